"""Coordinates in which priors are standard normal."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_vae.infer import Latents
from pyro_vae.infer.tracing import trace_graph


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def programs(prior, likelihood=lambda z: dist.Normal(z, 1.0).to_event(1)):
    """z ~ prior, which may be a function of x; x ~ likelihood(z), where z always has an event dimension."""

    def draw(x):
        z = pyro.sample("z", prior if isinstance(prior, dist.Distribution) else prior(x))
        return z if z.dim() > 2 else z.unsqueeze(-1)

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", likelihood(draw(x)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            draw(x)

    return model, guide


def families(dtype=torch.float64):
    def t(*numbers):
        return torch.tensor(numbers, dtype=dtype)

    one = t(1.0)
    return {
        "Normal": dist.Normal(t(0.0, 30.0), t(1.0, 0.01)).to_event(1),
        "scalar": dist.Laplace(t(0.3)[0], t(2.0)[0]),
        "Uniform": dist.Uniform(t(-1.0, 2.0), t(1.0, 5.0)).to_event(1),
        "Laplace": dist.Laplace(t(0.0, 1.0), t(0.7, 0.7)).to_event(1),
        "StudentT1": dist.StudentT(one, t(0.0), one).to_event(1),
        "StudentT2": dist.StudentT(t(2.0, 2.0), t(0.0, 1000.0), t(1.0, 0.1)).to_event(1),
        "Gamma": dist.Gamma(t(2.0, 0.5, 0.5, 2.0, 1.0), t(1.0, 1.0, 1.0, 1.0, 3.0)).to_event(1),
        "HalfCauchy": dist.HalfCauchy(one).to_event(1),
        "Beta": dist.Beta(t(0.9), t(2.5)).to_event(1),
        "LogNormal": dist.LogNormal(t(0.7), t(2.5)).to_event(1),
        "Gumbel": dist.Gumbel(t(0.7), t(0.5)).to_event(1),
        "Pareto": dist.Pareto(t(0.7), t(0.5)).to_event(1),
        "mixture": dist.MixtureSameFamily(dist.Categorical(t(0.3, 0.7)), dist.Normal(t(-2.0, 1.0), t(0.5, 1.0))),
        "masked": dist.Exponential(t(0.7, 0.8)).mask(False).to_event(1),
        "matrix": dist.HalfNormal(one).expand([2, 3]).to_event(2),
    }


def standard_normal(v):
    return torch.as_tensor(stats.norm.logpdf(v.numpy())).sum(-1)


# ---- the density


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_v_is_standard_normal(name, dtype):
    latents = Latents(*programs(families(dtype)[name], quiet), torch.zeros(3, 1, dtype=dtype), gaussian=True)
    assert latents.standard
    line = torch.linspace(-5, 5, 3001, dtype=dtype)
    v = line[:, None, None].expand(-1, 3, latents.dim)
    log_prior, _ = latents.log_joint(v)
    assert log_prior.dtype == dtype
    tolerance = 1e-3 if dtype == torch.float64 or name != "Beta" else 1e-2  # 1 - z is rounded there
    assert ((log_prior - standard_normal(v)).abs() < tolerance * latents.dim).all()
    draws = latents.sample_prior(1000)
    assert draws.dtype == dtype
    assert stats.kstest(draws.flatten().numpy(), stats.norm.cdf).pvalue > 1e-3


def quiet(z):
    return dist.Normal(0 * z.flatten(2).sum(-1, keepdim=True) if z.dim() > 2 else 0 * z, 1.0).to_event(1)


@pytest.mark.parametrize(
    ("prior", "cdf"),
    [
        (dist.StudentT(double(1.0), double(0.0), double(1.0)).to_event(1), stats.t(1).cdf),
        (dist.Laplace(double(0.0), double(1.0)).to_event(1), stats.laplace.cdf),
        (dist.Uniform(double(-2.0), double(2.0)).to_event(1), lambda u: 1 / (1 + math.exp(-u))),
        (dist.Gamma(double(0.1), double(1.0)).to_event(1), lambda u: stats.gamma(0.1).cdf(math.exp(u))),
    ],
    ids=["StudentT", "Laplace", "Uniform", "Gamma"],
)
def test_u_is_the_quantile_of_v(prior, cdf):
    gaussian = Latents(*programs(prior), double(0.0)[:, None], gaussian=True)
    plain = Latents(*programs(prior), double(0.0)[:, None])
    torch.manual_seed(3)
    v = gaussian.sample_prior(50).flatten()
    torch.manual_seed(3)
    u = plain.sample_prior(50).flatten()
    np.testing.assert_allclose([stats.norm.ppf(cdf(each)) for each in u.tolist()], v, atol=1e-6)


# ---- exactness, whatever the interpolation


@pytest.mark.parametrize(
    "prior",
    [
        dist.StudentT(double(2.0), double(0.0), double(1.0)).to_event(1),
        dist.Gamma(double(0.5), double(2.0)).to_event(1),
        # far apart, so that v is no normal where it leaps: no matter
        dist.MixtureSameFamily(dist.Categorical(double(0.3, 0.7)), dist.Normal(double(-6.0, 6.0), double(0.5, 1.0))),
    ],
    ids=["StudentT", "Gamma", "apart"],
)
def test_the_evidence_is_the_same_in_both_coordinates(prior):
    model, guide = programs(prior, lambda z: dist.Normal(z, 0.5).to_event(1))
    found, (nodes, weights) = [], np.polynomial.legendre.leggauss(8)
    leap = stats.norm.ppf(0.3) + np.outer([-1, 1], np.logspace(-9, 0, 5000)).flatten()
    for gaussian in (False, True):
        latents = Latents(model, guide, double(1.7)[:, None], gaussian=gaussian)
        ends = (-9, 9) if gaussian else (-60, 60)
        edges = double(*np.sort(np.concatenate([np.linspace(*ends, 2001), leap])))
        u = (edges[:-1, None] + edges.diff()[:, None] * (1 + double(*nodes)) / 2).flatten()
        joint = sum(latents.log_joint(u[:, None, None])).exp().view(-1, 8)
        found.append((joint @ double(*weights) * edges.diff() / 2).sum().item())
    assert found[0] == pytest.approx(found[1], rel=2e-6)


def test_densities_of_model_and_guide_change_by_the_same():
    prior = dist.StudentT(double(2.0, 1.0), double(0.0, 1.0), double(1.0, 3.0)).to_event(1)
    model, guide = programs(prior, lambda z: dist.Normal(z.sum(-1, keepdim=True), 0.5).to_event(1))
    x = torch.randn(4, 1, dtype=torch.float64)
    draws = []
    for gaussian in (False, True):
        torch.manual_seed(1)
        latents = Latents(model, guide, x, gaussian=gaussian)
        u = latents.sample_guide(20)
        log_prior, log_likelihood, log_guide = latents.log_joint_and_guide(u)
        draws.append((log_prior - log_guide, log_likelihood))
    torch.testing.assert_close(draws[0], draws[1], rtol=1e-9, atol=1e-9)


# ---- derivatives


@pytest.mark.parametrize("name", ["StudentT2", "Laplace", "Beta", "Normal"])
def test_gradients_are_those_of_finite_differences(name):
    prior = families()[name]
    latents = Latents(*programs(prior, quiet), double(0.0)[:, None], gaussian=True)
    v = torch.tensor([-9.3, -3.01, -0.207, 0.4, 2.2, 5.1, 8.4], dtype=torch.float64)
    v = v[:, None, None].expand(-1, 1, latents.dim).clone().requires_grad_()

    def log_joint(v):
        return latents.log_joint(v)[0]

    assert torch.autograd.gradcheck(log_joint, v, eps=1e-7, atol=1e-4)
    assert torch.autograd.gradgradcheck(log_joint, v, eps=1e-7, atol=1e-3)


def test_runs_as_one_graph():
    latents = Latents(*programs(families()["StudentT2"], quiet), torch.zeros(3, 1).double(), gaussian=True)

    def gradient(v):
        with torch.enable_grad():
            v = v.requires_grad_()
            return torch.autograd.grad(latents.log_joint(v)[0].sum(), v)

    v = 3 * torch.randn(5, 3, 2, dtype=torch.float64)
    graph = trace_graph(gradient, [v])
    again = 4 * torch.randn(5, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(graph(again)[0], gradient(again.clone())[0])


def test_positions_that_ran_away_have_no_density_and_do_not_fail():
    latents = Latents(*programs(families()["StudentT2"], quiet), double(0.0)[:, None], gaussian=True)
    v = double(math.nan, math.inf, -math.inf, 1e300)[:, None, None].expand(-1, 1, 2)
    assert not latents.log_joint(v)[0].gt(-1e3).any()


# ---- the inverse, and draws


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["StudentT1", "Uniform", "Gamma", "mixture", "scalar", "Normal"])
def test_the_inverse_is_one(name, dtype):
    latents = Latents(*programs(families(dtype)[name], quiet), torch.zeros(1, 1, dtype=dtype), gaussian=True)
    shape = latents._places["z"][1]
    v = torch.linspace(-6, 6, 999, dtype=dtype).view(-1, *[1] * len(shape)).expand(-1, *shape)
    u, log_slope = latents._maps["z"](v)
    back = latents._maps["z"].inverse(u)
    assert back.dtype == dtype
    torch.testing.assert_close(back, v, rtol=0, atol=1e-9 if dtype == torch.float64 else 3e-4)  # u is rounded
    assert (u.diff(dim=0) > 0).all()
    slope = (u[2:] - u[:-2]) / (v[2:] - v[:-2])
    assert ((slope.log() - log_slope[1:-1]).abs() < 0.02).all()


def test_simulated_pairs_are_read_in_the_coordinates():
    model, guide = programs(families()["Gamma"], lambda z: dist.Normal(z.sum(-1, keepdim=True), 0.1).to_event(1))
    latents = Latents(model, guide, torch.zeros(2000, 1).double(), gaussian=True)
    x, v = latents.simulate()
    assert stats.kstest(v.flatten().numpy(), stats.norm.cdf).pvalue > 1e-3
    log_likelihood = latents.of(x).log_joint(v[None])[1]
    noise = stats.norm.logpdf(0.1 * np.random.default_rng(0).standard_normal(200_000), 0, 0.1).mean()
    assert log_likelihood.mean().item() == pytest.approx(noise, abs=0.1)
    part = latents.select(slice(5, 8))
    torch.testing.assert_close(part.log_joint(v[None, 5:8])[0], latents.log_joint(v[None])[0][:, 5:8])
    assert part.prior_draws(10).shape == (10, 5)


# ---- which sites


def chain(top, bottom, x_of=lambda a, b: b):
    def draw(x):
        a = pyro.sample("a", top)
        return a, pyro.sample("b", bottom(a, x))

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(x_of(*draw(x)), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            draw(x)

    return model, guide


def test_a_site_that_depends_on_another_stays():
    laplace = dist.Laplace(double(0.0), 1.0).to_event(1)
    x = torch.randn(4, 1, dtype=torch.float64)
    depends = Latents(*chain(laplace, lambda a, x: dist.Laplace(a, 1.0).to_event(1)), x, gaussian=True)
    assert set(depends._maps) == {"a"}
    assert not depends.standard
    free = Latents(*chain(laplace, lambda a, x: laplace), x, gaussian=True)
    assert set(free._maps) == {"a", "b"}
    assert free.standard
    v = torch.randn(7, 4, 2, dtype=torch.float64)
    torch.testing.assert_close(free.log_joint(v)[0], standard_normal(v), rtol=0, atol=1e-5)
    # uniform between zero and a: the logit of b / a has the same distribution whatever a
    positive = dist.Gamma(double(2.0), 1.0).to_event(1)
    scaled = Latents(*chain(positive, lambda a, x: dist.Uniform(0 * a, a).to_event(1)), x, gaussian=True)
    torch.testing.assert_close(scaled.log_joint(v)[0], standard_normal(v), rtol=0, atol=1e-5)


def test_a_site_that_depends_on_the_datum_stays():
    x = torch.randn(5, 1, dtype=torch.float64)
    latents = Latents(*programs(lambda x: dist.Laplace(x, 1.0).to_event(1)), x, gaussian=True)
    assert not latents._maps
    assert not latents.standard


@pytest.mark.parametrize(
    "prior",
    [
        dist.Dirichlet(double(1.0, 2.0, 3.0)),
        dist.MultivariateNormal(double(0.0, 0.0), torch.eye(2).double()),
        dist.VonMises(double(0.0), double(1.0)).to_event(1),  # its density goes on periodically over the whole line
    ],
    ids=["Dirichlet", "MultivariateNormal", "VonMises"],
)
def test_what_is_not_independent_or_not_normalized_stays(prior):
    model, guide = programs(prior, quiet)
    x = torch.zeros(2, 1).double()
    latents, plain = Latents(model, guide, x, gaussian=True), Latents(model, guide, x)
    assert not latents.standard
    u = torch.randn(5, 2, latents.dim, dtype=torch.float64)
    torch.testing.assert_close(latents.log_joint(u), plain.log_joint(u), rtol=0, atol=0)


def test_a_standard_normal_is_left_as_it_is():
    model, guide = programs(dist.Normal(double(0.0, 0.0), 1.0).to_event(1), quiet)
    latents = Latents(model, guide, double(0.0)[:, None], gaussian=True)
    assert latents.standard
    assert not latents._maps
    assert not Latents(model, guide, double(0.0)[:, None]).standard


def test_the_random_numbers_of_others_go_on_as_if_none_had_been_drawn():
    model, guide = programs(families()["Laplace"], quiet)
    after = []
    for gaussian in (False, True):
        torch.manual_seed(2)
        Latents(model, guide, double(0.0)[:, None], gaussian=gaussian)
        after.append(torch.rand(1).item())
    assert after[0] == after[1]


def test_a_masked_site_and_the_unseen_part_of_another():
    def model(x, seen):
        with pyro.plate("data", len(x), dim=-1):
            with pyro.poutine.mask(mask=seen):
                z = pyro.sample("z", dist.Laplace(double(0.0), 1.0).to_event(1))
            pyro.sample("y", dist.Laplace(0 * z, 1.0).to_event(1), obs=x, obs_mask=seen)
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x, seen):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    data = double(0.3, -2.0, 1.0)[:, None], torch.tensor([True, False, True])
    latents = Latents(model, guide, data, gaussian=True)
    assert latents.standard
    v = torch.randn(6, 3, 1, dtype=torch.float64)
    torch.testing.assert_close(latents.log_joint(v)[0], standard_normal(v), rtol=0, atol=1e-5)


def test_log_of_a_tiny_gamma_in_single_precision_is_finite():
    prior = dist.Gamma(torch.tensor([0.1]), torch.tensor([1.0])).to_event(1)
    latents = Latents(*programs(prior, quiet), torch.zeros(1, 1), gaussian=True)
    v = torch.linspace(-7, 7, 200)[:, None, None]
    log_prior = latents.log_joint(v)[0]
    assert log_prior.isfinite().all()
    assert (log_prior < standard_normal(v) + 0.01).all()
