"""Estimators of the benchmark: each makes of a task, and a budget of model evaluations per datum, its evidence."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from experiments.evidence_benchmark.task import Task
from pyro_vae import Annealing, ContractError, Evidence, annealed_importance_sampling, importance_sampling, quadrature
from pyro_vae.infer.diagnostics import pareto_k_threshold
from pyro_vae.infer.evidence import (
    CREMER_2018,
    SMC,
    WU_2017,
    PosteriorChains,
    Thermodynamic,
    bridge_sampling,
    smc,
    thermodynamic_integration,
)
from pyro_vae.infer.evidence.laplace import laplace_cost
from pyro_vae.infer.supports import Latents

Estimator = Callable[[Task, int], Evidence]
"""Called with a task and about how often the model may be evaluated for each datum; a gradient counts as two."""

EAGER: dict[str, Any] = {"compiled": False}
"""Tasks are small, and compiling takes seconds for each."""


def from_guide(task: Task, budget: int) -> Evidence:
    """Importance sampling from the guide."""
    found = importance_sampling(task.model, task.guide, task.data, budget, **EAGER)
    return _with_cost(found, budget)


def from_laplace(task: Task, budget: int) -> Evidence:
    """Importance sampling from a Gaussian at a mode, its standard deviations a tenth wider."""
    spent = 40 + laplace_cost(Latents(task.model, task.guide, task.data).dim)
    num = max(10, budget - spent)
    found = importance_sampling(task.model, task.guide, task.data, num, "laplace", 1.1, **EAGER)
    return _with_cost(found, num + spent)


def wu(task: Task, budget: int) -> Evidence:
    """Annealing from the prior as Wu et al. (2017) set it, with as many temperatures as the budget has."""
    return _from_prior(WU_2017, task, budget)


def cremer(task: Task, budget: int) -> Evidence:
    """Annealing from the prior as Cremer et al. (2018) set it, with as many temperatures as the budget has."""
    return _from_prior(CREMER_2018, task, budget)


def annealed(task: Task, budget: int) -> Evidence:
    """This library's, for an error that is its default, 0.2 nats, at a budget of 3,000.

    It takes no more than the error needs, and at most about four times the budget before it gives up.
    """
    most = min(4096, max(8, budget * 256 // 12_000))
    settings = Annealing(error=0.2 * math.sqrt(3000 / budget), most_temperatures=most)
    return annealed_importance_sampling(task.model, task.guide, task.data, settings, **EAGER)


def particles(task: Task, budget: int) -> Evidence:
    """Sequential Monte Carlo from the prior with Hamiltonian moves, as if it took half a dozen temperatures."""
    defaults = SMC()
    each = 2 * 6 * defaults.num_leapfrogs * defaults.num_moves * defaults.num_groups
    settings = replace(defaults, num_particles=defaults.num_groups * max(2, budget // each))
    return smc(task.model, task.guide, task.data, settings, **EAGER)


def bridge(task: Task, budget: int) -> Evidence:
    """Bridge sampling from long posterior chains."""
    _check(budget, 4000)
    return bridge_sampling(task.model, task.guide, task.data, _lengthened(PosteriorChains(), budget), **EAGER)


def thermodynamic(task: Task, budget: int) -> Evidence:
    """Thermodynamic integration, as if it took eight temperatures; a quarter is for the chains that check it."""
    _check(budget, 12_000)
    defaults = Thermodynamic()
    transitions = budget * 3 // 4 // (8 * 2 * defaults.num_chains * defaults.num_leapfrogs)
    num_warmup, num_draws = max(1, transitions // 5), max(4, transitions * 4 // 5)
    check = _lengthened(defaults.check, budget // 4)
    settings = replace(defaults, num_warmup=num_warmup, num_draws=num_draws, check=check)
    return thermodynamic_integration(task.model, task.guide, task.data, settings, **EAGER)


def _check(budget: int, least: int) -> None:
    """Refuse a budget that is less than the least that an estimator can do with."""
    if budget < least:
        raise ContractError(f"it takes at least {least:,} evaluations, and the budget is {budget:,}")


def _lengthened(settings: PosteriorChains, budget: int) -> PosteriorChains:
    """Chains as long as the budget has it, with the share of warm-up that they had."""
    transitions = budget // (2 * settings.num_chains * settings.num_leapfrogs)
    num_warmup = transitions * settings.num_warmup // (settings.num_warmup + settings.num_draws)
    return replace(settings, num_warmup=max(20, num_warmup), num_draws=max(8, transitions - num_warmup))


def on_a_grid(task: Task, budget: int) -> Evidence:
    """Quadrature, for one or two latent variables."""
    return _with_cost(quadrature(task.model, task.guide, task.data, max(1024, budget)), max(1024, budget))


ESTIMATORS: dict[str, Estimator] = {
    "importance_guide": from_guide,
    "importance_laplace": from_laplace,
    "ais_wu": wu,
    "ais_cremer": cremer,
    "annealed": annealed,
    "smc": particles,
    "bridge": bridge,
    "thermodynamic": thermodynamic,
    "quadrature": on_a_grid,
}
"""By the names that tables print."""


def run(task: Task, estimator: str, budget: int, seed: int = 0) -> Evidence:
    """The evidence of a task by an estimator; ``reliable`` and ``evaluations`` are always there.

    Where an estimator does not say whether it is reliable, it is where the Pareto k of its weights is below its
    threshold.

    Args:
        task: one of :func:`experiments.evidence_benchmark.tasks.tasks`.
        estimator: one of ``ESTIMATORS``.
        budget: about how often the model may be evaluated for each datum, a gradient counting as two.
        seed: of torch's random numbers.

    Raises:
        ContractError: if the estimator does not take such programs, or cannot do with so few evaluations.
    """
    torch.manual_seed(seed)
    found = ESTIMATORS[estimator](task, budget)
    if found.reliable is None:
        good = ~(found.khat > pareto_k_threshold(found.num_samples)) & found.log_px.isfinite()
        found = found._replace(reliable=good)
    return found


def _from_prior(settings: Annealing, task: Task, budget: int) -> Evidence:
    """With its warm-up, which goes the whole way, counted; no second opinion, which these authors did not ask for."""
    each = 2 * settings.num_leapfrogs * (settings.num_chains + settings.num_warmup_chains)
    _check(budget, each)
    settings = replace(settings, num_temperatures=1 + budget // each, num_checked=0)
    return annealed_importance_sampling(task.model, task.guide, task.data, settings, **EAGER)


def _with_cost(evidence: Evidence, evaluations: int) -> Evidence:
    """Evidence whose evaluations are these, if it does not say itself."""
    if evidence.evaluations is not None:
        return evidence
    return evidence._replace(evaluations=torch.full_like(evidence.log_px, float(evaluations)))
