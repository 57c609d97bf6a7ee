"""A second opinion: log p(x) once more, from the prior, where modes that a start has missed would show."""

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_vae.errors import ContractError
from pyro_vae.infer.evidence.annealing import Annealing
from pyro_vae.infer.evidence.blocks import Blocks, Part, block_size, joined, power_of_two
from pyro_vae.infer.evidence.chains import Path, evaluator
from pyro_vae.infer.evidence.exact import quadrature
from pyro_vae.infer.evidence.modes import ENOUGH, FEW, MANY
from pyro_vae.infer.evidence.particles import SMC, sample_particles
from pyro_vae.infer.evidence.result import Evidence, beyond_rounding, log_mean_of_groups, pick
from pyro_vae.infer.evidence.rounds import HOPELESS, Found, adaptive, coordinates_of, kind_of
from pyro_vae.infer.evidence.weights import reduce_log_weights
from pyro_vae.infer.programs import Program, evaluating
from pyro_vae.infer.supports import Latents
from pyro_vae.infer.trees import Data

EXACT = 1e-3
"""Error below which another estimate is as good as exact, as is that of quadrature that is reliable."""
LEAST_BUDGET = 1e6
"""Evaluations that may be spent on second opinions in any case, if one of them contradicts."""
SOME = 16
"""Draws of the prior that look for a density of NaN, where there are many dimensions."""
GROUP = 8
"""Observations that are tried together."""
WAVE = 256
"""Observations at most that are tried before it is asked how far the budget goes."""
CHEAP = 512
"""How many z must fit into a chunk, so that the thousands of a grid take neither gigabytes nor hours."""
MANY_WRONG = 0.05
"""Share of the observations tried on which the second opinion may differ without doubt falling on all the others."""


def second_opinion(latents: Latents, rows: int, num_particles: int) -> tuple[Tensor, Tensor, Tensor]:
    """log p(x) by sequential Monte Carlo from the prior, its error, and what it cost, ``(B,)`` each.

    The error is infinite where particles did not arrive. In many dimensions the estimate is low, by more than it says:
    it can show that another one is too low, and never that one is too high.
    """
    kind, settings = kind_of(latents, "prior"), SMC(num_particles)
    evaluate, parts = evaluator(latents, kind, False), []
    size = max(1, rows // num_particles)
    for first in range(0, latents.size, size):
        part = latents.select(slice(first, first + size))
        path = Path(part, coordinates_of(part, "prior"), kind, settings.num_leapfrogs, evaluate)
        found = sample_particles(path, settings)
        log_z, error = log_mean_of_groups(found.log_z)
        parts.append((log_z, torch.where(found.arrived, error, math.inf), found.evaluations))
    log_z, error, cost = (torch.cat(each) for each in zip(*parts, strict=True))
    return log_z, error, cost


class Opinion(NamedTuple):
    """Another estimate of B data, ``(B,)`` each; it is ``exact`` if by quadrature, and then says too much as well."""

    log_z: Tensor
    error: Tensor
    evaluations: Tensor
    exact: Tensor
    differs: Tensor


def decided(latents: Latents, evidence: Evidence, rows: int) -> Opinion:
    """What another way says of p(x), and whether it contradicts.

    With one or two latent dimensions it is quadrature, if the programs are cheap enough for its grid, otherwise
    sequential Monte Carlo from the prior, of which more particles are asked as long as it is in doubt.
    """
    by_quadrature = latents.dim <= 2 and rows >= CHEAP
    log_z, error, cost = _by_quadrature(latents, rows) if by_quadrature else second_opinion(latents, rows, 128)
    exact = error < EXACT
    for num_particles in (512, 2048, 8192):
        differs = contradicts(evidence.log_px, evidence.mc_se, log_z, error)
        higher = log_z - evidence.log_px > 0.5 * error
        worth = cost.mean() < 5e4  # it is about four times as much each time
        again = (
            (~exact & worth & ((higher & ~differs & (error > 0.03)) | (differs & (error > 0.3)))).nonzero().squeeze(1)
        )
        if len(again) == 0:
            break
        more = second_opinion(latents.select(again), rows, num_particles)
        log_z, error = log_z.index_copy(0, again, more[0]), error.index_copy(0, again, more[1])
        cost = cost.index_add(0, again, more[2])
    differs = contradicts(evidence.log_px, evidence.mc_se, log_z, error)
    differs |= exact & contradicts(log_z, error, evidence.log_px, evidence.mc_se)
    return Opinion(log_z, error, cost, exact, differs)


def _by_quadrature(latents: Latents, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """log p(x) by quadrature, or, of whole programs and where it is not sure of itself, sequential Monte Carlo."""
    if type(latents) is not Latents:
        return second_opinion(latents, rows, 128)
    try:
        found = quadrature(latents.model, latents.guide, latents.data)
    except ContractError:  # its grid is lost where a datum's posterior is hundreds of prior widths away
        return second_opinion(latents, rows, 128)
    log_z, error, cost = found.log_px, found.mc_se, cast(Tensor, found.evaluations)
    unsure = (~cast(Tensor, found.reliable)).nonzero().squeeze(1)
    if len(unsure) == 0:
        return log_z, error, cost
    other = second_opinion(latents.select(unsure), rows, 512)
    pairs = zip((log_z, error, cost), other, strict=True)
    log_z, error, cost = (a.index_copy(0, unsure, b) for a, b in pairs)
    return log_z, error, cost


def contradicts(log_z: Tensor, error: Tensor, other: Tensor, other_error: Tensor) -> Tensor:
    """Whether another estimate, low in expectation, is higher than one by more than both errors allow, ``(B,)``.

    By Markov's inequality an unbiased estimate of p(x) is d nats too high with a probability of at most exp(-d).
    """
    allowed = 3 * torch.hypot(error, other_error) + 0.02
    return (other - log_z > allowed) & (other_error < 1)


def checked(
    latents: Latents,
    evidence: Evidence,
    unseen: Tensor,
    settings: Annealing,
    rows: int,
    compiled: bool,
    blocks: Blocks,
    bar: tqdm,
) -> Evidence:
    """The evidence, with what second opinions say of it; where they are confirmed, it is put right."""
    if not settings.num_checked:
        return evidence._replace(reliable=cast(Tensor, evidence.reliable) & ~(unseen >= ENOUGH))
    budget = max(float(cast(Tensor, evidence.evaluations).sum()), LEAST_BUDGET)
    suspect = unseen >= ENOUGH
    with blocks.apart("order"):
        order = torch.randperm(latents.size, device=evidence.log_px.device)
    order = order[(~suspect[order]).long().argsort(stable=True)]  # suspects first
    tried, wrong, agreed = (torch.zeros_like(suspect) for _ in range(3))
    first, wanted, spent = 0, int(suspect.sum()) + settings.num_checked, 0.0
    cost = cast(Tensor, evidence.evaluations).clone()
    size = block_size(unseen, GROUP)
    while first < min(wanted, latents.size):
        groups = [each.sort().values for each in order[first : min(wanted, latents.size)][:WAVE].split(size)]

        def ask(i: int, groups: list[Tensor] = groups, evidence: Evidence = evidence) -> Part:
            among = groups[i]
            part, mine = latents.select(among), pick(evidence, among)
            opinion = decided(part, mine, rows)
            # where modes are many, nothing is believed but what an estimate confirms that is precise itself
            agrees = _agrees(mine.log_px, mine.mc_se, opinion.log_z, opinion.error)
            again = (opinion.differs | ((unseen[among] >= HOPELESS) & ~agrees)) & ~opinion.exact
            result = opinion._asdict() | {"agrees": agrees, "again": again}
            if again.any():
                alone = Blocks(evidence.log_px)
                found = adaptive(part.select(again.nonzero().squeeze(1)), settings, rows, compiled, alone, bar, "prior")
                result |= {f"found_{name}": value for name, value in found._asdict().items()}
            return result

        for among, part in zip(groups, blocks.each(f"opinion-{first}", ask, len(groups)), strict=True):
            opinion, again = Opinion(**{name: part[name] for name in Opinion._fields}), part["again"]
            tried[among], wrong[among], agreed[among] = True, opinion.differs, part["agrees"]
            cost[among] += opinion.evaluations
            spent += float(opinion.evaluations.sum())
            taken = (opinion.differs | ((unseen[among] >= HOPELESS) & ~part["agrees"])) & opinion.exact
            evidence = _taken(evidence, among[taken], opinion.log_z[taken], opinion.error[taken])
            agreed[among[taken]] = True
            if again.any():
                places, other, error = among[again], opinion.log_z[again], opinion.error[again]
                found = Found(**{name: part[f"found_{name}"] for name in Found._fields})
                evidence = _replaced(evidence, places, found, other, error, settings.error)
                agreed[places] = _agrees(found.log_z, found.mc_se, other, error)
                cost[places] += found.evaluations
            first += len(among)
        if wrong.any() and first >= wanted and spent < budget:
            affordable = first + max(size, int((budget - spent) * first / spent))
            wanted = min(latents.size, 2 * wanted, affordable)
        if spent > budget and first >= settings.num_checked:
            break
    known = cast(Tensor, evidence.reliable) & ~(suspect & ~agreed)
    if wrong.any() and wrong.sum() > MANY_WRONG * tried.sum():
        known = known & tried
    # what took an estimate's place may be as absurd
    known = known & beyond_rounding(evidence.log_px, latents.like.dtype)
    invalid = torch.maximum(evidence.num_invalid, (~evidence.log_px.isfinite()).long())
    return evidence._replace(reliable=known, evaluations=cost, num_invalid=invalid)


def _agrees(log_z: Tensor, mc_se: Tensor, other: Tensor, error: Tensor) -> Tensor:
    """Whether an estimate that is precise itself says the same, ``(B,)``."""
    return ((other - log_z).abs() < 4 * torch.hypot(error, mc_se) + 0.02) & (error < 0.2)


@torch.no_grad()
def confirmed(
    model: Program, guide: Program, data: Data, evidence: Evidence, rows: int, blocks: Blocks, num_checked: int = 16
) -> Evidence:
    """The evidence, not reliable where second opinions contradict it."""
    known = cast(Tensor, evidence.reliable)
    places = known.nonzero().squeeze(1)
    if num_checked == 0 or len(places) == 0:
        return evidence
    with evaluating(model, guide):
        try:
            with blocks.apart("latents"):
                latents = Latents(model, guide, data, gaussian=True)
        except ContractError:  # a discrete site: there is no path to follow from the prior
            return evidence
        cost = cast(Tensor, evidence.evaluations).clone()
        few, mine, draws = latents.select(places), pick(evidence, places), MANY if latents.dim <= FEW else SOME

        def by_prior(at: slice) -> Part:
            among = torch.arange(at.start, at.stop, device=known.device)
            return {"more": _more_by_prior(few.select(at), pick(mine, among), rows, draws)}

        wrong = joined(blocks.of("prior", len(places), by_prior, 8 * blocks.size))["more"]
        known = known.index_fill(0, places[wrong], False)
        cost[places] += draws
        places = places[~wrong]
        with blocks.apart("order"):
            among = places[torch.randperm(len(places))[:num_checked].to(places.device)].sort().values
        if len(among):

            def ask(at: slice) -> Part:
                some = among[at]
                return decided(latents.select(some), pick(evidence, some), rows)._asdict()

            opinion = Opinion(**joined(blocks.of("opinion", len(among), ask, block_size(known, GROUP))))
            cost[among] += opinion.evaluations
            agreed = among[~opinion.differs]
            if opinion.differs.sum() > MANY_WRONG * len(among):
                known = torch.zeros_like(known).index_fill(0, agreed, True)
            else:
                known = known.index_fill(0, among[opinion.differs], False)
    return evidence._replace(reliable=known, evaluations=cost)


def _more_by_prior(latents: Latents, evidence: Evidence, rows: int, num: int) -> Tensor:
    """Whether importance sampling from the prior finds more than the evidence allows, or a density of NaN, ``(B,)``."""
    more = []
    for part in torch.arange(latents.size, device=evidence.log_px.device).split(power_of_two(rows // num)):
        few = latents.select(part)
        with torch.no_grad():
            log_prior, log_w = few.log_joint(few.sample_prior(num))
        found = reduce_log_weights([log_w.double().nan_to_num(nan=-math.inf)], num)
        mine = pick(evidence, part)
        nan = (log_prior + log_w).isnan().any(0)
        more.append(contradicts(mine.log_px, mine.mc_se, found.log_px, found.mc_se) | nan)
    return torch.cat(more)


def _replaced(evidence: Evidence, places: Tensor, found: Found, other: Tensor, error: Tensor, asked: float) -> Evidence:
    """The evidence with that of chains from the prior in some places, or, if they are contradicted too, the other."""
    agree = ~contradicts(found.log_z, found.mc_se, other, error)
    # chains from the prior that find no more refute the other opinion, unless they are too uncertain for that
    first, first_error = evidence.log_px[places], evidence.mc_se[places]
    refuted = ~contradicts(first, first_error, found.log_z, found.mc_se) & ~agree
    refuted |= ~contradicts(first, first_error, found.log_z, found.mc_se) & (found.mc_se > first_error)
    log_px = torch.where(agree, found.log_z, other)
    values = {
        "log_px": torch.where(refuted, first, log_px),
        "mc_se": torch.where(refuted, first_error, torch.where(agree, found.mc_se, error)),
        "acceptance": found.acceptance,
        "reliable": torch.where(refuted, cast(Tensor, evidence.reliable)[places], agree) & (found.mc_se <= asked),
    }
    return evidence._replace(
        **{name: getattr(evidence, name).index_copy(0, places, value) for name, value in values.items()}
    )


def _taken(evidence: Evidence, places: Tensor, log_px: Tensor, error: Tensor) -> Evidence:
    """The evidence with exact values in some places."""
    return evidence._replace(
        log_px=evidence.log_px.index_copy(0, places, log_px),
        mc_se=evidence.mc_se.index_copy(0, places, error.clamp(min=1e-6)),
        reliable=cast(Tensor, evidence.reliable).index_fill(0, places, True),
    )


def check_start(latents: Latents, first: int = 0, num_draws: int = 64) -> Tensor:
    """Refuse programs with an observation whose density is finite at no draw of prior or guide.

    ``first`` is the place of the first of these observations among all.

    Returns:
        Whether it is NaN at none of them, ``(B,)``: otherwise no estimate is to be believed.

    Raises:
        ContractError: naming the sites whose density is not.
    """
    with torch.no_grad():
        draws = torch.cat([latents.sample_guide(num_draws), latents.sample_prior(num_draws)])
        log_prior, log_likelihood = latents.log_joint(draws)
    for what, value in (("prior", log_prior), ("observed", log_likelihood)):
        lost = ~value.isfinite().any(0)
        if lost.any():
            names = latents.latent_names if what == "prior" else latents.observed_names
            raise ContractError(
                f"the log-density of {' and '.join(map(repr, names))} is finite at none of {len(draws)} draws of guide "
                f"and prior for {int(lost.sum())} observations, the first of which is number "
                f"{first + int(lost.nonzero()[0])}: there is no posterior to be annealed to"
            )
    return ~(log_prior + log_likelihood).isnan().any(0)
