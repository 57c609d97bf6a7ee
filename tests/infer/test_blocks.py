"""Estimates by fixed blocks of data: who computes them, when, and in how much memory, changes no digit."""

import random
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from oracles import binary, linear_gaussian, small_vae
from torch import Tensor

from pyro_vae import (
    Annealing,
    annealed_importance_sampling,
    bidirectional_monte_carlo,
    bridge_sampling,
    estimate_elbo,
    importance_sampling,
    impute,
    inference_gaps,
    log_conditional,
    quadrature,
    rate_distortion,
    sandwich,
    smc,
    thermodynamic_integration,
)
from pyro_vae.infer import compiling, diagnostics
from pyro_vae.infer.evidence import blocks, importance
from pyro_vae.infer.evidence.distortion import Tempering
from pyro_vae.infer.evidence.local import local_flow, local_mean_field
from pyro_vae.infer.evidence.particles import SMC
from pyro_vae.infer.evidence.posterior import PosteriorChains
from pyro_vae.infer.evidence.thermodynamic import Thermodynamic
from pyro_vae.infer.trees import tensors

CHAINS = PosteriorChains(4, 20, 8)
FEW = Annealing(4, 4, num_checked=4)


def annealing(start, num=None):
    return Annealing(4, num, start, error=0.6, num_checked=4, most_temperatures=8)


def estimators():
    """Called with model, guide, data and options, and as many data as make several blocks of each."""
    seen = torch.arange(7) < 4
    return {
        "importance": partial(importance_sampling, num_samples=70, num_checked=4),
        "laplace": partial(importance_sampling, num_samples=30, proposal="laplace", num_checked=4),
        "annealed": partial(annealed_importance_sampling, settings=annealing("laplace")),
        "annealed from the guide": partial(annealed_importance_sampling, settings=annealing("guide")),
        "annealed from the prior": partial(annealed_importance_sampling, settings=annealing("prior")),
        "annealed, given temperatures": partial(annealed_importance_sampling, settings=FEW),
        "bidirectional": partial(bidirectional_monte_carlo, settings=annealing("guide")),
        "smc": partial(smc, settings=SMC(16, 4)),
        "bridge": partial(bridge_sampling, settings=CHAINS),
        "thermodynamic": partial(thermodynamic_integration, settings=Thermodynamic(4, 4, 1, 4, check=CHAINS)),
        "sandwich": partial(sandwich, settings=FEW, chains=CHAINS),
        "rate and distortion": partial(rate_distortion, betas=[0.5, 1.0], settings=Tempering(4, 6)),
        "imputation": partial(impute, num_samples=50, num_draws=3, num_checked=4),
        "imputation by chains": partial(impute, num_draws=3, chains=annealing("laplace"), num_checked=4),
        "conditional": partial(log_conditional, target=~seen, given=seen, settings=FEW),
    }


class Stop(Exception):
    pass


class Shared:
    """Parts by stage and number, computed at random by calls of an estimator of which each dies after some parts."""

    def __init__(self, at_most):
        self.parts, self.at_most, self.left = {}, at_most, at_most

    def __call__(self, stage, do, number):
        missing = [i for i in range(number) if (stage, i) not in self.parts]
        random.Random(len(self.parts)).shuffle(missing)
        for i in missing:
            if not self.left:
                raise Stop
            self.left -= 1
            torch.rand(3)  # a part depends on its number, not on what was drawn before
            self.parts[stage, i] = do(i)
            if i == 1:  # it was lost
                for name, value in do(i).items():
                    torch.testing.assert_close(value, self.parts[stage, i][name], rtol=0, atol=0, equal_nan=True)
        return (self.parts[stage, i] for i in range(number))

    def finish(self, estimate):
        """What the last of the calls gives."""
        while True:
            self.left = self.at_most
            torch.manual_seed(0)
            try:
                return estimate(work=self)
            except Stop:
                continue


def check_equal(a, b):
    pairs = [pair for pair in zip(tensors(tuple(a)), tensors(tuple(b)), strict=True) if isinstance(pair[0], Tensor)]
    assert len(pairs) > 3
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def small(monkeypatch):
    """Blocks are of 8 data, and what is compiled, soon, rounds in another way than what is not."""

    def compile_graph(graph, tensors):
        return lambda *given: tuple(each * (1 + 1e-13) for each in graph(*given))

    monkeypatch.setattr(compiling, "compile_graph", compile_graph)
    monkeypatch.setattr(compiling.Compiled.__init__, "__defaults__", (10, lambda *_: False))
    monkeypatch.setattr(importance, "WORTH", 3)
    monkeypatch.setattr(blocks, "BLOCK", 8)
    monkeypatch.setattr(diagnostics, "BLOCK", 8)


QUICK = "importance", "annealed, given temperatures", "imputation"


@pytest.mark.filterwarnings("ignore:memory=1 is less than a chunk takes")
@pytest.mark.parametrize("name", [pytest.param(k, marks=[] if k in QUICK else pytest.mark.slow) for k in estimators()])
def test_no_digit_depends_on_who_computes_what(name, small, monkeypatch):
    if name in ("importance", "annealed from the guide"):  # several chunks in a block, some of them compiled
        monkeypatch.setitem(importance.CHUNK, "cpu", 200_000)
    vae = linear_gaussian(latent_dim=3)
    x = vae.mean + torch.randn(17, 7, dtype=torch.float64)
    if name == "conditional":
        vae, x = small_vae(pixels=7), binary(17, pixels=7)
    if name.startswith("imputation"):
        x = x, torch.rand(17, 7) < 0.7
    estimate = partial(estimators()[name], vae.model, vae.guide, x)
    torch.manual_seed(0)
    alone = estimate()
    state = torch.get_rng_state()
    shared = Shared(at_most=6 if "annealed" in name else 2)
    check_equal(shared.finish(partial(estimate, memory=1)), alone)
    assert len(shared.parts) >= 3
    torch.manual_seed(0)
    torch.randint(2**62, ())  # all that it may take
    assert torch.equal(torch.get_rng_state(), state)


UNTOLD = {  # what is said of the data of one block depends on no other
    "importance": lambda *given: importance_sampling(*given, num_samples=5, num_checked=0).log_px,
    "annealed": lambda *given: (
        annealed_importance_sampling(*given, settings=Annealing(2, 3, num_checked=0), compiled=False).log_px
    ),
    "elbo": estimate_elbo,
    "mean field": lambda *given: local_mean_field(*given, num_steps=2).loc[:, 0],
    "flow": lambda *given: local_flow(*given, num_steps=2).parameters["steps.0.hyper.0.bias"][:, 0],
    "gaps": lambda model, guide, x: inference_gaps(
        model, guide, torch.zeros(len(x)), x, num_steps=1, num_samples=2
    ).inference_gap()[0],
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", UNTOLD)
def test_each_block_reads_its_own_data_and_draws_its_own_noise(name, small):
    vae = small_vae()
    x = binary(1).expand(20, -1).clone()
    torch.manual_seed(0)
    found = UNTOLD[name](vae.model, vae.guide, x)
    assert len(found.unique()) == 20
    x[8:16] = 1 - x[8:16]
    torch.manual_seed(0)
    other = UNTOLD[name](vae.model, vae.guide, x)
    assert torch.equal(other[:8], found[:8])
    assert torch.equal(other[16:], found[16:])
    assert not (other[8:16] == found[8:16]).any()
    torch.manual_seed(1)
    assert not (UNTOLD[name](vae.model, vae.guide, x) == other).any()


@pytest.mark.parametrize("estimate", [estimate_elbo, local_mean_field, local_flow, quadrature])
def test_a_batch_size_changes_no_digit(estimate, small):
    if estimate in (local_mean_field, local_flow):
        estimate = partial(estimate, num_steps=2)
    vae, x, found = small_vae(latent_dim=1), binary(10), []
    for more in ({}, {"batch_size": 3}):
        torch.manual_seed(0)
        with pytest.warns(DeprecationWarning, match="batch_size has no effect") if more else nullcontext():
            found.append(tensors(estimate(vae.model, vae.guide, x, **more)))
    for one, other in zip(*found, strict=True):
        if isinstance(one, Tensor):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_what_is_compiled_is_decided_for_each_part_alone(small):
    function = compiling.Compiled(lambda x: x + 1, 2, lambda x: len(x) == 3)
    two, three = torch.ones(2, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for _ in range(2):
        assert [(function(two) != 2).any().item() for _ in range(4)] == [False, False, True, True]
        assert (function(three) != 2).all()
        function = function.anew()
