"""Data far from all that an encoder was trained on have a finite log p(x), or are named."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae import LinearGaussianVAE, annealed_importance_sampling, importance_sampling

LINEAR = LinearGaussianVAE(torch.tensor([[1.0, 0.5], [-0.3, 2.0], [0.7, 0.1]]), torch.zeros(3), 0.5)
X = torch.tensor([[0.3, -1.0, 0.5], [300.0, 200.0, -500.0], [-800.0, 1000.0, 600.0]])


def guide_of(gain):
    """An encoder that is near the posterior, and whose scale runs away with the distance."""

    def guide(x):
        exact = LINEAR.posterior(x)
        scale = 0.5 * (gain * (x.abs().mean(-1, keepdim=True) - 0.6)).exp()
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", dist.Normal(exact.mean * 1.1, scale.expand(-1, 2)).to_event(1))

    return guide


@pytest.mark.parametrize("gain", [-1.0, -0.1, -0.02, 0.02, 0.1, 1.0])
def test_what_importance_sampling_cannot_know_is_not_called_reliable(gain):
    evidence = importance_sampling(LINEAR.model, guide_of(gain), X, 200, num_checked=0)
    wrong = (evidence.log_px - LINEAR.log_px(X)).abs() > 5 * evidence.mc_se + 1
    assert not (evidence.reliable & (wrong | ~evidence.log_px.isfinite())).any()
    assert not evidence.reliable[1:].any()
    assert evidence.log_px[0].isfinite()


@pytest.mark.slow
def test_annealing_finds_the_exact_number():
    evidence = annealed_importance_sampling(LINEAR.model, guide_of(1.0), X)
    torch.testing.assert_close(evidence.log_px.float(), LINEAR.log_px(X), rtol=1e-4, atol=0.1)


def test_the_exact_posterior_is_reliable_anywhere():
    x = X / torch.tensor([[1.0], [100.0], [100.0]])
    evidence = importance_sampling(LINEAR.model, LINEAR.guide, x, 200, num_checked=0)
    assert evidence.reliable.all()
    torch.testing.assert_close(evidence.log_px.float(), LINEAR.log_px(x))
