"""Data that a finished model has not seen, as the observations that it was trained on; and back."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyro_vae.data.columns import Entries, Frame, check_rows, encoded, frame_of
from pyro_vae.data.datasets import Column, Pixels, Schema, names_of
from pyro_vae.data.images import ENCODINGS, MOST, Binarization, observed
from pyro_vae.errors import DataError


def observations(raw: Any, schema: Schema, told: Callable[[str], object] = print) -> Tensor:
    """New data as observations ``(N, X)``, as the data of the schema became observations; NaN was not seen.

    Pixels that are 0 or 1 are the observations of a binary model as they are; other pixels are binarized by its rule,
    or dequantized, with its seed: the pixels of its own test set give its own test observations.

    Args:
        raw: a NumPy array or torch tensor ``(N, *shape)``, ``(N, X)`` or, of images of one channel, ``(N, H, W)``, of
            booleans, whole or real numbers; or a DataFrame or Frame, of a table with its columns in any order.
        schema: of the model.
        told: called with a line on each thing that is done to the values.

    Raises:
        DataError: if it is something else, or a value cannot be an observation; row and column are named.
    """
    if schema.columns:
        frame = _frame(raw if hasattr(raw, "columns") else _named(_flat(_array(raw), schema), schema))
        return _of_columns(frame, schema, told)
    array = _flat(_array(raw), schema)
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
        raise DataError(f"the model has a condition: give {names}; on the command line, --given")
    if not hasattr(given, "columns"):
        given = _frame_of_given(given, size, schema.condition)
    frame = _frame(given)
    if absent := [column.name for column in schema.condition if column.name not in frame.columns]:
        raise DataError(f"the model has a condition: '{absent[0]}' is not given")
    entries = encoded(frame, schema.condition)
    if len(entries) != size:
        raise DataError(f"given has {len(entries)} rows, and there are {size} {schema.noun}s")
    _refuse_gaps(frame, entries, schema.condition)
    columns = zip(schema.condition, torch.from_numpy(entries).mT, strict=True)
    return torch.cat([column.encode(each) for column, each in columns], 1)


def _frame_of_given(given: Any, size: int, columns: Sequence[Column]) -> pd.DataFrame:
    """Values of a condition, by their names unless there is one, as a table of ``size`` rows."""
    if not isinstance(given, Mapping):
        first, *others = columns
        if others:
            raise DataError(f"given must be a dict or a DataFrame of the columns {names_of(columns)}")
        given = {first.name: given}
    table = {}
    for name, values in given.items():
        values = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        values = np.full(size, values.item()) if values.size == 1 else values
        if values.shape != (size,):
            raise DataError(f"given '{name}' must be one value, or {size} of them, it is of shape {values.shape}")
        kind = next((column for column in columns if column.name == name), None)
        if values.dtype.kind in "OU" and kind is not None and not isinstance((*kind.values, 0.0)[0], str):
            numbers: Any = pd.to_numeric(pd.Series(values), errors="coerce")
            values = values if numbers.isna().any() else np.asarray(numbers)
        table[name] = values
    return pd.DataFrame(table)


def _frame(raw: Any) -> Frame:
    return raw if isinstance(raw, Frame) else frame_of(raw)


def _named(array: np.ndarray, schema: Schema) -> pd.DataFrame:
    """An array ``(N, X)`` as a table with the columns of the model, in its order."""
    return pd.DataFrame(array, columns=pd.Index([column.name for column in schema.columns]))


def _of_columns(frame: Frame, schema: Schema, told: Callable[[str], object]) -> Tensor:
    """The columns of the model as numbers, and what was not seen as NaN."""
    if not frame.num_rows:
        raise DataError(f"{frame.title} holds no rows")
    known = {column.name for column in (*schema.columns, *schema.condition)}
    if others := [name for name in frame.columns if name not in known]:
        told(f"columns that the model does not know are left out: {', '.join(others)}")
    absent = [column for column in schema.columns if column.name not in frame.columns]
    if absent and schema.missing and len(absent) < len(schema.columns):
        told(f"columns that are missing count as not seen: {names_of(absent)}")
        nothing = Entries(None, np.full(frame.num_rows, np.nan))
        frame = frame._replace(columns={**frame.columns, **{column.name: nothing for column in absent}})
    x = encoded(frame, schema.columns)
    check_rows(frame, x)
    if not schema.missing:
        _refuse_gaps(frame, x, schema.columns)
    return torch.from_numpy(x)


def _refuse_gaps(frame: Frame, x: np.ndarray, columns: Sequence[Column]) -> None:
    """Refuse what was not seen of a model that knows no gaps."""
    for place, column in enumerate(columns):
        if (gaps := np.isnan(x[:, place])).any():
            where = frame.at(column.name, int(gaps.argmax()))
            raise DataError(f"{where}: the value is missing, and nothing was missing where the model was trained")


def restored(x: Tensor, schema: Schema) -> Any:
    """Observations ``(*, N, X)`` in the form in which data are given: a DataFrame of a table, else a tensor of images.

    A table must have no further dimension; what was not seen is NaN.
    """
    if not schema.columns:
        return x.reshape(*x.shape[:-1], *schema.shape)
    table = {}
    for column, entries in zip(schema.columns, x.detach().cpu().numpy().T, strict=True):
        values: Any = entries
        if column.values:
            gaps = np.isnan(entries)
            places = np.where(gaps, 0, entries).astype(int)
            values = [None if gap else column.values[i] for gap, i in zip(gaps, places, strict=True)]
        table[column.name] = values
    return pd.DataFrame(table)


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
        return np.ascontiguousarray(array.reshape(len(array), -1))
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
