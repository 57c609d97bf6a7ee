"""log p(x) by annealed importance sampling, and between a lower and an upper bound by bidirectional Monte Carlo."""

import math
from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_vae.infer.checks import check_parts, check_program
from pyro_vae.infer.evidence.annealing import CREMER_2018 as CREMER_2018
from pyro_vae.infer.evidence.annealing import WU_2017 as WU_2017
from pyro_vae.infer.evidence.annealing import Annealing as Annealing
from pyro_vae.infer.evidence.blocks import Blocks, Part, Work, block_size, joined, power_of_two
from pyro_vae.infer.evidence.chains import Path, Start, anew, anneal, evaluator, warm_up
from pyro_vae.infer.evidence.importance import WORTH, rows_per_chunk
from pyro_vae.infer.evidence.laplace import laplace_approximation, laplace_cost, observations_at_once
from pyro_vae.infer.evidence.opinion import check_start, checked
from pyro_vae.infer.evidence.result import (
    Evidence,
    as_part,
    beyond_rounding,
    concatenate,
    from_part,
    rounding,
    t_factor,
)
from pyro_vae.infer.evidence.rounds import Found, adaptive, coordinates_of, kind_of, longest_step
from pyro_vae.infer.evidence.weights import reduce_log_weights
from pyro_vae.infer.programs import Program, evaluating, scoring
from pyro_vae.infer.supports import Latents
from pyro_vae.infer.trees import Data, data_size, split

DEFAULTS = Annealing()
FEWEST = 0.15
"""Over the number of chains, an error that is added: a part of p(x) that none of them met does not show in theirs."""


def annealed_importance_sampling(
    model: Program,
    guide: Program,
    data: Data,
    settings: Annealing = DEFAULTS,
    memory: int | None = None,
    compiled: bool = True,
    progress: bool = False,
    work: Work | None = None,
) -> Evidence:
    """Estimate log p(x) of each observation by annealed importance sampling (Neal 2001), there and back.

    A chain z_0 .. z_(T-1) that starts at z_0 ~ start and is annealed to the posterior has the log-weight

        log w = sum_t (beta_t - beta_(t-1)) (log p(x, z_(t-1)) - log start(z_(t-1))),    E[w] = p(x).

    With a given number of temperatures that is all, and log 1/C sum_c w_c is low in expectation, by about half of
    ``mc_se`` squared (:meth:`Evidence.shortfall`). Otherwise the chains go back to the start as well, from where they
    arrived, and Bennett's acceptance ratio joins both ways, whose biases are opposite; temperatures are added for each
    observation until its error is the one asked for. The start is a mixture of normals around all modes of the
    posterior that climbs from several points find, each with chains of its own.

    ``reliable`` is false where the error asked for was not reached, or where sequential Monte Carlo from the prior,
    tried on ``num_checked`` observations and wherever modes seem to have been missed, finds more of p(x), unless chains
    from the prior that it confirms take the estimate's place. If it finds more in any, it is tried on further ones, as
    many as cost no more than all chains did, and where it fails more than a few, what was not tried is not reliable.
    No test of this kind finds a mode that neither climbs nor prior draws come near.

    Args:
        model, guide: see :func:`pyro_vae.traces`; latent sites must be continuous, there may be several. The guide
            says where the posterior is looked for first, and is the start if asked.
        data: see :func:`pyro_vae.traces`; on the programs' device.
        settings: of the chains.
        memory, work: see :func:`pyro_vae.importance_sampling`.
        compiled: compile what is called often, see :class:`pyro_vae.infer.compiling.Compiled`; not for programs with
            side effects.
        progress: show a progress bar.

    Returns:
        Evidence of the N observations, in nats per datum: ``mc_se`` is such that 1.96 times it is a 95 % interval;
        ``khat`` needs a given number of temperatures and at least 21 chains.

    Raises:
        ContractError: as :func:`pyro_vae.traces`, if a site is discrete, or if p(x, z) is finite nowhere at the start.
    """
    with scoring(model, guide):
        blocks = Blocks(data, work)
        with blocks.apart("checks"):
            check_parts(model, guide, data)
            # a gradient keeps what a forward pass drops
            rows = max(1, rows_per_chunk(model, guide, data, memory) // 2)
    with evaluating(model, guide):
        with blocks.apart("latents"):
            latents = Latents(model, guide, data, gaussian=True)
        return anneal_latents(latents, settings, rows, compiled, progress, blocks)


@torch.no_grad()
def anneal_latents(
    latents: Latents,
    settings: Annealing,
    rows: int,
    compiled: bool = True,
    progress: bool = False,
    blocks: Blocks | None = None,
) -> Evidence:
    """What :func:`annealed_importance_sampling` does once the programs are checked; ``rows`` z fit into memory."""
    blocks = blocks or Blocks(latents.like)

    def start(at: slice) -> Part:
        return {"known": check_start(latents.select(at), at.start)}

    known = joined(blocks.of("start", latents.size, start))["known"]
    with tqdm(total=latents.size, disable=not progress, unit="datum", desc="annealing") as bar:
        if settings.num_temperatures is not None:
            evidence, unseen = _there_only(latents, settings, rows, compiled, blocks, bar)
        else:
            found = adaptive(latents, settings, rows, compiled, blocks, bar)
            evidence, unseen = evidence_of(found, settings), found.unseen
        mc_se = torch.maximum(evidence.mc_se, rounding(evidence.log_px, latents.like.dtype))
        known = known & beyond_rounding(evidence.log_px, latents.like.dtype)
        evidence = evidence._replace(mc_se=mc_se, reliable=cast(Tensor, evidence.reliable) & known)
        return checked(latents, evidence, unseen, settings, rows, compiled, blocks, bar)


def evidence_of(found: Found, settings: Annealing) -> Evidence:
    """Evidence from estimates of adaptive chains."""
    nan = torch.full_like(found.log_z, math.nan)
    mc_se = torch.hypot(found.mc_se, found.unseen)  # that share of p(x) may be missing
    mc_se = torch.hypot(mc_se, torch.full_like(mc_se, FEWEST / settings.num_chains))
    reached = (mc_se <= settings.error) & found.log_z.isfinite()
    invalid = (~(found.log_z.isfinite() & found.mc_se.isfinite())).long()
    return Evidence(
        found.log_z,
        mc_se,
        ess=nan,
        khat=nan,
        num_invalid=invalid,
        acceptance=found.acceptance,
        num_samples=settings.num_chains,
        reliable=reached,
        evaluations=found.evaluations,
    )


def _there_only(
    latents: Latents, settings: Annealing, rows: int, compiled: bool, blocks: Blocks, bar: tqdm
) -> tuple[Evidence, Tensor]:
    """Unbiased estimates with a given number of temperatures, from a start on one mode, if it is laplace."""
    paths, parts = Paths(latents, settings, rows, compiled, blocks), []

    def estimate(at: slice) -> Part:
        results = []
        for path, steps in paths.of(latents.select(at)):
            log_w, _, acceptance = anneal(path, paths.betas, path.evaluate(path.draw(settings.num_chains)), steps)
            results.append(one_way(log_w, acceptance, path))
        return as_part(concatenate(results))

    for part in blocks.of("annealed", latents.size, estimate):
        parts.append(part)
        bar.update(len(part["log_px"]))
    evidence = from_part(joined(parts))
    return evidence, torch.zeros_like(evidence.log_px)


class Sandwich(NamedTuple):
    """log p(x) of observations between two estimates.

    Attributes:
        lower: annealed importance sampling, low in expectation.
        upper: the same chains in reverse from the posterior, high in expectation. On simulated data they share their
            first point, so that ``mc_se`` understates how much another simulation would differ: use that of
            :meth:`width`.
        data: the simulated data, or those given, as the programs take them.
    """

    lower: Evidence
    upper: Evidence
    data: Data

    def width(self) -> tuple[float, float]:
        """Mean of upper minus lower, and its standard error over observations, in nats."""
        difference = self.upper.log_px - self.lower.log_px
        size = len(difference)
        return difference.mean().item(), difference.std().item() / size**0.5 if size > 1 else math.nan


def bidirectional_monte_carlo(
    model: Program,
    guide: Program,
    data: Data,
    settings: Annealing = DEFAULTS,
    memory: int | None = None,
    compiled: bool = True,
    progress: bool = False,
    work: Work | None = None,
) -> Sandwich:
    """Enclose log p(x) of observations that are drawn from the model itself (Grosse, Ghahramani & Adams 2015).

    The z that an observation was drawn from is an exact draw of its posterior. Chains that are annealed from it back
    to the start have weights of mean 1 / p(x), which gives an estimate that is high in expectation. A narrow
    gap between the two shows that the settings suffice for data like those simulated; a wide one, how far they may
    fail.

    Args:
        model, guide, settings, memory, compiled, progress, work: see :func:`annealed_importance_sampling`.
        data: what is observed is drawn anew, for as many data; conditions and masks stay.
    """
    with scoring(model, guide):
        blocks = Blocks(data, work)
        with blocks.apart("simulate"):
            latents = Latents(model, guide, data, gaussian=True)
            data, posterior_draws = latents.simulate()
            check_program(model, guide, next(split(data, 1000)))
            rows = max(1, rows_per_chunk(model, guide, data, memory) // 2)
    latents, parts = latents.of(data), []

    def estimate(at: slice) -> Part:
        drawn, bounds = posterior_draws[at].expand(settings.num_chains, -1, -1), []
        for path, steps in paths.of(latents.select(at)):
            here, drawn = drawn[:, : path.latents.size], drawn[:, path.latents.size :]
            bounds.append(enclosed(path, paths.betas, steps, here))
        return as_bounds(*(concatenate(each) for each in zip(*bounds, strict=True)))

    bar = tqdm(total=data_size(data), disable=not progress, unit="datum", desc="annealing")
    with bar, evaluating(model, guide):
        paths = Paths(latents, settings, rows, compiled, blocks)
        for part in blocks.of("bounds", latents.size, estimate):
            parts.append(part)
            bar.update(len(part["lower_log_px"]))
    return Sandwich(*from_bounds(joined(parts)), data)


def as_bounds(lower: Evidence, upper: Evidence) -> Part:
    """Both as tensors by name."""
    sides = {"lower": as_part(lower), "upper": as_part(upper)}
    return {f"{side}_{name}": each for side, part in sides.items() for name, each in part.items()}


def from_bounds(part: Part) -> tuple[Evidence, Evidence]:
    """What :func:`as_bounds` was given."""
    known = {name: each for name, each in part.items() if name == "known"}
    sides = (
        known | {name[6:]: each for name, each in part.items() if name[:6] == f"{side}_"} for side in ("lower", "upper")
    )
    lower, upper = map(from_part, sides)
    return lower, upper


def enclosed(path: Path, betas: Tensor, steps: Tensor, drawn: Tensor) -> tuple[Evidence, Evidence]:
    """Evidence from chains to the posterior, and from as many back from u drawn of it, ``(C, B, D)``."""
    log_w, _, acceptance = anneal(path, betas, path.evaluate(path.draw(len(drawn))), steps)
    lower = one_way(log_w, acceptance, path)
    log_w, _, acceptance = anneal(
        path, betas.flip(0), path.evaluate(path.coordinates.from_latents(drawn)), steps.flip(0)
    )
    inverse = one_way(log_w, acceptance, path)
    return lower, inverse._replace(log_px=-inverse.log_px)


def one_way(log_w: Tensor, acceptance: Tensor, path: Path) -> Evidence:
    """Evidence of chains that went one way; reliable if none of them alone makes up the average."""
    evidence = reduce_log_weights([log_w], len(log_w))
    mc_se = torch.maximum(evidence.mc_se * t_factor(len(log_w) - 1), rounding(evidence.log_px, path.latents.like.dtype))
    cost = torch.full_like(mc_se, float(path.evaluations))
    known = evidence.log_px.isfinite() & (evidence.ess >= len(log_w) / 4) & (mc_se < 0.5)
    return evidence._replace(acceptance=acceptance, mc_se=mc_se, reliable=known, evaluations=cost)


class Paths:
    """Paths of observations from a start to the posterior.

    Args:
        latents: of all observations.
        settings: of the chains.
        rows: how many z fit into memory.
        compiled: whether what is called often is compiled.
        blocks: of the estimate; a pilot is one of its stages if the settings do not say how many temperatures.

    Attributes:
        betas: temperatures, ``(T + 1,)``.
    """

    def __init__(self, latents: Latents, settings: Annealing, rows: int, compiled: bool, blocks: Blocks):
        self._settings = settings
        self._kind: Start = kind_of(latents, settings.start)
        self._at_once = observations_at_once(rows, latents.dim)
        self._size = power_of_two(rows // settings.num_chains)
        self._evaluate = evaluator(latents, self._kind, compiled)
        num = settings.num_temperatures
        if num is None:
            with blocks.apart("few"):
                few = latents.select(torch.randperm(latents.size)[:32].to(latents.like.device))
            num = int(blocks.once("pilot", lambda: {"num": torch.tensor(_pilot(self._path(few), settings))})["num"])
        self.betas = settings.temperatures(num).to(latents.like)
        whole = min(self._size, self._at_once, block_size(latents.like))
        many = num * settings.num_leapfrogs * (latents.size // whole) > WORTH
        self._evaluate = evaluator(latents, self._kind, compiled, whole if many else 0)

    def of(self, latents: Latents) -> Iterator[tuple[Path, Tensor]]:
        """For each chunk of observations its path, and step sizes ``(T - 1, B)`` of its own."""
        self._evaluate = anew(self._evaluate)
        for first in range(0, latents.size, self._at_once):
            whole = self._path(latents.select(slice(first, first + self._at_once)))
            for start in range(0, whole.latents.size, self._size):
                path = whole.select(slice(start, start + self._size))
                path.evaluations = whole.evaluations
                yield path, step_sizes(path, self.betas, self._settings)

    def _path(self, part: Latents) -> Path:
        laplace = self._settings.start == "laplace"
        coordinates = laplace_approximation(part) if laplace else coordinates_of(part, self._settings.start)
        path = Path(part, coordinates, self._kind, self._settings.num_leapfrogs, self._evaluate)
        path.evaluations = laplace_cost(part.dim) if laplace else 64
        return path


def step_sizes(path: Path, betas: Tensor, settings: Annealing) -> Tensor:
    """Step sizes of each transition, ``(T - 1, B)``, adapted by chains that go the whole way."""
    longest = longest_step(settings.start, settings.num_leapfrogs)
    return warm_up(path, betas, settings.num_warmup_chains, longest, settings.target_acceptance)


def _pilot(path: Path, settings: Annealing, least: int = 5) -> int:
    """How many temperatures it takes: more as long as the chains' log-weights vary too much for the error asked for."""
    allowed = math.log1p(settings.num_chains * settings.error**2)  # of log w, if it is normal
    num = least
    while num < settings.most_temperatures:
        betas = settings.temperatures(num).to(path.latents.like)
        steps = step_sizes(path, betas, settings)
        log_w, _, _ = anneal(path, betas, path.evaluate(path.draw(settings.num_chains)), steps)
        ratio = log_w.var(0).nanmean().item() / allowed
        if ratio <= 1:
            return num
        wider = 4.0 if math.isnan(ratio) else min(ratio, 4)
        num = min(settings.most_temperatures, math.ceil(num * wider))
    return num
