"""The step of one kind of call as a graph: when it holds, what it gives, and on a GPU its record."""

import math
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import pyro
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_leaves, tree_map_only, tree_unflatten

from pyro_vae.infer.compiling import compile_graph
from pyro_vae.infer.holding import Place
from pyro_vae.infer.parting import split_looks
from pyro_vae.infer.steps import Derivatives
from pyro_vae.infer.tracing import Look, Traced, first_line, in_words, looked
from pyro_vae.infer.trees import precise
from pyro_vae.infer.watching import Snapshot

SECONDS_TO_COMPILE = 2.0, 0.01
"""About what inductor takes on a CPU: for a graph, and for each of its nodes."""
SECONDS_GAINED = 3e-6
"""About what a compiled node saves at each use. ``auto`` compiles after as many uses as make good for compiling; it
does not measure, so that a seed gives the same numbers, to the last digit, on every run of one machine."""


class Result(NamedTuple):
    """What a run of a graph gives.

    Attributes:
        loss: a tensor, or a tuple of them.
        gradients: of ``Graph.trained``.
        replaced: the values of ``Graph.replaced``.
        valid: whether the observed values lie in their supports; None if that was not asked.
        looks: what was read from tensors that are drawn.
    """

    loss: Any
    gradients: Sequence[Tensor]
    replaced: Sequence[Tensor]
    valid: Tensor | None
    looks: Sequence[Tensor]


class Outline(NamedTuple):
    """What a traced step returned and met, in the order of its outputs.

    Attributes:
        leaves, spec: of the loss, tensors or numbers, and how they make it.
        params: the tensors whose ``param`` sites it met, which the optimizer is called with, by name.
        trained: those that it has gradients of.
        replaced: entries of the parameter store that it set anew.
        passes: how many backward passes it has.
    """

    leaves: list[Any]
    spec: TreeSpec
    params: dict[str, Tensor]
    trained: list[Tensor]
    replaced: list[str]
    passes: int


class Graph:
    """Loss and gradients for calls of one kind.

    Attributes:
        params, trained, replaced: see :class:`Outline`.
        written: tensors that a run changes in place.
        uses: how often it was run.
    """

    def __init__(self, traced: Traced, outline: Outline, store: dict[str, Tensor], snapshot: Snapshot):
        self.params, self.trained, self.replaced = outline.params, outline.trained, outline.replaced
        self.passes = outline.passes
        self._leaves, self._spec = outline.leaves, outline.spec
        self.written, self._judged = traced.written, traced.judged
        self.constants = traced.constants
        places = {id(x): i for i, x in enumerate(traced.constants)}
        lies = {(x.data_ptr(), x.shape): i for i, x in enumerate(traced.constants)}  # met as aliases
        found = [(lies.get((store[name].data_ptr(), store[name].shape)), name) for name in self.replaced]
        self._from_store = [(place, name) for place, name in found if place is not None]
        held = {id(each) for each in self.params.values()}
        constraints = pyro.get_param_store()._constraints
        self._entries = [
            (name, value, constraints.get(name))
            for name, value in store.items()
            if name not in self.replaced and (id(value) in places or id(value) in held)
        ]
        self._exchange(*snapshot.places())
        self._layouts = _layouts(self.constants)
        self._needs = [(p, p.requires_grad) for p in (*self.params.values(), *self.trained, *self.constants)]
        num_losses = sum(isinstance(leaf, Tensor) for leaf in self._leaves)
        self._ends = [num_losses, num_losses + len(self.trained)]
        self._ends += [self._ends[-1] + len(self.replaced), self._ends[-1] + len(self.replaced) + self._judged]
        self._traced, self._first, before, after = split_looks(traced.graph, self._ends[-1])
        self._before = [traced.looks[i] for i in before]
        self._after = [traced.looks[i] for i in after]
        self._run: Callable[..., Sequence[Tensor]] = self._traced
        self.compiled = False
        self.uses = self.misses = 0
        self.checked = 0

    def _exchange(self, free: list[Place], fixed: set[int]) -> None:
        """Find the constants that are taken, in each run, from where programs find them; pin those that cannot be."""
        self._places: dict[int, Place] = {}
        self._pinned: list[tuple[Place, Tensor]] = []
        changed = {_lies(x)[0] for x in self.written}
        for place in free:
            tensor = place.tensor()
            lies = _lies(tensor)
            sharing = [i for i, x in enumerate(self.constants) if x is tensor or _lies(x)[0] == lies[0]]
            plain = all(_lies(self.constants[i]) == lies and i not in self._places for i in sharing)
            if plain and id(tensor) not in fixed and lies[0] not in changed:
                self._places.update(dict.fromkeys(sharing, place))
            elif sharing:
                self._pinned.append((place, tensor))

    @property
    def exchanges(self) -> bool:
        """Whether a run reads tensors that may be others than in the run before."""
        return bool(self._places)

    @property
    def speculates(self) -> bool:
        """Whether a run must be judged by what it drew."""
        return bool(self._after)

    @property
    def judges(self) -> bool:
        """Whether a run may turn out to be none."""
        return bool(self._after) or self._judged

    def valid(self, result: Result) -> bool:
        """Whether observed values lie in their supports, and the loss is a number; on a GPU spot checks see to it, so
        that nobody waits."""
        if result.valid is None or result.valid.is_cuda:
            return True
        losses = [x.item() for x in tree_leaves(result.loss) if isinstance(x, Tensor)]
        return bool(result.valid) and not any(map(math.isnan, losses))

    def looked(self) -> str:
        """What the program read from tensors, in words."""
        return looked(self._after, "that are drawn or changed in a step") if self._after else looked(self._before)

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the parameter store, what needs gradients, and what programs read from tensors are as they were."""
        params, constraints = pyro.get_param_store()._params, pyro.get_param_store()._constraints
        if any(params.get(n) is not value or constraints.get(n) is not c for n, value, c in self._entries):
            return False
        if any(name not in params for name in self.replaced):
            return False
        if any(p.requires_grad is not needed for p, needed in self._needs):
            return False
        if any(place.tensor() is not tensor for place, tensor in self._pinned):
            return False
        if _layouts(self.constants) != self._layouts:  # a tensor's ``data`` may have been replaced
            return False
        if self._first is None:
            return True
        with torch.no_grad():
            try:
                found = self._first(*tensors, *self._constants())
            except RuntimeError:  # other shapes, of values that decide about shapes
                return False
        return all(map(_equal, found, self._before))

    def run(self, tensors: Sequence[Tensor], compiled: bool = True) -> Result:
        """One run; nothing is changed but ``written``, and the random numbers."""
        run = self._run if compiled else self._traced
        with torch.no_grad():
            found = run(*tensors, *self._constants())
        a, b, c, d = self._ends
        given = iter(found[:a])
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        loss = tree_unflatten(leaves, self._spec)
        return Result(loss, found[a:b], found[b:c], found[c] if self._judged else None, found[d:])

    def pairs(self, result: Result) -> list[tuple[Tensor, Tensor]]:
        """What is trained with its gradients, laid out alike: fused optimizers refuse others, and inductor pads matrix
        products on a GPU."""
        return [
            (p, g if g.is_sparse or g.stride() == p.stride() else torch.empty_like(p).copy_(g))
            for p, g in zip(self.trained, result.gradients, strict=True)
        ]

    def attempt(self, tensors: Sequence[Tensor], compiled: bool = True) -> Result | str:
        """A run, or why it fails."""
        try:
            return self.run(tensors, compiled)
        except RuntimeError as error:
            return f"it fails, {in_words(error)}"

    def met(self) -> dict[str, Tensor]:
        """``params`` of the step to come: of the entries that it sets anew, those that are there before."""
        store = pyro.get_param_store()._params
        return {name: store[name] if name in self.replaced else p for name, p in self.params.items()}

    def foreseen(self, result: Result) -> bool:
        """Whether what was read from drawn tensors is what the graph was made for."""
        return all(map(_equal, result.looks, self._after))

    def compile(self, compiler: Literal["auto", "inductor", "none"], tensors: Sequence[Tensor]) -> None:
        """Compile it, if asked, or if that seems worth the time."""
        if compiler == "none" or self.compiled:
            return
        on_gpu = any(x.is_cuda for x in (*tensors, *self.constants))
        nodes = len(self._traced.graph.nodes)
        worth = (SECONDS_TO_COMPILE[0] + SECONDS_TO_COMPILE[1] * nodes) / (SECONDS_GAINED * nodes)
        if compiler == "inductor" or on_gpu or self.uses > worth:
            self._run = compile_graph(self._traced, [*tensors, *self._constants()])
            self.compiled = True

    def uncompile(self) -> None:
        """Go on with the traced graph."""
        self._run = self._traced

    def _constants(self) -> list[Tensor]:
        if not self._from_store and not self._places:
            return self.constants
        params = pyro.get_param_store()._params
        constants = list(self.constants)
        for i, place in self._places.items():
            constants[i] = place.tensor()
        for place, name in self._from_store:
            constants[place] = params[name]
        return constants


def _layouts(tensors: Sequence[Tensor]) -> tuple[list, list]:
    return list(map(_SHAPE_AND_TYPE, tensors)), list(map(Tensor.stride, tensors))


_SHAPE_AND_TYPE = operator.attrgetter("shape", "dtype")


def _lies(x: Tensor) -> tuple:
    """Where a tensor lies in memory."""
    return x.untyped_storage().data_ptr() if x.numel() else id(x), x.data_ptr(), x.shape, x.stride(), x.dtype


def _equal(found: Tensor, look: Look) -> bool:
    value = look.value
    return found.shape == value.shape and bool(((found == value) | ((found != found) & (value != value))).all())


def difference(graph: Graph, mine: Result | str, theirs: Derivatives, rounded: bool) -> str:
    """How a run differs from Pyro's own, in words; empty if only by rounding.

    Args:
        mine: or why there is none.
        rounded: whether products are in bfloat16.
    """
    if isinstance(mine, str):
        return mine
    loss, params, gradients = theirs
    if graph.params.keys() != params.keys() or any(
        graph.params[name] is not p for name, p in params.items() if name not in graph.replaced
    ):
        return "the programs meet other parameters"
    slack = 10.0 if graph.compiled else 1.0
    of_loss, of_gradient = (0.01, 0.1) if rounded else (1e-5 * slack, 1e-3 * slack)
    for a, b in zip(tree_leaves(mine.loss), tree_leaves(loss), strict=True):
        ours, pyros = (x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64) for x in (a, b))
        if not _close(ours, pyros, of_loss, rounded, at_least=1.0):
            return f"a loss of {float(a):.6g}, not {float(b):.6g}"
    found = {id(p): gradient for p, gradient in zip(graph.trained, mine.gradients, strict=True)}
    largest = max([float(gradient.norm()) for _, gradient in gradients], default=0.0)
    for p, gradient in gradients:
        if p._backward_hooks:
            continue  # which may have changed it
        if not _close(found.get(id(p), torch.zeros_like(p)), gradient, of_gradient, rounded, at_least=0.01 * largest):
            name = next((name for name, each in params.items() if each is p), f"a tensor of shape {tuple(p.shape)}")
            return f"another gradient of {name}"
    return ""


def _close(a: Tensor, b: Tensor, tolerance: float, rounded: bool, at_least: float) -> bool:
    if a.dtype == b.dtype == torch.float64 and not rounded:
        tolerance = tolerance * 1e-4
    a, b = (precise(x.detach().to_dense().to(b.device)) for x in (a, b))
    finite = a.isfinite() & b.isfinite()
    if not finite.all():
        same = (a == b) | (a.isnan() & b.isnan())
        if not (same | finite).all():
            return False
        a, b = a.where(finite, 0.0), b.where(finite, 0.0)
    return float((a - b).norm()) <= tolerance * max(float(b.norm()), at_least) + 1e-30


class Input:
    """Where a record reads an argument: as its graph was made for, with the strides of ``x``."""

    def __init__(self, x: Tensor):
        self._span = None if x.is_contiguous() else (_span(x),)
        self._held = self._memory(x).clone()
        self.tensor = self._held if self._span is None else self._held.as_strided(x.shape, x.stride())

    def take(self, x: Tensor) -> None:
        """The values of another one."""
        self._held.copy_(self._memory(x))

    def _memory(self, x: Tensor) -> Tensor:
        return x if self._span is None else x.as_strided(self._span, (1,))

    @staticmethod
    def is_small(x: Tensor) -> bool:
        """Whether little lies between its numbers that is not of it."""
        return _span(x) <= 4 * x.numel()


def _span(x: Tensor) -> int:
    """From the first number of a tensor to the last, in memory."""
    return 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0


class Record:
    """Runs of one graph on a GPU: the first two as they are, the third is recorded, it and all others replayed.

    Whatever memory a record reads or writes is held as long as it may be replayed. Where other tensors have taken the
    place of those that it was made with, or numbers have changed, it is made anew, ever more rarely if that goes on.

    Args:
        graph: reads nothing that is drawn, and keeps its tensors on the GPU.
        step: ``step(result)`` clips gradients and steps the optimizer; recorded too if ``whole``.
    """

    def __init__(self, graph: Graph, step: Callable[[Result], None], whole: bool):
        self.graph, self.whole, self._step = graph, whole, step
        self._wait, self._pause = 2, 1  # kernels are compiled meanwhile
        self._replays = 0
        self._record: torch.cuda.CUDAGraph | None = None
        self._held: Sequence[Tensor] | None = None
        self._key: tuple = ()

    def step(self, tensors: Sequence[Tensor], held: Sequence[Tensor], numbers: tuple) -> Any:
        """One step.

        Args:
            tensors: the arguments.
            held: all other tensors that it reads or writes.
            numbers: what else it depends on.
        """
        self._follow(held, numbers)
        if self._record is None and self._wait == 0:
            self._make(tensors)
        self._wait -= 1
        if self._record is None:
            result = self.graph.run(tensors)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")  # it will be
                self._step(result)
            return result.loss
        for place, given in zip(self._inputs, tensors, strict=True):
            place.take(given)
        self._record.replay()
        self._replays += 1
        if not self.whole:
            self._step(self._result)
        loss = self._result.loss  # the next replay overwrites it
        return loss.clone() if isinstance(loss, Tensor) else tree_map_only(Tensor, Tensor.clone, loss)

    def _follow(self, held: Sequence[Tensor], numbers: tuple) -> None:
        """Forget a record that is made of other tensors or numbers than these."""
        key = (*map(Tensor.data_ptr, held), *numbers)
        if self._held is None:
            self._held, self._key = held, key
        elif key != self._key or len(held) != len(self._held) or not all(map(operator.is_, held, self._held)):
            # an optimizer makes new state in a run that is not recorded: a replay would make it again
            self._pause = 1 if self._replays > 16 else min(2 * self._pause, 1024)
            self._wait, self._replays = max(self._wait, self._pause), 0
            self._record, self._held, self._key = None, held, key

    def _make(self, tensors: Sequence[Tensor]) -> None:
        self._inputs = [Input(x) for x in tensors]
        inputs = [each.tensor for each in self._inputs]
        before = [(p, p.grad) for p in self.graph.trained]
        record = torch.cuda.CUDAGraph()
        try:
            with (
                torch.cuda.device(self.graph.trained[0].device),
                torch.cuda.graph(record, capture_error_mode="thread_local"),  # other threads may allocate meanwhile
            ):
                self._result = self.graph.run(inputs)
                if self.whole:
                    self._step(self._result)
        except Exception as error:
            reason = first_line(error)
            warnings.warn(f"a step cannot be recorded as a CUDA graph, and runs unrecorded: {reason}", stacklevel=5)
            for p, gradient in before:
                p.grad = gradient
        else:
            self._record = record
