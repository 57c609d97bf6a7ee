"""log p(x) by thermodynamic integration along the path from a start to the posterior."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pyro_vae.infer.convergence import autocorrelation_ess
from pyro_vae.infer.evidence.blocks import Part, Work
from pyro_vae.infer.evidence.chains import Path, Start, evaluator
from pyro_vae.infer.evidence.laplace import laplace_approximation, laplace_cost
from pyro_vae.infer.evidence.opinion import confirmed
from pyro_vae.infer.evidence.posterior import PRIOR_DRAWS, PosteriorChains, by_blocks, contradicted, posterior_chains
from pyro_vae.infer.evidence.result import Evidence, as_part, from_part, rounding, t_factor
from pyro_vae.infer.evidence.rounds import coordinates_of, longest_step
from pyro_vae.infer.evidence.tempered import pilot
from pyro_vae.infer.programs import Program
from pyro_vae.infer.supports import Latents
from pyro_vae.infer.trees import Data

MAX_DRIFT = 4.5
"""Standard errors, of few chains, by which the halves of all draws may differ, as they do where chains lag behind."""
MAX_ERROR = 0.5
MOST_TEMPERATURES = 100


@dataclass(frozen=True)
class Thermodynamic:
    """Chains that stop at each temperature of a path.

    Args:
        num_chains: C, at least 4.
        num_temperatures: T, an even number of steps from beta = 0 to 1; None: as many as make each about a third of
            the length in which the density of the path changes beyond recognition, 8 to 100.
        num_warmup: transitions at each temperature before those that count, at least 1.
        num_draws: transitions at each temperature that count, at least 4.
        start: laplace: a Gaussian with the posterior's mode and curvature; guide: q(z | x); prior: p(z).
        num_leapfrogs: gradient steps of a transition, at least 1.
        target_acceptance: of the adapted step sizes, in (0, 1).
        check: chains that start far apart, and must agree for an estimate to count as reliable.

    Raises:
        ValueError: if a setting is out of range.
    """

    num_chains: int = 16
    num_temperatures: int | None = None
    num_warmup: int = 10
    num_draws: int = 40
    start: Literal["laplace", "guide", "prior"] = "laplace"
    num_leapfrogs: int = 4
    target_acceptance: float = 0.8
    check: PosteriorChains = field(default_factory=lambda: PosteriorChains(8, 100, 150, max_rhat=1.05, min_ess=100))

    def __post_init__(self):
        least = {"num_chains": 4, "num_temperatures": 2, "num_warmup": 1, "num_draws": 4, "num_leapfrogs": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is None and name == "num_temperatures":
                continue
            if not isinstance(value, int) or value < bound:
                raise ValueError(f"{name} must be a whole number of at least {bound}, got {value}")
        if (self.num_temperatures or 0) % 2:
            raise ValueError(f"num_temperatures must be even, got {self.num_temperatures}")
        if self.start not in (choices := get_args(type(self).__annotations__["start"])):
            raise ValueError(f"start must be one of {', '.join(choices)}, got {self.start}")
        if not 0 < self.target_acceptance < 1:
            raise ValueError(f"target_acceptance must be between 0 and 1, got {self.target_acceptance}")

    @property
    def path_start(self) -> Start:
        return "normal" if self.start == "laplace" else self.start


DEFAULTS = Thermodynamic()


def thermodynamic_integration(
    model: Program,
    guide: Program,
    data: Data,
    settings: Thermodynamic = DEFAULTS,
    memory: int | None = None,
    compiled: bool = True,
    progress: bool = False,
    work: Work | None = None,
) -> Evidence:
    """Estimate log p(x) of each observation by thermodynamic integration (Friel & Pettitt 2008).

    With p_beta proportional to start(z)^(1 - beta) p(x, z)^beta,

        log p(x) = integral of E_beta[U] over beta from 0 to 1,    U = log p(x, z) - log start(z),

    by the trapezoidal rule with its second-derivative correction (Friel, Hurn & Wyse 2014, equation 12),

        sum_t d_t / 2 (E_t[U] + E_(t-1)[U]) - d_t^2 / 12 (Var_t[U] - Var_(t-1)[U]),    d_t = beta_t - beta_(t-1),

    since d E_beta[U] / d beta = Var_beta[U]. The expectations are averages over Hamiltonian chains. Temperatures stand
    at equal distances by the standard deviation of U, as a pilot finds it, the same for all data of a chunk.

    Args:
        model, guide, memory, compiled, progress, work: see :func:`pyro_vae.annealed_importance_sampling`.
        data: see :func:`pyro_vae.traces`; on the programs' device.
        settings: of the chains.

    Returns:
        Evidence of the N observations, in nats per datum. ``mc_se`` is that of the average over chains, which are
        independent, such that 1.96 times it is a 95 % interval, and a third of what every other temperature would
        change, in quadrature; ``ess`` that of U at
        beta = 1. ``reliable`` where the chains of ``settings.check`` agree, the first and second half of the draws do,
        the error is below 0.5, and draws of the prior say nothing else. ``khat`` is NaN.

    Raises:
        ContractError: as :func:`pyro_vae.traces`, if a site is discrete, and if chains run away since log p(x)
            diverges.
    """

    def tools(latents: Latents, whole: int) -> Tools:
        return Tools.of(latents, settings, compiled)

    def do(latents: Latents, *tools: Callable) -> Part:
        return as_part(estimate(latents, settings, Tools(*tools)))

    found, rows, blocks = by_blocks(
        model, guide, data, tools, do, settings.num_chains, memory, progress, "thermodynamic", work
    )
    return confirmed(model, guide, data, from_part(found), rows, blocks)


class Tools(NamedTuple):
    """What evaluates points of the path, and of the chains that check it, for all chunks of data alike."""

    path: Callable[..., tuple[Tensor, ...]]
    check: Callable[..., tuple[Tensor, ...]]

    @classmethod
    def of(cls, latents: Latents, settings: Thermodynamic, compiled: bool) -> "Tools":
        check = evaluator(latents, "normal", compiled)
        start = settings.path_start
        return cls(check if start == "normal" else evaluator(latents, start, compiled), check)


def estimate(latents: Latents, settings: Thermodynamic = DEFAULTS, tools: Tools | None = None) -> Evidence:
    """:func:`thermodynamic_integration` of one chunk of data."""
    tools = tools or Tools.of(latents, settings, compiled=False)
    path, spent = _path(latents, settings, tools.path)
    longest = longest_step(settings.start, settings.num_leapfrogs)
    found = pilot(path, 1.0, settings.num_chains, longest, settings.target_acceptance)
    wanted = 2 * math.ceil(1.5 * min(found.lengths[-1].item(), MOST_TEMPERATURES))
    num = settings.num_temperatures or min(MOST_TEMPERATURES, max(8, wanted))
    betas, steps = found.place(num, torch.ones(1, dtype=torch.float64, device=latents.like.device))
    means, variances, last, acceptance = _averages(path, betas, steps, settings)
    whole = means.mean((1, 2))
    fine, coarse = (integral(betas[::by], whole[::by], variances[::by]) for by in (1, 2))
    of_chains = integral(betas, means)  # (2, C, B), of the halves of each chain
    of_halves = of_chains[0] - of_chains[1]
    drift = (of_halves.mean(0).abs() - 1e-3).clamp(min=0) / (of_halves.std(0) / settings.num_chains**0.5)
    sampling = of_chains.mean(0).std(0) / settings.num_chains**0.5 * t_factor(settings.num_chains - 1)
    mc_se = torch.maximum(torch.hypot(sampling, (fine - coarse) / 3), rounding(fine, latents.like.dtype))
    check = posterior_chains(latents, settings.check, tools.check)
    doubted = contradicted(latents, fine, mc_se, settings.num_chains)
    return Evidence(
        log_px=fine,
        mc_se=mc_se,
        ess=autocorrelation_ess(last),
        khat=torch.full_like(fine, math.nan),
        num_invalid=(~means.isfinite()).sum((0, 1, 2)),
        acceptance=acceptance,
        num_samples=settings.num_chains * settings.num_draws * len(betas),
        reliable=check.converged & ~(drift > MAX_DRIFT) & (mc_se < MAX_ERROR) & ~doubted,
        evaluations=torch.full_like(fine, spent + path.evaluations + check.evaluations + PRIOR_DRAWS),
    )


def _path(latents: Latents, settings: Thermodynamic, evaluate: Callable) -> tuple[Path, int]:
    """The path, in coordinates in which its start is about a unit ball, and what finding them cost."""
    laplace = settings.start == "laplace"
    where = laplace_approximation(latents) if laplace else coordinates_of(latents, settings.start)
    spent = laplace_cost(latents.dim) if laplace else 64
    return Path(latents, where, settings.path_start, settings.num_leapfrogs, evaluate), spent


def _averages(
    path: Path, betas: Tensor, steps: Tensor, settings: Thermodynamic
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """E[U] of both halves of each chain at each temperature, ``(T + 1, 2, C, B)``; Var[U] of all, ``(T + 1, B)``.

    Also the last U, ``(N, C, B)``, and the mean acceptance, ``(B,)``.
    """
    state = path.evaluate(path.draw(settings.num_chains))
    means, variances, acceptances = [], [], []
    half = settings.num_draws // 2
    for beta, step in zip(betas.to(state.start), steps, strict=True):
        draws = []
        for t in range(settings.num_warmup + 2 * half if beta > 0 else 2 * half):
            if beta > 0:
                state, acceptance = path.transition(state, beta, step)
                acceptances.append(acceptance)
            elif t:
                state = path.evaluate(path.draw(settings.num_chains))  # exact, and independent
            draws.append((state.target - state.start).double())
        draws = torch.stack(draws[-2 * half :])
        means.append(draws.unflatten(0, (2, half)).mean(1))
        variances.append(draws.flatten(0, 1).var(0))
    return torch.stack(means), torch.stack(variances), draws, torch.stack(acceptances).mean(0).double()


def integral(betas: Tensor, means: Tensor, variances: Tensor | None = None) -> Tensor:
    """By the trapezoidal rule, ``(T + 1, *) -> (*)``; with variances, corrected by them as derivatives of the means."""
    widths = betas.diff().view(-1, *[1] * (means.dim() - 1))
    total = (widths / 2 * (means[1:] + means[:-1])).sum(0)
    return total if variances is None else total - (widths.square() / 12 * variances.diff(dim=0)).sum(0)
