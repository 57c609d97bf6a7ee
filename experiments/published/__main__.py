"""Do we get what was published? The tables of two papers, each row trained and scored anew, at the budget given.

Usage: python -m experiments.published [options]

Tables: iwae, Burda et al. (2016), Table 1, MNIST and Omniglot; vampprior, Tomczak & Welling (2018), Table 1, VAE on
static and dynamic MNIST. Data, networks, bound and the customary 5,000 importance samples are those of the papers; so
is the schedule with --schedule paper, for a GPU; short has a rate that falls at the end, and as many epochs as --epochs
or --hours allow. Beside the customary number stands an annealed one, which is higher where the guide fits badly. Before
anything is trained, a few steps of each row are timed, and what all will take is printed; --estimate stops there.
With no options: the rows of MNIST with one stochastic layer, each trained for 12 minutes, scored in some more.
"""

import contextlib
import fnmatch
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from experiments.published.plan import Budget, Plan, in_turn, measured, plan_table
from experiments.published.report import Made, check_common, check_is_of, conclude
from experiments.published.rows import TABLES, Row, Schedule, ScheduleName, Table
from pyro_vae import cli, runs
from pyro_vae.runs.reading import json_of
from pyro_vae.runs.studies import holds, run_all


@dataclass(frozen=True)
class Settings:
    """Settings of one remake.

    Args:
        tables: iwae, vampprior, or both.
        rows: names of rows of these tables, or patterns such as mnist-1-* or *-k50; null: a few of each table.
        schedule: paper: as published; short: one cycle of the rate, or of vampprior a constant one that falls linearly
            at the end, and the KL divergence warmed up over the first tenth; turns: short, of iwae alone,
            with the ELBO of one sample in place of bounds of several for the first 80 % of the epochs.
        epochs: of each row, at least 1; null: all of the schedule paper, or as --hours allows.
        hours: of training each row, positive, at most all epochs of the schedule; null: as --epochs says, and if that
            says nothing, 0.2 with the schedule short.
        common: arguments of pyro-vae train for all rows, in place of those of the schedule, such as '--batch_size 250
            --lr 5e-3 --precision bfloat16'; not what a row is made of: data, networks, bound.
        seeds: runs of each row, at least 1.
        evidence: how test images are scored.
        finished: by the name of a row, the directory of a run that was trained elsewhere, or by another schedule; it
            is not trained again.
        estimate: print how long it would take, and stop.
        data_dir: folder of data files and downloads; null: the user's cache folder.
        device: auto takes a CUDA device if there is one; or cpu, cuda, cuda:1.
        run_dir: directory to write, new or empty; null: one under runs/, named by time.
        resume: go on with the interrupted remake in --run_dir; what is finished is not run again.
        workers: runs at a time, each in a process of its own with its part of the processor's threads, at least 1.
    """

    DESCRIPTION: ClassVar[str | None] = __doc__

    tables: Sequence[str] = ("iwae",)
    rows: Sequence[str] | None = None
    schedule: ScheduleName = "short"
    epochs: int | None = None
    hours: float | None = None
    common: str = ""
    seeds: int = 1
    evidence: runs.EvidenceSettings = field(
        default_factory=lambda: runs.EvidenceSettings(num_samples=5000, annealed_images=500)
    )
    finished: dict[str, Path] = field(default_factory=dict)
    estimate: bool = False
    data_dir: Path | None = None
    device: str = "auto"
    run_dir: Path | None = None
    resume: bool = False
    workers: int = 1

    def __post_init__(self):
        if self.workers < 1:
            raise ValueError(f"--workers must be at least 1, got {self.workers}")
        if self.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {self.seeds}")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"--epochs must be at least 1, got {self.epochs}")
        if self.hours is not None and not 0 < self.hours < math.inf:
            raise ValueError(f"--hours must be positive and finite, got {self.hours}")
        if self.epochs is not None and self.hours is not None:
            raise ValueError("--epochs and --hours are two budgets: choose one of them")

    def budget(self, schedule: Schedule) -> Budget:
        """The epochs of a row of this schedule."""
        hours = self.hours
        if self.epochs is None and hours is None and schedule.epochs is None:
            hours = 0.2
        return Budget(self.epochs, hours, schedule.epochs)


def main(argv: Sequence[str] | None = None, tables: Mapping[str, Table] = TABLES) -> Path | None:
    """Make the tables as told by ``argv``; return the directory written, None of an estimate alone.

    Raises:
        RunError: for a mistake in ``argv``, for runs of other data, or if runs failed, when all others are finished.
    """
    settings, text = runs.parse(Settings, argv, prog="python -m experiments.published")
    chosen = dict(_chosen(settings, tables))
    elsewhere = _elsewhere(settings, chosen)
    todo = {name: each for name, each in chosen.items() if name not in elsewhere}
    for each in chosen.values() if settings.common else ():
        check_common(each.row, each.schedule)
    if settings.estimate:
        print(plan_table(_plans(settings, todo), settings.seeds, settings.workers))
        return None
    run_dir = runs.run_dir_for("published", settings.run_dir)
    runs.open_run(run_dir, text, settings.resume or holds(run_dir, text))
    plans = _kept_plans(settings, todo, run_dir)
    directories = dict(elsewhere)
    if todo:
        study = runs.StudySettings(
            {name: each.row.arguments(each.schedule, plans[name].epochs) for name, each in todo.items()},
            shlex.join(_common(settings)),
            settings.seeds,
            workers=settings.workers,
        )
        directories |= run_all(study, run_dir)
    made = [
        Made(
            each.row, [check_is_of(each.row, runs.load(path)) for path in directories[name]], each.table, each.schedule
        )
        for name, each in chosen.items()
    ]
    return conclude(run_dir, made, settings.data_dir, elsewhere)


@dataclass(frozen=True)
class Chosen:
    """A row that is to be made, the table it is of, and how it is trained."""

    row: Row
    table: Table
    schedule: Schedule


def _chosen(settings: Settings, tables: Mapping[str, Table]) -> Iterator[tuple[str, Chosen]]:
    """The rows asked for, by name."""
    if not settings.tables or not set(settings.tables) <= set(tables):
        raise runs.RunError(f"--tables: expected some of {', '.join(tables)}, got {list(settings.tables)}")
    known = [row.name for name in settings.tables for row in tables[name].rows]
    for pattern in settings.rows or ():
        if not fnmatch.filter(known, pattern):
            raise runs.RunError(f"--rows {pattern}: there is no such row, only {', '.join(known)}")
    patterns = [*(settings.rows or ()), *settings.finished]
    for table in (tables[name] for name in settings.tables):
        for row in table.rows:
            if any(fnmatch.fnmatchcase(row.name, each) for each in patterns or table.usual):
                yield row.name, Chosen(row, table, _schedule(settings, table))


def _schedule(settings: Settings, table: Table) -> Schedule:
    """The schedule asked for, with ``common`` in place of what it says otherwise."""
    if settings.schedule not in table.schedules:
        raise runs.RunError(f"--schedule {settings.schedule}: {table.title} has {', '.join(table.schedules)}")
    schedule, common = table.schedules[settings.schedule], settings.common
    if not common:
        return schedule
    try:
        argv = shlex.split(f"--batch_size {schedule.batch_size} {common}")
    except ValueError as error:
        raise runs.RunError(f"--common: {error}") from error
    batch_size = runs.parse(runs.Settings, argv)[0].batch_size
    words = *schedule.words, f"In place of what is said here about the schedule: {common}."
    return schedule._replace(batch_size=batch_size, arguments=f"{schedule.arguments} {common}", words=words)


def _elsewhere(settings: Settings, chosen: Mapping[str, Chosen]) -> dict[str, list[Path]]:
    """The directories of rows that are finished elsewhere, checked before anything is trained."""
    for name, path in settings.finished.items():
        if name not in chosen:
            raise runs.RunError(f"--finished.{name}: there is no such row in --tables {list(settings.tables)}")
        check_is_of(chosen[name].row, runs.load(path))
    return {name: [path] for name, path in settings.finished.items()}


def _common(settings: Settings) -> list[str]:
    """Arguments of pyro-vae train for all rows."""
    place = [f"--device={settings.device}"]
    place += [] if settings.data_dir is None else [f"--data_dir={settings.data_dir}"]
    return [*place, *_options("--evidence.", asdict(settings.evidence))]


def _options(prefix: str, values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _options(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}={value if isinstance(value, str) else json.dumps(value)}"


def _plans(settings: Settings, todo: Mapping[str, Chosen]) -> dict[str, Plan]:
    """What each row takes here, timed with the threads that a run will have."""
    threads, plans = torch.get_num_threads(), {}
    torch.set_num_threads(max(1, threads // settings.workers))
    try:
        for name, each in todo.items():
            print(f"timing a few steps of {name}")
            plans[name] = _plan(settings, each.row, each.schedule)
            if each.schedule.first and each.row.takes_turns:
                cheap = _plan(settings, replace(each.row, objective="--objective ELBO"), each.schedule)
                plans[name] = in_turn(cheap, plans[name], each.schedule.first, settings.budget(each.schedule))
    finally:
        torch.set_num_threads(threads)
    return plans


def _plan(settings: Settings, row: Row, schedule: Schedule) -> Plan:
    budget = settings.budget(schedule)
    alone = schedule._replace(first=0.0, warmup=0.0)  # the bound of the row, with none before it
    argv = [*_common(settings), *shlex.split(row.arguments(alone, budget.epochs or 1))]
    return measured(runs.parse(runs.Settings, argv)[0], budget)


def _kept_plans(settings: Settings, todo: Mapping[str, Chosen], run_dir: Path) -> dict[str, Plan]:
    """Plans, made now or, by an interrupted command or another process, before: epochs do not change on the way."""
    path = run_dir / "plan.json"
    if not path.exists() and todo:
        made = {name: plan._asdict() for name, plan in _plans(settings, todo).items()}
        with runs.writing(run_dir), contextlib.suppress(FileExistsError):  # another process was first
            runs.write_text(path, json.dumps(made, indent=2) + "\n", new=True)
    plans = {name: Plan(**each) for name, each in json_of(path).items()} if todo else {}
    if lost := [name for name in todo if name not in plans]:
        raise runs.RunError(f"{path} has no plan of {', '.join(lost)}: start in another --run_dir")
    if plans:
        print(f"\n{plan_table(plans, settings.seeds, settings.workers)}\n")
    return plans


if __name__ == "__main__":
    cli.guarded(main)
