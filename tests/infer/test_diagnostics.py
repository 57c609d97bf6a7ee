import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import BinaryLatents, binary, linear_gaussian, small_vae
from scipy import integrate, stats

from pyro_vae import (
    MLP,
    VAE,
    Bernoulli,
    Conditional,
    LinearGaussianVAE,
    MeanField,
    StandardNormal,
    TwoLayerVAE,
)
from pyro_vae.infer.diagnostics import kl_divergence, mean_log_weights, mutual_information
from pyro_vae.infer.programs import posterior_samples
from pyro_vae.parts import priors
from pyro_vae.parts.posteriors import FullRank


def vae_of(prior, posterior, pixels=12):
    vae = VAE(
        prior,
        likelihood=Conditional(MLP(prior.latent_dim, pixels, hidden=[8]), Bernoulli(pixels)),
        posterior=Conditional(MLP(pixels, sum(posterior.sizes), hidden=[8]), posterior),
    ).double()
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return vae


def from_model(vae, num):
    z = torch.randn(num, vae.weight.shape[1], dtype=torch.float64)
    return vae.mean + z @ vae.weight.mT + vae.scale * torch.randn(num, len(vae.mean), dtype=torch.float64)


# ---- kl_divergence


@pytest.mark.parametrize("batch_size", [3, 1000])
def test_kl_per_dimension_against_torch(batch_size):
    vae, x = vae_of(StandardNormal(3), MeanField(3)), binary(10)
    with torch.no_grad():
        exact = torch.distributions.kl_divergence(vae.posterior(x).base_dist, dist.Normal(double(0.0), 1.0)).mean(0)
    kl = kl_divergence(vae.model, vae.guide, x, num_samples=20_000, batch_size=batch_size)
    assert kl.keys() == {"z"}
    assert kl["z"].shape == (3,)
    assert kl["z"].dtype == torch.float64
    assert (exact > 0.05).all()
    torch.testing.assert_close(kl["z"], exact, rtol=0.02, atol=0.01)


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize(
    ("prior", "posterior"),
    [(StandardNormal(3), FullRank(3)), (priors.Uniform(3), MeanField(3))],
    ids=["full", "uniform"],
)
def test_kl_is_one_number_where_a_density_does_not_factorize(prior, posterior):
    vae, x = vae_of(prior, posterior), binary(6)
    kl = kl_divergence(vae.model, vae.guide, x, num_samples=20_000)["z"]
    assert kl.shape == ()
    if isinstance(prior, StandardNormal):
        wide = dist.MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
        with torch.no_grad():
            exact = torch.distributions.kl_divergence(vae.posterior(x), wide).mean()
    else:
        exact = squashed(vae, x)
    assert kl.item() == pytest.approx(exact.item(), abs=0.03)


def squashed(vae, x):
    """KL from the uniform on [-1, 1]^3 of 2 sigmoid(u) - 1, for u ~ N: 3 log 2 minus its entropy, by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    with torch.no_grad():
        loc, scale = vae.posterior(x).mean.numpy(), vae.posterior(x).stddev.numpy()
    u = loc[..., None] + scale[..., None] * nodes
    log_slope = np.log(2) + stats.logistic.logpdf(u)
    entropy = 0.5 + 0.5 * math.log(2 * math.pi) + np.log(scale) + (log_slope * weights).sum(-1) / math.sqrt(2 * math.pi)
    return (3 * math.log(2) - entropy.sum(-1)).mean()


def test_kl_of_the_sites_of_two_layers():
    vae = TwoLayerVAE(
        StandardNormal(2),
        latent=Conditional(MLP(2, 6, hidden=[5]), MeanField(3)),
        likelihood=Conditional(MLP(3, 12, hidden=[5]), Bernoulli(12)),
        posterior=Conditional(MLP(12, 6, hidden=[5]), MeanField(3)),
        top_posterior=Conditional(MLP(3, 4, hidden=[5]), MeanField(2)),
    ).double()
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x = binary(6)
    kl = kl_divergence(vae.model, vae.guide, x, num_samples=20_000)
    assert list(kl) == ["z2", "z1"]
    assert kl["z2"].shape == (2,)
    assert kl["z1"].shape == (3,)
    with torch.no_grad():
        z1 = vae.posterior(x).sample((20_000,))
        q2 = vae.top_posterior(z1)
        exact2 = torch.distributions.kl_divergence(q2.base_dist, dist.Normal(double(0.0), 1.0)).mean((0, 1))
        p1 = vae.latent(q2.sample())
        exact1 = (vae.posterior(x).base_dist.log_prob(z1) - p1.base_dist.log_prob(z1)).mean((0, 1))
    torch.testing.assert_close(kl["z2"], exact2, rtol=0.02, atol=0.01)
    torch.testing.assert_close(kl["z1"], exact1, rtol=0.02, atol=0.02)


def test_kl_of_discrete_sites():
    program = BinaryLatents()
    kl = kl_divergence(program.model, program.guide, binary(4, pixels=6), num_samples=50_000)["z"]
    q, p = dist.Bernoulli(program.proposal), dist.Bernoulli(program.prior)
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(q, p), rtol=0, atol=0.005)


def test_kl_is_what_separates_the_elbo_from_the_reconstruction():
    vae, x = small_vae(), binary(8)
    torch.manual_seed(1)
    elbo = mean_log_weights(vae.model, vae.guide, x, num_samples=50).mean()
    torch.manual_seed(1)
    kl = kl_divergence(vae.model, vae.guide, x, num_samples=50)["z"].sum()
    torch.manual_seed(1)
    with torch.no_grad():
        z = posterior_samples(vae.guide, x, 50)["z"]
        reconstruction = vae.likelihood(z).log_prob(x).mean()
    torch.testing.assert_close(reconstruction - kl, elbo, rtol=1e-10, atol=0)


def test_kl_of_wider_events_and_masked_sites():
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(double(0.0, 1.0, 2.0), 1.0).expand([2, 3]).to_event(1).to_event(1))
            pyro.sample("x", dist.Normal(z.sum((-1, -2)).unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(double(0.5), 0.5).expand([2, 3]).to_event(2))

    x = torch.zeros(4, 1, dtype=torch.float64)
    kl = kl_divergence(model, guide, x, num_samples=20_000)["z"]
    exact = torch.distributions.kl_divergence(dist.Normal(double(0.5), 0.5), dist.Normal(double(0.0, 1.0, 2.0), 1.0))
    torch.testing.assert_close(kl, exact.expand(2, 3), rtol=0, atol=0.02)

    def masked(program):
        def run(x):
            with pyro.poutine.mask(mask=torch.tensor(False)):
                program(x)

        return run

    assert kl_divergence(masked(model), masked(guide), x)["z"].tolist() == 0


# ---- mutual_information


def test_mutual_information_of_a_linear_gaussian():
    weight = torch.randn(5, 2, dtype=torch.float64)
    vae = LinearGaussianVAE(weight, torch.randn(5, dtype=torch.float64), scale=1.2)
    x = from_model(vae, 3000)
    exact = 0.5 * torch.logdet(torch.eye(2).double() + weight.mT @ weight / vae.scale**2).item()
    assert 0.8 < exact < 4
    parts = mutual_information(vae.model, vae.guide, x)
    assert parts.mutual_information == pytest.approx(exact, abs=4 * parts.mutual_information_se)
    assert abs(parts.kl_aggregated) < 4 * parts.kl_aggregated_se + 0.01  # its bias is of the order of exp(I) / 2N
    assert 0.005 < parts.mutual_information_se < 0.05
    prior = dist.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double())
    kl = torch.distributions.kl_divergence(vae.posterior(x), prior)
    assert parts.kl == pytest.approx(kl.mean().item(), abs=4 * parts.kl_se)
    assert parts.kl == pytest.approx(parts.mutual_information + parts.kl_aggregated, abs=1e-12)


@pytest.mark.slow
def test_standard_errors_are_the_spread_over_data_sets():
    vae = LinearGaussianVAE(torch.randn(4, 1).double(), torch.zeros(4).double(), scale=1.0)
    runs = [mutual_information(vae.model, vae.guide, from_model(vae, 150)) for _ in range(150)]
    for name in ("mutual_information", "kl_aggregated", "kl"):
        spread = np.std([getattr(run, name) for run in runs])
        stated = np.mean([getattr(run, name + "_se") for run in runs])
        assert 0.75 < stated / spread < 1.35  # the spread's own error is 6 %


@pytest.mark.parametrize("num_samples", [1, 3])
def test_aggregated_posterior_against_a_mixture_by_scipy(num_samples):
    vae, x = vae_of(StandardNormal(2), MeanField(2)), binary(70)
    torch.manual_seed(1)
    parts = mutual_information(vae.model, vae.guide, x, num_samples)
    torch.manual_seed(1)
    with torch.no_grad():
        z = posterior_samples(vae.guide, x, num_samples)["z"].numpy()  # (K, N, 2)
        loc, scale = vae.posterior(x).mean.numpy(), vae.posterior(x).stddev.numpy()
    density = stats.norm.pdf(z[:, :, None], loc, scale).prod(-1)  # (K, N, N)
    own = np.einsum("knn->kn", density)
    information = np.log(own / density.mean(-1))
    to_prior = np.log(density.mean(-1) / stats.norm.pdf(z).prod(-1))
    assert parts.mutual_information == pytest.approx(information.mean(), rel=1e-9)
    assert parts.kl_aggregated == pytest.approx(to_prior.mean(), rel=1e-9)
    assert parts.mutual_information_se == pytest.approx(information.mean(0).std(ddof=1) / math.sqrt(70), rel=1e-9)
    assert parts.kl_aggregated_se == pytest.approx(to_prior.mean(0).std(ddof=1) / math.sqrt(70), rel=1e-9)


def test_mutual_information_stops_at_log_n():
    vae = linear_gaussian()
    vae.scale = 1e-4
    x = from_model(vae, 40)
    parts = mutual_information(vae.model, vae.guide, x)
    assert parts.mutual_information == pytest.approx(math.log(40), abs=1e-9)
    assert parts.kl_aggregated == pytest.approx(parts.kl - math.log(40), abs=1e-9)


def test_mutual_information_of_several_sites_and_many_chunks():
    # q(a | x) = Bernoulli(sigmoid(x)), q(z | a, x) = N(a + x, 1), for x of two values: I by hand, over a and z
    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Bernoulli(double(0.4)[0]))
            z = pyro.sample("z", dist.Normal(double(0.0), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + a.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Bernoulli(logits=x[:, 0]))
            pyro.sample("z", dist.Normal(a.unsqueeze(-1) + x, 1.0).to_event(1))

    x = double(-1.0, 2.0).repeat(1500)[:, None]
    z = np.linspace(-10, 12, 4001)
    information = to_prior = 0
    for a in (0, 1):
        q = [stats.bernoulli(1 / (1 + math.exp(-v))).pmf(a) * stats.norm.pdf(z, a + v) for v in (-1.0, 2.0)]
        mean = sum(q) / 2
        information += sum(integrate.trapezoid(each * np.log(each / mean), z) for each in q) / 2
        to_prior += integrate.trapezoid(mean * np.log(mean / (stats.bernoulli(0.4).pmf(a) * stats.norm.pdf(z))), z)
    parts = mutual_information(model, guide, x, num_samples=2)
    assert parts.mutual_information == pytest.approx(information, abs=4 * parts.mutual_information_se)
    assert parts.kl_aggregated == pytest.approx(to_prior, abs=4 * parts.kl_aggregated_se)
    assert information > 0.4


@pytest.mark.parametrize("posterior", [FullRank(2), MeanField(2)], ids=["full", "squashed"])
def test_mutual_information_of_every_kind_of_guide(posterior):
    vae = vae_of(StandardNormal(2) if isinstance(posterior, FullRank) else priors.Uniform(2), posterior)
    x = binary(50)
    parts = mutual_information(vae.model, vae.guide, x, num_samples=400)
    kl = kl_divergence(vae.model, vae.guide, x, num_samples=400)["z"].item()
    assert parts.kl == pytest.approx(kl, abs=0.1)
    assert 0 < parts.mutual_information < math.log(50)
    assert parts.kl_aggregated > 0


def test_bad_arguments_are_refused():
    vae, x = small_vae(), binary(3)
    with pytest.raises(ValueError, match="at least 2 observations, got 1"):
        mutual_information(vae.model, vae.guide, x[:1])
    for diagnostic in (mutual_information, kl_divergence):
        with pytest.raises(ValueError, match="num_samples must be at least 1"):
            diagnostic(vae.model, vae.guide, x, num_samples=0)
