"""Diagnostics of log-weights (K, B) and of the latent space of a model and guide."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Independent

from pyro_vae.errors import ContractError
from pyro_vae.infer.checks import check_data, check_latent_masks, seen_entries
from pyro_vae.infer.programs import (
    Program,
    added,
    latent_sites,
    log_weights,
    particle_trace,
    posterior_samples,
    scoring,
    site_of,
    sum_log_prob,
    traces,
)
from pyro_vae.infer.randomness import own_numbers, without_effect
from pyro_vae.infer.trees import Data, data_size, first_tensor, split

BLOCK, ROWS = 256, 2**13
"""Data with random numbers of their own, 8 times as many on a GPU, and draws of z that are scored together."""


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
    return pareto_smooth(log_w, num_samples)[0]


def pareto_smooth(log_w: Tensor, num_samples: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Pareto's k, and the largest log-weights replaced by quantiles of the distribution fitted to them.

    The r-th smallest of M becomes the quantile at (r - 1/2) / M, at most the largest weight (Vehtari et al. 2024,
    section 3.1). Where k is not finite nothing is replaced.

    Args:
        log_w, num_samples: see :func:`pareto_k`.

    Returns:
        k, shape ``(B,)``; the M = ``pareto_tail_length(num_samples)`` largest log-weights, ascending, and what replaces
        them, shape ``(M, B)`` both; empty where K is too small for a fit.
    """
    num_samples = num_samples or log_w.shape[0]
    length = pareto_tail_length(num_samples)
    k = log_w.new_full(log_w.shape[1:], math.nan, dtype=torch.float64)
    if length < 5:
        nothing = log_w.new_empty(0, *log_w.shape[1:], dtype=torch.float64)
        return k, nothing, nothing
    top = log_w.double().topk(length + 1, dim=0).values.flip(0)  # ascending; its first row is the cut-off
    largest = top[-1]
    top = top - largest
    cutoff = top[0].clamp(min=math.log(torch.finfo(torch.float64).tiny))
    in_tail = top[1:] > cutoff
    counts = in_tail.sum(0)
    excess = top[1:].exp() - cutoff.exp()
    smoothed = top[1:].clone()
    for count in counts.unique().tolist():
        columns = (counts == count) & ~top.isnan().any(0)
        if count >= 5:
            k[columns], scale = _fit_generalized_pareto(excess[length - count :, columns])
            at = (torch.arange(count, dtype=torch.float64, device=k.device) + 0.5).unsqueeze(-1) / count
            quantile = scale * torch.expm1(-k[columns] * torch.log1p(-at)) / k[columns]
            smoothed[length - count :, columns] = (cutoff[columns].exp() + quantile).log().clamp(max=0)
        else:
            k[columns] = torch.where(cutoff[columns] == 0, k.new_tensor(-math.inf), math.inf)
    return k, top[1:] + largest, smoothed + largest


def _fit_generalized_pareto(x: Tensor) -> tuple[Tensor, Tensor]:
    """Zhang & Stephens (2009): ``x`` is ``(n, B)``, positive and ascending; returns shape k and scale, ``(B,)``."""
    n = x.shape[0]
    grid_size = 30 + math.isqrt(n)
    grid = 1 - torch.sqrt(grid_size / (torch.arange(1, grid_size + 1, dtype=x.dtype, device=x.device) - 0.5))
    quartile = x[int(n / 4 + 0.5) - 1]
    b = grid[:, None] / (3 * quartile) + 1 / x[-1]  # (grid, B)
    k = torch.log1p(-b[:, None] * x).mean(1)
    log_likelihood = n * (torch.log(-b / k) - k - 1)
    b = (b * log_likelihood.softmax(0)).sum(0)
    k = torch.log1p(-b * x).mean(0)
    return (n * k + 5) / (n + 10), -k / b  # prior of 10 observations at k = 1/2


def estimate_elbo(
    model: Program, guide: Program, data: Data, num_samples: int = 1, batch_size: int | None = None
) -> Tensor:
    """The ELBO of each observation, averaged over K samples: ``(N, X) -> (N,)``, nats per datum.

    Each block of 256 data has random numbers of its own, from a seed which is the one number that is taken from torch's
    generator.

    Args:
        model, guide: see :func:`pyro_vae.traces`.
        data: likewise.
        num_samples: K, at least 1.
        batch_size: has no effect any more; blocks are of one size, so that numbers do not depend on it.

    Raises:
        ValueError: as :func:`pyro_vae.traces`.
        ContractError: as :func:`pyro_vae.check_program`.
    """
    without_effect(batch_size)
    data_size(data)  # refuses what is none
    seed, device = int(torch.randint(2**62, (), device="cpu")), first_tensor(data).device
    with own_numbers(f"{seed}/checks", device):
        check_data(model, guide, data)
    rows, found = BLOCK * (8 if device.type == "cuda" else 1), []
    for number, part in enumerate(split(data, rows)):
        with own_numbers(f"{seed}/{number}", device), scoring(model, guide):
            most = max(1, ROWS // data_size(part))
            counts = (min(most, num_samples - done) for done in range(0, max(1, num_samples), most))
            found.append(sum(log_weights(model, guide, part, count).sum(0) for count in counts) / num_samples)
    return torch.cat(found)


def mean_log_weights(
    model: Program, guide: Program, data: Data, num_samples: int = 1, batch_size: int = 1000
) -> Tensor:
    """:func:`estimate_elbo` of data that have been checked, drawn as they come, ``batch_size`` at a time."""
    with scoring(model, guide):
        return torch.cat([log_weights(model, guide, part, num_samples).mean(0) for part in split(data, batch_size)])


def active_units(
    guide: Program, data: Data, num_samples: int = 128, threshold: float = 0.01, batch_size: int = 1000
) -> dict[str, Tensor]:
    """Which latent units vary with x: Var_x(E_q[z_d | x]) > threshold (Burda et al. 2016, section 5.2).

    The variance of the posterior means is estimated without bias for any posterior, as the covariance over x of the
    means of two independent halves of the samples.

    The paper takes the variance over the data; its code took the first 500 training data only, so pass these to get
    the paper's numbers.

    Args:
        guide: see :func:`pyro_vae.traces`.
        data: likewise, at least 2.
        num_samples: samples of z per observation, at least 2.
        threshold: the smallest variance of an active unit.
        batch_size: observations at a time.

    Returns:
        For each latent site, a boolean tensor of its event shape.

    Raises:
        ValueError: if there are fewer than two samples or observations.
    """
    if num_samples < 2 or data_size(data) < 2:
        raise ValueError(
            f"active units need at least 2 samples and 2 observations, got {num_samples} and {data_size(data)}"
        )
    halves: dict[str, list[Tensor]] = {}
    with scoring(guide):
        for part in split(data, batch_size):
            for name, z in posterior_samples(guide, part, num_samples // 2 * 2).items():
                halves.setdefault(name, []).append(z.unflatten(0, (2, -1)).mean(1))
    result = {}
    for name, parts in halves.items():
        first, second = torch.cat(parts, dim=1)  # (N, *event_shape) each
        covariance = ((first - first.mean(0)) * (second - second.mean(0))).sum(0) / (data_size(data) - 1)
        result[name] = covariance > threshold
    return result


def kl_divergence(
    model: Program, guide: Program, data: Data, num_samples: int = 10, batch_size: int = 1000
) -> dict[str, Tensor]:
    """What each latent site s adds to the KL divergence of q(z | x) from p(z), averaged over the data: nats per datum.

    KL_s = E[log q(z_s | x, ...) - log p(z_s | ...)], where the dots are the sites that s depends on in each program.
    Their sum over sites is E[KL(q(z | x) || p(z))], the second term of the ELBO (Kingma & Welling 2014, equation 3).
    The expectation is estimated by draws from q; of several sites, one may have a negative share.

    Args:
        model, guide: see :func:`pyro_vae.traces`.
        data: likewise.
        num_samples: draws of z per observation, at least 1.
        batch_size: observations at a time.

    Returns:
        For each latent site, in the model's order, a float64 tensor: of its event shape, so one number per dimension,
        if its densities factorize over the dimensions in model and guide; else a scalar.

    Raises:
        ValueError: as :func:`pyro_vae.traces`.
        ContractError: as :func:`pyro_vae.check_program`.
    """
    totals: dict[str, Tensor] = {}
    for name, p, q in _latent_pairs(model, guide, data, num_samples, batch_size):
        if _factorizes(p) and _factorizes(q):
            log_ratio = _log_prob_per_dimension(q) - _log_prob_per_dimension(p)
        else:
            log_ratio = q["log_prob"] - p["log_prob"]
        totals[name] = totals.get(name, 0) + log_ratio.double().sum((0, 1))
    return {name: total / (num_samples * data_size(data)) for name, total in totals.items()}


def kl_by_datum(
    model: Program, guide: Program, data: Data, num_samples: int = 10, batch_size: int = 1000
) -> dict[str, Tensor]:
    """:func:`kl_divergence` of each datum, of whole sites: ``(N,)``, float64, of each latent site; nats.

    E_q[log p(x | z)] is the ELBO and their sum together.

    Args:
        model, guide, data, num_samples, batch_size: see :func:`kl_divergence`, which raises the same errors.
    """
    parts: dict[str, list[Tensor]] = {}
    for name, p, q in _latent_pairs(model, guide, data, num_samples, batch_size):
        parts.setdefault(name, []).append((q["log_prob"] - p["log_prob"]).double().mean(0))
    return {name: torch.cat(values) for name, values in parts.items()}


def _latent_pairs(
    model: Program, guide: Program, data: Data, num_samples: int, batch_size: int
) -> Iterator[tuple[str, dict, dict]]:
    """Each latent site of model and guide, for so many data at a time, after the checks of all."""
    check_data(model, guide, data)
    with scoring(model, guide):
        for part in split(data, batch_size):
            both = traces(model, guide, part, num_samples)
            check_latent_masks(both)
            for name in latent_sites(both.model):
                yield name, site_of(both.model, name), site_of(both.guide, name)


def _factorizes(site: dict) -> bool:
    """Whether a site's density is a product over the dimensions of its event."""
    return isinstance(site["fn"], Independent) and not _base(site["fn"]).event_shape and site["mask"] is None


def _base(fn: torch.distributions.Distribution) -> torch.distributions.Distribution:
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn


def _log_prob_per_dimension(site: dict) -> Tensor:
    """``(K, B, *event_shape)``, or a shape that broadcasts to it."""
    return _base(site["fn"]).log_prob(site["value"])


class AggregatedPosterior(NamedTuple):
    """The parts of E[KL(q(z | x) || p(z))] = I_q(x; z) + KL(q(z) || p(z)), nats per datum, and their standard errors.

    Attributes:
        mutual_information: I_q(x; z), how much z tells about which observation it encodes.
        kl_aggregated: KL(q(z) || p(z)) of the aggregated posterior: what a better prior could gain.
        kl: their sum, E[KL(q(z | x) || p(z))].
        mutual_information_se, kl_aggregated_se, kl_se: standard errors over observations: how far other data as many
            as these, and other draws, would differ.
    """

    mutual_information: float
    kl_aggregated: float
    kl: float
    mutual_information_se: float
    kl_aggregated_se: float
    kl_se: float


def mutual_information(model: Program, guide: Program, data: Data, num_samples: int = 1) -> AggregatedPosterior:
    """The mutual information of x and z under the guide, and how far its aggregated posterior is from the prior.

    With q(z) = 1/N sum_n q(z | x_n), the KL term of the ELBO is (Hoffman & Johnson 2016, "ELBO surgery")

        E_n[KL(q(z | x_n) || p(z))] = I_q(x; z) + KL(q(z) || p(z)),    I_q(x; z) = E[log q(z | x_n) - log q(z)]

    Draws of z from each q(z | x_n) are scored under all N conditionals, all latent sites together: a matrix of
    N num_samples times N densities, in chunks of bounded memory.

    For the N observations given, the estimates are unbiased. For the distribution that they are drawn from they are
    not: q(z) has the term q(z | x_n) / N of the observation that z was drawn from, so that I_q is at most log N and low
    in expectation, and KL(q(z) || p(z)) high by as much. Where I_q comes near log N, both are about N, not about the
    model.

    Args:
        model, guide: see :func:`pyro_vae.traces`.
        data: likewise, at least 2.
        num_samples: draws of z per observation, at least 1.

    Raises:
        ValueError: if there are fewer than 2 observations, or as :func:`pyro_vae.traces`.
        ContractError: if a latent site is masked, or as :func:`pyro_vae.check_program`.
    """
    if data_size(data) < 2:
        raise ValueError(f"an aggregated posterior needs at least 2 observations, got {data_size(data)}")
    check_data(model, guide, data)
    log_q, log_p = [], []
    draws: dict[str, list[Tensor]] = {}
    with scoring(model, guide):
        for part in split(data, max(1, 1000 // max(1, num_samples))):
            both = traces(model, guide, part, num_samples)
            latent = latent_sites(both.model)
            check_latent_masks(both)
            if masked := [name for name in latent if not seen_entries(site_of(both.guide, name)).all()]:
                raise ContractError(f"site '{masked[0]}' is masked, so that some data have no q(z | x) to compare")
            log_q.append(sum_log_prob(both.guide).double())
            log_p.append(added(site_of(both.model, name)["log_prob"] for name in latent).double())
            for name in latent:
                draws.setdefault(name, []).append(site_of(both.guide, name)["value"])
        z = {name: torch.cat(values, 1).flatten(0, 1) for name, values in draws.items()}
        log_qz = _log_aggregated(guide, data, z).unflatten(0, (num_samples, data_size(data)))
    log_q, log_p = torch.cat(log_q, 1), torch.cat(log_p, 1)
    terms = [term.mean(0) for term in (log_q - log_qz, log_qz - log_p, log_q - log_p)]  # (N,) each
    errors = [term.std().item() / math.sqrt(data_size(data)) for term in terms]
    return AggregatedPosterior(*(term.mean().item() for term in terms), *errors)


def _log_aggregated(guide: Program, data: Data, z: dict[str, Tensor]) -> Tensor:
    """log 1/N sum_n q(z_m | x_n) of draws ``(M, *event_shape)`` of each site: ``(M,)``, in float64.

    Few observations at a time meet many draws: the encoder runs once for each chunk of draws.
    """
    observations, draws = 64, 2048
    result = []
    for start in range(0, len(next(iter(z.values()))), draws):
        chunk = {name: values[start : start + draws].unsqueeze(1) for name, values in z.items()}
        log_q = []
        for part in split(data, observations):
            placed = {name: v.expand(-1, data_size(part), *v.shape[2:]) for name, v in chunk.items()}
            trace = particle_trace(poutine.condition(guide, data=placed), part, len(next(iter(placed.values()))))
            trace.compute_log_prob()
            log_q.append(sum_log_prob(trace).double().logsumexp(1))
        result.append(torch.stack(log_q).logsumexp(0))
    return torch.cat(result) - math.log(data_size(data))
