"""Diagnostics of log-weights (K, B) and of the latent space of a model and guide."""

import math

import pyro
import torch
from torch import Tensor

from pyro_vae.log_weights import Program, log_weights, posterior_samples


def effective_sample_size(log_w: Tensor) -> Tensor:
    """(sum_k w_k)^2 / sum_k w_k^2, between 1 and K: ``(K, B) -> (B,)`` (Kong 1992; Owen, mcbook 9.3).

    >>> effective_sample_size(torch.zeros(7, 1)).round().item()
    7.0
    """
    log_w = log_w.double()
    return torch.exp(2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0))


def pareto_tail_length(num_samples: int) -> int:
    """How many of the largest of K weights the Pareto fit uses: ceil(min(K / 5, 3 sqrt(K)))."""
    return math.ceil(min(num_samples / 5, 3 * math.sqrt(num_samples)))


def pareto_k_threshold(num_samples: int) -> float:
    """Above this k an estimate from K weights is not to be trusted: min(1 - 1 / log10(K), 0.7).

    Vehtari et al. 2024: the larger k, the more samples it takes; 0.7 is never enough of them.

    >>> round(pareto_k_threshold(100), 3), pareto_k_threshold(10_000)
    (0.5, 0.7)
    """
    return min(1 - 1 / math.log10(num_samples), 0.7) if num_samples > 1 else -math.inf


def pareto_k(log_w: Tensor, num_samples: int | None = None) -> Tensor:
    """The shape k of a generalized Pareto distribution fitted to the largest weights: ``(K, B) -> (B,)``.

    Weights have a variance where k is below 0.5; above :func:`pareto_k_threshold` an estimate from them, and its error
    bar, are not to be trusted (Vehtari, Simpson, Gelman, Yao & Gabry 2024, "Pareto smoothed importance sampling"; the
    fit is that of Zhang & Stephens 2009, with the paper's weak prior).

    Args:
        log_w: log-weights, shape ``(K, B)``; or only the largest of each column, at least
            ``pareto_tail_length(num_samples) + 1``, if ``num_samples`` is given.
        num_samples: K, if ``log_w`` does not hold all of them.

    Returns:
        k per column. NaN where K < 21 leaves no five draws for the fit or a weight is NaN; ``-inf`` where the largest
        weights are all equal, so bounded; ``inf`` where fewer than five weights of the tail differ from zero.
    """
    num_samples = num_samples or log_w.shape[0]
    length = pareto_tail_length(num_samples)
    k = log_w.new_full(log_w.shape[1:], math.nan, dtype=torch.float64)
    if length < 5:
        return k
    top = log_w.double().topk(length + 1, dim=0).values.flip(0)  # ascending; its first row is the cut-off
    top = top - top[-1]
    cutoff = top[0].clamp(min=math.log(torch.finfo(torch.float64).tiny))
    in_tail = top[1:] > cutoff
    counts = in_tail.sum(0)
    excess = top[1:].exp() - cutoff.exp()
    for count in counts.unique().tolist():
        columns = (counts == count) & ~top.isnan().any(0)
        if count >= 5:
            k[columns] = _fit_generalized_pareto(excess[length - count :, columns])
        else:
            k[columns] = torch.where(cutoff[columns] == 0, k.new_tensor(-math.inf), math.inf)
    return k


def _fit_generalized_pareto(x: Tensor) -> Tensor:
    """Zhang & Stephens (2009), shape only: ``x`` is ``(n, B)``, positive and ascending; returns k, shape ``(B,)``."""
    n = x.shape[0]
    grid_size = 30 + math.isqrt(n)
    grid = 1 - torch.sqrt(grid_size / (torch.arange(1, grid_size + 1, dtype=x.dtype, device=x.device) - 0.5))
    quartile = x[int(n / 4 + 0.5) - 1]
    b = grid[:, None] / (3 * quartile) + 1 / x[-1]  # (grid, B)
    k = torch.log1p(-b[:, None] * x).mean(1)
    log_likelihood = n * (torch.log(-b / k) - k - 1)
    b = (b * log_likelihood.softmax(0)).sum(0)
    k = torch.log1p(-b * x).mean(0)
    return (n * k + 5) / (n + 10)  # prior of 10 observations at k = 1/2


def estimate_elbo(model: Program, guide: Program, x: Tensor, num_samples: int = 1, batch_size: int = 1000) -> Tensor:
    """The ELBO of each observation, averaged over K samples: ``(N, X) -> (N,)``, nats per datum.

    Args:
        model, guide: see :func:`pyro_vae.traces`.
        x: observations, shape ``(N, X)``.
        num_samples: K, at least 1.
        batch_size: observations at a time.
    """
    with torch.no_grad(), pyro.validation_enabled(False):
        return torch.cat([log_weights(model, guide, part, num_samples).mean(0) for part in x.split(batch_size)])


def active_units(
    guide: Program, x: Tensor, num_samples: int = 128, threshold: float = 0.01, batch_size: int = 1000
) -> dict[str, Tensor]:
    """Which latent units vary with x: Var_x(E_q[z_d | x]) > threshold (Burda et al. 2016, section 5.2).

    The variance of the posterior means is estimated without bias for any posterior, as the covariance over x of the
    means of two independent halves of the samples.

    Args:
        guide: see :func:`pyro_vae.traces`.
        x: observations, shape ``(N, X)``, at least 2.
        num_samples: samples of z per observation, at least 2.
        threshold: the smallest variance of an active unit.
        batch_size: observations at a time.

    Returns:
        For each latent site, a boolean tensor of its event shape.

    Raises:
        ValueError: if there are fewer than two samples or observations.
    """
    if num_samples < 2 or len(x) < 2:
        raise ValueError(f"active units need at least 2 samples and 2 observations, got {num_samples} and {len(x)}")
    halves: dict[str, list[Tensor]] = {}
    with torch.no_grad(), pyro.validation_enabled(False):
        for part in x.split(batch_size):
            for name, z in posterior_samples(guide, part, num_samples // 2 * 2).items():
                halves.setdefault(name, []).append(z.unflatten(0, (2, -1)).mean(1))
    result = {}
    for name, parts in halves.items():
        first, second = torch.cat(parts, dim=1)  # (N, *event_shape) each
        covariance = ((first - first.mean(0)) * (second - second.mean(0))).sum(0) / (len(x) - 1)
        result[name] = covariance > threshold
    return result
