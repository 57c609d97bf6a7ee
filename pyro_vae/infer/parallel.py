"""Several processes that train one model: each takes its rows of every mini-batch, and gradients are summed.

The processes are those of ``torch.distributed``, as ``torchrun`` starts them. Nothing is wrapped: between the backward
pass and the optimizer's step stands one sum over processes, of all gradients in one buffer.
"""

import itertools
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from pyro import poutine
from pyro.infer import ELBO as PyroELBO
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.optim import PyroOptim
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_vae.errors import ContractError, ProcessLost
from pyro_vae.infer.compiling import undone
from pyro_vae.infer.objectives import Objective
from pyro_vae.infer.randomness import Randomness
from pyro_vae.infer.steps import Steps
from pyro_vae.infer.trees import Data, as_data, call, data_size, first_tensor, select, tensors

T = TypeVar("T")
KEY = 0x9E3779B97F4A7C15  # odd, so that no two processes have one key
MOST_KNOWN = 100_000  # parameters that have been made equal, after which all are again
DRIFT = 1e-3  # of its norm, by which a weight may differ between processes of other hardware, after an epoch


class Processes:
    """All processes of the default group of ``torch.distributed``; this one alone where there is none.

    Every method but ``noise`` and ``rows`` must be called in all processes, in the same order.

    Attributes:
        grouped: whether there is a group.
        rank, size: of this process, from 0, and how many there are.
        is_first: whether this is the one that writes files and shows progress.
    """

    def __init__(self) -> None:
        self.grouped = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if self.grouped else (0, 1)
        self.is_first = self.rank == 0

    def from_first(self, function: Callable[[], T]) -> T:
        """What a function gives in the first process, which alone runs it; what it raises is raised in all."""
        if not self.grouped:
            return function()
        answer: list[Any] = [_outcome(function)] if self.is_first else [None]
        with _lost():
            dist.broadcast_object_list(answer, src=0)
        return _opened(answer[0])

    def all(self, function: Callable[[], T]) -> T:
        """What a function gives here; where it raises in any process, all raise, and say which process it was."""
        if not self.grouped:
            return function()
        outcome = _outcome(function)
        for rank, error in enumerate(self.gather(None if outcome[0] else outcome[1])):
            if error is not None and outcome[0]:
                raise _changed(error, f"process {rank}: {error}")
        return _opened(outcome)

    def in_turn(self, function: Callable[[], T]) -> T:
        """As :meth:`all`, the first process before the others, which find what it has fetched."""
        first = self.all(lambda: [function()] if self.is_first else [])
        others = self.all(lambda: [] if self.is_first else [function()])
        return [*first, *others][0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if not self.grouped:
            return [value]
        values: list[Any] = [None] * self.size
        with _lost():
            dist.all_gather_object(values, value)
        return values

    def check_same(self, **values: Any) -> None:
        """Refuse to go on where processes differ.

        Raises:
            ContractError: naming the first thing of which they have others.
        """
        for rank, others in enumerate(everybody := self.gather(values)):
            for name, value in others.items():
                if value != everybody[0][name]:
                    raise ContractError(
                        f"process {rank} has another {name} than process 0: {value}, not {everybody[0][name]}"
                    )

    def check_same_data(self, data: Data) -> None:
        """Refuse a mini-batch that is not the same in all processes.

        Raises:
            ContractError: naming a process that has another.
        """
        if self.grouped and len(set(found := self.gather(tuple(map(_digest, tensors(data)))))) > 1:
            rank = next(rank for rank, each in enumerate(found) if each != found[0])
            raise ContractError(
                f"process {rank} has another mini-batch than process 0: all must draw them from the same data and seed"
            )

    def rows(self, data: Data) -> Data | None:
        """The rows of this process, one after the other by rank, none of them larger by more than one; None: no row."""
        size = data_size(data)
        start, more = divmod(size, self.size)
        first = self.rank * start + min(self.rank, more)
        last = first + start + (self.rank < more)
        if last - first == size:
            return data
        return select(data, slice(first, last)) if last > first else None

    def mean(self, function: Callable[[Data], Tensor], data: Data) -> float:
        """The mean over data of what a function gives for each datum; every process computes it for its rows."""
        if not self.grouped:
            return function(data).mean().item()
        rows = self.rows(data)
        with self.noise(first_tensor(data).device):
            total = self.all(lambda: 0.0 if rows is None else function(rows).double().sum().item())
        return sum(self.gather(total)) / data_size(data)

    @contextmanager
    def noise(self, device: torch.device) -> Iterator[None]:
        """Context: random numbers of this process alone. Outside of it all processes draw the same ones, and each time
        that it is entered one of them becomes the key of those inside."""
        if not self.grouped:
            yield
            return
        key = (int(torch.randint(2**62, ())) + self.rank * KEY) % 2**63
        shared = Randomness([device] if device.type == "cuda" else [], others=False)
        torch.default_generator.manual_seed(key)  # torch.manual_seed takes a hundred times as long
        if device.type == "cuda":
            torch.cuda.default_generators[_index(device)].manual_seed(key)
        try:
            yield
        finally:
            shared.restore()

    def share_randomness(self, device: torch.device) -> None:
        """Let all processes go on with the random numbers of the first."""
        if not self.grouped:
            return
        on_gpu = device.type == "cuda"
        states = self.from_first(
            lambda: [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if on_gpu else [])]
        )
        torch.set_rng_state(states[0])
        if on_gpu:
            torch.cuda.set_rng_state(states[1], device)

    @torch.no_grad()
    def share(self, values: Sequence[Tensor], near: bool = False) -> None:
        """Give all processes the values that tensors have in the first.

        Args:
            near: they have the same ones, but for rounding.

        Raises:
            ContractError: if tensors are of other shapes or types, or not near, in the processes.
        """
        if not self.grouped:
            return
        self.check_same(weights=[(tuple(x.shape), str(x.dtype)) for x in values])
        whole = [x.detach().contiguous().reshape(-1).view(torch.uint8) for x in values]
        if not whole:
            return
        mine = torch.cat(whole)
        first = mine.clone()
        with _lost():
            dist.broadcast(first, src=0)
        same, off = torch.equal(first, mine), False
        for x, part in zip(values, first.split([len(each) for each in whole]), strict=True):
            if not same:
                value = part.clone().view(x.dtype).view(x.shape)
                off |= near and bool((value.double() - x.double()).norm() > DRIFT * value.double().norm())
                x.copy_(value)
        if near and any(self.gather(off)):
            raise ContractError("the processes do not have the same weights any more: something draws or steps apart")


def _outcome(function: Callable[[], Any]) -> tuple[bool, Any]:
    """Whether a function gives anything, and what, or the error; both can be sent to other processes."""
    try:
        return True, function()
    except Exception as error:
        return False, _changed(error, str(error))


def _changed(error: Exception, message: str) -> Exception:
    """An error of the same type with a message, or, of a type that takes or keeps something else, a RuntimeError."""
    for make in (lambda: error, lambda: type(error)(message)):
        with suppress(Exception):  # whatever the constructor of a stranger's error raises
            if str(pickle.loads(pickle.dumps(made := make()))) == message:
                return made.with_traceback(error.__traceback__)
    return RuntimeError(f"{type(error).__name__}: {message}")


def _opened(outcome: tuple[bool, Any]) -> Any:
    if not outcome[0]:
        raise outcome[1]
    return outcome[1]


@contextmanager
def _lost() -> Iterator[None]:
    """Context: what torch says of a process that does not answer is a :class:`ProcessLost`."""
    try:
        yield
    except RuntimeError as error:
        # without the lines of torch's own source, and its advice to programmers
        reason = " ".join(re.sub(r"\[\S+:\d+\]", "", str(error)).split()).partition(". ")[0]
        raise ProcessLost(f"another process of this training ended, or does not answer ({reason[:200]})") from error


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


class DataParallel:
    """An engine whose steps are those of all processes together: each takes its rows of the batch.

    For the same noise the gradient is that of one process on the whole batch, up to rounding: that of a loss which is a
    mean over rows is weighted by a process's share of the rows, that of a sum is not. What a loss or a network computes
    of a batch as a whole (free bits, batch normalization) is computed of a process's rows. Noise is keyed by process
    and step.

    All processes must be given the same batches, as they are from the same seed. Parameters become those of the first
    process, and so do those that ``pyro.param`` makes at a step. A step holds one sum over processes, of all gradients
    in one buffer; ``max_norm`` of the engine acts on the sum.

    Args:
        svi: a :class:`pyro_vae.PyroSVI` or :class:`pyro_vae.CompiledSVI`, or another engine that has their ``steps``.
        processes: all of them. Default: those of the default group of ``torch.distributed``.
        reduction: whether the loss is a ``sum`` over rows or a ``mean``. Default: objectives of this library are
            means; for ELBOs of Pyro the programs are looked at, for a plate that is subsampled makes a mean of their
            sum.

    Raises:
        ContractError: by the first ``step``, if there are fewer rows than processes, or if they differ between
            processes; if the loss is a function and ``reduction`` is not given; or if some sites are of rows and others
            of the batch as a whole, and no scale of a plate says what share of all data a batch is.
        ProcessLost: by ``step``, if another process ended.
    """

    def __init__(self, svi: Any, processes: Processes | None = None, reduction: Literal["sum", "mean"] | None = None):
        self._svi, self._processes = svi, processes or Processes()
        self._reduction = reduction
        self._share = torch.ones((), dtype=torch.float64)
        self._buffers: dict[tuple, list[_Buffer]] = {}
        self._known: dict[int, Tensor] = {}
        self._params: Sequence[Tensor] = ()
        self._begun = self._summed = False
        if self._processes.grouped:
            if not isinstance(getattr(svi, "steps", None), Steps):
                raise ContractError(
                    f"{type(svi).__name__} cannot train in several processes: it has no steps, as PyroSVI and "
                    "CompiledSVI do"
                )
            svi.steps.reduce = self._sum

    def step(self, *args: Any, **kwargs: Any) -> float | Tensor:
        """Take one gradient step on a whole batch; return this process's part of the loss: the sum of all processes'
        parts is the loss."""
        data = as_data(args, kwargs)
        if not self._processes.grouped:
            return call(self._svi.step, data)
        if not self._begun:
            self._begin(data)
        rows, device = self._processes.rows(data), first_tensor(data).device
        share = (data_size(rows) if rows is not None else 0) / data_size(data)
        share = share if self._reduction == "mean" else 1.0
        self._share.fill_(share)  # a tensor, which a CUDA graph reads anew
        self._summed = False
        try:
            with self._processes.noise(device):
                if rows is None:
                    self._svi.steps.update_without_data()
                    return 0.0
                return share * call(self._svi.step, rows)
        except Exception:
            if not self._summed:  # the others wait for it
                for buffer in self._buffers_of(self._params):
                    buffer.fail()
            raise

    def _begin(self, data: Data) -> None:
        processes, device = self._processes, first_tensor(data).device
        if (size := data_size(data)) < processes.size:
            raise ContractError(
                f"a batch size of {size} is too small for {processes.size} processes, each of which takes its rows"
            )
        processes.check_same_data(data)
        self._share = self._share.to(device)
        steps = self._svi.steps
        held = steps.held
        if isinstance(steps.optim, PyroOptim):  # parameters may come into being
            processes.share_randomness(device)
            sites = dict(item for trace in _traces(steps, data) for item in trace.nodes.items())
            found = [cast(Any, sites[name])["value"] for name in sorted(sites) if sites[name]["type"] == "param"]
            held = list({id(p): p for p in (value.unconstrained() for value in found)}.values())
        self._share_new(held)
        self._params = held
        self._reduction = self._reduction or processes.all(lambda: _reduction_of(steps, data))
        self._begun = True

    def _share_new(self, params: Sequence[Tensor]) -> None:
        if new := [p for p in params if id(p) not in self._known]:
            self._processes.share([p.data for p in new])
            if len(self._known) > MOST_KNOWN:  # programs that set entries of Pyro's store make tensors at every step
                self._known.clear()
            self._known.update((id(p), p) for p in (*new, *params))

    def _sum(self, params: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of all processes together, laid out as their parameters; None where nobody has one."""
        self._share_new(params)
        self._params, self._summed = params, True
        found: list[Tensor | None] = [None] * len(params)
        failed = [buffer.sum(params, gradients, self._share, found) for buffer in self._buffers_of(params)]
        if any(failed):
            raise ProcessLost("another process of this training failed, and says why")
        return found

    def _buffers_of(self, params: Sequence[Tensor]) -> "list[_Buffer]":
        key = tuple((p.shape, p.dtype, p.device) for p in params)
        if key not in self._buffers:
            types = list(dict.fromkeys((p.dtype, p.device) for p in params))
            places = [[i for i, p in enumerate(params) if (p.dtype, p.device) == each] for each in types]
            self._buffers[key] = [_Buffer(each, params) for each in places]
        return self._buffers[key]


class _Buffer:
    """The gradients of parameters of one type, one after the other, then how many processes have each of them, and how
    many have failed."""

    def __init__(self, places: list[int], params: Sequence[Tensor]):
        mine = [params[i] for i in places]
        ends = [0, *itertools.accumulate(p.numel() for p in mine)]
        self.places, self.last = places, ends[-1]
        self.flat = torch.zeros(self.last + len(mine) + 1, dtype=mine[0].dtype, device=mine[0].device)
        self.views = [self.flat[a:b].view(p.shape) for (a, b), p in zip(itertools.pairwise(ends), mine, strict=True)]
        self.had = [False] * len(mine)

    def fail(self) -> None:
        """Take part in a sum that comes to nothing; a GPU's sees to that by NaN."""
        with suppress(Exception), torch.no_grad():
            self.flat.fill_(torch.nan)
            self._over_processes()

    @torch.no_grad()
    def sum(
        self,
        params: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        share: Tensor,
        found: list[Tensor | None],
    ) -> bool:
        """Put the gradients of all processes together in their places; whether one of them failed instead."""
        given = [gradients[i] for i in self.places]
        some = [(view, g.to_dense()) for view, g in zip(self.views, given, strict=True) if g is not None]
        if len(some) < len(given):
            self.flat.zero_()
        for view, gradient in some:
            torch.mul(gradient, share, out=view)
        if some:
            self.had = [g is not None for g in given]
        on_cpu = self.flat.device.type == "cpu"
        if on_cpu:
            self.flat[self.last :] = torch.tensor([*(g is not None for g in given), False], dtype=self.flat.dtype)
        self._over_processes()
        # a GPU's counts would have to be waited for: there, who has no row has what it had the last time
        *has, failed = self.flat[self.last :].tolist() if on_cpu else [*self.had, 0.0]
        for i, view, some_have in zip(self.places, self.views, has, strict=True):
            if some_have:
                p = params[i]
                found[i] = view if view.stride() == p.stride() else torch.empty_like(p).copy_(view)
        return bool(failed)

    def _over_processes(self) -> None:
        with _lost():
            dist.all_reduce(torch.view_as_real(self.flat) if self.flat.is_complex() else self.flat)


def _digest(x: Tensor) -> float:
    """A number that tells tensors apart, cheaply."""
    x = x.detach().double().nan_to_num(0.5, 0.25, 0.75).flatten()
    return float((x * torch.linspace(1.0, 2.0, len(x), dtype=x.dtype, device=x.device)).sum())


LINEAR = (Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO)
"""ELBOs of Pyro that the scale of a plate multiplies, which in others stands inside a logarithm."""


def _reduction_of(steps: Steps, data: Data) -> Literal["sum", "mean"]:
    """Whether the loss is a mean over rows, or a sum; for one of Pyro's, by the scale of every site for fewer rows."""
    if isinstance(steps.loss, Objective):
        return "mean"
    if not isinstance(steps.loss, PyroELBO):
        raise ContractError("several processes cannot tell whether this loss is a sum over rows: give reduction")
    size = data_size(data)
    fewer = max(1, size // 2)
    whole, part = _weights(steps, data), _weights(steps, select(data, slice(0, fewer)))
    of_rows = [name for name in part if _near(whole[name] * fewer, part[name] * size)]
    of_all = [name for name in part if _near(whole[name], part[name])]
    if size == 1 or set(of_rows) == set(part):
        return "sum"
    if set(of_all) == set(part) and isinstance(steps.loss, LINEAR):
        return "mean"
    if set(of_all) == set(part):
        raise ContractError(
            f"{type(steps.loss).__name__} of a plate that is subsampled or scaled is no bound: leave it to Trace_ELBO"
        )
    raise ContractError(
        f"several processes cannot share a loss in which sites of rows ({', '.join(of_rows) or 'none'}) are summed and "
        f"others ({', '.join(name for name in part if name not in of_rows)}) are of no row: give the plate of the data "
        "the size of all data, and subsample_size, so that its scale says what share a batch is"
    )


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-5 * max(abs(a), abs(b))


def _traces(steps: Steps, data: Data) -> tuple[poutine.Trace, poutine.Trace]:
    """One of each program, of which nothing remains but new parameters."""
    with undone(tensors(data), {}), torch.no_grad():
        guide = call(poutine.trace(steps.guide).get_trace, data)
        return guide, call(poutine.trace(poutine.replay(steps.model, trace=guide)).get_trace, data)


def _weights(steps: Steps, data: Data) -> dict[str, float]:
    """How much all log-probabilities of each site count together: their number, times their scale."""
    found = {}
    for trace in _traces(steps, data):
        for name, site in prune_subsample_sites(trace).nodes.items():
            if site["type"] == "sample":
                scale = torch.as_tensor(site["scale"], dtype=torch.float64)
                shape = site["fn"].log_prob(site["value"]).shape
                found[name] = float(scale.expand(torch.broadcast_shapes(shape, scale.shape)).sum())
    return found
