"""Functions of tensors that run Pyro programs, as one graph of tensor operations: traced, compiled, watched."""

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any, cast

import pyro
import pyro.infer
import torch
from pyro.poutine.messenger import Messenger
from pyro.util import warn_if_inf, warn_if_nan
from torch import Tensor
from torch._ops import OpOverload
from torch.distributions import Distribution, constraints
from torch.fx import GraphModule, Node
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from pyro_vae.errors import ContractError

MOST_OPERATIONS = 30_000
"""A step of more would take longer than 15 seconds to trace."""


@dataclass(frozen=True)
class Look:
    """Something that a program read from tensors in Python: a graph made of one run holds while it stays the same.

    Attributes:
        value: what was read, a tensor that nobody changes.
        where: the line of the programs, ready for a message; empty if it is in a library.
    """

    value: Tensor
    where: str


@dataclass
class Traced:
    """A function of tensors as a graph of tensor operations.

    Attributes:
        graph: takes the tensors, and after them ``constants``; gives what the function gave, and after it what was
            looked at.
        constants: the tensors that the function met: parameters, buffers, closures. They are read anew in each run.
        looks: what was read from tensors in Python.
        written: tensors that were there before, and that a run changes in place.
        judged: whether the last output before the looks is a bool: whether all observed values lie in their supports.
        undo: puts back what the traced run has written.
    """

    graph: GraphModule
    constants: list[Tensor]
    looks: list[Look]
    written: list[Tensor]
    judged: bool
    undo: Callable[[], None]


def trace(function: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor]) -> Traced:
    """The graph of a function of tensors; the function runs once, for real, with all its side effects.

    Pyro's validation, which looks at values, is off meanwhile; whether observed values lie in their supports becomes
    an output. A run that fails undoes what it did to tensors.

    Args:
        function: gives tensors without a graph.
        tensors: those that it is called with. One that is given twice is one input; one that is also closed over is
            two, since a program is called with aliases.
    """
    watch, judge = _Watch(), _Judge()
    looks: list[Look] = []
    valid = False

    def watched(*inputs: Tensor) -> tuple[Tensor, ...]:
        nonlocal valid
        with watch, _Python(watch), judge:
            found = tuple(function(*inputs))
            looks.extend(look for _, look in watch.looks)
            if judge.verdicts:
                verdict = torch.stack(judge.verdicts).all()
                with _disable_current_modes():
                    valid = bool(verdict)
                found = (*found, verdict)
            return (*found, *(x for x, _ in watch.looks))

    aliases = {id(x): x.detach() for x in tensors}
    for x in tensors:
        for name, value in vars(x).items():  # what users note on tensors
            setattr(aliases[id(x)], name, value)
    try:
        with unvalidated(judge), _undescribed():
            graph = make_fx(watched)(*(aliases[id(x)] for x in tensors))
        if not judge.valid or (judge.verdicts and not valid):
            raise InvalidData("observed values are outside of the support of their distribution")
    except BaseException:
        watch.undo()
        raise
    graph, constants = _lifted(graph, watch)
    return Traced(graph, constants, looks, [x for x, _ in watch.before.values()], bool(judge.verdicts), watch.undo)


class InvalidData(Exception):
    """Pyro would refuse the data of this step: it says why better."""


def put_back(kept: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Give tensors the values that they had."""
    with torch.no_grad():
        for x, value in kept:
            x.copy_(value)


class _Judge(Messenger):
    """Asks the distributions of observed sites whether values lie in their support, as tensors."""

    costly = (constraints._PositiveDefinite, constraints._PositiveSemidefinite, constraints._CorrCholesky)

    def __init__(self):
        super().__init__()
        self.verdicts: list[Tensor] = []
        self.valid = True  # arguments of distributions
        self._observed: dict[int, Tensor] = {}

    def _pyro_post_sample(self, msg) -> None:
        if msg["is_observed"] and isinstance(msg["value"], Tensor):
            self._observed[id(msg["value"])] = msg["value"]

    def judge_arguments(self, distribution: Distribution) -> None:
        """What a distribution is made with, in the run that is traced; later ones show it by a loss that is NaN."""
        for name, constraint in distribution.arg_constraints.items():
            if name in vars(distribution) and not constraints.is_dependent(constraint):
                with _disable_current_modes():
                    value = getattr(distribution, name)
                    self.valid &= bool(constraint.check(value).all()) if isinstance(value, Tensor) else True

    def judge(self, distribution: Distribution, value: object) -> None:
        """What ``_validate_sample`` would look at, of an observed value."""
        if id(value) in self._observed and not isinstance(distribution.support, self.costly):
            self.verdicts.append(cast(Any, distribution.support).check(value).all())


def trace_graph(function: Callable[..., Any], tensors: Sequence[Tensor]) -> GraphModule:
    """The graph of a function of tensors, which looks at no values; what it closes over is in the graph.

    Raises:
        ContractError: if something looks at the values of tensors.
    """

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        with watch, _Python(watch):
            found = function(*tensors)
        if watch.looks:
            raise ContractError(looked([look for _, look in watch.looks]))
        return found

    watch = _Watch()
    with unvalidated(), _undescribed():
        return make_fx(flat)(*(x.detach() for x in tensors))


def looked(looks: Iterable[Look], which: str = "") -> str:
    """What a program did that one graph cannot hold, in words."""
    where = next((look.where for look in looks if look.where), "")
    return (
        f"the programs look at the values of tensors{which and ' '}{which}{where}, in an if, a float(), an .item(), a "
        "choice by a mask or as an array, which one graph cannot hold: write torch.where"
    )


ONE_AT_A_TIME = threading.RLock()
"""Pyro's handlers, and the switches below, belong to the process: one thread at a time runs or traces programs."""


_EMPTY = torch.Size()


@contextlib.contextmanager
def unvalidated(judge: _Judge | None = None) -> Iterator[None]:
    """Context: distributions and Pyro judge no values in this thread, those neither that were made beforehand or were
    asked to; ``judge`` is asked in their place."""
    this = threading.get_ident()
    begin, validate, usual = Distribution.__init__, Distribution._validate_sample, Distribution._validate_args

    def begun(self, batch_shape=_EMPTY, event_shape=_EMPTY, validate_args=None):
        if threading.get_ident() != this:
            return begin(self, batch_shape, event_shape, validate_args)
        if validate_args is None and isinstance(getattr(type(self), "_validate_args", None), property):
            return begin(self, batch_shape, event_shape)  # Pyro's Independent does what its base does
        begin(self, batch_shape, event_shape, False)
        if judge is not None and (usual if validate_args is None else validate_args):
            judge.judge_arguments(self)
        self._validate_args = judge is not None and bool(usual if validate_args is None else validate_args)
        return None

    def judged(self, value):
        if threading.get_ident() != this:
            return validate(self, value)
        return None if judge is None else judge.judge(self, value)

    with ONE_AT_A_TIME:
        Distribution.__init__, Distribution._validate_sample = begun, judged
        try:
            with pyro.validation_enabled(False):
                yield
        finally:
            Distribution.__init__, Distribution._validate_sample = begin, validate


@contextlib.contextmanager
def _undescribed() -> Iterator[None]:
    """Context: nodes of graphs traced in this thread say nothing of shapes, which nobody reads and which take most of
    the time."""
    this, usual = threading.get_ident(), proxy_tensor.set_meta

    def described(proxy, value):
        return proxy if threading.get_ident() == this else usual(proxy, value)

    proxy_tensor.set_meta = described
    try:
        yield
    finally:
        proxy_tensor.set_meta = usual


def _lifted(graph: GraphModule, watch: "_Watch") -> tuple[GraphModule, list[Tensor]]:
    """The graph with the tensors that it met as further inputs; those made on the way stay in it."""
    found: dict[int, Node] = {}
    constants: list[Tensor] = []
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node in [node for node in graph.graph.nodes if node.op == "get_attr"]:
        tensor = getattr(graph, cast(str, node.target), None)
        if not isinstance(tensor, Tensor) or watch.is_made(tensor):
            continue
        if id(tensor) not in found:
            with graph.graph.inserting_after(inputs[-1]) if inputs else graph.graph.inserting_before():
                inputs.append(graph.graph.placeholder(f"constant_{len(constants)}"))
            found[id(tensor)] = inputs[-1]
            constants.append(tensor)
        node.replace_all_uses_with(found[id(tensor)])
        graph.graph.erase_node(node)
    if not any(node.target._schema.is_mutable for node in graph.graph.nodes if isinstance(node.target, OpOverload)):
        for node in [node for node in graph.graph.nodes if node.target is torch.ops.aten.detach.default]:
            node.replace_all_uses_with(node.args[0])  # no gradients are left to stop
            graph.graph.erase_node(node)
    return GraphModule(graph, graph.graph), constants


class _Watch(TorchDispatchMode):
    """Notes which tensors are constant, which are looked at, and which are changed that were there before."""

    def __init__(self):
        super().__init__()
        self.looks: list[tuple[Tensor, Look]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self._operations = 0
        self._made: set[int] = set()
        self._constant: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._operations += 1
        if self._operations > MOST_OPERATIONS:
            raise ContractError(f"they have more than {MOST_OPERATIONS:,} operations, which would take long to trace")
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func in _LIFTED:
            self._add(given[0], constant=True)
        elif func is aten._local_scalar_dense.default or torch.Tag.data_dependent_output in func.tags:
            for x in given:
                self.look(x)
            with _disable_current_modes():
                return func(*args, **kwargs)
        for x in _shaping(func, args, kwargs):
            self.look(x)
        for x in written(func, args, kwargs):
            self._keep(x)
        result = func(*args, **kwargs)
        constant = torch.Tag.nondeterministic_seeded not in func.tags and all(map(self._is_constant, given))
        old = {_storage(x) for x in given}
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                if _storage(x) not in old:
                    self._add(x, constant)
                elif not constant:
                    self._constant.discard(_storage(x))
        return result

    def look(self, x: Tensor) -> None:
        """Note that Python reads this tensor, unless it is the same in every run."""
        if not self._is_constant(x):
            copy = x.detach().clone()
            self.looks.append((copy, Look(copy, _where())))

    def is_made(self, x: Tensor) -> bool:
        """Whether the tensor came into being on the way."""
        return _storage(x) in self._made

    def undo(self) -> None:
        """Put back the tensors that were changed."""
        put_back(self.before.values())

    def _add(self, x: Tensor, constant: bool) -> None:
        self._made.add(_storage(x))
        (self._constant.add if constant else self._constant.discard)(_storage(x))

    def _is_constant(self, x: Tensor) -> bool:
        return _storage(x) in self._constant

    def _keep(self, x: Tensor) -> None:
        if _storage(x) not in self._made and id(x) not in self.before:
            with _disable_current_modes():
                self.before[id(x)] = x, x.detach().clone()


aten = torch.ops.aten
_LIFTED = (aten.lift_fresh.default, aten.lift_fresh_copy.default)
_BY_VALUES = {
    aten.nonzero.default: 0,
    aten.masked_select.default: 1,
    aten._unique2.default: 0,
    aten.unique_dim.default: 0,
    aten.unique_consecutive.default: 0,
    aten.repeat_interleave.Tensor: 0,
    aten.bincount.default: 0,
    aten._pack_padded_sequence.default: 1,
}
"""Operations whose result has a shape, or is read by kernels as one, that depends on the values of this argument."""


_NORMS = (aten.native_batch_norm.default, aten.cudnn_batch_norm.default, aten.miopen_batch_norm.default)
"""Operations that change their running means and do not say so."""


def _shaping(func: OpOverload, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors whose values make shapes."""
    if func is aten.index.Tensor:
        return [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
    place = _BY_VALUES.get(func)
    return [] if place is None or place >= len(args) else [args[place]]


def written(func: OpOverload, args: tuple, kwargs: dict, kind: type = Tensor) -> Iterator[Any]:
    """The tensors, or nodes, that an operation changes."""
    if func._schema.is_mutable or func in _NORMS:
        for place, argument in enumerate(func._schema.arguments):
            declared = argument.alias_info is not None and argument.alias_info.is_write
            if declared or (func in _NORMS and argument.name in ("running_mean", "running_var")):
                given = args[place] if place < len(args) else kwargs.get(argument.name)
                yield from (x for x in tree_leaves(given) if isinstance(x, kind))


def _storage(x: Tensor) -> int:
    try:
        return x.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a sparse tensor has none
        return -id(x)


class _Python(TorchFunctionMode):
    """What is no operation: reads of values by Python and NumPy, and Pyro's searches for NaN."""

    reads = frozenset((Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__))

    def __init__(self, watch: _Watch):
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.__bool__ and _caller() in _SEARCHES:
            return False
        if func is Tensor.__repr__:
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func in self.reads:
            self._watch.look(args[0])
        if func is Tensor.__getitem__ and (places := _places(args[1])):  # without a look at each of them
            return aten.index.Tensor(args[0], places)
        if func is torch.nn.functional.one_hot:  # of a given number of classes: without a look at the largest label
            labels, classes = (*args, *kwargs.values()) if len(args) + len(kwargs) == 2 else (args[0], -1)
            if classes > 0:
                return (labels.unsqueeze(-1) == torch.arange(classes, device=labels.device)).long()
        return func(*args, **kwargs)


def _places(index: object) -> list[Tensor]:
    """An index of integers that are tensors; empty if it is another."""
    places = list(index) if isinstance(index, tuple) else [index]
    kinds = (torch.int64, torch.int32, torch.int16, torch.int8)
    of_integers = all(isinstance(i, Tensor) and i.dim() == 0 and i.dtype in kinds for i in places)
    return [i.long() for i in cast(list[Tensor], places)] if of_integers else []


class Collected(TorchFunctionMode):
    """Losses of Pyro without gradients and numbers: ``backward`` adds to ``losses``, and ``item`` is a tensor.

    Args:
        loss: the object whose methods', and Pyro's losses', ``item`` is meant.
    """

    def __init__(self, loss: object):
        super().__init__()
        self.losses: list[Tensor] = []
        self._loss = loss

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is Tensor.backward:
            if (len(args) > 1 and args[1] is not None) or kwargs.get("gradient") is not None:
                raise ContractError("a loss that calls backward with a gradient of its own cannot be compiled")
            self.losses.append(args[0])
            return None
        if func is Tensor.item:
            frame = sys._getframe(1)
            of_pyro = os.path.dirname(frame.f_code.co_filename) == _LOSSES
            if of_pyro or ("self" in frame.f_locals and frame.f_locals["self"] is self._loss):
                return args[0].detach()
        return func(*args, **kwargs)


_LOSSES = os.path.dirname(pyro.infer.__file__)
_SEARCHES = (warn_if_nan.__code__, warn_if_inf.__code__)


def _caller() -> CodeType:
    """The code that asks a function of a tensor, behind the modes of this file."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code


def _where() -> str:
    """The line of the programs that is running, outside of the libraries; empty if there is none."""
    for frame in reversed(traceback.extract_stack()):
        of_library = "site-packages" in frame.filename or Path(frame.filename).parent == Path(__file__).parent
        if not of_library and frame.filename != "<string>":
            return f" ({Path(frame.filename).name}, line {frame.lineno})"
    return ""


def in_words(error: BaseException) -> str:
    """What an error, or the one that Pyro wraps in it, says, in one line and without Pyro's table of shapes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error).removesuffix(":").removesuffix("Trace Shapes").strip() or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).splitlines()), type(error).__name__)
