"""A study: the same run for several contenders and seeds, and differences paired by seed and datum.

Usage: pyro-vae study --contenders.NAME 'ARGUMENTS' --contenders.OTHER 'ARGUMENTS' [options]

Each contender is a line of arguments of pyro-vae train; differences of log p(x) are those to the first one. Runs are
independent: --workers N does N at a time, and the same command, given again in other shells or as the tasks of an array
of jobs, on this machine or on others that share the directory, shares the work. A run that fails does not stop the
others; the same command with --resume runs it again.
"""

import csv
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import yaml

from pyro_vae.errors import RunError
from pyro_vae.runs.build import make
from pyro_vae.runs.directory import open_run, writing
from pyro_vae.runs.parsing import parse, settings_text
from pyro_vae.runs.settings import Settings
from pyro_vae.runs.summaries import (
    Summary,
    best_by_validation,
    choice,
    estimators,
    forest,
    summarize,
    summary_table,
    write_study,
)
from pyro_vae.runs.training import train
from pyro_vae.runs.workers import CLAIMS, Shared, in_processes


@dataclass(frozen=True)
class StudySettings:
    """Settings that every study has.

    Args:
        contenders: for each name, the arguments of pyro-vae train that make it; the first is the reference. Each is
            given by --contenders.NAME 'ARGUMENTS'.
        common: arguments of pyro-vae train for all runs; --help there lists them.
        seeds: runs of each contender, at least 1.
        run_dir: directory to write, new or empty; null: one under runs/, named by time.
        resume: go on with the interrupted study in --run_dir; what is finished is not run again.
        workers: runs at a time, each in a process of its own with its part of the processor's threads, at least 1.
    """

    contenders: dict[str, str]
    common: str = ""
    seeds: int = 3
    run_dir: Path | None = None
    resume: bool = False
    workers: int = 1

    def __post_init__(self):
        if self.workers < 1:
            raise ValueError(f"--workers must be at least 1, got {self.workers}")
        if self.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {self.seeds}")
        if not self.contenders:
            raise ValueError("--contenders: there is none")
        slugs = [slug(name) for name in self.contenders]
        if len(set(slugs)) < len(slugs) or not all(slugs):
            raise ValueError("--contenders: names must differ in their letters and digits, which name directories")

    def arguments(self) -> list[str]:
        """Arguments of pyro-vae train for all runs."""
        return shlex.split(self.common)


class Study(NamedTuple):
    """A finished study: its settings, its directory, the run directories of each contender, and what they say."""

    settings: StudySettings
    run_dir: Path
    directories: dict[str, list[Path]]
    summaries: list[Summary]

    @property
    def best(self) -> Summary:
        """The contender that the validation data choose, of those that can be compared with the first one."""
        return best_by_validation(self.summaries)


def study(
    contenders: Mapping[str, str | Settings],
    common: str = "",
    seeds: int = 3,
    run_dir: Path | str | None = None,
    resume: bool = False,
    workers: int = 1,
) -> Study:
    """Run every contender with every seed, and compare each with the first.

    Args:
        contenders: by name, settings made in Python, or the arguments of ``pyro-vae train`` that make them.
        common: more such arguments, for those contenders that are given as arguments.
        seeds: runs of each contender, at least 1.
        run_dir: directory to write, new or empty; None: one under runs/, named by time.
        resume: go on with the interrupted study in ``run_dir``; what is finished is not run again.
        workers: runs at a time, each in a process of its own with its part of the processor's threads, at least 1.

    Raises:
        RunError: for a mistake in the settings, or if the directory holds anything else.
    """
    given = cast(dict[str, str], dict(contenders))  # what stands for Settings there is only what a command line has
    try:
        settings = StudySettings(given, common, seeds, None if run_dir is None else Path(run_dir), resume, workers)
    except ValueError as error:
        raise RunError(str(error)) from error
    content = {"contenders": {}, "common": common, "seeds": seeds}
    for name, each in contenders.items():
        with _named(name):
            content["contenders"][name] = each if isinstance(each, str) else yaml.safe_load(settings_text(each))
    done = _run(settings, yaml.safe_dump(content, sort_keys=False), "study")
    report_study(done, "log p(x) of each contender, minus that of the first")
    return done


def run_study(settings: type[StudySettings], argv: Sequence[str] | None, name: str, prog: str | None = None) -> Study:
    """Run the study that ``argv`` asks for, in its directory, made, or with ``--resume`` found.

    Raises:
        RunError: for a mistake in ``argv``, or if the directory holds anything else.
    """
    return _run(*parse(settings, argv, prog=prog), name)


def _run(settings: StudySettings, text: str, name: str) -> Study:
    run_dir = settings.run_dir or Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    for contender in settings.contenders:  # a mistake in the last one is found now, not after hours
        with _named(contender):
            make("objective", _planned(settings, contender, 0)[0].objective)
    # the same command may be given in several shells: all but the first find the study there
    open_run(run_dir, text, settings.resume or _holds(run_dir, text))
    directories = run_all(settings, run_dir)
    return Study(settings, run_dir, directories, summarize(directories))


def _holds(run_dir: Path, text: str) -> bool:
    """Whether the directory holds this very study, on its way."""
    saved = run_dir / "config.yaml"
    try:
        return not (run_dir / "result.json").exists() and yaml.safe_load(saved.read_text()) == yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False  # what is wrong with it is told where it is opened


def run_all(settings: StudySettings, run_dir: Path) -> dict[str, list[Path]]:
    """Run every contender with every seed, one seed after the other; finished runs are not run again.

    Returns:
        The run directories of each contender, one per seed.

    Raises:
        RunError: if runs failed, when all others are finished.
    """
    shared = partial(_shared, settings, run_dir)
    work = shared()
    work.forget_failures()
    try:
        if settings.workers == 1:
            work.work(tell=lambda name: print(f"\n=== {name}"))
        else:
            status = partial(_status, run_dir)
            in_processes(shared, min(settings.workers, len(work.names)), partial(_log, run_dir), status)
    except KeyboardInterrupt as interrupt:
        hint = f"go on with the same command and --run_dir {shlex.quote(str(run_dir))} --resume"
        raise KeyboardInterrupt(hint) from interrupt
    if failures := work.failures():
        (first, reason), *others = failures.items()
        more = f"; {len(others)} more failed, see {run_dir / CLAIMS}/*.failed" if others else ""
        raise RunError(f"{first}: {reason}{more}; the same command with --run_dir {run_dir} --resume runs it again")
    return {name: [run_dir / _directory(name, s) for s in range(settings.seeds)] for name in settings.contenders}


def _directory(name: str, seed: int) -> str:
    """Where in the study a run is."""
    return f"{slug(name)}-seed{seed}"


def _shared(settings: StudySettings, run_dir: Path) -> Shared:
    """The runs of a study, as work that processes share."""
    runs = {_directory(name, seed): (name, seed) for seed in range(settings.seeds) for name in settings.contenders}

    def do(directory: str) -> None:
        name, seed = runs[directory]
        with _named(name):
            train(*_planned(settings, name, seed, run_dir / directory))

    return Shared(run_dir, list(runs), do, lambda directory: (run_dir / directory / "result.json").exists())


def _log(run_dir: Path, directory: str) -> Path:
    """What a run of a worker prints."""
    return run_dir / f"{directory}.log"


def _status(run_dir: Path, directory: str) -> str:
    """How far a run is that another process works on."""
    try:
        *_, last = csv.DictReader((run_dir / directory / "metrics.csv").read_text().splitlines())
        return f"epoch {last['epoch']}, validation ELBO {float(last['validation_elbo']):.2f}"
    except (OSError, ValueError, KeyError):
        return "starts"


def _planned(settings: StudySettings, name: str, seed: int, directory: Path | None = None) -> tuple[Settings, str]:
    """The settings of one run of a contender, and their YAML text."""
    contender: str | Settings = settings.contenders[name]
    resume = directory is not None and (directory / "config.yaml").exists()
    if isinstance(contender, Settings):
        run = replace(contender, seed=seed, run_dir=directory, resume=resume)
        return run, settings_text(run)
    argv = [*settings.arguments(), *shlex.split(contender), f"--seed={seed}"]
    return parse(Settings, argv + [f"--run_dir={directory}"] * (directory is not None) + ["--resume"] * resume)


@contextmanager
def _named(contender: str) -> Iterator[None]:
    """Context: a mistake inside is that of a contender."""
    try:
        yield
    except RunError as error:
        raise RunError(f"{contender}: {error}") from error


def slug(name: str) -> str:
    """A name as a directory's: ``Gaussian, per pixel`` becomes ``Gaussian-per-pixel``."""
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())


def report_study(done: Study, title: str, more: Mapping[str, Sequence[str]] | None = None, remarks: str = "") -> Path:
    """Write table and figure of a study whose contenders can all be compared; return its directory.

    ``more`` are columns of the table by their headers; ``remarks`` stand below it.

    Raises:
        RunError: if they cannot.
    """
    settings, run_dir, directories, summaries = done
    if odd := next((s.name for s in summaries if s.reference != summaries[0].name), None):
        raise RunError(f"--contenders: {odd} and {summaries[0].name} are scored on other data, or in another unit")
    if len(summaries) > 1:
        with writing(run_dir):
            forest(summaries, run_dir / "differences.png", title)
    per = summaries[0].unit.split(",")[0]
    lines = [
        f"{per[0].upper()}{per[1:]}, larger is better; means over seeds 0 to {settings.seeds - 1}, with standard",
        f"errors over seeds and over images. log p(x) is {estimators(summaries)}; importance sampling is too low "
        "where Pareto k is bad.",
        "",
        summary_table(summaries, more),
        *choice(summaries),
        *(["", remarks] if remarks else []),
    ]
    write_study(run_dir, "\n".join(lines), summaries, directories)
    return run_dir
