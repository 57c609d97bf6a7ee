"""Pyro programs after the kinds found in Pyro's examples, tutorials and tests, each written anew and small.

A program is a function of no arguments that makes all that a script has before its training loop. It draws its data
and weights by torch's generator, in torch's default type: seed first, and choose the type.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import pyro
import torch

Call = tuple[tuple, dict]


def adam(**settings: Any) -> Callable[[], pyro.optim.PyroOptim]:
    """Makers of the optimizer most scripts use."""
    return lambda: pyro.optim.Adam({"lr": 0.02, **settings})


class Program(NamedTuple):
    """A training script before its loop."""

    model: Callable[..., object]
    guide: Callable[..., object]
    loss: Callable[[], Any]
    """Makes the loss: one engine, one loss."""
    calls: Sequence[Call]
    """Arguments of the steps, over and over."""
    optim: Callable[[], pyro.optim.PyroOptim] = adam()
    epoch: int | None = None
    """So many steps are an epoch, after which the scheduler steps; None: there is no scheduler."""
    before: Callable[[int], object] | None = None
    """What a script does before each step, of which it gets the number."""
    plain: Callable[[], Any] | None = None
    """Another loss by which Pyro runs it for comparison: torch.jit draws random numbers of its own."""
    compiled: bool = True
    """Whether its steps must become a graph; if not, they run through Pyro, after one warning."""
    told: str | None = None
    """A regular expression for what a user is told; None: nothing if compiled."""
    predict: bool = True
    """Whether ``Predictive`` can be asked for the arguments of the first call."""

    def steps(self, num_steps: int) -> Iterator[Call]:
        return (call for _, call in zip(range(num_steps), cycle(self.calls), strict=False))


def call(*args: object, **kwargs: object) -> Call:
    return args, kwargs


def same(*args: object, **kwargs: object) -> list[Call]:
    """The arguments of every step."""
    return [(args, kwargs)]


def linear_data(num_rows: int = 16, num_columns: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(num_rows, num_columns)
    return x, x @ torch.linspace(-1, 1, num_columns) + 0.3 * torch.randn(num_rows)
