"""Where a posterior has its modes, and the start that covers them: for each observation, a mixture of normals."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.infer.evidence.chains import Mixture
from pyro_vae.infer.evidence.laplace import (
    Coordinates,
    climb,
    laplace_approximation,
    laplace_cost,
    log_joint,
    prior_location_and_width,
)
from pyro_vae.infer.supports import Latents

NEGLIGIBLE = 9.0
"""Nats of local evidence by which a mode may be below the highest one and still be a part of the start."""
ELSEWHERE = 24
"""Points at which a mode is looked for, the best of each group being climbed from: prior draws, modes of other data."""


class Starts(NamedTuple):
    """Normals around the modes of B observations, R of them in all; each is a row.

    Attributes:
        rows: the observation that each belongs to, shape ``(R,)``, in ascending order.
        coordinates: in which it is N(0, I), R of them.
        mixture: how the posterior is split between those of one observation; None if each has but one.
        unseen: the share of the posterior's modes that no climb has met, by Good's estimate, shape ``(B,)``.
        evaluations: how often the model was evaluated for each observation.
    """

    rows: Tensor
    coordinates: Coordinates
    mixture: Mixture | None
    unseen: Tensor
    evaluations: Tensor


def widened(coordinates: Coordinates, factor: float) -> Coordinates:
    """The same, ``factor`` times as wide: tails that are a little too heavy cost less than those that are too light."""
    grown = coordinates.log_det + coordinates.loc.shape[-1] * math.log(factor)
    return Coordinates(coordinates.loc, coordinates.factor * factor, grown)


def find_starts(latents: Latents, num_climbs: int, widening: float) -> Starts:
    """Climb from the guide's mean and from ``num_climbs`` other points, and fit a normal to each mode that is met."""
    size, dim = latents.size, latents.dim
    _, width = prior_location_and_width(latents)
    first = climb(latents, latents.sample_guide(32).mean(0, keepdim=True), width, 20)
    peaks, found = first, torch.ones_like(first[..., 0], dtype=torch.bool)
    cost = torch.full((size,), 40 + laplace_cost(dim), dtype=torch.float64, device=first.device)
    unseen = torch.zeros_like(cost)
    if num_climbs:
        others = climb(latents, _elsewhere(latents, first[0], num_climbs), width, 40)
        peaks = torch.cat([first, others])
        found, unseen = _distinct(latents, peaks)
        cost += ELSEWHERE + 80 * num_climbs
    place, rows = found.nonzero(as_tuple=True)
    place, rows = place[order := rows.argsort(stable=True)], rows[order]
    coordinates = laplace_approximation(latents.select(rows), start=peaks[place, rows])
    cost = cost + (rows.bincount(minlength=size) - 1) * laplace_cost(dim)
    coordinates = widened(coordinates, widening)
    if len(rows) == size:
        return Starts(rows, coordinates, None, unseen, cost)
    return _weighed(latents, rows, coordinates, unseen, cost)


def _elsewhere(latents: Latents, modes: Tensor, num: int) -> Tensor:
    """The best of each of ``num`` groups of points that have nothing to do with the guide, ``(num, B, D)``."""
    draws = latents.sample_prior(ELSEWHERE * 2 // 3)
    if latents.size > 1:
        shifts = torch.randint(1, latents.size, (ELSEWHERE - len(draws),)).tolist()
        draws = torch.cat([draws, torch.stack([modes.roll(shift, 0) for shift in shifts])])
    draws = draws[torch.randperm(len(draws), device=draws.device)]
    draws = draws[: len(draws) // num * num]
    heights = log_joint(latents, draws).nan_to_num(nan=-math.inf).unflatten(0, (num, -1))
    best = heights.argmax(1, keepdim=True).unsqueeze(-1).expand(-1, -1, -1, latents.dim)
    return draws.unflatten(0, (num, -1)).gather(1, best).squeeze(1)


def _distinct(latents: Latents, peaks: Tensor, num_between: int = 7) -> tuple[Tensor, Tensor]:
    """Which of the peaks ``(n, B, D)`` no higher one can be reached from without a descent, ``(n, B)``.

    Also Good's estimate (1953) of the share of modes that no climb met, ``(B,)``: that of those met only once.
    """
    heights = log_joint(latents, peaks).nan_to_num(nan=-math.inf)
    order = heights.argsort(0, descending=True)
    among = order.unsqueeze(-1).expand_as(peaks)
    peaks, heights = peaks.gather(0, among), heights.gather(0, order)
    kept = torch.zeros_like(heights, dtype=torch.bool)
    kept[0] = True
    met = torch.zeros_like(heights)  # how many climbs ended at each of those kept
    met[0] = 1
    t = torch.linspace(0, 1, num_between + 2).to(peaks)[1:-1]
    for i in range(1, len(peaks)):
        near = torch.zeros_like(kept[0])
        for j in range(i):
            between = torch.lerp(peaks[i], peaks[j], t.view(-1, 1, 1))
            lowest = log_joint(latents, between).nan_to_num(nan=-math.inf).amin(0)
            joined = kept[j] & ~near & (lowest > torch.minimum(heights[i], heights[j]) - 1)
            met[j] += joined
            near |= joined
        kept[i] = ~near & (heights[i] > heights[0] - NEGLIGIBLE - 0.5 * latents.dim)
        met[i] += kept[i]
    once = ((met == 1) & kept).sum(0)
    unseen = torch.where(kept.sum(0) > 1, once / met.sum(0).clamp(min=1), torch.zeros_like(heights[0]))
    back = torch.zeros_like(kept).scatter(0, order, kept)
    return back, unseen.double()


def _weighed(latents: Latents, rows: Tensor, coordinates: Coordinates, unseen: Tensor, cost: Tensor) -> Starts:
    """Weigh the normals of each observation by their local evidence, leave out what is negligible, and join them."""
    size, dim = latents.size, latents.dim
    local = log_joint(latents.select(rows), coordinates.loc.unsqueeze(0)).squeeze(0).double()
    local = (local + coordinates.log_det + 0.5 * dim * math.log(2 * math.pi)).nan_to_num(nan=-math.inf)
    best = torch.full((size,), -math.inf, dtype=local.dtype, device=local.device)
    best = best.scatter_reduce(0, rows, local, "amax")
    kept = local >= best[rows] - NEGLIGIBLE
    rows, local, coordinates = rows[kept], local[kept], Coordinates(*(each[kept] for each in coordinates))
    if len(rows) == size:
        return Starts(rows, coordinates, None, unseen, cost)
    counts = rows.bincount(minlength=size)
    firsts = counts.cumsum(0) - counts
    own = torch.arange(len(rows), device=rows.device) - firsts[rows]
    most = int(counts.max())
    among = (firsts[rows].unsqueeze(1) + torch.arange(most, device=rows.device)).clamp(max=len(rows) - 1)
    absent = torch.arange(most, device=rows.device) >= counts[rows].unsqueeze(1)
    weight = (local - best[rows] - coordinates.log_det.double())[among].to(coordinates.loc.dtype)
    mixture = Mixture(
        coordinates.loc[among],
        torch.linalg.inv(coordinates.factor)[among],
        weight.masked_fill(absent, -math.inf),
        own,
    )
    return Starts(rows, coordinates, mixture, unseen, cost)
