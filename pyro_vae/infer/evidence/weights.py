"""What log-weights say of p(x)."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pyro_vae.infer.diagnostics import pareto_k_threshold, pareto_smooth, pareto_tail_length
from pyro_vae.infer.evidence.result import Evidence, beyond_rounding, rounding


def reduce_log_weights(chunks: Iterable[Tensor], num_samples: int, smooth: bool = False) -> Evidence:
    """Reduce log-weights that arrive in chunks ``(k_i, B)``, with sum_i k_i = K, to evidence of B observations.

    However they are chunked, the result is the same up to rounding in float64. Memory does not grow with K but for
    the square root of K largest weights, which the Pareto fit needs.

    The Monte Carlo error is that of the delta method, se^2 = Var(w) / (K mean(w)^2), with the sample variance of w;
    it is no smaller than what rounding of the log-weights does.
    With ``smooth``, the weights are those smoothed by :func:`pyro_vae.pareto_smooth`.

    Raises:
        ValueError: if the chunks do not hold K log-weights.
    """
    length = pareto_tail_length(num_samples) + 1
    total: Any = None
    total_square: Any = None
    invalid: Any = None
    seen = 0
    largest: list[Tensor] = []
    dtype = torch.float64
    for chunk in chunks:
        dtype = chunk.dtype
        log_w = chunk.double()
        seen += log_w.shape[0]
        sums = (log_w.logsumexp(0), (2 * log_w).logsumexp(0), (~log_w.isfinite()).sum(0))
        if total is None:
            total, total_square, invalid = sums
        else:
            total, total_square, invalid = (
                torch.logaddexp(total, sums[0]),
                torch.logaddexp(total_square, sums[1]),
                invalid + sums[2],
            )
        largest.append(log_w)
        if sum(part.shape[0] for part in largest) > 8 * length:
            largest = [torch.cat(largest).topk(length, dim=0).values]
    if seen != num_samples:
        raise ValueError(f"expected {num_samples} log-weights per observation, got {seen}")
    khat, raw, smoothed = pareto_smooth(torch.cat(largest), num_samples)
    if smooth and len(raw):
        total = _replace(total, raw, smoothed)
        total_square = _replace(total_square, 2 * raw, 2 * smoothed)
    ess = torch.exp(2 * total - total_square)
    variance = (
        (1 / ess - 1 / num_samples).clamp(min=0) * num_samples / (num_samples - 1)
        if num_samples > 1
        else ess * math.nan
    )
    return Evidence(
        log_px=total - math.log(num_samples),
        mc_se=torch.maximum(variance.sqrt(), rounding(total, dtype)),
        ess=ess,
        khat=khat,
        num_invalid=invalid,
        acceptance=torch.full_like(total, math.nan),
        num_samples=num_samples,
        reliable=known_by_k(total - math.log(num_samples), variance.sqrt(), khat, num_samples)
        & beyond_rounding(total, dtype),
        evaluations=torch.full_like(total, float(num_samples)),
    )


def known_by_k(log_px: Tensor, mc_se: Tensor, khat: Tensor, num_samples: int) -> Tensor:
    """Whether Pareto's k lets estimates be believed, or weights that are all the same, ``(B,)``."""
    return log_px.isfinite() & ((khat <= pareto_k_threshold(num_samples)) | (mc_se < 1e-4))


def _replace(total: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """The logarithm of a sum in which the terms exp(old) are replaced by exp(new), given that of the sum."""
    rest = -torch.expm1((old.logsumexp(0) - total).clamp(max=0))  # of the sum, the part that stays
    return torch.logaddexp(total + rest.log(), new.logsumexp(0))
