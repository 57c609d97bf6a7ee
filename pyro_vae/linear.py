"""The linear-Gaussian VAE, for which everything is known in closed form: an oracle."""

import math
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn


class ExactGaps(NamedTuple):
    """Why the ELBO of a factorized Gaussian q lies below log p(x): nats per datum, shape ``(*,)`` each.

    Their sum is KL(q || p(z | x)) = log p(x) - ELBO (Cremer, Li & Duvenaud 2018, section 3).

    Attributes:
        approximation: KL(q* || p(z | x)) for the best factorized Gaussian q*: what no encoder can gain back.
        amortization: KL(q || p(z | x)) - KL(q* || p(z | x)): what a better encoder would gain.
    """

    approximation: Tensor
    amortization: Tensor


class LinearGaussianVAE(nn.Module):
    """The linear-Gaussian VAE, probabilistic PCA: z ~ N(0, I), x | z ~ N(W z + mean, scale^2 I).

    Its marginal likelihood and posterior are (Tipping & Bishop 1999, equations 6-9):

        p(x) = N(mean, W W' + scale^2 I),     p(z | x) = N(M^-1 W' (x - mean), scale^2 M^-1),   M = W' W + scale^2 I

    ``guide`` is that posterior, so every log-weight equals log p(x); pair ``model`` with another guide to test an
    estimator.

    Args:
        weight: W, shape ``(X, D)``.
        mean: shape ``(X,)``.
        scale: the observations' standard deviation, positive.

    Raises:
        ValueError: if the shapes disagree or ``scale`` is not positive.
    """

    weight: Tensor
    mean: Tensor

    def __init__(self, weight: Tensor, mean: Tensor, scale: float):
        super().__init__()
        if weight.dim() != 2 or mean.shape != weight.shape[:1]:
            raise ValueError(f"weight must be (X, D) and mean (X,), got {tuple(weight.shape)} and {tuple(mean.shape)}")
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}")
        self.register_buffer("weight", weight)
        self.register_buffer("mean", mean)
        self.scale = scale

    def model(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """p(x, z) for observations ``x``, and booleans of what was ``seen`` of them, shape ``(B, X)``; None: all."""
        size = self.weight.new_zeros(self.weight.shape[1])
        with pyro.plate("data", x.shape[0], dim=-1, device=x.device):  # pyright: ignore[reportArgumentType]
            z = pyro.sample("z", dist.Normal(size, 1.0).to_event(1))
            entries = dist.Normal(z @ self.weight.mT + self.mean, self.scale)
            if seen is not None:
                x, entries = torch.where(seen, x, self.mean), entries.mask(seen)
            return pyro.sample("x", entries.to_event(1), obs=x)

    def guide(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """The exact posterior of observations ``x``, and what was ``seen`` of them, shape ``(B, X)``."""
        with pyro.plate("data", x.shape[0], dim=-1, device=x.device):  # pyright: ignore[reportArgumentType]
            return pyro.sample("z", self.posterior(x, seen))

    def posterior(self, x: Tensor, seen: Tensor | None = None) -> dist.MultivariateNormal:
        """p(z | x), batch shape ``(*)``, for ``x`` and what was ``seen`` of it, of shape ``(*, X)``."""
        residual, m = x - self.mean, self._m(seen)
        residual = residual if seen is None else torch.where(seen, residual, 0.0)
        loc = torch.linalg.solve(m, self.weight.mT @ residual.unsqueeze(-1)).squeeze(-1)
        return dist.MultivariateNormal(loc, precision_matrix=m / self.scale**2)

    def log_px(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """log p(x) in nats, shape ``(*)``, for ``x``, and what was ``seen`` of it, of shape ``(*, X)``.

        By the matrix determinant lemma and Woodbury's identity, in O(X D) per observation.
        """
        size, latent = self.weight.shape
        residual = x - self.mean
        if seen is not None:
            size, residual = seen.to(residual).sum(-1), torch.where(seen, residual, 0.0)
        m = self._m(seen)
        projected = residual @ self.weight
        solved = torch.linalg.solve(m, projected.unsqueeze(-1)).squeeze(-1)
        mahalanobis = (residual.square().sum(-1) - (projected * solved).sum(-1)) / self.scale**2
        log_det = torch.logdet(m) + 2 * (size - latent) * math.log(self.scale)
        return -0.5 * (mahalanobis + log_det + size * math.log(2 * math.pi))

    def optimal_mean_field(self, x: Tensor) -> dist.Independent:
        """q*, the factorized Gaussian of smallest KL(q || p(z | x)): batch shape ``(*)``, for ``x`` ``(*, X)``.

        It has the posterior's mean, and variances 1 / P_dd for the posterior's precision P, smaller than its marginal
        variances (Bishop 2006, equations 10.13-10.15).
        """
        loc = self.posterior(x).mean
        return dist.Normal(loc, self._precision().diagonal().rsqrt().expand_as(loc)).to_event(1)

    def elbo(self, x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        """log p(x) - KL(q || p(z | x)) of q = N(loc, diag(scale^2)), nats per datum, shape ``(*,)``.

        Args:
            x: observations, shape ``(*, X)``.
            loc: shape ``(*, D)``.
            scale: standard deviations, positive, shape ``(*, D)``.
        """
        gaps = self.gaps(x, loc, scale)
        return self.log_px(x) - (gaps.approximation + gaps.amortization)

    def gaps(self, x: Tensor, loc: Tensor, scale: Tensor) -> ExactGaps:
        """The gaps between log p(x) and the ELBO of q = N(loc, diag(scale^2)), nats per datum, shape ``(*,)`` each.

        For a posterior N(mu, P^-1), with r_d = P_dd scale_d^2, the closed form of KL(q || p(z | x)) splits into

            approximation = 1/2 (sum_d log P_dd - log det P)
            amortization = 1/2 (sum_d (r_d - 1 - log r_d) + (loc - mu)' P (loc - mu))

        Args:
            x, loc, scale: as for :meth:`elbo`.
        """
        precision = self._precision()
        diagonal = precision.diagonal()
        shift = loc - self.posterior(x).mean
        ratio = diagonal * scale.square()
        spread = (ratio - 1 - diagonal.log() - 2 * scale.log()).sum(-1)
        amortization = 0.5 * (spread + ((shift @ precision) * shift).sum(-1))
        approximation = 0.5 * (diagonal.log().sum() - torch.logdet(precision))
        return ExactGaps(approximation.expand_as(amortization), amortization)

    def _precision(self) -> Tensor:
        """P, the inverse of the posterior's covariance, which is the same for every x."""
        return self._m() / self.scale**2

    def _m(self, seen: Tensor | None = None) -> Tensor:
        known = self.weight if seen is None else self.weight * seen.unsqueeze(-1)
        return known.mT @ self.weight + self.scale**2 * torch.eye(
            self.weight.shape[1], dtype=self.weight.dtype, device=self.weight.device
        )
