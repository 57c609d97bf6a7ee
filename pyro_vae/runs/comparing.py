"""Which of several finished runs is better, by how much, and how sure is that? Paired over the same test images.

Usage: python -m experiments.compare RUN RUN [RUN ...]

Each run is compared with the first one given: the mean difference of log p(x) per image, its standard error over images
(images are easy or hard for all models alike, so that it is far smaller than the errors of the two means), and the
Monte Carlo error of the difference. log p(x) is that of annealed importance sampling, on the images that were drawn for
it, where every run has it, else that of importance sampling. Runs whose numbers mean different things are refused:
another unit, another test set, another number of importance samples.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pyro_vae.errors import RunError
from pyro_vae.runs.directory import table
from pyro_vae.runs.loading import Run, read

MUST_AGREE = ("unit", "dataset", "binarization", "binarization_seed", "num_images", "test_set")
"""What numbers mean; those of importance sampling must have as many samples, too."""


class Difference(NamedTuple):
    """Mean difference of log p(x) over images, nats; its standard error over images; its Monte Carlo error."""

    mean: float
    se: float
    mc_se: float


def compare_main(argv: Sequence[str] | None = None) -> list[Difference]:
    """Print the comparison of the runs named by ``argv``; return a difference to the first run for each other run.

    Raises:
        RunError: if a directory holds no finished run, or the runs cannot be compared.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = _refuse
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a finished run")
    directories = parser.parse_args(sys.argv[1:] if argv is None else argv).runs
    if len(directories) < 2:
        raise RunError("name at least two run directories to compare")
    if len({directory.resolve() for directory in directories}) < len(directories):
        raise RunError("a run is named twice: name each run directory once")
    finished = [read(directory) for directory in directories]
    first, *others = finished
    estimator = "annealed" if annealed_alike(finished) else "importance"
    differences = [compare_runs(run, first, estimator) for run in others]
    means = [f"{getattr(run, estimator)['log_px'].values.mean():.3f}" for run in finished]
    rows = [("run", "log p(x)", "difference", "error over images", "Monte Carlo error", "bad k")]
    rows.append((str(first.path), means[0], "", "", "", _share(first)))
    for run, mean, d in zip(others, means[1:], differences, strict=True):
        rows.append((str(run.path), mean, f"{d.mean:+.3f}", f"{d.se:.3f}", f"{d.mc_se:.3f}", _share(run)))
    result = first.result
    how = "annealed" if estimator == "annealed" else f"{result['num_samples']:,} importance samples"
    print(f"{result['unit']}; {result['dataset']}, {getattr(first, estimator).sizes['image']:,} test images, {how}")
    print(table(rows))
    return differences


def annealed_alike(finished: Sequence[Run]) -> bool:
    """Whether all runs have annealed estimates of the same images."""
    images = [None if run.annealed is None else tuple(run.annealed["image"].values) for run in finished]
    return images[0] is not None and len(set(images)) == 1


def compare_runs(run: Run, reference: Run, estimator: str = "importance") -> Difference:
    """The difference of ``run`` to ``reference``, image by image; positive if ``run`` is better.

    Raises:
        RunError: if their numbers mean different things.
    """
    for name in MUST_AGREE + (("num_samples",) if estimator == "importance" else ()):
        ours, theirs = run.result.get(name), reference.result.get(name)
        if ours != theirs:
            raise RunError(f"{run.path} and {reference.path} cannot be compared: {name} is {ours!r} and {theirs!r}")
    ours, theirs = getattr(run, estimator), getattr(reference, estimator)
    difference = (ours["log_px"] - theirs["log_px"]).values
    size = len(difference)
    mc_se = math.sqrt((ours["mc_se"].values ** 2 + theirs["mc_se"].values ** 2).sum()) / size
    return Difference(float(difference.mean()), float(difference.std(ddof=1)) / math.sqrt(size), mc_se)


def _share(run: Run) -> str:
    share = run.result["share_khat_above_threshold"]
    return "-" if share is None else f"{share:.0%}"


def _refuse(message: str) -> None:
    raise RunError(f"{message}; usage: python -m experiments.compare RUN RUN [RUN ...]")
