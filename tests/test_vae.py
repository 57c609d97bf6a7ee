"""The VAE remembers nothing of its parts: one that is replaced after training counts like one that was there first."""

import copy

import pytest
import torch

from pyro_vae import (
    MLP,
    VAE,
    Bernoulli,
    CompiledSVI,
    Conditional,
    Gaussian,
    MeanField,
    PyroSVI,
    StandardNormal,
    TwoLayerVAE,
    log_weights,
    traces,
)
from pyro_vae.infer.supports import is_whole_space
from pyro_vae.parts.posteriors import FullRank
from pyro_vae.parts.priors import DiagonalNormal, Uniform, VampPrior

ENGINES = {
    "pyro": PyroSVI,
    "compiled": lambda *args: CompiledSVI(*args, compiler="none"),
}


def conditional(inputs, head):
    return Conditional(MLP(inputs, sum(head.sizes), hidden=[8]), head)


def vae_of(prior):
    torch.manual_seed(1)
    return VAE(prior, conditional(2, Bernoulli(6)), conditional(6, MeanField(2)))


def two_layer_of(prior):
    torch.manual_seed(1)
    return TwoLayerVAE(
        prior,
        latent=conditional(2, MeanField(3)),
        likelihood=conditional(3, Bernoulli(6)),
        posterior=conditional(6, MeanField(3)),
        top_posterior=conditional(3, MeanField(2)),
    )


def batch():
    return torch.bernoulli(torch.full((5, 6), 0.4))


def train(vae, engine, steps=3, seed=2):
    """Losses of a few steps, for an engine and an optimizer that are made anew."""
    optim = torch.optim.Adam([p for p in vae.parameters() if p.requires_grad], 1e-2)
    svi = ENGINES[engine](vae.model, vae.guide, optim)
    torch.manual_seed(seed)
    x = batch()
    return torch.stack([torch.as_tensor(svi.step(x)) for _ in range(steps)])


NORMAL, UNIFORM, ELSEWHERE = DiagonalNormal(2), Uniform(2, -2.0, 3.0), Uniform(2, 5.0, 6.0)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("make", "first", "second"),
    [
        (vae_of, NORMAL, UNIFORM),
        (vae_of, UNIFORM, NORMAL),
        (vae_of, UNIFORM, ELSEWHERE),
        (vae_of, UNIFORM, StandardNormal(2)),
        (two_layer_of, NORMAL, UNIFORM),
        (two_layer_of, UNIFORM, NORMAL),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_a_replaced_prior_is_the_only_one(engine, make, first, second):
    vae = make(copy.deepcopy(first))
    train(vae, engine)
    fresh = make(copy.deepcopy(second))  # which never had another prior
    fresh.load_state_dict({**fresh.state_dict(), **{k: v for k, v in vae.state_dict().items() if "prior" not in k}})
    vae.prior = copy.deepcopy(second)

    site = "z" if make is vae_of else "z2"
    x = batch()
    torch.manual_seed(3)
    _, guide_trace = traces(vae.model, vae.guide, x, 4)
    assert second.forward().support.check(guide_trace.nodes[site]["value"]).all()
    results = []
    for each in (vae, fresh):
        torch.manual_seed(3)
        results.append((log_weights(each.model, each.guide, x, 4), train(each, engine)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][0].isfinite().all()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("likelihood", conditional(2, Gaussian(6))),
        ("posterior", conditional(6, FullRank(2))),
    ],
)
def test_a_replaced_conditional_is_the_only_one(engine, name, part):
    vae = vae_of(DiagonalNormal(2))
    train(vae, engine)
    setattr(vae, name, copy.deepcopy(part))
    parts = {each: copy.deepcopy(getattr(vae, each)) for each in ("prior", "likelihood", "posterior")}
    fresh = VAE(**parts)
    losses = [train(each, engine) for each in (vae, fresh)]
    assert torch.equal(losses[0], losses[1])
    trained = dict(getattr(vae, name).named_parameters())
    assert all(not torch.equal(trained[key], value) for key, value in part.named_parameters())


def test_the_support_of_a_vamp_prior_costs_no_encoding():
    vae = vae_of(VampPrior(2, components=4))
    vae.initialize(batch())
    seen = []
    vae.posterior.register_forward_hook(lambda module, inputs, made: seen.append(len(inputs[0])))
    vae.guide(batch())
    assert seen == [5]  # the batch alone
    assert is_whole_space(vae.prior.support(vae.posterior(batch())))


def test_asking_for_the_support_draws_no_random_numbers():
    vae = vae_of(DiagonalNormal(2))
    x = batch()
    torch.manual_seed(4)
    z = vae.guide(x)
    torch.manual_seed(4)
    assert torch.equal(z, vae.posterior(x).rsample())
