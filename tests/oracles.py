"""Models whose evidence is known by other means than this library's."""

import itertools
import math

import pyro
import pyro.distributions as dist
import torch
from scipy import integrate, special, stats
from torch import Tensor, nn

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


class SeparableBernoulli:
    """z ~ N(0, I_20), x_d | z ~ Bernoulli(logit = 6 z_d - 1): p(x) is a product of one-dimensional integrals."""

    dim = 20

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.dim), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=6 * z - 1).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Near the posterior's mean, and too narrow."""
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(1.5 * x - 0.5, 0.5).to_event(1))

    def log_px(self, x: Tensor) -> Tensor:
        one = integrate.quad(lambda z: stats.norm.pdf(z) * special.expit(6 * z - 1), -12, 12, epsabs=1e-13)[0]
        return torch.where(x == 1, math.log(one), math.log1p(-one)).sum(-1)


class Fold:
    """z ~ N(0, 1), x ~ N(abs(z), 0.2): two modes, of which the guide knows one."""

    @staticmethod
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z.abs(), 0.2), obs=x)

    @staticmethod
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.2))

    @staticmethod
    def log_px(x: Tensor) -> Tensor:
        def density(z, x):
            return stats.norm.pdf(z) * stats.norm.pdf(x, abs(z), 0.2)

        values = [integrate.quad(density, -9, 9, args=(v,), points=(-v, 0, v), limit=200)[0] for v in x.tolist()]
        return torch.tensor(values, dtype=torch.float64).log()


class Funnel:
    """v ~ N(0, 3), z_1 .. z_9 ~ N(0, exp(v / 2)), x ~ N(z_1, 5) (Neal 2003)."""

    @staticmethod
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            v = pyro.sample("v", dist.Normal(x.new_zeros(len(x)), 3.0))
            z = pyro.sample("z", dist.Normal(x.new_zeros(9), (v / 2).exp().unsqueeze(-1)).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 0], 5.0), obs=x)

    @staticmethod
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("v", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("z", dist.Normal(x.new_zeros(len(x), 9), 1.0).to_event(1))

    @staticmethod
    def log_px(x: Tensor) -> Tensor:
        def density(v, x):
            return stats.norm.pdf(v, 0, 3) * stats.norm.pdf(x, 0, math.sqrt(25 + math.exp(v)))

        return torch.tensor([integrate.quad(density, -30, 30, args=(v,), limit=200)[0] for v in x.tolist()]).log()


class GaussianChain:
    """z2 ~ N(0, I), z1 | z2 ~ N(A z2, s1^2 I), x | z1 ~ N(W z1, s^2 I): p(x) is normal."""

    def __init__(self, top_dim: int = 2, latent_dim: int = 3, pixels: int = 5):
        self.top = torch.randn(latent_dim, top_dim, dtype=torch.float64)
        self.weight = torch.randn(pixels, latent_dim, dtype=torch.float64)
        self.latent_scale, self.scale = 0.6, 0.8

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(self.top.shape[1]), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2 @ self.top.mT, self.latent_scale).to_event(1))
            pyro.sample("x", dist.Normal(z1 @ self.weight.mT, self.scale).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Draws z1 first, and z2 given it, as encoders do."""
        with pyro.plate("data", len(x), dim=-1):
            z1 = pyro.sample("z1", dist.Normal(0.2 * (x @ self.weight), 0.7).to_event(1))
            pyro.sample("z2", dist.Normal(0.3 * (z1 @ self.top), 0.8).to_event(1))

    def log_px(self, x: Tensor) -> Tensor:
        latent = self.top @ self.top.mT + self.latent_scale**2 * torch.eye(len(self.top)).to(x)
        noise = self.scale**2 * torch.eye(len(self.weight)).to(x)
        covariance = self.weight @ latent @ self.weight.mT + noise
        return torch.as_tensor(stats.multivariate_normal(cov=covariance.numpy()).logpdf(x.numpy()))


class Unrelated(nn.Module):
    """x does not depend on z, so that the loss of beta is log(2 pi) / 2 + beta KL: it tells the weight of each step."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.zeros_like(x), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc + x.new_zeros(len(x), 1), 1.0).to_event(1))

    @staticmethod
    def weight(loss) -> float:
        loss = loss.item() if isinstance(loss, Tensor) else loss
        return (loss - math.log(2 * math.pi) / 2) / 2  # KL = loc^2 / 2
