"""The entries of a table as they are in a file, and what each column holds: told from them, or by the user."""

import csv
import datetime
import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import pandas as pd

from pyro_vae.data.datasets import Column, Kind, check_file
from pyro_vae.data.images import MOST
from pyro_vae.data.own import load_arrays
from pyro_vae.errors import DataError, reason_of

Wish = Kind | Literal["ignore"] | Sequence[str | float]
"""What a user says of a column: its kind; to leave it out; or its values in order, which makes it ordinal."""

MISSING = frozenset(("", "?", "NA", "N/A", "n/a", "NaN", "nan", "null", "NULL", "None", "<NA>"))
"""Words of a text file that stand where nothing was seen."""

MOST_CATEGORIES = 100
"""Columns of more different strings are taken for names or texts, unless the user says categorical."""

DATE = re.compile(r"\d{4}-\d{1,2}-\d{1,2}([ T].*)?|\d{1,2}[/.]\d{1,2}[/.]\d{2,4}( .*)?")
PERCENTAGE = re.compile(r"[+-]?\d*[.,]?\d+ ?%")


class Entries(NamedTuple):
    """One column as it was read, N entries.

    ``words`` are strings, None where nothing was seen; ``numbers`` are double, NaN there and where a word is no number.
    What a text file holds has both. ``order`` are the values of an ordered categorical of pandas.
    """

    words: np.ndarray | None
    numbers: np.ndarray | None
    order: tuple[str | float, ...] = ()

    @property
    def seen(self) -> np.ndarray:
        """What was seen, booleans ``(N,)``."""
        if self.words is not None:
            return np.array([word is not None for word in self.words], dtype=bool)
        assert self.numbers is not None
        return ~np.isnan(self.numbers)

    @property
    def odd(self) -> np.ndarray:
        """Places of what was seen and is no number."""
        return np.flatnonzero(self.seen if self.numbers is None else self.seen & np.isnan(self.numbers))


class Frame(NamedTuple):
    """A table as it was read: what it is called, its columns, how many rows, and lines of a file that they start on."""

    title: str
    columns: dict[str, Entries]
    num_rows: int
    lines: Sequence[int] | None = None

    def row(self, place: int) -> str:
        """A row, as a user finds it: by its line, counted from 1, or else by its place, counted from 0."""
        return f"row {place}" if self.lines is None else f"line {self.lines[place]}"

    def at(self, name: str, place: int) -> str:
        """An entry, for messages."""
        return f"{self.title}, column '{name}', {self.row(place)}"


def read_frame(path: Path) -> Frame:
    """A table in a file: .csv or .tsv with a line of names, .parquet, or .npz with an array for each column.

    Raises:
        DataError: in one line, if it cannot be read or is no table.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".parquet", ".npz"):
        raise DataError(f"{path}: expected a file named .csv, .tsv, .parquet or .npz")
    if kind == ".parquet":
        return frame_of(_parquet(path), str(path))
    if kind == ".npz":
        arrays = load_npz(path)
        if wrong := next((name for name, array in arrays.items() if array.ndim != 1), None):
            raise DataError(f"{path}: the array '{wrong}' has shape {arrays[wrong].shape}; a column is (N,)")
        if len({len(array) for array in arrays.values()}) > 1:
            raise DataError(f"{path}: its columns are of {sorted({len(a) for a in arrays.values()})} rows")
        odd = next((name for name, array in arrays.items() if array.dtype.kind == "V"), None)
        if odd is not None:
            raise DataError(f"{path}: the array '{odd}' is of {arrays[odd].dtype}, which is no column")
        return frame_of(pd.DataFrame(arrays), str(path))
    check_file(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _text(csv.reader(file, delimiter="\t" if kind == ".tsv" else ","), path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no readable table: its text is not in UTF-8; save it so") from error
    except (OSError, csv.Error) as error:
        raise DataError(f"{path} is no readable table: {reason_of(error)}") from error


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an archive by name.

    Raises:
        DataError: if it is none.
    """
    arrays = load_arrays(path, ".npz archive")
    if isinstance(arrays, np.ndarray) or not arrays:
        raise DataError(f"{path} is no .npz archive with a name for each array: save it with numpy.savez")
    return arrays


def _parquet(path: Path) -> pd.DataFrame:
    check_file(path)
    if not path.is_file():
        raise DataError(f"{path} is no readable table: there is no such file")
    try:
        return pd.read_parquet(path)
    except ImportError as error:
        raise DataError(f"{path}: reading .parquet needs pyarrow (pip install pyarrow), or save it as .csv") from error
    except Exception as error:  # of whichever engine
        raise DataError(f"{path} is no readable table: {reason_of(error)}") from error


def _text(reader: Any, path: Path) -> Frame:
    """The table of a text file; every row is of a known line."""
    names = [name.strip() for name in next(reader, [])]
    if not any(names):
        raise DataError(f"{path}: the first line must have the names of the columns, it is empty")
    if len(names) == 1 and ";" in names[0]:
        raise DataError(f"{path}: entries must be separated by commas, the first line is '{names[0]}'")
    _check_names(names, str(path))
    rows, lines, start = [], [], reader.line_num + 1
    for row in reader:
        rows.append(row)
        lines.append(start)
        start = reader.line_num + 1
    while rows and not rows[-1]:  # empty lines at the end
        rows.pop()
    for row, line in zip(rows, lines, strict=False):
        if len(row) != len(names) and row:
            raise DataError(f"{path}, line {line}: {len(row)} entries, where the first line names {len(names)} columns")
    cells = np.full((len(rows), len(names)), None, dtype=object)
    for place, row in enumerate(rows):
        for column, word in enumerate(row):
            cells[place, column] = None if word.strip() in MISSING else word.strip()
    columns = {}
    for name, words in zip(names, cells.T, strict=True):
        columns[name] = Entries(words, np.asarray(pd.to_numeric(words, errors="coerce"), dtype=float))
    return Frame(str(path), columns, len(rows), lines)


def frame_of(table: pd.DataFrame, title: str = "the table") -> Frame:
    """A pandas DataFrame as it would be read from a file.

    Raises:
        DataError: if names are missing or twice there, or an entry is neither a number nor a string nor a truth value.
    """
    names = [str(name) for name in table.columns]
    _check_names(names, title)
    frame = Frame(title, {}, len(table))
    for place, name in enumerate(names):
        frame.columns[name] = _entries(table.iloc[:, place], frame, name)
    return frame


def _check_names(names: Sequence[str], title: str) -> None:
    for place, name in enumerate(names):
        if not name:
            raise DataError(f"{title}: column {place + 1} has no name; pandas writes such a one unless index=False")
        if name in names[:place]:
            raise DataError(f"{title}: columns {names.index(name) + 1} and {place + 1} are both called '{name}'")
    if not names:
        raise DataError(f"{title} has no columns")


def _entries(column: pd.Series, frame: Frame, name: str) -> Entries:
    kind = column.dtype
    if isinstance(kind, pd.CategoricalDtype):
        values = [_plain(value, frame, name, 0) for value in kind.categories]
        inner = _entries(column.astype(object), frame, name)
        return inner._replace(order=tuple(values)) if kind.ordered else inner
    if pd.api.types.is_bool_dtype(kind) or not pd.api.types.is_numeric_dtype(kind):
        missing = column.isna().to_numpy()
        cells = [
            None if gone else _plain(value, frame, name, place)
            for place, (value, gone) in enumerate(zip(column.astype(object), missing, strict=True))
        ]
        numbers = np.array([cell if isinstance(cell, float) else np.nan for cell in cells])
        if not any(isinstance(cell, str) for cell in cells):
            return Entries(None, numbers)
        words = np.array([None if cell is None else str(cell) for cell in cells], dtype=object)
        return Entries(words, numbers if any(isinstance(cell, float) for cell in cells) else None)
    if pd.api.types.is_complex_dtype(kind):
        raise DataError(f"{frame.title}, column '{name}': complex numbers are no entries of a table")
    return Entries(None, column.to_numpy(dtype=float, na_value=np.nan))


def _plain(value: Any, frame: Frame, name: str, place: int) -> str | float:
    """An entry as a string or a number."""
    if isinstance(value, str | bool | np.bool_):
        return str(value)
    if isinstance(
        value, datetime.date | datetime.time | datetime.timedelta | np.datetime64 | np.timedelta64 | pd.Period
    ):
        raise DataError(_dates(frame, name, place, value))
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{frame.at(name, place)}: expected a number or a string, got a {type(value).__name__}"
        ) from error


def option(name: str, kind: str) -> str:
    """How a user says what a column is."""
    return f"--dataset.columns '{{{name}: {kind}}}'"


def _dates(frame: Frame, name: str, place: int, value: Any) -> str:
    return (
        f"{frame.at(name, place)}: '{value}' is a date; make a number of it, such as days since one of them, or leave "
        f"the column out: {option(name, 'ignore')}"
    )


# What a column holds


def columns_of(frame: Frame, wishes: dict[str, Wish]) -> tuple[Column, ...]:
    """What the columns of a table hold, in the order of the file, those that are to be left out excepted.

    Numbers are binary if there are two of them, count if they are whole and none is negative, positive if all are above
    zero, and otherwise real; strings and truth values are binary or categorical.

    Raises:
        DataError: naming column and row, if that cannot be told, or what the user says does not hold.
    """
    for name in wishes:
        if name not in frame.columns:
            near = difflib.get_close_matches(name, frame.columns, 1)
            hint = f" (did you mean '{near[0]}'?)" if near else ""
            raise DataError(
                f"--dataset.columns: {frame.title} has no column '{name}'{hint}; it has {', '.join(frame.columns)}"
            )
    found = [
        _column(frame, name, entries, wishes.get(name))
        for name, entries in frame.columns.items()
        if wishes.get(name) != "ignore"
    ]
    if not found:
        raise DataError(f"--dataset.columns leaves no column of {frame.title}")
    return tuple(found)


def _column(frame: Frame, name: str, entries: Entries, wish: Wish | None) -> Column:
    where = f"{frame.title}, column '{name}'"
    if not entries.seen.any():
        raise DataError(f"{where} holds nothing; leave it out: {option(name, 'ignore')}")
    if wish is not None and not isinstance(wish, str):
        return Column(name, "ordinal", tuple(value if isinstance(value, str) else float(value) for value in wish))
    if entries.order and wish in (None, "ordinal"):
        return Column(name, "ordinal", entries.order)
    numeric = entries.numbers is not None and not len(entries.odd)
    kind = cast(Kind, wish) or (_kind(entries) if numeric else _kind_of_words(frame, name, entries))
    if kind in ("real", "positive", "count"):
        return Column(name, kind)
    values = _values(entries, numeric)
    if kind == "ordinal" and not numeric:
        order = f"[{', '.join(map(str, values[:3]))}]"
        raise DataError(f"{where}: in which order? Name its values from first to last, as {option(name, order)}")
    if kind == "binary" and len(values) > 2:
        raise DataError(f"{where} is no binary column: it holds {len(values)} values, {_some(values)}")
    return Column(name, kind, values)


def _values(entries: Entries, numeric: bool) -> tuple[str | float, ...]:
    """The different values that were seen, in ascending order."""
    if numeric:
        assert entries.numbers is not None
        return tuple(float(value) for value in np.unique(entries.numbers[entries.seen]))
    assert entries.words is not None
    return tuple(sorted({word for word in entries.words if word is not None}))


def _kind(entries: Entries) -> Kind:
    """What numbers are, unless the user says."""
    assert entries.numbers is not None
    numbers = entries.numbers[entries.seen]
    if len(np.unique(numbers)) == 2:
        return "binary"
    if (numbers == np.floor(numbers)).all() and numbers.min() >= 0:
        return "count"
    return "positive" if numbers.min() > 0 else "real"


def _kind_of_words(frame: Frame, name: str, entries: Entries) -> Kind:
    """What strings are, unless the user says; those that are no categories are refused."""
    assert entries.words is not None
    seen = np.flatnonzero(entries.seen)
    if entries.numbers is not None and len(entries.odd) < len(seen):
        odd = entries.odd[0]
        raise DataError(
            f"{frame.at(name, odd)}: '{entries.words[odd]}' is no number, as others of this column are; mend it, or "
            f"say {option(name, 'categorical')}"
        )
    if all(DATE.fullmatch(entries.words[place]) for place in seen):
        raise DataError(_dates(frame, name, seen[0], entries.words[seen[0]]))
    number = len(set(entries.words[seen]))
    if number > min(MOST_CATEGORIES, max(10, len(seen) // 2)):
        percentages = all(PERCENTAGE.fullmatch(entries.words[place]) for place in seen)
        raise DataError(
            f"{frame.title}, column '{name}' holds {number:,} different strings in {len(seen):,} rows, such as "
            f"'{entries.words[seen[0]]}': too many for categories; {'write numbers without %, ' * percentages}"
            f"leave it out, {option(name, 'ignore')}, or say {option(name, 'categorical')}"
        )
    return "binary" if number == 2 else "categorical"


def _some(values: Sequence[str | float]) -> str:
    shown = ", ".join(repr(value) if isinstance(value, str) else f"{value:g}" for value in values[:4])
    return shown + (", ..." if len(values) > 4 else "")


# Columns as numbers


def encoded(frame: Frame, columns: Sequence[Column]) -> np.ndarray:
    """A table as a model has its columns, float32 ``(N, X)``: numbers as they are, values by their place, NaN unseen.

    Columns may come in any order.

    Raises:
        DataError: naming column and row, if a column is not there, or an entry is none that the column can hold.
    """
    x = np.empty((frame.num_rows, len(columns)), np.float32)
    for place, column in enumerate(columns):
        if column.name not in frame.columns:
            raise DataError(f"{frame.title} has no column '{column.name}'; it has {', '.join(frame.columns)}")
        x[:, place] = _encoded(frame, column, frame.columns[column.name])
    return x


def _encoded(frame: Frame, column: Column, entries: Entries) -> np.ndarray:
    def refuse(wrong: np.ndarray, why: Callable[[Any], str], shown: np.ndarray) -> None:
        if len(places := np.flatnonzero(wrong)):
            value = shown[places[0]]
            text = f"'{value}'" if isinstance(value, str) else f"{value:.10g}"
            raise DataError(f"{frame.at(column.name, places[0])}: {why(text)}")

    seen, numbers = entries.seen, entries.numbers
    if column.values and isinstance(column.values[0], str):
        words = entries.words
        if words is None:
            words = np.array([f"{number:g}" for number in cast(np.ndarray, numbers)], dtype=object)
        codes = {value: place for place, value in enumerate(column.values)}
        x = np.array([codes.get(word, -1) if known else np.nan for word, known in zip(words, seen, strict=True)])
        refuse(x == -1, lambda text: f"{text} is none of the values {_some(column.values)}", words)
        return x
    if entries.words is not None and len(entries.odd):
        refuse(
            np.isin(np.arange(len(seen)), entries.odd),
            lambda text: f"{text} is no number, and the column is {column.kind}",
            entries.words,
        )
    assert numbers is not None
    refuse(np.isinf(numbers), lambda text: f"{text} is not finite", numbers)
    if column.values:
        values = np.array(column.values, dtype=float)
        x = (values[None] == numbers[:, None]).argmax(1).astype(float)
        refuse(seen & ~np.isin(numbers, values), lambda t: f"{t} is none of the values {_some(column.values)}", numbers)
        return np.where(seen, x, np.nan)
    if column.kind == "count":
        hint = f"say {option(column.name, 'real')}"
        wrong = seen & ((numbers < 0) | (numbers != np.floor(numbers)))
        refuse(wrong, lambda text: f"{text} is no count, as 0, 1, 2 are; {hint}", numbers)
        refuse(seen & (numbers > MOST), lambda text: f"counts go up to {MOST:,}, this is {text}; {hint}", numbers)
    if column.kind == "positive":
        smallest = float(np.finfo(np.float32).tiny)
        refuse(seen & (numbers < smallest), lambda text: f"{text} is not positive", numbers)
    largest = float(np.finfo(np.float32).max)
    refuse(seen & (np.abs(numbers) > largest), lambda text: f"{text} is too large for single precision", numbers)
    return numbers


def check_rows(frame: Frame, x: np.ndarray) -> None:
    """Refuse a row ``(X,)`` of which nothing was seen.

    Raises:
        DataError: naming the row.
    """
    if len(empty := np.flatnonzero(np.isnan(x).all(1))):
        raise DataError(f"{frame.title}, {frame.row(int(empty[0]))}: nothing was seen of this row; leave it out")


def check_spread(frame: Frame, columns: Sequence[Column], train: np.ndarray) -> None:
    """Refuse columns ``(N, X)`` of training data that tell nothing, or whose differences single precision loses.

    Raises:
        DataError: naming the column.
    """
    for place, column in enumerate(columns):
        where = f"{frame.title}, column '{column.name}'"
        leave = f"leave it out: {option(column.name, 'ignore')}"
        seen = train[~np.isnan(train[:, place]), place]
        if not len(seen):
            raise DataError(f"{where} holds nothing in the training rows; {leave}")
        exact = frame.columns[column.name].numbers if not column.values else None
        if exact is not None:
            exact = exact[~np.isnan(exact)]
            lost = np.abs(exact.astype(np.float32) - exact).max()
            if lost > 1e-3 * exact.std() > 0:
                raise DataError(
                    f"{where}: its values differ too little for single precision, {exact.min():.17g} and "
                    f"{exact.max():.17g}; subtract a constant"
                )
        if (seen == seen[0]).all():
            value = column.values[int(seen[0])] if column.values else float(seen[0])
            raise DataError(f"{where} holds one value in all training rows, {_some([value])}; {leave}")
