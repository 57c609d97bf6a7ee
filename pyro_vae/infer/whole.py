"""All latent variables of a program without a data plate as one vector: its datum is the whole data set."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Transform
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from pyro_vae.errors import ContractError
from pyro_vae.infer.checks import check_whole, seen_entries, unsteady
from pyro_vae.infer.gaussianize import Affine, Map
from pyro_vae.infer.programs import Program, added, latent_sites, sample_sites, site_of, unseen_sites, unvalidated
from pyro_vae.infer.scales import base_of, is_moved, is_normal, is_the_same, own_scale
from pyro_vae.infer.supports import (
    Latents,
    _Unobserved,
    gaussian_map,
    into_support,
    own_draws,
    unmasked_log_prob,
    within_type,
)
from pyro_vae.infer.trees import Data
from pyro_vae.infer.vectorized import NaNFactors, Vectorized

NUM_RUNS, NUM_TRIED = 5, 256
"""How often a program is run to see whether its sites stay, and how many draws may have no finite density."""


class _Site(NamedTuple):
    """Where a latent site lies in u, its shape there, and the type of its values."""

    where: slice
    shape: torch.Size
    dtype: torch.dtype


class WholeProgram(Latents):
    """The latent variables of a whole program, for all of its data, as one vector u in R^D.

    The program is any: Bayesian regression, a hierarchical model, a process with hyperparameters. It needs no plate of
    data and is written for one draw of its latent variables; K of them are run at once by :func:`torch.func.vmap`,
    or one after the other, with a warning, where that cannot be. ``log_joint`` splits log p(x, u) into the log-density
    of the latent sites and that of the observed sites, ``pyro.factor`` included. A mask on a latent site is not
    applied where the masked part bears on nothing else: it integrates to one. Parameters and modules are taken as they
    are.

    Args:
        model: p(x, z).
        args, kwargs: what the model, and the guide, are called with.
        guide: where the posterior is looked for: a program over the same sites, or one of Pyro's AutoGuides, trained,
            of which the Gaussian with the mean and the covariance of its draws of u is taken. None: the prior.
        centred: False: sites of a location and a scale (Normal, StudentT, Cauchy, Laplace, LogNormal,
            MultivariateNormal; of a scale: HalfNormal, HalfCauchy) are moved by them, z = loc + scale e, and e is their
            part of u. Where loc and scale are latent too, and the data say little of z, this takes the funnel out
            of the posterior (Papaspiliopoulos, Roberts & Skold 2007).
        gaussian: take coordinates in which p(u) is N(0, 1) where a site is made of independent numbers whose
            distribution depends on no other latent site, whatever ``centred`` is, see :class:`Latents`.

    Attributes:
        dim: D.
        like: a number of the type, and on the device, of u.
        data: the tensors among ``args`` and ``kwargs``, B times each; B is 1, or the number of rows in :meth:`select`.
        normal, standard: see :class:`Latents`.
        improper: the sites without a proper prior.
        is_hierarchical: whether some location or scale depends on another latent site, so that ``centred`` matters.

    Raises:
        ContractError: naming the site, if the program has no latent site, or none that is observed and no
            factor; if a latent site is discrete, or has no proper prior and there is no guide; if a plate is subsampled
            or a site scaled; if latent sites change from run to run, or differ from the guide's; if a site observes
            values outside its support, or more log-probabilities than values; if no draw tried has a finite
            density.
    """

    def __init__(
        self,
        model: Program,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        guide: Program | None = None,
        centred: bool = True,
        gaussian: bool = True,
    ):
        self.model, self.guide, self.centred = model, guide, centred
        self._leaves, self._spec = tree_flatten((args, dict(kwargs or {})))
        self.data: Any = [leaf.unsqueeze(0) for leaf in self._leaves if isinstance(leaf, Tensor)] or torch.zeros(1)
        self._guide_moments: list[Tensor] = []
        self._maps: dict[str, Map] = {}
        self._drawn: list[Tensor] = []
        if isinstance(guide, AutoGuide) and guide.prototype_trace is None:
            raise ContractError(
                f"the guide, {type(guide).__name__}, was never run and so never trained: train it first, or leave "
                "it out"
            )
        with torch.no_grad(), pyro.validation_enabled(False), NaNFactors():
            runs = [self._run() for _ in range(NUM_RUNS)]
            self._pinned = self._bear_on_nothing(runs[0])
            self._observed = check_whole(runs, self._pinned)
            names = [name for name in latent_sites(runs[0]) if name not in self._pinned]
            self.improper = [name for name in names if self._is_improper(runs[0], name)]
            if self.improper and guide is None:
                raise ContractError(_no_draws(self.improper[0]))
            self._places: dict[str, Any] = self._placed(runs[0], names)
            self.dim = max(place.where.stop for place in self._places.values())
            self.like = self._read(runs[0]).new_zeros(())
            if isinstance(self.data, Tensor):
                self.data = self.data.to(self.like.device)
            priors = runs if self.improper or guide is None else [_traced(model, *self._arguments) for _ in runs]
            self.normal = torch.zeros(self.dim, dtype=torch.bool, device=self.like.device)
            if gaussian:
                self._gaussianize_sites(priors)
            self.standard = bool(self.normal.all())
            self.is_hierarchical = any(_is_moved(priors, name) for name in names)
            values = [site_of(runs[0], name)["value"] for name in sample_sites(runs[0])]
            self._many = Vectorized(sum(each.numel() for each in [*values, *tree_flatten(self.data)[0]]))
            by_program = guide is not None and not isinstance(guide, AutoGuide)
            function = self._log_joint_and_guide if by_program else self._log_joint
            self._many.check(function, self._mapped(torch.stack([self._read(run) for run in runs[:2]])))
            self._check_densities()

    @property
    def batched(self) -> bool:
        """Whether many u are scored at once."""
        return self._many.at_once

    @property
    def rows(self) -> int:
        """How many u may be scored at once, with gradients, in about 128 MiB."""
        return max(1, self._many.at_a_time // 4)

    def log_joint(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """log p(u) and log p(x | u), whose sum is log p(x, u): ``(K, B, D) -> (K, B)`` each, in nats."""
        return self._each(self._log_joint, u)

    def log_guide(self, u: Tensor) -> Tensor:
        """log q(u): ``(K, B, D) -> (K, B)``, in nats; log p(u) without a guide."""
        return self.log_joint_and_guide(u)[2]

    def log_joint_and_guide(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log p(u), log p(x | u) and log q(u), for which the model is run but once."""
        if self.guide is None:
            log_prior, log_likelihood = self.log_joint(u)
            return log_prior, log_likelihood, log_prior
        if isinstance(self.guide, AutoGuide):
            loc, factor = self._moments()
            return *self.log_joint(u), dist.MultivariateNormal(loc, scale_tril=factor).log_prob(u)
        return self._each(self._log_joint_and_guide, u)

    def sample_prior(self, num_samples: int) -> Tensor:
        """Draws of u ~ p(u), shape ``(K, B, D)``, without gradients.

        Raises:
            ContractError: naming the site, if its prior is improper.
        """
        if self.improper:
            raise ContractError(_no_draws(self.improper[0]))
        return self._draws(lambda: self._read(_traced(self.model, *self._arguments)), num_samples)

    def sample_guide(self, num_samples: int) -> Tensor:
        """Draws of u ~ q(u), shape ``(K, B, D)``, without gradients; of p(u) without a guide."""
        if not isinstance(self.guide, AutoGuide):
            return self._draws(lambda: self._read(self._run()), num_samples)
        loc, factor = self._moments()
        return loc + torch.randn(num_samples, self.size, self.dim).to(self.like) @ factor.mT

    def prior_draws(self, num_samples: int) -> Tensor:
        """Draws of u ~ p(u), shape ``(K, D)``, the same again where each one takes long.

        Where a prior is improper, they are those of the guide, ten times as wide.
        """
        if self.improper:
            draws = self.select(slice(1)).sample_guide(num_samples).squeeze(1)
            return draws.mean(0) + 10 * (draws - draws.mean(0))
        if self._many.draws_at_once or not self._drawn or len(self._drawn[0]) < num_samples:
            self._drawn[:] = [self.select(slice(1)).sample_prior(num_samples).squeeze(1)]
        return self._drawn[0][:num_samples]

    def simulate(self) -> tuple[Data, Tensor]:
        """A draw of (x, u) from the model: the data, and u, ``(1, D)``, an exact draw from their posterior.

        Raises:
            ContractError: as :meth:`Latents.simulate`, and if a prior is improper or the model has a ``pyro.factor``.
        """
        if self.improper:
            raise ContractError(_no_draws(self.improper[0]))
        copy = self.of(
            tree_map(torch.clone, self.data)
        )  # each in a place of its own, so that equal ones are told apart
        leaves = [] if isinstance(copy.data, Tensor) else [leaf.squeeze(0) for leaf in copy.data]
        with torch.no_grad(), pyro.validation_enabled(False):
            given = _traced(self.model, *copy._arguments)
            with _Unobserved():
                trace = _traced(self.model, *self._arguments)
            trace.compute_log_prob()
            drawn = list(leaves)
            for name in self._observed:
                if isinstance(site_of(given, name)["fn"], dist.Unit):
                    raise ContractError(f"'{name}' is a pyro.factor, from which no data can be drawn")
                place = self._leaf_of(name, site_of(given, name)["value"], leaves)
                if drawn[place] is not leaves[place]:
                    raise ContractError(f"site '{name}' observes a tensor of the data that another site observes too")
                drawn[place] = site_of(trace, name)["value"].to(leaves[place].dtype).reshape(leaves[place].shape)
            other, u = self.of([leaf.unsqueeze(0) for leaf in drawn]), self._mapped(self._read(trace))
            self._check_simulated(other._scored(u)[0], trace)
        return other.data, u.unsqueeze(0)

    def of(self, data: Data) -> "WholeProgram":
        """The same for other data."""
        other = object.__new__(WholeProgram)
        other.__dict__.update(self.__dict__, data=data)
        return other

    def select(self, among: Any) -> "WholeProgram":
        """The same data as often as a slice, or places ``(n,)``, says."""
        rows = len(torch.arange(self.size)[among.cpu() if isinstance(among, Tensor) else among])
        return self.of(tree_map(lambda leaf: leaf[:1].expand(rows, *leaf.shape[1:]), self.data))

    @property
    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """args and kwargs, with the tensors of ``data`` in their places."""
        tensors = iter(() if isinstance(self.data, Tensor) else self.data)
        leaves = [next(tensors)[0] if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return tree_unflatten(leaves, self._spec)

    def _run(self) -> poutine.Trace:
        """The model, at a draw from the guide, or from the prior if there is none."""
        if self.guide is None:
            try:
                with _Drawable():
                    return _traced(self.model, *self._arguments)
            except ContractError as error:  # to which Pyro appends what it has traced
                raise ContractError(str(error).splitlines()[0]) from None
        given = _traced(self.guide, *self._arguments)
        run = _traced(poutine.replay(self.model, trace=given), *self._arguments)
        needed = set(latent_sites(run)) - set(unseen_sites(run))
        found = {name for name in sample_sites(given) if not site_of(given, name)["infer"].get("is_auxiliary")}
        if needed - found or found - set(latent_sites(run)):
            raise ContractError(
                f"model and guide must have the same latent sites, got {sorted(needed)} and {sorted(found)}: add "
                f"{sorted(needed ^ found)} to the other program, or take them out"
            )
        return run

    def _gaussianize_sites(self, runs: list[poutine.Trace]) -> None:
        """Map the sites that allow it to standard normal coordinates."""
        for name, place in self._places.items():
            fns = [site_of(run, name)["fn"] for run in runs]
            found = None
            if name not in self.improper and is_the_same(fns, [site_of(run, name)["value"] for run in runs]):
                with own_draws(self.like.is_cuda):
                    one, other = (fn.expand_by([1, 1]) for fn in fns[:2])
                    found = gaussian_map(one, other, place.shape, self.like)
            if found is not None and not (isinstance(found, Affine) and found.is_identity):
                self._maps[name] = found
            moved = not self.centred and is_normal(fns[0])
            self.normal[place.where] = moved if found is None else found.misfit < 0.01

    def _transform(self, name: str, fn: Any) -> Transform:
        """From part of u to the values of a site, but for what maps it to a Gaussian."""
        moved = None if self.centred or name in self._maps else own_scale(fn)
        return into_support(fn.support) if moved is None else moved

    def _placed(self, run: poutine.Trace, names: list[str]) -> dict[str, Any]:
        places: dict[str, Any] = {}
        end = 0
        for name in names:
            site = site_of(run, name)
            # of the whole value: bounds may depend on another site
            shape = self._transform(name, site["fn"]).inverse_shape(site["value"].shape)
            places[name] = _Site(slice(end, end + shape.numel()), shape, site["value"].dtype)
            end += shape.numel()
        return places

    def _read(self, trace: poutine.Trace) -> Tensor:
        """u of one run, ``(D,)``, but for what maps it to a Gaussian, which is quicker for many."""
        sites = ((name, site_of(trace, name)) for name in self._places)
        values: list[Any] = [self._transform(name, site["fn"]).inv(site["value"]) for name, site in sites]
        return torch.cat([value.reshape(-1) for value in values])

    def _mapped(self, u: Tensor) -> Tensor:
        """u of :meth:`_read`, ``(*, D)``, in Gaussian coordinates where there are some."""
        u = u.clone()
        for name, each in self._maps.items():
            where, shape, _ = self._places[name]
            u[..., where] = each.inverse(u[..., where].reshape(*u.shape[:-1], *shape)).reshape(u[..., where].shape)
        return u

    def _scored(self, u: Tensor) -> tuple[poutine.Trace, Tensor]:
        """The model at one u, ``(D,)``, its log-densities, and log |dz / du|."""
        with _Put(self, u) as put:
            trace = _traced(self.model, *self._arguments)
        if set(latent_sites(trace)) - set(self._pinned) != set(self._places):
            raise ContractError(unsteady(set(latent_sites(trace)) ^ set(self._places)))
        unvalidated(trace).compute_log_prob(lambda name, site: name in self._places or name in self._observed)
        return trace, put.log_det

    def _log_joint(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return self._split_one(*self._scored(u))

    def _split_one(self, trace: poutine.Trace, log_det: Tensor) -> tuple[Tensor, Tensor]:
        log_prior = log_det + added(self._density(site_of(trace, name)) for name in self._places)
        return log_prior, added(site_of(trace, name)["log_prob"].sum() for name in self._observed)

    def _density(self, site: Any) -> Tensor:
        """The log-density of a latent site; what is masked counts, but where the program means no other."""
        return (site["log_prob"] if site["name"] in self.improper else unmasked_log_prob(site)).sum()

    def _log_joint_and_guide(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        trace, log_det = self._scored(u)
        values = {name: site_of(trace, name)["value"] for name in [*self._places, *self._pinned]}
        guide = _traced(poutine.condition(cast(Program, self.guide), data=values), *self._arguments)
        guide.compute_log_prob()
        log_guide = log_det + added(unmasked_log_prob(site_of(guide, name)).sum() for name in self._places)
        return *self._split_one(trace, log_det), log_guide

    def _each(self, function: Callable[[Tensor], Any], u: Tensor) -> Any:
        """A function of one u, ``(D,)``, that gives numbers, of many: ``(K, B, D) -> (K, B)``."""
        with pyro.validation_enabled(False):
            return tree_map(lambda each: each.reshape(u.shape[:2]), self._many.each(function, u.flatten(0, 1)))

    def _draws(self, draw: Callable[[], Tensor], num_samples: int) -> Tensor:
        """Independent results of a function that draws, ``(D,)`` each: ``(K, B, D)``."""
        with pyro.validation_enabled(False):
            drawn = self._mapped(self._many.draws(draw, self.like, num_samples * self.size))
        return drawn.reshape(num_samples, self.size, self.dim)

    def _moments(self) -> list[Tensor]:
        """Mean ``(D,)`` of an automatic guide's draws of u, and a factor ``(D, D)`` of their covariance.

        A guide that is a point gets a tenth of the prior's width.
        """
        if not self._guide_moments:
            some = self.select(slice(1))
            draws = some._draws(lambda: some._read(some._run()), max(1000, 20 * self.dim)).squeeze(1).double()
            low, high = torch.zeros_like(draws[0]), torch.ones_like(draws[0])
            if not self.improper:
                low, high = self.prior_draws(1000).double().quantile(draws.new_tensor([0.16, 0.84]), dim=0)
            point = draws.std(0) < 1e-3 * (high - low) / 2
            draws = draws + 0.05 * torch.where(point, high - low, 0) * torch.randn_like(draws)
            covariance = draws.T.cov().reshape(self.dim, self.dim)
            self._guide_moments += [draws.mean(0).to(self.like), torch.linalg.cholesky(covariance).to(self.like)]
        return self._guide_moments

    def _bear_on_nothing(self, run: poutine.Trace) -> dict[str, Tensor]:
        """The unseen parts of sites with an ``obs_mask`` on which nothing else depends: they integrate to one."""
        if not (unseen := unseen_sites(run)):
            return {}
        values = {name: site_of(run, name)["value"] for name in latent_sites(run)}
        others = {name: value for name, value in values.items() if name not in unseen}
        again = _traced(poutine.condition(self.model, data=others), *self._arguments)
        for trace in (run, again):
            trace.compute_log_prob()
        for name in sample_sites(run):
            a, b = (site_of(trace, name)["log_prob"] for trace in (run, again))
            if name not in unseen and not torch.equal(a.nan_to_num(), b.nan_to_num()):
                return {}
        return {name: values[name] for name in unseen}

    def _is_improper(self, run: poutine.Trace, name: str) -> bool:
        """Whether others depend on a masked part of a latent site, which so has a flat prior."""
        site = site_of(run, name)
        if isinstance(base_of(site["fn"]), dist.ImproperUniform):
            return True
        if (seen := seen_entries(site)).all():
            return False
        values = {each: site_of(run, each)["value"] for each in latent_sites(run)}
        values[name] = leaf = values[name].detach().requires_grad_()
        with torch.enable_grad():
            trace = _traced(poutine.condition(self.model, data=values), *self._arguments)
            trace.compute_log_prob()
            scored = (each for each in sample_sites(trace) if each not in self._pinned)
            total = added(site_of(trace, each)["log_prob"].sum() for each in scored)
            if not total.requires_grad:
                return False
            (gradient,) = torch.autograd.grad(total, leaf, allow_unused=True)
        return gradient is not None and bool((gradient.ne(0) & ~seen).any())

    def _check_densities(self) -> None:
        """Refuse a site that has no finite density wherever it is tried."""

        def densities(u: Tensor) -> dict[str, Tensor]:
            trace, _ = self._scored(u)
            found = {name: self._density(site_of(trace, name)) for name in self._places}
            return found | {name: site_of(trace, name)["log_prob"].sum() for name in self._observed}

        tried = self.prior_draws(NUM_TRIED).unsqueeze(1) if self.guide is None else self.sample_guide(NUM_TRIED)
        finite = {name: each.isfinite() for name, each in self._each(densities, tried).items()}
        if not torch.stack(list(finite.values())).all(0).any():
            name = min(finite, key=lambda name: finite[name].sum().item())
            whose = "the prior" if self.guide is None else "the guide"
            raise ContractError(
                f"site '{name}' has a finite log-density at {finite[name].sum()} of {NUM_TRIED} draws from {whose}, "
                "and all sites together at none: look at its support and at its data, or pass a guide whose draws "
                "are possible"
            )


def _is_moved(runs: list[poutine.Trace], name: str) -> bool:
    return is_moved([site_of(run, name)["fn"] for run in runs], site_of(runs[0], name)["value"])


def _traced(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> poutine.Trace:
    """One run of a program, without the sites that plates make."""
    return prune_subsample_sites(poutine.trace(program).get_trace(*args, **kwargs))


class _Put(Messenger):
    """Puts one vector u where a program would draw its latent sites, and adds up log |dz / du|."""

    def __init__(self, program: WholeProgram, u: Tensor):
        super().__init__()
        self.program, self.u = program, u
        self.log_det = u.new_zeros(())

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            return
        if (name := msg["name"]) in self.program._pinned:
            msg["value"] = self.program._pinned[name]
        elif name in self.program._places:
            where, shape, dtype = self.program._places[name]
            free, log_slope = self.u[where].reshape(shape), None
            if name in self.program._maps:
                free, log_slope = self.program._maps[name](free)
                self.log_det = self.log_det + log_slope.sum()
            transform = self.program._transform(name, msg["fn"])
            value = cast(Tensor, transform(free := free.to(dtype)))
            self.log_det = self.log_det + transform.log_abs_det_jacobian(free, value).sum()
            msg["value"] = value if log_slope is None else within_type(value, msg["fn"].support)


class _Drawable(Messenger):
    """Names a site of whose prior no draw exists."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and isinstance(base_of(msg["fn"]), dist.ImproperUniform):
            raise ContractError(_no_draws(msg["name"]))


def _no_draws(name: str) -> str:
    return (
        f"site '{name}' is improper, its prior constant: nothing can be drawn from it, and log Z is known up to a "
        "constant alone, so that no other model can be compared with it: give it a proper prior"
    )
