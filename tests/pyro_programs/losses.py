"""Gradients by the score function, and losses other than the usual ones."""

from functools import partial

import pyro
import pyro.contrib.gp.kernels as kernels
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import (
    EnergyDistance,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    Trace_MMD,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
    TraceTMC_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.distributions import constraints

from pyro_programs import Program, linear_data, same
from pyro_programs.regression import linear


def counts_model(x):
    on = pyro.sample("on", dist.Bernoulli(0.4))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x)):
        n = pyro.sample("n", dist.Poisson(rate + 1))
        pyro.sample("x", dist.Normal(n * (on + 1), 1.0), obs=x)


def counts_guide(x, **baseline):
    on = pyro.param("p_on", torch.tensor(0.5), constraint=constraints.unit_interval)
    pyro.sample("on", dist.Bernoulli(on), infer={"baseline": baseline.get("on", {})})
    concentration = pyro.param("concentration", torch.tensor(2.0), constraint=constraints.positive)
    pyro.sample("rate", dist.Gamma(concentration, 1.0))
    with pyro.plate("data", len(x)):
        rates = pyro.param("rates", torch.ones(len(x)), constraint=constraints.positive)
        pyro.sample("n", dist.Poisson(rates), infer={"baseline": baseline.get("n", {})})


def score_function():
    """Sites without reparametrization in the plain bound."""
    return Program(counts_model, counts_guide, Trace_ELBO, same(torch.randn(4) + 3))


def score_function_by_graph():
    """The same with what the sites cost downstream only."""
    return Program(counts_model, counts_guide, TraceGraph_ELBO, same(torch.randn(4) + 3))


def decaying_average_baseline():
    """Baselines that are averages of past costs: entries of the store that are replaced at each step."""
    options = {"use_decaying_avg_baseline": True, "baseline_beta": 0.9}
    guide = partial(counts_guide, on=options, n=options)
    return Program(counts_model, guide, TraceGraph_ELBO, same(torch.randn(4) + 3), predict=False)


def neural_baseline():
    """A baseline by a network, trained beside the guide at a rate of its own."""

    class Baseline(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))

        def forward(self, x):
            return self.net(x).squeeze(-1)

    baseline = Baseline()

    def guide(x):
        pyro.module("baseline", baseline)
        counts_guide(x, on={"nn_baseline": baseline, "nn_baseline_input": x})

    def settings(name):
        return {"lr": 0.05 if name.startswith("baseline") else 0.01}

    return Program(counts_model, guide, TraceGraph_ELBO, same(torch.randn(4) + 3), partial(pyro.optim.Adam, settings))


def value_baseline():
    """A baseline that is a parameter, given as a value."""

    def guide(x):
        counts_guide(x, n={"baseline_value": pyro.param("baseline", torch.zeros(len(x)))})

    return Program(counts_model, guide, TraceGraph_ELBO, same(torch.randn(4) + 3), predict=False)


def attend_and_count():
    """Whether there is another object is drawn, and masks all that follows; a recurrent guide with baselines."""
    decode, cell, baseline = nn.Linear(1, 4), nn.RNNCell(4, 3), nn.RNNCell(4, 3)
    pres, what, value = nn.Linear(3, 1), nn.Linear(3, 2), nn.Linear(3, 1)

    def model(data):
        pyro.module("decode", decode)
        with pyro.plate("data", len(data)):
            on, image = data.new_ones(len(data), 1), data.new_zeros(data.shape)
            for t in range(2):
                on = pyro.sample(f"on_{t}", dist.Bernoulli(0.6 * on).to_event(1))
                z = pyro.sample(f"what_{t}", dist.Normal(data.new_zeros(len(data), 1), 1.0).mask(on).to_event(1))
                image = image + on * decode(z)
            pyro.sample("obs", dist.Normal(image, 0.5).to_event(1), obs=data)

    def guide(data):
        for name, module in (("cell", cell), ("pres", pres), ("what", what), ("bl", baseline), ("value", value)):
            pyro.module(name, module)
        with pyro.plate("data", len(data)):
            on, h, hb = data.new_ones(len(data), 1), None, None
            for t in range(2):
                h, hb = cell(data, h), baseline(data, hb)
                infer = {"baseline": {"baseline_value": (value(hb) * on.detach()).squeeze(-1)}}
                on = pyro.sample(f"on_{t}", dist.Bernoulli(pres(h).sigmoid() * on).to_event(1), infer=infer)
                loc, scale = what(h).chunk(2, -1)
                pyro.sample(f"what_{t}", dist.Normal(loc, scale.exp()).mask(on).to_event(1))

    return Program(model, guide, TraceGraph_ELBO, same(torch.randn(3, 4)), predict=False)


def renyi():
    loss = partial(RenyiELBO, alpha=0.5, num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    return Program(linear, AutoNormal(linear), loss, same(*linear_data()))


def importance_weighted():
    """Renyi's bound at 0, with particles one after another."""
    return Program(linear, AutoNormal(linear), partial(RenyiELBO, num_particles=3), same(*linear_data()))


def vectorized_particles():
    """The nesting of plates is guessed by the loss."""
    loss = partial(Trace_ELBO, num_particles=10, vectorize_particles=True)
    return Program(linear, AutoNormal(linear), loss, same(*linear_data()))


def masked_mean_field():
    """A site that is masked in model and guide altogether, and one in part."""
    seen = torch.tensor([True, False, True])

    def model(y):
        pyro.sample("unseen", dist.Normal(0.0, 1.0).mask(False))
        m = pyro.sample("m", dist.Normal(torch.zeros(3), 1.0).mask(seen).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(m[0] + m[2], 1.0), obs=y)

    def guide(y):
        pyro.sample("unseen", dist.Normal(0.0, 1.0).mask(False))
        pyro.sample("m", dist.Normal(pyro.param("loc", torch.zeros(3)), 0.5).mask(seen).to_event(1))

    return Program(model, guide, TraceMeanField_ELBO, same(torch.randn(5)))


def wake_and_sleep():
    """Discrete latent sites and a guide trained by wake and sleep, in equal parts; a loss that is a pair."""
    encode, decode = nn.Linear(4, 3), nn.Linear(3, 4)

    def model(x, observations=None):
        pyro.module("decode", decode)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.5)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=(observations or {}).get("x"))

    def guide(x, observations=None):
        pyro.module("encode", encode)
        given = (observations or {}).get("x", x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=encode(given)).to_event(1))

    x = torch.bernoulli(torch.full((3, 4), 0.5))
    loss = partial(
        ReweightedWakeSleep,
        num_particles=4,
        insomnia=0.5,
        model_has_params=True,
        vectorize_particles=True,
        num_sleep_particles=2,
        max_plate_nesting=1,
    )
    return Program(model, guide, loss, same(x, observations={"x": x}), predict=False)


def tail_adaptive():
    loss = partial(TraceTailAdaptive_ELBO, num_particles=6, vectorize_particles=True, max_plate_nesting=1)
    return Program(linear, AutoNormal(linear), loss, same(*linear_data()))


def tensor_monte_carlo():
    """All combinations of the sites' particles."""

    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    @partial(config_enumerate, default="parallel", expand=False, num_samples=3, tmc="diagonal")
    def guide(x):
        for name in ("a", "b"):
            loc = pyro.param(f"loc_{name}", torch.tensor(0.1))
            pyro.sample(name, dist.Normal(loc, pyro.param(f"scale_{name}", torch.tensor(1.0), constraints.positive)))

    return Program(model, guide, partial(TraceTMC_ELBO, max_plate_nesting=1), same(torch.randn(4)), predict=False)


def moments():
    """Maximum mean discrepancy between what the guide gives and the prior."""

    def make():
        kernel = kernels.RBF(input_dim=2, lengthscale=torch.tensor(1.0))
        return Trace_MMD(kernel=kernel, mmd_scale=2.0, num_particles=5, max_plate_nesting=1)

    def model(x):
        pyro.module("decode", decode)
        with pyro.plate("data", 1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decode(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", 1):
            loc = pyro.param("loc", torch.zeros(2))
            pyro.sample("z", dist.Normal(loc, pyro.param("scale", torch.ones(2), constraints.positive)).to_event(1))

    decode = nn.Linear(2, 3)
    return Program(model, guide, make, same(torch.randn(1, 3)), predict=False)


def energy_distance():
    """A likelihood without density, and a loss that is no bound."""

    def model(y=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        with pyro.plate("data", 6):
            pyro.sample("y", dist.Stable(1.5, 0.1, scale, loc), obs=y)

    guide = AutoNormal(model)
    return Program(model, guide, partial(EnergyDistance, num_particles=3), same(torch.randn(6)))


def loss_of_its_own():
    """A subclass of the bound that adds a term to its gradients, as a causal effect autoencoder does."""

    class Auxiliary(Trace_ELBO):
        def _differentiable_loss_particle(self, model_trace, guide_trace):
            loss, surrogate = super()._differentiable_loss_particle(model_trace, guide_trace)
            added = sum(-site["log_prob"].sum() for name, site in guide_trace.nodes.items() if name.startswith("aux_"))
            return loss + float(added), surrogate + added

        def loss_and_grads(self, model, guide, x, y):
            return super().loss_and_grads(model, guide, x, y) / len(x)

    def guide(x, y):
        shift = pyro.param("shift", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("aux_y", dist.Normal(x.sum(-1) * shift, 1.0), obs=y, infer={"is_auxiliary": True})
        made(x, y)

    made = AutoNormal(linear)
    return Program(linear, guide, Auxiliary, same(*linear_data()), predict=False)


def loss_by_hand():
    """A loss that is a function, after the tutorial's simple bound, with a regularizer."""

    def bound(model, guide, *args, **kwargs):
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        loss = guide_trace.log_prob_sum() - model_trace.log_prob_sum()
        return loss + 0.1 * sum(p.square().sum() for p in guide.parameters())

    return Program(linear, AutoNormal(linear), lambda: bound, same(*linear_data()))


def differentiable_loss():
    """A bound's own method is the loss."""
    return Program(linear, AutoNormal(linear), lambda: TraceMeanField_ELBO().differentiable_loss, same(*linear_data()))


def by_jit():
    """The bound that Pyro compiles by ``torch.jit``."""
    loss = partial(JitTrace_ELBO, ignore_jit_warnings=True)
    return Program(linear, AutoNormal(linear), loss, same(*linear_data()), plain=Trace_ELBO)


def enumerated_by_jit():
    @config_enumerate
    def model(x):
        p = pyro.param("p", torch.tensor([0.3, 0.7]), constraint=constraints.simplex)
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(p))
            pyro.sample("x", dist.Normal(loc + 2 * k, 1.0), obs=x)

    guide = AutoNormal(poutine.block(model, expose=["loc"]))
    loss = partial(JitTraceEnum_ELBO, max_plate_nesting=1, ignore_jit_warnings=True)
    plain = partial(TraceEnum_ELBO, max_plate_nesting=1)
    return Program(model, guide, loss, same(torch.randn(5)), plain=plain)


PROGRAMS = (
    score_function,
    score_function_by_graph,
    decaying_average_baseline,
    neural_baseline,
    value_baseline,
    attend_and_count,
    renyi,
    importance_weighted,
    vectorized_particles,
    masked_mean_field,
    wake_and_sleep,
    tail_adaptive,
    tensor_monte_carlo,
    moments,
    energy_distance,
    loss_of_its_own,
    loss_by_hand,
    differentiable_loss,
    by_jit,
    enumerated_by_jit,
)
