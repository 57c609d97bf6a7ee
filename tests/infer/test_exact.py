import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import BinaryLatents, binary, linear_gaussian, small_vae
from scipy import integrate, optimize, stats

from pyro_vae import MLP, VAE, Bernoulli, Conditional, ContractError, Evidence, Gaussian, MeanField, quadrature
from pyro_vae.infer.evidence import cubature, exact
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
    assert all(field.shape == (batch,) for field in evidence if isinstance(field, torch.Tensor))
    assert evidence.reliable.all()
    assert (evidence.evaluations > 0).all()
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


def test_quadrature_in_chunks(monkeypatch):
    vae = linear_gaussian(latent_dim=2)
    x = torch.randn(5, 7, dtype=torch.float64)
    monkeypatch.setattr(exact, "_ROWS", 3000)  # two data, and a part of their points, at a time
    evidence = quadrature(vae.model, vae.guide, x, num_points=1025)
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert ((default.log_px - evidence.log_px).abs() < default.mc_se + 1e-9).all()
    assert (default.mc_se < 1e-4).all()

    nodes, weights = np.polynomial.legendre.leggauss(200)
    z = torch.cartesian_prod(*[torch.as_tensor(0.5 + 1.5 * nodes)] * 2)
    weights = torch.as_tensor(np.log(np.multiply.outer(weights, weights) / 4).ravel())  # of the uniform density 1/9
    with torch.no_grad():
        pixels = vae.likelihood(z)
    log_likelihood = torch.as_tensor(stats.norm.logpdf(x[:, None].numpy(), pixels.mean, pixels.stddev)).sum(-1)
    torch.testing.assert_close(evidence.log_px, (weights + log_likelihood).logsumexp(1), rtol=0, atol=1e-9)


@pytest.mark.slow
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
    evidence = quadrature(model, guide, double(*values)[:, None])
    np.testing.assert_allclose(evidence.log_px, truth, rtol=0, atol=1e-9)


def test_the_error_of_a_quadrature_that_is_too_coarse_is_seen():
    model, guide = programs(
        lambda z: dist.Normal(torch.sin(60 * z).sum(-1, keepdim=True), 0.02).to_event(1),
        z=dist.Normal(double(0.0, 0.0), 1.0).to_event(1),
    )
    evidence = quadrature(model, guide, double(0.5)[:, None], num_points=1024)
    assert evidence.mc_se > 0.01
    assert not evidence.reliable


def test_modes_too_narrow_for_the_grid_are_found_by_the_cells():
    # x = z^2 + noise: two equal modes; a coarse grid comes closer to one of them, by thousands of nats
    square = programs(lambda z: dist.Normal(z.square(), 1e-4).to_event(1), z=dist.Normal(double(0.0), 1.0).to_event(1))
    x = torch.linspace(0.5, 2, 10, dtype=torch.float64)
    truth = -x / 2 - 0.5 * math.log(2 * math.pi) - x.sqrt().log()  # N(z; 0, 1) / |2 z| at both roots
    evidence = quadrature(*square, x[:, None])
    torch.testing.assert_close(evidence.log_px, truth, rtol=0, atol=1e-6)
    assert evidence.reliable.all()


def test_quadrature_names_the_site_over_which_the_integral_diverges():
    # an integrand that grows without end
    model, guide = programs(
        lambda z: dist.Exponential(torch.exp(-3 * z)).to_event(1), z=dist.Cauchy(double(0.0), 1.0).to_event(1)
    )
    growing, _ = programs(
        lambda z: dist.Normal(0.0, 1.0).expand(z.shape).to_event(1), z=Improper(double(0.0)).to_event(1)
    )
    with pytest.raises(ContractError, match=r"integral over site 'z' diverges.*\Z") as error:
        quadrature(growing, guide, double(0.0)[:, None], num_points=1024)
    assert "\n" not in str(error.value)
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
    assert not evidence.reliable


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


# ---- quadrature knows when it is wrong: heavy tails, far and narrow posteriors, several modes, edges, funnels


def check_truth(programs_, x, truth, atol=1e-6):
    """Right and reliable, within its own error."""
    evidence = quadrature(*programs_, x)
    np.testing.assert_allclose(evidence.log_px, truth, rtol=0, atol=atol)
    assert evidence.reliable.all()
    assert ((evidence.log_px - torch.as_tensor(np.asarray(truth))).abs() < 4 * evidence.mc_se + 1e-9).all()
    return evidence


def around(centre, width):
    return [centre + k * width for k in (-20, -8, -4, -2, -1, 0, 1, 2, 4, 8, 20)]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("df", [1.0, 2.0])
def test_a_narrow_posterior_far_out_in_a_heavy_tail(df):
    model = programs(lambda z: dist.Normal(z, 0.1).to_event(1), z=dist.StudentT(double(df), 0.0, 1.0).to_event(1))
    values = (0.0, 21.0, -300.0, 5000.0)
    truth = [
        log_integral(lambda z: stats.t(df).pdf(z) * stats.norm.pdf(v, z, 0.1), v - 2, v + 2, around(v, 0.1)[1:-1])  # noqa: B023
        for v in values
    ]
    check_truth(model, double(*values)[:, None], truth)


@pytest.mark.slow
def test_two_modes_a_million_widths_apart_in_heavy_tails():
    model = programs(
        lambda z: dist.Normal(z.square(), 0.5).to_event(1), z=dist.StudentT(double(2.0), 0.0, 1.0).to_event(1)
    )
    values = (0.5, 100.0, 1e4)
    truth = []
    for v in values:
        root = math.sqrt(v)
        width = 0.25 / root
        density = lambda z: stats.t(2).pdf(z) * stats.norm.pdf(v, z * z, 0.5)  # noqa: B023, E731
        low = max(0.0, root - 25 * width)
        points = [p for p in around(root, width) if p > low]
        truth.append(math.log(2) + log_integral(density, low, root + 25 * width, points))
    check_truth(model, double(*values)[:, None], truth)


def test_four_narrow_modes_in_two_dimensions():
    model = programs(
        lambda z: dist.Normal(z.square(), 0.02).to_event(1), z=dist.Normal(double(0.0, 0.0), 1.0).to_event(1)
    )
    truth = 0.0
    for v in (1.0, 2.0):
        root = math.sqrt(v)
        width = 0.01 / root
        density = lambda z: stats.norm.pdf(z) * stats.norm.pdf(v, z * z, 0.02)  # noqa: B023, E731
        truth += math.log(2) + log_integral(density, root - 25 * width, root + 25 * width, around(root, width))
    check_truth(model, double(1.0, 2.0)[None], [truth])


def test_a_mode_of_one_percent_that_is_thirty_times_as_narrow():
    slope = -30.0
    model = programs(
        lambda z: dist.Normal(torch.where(z > 0, z, slope * (z + 2)), 0.05).to_event(1),
        z=dist.Normal(double(0.0), 1.0).to_event(1),
    )
    narrow = log_integral(
        lambda z: stats.norm.pdf(z) * stats.norm.pdf(1.5, slope * (z + 2), 0.05), -3, 0, around(-2.05, 0.05 / 30)
    )
    wide = log_integral(lambda z: stats.norm.pdf(z) * stats.norm.pdf(1.5, z, 0.05), 0, 4, around(1.5, 0.05))
    assert math.exp(narrow - wide) == pytest.approx(0.0126, abs=0.0005)
    for seed in range(4):
        torch.manual_seed(seed)
        check_truth(model, double(1.5)[:, None], [np.logaddexp(narrow, wide)])


def test_a_posterior_at_and_beyond_the_edge_of_a_uniform_prior():
    model = programs(lambda z: dist.Normal(z, 0.01).to_event(1), z=dist.Uniform(double(-1.0), double(1.0)).to_event(1))
    values = np.array([0.0, 0.999, 1.0, 1.05])
    truth = np.log(0.5 * (stats.norm.cdf((1 - values) / 0.01) - stats.norm.cdf((-1 - values) / 0.01)))
    check_truth(model, double(*values)[:, None], truth)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1.0, 3.0])
def test_a_funnel(width):
    # b given a integrates out: x ~ N(0, exp(a) + 0.1^2)
    model = programs(
        lambda a, b: dist.Normal(b, 0.1).to_event(1),
        a=dist.Normal(double(0.0), width).to_event(1),
        b=lambda a: dist.Normal(0.0, torch.exp(a / 2)).to_event(1),
    )
    values = (0.0, 1.0, 10.0)
    truth = [
        log_integral(
            lambda a: stats.norm.pdf(a, 0, width) * stats.norm.pdf(v, 0, math.sqrt(math.exp(a) + 0.01)),  # noqa: B023
            -15 * width,
            12 * width,
            np.linspace(-14, 11, 60) * width,
        )
        for v in values
    ]
    check_truth(model, double(*values)[:, None], truth, atol=1e-5)


@pytest.mark.slow
def test_unknown_mean_and_scale_with_heavy_priors_far_from_the_data():
    model = programs(
        lambda a, s: dist.Normal(a.expand(*a.shape[:-1], 5), s).to_event(1),
        a=dist.StudentT(double(2.0), 0.0, 1.0).to_event(1),
        s=dist.HalfCauchy(double(1.0)).to_event(1),
    )
    x = double(50.0, 50.1, 49.9, 50.2, 49.7)
    t = np.linspace(-14, 8, 2001)  # log s, and a in units of its conditional width
    width = np.exp(t) / math.sqrt(5)
    a = x.mean().item() + width[:, None] * np.linspace(-40, 40, 2001)
    log_f = stats.t(2).logpdf(a) + (stats.halfcauchy.logpdf(np.exp(t)) + t + np.log(width))[:, None]
    log_f += sum(stats.norm.logpdf(v, a, np.exp(t)[:, None]) for v in x.tolist())
    truth = np.logaddexp.reduce(log_f.ravel()) + math.log(80 / 2000 * 22 / 2000)
    torch.manual_seed(2)  # of the prior's draws that say where to look: a third of them do not suffice, and it says so
    check_truth(model, x[None], [truth], atol=1e-5)


def test_a_curved_ridge_that_is_too_narrow_is_not_called_reliable():
    model, guide = programs(
        lambda a, b: dist.Normal(b - a.square(), 1e-3).to_event(1),
        a=dist.Normal(double(0.0), 1.0).to_event(1),
        b=dist.Normal(double(0.0), 2.0).to_event(1),
    )
    x = double(1.0)[:, None]
    truth = log_integral(
        lambda a: stats.norm.pdf(a) * stats.norm.pdf(1.0, -a * a, math.hypot(2, 1e-3)),
        -12,
        12,
        np.linspace(-11, 11, 45),
    )
    evidence = quadrature(model, guide, x, num_points=4096)
    assert not evidence.reliable
    assert (evidence.log_px - truth).abs() < 4 * evidence.mc_se


def test_a_datum_without_any_finite_density_is_refused_in_one_line():
    class Broken(dist.Normal):
        def expand(self, batch_shape, _instance=None):
            return Broken(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

        def log_prob(self, value):
            return torch.where(value > 1, -math.inf, super().log_prob(value))

    model, guide = programs(lambda z: Broken(z, 1.0).to_event(1), z=dist.Normal(double(0.0), 1.0).to_event(1))
    with pytest.raises(ContractError, match="finite density: see the log-probability of model site 'x'") as error:
        quadrature(model, guide, double(0.0, 2.0)[:, None])
    assert "\n" not in str(error.value)


# ---- cells


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("width", [1.0, 1e-2])
def test_cells_find_several_peaks_of_any_width(dim, width):
    places = double(-2.1, 0.4, 1.234)

    def log_f(t):
        each = stats.norm.logpdf(t.unsqueeze(-2).numpy(), places[:, None].numpy(), width).sum(-1)
        return torch.as_tensor(np.logaddexp.reduce(each, axis=-1))

    mesh = cubature.integrate(
        log_f,
        lambda low, high: torch.zeros_like(low[..., 0]),
        double(-35.0, -5.0, -1.0, 1.0, 5.0, 35.0),
        2,
        dim,
        2**17,
        1e-6,
    )
    assert mesh.centre.shape[1:] == (2, dim)
    torch.testing.assert_close(mesh.log_total, double(3.0, 3.0).log(), rtol=0, atol=2e-6)
    assert (mesh.error < 1e-3).all()
    volume = (2 * mesh.half).prod(-1).sum(0)
    torch.testing.assert_close(volume, double(70.0, 70.0) ** dim)  # cells fill the box


def test_the_rule_of_cells_is_exact_for_polynomials_of_degree_22():
    def log_f(t):
        return (t[..., 0] ** 22 + 1).log()

    mesh = cubature.integrate(log_f, lambda low, high: torch.zeros_like(low[..., 0]), double(-1.0, 1.0), 1, 1, 1, 1e-6)
    assert mesh.log_total.exp().item() == pytest.approx(2 / 23 + 2, rel=1e-13)


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
