"""Priors p(z)."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor, nn


class Prior(nn.Module, ABC):
    """A distribution over the latent variable.

    ``forward(posterior)`` returns a Pyro distribution with batch shape ``()`` and event shape ``(latent_dim,)``.
    ``posterior`` maps observations ``(*, X)`` to the distribution q(z | x); most priors ignore it.

    Args:
        latent_dim: number D of latent dimensions, at least 1.

    Raises:
        ValueError: if ``latent_dim`` is below 1.
    """

    def __init__(self, latent_dim: int):
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {latent_dim}")
        self.latent_dim = latent_dim

    @abstractmethod
    def forward(self, posterior: Callable[[Tensor], dist.TorchDistribution] | None = None) -> dist.TorchDistribution:
        """The prior distribution."""

    def initialize(self, x: Tensor) -> None:
        """Start from training images ``x``, shape ``(N, X)``; called once before the optimizer is made."""


class StandardNormal(Prior):
    """p(z) = N(0, I).

    Args:
        latent_dim: number D of latent dimensions.

    >>> round(StandardNormal(2)().log_prob(torch.zeros(2)).item(), 4)
    -1.8379
    """

    def __init__(self, latent_dim: int):
        super().__init__(latent_dim)
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(latent_dim), persistent=False)

    def forward(self, posterior: Callable[[Tensor], dist.TorchDistribution] | None = None) -> dist.TorchDistribution:
        return dist.Normal(self.loc, self.scale).to_event(1)
