"""Imputation and conditional densities, by the conditionals of the normal distribution."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from pyro_vae import ContractError
from pyro_vae.infer.evidence import Annealing, impute, log_conditional
from tests.oracles import BinaryLatents, linear_gaussian


def conditional(model, x, target, given):
    """Mean and covariance of x_target given x_given, of one row."""
    weight = model.weight
    whole = weight @ weight.mT + model.scale**2 * torch.eye(len(weight)).double()
    gain = torch.linalg.solve(whole[given][:, given], whole[given][:, target]).mT
    mean = model.mean[target] + gain @ (x[given] - model.mean[given])
    return mean, whole[target][:, target] - gain @ whole[given][:, target]


def wrong_guide(model):
    """Twice as wide as the posterior, and beside it."""

    def guide(x, seen=None):
        with pyro.plate("data", len(x), dim=-1):
            posterior = model.posterior(x, seen)
            scale = 2 * posterior.variance.sqrt()
            pyro.sample("z", dist.Normal(posterior.mean + 0.3 * scale, scale).to_event(1))

    return guide


def data_with_gaps(rows=6):
    torch.manual_seed(0)
    model = linear_gaussian(pixels=5, latent_dim=2)
    x = model.mean + 2 * torch.randn(rows, 5, dtype=torch.float64)
    seen = torch.rand(rows, 5) > 0.4
    seen[0], seen[1], seen[:, 0] = True, False, True
    seen[1, 0] = False
    return model, x, seen


@pytest.mark.parametrize("chains", [None, Annealing(num_chains=4000, num_temperatures=4)])
def test_imputations_are_those_of_the_conditional_normal(chains):
    model, x, seen = data_with_gaps()
    pyro.set_rng_seed(0)
    found = impute(model.model, wrong_guide(model), (x, seen), 8000, num_draws=4000, chains=chains, num_checked=0)
    assert found.draws.shape == (4000, 6, 5)
    assert torch.equal(found.seen, seen)
    assert torch.equal(found.mean[seen], x[seen])
    assert (found.std[seen] == 0).all()
    assert (found.draws[:, seen] == x[seen]).all()
    assert found.evidence.reliable.all()
    assert (found.ess > 500).all()
    torch.testing.assert_close(found.evidence.log_px, model.log_px(x, seen), rtol=0, atol=0.15)
    for row in range(1, 6):
        lost = ~seen[row]
        mean, covariance = conditional(model, x[row], lost, seen[row])
        std = covariance.diagonal().sqrt()
        assert ((found.mean[row, lost] - mean).abs() < 5 * std / found.ess[row].sqrt()).all()
        torch.testing.assert_close(found.std[row, lost], std, rtol=0.1, atol=0)
        draws = found.draws[:, row, lost]
        assert ((draws.mean(0) - mean).abs() < 0.12 * std).all()
        torch.testing.assert_close(draws.mT.cov().reshape(covariance.shape), covariance, rtol=0.1, atol=0.1)


def test_imputation_where_latents_are_discrete():
    torch.manual_seed(0)
    binary = BinaryLatents(pixels=6)

    def model(x, seen):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(binary.prior).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z @ binary.weight).mask(seen).to_event(1), obs=x)

    def guide(x, seen):
        binary.guide(x)

    x = torch.bernoulli(torch.full((4, 6), 0.5, dtype=torch.float64))
    seen = torch.tensor([True, True, True, True, False, True]).expand(4, 6)
    found = impute(model, guide, (x, seen), 20000)
    both = [binary.log_px(torch.where(seen, x, value)) for value in (0.0, 1.0)]
    wanted = torch.sigmoid(both[1] - both[0])
    torch.testing.assert_close(found.mean[:, 4], wanted, rtol=0, atol=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["exact", "wrong"])
def test_log_conditional_is_that_of_the_normal(whose):
    model, x, _ = data_with_gaps(rows=8)
    guide = model.guide if whose == "exact" else wrong_guide(model)
    target, given = torch.rand(8, 5) < 0.4, torch.rand(8, 5) < 0.6
    given &= ~target
    target[0, 0], given[0, 0] = True, False
    target[2] = False  # of nothing
    given[3] = False  # given nothing
    pyro.set_rng_seed(1)
    found = log_conditional(model.model, guide, x, target, given, compiled=False)
    wanted = model.log_px(x, target | given) - model.log_px(x, given)
    mean, covariance = conditional(model, x[0], target[0], given[0])
    oracle = stats.multivariate_normal(mean.numpy(), covariance.numpy()).logpdf(x[0, target[0]].numpy())
    assert wanted[0].item() == pytest.approx(oracle, abs=1e-9)
    assert found.reliable.all()
    assert (found.mc_se <= 0.05).all()
    assert ((found.log_px - wanted).abs() < 4 * found.mc_se + 1e-9).all()
    assert found.log_px[2] == 0


@pytest.mark.slow
def test_log_conditional_of_a_few_rows():
    model, x, _ = data_with_gaps(rows=2)
    target = torch.tensor([True, False, False, False, False])
    found = log_conditional(model.model, model.guide, x, target, ~target, Annealing(num_checked=0), compiled=False)
    wanted = model.log_px(x) - model.log_px(x, (~target).expand(2, 5))
    assert ((found.log_px - wanted).abs() < 4 * found.mc_se).all()
    assert (found.mc_se < 0.03).all()


@pytest.mark.slow
def test_a_target_far_away_is_reached():
    model, x, _ = data_with_gaps(rows=3)
    x[:, 1:] += 40
    target = torch.tensor([False, True, True, True, True])
    found = log_conditional(model.model, model.guide, x, target, ~target, Annealing(error=0.1), compiled=False)
    wanted = model.log_px(x) - model.log_px(x, (~target).expand(3, 5))
    assert (wanted < -100).all()
    assert ((found.log_px - wanted).abs() < 4 * found.mc_se).all()


@pytest.mark.slow
def test_a_mode_that_chains_miss_is_not_reliable():
    """x_0 = abs(z) tells nothing of z's sign, x_1 = z does: p(x_1 | x_0) is a mixture of two."""

    def model(x, seen):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            loc = torch.stack([z.abs(), z.expand_as(z)], -1)
            pyro.sample("x", dist.Normal(loc, 0.1).mask(seen).to_event(1), obs=x)

    def guide(x, seen):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x[:, 0], 0.1))

    x = torch.tensor([[1.5, -1.5], [1.5, 1.5]], dtype=torch.float64)
    target = torch.tensor([False, True])
    found = log_conditional(model, guide, x, target, ~target, compiled=False)
    # z | x_0 has both signs, equally likely; 0.1^2 both times
    wanted = math.log(0.5) + stats.norm(1.5 / 1.01, math.sqrt(0.01 / 1.01 + 0.01)).logpdf(1.5)
    right = (found.log_px - wanted).abs() < 4 * found.mc_se + 0.02
    assert (right | ~found.reliable).all()
    assert right.all()


@pytest.mark.parametrize(
    ("target", "given", "message"),
    [
        ([1, 1, 0, 0, 0], [0, 1, 1, 0, 0], "target and given overlap, in row 0, column 1"),
        ([0, 0, 0, 1, 0], [1, 0, 0, 0, 0], "target asks for an entry that is NaN, in row 2, column 3"),
        ([1, 0], [0, 1], r"target must be booleans of shape \(6, 5\) or \(5,\)"),
    ],
)
def test_masks_that_make_no_sense_are_refused(target, given, message):
    model, x, _ = data_with_gaps()
    x[2, 3] = math.nan
    masks = torch.tensor(target).bool(), torch.tensor(given).bool()
    with pytest.raises(ContractError, match=message):
        log_conditional(model.model, model.guide, x, *masks)


def test_programs_that_do_not_heed_the_mask_are_refused():
    model, x, _ = data_with_gaps()
    target = torch.tensor([True, False, False, False, False])
    with pytest.raises(ContractError, match="site 'x' must count what its program's argument 'seen' says"):
        log_conditional(lambda x, seen: model.model(x), model.guide, x, target, ~target)
    with pytest.raises(ContractError, match="observed sites are 'x': 'y' is none of them"):
        impute(model.model, model.guide, x, site="y")
    with pytest.raises(ValueError, match="num_draws must be at least 1"):
        impute(model.model, model.guide, x, num_draws=0)
