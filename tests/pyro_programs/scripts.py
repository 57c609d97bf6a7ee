"""What scripts do around a model: plates, handlers, arguments, parameters, optimizers."""

from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import nn
from torch.distributions import constraints

from pyro_programs import Program, call, linear_data, same
from pyro_programs.regression import linear


def mean_guide(*args, **kwargs):
    """A normal guide of the site ``mean``."""
    loc = pyro.param("loc", torch.tensor(0.5))
    scale = pyro.param("scale", torch.tensor(0.7), constraint=constraints.positive)
    return pyro.sample("mean", dist.Normal(loc, scale))


def subsampled():
    """A plate that draws its own subsample at each step, shared by model and guide."""

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=3) as ind:
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[ind])

    def guide(x):
        mean_guide()
        locs = pyro.param("locs", torch.zeros(len(x)))
        with pyro.plate("data", len(x), subsample_size=3) as ind:
            pyro.sample("z", dist.Normal(locs[ind], 0.5))

    return Program(model, guide, Trace_ELBO, same(torch.randn(8)), predict=False)


def subsampled_by_the_plate():
    """``pyro.subsample`` and an automatic guide with ``create_plates``."""

    def create_plates(x, y):
        return pyro.plate("data", len(x), subsample_size=4)

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with create_plates(x, y):
            batch_x = pyro.subsample(x, event_dim=1)
            batch_y = pyro.subsample(y, event_dim=0)
            z = pyro.sample("z", dist.Normal(0.0, 0.3))
            pyro.sample("y", dist.Normal(batch_x @ w + z, 0.5), obs=batch_y)

    guide = AutoNormal(model, create_plates=create_plates)
    return Program(model, guide, TraceMeanField_ELBO, same(*linear_data()), predict=False)


def sequential_plates():
    """Plates as loops, one of them with a subsample."""

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        for i in pyro.plate("few", 3):
            pyro.sample(f"x_{i}", dist.Normal(mean, 1.0), obs=x[i])
        for i in pyro.plate("some", 5, subsample=torch.tensor([4, 0])):
            pyro.sample(f"y_{i}", dist.Normal(mean, 2.0), obs=x[i])

    return Program(model, mean_guide, Trace_ELBO, same(torch.randn(5)))


def nested_plates():
    """Plates in one another with dimensions given or not, and events of each kind."""

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        columns = pyro.plate("columns", 3, dim=-1)
        rows = pyro.plate("rows", 4, dim=-2)
        with columns:
            a = pyro.sample("a", dist.Normal(mean, 1.0))
        with rows:
            b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with rows, columns:
            pyro.sample("x", dist.Normal(a + b.sum(-1), 1.0), obs=x)

    return Program(model, AutoNormal(model), Trace_ELBO, same(torch.randn(4, 3)))


def factors():
    """Terms without a distribution, and values that are only named."""

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        pyro.deterministic("double", 2 * mean)
        pyro.factor("near_one", -(mean - 1.0).square())
        with pyro.plate("data", len(x)):
            pyro.factor("data_term", -(x - mean).abs())

    return Program(model, mean_guide, Trace_ELBO, same(torch.randn(5)))


def factor_in_the_guide():
    """A guide whose draw is transformed by hand, with its volume as a factor."""

    def model(x):
        rate = pyro.sample("rate", dist.Exponential(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Exponential(rate), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.1))
        log_rate = pyro.sample("log_rate", dist.Normal(loc, 0.3), infer={"is_auxiliary": True})
        pyro.sample("rate", dist.Delta(log_rate.exp(), log_density=-log_rate))

    return Program(model, guide, Trace_ELBO, same(torch.rand(5)))


def handlers():
    """Handlers inside of the programs: masks, scales, blocks, conditions, and a seed for what is not random."""

    def inner(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)), poutine.mask(mask=x > -1), poutine.scale(scale=0.5):
            pyro.sample("x", dist.Normal(mean, noise), obs=x)

    def model(x):
        with poutine.block(hide=["jitter"]):
            pyro.sample("jitter", dist.Normal(0.0, 1.0))
        poutine.condition(inner, data={"noise": torch.tensor(0.8)})(x)

    def guide(x):
        with poutine.scale(scale=2.0):
            mean_guide()

    return Program(model, guide, Trace_ELBO, same(torch.randn(6)))


def handlers_around():
    """Handlers around whole programs: condition, scale, mask, block, infer_config, uncondition."""

    def joint(n):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.sample("other", dist.Normal(mean, 1.0))
        with pyro.plate("data", n):
            pyro.sample("x", dist.Normal(mean, 1.0))

    model = pyro.condition(joint, data={"x": torch.randn(6), "other": torch.tensor(0.3)})
    model = poutine.scale(poutine.infer_config(model, lambda site: {}), scale=0.1)
    return Program(model, poutine.scale(mean_guide, scale=0.1), Trace_ELBO, same(6))


def lifted():
    """A parameter of the model that a prior makes random."""

    def plain(x):
        mean = pyro.param("mean", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    model = poutine.lift(plain, prior={"mean": dist.Normal(0.0, 1.0)})
    return Program(model, mean_guide, Trace_ELBO, same(torch.randn(5)))


def arguments():
    """Data in dictionaries, lists and tuples, with strings, flags, None and numbers among them."""

    def model(batch, pair, *, link, robust=False, weights=None):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        x = batch["x"] * (1.0 if weights is None else weights) + pair[0] - pair[1][0]
        loc = {"identity": mean, "exp": mean.exp()}[link]
        family = dist.Laplace if robust else dist.Normal
        with pyro.plate("data", len(x)):
            pyro.sample("x", family(loc * batch["scale"], 1.0), obs=x)

    batch = {"x": torch.randn(4), "scale": 2}
    pair = (torch.randn(4), [torch.randn(4), None])
    calls = [
        call(batch, pair, link="identity"),
        call(batch, pair, link="exp", robust=True),
        call(dict(batch, x=torch.randn(4)), pair, link="identity"),
        call(batch, pair, link="identity", weights=torch.rand(4)),
    ]
    return Program(model, mean_guide, Trace_ELBO, calls)


def numpy_data():
    """Arrays as arguments, of which the program makes tensors, other ones at each step."""

    def model(x, rows):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        data = torch.as_tensor(x)[rows]
        with pyro.plate("data", len(data)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=data)

    x = np.random.default_rng(0).standard_normal((2, 6))
    calls = [call(x[0], slice(0, 4)), call(x[1], slice(1, 5))]
    return Program(model, mean_guide, Trace_ELBO, calls)


def number_of_sites():
    """As many sites as an integer says, and one parameter each."""

    def model(x, depth):
        z = torch.tensor(0.0)
        for i in range(depth):
            z = pyro.sample(f"z_{i}", dist.Normal(z, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, depth):
        for i in range(depth):
            pyro.sample(f"z_{i}", dist.Normal(pyro.param(f"loc_{i}", torch.tensor(0.1 * i)), 0.5))

    x = torch.randn(5)
    return Program(model, guide, Trace_ELBO, [call(x, 1), call(x, 3)])


def born_late():
    """A parameter of the model that the third step makes."""

    def model(x, warm=False):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        noise = 1.0 if warm else pyro.param("noise", torch.tensor(0.5), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, noise), obs=x)

    x = torch.randn(5)
    return Program(model, mean_guide, Trace_ELBO, [call(x, True), call(x, True), *[call(x)] * 18])


def constrained_parameters():
    """A parameter of each constraint, as points, with values given by functions."""

    def model(x):
        probs = pyro.param("probs", lambda: torch.rand(3).softmax(-1), constraint=constraints.simplex)
        locs = pyro.param("locs", torch.randn(3))
        scales = pyro.param("scales", torch.ones(3), constraint=constraints.greater_than(0.1))
        cholesky = pyro.param("cholesky", torch.eye(2), constraint=constraints.corr_cholesky)
        share = pyro.param("share", torch.tensor(0.2), constraint=constraints.unit_interval)
        mixed = dist.MixtureSameFamily(dist.Categorical(probs), dist.Normal(locs, scales))
        with pyro.plate("data", len(x)):
            pyro.sample("x", mixed, obs=x[:, 0])
            pyro.sample("y", dist.MultivariateNormal(share * torch.ones(2), scale_tril=cholesky), obs=x)

    return Program(model, lambda x: None, Trace_ELBO, same(torch.randn(6, 2)))


def points():
    """Maximum a posteriori by deltas of the guide."""

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        rate = pyro.sample("rate", dist.Gamma(2.0, 2.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, rate.rsqrt()), obs=x)

    def guide(x):
        pyro.sample("mean", dist.Delta(pyro.param("at", torch.tensor(0.2))))
        pyro.sample("rate", dist.Delta(pyro.param("rate_at", torch.tensor(1.0), constraint=constraints.positive)))

    return Program(model, guide, Trace_ELBO, same(torch.randn(5)))


def annealed_weight():
    """The weight of the prior rises to one and is a Python number."""

    def model(x, weight):
        with poutine.scale(scale=weight):
            mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def guide(x, weight):
        with poutine.scale(scale=weight):
            mean_guide()

    x = torch.randn(5)
    calls = [call(x, min(1.0, (i + 1) / 15)) for i in range(20)]
    return Program(model, guide, Trace_ELBO, calls, told=r"number|annealing")


def regression_with(optim, **fields):
    return Program(linear, AutoNormal(linear), Trace_ELBO, same(*linear_data()), optim, **fields)


def clipped_adam():
    settings = {"lr": 0.05, "lrd": 0.9, "clip_norm": 5.0, "betas": (0.9, 0.99)}
    return regression_with(lambda: pyro.optim.ClippedAdam(settings))


def clipped_gradients():
    """Norms and values are clipped for each parameter, by arguments that depend on its name."""

    def clip(module, name):
        return {"clip_norm": 2.0} if "scale" in name else {"clip_value": 0.5}

    return regression_with(lambda: pyro.optim.SGD({"lr": 0.01, "momentum": 0.9}, clip))


def settings_by_parameter():
    def settings(name):
        return {"lr": 0.1 if "loc" in name else 0.01}

    return regression_with(lambda: pyro.optim.Adam(settings))


def exponential_rate():
    settings = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.5}
    return regression_with(lambda: pyro.optim.ExponentialLR(dict(settings)), epoch=1)


def stepped_rate():
    """A rate that changes at each fifth epoch of two steps."""
    settings = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.01, "momentum": 0.5}, "step_size": 3, "gamma": 0.1}
    return regression_with(lambda: pyro.optim.StepLR(dict(settings), {"clip_norm": 10.0}), epoch=2)


def rms_steps():
    return regression_with(lambda: pyro.optim.RMSprop({"lr": 0.01, "centered": True}))


def cosine_transformed():
    """Adam in the frequencies of a series."""

    def model(y):
        z = pyro.sample("z", dist.Normal(torch.zeros(6), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.cumsum(-1), 0.5).to_event(1), obs=y)

    optim = partial(pyro.optim.DCTAdam, {"lr": 0.05})
    return Program(model, AutoDelta(model), Trace_ELBO, same(torch.randn(6).cumsum(0)), optim)


def dropped_out():
    """Dropout and batch normalization in training, whose running means move with each run of the program."""
    network = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.4), nn.Linear(6, 1))

    def model(x, y):
        pyro.module("network", network)
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(network(x).squeeze(-1) + mean, 0.5), obs=y)

    return Program(model, mean_guide, Trace_ELBO, same(*linear_data()), predict=False)


PROGRAMS = (
    subsampled,
    subsampled_by_the_plate,
    sequential_plates,
    nested_plates,
    factors,
    factor_in_the_guide,
    handlers,
    handlers_around,
    lifted,
    arguments,
    numpy_data,
    number_of_sites,
    born_late,
    constrained_parameters,
    points,
    annealed_weight,
    clipped_adam,
    clipped_gradients,
    settings_by_parameter,
    exponential_rate,
    stepped_rate,
    rms_steps,
    cosine_transformed,
    dropped_out,
)
