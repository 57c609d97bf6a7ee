"""Chains that go to the posterior and return, for as many rounds as each observation needs for the error asked for."""

import math
from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_vae.errors import ContractError
from pyro_vae.infer.evidence.annealing import Annealing
from pyro_vae.infer.evidence.blocks import Blocks, Part, block_size, joined, power_of_two
from pyro_vae.infer.evidence.chains import Mixture, Path, Start, anneal, bennett, evaluator, resample, warm_up
from pyro_vae.infer.evidence.laplace import (
    Coordinates,
    diagonal,
    log_joint,
    observations_at_once,
    prior_location_and_width,
)
from pyro_vae.infer.evidence.modes import ELSEWHERE, FEW, Starts, find_starts
from pyro_vae.infer.evidence.particles import SMC, sample_particles, typical_ladder
from pyro_vae.infer.evidence.result import t_factor
from pyro_vae.infer.supports import Latents

WIDENING = 1.05
"""Of the normals that chains start from, measured on an MNIST run: tails are seldom lighter than a normal's."""
LEAST = 6
"""Temperatures: with fewer, chains there and back do not forget where they began."""
LEAST_OF_FEW = 16
"""The same where there are few dimensions, and posteriors more often curved than in many."""
AT_ONCE, LOOK = 16, SMC(64, 4)
"""Observations of a part of the pilot, and particles that see how far apart temperatures should be."""
MANY_CHUNKS = 4
"""Chunks of observations from which on it is worth compiling."""
ARRIVED = 5
"""Transitions between the ways there and back, so that chains which resampling has doubled part."""
QUANTILE = 0.8
"""Share of the pilot's observations that have the error asked for at once: going on only where an estimate happens to
be uncertain, as the high ones are, would bias the mean."""
HOPELESS = 0.2
"""The share of modes that no climb has met, as far as can be told, above which a start on those met is given up."""


class Found(NamedTuple):
    """Estimates of B observations, ``(B,)`` each."""

    log_z: Tensor
    mc_se: Tensor
    acceptance: Tensor
    unseen: Tensor
    evaluations: Tensor


def adaptive(
    latents: Latents,
    settings: Annealing,
    rows: int,
    compiled: bool,
    blocks: Blocks,
    bar: tqdm,
    start: str | None = None,
) -> Found:
    """Estimates of all observations, from rounds of chains; ``rows`` is how many z may be evaluated at once."""
    sampler = _Sampler(latents, settings, start or settings.start, rows, compiled)
    with blocks.apart("few"):
        few = latents.select(torch.randperm(latents.size)[:64].to(latents.like.device))
    num, steps = sampler.pilot(few, blocks)
    bar.set_postfix(temperatures=num)
    parts = []
    size = observations_at_once(blocks.size, latents.dim)
    for part in blocks.of("annealed", latents.size, lambda at: sampler.block(latents, at, num, steps), size):
        parts.append(part)
        bar.update(len(part["log_z"]))
    return Found(**joined(parts))


class _Sampler:
    """What is the same for all observations."""

    def __init__(self, latents: Latents, settings: Annealing, start: str, rows: int, compiled: bool):
        self.settings, self.start = settings, start
        self.kind: Start = kind_of(latents, start)
        self.rows = power_of_two(observations_at_once(rows // settings.num_chains, latents.dim))
        # compiling takes longer than a few chunks do, and than what is left over
        compiled = compiled and latents.size > MANY_CHUNKS * self.rows
        whole = min(self.rows, observations_at_once(block_size(latents.like), latents.dim))
        self.evaluate = evaluator(latents, self.kind, compiled, whole, math.inf)
        self.num_climbs = settings.num_climbs
        self.curve: Tensor | None = None

    def starts(self, latents: Latents, before: int = 0) -> Starts:
        """Where the chains of some observations start; ``before`` is the place of the first among all."""
        settings, parts = self.settings, []
        at_once = ELSEWHERE if self.start == "laplace" and self.num_climbs else 32
        rows = observations_at_once(
            3 * self.rows * settings.num_chains // at_once, latents.dim
        )  # of which no gradients are taken
        for first in range(0, latents.size, rows):
            part = latents.select(slice(first, first + rows))
            if self.start == "laplace":
                starts = find_starts(part, self.num_climbs, WIDENING)
            else:
                nothing = part.like.new_zeros(part.size, dtype=torch.float64)
                places = torch.arange(part.size, device=nothing.device)
                starts = Starts(places, coordinates_of(part, self.start), None, nothing, nothing + 64)
            _check_ends(part, starts, before + first)
            parts.append(starts._replace(rows=starts.rows + first))
        return all_starts(parts)

    def pilot(self, latents: Latents, blocks: Blocks) -> tuple[int, Tensor]:
        """How many temperatures T give most the error asked for, and step sizes that suit most, ``(T - 1,)``.

        Where there are many dimensions, and none of the observations has several modes, the others are spared climbs.
        All wait for it, so that it has parts of its own, :data:`AT_ONCE` observations each.
        """
        settings = self.settings
        each = list(torch.arange(latents.size, device=latents.like.device).split(block_size(latents.like, AT_ONCE)))
        begun = blocks.each("pilot-start", lambda i: _as_part(self.starts(latents.select(each[i]))), len(each))
        starts = [_from_part(part) for part in begun]
        if self.start != "laplace" and settings.schedule == "linear":
            path = Path(
                latents.select(each[0]), starts[0].coordinates, self.kind, settings.num_leapfrogs, self.evaluate
            )
            few = path.select(slice(8))
            ladder = blocks.once("pilot-curve", lambda: {"curve": typical_ladder(sample_particles(few, LOOK).ladder)})
            self.curve = ladder["curve"]
        if latents.dim > FEW and sum(len(part.rows) for part in starts) == latents.size:
            self.num_climbs = 0
        num = min(LEAST if latents.dim > FEW else LEAST_OF_FEW, settings.most_temperatures)
        while True:

            def estimate(i: int, num: int = num) -> Part:
                some, steps = latents.select(each[i]), []
                found = self.round(some, starts[i], self.ladder(some, num), None, steps)
                return {"mc_se": found.mc_se, "steps": torch.cat(steps, 1).mT}

            found = joined(blocks.each(f"pilot-{num}", estimate, len(each[:2])))
            wide = found["mc_se"].nan_to_num(nan=math.inf).quantile(QUANTILE).item() / settings.error
            if wide <= 1 or num >= settings.most_temperatures:
                return num, found["steps"].median(0).values
            num = min(settings.most_temperatures, math.ceil(num * (min(wide, 2) ** 2 if math.isfinite(wide) else 3)))

    def ladder(self, latents: Latents, num: int) -> Tensor:
        """Temperatures from 0 to 1, ``(num + 1,)``: from afar, between which weights change as much."""
        betas = self.settings.temperatures(num).to(latents.like.device)
        if self.curve is not None:
            at = betas * (len(self.curve) - 1)
            low = at.long().clamp(max=len(self.curve) - 2)
            betas = torch.lerp(self.curve[low], self.curve[low + 1], at - low)
        return betas.to(latents.like)

    def block(self, everything: Latents, at: slice, num: int, steps: Tensor) -> Part:
        """Rounds with more and more temperatures for those observations that do not have the error asked for yet."""
        latents = everything.select(at)
        settings, starts = self.settings, self.starts(latents, at.start)
        found = self.round(latents, starts, self.ladder(latents, num), steps)
        found = found._replace(evaluations=found.evaluations + starts.evaluations)
        while num < settings.most_temperatures:
            worse = ~(found.mc_se <= settings.error) | (found.acceptance < 0.3)
            worse &= found.unseen < HOPELESS  # others of its modes were missed: no more chains from these help
            again = worse.nonzero().squeeze(1)
            if len(again) == 0:
                break
            wide = (found.mc_se[again] / settings.error).nan_to_num(nan=2.0, posinf=2.0).median().item()
            before, num = num, min(settings.most_temperatures, math.ceil(num * min(max(wide**2, 2), 4)))
            more = self.round(latents.select(again), some_of(starts, again), self.ladder(latents, num), None)
            first = Found(*(each[again] for each in found))
            more = _averaged(first, more, before / (before + num), 2 * settings.error)
            found = Found(*(a.index_copy(0, again, b) for a, b in zip(found, more, strict=True)))
        return found._asdict()

    def round(
        self, latents: Latents, starts: Starts, betas: Tensor, steps: Tensor | None, kept: list | None = None
    ) -> Found:
        """One estimate of each observation; ``steps`` None: adapted, and appended to ``kept``."""
        log_z, mc_se, acceptance, cost = ([] for _ in range(4))
        order = []
        for places, path in self._paths(latents, starts):
            mine = path.coordinates.log_det
            if steps is None:
                longest = longest_step(self.start, self.settings.num_leapfrogs)
                sizes = warm_up(path, betas, self.settings.num_warmup_chains, longest, self.settings.target_acceptance)
                if kept is not None:
                    kept.append(sizes)
            else:
                sizes = steps.unsqueeze(1).expand(-1, len(mine))
            for each, value in zip(
                (log_z, mc_se, acceptance), there_and_back(path, betas, sizes, self.settings.num_chains), strict=True
            ):
                each.append(value)
            cost.append(torch.full_like(log_z[-1], float(path.evaluations)))
            order.append(places)
        back = torch.cat(order).argsort()
        values = (torch.cat(each)[back] for each in (log_z, mc_se, acceptance, cost))
        return _combined(starts, latents.size, *values)

    def _paths(self, latents: Latents, starts: Starts) -> Iterator[tuple[Tensor, Path]]:
        """The rows by chunks, those of observations with several modes apart, which alone need the mixture."""
        places = torch.arange(len(starts.rows), device=starts.rows.device)
        alone = starts.rows.bincount(minlength=latents.size)[starts.rows] == 1
        for group in (places[alone], places[~alone]):
            for among in group.split(self.rows) if len(group) else ():
                mixture = None
                if starts.mixture is not None and not alone[among[0]]:
                    mixture = starts.mixture.select(among)
                coordinates = starts.coordinates.select(among)
                yield (
                    among,
                    Path(
                        latents.select(starts.rows[among]),
                        coordinates,
                        self.kind,
                        self.settings.num_leapfrogs,
                        self.evaluate,
                        mixture,
                    ),
                )


def _averaged(first: Found, second: Found, weight: float, usable: float) -> Found:
    """The average of two estimates of p(x), the first counting for ``weight`` unless its error is not ``usable``.

    The weight does not depend on the estimates. To leave out the first because its error is large would bias the mean:
    it is large where the estimate is high.
    """
    share = torch.where(first.mc_se <= usable, weight, torch.zeros_like(first.mc_se))
    log_z = torch.logaddexp(share.log() + first.log_z.nan_to_num(), (1 - share).log() + second.log_z)
    parts = [(each.log_z.nan_to_num() - log_z).exp() * each.mc_se.nan_to_num() for each in (first, second)]
    mc_se = torch.hypot(share * parts[0].nan_to_num(), (1 - share) * parts[1])
    return second._replace(
        log_z=log_z,
        mc_se=torch.where(second.mc_se.isfinite(), mc_se, second.mc_se),
        evaluations=first.evaluations + second.evaluations,
    )


def there_and_back(path: Path, betas: Tensor, steps: Tensor, num_chains: int) -> tuple[Tensor, Tensor, Tensor]:
    """log Z, its error, and the acceptance rate, ``(R,)`` each, by chains that go to the posterior and return.

    Chains back begin where those there ended, resampled by their weights and moved on; Bennett's ratio joins both.
    Chains there say too little of p(x) where they arrive late, chains back too much: together they are in the right
    place, and a quarter of what they disagree by is the least that is stated as error.
    """
    there, state, acceptance = anneal(path, betas, path.evaluate(path.draw(num_chains)), steps)
    state = state.select(resample(there))
    for _ in range(ARRIVED):
        state, _ = path.transition(state, betas[-1], steps[-1])
    back, _, _ = anneal(path, betas.flip(0), state, steps.flip(0))
    effective = (2 * there.logsumexp(0) - (2 * there).logsumexp(0)).exp()  # of those that resampling has left
    log_z, error = bennett(there, back, effective)
    apart = (there.logsumexp(0) + back.logsumexp(0) - 2 * math.log(num_chains)).abs()
    return log_z, torch.maximum(error * t_factor(num_chains - 1), apart / 4), acceptance


def _check_ends(latents: Latents, starts: Starts, first: int) -> None:
    """Refuse a posterior whose density does not fall on the way to infinity, where climbs have gone that way."""
    location, width = prior_location_and_width(latents)
    loc = starts.coordinates.loc
    away = ((loc - location) / width).abs().amax(-1)
    far = (away > 6).nonzero().squeeze(1)
    if len(far) == 0:
        return
    few = latents.select(starts.rows[far])
    ends = torch.stack([loc[far], location + 1000 * (loc[far] - location)])
    with torch.no_grad():
        here, there = log_joint(few, ends)
    runs = ((there > here - 1) & here.isfinite()).nonzero().squeeze(1)
    if len(runs):
        at = far[runs[0]]
        name = latents.site_at(int(((loc[at] - location) / width).abs().argmax()))
        raise ContractError(
            f"log p(x) of observation {first + int(starts.rows[at])} diverges: p(x, z) does not fall as site '{name}' "
            "goes to the end of its support, so that there is no posterior"
        )


def longest_step(start: str, num_leapfrogs: int) -> float:
    """A quarter of a standard normal's period in all, after which a trajectory has forgotten where it began.

    Coordinates of other starts than laplace know the posterior's width less well, and may need twice as much.
    """
    return (0.5 if start == "laplace" else 1) * math.pi / num_leapfrogs


def kind_of(latents: Latents, start: str) -> Start:
    """What :class:`Path` calls a start: normal if it is N(0, I) in its coordinates, as a standard prior is."""
    return "normal" if start == "laplace" or (start == "prior" and latents.standard) else cast(Start, start)


def coordinates_of(latents: Latents, start: str) -> Coordinates:
    """Coordinates in which the guide's draws, or the prior's, are about a unit ball."""
    if start == "guide":
        draws = latents.sample_guide(64)
        return diagonal(draws.mean(0), draws.std(0).clamp(min=1e-6))
    if latents.standard:
        loc = latents.like.new_zeros(latents.size, latents.dim)
        return diagonal(loc, torch.ones_like(loc))
    return diagonal(*(each.expand(latents.size, -1) for each in prior_location_and_width(latents)))


def _as_part(starts: Starts) -> Part:
    """The starts as tensors by name."""
    rows, coordinates, mixture, unseen, evaluations = starts
    part = {"rows": rows, **coordinates._asdict(), "unseen": unseen, "evaluations": evaluations}
    return part if mixture is None else part | {f"mixture_{name}": value for name, value in mixture._asdict().items()}


def _from_part(part: Part) -> Starts:
    """What :func:`_as_part` was given."""
    mixture = None
    if "mixture_own" in part:
        mixture = Mixture(*(part[f"mixture_{name}"] for name in Mixture._fields))
    coordinates = Coordinates(*(part[name] for name in Coordinates._fields))
    return Starts(part["rows"], coordinates, mixture, part["unseen"], part["evaluations"])


def all_starts(parts: list[Starts]) -> Starts:
    """The starts of all parts, one after the other."""
    if len(parts) == 1:
        return parts[0]
    mixture = None
    if any(part.mixture is not None for part in parts):
        most = max(part.mixture.log_weight.shape[1] for part in parts if part.mixture is not None)
        mixture = Mixture(*map(torch.cat, zip(*(_padded(part, most) for part in parts), strict=True)))
    coordinates = Coordinates(*map(torch.cat, zip(*(part.coordinates for part in parts), strict=True)))
    return Starts(
        torch.cat([part.rows for part in parts]),
        coordinates,
        mixture,
        torch.cat([part.unseen for part in parts]),
        torch.cat([part.evaluations for part in parts]),
    )


def _padded(starts: Starts, most: int) -> Mixture:
    """The mixture of each row, with ``most`` normals, of which the last weigh nothing."""
    if starts.mixture is None:
        loc, factor, log_det = starts.coordinates
        own = torch.zeros(len(loc), dtype=torch.long, device=loc.device)
        inverse = torch.eye(loc.shape[1], dtype=loc.dtype, device=loc.device).expand_as(factor)
        mixture = Mixture(loc.unsqueeze(1), inverse.unsqueeze(1), torch.zeros_like(log_det).unsqueeze(1), own)
    else:
        mixture = starts.mixture
    missing = most - mixture.log_weight.shape[1]
    loc, inverse, log_weight, own = mixture
    if missing:
        loc, inverse = (torch.cat([a, a[:, :1].expand(-1, missing, *a.shape[2:])], 1) for a in (loc, inverse))
        log_weight = torch.cat([log_weight, torch.full_like(log_weight[:, :1], -math.inf).expand(-1, missing)], 1)
    return Mixture(loc, inverse, log_weight, own)


def some_of(starts: Starts, among: Tensor) -> Starts:
    """The starts of some of the observations, whose places are in ascending order."""
    number = torch.full((int(starts.rows.max()) + 1,), -1, device=among.device)
    number[among] = torch.arange(len(among), device=among.device)
    kept = number[starts.rows] >= 0
    mixture = None if starts.mixture is None else starts.mixture.select(kept)
    coordinates = starts.coordinates.select(kept)
    return Starts(number[starts.rows[kept]], coordinates, mixture, starts.unseen[among], starts.evaluations[among])


def _combined(starts: Starts, size: int, log_z: Tensor, mc_se: Tensor, acceptance: Tensor, cost: Tensor) -> Found:
    """Estimates of observations from those of their rows, whose p(x) add up."""
    rows = starts.rows

    def added(values: Tensor) -> Tensor:
        return values.new_zeros(size).index_add(0, rows, values)

    highest = torch.full_like(starts.unseen, -math.inf).scatter_reduce(0, rows, log_z.nan_to_num(nan=math.inf), "amax")
    whole = highest + added((log_z - highest[rows]).exp()).log()
    share = (log_z - whole[rows]).exp()
    error = added((share * mc_se).square()).sqrt()
    return Found(whole, error, added(share * acceptance), starts.unseen, added(cost))
