"""A study: the same run for several contenders and seeds, and differences paired by seed and datum.

Usage: pyro-vae study --contenders.NAME 'ARGUMENTS' --contenders.OTHER 'ARGUMENTS' [options]

Each contender is a line of arguments of pyro-vae train; differences of log p(x) are those to the first one. Runs are
independent: --workers N does N at a time, and the same command, given again in other shells or as the tasks of an array
of jobs, on this machine or on others that share the directory, shares the work; --ray does the runs on a Ray cluster. A
run that fails does not stop the others; the same command with --resume runs it again.
"""

import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol, cast

import yaml

from pyro_vae.errors import RunError
from pyro_vae.runs.build import make
from pyro_vae.runs.directory import open_run, read_csv, run_dir_for, writing
from pyro_vae.runs.given import check_made, check_name
from pyro_vae.runs.parsing import parse, settings_text
from pyro_vae.runs.ray_cluster import Cluster
from pyro_vae.runs.ray_tasks import in_cluster
from pyro_vae.runs.reading import yaml_of
from pyro_vae.runs.reporting import report_study_after
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

MOST_SEEDS = 10_000


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
        ray: do the runs on a Ray cluster: one that is started on this machine, or at an address: auto, host:port or
            ray://host:port.
        cpus_per_run: of a node of the cluster, as many threads, at least 1.
        gpus_per_run: of a node of the cluster; 0.5 lets two runs share one.
        report: write report.html to run_dir at the end, a page on the study; its runs have one if their arguments ask
            for it, by --report true.
    """

    contenders: dict[str, str]
    common: str = ""
    seeds: int = 3
    run_dir: Path | None = None
    resume: bool = False
    workers: int = 1
    ray: bool | str = False
    cpus_per_run: int = 1
    gpus_per_run: float = 0
    report: bool = True

    def __post_init__(self):
        check_made(self)
        check_workers(self)
        if self.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {self.seeds}")
        if self.seeds > MOST_SEEDS:
            raise ValueError(f"--seeds must be at most {MOST_SEEDS:,}, got {self.seeds}")
        if not self.contenders:
            raise ValueError("--contenders: there is none")
        given = {"--common": self.common} | {f"--contenders.{name}": each for name, each in self.contenders.items()}
        for name in self.contenders:
            check_name("--contenders", name)
        for option, each in given.items():
            try:
                shlex.split(each if isinstance(each, str) else "")
            except ValueError as error:
                raise ValueError(f"{option}: {error}") from error
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
    ray: bool | str = False,
    cpus_per_run: int = 1,
    gpus_per_run: float = 0,
) -> Study:
    """Run every contender with every seed, and compare each with the first.

    Args:
        contenders: by name, settings made in Python, or the arguments of ``pyro-vae train`` that make them.
        common: more such arguments, for those contenders that are given as arguments.
        seeds: runs of each contender, at least 1.
        run_dir: directory to write, new or empty; None: one under runs/, named by time.
        resume: go on with the interrupted study in ``run_dir``; what is finished is not run again.
        workers: runs at a time, each in a process of its own with its part of the processor's threads, at least 1.
        ray: do the runs on a Ray cluster: True, one that is started on this machine; or its address.
        cpus_per_run, gpus_per_run: of a node of the cluster.

    Raises:
        RunError: for a mistake in the settings, or if the directory holds anything else.
    """
    given = cast(dict[str, str], dict(contenders))  # what stands for Settings there is only what a command line has
    try:
        place = None if run_dir is None else Path(run_dir)
        settings = StudySettings(given, common, seeds, place, resume, workers, ray, cpus_per_run, gpus_per_run)
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
    run_dir = run_dir_for(name, settings.run_dir)
    for contender in settings.contenders:  # a mistake in the last one is found now, not after hours
        with _named(contender):
            make("objective", _planned(settings, contender, 0)[0].objective)
    # the same command may be given in several shells: all but the first find the study there
    open_run(run_dir, text, settings.resume or holds(run_dir, text))
    directories = run_all(settings, run_dir)
    return Study(settings, run_dir, directories, summarize(directories))


def holds(run_dir: Path, text: str) -> bool:
    """Whether the directory holds this very study, on its way, or finished by others in the meantime."""
    saved = run_dir / "config.yaml"
    try:
        return yaml_of(saved) == yaml.safe_load(text)
    except RunError:
        return False  # what is wrong with it is told where it is opened


def run_all(settings: StudySettings, run_dir: Path) -> dict[str, list[Path]]:
    """Run every contender with every seed, one seed after the other; finished runs are not run again.

    Returns:
        The run directories of each contender, one per seed.

    Raises:
        RunError: if runs failed, when all others are finished; the table of these is printed.
    """
    directories = {name: [run_dir / _directory(name, s) for s in range(settings.seeds)] for name in settings.contenders}
    if failures := do_all(partial(_shared, settings), run_dir, settings):
        _print_finished(directories, failures)
        (first, reason), *others = failures.items()
        more = f"; {len(others)} more failed, see {run_dir / CLAIMS}/*.failed" if others else ""
        raise RunError(f"{first}: {reason}{more}; the same command with --run_dir {run_dir} --resume runs it again")
    return directories


def _print_finished(directories: Mapping[str, Sequence[Path]], failures: Mapping[str, str]) -> None:
    """Print the table of what is finished of a study, by the seeds that all in it have, and what failed."""
    done = {name: {s for s, path in enumerate(paths) if _is_done(path)} for name, paths in directories.items()}
    done = {name: seeds for name, seeds in done.items() if seeds}
    seeds = set.intersection(*done.values()) if done else set()
    with suppress(RunError):  # what is wrong with the files of a run, when others failed anyway
        if seeds:
            finished = summarize({name: [directories[name][seed] for seed in sorted(seeds)] for name in done})
            alike = [each for each in finished if each.reference == finished[0].name]
            print(f"\nOf seeds {', '.join(map(str, sorted(seeds)))}, without what failed:\n\n{summary_table(alike)}")
    print("\n" + "\n".join(f"failed: {directory}: {reason}" for directory, reason in failures.items()))


def _is_done(run: Path) -> bool:
    return (run / "result.json").exists()


class Workers(Protocol):
    """Who does the runs, as :class:`StudySettings` has it."""

    @property
    def workers(self) -> int: ...
    @property
    def ray(self) -> bool | str: ...
    @property
    def cpus_per_run(self) -> int: ...
    @property
    def gpus_per_run(self) -> float: ...


def check_workers(settings: Workers) -> None:
    """Refuse workers that cannot be.

    Raises:
        ValueError: naming the option.
    """
    if settings.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {settings.workers}")
    if settings.cpus_per_run < 1:
        raise ValueError(f"--cpus_per_run must be at least 1, got {settings.cpus_per_run}")
    if not 0 <= settings.gpus_per_run < math.inf:
        raise ValueError(f"--gpus_per_run must be at least 0 and finite, got {settings.gpus_per_run}")
    if settings.gpus_per_run > 1 and settings.gpus_per_run % 1:
        raise ValueError(f"--gpus_per_run above 1 must be a whole number, got {settings.gpus_per_run}")
    if settings.ray and settings.workers > 1:
        raise ValueError("--workers are processes on this machine, --ray is a cluster: choose one of them")
    if not settings.ray and (settings.cpus_per_run, settings.gpus_per_run) != (1, 0):
        raise ValueError("--cpus_per_run and --gpus_per_run are for --ray")


def do_all(shared: Callable[[Path], Shared], run_dir: Path, who: Workers) -> dict[str, str]:
    """Do all of a work in ``run_dir``, in this process, in several, or on a cluster.

    Returns:
        The reasons of what failed.

    Raises:
        KeyboardInterrupt: with a hint.
    """
    work = shared(run_dir)
    work.forget_failures()
    try:
        if who.ray:
            in_cluster(shared, run_dir, Cluster(who.ray, who.cpus_per_run, who.gpus_per_run))
        elif who.workers == 1:
            work.work(tell=lambda name: print(f"\n=== {name}"))
        else:
            workers = min(who.workers, len(work.names))
            in_processes(partial(shared, run_dir), workers, partial(_log, run_dir), work.status)
    except KeyboardInterrupt as interrupt:
        hint = f"go on with the same command and --run_dir {shlex.quote(str(run_dir))} --resume"
        raise KeyboardInterrupt(hint) from interrupt
    return work.failures()


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

    def is_done(directory: str) -> bool:
        return _is_done(run_dir / directory)

    return Shared(run_dir, list(runs), do, is_done, partial(status, run_dir))


def _log(run_dir: Path, directory: str) -> Path:
    """What a run of a worker prints."""
    return run_dir / f"{directory}.log"


def status(run_dir: Path, directory: str) -> str:
    """How far a run is that another process works on."""
    try:
        *_, last = read_csv(run_dir / directory / "metrics.csv")
        return f"epoch {last['epoch']}, validation ELBO {float(last['validation_elbo']):.2f}"
    except (RunError, ValueError, KeyError, TypeError):
        return "starts"


def _planned(settings: StudySettings, name: str, seed: int, directory: Path | None = None) -> tuple[Settings, str]:
    """The settings of one run of a contender, and their YAML text."""
    contender: str | Settings = settings.contenders[name]
    resume = directory is not None and (directory / "config.yaml").exists()
    if isinstance(contender, Settings):
        run = replace(contender, seed=seed, run_dir=directory, resume=resume, report=False)
        return run, settings_text(run)
    argv = ["--report=false", *settings.arguments(), *shlex.split(contender), f"--seed={seed}"]
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
    if settings.report:
        report_study_after(run_dir)
    return run_dir
