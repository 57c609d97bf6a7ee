"""What the code of the VampPrior paper has and this library has not: its optimizer, and the limits of its numbers.

Tomczak & Welling (2018), arXiv 1705.07120; the limits are those of the authors' code.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.optim import Adam

from pyro_vae import Bernoulli
from pyro_vae.parts.posteriors import MeanField

LEAST = 1e-5
"""No pixel's probability is below this, nor above 1 minus this."""
LOG_VARIANCES = (-6.0, 2.0)
"""The log-variances of q(z | x) are clipped to this range."""


class ClippedBernoulli(Bernoulli):
    """Independent binary pixels whose probabilities are clipped to [1e-5, 1 - 1e-5]; log p(x) is a mass.

    Args:
        event_size: number X of pixels.

    >>> round(ClippedBernoulli(1)(torch.tensor([-50.0])).log_prob(torch.tensor([1.0])).exp().item(), 7)
    1e-05
    """

    def forward(self, logits: Tensor) -> TorchDistribution:
        most = math.log((1 - LEAST) / LEAST)
        return super().forward(logits.clamp(-most, most))


class ClippedGaussian(MeanField):
    """A Gaussian with diagonal covariance whose log-variances are clipped to [-6, 2].

    Args:
        latent_dim: number D of latent dimensions.
    """

    def forward(self, loc: Tensor, log_variance: Tensor) -> TorchDistribution:
        return dist.Normal(loc, (0.5 * log_variance.clamp(*LOG_VARIANCES)).exp()).to_event(1)


class AdamNormGrad(Adam):
    """Adam on gradients each divided by its norm, tensor by tensor.

    Args:
        params: to train.
        lr: learning rate.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 5e-4):
        super().__init__(params, lr=lr)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Normalize the gradients, and take a step of Adam."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(torch.linalg.vector_norm(parameter.grad) + 1e-7)
        return super().step(closure)
