"""Draws of p(z | x) by long Hamiltonian chains, and whether the chains have converged."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_vae.errors import ContractError
from pyro_vae.infer.checks import check_part, check_program
from pyro_vae.infer.convergence import bulk_ess, split_rhat, tail_ess
from pyro_vae.infer.evidence.blocks import Blocks, Part, Work, joined, power_of_two
from pyro_vae.infer.evidence.chains import Path, State, anew
from pyro_vae.infer.evidence.importance import CHUNK, rows_per_chunk
from pyro_vae.infer.evidence.laplace import (
    Coordinates,
    cholesky,
    laplace_approximation,
    laplace_cost,
    observations_at_once,
    prior_location_and_width,
)
from pyro_vae.infer.evidence.opinion import check_start
from pyro_vae.infer.evidence.weights import reduce_log_weights
from pyro_vae.infer.programs import Program, added, evaluating, scoring
from pyro_vae.infer.supports import Latents
from pyro_vae.infer.trees import Data, data_size, split

RUN_AWAY = 3.0
"""Chains that stay further out than this, in units of the prior's width, are asked whether they run away."""
PRIOR_DRAWS = 1024
MANY_CHUNKS = 4
"""Chunks of observations from which on it is worth compiling for the first."""


@dataclass(frozen=True)
class PosteriorChains:
    """Long Hamiltonian chains of p(z | x), and when they count as converged.

    They start far apart, half of them from the prior, a quarter from the guide, the others from a Laplace approximation
    of twice the width, so that modes that few chains reach, and none leaves, show as a large R-hat.

    Args:
        num_chains: C, at least 4.
        num_warmup: transitions that adapt step sizes and coordinates of each datum, frozen after them; at least 20.
        num_draws: N, transitions of each chain that count, at least 8.
        num_leapfrogs: gradient steps of a transition, at least 1.
        target_acceptance: of the adapted step sizes, in (0, 1).
        max_rhat: the largest rank-normalized split R-hat of any coordinate, and of log p(x, z), above 1.
        min_ess: the smallest effective sample size of their middle and their tails, positive.

    Raises:
        ValueError: if a setting is out of range.
    """

    num_chains: int = 16
    num_warmup: int = 300
    num_draws: int = 500
    num_leapfrogs: int = 4
    target_acceptance: float = 0.8
    max_rhat: float = 1.02
    min_ess: float = 400

    def __post_init__(self):
        for name, bound in {"num_chains": 4, "num_warmup": 20, "num_draws": 8, "num_leapfrogs": 1}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < bound:
                raise ValueError(f"{name} must be a whole number of at least {bound}, got {value}")
        if not 0 < self.target_acceptance < 1:
            raise ValueError(f"target_acceptance must be between 0 and 1, got {self.target_acceptance}")
        if not 1 < self.max_rhat < math.inf:
            raise ValueError(f"max_rhat must be above 1, got {self.max_rhat}")
        if not 0 < self.min_ess < math.inf:
            raise ValueError(f"min_ess must be positive, got {self.min_ess}")

    @property
    def longest_step(self) -> float:
        """A quarter of a standard normal's period in all, after which a trajectory has forgotten where it began."""
        return math.pi / 2 / self.num_leapfrogs


class Posterior(NamedTuple):
    """Draws of p(z | x) of B observations.

    Attributes:
        e: draws in whitened coordinates, shape ``(N, C, B, D)``.
        log_joint: log p(x, e) of them, shape ``(N, C, B)``.
        coordinates: those of e.
        rhat: the largest rank-normalized split R-hat of any coordinate and of log p(x, e), shape ``(B,)``.
        ess: the smallest effective sample size of middle and tails of any of them, shape ``(B,)``.
        acceptance: of the transitions, shape ``(B,)``.
        converged: whether both are as the settings ask, shape ``(B,)``.
        evaluations: of the model for each datum, a gradient counting as two.
    """

    e: Tensor
    log_joint: Tensor
    coordinates: Coordinates
    rhat: Tensor
    ess: Tensor
    acceptance: Tensor
    converged: Tensor
    evaluations: int


def by_blocks(
    model: Program,
    guide: Program,
    data: Data,
    tools: Callable[[Latents, int], Iterable[Callable[..., Any]]],
    estimate: Callable[..., Part],
    num_chains: int,
    memory: int | None,
    progress: bool,
    description: str,
    work: Work | None,
    draws: int = 0,
) -> tuple[Part, int, Blocks]:
    """What ``estimate`` says of as many observations at a time as a chunk holds, for all of them.

    Args:
        tools: functions that chunks have in common, for all data, and for chunks of a size, or 0 where there are few.
        estimate: of the latent variables of some observations, and of the tools.
        num_chains: of each observation.
        draws: how many draws of each chain are kept.
        model, guide, data, memory, progress, work: see :func:`pyro_vae.importance_sampling`.

    Returns:
        The tensors, whose first dimension is the datum, and whether prior and guide draw nothing whose density is NaN,
        ``known``; how many z a chunk holds; and the blocks, for further stages.
    """
    with scoring(model, guide):
        blocks = Blocks(data, work)
        with blocks.apart("checks"):
            check_program(model, guide, next(split(data, 1000)))
            rows = rows_per_chunk(model, guide, data, memory)
            latents = Latents(model, guide, data, gaussian=True)
    size = observations_at_once(rows // 3 // num_chains, latents.dim)  # a gradient keeps what a forward pass would drop
    if draws:
        kept = 4 * draws * num_chains * latents.dim * latents.like.element_size()  # with what is made of them
        size = min(size, CHUNK["cuda" if latents.like.is_cuda else "cpu"] // kept)
    size = power_of_two(size)

    def do(at: slice) -> Part:
        found = []
        for first in range(at.start, at.stop, size):
            some = latents.select(slice(first, min(first + size, at.stop)))
            check_part(model, guide, some.data, False, first)
            known = check_start(some, first)
            found.append(estimate(some, *map(anew, made)) | {"known": known})
        return joined(found)

    parts, bar = [], tqdm(total=data_size(data), disable=not progress, unit="datum", desc=description)
    with bar, evaluating(model, guide):
        made = tuple(tools(latents, size if latents.size > MANY_CHUNKS * size else 0))
        for part in blocks.of("estimate", latents.size, do, max(blocks.size // 4, min(size, blocks.size))):
            parts.append(part)
            bar.update(len(next(iter(part.values()))))
    return joined(parts), rows, blocks


def posterior_chains(latents: Latents, settings: PosteriorChains, evaluate: Callable) -> Posterior:
    """Draws of each p(z | x) by :class:`PosteriorChains`.

    Args:
        latents: those of the observations.
        settings: of the chains.
        evaluate: of :func:`pyro_vae.infer.evidence.chains.evaluator`, with a normal start.

    Raises:
        ContractError: if chains run away, as they do where log p(x) diverges.
    """
    path = Path(latents, laplace_approximation(latents), "normal", settings.num_leapfrogs, evaluate)
    spent = laplace_cost(latents.dim)
    state = path.evaluate(_dispersed_starts(path, settings.num_chains))
    one = torch.ones((), dtype=state.e.dtype, device=state.e.device)
    half = settings.num_warmup // 2
    seen, state, step = _settle(path, state, one, half, settings)
    coordinates, moved = _whitened_again(path.coordinates, seen, state.e)
    spent += path.evaluations
    path = Path(latents, coordinates, "normal", settings.num_leapfrogs, evaluate)
    state, step = _adapt(path, path.evaluate(moved), one, settings.num_warmup - half, step, settings)
    e, log_joint, acceptances = [], [], []
    for _ in range(settings.num_draws):
        state, acceptance = path.transition(state, one, step)
        e.append(state.e)
        log_joint.append(state.target)
        acceptances.append(acceptance)
    e, log_joint = torch.stack(e), torch.stack(log_joint)
    _check_that_none_runs_away(path, e)
    rhat, ess = _worst(e, log_joint)
    converged = (rhat <= settings.max_rhat) & (ess >= settings.min_ess)
    acceptance = torch.stack(acceptances).mean(0).double()
    return Posterior(e, log_joint, coordinates, rhat, ess, acceptance, converged, spent + path.evaluations)


def _dispersed_starts(path: Path, num_chains: int) -> Tensor:
    """Points ``(C, B, D)`` that lie further apart than the posterior does."""
    loc = path.coordinates.loc
    wide = 2 * torch.randn(num_chains, *loc.shape, dtype=loc.dtype, device=loc.device)
    drawn = torch.cat([path.latents.sample_prior(num_chains // 2), path.latents.sample_guide(num_chains // 4)])
    starts = torch.cat([path.coordinates.from_latents(drawn), wide[len(drawn) :]])
    for other in (wide, torch.zeros_like(wide)):  # where there is no density to follow
        state = path.evaluate(starts)
        sound = state.target.isfinite() & state.target_gradient.isfinite().all(-1)
        starts = torch.where(sound.unsqueeze(-1), starts, other)
    return starts


def _settle(path: Path, state: State, one: Tensor, num: int, settings: PosteriorChains) -> tuple[Tensor, State, Tensor]:
    """Bring chains from wherever they start to where the posterior's mass is, each with a step size of its own.

    Returns:
        The draws of the second half, ``(num / 2, C, B, D)``, the chains, and a step size for each observation.
    """
    longest = math.log(settings.longest_step)
    log_step = torch.full_like(state.target, longest)
    seen = []
    for t in range(num):
        old = state.e
        state, _ = path.transition(state, one, log_step.exp().unsqueeze(-1))
        accepted = (state.e != old).any(-1).to(log_step)
        log_step = (log_step + (1 + t / 10) ** -0.6 * (accepted - settings.target_acceptance)).clamp(max=longest)
        if t >= num // 2:
            seen.append(state.e)
    return torch.stack(seen), state, log_step.median(0).values.exp()


def _whitened_again(coordinates: Coordinates, seen: Tensor, e: Tensor) -> tuple[Coordinates, Tensor]:
    """Coordinates in which the draws ``seen`` have about unit covariance, and the points e in them.

    The covariance is shrunk towards that of ``coordinates`` by as much as its noise explains of what it differs by
    (Ledoit & Wolf 2004), and extremes count no more than five deviations, lest one lost chain stretch all.
    """
    draws = seen.flatten(0, 1)
    median = draws.median(0).values
    width = 1.5 * (draws - median).abs().median(0).values.clamp(min=1e-3)
    draws = torch.minimum(torch.maximum(draws, median - 5 * width), median + 5 * width)
    mean = draws.mean(0)
    centred = draws - mean
    covariance = torch.einsum("kbi,kbj->bij", centred, centred) / len(draws)
    identity = torch.eye(covariance.shape[-1]).to(covariance)
    noise = covariance.diagonal(dim1=-2, dim2=-1).sum(-1).square() / (len(draws) / 4)  # draws depend on each other
    share = (1 - noise / (covariance - identity).square().sum((-2, -1))).clamp(0, 1)
    shrunk = torch.lerp(identity, covariance, share.view(-1, 1, 1))
    shrunk = shrunk + 1e-3 * average_variance(shrunk) * identity
    scale = cholesky(shrunk)
    moved = torch.linalg.solve_triangular(scale, (e - mean).unsqueeze(-1), upper=False).squeeze(-1)
    loc = coordinates.loc + (coordinates.factor @ mean.unsqueeze(-1)).squeeze(-1)
    log_det = coordinates.log_det + scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return Coordinates(loc, coordinates.factor @ scale, log_det), moved


def average_variance(covariance: Tensor) -> Tensor:
    """The mean of a covariance's diagonal: ``(B, D, D) -> (B, 1, 1)``, the unit in which it may be called singular."""
    return covariance.diagonal(dim1=-2, dim2=-1).mean(-1).view(-1, 1, 1)


def _adapt(
    path: Path, state: State, one: Tensor, num: int, step: Tensor, settings: PosteriorChains
) -> tuple[State, Tensor]:
    """One step size for each observation, the average of those of the second half."""
    longest = math.log(settings.longest_step)
    log_step, kept = step.log(), []
    for t in range(num):
        state, acceptance = path.transition(state, one, log_step.exp())
        rate = (1 + t / 5) ** -0.6
        log_step = (log_step + rate * (acceptance - settings.target_acceptance)).clamp(max=longest)
        if t >= num // 2:
            kept.append(log_step)
    return state, torch.stack(kept).mean(0).exp()


def _check_that_none_runs_away(path: Path, e: Tensor) -> None:
    """Refuse posteriors without mass in any finite region: chains stay far out, and further out is hardly less likely.

    A density that falls no faster than the distance grows has no finite integral.
    """
    centre, width = prior_location_and_width(path.latents)
    distances = [((path.coordinates.to_latents(each) - centre) / width).abs() for each in e[-(len(e) // 4) :]]
    far, u = distances[-1] > RUN_AWAY, path.coordinates.to_latents(e[-1])
    away = (torch.stack(distances).amin(0) > RUN_AWAY).any(-1)
    if not away.any():
        return
    here = path.evaluate(e[-1]).target
    for factor in (1.5, 2.0, 3.1, 4.7):
        beyond = path.coordinates.from_latents(torch.where(far, centre + factor * (u - centre), u))
        away &= ~(path.evaluate(beyond).target - here < -math.log(factor))
    share = away.double().mean(0)
    if (share >= 0.25).any():
        datum = int(share.argmax())
        site = path.latents.site_at(int(distances[-1][:, datum].median(0).values.argmax()))
        raise ContractError(
            f"log p(x) diverges for datum {datum} of this chunk: chains run away at site '{site}', where the posterior "
            "has no finite integral; give it a prior whose tails the likelihood does not outweigh"
        )


def _worst(e: Tensor, log_joint: Tensor) -> tuple[Tensor, Tensor]:
    """The largest R-hat and the smallest effective sample size of any coordinate, ``(B,)`` each, a datum at a time."""
    rhat, ess = [], []
    for datum in range(e.shape[2]):
        variables = torch.cat([e[:, :, datum], log_joint[:, :, datum, None]], -1).double()
        rhat.append(split_rhat(variables).max())
        ess.append(torch.minimum(bulk_ess(variables), tail_ess(variables)).min())
    return torch.stack(rhat), torch.stack(ess)


def contradicted(latents: Latents, log_px: Tensor, mc_se: Tensor, rows: int) -> Tensor:
    """Whether draws of the prior find clearly more mass than an estimate knows of, as of a mode not seen: ``(B,)``.

    ``rows`` of them are scored at a time, :data:`PRIOR_DRAWS` in all.
    """
    with torch.no_grad():
        draws = (latents.sample_prior(rows) for _ in range(-(-PRIOR_DRAWS // rows)))
        weights = [added([latents.log_joint(u)[1]]) for u in draws]
    found = reduce_log_weights(weights, rows * len(weights))
    certain = (found.mc_se < 0.3) & (found.ess > 20)
    return certain & (found.log_px - log_px > 4 * torch.hypot(found.mc_se, mc_se))
