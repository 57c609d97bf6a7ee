"""Where a posterior has its modes, and the start that covers them: for each observation, a mixture of normals."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.infer.evidence.chains import Mixture
from pyro_vae.infer.evidence.laplace import (
    Coordinates,
    cholesky,
    climb,
    laplace_approximation,
    laplace_cost,
    log_joint,
    prior_location_and_width,
)
from pyro_vae.infer.supports import Latents

NEGLIGIBLE = 9.0
"""Nats of local evidence by which a mode may be below the highest one and still be a part of the start."""
ELSEWHERE, FROM_PRIOR = 160, 128
"""Points at which a mode is looked for: prior draws, and modes of other data."""
MOST = 24
"""Modes of one observation that are made a part of the start."""
FEW, MANY = 8, 512
"""Dimensions up to which modes are looked for in every observation, and prior draws that look for what is uncovered."""
BETWEEN = 7
"""Points between two peaks at which a descent is looked for."""
ENOUGH = 0.05
"""The share of modes that no climb has met, as far as can be told, below which no more climbs are made."""


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
    """Climb from the guide's mean and from ``num_climbs`` other points, and fit a normal to each mode that is met.

    Where there are several modes, three times as many climbs follow, and again where some were not met twice.
    """
    size, dim = latents.size, latents.dim
    _, width = prior_location_and_width(latents)
    first = climb(latents, latents.sample_guide(32).mean(0, keepdim=True), width, 20)
    cost = torch.full((size,), laplace_cost(dim), dtype=torch.float64, device=first.device)
    rows, peaks, unseen = torch.arange(size, device=first.device), first.squeeze(0), torch.zeros_like(cost)
    if num_climbs:
        rows, peaks = rows[:0], peaks[:0]
        asked, reached = torch.arange(size, device=first.device), first
        for more in (num_climbs, 3 * num_climbs, 9 * num_climbs):
            some = latents.select(asked)
            others = climb(some, _elsewhere(some, reached[0], width, more), width, 40)
            reached = torch.cat([reached, others])
            found, missing = _distinct(some, reached)
            unseen[asked] = missing
            cost[asked] += ELSEWHERE + 80 * more + BETWEEN * len(reached)
            open_ = missing >= ENOUGH
            if more == num_climbs and (found.sum(0) > 1).any():
                # few climbs may all end at one of several modes, which others of the data are seen to have
                open_ |= (found.sum(0) > 1) | (dim > FEW)
            if dim > FEW:  # where nothing else looks for what is missing
                open_ |= found.sum(0) > 1
            open_ &= more < 9 * num_climbs
            place, row = (found & ~open_).nonzero(as_tuple=True)
            rows, peaks = torch.cat([rows, asked[row]]), torch.cat([peaks, reached[place, row]])
            asked, reached = asked[open_], reached[:, open_]
            if len(asked) == 0:
                break
        order = rows.argsort(stable=True)
        rows, peaks = rows[order], peaks[order]
    coordinates = laplace_approximation(latents.select(rows), start=peaks)
    cost += (rows.bincount(minlength=size) - 1) * laplace_cost(dim, num_steps=0)
    local = log_joint(latents.select(rows), coordinates.loc.unsqueeze(0)).squeeze(0).double()
    local = (local + coordinates.log_det + 0.5 * dim * math.log(2 * math.pi)).nan_to_num(nan=-math.inf)
    starts = Starts(rows, widened(coordinates, widening), None, unseen, cost)
    if len(rows) > size:
        starts, local = _weighed(starts, local)
    if num_climbs and dim <= FEW:
        starts, local = _with_remainders(latents, starts, local, width)
        uncovered, _, _ = _outside(latents, starts, local)
        more = starts.evaluations + 2 * MANY
        starts = starts._replace(unseen=torch.maximum(unseen, uncovered), evaluations=more)
    return starts


def _outside(latents: Latents, starts: Starts, local: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The share of p(x) that lies outside all normals, by importance sampling from the prior, ``(B,)``.

    Outside is where the square of e is four standard deviations above its mean. What is inside is the normals' local
    evidence ``(R,)``, since draws may hit no narrow normal. Also draws from the prior, and the log-weights of those
    that are outside, minus infinity for the others.
    """
    draws = latents.sample_prior(MANY)
    log_w = latents.log_joint(draws)[1].double().nan_to_num(nan=-math.inf) - math.log(MANY)
    e = starts.coordinates.from_latents(draws[:, starts.rows])
    inside = (e.square().sum(-1) < latents.dim + 4 * math.sqrt(2 * latents.dim)).double()
    covered = torch.zeros_like(log_w).index_add(1, starts.rows, inside) > 0
    outside = log_w.masked_fill(covered, -math.inf)
    within = torch.full((latents.size, len(local)), -math.inf, dtype=local.dtype, device=local.device)
    within[starts.rows, torch.arange(len(local), device=local.device)] = local
    mass = outside.logsumexp(0)
    return (mass - torch.logaddexp(mass, within.logsumexp(1))).exp().nan_to_num(), draws, outside


def _with_remainders(latents: Latents, starts: Starts, local: Tensor, width: Tensor) -> tuple[Starts, Tensor]:
    """One normal more where much is outside: with the mean and the covariance of what is, as in a curved posterior."""
    share, draws, log_w = _outside(latents, starts, local)
    places = (share > ENOUGH / 2).nonzero().squeeze(1)
    if len(places) == 0:
        return starts, local
    mass = log_w[:, places].logsumexp(0)
    weight = (log_w[:, places] - mass).exp().to(draws.dtype)
    loc = torch.einsum("kb,kbd->bd", weight, draws[:, places])
    centred = draws[:, places] - loc
    covariance = torch.einsum("kb,kbi,kbj->bij", weight, centred, centred)
    factor = cholesky(covariance + torch.diag((0.1 * width).square()))
    more = Coordinates(loc, factor, factor.diagonal(dim1=-2, dim2=-1).log().sum(-1))
    rows = torch.cat([starts.rows, places])
    order = rows.argsort(stable=True)
    pairs = zip(starts.coordinates, more, strict=True)
    whole = Coordinates(*(torch.cat(pair)[order] for pair in pairs))
    return _weighed(starts._replace(rows=rows[order], coordinates=whole), torch.cat([local, mass])[order])


def _elsewhere(latents: Latents, modes: Tensor, width: Tensor, num: int) -> Tensor:
    """The highest points of many that have nothing to do with the guide, apart from each other, ``(num, B, D)``.

    Apart is a third of the prior's width, in the root of the mean square over dimensions.
    """
    draws = latents.sample_prior(FROM_PRIOR)
    if latents.size > 1:
        shifts = torch.randint(1, latents.size, (ELSEWHERE - FROM_PRIOR,)).tolist()
        draws = torch.cat([draws, torch.stack([modes.roll(shift, 0) for shift in shifts])])
    heights = log_joint(latents, draws).nan_to_num(nan=-math.inf)
    chosen = []
    for _ in range(num):
        best = heights.argmax(0).view(1, -1, 1).expand(-1, -1, latents.dim)
        chosen.append(draws.gather(0, best).squeeze(0))
        near = ((draws - chosen[-1]) / width).square().mean(-1) < 1 / 9
        heights = heights.masked_fill(near, -math.inf)
    return torch.stack(chosen)


def _distinct(latents: Latents, peaks: Tensor) -> tuple[Tensor, Tensor]:
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
    t = torch.linspace(0, 1, BETWEEN + 2).to(peaks)[1:-1]
    for i in range(1, len(peaks)):
        between = torch.lerp(peaks[i], peaks[:i], t.view(-1, 1, 1, 1)).flatten(0, 1)
        lowest = log_joint(latents, between).nan_to_num(nan=-math.inf).unflatten(0, (BETWEEN, i)).amin(0)
        joined = kept[:i] & (lowest > torch.minimum(heights[i], heights[:i]) - 1)
        first = joined & (joined.cumsum(0) == 1)
        met[:i] += first
        kept[i] = ~joined.any(0) & (heights[i] > heights[0] - NEGLIGIBLE - 0.5 * latents.dim)
        met[i] += kept[i]
    once = ((met == 1) & kept).sum(0)
    unseen = torch.where(kept.sum(0) > 1, once / met.sum(0).clamp(min=1), torch.zeros_like(heights[0]))
    back = torch.zeros_like(kept).scatter(0, order, kept)
    return back, unseen.double()


def _rank(rows: Tensor, values: Tensor) -> Tensor:
    """How many of the same row have higher values, for each of them; ``rows`` ascends."""
    order = values.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    counts = rows.bincount()
    firsts = (counts.cumsum(0) - counts)[rows[order]]
    return torch.empty_like(rows).scatter(0, order, torch.arange(len(rows), device=rows.device) - firsts)


def _weighed(starts: Starts, local: Tensor) -> tuple[Starts, Tensor]:
    """The normals weighed by their local evidence ``(R,)``, joined, without those that are negligible."""
    rows, coordinates, _, unseen, cost = starts
    size = len(unseen)
    best = torch.full((size,), -math.inf, dtype=local.dtype, device=local.device)
    best = best.scatter_reduce(0, rows, local, "amax")
    kept = (local >= best[rows] - NEGLIGIBLE) & (_rank(rows, local) < MOST)
    rows, local, coordinates = rows[kept], local[kept], coordinates.select(kept)
    if len(rows) == size:
        return Starts(rows, coordinates, None, unseen, cost), local
    counts = rows.bincount(minlength=size)
    firsts = counts.cumsum(0) - counts
    own = torch.arange(len(rows), device=rows.device) - firsts[rows]
    most = int(counts.max())
    among = (firsts[rows].unsqueeze(1) + torch.arange(most, device=rows.device)).clamp(max=len(rows) - 1)
    absent = torch.arange(most, device=rows.device) >= counts[rows].unsqueeze(1)
    weight = (local - best[rows] - coordinates.log_det.double())[among].to(coordinates.loc.dtype)
    mixture = Mixture(
        coordinates.loc[among],
        torch.linalg.inv_ex(coordinates.factor)[0][among],
        weight.masked_fill(absent, -math.inf),
        own,
    )
    return Starts(rows, coordinates, mixture, unseen, cost), local
