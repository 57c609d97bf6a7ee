"""Decoders of two latent variables under six priors, whose log p(x) is an integral over the plane."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import AffineTransform, SigmoidTransform

from experiments.evidence_benchmark.exact import integral, one_site
from experiments.evidence_benchmark.integrals import log_integral, over_reals, panels
from experiments.evidence_benchmark.task import Task, double, draws

PIXELS, NUM_DATA = 12, 50


class Prior(NamedTuple):
    """A prior of two variables.

    Attributes:
        distribution: makes it.
        draw: the same by numpy, n draws ``(n, 2)``.
        edges: panels of t = asinh(z), or of z where it is bounded, that hold its mass.
        bounded: whether it is.
    """

    distribution: Callable[[], Any]
    draw: Callable[[np.random.RandomState, int], np.ndarray]
    edges: list[float]
    bounded: bool = False


ZERO = torch.zeros(2).double()
CENTRES, WEIGHTS, WIDTH = double([[-2.5, 0.0], [0.5, 2.0], [1.5, -2.0]]), [0.5, 0.3, 0.2], 0.5


def _mixture():
    return dist.MixtureSameFamily(dist.Categorical(double(WEIGHTS)), dist.Normal(CENTRES, WIDTH).to_event(1))


def _draw_mixture(random: np.random.RandomState, num: int) -> np.ndarray:
    return CENTRES.numpy()[random.choice(3, num, p=WEIGHTS)] + WIDTH * random.normal(size=(num, 2))


PRIORS = {
    "normal": Prior(
        lambda: dist.Normal(ZERO, 1.0).to_event(1), lambda r, n: r.normal(size=(n, 2)), panels(-3.2, 3.2, 24)
    ),
    "uniform": Prior(
        lambda: dist.Uniform(ZERO - 2, ZERO + 2).to_event(1),
        lambda r, n: r.uniform(-2, 2, (n, 2)),
        panels(-2, 2, 12),
        bounded=True,
    ),
    "laplace": Prior(
        lambda: dist.Laplace(ZERO, 1.0).to_event(1), lambda r, n: r.laplace(size=(n, 2)), panels(-4.5, 4.5, 30)
    ),
    "student_t": Prior(
        lambda: dist.StudentT(ZERO + 2, ZERO, 1.0).to_event(1),
        lambda r, n: r.standard_t(2, (n, 2)),
        panels(-14, 14, 40),
    ),
    "mixture": Prior(_mixture, _draw_mixture, panels(-3.2, 3.2, 24)),
}


def decoder(tripled: bool) -> Callable[[Tensor], Tensor]:
    """Logits ``(*, PIXELS)`` of z, ``(*, 2)``, by a network of fixed weights, three times as large if ``tripled``."""
    random = draws(100)
    first, second = double(random.normal(0, 1.0, (2, 10))), double(random.normal(0, 1.0, (10, PIXELS)))
    bias = double(random.normal(0, 0.5, PIXELS))
    factor = 3.0 if tripled else 1.0
    return lambda z: factor * (torch.tanh(z @ first) @ second) + bias


def planar(name: str, tripled: bool = False) -> Task:
    """z ~ one of the ``PRIORS``, x ~ Bernoulli(decoder(z)); the guide is the best normal that is linear in x."""
    prior, logits_of = PRIORS[name], decoder(tripled)
    x, posterior = _data_and_posterior(prior, logits_of)
    programs = one_site(prior.distribution(), lambda z: dist.Bernoulli(logits=logits_of(z)).to_event(1), posterior)

    def log_density(z: Tensor) -> Tensor:
        return prior.distribution().log_prob(z).unsqueeze(-1) + log_likelihood(logits_of(z), x)

    inside = log_density if prior.bounded else over_reals(log_density)
    result = log_integral(inside, prior.edges, prior.edges, nodes=16)
    return integral(f"planar_{name}" + "_tripled" * tripled, programs, x, result, "quadrature over z")


def two_layers(tripled: bool = False) -> Task:
    """a ~ N(0, 1), b ~ N(1.5 tanh(2 a), 0.5), and both are decoded; the guide draws b first."""
    logits_of = decoder(tripled)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Normal(x.new_zeros(()), 1.0))
            b = pyro.sample("b", dist.Normal(1.5 * torch.tanh(2 * a), 0.5))
            logits = logits_of(torch.stack([a, b], -1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    random = draws(101)
    a = double(random.normal(size=20_000))
    b = 1.5 * torch.tanh(2 * a) + 0.5 * double(random.normal(size=20_000))
    simulated = _pixels(logits_of(torch.stack([a, b], -1)), random)
    of_b, of_a = _Regression(simulated, b), _Regression(torch.cat([simulated, b[:, None]], -1), a)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            b = pyro.sample("b", dist.Normal(*of_b(x)))
            given = torch.cat([x.expand(*b.shape, -1), b.unsqueeze(-1)], -1)
            pyro.sample("a", dist.Normal(*of_a(given)))

    x = simulated[:NUM_DATA]

    def log_density(z: Tensor) -> Tensor:
        a, b = z.unbind(-1)
        prior = dist.Normal(0.0, 1.0).log_prob(a) + dist.Normal(1.5 * torch.tanh(2 * a), 0.5).log_prob(b)
        return prior.unsqueeze(-1) + log_likelihood(logits_of(z), x)

    result = log_integral(over_reals(log_density), panels(-3.2, 3.2, 24), panels(-3.2, 3.2, 24), nodes=16)
    return integral("planar_two_layers" + "_tripled" * tripled, (model, guide), x, result, "quadrature over z")


def log_likelihood(logits: Tensor, x: Tensor) -> Tensor:
    """log p(x | z) of binary pixels: logits ``(N, X)``, x ``(B, X)`` -> ``(N, B)``."""
    return logits @ x.mT - F.softplus(logits).sum(-1, keepdim=True)


def _data_and_posterior(prior: Prior, logits_of: Callable) -> tuple[Tensor, Callable]:
    """Data of the model, and a mean-field normal fitted to simulated pairs, for bounded z in its logit."""
    random = draws(102)
    z = double(prior.draw(random, 20_000))
    x = _pixels(logits_of(z), random)
    if not prior.bounded:
        fit = _Regression(x, z.clamp(-20, 20))
        return x[:NUM_DATA], lambda x: dist.Normal(*fit(x)).to_event(1)
    low, high = prior.edges[0], prior.edges[-1]
    fit = _Regression(x, torch.logit((z - low) / (high - low)))
    maps = [SigmoidTransform(), AffineTransform(low, high - low)]
    return x[:NUM_DATA], lambda x: dist.TransformedDistribution(dist.Normal(*fit(x)), maps).to_event(1)


def _pixels(logits: Tensor, random) -> Tensor:
    return (double(random.uniform(size=logits.shape)) < torch.sigmoid(logits)).double()


class _Regression:
    """Least squares of y on x and a constant: the mean, and the standard deviation of what is left."""

    def __init__(self, x: Tensor, y: Tensor):
        design = torch.cat([x, torch.ones_like(x[:, :1])], -1)
        y = y.reshape(len(x), -1)
        self.weight = torch.linalg.lstsq(design, y).solution
        self.scale = (y - design @ self.weight).std(0)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x @ self.weight[:-1] + self.weight[-1]
        scale = self.scale.expand_as(mean)
        return (mean, scale) if len(self.scale) > 1 else (mean.squeeze(-1), scale.squeeze(-1))
