"""Sequential Monte Carlo from the prior: temperatures as the weights ask for, resampling, Hamiltonian moves."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.infer.evidence.chains import Path, State, resample

MOST_TEMPERATURES = 1000


@dataclass(frozen=True)
class SMC:
    """How particles are taken from a start to the posterior.

    Args:
        num_particles: of each observation, in ``num_groups`` groups of at least 2.
        num_groups: groups that resample among themselves alone, at least 2, whose spread is the error.
        ess: effective sample size, as a share of the particles, that a change of temperature leaves, in (0, 1).
        num_moves: transitions at each temperature, at least 1.
        num_leapfrogs: gradient steps of a transition, at least 1.
        start: prior: p(z); guide: q(z | x).

    Raises:
        ValueError: if a setting is out of range.
    """

    num_particles: int = 256
    num_groups: int = 8
    ess: float = 0.5
    num_moves: int = 1
    num_leapfrogs: int = 4
    start: str = "prior"

    def __post_init__(self):
        for name, least in (("num_groups", 2), ("num_moves", 1), ("num_leapfrogs", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.num_particles % self.num_groups or self.num_particles < 2 * self.num_groups:
            raise ValueError(
                f"num_particles must be a multiple of num_groups, at least twice it, got {self.num_particles} and "
                f"{self.num_groups}"
            )
        if not 0 < self.ess < 1:
            raise ValueError(f"ess must be between 0 and 1, got {self.ess}")
        if self.start not in ("prior", "guide"):
            raise ValueError(f"start must be prior or guide, got {self.start}")


class Particles(NamedTuple):
    """What sequential Monte Carlo found: estimates of each group ``(G, B)``, and how it went."""

    log_z: Tensor  # (G, B)
    arrived: Tensor  # (B,)
    acceptance: Tensor  # (B,)
    evaluations: Tensor  # (B,)
    ladder: Tensor  # (T, B), the temperatures after each step
    num_nan: Tensor  # (B,), weights that were NaN, and counted as zero


def sample_particles(path: Path, settings: SMC) -> Particles:
    """Take particles from the start to the posterior (Del Moral, Doucet & Jasra 2006, section 3.3.2.3).

    Each observation has its own temperatures: the next is the one at which the effective sample size of the weights
    (Jasra et al. 2011) has fallen to the share asked for. Groups resample apart, so that their estimates of p(x) are
    nearly independent, each nearly unbiased: temperatures and step sizes are taken from all particles together.
    """
    num, groups = settings.num_particles, settings.num_groups
    state, size = path.evaluate(path.draw(num)), path.latents.size
    like = path.coordinates.loc
    beta = like.new_zeros(size, dtype=torch.float64)
    log_z = beta.new_zeros(groups, size)
    step = torch.full_like(beta, 1.5 / settings.num_leapfrogs)
    rates, moved = torch.zeros_like(beta), torch.zeros_like(beta)
    evaluations = torch.full_like(beta, 2.0 * num)
    active = torch.arange(size, device=like.device)
    ladder, num_nan = [beta.clone()], torch.zeros(size, dtype=torch.long, device=like.device)
    for _ in range(MOST_TEMPERATURES):
        gain = (state.target - state.start).double()
        num_nan[active] += gain.isnan().sum(0)
        gain = torch.where(gain.isnan(), -math.inf, gain)
        change = _next(gain, 1 - beta[active], settings.ess)
        log_w = (change * gain).unflatten(0, (groups, -1))
        log_z[:, active] += log_w.logsumexp(1) - math.log(num // groups)
        beta[active] += change
        ladder.append(beta.clone())
        offset = torch.arange(groups, device=like.device).view(-1, 1, 1) * (num // groups)
        chosen = torch.stack([resample(each) for each in log_w]) + offset
        state = state.select(chosen.flatten(0, 1))
        spread = state.e.std(0).clamp(min=1e-4)
        for _ in range(settings.num_moves):
            size_of = (step[active].to(like.dtype).unsqueeze(-1) * spread).contiguous()
            state, acceptance = path.transition(state, beta[active].to(like.dtype), size_of)
            step[active] *= torch.exp(0.5 * (acceptance.double() - 0.8))
            rates[active] += acceptance.double()
            moved[active] += 1
        evaluations[active] += 2 * num * settings.num_moves * settings.num_leapfrogs
        going = (beta[active] < 1) & log_z[:, active].isfinite().any(0)
        if not going.all():
            active = active[going]
            if len(active) == 0:
                break
            state, path = State(*(each[:, going] for each in state)), path.select(going.nonzero().squeeze(1))
    return Particles(log_z, beta >= 1, rates / moved, evaluations, torch.stack(ladder), num_nan)


def typical_ladder(ladder: Tensor, num_points: int = 65) -> Tensor:
    """Temperatures between which the weights change about as much, for most observations: ``(T, B) -> (num_points,)``.

    They are averaged in the logarithm, at equal shares of each observation's way.
    """
    steps = (ladder < 1).sum(0).clamp(min=1)  # until an observation arrived
    at = torch.linspace(0, 1, num_points, dtype=ladder.dtype, device=ladder.device).unsqueeze(1) * steps
    low = at.long().clamp(max=len(ladder) - 1)
    high = (low + 1).clamp(max=len(ladder) - 1)
    value = torch.lerp(ladder.gather(0, low), ladder.gather(0, high), at - low).clamp(max=1)
    curve = (value + 1e-9).log().mean(1).exp()
    return ((curve - curve[0]) / (curve[-1] - curve[0])).cummax(0).values


def _next(gain: Tensor, rest: Tensor, share: float) -> Tensor:
    """How far the temperature may rise, ``(B,)``, at most by ``rest``, with ``share`` of the weights effective."""

    def enough(change: Tensor) -> Tensor:
        log_w = change * gain
        return (2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp() >= share * len(gain)

    low, high = torch.zeros_like(rest), rest.clone()
    whole = enough(rest)
    for _ in range(40):
        middle = (low + high) / 2
        fits = enough(middle)
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return torch.where(whole, rest, torch.maximum(low, rest * 1e-9))
