"""Results of new data as files: their ending says how."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from pyro_vae.data.datasets import Schema
from pyro_vae.errors import RunError
from pyro_vae.files import whole
from pyro_vae.runs import figures
from pyro_vae.runs.directory import write_netcdf, writing

MOST_PICTURES = 100


def check_out(out: Path | None, endings: Sequence[str]) -> None:
    """Refuse, before any work, a file that cannot be written.

    Raises:
        RunError: if it is there already, its directory is not, or it has none of the endings.
    """
    if out is None:
        return
    if out.suffix not in endings:
        raise RunError(f"--out {out}: expected a file named {', '.join(endings[:-1])} or {endings[-1]}")
    if out.exists():
        raise RunError(f"--out {out} exists and is never overwritten: choose another file by --out")
    if not out.parent.is_dir():
        raise RunError(f"--out {out}: there is no directory {out.parent}")


def write_result(
    result: xr.Dataset, out: Path, main: str, images: Sequence[Tensor] = (), schema: Schema | None = None
) -> None:
    """Write variables along ``datum`` to a new file.

    Args:
        result: the variables.
        out: .nc has all, .npz too, .csv and .parquet those of a row as columns, .npy the main one, .png images.
        main: name of the main variable.
        images: for .png: rows of pictures, ``(N, C, H, W)`` each.
        schema: of the images.

    Raises:
        RunError: if it cannot be written, or the variables do not fit.
    """
    kind = out.suffix
    if kind == ".csv" and any("draw" in each.dims for each in result.values()):
        raise RunError(f"--out {out}: draws are no table, name it .npy, .npz or .nc")
    with writing(f"--out {out}"):
        if kind == ".png":
            assert schema is not None
            _picture(images, schema, out)
            return
        if kind == ".nc":
            write_netcdf(out, result.map(_writable))
            return
        with whole(out, new=True) as partial:
            if kind in (".npz", ".npy"):
                arrays: dict[str, Any] = {str(name): _writable(each).values for name, each in result.items()}
                with partial.open("wb") as file:
                    if kind == ".npy":
                        np.save(file, arrays[main])
                    else:
                        np.savez(file, **arrays, row=result["datum"].values)
            elif kind == ".csv":
                flat_table(result).to_csv(partial)
            else:
                _parquet(flat_table(result), partial, out)


def _writable(each: xr.DataArray) -> xr.DataArray:
    """Strings, and nothing where there is none, as strings."""
    if each.dtype != object:
        return each
    return each.copy(data=np.array(["" if value is None else str(value) for value in each.values.flat]))


def _parquet(table: pd.DataFrame, partial: Path, out: Path) -> None:
    try:
        table.to_parquet(partial)
    except ImportError as error:
        raise RunError(f"--out {out}: writing .parquet needs pyarrow (pip install pyarrow), or name it .csv") from error


def flat_table(result: xr.Dataset) -> pd.DataFrame:
    """Variables ``(datum, ...)`` as a table with a column for each entry, and rows by their name."""
    columns: dict[str, Any] = {}
    for name, each in result.items():
        values = each.values.reshape(len(each), -1)
        if each.ndim == 1:
            columns[str(name)] = values[:, 0]
        else:
            columns |= {f"{name}{place}": values[:, place] for place in range(values.shape[1])}
    return pd.DataFrame(columns, index=pd.Index(result["datum"].values, name="row"))


def _picture(images: Sequence[Tensor], schema: Schema, out: Path) -> None:
    """Pictures, ten to a line; of several rows of pictures each is below the one before."""
    number = min(len(images[0]), MOST_PICTURES)
    largest = schema.pixels.max_value if schema.pixels is not None and schema.pixels.binarization == "integers" else 1
    if number < len(images[0]):
        print(f"{out} shows the first {number} of {len(images[0]):,}")
    columns = min(10, number)
    missing = -number % columns
    rows = []
    for start in range(0, number + missing, columns):
        for each in images:
            part = each[start : min(start + columns, number)].flatten(1).cpu().nan_to_num(0) / largest
            rows.append(torch.nn.functional.pad(part, (0, 0, 0, columns - len(part))))
    figures.image_grid(torch.stack(rows), schema.shape, out)
