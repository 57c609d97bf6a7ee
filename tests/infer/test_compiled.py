"""CompiledSVI against Pyro's own SVI: with compiler="none" the noise is the same, and so must be every number."""

from queue import SimpleQueue

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import binary, small_vae
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from test_contract import DECODERS, ENCODERS, LIKELIHOODS, PIXELS, data_for, vae_with
from torch import nn
from torch.distributions import constraints

from pyro_vae import (
    ELBO,
    IWAE,
    MLP,
    VAE,
    Bernoulli,
    BetaELBO,
    CompiledSVI,
    Conditional,
    ContractError,
    DReG,
    MeanField,
    Prior,
    PyroSVI,
    StandardNormal,
    TwoLayerVAE,
    log_weights,
)
from pyro_vae.infer import compiling
from pyro_vae.infer.compiling import Compiled
from pyro_vae.infer.objectives import CIWAE, MIWAE, PIWAE, STL, TVO, Renyi
from pyro_vae.infer.tracing import trace_graph
from pyro_vae.parts import posteriors, priors
from pyro_vae.parts.posteriors import FullRank, LowRank
from pyro_vae.parts.priors import GaussianMixture, VampPrior

PRIORS = {
    "StandardNormal": lambda: StandardNormal(3),
    "GaussianMixture": lambda: GaussianMixture(3, components=4),
    "VampPrior": lambda: VampPrior(3, components=4),
    "FlowPrior": lambda: priors.Flow(3, hidden=[8]),
    "LaplacePrior": lambda: priors.Laplace(3),
    "StudentTPrior": lambda: priors.StudentT(3),
    "UniformPrior": lambda: priors.Uniform(3),
}
POSTERIORS = {
    "MeanField": MeanField,
    "FullRank": FullRank,
    "LowRank": lambda dim: LowRank(dim, rank=2),
    "FlowPosterior": lambda dim: posteriors.Flow(dim, hidden=[8]),
}

pytestmark = pytest.mark.inductor


def vae_of(prior="StandardNormal", posterior="MeanField"):
    torch.manual_seed(3)
    head = POSTERIORS[posterior](3)
    vae = VAE(
        PRIORS[prior](),
        likelihood=Conditional(MLP(3, 12, hidden=[8]), Bernoulli(12)),
        posterior=Conditional(MLP(12, sum(head.sizes), hidden=[8]), head),
    ).double()
    vae.initialize(binary(20))
    return vae


def two_layers():
    torch.manual_seed(3)

    def conditional(inputs, dim):
        return Conditional(MLP(inputs, 2 * dim, hidden=[8]), MeanField(dim))

    return TwoLayerVAE(
        StandardNormal(2),
        latent=conditional(2, 3),
        likelihood=Conditional(MLP(3, 12, hidden=[8]), Bernoulli(12)),
        posterior=conditional(12, 3),
        top_posterior=conditional(3, 2),
    ).double()


def trajectory(engine, make, x, loss=None, steps=4, **settings):
    """Losses of some steps, and the parameters they end at."""
    module = make()
    optim = torch.optim.Adam(module.parameters(), lr=1e-2)
    svi = engine(module.model, module.guide, optim, loss, **settings)
    torch.manual_seed(1)
    losses = [float(svi.step(x)) for _ in range(steps)]
    return [*losses, float(svi.evaluate_loss(x))], [p.detach().clone() for p in module.parameters()]


def assert_same(make, x, loss=None, compiler="none"):
    losses, parameters = trajectory(PyroSVI, make, x, loss)
    ours, same = trajectory(CompiledSVI, make, x, loss, compiler=compiler)
    assert ours == pytest.approx(losses, rel=1e-9)
    for a, b in zip(parameters, same, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-9)
    assert any((a != b).any() for a, b in zip(parameters, make().parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("prior", PRIORS)
def test_every_prior_trains_as_with_pyro(prior):
    assert_same(lambda: vae_of(prior=prior), binary(6))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("posterior", POSTERIORS)
def test_every_posterior_trains_as_with_pyro(posterior):
    assert_same(lambda: vae_of(posterior=posterior), binary(6))


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_every_likelihood_trains_as_with_pyro(likelihood):
    make, x = seeded(likelihood=LIKELIHOODS[likelihood]), data_for(LIKELIHOODS[likelihood](PIXELS), 6).double()
    assert_same(make, x)


@pytest.mark.slow
@pytest.mark.parametrize(
    "networks",
    [{"encoder": each} for each in ENCODERS.values()] + [{"decoder": each} for each in DECODERS.values()],
    ids=[*ENCODERS, *DECODERS],
)
def test_every_network_trains_as_with_pyro(networks):
    assert_same(seeded(**networks), binary(6, pixels=PIXELS))


def seeded(**parts):
    """Makes the same VAE each time."""

    def make():
        torch.manual_seed(3)
        return vae_with(**parts).double()

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [
        Trace_ELBO(),
        Trace_ELBO(num_particles=2),
        Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
        TraceMeanField_ELBO(),
        TraceMeanField_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1),
        ELBO(),
        ELBO(num_particles=5),
        ELBO(num_particles=2, kl="analytic"),
        BetaELBO(beta=2.0, free_bits=0.1),
        IWAE(5),
        Renyi(0.5, 4),
        MIWAE(2, 3),
        CIWAE(0.3, 4),
        PIWAE(2, 2),
        STL(2),
        DReG(5),
        TVO(6),
    ],
    ids=lambda loss: f"{type(loss).__name__}-{loss.num_particles}",
)
@pytest.mark.parametrize("make", [vae_of, two_layers])
@pytest.mark.filterwarnings("ignore:Failed to verify mean field")  # Pyro's, of guides in another order than the model
def test_every_loss_trains_as_with_pyro(make, loss):
    assert_same(make, binary(6), loss)


# Programs that are no VAE


class Regression:
    """Bayesian linear regression: global weights and scale, by an automatic guide."""

    def __init__(self, auto=AutoNormal):
        self.guide = auto(self.model)

    def model(self, x, y=None):
        weight = pyro.sample("weight", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(x @ weight, scale), obs=y)


class GlobalAndLocal:
    """A global mean, and one latent variable for each observation, with pyro.param for both guides."""

    def model(self, y):
        mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 10.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    def guide(self, y):
        loc = pyro.param("loc", y.new_tensor(0.3))
        scale = pyro.param("scale", y.new_tensor(0.7), constraint=constraints.positive)
        pyro.sample("mean", dist.Normal(loc, scale))
        with pyro.plate("data", len(y)):
            slope = pyro.param("slope", y.new_tensor(0.5))
            pyro.sample("z", dist.Normal(slope * y, 0.4))


class Factors:
    """A factor model: loadings are parameters, with a prior of their own."""

    def __init__(self, x):
        self.guide = AutoNormal(self.model)

    def model(self, x):
        with pyro.plate("columns", x.shape[1], dim=-1):
            loading = pyro.sample("loading", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(x), dim=-2):
            factor = pyro.sample("factor", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            with pyro.plate("columns_again", x.shape[1], dim=-1):
                pyro.sample("x", dist.Normal((factor * loading).sum(-1), 0.5), obs=x)


class Subsampled:
    """A plate that draws a subset of the data at each step."""

    def model(self, y):
        loc = pyro.sample("loc", dist.Normal(y.new_zeros(()), 3.0))
        with pyro.plate("data", len(y), subsample_size=5) as index:
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y[index])

    def guide(self, y):
        loc = pyro.param("q_loc", y.new_tensor(0.0))
        pyro.sample("loc", dist.Normal(loc, pyro.param("q_scale", y.new_tensor(1.0), constraint=constraints.positive)))


def programs():
    x = torch.randn(20, 3, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    return {
        "regression": (lambda: Regression(), (x, y)),
        "map": (lambda: Regression(AutoDelta), (x, y)),
        "global and local": (GlobalAndLocal, (y,)),
        "factors": (lambda: Factors(x), (x,)),
        "subsampled": (Subsampled, (y,)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("name", ["regression", "map", "global and local", "factors", "subsampled"])
def test_programs_that_are_no_vae_train_as_with_pyro(name, loss):
    make, args = programs()[name]
    losses, ends = [], []
    for ours in (False, True):
        with pyro.get_param_store().scope():
            program = make()
            torch.manual_seed(0)
            Trace_ELBO().loss(program.model, program.guide, *args)  # brings the parameters into being
            store = pyro.get_param_store()
            params = list({id(p): p for p in (store._params[name] for name in store)}.values())
            if isinstance(program.guide, nn.Module):
                params = list(program.guide.parameters())
            torch.manual_seed(1)
            optim = torch.optim.Adam(params, lr=1e-2)
            if ours:
                svi = CompiledSVI(program.model, program.guide, optim, loss(), compiler="none")
            else:
                svi = SVI(program.model, program.guide, pyro.optim.Adam({"lr": 1e-2}), loss())
            losses.append([float(svi.step(*args)) for _ in range(5)])
            ends.append([p.detach().clone() for p in params])
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-9)


# The compiled graph


@pytest.mark.slow
def test_compiled_steps_are_those_of_pyro():
    """Inductor rounds otherwise, but draws the noise that eager torch draws."""
    assert_same(lambda: vae_of(posterior="FullRank"), binary(6), compiler="inductor")


@pytest.mark.slow
def test_compiled_noise_is_new_at_every_step_reproducible_and_of_the_right_law():
    vae, x = vae_of(), binary(6)
    optim = torch.optim.SGD(vae.parameters(), lr=1e-12)
    svi = CompiledSVI(vae.model, vae.guide, optim, ELBO())
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append(torch.stack([svi.step(x) for _ in range(400)]))
    torch.testing.assert_close(*draws, rtol=1e-7, atol=0)
    assert draws[0].unique().numel() == 400
    eager = torch.stack([ELBO()(vae.model, vae.guide, x).detach() for _ in range(400)])
    assert abs(draws[0].mean() - eager.mean()) < 4 * (draws[0].var() / 400 + eager.var() / 400).sqrt()
    assert 0.8 < draws[0].std() / eager.std() < 1.25


@pytest.mark.slow
def test_compiled_products_are_rounded_as_the_traced_ones():
    x, losses = binary(6).float(), []
    for settings in ({"precision": "bfloat16"}, {"precision": "bfloat16", "compiler": "none"}, {"compiler": "none"}):
        vae = vae_of().float()
        svi = CompiledSVI(vae.model, vae.guide, torch.optim.Adam(vae.parameters(), lr=1e-2), **settings)
        torch.manual_seed(1)
        losses.append([float(svi.step(x)) for _ in range(4)])
    compiled, traced, exact = losses
    assert compiled == pytest.approx(traced, rel=1e-3)
    assert compiled != pytest.approx(exact, rel=1e-6)


def test_without_a_compiler_the_traced_graph_runs(monkeypatch):
    class InvalidCxxCompiler(RuntimeError):
        pass

    def broken(graph, tensors, options):
        raise InvalidCxxCompiler("no working compiler")

    x = binary(6)
    losses, _ = trajectory(PyroSVI, vae_of, x)
    monkeypatch.setattr("torch._inductor.compile", broken)
    with pytest.warns(UserWarning, match=r"runs uncompiled, and slower: it finds no C\+\+ compiler"):
        ours, _ = trajectory(CompiledSVI, vae_of, x, compiler="inductor")
    assert ours == pytest.approx(losses, rel=1e-9)


# Products in bfloat16


def test_only_products_are_rounded():
    """Two steps by hand: the network's products in bfloat16, all else in float32."""
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 4), torch.randn(5, 6)
    log_scale = nn.Parameter(torch.tensor(0.3))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(layer(x) @ layer.weight, log_scale.exp()).to_event(1), obs=x)

    def round_products(x, weight, bias):
        down = torch.Tensor.bfloat16
        hidden = torch.addmm(down(bias), down(x), down(weight).mT).float()
        return (down(hidden) @ down(weight)).float(), hidden

    optim = torch.optim.SGD([*layer.parameters(), log_scale], lr=1.0)
    svi = CompiledSVI(model, lambda x: None, optim, precision="bfloat16", compiler="none")
    weight, bias, log = (p.detach().clone() for p in (layer.weight, layer.bias, log_scale))
    loss = svi.step(x)
    by = [
        old - new.detach() for old, new in zip((weight, bias, log), (layer.weight, layer.bias, log_scale), strict=True)
    ]
    mean, hidden = round_products(x, weight, bias)
    scale = log.exp()
    assert loss.item() == pytest.approx(-dist.Normal(mean, scale).log_prob(x).sum().item(), rel=1e-6)
    by_mean = (mean - x) / scale**2
    by_hidden = (by_mean.bfloat16() @ weight.bfloat16().mT).float()
    by_weight = (hidden.bfloat16().mT @ by_mean.bfloat16()).float() + (by_hidden.bfloat16().mT @ x.bfloat16()).float()
    torch.testing.assert_close(by[0], by_weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(by[1], by_hidden.sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(by[2], (1 - ((x - mean) / scale) ** 2).sum(), rtol=1e-5, atol=1e-5)


def test_rounded_convolutions_train_as_precise_ones_do():
    """Their gradients point the same way."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 3, 3), nn.Tanh(), nn.ConvTranspose2d(3, 1, 3))
    x = binary(6, pixels=16).float()

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(logits=layers(x).flatten(1)).to_event(1), obs=x)

    gradients = []
    for precision in ("float32", "bfloat16"):
        start = [p.detach().clone() for p in layers.parameters()]
        optim = torch.optim.SGD(layers.parameters(), lr=1.0)
        CompiledSVI(model, lambda x: None, optim, precision=precision, compiler="none").step(x)
        gradients.append(
            torch.cat([(old - p.detach()).flatten() for p, old in zip(layers.parameters(), start, strict=True)])
        )
        layers.load_state_dict(dict(zip(layers.state_dict(), start, strict=True)))
    precise, rounded = gradients
    assert 1e-5 < (rounded - precise).norm() / precise.norm() < 2e-2


# Functions of tensors that run programs


@pytest.mark.slow
def test_a_compiled_function_gives_what_the_function_gives():
    vae, x = small_vae(), binary(5)
    calls = []

    def weigh(x):
        calls.append(len(x))
        return log_weights(vae.model, vae.guide, x, 7)

    compiled = Compiled(weigh, often=2)
    torch.manual_seed(0)
    expected = [log_weights(vae.model, vae.guide, x, 7) for _ in range(5)]
    torch.manual_seed(0)
    found = [compiled(x) for _ in range(5)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-9, atol=1e-9)
    assert calls == [5] * 4  # two calls as they are; one to trace, one to check
    compiled(x[:3])
    assert calls == [5, 5, 5, 5, 3]


def test_a_function_that_cannot_be_compiled_goes_on_as_it_is():
    def branches(x):
        return x + 1 if x.sum() > 0 else x - 1

    compiled, x = Compiled(branches, often=1), torch.ones(3)
    assert compiled(x).tolist() == [2, 2, 2]
    with pytest.warns(UserWarning, match="uncompiled, since the programs cannot be traced"):
        assert compiled(x).tolist() == [2, 2, 2]
    assert compiled(-x).tolist() == [-2, -2, -2]


@pytest.mark.slow
def test_a_compiled_function_that_gives_something_else_is_not_used():
    calls = []

    def counts(x):
        calls.append(0)
        return x + len(calls)

    compiled, x = Compiled(counts, often=1), torch.full((1,), 1000.0)  # beside which 1 is not much
    assert compiled(x).item() == 1001
    with pytest.warns(UserWarning, match="the compiled programs give something else"):
        compiled(x)
    assert compiled(x).item() == 1000 + len(calls)


@pytest.mark.slow
@pytest.mark.inductor
def test_inductors_cache_on_disk_is_used():
    from torch._dynamo.utils import counters

    graph, x = trace_graph(lambda x: (x * 2.25).exp(), [torch.ones(3)]), torch.ones(3)
    compiling.compile_graph(graph, [x])
    before = counters["inductor"]["fxgraph_cache_hit"]
    found = compiling.compile_graph(graph, [x])(x)
    assert counters["inductor"]["fxgraph_cache_hit"] == before + 1
    torch.testing.assert_close(found, (x * 2.25).exp())


# What changes between steps


class Weighted(ELBO):
    """A bound times a Python number."""

    weight = 1.0

    def __init__(self):
        super().__init__()
        self.weight = 1.0

    def __call__(self, model, guide, x):
        return self.weight * super().__call__(model, guide, x)


@pytest.mark.slow
def test_a_changed_number_is_noticed():
    vae, x, loss = vae_of(), binary(6), Weighted()
    svi = CompiledSVI(vae.model, vae.guide, torch.optim.SGD(vae.parameters(), lr=1e-12), loss, compiler="none")
    values = []
    for weight in (1.0, 2.0, 1.0, 0.0):
        loss.weight = weight
        torch.manual_seed(0)
        values.append(svi.step(x).item())
    assert values == pytest.approx([values[0], 2 * values[0], values[0], 0.0], rel=1e-6)

    def change():
        for weight in range(3, 30):
            loss.weight = float(weight)
            torch.manual_seed(0)
            values.append(svi.step(x).item())

    with pytest.warns(UserWarning, match=r"goes on through Pyro at step \d+: .* another kind: Weighted.weight changes"):
        change()
    assert values[4:] == pytest.approx([weight * values[0] for weight in range(3, 30)], rel=1e-6)


class Noisy(nn.Module):
    """A regression, reached by a function alone, with dropout, a running mean and a tensor as attribute."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1)).double()
        self.offset = torch.tensor(0.0, dtype=torch.float64)

    def forward(self, x):
        return self.layers(x) + self.offset


def test_what_modules_hold_is_watched_wherever_they_are():
    torch.manual_seed(0)
    net, x = Noisy(), torch.randn(20, 3, dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(net(x), 1.0).to_event(1), obs=x[:, :1])

    def losses(engine):
        torch.manual_seed(1)
        found = []
        for change in (lambda: None, net.eval, lambda: setattr(net, "offset", torch.full_like(net.offset, 2.0))):
            change()
            found += [float(engine.evaluate_loss(x)), float(engine.evaluate_loss(x))]
        net.train()
        net.offset = torch.zeros_like(net.offset)
        return found

    optim = torch.optim.SGD(net.parameters(), lr=0.01)
    start = {name: value.clone() for name, value in net.state_dict().items()}
    theirs = losses(PyroSVI(model, lambda x: None, optim))
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    net.load_state_dict(start)
    assert losses(CompiledSVI(model, lambda x: None, optim, compiler="none")) == pytest.approx(theirs, rel=1e-9)
    assert len(set(theirs)) == 4  # dropout draws anew, until it is switched off
    for name, value in net.named_buffers():  # running means have seen the data as often, though they were traced
        torch.testing.assert_close(value, buffers[name])


@pytest.mark.slow
def test_data_of_other_strides_are_another_case():
    vae = vae_of()
    svi = CompiledSVI(vae.model, vae.guide, torch.optim.SGD(vae.parameters(), lr=1e-12))
    x, losses = binary(6), []
    for each in (x, x.mT.contiguous().mT):
        torch.manual_seed(0)
        losses.append(svi.step(each).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_batches_of_several_sizes():
    vae = vae_of()
    svi = CompiledSVI(vae.model, vae.guide, torch.optim.SGD(vae.parameters(), lr=1e-12), compiler="none")
    x = binary(7)
    for part in (x, x[:3], x):
        torch.manual_seed(0)
        expected = Trace_ELBO().differentiable_loss(vae.model, vae.guide, part)
        torch.manual_seed(0)
        assert svi.step(part).item() == pytest.approx(expected.item())


def test_gradients_are_clipped_together():
    vae, x = vae_of(), binary(6)
    before = [p.detach().clone() for p in vae.parameters()]
    svi = CompiledSVI(vae.model, vae.guide, torch.optim.SGD(vae.parameters(), lr=1.0), max_norm=0.01, compiler="none")
    svi.step(x)
    moved = torch.cat([(p.detach() - old).flatten() for p, old in zip(vae.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_only_the_optimizers_tensors_are_trained():
    vae, x = vae_of(), binary(6)
    frozen = {name: p.detach().clone() for name, p in vae.likelihood.named_parameters()}
    optim = torch.optim.Adam(vae.posterior.parameters(), lr=1e-2)
    svi = CompiledSVI(vae.model, vae.guide, optim, compiler="none")
    svi.step(x)
    for name, p in vae.likelihood.named_parameters():
        assert torch.equal(p, frozen[name])
        assert p.grad is None
    optim.add_param_group({"params": list(vae.likelihood.parameters())})
    svi.step(x)
    assert all((p != frozen[name]).any() for name, p in vae.likelihood.named_parameters())


def test_pyros_store_holds_what_svi_leaves_there():
    def model(x):
        pyro.module("vae", vae)
        return vae.model(x)

    vae = vae_of()
    svi = CompiledSVI(model, vae.guide, torch.optim.Adam(vae.parameters()), compiler="none")
    with pyro.get_param_store().scope() as held:
        for _ in range(4):
            svi.step(binary(4))
        assert not set(vae.parameters()).symmetric_difference(pyro.get_param_store()._params.values())
    assert held["params"]
    assert not list(pyro.get_param_store().keys())


# What cannot be served


class Discrete(Prior):
    def forward(self, posterior=None):
        return dist.Bernoulli(torch.full((3,), 0.5, dtype=torch.float64)).to_event(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"max_norm": 0.0}, "max_norm must be positive"), ({"compiler": "gcc"}, "compiler must be")],
)
def test_bad_settings_are_refused(settings, message):
    vae = small_vae()
    with pytest.raises(ValueError, match=message):
        CompiledSVI(vae.model, vae.guide, torch.optim.Adam(vae.parameters()), **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim": list}, "must be an optimizer of pyro.optim, .*, got list"),
        ({"optim": lambda p: torch.optim.LBFGS(p)}, "that needs no closure, .*, got LBFGS"),
        ({"loss": Trace_ELBO}, r"loss must be an instance, such as Trace_ELBO\(\)"),
        ({"loss": "ELBO"}, "loss must be an instance, .*, got ELBO"),
    ],
)
def test_what_is_no_optimizer_or_loss_is_refused(change, message):
    vae = small_vae()
    make = change.get("optim", torch.optim.Adam)
    with pytest.raises(TypeError, match=message):
        CompiledSVI(vae.model, vae.guide, make(vae.parameters()), change.get("loss"))


def optimizer_of(vae):
    return torch.optim.Adam(vae.parameters())


def test_sites_without_reparametrized_draws_are_refused():
    vae = small_vae()

    def guide(x):
        with pyro.plate("data", len(x)):
            made = vae.posterior(x)
            pyro.sample("z", NonreparameterizedNormal(made.mean, torch.ones_like(made.mean)).to_event(1))

    with pytest.raises(ContractError, match=r"site 'z' .*no gradient"):
        CompiledSVI(vae.model, guide, optimizer_of(vae), ELBO(), compiler="none").step(binary(3))


class Looking:
    """Programs whose Python looks at values of tensors, be they data, parameters or neither."""

    def __init__(self, look):
        self.vae, self.look, self.switch = small_vae(), look, torch.tensor(1.0)

    def model(self, x):
        self.look(self, x)
        return self.vae.model(x)


@pytest.mark.parametrize(
    "look",
    [
        lambda program, x: x.sum() > 3 and None,
        lambda program, x: 1 if x.sum() > 3 else 0,
        lambda program, x: program.switch.item(),
        lambda program, x: x[x > 0],
        lambda program, x: x.nonzero(),
    ],
    ids=["and", "if", "item", "mask", "nonzero"],
)
def test_python_that_looks_at_values_is_compiled_while_they_are_the_same(look):
    program, x = Looking(look), binary(3)
    calls = SimpleQueue()  # a list that grows would be a state of the program

    def model(x):
        calls.put(None)
        program.model(x)

    svi = CompiledSVI(model, program.vae.guide, optimizer_of(program.vae), compiler="none")
    for _ in range(9):
        svi.step(x)
    assert calls.qsize() == 5  # two at first, and spot checks at uses 1, 2, 4


@pytest.mark.slow
def test_python_that_looks_at_what_every_step_changes_goes_on_through_pyro():
    program, x = Looking(lambda program, x: float(next(program.vae.parameters()).detach()[0, 0])), binary(3)
    svi = CompiledSVI(program.model, program.vae.guide, optimizer_of(program.vae), compiler="none")
    with pytest.warns(UserWarning, match=r"look at the values of tensors \(test_compiled.py, line \d+\)"):
        steps(svi, x, 24)
    strict = CompiledSVI(program.model, program.vae.guide, optimizer_of(program.vae), compiler="none", fallback=False)
    with pytest.raises(ContractError, match=r"look at the values of tensors \(test_compiled.py, line \d+\)"):
        steps(strict, x, 24)


def steps(svi, x, number=40):
    for _ in range(number):
        svi.step(x)


@pytest.mark.slow
def test_a_distribution_made_beforehand_may_check_its_values():
    """It has a switch of its own for the checks, which look at values."""
    prior, x, y = dist.Normal(0.0, 1.0).expand([3]).to_event(1), torch.randn(8, 3), torch.randn(8)
    assert prior.base_dist._validate_args

    def model(x, y):
        weight = pyro.sample("weight", prior)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ weight, 1.0), obs=y)

    with pyro.get_param_store().scope():
        guide = AutoDelta(model)
        guide(x, y)
        optim = torch.optim.SGD(guide.parameters(), lr=0.01)
        losses = [engine(model, guide, optim).evaluate_loss(x, y) for engine in (CompiledSVI, PyroSVI)]
    assert losses[0].item() == pytest.approx(losses[1], rel=1e-6)
    assert prior.base_dist._validate_args


def test_an_optimizer_of_other_tensors_is_refused():
    vae, other = small_vae(), small_vae()
    with pytest.raises(ValueError, match="nothing would be trained"):
        CompiledSVI(vae.model, vae.guide, optimizer_of(other), compiler="none").step(binary(3))


def test_a_parameter_that_the_optimizer_lacks_is_named():
    vae = small_vae()

    def guide(x):
        vae.guide(x)
        pyro.factor("factor", pyro.param("late", torch.zeros(())), has_rsample=True)

    for engine in (PyroSVI, CompiledSVI):
        with (
            pyro.get_param_store().scope(),
            pytest.raises(ValueError, match=r"pyro\.param 'late' is not held by the opt"),
        ):
            engine(vae.model, guide, optimizer_of(vae)).step(binary(3))


def test_an_objective_refuses_global_latents():
    make, args = programs()["subsampled"]
    with pyro.get_param_store().scope():
        program = make()
        program.guide(*args)
        params = [pyro.get_param_store()._params[name] for name in pyro.get_param_store()]
        svi = CompiledSVI(program.model, program.guide, torch.optim.Adam(params), ELBO(), compiler="none")
        with pytest.raises(ContractError):
            svi.step(*args)


def test_a_gradient_is_used_once():
    """Of a parameter on which the loss depends in some steps only."""
    x, found = torch.ones(4), []
    for make in (PyroSVI, lambda *given: CompiledSVI(*given, compiler="none")):
        first, second = (nn.Parameter(torch.tensor(0.0)) for _ in range(2))

        def model(x, flag, first=first, second=second):
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("x", dist.Normal(first if flag else second, 1.0), obs=x)

        svi = make(model, lambda x, flag: None, torch.optim.SGD([first, second], lr=0.1))
        for flag in (True, False, False):
            svi.step(x, flag)
        found.append((first.item(), second.item()))
    assert found[0] == pytest.approx((0.4, 0.64))
    assert found[1] == pytest.approx(found[0])


def test_data_that_are_attributes_may_be_exchanged():
    """As those of a Gaussian process by set_data: the graph takes whatever lies there, and sees which are one."""

    class Held:
        def __init__(self):
            self.x = self.y = torch.randn(8, 3, dtype=torch.float64)
            self.calls = SimpleQueue()

        def model(self):
            self.calls.put(None)
            weight = pyro.sample("weight", dist.Normal(self.x.new_zeros(3), 1.0).to_event(1))
            with pyro.plate("data", 8):
                pyro.sample("y", dist.Normal(self.x @ weight, 1.0), obs=self.y[:, 0])

        def guide(self):
            loc = pyro.param("loc", lambda: torch.ones(3, dtype=torch.float64))
            pyro.sample("weight", dist.Normal(loc, 0.1).to_event(1))

    found = []
    for engine in (SVI, CompiledSVI):
        torch.manual_seed(0)
        with pyro.get_param_store().scope():
            held = Held()
            svi = engine(held.model, held.guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
            losses = []
            for step in range(40):
                if step % 3 == 0:
                    held.x = torch.randn(8, 3, dtype=torch.float64)
                if step % 5 == 0:
                    held.y = held.x  # one tensor in two places
                losses.append(svi.step())
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=1e-9)
    assert held.calls.qsize() < 20
