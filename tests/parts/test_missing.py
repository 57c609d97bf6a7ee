"""Entries that nobody saw, and columns of several kinds, by oracles."""

import math

import pyro
import pytest
import torch
from scipy import stats
from torch import nn

from pyro_vae import (
    IWAE,
    MLP,
    VAE,
    Annealing,
    Bernoulli,
    CompiledSVI,
    Conditional,
    ContractError,
    Gaussian,
    Incomplete,
    MeanField,
    Mixed,
    StandardNormal,
    TwoLayerVAE,
    annealed_importance_sampling,
    bidirectional_monte_carlo,
    check_program,
    fit,
    importance_sampling,
    log_weights,
    quadrature,
    testing,
)
from pyro_vae.parts.likelihoods import Beta, Categorical, Likelihood, NegativeBinomial, Poisson
from pyro_vae.parts.missing import without_gaps
from pyro_vae.parts.mixed import LogNormal, Ordinal, Scaled
from tests.oracles import linear_gaussian

HEADS = {
    "Mixed": lambda x: Mixed([Gaussian(1), Categorical(x - 1, levels=3)]),
    "Mixed of masses": lambda x: Mixed([Bernoulli(1), Poisson(x - 1)], [[x - 1], list(range(x - 1))]),
    "LogNormal": LogNormal,
    "Ordinal": lambda x: Ordinal(x, levels=4),
    "Scaled": lambda x: Scaled(Gaussian(x, scale="per_pixel")),
}


def with_gaps(x, share=0.1):
    seen = torch.rand(x.shape) > share
    return torch.where(seen, x, math.nan), seen


def block_log_px(x, mean, covariance):
    """The normal log-density of the entries of each row that are no NaN."""
    values = []
    for row in x:
        known = ~row.isnan()
        part = covariance[known][:, known]
        values.append(stats.multivariate_normal(mean[known].numpy(), part.numpy()).logpdf(row[known].numpy()))
    return torch.as_tensor(values)


def linear_vae(latent_dim=2, pixels=6, scale=0.6, mask=True):
    """A VAE whose decoder is affine: p(x) is normal. Its mean and covariance beside it."""
    width = 2 * pixels if mask else pixels
    vae = VAE(
        StandardNormal(latent_dim),
        Conditional(MLP(latent_dim, pixels, hidden=[]), Gaussian(pixels, scale=scale)),
        Conditional(Incomplete(MLP(width, 2 * latent_dim, hidden=[]), pixels, mask), MeanField(latent_dim)),
    ).double()
    layer = vae.likelihood.network.layers[0]
    with torch.no_grad():
        layer.bias.normal_()
    covariance = layer.weight @ layer.weight.mT + scale**2 * torch.eye(pixels).double()
    return vae, layer.bias.detach(), covariance.detach()


@pytest.mark.parametrize("name", HEADS)
def test_heads_keep_the_contract(name):
    testing.check_likelihood(HEADS[name], event_sizes=(2, 5), batch_shapes=((), (2, 3)))


def test_exact_posterior_gives_exact_marginal_of_what_was_seen():
    torch.manual_seed(0)
    model = linear_gaussian(pixels=9, latent_dim=3)
    x, seen = with_gaps(model.mean + 2 * torch.randn(50, 9, dtype=torch.float64))
    assert 0.05 < (~seen).double().mean() < 0.2
    covariance = model.weight @ model.weight.mT + 0.49 * torch.eye(9).double()
    wanted = block_log_px(x, model.mean, covariance)
    torch.testing.assert_close(model.log_px(x, seen), wanted, rtol=0, atol=1e-9)
    evidence = importance_sampling(model.model, model.guide, (x.nan_to_num(), seen), 32, compiled=False, num_checked=0)
    torch.testing.assert_close(evidence.log_px, wanted, rtol=0, atol=1e-9)
    torch.testing.assert_close(-IWAE(3)(model.model, model.guide, (x, seen)), wanted.mean(), rtol=0, atol=1e-9)


@pytest.mark.slow
def test_quadrature_of_a_vae_with_gaps_is_exact():
    torch.manual_seed(0)
    vae, mean, covariance = linear_vae()
    x, _ = with_gaps(mean + torch.randn(20, 6, dtype=torch.float64))
    wanted = block_log_px(x, mean, covariance)
    torch.testing.assert_close(quadrature(vae.model, vae.guide, x).log_px, wanted, rtol=0, atol=1e-5)
    found = annealed_importance_sampling(vae.model, vae.guide, x, Annealing(8, 5, num_leapfrogs=2), compiled=False)
    assert found.reliable.all()
    assert ((found.log_px - wanted).abs() < 5 * found.mc_se + 1e-5).all()


def test_nan_and_mask_say_the_same():
    vae, mean, _ = linear_vae()
    x, seen = with_gaps(mean + torch.randn(30, 6, dtype=torch.float64), 0.3)
    results = []
    for data in (x, (torch.where(seen, x, 7.0), seen), {"x": x, "seen": seen}):
        pyro.set_rng_seed(0)
        results.append(log_weights(vae.model, vae.guide, data, 4))
        check_program(vae.model, vae.guide, data)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_encoder_sees_zeros_after_standardizing():
    for mask in (True, False):
        encoder = Incomplete(MLP(4 if mask else 2, 1, hidden=[]), 2, mask)
        encoder.initialize(torch.tensor([[1.0, 10.0], [3.0, math.nan], [math.nan, 30.0]]))
        assert encoder.loc.tolist() == [2.0, 20.0]
        assert encoder.scale.tolist() == [1.0, 10.0]
        weight = torch.tensor([[1.0, 10.0, 100.0, 1000.0]])[:, : 4 if mask else 2]
        encoder.network.layers[0].weight = nn.Parameter(weight)
        found = encoder(torch.tensor([[3.0, math.nan], [math.nan, 30.0], [math.nan, math.nan]])).squeeze(1)
        assert found.tolist() == ([101.0, 1010.0, 0.0] if mask else [1.0, 10.0, 0.0])
        assert not encoder.state_dict().keys().isdisjoint({"loc", "scale"})


def test_gradients_are_finite_where_the_filler_stands():
    """A zero, the obvious filler, has no density under a LogNormal or a Beta, and gives NaN."""
    head = Mixed([LogNormal(1), Beta(1), NegativeBinomial(1), Categorical(1, levels=3), Bernoulli(1)])
    vae = VAE(
        StandardNormal(2),
        Conditional(MLP(2, sum(head.sizes), hidden=[8]), head),
        Conditional(Incomplete(MLP(10, 4, hidden=[8]), 5), MeanField(2)),
    )
    x = torch.tensor([[1.5, 0.3, 4.0, 2.0, 1.0]]).repeat(64, 1)
    x, _ = with_gaps(x, 0.5)
    vae.initialize(x)
    loss = IWAE(5)(vae.model, vae.guide, x)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in vae.parameters())
    assert vae.likelihood.head.is_density


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["eager", "graph"])
def test_training_with_gaps_reaches_the_maximum_likelihood(compiler):
    """Of a normal with missing entries, by the observed-data likelihood: the ELBO ends near the truth's."""
    torch.manual_seed(0)
    _truth, mean, covariance = linear_vae(1, 4, mask=False)
    draws = stats.multivariate_normal(mean.numpy(), covariance.numpy()).rvs(400, random_state=0)
    x, _ = with_gaps(torch.as_tensor(draws), 0.2)
    vae, _, _ = linear_vae(1, 4, mask=True)
    vae.initialize(x)
    optimizer = torch.optim.Adam(vae.parameters(), 0.1)
    if compiler == "graph":
        svi = CompiledSVI(vae.model, vae.guide, optimizer, IWAE(8), compiler="none")
        for _ in range(100):
            svi.step(x)
    else:
        for _ in range(100):
            optimizer.zero_grad()
            IWAE(8)(vae.model, vae.guide, x).backward()
            optimizer.step()
    found = quadrature(vae.model, vae.guide, x[:100]).log_px.mean()
    assert found > block_log_px(x[:100], mean, covariance).mean() - 0.15


def test_fit_takes_gaps():
    vae, mean, _ = linear_vae(mask=False)
    x, _ = with_gaps(mean + torch.randn(64, 6, dtype=torch.float64))
    history = fit(vae, x.split(16), epochs=2)
    assert all(math.isfinite(epoch.train_elbo) for epoch in history)


def test_two_layers_take_gaps():
    posterior = Conditional(Incomplete(MLP(8, 4, hidden=[]), 4), MeanField(2))
    vae = TwoLayerVAE(
        StandardNormal(2),
        Conditional(MLP(2, 4, hidden=[]), MeanField(2)),
        Conditional(MLP(2, 4, hidden=[]), Bernoulli(4)),
        posterior,
        Conditional(MLP(2, 4, hidden=[]), MeanField(2)),
    ).double()
    x, seen = with_gaps(torch.bernoulli(torch.full((9, 4), 0.5, dtype=torch.float64)), 0.4)
    check_program(vae.model, vae.guide, x)
    with torch.no_grad():  # z2 and z1 are then independent of each other, and their posteriors the priors
        for part in (vae.latent, vae.posterior, vae.top_posterior):
            for p in part.parameters():
                p.zero_()
    found = log_weights(vae.model, vae.guide, torch.full_like(x, math.nan), 2)
    torch.testing.assert_close(found, torch.zeros_like(found))  # of nothing, p is one
    with pytest.raises(ContractError, match="seen must be booleans of the observations' shape"):
        vae.model(x, seen.double())


def test_simulated_data_keep_the_gaps():
    vae, mean, _ = linear_vae()
    x, seen = with_gaps(mean + torch.randn(5, 6, dtype=torch.float64), 0.3)
    found = bidirectional_monte_carlo(vae.model, vae.guide, x, compiled=False)
    assert torch.equal(~found.data.isnan(), seen)
    assert not torch.equal(found.data[seen], x[seen])
    assert abs(found.width()[0]) < 0.5


def test_nan_that_no_mask_covers_is_refused():
    model = linear_gaussian()
    x = torch.zeros(3, 7, dtype=torch.float64)
    x[1, 2] = math.nan
    with pytest.raises(ContractError, match=r"1 of 3 observations hold NaN \(data, row 1\)"):
        check_program(model.model, model.guide, x)


def test_mixed_adds_up_its_columns():
    torch.manual_seed(0)
    heads = [Gaussian(2, scale=0.5), Categorical(1, levels=3), Poisson(1)]
    head = Mixed(heads, columns=[[3, 0], [2], [1]])
    outputs = [torch.randn(5, n) for n in head.sizes]
    x = torch.tensor([[0.3, 4.0, 2.0, -1.0]]).expand(5, -1)
    made = head(*outputs)
    wanted = stats.norm(outputs[0].numpy(), 0.5).logpdf([[-1.0, 0.3]]).sum(-1)
    wanted += outputs[1].log_softmax(-1)[:, 2].numpy()
    wanted += stats.poisson(nn.functional.softplus(outputs[2]).squeeze(-1).numpy()).logpmf(4)
    torch.testing.assert_close(made.log_prob(x), torch.as_tensor(wanted, dtype=torch.float32))
    assert made.sample((1000,)).shape == (1000, 5, 4)
    assert head.unit().endswith("density")
    torch.testing.assert_close(made.mean[:, 3], outputs[0][:, 0])
    torch.testing.assert_close(head._split(x)[0][1], x[:, [3, 0]])


def test_scaled_counts_its_jacobian():
    head = Scaled(Gaussian(1, scale=1.0))
    head.initialize(torch.tensor([[1000.0], [3000.0]]))
    log_prob = head(torch.tensor([[0.5]])).log_prob(torch.tensor([[2500.0]])).item()
    std = 2000 / math.sqrt(2)
    assert log_prob == pytest.approx(stats.norm(2000 + 0.5 * std, std).logpdf(2500), abs=1e-5)
    head.initialize(torch.full((3, 1), 5.0))
    assert head.scale.item() == 1
    assert head.loc.item() == 5


def test_ordinal_is_cumulative_and_starts_at_the_frequencies():
    head = Ordinal(1, levels=4)
    made = head(torch.tensor([[0.7]]))
    ends = torch.sigmoid(head.thresholds() - 0.7)[0]
    wanted = torch.cat([ends, torch.ones(1)]).diff(prepend=torch.zeros(1))
    torch.testing.assert_close(made.base_dist.probs[0, 0], wanted)
    x = torch.tensor([0.0] * 50 + [1.0] * 20 + [3.0] * 30).unsqueeze(1)
    head.initialize(x)
    torch.testing.assert_close(
        head(*head.marginal(x)).base_dist.probs[0], (torch.tensor([50.5, 20.5, 0.5, 30.5]) / 102)
    )


def test_columns_of_several_gaps_are_filled_by_what_was_seen():
    x = torch.tensor([[1.0, math.nan], [math.nan, 5.0], [3.0, math.nan], [math.nan, 6.0], [math.nan, 7.0]])
    assert without_gaps(x).tolist() == [[1.0, 5.0], [1.0, 5.0], [3.0, 6.0], [3.0, 6.0], [1.0, 7.0]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixed([]), "at least one head"),
        (lambda: Mixed([Gaussian(2)], [[0, 0]]), "each entry 0..1 once"),
        (lambda: Mixed([Gaussian(2)], [[0]]), "Gaussian scores 2 entries"),
        (lambda: Mixed([Gaussian(2)], []), "one list for each of 1 heads"),
        (lambda: Scaled(Bernoulli(2)), "is no density"),
        (lambda: Ordinal(2, levels=1), "at least 2"),
        (lambda: Incomplete(MLP(3, 2), 2), "reads 3 features, it needs 2 entries and as many of the mask"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_entries_that_hang_together_have_no_mask():
    class Whole(Likelihood):
        is_density = True

        def forward(self, loc):
            return pyro.distributions.MultivariateNormal(loc, torch.eye(2))

    vae = VAE(StandardNormal(1), Conditional(MLP(1, 2), Whole(2)), Conditional(MLP(2, 2), MeanField(1)))
    vae.model(torch.zeros(3, 2))
    with pytest.raises(ContractError, match=r"Whole makes a MultivariateNormal.*\.to_event\(1\)"):
        vae.model(torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool))
