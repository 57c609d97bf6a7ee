"""All latent variables of a program as one vector of real numbers: what estimators that move through them need."""

import math
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Transform, biject_to
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
            return self._read(particle_trace(poutine.uncondition(self.model), self.data, num_samples))

    def prior_draws(self, num_samples: int) -> Tensor:
        """Draws of u from the priors of a few of the data together, shape ``(K, D)``: where u lies, and how widely."""
        few = self.select(slice(16))
        rows = data_size(few.data)
        return few.sample_prior(-(-num_samples // rows)).flatten(0, 1)[:num_samples]

    def simulate(self) -> tuple[Data, Tensor]:
        """Draws of (x, u) from the model, one for each datum and given its conditions: the data, and u, ``(B, D)``.

        u is then an exact draw from the posterior of x.

        Raises:
            ContractError: if an observed site holds no whole tensor of the data, whose place its draws could take.
        """
        with torch.no_grad(), pyro.validation_enabled(False):
            given = particle_trace(self.model, self.data, 1)
            trace = particle_trace(poutine.uncondition(self.model), self.data, 1)
        leaves, spec = tree_flatten(self.data)
        for name in self._observed:
            place = self._leaf_of(name, site_of(given, name)["value"], leaves)
            leaf = leaves[place]
            leaves[place] = site_of(trace, name)["value"][0].expand(len(leaf), *[-1] * (leaf.dim() - 1)).to(leaf.dtype)
            leaves[place] = leaves[place].reshape(leaf.shape)
        return tree_unflatten(leaves, spec), self._read(trace)[0]

    def _leaf_of(self, name: str, value: Tensor, leaves: list[Tensor]) -> int:
        """The place of the tensor that an observed site holds."""
        for place, leaf in enumerate(leaves):
            if value.numel() == leaf.numel() and torch.equal(value.reshape(leaf.shape).to(leaf), leaf):
                return place
        raise ContractError(
            f"site '{name}' observes no whole tensor of the data, so that no draw can stand in for it: pass what it "
            "observes as a tensor of its own"
        )

    def of(self, data: Data) -> "Latents":
        """The same for other data."""
        other = object.__new__(Latents)
        other.__dict__.update(self.__dict__, data=data)
        return other

    def select(self, among: slice) -> "Latents":
        """The same for some of the data."""
        return self.of(select(self.data, among))

    def _run_model(self, u: Tensor) -> tuple[poutine.Trace, "_Place"]:
        with pyro.validation_enabled(False), _Place(self._places, u) as place:
            trace = particle_trace(self.model, self.data, u.shape[0])
            trace.compute_log_prob(lambda name, site: name in self._places or name in self._observed)
        return trace, place

    def _split(self, trace: poutine.Trace, place: "_Place") -> tuple[Tensor, Tensor]:
        log_prior = added(self._unmasked(site_of(trace, name)) for name in self._places) + place.log_det
        return log_prior, added(site_of(trace, name)["log_prob"] for name in self._observed)

    def _score_guide(self, trace: poutine.Trace, place: "_Place") -> Tensor:
        values = {name: site_of(trace, name)["value"] for name in self._places}
        with pyro.validation_enabled(False):
            trace = particle_trace(poutine.condition(self.guide, data=values), self.data, place.u.shape[0])
            trace.compute_log_prob()
        return added(self._unmasked(site_of(trace, name)) for name in self._places) + place.log_det

    @staticmethod
    def _unmasked(site: dict) -> Tensor:
        return site["log_prob"] if site["mask"] is None else site["fn"].log_prob(site["value"])

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
