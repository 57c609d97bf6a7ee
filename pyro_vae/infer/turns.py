"""Training objectives that change on the way: one after the other, and a loss of Pyro that is warmed up."""

from typing import Any, cast

import torch
from pyro.infer import ELBO as PyroELBO
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_vae.errors import check_at_least_one
from pyro_vae.infer.objectives import Objective, uncounted
from pyro_vae.infer.programs import Program
from pyro_vae.infer.trees import Data


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


class WarmUp(PyroELBO):
    """A loss of Pyro whose KL divergence counts in part at first, so that units of z that carry nothing yet stay alive.

    The log-probabilities of the latent sites are scaled, in model and guide, as in Pyro's own deep Markov model, by a
    weight that rises linearly over the first gradient steps (Sonderby et al. 2016, section 3.2); from then on it is 1,
    and this is the loss of Pyro, a sum over the batch as that. Before, it is no bound of log p(x).

    :func:`pyro_vae.fit` counts the steps; a loop of your own calls :meth:`advance` before each.
    :class:`pyro_vae.BetaELBO` is an objective that advances by itself.

    Args:
        steps: gradient steps below a weight of 1, at least 1; the first has the weight 1 / (steps + 1).
        warmed: a loss of Pyro, such as ``Trace_ELBO()``, the default.

    Raises:
        TypeError: if ``warmed`` is no loss of Pyro, or one of these.
        ValueError: if ``steps`` is below 1.
    """

    def __init__(self, steps: int, warmed: PyroELBO | None = None):
        check_at_least_one(steps=steps)
        super().__init__()
        warmed = Trace_ELBO() if warmed is None else warmed
        if not isinstance(warmed, PyroELBO) or isinstance(warmed, WarmUp):
            what = warmed.__name__ if isinstance(warmed, type) else type(warmed).__name__
            raise TypeError(f"warmed: {what} is no loss of Pyro to be warmed up, such as Trace_ELBO()")
        self.steps, self.warmed = steps, warmed
        self._weight = torch.tensor(0.0)  # a tensor, so that a compiled step sees it change
        self.advance(0)

    def advance(self, step: int) -> None:
        """Set the weight of gradient step ``step``, counted from 0."""
        self._weight.fill_(min(1.0, (step + 1) / (self.steps + 1)))

    def loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Any:
        """The value, as that of ``warmed``."""
        return cast(Any, self.warmed).loss(*self._scaled(model, guide, args, kwargs), *args, **kwargs)

    def loss_and_grads(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Any:
        """The value; gradients are added to the parameters'."""
        return cast(Any, self.warmed).loss_and_grads(*self._scaled(model, guide, args, kwargs), *args, **kwargs)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Any:
        """The value, with its graph, of a loss that has it."""
        return cast(Any, self.warmed).differentiable_loss(*self._scaled(model, guide, args, kwargs), *args, **kwargs)

    def _get_trace(self, model: Program, guide: Program, args: tuple, kwargs: dict) -> Any:
        return cast(Any, self.warmed)._get_trace(*self._scaled(model, guide, args, kwargs), args, kwargs)

    def _scaled(self, model: Program, guide: Program, args: tuple, kwargs: dict) -> tuple[Program, Program]:
        device = next((each.device for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)), None)
        if device is not None and device != self._weight.device:
            self._weight = self._weight.to(device)
        latent = _Scaled(self._weight)
        return latent(model), latent(guide)


class _Scaled(Messenger):
    """Latent sites count so much."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.weight
