"""Engines: stochastic variational inference, one gradient step at a time."""

from collections.abc import Callable
from typing import Protocol, cast

import pyro
import torch
from pyro.infer import ELBO as PyroELBO
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn

from pyro_vae.errors import NonFiniteError
from pyro_vae.infer.objectives import Objective
from pyro_vae.infer.programs import Program
from pyro_vae.infer.trees import as_data


class Engine(Protocol):
    """What :func:`pyro_vae.fit` asks of an engine: it is made of ``(model, guide, optim, loss)`` and has ``step``."""

    def step(self, x: Tensor) -> float | Tensor:
        """Take one gradient step on observations ``(B, X)``; return the loss, in the loss's own scale."""
        ...


class PyroSVI:
    """The reference engine: ``pyro.infer.SVI`` itself, and by default ``Trace_ELBO``.

    The optimizer's parameters are registered by one ``pyro.module`` per step, inside a parameter store of this
    engine's own. So several engines in a process all learn, and Pyro's global store stays as it was.

    Args:
        model: p(x, z); any Pyro program.
        guide: q(z | x); any Pyro program.
        optim: an optimizer of torch. It holds exactly the tensors that are trained: those of modules, or the
            unconstrained tensors of ``pyro.param`` statements that exist already.
        loss: one of Pyro's ELBOs, whose value and gradient are sums over the batch, or an objective of this
            library, whose are means. Default: ``Trace_ELBO()``.

    Raises:
        NonFiniteError: by ``step``, if a gradient is NaN or infinite; nothing has been updated then.
        ValueError: by ``step``, if the optimizer holds no tensor that the loss depends on.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        optim: torch.optim.Optimizer,
        loss: PyroELBO | Objective | None = None,
    ):
        self.model = model
        self.guide = guide
        self.optim = optim
        self._params = pyro.get_param_store().get_state()
        modules = nn.ParameterList(
            p
            for group in optim.param_groups
            for p in group["params"]
            if isinstance(p, nn.Parameter) and p.requires_grad
        ).eval()  # else Pyro warns of those that are frozen later

        def registered_model(*args, **kwargs):
            pyro.module("trained", modules)
            return model(*args, **kwargs)

        loss = Trace_ELBO() if loss is None else loss
        self._svi = SVI(registered_model, guide, _OneOptimizer(optim), loss=_of_arguments(loss))

    def step(self, *args: object, **kwargs: object) -> float:
        """Take one gradient step, on observations ``(B, X)`` for example; return the loss in its own scale."""
        with pyro.get_param_store().scope(self._params):
            return cast(float, self._svi.step(*args, **kwargs))

    def evaluate_loss(self, *args: object, **kwargs: object) -> float:
        """The loss in its own scale, without a step."""
        with pyro.get_param_store().scope(self._params):
            return cast(float, self._svi.evaluate_loss(*args, **kwargs))


def _of_arguments(loss: PyroELBO | Objective) -> PyroELBO | Callable[..., Tensor]:
    """A loss as Pyro calls it, with the programs' arguments one by one."""
    if isinstance(loss, PyroELBO):
        return loss
    return lambda model, guide, *args, **kwargs: loss(model, guide, as_data(args, kwargs))


class _OneOptimizer(PyroOptim):
    """Lets ``pyro.infer.SVI`` drive one torch optimizer for all parameters, so that schedules and checkpoints are
    those of torch. SVI calls it with the parameters it traced, and zeroes their gradients afterwards."""

    def __init__(self, optim: torch.optim.Optimizer):
        super().__init__(type(optim), {})
        self.optim = optim

    def __call__(self, params, *args, **kwargs) -> None:
        held = [p for group in self.optim.param_groups for p in group["params"]]
        for p in held:
            if not p.requires_grad:  # frozen since: without a gradient no momentum moves it on
                p.grad = None
        grads = [p.grad for p in held if p.grad is not None]
        if not grads:
            raise ValueError("the optimizer holds no tensor that the loss depends on: nothing would be trained")
        if not torch.nn.utils.get_total_norm(grads).isfinite():
            self.optim.zero_grad()
            raise NonFiniteError("a gradient is NaN or infinite")
        self.optim.step()
        traced = {id(p) for p in params}  # SVI zeroes their gradients, and not of what was freed since
        for p in held:
            if p.grad is not None and id(p) not in traced:
                p.grad = torch.zeros_like(p.grad)
