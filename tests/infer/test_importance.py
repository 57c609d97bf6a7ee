import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from oracles import BinaryLatents, binary, linear_gaussian, small_vae
from scipy.stats import multivariate_normal

from pyro_vae import Evidence, LinearGaussianVAE, active_units, estimate_elbo, importance_sampling
from pyro_vae.infer.diagnostics import effective_sample_size, pareto_k, pareto_k_threshold
from pyro_vae.infer.evidence.importance import CHUNK, reduce_log_weights


def wide_guide(vae, widening=1.1):
    """The exact posterior with its covariance widened: weights are bounded, so errors mean what they say."""

    def guide(x):
        exact = vae.posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(exact.mean, exact.covariance_matrix * widening**2))

    return guide


def arviz_psis(log_w):
    """Smoothed log-weights of one vector of log-weights, normalized, and Pareto's k, by ArviZ."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz as az
    if int(az.__version__.split(".")[0]) == 0:
        return az.psislw(log_w)
    from arviz_stats.base import array_stats

    return array_stats.psislw(-log_w)


def test_linear_gaussian_log_px_and_posterior_against_scipy():
    vae = linear_gaussian(pixels=7, latent_dim=2)
    x = torch.randn(5, 7, dtype=torch.float64)
    weight, mean = vae.weight.numpy(), vae.mean.numpy()
    covariance = weight @ weight.T + vae.scale**2 * np.eye(7)
    np.testing.assert_allclose(vae.log_px(x), multivariate_normal(mean, covariance).logpdf(x), rtol=1e-12)
    # Bayes' rule: p(x, z) / p(z | x) is p(x), whatever z is
    z = torch.randn(5, 2, dtype=torch.float64)
    noise = x.numpy() - z.numpy() @ weight.T - mean
    log_joint = multivariate_normal(cov=np.eye(2)).logpdf(z) + multivariate_normal(cov=vae.scale**2 * np.eye(7)).logpdf(
        noise
    )
    np.testing.assert_allclose(log_joint - vae.posterior(x).log_prob(z).numpy(), vae.log_px(x), rtol=1e-10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), torch.zeros(3), 1.0), r"weight must be \(X, D\)"),
        ((torch.zeros(3, 2), torch.zeros(2), 1.0), r"mean \(X,\)"),
        ((torch.zeros(3, 2), torch.zeros(3), 0.0), "scale must be positive"),
    ],
)
def test_linear_gaussian_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LinearGaussianVAE(*arguments)


def test_exact_guide_gives_the_exact_evidence_without_error():
    vae = linear_gaussian()
    x = torch.randn(5, 7, dtype=torch.float64)
    evidence = importance_sampling(vae.model, vae.guide, x, 100)
    torch.testing.assert_close(evidence.log_px, vae.log_px(x), rtol=0, atol=1e-9)
    assert (evidence.mc_se < 1e-6).all()
    torch.testing.assert_close(evidence.ess, torch.full((5,), 100.0).double(), rtol=1e-6, atol=0)
    assert (evidence.num_invalid == 0).all()
    assert evidence.acceptance.isnan().all()


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("num_samples", "most"), [(50, 6), (5000, 4.5)])
def test_importance_sampling_is_within_its_own_error(num_samples, most):
    vae = linear_gaussian()
    x = torch.randn(200, 7, dtype=torch.float64)
    evidence = importance_sampling(vae.model, wide_guide(vae), x, num_samples)
    standardized = (evidence.log_px - vae.log_px(x)) / evidence.mc_se
    assert (standardized.abs() < most).all()  # an error of few samples is itself uncertain
    assert 0.8 < standardized.std() < 1.2
    assert (evidence.mc_se > 0).all()


@pytest.mark.slow
def test_intervals_cover_at_the_stated_rate():
    vae = linear_gaussian()
    x = torch.randn(1, 7, dtype=torch.float64).expand(2000, 7)  # 2,000 replications on one observation
    evidence = importance_sampling(vae.model, wide_guide(vae, 1.2), x, 500)
    covered = ((evidence.log_px - vae.log_px(x)).abs() < 1.96 * evidence.mc_se).double().mean().item()
    assert evidence.khat.median() < 0.3
    assert 0.93 < covered < 0.97  # binomial standard error 0.005


@pytest.mark.slow
def test_brute_force_over_binary_latents():
    program, x = BinaryLatents(), binary(3, pixels=6)
    evidence = importance_sampling(program.model, program.guide, x, 100_000)
    assert ((evidence.log_px - program.log_px(x)).abs() < 4 * evidence.mc_se).all()
    assert (evidence.mc_se > 1e-4).all()


def test_a_grey_pixel_is_refused():
    vae = small_vae()
    with pytest.raises(ValueError, match="outside the support"):
        importance_sampling(vae.model, vae.guide, torch.full((2, 12), 0.3, dtype=torch.float64), 5)


@pytest.mark.parametrize("settings", [{"num_samples": 0}, {"num_samples": 1, "memory": 0}])
def test_bad_settings_are_refused(settings):
    vae = small_vae()
    with pytest.raises(ValueError, match="must be at least 1"):
        importance_sampling(vae.model, vae.guide, binary(2), **settings)


@pytest.mark.parametrize("sizes", [[1000], [1] * 1000, [500, 500], [999, 1], [7] * 142 + [6]])
def test_reduction_does_not_depend_on_the_chunks(sizes):
    log_w = 3 * torch.randn(1000, 4, dtype=torch.float64) - 700
    whole = reduce_log_weights([log_w], 1000)
    parts = reduce_log_weights(log_w.split(sizes), 1000)
    for name in Evidence._fields[:-1]:
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-9, atol=1e-9, equal_nan=True)
    np.testing.assert_allclose(whole.log_px, np.log(np.exp(log_w.numpy() + 700).mean(0)) - 700, rtol=1e-12)
    w = np.exp(log_w.numpy() + 700)
    np.testing.assert_allclose(whole.mc_se, w.std(0, ddof=1) / w.mean(0) / math.sqrt(1000), rtol=1e-9)
    np.testing.assert_allclose(whole.ess, w.sum(0) ** 2 / (w**2).sum(0), rtol=1e-9)


def test_reduction_counts_what_it_was_promised():
    with pytest.raises(ValueError, match="expected 10 log-weights per observation, got 9"):
        reduce_log_weights([torch.zeros(9, 2)], 10)


@pytest.mark.slow
def test_exactly_num_samples_are_drawn_whatever_the_chunks(monkeypatch):
    vae, x = small_vae(), binary(5)
    drawn = []

    def guide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", vae.posterior(x))
        drawn.append(z.numel())
        return z

    for memory in (1, 10_000, 2**30):
        drawn.clear()
        monkeypatch.setitem(CHUNK, "cpu", memory)
        importance_sampling(vae.model, guide, x, 333, compiled=False, num_checked=0)
        checks_and_sizing = sum(drawn) - 333 * 5 * 3
        once = 2 * 5 + 2 * (2 + 3)  # two samples of each, and of every other one alone
        again = 2 * 5  # of each chunk, without that
        collapsed = 8 * 5  # of each datum, to see whether its draws differ
        assert checks_and_sizing == 3 * (64 + 128 + once + again + collapsed)


def test_invalid_log_weights_are_counted_and_never_averaged_away():
    log_w = torch.zeros(100, 3)
    log_w[:2, 1] = -math.inf
    log_w[5, 2] = math.nan
    evidence = reduce_log_weights(log_w.split(10), 100)
    assert evidence.num_invalid.tolist() == [0, 2, 1]
    assert evidence.log_px[0].item() == pytest.approx(0)
    assert evidence.log_px[1].item() == pytest.approx(math.log(0.98))  # a weight of zero counts as zero
    assert evidence.log_px[2].isnan()
    assert evidence.khat[2].isnan()


def test_one_sample_has_no_error():
    evidence = reduce_log_weights([torch.zeros(1, 2)], 1)
    assert evidence.log_px.tolist() == [0, 0]
    assert evidence.mc_se.isnan().all()
    assert evidence.khat.isnan().all()


@pytest.mark.parametrize("num_samples", [100, 1000, 5000])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_pareto_k_against_arviz(num_samples, spread):
    log_w = spread * torch.randn(num_samples, 3, dtype=torch.float64) + 100
    ours = pareto_k(log_w)
    for column, k in zip(log_w.T.numpy(), ours, strict=True):
        assert k.item() == pytest.approx(float(arviz_psis(column)[1]), abs=0.03)


@pytest.mark.parametrize("sizes", [[2000], [300] * 6 + [200]])
def test_pareto_smoothing_against_arviz(sizes):
    log_w = torch.tensor([1.5, 2.5, 4.0], dtype=torch.float64) * torch.randn(2000, 3, dtype=torch.float64) - 300
    evidence = reduce_log_weights(log_w.split(sizes), 2000, smooth=True)
    raw = reduce_log_weights([log_w], 2000)
    for column, log_px, mc_se, k in zip(log_w.T.numpy(), evidence.log_px, evidence.mc_se, evidence.khat, strict=True):
        normalized, theirs = arviz_psis(column)
        assert k > 1 / 3  # below, ArviZ leaves the weights as they are
        close = 1e-6 if abs(k.item() - float(theirs)) < 1e-6 else 0.02  # ArviZ 1.x may fit one draw less
        at = column.argmin()  # not in the tail, so that only the normalization has changed it
        assert log_px.item() == pytest.approx(column[at] - normalized[at] - math.log(2000), abs=close)
        w = np.exp(normalized) * 2000
        assert mc_se.item() == pytest.approx(w.std(ddof=1) / math.sqrt(2000), rel=close)
    assert (evidence.log_px != raw.log_px).all()
    torch.testing.assert_close(evidence.khat, raw.khat)


def test_smoothing_changes_nothing_where_weights_are_equal():
    evidence = reduce_log_weights([torch.full((100, 2), -5.0)], 100, smooth=True)
    torch.testing.assert_close(evidence.log_px, torch.full((2,), -5.0).double())
    assert reduce_log_weights([torch.zeros(10, 1)], 10, smooth=True).log_px == 0


def test_pareto_k_of_a_pareto_tail():
    # the weights of a proposal whose k is known: U^-k has a generalized Pareto tail of shape k
    for k in (0.2, 0.5, 0.9):
        log_w = -k * torch.rand(20_000, 20, dtype=torch.float64).log()
        assert pareto_k(log_w).mean().item() == pytest.approx(k, abs=0.05)


def test_pareto_k_where_there_is_nothing_to_fit():
    assert pareto_k(torch.zeros(20, 1)).isnan()  # too few draws
    assert pareto_k(torch.zeros(100, 1)) == -math.inf  # bounded: all equal
    one = torch.full((100, 1), -1e6)
    one[3] = 0
    assert pareto_k(one) == math.inf  # one weight is everything


@pytest.mark.parametrize(("num_samples", "threshold"), [(10, 0.0), (100, 0.5), (1000, 2 / 3), (10**6, 0.7)])
def test_pareto_k_threshold(num_samples, threshold):
    assert pareto_k_threshold(num_samples) == pytest.approx(threshold)


def test_effective_sample_size():
    log_w = torch.tensor([0.0, 0.0, 0.0, -math.inf])[:, None] - 1000
    assert effective_sample_size(log_w).item() == pytest.approx(3)


def test_estimate_elbo_matches_the_closed_form():
    vae = linear_gaussian()
    x = torch.randn(7, 7, dtype=torch.float64)
    guide = wide_guide(vae, 1.5)
    exact = vae.posterior(x)
    q = dist.MultivariateNormal(exact.mean, exact.covariance_matrix * 1.5**2)
    bound = vae.log_px(x) - torch.distributions.kl_divergence(q, exact)  # ELBO = log p(x) - KL(q, posterior)
    elbo = estimate_elbo(vae.model, guide, x, num_samples=20_000)
    assert elbo.shape == (7,)
    assert ((elbo - bound).abs() < 0.05).all()
    assert ((vae.log_px(x) - bound) > 0.3).all()


def test_active_units_of_a_linear_gaussian():
    weight = torch.zeros(6, 3, dtype=torch.float64)
    weight[:3, 0] = 1.0  # used
    weight[3:, 1] = 0.01  # hardly used: its posterior means vary by less than the threshold
    vae = LinearGaussianVAE(weight, torch.zeros(6, dtype=torch.float64), scale=0.3)
    x = torch.randn(3000, 3, dtype=torch.float64) @ weight.T + 0.3 * torch.randn(3000, 6, dtype=torch.float64)
    variance = vae.posterior(x).mean.var(0)
    units = active_units(vae.guide, x)
    assert units.keys() == {"z"}
    assert units["z"].tolist() == (variance > 0.01).tolist() == [True, False, False]
    with pytest.raises(ValueError, match="at least 2"):
        active_units(vae.guide, x, num_samples=1)


def test_shortfall_is_that_of_the_logarithm():
    """log of the mean of 16 weights is low by half its squared error, to first order."""
    log_w = 0.5 * torch.randn(16, 200_000, dtype=torch.float64)
    evidence = reduce_log_weights([log_w], 16)
    low = 0.125 - evidence.log_px.mean().item()  # E[w] = exp(0.5^2 / 2)
    assert evidence.shortfall() == pytest.approx(low, rel=0.1)
    assert evidence.share_bad_k() is None
    assert reduce_log_weights([4 * torch.randn(1000, 50)], 1000).share_bad_k() > 0.9
    assert reduce_log_weights([torch.randn(1000, 50) / 9], 1000).share_bad_k() == 0


def test_evidence_mean_and_its_two_errors():
    evidence = reduce_log_weights([torch.randn(100, 50)], 100)
    mean, over_images, monte_carlo = evidence.mean()
    assert mean == pytest.approx(evidence.log_px.mean().item())
    assert over_images == pytest.approx(np.std(evidence.log_px.numpy(), ddof=1) / math.sqrt(50))
    assert monte_carlo == pytest.approx(np.sqrt((evidence.mc_se.numpy() ** 2).sum()) / 50)


def test_evidence_round_trip_through_netcdf(tmp_path):
    evidence = reduce_log_weights([torch.randn(100, 5)], 100)
    datum = torch.tensor([3, 5, 7, 11, 13])
    tree = xr.DataTree.from_dict({"importance": evidence.to_dataset(datum)})
    tree.to_netcdf(tmp_path / "evidence.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "evidence.nc", engine="h5netcdf") as tree:
        group = tree["importance"]
        assert group.attrs["num_samples"] == 100
        for name in set(Evidence._fields) - {"num_samples"}:
            np.testing.assert_array_equal(group[name].values, getattr(evidence, name))
        assert group["log_px"].dims == ("datum",)
        assert group["datum"].values.tolist() == [3, 5, 7, 11, 13]
