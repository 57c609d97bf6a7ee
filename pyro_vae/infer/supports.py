"""All latent variables of a program as one vector of real numbers: what estimators that move through them need."""

import math
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution, constraints
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor
from torch.distributions import Independent, Transform, biject_to
from torch.distributions.constraints import MixtureSameFamilyConstraint
from torch.utils._pytree import tree_flatten, tree_unflatten

from pyro_vae.errors import ContractError
from pyro_vae.infer.programs import Program, added, latent_sites, particle_trace, sample_sites, site_of, traces
from pyro_vae.infer.trees import Data, data_size, select


class Latents:
    """The latent variables z of ``model`` for given data, as vectors u in R^D.

    u puts the sites one after the other, each mapped from its support to the whole space; log-densities are those of u,
    so they count ``log |dz / du|``. A mask on a latent site is not applied: where the masked part bears on nothing
    else it integrates to one, as it should. The part of an ``obs_mask`` site that was not seen is no latent variable if
    the guide lacks it.

    Args:
        model, guide, data: see :func:`pyro_vae.traces`.

    Attributes:
        dim: D.
        like: a number of the type, and on the device, of u.

    Raises:
        ContractError: as :func:`pyro_vae.traces`, and if a latent site is discrete.
    """

    def __init__(self, model: Program, guide: Program, data: Data):
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
        self._observed = [name for name in sample_sites(trace) if name not in self._places]
        self.like = self._read(trace).new_zeros(())

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
                if it depends on what another one observes through the data, and not through the value of its site.
        """
        leaves, spec = tree_flatten(self.data)
        leaves = [leaf.clone() for leaf in leaves]  # each in a place of its own, so that equal ones are told apart
        with torch.no_grad(), pyro.validation_enabled(False):
            given = particle_trace(self.model, tree_unflatten(leaves, spec), 1)
            with _Unobserved():
                trace = particle_trace(self.model, self.data, 1)
            trace.compute_log_prob()
        drawn = list(leaves)
        for name in self._observed:
            place = self._leaf_of(name, site_of(given, name)["value"], leaves)
            leaf, value = leaves[place], site_of(trace, name)["value"][0]
            if drawn[place] is not leaf:
                raise ContractError(f"site '{name}' observes a tensor of the data that another site observes too")
            drawn[place] = value.expand(len(leaf), *value.shape[1:]).to(leaf.dtype).reshape(leaf.shape)
        data, u = tree_unflatten(drawn, spec), self._read(trace)
        self._check_simulated(self.of(data)._run_model(u)[0], trace)
        return data, u[0]

    def _leaf_of(self, name: str, value: Tensor, leaves: list[Tensor]) -> int:
        """The place of the tensor that an observed site holds."""
        equal = [
            place
            for place, leaf in enumerate(leaves)
            if value.numel() == leaf.numel() and torch.equal(value.reshape(leaf.shape).to(leaf), leaf)
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
        return next(name for name, (where, _) in self._places.items() if where.start <= coordinate < where.stop)

    def of(self, data: Data) -> "Latents":
        """The same for other data."""
        other = object.__new__(Latents)
        other.__dict__.update(self.__dict__, data=data)
        return other

    def select(self, among: Any) -> "Latents":
        """The same for some of the data: a slice, or places ``(n,)``."""
        return self.of(select(self.data, among))

    def _run_model(self, u: Tensor) -> tuple[poutine.Trace, "_Place"]:
        with pyro.validation_enabled(False), _Place(self._places, u) as place:
            trace = particle_trace(self.model, self.data, u.shape[0])
            trace.compute_log_prob(lambda name, site: name in self._places or name in self._observed)
        return trace, place

    def _split(self, trace: poutine.Trace, place: "_Place") -> tuple[Tensor, Tensor]:
        log_prior = added(unmasked_log_prob(site_of(trace, name)) for name in self._places) + place.log_det
        return log_prior, added(site_of(trace, name)["log_prob"] for name in self._observed)

    def _score_guide(self, trace: poutine.Trace, place: "_Place") -> Tensor:
        values = {name: site_of(trace, name)["value"] for name in self._places}
        with pyro.validation_enabled(False):
            trace = particle_trace(poutine.condition(self.guide, data=values), self.data, place.u.shape[0])
            trace.compute_log_prob()
        return added(unmasked_log_prob(site_of(trace, name)) for name in self._places) + place.log_det

    def _read(self, trace: poutine.Trace) -> Tensor:
        parts = []
        for name in self._places:
            site = site_of(trace, name)
            value: Any = into_support(site["fn"].support).inv(site["value"])
            parts.append(value.flatten(2) if value.dim() > 2 else value.unsqueeze(-1))
        return torch.cat(parts, -1)


class _Place(Messenger):
    """Puts a vector u where a program would draw its latent sites, and adds up log |dz / du|."""

    def __init__(self, places: dict[str, tuple[slice, torch.Size]], u: Tensor):
        super().__init__()
        self.places, self.u = places, u
        self.log_det = u.new_zeros(())

    def _pyro_sample(self, msg) -> None:
        if msg["name"] not in self.places:
            return
        where, shape = self.places[msg["name"]]
        value = self.u[..., where].reshape(*self.u.shape[:2], *shape)
        if not is_whole_space(msg["fn"].support):
            transform = into_support(msg["fn"].support)
            free, value = value, transform(value)
            log_det = transform.log_abs_det_jacobian(free, value)
            self.log_det = self.log_det + cast(Tensor, sum_rightmost(log_det, log_det.dim() - 2))
        msg["value"] = value


class _Unobserved(UnconditionMessenger):
    """Draws what is observed, and leaves pyro.deterministic alone, which poutine.uncondition would take for it."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["infer"].get("_deterministic"):
            super()._pyro_sample(msg)


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
    return biject_to(support.base_constraint if isinstance(support, MixtureSameFamilyConstraint) else support)
