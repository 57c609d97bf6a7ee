"""Approximate posteriors q(z | x): heads that turn an encoder's raw outputs into a distribution over z."""

from abc import ABC, abstractmethod

import pyro.distributions as dist
from torch import Tensor, nn


class Posterior(nn.Module, ABC):
    """Raw outputs in, distribution out.

    ``forward(*parameters)`` takes one tensor ``(*, n_i)`` per entry of ``sizes`` and returns a reparametrized Pyro
    distribution with batch shape ``(*)`` and event shape ``(latent_dim,)``.

    Args:
        latent_dim: number D of latent dimensions, at least 1.

    Attributes:
        sizes: how many raw outputs each parameter takes; their sum is the encoder's ``out_features``.

    Raises:
        ValueError: if ``latent_dim`` is below 1.
    """

    sizes: tuple[int, ...]

    def __init__(self, latent_dim: int):
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {latent_dim}")
        self.latent_dim = latent_dim

    @abstractmethod
    def forward(self, *parameters: Tensor) -> dist.TorchDistribution:
        """The distribution of z given raw outputs ``(*, n_i)``."""


class MeanField(Posterior):
    """A Gaussian with diagonal covariance: z = loc + exp(log_scale) * eps (Kingma & Welling 2014, section 3).

    Args:
        latent_dim: number D of latent dimensions.
    """

    def __init__(self, latent_dim: int):
        super().__init__(latent_dim)
        self.sizes = (latent_dim, latent_dim)

    def forward(self, loc: Tensor, log_scale: Tensor) -> dist.TorchDistribution:
        return dist.Normal(loc, log_scale.exp()).to_event(1)
