"""Who runs programs in which mode, and who refuses data that no likelihood scores: every estimator, every engine."""

import inspect
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import binary, small_vae
from pyro.infer import Trace_ELBO
from torch import nn
from torch.distributions import constraints

from pyro_vae import (
    ELBO,
    MLP,
    VAE,
    Annealing,
    Bernoulli,
    CompiledSVI,
    Conditional,
    ContractError,
    Gaussian,
    MeanField,
    Network,
    PyroSVI,
    StandardNormal,
    active_units,
    annealed_importance_sampling,
    bidirectional_monte_carlo,
    bridge_sampling,
    class_posterior,
    estimate_elbo,
    fit,
    importance_sampling,
    impute,
    infer,
    inference_gaps,
    log_conditional,
    objectives,
    quadrature,
    rate_distortion,
    sandwich,
    smc,
    thermodynamic_integration,
)
from pyro_vae.infer.batches import Watch, _all_in
from pyro_vae.infer.diagnostics import kl_by_datum, kl_divergence, mutual_information
from pyro_vae.infer.evidence import (
    SMC,
    PosteriorChains,
    Tempering,
    Thermodynamic,
    enumeration,
    local_flow,
    local_mean_field,
)

SHORT = Annealing(num_temperatures=2, num_chains=2, num_leapfrogs=1, num_warmup_chains=2, num_climbs=1, num_checked=0)
CHAINS = PosteriorChains(num_chains=4, num_warmup=20, num_draws=20, num_leapfrogs=1)
ENGINES = {"pyro": PyroSVI, "compiled": partial(CompiledSVI, compiler="none")}

HALF = torch.arange(6) < 3
ESTIMATORS = {
    "elbo": estimate_elbo,
    "kl": kl_divergence,
    "kl by datum": kl_by_datum,
    "mutual information": mutual_information,
    "importance": partial(importance_sampling, num_samples=30, num_checked=0, compiled=False),
    "laplace": partial(importance_sampling, num_samples=30, proposal="laplace", num_checked=0, compiled=False),
    "annealed": partial(annealed_importance_sampling, settings=SHORT, compiled=False),
    "bdmc": partial(bidirectional_monte_carlo, settings=SHORT, compiled=False),
    "sandwich": partial(sandwich, settings=SHORT, chains=CHAINS, compiled=False),
    "smc": partial(smc, settings=SMC(num_particles=8, num_groups=2, num_leapfrogs=1), compiled=False),
    "bridge": partial(bridge_sampling, settings=CHAINS, compiled=False),
    "thermodynamic": partial(
        thermodynamic_integration,
        settings=Thermodynamic(num_chains=4, num_temperatures=2, num_warmup=2, num_draws=4, check=CHAINS),
        compiled=False,
    ),
    "rate": partial(
        rate_distortion, betas=(1.0,), settings=Tempering(num_chains=4, num_temperatures=2), compiled=False
    ),
    "gaps": partial(inference_gaps, log_px=torch.zeros(3), num_steps=2, num_samples=30),
    "mean field": partial(local_mean_field, num_steps=2),
    "flow": partial(local_flow, num_steps=2),
    "quadrature": partial(quadrature, num_points=1024),
    "enumeration": enumeration,
    "impute": partial(impute, num_samples=30, num_draws=2, num_checked=0),
    "impute by chains": partial(impute, num_draws=2, chains=SHORT, num_checked=0),
    "conditional": partial(log_conditional, target=HALF, given=~HALF, settings=SHORT, compiled=False),
    "classes": partial(
        class_posterior,
        classes=torch.ones(2, 6).bool(),
        estimate=partial(importance_sampling, num_samples=30, num_checked=0, compiled=False),
        name="seen",
    ),
}
PRIMITIVES = {"traces", "log_weights", "check_program"}
"""These run programs in the mode that they are in, as they say."""


def test_all_that_is_public_is_here():
    """A function of model, guide and data that is new is to be added above."""
    rooms = (infer, infer.diagnostics, infer.evidence)
    public = {name: getattr(room, name) for room in rooms for name in getattr(room, "__all__", dir(room))}
    wanted = {
        name
        for name, each in public.items()
        if inspect.isfunction(each)
        and not name.startswith("_")
        and each.__module__.startswith("pyro_vae.infer")
        and {"model", "guide", "data"} <= inspect.signature(each).parameters.keys()
    }
    internal = {"check_data", "mean_log_weights"}  # imported, or for data that have been checked
    assert {getattr(each, "func", each).__name__ for each in ESTIMATORS.values()} == wanted - PRIMITIVES - internal


class Normed(Network):
    """A network with batch normalization and dropout."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.first, self.norm, self.last = nn.Linear(in_features, 5), nn.BatchNorm1d(5), nn.Linear(5, out_features)

    def forward(self, features):
        hidden = self.norm(self.first(features.reshape(-1, self.in_features))).tanh()
        return self.last(nn.functional.dropout(hidden, 0.2, self.training)).unflatten(0, features.shape[:-1])


def normed(pixels=6, latent_dim=2):
    return VAE(
        StandardNormal(latent_dim),
        likelihood=Conditional(Normed(latent_dim, pixels), Bernoulli(pixels)),
        posterior=Conditional(Normed(pixels, 2 * latent_dim), MeanField(latent_dim)),
    ).double()


class Discrete(nn.Module):
    """Two binary latent variables, which enumeration takes."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Normed(6, 2).double(), Normed(2, 6).double()

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(2).double()).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))


def counts(vae):
    return [int(module.num_batches_tracked) for module in vae.modules() if isinstance(module, nn.BatchNorm1d)]


SLOW = {"thermodynamic", "bridge", "rate", "conditional"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in ESTIMATORS]
)
def test_estimators_run_programs_in_evaluation_mode_and_leave_the_mode(name):
    vae, modes = Discrete() if name == "enumeration" else normed(), set()
    for module in vae.modules():
        module.register_forward_pre_hook(lambda module, _: modes.add(module.training))
    next(module for module in vae.modules() if isinstance(module, nn.BatchNorm1d)).eval()  # one in another mode
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    its_modes = [module.training for module in vae.modules()]
    ESTIMATORS[name](vae.model, vae.guide, data=binary(3, 6))
    assert modes == {False}
    assert [module.training for module in vae.modules()] == its_modes
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


@pytest.mark.parametrize("spoil", [16.0, math.nan])
@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - {"bdmc"}))  # which draws its own data
def test_estimators_refuse_what_no_likelihood_scores(name, spoil):
    vae, x = Discrete() if name == "enumeration" else small_vae(6, 2), binary(3, 6)
    x[1, 4] = spoil
    with pytest.raises(ContractError, match=r"lie outside the support.* row 1:" if spoil == 16 else r"NaN.* row 1\b"):
        ESTIMATORS[name](vae.model, vae.guide, data=x)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - {"bdmc", "classes", "gaps", "conditional"} - SLOW))
def test_rows_are_counted_from_the_first_of_all(name):
    """Data are checked a thousand or fewer at a time."""
    vae, x = Discrete() if name == "enumeration" else small_vae(6, 2), binary(1003, 6)
    x[1002, 4] = 16.0
    with pytest.raises(ContractError, match=r"1 observations of site 'x' .*, row 1002:"):
        ESTIMATORS[name](vae.model, vae.guide, data=x)


def test_active_units_too():
    vae = normed()
    active_units(vae.guide, binary(3, 6))
    assert counts(vae) == [0, 0]
    assert vae.training


def with_nan(x):
    x[1, 4] = math.nan
    return x


def with_16(x):
    x[1, 4] = 16.0
    return x


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "loss", [Trace_ELBO(), ELBO(), objectives.IWAE(2), objectives.DReG(2)], ids=lambda loss: type(loss).__name__
)
@pytest.mark.parametrize("engine", ENGINES)
def test_batch_normalization_counts_the_training_batches(engine, loss):
    vae = normed()
    fit(vae, binary(36, 6).split(3), binary(7, 6), epochs=3, engine=ENGINES[engine], loss=loss, progress=False)
    assert counts(vae) == [36, 36]
    assert vae.training


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_of_one_is_told_as_such(engine):
    vae = normed()
    with pytest.raises(ContractError, match="one datum alone, on which batch normalization cannot be trained"):
        fit(vae, binary(7, 6).split(3), binary(1, 6), epochs=1, engine=ENGINES[engine], progress=False)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("spoil", "words"),
    [(with_nan, r"1 of 5 observations hold NaN \(data, row 1\)"), (with_16, "1 observations of site 'x' .*row 1:")],
)
@pytest.mark.parametrize("where", ["batch", "validation"])
def test_fit_refuses_a_bad_batch_and_bad_validation_data(engine, spoil, words, where):
    vae, parts = small_vae(), list(binary(20).split(5))
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    validation = binary(5)
    if where == "batch":
        parts[2] = spoil(parts[2])
    else:
        validation = spoil(validation)
    prefix = "mini-batch 3 of epoch 1: " if where == "batch" else "validation: "
    with pytest.raises(ContractError, match=prefix + words):
        fit(vae, parts, validation, epochs=2, engine=ENGINES[engine], progress=False)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


@pytest.mark.parametrize("engine", ENGINES)
def test_an_infinite_value_is_told_as_such(engine):
    vae = VAE(StandardNormal(2), Conditional(MLP(2, 4), Gaussian(4)), Conditional(MLP(4, 4), MeanField(2)))
    x = torch.randn(12, 4)
    x[7, 1] = math.inf
    with pytest.raises(ContractError, match=r"mini-batch 2 of epoch 1: 1 observations .*Real.*, row 3"):
        fit(vae, x.split(4), epochs=1, engine=ENGINES[engine], progress=False)


class Columns(nn.Module):
    """Some columns of the data are observed, one is a condition; the support depends on a parameter."""

    def __init__(self):
        super().__init__()
        self.top = nn.Parameter(torch.tensor(2.0))

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x[:, 2], 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=x[:, 0])
            pyro.sample("u", dist.Uniform(0.0, self.top.clamp(min=1.0)), obs=x[:, 1])

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x[:, 0], 1.0))


@pytest.mark.parametrize(("column", "value"), [(1, 2.5), (2, math.nan)])
def test_batches_of_programs_that_must_be_run_are_looked_at_too(column, value):
    module, x = Columns(), torch.rand(12, 3)
    x[9, column] = value
    state = torch.get_rng_state()
    watch = Watch(module.model, module.guide, x[:3])
    for number, part in enumerate(x.split(3)):
        if number < 3:
            watch.look(part, f"batch {number}")
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ContractError, match=r"batch 3: 1 .*row 0"):
        watch.look(x[9:], "batch 3")


def test_a_bernoulli_vae_is_looked_at_without_running_it():
    vae, x = small_vae(), binary(6)
    watch = Watch(vae.model, vae.guide, x)
    vae.likelihood.network.register_forward_hook(lambda *_: pytest.fail("the decoder has run"))
    watch.look(binary(4), "second")


@pytest.mark.parametrize(
    "support",
    [
        constraints.boolean,
        constraints.real,
        constraints.nonnegative_integer,
        constraints.positive_integer,
        constraints.integer_interval(0, 3),
        constraints.unit_interval,
        constraints.positive,
        constraints.independent(constraints.boolean, 1),
        constraints.independent(constraints.integer_interval(0, 1), 1),
    ],
    ids=repr,
)
@pytest.mark.parametrize("value", [-1.0, -0.0, 0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_quick_look_at_values_agrees_with_torch(support, value, dtype):
    x = torch.ones(3, 2).to(dtype)
    x[2, 1] = value
    assert bool(_all_in(x, support)) == bool(support.check(x).all())


def test_values_that_no_bernoulli_scores_are_no_bound():
    """They gave an ELBO of +183, and a rate of nothing."""
    vae = small_vae()
    for estimate in (estimate_elbo, kl_divergence, mutual_information):
        with pytest.raises(ContractError, match=r"2 observations .* outside the support .* first row 0"):
            estimate(vae.model, vae.guide, torch.full((2, 12), 16.0).double())


def test_checks_use_up_no_random_numbers():
    vae, x = small_vae(), binary(5)
    torch.manual_seed(1)
    estimate_elbo(vae.model, vae.guide, x, num_samples=3)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    torch.randint(2**62, ())  # the seed of all that it draws
    assert torch.equal(torch.get_rng_state(), state)
