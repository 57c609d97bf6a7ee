"""Integrals over one or two real variables, by Gauss-Legendre panels: independent of the library's own quadrature."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

LogDensity = Callable[[Tensor], Tensor]
"""Points ``(N, D)`` to log-densities ``(N, B)``, of B integrals at once."""


def log_integral(log_density: LogDensity, *edges: Sequence[float], nodes: int = 20) -> tuple[Tensor, Tensor]:
    """The logarithm of an integral over a box, and how far half the nodes are from it; ``(B,)`` both, in nats.

    Args:
        log_density: of one or two variables.
        edges: for each variable, the edges of its panels; kinks belong on edges.
        nodes: of each panel.
    """
    fine, coarse = (_log_integral(log_density, edges, each) for each in (nodes, nodes // 2))
    return fine, (fine - coarse).abs()


def over_reals(log_density: LogDensity) -> LogDensity:
    """The log-density of t where each variable is sinh(t): a few panels of t reach far into heavy tails."""
    return lambda t: log_density(t.sinh()) + t.cosh().log().sum(-1, keepdim=True)


def panels(low: float, high: float, num: int) -> list[float]:
    """Edges of ``num`` panels of equal width."""
    return np.linspace(low, high, num + 1).tolist()


def _log_integral(log_density: LogDensity, edges: Sequence[Sequence[float]], nodes: int) -> Tensor:
    axes = [_axis(each, nodes) for each in edges]
    points = torch.cartesian_prod(*[at for at, _ in axes]).view(-1, len(axes))
    log_weights = torch.cartesian_prod(*[log_weight for _, log_weight in axes]).view(-1, len(axes)).sum(-1)
    total = torch.full((1,), -math.inf, dtype=torch.float64)
    for at, log_weight in zip(points.split(2**15), log_weights.split(2**15), strict=True):
        total = torch.logaddexp(total, (log_density(at) + log_weight[:, None]).logsumexp(0))
    return total


def _axis(edges: Sequence[float], nodes: int) -> tuple[Tensor, Tensor]:
    """Points of the panels of one variable, and the logarithms of their weights."""
    at, weight = (torch.from_numpy(each) for each in np.polynomial.legendre.leggauss(nodes))
    ends = torch.tensor(edges, dtype=torch.float64)
    middle, half = (ends[1:] + ends[:-1]) / 2, (ends[1:] - ends[:-1]) / 2
    return (middle[:, None] + half[:, None] * at).flatten(), (half[:, None] * weight).log().flatten()
