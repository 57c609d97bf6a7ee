"""The way back of a training that meets a NaN: copies of its state at intervals, and the steps since, taken again."""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import pyro
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only

from pyro_vae.errors import NonFiniteError
from pyro_vae.infer.randomness import Randomness
from pyro_vae.infer.tracing import put_back
from pyro_vae.infer.trees import Data, tensors


class State:
    """All that a gradient step changes, as it is when this is made: a copy.

    Weights and buffers of the module, entries of Pyro's parameter store, states of optimizer and schedule.

    Args:
        step: how many steps of the training have been taken.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, scheduler: Any, step: int):
        self.step, self._optimizer, self._scheduler = step, optimizer, scheduler
        store = pyro.get_param_store()
        self._store = dict(store._params), dict(store._constraints), dict(store._param_to_name)
        held = [*module.parameters(), *module.buffers(), *_held(optimizer), *self._store[0].values()]
        with torch.no_grad():
            self._kept = [(x, x.detach().clone()) for x in {id(x): x for x in held}.values()]
            self._optimizers = tree_map_only(Tensor, Tensor.clone, optimizer.state_dict())
        self._schedule = copy.deepcopy(scheduler.state_dict())

    def restore(self) -> None:
        """Put all of it back; may be done several times."""
        put_back(self._kept)
        store = pyro.get_param_store()
        for kept, now in zip(self._store, (store._params, store._constraints, store._param_to_name), strict=True):
            now.clear()
            cast(dict[Any, Any], now).update(kept)
        self._optimizer.load_state_dict(tree_map_only(Tensor, Tensor.clone, self._optimizers))
        self._scheduler.load_state_dict(copy.deepcopy(self._schedule))


class Step(NamedTuple):
    """A step that was taken: its number, counted from 0, its mini-batch and what the batch is called."""

    number: int
    batch: Data
    name: str


class Retreat:
    """Keeps a training's state at intervals, and finds the last good one when something is not finite.

    A state is good if its weights, buffers and moments of the optimizer are finite and so is the ELBO that ``look``
    gives, of data that training has seen. Copies cost less than a hundredth of a step: one is made every ``INTERVAL``
    steps, fewer if the mini-batches since, which are kept, are large. On failure the steps since the copy are taken
    again with the same noise, each looked at. Where they do not fail again, or several processes train together, the
    last good state is a copy.

    Args:
        module, optimizer, scheduler: of the training.
        take: takes a step again, and gives its loss.
        look: the ELBO of data seen so far, which a state is judged by.
    """

    INTERVAL, LEAST, MOST_ENTRIES = 128, 16, 2**24

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        scheduler: Any,
        take: Callable[[Step], Any],
        look: Callable[[], float],
    ):
        self._module, self._optimizer, self._scheduler = module, optimizer, scheduler
        self._take, self._look = take, look
        watched = [*module.parameters(), *module.buffers(), *_held(optimizer)]
        watched = list({id(x): x for x in watched if x.is_floating_point()}.values())
        # a mask of -inf, for instance, is what it should be
        self._watched = [x for x in watched if x.numel() and x.isfinite().all()]
        self._epoch: State | None = None
        self._recent: State | None = None
        self._devices = {x.device for x in self._watched if x.is_cuda}
        self._steps: list[tuple[Step, Randomness]] = []
        self._entries = 0

    def begin(self, step: int) -> None:
        """An epoch begins, after so many steps: its validation was finite, so that this state is good."""
        if self._epoch is None or self.is_finite():
            self._epoch = self._recent = self._state(step)
            self._steps, self._entries = [], 0

    def add(self, step: Step) -> None:
        """A step is about to be taken."""
        self._steps.append((step, Randomness(self._devices, others=False)))
        self._entries += sum(x.numel() for x in tensors(step.batch))

    @property
    def is_due(self) -> bool:
        """Whether it is time to look at what has been done, and to call ``advance``."""
        number = len(self._steps)
        return number >= self.INTERVAL or (number >= self.LEAST and self._entries > self.MOST_ENTRIES)

    def advance(self) -> None:
        """So far all is well: keep the state."""
        self._recent = self._state(self._steps[-1][0].number + 1)
        self._steps, self._entries = [], 0

    def is_finite(self) -> bool:
        """Whether weights, buffers and the moments of torch's own optimizers are finite, as they were at first."""
        moments = [
            x
            for each in getattr(self._optimizer, "optimizers", (self._optimizer,))
            if type(each).__module__.startswith("torch.optim")
            for x in tree_leaves(list(each.state.values()))
            if isinstance(x, Tensor) and x.is_floating_point() and x.numel()
        ]
        # a sum is finite only if all of it is, unless it overflows, and takes a tenth of the time
        found = [x.detach().sum().isfinite() for x in (*self._watched, *moments)]
        fine = not found or torch.stack([each.to(found[0].device) for each in found]).all()
        return bool(fine) or all(bool(x.isfinite().all()) for x in (*self._watched, *moments))

    def back(self, explain: Callable[[Step, str], object], look: bool = False) -> State:
        """Put the training into its last good state.

        Args:
            explain: called with the step that fails, in the state before it, and with what it does then.
            look: a step fails too if the ELBO of what has been seen is not finite after it.
        """
        last, before = None, None
        if self._recent is not None and not _several_processes():
            failed, what, last, before = self._again(self._recent, look)
            if failed is not None and last is not None:
                last.restore()
                failed[1].restore()
                explain(failed[0], what)
        return self._first_good([last, before, self._recent, self._epoch])

    def to_a_copy(self) -> State:
        """Put the training into the last state that was kept, or that at the beginning of this epoch."""
        return self._first_good([self._recent, self._epoch])

    def _again(
        self, start: State, look: bool
    ) -> tuple[tuple[Step, Randomness] | None, str, State | None, State | None]:
        """Take the steps again: the one that fails, how, the state before it, and the one before that; or nothing."""
        start.restore()
        last, before = start, None
        for taken in self._steps:
            step, randomness = taken
            randomness.restore()
            if taken is not self._steps[0]:
                last, before = self._state(step.number), last
            what = ""
            try:
                value = self._take(step)
                if not torch.as_tensor(value).isfinite().all():
                    what = f"the training loss is {float(value)}"
                elif not self.is_finite():
                    what = "a weight, a buffer or a moment of the optimizer is NaN or infinite after the step"
                elif look and not self._finite_look():
                    what = "the ELBO of what has been seen is NaN or infinite after the step"
            except NonFiniteError as error:
                what = str(error)
            except (ValueError, RuntimeError):
                what = "Pyro refuses a value"
            if what:
                return taken, what, last, before
        return None, "", None, None

    def _first_good(self, states: Iterable[State | None]) -> State:
        known = list({id(state): state for state in states if state is not None}.values())
        for state in known:
            state.restore()
            if state is known[-1] or (self.is_finite() and self._finite_look()):
                break
        return state

    def _finite_look(self) -> bool:
        try:
            return math.isfinite(self._look())
        except (ValueError, RuntimeError):  # Pyro refuses a scale of infinity, torch to draw with one of NaN
            return False

    def _state(self, step: int) -> State:
        return State(self._module, self._optimizer, self._scheduler, step)


def _held(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _several_processes() -> bool:
    """Whether others would have to take the steps again as well."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
