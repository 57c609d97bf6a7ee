"""Kinds of calls: what of arguments, surroundings and Python a graph holds for."""

import warnings
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.distributions import Distribution
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from pyro_vae.infer.compiling import likeness
from pyro_vae.infer.graphs import Graph, Record
from pyro_vae.infer.holding import PLAIN, exact
from pyro_vae.infer.watching import Snapshot, notes

MOST_STATES = 8
"""So many states of the programs' Python are kept with their graphs, such as those of training and evaluation."""


class Kind:
    """What is known of one kind of call.

    Attributes:
        graphs: one for each of what was read from tensors, the newest first.
        record: of the newest, on a GPU.
        reason: why it has none, if it must have none.
        traces: how often it was traced.
        mismatches: how often Pyro gave something else.
        waited: calls that came before it was worth tracing.
    """

    def __init__(self):
        self.graphs: list[Graph] = []
        self.record: Record | None = None
        self.reason = ""
        self.traces = self.mismatches = self.waited = 0


class State:
    """A state of the programs' Python, and the kinds of calls met in it."""

    def __init__(self, ids: tuple[int, ...], snapshot: Snapshot):
        self.ids, self.snapshot = ids, snapshot
        self.kinds: OrderedDict[tuple, Kind] = OrderedDict()


class Call(NamedTuple):
    """Arguments of a call, and its kind.

    Attributes:
        leaves, spec: all arguments, flat, and their structure.
        tensors: those among them, and numbers that are given as tensors.
        key: what the kind is, beside the state.
        devices: the GPUs on which random numbers may be drawn.
    """

    args: tuple
    kwargs: dict
    leaves: list[Any]
    spec: TreeSpec
    tensors: list[Tensor]
    lifted: frozenset[int]
    key: tuple
    state: State
    train: bool
    devices: tuple[torch.device, ...]

    def rebuilt(self, tensors: Sequence[Tensor]) -> tuple[tuple, dict]:
        """The arguments with other tensors."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(x, Tensor) or i in self.lifted else x for i, x in enumerate(self.leaves)]
        return tree_unflatten(leaves, self.spec)

    def difference(self, last: "Call | None") -> str:
        """What is other than in the last call, in words."""
        if last is None or last.spec != self.spec:
            return "the structure of the arguments"
        if last.state is not self.state and (changed := last.state.snapshot.changed()):
            return changed
        named = tree_flatten_with_path((self.args, self.kwargs))[0]
        for (path, leaf), a, b in zip(named, last.key[2], self.key[2], strict=True):
            if a != b:
                return f"{'the layout of ' if isinstance(leaf, Tensor) else ''}argument {keystr(path[1:])}"
        return "something around the step"


class Calls:
    """Finds the kind of each call of two programs.

    Args:
        roots: programs and loss, whose Python is watched.
    """

    def __init__(self, roots: tuple[object, ...]):
        self._roots = roots
        self._states: list[State] = []
        self._lifted: dict[TreeSpec, frozenset[int]] = {}
        self._specs: dict[tuple, TreeSpec] = {}
        self._last: Call | None = None

    def call(self, args: tuple, kwargs: dict, train: bool, params: Sequence[Tensor], fixed: tuple) -> Call | str:
        """A call with its kind; or why it has none, in words.

        Args:
            params: the tensors that the optimizer knows.
            fixed: what else the kind is.
        """
        leaves, spec, structure = self._flat(args, kwargs)
        ambient = _ambient()
        if isinstance(ambient, str):
            return ambient
        if any(p._post_accumulate_grad_hooks for p in params):
            return "a parameter has hooks that run once it has a gradient"
        if train and not torch.is_grad_enabled():
            return "gradients are switched off around the step"
        lifted = self._numbers(leaves, spec) if structure is spec else frozenset()
        tensors: list[Tensor] = []
        parts: list[object] = []
        objects: list[object] = []
        places: dict[int, int] = {}
        memories: dict[int, int] = {}
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                if leaf.requires_grad or type(leaf) is not Tensor or leaf.layout is not torch.strided:
                    return "an argument is no plain tensor, or needs a gradient"
                parts.append((likeness(leaf), places.setdefault(id(leaf), len(places)), _memory(leaf, memories)))
                tensors.append(leaf)
                if leaf.__dict__ and notes(leaf):
                    objects.append(leaf)
            elif i in lifted:
                parts.append(float)
                tensors.append(_as_tensor(leaf, leaves))
            elif isinstance(leaf, slice):
                parts.append((slice, leaf.start, leaf.stop, leaf.step))
            elif isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject:
                parts.append((leaf.shape, leaf.dtype.str, leaf.tobytes()))
            elif isinstance(leaf, (float, np.generic)):
                parts.append((type(leaf), exact(leaf)))
            elif isinstance(leaf, PLAIN):
                parts.append((type(leaf), leaf))
            else:
                parts.append((type(leaf), id(leaf)))
                objects.append(leaf)
        key = train, structure, tuple(parts), ambient, fixed
        try:
            hash(key)
        except TypeError as error:
            return f"an argument cannot be compared, {error}"
        state = self._state(objects)
        if state.snapshot.iterator:
            return f"{state.snapshot.iterator} holds an iterator, and how far it is cannot be watched"
        devices = tuple({x.device for x in (*tensors, *params) if x.is_cuda})
        self._last = Call(args, kwargs, leaves, spec, tensors, lifted, key, state, train, devices)
        return self._last

    def _flat(self, args: tuple, kwargs: dict) -> tuple[list[Any], TreeSpec, Hashable]:
        """All arguments; their structure; and what stands for it in keys: of tensors alone, as a rule, their names."""
        given = [*args, *kwargs.values()]
        if not all(type(x) is Tensor for x in given):
            leaves, spec = tree_flatten((args, kwargs))
            return leaves, spec, spec
        names = (len(args), *kwargs)
        if names not in self._specs:
            self._specs[names] = tree_flatten((args, kwargs))[1]
        return given, self._specs[names], names

    def _numbers(self, leaves: list[Any], spec: TreeSpec) -> frozenset[int]:
        """The numbers among the arguments that are tensors from now on, since they have changed."""
        lifted = self._lifted.get(spec, frozenset())
        last = self._last
        if last is None or last.spec != spec:
            return lifted
        pairs = enumerate(zip(last.leaves, leaves, strict=True))
        new = {i for i, (a, b) in pairs if type(a) is float and type(b) is float and a != b} - lifted
        if new:
            lifted = self._lifted[spec] = lifted | new
            named = tree_flatten_with_path(tree_unflatten(leaves, spec))[0]
            names = ", ".join(keystr(named[i][0][1:]) for i in sorted(new))
            warnings.warn(f"the number {names} changes between steps: compiled ones get it as a tensor", stacklevel=6)
        return lifted

    def _state(self, objects: list[object]) -> State:
        """The state of all that programs reach in Python: one known before, or a new one."""
        ids = tuple(map(id, objects))
        for i, state in enumerate(self._states):
            if state.ids == ids and state.snapshot.holds():
                if i:
                    self._states.insert(0, self._states.pop(i))
                return state
        for i, state in enumerate(self._states):
            if state.ids == ids and state.snapshot.release():
                state.kinds.clear()  # their graphs hold the tensors that were there
                self._states.insert(0, self._states.pop(i))
                return state
        state = State(ids, Snapshot((*self._roots, *objects)))
        self._states = [state, *self._states[: MOST_STATES - 1]]
        return state


def _memory(x: Tensor, memories: dict[int, int]) -> int:
    """Which of the memories that tensors lie in this one lies in."""
    return memories.setdefault(x.untyped_storage()._cdata, len(memories))


def _ambient() -> tuple | str:
    """What surrounds a step that programs run in; or why no graph holds there."""
    if _PYRO_STACK and not _hides_all(_PYRO_STACK[-1]):
        return f"a handler is around the step, {type(_PYRO_STACK[-1]).__name__}"
    stack = torch.overrides._get_current_function_mode_stack()
    modes = [type(each).__name__ for each in stack]
    if any(name != "DeviceContext" for name in modes) or torch._C._len_torch_dispatch_stack():
        return "a mode of torch is around the step"
    if cast(Any, torch._C)._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "hooks for saved tensors are around the step"
    if torch.is_inference_mode_enabled():
        return "inference mode is around the step"
    autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
    types = (torch.get_autocast_dtype("cpu"), torch.get_autocast_dtype("cuda")) if any(autocast) else ()
    judged = Distribution._validate_args
    device = str(torch.get_default_device()) if stack else ""
    usual = torch.get_default_dtype(), device, torch.are_deterministic_algorithms_enabled()
    return torch.is_grad_enabled(), judged, autocast, types, *usual


def _hides_all(handler: object) -> bool:
    """Whether it is ``poutine.block()``, inside of which programs are as if nothing were around them."""
    hide = handler.hide_fn if type(handler) is BlockMessenger else None
    return isinstance(hide, partial) and hide.args == ([], [], [], [], True)


def _as_tensor(number: float, leaves: list[Any]) -> Tensor:
    """A number that changes, as a tensor of the widest type among the data."""
    given = [x for x in leaves if isinstance(x, Tensor)]
    double = any(x.dtype == torch.float64 for x in given)
    device = given[0].device if given else None
    return torch.tensor(number, dtype=torch.float64 if double else None, device=device)
