"""Engines: stochastic variational inference, one gradient step at a time."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from pyro_vae.infer.steps import Loss, Steps


class Engine(Protocol):
    """What :func:`pyro_vae.fit` asks of an engine: it is made of ``(model, guide, optim, loss)`` and has ``step``.

    To train in several processes it needs ``steps`` as well, see :class:`pyro_vae.infer.parallel.DataParallel`.
    """

    def step(self, x: Tensor) -> float | Tensor:
        """Take one gradient step on observations ``(B, X)``; return the loss, in the loss's own scale."""
        ...


class PyroSVI:
    """The reference engine: Pyro's losses as they are, and by default ``Trace_ELBO``, with an optimizer of torch.

    ``pyro.infer.SVI`` trains what ``pyro.param`` and ``pyro.module`` have registered; this trains what the optimizer
    holds, registered or not, so that schedules and checkpoints are those of torch, and says so if programs have
    registered anything else.

    Args:
        model: p(x, z); any Pyro program.
        guide: q(z | x); any Pyro program.
        optim: an optimizer of torch. It holds exactly the tensors that are trained: those of modules, or the
            unconstrained tensors of ``pyro.param`` statements that exist already.
        loss: one of Pyro's ELBOs, whose value and gradient are sums over the batch, or an objective of this
            library, whose are means. Default: ``Trace_ELBO()``.

    Raises:
        NonFiniteError: by ``step``, if a gradient is NaN or infinite; nothing has been updated then.
        ValueError: by ``step``, if the optimizer holds no tensor that the loss depends on, or lacks a ``pyro.param``
            on which it does.
    """

    def __init__(
        self,
        model: Callable[..., object],
        guide: Callable[..., object],
        optim: torch.optim.Optimizer,
        loss: Loss | None = None,
    ):
        if not isinstance(optim, torch.optim.Optimizer):
            raise TypeError(
                f"optim must be an optimizer of torch, got {type(optim).__name__}: it is for pyro.infer.SVI"
            )
        self.model, self.guide, self.optim = model, guide, optim
        self._steps = Steps(model, guide, optim, loss)

    steps = property(lambda self: self._steps, doc="The two halves of a step.")

    def step(self, *args: object, **kwargs: object) -> float:
        """Take one gradient step, on observations ``(B, X)`` for example; return the loss in its own scale."""
        loss, params, gradients = self._steps.differentiate(args, kwargs)
        self._steps.update(params, gradients, finite=True)
        return tree_map_only(Tensor, float, loss)

    def evaluate_loss(self, *args: object, **kwargs: object) -> float:
        """The loss in its own scale, without a step."""
        return tree_map_only(Tensor, float, self._steps.evaluate(args, kwargs))
