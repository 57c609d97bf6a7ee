"""All latent variables of a program as one vector of real numbers: what estimators that move through them need."""

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions import ImproperUniform, MaskedDistribution, constraints
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor
from torch.distributions import Independent, Transform, biject_to
from torch.distributions.constraints import MixtureSameFamilyConstraint
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_vae.errors import ContractError
from pyro_vae.infer.gaussianize import Affine, Map, gaussianize
from pyro_vae.infer.programs import (
    Program,
    added,
    latent_sites,
    particle_trace,
    sample_sites,
    site_of,
    traces,
    unvalidated,
)
from pyro_vae.infer.trees import Data, data_size, select


class Latents:
    """The latent variables z of ``model`` for given data, as vectors u in R^D.

    u puts the sites one after the other, each mapped from its support to the whole space; log-densities are those of u,
    so they count ``log |dz / du|``. A mask on a latent site is not applied: where the masked part bears on nothing
    else it integrates to one, as it should. The part of an ``obs_mask`` site that was not seen is no latent variable if
    the guide lacks it.

    Args:
        model, guide, data: see :func:`pyro_vae.traces`.
        gaussian: take coordinates in which p(u) is N(0, 1), up to interpolation (:func:`.gaussianize`), where a site
            is made of independent numbers whose distribution depends on no other latent site and on no datum, as far as
            a few draws and data show; the others stay. Densities are exact either way. The coordinates are those of
            ``data``, also after :meth:`of`: two objects made of different data may have different ones.

    Attributes:
        dim: D.
        like: a number of the type, and on the device, of u.
        normal: which entries of u have p(u) = N(0, 1), given all others, up to interpolation: booleans ``(D,)``, all
            False unless ``gaussian``.
        standard: whether they all have.

    Raises:
        ContractError: as :func:`pyro_vae.traces`, and if a latent site is discrete.
    """

    def __init__(self, model: Program, guide: Program, data: Data, gaussian: bool = False):
        self.model, self.guide, self.data = model, guide, data
        self._places: dict[str, tuple[slice, torch.Size]] = {}
        self.dim = 0
        with torch.no_grad(), pyro.validation_enabled(False):
            trace, _ = traces(model, guide, select(data, slice(1)), 1)
        for name in latent_sites(trace):
            site = site_of(trace, name)
            if innermost(site["fn"].support).is_discrete:
                raise ContractError(
                    f"site '{name}' is discrete, on {site['fn'].support}, so that its log-density has no gradient "
                    "to follow: use importance_sampling from the guide, or enumeration if it has few values"
                )
            # of the whole value: bounds may depend on x or on another site
            shape = into_support(site["fn"].support).inverse_shape(site["value"].shape)[2:]
            end = self.dim + math.prod(shape)
            self._places[name] = (slice(self.dim, end), shape)
            self.dim = end
        if not self._places:
            raise ContractError("the program has no latent site: its log p(x) is that of its observed sites")
        self._observed = [name for name in sample_sites(trace) if name not in self._places]
        self._improper = [name for name in self._places if _is_improper(site_of(trace, name)["fn"])]
        self._maps: dict[str, Map] = {}
        self.like = self._read(trace).new_zeros(())
        self.standard = False
        self.normal = torch.zeros(self.dim, dtype=torch.bool, device=self.like.device)
        if gaussian:
            self._gaussianize()

    def _gaussianize(self) -> None:
        """Map the sites that allow it to standard normal coordinates."""
        few = select(self.data, slice(None, None, max(1, data_size(self.data) // 16)))
        with torch.no_grad(), pyro.validation_enabled(False), own_draws(self.like.is_cuda):
            one, _ = traces(self.model, self.guide, select(self.data, slice(1)), 1)
            some, _ = traces(self.model, self.guide, few, 3)
            maps = {
                name: gaussian_map(site_of(one, name)["fn"], site_of(some, name)["fn"], shape, self.like)
                for name, (_, shape) in self._places.items()
            }
        for name, (where, _) in self._places.items():
            each = maps[name]
            self.normal[where] = each is not None and each.misfit < 0.01
        self.standard = bool(self.normal.all())
        self._maps = {
            name: each
            for name, each in maps.items()
            if not (each is None or (isinstance(each, Affine) and each.is_identity))
        }

    @property
    def latent_names(self) -> list[str]:
        """The latent sites."""
        return list(self._places)

    @property
    def observed_names(self) -> list[str]:
        """The observed sites."""
        return list(self._observed)

    @property
    def size(self) -> int:
        """B, the number of data."""
        return data_size(self.data)

    def log_joint(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """log p(u) and log p(x | u), whose sum is log p(x, u): ``(K, B, D) -> (K, B)`` each, in nats."""
        return self._split(*self._run_model(u))

    def log_guide(self, u: Tensor) -> Tensor:
        """log q(u | x): ``(K, B, D) -> (K, B)``, in nats."""
        return self._score_guide(*self._run_model(u))

    def log_joint_and_guide(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log p(u), log p(x | u) and log q(u | x), for which z is decoded but once."""
        run = self._run_model(u)
        return *self._split(*run), self._score_guide(*run)

    def trace_at(self, u: Tensor) -> poutine.Trace:
        """The model's trace at u ``(K, B, D)``, inside a plate of K particles at dimension -2."""
        return self._run_model(u)[0]

    def sample_guide(self, num_samples: int) -> Tensor:
        """Draws of u ~ q(u | x), shape ``(K, B, D)``, without gradients."""
        with torch.no_grad(), pyro.validation_enabled(False):
            guide_trace = particle_trace(self.guide, self.data, num_samples)
            return self._read(particle_trace(poutine.replay(self.model, trace=guide_trace), self.data, num_samples))

    def sample_prior(self, num_samples: int) -> Tensor:
        """Draws of u ~ p(u), shape ``(K, B, D)``, without gradients; p(u | c) where there are conditions c."""
        with torch.no_grad(), pyro.validation_enabled(False):
            # what is observed stays: a latent variable after it in the program may depend on it
            return self._read(particle_trace(self.model, self.data, num_samples))

    def prior_draws(self, num_samples: int) -> Tensor:
        """Draws of u from the priors of a few of the data together, shape ``(K, D)``: where u lies, and how widely."""
        few = self.select(slice(16))
        rows = data_size(few.data)
        return few.sample_prior(-(-num_samples // rows)).flatten(0, 1)[:num_samples]

    def simulate(self) -> tuple[Data, Tensor]:
        """Draws of (x, u) from the model, one for each datum and given its conditions: the data, and u, ``(B, D)``.

        u is then an exact draw from the posterior of x.

        Raises:
            ContractError: if an observed site holds no whole tensor of the data, whose place its draws could take, or
                if it depends on what another one observes through the data, and not through the value of its site;
                or if nothing can be drawn, as with parameters of NaN.
        """
        for name, (where, _) in self._places.items():
            if name in self._improper:
                raise ContractError(
                    f"site '{name}' has an improper prior, of {where.stop - where.start} numbers, from "
                    "which nothing can be drawn: give it a distribution"
                )
        leaves, spec = tree_flatten(self.data)
        leaves = [leaf.clone() for leaf in leaves]  # each in a place of its own, so that equal ones are told apart
        with torch.no_grad(), pyro.validation_enabled(False):
            given = particle_trace(self.model, tree_unflatten(leaves, spec), 1)
            try:
                with _Unobserved():
                    trace = particle_trace(self.model, self.data, 1)
            except RuntimeError as error:  # as torch says of probabilities that are NaN
                raise ContractError(f"no data can be drawn from the model: {str(error).splitlines()[0]}") from error
            trace.compute_log_prob()
        drawn = list(leaves)
        for name in self._observed:
            place = self._leaf_of(name, site_of(given, name)["value"], leaves)
            leaf, value = leaves[place], site_of(trace, name)["value"][0]
            if drawn[place] is not leaf:
                raise ContractError(f"site '{name}' observes a tensor of the data that another site observes too")
            value = value.expand(len(leaf), *value.shape[1:]).to(leaf.dtype).reshape(leaf.shape)
            drawn[place] = torch.where(leaf.isnan(), leaf, value)  # what nobody saw stays so
        data, u = tree_unflatten(drawn, spec), self._read(trace)
        self._check_simulated(self.of(data)._run_model(u)[0], trace)
        return data, u[0]

    def _leaf_of(self, name: str, value: Tensor, leaves: list[Tensor]) -> int:
        """The place of the tensor that an observed site holds."""
        equal = [
            place
            for place, leaf in enumerate(leaves)
            if value.numel() == leaf.numel() and ((value.reshape(leaf.shape).to(leaf) == leaf) | leaf.isnan()).all()
        ]
        same = [place for place in equal if leaves[place].data_ptr() == value.data_ptr()]
        if len(same or equal) == 1:
            return (same or equal)[0]
        if equal:
            raise ContractError(
                f"site '{name}' observes one of several tensors of the data that are equal, which cannot be told "
                "apart: observe it as it is, or give data that differ"
            )
        raise ContractError(
            f"site '{name}' observes no whole tensor of the data, so that no draw can stand in for it: pass what it "
            "observes as a tensor of its own"
        )

    def _check_simulated(self, again: poutine.Trace, drawn: poutine.Trace) -> None:
        """Refuse programs that give simulated data another density than that they were drawn with."""
        for name in [*self._places, *self._observed]:
            found, wanted = (site_of(trace, name)["log_prob"].double().nan_to_num() for trace in (again, drawn))
            if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-2):
                raise ContractError(
                    f"site '{name}' depends on what the model observes through the data that it is called with, so "
                    "that no data can be drawn: use the value that pyro.sample returns where it observes them"
                )

    def site_at(self, coordinate: int) -> str:
        """The site that a coordinate of u belongs to."""
        return next(name for name, place in self._places.items() if coordinate < place[0].stop)

    def of(self, data: Data) -> "Latents":
        """The same for other data."""
        other = object.__new__(Latents)
        other.__dict__.update(self.__dict__, data=data)
        return other

    def select(self, among: Any) -> "Latents":
        """The same for some of the data: a slice, or places ``(n,)``."""
        return self.of(select(self.data, among))

    def _run_model(self, u: Tensor) -> tuple[poutine.Trace, "_Place"]:
        with pyro.validation_enabled(False), _Place(self._places, self._maps, u) as place:
            trace = unvalidated(particle_trace(self.model, self.data, u.shape[0]))
            trace.compute_log_prob(lambda name, site: name in self._places or name in self._observed)
        return trace, place

    def _split(self, trace: poutine.Trace, place: "_Place") -> tuple[Tensor, Tensor]:
        log_prior = added(unmasked_log_prob(site_of(trace, name)) for name in self._places) + place.log_det
        return log_prior, added(site_of(trace, name)["log_prob"] for name in self._observed)

    def _score_guide(self, trace: poutine.Trace, place: "_Place") -> Tensor:
        values = {name: site_of(trace, name)["value"] for name in self._places}
        with pyro.validation_enabled(False):
            trace = unvalidated(particle_trace(poutine.condition(self.guide, data=values), self.data, place.u.shape[0]))
            trace.compute_log_prob()
        return added(unmasked_log_prob(site_of(trace, name)) for name in self._places) + place.log_det

    def _read(self, trace: poutine.Trace) -> Tensor:
        parts = []
        for name in self._places:
            site = site_of(trace, name)
            value: Any = into_support(site["fn"].support).inv(site["value"])
            if name in self._maps:
                value = self._maps[name].inverse(value)
            parts.append(value.flatten(2) if value.dim() > 2 else value.unsqueeze(-1))
        return torch.cat(parts, -1)


@contextlib.contextmanager
def own_draws(on_gpu: bool) -> Iterator[None]:
    """The same random numbers each time, while those of others go on as if none had been drawn."""
    with torch.random.fork_rng(range(torch.cuda.device_count()) if on_gpu else ()):
        torch.default_generator.manual_seed(0)
        if on_gpu:
            torch.cuda.manual_seed_all(0)
        yield


class _Place(Messenger):
    """Puts a vector u where a program would draw its latent sites, and adds up log |dz / du|."""

    def __init__(self, places: dict[str, tuple[slice, torch.Size]], maps: dict[str, Map], u: Tensor):
        super().__init__()
        self.places, self.maps, self.u = places, maps, u
        self.log_det = u.new_zeros(())

    def _pyro_sample(self, msg) -> None:
        if msg["name"] not in self.places:
            return
        where, shape = self.places[msg["name"]]
        value = self.u[..., where].reshape(*self.u.shape[:2], *shape)
        if msg["name"] in self.maps:
            value, log_slope = self.maps[msg["name"]](value)
            self._add(log_slope)
        if not is_whole_space(msg["fn"].support):
            transform = into_support(msg["fn"].support)
            free, value = value, cast(Tensor, transform(value))
            self._add(transform.log_abs_det_jacobian(free, value))
            if msg["name"] in self.maps:
                value = within_type(value, msg["fn"].support)
        msg["value"] = value

    def _add(self, log_det: Tensor) -> None:
        self.log_det = self.log_det + cast(Tensor, sum_rightmost(log_det, log_det.dim() - 2))


class _Unobserved(UnconditionMessenger):
    """Draws what is observed, and leaves pyro.deterministic alone, which poutine.uncondition would take for it."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["infer"].get("_deterministic"):
            super()._pyro_sample(msg)


def gaussian_map(one: Any, some: Any, shape: torch.Size, like: Tensor) -> Map | None:
    """The map to v ~ N(0, 1) of a site's unconstrained values; None where there is none.

    There is one where the site is made of independent numbers, and their distribution is the same each time.

    Args:
        one: the distribution of the site, of batch shape (1, 1).
        some: the same in other traces, of any batch shape that broadcasts with (1, 1).
        shape: of the site's unconstrained value, without the batch.
        like: a tensor of the type, and on the device, of u.
    """
    one, some = (_numbers(_in_double(fn, {}), math.prod(shape)) for fn in (one, some))
    if one is None or some is None:
        return None

    def log_density(u: Tensor) -> Tensor:
        return _free_log_prob(one, u.reshape(-1, 1, 1, *shape)).reshape(u.shape)

    try:
        draws = cast(Tensor, into_support(one.support).inv(one.sample((257,))))
        draws = draws.reshape(257, *[1] * (3 + len(shape) - draws.dim()), *draws.shape[1:])
        draws = draws.double().expand(257, 1, 1, *shape)
        u = draws[:32]
        wanted, found = _free_log_prob(one, u), _free_log_prob(some, u)
    except (NotImplementedError, ValueError, RuntimeError):  # no draws, no density there, or it mixes types
        return None
    if not torch.allclose(found, wanted.expand_as(found), rtol=1e-5, atol=1e-5):
        return None
    if type(one).log_prob is torch.distributions.Normal.log_prob:
        return Affine(*(each.expand(1, 1, *shape)[0, 0].to(like).clone() for each in (one.loc, one.scale)))
    return gaussianize(log_density, draws.flatten(1), shape, like)


def _numbers(fn: Any, count: int) -> Any:
    """The distribution of each of ``count`` independent numbers, of no event dimension, or of the only one; or None."""
    fn = without_mask(fn)
    if count == 1:
        return fn
    while isinstance(fn, Independent | ExpandedDistribution | MaskedDistribution):
        fn = fn.base_dist
    return None if fn.event_shape else fn


def _free_log_prob(fn: Any, u: Tensor) -> Tensor:
    """The log-density of unconstrained numbers u ``(T, 1, 1, *shape)``, each by itself: ``(T, K, B, *shape)``."""
    transform = into_support(fn.support)
    batch = [*fn.batch_shape, *[1] * (u.dim() - 3 if fn.event_shape else 0)]
    u = u.expand(len(u), *torch.broadcast_shapes(u.shape[1:], batch))
    value = cast(Tensor, transform(u))
    log_prob = fn.log_prob(within_type(value, fn.support))
    log_det = transform.log_abs_det_jacobian(u, value)
    log_prob = log_prob + sum_rightmost(log_det, log_det.dim() - log_prob.dim())
    return log_prob.reshape(u.shape)


def _in_double(part: Any, made: dict[int, Any]) -> Any:
    """A distribution, or what one is made of, with parameters in double precision: some round values to their type."""
    if isinstance(part, Tensor):
        return part.double() if part.is_floating_point() else part
    if isinstance(part, list):
        return [_in_double(each, made) for each in part]
    if not isinstance(part, torch.distributions.Distribution | Transform):
        return part
    if id(part) not in made:
        made[id(part)] = copy.copy(part)
        inside = {name: _in_double(value, made) for name, value in vars(part).items()}
        made[id(part)].__dict__.update(inside)
    return made[id(part)]


def within_type(value: Tensor, support: Any) -> Tensor:
    """Positive numbers, none of them rounded to zero, where a density may be infinite; others as they are."""
    is_positive = innermost(support) in (constraints.positive, constraints.nonnegative)
    return value.clamp(min=torch.finfo(value.dtype).tiny) if is_positive else value


def without_mask(fn: Any) -> Any:
    """A distribution whose own mask, that of ``.mask()``, is taken off; the very same one if it has none."""
    if isinstance(fn, MaskedDistribution):
        return without_mask(fn.base_dist)
    if isinstance(fn, Independent) and (base := without_mask(fn.base_dist)) is not fn.base_dist:
        return Independent(base, fn.reinterpreted_batch_ndims)
    return fn


def unmasked_log_prob(site: dict[str, Any]) -> Tensor:
    """The log-probability of a site's value, of what is masked too."""
    fn = without_mask(site["fn"])
    return site["log_prob"] if site["mask"] is None and fn is site["fn"] else fn.log_prob(site["value"])


def _is_improper(fn: Any) -> bool:
    fn = without_mask(fn)
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return isinstance(fn, ImproperUniform)


def innermost(support: Any) -> constraints.Constraint:
    """The constraint of one number, inside those that put numbers together."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return support


def is_whole_space(support: constraints.Constraint | None) -> bool:
    """Whether a support is all of R^D."""
    return innermost(support) is constraints.real


def into_support(support: constraints.Constraint | None) -> Transform:
    """torch's bijection from R^D to a support, also for mixtures, which it does not know.

    Raises:
        NotImplementedError: if there is none, as for a discrete support.
    """
    return biject_to(_without_mixture(support))


def _without_mixture(support: Any) -> Any:
    if isinstance(support, MixtureSameFamilyConstraint):
        return _without_mixture(support.base_constraint)
    if isinstance(support, type(constraints.independent(constraints.real, 1))):
        return constraints.independent(_without_mixture(support.base_constraint), support.reinterpreted_batch_ndims)
    return support
