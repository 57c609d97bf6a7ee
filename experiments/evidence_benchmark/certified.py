"""Programs whose log p(x) is stored: it was found once, between two bounds or by a particle filter; see ``certify``."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from experiments.evidence_benchmark.task import Task, double, draws
from pyro_vae.infer.programs import Program
from pyro_vae.infer.trees import Data

STORED = Path(__file__).with_name("references.json")
"""Written by ``python -m experiments.evidence_benchmark.certify``."""
VOLATILITY_PHI = 0.95
"""Of ``stochastic_volatility``: how much of one step is left at the next."""


def stored(name: str, make: Callable[[], tuple[tuple[Program, Program], Data]]) -> Callable[[], Task]:
    """What makes a task whose reference is in ``STORED``, of programs and data that ``make`` gives."""

    def task() -> Task:
        found = json.loads(STORED.read_text())[name]
        programs, data = make()
        return Task(name, *programs, data, double(found["log_px"]), double(found["error"]), found["source"])

    return task


def logistic_regression(table: str) -> tuple[tuple[Program, Program], dict[str, Tensor]]:
    """Weights and intercept ~ N(0, 1), standardized columns of a data set of scikit-learn; the datum is the data set.

    breast_cancer: all of it. wine: its first two kinds.
    """
    from sklearn import datasets  # one table of few

    x, y = getattr(datasets, f"load_{table}")(return_X_y=True)
    x, y = x[y < 2], y[y < 2]
    x = double((x - x.mean(0)) / x.std(0))
    data = {"x": torch.cat([x, torch.ones_like(x[:, :1])], 1).unsqueeze(0), "y": double(y).unsqueeze(0)}
    dim = data["x"].shape[-1]

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            weight = pyro.sample("weight", dist.Normal(x.new_zeros(dim), 1.0).to_event(1))
            logits = (x @ weight.unsqueeze(-1)).squeeze(-1)
            pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y)

    def guide(x: Tensor, y: Tensor) -> None:
        """Ridge regression of the sign: a posterior of a linear model with noise of variance four."""
        with pyro.plate("data", len(x), dim=-1):
            precision = torch.eye(dim).double() + x.mT @ x / 4
            loc = torch.linalg.solve(precision, (x.mT @ (2 * y - 1).unsqueeze(-1)) / 4 * 2).squeeze(-1)
            factor = torch.linalg.cholesky(torch.linalg.inv(precision))
            pyro.sample("weight", dist.MultivariateNormal(loc, scale_tril=factor))

    return (model, guide), data


def cox_process(side: int) -> tuple[tuple[Program, Program], Tensor]:
    """A log-Gaussian Cox process on a grid: f ~ GP(m, exp(-distance / 0.2)), counts ~ Poisson(exp(f)).

    The grid covers the unit square; m gives cells four points on average at 8x8, and in proportion to their area.
    """
    cells = torch.cartesian_prod(*[(torch.arange(side).double() + 0.5) / side] * 2)
    factor = torch.linalg.cholesky(torch.exp(-torch.cdist(cells, cells) / 0.2))
    mean = math.log(4 * 64 / side**2) - 0.5

    def model(counts: Tensor) -> None:
        with pyro.plate("data", len(counts), dim=-1):
            f = pyro.sample("f", dist.MultivariateNormal(counts.new_full((side**2,), mean), scale_tril=factor))
            pyro.sample("counts", dist.Poisson(f.exp()).to_event(1), obs=counts)

    def guide(counts: Tensor) -> None:
        with pyro.plate("data", len(counts), dim=-1):
            loc = (0.5 * (counts + 0.5).log() + 0.5 * mean).clamp(min=mean - 2)
            pyro.sample("f", dist.Normal(loc, 0.6).to_event(1))

    random = draws(120 + side)
    f = mean + factor @ double(random.normal(size=side**2))
    return (model, guide), double(random.poisson(f.exp().numpy())).unsqueeze(0)


def stochastic_volatility() -> tuple[tuple[Program, Program], Tensor]:
    """h_t = 0.95 h_(t-1) + 0.3 e_t, stationary, x_t ~ N(0, exp(h_t / 2)), for 30 steps: a state space, not linear."""
    random, steps = draws(130), torch.arange(30).double()
    covariance = 0.3**2 / (1 - VOLATILITY_PHI**2) * VOLATILITY_PHI ** (steps[:, None] - steps).abs()
    factor = torch.linalg.cholesky(covariance)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            h = pyro.sample("h", dist.MultivariateNormal(x.new_zeros(30), scale_tril=factor))
            pyro.sample("x", dist.Normal(torch.zeros_like(h), (h / 2).exp()).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        """The mean square of all steps, in all of them."""
        with pyro.plate("data", len(x), dim=-1):
            level = x.square().mean(-1, keepdim=True).log().expand_as(x)
            pyro.sample("h", dist.MultivariateNormal(0.7 * level, scale_tril=0.7 * factor))

    h = double(random.normal(size=(8, 30))) @ factor.mT
    return (model, guide), (h / 2).exp() * double(random.normal(size=(8, 30)))


def log_px_by_particles(x: Tensor, num_particles: int) -> Tensor:
    """log p(x) of ``stochastic_volatility`` by a bootstrap filter (Gordon, Salmond & Smith 1993); p(x) is unbiased.

    Args:
        x: shape ``(B, 30)``.
        num_particles: of each datum.

    Returns:
        Nats, shape ``(B,)``, of torch's random numbers.
    """
    spread = 0.3 / math.sqrt(1 - VOLATILITY_PHI**2)
    h = spread * torch.randn(num_particles, len(x), dtype=x.dtype)
    total = torch.zeros(len(x), dtype=x.dtype)
    for step in range(x.shape[1]):
        if step:
            h = VOLATILITY_PHI * h + 0.3 * torch.randn_like(h)
        log_weight = torch.distributions.Normal(0.0, (h / 2).exp()).log_prob(x[:, step])
        total += log_weight.logsumexp(0) - math.log(num_particles)
        heights = log_weight.softmax(0).cumsum(0).mT.contiguous()
        rungs = (torch.arange(num_particles) + torch.rand(len(x), 1, dtype=x.dtype)) / num_particles
        places = torch.searchsorted(heights, rungs).clamp(max=num_particles - 1)
        h = h.gather(0, places.mT)
    return total
