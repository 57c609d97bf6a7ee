"""Files of new data, which a finished model is used on."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from pyro_vae.data.columns import read_frame
from pyro_vae.data.datasets import Schema, check_file
from pyro_vae.data.own import ImageFolder, load_arrays, wide
from pyro_vae.data.sequences import sequences_of
from pyro_vae.errors import DataError, reason_of

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


class NewData(NamedTuple):
    """What a file holds.

    Attributes:
        x: as :func:`pyro_vae.data.incoming.observations` takes it.
        given: what the file says of the condition; None: nothing.
        rows: names of the rows; None: they are numbered.
    """

    x: Any
    given: Any = None
    rows: list[str] | None = None


def read_new(path: Path, schema: Schema, array: str | None = None) -> NewData:
    """Read new data for a model with this schema.

    Args:
        path: a .npy or .npz file of arrays, of sequences with their lengths as :class:`pyro_vae.data.Sequences` has
            them; a .csv, .tsv or .parquet file, of a table by the names of its columns, of other data with the entries
            of an observation in each line; a picture, or a folder of them.
        schema: of the model.
        array: name of the array of an .npz file; None: the only one, or that called test.

    Raises:
        DataError: in one line, if it cannot be read or is no such data.
    """
    kind = path.suffix.lower()
    if not path.exists():
        raise DataError(f"{path}: there is no such file")
    check_file(path)
    if array is not None and kind != ".npz":
        raise DataError(f"--array {array}: {path} is no .npz file, which could have arrays of several names")
    if path.is_dir() or kind in PICTURES:
        return _pictures(path, schema)
    if kind == ".npy":
        content = load_arrays(path, ".npy file")
        if not isinstance(content, np.ndarray):
            raise DataError(f"{path} holds several arrays: call it .npz")
        return NewData(content)
    if kind == ".npz":
        return _archive(path, schema, array)
    if kind not in (".csv", ".tsv", ".parquet"):
        wanted = ".npy, .npz, .csv, .tsv, .parquet, a picture, or a folder of pictures"
        raise DataError(f"{path}: expected a file named {wanted}")
    if schema.columns:
        frame = read_frame(path)
        return NewData(frame, frame if schema.condition else None)
    return _lines(path, schema)


def _pictures(path: Path, schema: Schema) -> NewData:
    """Pictures, brought to the shape and range of the model's."""
    if len(schema.shape) != 3 or schema.shape[0] not in (1, 3):
        raise DataError(f"{path}: pictures are for models of images of 1 or 3 channels, not of {schema.noun}s")
    channels, height, width = schema.shape
    source = ImageFolder(Path(), path, (height, width), channels == 1)
    images, names = source.pictures(path) if path.is_dir() else (source.picture(path)[None], [path.name])
    rule, white = schema.pixels, 65535 if images.dtype == np.uint16 else 255
    if rule is not None and rule.max_value == 65535:
        images = wide(images)
    elif rule is not None and rule.max_value != white:  # a picture's range is that of its file, not of the model's data
        images = images / white
        if rule.max_value > 1 and rule.binarization in ("integers", "dequantized"):
            images = (images * rule.max_value).round().astype(np.int64)
    return NewData(images, None, names)


def _archive(path: Path, schema: Schema, name: str | None) -> NewData:
    """One array of an archive, and beside it those called as the condition is, or as its labels are."""
    arrays = load_arrays(path, ".npz archive")
    if isinstance(arrays, np.ndarray):
        return NewData(arrays)
    if schema.columns and name is None and all(each.ndim == 1 for each in arrays.values()):
        frame = read_frame(path)
        return NewData(frame, frame if schema.condition else None)
    wanted = [each for each, found in arrays.items() if found.ndim > 1]
    if name is None:
        name = wanted[0] if len(wanted) == 1 else "test"
    if name not in arrays:
        raise DataError(f"{path}: which array? Name one by --array: {', '.join(arrays) or 'there is none'}")
    if schema.entries and "lengths" in arrays:
        raise DataError(
            f"{path}: the lengths of the sequences in '{name}' are read from '{name}_lengths', not 'lengths'"
        )
    if schema.entries and (arrays[name].ndim == 3 or f"{name}_lengths" in arrays):
        return NewData(sequences_of(arrays, name, path))
    given = {}
    for column in schema.condition:
        for other in (column.name, f"{name}_{column.name}", f"{name}_labels"):
            if other in arrays:
                given[column.name] = arrays[other]
                break
    return NewData(arrays[name], given or None)


def _lines(path: Path, schema: Schema) -> NewData:
    """Observations that are no table, one a line; a first line that is not all numbers has names."""
    try:
        table: Any = pd.read_parquet(path) if path.suffix.lower() == ".parquet" else None
        if table is None:
            separator = "\t" if path.suffix.lower() == ".tsv" else ","
            first: Any = pd.read_csv(path, sep=separator, header=None, nrows=1, dtype=str).iloc[0]
            numbers: Any = pd.to_numeric(first, errors="coerce")
            counted = len(numbers) > 3 and numbers.tolist() == list(range(len(numbers)))  # as pandas names columns
            named = bool(numbers.isna().any()) or counted
            table = pd.read_csv(path, sep=separator, header=0 if named else None)
    except ImportError as error:
        raise DataError(f"{path}: reading .parquet needs pyarrow (pip install pyarrow), or save it as .csv") from error
    except Exception as error:  # of whichever reader
        raise DataError(f"{path} is no readable file of numbers: {reason_of(error)}") from error
    table.columns = [str(name) for name in table.columns]
    given = {column.name: table.pop(column.name) for column in schema.condition if column.name in table}
    for name in table:
        numbers = pd.to_numeric(table[name], errors="coerce")
        if (odd := numbers.isna() & table[name].notna()).any():
            row = int(odd.to_numpy().argmax())
            raise DataError(f"{path}, row {row}, column '{name}': '{table[name].iloc[row]}' is no number")
        table[name] = numbers
    return NewData(table.to_numpy(), given or None)
