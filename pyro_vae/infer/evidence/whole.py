"""log Z of programs without a data plate, and Bayes factors of two of them."""

import math
from dataclasses import replace
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from pyro_vae.errors import check_choice
from pyro_vae.infer.evidence import bridge, thermodynamic
from pyro_vae.infer.evidence.annealed import anneal_latents
from pyro_vae.infer.evidence.annealing import Annealing
from pyro_vae.infer.evidence.particles import SMC
from pyro_vae.infer.evidence.posterior import PosteriorChains
from pyro_vae.infer.evidence.result import Evidence
from pyro_vae.infer.evidence.smc import estimate as by_particles
from pyro_vae.infer.evidence.thermodynamic import Thermodynamic
from pyro_vae.infer.programs import Program, evaluating
from pyro_vae.infer.whole import WholeProgram

Estimator = Literal["annealed", "smc", "bridge", "thermodynamic"]


def model_evidence(
    model: Program,
    *args: Any,
    guide: Program | None = None,
    estimator: Estimator = "annealed",
    settings: Any = None,
    centred: bool | None = None,
    compiled: bool = False,
    progress: bool = False,
    **kwargs: Any,
) -> Evidence:
    """log Z of a whole program, the marginal likelihood of its data: log of the integral of p(x, z) over all z.

    The program is any Pyro program of continuous latent variables: Bayesian regression, a hierarchical model, a process
    with hyperparameters. It needs no plate of data; all that it observes is one datum, log-factors included.

    Args:
        model: p(x, z), called as ``model(*args, **kwargs)``; one that has an argument of the name of one of those
            below can be given as a ``functools.partial``.
        guide: where the posterior is looked for: a program over the same sites, or one of Pyro's AutoGuides, trained.
            None: where the prior draws.
        estimator: annealed: :func:`pyro_vae.annealed_importance_sampling`; smc, bridge, thermodynamic: :func:`.smc`,
            :func:`.bridge_sampling`, :func:`.thermodynamic_integration`.
        settings: of the estimator: ``Annealing``, ``SMC``, ``PosteriorChains`` or ``Thermodynamic``. None: its
            defaults, for annealing an error of 0.05, up to 512 chains, and the start that suits best.
        centred: False: latent variables are moved by their own locations and scales, see
            :class:`pyro_vae.infer.whole.WholeProgram`; None: so, where a short path does better then.
        compiled: compile what is called often, see :class:`pyro_vae.infer.compiling.Compiled`; it takes seconds, which
            programs of few sites do not win back.
        progress: show a progress bar.

    Returns:
        Evidence of one entry, in nats for the whole data set.

    Raises:
        ContractError: as :class:`pyro_vae.infer.whole.WholeProgram`.
        ValueError: if there is no such estimator.
    """
    check_choice("estimator", estimator, get_args(Estimator))
    with evaluating(model, *([] if guide is None else [guide])):
        candidates = [WholeProgram(model, args, kwargs, guide, centred is not False)]
        if centred is None and candidates[0].is_hierarchical and not candidates[0].improper:
            candidates.append(WholeProgram(model, args, kwargs, guide, False))
        many = _num_chains(candidates[0])
        if estimator == "annealed":
            starts = [settings.start] if settings else ["laplace", "prior", *(["guide"] if guide is not None else [])]
            settings = settings or Annealing(many, error=0.05)
        else:
            settings = settings or {"smc": SMC(4 * many), "bridge": PosteriorChains()}.get(estimator, Thermodynamic())
            starts = [getattr(settings, "start", "laplace")]
        paths = [replace(Annealing(min(many, 128)), start=start) for start in starts]
        (latents, path), spent = _better([(latents, path) for latents in candidates for path in paths])
        if estimator == "annealed":
            settings = replace(settings, start=path.start)
        evidence = _estimate(latents, estimator, settings, compiled and latents.batched, progress)
    return evidence._replace(evaluations=cast(Tensor, evidence.evaluations) + spent)


def _estimate(latents: WholeProgram, estimator: Estimator, settings: Any, compiled: bool, progress: bool) -> Evidence:
    if estimator == "annealed":
        return anneal_latents(latents, settings, latents.rows, compiled, progress)
    if estimator == "smc":
        return by_particles(latents, settings)
    if estimator == "bridge":
        return bridge.estimate(latents, settings, bridge.Tools.of(latents, compiled))
    return thermodynamic.estimate(latents, settings, thermodynamic.Tools.of(latents, settings, compiled))


def _num_chains(latents: WholeProgram) -> int:
    """Chains of an estimate by default: many cost little where the data are few, since all run at once."""
    return 2 ** min(9, max(4, int(math.log2(4 * latents.rows))))


def _better(choices: list[tuple[WholeProgram, Annealing]]) -> tuple[tuple[WholeProgram, Annealing], float]:
    """The coordinates and the start in which a short path from and back to the start has the least error; its cost."""
    if len(choices) == 1:
        return choices[0], 0.0
    errors, spent = [], 0.0
    for latents, settings in choices:
        short = replace(settings, num_temperatures=None, most_temperatures=4, error=1e-6, num_checked=0)
        found = anneal_latents(latents, short, latents.rows, compiled=False)
        errors.append(found.mc_se.nan_to_num(nan=math.inf).item())
        spent += cast(Tensor, found.evaluations).item()
    return choices[min(range(len(errors)), key=errors.__getitem__)], spent


class BayesFactor(NamedTuple):
    """How much better one model predicts the data than another.

    Attributes:
        log_factor: log p(x) of the first minus log p(x) of the second, in nats.
        error: its Monte Carlo standard error.
        reliable: whether both evidences are.
    """

    log_factor: float
    error: float
    reliable: bool


def bayes_factor(first: Evidence, second: Evidence) -> BayesFactor:
    """The log Bayes factor of two models of the same data, in nats, with its Monte Carlo standard error.

    Evidence of several data is added up, as that of independent data. Errors add in quadrature.

    Raises:
        ValueError: if the two are not of as many data.
    """
    if first.log_px.shape != second.log_px.shape:
        raise ValueError(
            f"the evidences are of {first.log_px.numel()} and {second.log_px.numel()} data: compare models of the same "
            "data"
        )
    error = torch.cat([first.mc_se, second.mc_se]).square().sum().sqrt().item()
    reliable = all(each.reliable is None or bool(each.reliable.all()) for each in (first, second))
    return BayesFactor((first.log_px - second.log_px).sum().item(), error, reliable)
