"""Training objectives that change on the way: one after the other, and a loss of Pyro that is warmed up."""

from functools import partial
from typing import Any, cast

import torch
from pyro.infer import ELBO as PyroELBO
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.errors import check_at_least_one
from pyro_vae.infer.objectives import Objective, uncounted
from pyro_vae.infer.programs import Program
from pyro_vae.infer.trees import Data, call, data_size, first_tensor


class InTurn(Objective):
    """One objective for so many gradient steps, and another one from then on: a cheap bound first, a tight one last.

    :func:`pyro_vae.fit` counts the steps; a loop of your own calls :meth:`advance` before each. Those of the second
    objective begin at 0.

    Args:
        first, then: two objectives; not the same object.
        steps: gradient steps of the first, at least 1.

    Raises:
        TypeError: if one of them is no objective of this library; losses of Pyro are none.
        ValueError: if ``steps`` is below 1, or both are the same object.
    """

    def __init__(self, first: Objective, then: Objective, steps: int):
        check_at_least_one(steps=steps)
        for name, each in (("first", first), ("then", then)):
            if not isinstance(each, Objective):
                what = each.__name__ if isinstance(each, type) else type(each).__name__
                raise TypeError(f"{name}: {what} is no objective of pyro_vae, such as ELBO() or DReG(4)")
        if first is then:
            raise ValueError("first and then are one object, whose steps would be counted twice")
        self.first, self.then, self.steps = first, then, steps
        self._now = first

    def advance(self, step: int) -> None:
        """Set which of the two it is, and how many steps that has taken."""
        super().advance(step)
        self._now, own = (self.first, step) if step < self.steps else (self.then, step - self.steps)
        self._now.advance(own)

    def stepped(self) -> None:
        """Nothing: it may not become another one within a step, which a compiled engine compares with Pyro's."""

    def __call__(self, model: Program, guide: Program, data: Data) -> Tensor:
        with uncounted(self._now):
            return self._now(model, guide, data)


class WarmUp(Objective):
    """A loss of Pyro whose KL divergence counts in part at first, so that units of z that carry nothing yet stay alive.

    The log-probabilities of the latent sites are scaled, in model and guide, as in Pyro's own deep Markov model, by a
    weight that rises linearly over the first gradient steps (Sonderby et al. 2016, section 3.2); from then on it is 1,
    and this is the loss of Pyro. Before, it is no bound of log p(x). The weight advances by itself, as that of
    :class:`pyro_vae.BetaELBO`, whose gradient is the pathwise one.

    Args:
        steps: gradient steps below a weight of 1, at least 1; the first has the weight 1 / (steps + 1).
        loss: such as ``Trace_ELBO()``, the default, or ``TraceMeanField_ELBO()``.

    Raises:
        TypeError: if ``loss`` is no loss of Pyro.
        ValueError: if ``steps`` is below 1.
    """

    def __init__(self, steps: int, loss: PyroELBO | None = None):
        check_at_least_one(steps=steps)
        loss = Trace_ELBO() if loss is None else loss
        if not isinstance(loss, PyroELBO):
            what = loss.__name__ if isinstance(loss, type) else type(loss).__name__
            raise TypeError(f"loss: {what} is no loss of Pyro, such as Trace_ELBO()")
        self.steps, self.loss = steps, loss
        self._weight = torch.tensor(0.0)  # a tensor, so that a compiled step sees it change
        self.advance(0)

    def advance(self, step: int) -> None:
        """Set the weight of gradient step ``step``, counted from 0; the steps after it are counted from there."""
        super().advance(step)
        self._weight.fill_(min(1.0, (step + 1) / (self.steps + 1)))

    def __call__(self, model: Program, guide: Program, data: Data) -> Tensor:
        if self._weight.device != first_tensor(data).device:
            self._weight = self._weight.to(first_tensor(data).device)
        # a copy: the weight of the next step is set while this loss is differentiated
        latent = _Scaled(self._weight.clone())
        differentiable = cast(Any, self.loss).differentiable_loss
        total = call(partial(differentiable, latent(model), latent(guide)), data)
        return self.counted(torch.as_tensor(total) / data_size(data))  # Pyro's is a number where no site is random


class _Scaled(Messenger):
    """Latent sites count so much."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.weight
