"""Training runs: from settings to a directory with a trained and scored model."""

import contextlib
import inspect
import json
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pyro.infer import ELBO, Trace_ELBO
from torch import nn

from pyro_vae.callbacks import AverageWeights, BestWeights, Callback, Checkpoint, EarlyStopping, Epoch, Training
from pyro_vae.data.datasets import Data, Source
from pyro_vae.data.fetched import cache_folder
from pyro_vae.data.tables import densities
from pyro_vae.errors import CheckpointError, ContractError, NonFiniteError, ProcessLost, RunError
from pyro_vae.infer.compiled import CompiledSVI
from pyro_vae.infer.engines import PyroSVI
from pyro_vae.infer.objectives import Objective
from pyro_vae.infer.parallel import Processes
from pyro_vae.infer.trees import call, data_size, select
from pyro_vae.infer.turns import InTurn, WarmUp
from pyro_vae.optimizers import OptimizerFactory, make_optimizer, make_schedule
from pyro_vae.runs import figures
from pyro_vae.runs.blockwise import Files, code, fingerprint, forget_parts
from pyro_vae.runs.build import (
    Model,
    as_options,
    build,
    check_objective,
    check_observations,
    check_pairing,
    load_dataset,
    make,
)
from pyro_vae.runs.columns import write_columns
from pyro_vae.runs.directory import (
    check_run_dir,
    choose_device,
    flat,
    open_run,
    provenance,
    run_dir_for,
    write_csv,
    write_evidence,
    write_json,
    write_weights,
    writing,
)
from pyro_vae.runs.launched import check_same, device_of, launched, leave
from pyro_vae.runs.loading import Run, load, load_settings
from pyro_vae.runs.memory import FILE, check_same_data, find_again, remember
from pyro_vae.runs.parsing import parse, settings_text
from pyro_vae.runs.reading import yaml_of
from pyro_vae.runs.reporting import report_after
from pyro_vae.runs.scoring import best, bits_per_dim, report_run, score_test, score_validation
from pyro_vae.runs.seals import without_weights
from pyro_vae.runs.settings import Settings
from pyro_vae.runs.tracking import Tracking
from pyro_vae.runs.workers import alone
from pyro_vae.training import fit

WORTH_COMPILING = 5000
"""Gradient steps above which the seconds of compiling pay; below, the compiled engine runs the graph as it is."""


def train(settings: Settings, text: str | None = None) -> Run:
    """Train the run of ``settings``, score it and draw it; one that is finished is only reported.

    Of several processes that torchrun has started, all train, and the first writes the run and scores it; in the others
    this ends the process, with status 0, when there is no more to train.

    Args:
        settings: of the run, made in Python or read from a command line.
        text: the same as YAML, if the caller has it; otherwise it is written from ``settings``.

    Raises:
        RunError: for a mistake in the settings or in what they point to.
    """
    text = settings_text(settings) if text is None else text
    _refuse_image_shape(text)
    dataset = make("dataset", settings.dataset, settings.data_dir or cache_folder())
    objective = make("objective", settings.objective)
    with launched(settings.device) as processes:
        check_same(processes, dict(flat(yaml.safe_load(text), "--")))
        run_dir = Path(processes.from_first(lambda: run_dir_for(type(dataset).__name__, settings.run_dir)))
        tracking = Tracking(run_dir, settings, text)
        processes.from_first(lambda: check_run_dir(run_dir, text, settings.resume, _reread))
        finished = processes.from_first((run_dir / "result.json").exists)
        if not finished:
            torch.manual_seed(settings.seed)
            new, began = not run_dir.exists(), processes.is_first and not settings.resume
            data, vae = _begin(settings, text, dataset, objective, run_dir, processes)
            try:
                with contextlib.ExitStack() as mine:
                    processes.from_first(lambda: bool(mine.enter_context(alone(run_dir))))
                    with _leaving_nothing(run_dir, new) if began else contextlib.nullcontext(), tracking:
                        history = fit_run(settings, vae, data, objective, run_dir, _about(text, data), tracking)
                    leave()
                    if processes.is_first:
                        with tracking:
                            _score(settings, dataset, vae, data, history, run_dir)
                        tracking.conclude()
            except KeyboardInterrupt as interrupt:
                if not processes.is_first:
                    sys.exit(130)  # the first one says it
                raise KeyboardInterrupt(resume_hint(run_dir, processes.size)) from interrupt
            except ProcessLost as error:
                raise RunError(f"{error}; {resume_hint(run_dir, processes.size)}") from error
            except OSError as error:
                raise RunError(f"--run_dir {run_dir}: {error.strerror or error}") from error
    if not processes.is_first:
        sys.exit(0)
    if finished:
        if not (run_dir / "model.safetensors").exists():
            raise RunError(f"{run_dir} is finished, but has no model.safetensors{without_weights(run_dir)}")
        load_settings(run_dir)
        forget_parts(run_dir)
        tracking.conclude()
        print("This run is finished; its result:")
    report_run(run_dir)
    return load(run_dir)


@contextlib.contextmanager
def _leaving_nothing(run_dir: Path, new: bool) -> Iterator[None]:
    """Context: a training that this call began, and that fails before its first checkpoint, is as if never begun."""
    try:
        yield
    except Exception as error:
        if not (isinstance(error, ProcessLost) or (run_dir / "checkpoint.pt").exists()):
            with contextlib.suppress(OSError):  # the failure itself is what has to be told
                for path in (run_dir / "config.yaml", run_dir / FILE, *run_dir.glob("events.out.tfevents.*")):
                    path.unlink(missing_ok=True)
                if new:
                    run_dir.rmdir()
        raise


def _begin(
    settings: Settings,
    text: str,
    dataset: Source,
    objective: Objective | ELBO,
    run_dir: Path,
    processes: Processes,
) -> tuple[Data, Model]:
    """Data and model before the first step, in every process, and the directory of the run."""
    device = device_of(settings.device, processes.size)
    if settings.resume:
        processes.all(lambda: find_again(run_dir, dataset))
    data = processes.in_turn(lambda: load_dataset(dataset, device, settings.conditions))
    check_same(processes, {"fingerprint of the data": data.fingerprint})
    if settings.resume:
        processes.from_first(lambda: check_same_data(run_dir, dataset, data, "--resume: "))
    vae = processes.all(lambda: prepare(settings, data, objective))
    if (rows := min(settings.batch_size, data.num_train)) < processes.size:
        option = "--batch_size" if rows == settings.batch_size else "training data"
        raise RunError(f"{option} {rows}: {processes.size} processes of torchrun need at least a row each")

    def write() -> None:
        open_run(run_dir, text, settings.resume, _reread)
        if not (run_dir / "data.json").exists():  # a run may have been killed before it was written
            with writing(f"--run_dir {run_dir}"):
                remember(run_dir, dataset, data)

    processes.from_first(write)
    if processes.is_first:
        num_parameters = sum(p.numel() for p in vae.parameters())
        numbers = (
            f"{data.num_train:,} training, {data_size(data.validation):,} validation, {data_size(data.test):,} test"
        )
        number = f", in {processes.size} processes" if processes.size > 1 else ""
        print(
            f"{data.title}: {numbers} {data.schema.noun}s on {device}{number}\n"
            f"VAE with {num_parameters:,} parameters, run directory {run_dir}"
        )
    return data, vae


def _score(settings: Settings, dataset: Source, vae: Model, data: Data, history: list[Epoch], run_dir: Path) -> None:
    """Finish a run whose training is done."""
    if data.device.type == "mps":  # has no double precision
        print("scoring on the CPU, in double precision, which mps lacks")
        vae, data = vae.cpu(), load_dataset(dataset, "cpu", settings.conditions)
    finish(settings, vae.eval(), data, history, run_dir)
    if settings.report:
        report_after(run_dir, vae, data)


LATER = ("epochs", "evidence", "device", "data_dir", "patience", "weights")
"""Settings that do not change what a training has done so far."""


def _about(text: str, data: Data) -> dict[str, Any]:
    """What a checkpoint says of its run: one of other settings, or of other data, is not gone on with."""
    settings = {name: value for name, value in yaml.safe_load(text).items() if name not in LATER}
    return dict(flat(settings, "--")) | {"data": data.fingerprint}


def _refuse_image_shape(text: str) -> None:
    content = yaml.safe_load(text)
    for part in ("encoder", "decoder", "likelihood"):
        given = content[part]
        if isinstance(given, dict) and given.get("init_args", {}).get("image_shape") is not None:
            raise RunError(f"--{part}.image_shape cannot be given: it is that of the data set's images")


def _reread(saved: Path) -> str:
    """The settings of a run, which another version may have written, in the spelling of today."""
    return parse(Settings, [f"--config={saved}"])[1]


def prepare(settings: Settings, data: Data, objective: Objective | ELBO) -> Model:
    """The model before its first step, on the device of ``data``, with all that does not fit refused.

    Raises:
        RunError: with the option that would help.
    """
    vae = make("model", build, settings, data.schema).to(data.device)
    x = data.observe(torch.arange(data.num_train, device=data.device))
    check_pairing(vae.likelihood.head, data)
    make("prior", call, vae.initialize, x)
    check_observations(vae, [data.test, data.validation, x], data)
    if isinstance(objective, Objective):
        check_objective(objective, vae, select(x, slice(2)))
    optimizer = make("optimizer", make_optimizer, optimizer_of(settings), list(vae.parameters()), settings.lr)
    steps = len(data.batches(settings.batch_size))
    make("schedule", make_schedule, settings.schedule, optimizer, steps, settings.epochs)
    return vae


def finish(
    settings: Settings,
    vae: Model,
    data: Data,
    history: list[Epoch],
    run_dir: Path,
) -> None:
    """Write weights, scores and figures of a trained model; ``result.json`` is the last file."""
    settled = json.dumps(yaml_of(run_dir / "config.yaml"), default=str)
    metadata = {"schema": data.schema.dumps(), "settings": settled}
    write_weights(run_dir / "model.safetensors", vae.state_dict(), metadata)
    works = partial(_parts, settings, data, run_dir)
    result, evidence, annealed = score_test(settings, vae, data, works)
    result |= score_validation(settings, vae, data, works)
    result |= {
        "bits_per_dim": bits_per_dim(best(result), data, vae.likelihood.head),
        "train_seconds": sum(e.seconds for e in history),
        "epochs": len(history),
        "weights": settings.weights,
        "seed": settings.seed,
        "data": data.fingerprint,
        **data.about,
        **({"densities": densities(vae.likelihood.head, data.schema.columns)} if data.schema.columns else {}),
        **provenance(choose_device(settings.device, scores=False)),
    }
    importance = evidence.to_dataset(unit=result["unit"])
    groups = {"importance": importance} | ({} if annealed is None else {"annealed": annealed})
    write_evidence(run_dir / "evidence.nc", groups)
    figures.training_curve(history, run_dir / "training.png", data.schema.noun)
    figures.evidence(evidence, result, run_dir)
    if data.schema.columns:
        write_columns(vae.model, vae.guide, data, run_dir)
    figures.pictures(vae.model, vae.guide, data, run_dir)
    write_json(run_dir / "result.json", result)
    forget_parts(run_dir)


def _parts(settings: Settings, data: Data, run_dir: Path, name: str) -> Files:
    """Where the parts of one of a run's estimates outlive a process that is killed while they are computed."""
    about = {"evidence": asdict(settings.evidence), "seed": settings.seed, "data": data.fingerprint}
    about |= {"weights": fingerprint(run_dir / "model.safetensors"), "code": code()}
    about |= {"device": data.device.type, "threads": torch.get_num_threads()}
    work = Files(run_dir, about, data.device, name, alone=True)
    work.begin()
    return work


class Log(Callback):
    """Write metrics.csv after every epoch, and curves for TensorBoard if asked to."""

    def __init__(self, run_dir: Path, tensorboard: bool):
        self.run_dir, self._logged, self._writer = run_dir, 0, None
        if tensorboard and Processes().is_first:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

            self._writer = SummaryWriter(str(run_dir))

    def start(self, training: Training) -> None:
        if training.history:
            self.save(training)

    def save(self, training: Training) -> None:
        Processes().from_first(lambda: self._write(training))

    def _write(self, training: Training) -> None:
        write_csv(self.run_dir / "metrics.csv", [row._asdict() for row in training.history])
        if self._writer:
            for row in training.history[self._logged :]:
                for name in ("objective", "train_elbo", "validation_elbo", "learning_rate"):
                    self._writer.add_scalar(name, getattr(row, name), row.epoch)
            self._writer.flush()
        self._logged = len(training.history)

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._writer:
            self._writer.close()


def fit_run(
    settings: Settings,
    vae: Model,
    data: Data,
    objective: Objective | ELBO,
    run_dir: Path,
    about: dict[str, Any],
    *more: Callback,
) -> list[Epoch]:
    """Fit the VAE, writing metrics.csv and checkpoint.pt after every epoch; ``more`` comes after that."""
    log = Log(run_dir, settings.tensorboard)
    callbacks: list[Callback] = [Checkpoint(run_dir / "checkpoint.pt", settings.resume, about), log, *more]
    callbacks += [BestWeights()] if settings.weights == "best" else []
    callbacks += [AverageWeights(settings.average_decay)] if settings.weights == "average" else []
    callbacks += [EarlyStopping(settings.patience)] if settings.patience is not None else []
    batches = data.batches(settings.batch_size)
    all_steps = settings.epochs * len(batches)
    num_steps = 0 if data.device.type == "mps" else all_steps  # for which inductor is young
    loss = _warmed_up(settings, objective, all_steps)
    compiled = compiled_engine(num_steps, max_norm=settings.max_norm, precision=settings.precision)
    engine = PyroSVI if settings.engine == "pyro" or _slower_traced(settings, vae, num_steps) else compiled
    try:
        return fit(
            vae,
            batches,
            data.validation,
            epochs=settings.epochs,
            lr=settings.lr,
            optimizer=optimizer_of(settings),
            schedule=settings.schedule,
            loss=loss,
            engine=engine,
            callbacks=callbacks,
        )
    except CheckpointError as error:
        raise RunError(f"--resume: {error}; start a new run in another --run_dir") from error
    except NonFiniteError as error:
        raise NonFiniteError(as_options(error)) from error
    except (ValueError, TypeError, NotImplementedError) as error:
        if not isinstance(error, ContractError) and not _raised_by_a_library(error):
            raise  # an error in somebody's own class: its traceback says where
        reason = as_options(error)
        refused = settings.engine == "compiled" and "--engine pyro" in reason
        option = "--engine compiled" if refused else f"--objective {type(objective).__name__}"
        option = f"--batch_size {settings.batch_size}" if "batch size" in reason else option
        raise RunError(f"{option}: {reason}") from error
    finally:
        log.close()


def _warmed_up(settings: Settings, objective: Objective | ELBO, num_steps: int) -> Objective | ELBO:
    """The loss of a training of so many steps."""
    if isinstance(objective, InTurn | WarmUp) and objective.steps >= num_steps:
        name = type(objective).__name__
        warnings.warn(
            f"{name} has {objective.steps:,} steps before it changes, the training {num_steps:,}", stacklevel=2
        )
    share = 0.1 * (type(objective) is Trace_ELBO) if settings.warmup is None else settings.warmup
    steps = round(share * num_steps)
    return make("warmup", WarmUp, steps, objective) if steps else objective


def optimizer_of(settings: Settings) -> Literal["adam"] | OptimizerFactory:
    """The optimizer as :func:`pyro_vae.fit` takes it: the learning rate is that of the run.

    Raises:
        RunError: if the optimizer has been given a rate of its own.
    """
    made = settings.optimizer
    if isinstance(made, partial) and "lr" in made.keywords:
        usual = inspect.signature(made.func).parameters["lr"].default
        if made.keywords["lr"] != usual:
            raise RunError(f"--optimizer.lr {made.keywords['lr']}: the learning rate is that of --lr")
        return partial(made.func, **{name: value for name, value in made.keywords.items() if name != "lr"})
    return made


def _slower_traced(settings: Settings, vae: Model, num_steps: int) -> bool:
    """Whether Pyro's own steps are faster: the graph of a recurrent network has each of its steps, one by one."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in vae.modules())
    only_traced = settings.max_norm is not None or settings.precision != "float32"
    return recurrent and num_steps <= WORTH_COMPILING and not only_traced


def compiled_engine(num_steps: int, **settings: Any) -> Callable[..., CompiledSVI]:
    """The compiled engine for a training of so many steps, with other settings of its own."""
    return partial(CompiledSVI, compiler="inductor" if num_steps > WORTH_COMPILING else "none", **settings)


def _raised_by_a_library(error: BaseException) -> bool:
    """Whether Pyro or pyro_vae itself refused what it was given, as losses do with settings they cannot serve."""
    while error.__cause__ is not None:
        error = error.__cause__
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"].split(".")[0] in ("pyro", "pyro_vae")


def resume_hint(run_dir: Path, processes: int = 1) -> str:
    """What to tell someone who pressed Ctrl-C."""
    if (run_dir / "checkpoint.pt").exists():
        command = f"torchrun --nproc-per-node {processes} -m pyro_vae" if processes > 1 else "pyro-vae"
        others = " (and what else torchrun was told)" if processes > 1 else ""
        return f"go on with: {command} train --run_dir {shlex.quote(str(run_dir))} --resume{others}"
    return f"no epoch was finished; {run_dir} can be deleted"
