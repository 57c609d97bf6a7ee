"""Optimizers and schedules as fit makes them: by a short name, or by a factory of yours."""

import inspect
import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import LBFGS, Adam, Optimizer, SparseAdam
from torch.optim.lr_scheduler import ConstantLR, LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from pyro_vae.errors import check_at_least_one, reason_of

Made = TypeVar("Made")

OptimizerFactory = Callable[..., Optimizer]
"""``optimizer(parameters, lr=lr)``, given a list of tensors: any optimizer class of torch is one."""

ScheduleFactory = Callable[..., LRScheduler]
"""``schedule(optimizer, steps_per_epoch=..., epochs=...)``: its scheduler is stepped after each gradient step."""


class Together(Optimizer):
    """Several optimizers, each with parameters of its own, as one.

    >>> def muon(parameters, lr):
    ...     matrices, others = [p for p in parameters if p.ndim == 2], [p for p in parameters if p.ndim != 2]
    ...     return Together(torch.optim.Muon(matrices, lr=lr), torch.optim.AdamW(others, lr=lr / 10))
    >>> len(muon(list(torch.nn.Linear(3, 2).parameters()), lr=0.01).param_groups)
    2

    Args:
        optimizers: of torch, at least one, none of which needs a closure.

    Raises:
        ValueError: if two hold the same parameter.
    """

    def __init__(self, *optimizers: Optimizer):
        self.optimizers = optimizers
        super().__init__([group for each in optimizers for group in each.param_groups], {})

    def step(self, closure: None = None) -> None:
        """Let each take its step."""
        for each in self.optimizers:
            each.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of all."""
        return {"optimizers": [each.state_dict() for each in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give each its state.

        Raises:
            ValueError: if these are the states of others.
        """
        states = state_dict.get("optimizers", ())
        if len(states) != len(self.optimizers):
            raise ValueError(f"these are the states of {len(states)} optimizers, not of {len(self.optimizers)}")
        for each, state in zip(self.optimizers, states, strict=True):
            each.load_state_dict(state)
        self.param_groups = [group for each in self.optimizers for group in each.param_groups]
        self.state = defaultdict(dict)  # another object tells a compiled engine that what it recorded is gone

    def train(self) -> None:
        """Switch those to training for which that makes a difference."""
        switch(self.optimizers, "train")

    def eval(self) -> None:
        """Switch those to evaluation for which that makes a difference."""
        switch(self.optimizers, "eval")


class Muon(Together):
    """Muon for matrices (Jordan et al. 2024), whose steps are orthogonal, and Adam for all other parameters.

    A step of a matrix is as large as one of Adam (Liu et al. 2025), so that one rate serves both. Every tensor with two
    dimensions is a matrix here, pseudo-inputs of a VampPrior too.

    Args:
        parameters: tensors.
        lr: learning rate.
        momentum: of the matrices' gradients, at least 0 and below 1.
        iterations: of Newton and Schulz, which make a step orthogonal, at least 1. Each multiplies matrices three
            times, and five of them take longer than the gradient of a small mini-batch.
        weight_decay: matrices shrink by lr times this in a step, at least 0.

    Raises:
        ValueError: if a setting is out of its range.

    >>> len(Muon(list(torch.nn.Linear(3, 2).parameters())).optimizers)
    2
    """

    def __init__(
        self,
        parameters: list[Tensor],
        lr: float = 5e-3,
        momentum: float = 0.95,
        iterations: int = 5,
        weight_decay: float = 0.0,
    ):
        check_at_least_one(iterations=iterations)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}")
        matrices, others = [p for p in parameters if p.ndim == 2], [p for p in parameters if p.ndim != 2]
        made: list[Optimizer] = []
        if matrices:
            like_adam: Any = {"adjust_lr_fn": "match_rms_adamw", "weight_decay": weight_decay}
            made.append(torch.optim.Muon(matrices, lr=lr, momentum=momentum, ns_steps=iterations, **like_adam))
        if others:
            made.append(Adam(others, lr=lr, fused=True, capturable=others[0].is_cuda))
        super().__init__(*made)


class Trapezoid(LambdaLR):
    """The learning rate rises linearly, stays, and falls linearly to zero (Zhai et al. 2022; Hagele et al. 2024).

    Args:
        optimizer: its rates are the highest ones.
        steps_per_epoch, epochs: of the training.
        warm_up: share of all steps in which it rises, at least 0.
        constant_until: share of all steps after which it falls, from ``warm_up`` to 1; 1: never.

    Raises:
        ValueError: if a share is out of its range.

    >>> optimizer, rates = torch.optim.SGD([torch.zeros(1)], lr=1.0), []
    >>> schedule = Trapezoid(optimizer, steps_per_epoch=1, epochs=10, warm_up=0.2)
    >>> for _ in range(10):
    ...     rates += schedule.get_last_lr()
    ...     optimizer.step()
    ...     schedule.step()
    >>> rates
    [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        steps_per_epoch: int,
        epochs: int,
        warm_up: float = 0.02,
        constant_until: float = 0.6,
    ):
        if not 0 <= warm_up <= constant_until <= 1:
            raise ValueError(
                "warm_up and constant_until are shares of all steps, one after the other, from 0 to 1, got "
                f"{warm_up} and {constant_until}"
            )
        steps = steps_per_epoch * epochs
        rising, falling = max(1, math.ceil(warm_up * steps)), max(1, steps - math.floor(constant_until * steps))
        super().__init__(optimizer, lambda step: max(0.0, min(1.0, (step + 1) / rising, (steps - step) / falling)))


def switch(optimizers: tuple[Optimizer, ...], mode: str) -> None:
    """Call ``train()`` or ``eval()`` of optimizers without a schedule, which train other weights than those that they
    give (Defazio et al. 2024); others have neither."""
    for each in optimizers:
        if hasattr(each, mode):
            getattr(each, mode)()


def make_optimizer(optimizer: str | OptimizerFactory, parameters: list[Tensor], lr: float) -> Optimizer:
    """The optimizer of a short name or factory; on a GPU capturable, if it can be, for CUDA graphs.

    Raises:
        ValueError: for another name, where the factory refuses what it is given, or if the optimizer needs a closure.
        TypeError: if it is not a factory, or returns no optimizer.
    """
    if not parameters:
        raise ValueError("the module has no parameters to train")
    on_gpu = parameters[0].is_cuda
    if isinstance(optimizer, str):
        if optimizer != "adam":
            raise ValueError(f"optimizer must be adam or a factory, such as torch.optim.SGD, got {optimizer}")
        return Adam(parameters, lr=lr, fused=True, capturable=on_gpu)
    if isinstance(optimizer, partial) and "lr" in optimizer.keywords:
        raise ValueError(f"optimizer {name_of(optimizer)}: its lr is that of fit(..., lr=), give it there")
    made = _made("optimizer", optimizer, Optimizer, parameters, lr=lr)
    for each in getattr(made, "optimizers", (made,)):
        if _needs_closure(each):
            raise ValueError(f"optimizer {name_of(optimizer)} needs a closure, which no engine gives: choose another")
        if isinstance(each, SparseAdam):
            raise ValueError(
                f"optimizer {name_of(optimizer)} takes sparse gradients alone, there are none: choose another"
            )
    for group in made.param_groups:
        if on_gpu and "capturable" in group:
            group["capturable"] = True
    return made


def make_schedule(
    schedule: str | ScheduleFactory, optimizer: Optimizer, steps_per_epoch: int, epochs: int
) -> LRScheduler:
    """The scheduler of a short name or factory; see :func:`pyro_vae.fit`.

    Raises:
        ValueError: for another name, or where the factory refuses what it is given.
        TypeError: if it is not a factory, or returns no scheduler, or one that needs more than the number of steps.
    """
    short = {"one_cycle": _one_cycle, "constant": _constant, "stages": _stages, "trapezoid": Trapezoid}
    if isinstance(schedule, str) and schedule not in short:
        raise ValueError(f"schedule must be one of {', '.join(short)}, got {schedule}; or give a factory")
    factory = short[schedule] if isinstance(schedule, str) else schedule
    made = _made("schedule", factory, LRScheduler, optimizer, steps_per_epoch=steps_per_epoch, epochs=epochs)
    if isinstance(made, ReduceLROnPlateau):
        raise TypeError(f"schedule {name_of(schedule)} is stepped by a measure, fit steps by the number of steps alone")
    if factory is not _constant:
        for group in optimizer.param_groups:
            if group.get("capturable") and group["params"][0].is_cuda:
                # a CUDA graph reads the rate of each step where it lies
                group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device)
    return made


def name_of(factory: object) -> str:
    """What to call a factory in a message, and in a checkpoint."""
    while isinstance(factory, partial):
        factory = factory.func
    return factory if isinstance(factory, str) else getattr(factory, "__qualname__", type(factory).__name__)


def _made(what: str, factory: Callable[..., object], kind: type[Made], *args: object, **kwargs: object) -> Made:
    """What a factory makes of these arguments, checked."""
    name = name_of(factory)
    given = f"{what}({', '.join(('parameters' if what == 'optimizer' else 'optimizer', *kwargs))})"
    if not callable(factory) or isinstance(factory, kind):
        raise TypeError(f"{what} must be a short name or a factory, called as {given}, got an object: {name}")
    try:
        made = factory(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{what} {name}: {reason_of(error)}; it is called as {given}") from error
    except ValueError as error:
        raise ValueError(f"{what} {name}: {reason_of(error)}") from error
    if not isinstance(made, kind):
        raise TypeError(f"{what} {name} must return a torch {kind.__name__}, it returned {name_of(made)}")
    return made


def _needs_closure(optimizer: Optimizer) -> bool:
    given = inspect.signature(optimizer.step).parameters.values()
    required = [each for each in given if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]
    return isinstance(optimizer, LBFGS) or bool(required)


def _one_cycle(optimizer: Optimizer, *, steps_per_epoch: int, epochs: int) -> LRScheduler:
    peaks = [float(group["lr"]) for group in optimizer.param_groups]
    return OneCycleLR(optimizer, max_lr=peaks, total_steps=epochs * steps_per_epoch, cycle_momentum=False)


def _constant(optimizer: Optimizer, *, steps_per_epoch: int, epochs: int) -> LRScheduler:
    return ConstantLR(optimizer, factor=1.0)


def _stages(optimizer: Optimizer, *, steps_per_epoch: int, epochs: int) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: 10 ** (-_stage(step // steps_per_epoch) / 7))


def _stage(epoch: int) -> int:
    """The stage of an epoch, both counted from 0, where stage i has 3^i epochs."""
    stage, end = 0, 1
    while epoch >= end:
        stage += 1
        end += 3**stage
    return stage
