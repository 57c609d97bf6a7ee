"""What Python holds that programs may read: seen once, and compared at every step, so that no graph outlives it."""

import contextlib
import enum
import operator
import os
import random
import sys
import types
import weakref
from array import array
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any, cast

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.optim import PyroOptim
from torch import Tensor
from torch.distributions import constraints

from pyro_vae.infer.holding import (
    PLAIN,
    Array,
    Buffer,
    Cells,
    Context,
    Entries,
    Holder,
    Items,
    Keys,
    Named,
    Place,
    Row,
    Sample,
    Slots,
    Through,
    alike,
)
from pyro_vae.infer.naming import Names, is_library, names_in, names_of_libraries

MOST_SLOTS = 5000
"""So many places are watched at the most; what lies beyond is left to the spot checks."""
MOST_ENTRIES = 1000
"""Of larger containers some items are compared, at equal distances."""
_UNSEEN = frozenset(("_steps_taken", "_pyro_context", "__weakref__", "__dict__"))
_UNSEEN_IN_LIBRARIES = (
    "_cache",
    "_samples_cache",
    "_param_hits",
    "_param_misses",
    "_inv",
    "plates",
    "_prototype_frames",
    "args_kwargs",
    "trace",
)
"""Attributes, and beginnings of such, that change while programs run and that are none of their settings."""
_METHODS = (types.FunctionType, staticmethod, classmethod, property)
_UNCALLED = frozenset(
    ("__init__", "__new__", "__del__", "__repr__", "__str__", "__reduce__", "__getstate__", "__setstate__")
)
"""Methods that run at other times than those of steps."""
_OF_ALL_GLOBALS = frozenset(("globals", "eval", "exec"))
_UNSEEN_IN_TENSORS = ("unconstrained", "_pyro", "_dynamo")
"""Beginnings of what Pyro and torch note on tensors."""


class Snapshot:
    """The attributes, closures, globals and containers that objects and their code can reach, at one moment.

    What was replaced, added or removed since is found by identity, and numbers, strings and NumPy scalars by value.
    The contents of tensors do not count, since a graph reads them anew; which tensor it is does. Nor do attributes of
    the user's classes that no code reached names, such as the losses that a method for training keeps.

    Args:
        roots: programs, losses and other objects.
    """

    def __init__(self, roots: Iterable[object]):
        self._holders: list[Holder] = []
        self._empty: list[Any] = []
        self._seen: dict[int, object] = {}  # kept alive, so that no id is taken twice
        self._slots = 0
        self.generators: list[torch.Generator | np.random.Generator | np.random.RandomState | random.Random] = []
        self.iterator = ""  # the name of what holds one, whose place nobody sees
        self._code = Names()
        self._methods: dict[str, list[tuple[object, str]]] = {}  # of the user's classes, until code names them
        self._objects: list[_Object] = []
        self._instances: list[object] = []
        self._classes: list[type] = []
        todo = deque((root, getattr(root, "__name__", type(root).__name__)) for root in roots)
        while todo and self._slots < MOST_SLOTS:
            each, label = todo.popleft()
            with contextlib.suppress(
                AttributeError, LookupError, RuntimeError
            ):  # of proxies that stand for nothing yet
                if id(each) not in self._seen and not _is_leaf(each):
                    self._seen[id(each)] = each
                    todo.extend(self._visit(each, label))
            if not todo:
                todo.extend(self._named())
        for each in self._objects:
            self._hold(Named(each.held, each.label, [*each.visited, *each.missing(self._code)]))
        for each in self._classes:
            of_bases = {name for base in each.__mro__[1:] if not is_library(base.__module__) for name in vars(base)}
            self._hold(Named(vars(each), each.__name__, sorted((of_bases & self._code.read) - vars(each).keys())))
        self._hold(Through(self._classes, "bases of classes", operator.attrgetter("__bases__")))
        self._hold(Through(self._instances, "classes", type))
        if not self._code.read.isdisjoint(("environ", "getenv")):
            self._hold(Entries(cast(Any, os.environ)._data, "environment"))
        if "get_param_store" in self._code.read:
            self._hold(Keys(lambda: pyro.get_param_store()._params, "parameter store"))
        self._row = Row(self._holders)

    def holds(self) -> bool:
        """Whether all is as it was."""
        return not any(self._empty) and self._row.holds()

    def changed(self, since: bool = False) -> str:
        """The name of something that is not as it was; empty if all is.

        Args:
            since: a tensor that may be exchanged between steps counts too, if it was since :meth:`holds` was asked.
        """
        grown = next((each for each in self._empty if each), None)
        if grown is not None:
            return "a container that was empty"
        return next((holder.changed() for holder in self._holders if not holder.holds(exchanges=not since)), "")

    def release(self) -> bool:
        """Whether nothing was replaced but tensors by others like them; these may be exchanged from now on."""
        changed = [holder for holder in self._holders if not holder.holds()]
        if any(self._empty) or not changed:
            return False
        released = []
        for holder in changed:
            found = tuple(holder.now())
            if len(found) != len(holder.values):
                return False
            places = holder.exchanged(found)
            pairs = enumerate(zip(found, holder.values, strict=True))
            if not places or not all(alike(a, b) or i in places for i, (a, b) in pairs):
                return False
            released.append((holder, places, found))
        for holder, places, found in released:
            holder.free, holder.values = holder.free | places, found
        self._row = Row(self._holders)
        return True

    def places(self) -> tuple[list["Place"], set[int]]:
        """Where tensors may be exchanged; and the ids of the tensors that may not."""
        free = [Place(holder, i) for holder in self._holders for i in sorted(holder.free)]
        pairs = ((i in holder.free, x) for holder in self._holders for i, x in enumerate(holder.values))
        return free, {id(x) for is_free, x in pairs if not is_free and isinstance(x, Tensor)}

    def restore(self) -> None:
        """Put back what was replaced, added or removed."""
        for each in self._empty:
            each.clear()
        for holder in self._holders:
            if not holder.holds():
                holder.restore()

    def _visit(self, each: Any, label: str) -> Iterator[tuple[object, str]]:
        if isinstance(each, (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)):
            self.generators.append(each)
        elif isinstance(each, dict):
            yield from self._whole(each, label)
        elif isinstance(each, (list, deque, set)):
            if not each:
                self._empty.append(each)
            elif len(each) <= MOST_ENTRIES:
                yield from self._hold(Items(each, label))
            else:
                self._hold(Sample(each, label))
        elif isinstance(each, (tuple, frozenset)):
            yield from ((item, label) for item in each)
        elif isinstance(each, np.ndarray):
            self._hold(Array(each, label))
        elif isinstance(each, Tensor):
            yield from self._some(vars(each), notes(each), "a tensor")
        elif isinstance(each, (operator.attrgetter, operator.methodcaller)):
            self._code.read.add("attrgetter")
        elif isinstance(each, Iterator) and type(each).__module__ in ("builtins", "itertools"):
            self.iterator = label
        elif isinstance(each, (array, bytearray, memoryview)):
            if len(each) <= MOST_ENTRIES * 10:
                self._hold(Buffer(each, label))
        elif isinstance(each, ContextVar):
            yield from self._hold(Context(each, label))
        elif isinstance(each, weakref.ref):
            yield each(), label
        elif isinstance(each, types.MethodType):
            yield from ((each.__func__, label), (each.__self__, type(each.__self__).__name__))
        elif isinstance(each, partial):
            yield from ((each.func, label), (each.args, label), (each.keywords, label))
            yield from self._whole(vars(each), label)
        elif isinstance(each, (staticmethod, classmethod)):
            yield each.__func__, label
        elif isinstance(each, property):
            yield from ((f, label) for f in (each.fget,) if f is not None)
        elif isinstance(each, types.FunctionType):
            yield from self._function(each, label)
        elif isinstance(each, types.ModuleType):
            self._objects.append(_Object(vars(each), each.__name__, of_library=is_library(each.__name__)))
        elif isinstance(each, type):
            yield from self._class(each)
        else:
            yield from self._object(each)

    def _named(self) -> list[tuple[object, str]]:
        """The methods and attributes that code reached by now names, and that were not visited."""
        found = [each for name in self._code.read & self._methods.keys() for each in self._methods.pop(name)]
        for each in self._objects:
            values = [each.held[name] for name in each.visit(self._code)]
            followed = [value for value in values if not each.of_library or isinstance(value, types.ModuleType)]
            found += [(value, each.label) for value in followed]
        self._slots += len(found)
        return found

    def _hold(self, holder: "Holder") -> Iterator[tuple[object, str]]:
        self._holders.append(holder)
        self._slots += len(holder.values)
        return ((value, holder.label) for value in holder.values)

    def _whole(self, each: dict, label: str) -> Iterator[tuple[object, str]]:
        if not each:
            self._empty.append(each)
            return iter(())
        return self._hold(Entries(each, label)) if len(each) <= MOST_ENTRIES else self._hold(Sample(each, label))

    def _some(self, each: Any, names: Iterable[str], label: str) -> Iterator[tuple[object, str]]:
        names = [name for name in names if name in each]
        return self._hold(Named(each, label, names)) if names else iter(())

    def _function(self, each: types.FunctionType, label: str) -> Iterator[tuple[object, str]]:
        """Closure, defaults and attributes; of a user's function the globals that its code names."""
        cells = each.__closure__ or ()
        names = each.__code__.co_freevars
        if cells:
            yield from self._hold(Cells(cells, label, names))
        yield from self._whole(each.__dict__, label)
        if str(each.__module__).startswith("pyro_vae.") or is_library(each.__module__):  # never changed in place
            yield from ((value, label) for value in (each.__defaults__ or ()))
            yield from ((value, label) for value in (each.__kwdefaults__ or {}).values())
        else:
            yield from self._hold(Slots(each, label, ["__code__", "__defaults__", "__kwdefaults__"]))
        if not is_library(each.__module__):
            code = names_in(each.__code__)
            self._code.add(code)
            yield from self._some(each.__globals__, code.of_globals, "global")
            if not code.of_globals.isdisjoint(_OF_ALL_GLOBALS):
                self._code.read.add("vars")
                self._objects.append(_Object(each.__globals__, "global"))
            if code.imported:
                package = each.__globals__.get("__package__") or ""
                names = [name for n in code.imported for name in (n, f"{package}.{n}".strip(".")) if name]
                yield from self._hold(Named(sys.modules, "module", names))

    def _class(self, each: type) -> Iterator[tuple[object, str]]:
        """What the user's classes hold: attributes, and what their methods reach as soon as code names them."""
        if not is_library(each.__module__):
            self._classes.append(each)
        for base in each.__mro__:
            if is_library(base.__module__) or (id(base) in self._seen and base is not each):
                continue
            self._seen[id(base)] = base
            yield type(base), type(base).__name__
            if issubclass(base, enum.Enum):
                continue
            methods = [name for name, value in vars(base).items() if isinstance(value, _METHODS)]
            others = [name for name in vars(base) if not name.startswith("__") and name not in methods]
            yield from self._some(vars(base), others, base.__name__)
            methods = [name for name in methods if name not in _UNCALLED]
            self._hold(Named(vars(base), base.__name__, methods))
            for name in methods:
                method = vars(base)[name], base.__name__
                if name.startswith(("__", "_pyro_")) or name in names_of_libraries(each):
                    yield method
                else:
                    self._methods.setdefault(name, []).append(method)

    def _object(self, each: Any) -> Iterator[tuple[object, str]]:
        kind = type(each)
        self._instances.append(each)
        yield kind, kind.__name__
        held = getattr(each, "__dict__", None)
        if isinstance(held, dict):
            own = [base for base in kind.__mro__ if is_library(base.__module__) and base is not object]
            skip = _UNSEEN | {name for name in held if own and name.startswith(_UNSEEN_IN_LIBRARIES)}
            if kind.__module__ == "contextlib":
                skip = {*skip, "gen"}  # which nobody goes on with: a context is made anew of ``func``
            if not is_library(kind.__module__):
                self._objects.append(_Object(held, kind.__name__, kind, skip))
            elif skip.isdisjoint(held):
                yield from self._whole(held, kind.__name__)
            else:
                yield from self._some(held, [name for name in held if name not in skip], kind.__name__)
        slots = [n for base in kind.__mro__ for n in _as_tuple(vars(base).get("__slots__", ())) if n not in _UNSEEN]
        if slots and not is_library(kind.__module__):
            yield from self._hold(Slots(each, kind.__name__, [name for name in slots if hasattr(each, name)]))
        if kind.__module__.startswith("pandas.core.internals"):
            yield from self._hold(Slots(each, kind.__name__, [n for n in ("blocks", "values") if hasattr(each, n)]))


def _is_leaf(each: object) -> bool:
    """What holds nothing to watch, or is watched elsewhere."""
    if isinstance(each, Tensor):
        return not notes(each)
    if isinstance(each, (*PLAIN, np.generic, enum.Enum, poutine.Trace)):
        return True
    if isinstance(each, constraints.Constraint):
        return not vars(each)
    if isinstance(each, (types.BuiltinFunctionType, types.CodeType)):
        return True
    if isinstance(each, (torch.optim.Optimizer, PyroOptim)) or each is pyro.get_param_store():
        return True
    return isinstance(each, type) and is_library(each.__module__)


def notes(x: Tensor) -> list[str]:
    """The attributes that a user gave to a tensor."""
    return [name for name in x.__dict__ if not name.startswith(_UNSEEN_IN_TENSORS)]


class _Object:
    """An object of a user's class, or a module, of whose attributes those count that code names."""

    def __init__(
        self,
        held: dict[str, Any],
        label: str,
        kind: type = object,
        skip: Collection[str] = (),
        of_library: bool = False,
    ):
        self.held, self.label, self.kind, self.skip, self.of_library = held, label, kind, skip, of_library
        self.visited: dict[str, None] = {}

    def visit(self, code: Names) -> list[str]:
        """The attributes that are named, and were not when this was asked before."""
        if code.is_dynamic and not self.of_library:
            named: Collection[str] = self.held.keys()
        else:
            named = self.held.keys() & (code.read | names_of_libraries(self.kind) | {"__getattr__"})
        new = [name for name in self.held if name in named and name not in self.visited and name not in self.skip]
        self.visited.update(dict.fromkeys(new))
        return new

    def missing(self, code: Names) -> list[str]:
        """Attributes that it has not yet, and that would count: code sets or asks for them, or its class has them."""
        of_class = {name for base in self.kind.__mro__ if not is_library(base.__module__) for name in vars(base)}
        names = () if self.of_library else sorted(code.written | (code.read & of_class))
        return [name for name in names if name not in self.held]


def _as_tuple(slots: object) -> tuple:
    return (slots,) if isinstance(slots, str) else tuple(slots)  # type: ignore[arg-type]
