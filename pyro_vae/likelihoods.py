"""Likelihoods p(x | z): heads that turn a decoder's raw outputs into a distribution over one observation."""

from abc import ABC, abstractmethod

import pyro.distributions as dist
import torch
from torch import Tensor, nn


class Likelihood(nn.Module, ABC):
    """Raw outputs in, distribution out.

    ``forward(*parameters)`` takes one tensor ``(*, n_i)`` per entry of ``sizes`` and returns a Pyro distribution
    with batch shape ``(*)`` and event shape ``(event_size,)``.

    Args:
        event_size: number X of entries of one flat observation, at least 1.

    Attributes:
        sizes: how many raw outputs each parameter takes; their sum is the decoder's ``out_features``.
        is_density: whether log p(x) is a density (else a probability mass).

    Raises:
        ValueError: if ``event_size`` is below 1.
    """

    sizes: tuple[int, ...]
    is_density: bool = False

    def __init__(self, event_size: int):
        super().__init__()
        if event_size < 1:
            raise ValueError(f"event_size must be at least 1, got {event_size}")
        self.event_size = event_size

    @abstractmethod
    def forward(self, *parameters: Tensor) -> dist.TorchDistribution:
        """The distribution of x given raw outputs ``(*, n_i)``."""

    def marginal(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """Raw outputs ``(n_i,)`` under which the head alone describes ``x``, shape ``(N, X)``, best.

        An untrained decoder starts there. Default: ``None``, no such start.
        """
        return None


class Bernoulli(Likelihood):
    """Independent binary pixels, parametrized by their logits; log p(x) is a probability mass.

    Args:
        event_size: number X of pixels.

    >>> round(Bernoulli(2)(torch.tensor([0.0, 100.0])).log_prob(torch.tensor([1.0, 1.0])).item(), 4)
    -0.6931
    """

    def __init__(self, event_size: int):
        super().__init__(event_size)
        self.sizes = (event_size,)

    def forward(self, logits: Tensor) -> dist.TorchDistribution:
        return BernoulliVector(logits)

    def marginal(self, x: Tensor) -> tuple[Tensor, ...]:
        """The logit of the mean image, its probabilities clipped to [0.001, 0.999] (the IWAE authors' code)."""
        return (torch.logit(x.mean(0), eps=1e-3),)


class BernoulliVector(dist.Independent):
    """Independent Bernoulli variables along the last dimension, scored in one fused pass.

    log p(x) = sum_d x_d l_d - softplus(l_d), for logits l: the value of
    ``Bernoulli(logits=l).to_event(1).log_prob(x)``, at a fraction of its cost without gradients.

    Args:
        logits: shape ``(*, X)``.
    """

    def __init__(self, logits: Tensor, validate_args: bool | None = None):
        self.logits = logits
        super().__init__(dist.Bernoulli(logits=logits, validate_args=validate_args), 1, validate_args=validate_args)

    def log_prob(self, x: Tensor) -> Tensor:
        if self.base_dist._validate_args:
            self.base_dist._validate_sample(x)
        if torch.is_grad_enabled():
            return (x * self.logits - nn.functional.softplus(self.logits, threshold=50)).sum(-1)
        return _bernoulli_log_prob(self.logits, x)

    def expand(self, batch_shape, _instance=None) -> "BernoulliVector":
        return BernoulliVector(self.logits.expand(*batch_shape, -1), validate_args=self.base_dist._validate_args)


def _bernoulli_log_prob(logits: Tensor, x: Tensor) -> Tensor:
    """sum_d x_d l_d - softplus(l_d) without gradients, where memory traffic and logarithms dominate on a CPU.

    softplus(l) = max(l, 0) + log(1 + exp(-|l|)). Sixteen factors 1 + exp(-|l|), each in (1, 2], are multiplied before
    the logarithm is taken, so it runs 16 times less often and nothing overflows; one buffer serves all steps.
    """
    logits, x = torch.broadcast_tensors(logits, x)
    buffer = logits * x
    result = buffer.sum(-1)
    factors = torch.abs(logits, out=buffer).neg_().exp_().add_(1)
    for _ in range(4):
        if factors.shape[-1] % 2:
            break
        left, right = factors.chunk(2, dim=-1)
        factors = left.mul_(right)
    result -= factors.log().sum(-1)
    return result.sub_(torch.clamp(logits, min=0, out=buffer).sum(-1))
