"""log p(x_target | x_given): of some entries of each observation given others, for any pattern of them."""

import math
from functools import partial
from typing import Any, cast

import pyro
import torch
from torch import Tensor

from pyro_vae.errors import ContractError
from pyro_vae.infer.checks import seen_entries
from pyro_vae.infer.evidence.annealed import DEFAULTS, FEWEST, annealed_importance_sampling, step_sizes
from pyro_vae.infer.evidence.annealing import Annealing
from pyro_vae.infer.evidence.blocks import Blocks, Part, Work, joined, named, power_of_two
from pyro_vae.infer.evidence.chains import Path, anneal, evaluator, in_graphs, resample
from pyro_vae.infer.evidence.importance import rows_per_chunk
from pyro_vae.infer.evidence.laplace import Coordinates, laplace_approximation, laplace_cost
from pyro_vae.infer.evidence.result import Evidence, rounding
from pyro_vae.infer.evidence.rounds import ARRIVED, LEAST_OF_FEW, Found, there_and_back
from pyro_vae.infer.programs import Program, evaluating, sample_sites, scoring, site_of, traces
from pyro_vae.infer.supports import Latents
from pyro_vae.infer.trees import Data, first_tensor, select, with_arguments


def log_conditional(
    model: Program,
    guide: Program,
    data: Data,
    target: Tensor,
    given: Tensor,
    settings: Annealing = DEFAULTS,
    memory: int | None = None,
    compiled: bool = True,
    work: Work | None = None,
) -> Evidence:
    """Estimate log p(x_target | x_given) of each observation x, by chains from p(z | x_given) to p(z | x).

    Chains that have arrived at p(z | x_given) are annealed on, by p(x_target | z)^beta, and back; Bennett's ratio of
    both ways gives the ratio of p(x_target, x_given) to p(x_given). The two are also estimated one by one
    (:func:`pyro_vae.annealed_importance_sampling`): where the difference of their logarithms contradicts the chains, or
    is more precise, it is what is returned.

    Args:
        model, guide: called with ``data``, and with booleans ``seen`` of x's shape as another argument of that name, as
            a :class:`pyro_vae.VAE` is; the model's observed site counts only what was seen. Latent sites must be
            continuous.
        data: see :func:`pyro_vae.traces`, without the mask; its first tensor is x, shape ``(B, X)``. Entries that are
            in neither mask count for nothing.
        target: booleans, shape ``(B, X)``, or ``(X,)`` for all observations alike.
        given: likewise; none of them may be a target. Where there is none, the result is log p(x_target).
        settings: of the chains; ``error`` is what is asked for of the result, and of both parts.
        memory, compiled, work: see :func:`pyro_vae.annealed_importance_sampling`.

    Returns:
        Evidence, whose ``log_px`` is log p(x_target | x_given), in nats per datum: a density in the unit of x_target,
        or a mass. ``reliable`` where the estimates of both parts are, chains and difference agree within their errors,
        and the error is the one asked for.

    Raises:
        ContractError: if the masks are no booleans of x's shape, overlap, or ask for NaN, naming row and column; if the
            model does not heed ``seen``; and as :func:`pyro_vae.annealed_importance_sampling`.
    """
    x = first_tensor(data)
    target, given = _checked_masks(x, target, given)
    whole, part = with_arguments(data, seen=target | given), with_arguments(data, seen=given)
    blocks = Blocks(data, work)
    with scoring(model, guide), blocks.apart("heeded"):
        for each, seen in ((whole, target | given), (part, given)):
            _check_heeded(model, guide, each, seen)
    options: dict[str, Any] = {"settings": settings, "memory": memory, "compiled": compiled}

    def annealed(name: str, data: Data) -> Evidence:
        with blocks.apart(name):
            return annealed_importance_sampling(model, guide, data, **options, work=named(name, work))

    of_whole, of_part = annealed("whole", whole), annealed("part", part)
    with scoring(model, guide), blocks.apart("checks"):
        rows = max(1, rows_per_chunk(model, guide, whole, memory) // 6)  # two gradients, of what each keeps
        latents = Latents(model, guide, part, gaussian=True)
    with evaluating(model, guide), torch.no_grad():
        enough = torch.hypot(of_whole.mc_se, of_part.mc_se) <= settings.error
        found = _chained(latents, whole, settings, rows, compiled, enough, blocks)
    result = _joined(of_whole, of_part, found, settings, latents.like.dtype)
    return _exact_where_empty(result, of_whole, target, given)


def _checked_masks(x: Tensor, target: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    masks = []
    for name, mask in (("target", target), ("given", given)):
        if mask.dtype != torch.bool or mask.shape not in (x.shape, x.shape[1:]):
            raise ContractError(
                f"{name} must be booleans of shape {tuple(x.shape)} or {tuple(x.shape[1:])}, it is of {mask.dtype} and "
                f"shape {tuple(mask.shape)}"
            )
        mask = mask.to(x.device).expand(x.shape)
        if (unknown := mask & x.isnan()).any():
            raise ContractError(f"{name} asks for an entry that is NaN, in {_place(unknown)}: nobody saw it")
        masks.append(mask)
    if (overlap := masks[0] & masks[1]).any():
        raise ContractError(f"target and given overlap, in {_place(overlap)}: what is given has no probability left")
    return masks[0], masks[1]


def _place(wrong: Tensor) -> str:
    row, *columns = wrong.nonzero()[0].tolist()
    return f"row {row}" + (f", column {columns[0] if len(columns) == 1 else tuple(columns)}" if columns else "")


def _check_heeded(model: Program, guide: Program, data: Data, seen: Tensor) -> None:
    """Refuse programs whose observed site counts something else than what was seen."""
    few = select(data, slice(8))
    with pyro.validation_enabled(False):
        trace = traces(model, guide, few, 1).model
    observed = [name for name in sample_sites(trace) if site_of(trace, name)["is_observed"]]
    if len(observed) != 1:
        raise ContractError(f"log_conditional is for programs of one observed site, this one has {observed}")
    site = site_of(trace, observed[0])
    counted, value, seen = seen_entries(site), site["value"], seen[: len(first_tensor(few))]
    while counted.dim() > seen.dim():
        counted = counted.all(0)
    if value.shape[-seen.dim() :] != seen.shape or not torch.equal(counted.expand(seen.shape), seen):
        raise ContractError(
            f"site '{observed[0]}' must count what its program's argument 'seen' says, of the first tensor of the "
            "data: mask its distribution, as in dist.Normal(loc, scale).mask(seen).to_event(1)"
        )


class _Between(Path):
    """The densities p(z, x_given) p(x_target | z)^beta, with chains that have arrived at p(z | x_given)."""

    arrived: Tensor

    def draw(self, num_chains: int) -> Tensor:
        return self.arrived[:num_chains]


@torch.enable_grad()
def _evaluate(latents: Latents, e: Tensor, data: Any, coordinates: Any, mixture: Any) -> tuple[Tensor, ...]:
    """What :class:`State` holds after e, of the densities given a part of x, and of all of it."""
    coordinates, e = Coordinates(*coordinates), e.detach().requires_grad_()
    u = coordinates.to_latents(e)
    ends = []
    for each in data:
        log_prior, log_likelihood = latents.of(each).log_joint(u)
        ends.append(log_prior + log_likelihood + coordinates.log_det)
    gradients = [torch.autograd.grad(end.sum(), e, retain_graph=True)[0] for end in ends]
    return tuple(each.detach() for each in (*ends, *gradients))


def _chained(
    latents: Latents, whole: Data, settings: Annealing, rows: int, compiled: bool, enough: Tensor, blocks: Blocks
) -> Found:
    """log p(x_target | x_given) by chains; ``rows`` z fit into memory; where it is known well ``enough``, once only."""
    pair = latents.of((latents.data, whole))
    size = power_of_two(min(blocks.size, rows // settings.num_chains))
    compiled = compiled and latents.size > 4 * size  # compiling takes longer than a few chunks do
    regular = min(size, blocks.size)
    evaluates = (
        evaluator(latents, "normal", compiled, regular, math.inf),
        in_graphs(partial(_evaluate, latents), compiled, regular, math.inf),
    )

    def estimate(among: slice) -> Part:
        part = latents.select(among)
        coordinates = laplace_approximation(part)
        most = settings.num_temperatures or settings.most_temperatures
        num = settings.num_temperatures or min(LEAST_OF_FEW, most)
        found = _round(part, pair.select(among), coordinates, settings, num, evaluates)
        wanted = ~enough[among]
        while num < most and (again := (wanted & ~(found.mc_se <= settings.error)).nonzero().squeeze(1)).numel():
            num = min(most, 2 * num)
            chosen = part.select(again), pair.select(among).select(again), coordinates.select(again)
            more = _round(*chosen, settings, num, evaluates)
            cost = found.evaluations[again] + more.evaluations
            more = more._replace(evaluations=cost)
            found = Found(*(a.index_copy(0, again, b) for a, b in zip(found, more, strict=True)))
        return found._asdict()

    return Found(**joined(blocks.of("conditional", latents.size, estimate, size)))


def _round(
    part: Latents, pair: Latents, coordinates: Coordinates, settings: Annealing, num: int, evaluates: tuple[Any, Any]
) -> Found:
    """One estimate of each observation: chains to p(z | x_given), and from there to p(z | x) and back."""
    betas = settings.temperatures(num).to(part.like)
    path = Path(part, coordinates, "normal", settings.num_leapfrogs, evaluates[0])
    steps = step_sizes(path, betas, settings)
    log_w, state, _ = anneal(path, betas, path.evaluate(path.draw(settings.num_chains)), steps)
    state = state.select(resample(log_w))
    last = steps[-1] if len(steps) else torch.full_like(coordinates.log_det, 0.5 / settings.num_leapfrogs)
    for _ in range(ARRIVED):
        state, _ = path.transition(state, betas[-1], last)
    between = _Between(pair, coordinates, "normal", settings.num_leapfrogs, evaluates[1])
    between.arrived = state.e
    steps = step_sizes(between, betas, settings) if num > 1 else last.expand(1, -1)
    log_z, error, acceptance = there_and_back(between, betas, steps, settings.num_chains)
    # chains that were doubled on the way to the start are fewer than they seem
    ess = (2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp().clamp(min=1)
    error = error * (len(log_w) / ess).sqrt()
    cost = torch.full_like(log_z, float(path.evaluations + 2 * between.evaluations + laplace_cost(part.dim)))
    return Found(log_z, error, acceptance, torch.zeros_like(log_z), cost)


def _joined(whole: Evidence, part: Evidence, found: Found, settings: Annealing, dtype: torch.dtype) -> Evidence:
    """The chains' estimate, or the difference of the two where that is more precise, or the chains are wrong."""
    difference = whole.log_px - part.log_px
    error = torch.hypot(whole.mc_se, part.mc_se)
    floor = torch.full_like(found.mc_se, FEWEST / settings.num_chains)
    mc_se = torch.hypot(found.mc_se, floor)
    apart = (found.log_z - difference).abs() > 3 * torch.hypot(mc_se, error) + 0.02
    agree = ~apart | ~(mc_se < 1)  # chains that did not arrive say nothing
    better = agree & (mc_se < error)
    log_px = torch.where(better, found.log_z, difference)
    rounded = torch.maximum(rounding(whole.log_px, dtype), rounding(part.log_px, dtype))
    mc_se = torch.maximum(torch.where(better, mc_se, error), rounded)
    reliable = cast(Tensor, whole.reliable) & cast(Tensor, part.reliable) & agree & (mc_se <= settings.error)
    return whole._replace(
        log_px=log_px,
        mc_se=mc_se,
        num_invalid=(~log_px.isfinite()).long(),
        acceptance=found.acceptance,
        ess=torch.full_like(log_px, math.nan),
        khat=torch.full_like(log_px, math.nan),
        reliable=reliable,
        evaluations=cast(Tensor, whole.evaluations) + cast(Tensor, part.evaluations) + found.evaluations,
    )


def _exact_where_empty(result: Evidence, whole: Evidence, target: Tensor, given: Tensor) -> Evidence:
    """Of no target p is one; given nothing it is p(x_target)."""
    no_target, nothing = ~target.flatten(1).any(1), ~given.flatten(1).any(1)
    zero = torch.zeros_like(result.log_px)

    def pick(mine: Tensor, others: Tensor, of_none: Tensor) -> Tensor:
        return torch.where(no_target, of_none, torch.where(nothing, others, mine))

    return result._replace(
        log_px=pick(result.log_px, whole.log_px, zero),
        mc_se=pick(result.mc_se, whole.mc_se, zero),
        reliable=pick(cast(Tensor, result.reliable), cast(Tensor, whole.reliable), torch.ones_like(no_target)),
    )
