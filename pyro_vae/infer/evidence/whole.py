"""log Z of programs without a data plate, and Bayes factors of two of them."""

import math
from typing import Any, Literal, NamedTuple, get_args

import torch

from pyro_vae.errors import check_choice
from pyro_vae.infer.evidence import bridge
from pyro_vae.infer.evidence.annealed import Annealing, anneal_latents
from pyro_vae.infer.evidence.laplace import laplace_approximation
from pyro_vae.infer.evidence.posterior import PosteriorChains
from pyro_vae.infer.evidence.result import Evidence
from pyro_vae.infer.programs import Program, evaluating
from pyro_vae.infer.whole import WholeProgram

Estimator = Literal["annealed", "bridge"]


def model_evidence(
    model: Program,
    *args: Any,
    guide: Program | None = None,
    estimator: Estimator = "annealed",
    settings: Any = None,
    centred: bool | None = None,
    compiled: bool = True,
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
        estimator: annealed: :func:`pyro_vae.annealed_importance_sampling`; bridge: :func:`.bridge_sampling`.
        settings: of the estimator, ``Annealing`` or ``PosteriorChains``; None: its defaults, with an error of 0.05 where
            one is asked for.
        centred: False: latent variables are moved by their own locations and scales, see
            :class:`pyro_vae.infer.whole.WholeProgram`; None: so, where a Gaussian fits the posterior better then.
        compiled: compile what is called often, see :class:`pyro_vae.infer.tracing.Compiled`; not for programs with side
            effects.
        progress: show a progress bar.

    Returns:
        Evidence of one entry, in nats for the whole data set.

    Raises:
        ContractError: as :class:`pyro_vae.infer.whole.WholeProgram`.
        ValueError: if there is no such estimator.
    """
    check_choice("estimator", estimator, get_args(Estimator))
    with evaluating(model, *([] if guide is None else [guide])):
        latents = WholeProgram(model, args, kwargs, guide, centred is not False)
        if centred is None and latents.is_hierarchical:
            latents = max((latents, WholeProgram(model, args, kwargs, guide, False)), key=_fit)
        compiled = compiled and latents.batched
        if estimator == "bridge":
            return bridge.estimate(latents, settings or PosteriorChains(), bridge.Tools.of(latents, compiled))
        return anneal_latents(latents, settings or Annealing(error=0.05), latents.rows, compiled, progress)


def _fit(latents: WholeProgram, num_samples: int = 256) -> float:
    """The evidence lower bound of the Gaussian that fits the posterior: log Z minus their divergence in KL."""
    with torch.no_grad():
        at = laplace_approximation(latents)
        e = torch.randn(num_samples, 1, latents.dim).to(latents.like)
        log_joint = sum(latents.log_joint(at.to_latents(e))) + at.log_det
        bound = log_joint + 0.5 * (e.square().sum(-1) + latents.dim * math.log(2 * math.pi))
        return bound.double().nan_to_num(-math.inf).mean().item()


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
