"""R-hat and effective sample sizes of chains against ArviZ."""

import warnings

import pytest
import torch
from torch import Tensor

from pyro_vae.infer.convergence import autocorrelation_ess, bulk_ess, split_rhat, tail_ess

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ArviZ's, of its own future, once a day
    import arviz as az


def oracle(function, draws: Tensor, **settings) -> Tensor:
    """ArviZ's number of each variable, its chains first."""
    flat = draws.flatten(2).permute(2, 1, 0).numpy()
    return torch.tensor([float(function(each, **settings)) for each in flat], dtype=torch.float64).view(draws.shape[2:])


def chains(n: int, num_chains: int, correlation: float = 0.8) -> Tensor:
    """Three autoregressions: of one mean, of two, of two widths; and one that often stays where it is."""
    noise = torch.randn(n, num_chains, 4, dtype=torch.float64)
    draws = [noise[0]]
    for each in noise[1:]:
        draws.append(correlation * draws[-1] + (1 - correlation**2) ** 0.5 * each)
    draws = torch.stack(draws)
    draws[:, ::2, 1] += 1
    draws[:, ::2, 2] *= 2
    draws[:, :, 3] = draws[torch.arange(n) // 3 * 3, :, 3]
    return draws


@pytest.mark.parametrize("shape", [(400, 4), (251, 3), (1000, 16)])
@pytest.mark.parametrize("correlation", [0.8, 0.0, -0.5])
def test_rhat_and_sizes_are_those_of_arviz(shape, correlation):
    draws = chains(shape[0], shape[1], correlation)
    even = draws[: shape[0] // 2 * 2]  # of odd numbers, ArviZ's versions leave out different draws
    torch.testing.assert_close(split_rhat(even), oracle(az.rhat, even), rtol=1e-9, atol=0)
    torch.testing.assert_close(bulk_ess(even), oracle(az.ess, even, method="bulk"), rtol=1e-9, atol=0)
    torch.testing.assert_close(autocorrelation_ess(draws), oracle(az.ess, draws, method="identity"), rtol=1e-9, atol=0)
    torch.testing.assert_close(tail_ess(even), oracle(az.ess, even, method="tail"), rtol=0.02, atol=0)


def test_rhat_tells_chains_apart():
    rhat = split_rhat(chains(1000, 8))
    assert rhat[0] < 1.02
    assert (rhat[1:3] > 1.05).all()


def test_constant_and_invalid_draws():
    draws = torch.randn(100, 4, 3)
    draws[:, :, 1] = 2.0
    draws[7, 1, 2] = torch.nan
    assert split_rhat(draws).isnan().tolist() == [False, False, True]
    assert split_rhat(draws)[1] == 1
    assert bulk_ess(draws).isnan().tolist() == [False, False, True]
    assert tail_ess(draws).isnan().tolist() == [False, False, True]
