"""Models whose evidence is known by other means than this library's."""

import itertools

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae import MLP, VAE, Bernoulli, Conditional, LinearGaussianVAE, MeanField, StandardNormal


def small_vae(pixels: int = 12, latent_dim: int = 3, dtype: torch.dtype = torch.float64) -> VAE:
    """A Bernoulli VAE with random weights, large enough that nothing is near zero."""
    vae = VAE(
        StandardNormal(latent_dim),
        likelihood=Conditional(MLP(latent_dim, pixels, hidden=[8]), Bernoulli(pixels)),
        posterior=Conditional(MLP(pixels, 2 * latent_dim, hidden=[8]), MeanField(latent_dim)),
    ).to(dtype)
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return vae


def binary(batch: int, pixels: int = 12, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.bernoulli(torch.full((batch, pixels), 0.4, dtype=dtype))


def linear_gaussian(pixels: int = 7, latent_dim: int = 2) -> LinearGaussianVAE:
    weight = torch.randn(pixels, latent_dim, dtype=torch.float64)
    return LinearGaussianVAE(weight, torch.randn(pixels, dtype=torch.float64), scale=0.7)


class BinaryLatents:
    """z in {0, 1}^3, x | z Bernoulli: log p(x) is a sum of eight terms."""

    def __init__(self, pixels: int = 6):
        self.prior = torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64)
        self.weight = 2 * torch.randn(3, pixels, dtype=torch.float64)
        self.proposal = torch.tensor([0.4, 0.6, 0.5], dtype=torch.float64)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(self.prior).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z @ self.weight).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Bernoulli(self.proposal).to_event(1))

    def log_px(self, x: Tensor) -> Tensor:
        terms = []
        for bits in itertools.product((0.0, 1.0), repeat=3):
            z = torch.tensor(bits, dtype=x.dtype)
            p = torch.sigmoid(z @ self.weight)
            log_likelihood = torch.where(x == 1, p, 1 - p).log().sum(-1)
            terms.append(torch.where(z == 1, self.prior, 1 - self.prior).log().sum() + log_likelihood)
        return torch.logsumexp(torch.stack(terms), 0)
