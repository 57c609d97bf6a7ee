"""Draws of distributions as functions of noise, which comes in from outside: the same noise, the same draw."""

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch import distributions as td

from pyro_vae.errors import RunError
from pyro_vae.infer.scales import base_of
from pyro_vae.parts import distributions as own

KINDS = {"normal": "independent, standard normal", "uniform": "independent, uniform between 0 and 1"}
"""Of noise."""


class NotExportable(RunError):
    """What cannot be written as a program of tensors, in one line that names it."""


class Noise:
    """Numbers to draw with, taken in turn from the columns of ``normal`` and ``uniform``, shape ``(B, n)`` each.

    Without these it draws them itself, for ``size`` rows, and remembers them: so it is found how many are needed.

    Attributes:
        taken: what was used so far, by kind.
    """

    def __init__(self, size: int, **given: Tensor):
        self.size, self.given = size, given
        self.taken: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, ``(B, *shape)``."""
        return self._next("normal", shape)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers uniform in (0, 1), ``(B, *shape)``."""
        return self._next("uniform", shape).clamp(1e-7, 1 - 1e-7)

    def _next(self, kind: str, shape: tuple[int, ...]) -> Tensor:
        count = math.prod(shape)
        if self.given:
            first = sum(each.shape[1] for each in self.taken[kind])
            found = self.given[kind][:, first : first + count]
        else:
            found = torch.randn(self.size, count) if kind == "normal" else torch.rand(self.size, count)
        self.taken[kind].append(found)
        return found.reshape(found.shape[0], *shape)

    def whole(self) -> dict[str, Tensor]:
        """All that was taken, ``(B, n)`` by kind; without kinds of which nothing was."""
        return {kind: torch.cat(parts, 1) for kind, parts in self.taken.items() if parts}


def drawn(made: Any, noise: Noise) -> Tensor:
    """A draw of a distribution with batch shape ``(B,)``, or ``(B, X)`` inside: a function of its parameters and noise.

    Raises:
        NotExportable: naming a distribution whose draws are no such function.
    """
    made = base_of(made)
    return _DRAWS.get(type(made), _icdf)(made, noise)  # of this very class: one that is derived may draw otherwise


def place_of(probs: Tensor, u: Tensor) -> Tensor:
    """Of each row of probabilities ``(*, C)`` the place that ``u``, shape ``(*)``, falls on."""
    return (probs.cumsum(-1) <= u.unsqueeze(-1)).sum(-1).clamp(max=probs.shape[-1] - 1)


class _Shared(Noise):
    """Noise that all components of a mixture share, along dimension ``at`` of what they ask for: one draw is taken."""

    def __init__(self, noise: Noise, at: int):
        super().__init__(0)
        self.noise, self.at = noise, at

    def _next(self, kind: str, shape: tuple[int, ...]) -> Tensor:
        found = self.noise._next(kind, (*shape[: self.at], *shape[self.at + 1 :]))
        return found.unsqueeze(self.at + 1).expand(found.shape[0], *shape)


def _icdf(made: Any, noise: Noise) -> Tensor:
    """By the inverse of its distribution function, if that is the class's own: one of a base class may be another's."""
    kind = type(made)
    of_torch = kind.__module__.startswith(("torch.", "pyro."))
    if (of_torch or "icdf" in vars(kind)) and not made.event_shape:
        try:
            return made.icdf(noise.uniform(*made.batch_shape[1:]))
        except NotImplementedError:
            pass
    raise NotExportable(f"draws of {kind.__name__} are no function of a fixed number of random numbers")


def _normal(made: Any, noise: Noise) -> Tensor:
    return made.loc + made.scale * noise.normal(*made.batch_shape[1:])


def _full_rank(made: Any, noise: Noise) -> Tensor:
    eps = noise.normal(*made.batch_shape[1:], *made.event_shape)
    return made.loc + (made._unbroadcasted_scale_tril @ eps.unsqueeze(-1)).squeeze(-1)


def _low_rank(made: Any, noise: Noise) -> Tensor:
    factor, diagonal = made._unbroadcasted_cov_factor, made._unbroadcasted_cov_diag
    first = noise.normal(*made.batch_shape[1:], factor.shape[-1])
    second = noise.normal(*made.batch_shape[1:], *made.event_shape)
    return made.loc + (factor @ first.unsqueeze(-1)).squeeze(-1) + diagonal.sqrt() * second


def _flow(made: Any, noise: Noise) -> Tensor:
    """As ``FlowDistribution.rsample``; the flow's base is a standard normal."""
    eps = noise.normal(*made.batch_shape[1:], *made.event_shape)
    flow = made.flow() if made.context is None else made.flow(made.context.expand(*made.batch_shape, -1))
    z = flow.transform.inv(eps)
    return z if made.loc is None else made.loc + made.log_scale.exp() * z


def _student_t(made: Any, noise: Noise) -> Tensor:
    """By two uniform numbers (Bailey 1994, "Polar generation of random variates with the t-distribution")."""
    first, second = noise.uniform(*made.batch_shape[1:]), noise.uniform(*made.batch_shape[1:])
    radius = (made.df * torch.expm1(-2 / made.df * first.log())).sqrt()
    return made.loc + made.scale * radius * torch.cos(2 * math.pi * second)


def _transformed(made: Any, noise: Noise) -> Tensor:
    value = drawn(made.base_dist, noise)
    for transform in made.transforms:
        value = transform(value)
    return value


def _mixture(made: Any, noise: Noise) -> Tensor:
    along = len(made.batch_shape)
    place = place_of(made.mixture_distribution.probs, noise.uniform(*made.batch_shape[1:]))
    draws = drawn(made.component_distribution, _Shared(noise, along - 1))  # (*batch, C, *event)
    place = place.reshape(*place.shape, *[1] * (draws.dim() - along))
    return draws.gather(along, place.expand(*draws.shape[:along], 1, *draws.shape[along + 1 :])).squeeze(along)


def _bernoulli(made: Any, noise: Noise) -> Tensor:
    probs = made.probs
    return torch.where(probs.isnan(), torch.nan, (noise.uniform(*made.batch_shape[1:]) < probs).to(probs.dtype))


def _categorical(made: Any, noise: Noise) -> Tensor:
    place = place_of(made.probs, noise.uniform(*made.batch_shape[1:])).to(made.probs.dtype)
    return torch.where(made.probs.isnan().any(-1), torch.nan, place)  # and no silent zero


def _scaled(made: Any, noise: Noise) -> Tensor:
    return made.loc + made.scale * drawn(made.base, noise)


def _columns(made: Any, noise: Noise) -> Tensor:
    return made.join([drawn(part, noise) for part in made.parts])


_DRAWS: dict[type, Callable[[Any, Noise], Tensor]] = {
    own.FlowDistribution: _flow,
    own.WholeNumbers: _categorical,
    own.Scaled: _scaled,
    own.Columns: _columns,
}
for _module in (dist, td):
    _DRAWS |= {
        _module.Normal: _normal,
        _module.MultivariateNormal: _full_rank,
        _module.LowRankMultivariateNormal: _low_rank,
        _module.StudentT: _student_t,
        _module.LogNormal: _transformed,
        _module.TransformedDistribution: _transformed,
        _module.MixtureSameFamily: _mixture,
        _module.Bernoulli: _bernoulli,
        _module.Categorical: _categorical,
    }
