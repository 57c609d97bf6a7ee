"""Places where Python holds values: what they held at one moment, and whether they still do."""

import gc
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from itertools import chain, islice, repeat
from operator import attrgetter, call, is_
from types import FunctionType, MappingProxyType
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

MOST_SAMPLED = 500
PLAIN = (bool, int, float, complex, str, bytes, type(None), slice, range, torch.Size, torch.dtype, torch.device)


def alike(a: object, b: object) -> bool:
    """Whether a program that reads one value in place of the other does the same; tensors and objects by identity."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        other: Any = b
        return len(a) == len(other) and all(map(alike, a, other))
    if isinstance(a, (float, np.generic)):
        return exact(a) == exact(b)
    return isinstance(a, PLAIN) and a == b


def exact(number: Any) -> object:
    """What tells a floating-point number from all others: 0 from -0, and no NaN from itself."""
    return number.tobytes() if isinstance(number, np.generic) else number.hex()


class Place(NamedTuple):
    """Where programs find a tensor."""

    holder: "Holder"
    index: int

    def tensor(self) -> Tensor:
        """The tensor that is there now."""
        return self.holder.at(self.index)


_ABSENT = object()


def _are_exchangeable(a: object, b: object) -> bool:
    if not (type(a) is Tensor and type(b) is Tensor) or a.requires_grad or b.requires_grad:
        return False
    return (a.shape, a.stride(), a.dtype, a.device, a.layout) == (b.shape, b.stride(), b.dtype, b.device, b.layout)


class Holder:
    """Values that one object holds, as they were."""

    __slots__ = ("free", "label", "of", "values")

    def __init__(self, of: Any, label: str):
        self.of, self.label = of, label
        self.values: tuple = tuple(self.now())
        self.free: frozenset[int] = frozenset()  # the places of tensors that may be exchanged for others like them

    def now(self) -> Iterable[Any]:
        raise NotImplementedError

    def names(self) -> Sequence[object]:
        return range(len(self.values))

    def restore(self) -> None:
        raise NotImplementedError

    def in_c(self) -> Callable[[Any], Iterable[Any]] | None:
        """A function in C that makes of ``of`` what ``now`` gives; None: there is none."""
        return None

    def holds(self, exchanges: bool = True) -> bool:
        now = self.now()
        if all(map(is_, now, self.values)) and len(self) == len(self.values):
            return True
        found = tuple(self.now())
        free = self.free if exchanges else frozenset()
        if len(found) != len(self.values) or (others := self.exchanged(found)) - free:
            return False
        if not all(alike(a, b) or i in others for i, (a, b) in enumerate(zip(found, self.values, strict=True))):
            return False
        self.values = found  # equal numbers, but other objects: found by identity the next time
        return True

    def exchanged(self, found: tuple) -> set[int]:
        """The places whose tensor is another, like the one before."""
        pairs = enumerate(zip(found, self.values, strict=True))
        return {i for i, (a, b) in pairs if a is not b and _are_exchangeable(a, b)}

    def at(self, place: int) -> Any:
        """What is there now."""
        return next(islice(self.now(), place, None), None)

    def __len__(self) -> int:
        return len(self.of)

    def changed(self) -> str:
        found = tuple(self.now())
        names = self.names()
        for name, old, new in zip(names, self.values, found, strict=False):
            if not alike(old, new):
                return f"{self.label}.{name}" if isinstance(name, str) else f"{self.label}[{name}]"
        return f"what {self.label} holds"


class Entries(Holder):
    """All entries of a dict."""

    __slots__ = ("keys",)

    def __init__(self, of: dict, label: str):
        self.keys = tuple(of)
        super().__init__(of, label)

    def now(self) -> Iterable[Any]:
        return self.of.values()

    def holds(self, exchanges: bool = True) -> bool:
        return super().holds(exchanges) and (len(self.keys) < 2 or next(reversed(self.of)) == self.keys[-1])

    def names(self) -> Sequence[object]:
        return self.keys

    def restore(self) -> None:
        self.of.clear()
        self.of.update(zip(self.keys, self.values, strict=True))


class Named(Holder):
    """Some entries of a mapping, such as the globals that a function names."""

    __slots__ = ("keys",)

    def __init__(self, of: Any, label: str, keys: list[str]):
        self.keys = keys
        super().__init__(of, label)

    def now(self) -> Iterable[Any]:
        return map(self.of.get, self.keys, repeat(_ABSENT))

    def __len__(self) -> int:
        return len(self.keys)

    def names(self) -> Sequence[object]:
        return self.keys

    def restore(self) -> None:
        if isinstance(self.of, dict):
            for name, value in zip(self.keys, self.values, strict=True):
                if value is not _ABSENT:
                    self.of[name] = value
                else:
                    self.of.pop(name, None)


class Slots(Named):
    __slots__ = ()

    def now(self) -> Iterable[Any]:
        return (getattr(self.of, name, None) for name in self.keys)

    def in_c(self) -> Callable[[Any], Iterable[Any]] | None:
        return attrgetter(*self.keys) if type(self.of) is FunctionType and len(self.keys) > 1 else None

    def restore(self) -> None:
        for name, value in zip(self.keys, self.values, strict=True):
            setattr(self.of, name, value)


class Cells(Holder):
    """The closure of a function."""

    __slots__ = ("keys",)

    def __init__(self, of: tuple, label: str, keys: tuple[str, ...]):
        self.keys = keys
        super().__init__(of, label)

    def now(self) -> Iterable[Any]:
        return map(_contents, self.of)

    def in_c(self) -> Callable[[Any], Iterable[Any]] | None:
        empty = any(value is _EMPTY_CELL for value in self.values)
        return None if empty else partial(map, attrgetter("cell_contents"))

    def names(self) -> Sequence[object]:
        return self.keys

    def restore(self) -> None:
        for cell, value in zip(self.of, self.values, strict=True):
            if value is not _EMPTY_CELL:
                cell.cell_contents = value


_EMPTY_CELL = object()


def _contents(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # a name that has no value yet
        return _EMPTY_CELL


class Items(Holder):
    """The items of a list, deque or set."""

    __slots__ = ()

    def now(self) -> Iterable[Any]:
        return self.of

    def in_c(self) -> Callable[[Any], Iterable[Any]] | None:
        return iter if type(self.of) in (list, deque, set) else None

    def restore(self) -> None:
        kept = self.values
        self.of.clear()
        (self.of.update if isinstance(self.of, set) else self.of.extend)(kept)


class Through(Holder):
    """What a function gives for each of some objects, such as their classes."""

    __slots__ = ("function",)

    def __init__(self, of: list, label: str, function: Callable[[Any], Any]):
        self.function = function
        super().__init__(of, label)

    def now(self) -> Iterable[Any]:
        return map(self.function, self.of)

    def restore(self) -> None:
        """Nobody changes classes while a step runs."""


class Sample(Holder):
    """The length of a large container, and some of its items."""

    __slots__ = ()

    def now(self) -> Iterable[Any]:
        values = self.of.values() if isinstance(self.of, dict) else self.of
        return chain((len(self.of),), islice(values, 0, None, 1 + len(self.of) // MOST_SAMPLED))

    def __len__(self) -> int:
        return len(self.values)

    def restore(self) -> None:
        """What the others were is not known."""


class Keys(Holder):
    """The keys of the mapping that a function gives."""

    __slots__ = ()

    def now(self) -> Iterable[Any]:
        return self.of()

    def __len__(self) -> int:
        return len(self.of())

    def restore(self) -> None:
        """Whoever changes the mapping puts it back."""


class Buffer(Holder):
    """The contents of an array of Python, or of bytes."""

    __slots__ = ()

    def now(self) -> Iterable[Any]:
        return (bytes(self.of),)

    def __len__(self) -> int:
        return 1

    def restore(self) -> None:
        self.of[:] = array(self.of.typecode, self.values[0]) if isinstance(self.of, array) else self.values[0]


class Context(Holder):
    """The value of a context variable."""

    __slots__ = ()

    def now(self) -> Iterable[Any]:
        return (self.of.get(_ABSENT),)

    def __len__(self) -> int:
        return 1

    def restore(self) -> None:
        if self.values[0] is not _ABSENT:
            self.of.set(self.values[0])


class Array(Holder):
    """The contents of an array of NumPy; of a large one some elements, at equal distances."""

    __slots__ = ("copy", "every")

    def __init__(self, of: np.ndarray, label: str):
        self.every = 1 + of.size // (20 * MOST_SAMPLED)
        self.copy = self.some(of).copy()
        super().__init__(of, label)

    def some(self, of: np.ndarray) -> np.ndarray:
        return of if self.every == 1 else of.reshape(-1)[:: self.every]

    def now(self) -> Iterable[Any]:
        return ()

    def holds(self, exchanges: bool = True) -> bool:
        return np.array_equal(self.some(self.of), self.copy, equal_nan=self.copy.dtype.kind in "fc")

    def changed(self) -> str:
        return f"an array of {self.label}"

    def restore(self) -> None:
        if self.every == 1:
            self.of[...] = self.copy


class Row:
    """Many holders, compared at every step in a fraction of the time that one after the other takes.

    Those of a dict are looked at only if its version is another: Python, or torch, counts the changes of a dict. Most
    others are compared in one go.

    Args:
        holders: in any order.
    """

    def __init__(self, holders: Iterable[Holder]):
        version, rest = dict_versions(), list(holders)
        self._version: Callable[[dict], int] = version or len
        pairs = [(each, _dict_of(each)) for each in rest if version is not None]
        self._of_dicts = [each for each, found in pairs if found is not None]
        self._dicts = [found for _, found in pairs if found is not None]
        self._versions = [-1] * len(self._dicts)
        of_dicts = set(map(id, self._of_dicts))
        self._others = [each for each in rest if id(each) not in of_dicts and each.in_c() is None]
        self._line_up([each for each in rest if id(each) not in of_dicts and each.in_c() is not None])

    def holds(self) -> bool:
        """Whether all is as it was."""
        versions = list(map(self._version, self._dicts))
        if versions != self._versions:
            for i, (now, then) in enumerate(zip(versions, self._versions, strict=True)):
                if now != then:
                    if not self._of_dicts[i].holds():
                        return False
                    self._versions[i] = now
        return self._is_in_line() and all(each.holds() for each in self._others)

    def _line_up(self, holders: list[Holder]) -> None:
        self._line = holders
        self._of = [each.of for each in holders]
        self._get = [cast(Callable, each.in_c()) for each in holders]
        self._seen = [each.values for each in holders]
        self._values = tuple(chain.from_iterable(self._seen))
        self._sized = [each.of for each in holders if isinstance(each, Items)]
        self._sizes = list(map(len, self._sized))

    def _is_in_line(self) -> bool:
        try:
            now = chain.from_iterable(map(_CALL, self._get, self._of))
            if all(map(is_, now, self._values)) and list(map(len, self._sized)) == self._sizes:
                return True
        except Exception:  # something is gone, or is just being changed
            pass
        if not all(each.holds() for each in self._line):
            return False
        # equal numbers, or tensors exchanged: which as a rule happens again at the next step
        moved = {id(a) for a, b in zip(self._line, self._seen, strict=True) if a.values is not b}
        self._others += [each for each in self._line if id(each) in moved]
        self._line_up([each for each in self._line if id(each) not in moved])
        return True


_CALL: Any = call


@cache
def dict_versions() -> Callable[[dict], int] | None:
    """A function that gives another number for a dict that has been changed; None if torch has none that does."""
    try:
        from torch._C._dynamo.guards import dict_version  # no public name, so that it is tried before it is trusted

        def changes(held: dict, change: Callable[[], object]) -> bool:
            before = dict_version(held)
            same = dict_version(held)
            change()
            return before == same != dict_version(held)

        kind = type("kind", (), {})
        each, entries = kind(), {"a": 1, "b": 2}
        of_class = cast(dict, gc.get_referents(vars(kind))[0])
        steps = [(vars(each), partial(_number, each, i)) for i in range(20)]  # as Python makes such code faster
        steps += [(vars(each), partial(delattr, each, "number")), (of_class, partial(setattr, kind, "a", 1))]
        steps += [(of_class, partial(setattr, kind, "a", 2)), (of_class, partial(delattr, kind, "a"))]
        steps += [(entries, partial(entries.update, a=3)), (entries, partial(entries.pop, "a"))]
        steps += [(entries, partial(entries.setdefault, "c", 1)), (entries, entries.clear)]
        return dict_version if all(changes(*step) for step in steps) else None
    except (ImportError, TypeError, RuntimeError, IndexError):
        return None


def _number(each: Any, value: int) -> None:
    each.number = value


def _dict_of(holder: Holder) -> dict | None:
    """The dict in which all lies that a holder compares."""
    if not isinstance(holder, (Entries, Named)) or isinstance(holder, Slots):
        return None
    if type(holder.of) is MappingProxyType:
        inner = gc.get_referents(holder.of)[0]
        return inner if type(inner) is dict else None
    return holder.of if type(holder.of) is dict else None
