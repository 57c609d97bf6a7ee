"""A search for settings: a trial is a run, and what the validation data say chooses; the test set is asked once.

Usage: pyro-vae study --search grid --space.NAME '[VALUE, VALUE]' [--space.OTHER ...] [options]
       pyro-vae study --search random --space.lr 'loguniform(1e-4, 1e-2)' --trials 30 [options]

grid takes all combinations of the lists; random draws each setting of a trial from its list, or from uniform(low,
high), loguniform(low, high) or int(low, high), by seed and trial; optuna learns from finished trials where to look
next (its TPE). Any setting of pyro-vae train can be searched over; a value in a list may bring options of its own, as
in --space.prior '[StandardNormal, GaussianMixture --prior.components 100]'. Each trial is a run directory: --workers,
--ray, other shells and --resume are those of a study. The table shows validation values; the test value is that of
the chosen trial alone.
"""

import itertools
import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import yaml

from pyro_vae.data.datasets import Data
from pyro_vae.data.fetched import cache_folder
from pyro_vae.data.tables import densities
from pyro_vae.errors import RunError, need_extra
from pyro_vae.runs.build import Model, build, load_dataset, make
from pyro_vae.runs.directory import (
    check_run_dir,
    noun_of,
    open_run,
    run_dir_for,
    table,
    write_json,
    write_text,
    writing,
)
from pyro_vae.runs.loading import load
from pyro_vae.runs.parsing import PLACE, parse, settings_text
from pyro_vae.runs.reading import text_of
from pyro_vae.runs.reporting import report_study_after
from pyro_vae.runs.scoring import best, number, unit_of
from pyro_vae.runs.settings import Settings, check_seed
from pyro_vae.runs.spaces import MOST, grid, options, read_space
from pyro_vae.runs.studies import check_workers, do_all, holds, status
from pyro_vae.runs.training import train
from pyro_vae.runs.trials import PLANS, chosen, validation
from pyro_vae.runs.workers import Shared

LATER = ("trials", "by")
"""Settings of a search that may change when it is gone on with."""
CHECKED = 200
"""Trials that are built before the first one runs; of more, the ends and choices of each setting alone."""


@dataclass(frozen=True)
class SearchSettings:
    """Settings of a search.

    Args:
        search: grid: all combinations; random; optuna: TPE, which needs the extra search.
        space: for each setting of pyro-vae train, what it may be: a list, uniform(low, high), loguniform(low, high) or
            int(low, high). Each is given by --space.NAME.
        common: arguments of pyro-vae train for all trials; --help there lists them.
        trials: how many, of random and optuna; more than before with --resume go on.
        by: what the validation data choose by.
        seed: of the draws, at least 0; the seed of each run is that in --common.
        run_dir: directory to write, new or empty; null: one under runs/, named by time.
        resume: go on with the interrupted search in --run_dir; what is finished is not run again.
        workers: trials at a time, each in a process of its own with its part of the processor's threads, at least 1.
        ray: do the trials on a Ray cluster: one that is started on this machine, or at an address: auto, host:port or
            ray://host:port.
        cpus_per_run: of a node of the cluster, as many threads, at least 1.
        gpus_per_run: of a node of the cluster; 0.5 lets two trials share one.
        report: write report.html to run_dir at the end, a page on the search; its trials have none.
    """

    MAIN: ClassVar[tuple[str, ...]] = (
        *("search", "space", "common", "trials", "by", "seed", "run_dir", "resume", "workers", "ray"),
        "report",
    )

    search: Literal["grid", "random", "optuna"]
    space: dict[str, str]
    common: str = ""
    trials: int | None = None
    by: Literal["validation_log_likelihood", "validation_elbo"] = "validation_log_likelihood"
    seed: int = 0
    run_dir: Path | None = None
    resume: bool = False
    workers: int = 1
    ray: bool | str = False
    cpus_per_run: int = 1
    gpus_per_run: float = 0
    report: bool = True

    def __post_init__(self):
        check_workers(self)
        check_seed(self.seed)
        if not self.space:
            raise ValueError("--search needs a space: --space.NAME '[VALUE, VALUE]', such as --space.lr '[1e-3, 1e-2]'")
        for name in self.space:
            if name.split(".")[0] in (*PLACE, "config", "evidence"):
                raise ValueError(
                    f"--space.{name}: a search is over what a run is, not where it is nor how it is scored"
                )
        dimensions = read_space(self.space)
        if self.search == "grid":
            grid(dimensions)
            if self.trials is not None:
                raise ValueError("--trials is for --search random and optuna; a grid has as many as there are")
        elif self.trials is None:
            raise ValueError(f"--search {self.search} needs --trials, how many")
        elif not 1 <= self.trials <= MOST:
            raise ValueError(f"--trials must be from 1 to {MOST:,}, got {self.trials}")

    def arguments(self) -> list[str]:
        """Arguments of pyro-vae train for all trials."""
        try:
            return shlex.split(self.common)
        except ValueError as error:
            raise RunError(f"--common: {error}") from error

    def names(self) -> list[str]:
        """The directory of each trial."""
        number = len(grid(read_space(self.space))) if self.search == "grid" else self.trials or 0
        return [f"trial-{i:04}" for i in range(number)]


class Trial(NamedTuple):
    """One trial: its directory, what was chosen for it, its validation value, or why it has none."""

    name: str
    values: dict[str, str]
    validation: float | None
    validation_se: float | None
    seconds: float | None
    reason: str


class Search(NamedTuple):
    """A finished search: its settings, its directory, and all trials, the best one first."""

    settings: SearchSettings
    run_dir: Path
    trials: list[Trial]

    @property
    def best(self) -> Trial:
        """The trial that the validation data choose."""
        return self.trials[0]


def search(kind: str, space: Mapping[str, Any], common: str = "", **settings: Any) -> Search:
    """Search for the settings that the validation data choose.

    Args:
        kind: grid, random or optuna.
        space: by the name of a setting, a list of values, or a text such as ``"loguniform(1e-4, 1e-2)"``.
        common: arguments of ``pyro-vae train`` for all trials.
        settings: others of :class:`SearchSettings`, by name.

    Raises:
        RunError: for a mistake in the settings, before any trial, or if all trials failed.
    """
    texts = {name: each if isinstance(each, str) else yaml.safe_dump(list(each)) for name, each in space.items()}
    if isinstance(place := settings.get("run_dir"), str):
        settings["run_dir"] = Path(place)
    try:
        made = SearchSettings(kind, texts, common, **settings)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise RunError(str(error)) from error
    return _run(made, settings_text(made))


def run_search(argv: Sequence[str], prog: str | None = None) -> Search:
    """Do the search that ``argv`` asks for.

    Raises:
        RunError: for a mistake in ``argv``, before any trial, or if all trials failed.
    """
    return _run(*parse(SearchSettings, _space_in_one(argv), prog=prog))


def _space_in_one(argv: Sequence[str]) -> list[str]:
    """The command line with all ``--space.NAME TEXT`` as one ``--space``: names have dots, and texts are no YAML."""
    result, space, words = [], {}, iter(argv)
    for word in words:
        name, equals, text = word.partition("=")
        if name.startswith("--space.") and name != "--space.help":
            text = text if equals else next(words, "")
            if not text.strip():
                raise RunError(f"{name}: the value is empty")
            space[name.removeprefix("--space.")] = text
        else:
            result.append(word)
    known = any(word.partition("=")[0] in ("--space", "--config", "--resume") for word in result)
    return result + [f"--space={json.dumps(space)}"] * bool(space or not known)


def _run(settings: SearchSettings, text: str) -> Search:
    if settings.search == "optuna":
        need_extra("search", ["optuna"])
    run_dir = run_dir_for("search", settings.run_dir)
    resume = settings.resume or holds(run_dir, text)
    reread = partial(_reread, text)
    check_run_dir(run_dir, text, resume, reread)
    _check(settings)
    open_run(run_dir, text, resume, reread)
    if resume and text_of(run_dir / "config.yaml") != text:
        with writing(run_dir):
            write_text(run_dir / "config.yaml", text)
    failures = do_all(partial(_shared, settings), run_dir, settings)
    done = Search(settings, run_dir, _ranked(settings, run_dir, failures))
    _report(done)
    if settings.report:
        report_study_after(run_dir)
    return done


def _reread(text: str, saved: Path) -> str:
    """The settings of the search that is there, but for those that may change."""
    before, now = yaml.safe_load(text_of(saved)), yaml.safe_load(text)
    if isinstance(before, dict):
        before |= {name: now[name] for name in LATER if name in before}
    return yaml.safe_dump(before, sort_keys=False)


def _check(settings: SearchSettings) -> None:
    """Build what will be run, before anything runs: each trial, or each value alone of a space that is too large."""
    dimensions, names = read_space(settings.space), settings.names()
    if settings.search != "optuna" and len(names) <= CHECKED:
        trials = [chosen(settings, Path(), i) for i in range(len(names))]
    else:
        first = {each.name: each.extremes()[0] for each in dimensions}
        trials = [first | {each.name: text} for each in dimensions for text in each.extremes()]
    known: dict[str, Any] = {}
    meaning: dict[str, Any] = {}
    for values in trials:
        run, text = _planned(settings, values)
        with _named(values):
            make("objective", run.objective)
            dataset = make("dataset", run.dataset, run.data_dir or cache_folder())
            content = yaml.safe_load(text)
            key = repr([content[name] for name in ("dataset", "data_dir", "condition")])
            data = known[key] if key in known else load_dataset(dataset, "cpu", run.conditions)
            known = {key: data}
            meant = _meaning(make("model", build, run, data.schema), data)
        meaning = meaning or meant
        if other := next((name for name in meaning if meant[name] != meaning[name]), None):
            raise RunError(
                f"--space: {_told(values)} and {_told(trials[0])} are scored in other units, or on other data ({other} "
                f"{meant[other]} and {meaning[other]}): their numbers cannot be ranked"
            )


def _meaning(vae: Model, data: Data) -> dict[str, Any]:
    """What log p(x) of a run means: trials of different meanings are not ranked."""
    columns = data.schema.columns
    known = {"unit": unit_of(vae, data.schema), "data": data.fingerprint, **data.about}
    return known | ({"densities": densities(vae.likelihood.head, columns)} if columns else {})


@contextmanager
def _named(values: Mapping[str, str]) -> Iterator[None]:
    """Context: a mistake inside is that of a trial."""
    try:
        yield
    except RunError as error:
        raise RunError(f"--space: {_told(values)}: {error}") from error


def _told(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {text}" for name, text in values.items())


def _planned(
    settings: SearchSettings, values: Mapping[str, str], directory: Path | None = None
) -> tuple[Settings, str]:
    """The settings of the run of a trial, and their YAML text."""
    resume = directory is not None and (directory / "config.yaml").exists()
    argv = ["--report=false", *settings.arguments(), *options(values)]
    with _named(values):
        return parse(Settings, argv + [f"--run_dir={directory}"] * (directory is not None) + ["--resume"] * resume)


def _shared(settings: SearchSettings, run_dir: Path) -> Shared:
    """The trials, as work that processes share."""
    names = settings.names()
    plan = partial(_plan, settings, run_dir)

    def do(name: str) -> None:
        train(*_planned(settings, plan(name), run_dir / name))

    def is_done(name: str) -> bool:
        return (run_dir / name / "result.json").exists()

    plans = (lambda name: f"{PLANS}/{name}.json") if settings.search == "optuna" else None
    return Shared(run_dir, names, do, is_done, partial(status, run_dir), plan, plans)


def _plan(settings: SearchSettings, run_dir: Path, name: str) -> dict[str, str]:
    """What is chosen for a trial."""
    return chosen(settings, run_dir, settings.names().index(name))


def _ranked(settings: SearchSettings, run_dir: Path, failures: Mapping[str, str]) -> list[Trial]:
    """All trials, the best one first.

    Raises:
        RunError: if none is left to choose.
    """
    trials = []
    for i, name in enumerate(settings.names()):
        value, error = validation(run_dir / name, settings.by)
        finished = (run_dir / name / "result.json").exists()
        seconds = load(run_dir / name).result["train_seconds"] if finished else None
        reason = failures.get(name, "" if value is not None else f"{settings.by} is not finite")
        trials.append(Trial(name, chosen(settings, run_dir, i), value, error, seconds, reason))
    ranked = sorted(trials, key=lambda each: -math.inf if each.validation is None else each.validation, reverse=True)
    if ranked[0].validation is None:
        first = next(each for each in trials)
        again = f"the same command with --run_dir {run_dir} --resume runs them again"
        raise RunError(f"all {len(trials)} trials failed; {first.name}: {first.reason}; {again}")
    return ranked


def _report(done: Search) -> None:
    """Print the table of trials and write it; of the test set, the best trial's value alone."""
    settings, run_dir, trials = done
    result = load(run_dir / done.best.name).result
    what = {"validation_log_likelihood": "log p(x)", "validation_elbo": "ELBO"}[settings.by]
    rows = [["trial", *settings.space, f"validation {what}", "+-", "train s"]]
    for each in trials:
        shown = [each.values[name] for name in settings.space]
        numbers = [number(each.validation, 2), number(each.validation_se, 2), number(each.seconds, 0)]
        rows.append([each.name, *map(_short, shown), *numbers])
    estimator = "importance sampling" if result.get("annealed_log_likelihood") is None else "annealing"
    lines = [
        f"Validation {what}, {result['unit']}, larger is better; +- is its error over {noun_of(result)}s.",
        "",
        table(rows),
        "",
        f"The validation data choose {done.best.name}, of {len(trials)} trials: {what} {done.best.validation:.2f} "
        f"with {_told(done.best.values)}.",
        f"Its test log p(x), by {estimator}, is {best(result):.2f}; that of no other trial is shown.",
    ]
    if settings.by == "validation_log_likelihood" and result.get("validation_reliable") is False:
        lines.append("Its validation log p(x) is not to be believed, too many Pareto k are bad: --by validation_elbo.")
    failed = [each for each in trials if each.reason]
    lines += ["", f"{len(failed)} have no validation value; --resume runs those again that failed:"] * bool(failed)
    lines += [f"- {each.name}: {each.reason}" for each in itertools.islice(failed, 20)]
    text = "\n".join(lines)
    winner = done.best._asdict() | {name: result.get(name) for name in TEST}
    with writing(run_dir):
        write_text(run_dir / "table.md", text + "\n")
        content = {"search": settings.search, "by": settings.by, "unit": result["unit"], "best": winner}
        origin = {"device": result["device"], "versions": result["versions"], "commit": result["commit"]}
        write_json(run_dir / "result.json", content | {"trials": [each._asdict() for each in trials]} | origin)
    print(f"\n{text}\n\n{run_dir}")


TEST = ("test_elbo", "test_log_likelihood", "test_log_likelihood_se", "annealed_log_likelihood", "mc_se")
"""What is said of the test data, of the chosen trial."""


def _short(text: str) -> str:
    """A value as the table shows it."""
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text
