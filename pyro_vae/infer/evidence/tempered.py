"""Where the temperatures of a path are to stand, found by a few chains that go ahead."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.infer.evidence.chains import Path

PILOT_RATE = 0.5


class Pilot(NamedTuple):
    """What the chains that went ahead have found.

    Attributes:
        betas: from 0 on, ascending, shape ``(n,)``.
        lengths: of the path up to there, shape ``(n,)``: the integral of the standard deviation of
            log target - log start, of root mean square over observations (Syed, Bouchard-Cote, Deligiannidis &
            Doucet 2022, "Non-reversible parallel tempering", section 4.1, call it the barrier).
        steps: adapted step sizes, shape ``(n, B)``.
    """

    betas: Tensor
    lengths: Tensor
    steps: Tensor

    def place(self, num: int, at: Tensor) -> tuple[Tensor, Tensor]:
        """About ``num`` steps of equal length up to the last of ``at``, ascending; some end at each of these.

        Returns:
            betas from 0, shape ``(T + 1,)``, and a step size for each, ``(T + 1, B)``.
        """
        ends = _interpolate(at, self.betas, self.lengths)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        betas = [at.new_zeros(1)]
        for low, high, last in zip(starts, ends, at, strict=True):
            count = max(1, round(num * ((high - low) / ends[-1]).item()))
            lengths = torch.lerp(low, high, torch.arange(1, count + 1).to(low) / count)
            inside = _interpolate(lengths[:-1], self.lengths, self.betas)
            betas += [inside, last.view(1)]
        placed = torch.cat(betas)
        nearest = torch.searchsorted(self.betas, placed).clamp(max=len(self.betas) - 1)
        return placed, self.steps[nearest]


def pilot(path: Path, last: float, num_chains: int, longest: float, target: float, most: int = 500) -> Pilot:
    """Go from the start to the temperature ``last`` by steps as long as the chains allow, adapting their own steps.

    After ``most`` steps the rest of the way is taken for as rough as the last of them.
    """
    state = path.evaluate(path.draw(num_chains))
    step = torch.full((path.latents.size,), longest).to(state.start)
    beta, length, move = 0.0, 0.0, last
    betas, lengths, steps = [beta], [length], [step]
    while beta < last and len(betas) < most:
        variance = (state.target - state.start).double().var(0)
        deviation = variance[variance.isfinite()].mean().sqrt().item()
        move = last if math.isnan(deviation) else PILOT_RATE / max(deviation, 1e-6)
        # at the start few chains may not tell how heavy the tails are
        move = min(move, last - beta, last / 10, max(beta, 1e-6 * last))
        beta = last if last - beta - move < 1e-9 * last else beta + move
        length += move * max(deviation if math.isfinite(deviation) else 0.0, 1e-9)  # never none, to be divided
        for _ in range(2):
            state, acceptance = path.transition(state, torch.tensor(beta).to(state.start), step)
            step = (step * torch.exp(0.5 * (acceptance - target))).clamp(max=longest)
        betas.append(beta)
        lengths.append(length)
        steps.append(step)
    if beta < last:
        betas.append(last)
        lengths.append(length + (last - beta) / max(move, 1e-300) * PILOT_RATE)
        steps.append(step)
    like = {"dtype": torch.float64, "device": step.device}
    return Pilot(torch.tensor(betas, **like), torch.tensor(lengths, **like), torch.stack(steps))


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Linear interpolation; ``xs`` ascending."""
    right = torch.searchsorted(xs, x).clamp(1, len(xs) - 1)
    left = right - 1
    share = ((x - xs[left]) / (xs[right] - xs[left]).clamp(min=1e-300)).clamp(0, 1)
    return torch.lerp(ys[left], ys[right], share)
