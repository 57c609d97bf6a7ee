"""What happens in a training beside its steps: checkpoints, early stopping, the best weights, and what users add."""

import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pyro_vae.errors import CheckpointError, check_at_least_one, reason_of
from pyro_vae.files import bytes_in, whole
from pyro_vae.infer.parallel import Processes


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


class Training(Protocol):
    """What a callback sees of a training; see :class:`pyro_vae.training.Training`."""

    module: nn.Module
    validation: Any
    epochs: int
    history: list[Epoch]
    kept: dict[str, Any]

    def stop(self) -> None: ...
    def weights(self) -> dict[str, Tensor]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, content: dict[str, Any]) -> None: ...


class Callback:
    """Something to do in a training: override what is needed. Callbacks are called in the order given, and in each of
    several processes; those of this library write in the first alone."""

    def load(self, training: Training) -> None:
        """Before anything else: put the training where it is to begin."""

    def start(self, training: Training) -> None:
        """Before the first epoch, after every ``load``: ``training.history`` has the epochs of an earlier call."""

    def step(self, training: Training) -> None:
        """After each gradient step, of which there are many."""

    def epoch(self, training: Training) -> None:
        """After each epoch: ``training.history[-1]`` is its row, the module has its weights."""

    def save(self, training: Training) -> None:
        """After each epoch, when every callback's ``epoch`` is done: write what is to outlast the process."""

    def end(self, training: Training) -> None:
        """After the last epoch; not where something was raised, which ends the training."""


class EarlyStopping(Callback):
    """Stop when the validation ELBO has not risen for ``patience`` epochs.

    Raises:
        ValueError: if ``patience`` is below 1; by ``fit``, without validation data.
    """

    def __init__(self, patience: int):
        check_at_least_one(patience=patience)
        self.patience = patience

    def start(self, training: Training) -> None:
        _check_validation(self, training)
        self.epoch(training)

    def epoch(self, training: Training) -> None:
        if len(training.history) - best_epoch(training.history) >= self.patience:
            training.stop()


class BestWeights(Callback):
    """Leave the module with the weights of the highest validation ELBO, not with the last ones.

    Raises:
        ValueError: by ``fit``, without validation data.
        CheckpointError: by ``fit``, if a training is resumed that did not keep them.
    """

    def start(self, training: Training) -> None:
        _check_validation(self, training)
        if training.history and not training.kept.get("best_weights"):
            raise CheckpointError("the checkpoint has no best weights, since BestWeights was not among its callbacks")

    def epoch(self, training: Training) -> None:
        if best_epoch(training.history) == len(training.history):
            training.kept["best_weights"] = training.weights()

    def end(self, training: Training) -> None:
        training.module.load_state_dict(training.kept["best_weights"])


class AverageWeights(Callback):
    """Leave the module with the average of its weights after each step, of which later ones count more.

    After T steps it is (1 - decay) sum_t decay^(T - t) w_t / (1 - decay^T), in which the first weights have no share of
    their own (Kingma & Ba 2015, section 3). Rows of the history are of the weights that are trained. Buffers are the
    last ones.

    Args:
        decay: about 1 / (1 - decay) of the last steps count; above 0 and below 1.

    Raises:
        ValueError: if ``decay`` is out of its range.
        CheckpointError: by ``fit``, if a training is resumed that did not average.
    """

    def __init__(self, decay: float = 0.999):
        if not 0 < decay < 1:
            raise ValueError(f"decay must be above 0 and below 1, got {decay}")
        self.decay = decay

    def start(self, training: Training) -> None:
        if training.history and not training.kept.get("average_weights"):
            raise CheckpointError("the checkpoint has no average of weights, as AverageWeights was not a callback")
        # apart from the module, whose own tensors a recorded step reads and writes where they are
        parameters = dict(training.module.named_parameters())
        kept = training.kept.get("average_weights") or {"steps": 0, "values": parameters}
        values = {name: kept["values"][name].detach().to(p.device, copy=True) for name, p in parameters.items()}
        training.kept["average_weights"] = {"steps": kept["steps"], "values": values}
        self._now: list[Tensor] = list(parameters.values())

    def step(self, training: Training) -> None:
        kept = training.kept["average_weights"]
        kept["steps"] += 1
        # the first one is the weights themselves
        decay = 1 - (1 - self.decay) / (1 - self.decay ** kept["steps"])
        get_ema_multi_avg_fn(decay)(list(kept["values"].values()), self._now, None)

    def end(self, training: Training) -> None:
        values = list(training.kept["average_weights"]["values"].values())
        Processes().share(values, near=True)
        with torch.no_grad():
            for p, value in zip(self._now, values, strict=True):
                p.copy_(value)


class Checkpoint(Callback):
    """Write everything needed to resume to a file, after each epoch, atomically.

    Args:
        path: the file.
        resume: go on from it if it exists. The trajectory is that of an uninterrupted run, but for its random numbers
            where the number of processes is another.
        about: what the training is of, such as its data: written to the file, and compared with what a file says.

    Raises:
        CheckpointError: by ``fit``, if the file is damaged, or of another model, optimizer or schedule, or about
            something else.
        OSError: by ``fit``, if it cannot be read or written.
    """

    def __init__(self, path: Path | str, resume: bool = False, about: Mapping[str, Any] | None = None):
        self.path, self.resume, self.about = Path(path), resume, dict(about or {})

    def load(self, training: Training) -> None:
        processes = Processes()
        device = "cpu" if processes.grouped else next(training.module.parameters()).device
        content = processes.from_first(lambda: self._read(device))
        if content is None:
            return
        try:
            known = content.get("about", {}) if isinstance(content, dict) else {}
            for name, value in self.about.items():
                if name in known and known[name] != value:
                    raise CheckpointError(f"belongs to a training with {name} {known[name]}, not {value}")
            training.load_state_dict(content)
            if not content["history"]:
                raise CheckpointError("is damaged: its history has no epoch")
        except CheckpointError as error:
            raise CheckpointError(f"{self.path} {error}") from error
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{self.path} is damaged: {reason_of(error)}") from error

    def _read(self, device: torch.device | str) -> Any:
        """What the file holds; None if there is nothing to go on from."""
        if not (self.resume and os.path.lexists(self.path)):
            return None
        written = bytes_in(self.path)
        file, seal = io.BytesIO(written), _seal(written[:-SEALED]) if len(written) > SEALED else b""
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()  # torch writes checksums, and does not read them
            file.seek(0)
            content = torch.load(file, map_location=device, weights_only=True)
        except Exception as error:  # unpickling the bytes of a stranger's file may raise anything
            raise CheckpointError(f"{self.path} is damaged, or no checkpoint of this program") from error
        if damaged:
            raise CheckpointError(f"{self.path} is damaged: the checksum of {damaged} is another")
        if isinstance(content, dict) and content.get("sealed") and written[-SEALED:] != seal:
            raise CheckpointError(f"{self.path} is damaged: its checksum is another")
        return content

    def save(self, training: Training) -> None:
        Processes().from_first(lambda: self._write(training))

    def _write(self, training: Training) -> None:
        content = io.BytesIO()  # torch.save itself raises no OSError where a path cannot be written
        torch.save(training.state_dict() | {"about": self.about, "sealed": True}, content)
        archive = content.getbuffer()[:-2]  # which end with the length of a comment, 0
        with whole(self.path) as partial, partial.open("wb") as file:
            file.write(archive)
            file.write(_seal(archive))


SEALED = 66
"""Bytes of a seal."""


def _seal(archive: bytes | memoryview) -> bytes:
    """A checksum of all bytes before it, as the comment at the end of an archive: its length, and the comment."""
    comment = hashlib.sha256(archive).hexdigest().encode()
    return len(comment).to_bytes(2, "little") + comment


class OnEpoch(Callback):
    """Call a function with the history so far, after each epoch and once when a training is resumed: for a log.
    Given after :class:`Checkpoint`, it is called when the epoch's checkpoint has been written. Of several processes the
    first one calls it.
    """

    def __init__(self, function: Callable[[list[Epoch]], object]):
        self.function = function

    def start(self, training: Training) -> None:
        if training.history:
            self.save(training)

    def save(self, training: Training) -> None:
        def tell() -> None:
            self.function(training.history)

        Processes().from_first(tell)


def best_epoch(history: Sequence[Epoch]) -> int:
    """The first of the epochs with the highest validation ELBO, counted from 1; 0 of an empty history."""
    return max(history, key=lambda row: row.validation_elbo).epoch if history else 0


def _check_validation(callback: Callback, training: Training) -> None:
    if training.validation is None:
        raise ValueError(f"{type(callback).__name__} needs validation data")
