"""Which of several finished runs is better, by how much, and how sure is that? Paired over the same test images.

Usage: python -m experiments.compare RUN RUN [RUN ...]

Each run is compared with the first one given: the mean difference of log p(x) per image, its standard error over images
(images are easy or hard for all models alike, so that it is far smaller than the errors of the two means), and the
Monte Carlo error of the difference. Runs whose numbers mean different things are refused: another unit, test set or
estimator.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from experiments import runs

MUST_AGREE = ("unit", "dataset", "binarization", "binarization_seed", "num_images", "num_samples", "test_set")


class Run(NamedTuple):
    """A finished run: its result, and per image log p(x), its Monte Carlo error and Pareto's k."""

    path: Path
    result: dict[str, Any]
    log_px: np.ndarray
    mc_se: np.ndarray
    khat: np.ndarray


class Difference(NamedTuple):
    """Mean difference of log p(x) over images, nats; its standard error over images; its Monte Carlo error."""

    mean: float
    se: float
    mc_se: float


def main(argv: Sequence[str] | None = None) -> list[Difference]:
    """Print the comparison of the runs named by ``argv``; return a difference to the first run for each other run.

    Raises:
        RunError: if a directory holds no finished run, or the runs cannot be compared.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = _refuse
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a finished run")
    directories = parser.parse_args(sys.argv[1:] if argv is None else argv).runs
    if len(directories) < 2:
        raise runs.RunError("name at least two run directories to compare")
    first, *others = (read(directory) for directory in directories)
    differences = [compare(run, first) for run in others]
    rows = [("run", "log p(x)", "difference", "error over images", "Monte Carlo error", "bad k")]
    rows.append((str(first.path), f"{first.log_px.mean():.3f}", "", "", "", _share(first)))
    for run, d in zip(others, differences, strict=True):
        errors = f"{d.se:.3f}", f"{d.mc_se:.3f}"
        rows.append((str(run.path), f"{run.log_px.mean():.3f}", f"{d.mean:+.3f}", *errors, _share(run)))
    result = first.result
    size = f"{result['num_images']:,} test images, {result['num_samples']:,} samples"
    print(f"{result['unit']}; {result['dataset']}, {size}")
    print(runs.table(rows))
    return differences


def read(directory: Path) -> Run:
    """A finished run.

    Raises:
        RunError: if ``directory`` does not hold one.
    """
    try:
        result = json.loads((directory / "result.json").read_text())
        with xr.open_datatree(directory / "evidence.nc", engine="h5netcdf") as tree:
            group = tree["importance"]
            return Run(directory, result, *(group[name].values for name in ("log_px", "mc_se", "khat")))
    except FileNotFoundError as error:
        raise runs.RunError(f"{directory} holds no finished run: there is no {Path(error.filename).name}") from error
    except (OSError, ValueError, KeyError) as error:
        raise runs.RunError(f"{directory} holds a damaged run: {' '.join(str(error).split())}") from error


def compare(run: Run, reference: Run) -> Difference:
    """The difference of ``run`` to ``reference``, image by image; positive if ``run`` is better.

    Raises:
        RunError: if their numbers mean different things.
    """
    for name in MUST_AGREE:
        ours, theirs = run.result.get(name), reference.result.get(name)
        if ours != theirs:
            raise runs.RunError(
                f"{run.path} and {reference.path} cannot be compared: {name} is {ours!r} and {theirs!r}"
            )
    difference = run.log_px - reference.log_px
    size = len(difference)
    mc_se = math.sqrt((run.mc_se**2 + reference.mc_se**2).sum()) / size
    return Difference(float(difference.mean()), float(difference.std(ddof=1)) / math.sqrt(size), mc_se)


def _share(run: Run) -> str:
    return f"{(run.khat > run.result['khat_threshold']).mean():.0%}"


def _refuse(message: str) -> None:
    raise runs.RunError(f"{message}; usage: python -m experiments.compare RUN RUN [RUN ...]")


if __name__ == "__main__":
    runs.cli(main)
