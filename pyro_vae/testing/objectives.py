"""The contract of an objective."""

import copy
import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.errors import ContractError
from pyro_vae.infer.objectives import Objective
from pyro_vae.testing.checks import naming, seeded


def check_objective(objective: Objective, bound: bool = True) -> None:
    """Check an objective on a model of one latent number whose posterior and log p(x) are known.

    Args:
        objective: a function of ``(model, guide, x)``, such as an instance of a subclass of ``Objective``.
        bound: whether its value is a lower bound of log p(x), so that the loss is at least minus log p(x).

    Raises:
        ContractError: naming what is wrong.

    >>> from pyro_vae.objectives import IWAE
    >>> check_objective(IWAE(num_particles=3))
    """
    if isinstance(objective, type):
        raise ContractError(f"check_objective takes an instance, such as {objective.__name__}(), not the class")
    name, objective = type(objective).__name__, copy.deepcopy(objective)
    with seeded():
        x = torch.tensor([[1.0, 0.5]])
        right, wrong = _Conjugate(0.0), _Conjugate(2.0)
        losses = {}
        for program in (right, wrong):
            for size in (2000, 8000):
                torch.manual_seed(1)
                with naming(objective, f"the loss of observations of shape {(size, 2)}"):
                    loss = objective(program.model, program.guide, x.expand(size, 2))
                _check_loss(name, loss, program)
                losses[program, size] = loss.item()
        few, many = losses[wrong, 2000], losses[wrong, 8000]
        if abs(many - few) > 0.25 * abs(few):
            raise ContractError(
                f"{name} must average over the batch: of four times as many equal observations the loss is {many:.4g} "
                f"instead of {few:.4g}"
            )
        log_px = right.log_px(x).item()
        if bound and losses[right, 8000] < -log_px - 0.05 * abs(log_px):
            raise ContractError(
                f"{name} is no lower bound: where log p(x) is {log_px:.4g}, the loss, minus the bound, is "
                f"{losses[right, 8000]:.4g}; expected at least {-log_px:.4g} (pass bound=False if it is meant)"
            )
        if not losses[right, 8000] < losses[wrong, 8000]:
            raise ContractError(
                f"{name} must be a loss, minus a bound: it is {losses[right, 8000]:.4g} under the true posterior and "
                f"{losses[wrong, 8000]:.4g} under one that is far off; expected the first to be smaller"
            )
        _check_descent(name, objective, wrong, x.expand(8000, 2))


class _Conjugate(nn.Module):
    """z ~ N(0, 1), x_i ~ N(z, 1) for two entries, and a guide whose mean is off by ``error``."""

    def __init__(self, error: float):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.0))
        self.error = nn.Parameter(torch.tensor(error))
        self.log_scale = nn.Parameter(torch.tensor(-0.5 * math.log(3.0)))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(self.loc.expand(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.expand(*z.shape[:-1], 2), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            loc = x.sum(-1, keepdim=True) / 3 + self.error
            pyro.sample("z", dist.Normal(loc, self.log_scale.exp()).to_event(1))

    @staticmethod
    def log_px(x: Tensor) -> Tensor:
        return dist.MultivariateNormal(torch.zeros(2), torch.eye(2) + 1).log_prob(x)


def _check_loss(name: str, loss: Any, program: nn.Module) -> None:
    if not isinstance(loss, Tensor) or loss.shape != ():
        kind = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ContractError(f"{name} must return one number, a tensor of shape (), it returned {kind}")
    if not loss.isfinite():
        raise ContractError(f"{name} must be finite, it is {loss.item()} for a Gaussian model and guide")
    if not loss.requires_grad:
        raise ContractError(f"{name}: the loss has no gradient; expected one by the parameters of model and guide")
    if any(p.grad is not None for p in program.parameters()):
        raise ContractError(f"{name} must leave the gradients of parameters alone: expected no backward() inside")


def _check_descent(name: str, objective: Objective, program: _Conjugate, x: Tensor) -> None:
    """A small step against the gradient makes the loss smaller, for the same noise."""

    def value() -> Tensor:
        torch.manual_seed(2)
        return copy.deepcopy(objective)(program.model, program.guide, x)

    before = value()
    gradient = torch.autograd.grad(before, [program.error, program.log_scale], allow_unused=True)
    if any(g is None or not g.isfinite() for g in gradient):
        raise ContractError(f"{name}: the loss has no finite gradient by the parameters of the guide")
    with torch.no_grad():
        for p, g in zip([program.error, program.log_scale], gradient, strict=True):
            p -= 0.01 * g
    if not value() < before:
        raise ContractError(
            f"{name}: a small step against its gradient makes the loss larger, {value().item():.6g} after "
            f"{before.item():.6g}; expected its gradient to be that of its value"
        )
