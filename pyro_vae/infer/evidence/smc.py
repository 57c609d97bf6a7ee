"""log p(x) by sequential Monte Carlo."""

import math
from collections.abc import Callable
from typing import Any

import torch

from pyro_vae.infer.evidence.blocks import Part, Work
from pyro_vae.infer.evidence.chains import Path, evaluator
from pyro_vae.infer.evidence.opinion import check_start, confirmed
from pyro_vae.infer.evidence.particles import SMC, sample_particles
from pyro_vae.infer.evidence.posterior import by_blocks
from pyro_vae.infer.evidence.result import Evidence, as_part, beyond_rounding, from_part, log_mean_of_groups, rounding
from pyro_vae.infer.evidence.rounds import coordinates_of, kind_of
from pyro_vae.infer.programs import Program
from pyro_vae.infer.supports import Latents
from pyro_vae.infer.trees import Data

DEFAULTS = SMC()
LARGEST_SPREAD = 0.5
"""Standard deviation over groups of their log p(x), in nats, up to which its half square, the bias, is small."""


def smc(
    model: Program,
    guide: Program,
    data: Data,
    settings: SMC = DEFAULTS,
    memory: int | None = None,
    compiled: bool = True,
    progress: bool = False,
    work: Work | None = None,
) -> Evidence:
    """Estimate log p(x) of each observation by sequential Monte Carlo (Del Moral, Doucet & Jasra 2006).

    Particles go from the prior, or the guide, to the posterior, by temperatures at which the effective sample size has
    fallen to a given share, resampled at each and moved by Hamiltonian Monte Carlo. Several modes are no obstacle as
    long as the particles at the start come near each; many dimensions are, where it says that it is not reliable.

    Args:
        model, guide, memory, compiled, progress, work: see :func:`pyro_vae.annealed_importance_sampling`.
        data: see :func:`pyro_vae.traces`; on the programs' device.
        settings: of the particles.

    Returns:
        Evidence of the N observations, in nats per datum. ``mc_se`` is from the spread of groups that resample apart,
        such that 1.96 times it is a 95 % interval; ``reliable`` where all particles arrived and the groups' log p(x)
        have a standard deviation below 0.5. ``ess`` and ``khat`` are NaN.

    Raises:
        ContractError: as :func:`pyro_vae.traces`, and if a site is discrete.
    """

    def tools(latents: Latents, whole: int) -> list[Callable[..., Any]]:
        return [evaluator(latents, kind_of(latents, settings.start), compiled, whole)]

    def do(latents: Latents, evaluate: Callable[..., Any]) -> Part:
        return as_part(estimate(latents, settings, evaluate))

    name = "sequential Monte Carlo"
    found, rows, blocks = by_blocks(model, guide, data, tools, do, settings.num_particles, memory, progress, name, work)
    return confirmed(model, guide, data, from_part(found), rows, blocks)


@torch.no_grad()
def estimate(latents: Latents, settings: SMC = DEFAULTS, evaluate: Callable[..., Any] | None = None) -> Evidence:
    """:func:`smc` of one chunk of data."""
    known, kind = check_start(latents), kind_of(latents, settings.start)
    evaluate = evaluate or evaluator(latents, kind, False)
    path = Path(latents, coordinates_of(latents, settings.start), kind, settings.num_leapfrogs, evaluate)
    found = sample_particles(path, settings)
    log_px, mc_se = log_mean_of_groups(found.log_z)
    nan, told = torch.full_like(log_px, math.nan), beyond_rounding(log_px, latents.like.dtype)
    return Evidence(
        log_px,
        torch.maximum(mc_se, rounding(log_px, latents.like.dtype)),
        ess=nan,
        khat=nan,
        num_invalid=(~found.log_z.isfinite()).sum(0) + found.num_nan,
        acceptance=found.acceptance,
        num_samples=settings.num_particles,
        reliable=known & found.arrived & (found.log_z.std(0) < LARGEST_SPREAD) & told,
        evaluations=found.evaluations,
    )
