"""Runs logged elsewhere, too: by Weights & Biases and MLflow. All that is sent is in the run's own directory as well.

A run loses nothing where a server is away, or says no: a line says so, and the same command with ``--resume`` sends
what is missing. Keys and addresses are those of the services' own logins and variables of the environment.
"""

import math
import os
import secrets
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import yaml
from pyro.util import get_rng_state, set_rng_state

from pyro_vae.callbacks import Callback, Epoch, Training
from pyro_vae.errors import need_extra
from pyro_vae.infer.parallel import Processes
from pyro_vae.runs.directory import flat, write_json
from pyro_vae.runs.hub import reason_without_secrets
from pyro_vae.runs.reading import damaged, is_count, is_flag, is_text, json_of, result_of
from pyro_vae.runs.reporting.contents import history_of
from pyro_vae.runs.settings import Settings

FILE = "tracking.json"
PROJECT = "pyro-vae"
SCALARS = ("objective", "train_elbo", "validation_elbo", "learning_rate", "seconds")
"""What is sent of each epoch, in nats per datum, and seconds."""


class News(NamedTuple):
    """What a service has not been told yet.

    Attributes:
        rows: of the history, one each epoch.
        epochs: how many there were so far.
        result: what is in ``result.json``, by name, of a run that is finished.
        figures: its pictures.
        ended: how the run ended, if it did.
    """

    rows: Sequence[Epoch]
    epochs: int
    result: Mapping[str, Any] = {}
    figures: Sequence[Path] = ()
    ended: Literal["finished", "failed", "interrupted"] | None = None

    def scalars(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Epoch by epoch, the numbers of each that are finite."""
        for row in self.rows:
            found = {name: getattr(row, name) for name in SCALARS}
            yield row.epoch, {name: value for name, value in found.items() if math.isfinite(value)}

    def numbers(self) -> dict[str, float]:
        """The numbers of the result, as ``result/NAME``."""
        found = flat(dict(self.result), "result/")
        return {name: float(value) for name, value in found if isinstance(value, bool | int | float)}

    def texts(self) -> dict[str, str]:
        """What else there is in the result."""
        return {name: str(value) for name, value in flat(dict(self.result), "result/") if isinstance(value, str)}


class Service(Protocol):
    """One run at a service.

    Attributes:
        identity: by which the service finds the run again.
        place: where it is, for a line that says so.
    """

    identity: str
    place: str

    def send(self, news: News) -> None:
        """Tell the service; whatever goes wrong is raised."""
        ...


class WandB:
    """A run at Weights & Biases, or, offline, in the folder ``wandb`` of the run's directory.

    Without a login, or a server, it is offline: ``wandb sync`` sends it later.
    """

    def __init__(self, run_dir: Path, project: str, identity: str | None, settings: Mapping[str, Any]):
        import wandb  # pyright: ignore[reportMissingImports]

        self._wandb, self.identity = wandb, identity or secrets.token_hex(4)
        entity, _, project = project.rpartition("/")
        usual = {"console": "off", "silent": True, "disable_git": True, "disable_code": True, "save_code": False}
        # the first is how long a server may take to answer, the last a person at a terminal, who is asked to log in
        waits = {"init_timeout": 30.0, "finish_timeout": 60.0, "login_timeout": 60.0}
        told = {name for name in wandb.Settings.model_fields if f"WANDB_{name.upper()}" not in os.environ}
        usual |= {"reinit": "create_new"} | {name: each for name, each in waits.items() if name in told}
        told = {"project": project, "entity": entity or None, "id": self.identity, "name": run_dir.resolve().name}
        told |= {"dir": str(run_dir), "config": dict(settings), "resume": "allow"}
        try:
            self._run = wandb.init(**told, settings=wandb.Settings(**usual))
        except wandb.errors.Error as error:
            if wandb.run is None:  # its process still waits for the server, in the name of this run
                wandb.teardown()
            self._run = wandb.init(**told, mode="offline", settings=wandb.Settings(**usual))
            _say(f"Weights & Biases: {reason_without_secrets(error)}; the run is logged offline")
        folder = Path(self._run.dir).parent
        offline = f"offline: wandb sync {shlex.quote(str(folder))} sends it"
        self.place = offline if self._run.offline else str(self._run.url)

    def send(self, news: News) -> None:
        for epoch, scalars in news.scalars():
            self._run.log(scalars, step=epoch)
        if news.figures:
            self._run.log({f"figures/{each.stem}": self._wandb.Image(str(each)) for each in news.figures})
        self._run.summary.update({**news.numbers(), **news.texts()})
        if news.ended:
            self._run.finish(exit_code={"finished": 0, "failed": 1, "interrupted": 130}[news.ended])


class MLflow:
    """A run at MLflow, whose store is that of ``MLFLOW_TRACKING_URI``, or MLflow's default."""

    def __init__(self, run_dir: Path, project: str, identity: str | None, settings: Mapping[str, Any]):
        with _briefly():
            self._begin(run_dir, project, identity, settings)

    def _begin(self, run_dir: Path, project: str, identity: str | None, settings: Mapping[str, Any]) -> None:
        from mlflow import MlflowClient, entities, exceptions  # pyright: ignore[reportMissingImports]

        self._client, self._entities = MlflowClient(), entities
        if identity is not None:
            try:
                self._client.update_run(identity, status="RUNNING")
            except exceptions.MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                _say(f"MLflow: its store has no run {identity}; a new one is begun")
                identity = None
        if identity is None:
            found = self._client.get_experiment_by_name(project)
            experiment = found.experiment_id if found else self._client.create_experiment(project)
            made = self._client.create_run(experiment, run_name=run_dir.resolve().name)
            identity = str(made.info.run_id)
            params = [entities.Param(name, str(value)[:500]) for name, value in settings.items()]
            for first in range(0, len(params), 100):  # no more are taken at a time
                self._client.log_batch(identity, params=params[first : first + 100])
        self.identity = identity
        self.place = f"run {identity} of experiment {project}"

    def send(self, news: News) -> None:
        now = int(time.time() * 1000)
        numbers = [(name, value, epoch) for epoch, scalars in news.scalars() for name, value in scalars.items()]
        numbers += [(name, value, news.epochs) for name, value in news.numbers().items()]
        metrics = [self._entities.Metric(name, value, now, step) for name, value, step in numbers]
        tags = [self._entities.RunTag(name, value[:500]) for name, value in news.texts().items()]
        with _briefly():
            for first in range(0, len(metrics), 1000):  # no more are taken at a time
                self._client.log_batch(self.identity, metrics=metrics[first : first + 1000])
            if tags:
                self._client.log_batch(self.identity, tags=tags[:100])
            for each in news.figures:
                self._client.log_artifact(self.identity, str(each), "figures")
            if news.ended:
                status = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}[news.ended]
                self._client.set_terminated(self.identity, status)


@contextmanager
def _briefly() -> Iterator[None]:
    """Context: MLflow, which by default asks a server that is away for minutes, gives up soon, unless it was told."""
    usual = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
    added = [name for name in usual if name not in os.environ]
    os.environ.update({name: usual[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


SERVICES: dict[str, tuple[str, Any]] = {"wandb": ("Weights & Biases", WandB), "mlflow": ("MLflow", MLflow)}
"""By the option that asks for it, and the extra that it needs: a title, and how a run is begun there."""


class Tracking(Callback):
    """The services at which a run is logged: a callback of its training, and what tells them its result.

    Nothing that they do changes the training's random numbers, or ends the run. As a context it tells them that the
    run failed, if what is inside does.

    Args:
        run_dir: the directory of the run; in ``tracking.json`` is how the services call it.
        settings: of the run, which say where it is logged.
        text: the same as YAML.

    Raises:
        MissingExtra: without what a service needs.
    """

    def __init__(self, run_dir: Path, settings: Settings, text: str):
        asked = {option: getattr(settings, option) for option in SERVICES}
        self._asked = {option: PROJECT if name is True else str(name) for option, name in asked.items() if name}
        for option in self._asked:
            need_extra(option, [option])
        self._run_dir, self._settings = run_dir, dict(flat(yaml.safe_load(text), ""))
        self._services: dict[str, Service] = {}
        self._lost: set[str] = set()
        self._history: list[Epoch] = []

    def start(self, training: Training) -> None:
        self.save(training)

    def save(self, training: Training) -> None:
        self._history = list(training.history)
        self._tell()

    def conclude(self) -> None:
        """Tell the result and the figures of the run, which is finished, and what else was not told before."""
        if self._asked:
            self._history = history_of(self._run_dir)
            figures = sorted(self._run_dir.glob("*.png"))
            self._tell(result=result_of(self._run_dir), figures=figures, ended="finished")

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            return
        for option in [option for option in self._asked if option not in self._services]:
            self._lost.add(option)  # which did not begin
        self._tell(ended="failed" if issubclass(kind, Exception) else "interrupted")
        if not (self._run_dir / "checkpoint.pt").exists():  # it is as if it had never been begun
            shutil.rmtree(self._run_dir / "wandb", ignore_errors=True)
            (self._run_dir / FILE).unlink(missing_ok=True)

    def _tell(self, **news: Any) -> None:
        if not Processes().is_first:
            return
        for option in self._asked:
            if option in self._lost:
                continue
            try:
                with _left_alone():
                    self._tell_one(option, news)
            except Exception as error:  # of whichever service: the run goes on without it
                self._lost.add(option)
                where = shlex.quote(str(self._run_dir))
                _say(
                    f"{SERVICES[option][0]}: {reason_without_secrets(error)}; the run goes on, and its own files are "
                    f"complete; what is missing there is sent by: pyro-vae train --run_dir {where} --resume --{option}"
                )

    def _tell_one(self, option: str, news: dict[str, Any]) -> None:
        known = _states(self._run_dir)
        state = known.get(option, {"run": None, "epochs": 0, "finished": False})
        if state["finished"]:
            return
        if option not in self._services:
            title, begin = SERVICES[option]
            service = self._services[option] = begin(self._run_dir, self._asked[option], state["run"], self._settings)
            if service.identity != state["run"]:
                state = {"run": service.identity, "epochs": 0, "finished": False}
                write_json(self._run_dir / FILE, known | {option: state})
            print(f"{title}: {service.place}")
        told = News(self._history[state["epochs"] :], len(self._history), **news)
        self._services[option].send(told)
        state |= {"epochs": max(state["epochs"], len(self._history)), "finished": told.ended == "finished"}
        write_json(self._run_dir / FILE, known | {option: state})
        if told.ended:
            del self._services[option]


def _states(run_dir: Path) -> dict[str, dict[str, Any]]:
    """What each service was told, in the file that says so."""
    path = run_dir / FILE
    if not os.path.lexists(path):
        return {}
    content = json_of(path)
    checks = {"run": is_text, "epochs": is_count, "finished": is_flag}
    for option, state in content.items():
        if not (isinstance(state, dict) and all(is_right(state.get(name)) for name, is_right in checks.items())):
            raise damaged(path, f"'{option}' is not what was told")
    return content


@contextmanager
def _left_alone() -> Iterator[None]:
    """Context: the random numbers of Python, NumPy and torch are afterwards what they were, and nobody is warned."""
    state = get_rng_state()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        set_rng_state(state)


def _say(line: str) -> None:
    print(line, file=sys.stderr)
