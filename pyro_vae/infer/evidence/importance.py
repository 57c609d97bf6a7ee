"""log p(x) by importance sampling, from the guide or from a Laplace approximation."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, cast

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from pyro_vae.infer.checks import check_part, check_program
from pyro_vae.infer.compiling import Compiled
from pyro_vae.infer.evidence.blocks import Blocks, Part, Work, joined, power_of_two
from pyro_vae.infer.evidence.laplace import (
    Coordinates,
    laplace_approximation,
    laplace_cost,
    observations_at_once,
    whitened_log_joint,
)
from pyro_vae.infer.evidence.opinion import confirmed
from pyro_vae.infer.evidence.result import Evidence, as_part, concatenate, from_part
from pyro_vae.infer.evidence.weights import reduce_log_weights
from pyro_vae.infer.programs import Program, evaluating, log_weights, posterior_samples, scoring
from pyro_vae.infer.supports import Latents
from pyro_vae.infer.trees import Data, data_size, first_tensor, select, split

CHUNK = {"cpu": 2**27, "cuda": 2**30}
"""Bytes that the intermediate results of one chunk may take, on each kind of device."""
SAMPLES_PER_CHUNK = 64
"""Samples of one observation scored together: enough that the encoder, run once per chunk, costs next to nothing."""
WORTH = 200
"""Calls of one shape from which on it is compiled at the first."""


Draw = Callable[[Data], Iterator[Callable[[int], Tensor]]]
"""For each chunk of a block of observations a function that draws K log-weights ``(K, B)``."""


def importance_sampling(
    model: Program,
    guide: Program,
    data: Data,
    num_samples: int,
    proposal: Literal["guide", "laplace"] = "guide",
    widening: float = 1.0,
    df: float | None = None,
    smooth: bool = False,
    memory: int | None = None,
    compiled: bool = True,
    progress: bool = False,
    num_checked: int = 16,
    work: Work | None = None,
) -> Evidence:
    """Estimate log p(x) of each observation from K importance samples of a proposal.

    log p_hat(x) = log 1/K sum_k w_k, with w_k = p(x, z_k) / q(z_k | x) and z_k ~ q(z | x): p_hat is unbiased, and its
    logarithm is low in expectation, the less the larger K (Burda, Grosse & Salakhutdinov 2016, theorem 1).

    Exactly K samples are drawn, in chunks of bounded memory; only running sums and the largest weights are kept.

    Args:
        model, guide: see :func:`pyro_vae.traces`.
        data: see :func:`pyro_vae.traces`; on the programs' device.
        num_samples: K, at least 1.
        proposal: guide, or laplace: :func:`pyro_vae.laplace_approximation`, for any number of continuous sites.
        widening: factor of the Laplace proposal's standard deviations, positive.
        df: degrees of freedom, positive, of a Student t in place of the Laplace proposal's normal; None: normal.
        smooth: replace the largest weights by quantiles of the Pareto distribution fitted to them: less noise for some
            bias; where k is above its threshold, still not to be trusted.
        memory: bytes that the intermediate results of one chunk are expected to take at most: a warning tells if that
            is not enough. Chunks are at most 128 MiB on a CPU, 1 GiB on a GPU, for any budget, so that numbers are the
            same for each.
        compiled: compile what is called often, see :class:`pyro_vae.infer.compiling.Compiled`; not for programs with
            side effects.
        progress: show a progress bar.
        num_checked: observations, drawn at random, on which chains from the prior are to confirm the estimate, which
            draws around some of several modes cannot; 0 leaves modes that were missed untold.
        work: who computes the blocks of data; None: this process. Numbers do not depend on it: each block has random
            numbers of its own, from a seed which is the one number that is taken from torch's generator.

    ``reliable`` is false where Pareto's k is above its threshold, or unknown, or draws of the guide are all alike, and
    where sequential Monte Carlo from the prior, tried on ``num_checked`` of the others, finds more of p(x): on those,
    and on all that were not tried if these are more than a few. It needs continuous latent sites.

    Returns:
        Evidence of the N observations, in nats per datum. ``acceptance`` is NaN.

    Raises:
        ValueError: if an argument is out of range.
        ContractError: as :func:`pyro_vae.traces` and :func:`pyro_vae.check_program`, and for the Laplace proposal if a
            site is discrete.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if proposal not in ("guide", "laplace"):
        raise ValueError(f"proposal must be guide or laplace, got {proposal}")
    if not widening > 0 or (df is not None and not df > 0):
        raise ValueError(f"widening and df must be positive, got {widening} and {df}")
    if proposal == "guide" and (widening != 1 or df is not None):
        raise ValueError("widening and df are for proposal laplace; the guide is taken as it is")
    with scoring(model, guide):
        blocks = Blocks(data, work)
        with blocks.apart("checks"):
            check_program(model, guide, next(split(data, 1000)))
            rows = rows_per_chunk(model, guide, data, memory)
            one = Latents(model, guide, select(data, slice(1))) if proposal == "laplace" else None
        samples = min(num_samples, max(SAMPLES_PER_CHUNK, rows // blocks.size), rows)
        size = power_of_two(rows // samples)
        many = (num_samples // samples) * (data_size(data) // min(size, blocks.size)) > WORTH
        graphs = partial(_Graphs, samples, min(size, blocks.size) if many else 0, compiled)
        draw = _from_guide(model, guide, size, graphs)
        if one is not None:
            draw = _from_laplace(one, rows, size, widening, df, graphs)
        total = num_samples * data_size(data)
        bar = tqdm(total=total, disable=not progress, unit="sample", unit_scale=True, desc="importance sampling")

        def chunks(weigh: Callable[[int], Tensor]) -> Iterator[Tensor]:
            for start in range(0, num_samples, samples):
                log_w = weigh(min(samples, num_samples - start))
                bar.update(log_w.numel())
                yield log_w

        def estimate(among: slice) -> Part:
            part = select(data, among)
            check_part(model, guide, part, False, among.start)
            evidence = concatenate(reduce_log_weights(chunks(weigh), num_samples, smooth) for weigh in draw(part))
            alike = torch.zeros_like(evidence.log_px, dtype=torch.bool)
            alike = _collapsed(guide, part, size) if proposal == "guide" else alike
            return as_part(evidence) | {"alike": alike}

        with bar:
            found = joined(blocks.of("importance", data_size(data), estimate))
        evidence = from_part(found)
        cost = cast(Tensor, evidence.evaluations)
        if one is not None:
            cost = cost + laplace_cost(one.dim)
        evidence = confirmed(model, guide, data, evidence._replace(evaluations=cost), rows, blocks, num_checked)
        return evidence._replace(reliable=cast(Tensor, evidence.reliable) & ~found["alike"])


def _collapsed(guide: Program, data: Data, size: int) -> Tensor:
    """Where draws of the guide differ by no more than rounding, ``(N,)``: all weights are alike then, and say nothing.

    An encoder may say so of data far from those that it was trained on.
    """
    found = []
    for part in split(data, size):
        alike = torch.zeros(data_size(part), dtype=torch.bool, device=first_tensor(data).device)
        for z in posterior_samples(guide, part, 8).values():
            if z.is_floating_point():
                spread, place = z.amax(0) - z.amin(0), z.abs().amax(0)
                narrow = (spread <= 16 * torch.finfo(z.dtype).eps * place) & (place > 0)
                alike = alike | narrow.reshape(len(alike), -1).any(1)
        found.append(alike)
    return torch.cat(found)


def _from_guide(model: Program, guide: Program, size: int, graphs: "Callable[..., _Graphs]") -> Draw:
    """Log-weights of draws of the guide."""
    weigh = graphs(lambda num_samples, data: log_weights(model, guide, data, num_samples))

    def draw(block: Data) -> Iterator[Callable[[int], Tensor]]:
        weigh.begin()
        for part in split(block, size):
            yield lambda num_samples, part=part: weigh(num_samples, part)

    return draw


def _from_laplace(
    latents: Latents, rows: int, size: int, widening: float, df: float | None, graphs: "Callable[..., _Graphs]"
) -> Draw:
    """The same of Laplace approximations, which are made of as many observations at once as memory allows."""
    zero = latents.like.new_zeros(latents.dim)
    if df is None:
        base = dist.Normal(zero, widening).to_event(1)
    else:
        base = dist.MultivariateStudentT(torch.full_like(zero[0], df), zero, widening * torch.diag_embed(zero + 1))

    def weights(num_samples: int, data: Data, *coordinates: Tensor) -> Tensor:
        e = base.sample((num_samples, len(coordinates[0])))
        return whitened_log_joint(latents.of(data), Coordinates(*coordinates), e) - base.log_prob(e)

    weigh = graphs(weights)
    at_once = observations_at_once(rows // 3, latents.dim)  # a gradient keeps what a forward pass would drop

    def draw(block: Data) -> Iterator[Callable[[int], Tensor]]:
        weigh.begin()
        for part in split(block, at_once):
            approximation = laplace_approximation(latents.of(part))
            for first in range(0, data_size(part), size):
                among = slice(first, first + size)
                given = select(part, among), *approximation.select(among)
                yield lambda num_samples, given=given: weigh(num_samples, *given)

    return draw


class _Graphs:
    """A function of a number of samples, which is a part of its shape, and of tensors.

    Args:
        samples: of a call that is compiled at once, if it is of ...
        rows: as many data.
        compiled: whether what is called often is compiled.
        function: called as ``function(num_samples, data, *tensors)``.
    """

    def __init__(self, samples: int, rows: int, compiled: bool, function: Callable[..., Tensor]):
        self._whole, self._compiled, self._function = (samples, rows), compiled, function
        self._of: dict[int, Compiled] = {}

    def begin(self) -> None:
        """A block of data: see :meth:`Compiled.anew`."""
        self._of = {number: each.anew() for number, each in self._of.items()}

    def __call__(self, num_samples: int, data: Data, *tensors: Tensor) -> Tensor:
        if not self._compiled:
            return self._function(num_samples, data, *tensors)
        if num_samples not in self._of:
            self._of[num_samples] = Compiled(
                partial(self._function, num_samples),
                at_once=lambda data, *_: (num_samples, data_size(data)) == self._whole,
            )
        return self._of[num_samples](data, *tensors)


def rows_per_chunk(model: Program, guide: Program, data: Data, memory: int | None) -> int:
    """How many z are scored at once: a power of two, which depends on the programs and the kind of device alone.

    Were it another for another budget, the order of sums, and so the last digits, would be too; a budget that does not
    suffice is told by a warning.

    Raises:
        ValueError: if ``memory`` is below 1.
    """
    each = _bytes_per_sample(model, guide, select(data, slice(1)))
    rows = power_of_two(CHUNK["cuda" if first_tensor(data).is_cuda else "cpu"] // each)
    if memory is not None and memory < 1:
        raise ValueError(f"memory must be at least 1 byte, got {memory}")
    if memory is not None and memory < each * rows:
        warnings.warn(
            f"memory={memory} is less than a chunk takes, {rows} draws of about {each} bytes: chunks are of one size, "
            "so that numbers do not depend on memory",
            stacklevel=3,
        )
    return rows


class _CountBytes(TorchDispatchMode):
    """Adds up the sizes of all results of tensor operations."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.total += result.nbytes
        return result


def _bytes_per_sample(model: Program, guide: Program, data: Data) -> int:
    """Bytes of intermediate results that one more sample of z brings, an upper bound of what it holds at a time."""
    sizes = []
    for num_samples in (64, 128):
        with evaluating(model, guide), _CountBytes() as count:
            log_weights(model, guide, data, num_samples)
        sizes.append(count.total)
    return max(1, (sizes[1] - sizes[0]) // 64)
