"""What a data set stores, what the likelihood scores, and what the encoder sees: no start overflows."""

import inspect
import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from pyro_vae import (
    MLP,
    VAE,
    Bernoulli,
    CompiledSVI,
    Conditional,
    Gaussian,
    Incomplete,
    Likelihood,
    MeanField,
    Network,
    Posterior,
    PyroSVI,
    StandardNormal,
    TwoLayerVAE,
    estimate_elbo,
    fit,
    likelihoods,
    networks,
    posteriors,
    priors,
)
from pyro_vae.parts.inputs import Inputs
from pyro_vae.parts.mixed import LogNormal, Mixed, Ordinal, Scaled
from pyro_vae.parts.pixels import PixelDecoder
from pyro_vae.parts.residual import ConvResidual, Residual

SHAPE = (1, 8, 8)
POSTERIORS = {
    "mean field": posteriors.MeanField,
    "full": posteriors.FullRank,
    "low": partial(posteriors.LowRank, rank=2),
    "flow": posteriors.Flow,
}
ENCODERS = {
    "tanh": MLP,
    "relu": partial(MLP, activation="relu"),
    "gated": networks.GatedMLP,
    "conv": networks.ConvEncoder,
    "residual": partial(networks.ConvEncoder, blocks=1),
    "residual of states": Residual,
    "recurrent": networks.RecurrentEncoder,
    "sequences": lambda size, out, image_shape: networks.ConvEncoder(size, out, image_shape=SHAPE[1:]),
    "sequences, recurrent": lambda size, out, image_shape: networks.RecurrentEncoder(size, out, image_shape=SHAPE[1:]),
    "gaps": lambda size, out, image_shape: Incomplete(MLP(2 * size, out, activation="relu"), size),
}
ENGINES = {"pyro": PyroSVI, "compiled": partial(CompiledSVI, compiler="none")}


def bright(size=300):
    """Images of 200..249."""
    return torch.randint(200, 250, (size, math.prod(SHAPE))).float()


def counts(size=300):
    """Over-dispersed, up to about 1,700."""
    generator = np.random.default_rng(0)
    mean = np.exp(generator.normal(size=(size, 2)) @ generator.normal(size=(2, 64)) + generator.normal(size=64) + 1)
    return torch.from_numpy(generator.poisson(mean * generator.gamma(2, 0.5, mean.shape)).clip(max=1700)).float()


def vae_of(head, encoder=MLP, posterior=posteriors.MeanField, prior=None, latent_dim=5):
    own = posterior(latent_dim)
    network = encoder(head.event_size, sum(own.sizes), image_shape=SHAPE)
    return VAE(
        prior or StandardNormal(latent_dim),
        likelihood=Conditional(MLP(latent_dim, sum(head.sizes), hidden=[16]), head),
        posterior=Conditional(network, own),
    )


def log_scales(vae, x):
    """The second output of the encoder, which most posteriors read as the log scale."""
    with torch.no_grad():
        return vae.posterior.network(vae.posterior.inputs(x)).split(vae.posterior.head.sizes, -1)[1]


def deep():
    return torch.randint(2**16, (300, 64)).float()


def unit():
    return bright().add(0.5).div(256)


HEADS = {
    "binary": (lambda: torch.bernoulli(torch.full((300, 64), 0.4)), Bernoulli),
    "logistic": (bright, likelihoods.DiscretizedLogistic),
    "logistics": (bright, partial(likelihoods.DiscretizedLogistic, components=2)),
    "logistic, 16 bits": (
        lambda: torch.randint(2**16, (300, 64)).float(),
        partial(likelihoods.DiscretizedLogistic, levels=2**16),
    ),
    "categorical": (bright, likelihoods.Categorical),
    "ordinal": (lambda: bright() - 200, partial(Ordinal, levels=50)),
    "poisson": (bright, likelihoods.Poisson),
    "poisson, counts": (counts, likelihoods.Poisson),
    "negative binomial": (bright, likelihoods.NegativeBinomial),
    "negative binomial, counts": (counts, likelihoods.NegativeBinomial),
    "gaussian": (unit, likelihoods.Gaussian),
    "gaussian, in a unit of its own": (lambda: 1e4 * torch.randn(300, 64) - 7e4, lambda size: Scaled(Gaussian(size))),
    "laplace": (unit, likelihoods.Laplace),
    "beta": (unit, likelihoods.Beta),
    "continuous": (unit, likelihoods.ContinuousBernoulli),
    "log-normal": (lambda: torch.randn(300, 64).mul(3).exp() * 1e3, LogNormal),
    "neighbours": (
        lambda: torch.bernoulli(torch.full((300, 64), 0.4)),
        lambda size: PixelDecoder(size, receptive_field=3, window=2, channels=4, context=1),
    ),
    "columns": (counts, lambda size: Mixed([likelihoods.Poisson(size // 2), Scaled(Gaussian(size - size // 2))])),
}
PAIRS = {
    *itertools.product(HEADS, ("relu", "conv")),
    *itertools.product(("logistic", "poisson, counts", "columns"), ENCODERS),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("head", "encoder"), sorted(PAIRS))
def test_no_start_overflows(head, encoder):
    """NaN at once, with whole numbers of 200..249 and a ReLU or convolutional encoder."""
    make, likelihood = HEADS[head]
    x = make()
    vae = vae_of(likelihood(64), ENCODERS[encoder])
    vae.initialize(x)
    assert log_scales(vae, x).abs().max() <= 1
    assert estimate_elbo(vae.model, vae.guide, x).isfinite().all()


def concrete(kind):
    below = {each for sub in kind.__subclasses__() for each in (sub, *concrete(sub))}
    return {each for each in below if each.__module__.startswith("pyro_vae.parts") and not inspect.isabstract(each)}


def test_all_parts_are_here():
    """A likelihood, or a network that can encode, that is new is to be added above."""
    made = [make(64) for _, make in HEADS.values()]
    assert {type(module) for head in made for module in head.modules()} & concrete(Likelihood) == concrete(Likelihood)
    decoders = {networks.ConvDecoder, networks.RecurrentDecoder}
    told = {networks.Told}  # a network of these, and a condition
    maps = {ConvResidual}  # from images to images
    encoders = {type(encoder(64, 10, image_shape=SHAPE)) for encoder in ENCODERS.values()}
    assert encoders == concrete(Network) - decoders - told - maps
    assert {type(make(5)) for make in POSTERIORS.values()} == concrete(Posterior)


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_no_start_overflows_with_any_posterior(posterior):
    x = counts()
    vae = vae_of(likelihoods.Poisson(64), posterior=POSTERIORS[posterior])
    vae.initialize(x)
    assert log_scales(vae, x).abs().max() <= 1
    assert estimate_elbo(vae.model, vae.guide, x).isfinite().all()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("head", HEADS)
def test_all_train(engine, head):
    make, likelihood = HEADS[head]
    x = make()
    vae = vae_of(likelihood(64), ENCODERS["relu"])
    vae.initialize(x)
    history = fit(vae, x.split(100), x[:50], epochs=1, lr=3e-3, engine=ENGINES[engine], progress=False)
    assert all(math.isfinite(row.validation_elbo) for row in history)


def test_what_is_seen_is_standardized():
    x = bright()
    seen = Inputs(64)
    seen.initialize(x, likelihoods.DiscretizedLogistic(64))
    torch.testing.assert_close(seen(x), x / 255)
    few = Inputs(64)
    few.initialize(x % 17, likelihoods.Categorical(64, levels=17))
    torch.testing.assert_close(few(x % 17), x % 17 / 16)
    for binary in (x % 2, x / 255):
        seen = Inputs(64)
        seen.initialize(binary, Gaussian(64))
        assert seen.is_identity
        assert seen(binary) is binary
    table = torch.randn(300, 64) * torch.linspace(1e-3, 1e3, 64) + 50
    table[:, 3] = 7.0  # of one value
    seen = Inputs(64)
    seen.initialize(table, Gaussian(64))
    shown = seen(table)
    wanted = (table - table.mean(0)) / torch.where(table.std(0) > 0, table.std(0, correction=0), 1.0)
    torch.testing.assert_close(shown, wanted, rtol=1e-3, atol=1e-3)
    numbers = counts()
    seen = Inputs(64)
    seen.initialize(numbers, likelihoods.NegativeBinomial(64))
    shown, logs = seen(numbers), numbers.log1p()
    torch.testing.assert_close(shown, (logs - logs.mean(0)) / logs.std(0, correction=0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(seen.inverse(shown), numbers, rtol=1e-4, atol=1e-3)


def test_columns_of_several_kinds():
    """A count, a real, a binary and a category of three, in another order than the heads."""
    heads = [likelihoods.Poisson(1), Gaussian(1), Bernoulli(1), likelihoods.Categorical(1, levels=3)]
    head = Mixed(heads, columns=[[2], [0], [3], [1]])
    x = torch.stack(
        [100 * torch.randn(50), torch.randint(3, (50,)), torch.poisson(torch.full((50,), 30.0)), torch.arange(50) % 2],
        1,
    )
    seen = Inputs(4)
    seen.initialize(x, head)
    shown = seen(x)
    assert seen.counts.tolist() == [False, False, True, False]
    for column in (0, 2):
        assert shown[:, column].mean().item() == pytest.approx(0, abs=1e-5)
        assert shown[:, column].std(correction=0).item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(shown[:, 1], x[:, 1] / 2)
    assert torch.equal(shown[:, 3], x[:, 3])


def test_a_value_that_no_mask_shows_is_seen_as_the_mean():
    x = counts(40)
    vae = vae_of(likelihoods.Poisson(64))
    vae.initialize(x)
    seen, shown = torch.rand(40, 64) < 0.7, []
    vae.posterior.network.register_forward_pre_hook(lambda module, inputs: shown.append(inputs[0]))
    with torch.no_grad():
        vae.guide(x, seen)
    assert shown[0][~seen].abs().max() < 1e-4
    torch.testing.assert_close(shown[0][seen], vae.posterior.inputs(x)[seen])


@pytest.mark.parametrize("prior", [None, priors.VampPrior(5, components=4)], ids=["normal", "vamp"])
def test_it_is_saved_with_the_model(prior):
    x = counts()
    vae = vae_of(likelihoods.Poisson(64), prior=prior)
    vae.initialize(x)
    again = vae_of(likelihoods.Poisson(64), prior=priors.VampPrior(5, components=4) if prior else None)
    again.load_state_dict(vae.state_dict())
    for other in (again, again.double()):
        expected = vae.double() if other.posterior.inputs.loc.dtype == torch.float64 else vae
        like = x.to(expected.posterior.inputs.loc.dtype)
        torch.testing.assert_close(other.posterior(like).mean, expected.posterior(like).mean)


@pytest.mark.parametrize("prior", [None, priors.VampPrior(5, components=4)], ids=["normal", "vamp"])
def test_models_of_earlier_versions_see_what_they_saw(prior):
    x = bright()
    vae = vae_of(likelihoods.DiscretizedLogistic(64), prior=prior)
    vae.initialize(x)
    new = ("inputs.", "prior.low", "prior.high")
    old = {name: value for name, value in vae.state_dict().items() if not any(part in name for part in new)}
    assert len(old) < len(vae.state_dict())
    vae.load_state_dict(old)
    assert vae.posterior.inputs.is_identity
    assert torch.equal(vae.posterior(x).mean, vae.posterior.head(*vae.posterior.network(x).chunk(2, -1)).mean)
    if prior:
        assert (vae.prior.low, vae.prior.high) == (0, 1)
        assert vae.prior.inputs.is_identity


def test_two_layers_see_the_same():
    x = bright()
    head = likelihoods.DiscretizedLogistic(64)
    vae = TwoLayerVAE(
        priors.VampPrior(2, components=5),
        latent=Conditional(MLP(2, 8, hidden=[8]), MeanField(4)),
        likelihood=Conditional(MLP(4, sum(head.sizes)), head),
        posterior=Conditional(MLP(64, 8, activation="relu"), MeanField(4)),
        top_posterior=Conditional(MLP(4, 4), MeanField(2)),
    )
    vae.initialize(x)
    assert log_scales(vae, x).abs().max() <= 1
    assert estimate_elbo(vae.model, vae.guide, x).isfinite().all()


def reals():
    return torch.randn(300, 64) * 40 - 7


def gaps():
    x = reals()
    return x.masked_fill(torch.rand(x.shape) < 0.2, math.nan)


def vae_with(prior, head, layers, incomplete):
    encoder = Incomplete(MLP(128, 10, hidden=[16]), 64) if incomplete else MLP(64, 10, hidden=[16])
    below = (
        Conditional(MLP(5, sum(head.sizes), hidden=[16]), head),
        Conditional(encoder, MeanField(5)),
    )
    if layers == 1:
        return VAE(prior, *below)
    latent, top = (Conditional(MLP(5, 10, hidden=[8]), MeanField(5)) for _ in range(2))
    return TwoLayerVAE(prior, latent, *below, top)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("make", [bright, counts, reals, gaps])
@pytest.mark.parametrize("learned", [True, False])
def test_pseudo_inputs_live_where_the_encoder_sees(make, learned, layers):
    """They were cut to [0, 1], whatever the data."""
    x = make()
    head = Gaussian(64) if make in (reals, gaps) else likelihoods.Poisson(64)
    vae = vae_with(priors.VampPrior(5, components=200, learned=learned), head, layers, make is gaps)
    vae.initialize(x)
    shown, low, high = [], *(torch.tensor(q(x.numpy(), 0)) for q in (np.nanmin, np.nanmax))

    def inputs():
        shown.clear()
        vae.prior(lambda u: shown.append(u) or vae.posterior(u))
        return shown[0]

    assert (inputs() >= low - 1e-3).all()
    assert (inputs() <= high * (1 + 1e-4 * high.sign())).all()
    if not learned:
        assert all(((x == row) | x.isnan()).all(1).any() for row in inputs())  # untouched
        return
    if make is not gaps:
        distance = torch.cdist(vae.posterior.inputs(inputs()), vae.posterior.inputs(x)).amin(1)
        assert distance.max() < 0.15 * (vae.prior.high - vae.prior.low).norm()
    before = vae.prior.pseudo_inputs.detach().clone()
    fit(vae, x.split(100), epochs=2, lr=0.5, schedule="constant", engine=PyroSVI, progress=False)
    assert (vae.prior.pseudo_inputs - before).abs().max() > 0.1
    assert (inputs() >= low - 1e-3).all()
    assert (inputs() <= high * (1 + 1e-4 * high.sign())).all()


def test_a_vamp_prior_says_what_is_missing():
    prior = priors.VampPrior(2, components=3)
    with pytest.raises(RuntimeError, match="no pseudo-inputs yet"):
        prior()
    prior.initialize(torch.rand(5, 4))
    with pytest.raises(TypeError, match=r"give its forward the map from observations to q\(z \| x\)"):
        prior()


def test_a_network_of_ones_own_starts_calm_too():
    class Wild(networks.Network):
        def __init__(self):
            super().__init__(64, 10)
            self.layers = nn.Sequential(nn.Linear(64, 30), nn.ReLU(), nn.Dropout(0.3), nn.Linear(30, 10))
            nn.init.normal_(self.layers[-1].weight, std=10.0)

        def forward(self, features):
            return self.layers(features)

    x = bright()
    head = likelihoods.DiscretizedLogistic(64)
    decoder = Conditional(MLP(5, sum(head.sizes)), head)
    vae = VAE(StandardNormal(5), decoder, Conditional(Wild(), MeanField(5)))
    state = torch.get_rng_state()
    vae.initialize(x)
    assert torch.equal(state, torch.get_rng_state())
    vae.eval()
    assert log_scales(vae, x).abs().max() <= 1
