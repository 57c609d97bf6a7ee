"""Settings of annealed importance sampling."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor


@dataclass(frozen=True)
class Annealing:
    """How chains are annealed from a start to the posterior.

    The path is start(z)^(1 - beta) p(x, z)^beta, beta from 0 to 1. Hamiltonian Monte Carlo follows it in coordinates
    in which the start is about a unit ball. Step sizes are adapted by chains of their own, and frozen before the chains
    that count begin: otherwise the estimate would be biased.

    Args:
        num_chains: C, at least 2.
        num_temperatures: T, steps from beta = 0 to 1; a transition stands between any two. At least 1, which leaves
            plain importance sampling from the start; chains go there only, and are unbiased. None: as many as it takes,
            of chains that go there and back, to give each log p(x) the error below.
        start: laplace: normals around the posterior's modes, with the curvature there; guide: q(z | x); prior: p(z).
        num_leapfrogs: gradient steps of a transition, at least 1.
        schedule: linear, or sigmoid, which is denser at both ends (Grosse, Ghahramani & Adams 2015).
        error: standard error of each log p(x), in nats, positive; what does not reach it is not called reliable.
        target_acceptance: of the adapted step sizes, in (0, 1).
        num_warmup_chains: at least 1.
        num_climbs: points beside the guide's mean from which modes are looked for, at least 0; for the laplace start.
        num_checked: observations, drawn at random, on which chains from the prior are to confirm the estimate, which
            those that start on some of several modes cannot; at least 0, which leaves modes that were missed untold.
        most_temperatures: where it is given up, at least 4.

    Raises:
        ValueError: if a setting is out of range.
    """

    num_chains: int = 12
    num_temperatures: int | None = None
    start: Literal["laplace", "guide", "prior"] = "laplace"
    num_leapfrogs: int = 3
    schedule: Literal["linear", "sigmoid"] = "linear"
    error: float = 0.25
    target_acceptance: float = 0.8
    num_warmup_chains: int = 4
    num_climbs: int = 4
    num_checked: int = 16
    most_temperatures: int = 256

    def __post_init__(self):
        least = {"num_chains": 2, "num_temperatures": 1, "num_leapfrogs": 1, "num_warmup_chains": 1}
        least |= {"num_climbs": 0, "num_checked": 0, "most_temperatures": 4}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is None and name == "num_temperatures":
                continue
            if not isinstance(value, int):
                raise ValueError(f"{name} must be a whole number, got {value}")
            if value < bound:
                raise ValueError(f"{name} must be at least {bound}, got {value}")
        for name in ("start", "schedule"):
            choices = get_args(type(self).__annotations__[name])
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)}")
        if not 0 < self.error < math.inf:
            raise ValueError(f"error must be positive, got {self.error}")
        if not 0 < self.target_acceptance < 1:
            raise ValueError(f"target_acceptance must be between 0 and 1, got {self.target_acceptance}")

    def temperatures(self, num: int) -> Tensor:
        """beta_0 = 0 .. beta_num = 1."""
        beta = torch.linspace(0, 1, num + 1, dtype=torch.float64)
        if self.schedule == "sigmoid":
            beta = torch.sigmoid(8 * beta - 4)
            beta = (beta - beta[0]) / (beta[-1] - beta[0])
        return beta


WU_2017 = Annealing(16, 10_000, "prior", 10, "sigmoid", target_acceptance=0.65, num_warmup_chains=16)
"""Settings of Wu, Burda, Salakhutdinov & Grosse (2017), but for the frozen step sizes: theirs adapt as they go."""
CREMER_2018 = Annealing(100, 10_000, "prior", 10, "linear", target_acceptance=0.65, num_warmup_chains=100)
"""Settings of the code of Cremer, Li & Duvenaud (2018), but for the frozen step sizes: theirs adapt as they go."""
