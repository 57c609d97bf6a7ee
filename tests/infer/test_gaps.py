"""Local posteriors and inference gaps against closed forms, quadrature, and each other."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import BinaryLatents, binary, small_vae
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from pyro_vae import (
    MLP,
    VAE,
    Bernoulli,
    Conditional,
    ContractError,
    Evidence,
    LinearGaussianVAE,
    MeanField,
    TwoLayerVAE,
    inference_gaps,
)
from pyro_vae.infer.evidence import blocks
from pyro_vae.infer.evidence.gaps import InferenceGaps
from pyro_vae.infer.evidence.local import LocalPosterior, local_flow, local_mean_field
from pyro_vae.parts import priors


class Oracle:
    """A linear-Gaussian model, its best mean field, and a guide that is far from it, all ELBOs in closed form."""

    def __init__(self, batch: int, latent_dim: int, shift: float = 3.0, stretch: float = 0.4):
        common = torch.randn(8, 1, dtype=torch.float64)  # makes the latent variables correlated given x
        weight = common + 0.7 * torch.randn(8, latent_dim, dtype=torch.float64)
        self.vae = LinearGaussianVAE(weight, torch.randn(8, dtype=torch.float64), scale=0.7)
        noise = 0.7 * torch.randn(batch, 8, dtype=torch.float64)
        self.x = torch.randn(batch, latent_dim, dtype=torch.float64) @ self.vae.weight.mT + self.vae.mean + noise
        self.log_px = self.vae.log_px(self.x)
        exact = self.vae.posterior(self.x)
        self.exact = MultivariateNormal(exact.mean, exact.covariance_matrix)
        # the Gaussian of precision P is nearest to N(m, diag(1 / P_dd)) in KL(q || p)
        self.scale = exact.precision_matrix.diagonal(dim1=-2, dim2=-1).rsqrt().expand_as(exact.mean)
        self.best = self.elbo(exact.mean, self.scale)
        self.start = (exact.mean + shift * self.scale, stretch * self.scale)

    def elbo(self, loc: Tensor, scale: Tensor) -> Tensor:
        return self.log_px - kl_divergence(MultivariateNormal(loc, torch.diag_embed(scale.square())), self.exact)

    def guide(self, x: Tensor) -> None:
        """Amortized, as a guide must be: the posterior's mean is linear in x."""
        exact = self.vae.posterior(x)
        scale = exact.precision_matrix.diagonal(dim1=-2, dim2=-1).rsqrt()
        shift, stretch = (self.start[0] - self.exact.mean)[0], self.start[1][0] / scale[0]
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(exact.mean + shift, stretch * scale).to_event(1))


def uniform_vae(latent_dim: int) -> VAE:
    vae = VAE(
        priors.Uniform(latent_dim, -1.0, 2.0),
        likelihood=Conditional(MLP(latent_dim, 12, hidden=[8]), Bernoulli(12)),
        posterior=Conditional(MLP(12, 2 * latent_dim, hidden=[8]), MeanField(latent_dim)),
    ).double()
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return vae


def quadrature(vae: VAE, x: Tensor, size: int = 200_000) -> Tensor:
    """log p(x) of a VAE with one latent variable, uniform on [-1, 2]: the mean of p(x | z) over midpoints."""
    z = (-1 + 3 * (torch.arange(size, dtype=torch.float64) + 0.5) / size)[:, None, None]
    with torch.no_grad():
        logits = vae.likelihood.network(z)
        log_likelihood = (x * logits - torch.nn.functional.softplus(logits)).sum(-1)
    return log_likelihood.logsumexp(0) - math.log(size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("latent_dim", "shift", "stretch"), [(1, 3.0, 0.4), (2, 5.0, 1 / 3), (2, -3.0, 5.0), (5, 0.5, 0.02)]
)
def test_local_mean_field_reaches_the_closed_form(latent_dim, shift, stretch):
    oracle = Oracle(6, latent_dim, shift, stretch)
    assert (oracle.best - oracle.elbo(*oracle.start) > 1).all()
    found = local_mean_field(oracle.vae.model, oracle.guide, oracle.x, num_samples=32)
    assert (oracle.best - oracle.elbo(found.loc, found.scale) < 0.01).all()
    torch.testing.assert_close(found.scale, oracle.scale, rtol=0.1, atol=0)
    elbo, error = found.elbo(oracle.vae.model, oracle.guide, oracle.x, 2000)
    assert ((elbo - oracle.elbo(found.loc, found.scale)).abs() < 4 * error + 1e-9).all()


@pytest.mark.slow
def test_local_flow_closes_the_gap_of_the_mean_field():
    oracle = Oracle(6, latent_dim=3)
    mean_field = local_mean_field(oracle.vae.model, oracle.guide, oracle.x)
    found = local_flow(oracle.vae.model, oracle.guide, oracle.x, mean_field)
    elbo, error = found.elbo(oracle.vae.model, oracle.guide, oracle.x, 4000)
    assert (oracle.log_px - oracle.best > 0.15).all()  # correlations that a mean field cannot have
    assert (oracle.log_px - elbo < 0.05).all()
    assert (elbo < oracle.log_px + 4 * error).all()


def test_every_observation_has_a_flow_of_its_own():
    oracle = Oracle(3, latent_dim=2)
    mean_field = local_mean_field(oracle.vae.model, oracle.guide, oracle.x, num_steps=20)
    found = local_flow(oracle.vae.model, oracle.guide, oracle.x, mean_field, num_steps=20)
    assert all(len(value) == 3 for value in found.parameters.values())
    noise = torch.randn(5, 3, 2, dtype=torch.float64)
    together, log_q = found.transport(noise)
    for b in range(3):
        alone, log_q_alone = found.select(slice(b, b + 1)).transport(noise[:, b : b + 1])
        torch.testing.assert_close(together[:, b], alone[:, 0])
        torch.testing.assert_close(log_q[:, b], log_q_alone[:, 0])
    others = found._replace(parameters={name: value.flip(0) for name, value in found.parameters.items()})
    assert not torch.allclose(together[:, 0], others.transport(noise)[0][:, 0])


@pytest.mark.parametrize("latent_dim", [1, 2, 4])
def test_the_density_of_a_local_flow_is_that_of_its_draws(latent_dim):
    oracle = Oracle(2, latent_dim)
    start = LocalPosterior(*oracle.start, None, {})
    found = local_flow(oracle.vae.model, oracle.guide, oracle.x, start, num_steps=40)
    noise = torch.randn(1, 2, latent_dim, dtype=torch.float64)
    assert not torch.allclose(found.transport(noise)[0], start.transport(noise)[0])
    jacobian = torch.autograd.functional.jacobian(lambda eps: found.transport(eps)[0], noise)
    base = dist.Normal(0.0, 1.0).log_prob(noise).sum(-1)
    for b in range(2):
        expected = base[0, b] - torch.linalg.slogdet(jacobian[0, b, :, 0, b])[1]  # change of variables
        torch.testing.assert_close(found.transport(noise)[1][0, b], expected)


def test_a_flow_starts_as_the_identity():
    oracle = Oracle(3, latent_dim=2)
    best = LocalPosterior(oracle.exact.mean, oracle.scale, None, {})
    found = local_flow(oracle.vae.model, oracle.guide, oracle.x, best, num_steps=1, lr=1e-12)
    noise = torch.randn(4, 3, 2, dtype=torch.float64)
    for ours, expected in zip(found.transport(noise), best.transport(noise), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.slow
def test_inference_gaps_match_the_closed_form():
    oracle = Oracle(7, latent_dim=2)
    gaps = inference_gaps(oracle.vae.model, oracle.guide, oracle.log_px, oracle.x, num_samples=2000)
    truth = oracle.elbo(*oracle.start)
    for (gap, error), expected in (
        (gaps.inference_gap(), oracle.log_px - truth),
        (gaps.approximation_gap(), oracle.log_px - oracle.best),
        (gaps.amortization_gap(), oracle.best - truth),
        (gaps.approximation_gap("flow"), torch.zeros_like(truth)),
        (gaps.amortization_gap("flow"), oracle.log_px - truth),
    ):
        assert gap.shape == error.shape == (7,)
        assert ((gap - expected).abs() < 4 * error + 0.05).all()
    assert ((gaps.elbo_mean_field - oracle.best).abs() < 4 * gaps.elbo_mean_field_se + 0.01).all()
    standardized = (gaps.elbo - truth) / gaps.elbo_se
    assert (standardized.abs() < 4).all()
    assert standardized.abs().max() > 0.2  # the error is not much too large
    assert (gaps.log_px_se == 0).all()


def test_means_and_their_two_errors():
    ones = torch.ones(4, dtype=torch.float64)
    values = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    gaps = InferenceGaps(values, values - 3, values - 1, values - 0.5, 0.3 * ones, 0.4 * ones, 0 * ones, 1.2 * ones)
    mean = gaps.mean()
    over_data = values.std().item() / 2
    assert mean["log_px"] == pytest.approx((3.0, over_data, 0.15))
    assert mean["elbo"] == pytest.approx((0.0, over_data, 0.2))
    assert mean["inference_gap"] == pytest.approx((3.0, 0.0, 0.25))
    assert mean["approximation_gap_mean_field"] == pytest.approx((1.0, 0.0, 0.15))
    assert mean["amortization_gap_mean_field"] == pytest.approx((2.0, 0.0, 0.2))
    assert mean["approximation_gap_flow"] == pytest.approx((0.5, 0.0, 0.6 * math.hypot(1, 0.25)))
    assert mean["amortization_gap_flow"] == pytest.approx((2.5, 0.0, math.hypot(0.2, 0.6)))
    assert len(mean) == 9
    with pytest.raises(ValueError, match="family must be mean_field or flow, got full"):
        gaps.approximation_gap("full")


def test_the_error_of_evidence_is_passed_on():
    vae, x = small_vae(), binary(3)
    evidence = Evidence(*torch.tensor([-8.0, 0.5, 1, 1, 0, 1], dtype=torch.float64)[:, None].expand(6, 3))
    gaps = inference_gaps(vae.model, vae.guide, evidence, x, num_steps=2, num_samples=50)
    assert gaps.log_px.tolist() == [-8.0] * 3
    torch.testing.assert_close(gaps.inference_gap()[1], torch.hypot(evidence.mc_se, gaps.elbo_se))


@pytest.mark.slow
def test_bounded_support_against_quadrature():
    vae = uniform_vae(1)
    x = binary(8)
    truth = quadrature(vae, x)
    gaps = inference_gaps(vae.model, vae.guide, truth, x, num_samples=4000)
    for family in ("mean_field", "flow"):
        gap, error = gaps.approximation_gap(family)
        assert (gap > -4 * error).all()
        gain, error = gaps.amortization_gap(family)
        assert (gain > -4 * error).all()
        assert gain.mean() > 0.1
    # one free variable: splines on the logit come near anything, a Gaussian does not
    assert gaps.approximation_gap("flow")[0].mean() < 0.5 * gaps.approximation_gap("mean_field")[0].mean()
    assert (gaps.approximation_gap("flow")[0] < 0.05).all()


@pytest.mark.slow
def test_several_latent_sites():
    vae = TwoLayerVAE(
        priors.Uniform(2),
        latent=Conditional(MLP(2, 6, hidden=[8]), MeanField(3)),
        likelihood=Conditional(MLP(3, 12, hidden=[8]), Bernoulli(12)),
        posterior=Conditional(MLP(12, 6, hidden=[8]), MeanField(3)),
        top_posterior=Conditional(MLP(3, 4, hidden=[8]), MeanField(2)),
    ).double()
    x = binary(5)
    mean_field = local_mean_field(vae.model, vae.guide, x, num_steps=100)
    assert mean_field.loc.shape == mean_field.scale.shape == (5, 5)
    gaps = inference_gaps(vae.model, vae.guide, torch.zeros(5), x, mean_field, num_steps=100)
    for bound, error in ((gaps.elbo_mean_field, gaps.elbo_mean_field_se), (gaps.elbo_flow, gaps.elbo_flow_se)):
        assert (bound > gaps.elbo - 4 * torch.hypot(error, gaps.elbo_se)).all()
    assert (gaps.elbo_mean_field - gaps.elbo).mean() > 0.1


def test_never_worse_than_the_start():
    oracle = Oracle(20, latent_dim=2, shift=0.0, stretch=1.0)  # the start is the optimum, but for its 256 draws
    loc, scale = oracle.exact.mean, oracle.scale
    guide = oracle.guide
    wild = local_mean_field(oracle.vae.model, guide, oracle.x, num_steps=3, num_samples=1, lr=5.0)
    assert (oracle.best - oracle.elbo(wild.loc, wild.scale) < 0.1).all()
    best = LocalPosterior(loc, scale, None, {})
    flow = local_flow(oracle.vae.model, guide, oracle.x, best, num_steps=3, num_samples=1, lr=5.0)
    elbo, error = flow.elbo(oracle.vae.model, guide, oracle.x)
    assert (elbo > oracle.best - 4 * error - 0.01).all()


def test_the_programs_are_left_as_they_were():
    vae, x = small_vae(), binary(3)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    inference_gaps(vae.model, vae.guide, torch.zeros(3), x, num_steps=3, num_samples=20)
    assert all(p.grad is None and p.requires_grad for p in vae.parameters())
    for name, value in vae.state_dict().items():
        assert torch.equal(value, before[name])
    with torch.no_grad():  # nor does it matter who calls
        found = local_flow(vae.model, vae.guide, x, num_steps=3)
    assert not any(value.requires_grad for value in (found.loc, found.scale, *found.parameters.values()))


@pytest.mark.slow
def test_blocks_hold_the_same_observations_in_order(capsys, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 2)
    oracle = Oracle(3, latent_dim=2)
    settings = {"num_steps": 150, "progress": True}
    found = local_flow(oracle.vae.model, oracle.guide, oracle.x, num_samples=16, **settings)
    elbo, error = found.elbo(oracle.vae.model, oracle.guide, oracle.x)
    assert ((oracle.log_px - elbo).abs() < 0.2 + 4 * error).all()
    shown = capsys.readouterr().err
    assert "local mean field" in shown
    assert "local flow: 100%" in shown


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": math.nan}, "lr must be positive"),
    ],
)
@pytest.mark.parametrize("fit", [local_mean_field, local_flow])
def test_bad_settings_are_refused(fit, settings, message):
    vae = small_vae()
    with pytest.raises(ValueError, match=message):
        fit(vae.model, vae.guide, binary(2), **settings)


def test_what_does_not_belong_together_is_refused():
    vae, x = small_vae(), binary(3)
    start = LocalPosterior(torch.zeros(3, 3).double(), torch.ones(3, 3).double(), None, {})
    flow = local_flow(vae.model, vae.guide, x, start, num_steps=1)
    with pytest.raises(ValueError, match="transforms must be at least 1"):
        local_flow(vae.model, vae.guide, x, start, transforms=0)
    with pytest.raises(ValueError, match="hidden"):
        local_flow(vae.model, vae.guide, x, start, hidden=[0])
    for other in (flow, start.select(slice(0, 2))):
        with pytest.raises(ValueError, match="start must be a factorized Gaussian of 3 observations"):
            local_flow(vae.model, vae.guide, x, other)
    with pytest.raises(ValueError, match="the posterior is one of 3 observations, got 2"):
        start.elbo(vae.model, vae.guide, x[:2])
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        start.elbo(vae.model, vae.guide, x, 1)
    with pytest.raises(ValueError, match=r"one value for each of 3 observations, got \(2,\)"):
        inference_gaps(vae.model, vae.guide, torch.zeros(2), x)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        inference_gaps(vae.model, vae.guide, torch.zeros(3), x, num_samples=1)
    with pytest.raises(ValueError, match="no datum"):
        local_mean_field(vae.model, vae.guide, x[:0])
    with pytest.raises(ValueError, match="outside the support"):
        local_mean_field(vae.model, vae.guide, torch.full((2, 12), 0.3, dtype=torch.float64))


def test_latents_without_a_gradient_or_a_spread_are_refused():
    program, x = BinaryLatents(), binary(2, pixels=6)
    with pytest.raises(ContractError, match="site 'z' is discrete"):
        local_mean_field(program.model, program.guide, x)
    vae = small_vae()

    def point(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Delta(torch.zeros(len(x), 3, dtype=x.dtype)).to_event(1))

    with pytest.raises(ContractError, match="must be finite and vary"):
        local_mean_field(vae.model, point, binary(2))
