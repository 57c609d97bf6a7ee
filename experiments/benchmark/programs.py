"""Small Pyro programs, one of each kind that people write; part programs of the benchmark times a step of each.

They are as small as in a lecture or a paper's first example, where what a step costs is Python rather than arithmetic.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pyro
import torch
from pyro import distributions as dist
from pyro.contrib.gp.kernels import RBF
from pyro.contrib.gp.likelihoods import Gaussian
from pyro.contrib.gp.models import VariationalSparseGP
from pyro.distributions import constraints
from pyro.distributions.transforms import affine_autoregressive
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal, AutoNormalizingFlow
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus


class Program(NamedTuple):
    """What ``pyro.infer.SVI`` is given, and what its steps are: a model, a guide, a loss and arguments."""

    model: Callable[..., object]
    guide: Callable[..., object]
    loss: ELBO
    args: tuple


def standard_normal(device: torch.device, *shape: int) -> Any:
    """``shape[-1]`` independent standard normal variables, in a batch of the shape before it."""
    return dist.Normal(torch.zeros(shape, device=device), 1.0).to_event(1)


# Regressions


def linear_regression(x: Tensor, y: Tensor) -> None:
    weight = pyro.sample("weight", standard_normal(x.device, x.shape[1]))
    bias = pyro.sample("bias", dist.Normal(x.new_zeros(()), 10.0))
    scale = pyro.sample("scale", dist.HalfNormal(x.new_ones(())))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ weight + bias, scale), obs=y)


def regression_data(device: torch.device) -> tuple[Tensor, Tensor]:
    x = torch.randn(200, 5, device=device)
    return x, x.sum(1) + 0.3 * torch.randn(200, device=device)


def regression(device: torch.device) -> Program:
    return Program(linear_regression, AutoNormal(linear_regression), Trace_ELBO(), regression_data(device))


def regression_full_covariance(device: torch.device) -> Program:
    return Program(linear_regression, AutoMultivariateNormal(linear_regression), Trace_ELBO(), regression_data(device))


def regression_flow(device: torch.device) -> Program:
    guide = AutoNormalizingFlow(
        linear_regression, lambda size: affine_autoregressive(size, hidden_dims=[32]).to(device)
    )
    return Program(linear_regression, guide, Trace_ELBO(), regression_data(device))


def eight_schools(device: torch.device) -> Program:
    """Rubin's eight schools, with the parametrization that is not centred and a guide of ``pyro.param``."""

    def model(effects: Tensor, errors: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(effects.new_zeros(()), 10.0))
        spread = pyro.sample("spread", dist.HalfCauchy(effects.new_full((), 10.0)))
        with pyro.plate("schools", len(effects)):
            shift = pyro.sample("shift", dist.Normal(torch.zeros_like(effects), 1.0))
            pyro.sample("effect", dist.Normal(mean + spread * shift, errors), obs=effects)

    def normal(name: str, like: Tensor) -> Any:
        scale = pyro.param(f"{name}_scale", lambda: torch.full_like(like, 0.1), constraint=constraints.positive)
        return dist.Normal(pyro.param(f"{name}_loc", lambda: torch.zeros_like(like)), scale)

    def guide(effects: Tensor, errors: Tensor) -> None:
        pyro.sample("mean", normal("mean", effects[0]))
        transform = dist.transforms.ExpTransform()
        pyro.sample("spread", dist.TransformedDistribution(normal("spread", effects[0]), [transform]))
        with pyro.plate("schools", len(effects)):
            pyro.sample("shift", normal("shift", effects))

    effects = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], device=device)
    errors = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], device=device)
    return Program(model, guide, Trace_ELBO(), (effects, errors))


def gaussian_process(device: torch.device) -> Program:
    """A sparse variational Gaussian process of 10 inducing points."""
    x = torch.linspace(0, 5, 100, device=device)
    y = torch.sin(3 * x) + 0.1 * torch.randn(100, device=device)
    kernel, likelihood = RBF(input_dim=1), Gaussian()
    inducing = torch.linspace(0, 5, 10, device=device)
    process = VariationalSparseGP(x, y, kernel, inducing, likelihood, whiten=True).to(device)
    return Program(process.model, process.guide, TraceMeanField_ELBO(), ())


# Networks


def network(device: torch.device, *widths: int) -> nn.Sequential:
    layers = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).to(device)


def joined(*parts: Tensor) -> Tensor:
    """Inputs of a network, side by side; batches of any shapes that go together."""
    batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*batch, part.shape[-1]) for part in parts], -1)


def split_normal(outputs: Tensor) -> Any:
    """A diagonal normal distribution of halves of a network's outputs."""
    loc, scale = outputs.chunk(2, -1)
    return dist.Normal(loc, softplus(scale)).to_event(1)


def autoencoder(device: torch.device) -> Program:
    encoder, decoder = network(device, 64, 32, 8), network(device, 4, 32, 64)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard_normal(x.device, len(x), 4))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", split_normal(encoder(x)))

    return Program(model, guide, Trace_ELBO(), (torch.bernoulli(torch.full((64, 64), 0.3, device=device)),))


def semi_supervised(device: torch.device) -> Program:
    """An autoencoder of ten classes, none of them known, which the guide enumerates in parallel."""
    classify, encoder, decoder = network(device, 64, 32, 10), network(device, 74, 32, 8), network(device, 14, 32, 64)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=x.new_zeros(10)))
            z = pyro.sample("z", standard_normal(x.device, len(x), 4))
            logits = decoder(joined(one_hot(y, 10).to(x), z))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("classify", classify)
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=classify(x)))
            pyro.sample("z", split_normal(encoder(joined(x, one_hot(y, 10).to(x)))))

    loss = TraceEnum_ELBO(max_plate_nesting=1)
    data = torch.bernoulli(torch.full((32, 64), 0.3, device=device))
    return Program(model, config_enumerate(guide, "parallel"), loss, (data,))


# Discrete latent variables


def mixture(device: torch.device) -> Program:
    """Three normal components, the components of the data summed out, the rest by its mode."""

    @config_enumerate
    def model(x: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(x.new_ones(3)))
        scale = pyro.sample("scale", dist.LogNormal(x.new_zeros(()), 1.0))
        with pyro.plate("components", 3):
            locs = pyro.sample("locs", dist.Normal(x.new_zeros(()), 10.0))
        with pyro.plate("data", len(x)):
            component = pyro.sample("component", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(locs[component], scale), obs=x)

    guide = AutoDelta(pyro.poutine.block(model, hide=["component"]))
    x = torch.randn(100, device=device) + 5.0 * torch.arange(100, device=device).remainder(3)
    return Program(model, guide, TraceEnum_ELBO(max_plate_nesting=1), (x,))


def hidden_markov(device: torch.device) -> Program:
    """Five states, summed out, of 20 sequences of 10 observations."""

    @config_enumerate
    def model(x: Tensor) -> None:
        with pyro.plate("states", 5):
            transition = pyro.sample("transition", dist.Dirichlet(x.new_ones(5)))
            locs = pyro.sample("locs", dist.Normal(x.new_zeros(()), 5.0))
        with pyro.plate("sequences", len(x)):
            state: Any = 0
            for t in pyro.markov(range(x.shape[1])):
                state = pyro.sample(f"state_{t}", dist.Categorical(transition[state]))
                pyro.sample(f"x_{t}", dist.Normal(locs[state], 1.0), obs=x[:, t])

    guide = AutoDelta(pyro.poutine.block(model, expose=["transition", "locs"]))
    return Program(model, guide, TraceEnum_ELBO(max_plate_nesting=1), (3 * torch.randn(20, 10, device=device),))


def deep_markov(device: torch.device) -> Program:
    """Ten steps of a latent state of 4 dimensions, 20 sequences; the guide reads them backwards by a GRU."""
    transition, emission, combine = network(device, 4, 16, 8), network(device, 4, 16, 12), network(device, 20, 8)
    reader = nn.GRU(12, 16, batch_first=True).to(device)

    def model(x: Tensor) -> None:
        pyro.module("transition", transition)
        pyro.module("emission", emission)
        with pyro.plate("sequences", len(x)):
            z = x.new_zeros(len(x), 4)
            for t in range(x.shape[1]):
                z = pyro.sample(f"z_{t}", split_normal(transition(z)))
                pyro.sample(f"x_{t}", dist.Bernoulli(logits=emission(z)).to_event(1), obs=x[:, t])

    def guide(x: Tensor) -> None:
        pyro.module("combine", combine)
        pyro.module("reader", reader)
        backwards, _ = reader(x.flip(1))
        with pyro.plate("sequences", len(x)):
            z = x.new_zeros(len(x), 4)
            for t in range(x.shape[1]):
                z = pyro.sample(f"z_{t}", split_normal(combine(joined(z, backwards[:, -1 - t]))))

    x = torch.bernoulli(torch.full((20, 10, 12), 0.3, device=device))
    return Program(model, guide, Trace_ELBO(), (x,))


def binary_code(device: torch.device) -> Program:
    """A code of 8 bits, whose gradient is by the score function with a running mean as baseline."""
    encoder, decoder = network(device, 64, 32, 8), network(device, 8, 32, 64)
    baseline: Any = {"baseline": {"use_decaying_avg_baseline": True}}

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            code = pyro.sample("code", dist.Bernoulli(x.new_full((len(x), 8), 0.5)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(code)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("code", dist.Bernoulli(logits=encoder(x)).to_event(1), infer=baseline)

    data = torch.bernoulli(torch.full((32, 64), 0.3, device=device))
    return Program(model, guide, TraceGraph_ELBO(), (data,))


def poisson_factors(device: torch.device) -> Program:
    """Counts of 20 words in 30 documents by 4 latent counts each, whose gradient is by the score function."""

    def model(x: Tensor) -> None:
        with pyro.plate("factors", 4):
            loadings = pyro.sample("loadings", dist.Gamma(x.new_ones(20), 1.0).to_event(1))
        with pyro.plate("documents", len(x)):
            count = pyro.sample("count", dist.Poisson(x.new_full((len(x), 4), 2.0)).to_event(1))
            pyro.sample("x", dist.Poisson(count @ loadings + 0.1).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        positive = constraints.positive
        rate = pyro.param("rate", lambda: x.new_full((len(x), 4), 2.0), constraint=positive)
        concentration = pyro.param("concentration", lambda: x.new_ones(4, 20), constraint=positive)
        with pyro.plate("factors", 4):
            pyro.sample("loadings", dist.Gamma(concentration, 1.0).to_event(1))
        with pyro.plate("documents", len(x)):
            pyro.sample("count", dist.Poisson(rate).to_event(1))

    return Program(model, guide, Trace_ELBO(), (torch.poisson(torch.full((30, 20), 3.0, device=device)),))


PROGRAMS: dict[str, Callable[[torch.device], Program]] = {
    "regression, AutoNormal": regression,
    "regression, AutoMultivariateNormal": regression_full_covariance,
    "regression, flow as guide": regression_flow,
    "eight schools": eight_schools,
    "sparse Gaussian process": gaussian_process,
    "VAE": autoencoder,
    "semi-supervised VAE, enumerated": semi_supervised,
    "Gaussian mixture, enumerated": mixture,
    "hidden Markov model, enumerated": hidden_markov,
    "deep Markov model": deep_markov,
    "binary code, TraceGraph, baseline": binary_code,
    "Poisson factors, score function": poisson_factors,
}
