"""Annealed importance sampling, the Laplace approximation and the latents they move through, against exact evidence."""

import math
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import BinaryLatents, GaussianChain, SeparableBernoulli, binary, linear_gaussian, small_vae
from scipy import integrate, optimize, special, stats

from pyro_vae import (
    MLP,
    VAE,
    Annealing,
    Bernoulli,
    Conditional,
    ContractError,
    Evidence,
    LinearGaussianVAE,
    MeanField,
    StandardNormal,
    TwoLayerVAE,
    annealed_importance_sampling,
    bidirectional_monte_carlo,
    importance_sampling,
    log_weights,
    quadrature,
)
from pyro_vae.infer.evidence import annealed
from pyro_vae.infer.evidence.annealed import Sandwich
from pyro_vae.infer.evidence.chains import Path, evaluator
from pyro_vae.infer.evidence.importance import CHUNK, reduce_log_weights
from pyro_vae.infer.evidence.laplace import laplace_approximation, observations_at_once
from pyro_vae.infer.evidence.result import difference_estimate, t_factor
from pyro_vae.infer.evidence.rounds import coordinates_of
from pyro_vae.infer.supports import Latents
from pyro_vae.parts import priors

STARTS = ["laplace", "guide", "prior"]


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def programs(likelihood, prior, posterior=None):
    """One latent site; without a posterior the guide is the prior."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", likelihood(pyro.sample("z", prior)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", prior if posterior is None else posterior(x))

    return model, guide


def normal_guide(loc, scale):
    """Normal of ``loc``, a function of x, whatever the posterior is."""

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc(x), scale).to_event(1))

    return guide


def far_guide(dim):
    return normal_guide(lambda x: x.new_full((len(x), dim), 4.0), 0.1)


def mild_linear_gaussian(dim):
    """Its posterior is about half as wide as its prior in each direction, so that short anneals do; and data of it."""
    pixels = 2 * dim + 5
    vae = linear_gaussian(pixels, dim)
    vae.scale = 0.6 * math.sqrt(pixels)
    z = torch.randn(8, dim, dtype=torch.float64)
    return vae, z @ vae.weight.mT + vae.mean + vae.scale * torch.randn(8, pixels, dtype=torch.float64)


def near_guide(vae):
    """The posterior's mean, shifted; scales that are wrong by a third."""
    scale = 1.3 * vae.posterior(vae.mean).variance.sqrt()
    return normal_guide(lambda x: vae.posterior(x).mean + 0.3 * scale, scale)


def bumpy():
    """A skewed posterior in one dimension: z ~ N(0, 1), x ~ Bernoulli(logit = 6 z - 1)."""
    model, guide = programs(
        lambda z: dist.Bernoulli(logits=6 * z - 1).to_event(1),
        dist.Normal(double(0.0), 1.0).to_event(1),
        lambda x: dist.Normal(x - 0.4, 0.7).to_event(1),
    )
    one = integrate.quad(lambda z: stats.norm.pdf(z) * special.expit(6 * z - 1), -12, 12, epsabs=1e-13)[0]
    return model, guide, double(0.0, 1.0)[:, None], double(1 - one, one).log()


def wide_uniform_vae():
    return VAE(
        priors.Uniform(2, -1.0, 2.0),
        likelihood=Conditional(MLP(2, 6, hidden=[5]), Bernoulli(6)),
        posterior=Conditional(MLP(6, 4, hidden=[5]), MeanField(2)),
    ).double()


def two_layer_vae():
    return TwoLayerVAE(
        StandardNormal(2),
        latent=Conditional(MLP(2, 6, hidden=[5]), MeanField(3)),
        likelihood=Conditional(MLP(3, 6, hidden=[5]), Bernoulli(6)),
        posterior=Conditional(MLP(6, 6, hidden=[5]), MeanField(3)),
        top_posterior=Conditional(MLP(3, 4, hidden=[5]), MeanField(2)),
    ).double()


def of(vae):
    return vae.model, vae.guide


def pixels_of(z):
    """Bernoulli pixels of a scalar."""
    return dist.Bernoulli(logits=z.unsqueeze(-1) * torch.linspace(-1, 2, 6).double()).to_event(1)


PROGRAMS = {
    "StandardNormal": (3, lambda: of(small_vae(pixels=6))),
    "UniformPrior": (2, lambda: of(wide_uniform_vae())),
    "TwoLayerVAE": (5, lambda: of(two_layer_vae())),
    "scalar": (1, lambda: programs(pixels_of, dist.Gamma(double(2.0)[0], 1.5), lambda x: dist.Gamma(1 + x[..., 0], 1))),
    "simplex": (
        2,
        lambda: programs(
            lambda z: dist.Bernoulli(torch.cat([z, 1 - z], -1)).to_event(1),
            dist.Dirichlet(double(2.0, 1.0, 3.0)),
            lambda x: dist.Dirichlet(1.5 + x[..., :3]),
        ),
    ),
    "matrix": (
        6,
        lambda: programs(
            lambda z: dist.Bernoulli(logits=z.flatten(-2)).to_event(1),
            dist.Normal(torch.zeros(2, 3).double(), 1).to_event(2),
        ),
    ),
}


# ---- latents


@pytest.mark.parametrize("name", PROGRAMS)
def test_latents_score_what_log_weights_scores(name):
    dim, make = PROGRAMS[name]
    model, guide = make()
    x = binary(4, pixels=6)
    latents = Latents(model, guide, x)
    assert latents.dim == dim
    torch.manual_seed(5)
    log_w = log_weights(model, guide, x, 7)
    torch.manual_seed(5)
    u = latents.sample_guide(7)
    assert u.shape == (7, 4, dim)
    log_prior, log_likelihood = latents.log_joint(u)
    torch.testing.assert_close(log_prior + log_likelihood - latents.log_guide(u), log_w, rtol=1e-8, atol=1e-8)
    for each, again in zip(
        (log_prior, log_likelihood, latents.log_guide(u)), latents.log_joint_and_guide(u), strict=True
    ):
        torch.testing.assert_close(each, again)
    part = latents.select(slice(1, 3))
    torch.testing.assert_close(sum(part.log_joint(u[:, 1:3])), (log_prior + log_likelihood)[:, 1:3])
    torch.testing.assert_close(part.log_guide(u[:, 1:3]), latents.log_guide(u)[:, 1:3])
    assert part.sample_guide(3).shape == (3, 2, dim)
    assert latents.sample_prior(9).shape == (9, 4, dim)


@pytest.mark.parametrize(
    "prior",
    [
        dist.Uniform(double(-1.0), double(2.0)).to_event(1),
        dist.Beta(double(2.0)[0], 3.0),
        dist.Gamma(double(2.0), 3.0).to_event(1),
        dist.Dirichlet(double(2.0, 3.0)),
        dist.Dirichlet(double(2.0, 1.5, 3.0)),
    ],
    ids=["Uniform", "Beta", "Gamma", "Dirichlet2", "Dirichlet3"],
)
def test_the_density_of_u_integrates_to_one(prior):
    model, guide = programs(lambda z: pixels_of(z.sum(-1) if prior.event_shape else z), prior)
    latents = Latents(model, guide, binary(1, pixels=6))
    grid = torch.linspace(-20, 20, 401, dtype=torch.float64)
    u = torch.cartesian_prod(*[grid] * latents.dim).view(-1, 1, latents.dim)
    for log_density in (latents.log_joint(u)[0], latents.log_guide(u)):
        assert (log_density.logsumexp(0) + latents.dim * math.log(0.1)).item() == pytest.approx(0, abs=1e-6)


def test_the_density_of_two_bounded_sites_integrates_to_one():
    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Gamma(double(2.0)[0], 1.5))
            pyro.sample("b", dist.Uniform(0 * a, a))  # the support depends on the site before

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            a = pyro.sample("a", dist.Gamma(double(2.0)[0], 1.5))
            b = pyro.sample("b", dist.Uniform(0 * a, a))
            pyro.sample("x", pixels_of(b), obs=x)

    u = torch.cartesian_prod(*[torch.linspace(-20, 20, 401, dtype=torch.float64)] * 2).unsqueeze(1)
    latents = Latents(model, guide, binary(1, pixels=6))
    for log_density in (latents.log_joint(u)[0], latents.log_guide(u)):
        assert (log_density.logsumexp(0) + 2 * math.log(0.1)).item() == pytest.approx(0, abs=1e-6)


def test_log_joint_is_prior_and_likelihood_apart():
    vae, x = linear_gaussian(), torch.randn(3, 7, dtype=torch.float64)
    u = torch.randn(5, 3, 2, dtype=torch.float64)
    log_prior, log_likelihood = Latents(vae.model, vae.guide, x).log_joint(u)
    np.testing.assert_allclose(log_prior, stats.norm.logpdf(u).sum(-1), rtol=1e-10)
    pixels = u @ vae.weight.mT + vae.mean
    np.testing.assert_allclose(log_likelihood, stats.norm.logpdf(x, pixels, vae.scale).sum(-1), rtol=1e-10)


def test_simulated_pairs_have_the_joint_distribution():
    vae = linear_gaussian(pixels=4, latent_dim=2)
    size = 40_000
    x, u = Latents(vae.model, vae.guide, torch.zeros(size, 4).double()).simulate()
    assert (x.shape, u.shape) == ((size, 4), (size, 2))
    observed = vae.weight @ vae.weight.mT + vae.scale**2 * torch.eye(4).double()
    covariance = torch.cat(
        [torch.cat([observed, vae.weight], 1), torch.cat([vae.weight.mT, torch.eye(2).double()], 1)], 0
    )
    variance = covariance.diagonal()
    both = torch.cat([x, u], 1)
    error = (both.mean(0) - torch.cat([vae.mean, double(0.0, 0.0)])) / (variance / size).sqrt()
    assert (error.abs() < 4).all()
    spread = ((variance[:, None] * variance + covariance.square()) / size).sqrt()  # of a sample covariance
    assert (((both.T.cov() - covariance) / spread).abs() < 4).all()


def test_simulate_and_sample_prior_read_u_from_bounded_draws():
    vae = wide_uniform_vae()
    latents = Latents(vae.model, vae.guide, binary(4000, pixels=6))
    x, u = latents.simulate()
    assert set(x.unique().tolist()) == {0, 1}
    for draws in (u, latents.prior_draws(4000)):
        assert stats.kstest(draws.flatten().numpy(), stats.logistic.cdf).pvalue > 0.01  # the logit of a uniform


@pytest.mark.parametrize(
    "estimate",
    [
        lambda *programs: importance_sampling(*programs, 10, proposal="laplace"),
        annealed_importance_sampling,
        bidirectional_monte_carlo,
        Latents,
    ],
    ids=["importance_sampling", "annealed_importance_sampling", "bidirectional_monte_carlo", "Latents"],
)
def test_a_discrete_site_is_refused_by_name(estimate):
    program = BinaryLatents()
    with pytest.raises(
        ContractError, match=r"site 'z' is discrete, on .*use importance_sampling .*enumeration"
    ) as error:
        estimate(program.model, program.guide, binary(2, pixels=6))
    assert "\n" not in str(error.value)


# ---- Laplace approximation


@pytest.mark.parametrize("dim", [2, 10, 50])
def test_laplace_approximation_of_a_gaussian_posterior_is_exact(dim):
    vae = linear_gaussian(2 * dim + 5, dim)
    x = torch.randn(4, 2 * dim + 5, dtype=torch.float64)
    with torch.no_grad():
        found = laplace_approximation(Latents(vae.model, far_guide(dim), x))
    exact = vae.posterior(x)
    torch.testing.assert_close(found.loc, exact.mean, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.factor @ found.factor.mT, exact.covariance_matrix, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.log_det, torch.linalg.slogdet(found.factor).logabsdet)


def test_laplace_approximation_without_refinement_is_laplaces_own():
    model, guide, x, _ = bumpy()
    found = laplace_approximation(Latents(model, guide, x), num_steps=200, num_polishing=50, num_refinements=0)
    for b, sign in enumerate((-1, 1)):
        mode = optimize.minimize_scalar(
            lambda z: 0.5 * z**2 - special.log_expit(sign * (6 * z - 1)),  # noqa: B023
            (-1, 1),
            tol=1e-10,
        ).x
        p = special.expit(6 * mode - 1)
        assert found.loc[b].item() == pytest.approx(mode, abs=1e-3)
        assert found.factor[b].item() == pytest.approx((1 + 36 * p * (1 - p)) ** -0.5, rel=2e-3)


def test_refinement_finds_the_gaussian_nearest_in_kl():
    model, guide, x, log_px = bumpy()
    latents = Latents(model, guide, x)
    plain = laplace_approximation(latents, num_refinements=0)
    default = laplace_approximation(latents)
    long = laplace_approximation(latents, num_refinements=60, num_samples=4000)
    nodes, weights = np.polynomial.hermite_e.hermegauss(150)

    def divergence(loc, scale, b):
        z = loc + scale * nodes
        log_joint = stats.norm.logpdf(z) + special.log_expit((-1, 1)[b] * (6 * z - 1))
        gap = stats.norm.logpdf(z, loc, scale) - log_joint + log_px[b].item()
        return (weights * gap).sum() / math.sqrt(2 * math.pi)

    for b in range(2):
        best = optimize.minimize(lambda v: divergence(v[0], math.exp(v[1]), b), [0.0, 0.0]).x  # noqa: B023
        least = divergence(best[0], math.exp(best[1]), b)
        assert long.loc[b].item() == pytest.approx(best[0], abs=0.02)
        assert long.factor[b].item() == pytest.approx(math.exp(best[1]), rel=0.03)
        first, last = (divergence(each.loc[b].item(), each.factor[b].item(), b) for each in (plain, default))
        assert last - least < 0.4 * (first - least)
    torch.testing.assert_close(default.log_det, torch.linalg.slogdet(default.factor).logabsdet)


def test_coordinates_there_and_back_again():
    vae, x = small_vae(), binary(4)
    coordinates = laplace_approximation(Latents(vae.model, vae.guide, x))
    e = torch.randn(5, 4, 3, dtype=torch.float64)
    u = coordinates.to_latents(e)
    torch.testing.assert_close(coordinates.from_latents(u), e)
    torch.testing.assert_close(u[2, 3], coordinates.loc[3] + coordinates.factor[3] @ e[2, 3])
    torch.testing.assert_close(coordinates.select(slice(1, 3)).to_latents(e[:, 1:3]), u[:, 1:3])
    torch.testing.assert_close(coordinates.log_det, torch.linalg.slogdet(coordinates.factor).logabsdet)


@pytest.mark.parametrize("start", STARTS)
def test_estimates_leave_no_gradients_and_need_none(start):
    vae, x = small_vae(), binary(3)
    with torch.no_grad():
        evidence = annealed_importance_sampling(vae.model, vae.guide, x, Annealing(num_temperatures=3, start=start))
        coordinates = laplace_approximation(Latents(vae.model, vae.guide, x))
    sandwich = bidirectional_monte_carlo(vae.model, vae.guide, x, Annealing(num_temperatures=3, start=start))
    for each in (*tensors_of(evidence), *coordinates, *tensors_of(sandwich.lower), *tensors_of(sandwich.upper)):
        assert not each.requires_grad
    assert all(p.grad is None for p in vae.parameters())


# ---- importance sampling from the Laplace approximation


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dim", [2, 10, 50])
def test_laplace_proposal_is_exact_for_a_gaussian_posterior(dim):
    vae, x = mild_linear_gaussian(dim)
    evidence = importance_sampling(vae.model, far_guide(dim), x, 100, proposal="laplace")
    torch.testing.assert_close(evidence.log_px, vae.log_px(x), rtol=0, atol=1e-7)
    assert (evidence.mc_se < 1e-7).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "wider", [{"widening": 1.3}, {"df": 5.0}, {"df": 5.0, "widening": 1.2}, {"widening": 1.3, "chunk": 200_000}]
)
def test_wider_laplace_proposals_are_normalized(wider, monkeypatch):
    wider = dict(wider)
    monkeypatch.setitem(CHUNK, "cpu", wider.pop("chunk", CHUNK["cpu"]))
    vae = linear_gaussian()
    x = torch.randn(20, 7, dtype=torch.float64)
    evidence = importance_sampling(vae.model, far_guide(2), x, 4000, proposal="laplace", **wider)
    assert ((evidence.log_px - vae.log_px(x)).abs() < 4 * evidence.mc_se).all()
    assert ((evidence.mc_se > 0.002) & (evidence.mc_se < 0.02)).all()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("df", [None, 5.0])
def test_a_proposal_widened_too_far_is_worse(df):
    vae, x = linear_gaussian(), torch.randn(5, 7, dtype=torch.float64)
    narrow, wide = (
        importance_sampling(vae.model, vae.guide, x, 2000, proposal="laplace", widening=widening, df=df)
        for widening in (1.2, 2.4)
    )
    assert (wide.mc_se > 1.5 * narrow.mc_se).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"proposal": "prior"}, "proposal must be guide or laplace, got prior"),
        ({"proposal": "laplace", "widening": 0.0}, "widening and df must be positive, got 0.0 and None"),
        ({"proposal": "laplace", "df": -1.0}, "widening and df must be positive, got 1.0 and -1.0"),
        ({"proposal": "laplace", "widening": math.nan}, "must be positive"),
        ({"widening": 1.2}, "are for proposal laplace"),
        ({"df": 5.0}, "are for proposal laplace"),
    ],
)
def test_laplace_proposal_refuses_bad_arguments(arguments, message):
    vae = small_vae()
    with pytest.raises(ValueError, match=message):
        importance_sampling(vae.model, vae.guide, binary(2), 10, **arguments)


# ---- annealed importance sampling


def tensors_of(evidence):
    fields = [field for field in evidence if isinstance(field, torch.Tensor)]
    assert len(fields) == 8  # all but num_samples
    return fields


def check_evidence(evidence, batch, acceptance=True):
    assert all(field.shape == (batch,) for field in tensors_of(evidence))
    assert evidence.log_px.dtype == torch.float64
    assert (evidence.num_invalid == 0).all()
    if acceptance:
        assert ((evidence.acceptance > 0) & (evidence.acceptance <= 1)).all()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dim", [2, 10, 50])
def test_annealing_from_laplace_is_all_but_exact_for_a_gaussian_posterior(dim):
    vae = linear_gaussian(2 * dim + 5, dim)
    x = torch.randn(4, 2 * dim + 5, dtype=torch.float64)
    evidence = annealed_importance_sampling(vae.model, far_guide(dim), x)
    error = evidence.log_px - vae.log_px(x)
    assert (error.abs() < 4 * evidence.mc_se).all()
    assert (evidence.mc_se < 0.1).all()  # but for a start that is a twentieth too wide it would be zero
    assert evidence.reliable.all()
    check_evidence(evidence, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "start", "num"),
    [(2, "guide", 40), (10, "guide", 40), (50, "guide", 100), (2, "prior", 40), (10, "prior", 100), (50, "prior", 300)],
)
def test_annealing_from_the_guide_and_the_prior(dim, start, num):
    vae, x = mild_linear_gaussian(dim)
    evidence = annealed_importance_sampling(vae.model, near_guide(vae), x, Annealing(num_temperatures=num, start=start))
    error = evidence.log_px - vae.log_px(x)
    assert (error.abs() < 4 * evidence.mc_se + 0.05).all(), error / evidence.mc_se
    assert abs(error.mean().item()) < 4 * evidence.mean()[2]
    assert (evidence.mc_se < 0.6).all()
    check_evidence(evidence, 8)


@pytest.mark.slow
@pytest.mark.parametrize(("start", "num"), [("laplace", 60), ("guide", 100), ("prior", 300)])
def test_annealing_of_a_hard_separable_model(start, num):
    program, x = SeparableBernoulli(), binary(30, pixels=20)
    evidence = annealed_importance_sampling(program.model, program.guide, x, Annealing(32, num, start))
    error = evidence.log_px - program.log_px(x)
    assert abs(error.mean().item()) < 4 * evidence.mean()[2]
    assert abs(error.mean().item()) < 0.05
    assert (error.abs() < 5 * evidence.mc_se).all()
    assert error.square().mean().sqrt() < 0.15
    check_evidence(evidence, 30)


@pytest.mark.slow
def test_annealing_beats_importance_sampling_from_the_same_start():
    program, x = SeparableBernoulli(), binary(30, pixels=20)
    exact = program.log_px(x)
    plain = importance_sampling(program.model, program.guide, x, 32, proposal="laplace").log_px - exact
    annealed = annealed_importance_sampling(program.model, program.guide, x, Annealing(32, 60)).log_px - exact
    assert plain.square().mean().sqrt() > 5 * annealed.square().mean().sqrt()


@pytest.mark.parametrize("schedule", ["linear", "sigmoid"])
@pytest.mark.parametrize("start", STARTS)
def test_weights_of_few_temperatures_are_unbiased(start, schedule):
    model, guide, x, log_px = bumpy()
    settings = Annealing(20_000, 3, start, schedule=schedule)
    evidence = annealed_importance_sampling(model, guide, x, settings, memory=2**30)
    ratio = (evidence.log_px - log_px).exp()  # a mean of 20,000 weights, so its logarithm is not yet taken
    assert ((ratio - 1).abs() < 4 * evidence.mc_se).all()
    assert (evidence.mc_se < 0.02).all()
    check_evidence(evidence, 2)


def path_of(program, guide, x, settings):
    """What a chain needs, with the coordinates of the start."""
    latents = Latents(program.model, guide, x)
    kind = "normal" if settings.start == "laplace" else settings.start
    coordinates = laplace_approximation(latents) if kind == "normal" else coordinates_of(latents, kind)
    return Path(latents, coordinates, kind, settings.num_leapfrogs, evaluator(latents, kind, False))


def gaussian_between(vae, x, beta):
    """prior^(1 - beta) joint^beta of a linear-Gaussian VAE."""
    precision = torch.eye(vae.weight.shape[1]).double() + beta * vae.weight.mT @ vae.weight / vae.scale**2
    covariance = torch.linalg.inv(precision)
    loc = beta * (x - vae.mean) @ vae.weight @ covariance / vae.scale**2
    return dist.MultivariateNormal(loc, precision_matrix=precision)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize(("length", "least", "most"), [(0.5, 0.9, 1.0), (1.4, 0.2, 0.85)])
def test_transitions_leave_the_density_invariant(beta, length, least, most):
    torch.manual_seed(1)
    vae = linear_gaussian(pixels=5, latent_dim=3)
    x = torch.randn(1, 5, dtype=torch.float64)
    path = path_of(vae, far_guide(3), x, Annealing(start="prior"))
    target = gaussian_between(vae, x, beta)
    size = 4000
    e = path.coordinates.from_latents(target.sample((size,)))
    e_scale = path.coordinates.from_latents(target.sample((size,))).std((0, 1)).min()
    state, rates = path.evaluate(e), []
    for _ in range(30):
        state, acceptance = path.transition(state, torch.tensor(beta).double(), (length * e_scale).expand(1))
        rates.append(acceptance)
    assert least < torch.cat(rates).mean() < most
    moved = (state.e - e).square().sum(-1).sqrt()
    assert (moved > 0).double().mean() > 0.99
    white = torch.linalg.solve(target.scale_tril, (path.coordinates.to_latents(state.e) - target.loc).unsqueeze(-1))
    white = white.view(size, 3)
    assert stats.kstest(white.square().sum(-1).numpy(), stats.chi2(3).cdf).pvalue > 0.005
    for d in range(3):
        assert stats.kstest(white[:, d].numpy(), stats.norm.cdf).pvalue > 0.005
    assert (white.mean(0).abs() < 4 / size**0.5).all()
    assert ((white.T.cov() - torch.eye(3).double()).abs() < 4 * 2**0.5 / size**0.5).all()


@pytest.mark.parametrize("start", STARTS)
def test_short_trajectories_are_accepted_because_gradients_are_right(start):
    vae, x = small_vae(), binary(4)
    path = path_of(vae, vae.guide, x, Annealing(start=start))
    state = path.evaluate(path.draw(200))
    for beta in (0.2, 0.9):
        rates = [path.transition(state, torch.tensor(beta), double(size).expand(4))[1] for size in (0.02, 0.04)]
        lost = 1 - torch.stack(rates).mean(1)
        assert (lost < 1e-3).all(), lost  # of second order in the step, so that a wrong gradient loses far more


def test_transitions_reach_the_posterior_from_elsewhere():
    vae = linear_gaussian(pixels=5, latent_dim=3)
    x = torch.randn(1, 5, dtype=torch.float64)
    path = path_of(vae, far_guide(3), x, Annealing(start="laplace"))
    state = path.evaluate(torch.full((2000, 1, 3), 2.0).double())
    for _ in range(30):
        state, _ = path.transition(state, torch.ones(()).double(), double(0.5))
    white = state.e.view(-1).numpy()  # coordinates in which the posterior is standard normal
    assert stats.kstest(white, stats.norm.cdf).pvalue > 0.005


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_annealing_over_bounded_support(start):
    vae, x = wide_uniform_vae(), binary(10, pixels=6)
    with torch.no_grad():
        list(vae.likelihood.parameters())[-2].mul_(4)
    exact = quadrature(vae.model, vae.guide, x).log_px
    evidence = annealed_importance_sampling(vae.model, vae.guide, x, Annealing(num_temperatures=50, start=start))
    error = evidence.log_px - exact
    assert (error.abs() < 5 * evidence.mc_se + 0.01).all()
    assert abs(error.mean().item()) < 4 * evidence.mean()[2]
    assert evidence.mean()[2] < 0.06
    check_evidence(evidence, 10)


@pytest.mark.slow
@pytest.mark.parametrize(("start", "num"), [("laplace", 5), ("guide", 80), ("prior", 80)])
def test_annealing_over_two_sites(start, num):
    program = GaussianChain()
    x = 2 * torch.randn(10, 5, dtype=torch.float64)
    evidence = annealed_importance_sampling(program.model, program.guide, x, Annealing(32, num, start))
    error = evidence.log_px - program.log_px(x)
    assert (error.abs() < 5 * evidence.mc_se + 0.01).all()
    assert abs(error.mean().item()) < 4 * evidence.mean()[2] + 1e-4
    assert evidence.mean()[2] < 0.2
    check_evidence(evidence, 10)


@pytest.mark.slow
def test_the_pilot_aims_at_the_error_asked_for():
    program, x = SeparableBernoulli(), binary(20, pixels=20)
    for error in (0.3, 0.1):
        evidence = annealed_importance_sampling(program.model, program.guide, x, Annealing(error=error))
        assert 0.4 * error < evidence.mc_se.median() < 1.4 * error


def test_schedules():
    for schedule in ("linear", "sigmoid"):
        beta = Annealing(schedule=schedule).temperatures(40)
        assert (beta.shape, beta[0].item(), beta[-1].item()) == ((41,), 0, 1)
        assert (beta.diff() > 0).all()
        torch.testing.assert_close(beta + beta.flip(0), torch.ones(41).double())
    torch.testing.assert_close(Annealing().temperatures(4), double(0, 0.25, 0.5, 0.75, 1))
    gaps = Annealing(schedule="sigmoid").temperatures(40).diff()
    assert (gaps[:20].diff() > 0).all()
    assert gaps[19] > 5 * gaps[0]
    sigma = special.expit(4 * np.array([-1, -0.5, 0, 0.5, 1]))  # Grosse, Ghahramani & Adams 2015, delta = 4
    np.testing.assert_allclose(
        Annealing(schedule="sigmoid").temperatures(4), (sigma - sigma[0]) / (sigma[-1] - sigma[0]), rtol=1e-12
    )


def test_step_sizes_are_frozen_and_go_back_the_way_they_came(monkeypatch):
    vae, x = linear_gaussian(), torch.randn(2, 7, dtype=torch.float64)
    sizes = torch.rand(4, 2, dtype=torch.float64)  # five temperatures, two observations
    monkeypatch.setattr(annealed, "step_sizes", lambda path, betas, settings: sizes.clone())
    taken = []
    transition = Path.transition

    def record(path, state, beta, step):
        taken.append((round(beta.item(), 6), step.tolist()))
        return transition(path, state, beta, step)

    monkeypatch.setattr(Path, "transition", record)
    forward = [(beta, step.tolist()) for beta, step in zip((0.2, 0.4, 0.6, 0.8), sizes, strict=True)]
    annealed_importance_sampling(vae.model, vae.guide, x, Annealing(num_temperatures=5, num_checked=0))
    assert taken == forward
    taken.clear()
    bidirectional_monte_carlo(vae.model, vae.guide, x, Annealing(num_temperatures=5))
    assert taken == forward + forward[::-1]


@pytest.mark.slow
@pytest.mark.parametrize("target", [0.6, 0.9])
def test_step_sizes_adapt_to_the_acceptance_asked_for(target):
    vae, x = linear_gaussian(15, 5), torch.randn(4, 15, dtype=torch.float64)
    settings = Annealing(32, 80, "prior", target_acceptance=target, num_warmup_chains=32, num_checked=0)
    evidence = annealed_importance_sampling(vae.model, vae.guide, x, settings)
    assert evidence.acceptance.mean().item() == pytest.approx(target, abs=0.06)


def test_step_sizes_end_at_the_longest():
    vae, x = linear_gaussian(), torch.randn(2, 7, dtype=torch.float64)
    for settings in (Annealing(), Annealing(num_leapfrogs=6)):
        path = path_of(vae, vae.guide, x, settings)
        steps = annealed.step_sizes(path, settings.temperatures(5).to(x), settings)
        torch.testing.assert_close(steps, torch.full((4, 2), 0.5 * math.pi / settings.num_leapfrogs).double())


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_trajectories_that_overflow_are_rejected(start):
    # sinh(z) after a long step is infinite, and the next point NaN
    model, _ = programs(lambda z: dist.Normal(z.sinh(), 0.1).to_event(1), dist.Normal(double(0.0), 1.0).to_event(1))
    guide = normal_guide(lambda x: x - 0.5, 3.0)
    x = double(0.6, 1.5, 2.0)[:, None]
    settings = Annealing(200, 40, start)
    evidence = annealed_importance_sampling(model, guide, x, settings)
    error = evidence.log_px - quadrature(model, guide, x).log_px
    assert (error.abs() < 4 * evidence.mc_se).all()
    check_evidence(evidence, 3)


class Broken(dist.Normal):
    """Normal whose density is ``value`` where its mean is negative."""

    value = math.nan

    def expand(self, batch_shape, _instance=None):
        return type(self)(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

    def log_prob(self, value):
        return torch.where(self.loc < 0, self.value, super().log_prob(value))


class Cut(Broken):
    value = -math.inf


@pytest.mark.parametrize("num", [1, 4])
def test_invalid_log_weights_are_counted(num):
    prior = dist.Normal(double(0.0), 1.0).to_event(1)
    settings = Annealing(2000, num, "prior")
    x = double(0.5)[:, None]
    model, guide = programs(lambda z: Cut(z, 1.0).to_event(1), prior)
    evidence = annealed_importance_sampling(model, guide, x, settings)
    exact = integrate.quad(lambda z: stats.norm.pdf(z) * stats.norm.pdf(0.5, z), 0, 10)[0]
    assert 900 < evidence.num_invalid.item() < 1100  # chains that start where the joint density is zero weigh nothing
    assert abs(evidence.log_px.item() - math.log(exact)) < 4 * evidence.mc_se.item()
    model, guide = programs(lambda z: Broken(z, 1.0).to_event(1), prior)
    evidence = annealed_importance_sampling(model, guide, x, settings)
    assert 900 < evidence.num_invalid.item() < 1100
    assert evidence.log_px.isnan()


@pytest.mark.slow
@pytest.mark.parametrize("memory", [1, 100_000])
def test_estimates_do_not_depend_on_chunks(memory, monkeypatch):
    monkeypatch.setitem(CHUNK, "cpu", memory)
    vae, x = linear_gaussian(), 2 * torch.randn(3, 7, dtype=torch.float64)  # apart, so that each is told by its value
    settings = Annealing(16, 15, "guide")
    evidence = annealed_importance_sampling(vae.model, near_guide(vae), x, settings)
    sandwich = bidirectional_monte_carlo(vae.model, near_guide(vae), x, settings)
    assert sandwich.data.shape == (3, 7)
    for found, at in ((evidence, x), (sandwich.lower, sandwich.data), (sandwich.upper, sandwich.data)):
        check_evidence(found, 3)
        assert ((found.log_px - vae.log_px(at)).abs() < 5 * found.mc_se + 0.05).all()
        assert (found.mc_se < 0.15).all()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("start", STARTS)
def test_one_temperature_is_importance_sampling_from_the_start(start):
    model, guide, x, _ = bumpy()
    x = x[1:].expand(1000, 1)
    evidence = annealed_importance_sampling(model, guide, x, Annealing(10, 1, start))
    assert evidence.acceptance.isnan().all()
    check_evidence(evidence, 1000, acceptance=False)
    if start == "prior":
        guide = programs(lambda z: z, dist.Normal(double(0.0), 1.0).to_event(1))[1]
    proposal = "laplace" if start == "laplace" else "guide"
    plain = importance_sampling(model, guide, x, 10, proposal=proposal)
    assert stats.ks_2samp(evidence.log_px.numpy(), plain.log_px.numpy()).pvalue > 0.01
    delta = evidence.mc_se / t_factor(9)
    assert stats.ks_2samp(delta.numpy(), plain.mc_se.numpy()).pvalue > 0.001


def test_annealing_in_single_precision():
    vae, exact = small_vae(latent_dim=2, dtype=torch.float32), small_vae(latent_dim=2)
    exact.load_state_dict(vae.state_dict())
    x = binary(5, dtype=torch.float32)
    evidence = annealed_importance_sampling(vae.model, vae.guide, x, Annealing(num_temperatures=20))
    error = evidence.log_px - quadrature(exact.model, exact.guide, x.double()).log_px
    assert (error.abs() < 4 * evidence.mc_se + 1e-4).all()
    check_evidence(evidence, 5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_chains": 1}, "num_chains must be at least 2, got 1"),
        ({"num_temperatures": 0}, "num_temperatures must be at least 1, got 0"),
        ({"num_leapfrogs": 0}, "num_leapfrogs must be at least 1, got 0"),
        ({"num_warmup_chains": 0}, "num_warmup_chains must be at least 1, got 0"),
        ({"start": "posterior"}, "start must be one of laplace, guide, prior, got posterior"),
        ({"schedule": "cosine"}, "schedule must be one of linear, sigmoid, got cosine"),
        ({"error": 0.0}, "error must be positive, got 0.0"),
        ({"error": math.inf}, "error must be positive, got inf"),
        ({"error": math.nan}, "error must be positive, got nan"),
        ({"target_acceptance": 1.0}, "target_acceptance must be between 0 and 1, got 1.0"),
        ({"target_acceptance": 0.0}, "target_acceptance must be between 0 and 1, got 0.0"),
    ],
)
def test_annealing_refuses_settings_out_of_range(setting, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Annealing(**setting)


def test_a_grey_pixel_is_refused_and_simulated_ones_are_not():
    vae = small_vae()
    x = torch.full((2, 12), 0.3, dtype=torch.float64)
    with pytest.raises(ContractError, match="outside the support"):
        annealed_importance_sampling(vae.model, vae.guide, x)
    assert set(bidirectional_monte_carlo(vae.model, vae.guide, x, Annealing(2, 1)).data.unique().tolist()) == {0, 1}


# ---- bidirectional Monte Carlo


@pytest.mark.parametrize("start", [pytest.param("guide", marks=pytest.mark.slow), "prior"])
def test_the_sandwich_encloses_the_exact_evidence_and_narrows(start):
    vae = mild_linear_gaussian(5)[0]
    x, widths = torch.zeros(60, 15).double(), []
    for num in (4, 30):
        settings = Annealing(8, num, start)
        sandwich = bidirectional_monte_carlo(vae.model, near_guide(vae), x, settings)
        assert isinstance(sandwich, Sandwich)
        exact = vae.log_px(sandwich.data)
        below, above = exact - sandwich.lower.log_px, sandwich.upper.log_px - exact
        for gap in (below, above):
            assert gap.mean() > -4 * gap.std() / 60**0.5
        width, error = sandwich.width()
        assert width == pytest.approx((below + above).mean().item())
        assert error == pytest.approx((below + above).std().item() / 60**0.5)
        widths.append(width)
        check_evidence(sandwich.lower, 60)
        check_evidence(sandwich.upper, 60)
    assert widths[0] > 4 * error
    assert widths[0] > 3 * abs(widths[1])
    assert abs(widths[1]) < 0.1 + 4 * error
    assert stats.kstest(sandwich.data.numpy() @ np.ones(15), stats.norm(vae.mean.sum(), total(vae)).cdf).pvalue > 0.01


def total(vae):
    """Standard deviation of the sum of the pixels."""
    return math.sqrt((vae.weight.sum(0).square().sum() + len(vae.weight) * vae.scale**2).item())


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_reverse_weights_have_the_inverse_evidence_as_their_mean(start, monkeypatch):
    monkeypatch.setitem(CHUNK, "cpu", 10**6)  # in about ten chunks a block
    torch.manual_seed(1)
    model, guide, x, log_px = bumpy()
    x, settings = x[:1].expand(10_000, 1), Annealing(2, 3, start)
    sandwich = bidirectional_monte_carlo(model, guide, x, settings)
    exact = log_px[sandwich.data[:, 0].long()]
    for ratio in ((exact - sandwich.upper.log_px).exp(), (sandwich.lower.log_px - exact).exp()):
        error = ratio.std().item() / 100
        assert abs(ratio.mean().item() - 1) < 4 * error
        assert error < 0.06
    share = sandwich.data.mean().item()
    assert abs(share - log_px[1].exp().item()) < 4 * 0.5 / 100


def test_t_factors():
    for freedom in (3, 5, 9, 15, 31, 1000):
        assert t_factor(freedom) == pytest.approx(stats.t.ppf(0.975, freedom) / stats.norm.ppf(0.975), rel=0.01)


# ---- rough estimates of all, fine ones of some


def evidence_of(log_px, mc_se):
    return Evidence(log_px, mc_se, *[torch.full_like(log_px, math.nan)] * 4)


@pytest.mark.slow
def test_difference_estimate_by_brute_force():
    """Over many draws of the observations and runs of the fine estimator it hits the mean, by as much as it says."""
    size, tried = 60, 24
    truth = 10 * torch.randn(size, dtype=torch.float64) - 90
    rough = truth - 1 - torch.rand(size, dtype=torch.float64)  # biased, by an amount that varies
    noise = 0.2 + torch.rand(size, dtype=torch.float64)
    found, stated = [], []
    for _ in range(6000):
        among = torch.randperm(size)[:tried]
        mc_se = noise[among]
        fine = evidence_of(truth[among] + mc_se * torch.randn(tried, dtype=torch.float64), mc_se)
        estimate, error = difference_estimate(rough, fine, among)
        found.append(estimate)
        stated.append(error)
    found, stated = torch.tensor(found), torch.tensor(stated)
    assert abs(found.mean() - truth.mean()) < 4 * found.std() / len(found) ** 0.5
    assert found.std().item() == pytest.approx(stated.square().mean().sqrt().item(), rel=0.05)
    assert found.std() < 0.2 * truth.std() / tried**0.5  # far better than the mean of those tried


def test_difference_estimate_of_all_is_their_mean():
    rough = torch.randn(50, dtype=torch.float64)
    fine = reduce_log_weights([torch.randn(100, 50, dtype=torch.float64)], 100)
    among = torch.randperm(50)
    estimate, error = difference_estimate(rough, fine, among)
    assert estimate == pytest.approx(fine.log_px.mean().item(), rel=1e-12)
    assert error == pytest.approx(fine.mean()[2], rel=1e-12)


def test_difference_estimate_of_single_precision():
    rough = torch.full((10_000,), -90.1)  # whose mean in single precision is off
    fine = evidence_of(rough[:10].double() + 1, torch.zeros(10).double())
    assert difference_estimate(rough, fine, torch.arange(10))[0] == pytest.approx(
        rough[0].double().item() + 1, abs=1e-9
    )


HOPELESS = {  # what importance sampling says of 400 observations where its log-weights are absurd
    "far": lambda noise: 1e9 * noise - 2e10,
    "one far": lambda noise: torch.where(torch.arange(400) == 7, -1e9 - 0 * noise, 0 * noise - 2e10),
    "quanta": lambda noise: 1e9 * (noise > 2).double() - 1.5e16,
    "alike": lambda noise: 0 * noise - 1.5e16,
}


@pytest.mark.parametrize("size", [12, 120])
@pytest.mark.parametrize("kind", HOPELESS)
def test_hopeless_rough_values_leave_the_mean_of_those_tried(kind, size):
    """The oracle is the mean of all, and the spread of estimates over draws: no term of the rough values is in it."""
    truth, noise = 8 * torch.randn(2, 400, dtype=torch.float64)
    nothing = torch.zeros(400).double()
    rough = Evidence(HOPELESS[kind](noise / 8), nothing + 1e4, nothing + 1, nothing, nothing, nothing, 20)
    found = []
    for _ in range(200):
        among = torch.randperm(400)[:size]
        found.append(difference_estimate(rough, evidence_of(truth[among] - 90, nothing[among]), among))
    estimate, error = torch.tensor(found, dtype=torch.float64).unbind(1)
    expected = truth.std().item() * ((1 - size / 400) / size) ** 0.5
    assert estimate.std().item() == pytest.approx(expected, rel=0.25)
    assert error.square().mean().sqrt().item() == pytest.approx(expected, rel=0.1)
    assert abs(estimate.mean() + 90 - truth.mean()) < 4 * expected / len(found) ** 0.5


@pytest.mark.parametrize("size", [12, 120])
def test_observations_far_from_those_tried_widen_the_error(size):
    """A few rows of far lower log p(x), none of them tried: right rough values tell of them, with an error."""
    truth = 8 * torch.randn(400, dtype=torch.float64) - 90
    truth[-8:] = -5000
    nothing = torch.zeros(400).double()
    rough = Evidence(truth - 1 - torch.rand(400).double(), nothing, nothing + 1, nothing, nothing, nothing, 20)
    near = []
    for _ in range(100):
        among = torch.randperm(392)[:size]
        estimate, error = difference_estimate(rough, evidence_of(truth[among], nothing[among]), among)
        near.append(abs(estimate - truth.mean().item()) / error)
        assert abs(estimate - truth.mean()) < 20  # the mean of those tried is off by 98
        assert error > 0.1
    assert sum(each < 2 for each in near) > 85


@pytest.mark.slow
def test_a_thousand_dimensions():
    weight = 3 * torch.randn(20, 1000, dtype=torch.float64) / 1000**0.5
    vae = LinearGaussianVAE(weight, torch.zeros(20, dtype=torch.float64), scale=0.5)
    x = torch.randn(1, 1000, dtype=torch.float64) @ weight.mT + 0.5 * torch.randn(1, 20, dtype=torch.float64)
    settings = Annealing(error=0.5, num_climbs=0, num_checked=0)
    evidence = annealed_importance_sampling(vae.model, vae.guide, x, settings, compiled=False)
    assert ((evidence.log_px - vae.log_px(x)).abs() < 4 * evidence.mc_se).all()
    assert (evidence.mc_se < 0.5).all()
    assert evidence.reliable is not None
    assert evidence.reliable.all()


def test_matrices_of_many_dimensions_are_made_of_few_observations_at_once():
    assert [observations_at_once(300, dim) for dim in (2, 50, 1000, 10**5)] == [300, 300, 16, 1]
    assert observations_at_once(0, 2) == 1
