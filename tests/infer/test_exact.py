import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import BinaryLatents, binary, linear_gaussian, small_vae
from scipy import integrate, optimize, stats

from pyro_vae import MLP, VAE, Bernoulli, Conditional, ContractError, Evidence, Gaussian, MeanField, quadrature
from pyro_vae.infer.evidence.exact import enumeration
from pyro_vae.parts import priors


def programs(likelihood, **priors):
    """A model with one site per prior, which the guide draws from; a prior may be a function of earlier sites."""

    def draw():
        z = []
        for name, prior in priors.items():
            z.append(pyro.sample(name, prior if isinstance(prior, dist.Distribution) else prior(*z)))
        return z

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", likelihood(*draw()), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            draw()

    return model, guide


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def log_integral(integrand, low, high, points):
    """By scipy, with the places of the mass named."""
    return math.log(integrate.quad(integrand, low, high, points=points, epsabs=0, epsrel=1e-12, limit=1000)[0])


def check_fields(evidence, batch):
    assert all(field.shape == (batch,) for field in evidence[:-1])
    assert (evidence.num_invalid == 0).all()
    for field in (evidence.ess, evidence.khat, evidence.acceptance):
        assert field.isnan().all()


# ---- the linear-Gaussian VAE


def factorized(loc, scale):
    return dist.MultivariateNormal(loc, torch.diag_embed(scale.square()))


def test_gaps_and_elbo_against_torchs_divergence_of_full_covariances():
    vae = linear_gaussian(pixels=7, latent_dim=3)
    x, loc, scale = torch.randn(5, 7).double(), torch.randn(5, 3).double(), torch.rand(5, 3).double() + 0.2
    exact, best = vae.posterior(x), vae.optimal_mean_field(x)
    approximation = torch.distributions.kl_divergence(factorized(best.mean, best.stddev), exact)
    whole = torch.distributions.kl_divergence(factorized(loc, scale), exact)
    gaps = vae.gaps(x, loc, scale)
    torch.testing.assert_close(gaps.approximation, approximation, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gaps.amortization, whole - approximation, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(vae.elbo(x, loc, scale), vae.log_px(x) - whole, rtol=1e-9, atol=1e-12)
    assert (approximation > 0.05).all()
    assert (gaps.amortization > 0.05).all()
    torch.testing.assert_close(vae.gaps(x, best.mean, best.stddev).amortization, torch.zeros(5).double())


def test_elbo_is_the_expectation_of_the_log_weights():
    # E_q[log p(x, z)] of Gaussians, written out: independent of KL and of log p(x)
    vae = linear_gaussian(pixels=4, latent_dim=2)
    x, loc, scale = torch.randn(3, 4).double(), torch.randn(3, 2).double(), torch.rand(3, 2).double() + 0.2
    variance = vae.scale**2
    misfit = (x - loc @ vae.weight.mT - vae.mean).square().sum(-1) + (scale.square() @ vae.weight.square().mT).sum(-1)
    log_likelihood = -0.5 * (misfit / variance + 4 * math.log(2 * math.pi * variance))
    log_prior = -0.5 * (loc.square() + scale.square() + math.log(2 * math.pi)).sum(-1)
    entropy = 0.5 * (1 + math.log(2 * math.pi) + 2 * scale.log()).sum(-1)
    torch.testing.assert_close(vae.elbo(x, loc, scale), log_likelihood + log_prior + entropy, rtol=1e-10, atol=0)


def test_optimal_mean_field_is_where_an_optimizer_ends():
    vae = linear_gaussian(pixels=6, latent_dim=2)
    vae.weight[:, 1] += vae.weight[:, 0]  # a correlated posterior
    x = torch.randn(6, dtype=torch.float64)
    exact, best = vae.posterior(x), vae.optimal_mean_field(x)

    def divergence(numbers):
        q = factorized(torch.from_numpy(numbers[:2]), torch.from_numpy(numbers[2:]).exp())
        return torch.distributions.kl_divergence(q, exact).item()

    found = optimize.minimize(divergence, np.zeros(4), method="BFGS", options={"gtol": 1e-7}).x
    np.testing.assert_allclose(best.mean, found[:2], atol=1e-5)
    np.testing.assert_allclose(best.stddev, np.exp(found[2:]), rtol=1e-5)
    assert isinstance(best, torch.distributions.Independent)
    assert (best.stddev < exact.variance.sqrt() - 0.01).all()  # 1 / P_dd, not the marginal variance


# ---- quadrature


@pytest.mark.parametrize("latent_dim", [1, 2])
@pytest.mark.parametrize("scale", [0.7, 1e-2, 30.0])
def test_quadrature_of_a_linear_gaussian(latent_dim, scale):
    vae = linear_gaussian(pixels=7, latent_dim=latent_dim)
    vae.scale = scale
    x = vae.mean + 2 * torch.randn(6, 7, dtype=torch.float64)
    evidence = quadrature(vae.model, vae.guide, x)
    torch.testing.assert_close(evidence.log_px, vae.log_px(x), rtol=1e-12, atol=1e-9)
    assert (evidence.mc_se < 1e-8).all()
    check_fields(evidence, 6)


def test_quadrature_does_not_depend_on_the_chunks():
    vae = linear_gaussian(latent_dim=2)
    x = torch.randn(5, 7, dtype=torch.float64)
    for batch_size in (100, 3000, 2**18):
        evidence = quadrature(vae.model, vae.guide, x, num_points=1025, batch_size=batch_size)
        torch.testing.assert_close(evidence.log_px, vae.log_px(x), rtol=0, atol=1e-9)
        assert (evidence.mc_se < 1e-4).all()


def test_quadrature_along_a_narrow_slanting_ridge():
    weight = double(1.0, 1.0, 1.0, 1.1).reshape(2, 2) * 10
    vae = linear_gaussian(pixels=2, latent_dim=2)
    vae.weight, vae.scale = weight, 0.02
    x = torch.cat([torch.randn(4, 2).double() @ weight.T, double(300.0, 310.0)[None]])  # the last: z at (20, 10)
    assert torch.linalg.cond(vae.posterior(x).covariance_matrix[0]) > 1000
    evidence = quadrature(vae.model, vae.guide, vae.mean + x)
    torch.testing.assert_close(evidence.log_px, vae.log_px(vae.mean + x), rtol=1e-9, atol=1e-7)
    assert (evidence.mc_se < 1e-6).all()


def test_quadrature_of_several_narrow_modes():
    # x = z^2 + noise, so a posterior has two modes, or one flat one; sin has many
    square = programs(
        lambda z: dist.Normal(z.square() - 1, 0.003).to_event(1), z=dist.Normal(double(0.3), 1.0).to_event(1)
    )
    values = (0.5, 3.0, -1.0)
    truth = []
    for v in values:
        modes = [-math.sqrt(1 + v), math.sqrt(1 + v)]
        truth.append(
            log_integral(
                lambda z: stats.norm.pdf(z, 0.3) * stats.norm.pdf(v, z**2 - 1, 0.003),  # noqa: B023
                -4,
                4,
                [m + d for m in modes for d in (-0.1, -0.01, 0, 0.01, 0.1)],
            )
        )
    evidence = quadrature(*square, double(*values)[:, None])
    np.testing.assert_allclose(evidence.log_px, truth, rtol=0, atol=1e-9)
    waves = programs(
        lambda z: dist.Normal(torch.sin(5 * z), 0.02).to_event(1), z=dist.Normal(double(0.3), 1.0).to_event(1)
    )
    peaks = [(math.asin(0.6) * (-1) ** k + math.pi * k) / 5 for k in range(-16, 17)]
    truth = log_integral(
        lambda z: stats.norm.pdf(z, 0.3) * stats.norm.pdf(0.6, np.sin(5 * z), 0.02), -9, 9.5, sorted(peaks)
    )
    evidence = quadrature(*waves, double(0.6)[:, None])
    assert evidence.log_px.item() == pytest.approx(truth, abs=1e-9)


def test_quadrature_of_a_posterior_a_thousand_times_narrower_than_the_prior():
    narrow = programs(
        lambda z: dist.Normal(torch.tanh(z), 5e-4).to_event(1), z=dist.Normal(double(0.0), 1.0).to_event(1)
    )
    values = (0.1, -0.6)
    truth = [
        log_integral(
            lambda z: stats.norm.pdf(z) * stats.norm.pdf(v, np.tanh(z), 5e-4),  # noqa: B023
            -1,
            1,
            [math.atanh(v) + d for d in (-0.01, -0.001, 0, 0.001, 0.01)],
        )
        for v in values
    ]
    evidence = quadrature(*narrow, double(*values)[:, None])
    np.testing.assert_allclose(evidence.log_px, truth, rtol=0, atol=1e-9)
    assert (evidence.mc_se < 1e-9).all()


@pytest.mark.parametrize("df", [1.0, 5.0])
def test_quadrature_where_the_posterior_keeps_the_priors_heavy_tail(df):
    heavy = programs(
        lambda z: dist.Bernoulli(logits=3 * z - 1).to_event(1), z=dist.StudentT(double(df), 0.0, 1.0).to_event(1)
    )
    one = integrate.quad(
        lambda z: stats.t(df).pdf(z) / (1 + math.exp(-min(max(3 * z - 1, -700), 700))), -np.inf, np.inf, epsabs=1e-13
    )[0]
    evidence = quadrature(*heavy, double(0.0, 1.0)[:, None])
    np.testing.assert_allclose(evidence.log_px, np.log([1 - one, one]), rtol=0, atol=1e-8)


def test_quadrature_over_bounded_supports():
    beta = programs(lambda z: dist.Normal(z, 0.3).to_event(1), z=dist.Beta(double(0.7), double(2.5)).to_event(1))
    values = (0.05, 0.4, 1.5)
    # in y with z = y^3 the integrand is bounded at zero
    truth = [
        log_integral(
            lambda y: 3 * y**2 * stats.beta(0.7, 2.5).pdf(y**3) * stats.norm.pdf(v, y**3, 0.3),  # noqa: B023
            1e-12,
            1,
            [0.01, 0.1],
        )
        for v in values
    ]
    evidence = quadrature(*beta, double(*values)[:, None])
    np.testing.assert_allclose(evidence.log_px, truth, rtol=0, atol=1e-9)
    check_fields(evidence, 3)


def test_quadrature_of_a_vae_with_a_uniform_prior():
    vae = VAE(
        priors.Uniform(2, -1.0, 2.0),
        likelihood=Conditional(MLP(2, 6, hidden=[5]), Gaussian(6, scale=0.4)),
        posterior=Conditional(MLP(6, 4, hidden=[5]), MeanField(2)),
    ).double()
    x = torch.rand(2, 6, dtype=torch.float64)
    default = quadrature(vae.model, vae.guide, x)
    evidence = quadrature(vae.model, vae.guide, x, num_points=2**16)
    assert ((default.log_px - evidence.log_px).abs() < default.mc_se).all()
    assert (default.mc_se < 1e-4).all()

    nodes, weights = np.polynomial.legendre.leggauss(200)
    z = torch.cartesian_prod(*[torch.as_tensor(0.5 + 1.5 * nodes)] * 2)
    weights = torch.as_tensor(np.log(np.multiply.outer(weights, weights) / 4).ravel())  # of the uniform density 1/9
    with torch.no_grad():
        pixels = vae.likelihood(z)
    log_likelihood = torch.as_tensor(stats.norm.logpdf(x[:, None].numpy(), pixels.mean, pixels.stddev)).sum(-1)
    torch.testing.assert_close(evidence.log_px, (weights + log_likelihood).logsumexp(1), rtol=0, atol=1e-9)


def test_quadrature_over_two_sites():
    # z2 | z1 ~ N(z1^2, 0.5), x | z2 ~ N(z2, 0.2): z2 integrates out in closed form
    model, guide = programs(
        lambda z1, z2: dist.Normal(z2, 0.2).to_event(1),
        z1=dist.Gamma(double(2.0), double(3.0)).to_event(1),
        z2=lambda z1: dist.Normal(z1.square(), 0.5).to_event(1),
    )
    values, sd = (0.3, 2.0), math.hypot(0.5, 0.2)
    truth = [
        log_integral(
            lambda z: stats.gamma(2, scale=1 / 3).pdf(z) * stats.norm.pdf(v, z**2, sd),  # noqa: B023
            0,
            20,
            [0.5, 1, 2],
        )
        for v in values
    ]
    evidence = quadrature(model, guide, double(*values)[:, None], num_points=2**16)
    np.testing.assert_allclose(evidence.log_px, truth, rtol=0, atol=1e-9)


def test_the_error_of_a_quadrature_that_is_too_coarse_is_seen():
    model, guide = programs(
        lambda z: dist.Normal(torch.sin(60 * z).sum(-1, keepdim=True), 0.02).to_event(1),
        z=dist.Normal(double(0.0, 0.0), 1.0).to_event(1),
    )
    evidence = quadrature(model, guide, double(0.5)[:, None], num_points=1024)
    assert evidence.mc_se > 0.01


def test_a_mode_too_narrow_for_the_grid_is_seen_to_be_unresolved_and_not_lost():
    # x = z^2 + noise: two equal modes; the coarse grid comes closer to one of them, by thousands of nats
    square = programs(lambda z: dist.Normal(z.square(), 1e-4).to_event(1), z=dist.Normal(double(0.0), 1.0).to_event(1))
    x = torch.linspace(0.5, 2, 10, dtype=torch.float64)
    evidence = quadrature(*square, x[:, None])
    assert (evidence.mc_se > 1e-3).all()
    truth = -x / 2 - 0.5 * math.log(2 * math.pi) - x.sqrt().log()  # N(z; 0, 1) / |2 z| at both roots
    evidence = quadrature(*square, x[:2, None], num_points=2**18)
    torch.testing.assert_close(evidence.log_px, truth[:2], rtol=0, atol=1e-6)


def test_quadrature_says_where_the_mass_was_not_found():
    # an integrand that grows without end
    model, guide = programs(
        lambda z: dist.Exponential(torch.exp(-3 * z)).to_event(1), z=dist.Cauchy(double(0.0), 1.0).to_event(1)
    )
    growing, _ = programs(
        lambda z: dist.Normal(0.0, 1.0).expand(z.shape).to_event(1), z=Improper(double(0.0)).to_event(1)
    )
    assert quadrature(growing, guide, double(0.0)[:, None], num_points=1024).mc_se.isinf()
    assert quadrature(model, guide, double(1.0)[:, None], num_points=1024).mc_se < 1e-3


class Improper(dist.Normal):
    """Draws as a normal does, with a density that grows."""

    def __init__(self, loc, scale=1.0, validate_args=None):
        super().__init__(loc, scale, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        return Improper(self.loc.expand(batch_shape))

    def log_prob(self, value):
        return value.abs()


def test_quadrature_counts_invalid_points():
    class Broken(dist.Normal):
        def expand(self, batch_shape, _instance=None):
            return Broken(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

        def log_prob(self, value):
            return torch.where(self.loc.abs() < 0.1, math.nan, super().log_prob(value))

    model, guide = programs(lambda z: Broken(z, 1.0).to_event(1), z=dist.Normal(double(0.0), 1.0).to_event(1))
    evidence = quadrature(model, guide, double(0.0)[:, None])
    assert evidence.num_invalid > 10
    assert evidence.log_px.isnan()


@pytest.mark.parametrize("dim", [3, 50])
def test_quadrature_refuses_more_dimensions(dim):
    vae = linear_gaussian(latent_dim=dim, pixels=60)
    with pytest.raises(ContractError, match=rf"1 or 2 latent dimensions.* D = {dim}: use annealed_importance_sampling"):
        quadrature(vae.model, vae.guide, torch.zeros(2, 60).double())


def test_quadrature_refuses_what_it_cannot_integrate():
    program, vae = BinaryLatents(), linear_gaussian(latent_dim=1)
    with pytest.raises(ContractError, match="site 'z' is discrete"):
        quadrature(program.model, program.guide, binary(2, pixels=6))
    x = torch.zeros(2, 7, dtype=torch.float64)
    with pytest.raises(ValueError, match="num_points must be at least 1024, got 10"):
        quadrature(vae.model, vae.guide, x, num_points=10)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        quadrature(vae.model, vae.guide, x, batch_size=0)
    grey = VAE(
        priors.Uniform(1),
        likelihood=Conditional(MLP(1, 6, hidden=[5]), Bernoulli(6)),
        posterior=Conditional(MLP(6, 2, hidden=[5]), MeanField(1)),
    ).double()
    with pytest.raises(ContractError, match="outside the support"):
        quadrature(grey.model, grey.guide, torch.full((2, 6), 0.3).double())


def test_quadrature_in_single_precision():
    vae, exact = small_vae(latent_dim=2, dtype=torch.float32), small_vae(latent_dim=2)
    exact.load_state_dict(vae.state_dict())
    x = binary(3)
    single = quadrature(vae.model, vae.guide, x.float())
    assert isinstance(single, Evidence)
    assert single.log_px.dtype == torch.float64
    torch.testing.assert_close(single.log_px, quadrature(exact.model, exact.guide, x).log_px, rtol=0, atol=1e-5)


# ---- enumeration


@pytest.mark.parametrize("batch_size", [1, 3, 2**15])
def test_enumeration_of_binary_latents(batch_size):
    program, x = BinaryLatents(), binary(5, pixels=6)
    evidence = enumeration(program.model, program.guide, x, batch_size=batch_size)
    torch.testing.assert_close(evidence.log_px, program.log_px(x), rtol=1e-12, atol=0)
    assert (evidence.mc_se == 0).all()
    check_fields(evidence, 5)


def test_enumeration_of_sites_that_depend_on_each_other():
    # a die with three sides, two coins each of whose bias it sets, a one-hot site, then x
    sides, bias = double(0.2, 0.5, 0.3), double(0.1, 0.6, 0.8, 0.3, 0.9, 0.5).reshape(3, 2)
    hot, scale = double(0.25, 0.75), double(0.4, 1.5)
    model, guide = programs(
        lambda die, coins, one_hot: dist.Normal(
            (die + 2 * coins[..., 0] - coins[..., 1]).unsqueeze(-1), (one_hot * scale).sum(-1, keepdim=True)
        ).to_event(1),
        die=dist.Categorical(sides),
        coins=lambda die: dist.Bernoulli(bias[die]).to_event(1),
        one_hot=lambda die, coins: dist.OneHotCategorical(hot),
    )
    x = double(0.3, -1.2, 4.0)[:, None]
    total = 0
    for die in range(3):
        for a in range(2):
            for b in range(2):
                for h in range(2):
                    p = sides[die] * hot[h]
                    p = p * (bias[die, 0] if a else 1 - bias[die, 0]) * (bias[die, 1] if b else 1 - bias[die, 1])
                    total = total + p.item() * stats.norm.pdf(x[:, 0], die + 2 * a - b, scale[h])
    np.testing.assert_allclose(enumeration(model, guide, x).log_px, np.log(total), rtol=1e-12)


def coin_and(other):
    return programs(
        lambda a, z: dist.Normal((a + z).unsqueeze(-1), 1.0).to_event(1), a=dist.Bernoulli(double(0.3)[0]), z=other
    )


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (dist.Normal(double(0.0)[0], 1.0), r"site 'z' is continuous \(Normal\).*quadrature.*importance_sampling"),
        (dist.Poisson(double(2.0)[0]), r"site 'z' \(Poisson on .*\) has no finite list of values.*importance_sampling"),
    ],
)
def test_enumeration_refuses_what_has_no_list_of_values(site, message):
    model, guide = coin_and(site)
    with pytest.raises(ContractError, match=message) as error:
        enumeration(model, guide, torch.zeros(2, 1).double())
    assert "\n" not in str(error.value)


def test_enumeration_refuses_more_values_than_its_limit():
    program, x = BinaryLatents(), binary(2, pixels=6)
    assert enumeration(program.model, program.guide, x, limit=8).log_px.isfinite().all()
    with pytest.raises(ContractError, match=r"take 8 values together \(2\^3 at 'z'\), more than the limit of 7"):
        enumeration(program.model, program.guide, x, limit=7)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        enumeration(program.model, program.guide, x, batch_size=0)
