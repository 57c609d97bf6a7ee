"""Which of several finished runs is better, by how much, and how sure is that? Differences paired by datum.

Usage: pyro-vae compare RUN RUN [RUN ...]

Each run is compared with the first one given: the mean difference of log p(x) per datum, its standard error over data
(images are easy or hard for all models alike, so this is far smaller than the errors of the two means), its 95 %
interval by Student's t, and the Monte Carlo error of the difference. Importance sampling pairs all data; where every
run has annealed estimates of the same data, their mean correction is added to it, with its error. Runs whose numbers
mean different things are refused: another unit, another test set, another number of importance samples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from scipy.special import stdtrit

from pyro_vae.errors import RunError
from pyro_vae.infer.evidence.result import Evidence, difference_estimate
from pyro_vae.runs import figures
from pyro_vae.runs.directory import check_run_dir, noun_of, open_run, several, table, write_json, write_text, writing
from pyro_vae.runs.hub import home_of
from pyro_vae.runs.loading import Run, load
from pyro_vae.runs.scoring import best, number

MUST_AGREE = ("unit", "dataset", "binarization", "binarization_seed", "num_images", "test_set", "densities")
"""What numbers mean; those of importance sampling must have as many samples, too."""


@dataclass(frozen=True)
class ComparisonSettings:
    """Settings of a comparison.

    Args:
        runs: directories of finished runs, or hf://USER/NAME, the reference first; may stand first, without --runs.
        run_dir: directory to write result.json, table.md and differences.png to, new or empty; null: print only.
        trust: whether the runs' settings may name classes of anybody, none of which is built here; false: only those of
            pyro_vae; null: false for runs of hf://, else true.
    """

    runs: Sequence[Path]
    run_dir: Path | None = None
    trust: bool | None = None


class Difference(NamedTuple):
    """Mean difference of log p(x) over data, nats, with its errors.

    Attributes:
        mean: of the first run minus the second.
        se: standard error over data: another test set, and another draw of the annealed data, would differ by this.
        mc_se: Monte Carlo error: another run of the estimators would differ by this; where some data are annealed,
            another draw of them, too.
        num_not_finite: data of which one of the two is NaN or infinite; where there are any, the others are NaN.
        size: paired data, 0 if that is not known.
        annealed: how many of them are annealed.
        freedom: degrees of freedom of ``se``: the data fewer one, or the annealed ones fewer one if there are others.
    """

    mean: float
    se: float
    mc_se: float
    num_not_finite: int = 0
    size: int = 0
    annealed: int = 0
    freedom: float = math.inf

    def margin(self, level: float = 0.95) -> float:
        """Half the width of the interval, by Student's t; NaN if no error is known, as of one datum."""
        return float(stdtrit(min(self.freedom, 1e9), 0.5 + level / 2)) * self.se if self.freedom > 0 else math.nan

    @property
    def is_told(self) -> bool:
        """Whether the 95 % interval leaves out zero."""
        return abs(self.mean) > self.margin()

    @property
    def interval(self) -> str:
        """The 95 % interval in words."""
        margin = self.margin()
        return f"{self.mean - margin:+.3f} to {self.mean + margin:+.3f}" if math.isfinite(margin) else "unknown"

    def count(self, noun: str) -> str:
        """How many data it is the mean of, in words."""
        told = several(self.size, noun)
        return told + f", {self.annealed:,} of them annealed" * (0 < self.annealed < self.size)

    def sentence(self, name: str, other: str, noun: str) -> str:
        """Whether the run ``name`` is better than ``other``, by how much, and how sure that is."""
        if not math.isfinite(self.mean):
            lost = f"log p(x) of {several(self.num_not_finite, noun)} is no number"
            return f"{name} and {other} cannot be told apart: {lost}."
        found = "no difference can be told"
        if self.is_told:
            found = f"{name if self.mean > 0 else other} is better"
        n = f"; n = {self.count(noun)}" * (self.size > 0)
        return f"{name} minus {other}: {self.mean:+.3f} nats per {noun} (95 % interval {self.interval}{n}): {found}."


class Gaps(NamedTuple):
    """Log p(x) of one run minus that of another, by datum, with Monte Carlo errors.

    Attributes:
        rough, rough_error: of all N data, by importance sampling, ``(N,)``.
        fine, fine_error: of the n data that are annealed in both, ``(n,)``; n may be 0.
        among: their places among all, ``(n,)``.
    """

    rough: np.ndarray
    rough_error: np.ndarray
    fine: np.ndarray
    fine_error: np.ndarray
    among: np.ndarray

    def difference(self) -> Difference:
        """The mean over all N: where 0 < n < N the rough one, plus the mean of fine minus rough over the n.

        The sampling of the n, and whether the rough ones help at all, is that of
        :func:`pyro_vae.infer.evidence.difference_estimate`. Its error has n - 1 degrees of freedom, which the whole is
        given: with few annealed data the interval is too wide rather than too narrow.
        """
        size, annealed = len(self.rough), len(self.fine)
        finite = np.isfinite(self.rough) if annealed < size else np.isfinite(self.fine)
        if 0 < annealed < size:
            finite[self.among] &= np.isfinite(self.fine)
        if not finite.all():
            return Difference(math.nan, math.nan, math.nan, int((~finite).sum()), size, annealed, math.nan)
        if annealed in (0, size):
            values, errors = (self.fine, self.fine_error) if annealed else (self.rough, self.rough_error)
            mc_se = math.sqrt((errors.astype(float) ** 2).sum()) / size
            return Difference(float(values.mean()), _error_of(values), mc_se, 0, size, annealed, size - 1)
        fine, errors = torch.from_numpy(self.fine.astype(float)), torch.from_numpy(self.fine_error.astype(float))
        none = torch.full_like(fine, math.nan)
        evidence = Evidence(fine, errors, none, none, none, none)
        among = torch.from_numpy(self.among)
        mean, error = difference_estimate(torch.from_numpy(self.rough.astype(float)), evidence, among)
        helped = mean != fine.mean().item()  # else importance sampling is hopeless, and the annealed stand alone
        over_data = _error_of(self.rough) if helped else _error_of(self.fine) * math.sqrt(annealed / size)
        return Difference(mean, math.hypot(over_data, error), error, 0, size, annealed, annealed - 1)


def _error_of(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


class Comparison(NamedTuple):
    """Finished runs, by which estimator they are compared, and the difference of each but the first to the first."""

    runs: list[Run]
    estimator: str
    differences: list[Difference]

    def table(self) -> str:
        """The comparison in Markdown, with a line above that says what its numbers are."""
        first, *others = self.runs
        noun, means = noun_of(first.result), [number(best(run.result)) for run in self.runs]
        header = ("run", "log p(x)", "difference", "95 % interval", f"{noun}s", "annealed", f"error over {noun}s")
        rows: list[tuple[str, ...]] = [(*header, "Monte Carlo error", "bad k")]
        rows.append((first.name, means[0], "", "", "", "", "", "", _share(first)))
        for run, mean, d in zip(others, means[1:], self.differences, strict=True):
            told = number(d.mean) if not math.isfinite(d.mean) else f"{d.mean:+.3f}"
            cells = (told, d.interval if math.isfinite(d.mean) else "-", f"{d.size:,}", f"{d.annealed:,}")
            rows.append((run.name, mean, *cells, number(d.se), number(d.mc_se), _share(run)))
        result, size = first.result, first.importance.sizes["datum"]
        annealed = first.evidence["annealed"].sizes["datum"] if self.estimator == "annealed" else 0
        how = "annealed" if annealed == size else f"{result['num_samples']:,} importance samples"
        how += f", corrected by the {annealed:,} annealed ones" * (0 < annealed < size)
        of = result.get("dataset") or "data"
        lost = [
            f"\n{run.name}: not reliable, log p(x) of {d.num_not_finite:,} {noun_of(result)}s is NaN or infinite there "
            "or in the reference"
            for run, d in zip(others, self.differences, strict=True)
            if d.num_not_finite
        ]
        pairs = zip(others, self.differences, strict=True)
        told = [f"\n{d.sentence(run.name, first.name, noun)}" for run, d in pairs if not d.num_not_finite]
        text = f"{result['unit']}; {of}, {size:,} test {noun}s, {how}\n{table(rows)}\n"
        return text + "".join(lost + told)


def compare(
    runs: Sequence[Run | Path | str],
    run_dir: Path | str | None = None,
    text: str | None = None,
    trust: bool | None = None,
) -> Comparison:
    """Compare finished runs, or their directories, with the first of them.

    Args:
        runs: at least two.
        run_dir: directory to write the comparison to, new or empty; None: nothing is written.
        text: its settings as YAML, if the caller has them.
        trust: of directories; see :func:`pyro_vae.runs.load`.

    Raises:
        RunError: if a directory holds no finished run, or the runs cannot be compared.
    """
    runs = [run if isinstance(run, Run) else home_of(run) for run in runs]
    paths, run_dir = [Path(run) for run in runs], None if run_dir is None else Path(run_dir)
    if len(paths) < 2:
        raise RunError("name at least two run directories to compare")
    if len({path.resolve() for path in paths}) < len(paths):
        raise RunError("a run is named twice: name each run directory once")
    text = yaml.safe_dump({"runs": [str(path) for path in paths]}) if text is None else text
    if run_dir:
        check_run_dir(run_dir, text, resume=None)
    finished = [run if isinstance(run, Run) else load(run, trust) for run in runs]
    first, *others = finished
    estimator = "annealed" if annealed_alike(finished) else "importance"
    done = Comparison(finished, estimator, [difference_of(run, first, estimator) for run in others])
    if run_dir:
        open_run(run_dir, text, resume=None)
        _write(done, run_dir)
    return done


def _write(done: Comparison, run_dir: Path) -> None:
    first, *others = done.runs
    pairs = list(zip(others, done.differences, strict=True))
    rows = {run.name: d._asdict() for run, d in pairs}
    result = {"reference": first.name, "estimator": done.estimator, "unit": first.result["unit"]}
    with writing(run_dir):
        found = {run.name: d for run, d in pairs if not d.num_not_finite}
        if found:
            figures.paired_differences(
                {name: (d.mean, d.se, d.freedom) for name, d in found.items()},
                run_dir / "differences.png",
                f"log p(x) minus that of {first.name}, nats per {noun_of(first.result)}",
            )
        write_text(run_dir / "table.md", done.table() + "\n")
        write_json(run_dir / "result.json", result | {"differences": rows})


def annealed_alike(finished: Sequence[Run]) -> bool:
    """Whether all runs have annealed estimates of the same images."""
    images = [None if run.annealed is None else tuple(run.annealed["datum"].values) for run in finished]
    return images[0] is not None and len(set(images)) == 1


def difference_of(run: Run, reference: Run, estimator: str = "importance") -> Difference:
    """The difference of ``run`` to ``reference``, paired by datum; positive if ``run`` is better.

    Args:
        run, reference: two finished runs.
        estimator: ``importance``, or ``annealed``: importance sampling of all, corrected by the annealed ones.

    Raises:
        RunError: if their numbers mean different things.
    """
    return gaps_of(run, reference, estimator).difference()


def gaps_of(run: Run, reference: Run, estimator: str = "importance") -> Gaps:
    """The differences of :func:`difference_of` by datum.

    Raises:
        RunError: if their numbers mean different things.
    """
    for name in MUST_AGREE + (("num_samples",) if estimator == "importance" else ()):
        ours, theirs = run.result.get(name), reference.result.get(name)
        if ours != theirs:
            raise RunError(f"{run.name} and {reference.name} cannot be compared: {name} is {ours!r} and {theirs!r}")
    rough, rough_error = _minus(run, reference, "importance")
    if estimator == "importance":
        return Gaps(rough, rough_error, rough[:0], rough[:0], np.arange(0))
    fine, fine_error = _minus(run, reference, "annealed")
    among = np.searchsorted(run.importance["datum"].values, run.evidence["annealed"]["datum"].values)
    return Gaps(rough, rough_error, fine, fine_error, among)


def _minus(run: Run, reference: Run, estimator: str) -> tuple[np.ndarray, np.ndarray]:
    """Differences of log p(x) by one estimator, and their Monte Carlo errors."""
    ours, theirs = run.evidence[estimator], reference.evidence[estimator]
    with np.errstate(invalid="ignore"):  # of infinities there is no difference, which is NaN
        return (ours["log_px"] - theirs["log_px"]).values, np.hypot(ours["mc_se"].values, theirs["mc_se"].values)


def _share(run: Run) -> str:
    share = run.result["share_khat_above_threshold"]
    return "-" if share is None else f"{share:.0%}"
