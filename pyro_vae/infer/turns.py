"""One training objective after the other."""

from torch import Tensor

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
