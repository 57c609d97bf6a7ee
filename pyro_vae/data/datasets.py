"""What every data set is: a source that is read, observations on a device, and what a model must know of them."""

import json
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyro_vae.errors import DataError
from pyro_vae.infer.trees import first_tensor, split
from pyro_vae.parts.likelihoods import Likelihood

Kind = Literal["real", "positive", "count", "binary", "categorical", "ordinal"]
"""What a column holds: any real number; one above zero; 0, 1, 2, ...; one of two, of several, of several in order."""


@dataclass(frozen=True)
class Column:
    """A named entry of an observation, or of a condition.

    Args:
        name: its name.
        kind: what it holds.
        values: of binary, categorical and ordinal columns: what is stored as 0, 1, 2, ..., as it is in the file.
        loc, scale: of other columns of a condition: mean and standard deviation of the training data.
    """

    name: str
    kind: Kind
    values: tuple[str | float, ...] = ()
    loc: float = 0.0
    scale: float = 1.0

    @property
    def width(self) -> int:
        """How many numbers of a condition it is: one of each category, or one."""
        return len(self.values) if self.kind == "categorical" else 1

    def encode(self, stored: Tensor) -> Tensor:
        """Entries ``(N,)``, as numbers or as places in ``values``, as a part ``(N, width)`` of a condition."""
        if self.kind == "categorical":
            return torch.nn.functional.one_hot(stored.long(), self.width).to(torch.get_default_dtype())
        return ((stored - self.loc) / self.scale).unsqueeze(-1)

    def decode(self, part: Tensor) -> Tensor:
        """The inverse of :meth:`encode`: ``(N, width)`` to ``(N,)``."""
        return part.argmax(-1).to(part) if self.kind == "categorical" else part[..., 0] * self.scale + self.loc


@dataclass(frozen=True)
class Pixels:
    """How the pixels of images become observations; see :class:`pyro_vae.data.Dataset`.

    Args:
        binarization: the rule.
        seed: of what is drawn once.
        max_value: the largest pixel; 1: they are real numbers in 0..1.
    """

    binarization: str
    seed: int
    max_value: int


@dataclass(frozen=True)
class Schema:
    """What a model must know of its data; it is saved with the weights, so that a model loads without data.

    Args:
        shape: of one observation: ``(C, H, W)`` of an image, ``(X,)`` of a row, ``(T, F)`` of a sequence.
        noun: what one of them is called.
        columns: of a row; none of others.
        missing: whether entries may be missing, as NaN.
        condition: the columns of what the model is told beside it; none: nothing.
        pixels: of images, how they become observations; None: what is stored is what is observed.
        entries: of sequences, what all entries hold; None: columns tell, or it is not known.
    """

    shape: tuple[int, ...]
    noun: str = "image"
    columns: tuple[Column, ...] = ()
    missing: bool = False
    condition: tuple[Column, ...] = field(default=())
    pixels: Pixels | None = None
    entries: Kind | None = None

    @property
    def size(self) -> int:
        """X, entries of one flat observation."""
        return int(torch.Size(self.shape).numel())

    @property
    def condition_dim(self) -> int:
        """C, numbers of one condition; 0: there is none."""
        return sum(column.width for column in self.condition)

    def dumps(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> "Schema":
        """Read back what ``dumps`` wrote.

        Raises:
            ValueError, KeyError or TypeError: if it is something else.
        """
        content = json.loads(text)
        columns, condition = (
            tuple(Column(**column | {"values": tuple(column["values"])}) for column in content[name])
            for name in ("columns", "condition")
        )
        pixels = Pixels(**content["pixels"]) if content.get("pixels") else None
        known = {"shape": tuple(content["shape"]), "columns": columns, "condition": condition, "pixels": pixels}
        return cls(**content | known)


class Origin(NamedTuple):
    """Where test data are in what a user gave.

    Attributes:
        noun: what ``places`` are: ``line``, ``row`` or ``file``.
        of: where, as a user called it.
        places: of each test datum: numbers, as a user counts them, or names.
    """

    noun: str
    of: str
    places: Sequence[int] | Sequence[str]


class Data(ABC):
    """Observations on a device.

    What programs are called with is a tensor ``x``, shape ``(N, X)``, or, where there is a condition, a tuple
    ``(x, c)`` with ``c`` of shape ``(N, C)``.

    Attributes:
        schema: what a model must know of them.
        validation, test: observations, fixed.
        fingerprint: of the content read, whatever file it came from: equal for equal content alone.
        encoding: what the entries of an observation are, for a likelihood that scores all of them alike; see
            ``pyro_vae.likelihoods.Encoding``. None: they are of several kinds, or any.
        levels: how many values a whole number can take; None: any.
        title: what they are, in a few words.
        about: entries of a run's ``result.json``; ``dataset`` is one of them, the name of the source.
        options: settings of the source that matter to a likelihood, for messages.
        train_labels, validation_labels, test_labels: class of each observation, ``(N,)``, or None.
        origin: where the test data are in the file that they were read from; None: in their order, or not known.
    """

    schema: Schema
    validation: Any
    test: Any
    fingerprint: str
    encoding: str | None = None
    levels: int | None = None
    title: str
    about: dict[str, Any]
    options: str = ""
    train_labels: Tensor | None = None
    validation_labels: Tensor | None = None
    test_labels: Tensor | None = None
    origin: Origin | None = None

    @property
    @abstractmethod
    def num_train(self) -> int:
        """How many training observations there are."""

    @abstractmethod
    def observe(self, index: Tensor) -> Any:
        """Training observations at these places, shape ``(n,)``."""

    @property
    def device(self) -> torch.device:
        """Where they live."""
        return first_tensor(self.test).device

    @abstractmethod
    def check(self, head: Likelihood) -> None:
        """Refuse a likelihood that does not score data of this kind: its numbers would not be a log-likelihood.

        Raises:
            DataError: with the option that would help.
        """

    def given(self, names: Sequence[str]) -> "Data":
        """The same data as ``(x, c)``, where the condition c is what has these names, and is no part of x any more.

        Raises:
            DataError: if there is nothing of such a name, or it cannot be a condition.
        """
        raise DataError(
            f"--condition {', '.join(names)}: {self.about['dataset']} has nothing but its {self.schema.noun}s"
        )

    def batches(self, batch_size: int) -> "Batches":
        """Mini-batches of training observations, in a new random order each epoch."""
        return Batches(self, batch_size)


MOST_ENTRIES = 2**22
"""This many entries, 16 MiB of observations, are drawn together: otherwise small batches would wait for Python."""


class Batches:
    """Each iteration is one epoch of shuffled mini-batches, as ``Data.observe`` makes them; the last may be smaller."""

    def __init__(self, data: Data, batch_size: int):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.data = data
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-self.data.num_train // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        together = self.batch_size * max(1, MOST_ENTRIES // self.data.schema.size // self.batch_size)
        for index in torch.randperm(self.data.num_train, device=self.data.device).split(together):
            yield from split(self.data.observe(index), self.batch_size)


class Source(ABC):
    """Where data come from: settings, and one method. The command line reads its options from the constructor."""

    @abstractmethod
    def load(self, device: torch.device | str = "cpu") -> Data:
        """Read the data, and bring them to ``device``.

        Raises:
            DataError: in one line, naming file, row and column, if they cannot be had or used.
        """


def check_file(path: Path) -> None:
    """Refuse a pipe or a device, which reading would wait for without end; what there is not, its reader refuses.

    Raises:
        DataError: naming it.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise DataError(f"{path} is a pipe or a device, no file of data")


def held_out(number: int, num_validation: int | None, what: str) -> int:
    """How many training data are held out for validation: a tenth, unless told otherwise.

    Raises:
        DataError: if nothing would be left.
    """
    size = max(1, number // 10) if num_validation is None else num_validation
    if size >= number:
        raise DataError(f"{what}: num_validation is {size}, of only {number} training data")
    return size


def names_of(columns: Sequence[Column]) -> str:
    """The names of columns, for messages."""
    return ", ".join(column.name for column in columns)
