"""log p(x) by bridge sampling between long posterior chains and a Gaussian fitted to them."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.infer.compiling import Compiled
from pyro_vae.infer.convergence import autocorrelation_ess
from pyro_vae.infer.evidence.blocks import Part, Work
from pyro_vae.infer.evidence.chains import evaluator
from pyro_vae.infer.evidence.laplace import Coordinates, cholesky, whitened_log_joint
from pyro_vae.infer.evidence.opinion import confirmed
from pyro_vae.infer.evidence.posterior import (
    PRIOR_DRAWS,
    PosteriorChains,
    average_variance,
    by_blocks,
    contradicted,
    posterior_chains,
)
from pyro_vae.infer.evidence.result import Evidence, as_part, beyond_rounding, from_part
from pyro_vae.infer.programs import Program
from pyro_vae.infer.supports import Latents
from pyro_vae.infer.trees import Data

DEFAULTS = PosteriorChains()
MAX_ERROR = 0.5
"""Nats; a relative error that large is not what the delta method says, nor is the logarithm's bias small."""


def bridge_sampling(
    model: Program,
    guide: Program,
    data: Data,
    settings: PosteriorChains = DEFAULTS,
    memory: int | None = None,
    compiled: bool = True,
    progress: bool = False,
    work: Work | None = None,
) -> Evidence:
    """Estimate log p(x) of each observation by bridge sampling (Meng & Wong 1996; Gronau et al. 2017, a tutorial).

    With draws z_i of the posterior, and as many draws y_j of a proposal g, p(x) is where

        p = [1/n sum_j l(y_j) / (s1 l(y_j) + s2 p)] / [1/n sum_i 1 / (s1 l(z_i) + s2 p)],    l = p(x, z) / g(z),

    stands still; s1 and s2 are the shares of the draws, those of the chains by their effective sample size. The first
    half of each chain fits the proposal, a Gaussian, the second half enters the equation. Both are symmetrized about
    the proposal's mean (Warp-III, Meng & Schilling 2002), so that a skewed posterior overlaps with it.

    Independent of annealing: its error is that of long chains, so that it finds what annealing from a poor start
    misses, at many times the cost. No estimate from chains sees a mode that none of them has found.

    Args:
        model, guide, memory, compiled, progress, work: see :func:`pyro_vae.annealed_importance_sampling`.
        data: see :func:`pyro_vae.traces`; on the programs' device.
        settings: of the posterior chains.

    Returns:
        Evidence of the N observations, in nats per datum. ``mc_se`` adds the errors of both sums, that of the chains by
        overlapping batch means (Flegal & Jones 2010) or by autocorrelations, whichever is larger; ``ess`` is the
        effective number of their draws. ``reliable`` where the chains have converged, the iteration too, the error is
        below 0.5, and draws of the prior say nothing else. ``khat`` is NaN.

    Raises:
        ContractError: as :func:`pyro_vae.traces`, if a site is discrete, and if chains run away since log p(x)
            diverges.
    """

    def tools(latents: Latents, whole: int) -> Tools:
        return Tools.of(latents, compiled)

    def do(latents: Latents, *tools: Callable) -> Part:
        return as_part(estimate(latents, settings, Tools(*tools)))

    chains, draws, name = settings.num_chains, settings.num_draws, "bridge sampling"
    found, rows, blocks = by_blocks(model, guide, data, tools, do, chains, memory, progress, name, work, draws)
    return confirmed(model, guide, data, from_part(found), rows, blocks)


class Tools(NamedTuple):
    """What scores points, for all chunks of data alike: with gradients, for chains; and without."""

    evaluate: Callable[..., tuple[Tensor, ...]]
    score: Callable[..., Tensor]

    @classmethod
    def of(cls, latents: Latents, compiled: bool) -> "Tools":
        score = partial(_score, latents)
        return cls(evaluator(latents, "normal", compiled), Compiled(score) if compiled else torch.no_grad()(score))


def estimate(latents: Latents, settings: PosteriorChains = DEFAULTS, tools: Tools | None = None) -> Evidence:
    """:func:`bridge_sampling` of one chunk of data."""
    tools = tools or Tools.of(latents, compiled=False)
    posterior = posterior_chains(latents, settings, tools.evaluate)
    half = len(posterior.e) // 2
    frame, moved = _fitted(posterior.coordinates, posterior.e[:half], posterior.e[half:])
    log_det = frame.log_det - posterior.coordinates.log_det
    ratios = []  # log p / g, of the chains' draws and the proposal's
    for e, known in ((moved, posterior.log_joint[half:] + log_det), (torch.randn_like(moved), None)):
        rows = []
        for i, each in enumerate(e):  # the size of the chains, which memory allows
            at = tools.score(each, latents.data, *frame) if known is None else known[i]
            mirrored = tools.score(-each, latents.data, *frame)
            rows.append(torch.logaddexp(at.double(), mirrored.double()) - math.log(2) - _log_normal(each))
        ratios.append(torch.stack(rows))
    log_px, mc_se, ess, settled = _bridge(*ratios)
    doubted = contradicted(latents, log_px, mc_se, settings.num_chains)
    told = beyond_rounding(log_px, latents.like.dtype)
    spent = posterior.evaluations + 3 * moved[..., 0, 0].numel() + PRIOR_DRAWS
    return Evidence(
        log_px=log_px,
        mc_se=mc_se,
        ess=ess,
        khat=torch.full_like(log_px, math.nan),
        num_invalid=(~torch.cat(ratios).isfinite()).sum((0, 1)),
        acceptance=posterior.acceptance,
        num_samples=moved[..., 0, 0].numel(),
        reliable=posterior.converged & settled & (mc_se < MAX_ERROR) & ~doubted & told,
        evaluations=torch.full_like(log_px, spent),
    )


def _score(latents: Latents, e: Tensor, data: Data, *coordinates: Tensor) -> Tensor:
    return whitened_log_joint(latents.of(data), Coordinates(*coordinates), e)


def _log_normal(e: Tensor) -> Tensor:
    return -0.5 * (e.double().square().sum(-1) + e.shape[-1] * math.log(2 * math.pi))


def _fitted(coordinates: Coordinates, first: Tensor, second: Tensor) -> tuple[Coordinates, Tensor]:
    """Coordinates in which draws ``first`` have mean 0 and unit covariance, and ``second`` in them."""
    draws = first.flatten(0, 1).double()
    mean = draws.mean(0)
    centred = draws - mean
    covariance = torch.einsum("kbi,kbj->bij", centred, centred) / len(draws)
    identity = torch.eye(covariance.shape[-1]).to(covariance)
    scale = cholesky(covariance + 1e-9 * average_variance(covariance).clamp(min=1e-6) * identity)
    whole = Coordinates(
        coordinates.loc.double() + (coordinates.factor.double() @ mean.unsqueeze(-1)).squeeze(-1),
        coordinates.factor.double() @ scale,
        coordinates.log_det + scale.diagonal(dim1=-2, dim2=-1).log().sum(-1),
    )
    moved = torch.linalg.solve_triangular(scale, (second.double() - mean).unsqueeze(-1), upper=False).squeeze(-1)
    return Coordinates(*(each.to(first) for each in whole)), moved.to(first)


def _bridge(chains: Tensor, proposed: Tensor, most: int = 1000) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fixed point for log-ratios ``(N, C, B)`` of chains and of proposals.

    Returns:
        log p(x), its error, the effective number of the chains' draws, and whether the iteration settled: ``(B,)``.
    """
    size = chains[..., 0].numel()
    ess = autocorrelation_ess(chains).clamp(min=1, max=size)
    log_share = (ess / (ess + size)).log(), (size / (ess + size)).log()

    def terms(log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of what the two sums add up."""
        below = [torch.logaddexp(log_share[0] + each, log_share[1] + log_p) for each in (chains, proposed)]
        return -below[0], proposed - below[1]

    log_p = proposed.flatten(0, 1).logsumexp(0) - math.log(size)
    change = torch.full_like(log_p, math.inf)
    for _ in range(most):
        of_chains, of_proposal = (each.flatten(0, 1).logsumexp(0) for each in terms(log_p))
        new = of_proposal - of_chains
        change, log_p = (new - log_p).abs(), new
        if not (change > 1e-9).any():
            break
    of_chains, of_proposal = terms(log_p)
    of_chains = (of_chains - of_chains.flatten(0, 1).logsumexp(0) + math.log(size)).exp()  # of mean 1
    of_proposal = (of_proposal - of_proposal.flatten(0, 1).logsumexp(0) + math.log(size)).exp()
    # batches are too short for chains that mix slowly, as autocorrelations are too noisy for those that do not
    by_lags = of_chains.flatten(0, 1).var(0) / autocorrelation_ess(of_chains)
    variance = torch.maximum(batch_variance(of_chains), by_lags) + of_proposal.flatten(0, 1).var(0) / size
    return log_p, variance.sqrt(), ess, change <= 1e-9


def batch_variance(draws: Tensor) -> Tensor:
    """The variance of the mean of N draws of C chains, by overlapping batches of root N: ``(N, C, *) -> (*)``.

    Batches are compared with the mean of all chains (Flegal & Jones 2010, equation 5; Vats, Flegal & Jones 2019), so
    that what chains differ by counts.
    """
    n, num_chains = draws.shape[:2]
    length = math.isqrt(n)
    sums = torch.cat([torch.zeros_like(draws[:1]), draws.cumsum(0)])
    batches = (sums[length:] - sums[:-length]) / length
    squares = (batches - draws.mean((0, 1))).square().mean((0, 1))
    return squares * length * n / (n - length) / (n * num_chains)
