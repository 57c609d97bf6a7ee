"""Models whose evidence is known in closed form."""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn


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

    def __init__(self, weight: Tensor, mean: Tensor, scale: float):
        super().__init__()
        if weight.dim() != 2 or mean.shape != weight.shape[:1]:
            raise ValueError(f"weight must be (X, D) and mean (X,), got {tuple(weight.shape)} and {tuple(mean.shape)}")
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}")
        self.register_buffer("weight", weight)
        self.register_buffer("mean", mean)
        self.scale = scale

    def model(self, x: Tensor) -> Tensor:
        """p(x, z) for observations ``x``, shape ``(B, X)``."""
        size = self.weight.new_zeros(self.weight.shape[1])
        with pyro.plate("data", x.shape[0], dim=-1, device=x.device):
            z = pyro.sample("z", dist.Normal(size, 1.0).to_event(1))
            return pyro.sample("x", dist.Normal(z @ self.weight.mT + self.mean, self.scale).to_event(1), obs=x)

    def guide(self, x: Tensor) -> Tensor:
        """The exact posterior of observations ``x``, shape ``(B, X)``."""
        with pyro.plate("data", x.shape[0], dim=-1, device=x.device):
            return pyro.sample("z", self.posterior(x))

    def posterior(self, x: Tensor) -> dist.MultivariateNormal:
        """p(z | x), batch shape ``(*)``, for ``x`` of shape ``(*, X)``."""
        precision = self._m() / self.scale**2
        loc = torch.linalg.solve(self._m(), self.weight.mT @ (x - self.mean).unsqueeze(-1)).squeeze(-1)
        return dist.MultivariateNormal(loc, precision_matrix=precision)

    def log_px(self, x: Tensor) -> Tensor:
        """log p(x) in nats, shape ``(*)``, for ``x`` of shape ``(*, X)``.

        By the matrix determinant lemma and Woodbury's identity, in O(X D) per observation.
        """
        size, latent = self.weight.shape
        residual = x - self.mean
        m = self._m()
        projected = residual @ self.weight
        solved = torch.linalg.solve(m, projected.unsqueeze(-1)).squeeze(-1)
        mahalanobis = (residual.square().sum(-1) - (projected * solved).sum(-1)) / self.scale**2
        log_det = torch.logdet(m) + 2 * (size - latent) * math.log(self.scale)
        return -0.5 * (mahalanobis + log_det + size * math.log(2 * math.pi))

    def _m(self) -> Tensor:
        return self.weight.mT @ self.weight + self.scale**2 * torch.eye(
            self.weight.shape[1], dtype=self.weight.dtype, device=self.weight.device
        )
