"""Bridge sampling, and the posterior chains under it, against closed forms and quadrature."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import Fold, Funnel, SeparableBernoulli, linear_gaussian
from torch import Tensor

from pyro_vae import ContractError, Evidence, bridge_sampling
from pyro_vae.infer.evidence import bridge
from pyro_vae.infer.evidence.bridge import batch_variance
from pyro_vae.infer.evidence.chains import evaluator
from pyro_vae.infer.evidence.importance import CHUNK
from pyro_vae.infer.evidence.posterior import PosteriorChains, posterior_chains
from pyro_vae.infer.supports import Latents
from pyro_vae.infer.whole import WholeProgram

QUICK = PosteriorChains(num_chains=8, num_warmup=50, num_draws=100, num_leapfrogs=3, max_rhat=1.1, min_ess=80)
EASY = PosteriorChains(num_chains=8, num_warmup=30, num_draws=100, num_leapfrogs=2, max_rhat=1.1, min_ess=80)
"""Enough for a normal posterior."""


def reliable(found: Evidence) -> Tensor:
    assert found.reliable is not None
    return found.reliable


@pytest.mark.slow
def test_the_chains_draw_from_the_posterior():
    vae = linear_gaussian()
    x = torch.randn(3, 7, dtype=torch.float64)
    latents = Latents(vae.model, vae.guide, x)
    found = posterior_chains(latents, QUICK, evaluator(latents, "normal", compiled=False))
    exact = vae.posterior(x)
    u = torch.stack([found.coordinates.to_latents(e) for e in found.e]).flatten(0, 1)
    error = exact.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt() / 100**0.5
    assert ((u.mean(0) - exact.mean).abs() < 4 * error).all()
    centred = u - u.mean(0)
    covariance = torch.einsum("kbi,kbj->bij", centred, centred) / len(u)
    torch.testing.assert_close(covariance, exact.covariance_matrix.expand_as(covariance), rtol=0.2, atol=0.02)
    log_joint = sum(latents.log_joint(found.coordinates.to_latents(found.e[5]))) + found.coordinates.log_det
    torch.testing.assert_close(found.log_joint[5], log_joint)
    assert found.converged.all()


def test_linear_gaussian_model():
    vae = linear_gaussian(latent_dim=3)
    x = torch.randn(4, 7, dtype=torch.float64)
    found = bridge_sampling(vae.model, vae.guide, x, QUICK)
    torch.testing.assert_close(found.log_px, vae.log_px(x), atol=0.02, rtol=0)
    assert reliable(found).all()
    assert (found.mc_se < 0.01).all()
    assert found.evaluations is not None
    assert (found.evaluations > 8 * (50 + 100) * 3 * 2).all()


@pytest.mark.slow
def test_chunks_are_of_the_same_data(monkeypatch):
    monkeypatch.setitem(CHUNK, "cpu", 2**20)
    vae = linear_gaussian(latent_dim=3)
    x = torch.randn(4, 7, dtype=torch.float64)
    found = bridge_sampling(vae.model, vae.guide, x, QUICK)
    torch.testing.assert_close(found.log_px, vae.log_px(x), atol=0.02, rtol=0)


@pytest.mark.slow
def test_twenty_dimensions_that_are_skewed():
    separable = SeparableBernoulli()
    x = torch.bernoulli(torch.full((6, 20), 0.4, dtype=torch.float64))
    found = bridge_sampling(separable.model, separable.guide, x, QUICK)
    error = (found.log_px - separable.log_px(x)) / found.mc_se
    assert reliable(found).all()
    assert (found.mc_se < 0.1).all()
    assert error.abs().max() < 4
    assert error.square().mean().sqrt() < 2


@pytest.mark.slow
@pytest.mark.parametrize("program", [Fold, Funnel])
def test_several_modes_and_funnels_are_right_or_not_reliable(program):
    x = torch.tensor([0.0, 0.2, 1.0, 2.0], dtype=torch.float64)
    found = bridge_sampling(program.model, program.guide, x, QUICK)
    wrong = (found.log_px - program.log_px(x)).abs() > 4 * found.mc_se + 0.01
    assert not (wrong & reliable(found)).any()
    if program is Fold:
        assert reliable(found).tolist() == [True, True, False, False]


@pytest.mark.slow
def test_draws_of_the_prior_tell_of_a_mode_that_no_chain_has_found(monkeypatch):
    monkeypatch.setattr("pyro_vae.infer.evidence.posterior._dispersed_starts", lambda path, num: path.draw(num))
    x = torch.tensor([0.2, 1.0], dtype=torch.float64)
    found = bridge_sampling(Fold.model, Fold.guide, x, QUICK)
    assert (found.log_px[1] - Fold.log_px(x)[1]).item() == pytest.approx(-math.log(2), abs=0.05)
    assert reliable(found).tolist() == [True, False]


def test_an_integral_that_diverges_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(x.new_zeros(len(x)), 1.0))
            b = pyro.sample("b", dist.StudentT(3.0, x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Exponential(b.exp()), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            for name in "ab":
                pyro.sample(name, dist.Normal(x.new_zeros(len(x)), 0.2))

    with pytest.raises(ContractError, match=r"diverges for datum 1 .* site 'b'"):
        bridge_sampling(model, guide, torch.tensor([1.0, 0.0], dtype=torch.float64), QUICK)


def test_an_improper_prior_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()).expand([len(x)]))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.5))

    with pytest.raises(ContractError, match="site 'z' has an improper prior"):
        bridge_sampling(model, guide, torch.ones(2), QUICK)


@pytest.mark.slow
def test_whole_programs():
    def model(y, weight=-1.0):
        z = pyro.sample("z", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), 0.5), obs=y)
        pyro.factor("more", weight * z.square().sum(-1))

    y = torch.tensor(1.3, dtype=torch.float64)
    found = bridge.estimate(WholeProgram(model, (y,)), EASY)
    # N(z | 0, I) exp(-z'z) is N(z | 0, I / 3) / 3
    truth = dist.Normal(0.0, (2 / 3 + 0.25) ** 0.5).log_prob(y) - math.log(3)
    assert found.log_px.item() == pytest.approx(truth.item(), abs=0.02)
    assert reliable(found).all()
    with pytest.raises(ContractError, match=r"diverges .* site 'z'"):
        bridge.estimate(WholeProgram(model, (y, 1.0)), EASY)


def test_the_variance_of_a_mean_is_that_of_an_autoregression():
    noise = torch.randn(2000, 50, 3, dtype=torch.float64)
    draws = [noise[0]]
    for each in noise[1:]:
        draws.append(0.5 * draws[-1] + each)
    expected = 1 / (1 - 0.5) ** 2 / (2000 * 50)
    torch.testing.assert_close(batch_variance(torch.stack(draws)) / expected, torch.ones(3).double(), rtol=0.1, atol=0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_chains": 3},
        {"num_warmup": 10},
        {"num_draws": 2.5},
        {"num_leapfrogs": 0},
        {"target_acceptance": 1},
        {"max_rhat": 1},
        {"min_ess": 0},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PosteriorChains(**wrong)
