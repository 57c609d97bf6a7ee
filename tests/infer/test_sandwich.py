"""Thermodynamic integration, and log p(x) between two estimates, against closed forms and quadrature."""

from typing import Any

import pytest
import torch
from oracles import Fold, Funnel, SeparableBernoulli, linear_gaussian

from pyro_vae import Annealing, sandwich, thermodynamic_integration
from pyro_vae.infer.evidence.posterior import PosteriorChains
from pyro_vae.infer.evidence.reverse import spread_draws
from pyro_vae.infer.evidence.tempered import Pilot
from pyro_vae.infer.evidence.thermodynamic import Thermodynamic, integral

CHECK = PosteriorChains(8, 50, 100, num_leapfrogs=3, max_rhat=1.1, min_ess=80)
QUICK: dict[str, Any] = {"num_warmup": 3, "num_draws": 12, "num_leapfrogs": 2, "check": CHECK}
ANNEALING = Annealing(16, 8, num_leapfrogs=2)


def test_the_rule_is_exact_for_cubic_averages_whose_derivative_is_known():
    betas = torch.tensor([0.0, 0.1, 0.3, 0.7, 1.0], dtype=torch.float64)
    means, variances = betas**3 - betas, 3 * betas**2 - 1
    assert integral(betas, means, variances).item() == pytest.approx(1 / 4 - 1 / 2, abs=1e-12)
    assert integral(betas, means).item() == pytest.approx(torch.trapezoid(means, betas).item(), abs=1e-12)


def test_temperatures_stand_at_equal_lengths_and_where_they_are_asked_for():
    betas = torch.linspace(0, 2, 201, dtype=torch.float64)
    found = Pilot(betas, betas.sqrt(), torch.arange(201.0).view(-1, 1))
    placed, steps = found.place(8, torch.tensor([0.5, 2.0], dtype=torch.float64))
    assert len(placed) == 9
    assert {0.0, 0.5, 2.0} <= set(placed.tolist())
    torch.testing.assert_close(placed[4:].sqrt().diff(), torch.full((4,), 2**0.5 / 8).double(), rtol=1e-3, atol=0)
    torch.testing.assert_close(steps[:, 0], (placed * 100).ceil().float())


@pytest.mark.slow
@pytest.mark.parametrize("start", ["laplace", "guide", "prior"])
def test_thermodynamic_integration_of_skewed_posteriors(start):
    separable = SeparableBernoulli()
    x = torch.bernoulli(torch.full((6, 20), 0.4, dtype=torch.float64))
    found = thermodynamic_integration(separable.model, separable.guide, x, Thermodynamic(start=start, **QUICK))
    error = (found.log_px - separable.log_px(x)) / found.mc_se
    assert (found.mc_se < 0.3).all()
    assert error.abs().max() < 4
    assert found.reliable is not None
    assert found.reliable.sum() >= 5
    assert found.evaluations is not None
    assert (found.evaluations > 2 * 2 * 16 * (8 * 12 + 8 * 3)).all()


@pytest.mark.slow
def test_thermodynamic_integration_is_exact_where_the_start_is_the_posterior():
    vae = linear_gaussian()
    x = torch.randn(3, 7, dtype=torch.float64)
    found = thermodynamic_integration(vae.model, vae.guide, x, Thermodynamic(**QUICK))
    torch.testing.assert_close(found.log_px, vae.log_px(x))
    assert found.reliable is not None
    assert found.reliable.all()
    assert (found.mc_se > 0).all()


@pytest.mark.slow
def test_too_few_temperatures_are_a_part_of_the_error():
    vae = linear_gaussian()
    x = 3 * torch.randn(4, 7, dtype=torch.float64)
    few = thermodynamic_integration(vae.model, vae.guide, x, Thermodynamic(start="prior", num_temperatures=2, **QUICK))
    assert ((few.log_px - vae.log_px(x)).abs() < 4 * few.mc_se).all()
    assert few.reliable is not None
    assert not few.reliable.any()


@pytest.mark.slow
@pytest.mark.parametrize("program", [Fold, Funnel])
def test_several_modes_and_funnels_are_right_or_not_reliable(program):
    x = torch.tensor([0.2, 1.0], dtype=torch.float64)
    truth = program.log_px(x)
    found = sandwich(program.model, program.guide, x, ANNEALING, CHECK)
    thermodynamic = thermodynamic_integration(program.model, program.guide, x, Thermodynamic(**QUICK))
    for each in (thermodynamic, found.lower, found.upper):
        assert each.reliable is not None
        assert not (((each.log_px - truth).abs() > 4 * each.mc_se + 0.01) & each.reliable).any()


@pytest.mark.slow
def test_a_sandwich_of_real_data():
    separable = SeparableBernoulli()
    x = torch.bernoulli(torch.full((8, 20), 0.4, dtype=torch.float64))
    found = sandwich(separable.model, separable.guide, x, ANNEALING, CHECK)
    assert found.data is x
    truth = separable.log_px(x)
    for each in (found.lower, found.upper):
        assert each.reliable is not None
        assert each.reliable.sum() >= 7
        assert ((each.log_px - truth).abs() < 4 * each.mc_se).all()
    width, error = found.width()
    assert -3 * error < width < 0.2
    assert found.lower.log_px.mean() < truth.mean() + 0.1
    assert found.upper.log_px.mean() > truth.mean() - 0.1


@pytest.mark.slow
def test_posterior_draws_come_from_all_chains(monkeypatch):
    vae = linear_gaussian()
    x = torch.randn(2, 7, dtype=torch.float64)
    seen = []
    monkeypatch.setattr(
        "pyro_vae.infer.evidence.reverse.spread_draws",
        lambda posterior, num: seen.append(posterior) or spread_draws(posterior, num),
    )
    found = sandwich(vae.model, vae.guide, x, Annealing(20, 3), CHECK)
    torch.testing.assert_close(found.upper.log_px, vae.log_px(x))
    (posterior,) = seen
    u = spread_draws(posterior, 20)
    torch.testing.assert_close(u[3], posterior.coordinates.to_latents(posterior.e[-1])[3])
    torch.testing.assert_close(u[11], posterior.coordinates.to_latents(posterior.e[-1 - 100 // 3])[3])
    assert len(u.flatten(1).unique(dim=0)) == 20


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_chains": 3},
        {"num_temperatures": 3},
        {"num_warmup": 0},
        {"num_draws": 2},
        {"start": "mode"},
        {"target_acceptance": 0.0},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Thermodynamic(**wrong)
