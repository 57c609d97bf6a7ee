"""Which of several finished runs is better, by how much, and how sure is that? Differences paired by datum.

Usage: pyro-vae compare RUN RUN [RUN ...]

Each run is compared with the first one given: the mean difference of log p(x) per datum, its standard error over data
(images are easy or hard for all models alike, so this is far smaller than the errors of the two means), and the
Monte Carlo error of the difference. log p(x) is that of annealed importance sampling, on the data that were drawn for
it, where every run has it, otherwise that of importance sampling. Runs whose numbers mean different things are refused:
another unit, another test set, another number of importance samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from pyro_vae.errors import RunError
from pyro_vae.runs import figures
from pyro_vae.runs.directory import check_run_dir, noun_of, open_run, table, write_json, write_text, writing
from pyro_vae.runs.loading import Run, load
from pyro_vae.runs.scoring import number

MUST_AGREE = ("unit", "dataset", "binarization", "binarization_seed", "num_images", "test_set", "densities")
"""What numbers mean; those of importance sampling must have as many samples, too."""


@dataclass(frozen=True)
class ComparisonSettings:
    """Settings of a comparison.

    Args:
        runs: directories of finished runs, the reference first; may stand first, without --runs.
        run_dir: directory to write result.json, table.md and differences.png to, new or empty; null: print only.
    """

    runs: Sequence[Path]
    run_dir: Path | None = None


class Difference(NamedTuple):
    """Mean difference of log p(x) over data, nats; its standard error over data; its Monte Carlo error.

    ``num_not_finite`` is the number of data of which one of the two is NaN or infinite; where there are any, the others
    are NaN.
    """

    mean: float
    se: float
    mc_se: float
    num_not_finite: int = 0


class Comparison(NamedTuple):
    """Finished runs, by which estimator they are compared, and the difference of each but the first to the first."""

    runs: list[Run]
    estimator: str
    differences: list[Difference]

    def table(self) -> str:
        """The comparison in Markdown, with a line above that says what its numbers are."""
        first, *others = self.runs
        means = [number(float(run.evidence[self.estimator]["log_px"].values.mean())) for run in self.runs]
        rows = [("run", "log p(x)", "difference", f"error over {noun_of(first.result)}s", "Monte Carlo error", "bad k")]
        rows.append((str(first.path), means[0], "", "", "", _share(first)))
        for run, mean, d in zip(others, means[1:], self.differences, strict=True):
            told = number(d.mean) if not math.isfinite(d.mean) else f"{d.mean:+.3f}"
            rows.append((str(run.path), mean, told, number(d.se), number(d.mc_se), _share(run)))
        result, size = first.result, first.evidence[self.estimator].sizes["datum"]
        how = "annealed" if self.estimator == "annealed" else f"{result['num_samples']:,} importance samples"
        of = result.get("dataset") or "data"
        lost = [
            f"\n{run.path}: not reliable, log p(x) of {d.num_not_finite:,} {noun_of(result)}s is NaN or infinite there "
            "or in the reference"
            for run, d in zip(others, self.differences, strict=True)
            if d.num_not_finite
        ]
        return f"{result['unit']}; {of}, {size:,} test {noun_of(result)}s, {how}\n{table(rows)}" + "".join(lost)


def compare(runs: Sequence[Run | Path | str], run_dir: Path | str | None = None, text: str | None = None) -> Comparison:
    """Compare finished runs, or their directories, with the first of them.

    Args:
        runs: at least two.
        run_dir: directory to write the comparison to, new or empty; None: nothing is written.
        text: its settings as YAML, if the caller has them.

    Raises:
        RunError: if a directory holds no finished run, or the runs cannot be compared.
    """
    paths, run_dir = [Path(run) for run in runs], None if run_dir is None else Path(run_dir)
    if len(paths) < 2:
        raise RunError("name at least two run directories to compare")
    if len({path.resolve() for path in paths}) < len(paths):
        raise RunError("a run is named twice: name each run directory once")
    text = yaml.safe_dump({"runs": [str(path) for path in paths]}) if text is None else text
    if run_dir:
        check_run_dir(run_dir, text, resume=None)
    finished = [run if isinstance(run, Run) else load(run) for run in runs]
    first, *others = finished
    estimator = "annealed" if annealed_alike(finished) else "importance"
    done = Comparison(finished, estimator, [difference_of(run, first, estimator) for run in others])
    if run_dir:
        open_run(run_dir, text, resume=None)
        _write(done, run_dir)
    return done


def _write(done: Comparison, run_dir: Path) -> None:
    first, *others = done.runs
    log_px = {str(run.path): run.evidence[done.estimator]["log_px"].values for run in done.runs}
    pairs = list(zip(others, done.differences, strict=True))
    rows = {str(run.path): d._asdict() for run, d in pairs}
    result = {"reference": str(first.path), "estimator": done.estimator, "unit": first.result["unit"]}
    with writing(run_dir):
        reference = log_px.pop(str(first.path))
        differences = {str(run.path): log_px[str(run.path)] - reference for run, d in pairs if not d.num_not_finite}
        if differences:
            figures.paired_differences(differences, run_dir / "differences.png", f"nats per datum above {first.path}")
        write_text(run_dir / "table.md", done.table() + "\n")
        write_json(run_dir / "result.json", result | {"differences": rows})


def annealed_alike(finished: Sequence[Run]) -> bool:
    """Whether all runs have annealed estimates of the same images."""
    images = [None if run.annealed is None else tuple(run.annealed["datum"].values) for run in finished]
    return images[0] is not None and len(set(images)) == 1


def difference_of(run: Run, reference: Run, estimator: str = "importance") -> Difference:
    """The difference of ``run`` to ``reference``, datum by datum; positive if ``run`` is better.

    Raises:
        RunError: if their numbers mean different things.
    """
    for name in MUST_AGREE + (("num_samples",) if estimator == "importance" else ()):
        ours, theirs = run.result.get(name), reference.result.get(name)
        if ours != theirs:
            raise RunError(f"{run.path} and {reference.path} cannot be compared: {name} is {ours!r} and {theirs!r}")
    ours, theirs = run.evidence[estimator], reference.evidence[estimator]
    finite = np.isfinite(ours["log_px"].values) & np.isfinite(theirs["log_px"].values)
    if not finite.all():
        return Difference(math.nan, math.nan, math.nan, int((~finite).sum()))
    difference = (ours["log_px"] - theirs["log_px"]).values
    size = len(difference)
    mc_se = math.sqrt((ours["mc_se"].values ** 2 + theirs["mc_se"].values ** 2).sum()) / size
    return Difference(float(difference.mean()), float(difference.std(ddof=1)) / math.sqrt(size), mc_se)


def _share(run: Run) -> str:
    share = run.result["share_khat_above_threshold"]
    return "-" if share is None else f"{share:.0%}"
