"""Tables: rows of columns that differ in kind, each scored by a head of its own, with gaps where nothing was seen."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyro_vae.data.columns import (
    Frame,
    Wish,
    check_rows,
    check_spread,
    columns_of,
    encoded,
    frame_of,
    load_npz,
    option,
    read_frame,
)
from pyro_vae.data.datasets import Column, Data, Kind, Origin, Schema, Source, held_out
from pyro_vae.data.images import fingerprint
from pyro_vae.errors import DataError
from pyro_vae.infer.trees import data_size, select
from pyro_vae.parts.inputs import heads_of
from pyro_vae.parts.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, NegativeBinomial
from pyro_vae.parts.mixed import LogNormal, Mixed, Ordinal, Scaled

DISCRETE: dict[Kind, str] = {
    "count": "counts",
    "binary": "two values",
    "categorical": "categories",
    "ordinal": "grades",
}
"""Kinds whose log p is a mass."""


class Table(Source):
    """A table: a .csv file with names in its first line, .tsv, .parquet or .npz; or, in Python, a DataFrame.

    The kind of each column is told from its entries, and printed. Numbers are binary if there are two of them, count if
    all are whole and none is negative, positive if all are above zero, otherwise real; strings and truth values are
    binary or categorical. log p(x) is in the units of the file. Empty entries, NA, NaN, null, None and ? were not seen.

    An .npz archive has an array (N,) for each column, or arrays train and test (N, X), whose columns are called by the
    array names, if there is one.

    Args:
        data_dir: not used.
        path: the file.
        test_path: a second file, of test rows, with the same columns; null: they are drawn from those of path.
        columns: kinds of columns in place of those told from the entries, such as '{age: count, name: ignore}': real,
            positive, count, binary, categorical, ordinal (of numbers), or a list of all values in their order, such as
            [small, medium, large]; ignore leaves a column out.
        num_test: rows of path that are the test set, at least 2; null: a tenth, but at least 2.
        num_validation: training rows held out, at least 1; null: a tenth of them.
        split_seed: of the random order of the rows of path, by which test and validation rows are drawn, at least 0.
    """

    def __init__(
        self,
        data_dir: Path,
        path: Path,
        test_path: Path | None = None,
        columns: dict[str, Kind | Literal["ignore"] | list[str | float]] | None = None,
        num_test: int | None = None,
        num_validation: int | None = None,
        split_seed: int = 0,
    ):
        self.data_dir = Path(data_dir)
        self.path: Path | pd.DataFrame = path if isinstance(path, pd.DataFrame) else Path(path)
        self.test_path = test_path if test_path is None or isinstance(test_path, pd.DataFrame) else Path(test_path)
        self.columns: dict[str, Wish] = {name: _wish(name, wish) for name, wish in (columns or {}).items()}
        self.num_test, self.num_validation, self.split_seed = num_test, num_validation, split_seed
        for name, number, least in (("num_test", num_test, 2), ("num_validation", num_validation, 1)):
            if number is not None and number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
        if num_test is not None and test_path is not None:
            raise ValueError("give test_path or num_test, not both")
        if not 0 <= split_seed < 2**63:
            raise ValueError(f"split_seed must be at least 0 and below 2^63, got {split_seed}")

    def load(self, device: torch.device | str = "cpu") -> "TableData":
        """Read the table, tell the kinds of its columns, and bring it to ``device``.

        Raises:
            DataError: in one line, naming file, column and row.
        """
        frame, other = self._frames()
        if not frame.num_rows:
            raise DataError(f"{frame.title} holds no rows")
        columns = columns_of(frame, self.columns)
        rows = encoded(frame, columns)
        check_rows(frame, rows)
        order = np.random.default_rng(self.split_seed).permutation(len(rows))
        if other is None:
            num_test = max(2, len(rows) // 10) if self.num_test is None else self.num_test
            if num_test >= len(rows):
                raise DataError(f"{frame.title}: a test set of {num_test} leaves nothing of {len(rows)} rows")
            origin = frame, order[-num_test:]
            order = order[:-num_test]
            test, train = rows[origin[1]], rows[order]
        else:
            known = {*(column.name for column in columns), *self.columns}
            if odd := next((name for name in other.columns if name not in known), None):
                raise DataError(f"{other.title} has the column '{odd}', which {frame.title} has not")
            test, train = encoded(other, columns), rows[order]
            origin = other, np.arange(len(test))
            check_rows(other, test)
            if len(test) < 2:
                raise DataError(
                    f"{other.title}: a mean over test rows with its error needs at least 2, got {len(test)}"
                )
        check_spread(frame, columns, train)
        columns = tuple(_with_statistics(column, train[:, place]) for place, column in enumerate(columns))
        last = held_out(len(train), self.num_validation, frame.title)
        data = TableData(columns, train[:-last], train[-last:], test, frame.title, device)
        data.origins = (frame, order[:-last]), (frame, order[-last:]), origin
        lines = origin[0].lines
        places = [place if lines is None else lines[place] for place in origin[1].tolist()]
        data.origin = Origin("row" if lines is None else "line", origin[0].title, places)
        data.report(frame.num_rows + (0 if other is None else other.num_rows))
        return data

    def _frames(self) -> tuple[Frame, Frame | None]:
        """Training rows, or all; and test rows, if they are apart."""
        if isinstance(self.path, Path) and self.path.suffix.lower() == ".npz" and self.test_path is None:
            arrays = load_npz(self.path)
            if arrays.get("train", np.empty(0)).ndim == 2:
                return self._matrices(arrays)
        frame, other = (
            None if each is None else frame_of(each, title) if isinstance(each, pd.DataFrame) else read_frame(each)
            for each, title in ((self.path, "the table"), (self.test_path, "the test table"))
        )
        assert frame is not None
        return frame, other

    def _matrices(self, arrays: dict[str, np.ndarray]) -> tuple[Frame, Frame | None]:
        width = arrays["train"].shape[1]
        names = [str(name) for name in arrays.get("names", np.array([f"x{place}" for place in range(width)]))]
        made: list[Frame | None] = []
        for part in ("train", "test"):
            array = arrays.get(part)
            if array is not None and array.shape != (len(array), len(names)):
                raise DataError(f"{self.path}: '{part}' has shape {array.shape}, it needs {len(names)} columns")
            if array is not None and array.dtype.kind not in "biufU":
                raise DataError(f"{self.path}: '{part}' must hold numbers or strings, got {array.dtype}")
            title = f"{self.path}, {part}"
            made.append(None if array is None else frame_of(pd.DataFrame(array, columns=pd.Index(names)), title))
        assert made[0] is not None
        return made[0], made[1]


def _wish(name: str, wish: Any) -> Wish:
    known = (*get_args(Kind), "ignore")
    if isinstance(wish, str) and wish not in known:
        raise ValueError(f"columns: '{name}' must be {', '.join(known)}, or a list of its values, got '{wish}'")
    if not isinstance(wish, str) and (
        len(wish) < 2 or len(set(map(type, wish)) | {str}) > 2 or len(set(wish)) < len(wish)
    ):
        raise ValueError(f"columns: '{name}' needs at least 2 different values, all numbers or all strings, got {wish}")
    return wish


def _with_statistics(column: Column, x: np.ndarray) -> Column:
    """The column with what its part of a condition is standardized by."""
    if column.values:
        return column
    return replace(column, loc=float(np.nanmean(x, dtype=float)), scale=float(np.nanstd(x, dtype=float)))


class TableData(Data):
    """The rows of a table on a device, see :class:`Data`.

    Args:
        columns: what the X columns hold.
        train, validation, test: rows ``(N, X)``: numbers as they are in the file, values of binary, categorical and
            ordinal columns by their place among the column's ``values``, NaN where nothing was seen.
        title: of the table.
        device: where all tensors live.

    Attributes:
        columns: as given.
        train, validation, test: the rows, float32 ``(N, X)``; or, with a condition, ``(x, c)``.
        origins: of each of the three, where its rows were read, and which they are there.
    """

    train: Any
    origins: tuple[tuple[Frame, np.ndarray], ...] = ()

    def __init__(
        self,
        columns: Sequence[Column],
        train: np.ndarray,
        validation: np.ndarray,
        test: np.ndarray,
        title: str = "the table",
        device: torch.device | str = "cpu",
    ):
        self.columns = tuple(columns)
        rows = train, validation, test
        self.missing = float(np.mean(np.isnan(np.concatenate(rows))))
        self.train, self.validation, self.test = (torch.from_numpy(np.array(each)).to(device) for each in rows)
        self.schema = Schema((len(columns),), "row", self.columns, self.missing > 0)
        named = [(column.name, column.kind, column.values) for column in columns]
        clean = [np.where(np.isnan(each), np.float32(np.nan), each) for each in rows]  # one NaN, of all that there are
        self.fingerprint = fingerprint(*clean, named)
        self.title = f"{title}, {len(columns)} columns"
        self.about = {"dataset": "Table", "columns": {column.name: column.kind for column in columns}}

    @property
    def num_train(self) -> int:
        return data_size(self.train)

    def observe(self, index: Tensor) -> Any:
        """Training rows ``(len(index), X)``."""
        return select(self.train, index)

    def given(self, names: Sequence[str]) -> "TableData":
        places = {column.name: place for place, column in enumerate(self.columns)}
        if odd := next((name for name in names if name not in places), None):
            few = f"{', '.join([*places][:20])}{', ...' if len(places) > 20 else ''}"
            raise DataError(f"--condition {odd}: there is no such column in {self.title}: {few}")
        if not (kept := [place for name, place in places.items() if name not in names]):
            raise DataError(f"--condition {', '.join(names)}: no column is left to be modelled")
        columns = [self.columns[places[name]] for name in names]
        for column in columns:
            self._check_condition(column, places[column.name])
        parts = [
            (rows[:, kept], torch.cat([column.encode(rows[:, places[column.name]]) for column in columns], 1).to(rows))
            for rows in (self.train, self.validation, self.test)
        ]
        result = copy.copy(self)
        result.columns = tuple(self.columns[place] for place in kept)
        result.train, result.validation, result.test = parts
        result.missing = float(torch.cat([x.isnan() for x, _ in parts]).cpu().double().mean())
        for part, (x, _) in enumerate(parts):
            if len(empty := x.isnan().all(1).nonzero()):
                raise DataError(
                    f"--condition {', '.join(names)}: {self._where(part, empty[0])} has nothing else that was seen; "
                    "leave it out"
                )
        result.schema = Schema((len(kept),), "row", result.columns, result.missing > 0, tuple(columns))
        result.title = f"{self.title}, given {', '.join(names)}"
        result.about = {
            "dataset": "Table",
            "columns": {column.name: column.kind for column in result.columns},
            "condition": list(names),
        }
        return result

    def _check_condition(self, column: Column, place: int) -> None:
        """Refuse gaps in a condition, and values that no training row has."""
        known = self.train[:, place].unique()
        for part, rows in enumerate((self.train, self.validation, self.test)):
            entries = rows[:, place]
            if len(gaps := entries.isnan().nonzero()):
                raise DataError(
                    f"--condition {column.name}: {self._where(part, gaps[0])} is missing, and a condition must be known"
                )
            if column.values and len(odd := (~torch.isin(entries, known)).nonzero()):
                value = column.values[int(entries[odd[0]])]
                raise DataError(
                    f"--condition {column.name}: {self._where(part, odd[0])} is {value!r}, which no training row is"
                )

    def _where(self, part: int, row: Tensor) -> str:
        """A row of one of the three parts, as it is found in its file."""
        if not self.origins:
            return f"{('training', 'validation', 'test')[part]} row {int(row)}"
        frame, places = self.origins[part]
        return f"{frame.title}, {frame.row(int(places[int(row)]))}"

    def report(self, num_rows: int) -> None:
        """Print what the columns were taken for."""
        kinds: dict[str, list[str]] = {}
        for column in self.columns:
            levels = f" ({len(column.values)})" if column.kind in ("categorical", "ordinal") else ""
            kinds.setdefault(column.kind, []).append(column.name + levels)
        print(
            f"{self.title}: {num_rows:,} rows, {self.missing:.1%} of the entries missing; --dataset.columns overrides"
        )
        for kind, names in kinds.items():
            print(f"  {kind}: {', '.join(names)}")

    def check(self, head: Likelihood) -> None:
        of = f"--likelihood {type(head).__name__}"
        for part, places in heads_of(head, torch.arange(len(self.columns))):
            for column in (self.columns[place] for place in places.tolist()):
                discrete = column.kind in DISCRETE
                if part.is_density is not None and part.is_density == discrete:
                    mend = f", or say {option(column.name, 'real')}" if discrete else ""
                    raise DataError(
                        f"{of} is a {'density' if part.is_density else 'mass'}, of which the {column.kind} column "
                        f"'{column.name}' has none; leave --likelihood away{mend}"
                    )
                if part.encoding == "binary" and column.kind != "binary":
                    raise DataError(
                        f"{of} scores binary columns, and '{column.name}' is {column.kind}; leave --likelihood away"
                    )
                if part.levels is not None and len(column.values) not in (0, part.levels):
                    raise DataError(
                        f"{of} has {part.levels} levels, and column '{column.name}' has {len(column.values)} values"
                    )


def densities(head: Likelihood, columns: Sequence[Column]) -> list[str]:
    """Names of the columns of which log p is a density: two log p(x) can be compared where these are the same."""
    found = heads_of(head, torch.arange(len(columns)))
    return [columns[place].name for part, places in found if part.is_density for place in places.tolist()]


def heads(columns: Sequence[Column]) -> Mixed:
    """The likelihood of columns: a head for those of each kind, and of each number of values.

    Real columns are normal after scaling, positive ones log-normal, counts negative binomial, binary ones Bernoulli,
    categories have a free probability each, and grades are of the cumulative logit model. Densities are in the units of
    the columns.

    >>> head = heads([Column("height", "real"), Column("treated", "binary", ("no", "yes")), Column("age", "real")])
    >>> [type(part).__name__ for part in head.heads], head.event_size
    (['Scaled', 'Bernoulli'], 3)
    """
    groups: dict[tuple[Kind, int], list[int]] = {}
    for place, column in enumerate(columns):
        groups.setdefault((column.kind, len(column.values)), []).append(place)
    return Mixed([_head(kind, len(places), levels) for (kind, levels), places in groups.items()], list(groups.values()))


def _head(kind: Kind, size: int, levels: int) -> Likelihood:
    """The head of columns of one kind."""
    match kind:
        case "real":
            return Scaled(Gaussian(size, "per_pixel", min_scale=0.01))
        case "positive":
            return LogNormal(size, "per_pixel", min_scale=0.01, standardized=True)
        case "count":
            return NegativeBinomial(size, "log")
        case "binary":
            return Bernoulli(size)
        case "categorical":
            return Categorical(size, levels)
        case "ordinal":
            return Ordinal(size, levels)
