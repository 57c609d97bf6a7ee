"""fit: epochs of an engine's steps, with validation and a learning-rate schedule; callbacks do the rest."""

import math
import textwrap
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, Protocol, cast

import torch
from pyro.infer import ELBO as PyroELBO
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from tqdm import tqdm

from pyro_vae.callbacks import AverageWeights as AverageWeights
from pyro_vae.callbacks import BestWeights, Callback, Checkpoint, EarlyStopping, Epoch, OnEpoch
from pyro_vae.errors import CheckpointError, ContractError, NonFiniteError, ProcessLost, check_at_least_one
from pyro_vae.infer.batches import ADVICE, Watch, explained, is_refusal
from pyro_vae.infer.checks import check_data, check_program
from pyro_vae.infer.diagnostics import mean_log_weights
from pyro_vae.infer.engines import Engine, PyroSVI
from pyro_vae.infer.objectives import Objective
from pyro_vae.infer.parallel import DataParallel, Processes
from pyro_vae.infer.programs import Program, evaluating
from pyro_vae.infer.retreat import Retreat, Step
from pyro_vae.infer.trees import Data, call, check_same_structure, concatenate, first_tensor
from pyro_vae.infer.turns import WarmUp
from pyro_vae.optimizers import OptimizerFactory, ScheduleFactory, make_optimizer, make_schedule, name_of, switch

FORMAT = "pyro_vae.training/3"  # of a checkpoint; another layout gets another number
RECENT = 5000  # observations on which the training ELBO is estimated


class Batches(Protocol):
    """What ``fit`` trains on: each iteration is one epoch of mini-batches; ``len`` is their number.

    A mini-batch is a tensor, a tuple or list of tensors, or a dict of them, whose first dimension is the datum: the
    programs are called as ``model(x)``, ``model(*tensors)`` or ``model(**tensors)``. A ``DataLoader`` is one; one of
    ``(x, y)``, for a model that takes no y, becomes one by :class:`FlatBatches`.
    """

    def __iter__(self) -> Iterator[Data]: ...

    def __len__(self) -> int: ...


class FlatBatches:
    """The x of another's mini-batches, flat and of real numbers, as a VAE takes it: ``(B, X)``.

    For loaders of torch and torchvision, whose mini-batches are ``(x, y)``, or whose images are ``(B, C, H, W)`` or of
    whole numbers; labels are dropped, values stay as they are.

    Args:
        loader: mini-batches, each a tensor or a tuple or list whose first one is x; ``len`` is their number.

    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> images, labels = torch.ones(5, 1, 2, 3, dtype=torch.uint8), torch.arange(5)
    >>> [x.shape for x in FlatBatches(DataLoader(TensorDataset(images, labels), batch_size=4))]
    [torch.Size([4, 6]), torch.Size([1, 6])]
    """

    def __init__(self, loader: Any):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.loader:
            x = (batch[0] if isinstance(batch, tuple | list) else batch).flatten(1)
            yield x if x.is_floating_point() else x.to(torch.get_default_dtype())


def fit(
    module: nn.Module,
    train: Batches,
    validation: Data | None = None,
    *,
    epochs: int = 30,
    lr: float = 3e-3,
    optimizer: Literal["adam"] | OptimizerFactory = "adam",
    schedule: Literal["one_cycle", "constant", "stages", "trapezoid"] | ScheduleFactory = "one_cycle",
    loss: PyroELBO | Objective | None = None,
    engine: Callable[..., Engine] = PyroSVI,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    **old: Any,
) -> list[Epoch]:
    """Train a module's programs and leave it with the last weights, or with those that a callback chooses.

    Args:
        module: has the Pyro programs ``model`` and ``guide``, such as a VAE.
        train: mini-batches on the module's device, see :class:`Batches`.
        validation: data of the same kind for the plain ELBO after each epoch; without them it is NaN.
        epochs: passes over ``train``, at least 1.
        lr: learning rate, positive: the peak of the cycle, or that of the first stage.
        optimizer: ``adam``, or a function called as ``optimizer(parameters, lr=lr)`` with the module's parameters,
            which returns an optimizer of torch; so ``torch.optim.SGD`` itself. Where parameters need different ones,
            as for ``torch.optim.Muon``, return :class:`pyro_vae.optimizers.Together`. Those without a schedule, which
            have ``train`` and ``eval``, are switched around training and evaluation.
        schedule: ``one_cycle`` (Smith & Topin 2019; torch's ``OneCycleLR`` without a momentum cycle), ``constant``,
            ``stages``: stage i = 0, 1, .. has 3^i epochs at the rate lr 10^(-i / 7) (Burda et al. 2016, section 5),
            ``trapezoid``: see :class:`pyro_vae.optimizers.Trapezoid`; or a function called as
            ``schedule(optimizer, steps_per_epoch=..., epochs=...)``, which returns a scheduler of torch. It is stepped
            after each gradient step.
        loss: the training objective, or one of Pyro's ELBOs. Default: Pyro's ``Trace_ELBO()``.
        engine: called as ``engine(model, guide, optim, loss)``.
        callbacks: :class:`EarlyStopping`, :class:`BestWeights`, :class:`AverageWeights`, :class:`Checkpoint`,
            :class:`OnEpoch`, or of your own.
        progress: show a progress bar.
        old: keywords of version 0.1.0, which callbacks have replaced; they give a DeprecationWarning.

    Returns:
        The history, a row per epoch.

    Raises:
        TypeError: if ``loss`` is a class, or ``optimizer`` or ``schedule`` returns something other than it should.
        ValueError: if a setting is out of its range, or :func:`pyro_vae.check_program` refuses model, guide or data.
        NonFiniteError: if training meets a NaN or an infinity, of losses, gradients, weights or moments of the
            optimizer. The message names the site, the row and the step. The module is left in its last good state,
            with weights and ELBO finite, and so are its buffers, the optimizer, the schedule and Pyro's parameters;
            the message says after which step that is. A checkpoint holds the last epoch.
    """
    check_at_least_one(epochs=epochs)
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {lr}")
    loss = loss or Trace_ELBO()
    if isinstance(loss, type):
        raise TypeError(f"loss is the class {loss.__name__}: pass an object, such as {loss.__name__}()")
    if not hasattr(train, "__len__") or len(train) < 1:
        raise ValueError("there is no mini-batch to train on: train must have some, and len(train) be their number")
    callbacks = [*callbacks, *_callbacks_of(old)]
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise TypeError(f"callbacks must be Callback objects, got {name_of(callback)}")
    training = Training(module, train, validation, epochs, lr, optimizer, schedule)
    return training.run(engine, loss, callbacks, progress)


def _callbacks_of(old: dict[str, Any]) -> list[Callback]:
    """The callbacks that do what keywords of version 0.1.0 did."""
    known = {"patience": None, "weights": "last", "checkpoint": None, "resume": False, "on_epoch": None}
    if unknown := ", ".join(old.keys() - known):
        raise TypeError(f"fit() got an unexpected keyword argument: {unknown}")
    patience, weights, checkpoint, resume, on_epoch = (known | old).values()
    if weights not in ("last", "best"):
        raise ValueError(f"weights must be last or best, got {weights}")
    new = {
        "EarlyStopping(patience)": EarlyStopping(patience) if patience is not None else None,
        "BestWeights()": BestWeights() if weights == "best" else None,
        "Checkpoint(path, resume)": Checkpoint(checkpoint, resume) if checkpoint is not None else None,
        "OnEpoch(function)": OnEpoch(on_epoch) if on_epoch is not None else None,
    }
    if old:
        instead = f"callbacks=[{', '.join(name for name, made in new.items() if made)}], of pyro_vae.training"
        warnings.warn(f"{', '.join(old)} of fit: write {instead}", DeprecationWarning, stacklevel=3)
    return [made for made in new.values() if made]


class Training:
    """A training on its way: what callbacks see, and all that a checkpoint holds.

    Attributes:
        module, train, validation, epochs: as given to :func:`fit`.
        optimizer, scheduler: those of torch.
        history: a row per epoch so far.
        kept: what callbacks want to find again when a training is resumed, each under a name of its own: tensors,
            numbers, strings, and lists, tuples and dicts of these.
    """

    def __init__(
        self, module: Any, train: Batches, validation: Any, epochs: int, lr: float, optimizer: Any, schedule: Any
    ):
        self.module: nn.Module = module
        self.train, self.epochs = train, epochs
        self.validation: Data | None = validation
        self._programs: tuple[Program, Program] = (module.model, module.guide)
        self.optimizer = make_optimizer(optimizer, list(module.parameters()), lr)
        self.scheduler = make_schedule(schedule, self.optimizer, len(train), epochs)
        self.history: list[Epoch] = []
        self.kept: dict[str, Any] = {}
        self._settings = {"optimizer": name_of(optimizer), "schedule": name_of(schedule), "lr": lr}
        if schedule not in ("constant", "stages"):  # these do not depend on when a training ends
            self._settings["steps"] = epochs * len(train)
        self._stopped, self._watch = False, cast(Watch | None, None)
        self._recent: deque[tuple[int, Data]] = deque()
        self._num_recent = 0
        self._processes = Processes()
        self._at_steps: list[Callback] = []

    def stop(self) -> None:
        """End the training with the epoch that is done."""
        self._stopped = True

    def weights(self) -> dict[str, Tensor]:
        """A copy of the module's weights as they are."""
        return {name: value.clone() for name, value in self.module.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on from here as if nothing had happened, random states included."""
        return {
            "format": FORMAT,
            "settings": self._settings,
            "weights": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "history": [tuple(row) for row in self.history],
            "kept": self.kept,
            "processes": self._processes.size,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "mps_rng": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
        }

    def load_state_dict(self, content: dict[str, Any]) -> None:
        """Go on from a state, of this version or of 0.1.0.

        Raises:
            CheckpointError: if it is not such a state, or is that of another model, optimizer or schedule.
        """
        if not isinstance(content, dict) or content.get("format") not in (FORMAT, "pyro_vae.training/2"):
            raise CheckpointError("is not a checkpoint of this program")
        previous = {"optimizer": "adam"} | content["settings"]  # 0.1.0 had no other
        for name, value in self._settings.items():
            if previous.get(name) != value:
                raise CheckpointError(f"belongs to a run with {name} {previous.get(name)}, not {value}")
        try:
            self.module.load_state_dict(content["weights"])
            self.optimizer.load_state_dict(content["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"belongs to another model: {textwrap.shorten(str(error), 200)}") from error
        self.scheduler.load_state_dict(content["scheduler"])
        self.history = [Epoch(*row) for row in content["history"]]
        if [row.epoch for row in self.history] != list(range(1, len(self.history) + 1)):
            raise CheckpointError("is damaged: its history is not one row for each epoch")
        before, now = content.get("processes", 1), self._processes.size
        if before != now and self._processes.is_first:
            warnings.warn(
                f"the training goes on in {now} process{'es' * (now > 1)}, after {before}: it is the same but for its "
                "random numbers",
                stacklevel=2,
            )
        self.kept = content["kept"] if "kept" in content else {"best_weights": content["best_weights"]}
        torch.set_rng_state(content["rng"].cpu())
        for index, rng in enumerate(content["cuda_rng"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(rng.cpu(), index)
        if (rng := content.get("mps_rng")) is not None and torch.backends.mps.is_available():
            torch.mps.set_rng_state(rng.cpu())

    def run(
        self, engine: Callable[..., Engine], loss: PyroELBO | Objective, callbacks: Sequence[Callback], progress: bool
    ) -> list[Epoch]:
        """Train to the end; return the history."""
        processes = self._processes
        svi = engine(*self._programs, self.optimizer, loss)
        if processes.grouped:
            svi = DataParallel(svi, processes)

        def take(step: Step) -> object:
            if isinstance(loss, Objective | WarmUp):
                loss.advance(step.number)
            value = call(svi.step, step.batch)
            self.scheduler.step()
            return value

        for callback in callbacks:
            callback.load(self)
        self._check_same(loss)
        for callback in callbacks:
            callback.start(self)
        self._at_steps = [each for each in callbacks if type(each).step is not Callback.step]
        retreat = Retreat(self.module, self.optimizer, self.scheduler, take, self._look)
        total, done = self.epochs * len(self.train), len(self.history) * len(self.train)
        hidden = not progress or not processes.is_first
        bar = tqdm(total=total, initial=done, disable=hidden, unit="step", desc="training")
        with bar, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Encountered (NaN|[+-]inf)")  # Pyro's; an error here, with more to say
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")  # engines do that
            while len(self.history) < self.epochs and not self._stopped:
                self.history.append(row := self._epoch_of_all(svi, loss, retreat, bar))
                for callback in callbacks:
                    callback.epoch(self)
                for callback in callbacks:
                    callback.save(self)
                self._stopped = processes.from_first(lambda: self._stopped)
                elbos = {"train": f"{row.train_elbo:.2f}", "validation": f"{row.validation_elbo:.2f}"}
                bar.set_postfix({"epoch": f"{row.epoch}/{self.epochs}"} | elbos)
        for callback in callbacks:
            callback.end(self)
        return self.history

    def _check_same(self, loss: PyroELBO | Objective) -> None:
        """Let all processes begin alike, or refuse to."""
        settings = self._settings | {
            "loss": type(loss).__name__,
            "epochs": self.epochs,
            "number of mini-batches": len(self.train),
        }
        self._processes.check_same(**settings, epoch=len(self.history), stopped=self._stopped)
        self._processes.share(list(self.module.state_dict().values()))

    def _epoch_of_all(self, svi: Engine, loss: PyroELBO | Objective, retreat: Retreat, bar: tqdm) -> Epoch:
        """An epoch after which all processes have one row, the same weights and the same random numbers to come."""
        processes, device = self._processes, next(self.module.parameters()).device
        processes.share_randomness(device)
        row = self._epoch(svi, loss, retreat, bar)
        processes.check_same_data(self._recent[-1][1])
        processes.share(list(self.module.buffers()))
        processes.share(list(self.module.parameters()), near=True)
        return processes.from_first(lambda: row)

    def _epoch(self, svi: Engine, loss: PyroELBO | Objective, retreat: Retreat, bar: tqdm) -> Epoch:
        """Train and evaluate for one epoch."""
        start, epoch = time.perf_counter(), len(self.history) + 1
        switch((self.optimizer,), "train")
        retreat.begin((epoch - 1) * len(self.train))
        try:
            objective, rate = self._steps(svi, loss, retreat, bar)
        except (ContractError, ProcessLost):  # refused late: steps on a GPU are not waited for
            retreat.to_a_copy()
            raise
        except NonFiniteError as error:
            raise self._undone(error, retreat) from error
        finally:
            switch((self.optimizer,), "eval")
        validation_elbo = math.nan
        try:
            if (x := self.validation) is not None:
                validation_elbo = self._finite("validation", x, lambda: _validation_elbo(self._programs, x))
            measure, recent = partial(mean_log_weights, *self._programs), self._last()
            train_elbo = self._finite("training", recent, lambda: self._processes.mean(measure, recent))
        except NonFiniteError as error:
            switch((self.optimizer,), "train")
            undone = self._undone(error, retreat, look=True)
            switch((self.optimizer,), "eval")
            raise undone from error
        return Epoch(epoch, objective, train_elbo, validation_elbo, rate, time.perf_counter() - start)

    def _finite(self, name: str, data: Data, measure: Callable[[], float]) -> float:
        """The ELBO of data, which must be a number."""
        try:
            elbo = measure()
        except (ValueError, RuntimeError) as error:
            if not is_refusal(error, self._programs, data):
                raise
            raise explained(self._programs, data, f"the {name} ELBO cannot be computed") from error
        if not math.isfinite(elbo):
            raise explained(self._programs, data, f"the {name} ELBO is {elbo}")
        return elbo

    def _undone(self, error: NonFiniteError, retreat: Retreat, look: bool = False) -> NonFiniteError:
        """The error of a step, of a training that has been put into its last good state."""
        told: list[str] = []

        def explain(step: Step, what: str) -> None:
            message = str(explained(self._programs, step.batch, what))
            blameless = not step.number and "after the step" not in what  # there was no step that could be smaller
            message = message.replace(f"; {ADVICE}", ", at the first weights") if blameless else message
            told.append(str(error) if look else message)  # which names the site that is not finite then
            told.append(f"step {step.number + 1}, {step.name}")

        state = retreat.back(explain, look)
        message, *where = told or [str(error)]
        return NonFiniteError("; ".join([message, *where, _weights_of(state.step)]))

    def _steps(self, svi: Engine, loss: PyroELBO | Objective, retreat: Retreat, bar: tqdm) -> tuple[float, float]:
        """One pass over the mini-batches: minus the loss per datum, and the last learning rate."""
        total, size, rate, first, watch = 0.0, 0, math.nan, None, None
        before = len(self.history) * len(self.train)
        self._recent.clear()
        self._num_recent = 0
        for number, batch in enumerate(self.train):
            if before == number == 0:
                with evaluating(*self._programs):
                    check_program(*self._programs, batch)
            self._watch = watch = self._watch or self._begin(batch)
            first = batch if first is None else first
            check_same_structure(batch, first, "the first mini-batch")
            name = f"mini-batch {number + 1} of epoch {len(self.history) + 1}"
            watch.look(batch, name)
            retreat.add(Step(before + number, batch, name))
            if isinstance(loss, Objective | WarmUp):
                loss.advance(before + number)
            value = watch.step(svi.step, batch)
            if isinstance(value, tuple):
                raise ValueError(f"{type(loss).__name__} has several values; fit needs a loss that has one")
            count = len(first_tensor(batch))
            total += value if isinstance(loss, PyroELBO) else value * count
            size += count
            self._remember(count, batch)
            rate = self.scheduler.get_last_lr()[0]
            self.scheduler.step()
            for callback in self._at_steps:
                callback.step(self)
            bar.update()
            if retreat.is_due:
                watch.finish()
                self._check_finite(sum(self._processes.gather(float(total))), retreat)
                retreat.advance()
        if watch is None:
            raise ValueError(f"train gave no mini-batch in epoch {len(self.history) + 1}: is it an iterator, used up?")
        watch.finish()
        total = sum(self._processes.gather(float(total)))
        self._check_finite(total, retreat)
        return -total / size, float(rate)

    def _check_finite(self, total: float, retreat: Retreat) -> None:
        """A compiled step does not wait to see its loss, so that a NaN is found now and then."""
        if not math.isfinite(total) or not retreat.is_finite():
            what = "a training loss" if not math.isfinite(total) else "a gradient, or a moment of the optimizer,"
            raise NonFiniteError(f"training stopped: {what} is NaN or infinite; {ADVICE}")

    def _remember(self, count: int, batch: Data) -> None:
        self._recent.append((count, batch))
        self._num_recent += count
        while self._num_recent - self._recent[0][0] >= RECENT:
            self._num_recent -= self._recent.popleft()[0]

    def _last(self) -> Data:
        """About the last ``RECENT`` observations trained on."""
        return concatenate([batch for _, batch in self._recent])

    def _look(self) -> float:
        """The ELBO of what has been seen in this epoch, and of validation data; 0 of nothing."""
        seen = [self._last()] if self._recent else []
        seen += [] if self.validation is None else [self.validation]
        return sum(mean_log_weights(*self._programs, each).mean().item() for each in seen)

    def _begin(self, batch: Data) -> Watch:
        """Check validation data, and in a training that is resumed the first mini-batch, in full."""
        if self.history:
            check_data(*self._programs, batch)
        if self.validation is not None:
            check_same_structure(self.validation, batch, "the first mini-batch")
            try:
                check_data(*self._programs, self.validation)
            except ContractError as error:
                raise ContractError(f"validation: {error}") from error
        return Watch(*self._programs, batch)


def _weights_of(step: int) -> str:
    return f"the weights are those after step {step}" if step else "the weights are those from before the first step"


def _validation_elbo(programs: tuple[Program, Program], data: Data) -> float:
    return Processes().mean(partial(mean_log_weights, *programs), data)
