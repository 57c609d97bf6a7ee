"""Which estimator of log p(x) is right, at which cost, and which says so when it is not?

Usage: python -m experiments.evidence_benchmark [options]

Every estimator is run on every task at every budget; a task is a program whose log p(x) is known, by a closed form, a
quadrature or a sandwich. An error is counted against the stated one: an estimate is silently wrong if it is off by more
than four stated errors and called reliable all the same. A budget says about how often the model may be evaluated for
each datum, a gradient counting as two; what was spent is in the table. Seconds are those of programs that are not
compiled, several data at once. Tasks and estimators are told by --tasks and --estimators, and how to add one by
docs/evidence_benchmark.md.
"""

import math
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.ticker import NullFormatter

from experiments.evidence_benchmark.estimators import ESTIMATORS, run
from experiments.evidence_benchmark.task import Task
from experiments.evidence_benchmark.tasks import TASKS, tasks
from pyro_vae import ContractError, Evidence, cli, runs
from pyro_vae.infer.trees import data_size, select
from pyro_vae.runs import figures

COLUMNS = "estimator, budget, evaluations, tasks, median error, covered, unreliable, silently wrong, seconds"
NEGLIGIBLE = 1e-3
"""Nats; who is off by less is right, whatever error is stated."""


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark.

    Args:
        tasks: names of tasks; null: all.
        estimators: names of estimators; null: all.
        budgets: model evaluations per datum, each at least 100.
        num_estimates: data of each task that are taken, where it has so many; a task of fewer is run again, with other
            seeds, until there are as many estimates, at least 1.
        max_runs: how often a task of few data is run, at the most, at least 1.
        seed: of all estimates, at least 0.
        run_dir: directory to write, new or empty.
    """

    tasks: Sequence[str] | None = None
    estimators: Sequence[str] | None = None
    budgets: Sequence[int] = (1000, 4000, 16_000)
    num_estimates: int = 10
    max_runs: int = 3
    seed: int = 0
    run_dir: Path = Path("runs/evidence_benchmark")

    def __post_init__(self):
        for name, known in (("tasks", TASKS), ("estimators", ESTIMATORS)):
            chosen = getattr(self, name)
            if chosen is not None and not chosen:
                raise ValueError(f"--{name} must name at least one")
            for each in chosen or ():
                if each not in known:
                    raise ValueError(f"--{name}: there is no {each}; choose from {', '.join(known)}")
        if not self.budgets or any(budget < 100 for budget in self.budgets):
            raise ValueError(f"--budgets must all be at least 100, got {list(self.budgets)}")
        for name in ("num_estimates", "max_runs"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        runs.check_seed(self.seed)


@dataclass(frozen=True)
class Row:
    """An estimator on a task at a budget; what it refuses has a ``refusal`` and no numbers.

    Args:
        task, estimator, budget: which.
        refusal: why there is no estimate.
        num_estimates: how many there are, of all data and runs.
        evaluations: of the model, per estimate.
        seconds: per estimate.
        bias: mean of estimate minus reference, nats.
        error: root of its mean square.
        stated_error: root of the mean square of the stated ones.
        covered: the share of 95 % intervals that hold the reference.
        unreliable: the share of estimates that are called so.
        silently_wrong: the share that is off by more than four stated errors and is called reliable.
    """

    task: str
    estimator: str
    budget: int
    refusal: str | None = None
    num_estimates: int = 0
    evaluations: float = math.nan
    seconds: float = math.nan
    bias: float = math.nan
    error: float = math.nan
    stated_error: float = math.nan
    covered: float = math.nan
    unreliable: float = math.nan
    silently_wrong: float = math.nan


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the benchmark as told by ``argv``; return the directory written.

    Raises:
        RunError: for a mistake in ``argv``, or if a frozen VAE is not the one whose log p(x) is known.
    """
    settings, written = runs.parse(Settings, argv)
    runs.check_empty(settings.run_dir)
    runs.make_directory(settings.run_dir)
    start = time.perf_counter()
    rows, estimates, known = [], [], []
    for task in tasks(settings.tasks):
        task = some(task, settings.num_estimates)
        known.append({"task": task.name, "source": task.source, "largest_error": task.error.max().item()})
        for estimator in settings.estimators or ESTIMATORS:
            for budget in sorted(settings.budgets):
                row, found = measure(task, estimator, budget, settings)
                print(line(row), flush=True)
                rows.append(row)
                estimates += found
    seconds = time.perf_counter() - start
    result = {"tasks": known, "rows": [asdict(row) for row in rows], "seconds": seconds}
    with runs.writing(settings.run_dir):
        plot(rows, settings.run_dir / "benchmark.png")
        if estimates:
            runs.write_csv(settings.run_dir / "estimates.csv", estimates)
        runs.write_csv(settings.run_dir / "benchmark.csv", [asdict(row) for row in rows])
        runs.write_text(settings.run_dir / "config.yaml", written)
    return runs.conclude(settings.run_dir, report(rows, settings, seconds), result, torch.device("cpu"))


def some(task: Task, num: int) -> Task:
    """The task with its first ``num`` data."""
    among = slice(num)
    data = select(task.data, among)
    return Task(task.name, task.model, task.guide, data, task.reference[among], task.error[among], task.source)


def measure(task: Task, estimator: str, budget: int, settings: Settings) -> tuple[Row, list[dict[str, Any]]]:
    """One row, and an entry for each of its estimates."""
    size = data_size(task.data)
    num_runs = min(settings.max_runs, math.ceil(settings.num_estimates / size))
    found, seconds = [], 0.0
    for each in range(num_runs):
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that some are unreliable is what is counted here
                evidence = run(task, estimator, budget, settings.seed + each)
        except ContractError as error:
            return Row(task.name, estimator, budget, refusal=" ".join(str(error).split())), []
        seconds += time.perf_counter() - start
        found += entries(task, evidence, each)
    names = {"task": task.name, "estimator": estimator, "budget": budget}
    return Row(**names, seconds=seconds / len(found), **summary(found)), [names | each for each in found]


def entries(task: Task, evidence: Evidence, number: int) -> list[dict[str, Any]]:
    """The estimates of one run, each beside its reference."""
    fields = (task.reference, task.error, *(getattr(evidence, name) for name in ("log_px", "mc_se", "reliable")))
    names = ("reference", "reference_error", "log_px", "mc_se", "reliable", "evaluations")
    columns = [each.tolist() for each in (*fields, evidence.evaluations) if each is not None]
    rows = zip(*columns, strict=True)
    return [{"run": number, "datum": i} | dict(zip(names, row, strict=True)) for i, row in enumerate(rows)]


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of a row, from its estimates; one that is NaN or infinite is off by more than any stated error."""
    errors = [each["log_px"] - each["reference"] for each in found]

    def within(each: dict[str, Any], error: float, factor: float) -> bool:
        return abs(error) <= factor * each["mc_se"] + each["reference_error"] + NEGLIGIBLE

    pairs = list(zip(found, errors, strict=True))
    return {
        "num_estimates": len(found),
        "evaluations": statistics.fmean(each["evaluations"] for each in found),
        "bias": statistics.fmean(errors),
        "error": math.sqrt(statistics.fmean(error**2 for error in errors)),
        "stated_error": math.sqrt(statistics.fmean(each["mc_se"] ** 2 for each in found)),
        "covered": statistics.fmean(within(*pair, 1.96) for pair in pairs),
        "unreliable": statistics.fmean(not each["reliable"] for each in found),
        "silently_wrong": statistics.fmean(each["reliable"] and not within(each, e, 4) for each, e in pairs),
    }


# Tables and figure


def line(row: Row) -> str:
    """A row as it is printed when it is done."""
    text = f"{row.task}, {row.estimator}, {row.budget:,}: "
    return text + (f"refused, {row.refusal}" if row.refusal else f"{cell(row)} nats, {row.seconds:.2f} seconds each")


def report(rows: Sequence[Row], settings: Settings, seconds: float) -> str:
    """What estimators do on average, and then each task."""
    sections = [
        "Errors are those of log p(x) of one datum against its reference, in nats. Covered: the share of 95 %\n"
        "intervals that hold it. Silently wrong: off by more than four stated errors and called reliable. Evaluations\n"
        "and seconds are for each datum.",
        overview(rows),
    ]
    for budget in sorted(settings.budgets):
        here = [row for row in rows if row.budget == budget]
        title = f"## A budget of {budget:,} evaluations"
        legend = (
            "Root mean square error; ! some estimates are silently wrong, ? some are called unreliable, - the\n"
            "estimator refuses the task, or cannot do with the budget."
        )
        sections.append(f"{title}\n\n{legend}\n\n{by_task(here)}")
    sections.append(f"{seconds:.0f} seconds in all.")
    return "\n\n".join(sections)


def overview(rows: Sequence[Row]) -> str:
    """A Markdown table of estimators and budgets; shares are of all estimates, costs are means over tasks."""
    lines: list[Sequence[str]] = [COLUMNS.split(", ")]
    for estimator in dict.fromkeys(row.estimator for row in rows):
        for budget in sorted({row.budget for row in rows}):
            here = [row for row in rows if (row.estimator, row.budget) == (estimator, budget) and not row.refusal]
            if not here:
                continue
            total = sum(row.num_estimates for row in here)
            shares = (
                sum(getattr(row, name) * row.num_estimates for row in here) / total
                for name in ("covered", "unreliable", "silently_wrong")
            )
            lines.append(
                (
                    estimator,
                    f"{budget:,}",
                    f"{statistics.fmean(row.evaluations for row in here):,.0f}",
                    f"{len(here)}",
                    f"{statistics.median(_known(row.error) for row in here):.3f}",
                    *(f"{share:.1%}" for share in shares),
                    f"{statistics.fmean(row.seconds for row in here):.3f}",
                )
            )
    return runs.table(lines)


def by_task(rows: Sequence[Row]) -> str:
    """A Markdown table of tasks and estimators, at one budget."""
    found = {(row.task, row.estimator): row for row in rows}
    estimators = list(dict.fromkeys(row.estimator for row in rows))
    lines = [["task", *estimators]]
    for task in dict.fromkeys(row.task for row in rows):
        lines.append([task, *(cell(found[task, estimator]) for estimator in estimators)])
    return runs.table(lines)


def cell(row: Row) -> str:
    """The error, and what is to be known of it."""
    if row.refusal:
        return "-"
    return f"{row.error:.3f}" + " !" * (row.silently_wrong > 0) + " ?" * (row.unreliable > 0)


def _known(error: float) -> float:
    """An error that is NaN counts as infinite."""
    return math.inf if math.isnan(error) else error


def plot(rows: Sequence[Row], path: Path) -> None:
    """Median errors over tasks, at least ``NEGLIGIBLE``, against their costs, and the share that is silently wrong."""
    columns = {"evaluations": "model evaluations per datum", "seconds": "seconds per datum"}
    with figures.figure(path, 13, 4.2, columns=3) as panels:
        for estimator in dict.fromkeys(row.estimator for row in rows):
            points = []
            for budget in sorted({row.budget for row in rows}):
                here = [row for row in rows if (row.estimator, row.budget) == (estimator, budget) and not row.refusal]
                if here:
                    points.append(
                        {
                            "error": max(NEGLIGIBLE, statistics.median(_known(row.error) for row in here)),
                            "wrong": 100 * statistics.fmean(row.silently_wrong for row in here),
                            **{name: statistics.median(getattr(row, name) for row in here) for name in columns},
                        }
                    )
            if points:
                for axes, cost in zip(panels, (*columns, "evaluations"), strict=True):
                    value = "wrong" if axes is panels[2] else "error"
                    at = [point[cost] for point in points]
                    axes.plot(at, [point[value] for point in points], marker="o", ms=4, label=estimator)
        for axes, label in zip(panels, (*columns.values(), columns["evaluations"]), strict=True):
            axes.set(xscale="log", xlabel=label)
            axes.xaxis.set_minor_formatter(NullFormatter())
        for axes in panels[:2]:
            axes.set(yscale="log", ylabel="root mean square error, nats, median of tasks")
        panels[2].set(ylabel="silently wrong, % of estimates, mean of tasks", ylim=(-0.1, None))
        panels[2].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


if __name__ == "__main__":
    cli.guarded(main)
