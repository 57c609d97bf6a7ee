"""Regressions, with automatic guides and guides by hand."""

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.distributions.transforms import block_autoregressive, iterated
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO, autoguide
from pyro.infer.autoguide.initialization import init_to_mean, init_to_sample
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam, PyroSample, pyro_method
from torch import nn
from torch.distributions import constraints

from pyro_programs import Program, linear_data, same


def linear(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal((x * w).sum(-1), scale), obs=y)


def logistic(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 2.0).to_event(1))
    bias = pyro.sample("bias", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w + bias), obs=y)


def conjugate_normal():
    """The mean of normal data, whose posterior is known; the guide's parameters are made at the first step."""

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.5))
        scale = pyro.param("scale", torch.tensor(1.5), constraint=constraints.positive)
        pyro.sample("mean", dist.Normal(loc, scale))

    return Program(model, guide, Trace_ELBO, same(torch.randn(9) + 2))


def beta_bernoulli():
    """A fair coin or not: a beta guide with positive parameters, and a loop over the tosses."""

    def model(tosses):
        fairness = pyro.sample("fairness", dist.Beta(10.0, 10.0))
        for i, toss in enumerate(tosses):
            pyro.sample(f"toss_{i}", dist.Bernoulli(fairness), obs=toss)

    def guide(tosses):
        a = pyro.param("a", torch.tensor(15.0), constraint=constraints.positive)
        b = pyro.param("b", torch.tensor(15.0), constraint=constraints.positive)
        pyro.sample("fairness", dist.Beta(a, b))

    return Program(model, guide, Trace_ELBO, same([torch.tensor(1.0)] * 4 + [torch.tensor(0.0)] * 2))


def bayesian_linear_layer():
    """A PyroModule whose weights are random, with observations among its methods, and AutoDiagonalNormal."""

    class Regression(PyroModule):
        def __init__(self, num_columns):
            super().__init__()
            self.linear = PyroModule[nn.Linear](num_columns, 1)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, num_columns]).to_event(2))
            self.linear.bias = PyroSample(dist.Normal(0.0, 10.0).expand([1]).to_event(1))

        def forward(self, x, y=None):
            sigma = pyro.sample("sigma", dist.Uniform(0.0, 5.0))
            mean = pyro.deterministic("mean", self.linear(x).squeeze(-1))
            with pyro.plate("data", len(x)):
                pyro.sample("obs", dist.Normal(mean, sigma), obs=y)
            return mean

    model = Regression(3)
    return Program(model, autoguide.AutoDiagonalNormal(model), Trace_ELBO, same(*linear_data()))


def module_of_params():
    """PyroModules in one another, with constrained PyroParams, a lazy one, and a ``pyro_method``."""

    class Noise(PyroModule):
        def __init__(self):
            super().__init__()
            self.scale = PyroParam(torch.tensor(0.7), constraint=constraints.positive)

    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.noise = Noise()
            self.hidden = PyroModule[nn.Linear](3, 4)

        @PyroParam(constraint=constraints.interval(0.0, 3.0))
        def slope(self):
            return torch.full((4,), 0.5)

        @pyro_method
        def mean(self, x):
            return (self.hidden(x).tanh() * self.slope).sum(-1)

        def forward(self, x, y):
            offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(self.mean(x) + offset, self.noise.scale), obs=y)

    model = Model()
    return Program(model, autoguide.AutoNormal(model), TraceMeanField_ELBO, same(*linear_data()))


def auto_normal():
    return Program(linear, autoguide.AutoNormal(linear, init_scale=0.2), Trace_ELBO, same(*linear_data()))


def auto_multivariate_normal():
    x, y = linear_data()
    guide = autoguide.AutoMultivariateNormal(logistic, init_loc_fn=init_to_mean)
    return Program(logistic, guide, partial(Trace_ELBO, num_particles=2), same(x, (y > 0).double()))


def auto_low_rank():
    """Errors of Student's t, and a low-rank guide whose rank is the square root of the dimension."""

    def model(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        df = pyro.sample("df", dist.Gamma(2.0, 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.StudentT(df + 1, x @ w, 0.5), obs=y)

    guide = autoguide.AutoLowRankMultivariateNormal(model, init_loc_fn=init_to_sample)
    return Program(model, guide, Trace_ELBO, same(*linear_data()))


def auto_delta():
    return Program(linear, autoguide.AutoDelta(linear), Trace_ELBO, same(*linear_data()))


def auto_laplace():
    return Program(linear, autoguide.AutoLaplaceApproximation(linear), Trace_ELBO, same(*linear_data()))


def auto_iaf():
    guide = autoguide.AutoIAFNormal(linear, hidden_dim=[5], num_transforms=1)
    return Program(linear, guide, Trace_ELBO, same(*linear_data(8, 2)))


def auto_normalizing_flow():
    """Two block autoregressive transforms make the guide."""
    flows = partial(iterated, 2, partial(block_autoregressive, hidden_factors=[3]))
    guide = autoguide.AutoNormalizingFlow(linear, flows)
    return Program(linear, guide, Trace_ELBO, same(*linear_data(8, 2)))


def auto_structured():
    guide = autoguide.AutoStructured(
        linear, conditionals={"w": "mvn", "scale": "normal"}, dependencies={"scale": {"w": "linear"}}
    )
    return Program(linear, guide, Trace_ELBO, same(*linear_data()))


def auto_gaussian():
    return Program(linear, autoguide.AutoGaussian(linear), Trace_ELBO, same(*linear_data()))


def auto_guide_list():
    """One part of the model has a normal guide, another a point."""
    guide = autoguide.AutoGuideList(linear)
    guide.append(autoguide.AutoNormal(poutine.block(linear, expose=["w"])))
    guide.append(autoguide.AutoDelta(poutine.block(linear, expose=["scale"])))
    return Program(linear, guide, Trace_ELBO, same(*linear_data()))


def easy_guide():
    """Global sites joined into one multivariate normal, local sites with one parameter each, in mini-batches."""

    def model(batch, size):
        center = pyro.sample("center", dist.Normal(0.0, 1.0))
        spread = pyro.sample("spread", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", size, subsample=batch.new_tensor(range(len(batch))).long()):
            local = pyro.sample("local", dist.Normal(center, spread))
            pyro.sample("x", dist.Normal(local, 1.0), obs=batch)

    class Guide(EasyGuide):
        def guide(self, batch, size):
            group = self.group(match="center|spread")
            loc = pyro.param("loc", torch.zeros(group.event_shape))
            scale = pyro.param("scale", torch.eye(group.event_shape[0]), constraint=constraints.lower_cholesky)
            group.sample("globals", dist.MultivariateNormal(loc, scale_tril=scale))
            with self.plate("data", size, subsample=batch.new_tensor(range(len(batch))).long()):
                group = self.group(match="local")
                loc = pyro.param("local_loc", torch.zeros((size, *group.event_shape)), event_dim=1)
                scale = pyro.param("local_scale", torch.ones((size, *group.event_shape)), constraints.positive, 1)
                group.sample("locals", dist.Normal(loc, scale).to_event(1))

    return Program(model, Guide(model), Trace_ELBO, same(torch.randn(6) + 1, 12))


def eight_schools():
    """A hierarchy made easy by a reparametrization of the model, and a guide by hand."""
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])

    @poutine.reparam(config={"theta": LocScaleReparam(0.0)})
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        tau = pyro.sample("tau", dist.HalfCauchy(25.0))
        with pyro.plate("schools", 8):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    def guide(y):
        loc = pyro.param("loc", torch.zeros(10))
        scale = pyro.param("scale", 0.3 * torch.ones(10), constraint=constraints.positive)
        pyro.sample("mu", dist.Normal(loc[0], scale[0]))
        tau = dist.TransformedDistribution(dist.Normal(loc[1], scale[1]), dist.transforms.ExpTransform())
        pyro.sample("tau", tau)
        with pyro.plate("schools", 8):
            pyro.sample("theta_decentered", dist.Normal(loc[2:], scale[2:]))

    return Program(model, guide, Trace_ELBO, same(y))


def learned_centering():
    """A centering that is a parameter of the model, for a model with sites in a nested index."""

    def centred(county, x, y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("counties", 4):
            level = pyro.sample("level", dist.Normal(mean, spread))
        with pyro.plate("homes", len(x)):
            pyro.sample("y", dist.Normal(level[county] + slope * x, 0.5), obs=y)

    model = poutine.reparam(centred, config={"level": LocScaleReparam(shape_params=())})
    x, y = linear_data(12, 1)
    county = torch.arange(12) % 4
    return Program(model, autoguide.AutoNormal(model), TraceMeanField_ELBO, same(county, x[:, 0], y))


def correlations():
    """A covariance by LKJ and scales."""

    def model(y=None):
        theta = pyro.sample("theta", dist.HalfCauchy(torch.ones(3)).to_event(1))
        cholesky = pyro.sample("cholesky", dist.LKJCholesky(3, 2.0))
        with pyro.plate("data", 10):
            scaled = theta.sqrt().diag_embed() @ cholesky
            pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=scaled), obs=y)

    return Program(model, autoguide.AutoNormal(model), Trace_ELBO, same(torch.randn(10, 3)))


def bayesian_network_float32():
    """A network with random weights in the usual type, found by lifting the modules' parameters to random ones."""
    network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))

    def draw(value):
        return dist.Normal(torch.zeros_like(value), 1.0).to_event(value.dim())

    priors = {name: draw(value) for name, value in network.named_parameters()}

    def deterministic(x, y):
        mean = pyro.module("net", network)(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    model = poutine.lift(deterministic, prior=priors)
    return Program(model, autoguide.AutoNormal(model), Trace_ELBO, same(*linear_data()))


PROGRAMS = (
    conjugate_normal,
    beta_bernoulli,
    bayesian_linear_layer,
    module_of_params,
    auto_normal,
    auto_multivariate_normal,
    auto_low_rank,
    auto_delta,
    auto_laplace,
    auto_iaf,
    auto_normalizing_flow,
    auto_structured,
    auto_gaussian,
    auto_guide_list,
    easy_guide,
    eight_schools,
    learned_centering,
    correlations,
    bayesian_network_float32,
)
