"""Traces of a model and its guide, and their log-weights: what every bound and estimator reduces."""

from collections.abc import Callable
from typing import NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Independent

from pyro_vae.errors import ContractError

Program = Callable[[Tensor], object]
"""An amortized Pyro program: called with observations ``(B, X)``, everything inside one data plate of size B."""


class Traces(NamedTuple):
    """Traces of K samples of the guide and of the model replayed on them, with every site's ``log_prob`` (K, B)."""

    model: poutine.Trace
    guide: poutine.Trace


def traces(model: Program, guide: Program, x: Tensor, num_samples: int) -> Traces:
    """Draw z_1..z_K ~ q(z | x_b) for each observation and score them under model and guide.

    The K samples live in a plate of their own at dimension -2, so programs run once, and the encoder sees each
    observation once.

    Args:
        model: p(x, z), with one plate over the data at dimension -1 and one observed site.
        guide: q(z | x), likewise.
        x: observations, shape ``(B, X)``.
        num_samples: K, at least 1.

    Raises:
        ValueError: if K is below 1.
        ContractError: if the programs break the rules above: a latent site that is not local to the data plate, a
            plate that is subsampled or scaled, no observed site or several.
    """
    return _scored(_draw(guide, x, num_samples), model, x, num_samples)


def leaf_traces(
    model: Program, guide: Program, x: Tensor, num_samples: int
) -> tuple[Traces, dict[str, Tensor], dict[str, Tensor]]:
    """As :func:`traces`, but with both scored at variables of their own that hold the values drawn.

    Derivatives by these leaves, by the model's parameters and by the guide's can so be told apart, and weighed apart.
    A guide of several sites is run a second time, at the leaves, and must then be the same function: no dropout in it.

    Returns:
        The traces; the draws of each latent site, with their gradients; the leaves. ``(K, B, *event_shape)`` both.
    """
    guide_trace = _draw(guide, x, num_samples)
    draws = {name: guide_trace.nodes[name]["value"] for name in sample_sites(guide_trace)}
    leaves = {name: draw.detach().requires_grad_(draw.is_floating_point()) for name, draw in draws.items()}
    for name, leaf in leaves.items():
        guide_trace.nodes[name]["value"] = leaf
    if len(draws) > 1:  # later sites' distributions must depend on the leaves of the earlier ones
        guide_trace = particle_trace(poutine.replay(guide, trace=guide_trace), x, num_samples)
    return _scored(guide_trace, model, x, num_samples), draws, leaves


def _draw(guide: Program, x: Tensor, num_samples: int) -> poutine.Trace:
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if x.dim() != 2 or x.shape[0] == 0:
        raise ContractError(f"observations must be a tensor of shape (B, X) with B > 0, got {tuple(x.shape)}")
    return particle_trace(guide, x, num_samples)


def _scored(guide_trace: poutine.Trace, model: Program, x: Tensor, num_samples: int) -> Traces:
    """The traces of the guide and of the model replayed on it, with log-probabilities, checked."""
    result = Traces(particle_trace(poutine.replay(model, trace=guide_trace), x, num_samples), guide_trace)
    for each in result:
        each.compute_log_prob()
    _check(result, (num_samples, x.shape[0]))
    return result


def posterior_samples(guide: Program, x: Tensor, num_samples: int) -> dict[str, Tensor]:
    """Draws z_kb ~ q(z | x_b) of each latent site: shapes ``(K, B, *event_shape)``. The model is not run.

    Args:
        guide: see :func:`traces`.
        x: observations, shape ``(B, X)``.
        num_samples: K, at least 1.
    """
    trace = particle_trace(guide, x, num_samples)
    return {name: trace.nodes[name]["value"] for name in sample_sites(trace)}


def particle_trace(program: Program, x: Tensor, num_samples: int) -> poutine.Trace:
    """The trace of one run of a program inside a plate of K particles at dimension -2."""

    def with_particles(x: Tensor) -> None:
        with pyro.plate("particles", num_samples, dim=-2, device=x.device):
            program(x)

    return prune_subsample_sites(poutine.trace(with_particles).get_trace(x))


def log_weights(model: Program, guide: Program, x: Tensor, num_samples: int) -> Tensor:
    """log w_kb = log p(x_b, z_kb) - log q(z_kb | x_b), with z_kb ~ q(z | x_b), in nats; shape ``(K, B)``.

    Their mean over K estimates the ELBO; the log of the mean of their exponentials is the importance-weighted bound
    and estimates log p(x_b) (Burda, Grosse & Salakhutdinov 2016, equation 8).

    Args:
        model, guide: see :func:`traces`.
        x: observations, shape ``(B, X)``.
        num_samples: K, at least 1.

    Raises:
        ValueError: see :func:`traces`.
        ContractError: as :func:`traces`, and if the log-weights are to be differentiated and draws have no gradient.
    """
    both = traces(model, guide, x, num_samples)
    log_w = log_weights_of(both)
    if log_w.requires_grad:
        check_pathwise(both.guide)
    return log_w


def log_weights_of(traces: Traces) -> Tensor:
    """The log-weights ``(K, B)`` of given traces."""
    return sum_log_prob(traces.model) - sum_log_prob(traces.guide)


def check_pathwise(guide_trace: poutine.Trace) -> None:
    """Refuse a guide whose draws carry no gradient: a pathwise bound would train it with a wrong one.

    Raises:
        ContractError: naming the site and its distribution.
    """
    for name in sample_sites(guide_trace):
        if not (made := guide_trace.nodes[name]["fn"]).has_rsample:
            while isinstance(made, Independent):
                made = made.base_dist
            raise ContractError(
                f"guide site '{name}' draws from {type(made).__name__}, whose draws have no gradient (has_rsample is "
                "False), as this bound needs: choose another posterior, TVO, or pyro.infer.Trace_ELBO with PyroSVI"
            )


def sum_log_prob(trace: poutine.Trace) -> Tensor:
    """The sum over all sites of a trace whose log-probabilities are computed, ``(K, B)``."""
    return sum(trace.nodes[name]["log_prob"] for name in sample_sites(trace))


def sample_sites(trace: poutine.Trace) -> list[str]:
    """The names of all sample sites, observed ones too, in the order of the program."""
    return [name for name, site in trace.nodes.items() if site["type"] == "sample"]


def _check(traces: Traces, shape: tuple[int, int]) -> None:
    """Refuse programs for which a sum of log-probabilities over sites is not a log-weight per observation."""
    latents = {name for name in sample_sites(traces.model) if not traces.model.nodes[name]["is_observed"]}
    observed = [name for name in sample_sites(traces.model) if name not in latents]
    if len(observed) != 1:
        raise ContractError(f"the model must have exactly one observed site, it has {observed or 'none'}")
    if latents != (in_guide := set(sample_sites(traces.guide))):
        raise ContractError(
            f"model and guide must have the same latent sites, got {sorted(latents)} and {sorted(in_guide)}"
        )
    for program, trace in zip(("model", "guide"), traces, strict=True):
        for name in sample_sites(trace):
            site = trace.nodes[name]
            if isinstance(site["scale"], Tensor) or site["scale"] != 1:
                raise ContractError(
                    f"{program} site '{name}' is scaled, by a subsampled plate or poutine.scale, which biases every "
                    "estimate of log p(x): pass the observations themselves, in an unscaled plate"
                )
            plates = {frame.dim for frame in site["cond_indep_stack"] if frame.vectorized}
            if plates != {-2, -1} or site["log_prob"].shape != shape:
                raise ContractError(
                    f"{program} site '{name}' is in plates at dimensions {sorted(plates)}, its log-probabilities have "
                    f"shape {tuple(site['log_prob'].shape)} for {shape[0]} samples (dim -2) of {shape[1]} observations "
                    "(dim -1): put every site in one data plate at dim=-1, and other dimensions in .to_event()"
                )


def check_program(model: Program, guide: Program, x: Tensor) -> None:
    """Run model and guide once on ``x`` and refuse what would give a number that is no log-likelihood.

    Supports are judged by draws: those of the guide must lie in the model's support, and those of the model in the
    guide's, which else misses part of the posterior.

    Args:
        model, guide: see :func:`traces`.
        x: observations, shape ``(B, X)``.

    Raises:
        ContractError: as :func:`traces`, and if there is no observation or an observation lies outside the support
            of its likelihood (grey pixels under a Bernoulli, which no normalized density or mass would score), or the
            observed site holds something else than x, or model and guide disagree about the support of a latent site.
    """
    if x.isnan().any():
        raise ContractError(f"{x.isnan().flatten(1).any(1).sum().item()} of {len(x)} observations hold NaN")
    with torch.no_grad(), pyro.validation_enabled(False):
        model_trace, guide_trace = traces(model, guide, x, num_samples=2)
        for name in sample_sites(guide_trace):
            guided, modelled = guide_trace.nodes[name]["fn"], model_trace.nodes[name]["fn"]
            for drawn, other, whose in ((guided, modelled, "guide"), (modelled, guided, "model")):
                if not other.support.check(drawn.sample()).all():
                    raise ContractError(
                        f"at site '{name}' the {whose} draws from {type(drawn).__name__} on {drawn.support}, outside "
                        f"the support of {type(other).__name__}, {other.support}: prior and posterior must have the "
                        "same support, or the posterior be over all reals"
                    )
    for name in sample_sites(model_trace):
        site = model_trace.nodes[name]
        if not site["is_observed"]:
            continue
        value = site["value"]
        if value.numel() != x.numel() or not torch.equal(value.reshape(x.shape).to(x).nan_to_num(), x.nan_to_num()):
            raise ContractError(
                f"the observed site '{name}' holds something else than the observations x that the model was given, so "
                "that its density is not p(x): observe x itself"
            )
        if not (valid := site["fn"].support.check(value)).all():
            head = type(site["fn"]).__name__
            raise ContractError(
                f"{(~valid).sum().item()} observations of site '{name}' lie outside the support of {head}, "
                f"{site['fn'].support}: its log_prob of them is no log-likelihood; binarize the data or choose a "
                "likelihood for its values"
            )


def find_non_finite(model: Program, guide: Program, x: Tensor, num_samples: int = 16) -> str | None:
    """Name the first site whose value or log-probability is NaN or infinite, guide first; None if all are finite."""
    with torch.no_grad(), pyro.validation_enabled(False):
        model_trace, guide_trace = traces(model, guide, x, num_samples)
    for program, trace in (("guide", guide_trace), ("model", model_trace)):
        for name in sample_sites(trace):
            for what in ("value", "log_prob"):
                if not trace.nodes[name][what].isfinite().all():
                    return f"{what.replace('_prob', '-probability')} of {program} site '{name}'"
    return None
