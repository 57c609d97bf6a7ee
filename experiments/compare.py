"""Which of several finished runs is better, by how much, and how sure is that? Paired over the same test images.

Usage: python -m experiments.compare RUN RUN [RUN ...]

Each run is compared with the first one given: the mean difference of log p(x) per image, its standard error over images
(images are easy or hard for all models alike, so that it is far smaller than the errors of the two means), and the
Monte Carlo error of the difference. log p(x) is that of annealed importance sampling, on the images that were drawn for
it, where every run has it, else that of importance sampling. Runs whose numbers mean different things are refused:
another unit, another test set, another number of importance samples.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xarray as xr

from experiments import runs

MUST_AGREE = ("unit", "dataset", "binarization", "binarization_seed", "num_images", "test_set")
"""What numbers mean; those of importance sampling must have as many samples, too."""


class Run(NamedTuple):
    """A finished run: its result, and its evidence per image, by importance sampling and, or None, annealed."""

    path: Path
    result: dict[str, Any]
    importance: xr.Dataset
    annealed: xr.Dataset | None


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
    if len({directory.resolve() for directory in directories}) < len(directories):
        raise runs.RunError("a run is named twice: name each run directory once")
    finished = [read(directory) for directory in directories]
    first, *others = finished
    estimator = "annealed" if annealed_alike(finished) else "importance"
    differences = [compare(run, first, estimator) for run in others]
    means = [f"{getattr(run, estimator)['log_px'].values.mean():.3f}" for run in finished]
    rows = [("run", "log p(x)", "difference", "error over images", "Monte Carlo error", "bad k")]
    rows.append((str(first.path), means[0], "", "", "", _share(first)))
    for run, mean, d in zip(others, means[1:], differences, strict=True):
        rows.append((str(run.path), mean, f"{d.mean:+.3f}", f"{d.se:.3f}", f"{d.mc_se:.3f}", _share(run)))
    result = first.result
    how = "annealed" if estimator == "annealed" else f"{result['num_samples']:,} importance samples"
    print(f"{result['unit']}; {result['dataset']}, {getattr(first, estimator).sizes['image']:,} test images, {how}")
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
            groups = {name: tree[name].to_dataset().load() for name in tree.children}
            return Run(directory, result, groups["importance"], groups.get("annealed"))
    except FileNotFoundError as error:
        raise runs.RunError(f"{directory} holds no finished run: there is no {Path(error.filename).name}") from error
    except (OSError, ValueError, KeyError) as error:
        raise runs.RunError(f"{directory} holds a damaged run: {' '.join(str(error).split())}") from error


def annealed_alike(finished: Sequence[Run]) -> bool:
    """Whether all runs have annealed estimates of the same images."""
    images = [None if run.annealed is None else tuple(run.annealed["image"].values) for run in finished]
    return images[0] is not None and len(set(images)) == 1


def compare(run: Run, reference: Run, estimator: str = "importance") -> Difference:
    """The difference of ``run`` to ``reference``, image by image; positive if ``run`` is better.

    Raises:
        RunError: if their numbers mean different things.
    """
    for name in MUST_AGREE + (("num_samples",) if estimator == "importance" else ()):
        ours, theirs = run.result.get(name), reference.result.get(name)
        if ours != theirs:
            raise runs.RunError(
                f"{run.path} and {reference.path} cannot be compared: {name} is {ours!r} and {theirs!r}"
            )
    ours, theirs = getattr(run, estimator), getattr(reference, estimator)
    difference = (ours["log_px"] - theirs["log_px"]).values
    size = len(difference)
    mc_se = math.sqrt((ours["mc_se"].values ** 2 + theirs["mc_se"].values ** 2).sum()) / size
    return Difference(float(difference.mean()), float(difference.std(ddof=1)) / math.sqrt(size), mc_se)


def _share(run: Run) -> str:
    share = run.result["share_khat_above_threshold"]
    return "-" if share is None else f"{share:.0%}"


def _refuse(message: str) -> None:
    raise runs.RunError(f"{message}; usage: python -m experiments.compare RUN RUN [RUN ...]")


if __name__ == "__main__":
    runs.cli(main)
