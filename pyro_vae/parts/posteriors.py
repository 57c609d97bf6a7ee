"""Approximate posteriors q(z | x): heads that turn an encoder's raw outputs into a distribution over z."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from pyro_vae.parts.distributions import FlowDistribution, make_flow


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
    def forward(self, *parameters: Tensor) -> TorchDistribution:
        """The distribution of z given raw outputs ``(*, n_i)``."""


class MeanField(Posterior):
    """A Gaussian with diagonal covariance: z = loc + exp(log_scale) * eps (Kingma & Welling 2014, section 3).

    Args:
        latent_dim: number D of latent dimensions.
    """

    def __init__(self, latent_dim: int):
        super().__init__(latent_dim)
        self.sizes = (latent_dim, latent_dim)

    def forward(self, loc: Tensor, log_scale: Tensor) -> TorchDistribution:
        return dist.Normal(loc, log_scale.exp()).to_event(1)


class FullRank(Posterior):
    """A Gaussian with any covariance L L', for L lower triangular: z = loc + L eps.

    Args:
        latent_dim: number D of latent dimensions.
    """

    _index: Tensor

    def __init__(self, latent_dim: int):
        super().__init__(latent_dim)
        self.sizes = (latent_dim, latent_dim, latent_dim * (latent_dim - 1) // 2)
        self.register_buffer("_index", torch.tril_indices(latent_dim, latent_dim, -1), persistent=False)

    def forward(self, loc: Tensor, log_diagonal: Tensor, below: Tensor) -> TorchDistribution:
        tril = torch.diag_embed(log_diagonal.exp())
        row, column = self._index
        # a column is scaled by its diagonal entry, so that L is well conditioned whatever the scale
        tril[..., row, column] = below * log_diagonal.exp()[..., column]
        return dist.MultivariateNormal(loc, scale_tril=tril)


class LowRank(Posterior):
    """A Gaussian with covariance diag(d) + F F', for F of few columns.

    Args:
        latent_dim: number D of latent dimensions.
        rank: columns of F, from 1 to D.

    Raises:
        ValueError: if ``rank`` is out of range.
    """

    def __init__(self, latent_dim: int, rank: int = 5):
        super().__init__(latent_dim)
        if not 1 <= rank <= latent_dim:
            raise ValueError(f"rank must be from 1 to latent_dim, which is {latent_dim}, got {rank}")
        self.rank = rank
        self.sizes = (latent_dim, latent_dim, latent_dim * rank)

    def forward(self, loc: Tensor, log_scale: Tensor, factor: Tensor) -> TorchDistribution:
        scale = log_scale.exp()
        factor = factor.unflatten(-1, (self.latent_dim, self.rank)) * scale.unsqueeze(-1)
        return dist.LowRankMultivariateNormal(loc, factor, scale.square())


class Flow(Posterior):
    """A conditional flow of zuko in the encoder's own coordinates: z = loc + exp(log_scale) * f(eps; context).

    The flow sees standard normal noise and a context bounded by tanh, and log_scale is bounded by 7, so whatever the
    encoder says of an image unlike any in training, the flow stays where it was trained: posteriors whose flow
    acts on z itself blow up there.

    Args:
        latent_dim: number D of latent dimensions, at least 2.
        architecture: inverse_autoregressive (Kingma et al. 2016) is sampled in one pass, and scored in one where it
            drew the sample itself, else in D; coupling does both in one.
        transform: of one dimension: affine, or a monotonic rational-quadratic spline (Durkan et al. 2019).
        transforms: invertible maps one after the other, at least 1.
        hidden: width of each hidden layer of the networks inside.
        context: numbers that the encoder passes to the flow, at least 1.

    Raises:
        ValueError: if a setting is out of its range.
    """

    def __init__(
        self,
        latent_dim: int,
        architecture: Literal["inverse_autoregressive", "coupling"] = "inverse_autoregressive",
        transform: Literal["affine", "spline"] = "affine",
        transforms: int = 2,
        hidden: Sequence[int] = (64,),
        context: int = 32,
    ):
        super().__init__(latent_dim)
        if context < 1:
            raise ValueError(f"context must be at least 1, got {context}")
        self.flow = make_flow(latent_dim, context, architecture, transform, transforms, hidden)
        self.sizes = (latent_dim, latent_dim, context)

    def forward(self, loc: Tensor, log_scale: Tensor, context: Tensor) -> TorchDistribution:
        log_scale = 7 * torch.tanh(log_scale / 7)
        return FlowDistribution(self.flow, self.latent_dim, torch.tanh(context), loc, log_scale)
