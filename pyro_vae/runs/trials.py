"""What is chosen for each trial of a search: by its number, by seed, or by Optuna, which learns from finished ones."""

import json
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from pyro_vae.errors import RunError
from pyro_vae.files import bytes_in
from pyro_vae.runs.directory import write_json, writing
from pyro_vae.runs.loading import load
from pyro_vae.runs.spaces import Dimension, grid, read_space
from pyro_vae.runs.workers import Taken, claim, failure

PLANS = "trials"
"""The folder, in that of a search, of what Optuna has asked for."""


class Searched(Protocol):
    """What is searched over, as :class:`pyro_vae.runs.SearchSettings` has it."""

    @property
    def search(self) -> str: ...
    @property
    def space(self) -> dict[str, str]: ...
    @property
    def by(self) -> str: ...
    @property
    def seed(self) -> int: ...
    def names(self) -> list[str]: ...


def chosen(settings: Searched, run_dir: Path, number: int) -> dict[str, str]:
    """The settings of a trial as text, by name; those that Optuna asks for are written, and stay.

    Raises:
        RunError: if what was written is damaged.
    """
    dimensions = read_space(settings.space)
    if settings.search == "grid":
        return grid(dimensions)[number]
    if settings.search == "random":
        return {each.name: each.text(each.draw(settings.seed, number)) for each in dimensions}
    values = _record(run_dir, settings.names()[number], dimensions)
    if values is None:
        with _waiting(run_dir, "optuna"):
            names = settings.names()
            values = _record(run_dir, names[number], dimensions) or _asked(settings, run_dir, number, dimensions)
            with writing(run_dir):
                (run_dir / PLANS).mkdir(exist_ok=True)
                write_json(run_dir / PLANS / f"{names[number]}.json", values)
    return {each.name: each.text(values[each.name]) for each in dimensions}


def _record(run_dir: Path, name: str, dimensions: Sequence[Dimension]) -> dict[str, Any] | None:
    """What Optuna has asked for of a trial; None: nothing yet.

    Raises:
        RunError: if it was written by somebody else.
    """
    path = run_dir / PLANS / f"{name}.json"
    try:
        content = json.loads(bytes_in(path))
        for each in dimensions:
            value, choices = content[each.name], range(len(each.values))
            fits = value in choices if each.kind == "choice" else each.values[0] <= value <= each.values[1]
            if isinstance(value, bool) or not fits or (each.kind in ("int", "choice") and not isinstance(value, int)):
                raise ValueError(f"{each.name} {value} is not in the space")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged: {' '.join(str(error).split())}; delete it") from error
    return {each.name: content[each.name] for each in dimensions}


@contextmanager
def _waiting(run_dir: Path, name: str) -> Iterator[None]:
    """Context: this process alone, sooner or later; the others take a moment."""
    while True:
        try:
            with claim(run_dir, name):
                yield
                return
        except Taken:
            time.sleep(0.05)


def _asked(settings: Searched, run_dir: Path, number: int, dimensions: Sequence[Dimension]) -> dict[str, Any]:
    """What Optuna would try next, knowing all that is finished and all that others are at work on.

    What it knows is made of the trials' own files each time: there is no other state that a kill could damage.
    """
    import optuna

    states = optuna.trial.TrialState
    distributions = {each.name: each.distribution(optuna) for each in dimensions}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that liars are experimental
        sampler = optuna.samplers.TPESampler(seed=(settings.seed + 7919 * number) % 2**32, constant_liar=True)
        before, optuna_says = optuna.logging.get_verbosity(), optuna.logging.set_verbosity
        optuna_says(optuna.logging.ERROR)
        try:
            study = optuna.create_study(direction="maximize", sampler=sampler)
            for name in settings.names():
                if (values := _record(run_dir, name, dimensions)) is None:
                    continue
                value = validation(run_dir / name, settings.by)[0]
                ended = any(path.exists() for path in (run_dir / name / "result.json", failure(run_dir, name)))
                state = states.COMPLETE if value is not None else states.FAIL if ended else states.RUNNING
                study.add_trial(
                    optuna.trial.create_trial(state=state, value=value, params=values, distributions=distributions)
                )
            return dict(study.ask(distributions).params)
        finally:
            optuna_says(before)


def validation(directory: Path, by: str) -> tuple[float | None, float | None]:
    """The validation value of a finished run and its error over data; None of what is not finite or not there."""
    if not (directory / "result.json").exists():
        return None, None
    result = load(directory).result
    value = result.get(by)
    finite = value is not None and math.isfinite(value)
    return (value, result.get(f"{by}_se")) if finite else (None, None)
