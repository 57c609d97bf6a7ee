"""Rate and distortion against the closed form of a linear-Gaussian model."""

import math
from typing import Any

import pytest
import torch
from oracles import SeparableBernoulli, linear_gaussian
from torch import Tensor

from pyro_vae import LinearGaussianVAE, rate_distortion
from pyro_vae.infer.evidence.distortion import Tempering

QUICK = Tempering(num_chains=32, num_temperatures=60, num_leapfrogs=3)


def exact(vae: LinearGaussianVAE, x: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Of N(z | m, S) with precision I + beta W'W / s^2: KL to N(0, I), and E[-log N(x | W z + b, s^2)]."""
    weight, variance = vae.weight, 0.7**2
    dim = weight.shape[1]
    covariance = torch.linalg.inv(torch.eye(dim).to(x) + beta / variance * weight.mT @ weight)
    mean = beta / variance * (x - vae.mean) @ weight @ covariance
    squares = (x - vae.mean - mean @ weight.mT).square().sum(-1) + (weight @ covariance @ weight.mT).trace()
    distortion = 0.5 * squares / variance + 0.5 * x.shape[1] * math.log(2 * math.pi * variance)
    rate = 0.5 * (covariance.trace() + mean.square().sum(-1) - dim - covariance.logdet())
    return rate, distortion


def test_linear_gaussian_curve():
    vae = linear_gaussian()
    x = vae.mean + torch.randn(30, 7, dtype=torch.float64)
    found = rate_distortion(vae.model, vae.guide, x, (0.01, 0.1, 1.0, 3.0), QUICK)
    assert found.rate.shape == found.distortion.shape == (4, 30)
    means = found.mean()
    for i, beta in enumerate(found.betas.tolist()):
        for name, truth in zip(("rate", "distortion"), exact(vae, x, beta), strict=True):
            value, error = getattr(found, name)[i], getattr(found, f"{name}_se")[i]
            # the weights of 32 chains are heavy-tailed: one datum in 30 may be far out
            assert ((value - truth) / error).clamp(-3, 3).square().mean().sqrt() < 1.6
            mean, _, of_chains = means[name][i]
            assert abs(mean - truth.mean().item()) < 4 * of_chains
            assert of_chains < 0.1 * (1 + abs(truth.mean().item()))
    assert found.reliable.all()
    assert (found.rate.mean(1).diff() > 0).all()
    assert (found.distortion.mean(1).diff() < 0).all()
    torch.testing.assert_close(found.rate[2] + found.distortion[2], -found.log_z[2])
    assert abs(means["log_z"][2][0] - vae.log_px(x).mean().item()) < 4 * means["log_z"][2][2]
    assert (found.evaluations > 32 * 60 * 3 * 2).all()


def test_the_pilot_finds_how_many_temperatures_the_error_takes():
    separable = SeparableBernoulli()
    x = torch.bernoulli(torch.full((5, 20), 0.4, dtype=torch.float64))
    found = rate_distortion(separable.model, separable.guide, x, [1.0], Tempering(num_leapfrogs=3))
    error = (found.log_z[0] - separable.log_px(x)) / found.log_z_se[0]
    assert error.abs().max() < 4
    assert 0.05 < found.log_z_se.square().mean().sqrt() < 0.3


def test_chains_that_are_worth_too_little_are_not_reliable():
    vae = linear_gaussian(pixels=20, latent_dim=6)
    x = vae.mean + 4 * torch.randn(4, 20, dtype=torch.float64)
    found = rate_distortion(vae.model, vae.guide, x, [1.0], Tempering(num_temperatures=2))
    assert not found.reliable.any()


@pytest.mark.parametrize("betas", [[], [0.0, 1.0], [1.0, 0.5], [1.0, math.inf], [math.nan]])
def test_betas_that_do_not_rise_are_refused(betas):
    vae = linear_gaussian()
    with pytest.raises(ValueError, match="betas must be positive and ascending"):
        rate_distortion(vae.model, vae.guide, torch.zeros(1, 7, dtype=torch.float64), betas)


@pytest.mark.parametrize(
    "wrong",
    [{"num_chains": 1}, {"num_temperatures": 0}, {"num_leapfrogs": 0.5}, {"error": 0}, {"target_acceptance": 1}],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Tempering(**wrong)
