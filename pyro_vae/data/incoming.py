"""Data that a finished model has not seen, as the observations that it was trained on; and back."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.datasets import Column, Pixels, Schema, names_of
from pyro_vae.data.images import ENCODINGS, MOST, Binarization, observed
from pyro_vae.errors import DataError


def observations(raw: Any, schema: Schema, told: Callable[[str], object] = print) -> Tensor:
    """New data as observations ``(N, X)``, as the data of the schema became observations; NaN was not seen.

    Pixels that are 0 or 1 are the observations of a binary model as they are; other pixels are binarized by its rule,
    or dequantized, with its seed: the pixels of its own test set give its own test observations.

    Args:
        raw: a NumPy array or torch tensor ``(N, *shape)``, ``(N, X)`` or, of images of one channel, ``(N, H, W)``, of
            booleans, whole or real numbers; or a DataFrame, of a table with its columns in any order.
        schema: of the model.
        told: called with a line on each thing that is done to the values.

    Raises:
        DataError: if it is something else, or a value cannot be an observation; row and column are named.
    """
    if schema.columns and hasattr(raw, "columns"):
        told_of_others(raw, schema, told)
        return stored(raw, schema.columns, schema.missing, told)
    array = _flat(_array(raw), schema)
    if schema.columns:
        frame = {column.name: array[:, place] for place, column in enumerate(schema.columns)}
        return stored(frame, schema.columns, schema.missing, told)
    if schema.pixels is not None:
        return _of_pixels(array, schema.pixels, told)
    rows = ~np.isfinite(array) & ~np.isnan(array)
    _refuse(rows, array, np.zeros_like(rows), "numbers must be finite")
    return torch.from_numpy(array.astype(np.float32))


def conditions(given: Any, size: int, schema: Schema) -> Tensor | None:
    """What the model is told of ``size`` observations, ``(size, C)``; None if it is told nothing.

    Args:
        given: a value for all, of the one column of the condition, or ``size`` values; or a dict or DataFrame of both
            by the names of the columns.
        size: N.
        schema: of the model.

    Raises:
        DataError: if it does not fit, naming row and column.
    """
    names = names_of(schema.condition)
    if not schema.condition:
        if given is None:
            return None
        raise DataError("given: the model has no condition")
    if given is None:
        raise DataError(f"the model has a condition: give {names}")
    if not isinstance(given, Mapping) and not hasattr(given, "columns"):
        first, *others = schema.condition
        if others:
            raise DataError(f"given must be a dict or a DataFrame of the columns {names}")
        given = {first.name: given}
    frame = {}
    for column in schema.condition:
        if column.name not in given:
            raise DataError(f"the model has a condition: '{column.name}' is not given")
        values = given[column.name]
        values = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        values = np.full(size, values.item()) if values.size == 1 else values
        if values.shape != (size,):
            raise DataError(
                f"given '{column.name}' must be one value, or {size} of them, it is of shape {values.shape}"
            )
        frame[column.name] = values
    entries = stored(frame, schema.condition, False, _silent)
    return torch.cat([column.encode(entry) for column, entry in zip(schema.condition, entries.mT, strict=True)], 1)


def _silent(line: str) -> None:
    """Told nothing."""


def told_of_others(frame: Any, schema: Schema, told: Callable[[str], object]) -> None:
    """Tell of columns that the model has no use for, and refuse names that are there twice."""
    names = list(map(str, frame.columns))
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"column '{twice[0]}' is there twice")
    known = {column.name for column in (*schema.columns, *schema.condition)}
    if others := [name for name in names if name not in known]:
        told(f"columns that the model does not know are left out: {', '.join(others)}")


def stored(frame: Any, columns: Sequence[Column], gaps: bool, told: Callable[[str], object]) -> Tensor:
    """Columns of a table, by name, as numbers ``(N, len(columns))``; NaN was not seen.

    Args:
        frame: a DataFrame, or a dict of arrays ``(N,)``.
        columns: of the model.
        gaps: whether values may be missing.
        told: called with a line on columns that are missing.

    Raises:
        DataError: naming row and column.
    """
    there = [column for column in columns if column.name in frame]
    if absent := [column for column in columns if column.name not in frame]:
        if not gaps or not there:
            raise DataError(f"column '{absent[0].name}' is missing; the model has {names_of(columns)}")
        told(f"columns that are missing count as not seen: {names_of(absent)}")
    size = len(frame[there[0].name])
    if not size:
        raise DataError("there is no row")
    found = [
        _entries(np.asarray(frame[column.name]), column, gaps) if column in there else np.full(size, np.nan)
        for column in columns
    ]
    result = np.stack(found, 1)
    if (empty := np.isnan(result).all(1)).any():
        raise DataError(f"row {empty.argmax()}: all of its values are missing")
    return torch.from_numpy(result.astype(np.float32))


def _entries(values: np.ndarray, column: Column, gaps: bool) -> np.ndarray:
    """The entries of a column as numbers; of one with a list of values, their places in it."""
    result = np.empty(len(values))
    known = {value: place for place, value in enumerate(column.values)}
    for row, value in enumerate(values.tolist()):
        where = f"row {row}, column '{column.name}'"
        if value is None or value != value or value == "":
            if not gaps:
                raise DataError(f"{where}: the value is missing, which the model does not know")
            result[row] = np.nan
            continue
        if column.values:
            place = next((known[each] for each in _spellings(value) if each in known), None)
            if place is None:
                raise DataError(f"{where}: {value!r} is none of {', '.join(map(repr, column.values))}")
            result[row] = place
            continue
        result[row] = _number(value, column.kind, where)
    return result


def _spellings(value: Any) -> list[Any]:
    """A value as it may be stored: as it is, as a number, as text."""
    try:
        number = [float(value)]
    except (TypeError, ValueError):
        number = []
    whole = [str(int(number[0]))] if number and number[0].is_integer() else []
    return [value, *number, str(value), *whole]


def _number(value: Any, kind: str, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: {value!r} is no number") from error
    if not np.isfinite(number):
        raise DataError(f"{where}: {value!r} is not finite")
    if kind == "positive" and number <= 0:
        raise DataError(f"{where}: {number:g} is not positive")
    if kind == "count" and (number < 0 or not number.is_integer()):
        raise DataError(f"{where}: {number:g} is no count")
    return number


def restored(x: Tensor, schema: Schema) -> Any:
    """Observations ``(*, N, X)`` in the form in which data are given: a DataFrame of a table, else a tensor of images.

    A table must have no further dimension; what was not seen is NaN.
    """
    if not schema.columns:
        return x.reshape(*x.shape[:-1], *schema.shape)
    import pandas as pd  # here: images should not wait for it

    frame = {}
    for column, entries in zip(schema.columns, x.detach().cpu().double().numpy().T, strict=True):
        values: Any = entries
        if column.values:
            gaps = np.isnan(entries)
            places = np.where(gaps, 0, entries).astype(int)
            values = [None if gap else column.values[i] for gap, i in zip(gaps, places, strict=True)]
        frame[column.name] = values
    return pd.DataFrame(frame)


def _array(raw: Any) -> np.ndarray:
    """An array of numbers."""
    if isinstance(raw, Tensor):
        raw = raw.detach().cpu()
        raw = (raw.float() if raw.dtype in (torch.bfloat16, torch.float16) else raw).numpy()
    if hasattr(raw, "to_numpy"):
        raw = raw.to_numpy()
    if not isinstance(raw, np.ndarray):
        raise DataError(f"expected a NumPy array, a torch tensor or a DataFrame, got {type(raw).__name__}")
    if raw.dtype.kind not in "buif":
        raise DataError(f"expected booleans, whole or real numbers, got an array of {raw.dtype}")
    return raw


def _flat(array: np.ndarray, schema: Schema) -> np.ndarray:
    """An array of observations as ``(N, X)``."""
    shape, given = schema.shape, array.shape
    image = len(shape) == 3
    if given[1:] in (shape, (schema.size,)) or (image and shape[0] == 1 and given[1:] == shape[1:]):
        if not len(array):
            raise DataError(f"there is no {schema.noun}: the array has shape {given}")
        return array.reshape(len(array), -1)
    wanted = ["N, " + ", ".join(map(str, shape))] + ([f"N, {schema.size}"] if len(shape) > 1 else [])
    wanted += ["N, " + ", ".join(map(str, shape[1:]))] if image and shape[0] == 1 else []
    hint = ""
    if given in (shape, (schema.size,)) or (image and shape[0] == 1 and given == shape[1:]):
        hint = f": one {schema.noun} is an array of N = 1, x[None]"
    elif image and given[1:] == (*shape[1:], shape[0]):
        hint = ": channels come first, transpose it"
    raise DataError(f"expected {schema.noun}s of shape ({') or ('.join(wanted)}), got an array of shape {given}{hint}")


def _of_pixels(array: np.ndarray, rule: Pixels, told: Callable[[str], object]) -> Tensor:
    """Pixels ``(N, X)`` as observations."""
    gaps = np.isnan(array) if array.dtype.kind == "f" else np.zeros(array.shape, bool)
    values, whole = _whole(np.where(gaps, 0, array) if gaps.any() else array)
    largest = rule.max_value if whole else 1
    encoding, seed = ENCODINGS[rule.binarization], f"with seed {rule.seed}"  # pyright: ignore[reportArgumentType]
    boolean = array.dtype == bool
    alike = bool(((values == 0) | (values == 1)).all())
    if encoding == "integers" and not whole and not alike:
        _refuse(values != np.floor(values), values, gaps, "pixels must be whole numbers")
    wrong = (values < 0) | (values > (largest if not boolean else 1)) | ~np.isfinite(values)
    _refuse(wrong, values, gaps, f"pixels must be in 0..{largest}")
    if alike and encoding in ("binary", "integers"):
        if encoding == "binary" and whole and not boolean and largest > 1:
            told(f"pixels are 0 and 1 alone, of 0..{largest}: they are taken as binary observations")
        result = torch.from_numpy(values.astype(np.float32))
    else:
        odd = whole if encoding == "grey" else True
        if alike and values.any() and odd and rule.max_value > 1:
            raise DataError(_ONLY_ZEROS_AND_ONES.format(largest=rule.max_value))
        pixels = torch.from_numpy(values.astype(np.int32 if whole else np.float32))
        told(_how(rule, whole, seed))
        generator = torch.Generator().manual_seed(rule.seed)
        binarization: Binarization = "static" if rule.binarization == "dynamic" else rule.binarization  # pyright: ignore[reportAssignmentType]
        result = observed(pixels, largest, binarization, generator)
    return torch.where(torch.from_numpy(gaps), torch.nan, result) if gaps.any() else result


_ONLY_ZEROS_AND_ONES = (
    "pixels are 0 and 1 alone, where those of the model are in 0..{largest}: give whole numbers of this range, or real "
    "numbers between 0 and 1"
)


def _how(rule: Pixels, whole: bool, seed: str) -> str:
    """What is done to pixels, in a line."""
    grey = f"pixel / {rule.max_value}" if whole else "pixel"
    return {
        "dynamic": f"grey pixels are binarized as the model's: 1 with probability {grey}, drawn {seed}",
        "static": f"grey pixels are binarized as the model's: 1 with probability {grey}, drawn {seed}",
        "threshold": f"grey pixels are binarized as the model's: 1 where {grey} is above 0.5",
        "dequantized": f"pixels are dequantized as the model's: (pixel + noise) / {rule.max_value + 1}, drawn {seed}"
        if whole
        else "pixels are real numbers in 0..1, taken as they are",
        "none": f"pixels are scored as {grey}",
        "integers": f"pixels are scored as whole numbers in 0..{rule.max_value}",
    }[rule.binarization]


def _whole(array: np.ndarray) -> tuple[np.ndarray, bool]:
    """Pixels, real numbers that are all whole and not all below 2 as whole numbers, and whether they are whole."""
    if array.dtype.kind != "f":
        return array.astype(np.int64), True
    if np.isfinite(array).all() and 1 < array.max() <= MOST and (array == np.floor(array)).all():
        return array.astype(np.int64), True
    return array, False


def _refuse(wrong: np.ndarray, values: np.ndarray, gaps: np.ndarray, wanted: str) -> None:
    """Refuse values of which some are wrong, ``(N, X)``, where they were seen."""
    wrong = wrong & ~gaps
    if wrong.any():
        row = int(wrong.any(1).argmax())
        found = values[row][wrong[row]][0]
        raise DataError(f"row {row}: {wanted}, there is {found:g}")
