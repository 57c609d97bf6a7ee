"""log p(x) of real observations between a lower and an upper estimate."""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from pyro_vae.infer.evidence.annealed import Paths, Sandwich, as_bounds, enclosed, from_bounds
from pyro_vae.infer.evidence.annealing import Annealing
from pyro_vae.infer.evidence.blocks import Blocks, Part, Work
from pyro_vae.infer.evidence.chains import evaluator
from pyro_vae.infer.evidence.opinion import confirmed
from pyro_vae.infer.evidence.posterior import Posterior, PosteriorChains, by_blocks, posterior_chains
from pyro_vae.infer.evidence.result import Evidence
from pyro_vae.infer.programs import Program
from pyro_vae.infer.supports import Latents
from pyro_vae.infer.trees import Data

ANNEALING = Annealing(32, error=0.05)
CHAINS = PosteriorChains()


def sandwich(
    model: Program,
    guide: Program,
    data: Data,
    settings: Annealing = ANNEALING,
    chains: PosteriorChains = CHAINS,
    memory: int | None = None,
    compiled: bool = True,
    progress: bool = False,
    work: Work | None = None,
) -> Sandwich:
    """Enclose log p(x) of the observations themselves, not of simulated ones, between two estimates.

    The lower one is annealed importance sampling: its mean is at most log p(x). Chains that are annealed from draws of
    the posterior back to the start have weights of mean 1 / p(x), so that minus the logarithm of their average is at
    least log p(x) in expectation (Grosse, Ghahramani & Adams 2015). The draws are those of long Hamiltonian chains
    that start far apart, and whose convergence is tested: R-hat and effective sample sizes of all coordinates and of
    log p(x, z). What has converged is drawn from the posterior up to an error that these tests bound but roughly.

    **No certificate for modes never seen.** If no chain has met a mode, from the prior, the guide or the Laplace
    approximation, the chains agree, R-hat is 1, and both estimates are low by what that mode holds. Bidirectional
    Monte Carlo on simulated data does not have this gap (:func:`pyro_vae.bidirectional_monte_carlo`), but is of data
    like those simulated only.

    Args:
        model, guide, memory, compiled, progress, work: see :func:`pyro_vae.annealed_importance_sampling`.
        data: see :func:`pyro_vae.traces`; on the programs' device.
        settings: of the annealed chains, which go both ways.
        chains: of the posterior.

    Returns:
        Both estimates of the N observations, in nats per datum, and the data as given. ``reliable`` is false of both
        where the posterior's chains have not converged, or the two differ by more than four of their errors.

    Raises:
        ContractError: as :func:`pyro_vae.traces`, if a site is discrete, and if chains run away since log p(x)
            diverges.
    """

    def tools(latents: Latents, whole: int) -> list[Callable]:
        return [evaluator(latents, "normal", compiled)]

    def do(latents: Latents, evaluate: Callable) -> Part:
        return as_bounds(*estimate(latents, settings, chains, evaluate, compiled))

    most = max(settings.num_chains, chains.num_chains)
    name, draws = "sandwich", chains.num_draws
    found, rows, blocks = by_blocks(model, guide, data, tools, do, most, memory, progress, name, work, draws)
    below, above = from_bounds(found)
    below = confirmed(model, guide, data, below, rows, blocks)
    sound = cast(Tensor, below.reliable)
    return Sandwich(below, above._replace(reliable=cast(Tensor, above.reliable) & sound), data)


class Bounds(NamedTuple):
    """Evidence from below and from above."""

    lower: Evidence
    upper: Evidence


def estimate(
    latents: Latents,
    settings: Annealing = ANNEALING,
    chains: PosteriorChains = CHAINS,
    evaluate: Callable | None = None,
    compiled: bool = False,
) -> Bounds:
    """:func:`sandwich` of one chunk of data; ``evaluate`` is for the posterior's chains."""
    posterior = posterior_chains(latents, chains, evaluate or evaluator(latents, "normal", compiled))
    rows = 2 * latents.size * settings.num_chains  # one path for all
    paths = Paths(latents, settings, rows, compiled, Blocks(latents.like))
    ((path, steps),) = paths.of(latents)
    lower, upper = enclosed(path, paths.betas, steps, spread_draws(posterior, settings.num_chains))
    apart = (upper.log_px - lower.log_px).abs() > 4 * torch.hypot(upper.mc_se, lower.mc_se)
    sound = posterior.converged & ~apart
    lower, upper = (each._replace(reliable=each.reliable & sound) for each in (lower, upper))
    return Bounds(lower, upper._replace(evaluations=upper.evaluations + posterior.evaluations))


def spread_draws(posterior: Posterior, num: int) -> Tensor:
    """u of ``num`` draws as far from each other as can be, of all chains in turn: ``(num, B, D)``."""
    length, num_chains = posterior.e.shape[:2]
    turn = torch.arange(num)
    times = length - 1 - (turn // num_chains) * (length // -(-num // num_chains))
    return posterior.coordinates.to_latents(posterior.e[times, turn % num_chains])
