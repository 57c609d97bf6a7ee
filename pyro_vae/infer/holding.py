"""Places where Python holds values: what they held at one moment, and whether they still do."""

from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice, repeat
from operator import is_
from typing import Any, NamedTuple

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
