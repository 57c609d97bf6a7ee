"""Programs without a data plate: their latent variables as one vector, and log Z of them against what is known."""

import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from scipy import integrate, special, stats
from sklearn import datasets
from torch.distributions import biject_to

from pyro_vae import Annealing, ContractError, Evidence, bayes_factor, model_evidence
from pyro_vae.infer.evidence import SMC, PosteriorChains, Thermodynamic
from pyro_vae.infer.evidence.importance import reduce_log_weights
from pyro_vae.infer.evidence.laplace import laplace_approximation
from pyro_vae.infer.tracing import trace_graph
from pyro_vae.infer.whole import WholeProgram

EFFECTS, ERRORS = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]


def double(numbers):
    return torch.as_tensor(numbers, dtype=torch.float64)


def schools(effects, errors):
    mu = pyro.sample("mu", dist.Normal(effects.new_zeros(()), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(effects.new_tensor(5.0)))
    with pyro.plate("schools", len(effects)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, errors), obs=effects)


def schools_evidence():
    """theta and mu integrated in closed form, tau by quadrature."""

    def integrand(tau):
        covariance = np.diag(np.square(ERRORS) + tau**2) + 25
        return stats.multivariate_normal.pdf(EFFECTS, np.zeros(8), covariance) * stats.halfcauchy.pdf(tau, scale=5)

    return math.log(integrate.quad(integrand, 0, math.inf, epsabs=0, limit=500)[0])


def regression(x, y, noise=0.5):
    """Written for one draw: a matrix product that a batch of draws would break."""
    weight = pyro.sample("weight", dist.Normal(x.new_zeros(x.shape[1]), 2.0).to_event(1))
    intercept = pyro.sample("intercept", dist.Normal(x.new_tensor(1.0), 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ weight + intercept, noise), obs=y)


def regression_data(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(20, 3))
    return double(x), double(x @ [1.0, -2.0, 0.5] + 0.5 * rng.normal(size=20))


def regression_evidence(x, y, noise=0.5):
    x, y = x.numpy(), y.numpy()
    covariance = 4 * x @ x.T + 9 + noise**2 * np.eye(len(x))
    return stats.multivariate_normal.logpdf(y, np.ones(len(x)), covariance)


def regression_guide(x, y, noise=0.5):
    """Near the posterior, and wider."""
    precision = x.T @ x / noise**2 + torch.eye(3).to(x) / 4
    loc = torch.linalg.solve(precision, x.T @ y / noise**2)
    covariance = 2 * torch.linalg.inv(precision)
    pyro.sample("weight", dist.MultivariateNormal(loc, covariance))
    pyro.sample("intercept", dist.Normal(x.new_zeros(()), 0.3))


def by_laplace(latents, num_samples=4000):
    """Importance sampling from the Laplace approximation, a Student-t of 5 degrees."""
    with torch.no_grad():
        at = laplace_approximation(latents)
        e = dist.MultivariateStudentT(5.0, at.loc.new_zeros(latents.dim), torch.eye(latents.dim).to(at.loc))
        draws = e.sample((num_samples, 1))
        log_w = sum(latents.log_joint(at.to_latents(draws))) + at.log_det - e.log_prob(draws)
    return reduce_log_weights([log_w], num_samples)


def agrees(evidence, truth, most=0.05):
    return abs(evidence.log_px.item() - truth) < max(4 * evidence.mc_se.item(), 1e-6) and evidence.mc_se.item() < most


def gradient_of(latents, u):
    u = u.clone().requires_grad_()
    return torch.autograd.grad(sum(latents.log_joint(u)).sum(), u)[0]


def test_densities_are_those_of_the_program():
    effects, errors = double(EFFECTS), double(ERRORS)
    latents = WholeProgram(schools, (effects,), {"errors": errors}, gaussian=False)
    assert (latents.dim, latents.size, latents.batched, latents.is_hierarchical) == (10, 1, True, True)
    u = torch.randn(7, 1, 10, dtype=torch.float64)
    mu, log_tau, theta = (part.numpy() for part in (u[:, 0, 0], u[:, 0, 1], u[:, 0, 2:]))
    tau = np.exp(log_tau)
    wanted = stats.norm.logpdf(mu, 0, 5) + stats.halfcauchy.logpdf(tau, scale=5) + log_tau
    wanted += stats.norm.logpdf(theta, mu[:, None], tau[:, None]).sum(1)
    log_prior, log_likelihood = latents.log_joint(u)
    np.testing.assert_allclose(log_prior.squeeze(1), wanted, rtol=1e-12)
    np.testing.assert_allclose(log_likelihood.squeeze(1), stats.norm.logpdf(theta, EFFECTS, ERRORS).sum(1), rtol=1e-12)


def test_moved_coordinates_give_the_same_density_of_other_variables():
    arguments = double(EFFECTS), double(ERRORS)
    plain, moved = (WholeProgram(schools, arguments, centred=centred, gaussian=False) for centred in (True, False))
    e = torch.randn(7, 1, 10, dtype=torch.float64)
    log_prior, log_likelihood = moved.log_joint(e)
    tau = 5 * e[..., 1:2].exp()
    u = torch.cat([5 * e[..., :1], tau.log(), 5 * e[..., :1] + tau * e[..., 2:]], -1)
    wanted, same = plain.log_joint(u)
    torch.testing.assert_close(log_likelihood, same)
    # |du / de| is 5 for mu, 1 for log tau, tau for each theta
    torch.testing.assert_close(log_prior, wanted + math.log(5) + 8 * tau.log().squeeze(-1))
    draws = moved.sample_prior(20_000).squeeze(1)
    assert draws[:, [0, *range(2, 10)]].mean(0).abs().max() < 0.05
    assert (draws[:, [0, *range(2, 10)]].std(0) - 1).abs().max() < 0.05


def test_rows_are_the_same_data_again():
    latents = WholeProgram(schools, (double(EFFECTS), double(ERRORS)))
    rows = latents.select(torch.tensor([0, 0, 0]))
    u = torch.randn(4, 3, 10, dtype=torch.float64)
    assert rows.size == 3
    assert rows.sample_prior(5).shape == (5, 3, 10)
    for found, wanted in zip(rows.log_joint(u), latents.log_joint(u.reshape(12, 1, 10)), strict=True):
        torch.testing.assert_close(found, wanted.reshape(4, 3))


def test_prior_draws_have_the_prior_density():
    """The entropy of the draws: mean of -log p(u) in closed form."""
    latents = WholeProgram(regression, regression_data(), gaussian=False)
    draws = latents.sample_prior(20_000)
    assert draws.shape == (20_000, 1, 4)
    entropy = 3 * stats.norm(0, 2).entropy() + stats.norm(1, 3).entropy()
    assert latents.log_joint(draws)[0].mean().item() == pytest.approx(-entropy, abs=0.05)
    assert latents.prior_draws(10).shape == (10, 4)


def test_draws_that_are_made_of_gammas():
    """Means and standard deviations of Beta, Dirichlet and LKJ priors, drawn all at once."""

    def model():
        pyro.sample("p", dist.Beta(double(2.0), 3.0).expand([2]).to_event(1))
        pyro.sample("share", dist.Dirichlet(double([1.0, 2.0, 5.0])))
        pyro.sample("factor", dist.LKJCholesky(2, double(2.0)))
        pyro.factor("nothing", double(0.0))

    latents = WholeProgram(model, gaussian=False)
    u = latents.sample_prior(20_000)
    assert latents._many.draws_at_once
    share = biject_to(constraints.simplex)(u[:, 0, 2:4])
    found = {
        "p": torch.sigmoid(u[:, 0, :2]).flatten(),
        "first": share[:, 0],
        "last": share[:, 2],
        "r": u[:, 0, 4].tanh(),
    }
    wanted = {"p": stats.beta(2, 3), "first": stats.beta(1, 7), "last": stats.beta(5, 3), "r": stats.beta(2, 2, -1, 2)}
    for name, draws in found.items():
        assert stats.kstest(draws.numpy(), wanted[name].cdf).pvalue > 1e-3, name


def test_gradients_and_curvature():
    """Those of the linear Gaussian: -A u + b with a constant A; the same from a graph."""
    x, y = regression_data()
    latents = WholeProgram(regression, (x, y), gaussian=False)
    design = torch.cat([x, torch.ones(20, 1).to(x)], 1)
    precision = design.T @ design / 0.25 + torch.diag(1 / double([4, 4, 4, 9]))
    right = design.T @ y / 0.25 + double([0, 0, 0, 1 / 9])
    u = torch.randn(3, 1, 4, dtype=torch.float64)
    wanted = right - u @ precision
    torch.testing.assert_close(gradient_of(latents, u), wanted)

    def twice(u):
        u = u.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(sum(latents.log_joint(u)).sum(), u, create_graph=True)
        return gradient, torch.autograd.grad(gradient[..., 1].sum(), u)[0]

    for found in (twice(u), trace_graph(twice, [u])(torch.ones_like(u))):
        torch.testing.assert_close(found[1], -precision[1].expand(3, 1, 4))
    torch.testing.assert_close(trace_graph(twice, [u])(u)[0], wanted)


def test_a_guide_is_scored_where_the_model_is():
    x, y = regression_data()
    latents = WholeProgram(regression, (x, y), guide=regression_guide, gaussian=False)
    u = latents.sample_guide(200)
    log_prior, log_likelihood, log_guide = latents.log_joint_and_guide(u)
    guide = poutine.trace(regression_guide).get_trace(x, y)
    wanted = guide.nodes["weight"]["fn"].log_prob(u[..., :3]) + guide.nodes["intercept"]["fn"].log_prob(u[..., 3])
    torch.testing.assert_close(log_guide, wanted)
    torch.testing.assert_close(latents.log_guide(u), wanted)
    evidence = reduce_log_weights([log_prior + log_likelihood - log_guide], 200)
    assert agrees(evidence, regression_evidence(x, y), 0.2)


def trained(guide, *data):
    """A guide after a few steps, whose parameters leave Pyro's store."""
    svi = SVI(regression, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(300):
        svi.step(*data)
    return guide


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal, AutoDelta])
def test_automatic_guides(kind):
    data = regression_data()
    pyro.set_rng_seed(1)
    try:
        guide = trained(kind(regression), *data)
        latents = WholeProgram(regression, data, guide=guide, gaussian=False)
        u = latents.sample_guide(4000)
        median = guide.median(*data)
        centre = torch.cat([median["weight"], median["intercept"].reshape(1)]).detach()
        assert (u.mean((0, 1)) - centre).abs().max() < 0.05
        log_guide = latents.log_guide(u)
        assert log_guide.mean().item() == pytest.approx(
            dist.MultivariateNormal(u.mean((0, 1)), u.squeeze(1).T.cov()).entropy().neg().item(), abs=0.1
        )
        if kind is not AutoDelta:
            evidence = reduce_log_weights([sum(latents.log_joint(u)).detach() - log_guide.detach()], 4000)
            assert agrees(evidence, regression_evidence(*data), 0.5)
    finally:
        pyro.clear_param_store()


def test_an_automatic_guide_that_was_never_run():
    with pytest.raises(ContractError, match="AutoNormal, was never run and so never trained: train it first"):
        WholeProgram(regression, regression_data(), guide=AutoNormal(regression))


def beta_binomial(heads):
    p = pyro.sample("p", dist.Beta(heads.new_tensor(2.0), 3.0))
    pyro.sample("heads", dist.Binomial(10, p), obs=heads)


def gamma_poisson(counts):
    rate = pyro.sample("rate", dist.Gamma(counts.new_tensor(2.0), 0.5))
    for i in pyro.plate("days", len(counts)):
        pyro.sample(f"count_{i}", dist.Poisson(rate), obs=counts[i])


def process(x, y):
    """A Gaussian process whose length scale is not known."""
    scale = pyro.sample("scale", dist.LogNormal(x.new_zeros(()), 0.5))
    covariance = torch.exp(-0.5 * ((x - x[:, None]) / scale).square()) + 0.1 * torch.eye(len(x)).to(x)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros_like(x), covariance), obs=y)


def correlated(x):
    factor = pyro.sample("factor", dist.LKJCholesky(2, x.new_tensor(2.0)))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.MultivariateNormal(x.new_zeros(2), scale_tril=factor), obs=x)


def by_factor(y):
    """y ~ N(z, 1) written as a log-factor, which lacks the normal's constant; z between 0 and a bound that is drawn."""
    top = pyro.sample("top", dist.Uniform(y.new_tensor(1.0), 3.0))
    z = pyro.sample("z", dist.Uniform(y.new_zeros(()), top))
    pyro.deterministic("twice", 2 * z)
    pyro.factor("likelihood", -0.5 * (y - z) ** 2)


GP_X = np.linspace(0, 3, 8)
GP_Y = np.sin(2 * GP_X)
PAIRS = np.random.default_rng(0).multivariate_normal([0, 0], [[1, 0.7], [0.7, 1]], 12)


def gp_integrand(scale):
    covariance = np.exp(-0.5 * ((GP_X - GP_X[:, None]) / scale) ** 2) + 0.1 * np.eye(8)
    return stats.lognorm.pdf(scale, 0.5) * stats.multivariate_normal.pdf(GP_Y, np.zeros(8), covariance)


def pair_integrand(r):
    """LKJ of two dimensions: (1 - r^2) up to its integral, 4/3, for a concentration of 2."""
    return 0.75 * (1 - r**2) * math.exp(stats.multivariate_normal.logpdf(PAIRS, [0, 0], [[1, r], [r, 1]]).sum())


CASES = {
    "beta_binomial": (
        beta_binomial,
        (double(7.0),),
        stats.betabinom.logpmf(7, 10, 2, 3),
    ),
    "gamma_poisson": (
        gamma_poisson,
        (double([3.0, 5.0, 4.0, 8.0]),),
        # Gamma(2, 1/2) and Poisson counts of sum 20 in 4 days
        special.gammaln(22) - special.gammaln(2) + 2 * math.log(0.5) - 22 * math.log(4.5)
        - special.gammaln(np.array([3, 5, 4, 8]) + 1).sum(),
    ),
    "process": (process, (double(GP_X), double(GP_Y)), math.log(integrate.quad(gp_integrand, 0, 30)[0])),
    "correlated": (correlated, (double(PAIRS),), math.log(integrate.quad(pair_integrand, -1, 1)[0])),
    "by_factor": (
        by_factor,
        (double(0.8),),
        math.log(
            integrate.dblquad(
                lambda z, top: math.exp(-0.5 * (0.8 - z) ** 2) / top / 2, 1, 3, 0, lambda top: top
            )[0]
        ),
    ),
    "regression": (regression, regression_data(), regression_evidence(*regression_data())),
}  # fmt: skip


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("centred", [True, False])
def test_evidence_that_is_known(name, centred):
    model, data, truth = CASES[name]
    assert agrees(by_laplace(WholeProgram(model, data, centred=centred)), truth)


def test_eight_schools_in_moved_coordinates():
    truth = schools_evidence()
    assert truth == pytest.approx(-31.31, abs=0.005)
    latents = WholeProgram(schools, (double(EFFECTS), double(ERRORS)), centred=False)
    assert latents.standard
    e = latents.sample_prior(20_000)
    log_prior, log_likelihood = latents.log_joint(e)
    torch.testing.assert_close(log_prior, dist.Normal(0.0, 1.0).log_prob(e).sum(-1), rtol=0, atol=1e-4)
    assert agrees(reduce_log_weights([log_likelihood], 20_000), truth, 0.1)


def test_three_levels_against_the_gaussian_that_they_are():
    """Pupils in classes in schools: nested plates, all normal."""
    rng = np.random.default_rng(0)
    school_of, class_of = torch.arange(6) % 3, torch.arange(24) % 6
    y = double(rng.normal(size=24) + rng.normal(size=6)[class_of] + 1)

    def model(y):
        top = pyro.sample("top", dist.Normal(y.new_zeros(()), 1.0))
        with pyro.plate("schools", 3):
            school = pyro.sample("school", dist.Normal(top, 0.8))
        with pyro.plate("classes", 6):
            group = pyro.sample("class", dist.Normal(school[school_of], 0.6))
        with pyro.plate("pupils", 24):
            pyro.sample("y", dist.Normal(group[class_of], 1.0), obs=y)

    member = np.eye(6)[class_of]
    above = np.eye(3)[school_of]
    covariance = member @ (above @ (1 + 0.64 * np.eye(3)) @ above.T + 0.36 * np.eye(6)) @ member.T + np.eye(24)
    truth = stats.multivariate_normal.logpdf(y.numpy(), np.zeros(24), covariance)
    for centred in (True, False):
        latents = WholeProgram(model, (y,), centred=centred)
        assert latents.dim == 10
        assert latents.is_hierarchical
        assert agrees(by_laplace(latents), truth)


def test_effects_that_are_correlated():
    """A plate of vectors whose one covariance is drawn: moved coordinates, by change of variables."""

    def model(y):
        factor = pyro.sample("factor", dist.LKJCholesky(2, y.new_tensor(2.0)))
        scale = pyro.sample("scale", dist.HalfNormal(torch.ones_like(y[0])).to_event(1))
        with pyro.plate("groups", len(y)):
            effect = pyro.sample(
                "effect", dist.MultivariateNormal(torch.zeros_like(y[0]), scale_tril=scale.unsqueeze(-1) * factor)
            )
            pyro.sample("y", dist.Normal(effect, 1.0).to_event(1), obs=y)

    y = double(PAIRS[:5])
    plain, moved = (WholeProgram(model, (y,), centred=centred, gaussian=False) for centred in (True, False))
    assert moved.dim == 13
    e = torch.randn(20, 1, 13, dtype=torch.float64)
    r, scale = torch.tanh(e[..., 0]), e[..., 1:3].exp()
    lower = torch.stack([torch.stack([r * 0 + 1, r * 0], -1), torch.stack([r, (1 - r**2).sqrt()], -1)], -2)
    factor = scale.unsqueeze(-1) * lower
    effect = torch.einsum("kbij,kbgj->kbgi", factor, e[..., 3:].unflatten(-1, (5, 2)))
    log_prior, log_likelihood = moved.log_joint(e)
    wanted, same = plain.log_joint(torch.cat([e[..., :3], effect.flatten(-2)], -1))
    torch.testing.assert_close(log_likelihood, same)
    torch.testing.assert_close(log_prior, wanted + 5 * torch.linalg.det(factor).log())


def test_shares_of_counts():
    """Dirichlet and Multinomial, whose density torch writes into by a mask."""

    def model(counts):
        share = pyro.sample("share", dist.Dirichlet(torch.ones_like(counts)))
        pyro.sample("counts", dist.Multinomial(probs=share, total_count=10), obs=counts)

    counts = double([5.0, 3.0, 2.0])
    latents = WholeProgram(model, (counts,))
    assert latents.batched
    assert agrees(by_laplace(latents), -math.log(66))  # every one of the 66 triples that sum to 10 is as likely


def test_supports_that_depend_on_another_site():
    latents = WholeProgram(by_factor, (double(0.8),), gaussian=False)
    u = torch.randn(50, 1, 2, dtype=torch.float64)
    top = 1 + 2 * torch.sigmoid(u[..., 0])
    share = torch.sigmoid(u[..., 1])
    log_prior, log_likelihood = latents.log_joint(u)
    torch.testing.assert_close(log_likelihood, -0.5 * (0.8 - top * share) ** 2)
    slopes = [special.expit(v) * special.expit(-v) for v in u.numpy().swapaxes(0, -1)]
    np.testing.assert_allclose(log_prior.T, np.log(slopes[0]) + np.log(slopes[1]), rtol=1e-9)


def test_what_was_not_seen_integrates_to_one():
    """A part of the data is masked, and a part of the latent variables, which bears on nothing then."""
    y = double([0.3, -1.0, 99.0])
    seen = torch.tensor([True, True, False])

    def model(y):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(y), 2.0).mask(seen))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y, obs_mask=seen)

    latents = WholeProgram(model, (y,))
    assert latents.dim == 3
    assert agrees(by_laplace(latents), stats.norm.logpdf([0.3, -1.0], 0, math.sqrt(5)).sum())


def test_float32_stays_float32():
    latents = WholeProgram(regression, [each.float() for each in regression_data()])
    assert latents.like.dtype == torch.float32
    assert latents.log_joint(latents.sample_prior(3))[1].dtype == torch.float32


def test_what_cannot_be_run_at_once_runs_one_after_the_other():
    def model(y):
        z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
        scale = 1.0 if z > 0 else 2.0
        pyro.sample("y", dist.Normal(z, scale), obs=y)

    with pytest.warns(UserWarning, match="one draw after the other, which is slow"):
        latents = WholeProgram(model, (double(0.5),), gaussian=False)
    assert not latents.batched
    u = double([[[0.3]], [[-0.4]]])
    wanted = stats.norm.logpdf(0.5, [0.3, -0.4], [1.0, 2.0])
    np.testing.assert_allclose(latents.log_joint(u)[1].squeeze(1), wanted)
    np.testing.assert_allclose(gradient_of(latents, u).flatten(), [-0.3 + 0.2, 0.4 + 0.9 / 4])


def test_a_covariance_that_is_not_positive_ends_no_other_run():
    def model(y):
        z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
        covariance = torch.eye(2).to(y) + z * (1 - torch.eye(2)).to(y)
        pyro.sample("y", dist.MultivariateNormal(y.new_zeros(2), covariance), obs=y)

    latents = WholeProgram(model, (double([0.5, 1.0]),))
    found = latents.log_joint(double([[[0.5]], [[1.5]]]))[1].squeeze(1)
    wanted = stats.multivariate_normal.logpdf([0.5, 1.0], [0, 0], [[1, 0.5], [0.5, 1]])
    assert found[0].item() == pytest.approx(wanted)
    assert found[1].isnan()


def test_draws_of_data_and_of_their_posterior():
    """Over many simulations, u and the mean of y have their joint moments."""
    latents = WholeProgram(regression, regression_data(), gaussian=False)
    drawn = []
    for _ in range(50):
        data, u = latents.simulate()
        (x, y) = (leaf[0] for leaf in data)
        torch.testing.assert_close(x, regression_data()[0])
        drawn.append((y - x @ u[0, :3] - u[0, 3]).numpy())
        found = latents.of(data).log_joint(u.unsqueeze(0))[1].item()
        assert found == pytest.approx(stats.norm.logpdf(drawn[-1], 0, 0.5).sum())
    assert np.std(drawn) == pytest.approx(0.5, rel=0.06)
    with pytest.raises(ContractError, match=r"'likelihood' is a pyro.factor, from which no data can be drawn"):
        WholeProgram(by_factor, (double(0.8),)).simulate()


def refused(match, *data, guide=None):
    """A decorator: the model is refused."""

    def check(model):
        def test():
            with pytest.raises(ContractError, match=match):
                WholeProgram(model, data, guide=guide)

        return test

    return check


@refused(r"site 'k' is discrete, on Boolean\(\)")
def test_discrete():
    k = pyro.sample("k", dist.Bernoulli(0.5))
    pyro.sample("y", dist.Normal(k, 1.0), obs=torch.tensor(0.1))


@refused("site 'y' is scaled, by a subsampled plate or poutine.scale", torch.randn(10))
def test_subsampled(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample_size=5) as some:
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[some])


@refused("site 'z' is scaled, by a subsampled plate or poutine.scale")
def test_scaled():
    with poutine.scale(scale=0.5):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.1))


@refused(r"an observed site or a pyro.factor, it has none: pass obs= to pyro.sample")
def test_nothing_observed():
    pyro.sample("z", dist.Normal(0.0, 1.0))


@refused("the model has no latent site")
def test_nothing_latent():
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(0.1))


@refused("site 'mu' is improper, its prior constant: nothing can be drawn from it")
def test_improper():
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(0.1))


@refused("site 'mu' is improper, its prior constant: nothing can be drawn")
def test_masked_away():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0).mask(False))
    pyro.sample("y", dist.Normal(mu, 1.0), obs=torch.tensor(0.1))


@refused("sites often change from run to run of the program")
def test_sites_that_come_and_go():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    if torch.rand(()) < 0.5:
        pyro.sample("often", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.1))


@refused("sites theta change from run to run of the program")
def test_shapes_that_change():
    theta = pyro.sample("theta", dist.Normal(torch.zeros(int(torch.randint(1, 5, ()))), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(theta.sum(), 1.0), obs=torch.tensor(0.1))


@refused(r"the observed site 'y' holds values outside the support of Poisson", torch.tensor([1.0, -1.0]))
def test_impossible_data(y):
    rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
    with pyro.plate("data", 2):
        pyro.sample("y", dist.Poisson(rate), obs=y)


@refused("the observed site 'y' holds NaN", torch.tensor([1.0, math.nan]))
def test_nan(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 2):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@refused("the observed site 'y' has 10 values of shape .10, 1. and 100 log-probabilities", torch.randn(10, 1))
def test_shapes_that_broadcast_by_mistake(y):
    z = pyro.sample("z", dist.Normal(torch.zeros(10), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(z, 1.0), obs=y)


@refused("site 'never' has a finite log-density at 0 of 256 draws from the prior", torch.tensor(5.0))
def test_no_finite_density(y):
    bound = pyro.sample("bound", dist.Uniform(0.0, 1.0))
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
    pyro.factor("never", torch.where(bound < 2, -math.inf, 0.0))


def other_guide():
    pyro.sample("w", dist.Normal(0.0, 1.0))


@refused(r"the same latent sites, got \['z'\] and \['w'\]", guide=other_guide)
def test_a_guide_of_other_sites():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.1))


def test_an_improper_prior_with_a_guide():
    """The integral of N(y; mu, 1) over mu is 1; what starts from the prior says that it cannot."""

    def model(y):
        mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def masked(y):
        mu = pyro.sample("mu", dist.Normal(y.new_zeros(()), 1.0).mask(False))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def guide(y):
        pyro.sample("mu", dist.Normal(y, 2.0))

    for each in (model, masked):
        latents = WholeProgram(each, (double(0.4),), guide=guide)
        assert agrees(by_laplace(latents), 0.0)
        with pytest.raises(ContractError, match="site 'mu' is improper"):
            latents.simulate()
        with pytest.raises(ContractError, match="site 'mu' is improper"):
            model_evidence(each, double(0.4), guide=guide)


def evidence(log_px, mc_se, reliable=True):
    numbers = (torch.tensor([each], dtype=torch.float64) for each in (log_px, mc_se, 1.0, 0.0, 0.0, 1.0))
    return Evidence(*numbers, reliable=torch.tensor([reliable]))


def test_bayes_factors():
    found = bayes_factor(evidence(-10.0, 0.3), evidence(-12.5, 0.4))
    assert found == pytest.approx((2.5, 0.5, True))
    assert not bayes_factor(evidence(-10.0, 0.3), evidence(-12.5, 0.4, reliable=False)).reliable
    two = Evidence(*(torch.zeros(2),) * 6)
    with pytest.raises(ValueError, match="the evidences are of 2 and 1 data"):
        bayes_factor(two, evidence(-1.0, 0.1))


SETTINGS = {
    "annealed": Annealing(64, error=0.1),
    "smc": SMC(2048),
    "bridge": PosteriorChains(8, 100, 150),
    "thermodynamic": Thermodynamic(8, 8, 5, 10),
}


@pytest.mark.parametrize(
    "estimator",
    ["smc", *(pytest.param(name, marks=pytest.mark.slow) for name in ("annealed", "bridge", "thermodynamic"))],
)
def test_evidence_of_a_regression(estimator):
    x, y = regression_data()
    found = model_evidence(regression, x, y=y, noise=0.7, estimator=estimator, settings=SETTINGS[estimator])
    assert found.log_px.shape == found.reliable.shape == found.evaluations.shape == (1,)
    assert found.reliable
    assert found.evaluations > 1000
    assert agrees(found, regression_evidence(x, y, 0.7), 0.3)


@pytest.mark.slow
@pytest.mark.parametrize("centred", [True, False, None])
def test_evidence_of_eight_schools(centred):
    """Right or not called reliable; in the coordinates that are chosen, it is."""
    settings = Annealing(64, error=0.1, most_temperatures=32) if centred else None
    found = model_evidence(schools, double(EFFECTS), double(ERRORS), centred=centred, settings=settings)
    wrong = abs(found.log_px.item() - schools_evidence()) > 4 * found.mc_se.item()
    assert not (wrong and found.reliable)
    assert found.reliable or centred is not None


@pytest.mark.slow
def test_evidence_of_a_logistic_regression():
    """Against long chains: -55.213 +- 0.013."""
    x, y = datasets.load_breast_cancer(return_X_y=True)

    def model(x, y):
        weight = pyro.sample("weight", dist.Normal(x.new_zeros(30), 1.0).to_event(1))
        intercept = pyro.sample("intercept", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ weight + intercept), obs=y)

    found = model_evidence(model, double((x - x.mean(0)) / x.std(0)), double(y))
    assert found.reliable
    assert abs(found.log_px.item() + 55.213) < 4 * math.hypot(found.mc_se.item(), 0.013)


def test_an_argument_of_a_reserved_name():
    def model(y, guide):
        z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
        pyro.sample("y", dist.Normal(z, guide), obs=y)

    found = model_evidence(partial(model, guide=2.0), double(0.7), settings=Annealing(64, 4))
    assert agrees(found, stats.norm.logpdf(0.7, 0, math.sqrt(5)))


def test_a_guide_says_where_the_posterior_is():
    """A posterior ten thousand times as narrow as the prior, and far out in it."""

    def model(y):
        z = pyro.sample("z", dist.Normal(y.new_zeros(()), 100.0))
        pyro.factor("far", -0.5 * ((z - y) / 0.01) ** 2)

    def guide(y):
        pyro.sample("z", dist.Normal(y, 0.02))

    truth = stats.norm.logpdf(250, 0, math.hypot(100, 0.01)) + math.log(0.01 * math.sqrt(2 * math.pi))
    found = model_evidence(model, double(250.0), guide=guide, settings=Annealing(64, 8, "guide", num_checked=0))
    assert agrees(found, truth, most=0.1)


def test_modules_and_parameters_are_taken_as_they_are():
    """In evaluation mode: dropout would draw at random."""
    network = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1)).double()

    def model(y):
        z = pyro.sample("z", dist.Normal(y.new_zeros(1), 1.0).to_event(1))
        scale = pyro.param("scale", y.new_tensor(0.5))
        pyro.sample("y", dist.Normal(network(z).squeeze(-1), scale), obs=y)

    try:
        found = model_evidence(model, double(0.3), settings=Annealing(64, 4))
    finally:
        pyro.clear_param_store()
    assert network.training
    slope, shift = (network[2].weight @ network[0].weight).item(), (network[2].weight @ network[0].bias).item()
    shift += network[2].bias.item()
    assert agrees(found, stats.norm.logpdf(0.3, shift, math.hypot(slope, 0.5)))


def test_a_latent_process_without_its_covariance():
    """Values of a process with an unknown length scale, freed of it by its Cholesky factor."""

    def model(x, y):
        scale = pyro.sample("scale", dist.LogNormal(x.new_zeros(()), 0.5))
        covariance = torch.exp(-0.5 * ((x - x[:, None]) / scale).square()) + 1e-6 * torch.eye(len(x)).to(x)
        f = pyro.sample("f", dist.MultivariateNormal(torch.zeros_like(x), covariance))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(f, 0.1**0.5), obs=y)

    latents = WholeProgram(model, (double(GP_X), double(GP_Y)), centred=False)
    assert latents.is_hierarchical
    assert latents.standard
    e = latents.sample_prior(1000)
    torch.testing.assert_close(latents.log_joint(e)[0], dist.Normal(0.0, 1.0).log_prob(e).sum(-1), rtol=0, atol=1e-4)
    found = model_evidence(model, double(GP_X), double(GP_Y), estimator="smc", centred=False)
    assert agrees(found, math.log(integrate.quad(gp_integrand, 0, 30)[0]), 0.2)


def test_no_such_estimator():
    with pytest.raises(ValueError, match="estimator must be annealed or smc or bridge or thermodynamic"):
        model_evidence(regression, *regression_data(), estimator="guess")
