"""What is not finite is counted and never called reliable, nor is what rounding has made absurd."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro_vae.evidence import difference_estimate

from pyro_vae import (
    Annealing,
    ContractError,
    Evidence,
    annealed_importance_sampling,
    bidirectional_monte_carlo,
    bridge_sampling,
    importance_sampling,
    sandwich,
    smc,
    thermodynamic_integration,
)
from pyro_vae.infer.evidence.particles import SMC
from pyro_vae.infer.evidence.posterior import PosteriorChains
from pyro_vae.infer.evidence.thermodynamic import Thermodynamic

CHAINS = PosteriorChains(4, 20, 8)
X = torch.tensor([[1.0, 0, 1, 0], [1, 1, 1, 1], [0, 0, 1, 1]])


def annealed(start, num=None):
    settings = Annealing(4, num, start, num_checked=0, most_temperatures=8)
    return partial(annealed_importance_sampling, settings=settings)


def both(estimator):
    def estimate(model, guide, x):
        lower, upper, _ = estimator(model, guide, x)
        return Evidence(
            *(torch.cat(pair) if torch.is_tensor(pair[0]) else 0 for pair in zip(lower, upper, strict=True))
        )

    return estimate


ESTIMATORS = {
    "importance": partial(importance_sampling, num_samples=50, num_checked=2),
    "laplace": partial(importance_sampling, num_samples=50, proposal="laplace", num_checked=2),
    "annealed": annealed("laplace"),
    "annealed from the prior": annealed("prior"),
    "annealed from the guide": annealed("guide"),
    "annealed, given temperatures": annealed("laplace", 4),
    "smc": partial(smc, settings=SMC(16, 4)),
    "bridge": partial(bridge_sampling, settings=CHAINS),
    "thermodynamic": partial(thermodynamic_integration, settings=Thermodynamic(4, 4, 1, 4, check=CHAINS)),
    "bidirectional": both(partial(bidirectional_monte_carlo, settings=Annealing(4, 4))),
    "sandwich": both(partial(sandwich, settings=Annealing(4, 4), chains=CHAINS)),
}

LONG = "thermodynamic", "bridge", "sandwich"


def programs(prior_scale=1.0, logits=lambda logits, x: logits, likelihood=None):
    weight = torch.tensor([[1.0, -0.5, 0.3, 2.0], [0.2, 1.5, -1.0, 0.4]])

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), prior_scale).to_event(1))
            found = logits(z @ weight, x)
            fn = dist.Bernoulli(logits=found) if likelihood is None else likelihood(found)
            pyro.sample("x", fn.to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    return model, guide


def where(condition, value):
    return lambda logits, x: torch.where(condition(logits, x), torch.full_like(logits, value), logits)


BROKEN = {
    "a huge prior": programs(1e30),
    "a larger one": programs(1e38),
    "a tiny prior": programs(1e-30),
    "one that is zero": programs(1e-44),
    "NaN at some z": programs(logits=where(lambda logits, x: logits > 1, math.nan)),
    "infinity of each x": programs(logits=where(lambda logits, x: logits.abs() >= 0, math.inf)),
    "a tiny likelihood": programs(likelihood=lambda loc: dist.Normal(loc, 1e-30)),
    "NaN of each x": programs(likelihood=lambda loc: dist.Normal(loc, loc * math.nan)),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("program", BROKEN)
@pytest.mark.parametrize("name", [pytest.param(k, marks=pytest.mark.slow if k in LONG else []) for k in ESTIMATORS])
def test_nothing_broken_is_reliable(name, program):
    try:
        found = ESTIMATORS[name](*BROKEN[program], X)
    except ContractError:  # there is no posterior
        return
    assert not found.reliable.any()
    lost = ~found.log_px.isfinite()
    assert (found.num_invalid[lost] > 0).all()
    assert not found.mc_se[lost].isfinite().any()
    assert torch.tensor(found.mean()).isfinite().all() == (not lost.any())


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["importance", "laplace", "annealed", "annealed, given temperatures", "bridge"])
def test_absurd_values_are_not_reliable(name):
    found = ESTIMATORS[name](*programs(logits=lambda logits, x: 1e30 * logits), X)
    absurd = found.log_px.abs() > 1e6
    assert absurd.any()
    assert not found.reliable[absurd].any()


def test_one_row_that_is_lost_leaves_the_others_alone():
    model, guide = programs(logits=where(lambda _, x: x.sum(-1, keepdim=True) == 4, math.nan))
    found = importance_sampling(model, guide, X, 50, num_checked=0)
    assert found.log_px.isnan().tolist() == [False, True, False]
    assert found.num_invalid.tolist() == [0, 50, 0]
    assert found.reliable[[0, 2]].all()
    assert not found.reliable[1]
    assert all(math.isnan(each) for each in (*found.mean(), found.shortfall()))
    assert found.share_bad_k() == pytest.approx(1 / 3)
    fine = Evidence(*(each[:2] if torch.is_tensor(each) else each for each in found))
    assert all(math.isnan(each) for each in difference_estimate(found, fine, torch.tensor([0, 1])))
