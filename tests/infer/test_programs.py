import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import BinaryLatents, binary, linear_gaussian, small_vae
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from scipy.stats import multivariate_normal

from pyro_vae import (
    ELBO,
    ContractError,
    annealed_importance_sampling,
    check_program,
    handrolled,
    importance_sampling,
    log_weights,
    traces,
)
from pyro_vae.infer.programs import find_non_finite, posterior_samples


def handrolled_elbo(vae, x, **kwargs):
    return handrolled.elbo(vae.posterior.network, vae.likelihood.network, x, **kwargs)


def gradients(loss, vae):
    return torch.autograd.grad(loss, list(vae.parameters()))


def assert_all_close(left, right, **tolerance):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_log_weight_is_log_joint_minus_log_posterior():
    vae, x = small_vae(), binary(4)
    model_trace, guide_trace = traces(vae.model, vae.guide, x, 5)
    z = guide_trace.nodes["z"]["value"]
    loc, log_scale = vae.posterior.network(x).chunk(2, -1)
    standard = ((z - loc) / log_scale.exp()).detach().numpy()
    log_q = multivariate_normal(cov=torch.eye(3)).logpdf(standard) - log_scale.sum(-1).detach().numpy()
    log_pz = multivariate_normal(cov=torch.eye(3)).logpdf(z.detach().numpy())
    p = torch.sigmoid(vae.likelihood.network(z))
    log_px = torch.where(x == 1, p, 1 - p).log().sum(-1).detach()
    total = model_trace.nodes["x"]["log_prob"] + model_trace.nodes["z"]["log_prob"] - guide_trace.nodes["z"]["log_prob"]
    torch.testing.assert_close(total.detach(), log_px + torch.as_tensor(log_pz - log_q), rtol=1e-9, atol=1e-9)


def test_exact_posterior_gives_log_px_at_every_sample():
    vae = linear_gaussian()
    x = vae.mean + torch.randn(5, 7, dtype=torch.float64)
    log_w = log_weights(vae.model, vae.guide, x, 20)
    assert log_w.shape == (20, 5)
    torch.testing.assert_close(log_w, vae.log_px(x).expand(20, 5), rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampled_kl", [True, False])
def test_handrolled_elbo_is_pyros_value_and_gradient(sampled_kl):
    vae, x = small_vae(), binary(6)
    torch.manual_seed(1)
    ours = -handrolled_elbo(vae, x, sampled_kl=sampled_kl).sum()
    torch.manual_seed(1)
    with pyro.get_param_store().scope():
        pyro_loss = Trace_ELBO() if sampled_kl else TraceMeanField_ELBO()
        theirs = pyro_loss.differentiable_loss(vae.model, vae.guide, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert_all_close(gradients(ours, vae), gradients(theirs, vae), rtol=1e-9, atol=1e-12)


def test_elbo_objective_is_trace_elbo_per_datum():
    vae, x = small_vae(), binary(6)
    torch.manual_seed(1)
    ours = ELBO()(vae.model, vae.guide, x)
    torch.manual_seed(1)
    theirs = Trace_ELBO().differentiable_loss(vae.model, vae.guide, x) / 6
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert_all_close(gradients(ours, vae), gradients(theirs, vae), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_samples", [1, 7])
def test_logmeanexp_of_log_weights_is_renyi_elbo_at_zero(num_samples):
    vae, x = small_vae(), binary(6)
    torch.manual_seed(1)
    log_w = log_weights(vae.model, vae.guide, x, num_samples)
    ours = (log_w.logsumexp(0) - math.log(num_samples)).sum()
    torch.manual_seed(1)
    with pyro.get_param_store().scope():
        theirs = RenyiELBO(alpha=0, num_particles=num_samples, max_plate_nesting=1, vectorize_particles=True)
        theirs = -theirs.loss(vae.model, vae.guide, x)
    assert ours.item() == pytest.approx(theirs, rel=1e-12)


def test_closed_form_kl_is_the_mean_of_the_sampled_one():
    loc, log_scale = torch.tensor([0.7, -1.2]).double(), torch.tensor([-0.4, 0.3]).double()
    sampled = handrolled.sampled_gaussian_kl(loc, log_scale, torch.randn(100_000, 2, dtype=torch.float64))
    exact = torch.distributions.kl_divergence(dist.Normal(loc, log_scale.exp()), dist.Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(handrolled.gaussian_kl(loc, log_scale), exact)
    assert abs(sampled.mean() - exact) < 4 * sampled.std() / math.sqrt(100_000)
    assert sampled.std() > 0.1


def test_binary_latents_need_no_reparametrization():
    program, x = BinaryLatents(), binary(3, pixels=6)
    log_w = log_weights(program.model, program.guide, x, 200_000)
    weights = (log_w - program.log_px(x)).exp()  # mean 1
    assert ((weights.mean(0) - 1).abs() < 4 * weights.std(0) / math.sqrt(200_000)).all()


def test_posterior_samples_have_the_guides_moments():
    vae = linear_gaussian()
    x = torch.randn(2, 7, dtype=torch.float64)
    z = posterior_samples(vae.guide, x, 100_000)["z"]
    exact = vae.posterior(x)
    assert z.shape == (100_000, 2, 2)
    standard_error = exact.variance.sqrt() / math.sqrt(100_000)
    assert ((z.mean(0) - exact.mean).abs() < 4 * standard_error).all()


def subsampled(x):
    with pyro.plate("data", 100, subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def subsampled_guide(x):
    with pyro.plate("data", 100, subsample_size=len(x)):
        pyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))


def global_latent(x):
    z = pyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def global_guide(x):
    pyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))


def no_event(x):
    with pyro.plate("data", len(x), dim=-1), pyro.plate("pixels", 2, dim=-3):
        z = pyro.sample("z", dist.Normal(0, 1))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x.mT[:, None])


def no_event_guide(x):
    with pyro.plate("data", len(x), dim=-1), pyro.plate("pixels", 2, dim=-3):
        pyro.sample("z", dist.Normal(0, 1))


def unobserved(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))


def other_name(x):
    with pyro.plate("data", len(x)):
        pyro.sample("u", dist.Normal(0, 1).expand([2]).to_event(1))


def local_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (unobserved, local_guide, "must have an observed site"),
        (subsampled, subsampled_guide, "scaled"),
        (global_latent, global_guide, "outside the data plate"),
        (global_latent, local_guide, "outside the data plate"),
        (no_event, no_event_guide, "in one data plate"),
    ],
)
def test_programs_that_give_no_log_weight_are_refused(model, guide, message):
    with pytest.raises(ValueError, match=message):
        log_weights(model, guide, torch.zeros(3, 2), 4)


def test_mismatched_sites_are_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match=r"same latent sites, got \['z'\] and \['u'\]"):
        log_weights(model, other_name, torch.zeros(3, 2), 4)


def test_scaled_site_is_refused():
    vae = small_vae()
    with pytest.raises(ValueError, match="scaled"):
        log_weights(pyro.poutine.scale(vae.model, scale=2.0), vae.guide, binary(2), 1)


def test_no_samples_are_refused():
    vae = small_vae()
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        log_weights(vae.model, vae.guide, binary(2), 0)
    with pytest.raises(ValueError, match="num_particles must be a whole number of at least 1, got 0"):
        ELBO(0)


def test_check_program_names_what_is_wrong():
    vae, x = small_vae(), binary(4)
    check_program(vae.model, vae.guide, x)
    with pytest.raises(ValueError, match=r"2 observations of site 'x' lie outside the support of BernoulliVector"):
        check_program(vae.model, vae.guide, torch.cat([x, torch.full((2, 12), 0.5, dtype=torch.float64)]))
    with pytest.raises(ValueError, match=r"\(0, 12\)"):
        check_program(vae.model, vae.guide, x[:0])


def test_find_non_finite_names_the_first_site():
    vae, x = small_vae(), binary(4)
    assert find_non_finite(vae.model, vae.guide, x) is None
    with torch.no_grad():
        vae.likelihood.network.layers[-1].bias[0] = math.nan
    assert find_non_finite(vae.model, vae.guide, x) == "log-probability of model site 'x'"
    with torch.no_grad():
        vae.posterior.network.layers[-1].bias[0] = math.nan
    assert find_non_finite(vae.model, vae.guide, x) == "value of guide site 'z'"


@pytest.mark.parametrize("estimate", [importance_sampling, log_weights, annealed_importance_sampling])
def test_no_observations_and_nan_are_refused(estimate):
    vae, settings = small_vae(), () if estimate is annealed_importance_sampling else (3,)
    with pytest.raises(ContractError, match=r"no datum: data has shape \(0, 12\)"):
        estimate(vae.model, vae.guide, torch.zeros(0, 12, dtype=torch.float64), *settings)
    if estimate is not log_weights:
        x = binary(4)
        x[1:3, 5] = math.nan
        with pytest.raises(ContractError, match="2 of 4 observations hold NaN"):
            estimate(vae.model, vae.guide, x, *settings)


def test_an_observed_site_that_is_not_x_is_refused():
    vae, x = small_vae(), binary(4)
    with pytest.raises(ContractError, match="site 'x' holds something else than the observations"):
        check_program(lambda x: vae.model(1 - x), vae.guide, x)
    with pytest.raises(ContractError, match="site 'x' holds something else"):
        importance_sampling(lambda x: vae.model(torch.ones_like(x)), vae.guide, x, 5)


@pytest.mark.parametrize("inside", [True, False])
def test_what_a_distribution_masks_was_not_seen(inside):
    shape = (50, 3) if inside else (50, 1)
    y, seen = torch.randn(50, 3, dtype=torch.float64), torch.rand(shape) < 0.6

    def model(y, seen):
        with pyro.plate("data", len(y), dim=-1):
            z = pyro.sample("z", dist.Normal(y.new_zeros(len(y)), 1.0))
            normals = dist.Normal(z.unsqueeze(-1).expand(*z.shape, 3), 0.5)
            made = normals.mask(seen).to_event(1) if inside else normals.to_event(1).mask(seen.squeeze(-1))
            pyro.sample("y", made, obs=y)

    def guide(y, seen):
        count, total = seen.expand(len(y), 3).sum(-1), (seen * y).sum(-1)
        with pyro.plate("data", len(y), dim=-1):
            pyro.sample("z", dist.Normal(4 * total / (1 + 4 * count), (1 + 4 * count) ** -0.5))

    check_program(model, guide, {"y": y, "seen": seen})
    for log_w, each, some in zip(log_weights(model, guide, {"y": y, "seen": seen}, 2).T, y, seen, strict=True):
        each = each[some.expand(3)]  # the posterior is exact, so each log-weight is the log-likelihood
        covariance = torch.ones(len(each), len(each), dtype=y.dtype) + torch.eye(len(each), dtype=y.dtype) / 4
        zero = torch.zeros(len(each), dtype=y.dtype)
        truth = dist.MultivariateNormal(zero, covariance).log_prob(each) if len(each) else each.sum()
        assert log_w.tolist() == pytest.approx([truth.item()] * 2, abs=1e-6)
