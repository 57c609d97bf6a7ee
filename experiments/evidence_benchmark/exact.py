"""Programs whose log p(x) is a closed form, or an integral over one or two variables that is computed on the spot."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from experiments.evidence_benchmark.integrals import log_integral, over_reals, panels
from experiments.evidence_benchmark.task import Task, double, draws
from pyro_vae.infer.programs import Program

ROUNDING = 1e-9
"""Error of a closed form in float64, nats."""
REALS = panels(-3.2, 3.2, 16)
"""Panels of t = asinh(z) for densities whose tails are those of a normal."""


def one_site(prior, likelihood: Callable, posterior: Callable) -> tuple[Program, Program]:
    """z ~ ``prior``, x ~ ``likelihood(z)``; the guide draws z ~ ``posterior(x)``."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", likelihood(pyro.sample("z", prior)), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", posterior(x))

    return model, guide


def closed_form(name: str, programs: tuple[Program, Program], data, reference: Tensor, source: str) -> Task:
    """A task whose reference is exact up to rounding."""
    return Task(name, *programs, data, reference, torch.full_like(reference, ROUNDING), source)


def integral(name: str, programs: tuple[Program, Program], data, result: tuple[Tensor, Tensor], source: str) -> Task:
    """A task whose reference is a quadrature with its error."""
    reference, error = result
    return Task(name, *programs, data, reference, error + ROUNDING, source)


# Several modes


def absolute_value() -> Task:
    """z ~ N(0, 1), x ~ N(|z|, 0.2): two modes, of which the guide knows one. p(x) = 2 N(x; 0, 1.04) Phi(m / s)."""
    x = double([1.0, 0.5, 0.0, -0.3, 2.0, 3.0])
    programs = one_site(
        dist.Normal(double(0.0), 1.0), lambda z: dist.Normal(z.abs(), 0.2), lambda x: dist.Normal(x / 1.04, 0.2)
    )
    middle, scale = x / 1.04, 0.2 / math.sqrt(1.04)
    reference = math.log(2) + Normal(0.0, math.sqrt(1.04)).log_prob(x) + torch.special.log_ndtr(middle / scale)
    return closed_form("absolute_value", programs, x, reference, "closed form")


def mixture_of_forty(dim: int) -> Task:
    """z ~ N(0, 20^2 I), x ~ 1/40 sum_k N(z + m_k, I): up to 40 modes, of which none is near to another."""
    centres, width = double(draws(40).uniform(-40, 40, (40, dim))), 20.0
    prior = dist.Normal(torch.zeros(dim).double(), width).to_event(1)

    def likelihood(z: Tensor):
        parts = dist.Normal(z.unsqueeze(-2) + centres, 1.0).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=z.new_zeros(*z.shape[:-1], 40)), parts)

    def posterior(x: Tensor):
        """As wide as the prior: it misses no mode, and fits none."""
        return dist.Normal(torch.zeros_like(x), width).to_event(1)

    x = double(draws(41).normal(0, 10, (8, dim)))
    parts = Normal(centres, math.sqrt(width**2 + 1)).log_prob(x.unsqueeze(1)).sum(-1)
    reference = parts.logsumexp(1) - math.log(40)
    programs = one_site(prior, likelihood, posterior)
    return closed_form(f"mixture_of_forty_{dim}d", programs, x, reference, "closed form")


def squares(dim: int) -> Task:
    """z ~ N(0, I), x ~ N(Q z^2, 0.3), Q of orthonormal columns: 2^D modes, alike but for signs; the guide knows one.

    Q'x is N(z^2, 0.3) and the rest of x is noise, so that p(x) is a product of one-dimensional integrals.
    """
    random, noise = draws(110 + dim), 0.3
    columns, _ = torch.linalg.qr(double(random.normal(size=(2 * dim, dim))))
    programs = one_site(
        dist.Normal(torch.zeros(dim).double(), 1.0).to_event(1),
        lambda z: dist.Normal(z.square() @ columns.mT, noise).to_event(1),
        lambda x: dist.Normal((x @ columns).clamp(min=0.05).sqrt(), 0.2).to_event(1),
    )
    x = double(random.normal(size=(8, dim))).square() @ columns.mT + noise * double(random.normal(size=(8, 2 * dim)))
    seen = x @ columns

    def one(z: Tensor) -> Tensor:
        return Normal(0.0, 1.0).log_prob(z) + Normal(z.square(), noise).log_prob(seen.flatten())

    log_each, error = (each.view(seen.shape) for each in log_integral(over_reals(one), panels(-3.2, 3.2, 40)))
    rest = -0.5 * (x - seen @ columns.mT).square().sum(-1) / noise**2 - dim / 2 * math.log(2 * math.pi * noise**2)
    result = log_each.sum(-1) + rest, error.sum(-1)
    return integral(f"squares_{dim}d", programs, x, result, "product of quadratures")


# Tails


def gamma_poisson() -> Task:
    """z ~ Gamma(0.1, 1), x ~ Poisson(z): the posterior of x = 0 spans dozens of powers of e. Negative binomial."""
    x = double([0.0, 1.0, 3.0, 10.0])
    programs = one_site(
        dist.Gamma(double(0.1), 1.0), dist.Poisson, lambda x: dist.Gamma(0.2 + x, torch.full_like(x, 2.0))
    )
    reference = torch.lgamma(x + 0.1) - math.lgamma(0.1) - torch.lgamma(x + 1) - (x + 0.1) * math.log(2)
    return closed_form("gamma_poisson", programs, x, reference, "closed form")


def collapsed(name: str, df: float, dim: int, scale: float) -> Task:
    """Units of a Student-t prior that the decoder ignores, so that p(x) is that of the pixels' constant probabilities.

    Their posterior is the prior, whose tails a normal guide, and any Gaussian start, lacks.
    """
    bias = double(draws(50).normal(0, 1, 16))
    zero = torch.zeros(dim).double()
    programs = one_site(
        dist.StudentT(zero + df, zero, zero + scale).to_event(1),
        lambda z: dist.Bernoulli(logits=bias + 0 * z.sum(-1, keepdim=True)).to_event(1),
        lambda x: dist.Normal(x.new_zeros(len(x), dim), scale).to_event(1),
    )
    x = double(draws(51).uniform(size=(8, 16)) < 0.5)
    reference = (x * bias - F.softplus(bias)).sum(-1)
    return closed_form(name, programs, x, reference, "closed form")


def funnel() -> Task:
    """Neal's funnel, v ~ N(0, 3), z ~ N(0, exp(v / 2)) in nine dimensions, seen through x ~ N(z, 0.5)."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            v = pyro.sample("v", dist.Normal(x.new_zeros(()), 3.0))
            scale = (v / 2).exp().unsqueeze(-1).expand(*v.shape, 9)
            z = pyro.sample("z", dist.Normal(torch.zeros_like(scale), scale).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            variance = (x.square().mean(-1) - 0.25).clamp(min=0.1)
            pyro.sample("v", dist.Normal(variance.log(), 1.5))
            share = (variance / (variance + 0.25)).unsqueeze(-1)
            pyro.sample("z", dist.Normal(share * x, 0.5).to_event(1))

    random = draws(60)
    v = double([-6.0, -2.0, -1.0, 0.0, 0.0, 1.0, 2.0, 4.0])
    x = double(random.normal(size=(8, 9))) * (v / 2).exp()[:, None] + 0.5 * double(random.normal(size=(8, 9)))

    def log_density(v: Tensor) -> Tensor:
        variance = (v.exp() + 0.25).unsqueeze(-1)
        given = -0.5 * (x.square() / variance + (2 * math.pi * variance).log()).sum(-1)
        return Normal(0.0, 3.0).log_prob(v) + given

    return integral("funnel", (model, guide), x, log_integral(log_density, panels(-36, 36, 48)), "quadrature over v")


# Normal and separable programs


def far_guide() -> Task:
    """A linear-Gaussian program in four dimensions, and a guide N(4, 0.1) far from every posterior."""
    random = draws(70)
    weight, scale = double(random.normal(size=(13, 4))), 2.0
    x = double(random.normal(size=(8, 4))) @ weight.mT + scale * double(random.normal(size=(8, 13)))
    programs = one_site(
        dist.Normal(torch.zeros(4).double(), 1.0).to_event(1),
        lambda z: dist.Normal(z @ weight.mT, scale).to_event(1),
        lambda x: dist.Normal(x.new_full((len(x), 4), 4.0), 0.1).to_event(1),
    )
    covariance = weight @ weight.mT + scale**2 * torch.eye(13).double()
    reference = MultivariateNormal(torch.zeros(13).double(), covariance).log_prob(x)
    return closed_form("far_guide", programs, x, reference, "closed form")


def separable_bernoulli(dim: int) -> Task:
    """z ~ N(0, I), x_d ~ Bernoulli(logit = 6 z_d - 1): skewed in every direction; the guide is too narrow."""
    programs = one_site(
        dist.Normal(torch.zeros(dim).double(), 1.0).to_event(1),
        lambda z: dist.Bernoulli(logits=6 * z - 1).to_event(1),
        lambda x: dist.Normal(1.5 * x - 0.5, 0.5).to_event(1),
    )
    x = double(draws(80).uniform(size=(8, dim)) < 0.4)
    bits = double([0.0, 1.0])
    one = over_reals(
        lambda z: (
            Normal(0.0, 1.0).log_prob(z) + torch.where(bits == 1, F.logsigmoid(6 * z - 1), F.logsigmoid(1 - 6 * z))
        )
    )
    log_bit, error = log_integral(one, REALS)
    of_x = torch.stack([torch.where(x == 1, each[1], each[0]).sum(-1) for each in (log_bit, error)])
    return integral(f"separable_bernoulli_{dim}d", programs, x, (of_x[0], of_x[1]), "product of quadratures")


# Whole programs: the one datum is a data set


def eight_schools() -> Task:
    """Rubin's eight schools, centred: mu ~ N(0, 5), tau ~ half-Cauchy(5), theta ~ N(mu, tau), y ~ N(theta, sigma)."""
    y = double([[28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]])
    sigma = double([[15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]])

    def model(y: Tensor, sigma: Tensor) -> None:
        with pyro.plate("data", len(y), dim=-1):
            mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 5.0)).unsqueeze(-1)
            tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0))).unsqueeze(-1)
            theta = pyro.sample("theta", dist.Normal(mu + torch.zeros_like(y), tau + torch.zeros_like(y)).to_event(1))
            pyro.sample("y", dist.Normal(theta, sigma).to_event(1), obs=y)

    def guide(y: Tensor, sigma: Tensor) -> None:
        with pyro.plate("data", len(y), dim=-1):
            pyro.sample("mu", dist.Normal(y.new_tensor(4.4), 3.3))
            pyro.sample("tau", dist.LogNormal(y.new_tensor(1.0), 1.0))
            pyro.sample("theta", dist.Normal(4.4 + 0.2 * (y - 4.4), 5.0).to_event(1))

    def log_density(log_tau: Tensor) -> Tensor:
        tau = log_tau.exp()
        covariance = torch.diag_embed(sigma.square() + tau.square()) + 25.0
        prior = math.log(2 / math.pi) - math.log(5) - torch.log1p((tau / 5).square()) + log_tau
        return prior + MultivariateNormal(torch.zeros(8).double(), covariance).log_prob(y).unsqueeze(-1)

    result = log_integral(log_density, panels(-25, 15, 40))
    return integral("eight_schools", (model, guide), (y, sigma), result, "quadrature over tau")


def brownian_motion() -> Task:
    """A random walk of 30 steps of width 0.1, seen with noise 0.15, but for ten steps in the middle.

    The program of Sountsov et al. (2020), with its scales known and data of our own. Its log p(y) is normal.
    """
    seen, y = _walks(8)
    walk = torch.ones(30, 30).double().tril()

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y), dim=-1):
            z = pyro.sample("z", dist.MultivariateNormal(y.new_zeros(30), scale_tril=0.1 * walk))
            pyro.sample("y", dist.Normal(z[..., seen], 0.15).to_event(1), obs=y)

    def guide(y: Tensor) -> None:
        """Between the neighbours that were seen, and of one scale."""
        with pyro.plate("data", len(y), dim=-1):
            middle = y[:, 9:11].mean(-1, keepdim=True).expand(-1, 10)
            pyro.sample("z", dist.Normal(torch.cat([y[:, :10], middle, y[:, 10:]], -1), 0.15).to_event(1))

    covariance = (0.01 * walk @ walk.mT)[seen][:, seen] + 0.15**2 * torch.eye(20).double()
    reference = MultivariateNormal(torch.zeros(20).double(), covariance).log_prob(y)
    return closed_form("brownian_motion", (model, guide), y, reference, "closed form")


def brownian_motion_of_unknown_scales() -> Task:
    """The same with both scales log-normal, of median 1 and width 2 (Sountsov et al. 2020): a funnel of 32 numbers."""
    seen, y = _walks(4)
    walk = torch.ones(30, 30).double().tril()

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y), dim=-1):
            step = pyro.sample("step", dist.LogNormal(y.new_zeros(()), 2.0))[..., None, None]
            noise = pyro.sample("noise", dist.LogNormal(y.new_zeros(()), 2.0)).unsqueeze(-1)
            z = pyro.sample("z", dist.MultivariateNormal(y.new_zeros(30), scale_tril=step * walk))
            pyro.sample("y", dist.Normal(z[..., seen], noise).to_event(1), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("data", len(y), dim=-1):
            for name in ("step", "noise"):
                pyro.sample(name, dist.LogNormal(y.new_tensor(math.log(0.12)), 0.4))
            middle = y[:, 9:11].mean(-1, keepdim=True).expand(-1, 10)
            pyro.sample("z", dist.Normal(torch.cat([y[:, :10], middle, y[:, 10:]], -1), 0.15).to_event(1))

    unit = (walk @ walk.mT)[seen][:, seen]

    def log_density(log_scales: Tensor) -> Tensor:
        step, noise = (2 * log_scales).exp().unsqueeze(-1).unsqueeze(-1).unbind(1)
        covariance = step * unit + noise * torch.eye(20).double()
        prior = Normal(0.0, 2.0).log_prob(log_scales).sum(-1, keepdim=True)
        marginal = MultivariateNormal(torch.zeros(20).double(), scale_tril=torch.linalg.cholesky(covariance))
        return prior + marginal.log_prob(y.unsqueeze(1)).mT

    result = log_integral(log_density, panels(-12, 4, 16), panels(-12, 4, 16), nodes=14)
    source = "quadrature over both scales"
    return integral("brownian_motion_unknown_scales", (model, guide), y, result, source)


def _walks(num: int) -> tuple[Tensor, Tensor]:
    """Which of 30 steps are seen, and what of ``num`` walks is."""
    random = draws(90)
    seen = torch.cat([torch.arange(10), torch.arange(20, 30)])
    z = double(0.1 * random.normal(size=(num, 30)).cumsum(-1))
    return seen, z[:, seen] + 0.15 * double(random.normal(size=(num, 20)))
