"""log p(x) by importance sampling from the guide."""

import math
from collections.abc import Iterable, Iterator

import pyro
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from pyro_vae.diagnostics import pareto_k, pareto_tail_length
from pyro_vae.evidence.result import Evidence
from pyro_vae.log_weights import Program, check_program, log_weights

SAMPLES_PER_CHUNK = 64
"""Samples of one observation scored together: enough that the encoder, run once per chunk, costs next to nothing."""


def importance_sampling(
    model: Program,
    guide: Program,
    x: Tensor,
    num_samples: int,
    memory: int = 2**27,
    progress: bool = False,
) -> Evidence:
    """Estimate log p(x) of each observation from K importance samples of the guide.

    log p_hat(x) = log 1/K sum_k w_k, with w_k = p(x, z_k) / q(z_k | x) and z_k ~ q(z | x): p_hat is unbiased, and its
    logarithm is low in expectation, the less the larger K (Burda, Grosse & Salakhutdinov 2016, theorem 1).

    Exactly K samples are drawn, in chunks of bounded memory; only running sums and the largest weights are kept.

    Args:
        model, guide: see :func:`pyro_vae.traces`.
        x: observations, shape ``(N, X)``, on the programs' device.
        num_samples: K, at least 1.
        memory: bytes that the intermediate results of one chunk may take, about.
        progress: show a progress bar.

    Returns:
        Evidence of the N observations, in nats per datum. ``acceptance`` is NaN.

    Raises:
        ValueError: if K or ``memory`` is below 1, or as :func:`pyro_vae.traces` and :func:`pyro_vae.check_program`.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if memory < 1:
        raise ValueError(f"memory must be at least 1 byte, got {memory}")
    with torch.no_grad(), pyro.validation_enabled(False):
        check_program(model, guide, x[:1])
        rows = max(1, memory // _bytes_per_sample(model, guide, x[:1]))
        samples = min(num_samples, SAMPLES_PER_CHUNK, rows)
        parts = x.split(max(1, rows // samples))
        with tqdm(
            total=num_samples * x.shape[0],
            disable=not progress,
            unit="sample",
            unit_scale=True,
            desc="log p(x)",
        ) as bar:

            def chunks(part: Tensor) -> Iterator[Tensor]:
                check_program(model, guide, part)
                for start in range(0, num_samples, samples):
                    log_w = log_weights(model, guide, part, min(samples, num_samples - start))
                    bar.update(log_w.numel())
                    yield log_w

            results = [reduce_log_weights(chunks(part), num_samples) for part in parts]
    return Evidence(*(torch.cat(field) for field in zip(*results, strict=True)))


def reduce_log_weights(chunks: Iterable[Tensor], num_samples: int) -> Evidence:
    """Reduce log-weights that arrive in chunks ``(k_i, B)``, with sum_i k_i = K, to evidence of B observations.

    However they are chunked, the result is the same up to rounding in float64. Memory does not grow with K but for
    the square root of K largest weights, which the Pareto fit needs.

    The Monte Carlo error is that of the delta method, se^2 = Var(w) / (K mean(w)^2), with the sample variance of w.

    Raises:
        ValueError: if the chunks do not hold K log-weights.
    """
    length = pareto_tail_length(num_samples) + 1
    total = total_square = invalid = None
    seen = 0
    largest: list[Tensor] = []
    for chunk in chunks:
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
    ess = torch.exp(2 * total - total_square)
    variance = (
        (1 / ess - 1 / num_samples).clamp(min=0) * num_samples / (num_samples - 1)
        if num_samples > 1
        else ess * math.nan
    )
    return Evidence(
        log_px=total - math.log(num_samples),
        mc_se=variance.sqrt(),
        ess=ess,
        khat=pareto_k(torch.cat(largest), num_samples),
        num_invalid=invalid,
        acceptance=torch.full_like(total, math.nan),
    )


class _CountBytes(TorchDispatchMode):
    """Adds up the sizes of all results of tensor operations."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.total += result.nbytes
        return result


def _bytes_per_sample(model: Program, guide: Program, x: Tensor) -> int:
    """Bytes of intermediate results that one more sample of z brings, an upper bound of what it holds at a time."""
    sizes = []
    for num_samples in (64, 128):
        with _CountBytes() as count:
            log_weights(model, guide, x, num_samples)
        sizes.append(count.total)
    return max(1, (sizes[1] - sizes[0]) // 64)
