"""fit: epochs of an engine's steps, with validation, a learning-rate schedule, checkpoints and resumption."""

import io
import math
import os
import textwrap
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import pyro
import torch
from pyro.infer import ELBO as PyroELBO
from torch import Tensor, nn
from tqdm import tqdm

from pyro_vae.errors import CheckpointError, NonFiniteError
from pyro_vae.infer.checks import check_program
from pyro_vae.infer.diagnostics import estimate_elbo
from pyro_vae.infer.engines import Engine, PyroSVI
from pyro_vae.infer.objectives import Objective
from pyro_vae.infer.programs import find_non_finite

FORMAT = "pyro_vae.training/2"
"""Marks a checkpoint; another layout gets another number."""


class Epoch(NamedTuple):
    """One row of a training history, in nats per datum.

    Attributes:
        epoch: counted from 1.
        objective: minus the loss, averaged over the epoch's steps; whatever bound that is.
        train_elbo: the plain ELBO after the epoch, of the last ``RECENT`` observations trained on, about.
        validation_elbo: the plain ELBO after the epoch; NaN without validation data.
        learning_rate: of the epoch's last step.
        seconds: that the epoch took.
    """

    epoch: int
    objective: float
    train_elbo: float
    validation_elbo: float
    learning_rate: float
    seconds: float


RECENT = 5000
"""Observations on which the training ELBO is estimated."""


class Batches(Protocol):
    """What ``fit`` trains on: each iteration is one epoch of mini-batches ``(B, X)``; ``len`` is their number."""

    def __iter__(self) -> Iterator[Tensor]: ...

    def __len__(self) -> int: ...


def fit(
    vae: nn.Module,
    train: Batches,
    validation: Tensor | None = None,
    *,
    epochs: int = 30,
    lr: float = 3e-3,
    schedule: Literal["one_cycle", "constant", "stages"] = "one_cycle",
    loss: PyroELBO | Objective | None = None,
    engine: Callable[..., Engine] = PyroSVI,
    patience: int | None = None,
    weights: Literal["last", "best"] = "last",
    checkpoint: Path | None = None,
    resume: bool = False,
    on_epoch: Callable[[list[Epoch]], None] | None = None,
    progress: bool = True,
) -> list[Epoch]:
    """Train a VAE with Adam and leave it with the weights asked for.

    Args:
        vae: a module with the Pyro programs ``model`` and ``guide``.
        train: mini-batches of observations on the module's device.
        validation: observations ``(N, X)`` for the plain ELBO after each epoch; without them it is NaN.
        epochs: passes over ``train``, at least 1.
        lr: learning rate, positive: the peak of the cycle, or that of the first stage.
        schedule: ``one_cycle`` (Smith & Topin 2019; torch's ``OneCycleLR`` without a momentum cycle), ``constant``, or
            ``stages``: stage i = 0, 1, .. has 3^i epochs at the rate lr 10^(-i / 7) (Burda et al. 2016, section 5).
        loss: the training objective, or one of Pyro's ELBOs. Default: Pyro's ``Trace_ELBO()``.
        engine: called as ``engine(model, guide, optim, loss)``.
        patience: stop when the validation ELBO has not risen for so many epochs. Default: never.
        weights: leave the module with its ``last`` weights, or with those of the ``best`` validation ELBO.
        checkpoint: file that receives everything needed to resume, after each epoch, atomically.
        resume: go on from ``checkpoint`` if it exists. The trajectory is that of an uninterrupted run.
        on_epoch: called with the history so far after each epoch, and once when a run is resumed.
        progress: show a progress bar.

    Returns:
        The history, a row per epoch.

    Raises:
        TypeError: if ``loss`` is a class.
        ValueError: if a setting is out of its range, or model, guide and data break the rules of
            :func:`pyro_vae.check_program`.
        NonFiniteError: if training meets a NaN or an infinity. The message names the site; the module and the
            checkpoint hold the last good state.
        CheckpointError: if the checkpoint is truncated, or of another model or schedule.
    """
    _check_settings(epochs, lr, patience, weights, validation)
    loss = loss or pyro.infer.Trace_ELBO()
    if isinstance(loss, type):
        raise TypeError(f"loss is the class {loss.__name__}: pass an object, such as {loss.__name__}()")
    on_gpu = next(vae.parameters()).is_cuda
    optim = torch.optim.Adam(vae.parameters(), lr=lr, fused=True, capturable=on_gpu)
    steps = len(train)
    if steps < 1:
        raise ValueError("there is no mini-batch to train on")
    settings: dict[str, object] = {"schedule": schedule, "lr": lr}
    if schedule == "one_cycle":
        settings["steps"] = epochs * steps
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optim, max_lr=lr, total_steps=epochs * steps, cycle_momentum=False
        )
    elif schedule == "stages":
        scheduler = torch.optim.lr_scheduler.LambdaLR(optim, lambda step: 10 ** (-_stage(step // steps) / 7))
    elif schedule == "constant":
        scheduler = torch.optim.lr_scheduler.ConstantLR(optim, factor=1.0)
    else:
        raise ValueError(f"schedule must be one_cycle, constant or stages, got {schedule}")
    if on_gpu and schedule != "constant":  # a CUDA graph reads the rate of each step where it lies
        for group in optim.param_groups:
            group["lr"] = torch.tensor(group["lr"], device=next(vae.parameters()).device)
    svi = engine(vae.model, vae.guide, optim, loss)
    state = _State(vae, optim, scheduler, settings)
    if resume and checkpoint is not None and checkpoint.exists():
        state.load(checkpoint)
        if on_epoch:
            on_epoch(state.history)

    bar = tqdm(
        total=epochs * steps,
        initial=len(state.history) * steps,
        disable=not progress,
        unit="step",
        desc="training",
    )
    with bar, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Encountered (NaN|[+-]inf)")  # Pyro's; it is an error here, with more to say
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")  # for engines that do
        for epoch in range(len(state.history) + 1, epochs + 1):
            if patience is not None and len(state.history) - state.best_epoch >= patience:
                break
            start = time.perf_counter()
            good = {name: value.clone() for name, value in vae.state_dict().items()}
            total, size = 0.0, 0
            recent: deque[Tensor] = deque()
            num_recent = 0
            for number, batch in enumerate(train):
                if epoch == 1 and number == 0:
                    check_program(vae.model, vae.guide, batch)
                if isinstance(loss, Objective):
                    loss.advance((epoch - 1) * steps + number)
                value = _step(svi, vae, batch)
                if isinstance(value, tuple):
                    raise ValueError(f"{type(loss).__name__} has several values; fit needs a loss that has one")
                total += value if isinstance(loss, PyroELBO) else value * len(batch)
                size += len(batch)
                recent.append(batch)
                num_recent += len(batch)
                while num_recent - len(recent[0]) >= RECENT:
                    num_recent -= len(recent.popleft())
                rate = scheduler.get_last_lr()[0]
                scheduler.step()
                bar.update()
            # a compiled step does not wait to see its loss, so that a NaN is found here
            if not math.isfinite(total) or not all(p.isfinite().all() for p in vae.parameters()):
                vae.load_state_dict(good)
                raise NonFiniteError(
                    f"training stopped: the training loss was NaN or infinite in epoch {epoch}; the weights are those "
                    "of the epoch before. A smaller learning rate may help; the engine PyroSVI names the site"
                )
            validation_elbo = math.nan
            if validation is not None:
                validation_elbo = _validation_elbo(vae, validation)
                if not math.isfinite(validation_elbo):
                    raise _non_finite(vae, validation, f"the validation ELBO is {validation_elbo}")
            train_elbo = estimate_elbo(vae.model, vae.guide, torch.cat(list(recent))).mean().item()
            seconds = time.perf_counter() - start
            row = Epoch(epoch, -float(total) / size, train_elbo, validation_elbo, float(rate), seconds)
            state.record(row)
            if checkpoint is not None:
                state.save(checkpoint)
            if on_epoch:
                on_epoch(state.history)
            bar.set_postfix(
                epoch=f"{epoch}/{epochs}", train=f"{row.train_elbo:.2f}", validation=f"{validation_elbo:.2f}"
            )
    if weights == "best":
        vae.load_state_dict(state.best_weights)
    return state.history


def _stage(epoch: int) -> int:
    """The stage of an epoch, both counted from 0, where stage i has 3^i epochs."""
    stage, end = 0, 1
    while epoch >= end:
        stage += 1
        end += 3**stage
    return stage


def _validation_elbo(vae: nn.Module, x: Tensor) -> float:
    return estimate_elbo(vae.model, vae.guide, x).mean().item()


def _check_settings(epochs: int, lr: float, patience: int | None, weights: str, validation: Tensor | None) -> None:
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {lr}")
    if patience is not None and patience < 1:
        raise ValueError(f"patience must be at least 1, got {patience}")
    if weights not in ("last", "best"):
        raise ValueError(f"weights must be last or best, got {weights}")
    if validation is None and (patience is not None or weights == "best"):
        raise ValueError("patience and weights='best' need validation data")


def _step(svi: Engine, vae: nn.Module, batch: Tensor) -> float | Tensor:
    """One step; where it meets a NaN, or Pyro's own validation refuses one, say at which site."""
    try:
        value = svi.step(batch)
    except NonFiniteError as error:
        raise _non_finite(vae, batch, str(error)) from error
    except ValueError as error:
        if find_non_finite(vae.model, vae.guide, batch) is None:
            raise
        raise _non_finite(vae, batch, "Pyro refuses a value") from error
    if isinstance(value, float) and not math.isfinite(value):
        raise _non_finite(vae, batch, f"the training loss is {value}")
    return value


def _non_finite(vae: nn.Module, x: Tensor, what: str) -> NonFiniteError:
    """The error that says where the NaN is, as far as a look at the observations ``x`` can tell."""
    sites = (find_non_finite(vae.model, vae.guide, part) for part in x.split(1000))
    site = next((site for site in sites if site), None)
    place = f"the {site} is NaN or infinite" if site else f"{what}, with every site finite"
    return NonFiniteError(f"training stopped: {place}; a smaller learning rate may help")


class _State:
    """Everything that a run needs to go on: saved to and loaded from one file."""

    def __init__(
        self,
        vae: nn.Module,
        optim: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        settings: dict[str, object],
    ):
        self.vae = vae
        self.optim = optim
        self.scheduler = scheduler
        self.settings = settings
        self.history: list[Epoch] = []
        self.best_epoch = 0
        self.best_elbo = -math.inf
        self.best_weights: dict[str, Tensor] = {}

    def record(self, row: Epoch) -> None:
        self.history.append(row)
        if row.validation_elbo > self.best_elbo:
            self.best_epoch, self.best_elbo = row.epoch, row.validation_elbo
            self.best_weights = {name: value.clone() for name, value in self.vae.state_dict().items()}

    def save(self, path: Path) -> None:
        cuda = torch.cuda.is_available()
        content = {
            "format": FORMAT,
            "settings": self.settings,
            "weights": self.vae.state_dict(),
            "optimizer": self.optim.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "history": [tuple(row) for row in self.history],
            "best_epoch": self.best_epoch,
            "best_elbo": self.best_elbo,
            "best_weights": self.best_weights,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if cuda else [],
        }
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:  # torch.save itself raises no OSError where a path cannot be written
            torch.save(content, file)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        device = next(self.vae.parameters()).device
        file = io.BytesIO(path.read_bytes())
        try:
            content = torch.load(file, map_location=device, weights_only=True)
        except Exception as error:  # unpickling the bytes of a stranger's file may raise anything
            raise CheckpointError(f"{path} is damaged, or no checkpoint of this program") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise CheckpointError(f"{path} is not a checkpoint of this program")
        previous = content.get("settings", {})
        for name, value in self.settings.items():
            if previous.get(name) != value:
                raise CheckpointError(f"{path} belongs to a run with {name} {previous.get(name)}, not {value}")
        try:
            self.vae.load_state_dict(content["weights"])
            self.optim.load_state_dict(content["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{path} belongs to another model: {textwrap.shorten(str(error), 200)}") from error
        self.scheduler.load_state_dict(content["scheduler"])
        self.history = [Epoch(*row) for row in content["history"]]
        self.best_epoch = content["best_epoch"]
        self.best_elbo = content["best_elbo"]
        self.best_weights = content["best_weights"]
        torch.set_rng_state(content["rng"].cpu())
        for index, rng in enumerate(content["cuda_rng"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(rng.cpu(), index)
