import math

import pyro.distributions as dist
import pytest
import torch

from pyro_vae import MLP, VAE, Bernoulli, Conditional, ContractError, MeanField, Network, StandardNormal
from pyro_vae.parts.distributions import BernoulliVector


@pytest.mark.parametrize("pixels", [1, 7, 16, 64, 784])
@pytest.mark.parametrize("grad", [True, False])
def test_bernoulli_is_torchs(pixels, grad):
    logits = (10 * torch.randn(5, 3, pixels, dtype=torch.float64)).requires_grad_(grad)
    x = torch.bernoulli(torch.full((3, pixels), 0.5, dtype=torch.float64))
    ours = Bernoulli(pixels)(logits)
    theirs = dist.Bernoulli(logits=logits).to_event(1)
    assert (ours.batch_shape, ours.event_shape) == (theirs.batch_shape, theirs.event_shape)
    with torch.set_grad_enabled(grad):
        log_prob = ours.log_prob(x)
    torch.testing.assert_close(log_prob, theirs.log_prob(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.mean, theirs.mean)
    torch.testing.assert_close(ours.expand((5, 3)).log_prob(x), theirs.log_prob(x), rtol=1e-12, atol=1e-12)
    if grad:
        (g,) = torch.autograd.grad(log_prob.sum(), logits)
        (h,) = torch.autograd.grad(theirs.log_prob(x).sum(), logits)
        torch.testing.assert_close(g, h, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("logit", [-1e4, -100.0, 0.0, 100.0, 1e4])
def test_bernoulli_does_not_overflow(logit):
    logits = torch.full((784,), logit)
    x = torch.ones(784)
    log_prob = BernoulliVector(logits).log_prob(x)
    expected = 784 * (logit if logit < 0 else -math.log(2) if logit == 0 else 0.0)
    assert log_prob.item() == pytest.approx(expected, rel=1e-6, abs=1e-4)


def test_bernoulli_broadcasts_over_particles():
    logits, x = torch.randn(4, 1, 6), torch.ones(3, 6)
    ours = BernoulliVector(logits).log_prob(x)
    assert ours.shape == (4, 3)
    torch.testing.assert_close(ours, dist.Bernoulli(logits=logits).to_event(1).log_prob(x))


def test_bernoulli_refuses_grey_pixels_where_validation_is_on():
    with pytest.raises(ValueError, match="support"):
        BernoulliVector(torch.zeros(3), validate_args=True).log_prob(torch.tensor([0.0, 0.5, 1.0]))


def test_decoder_starts_at_the_mean_image():
    x = torch.bernoulli(torch.rand(6).expand(10_000, 6))
    x[:, 0], x[:, 1] = 0, 1
    vae = VAE(
        StandardNormal(2), Conditional(MLP(2, 6), Bernoulli(6)), Conditional(MLP(6, 4, activation="relu"), MeanField(2))
    )
    vae.initialize(x)
    start = vae.likelihood(torch.zeros(2)).mean
    torch.testing.assert_close(start[2:], x.mean(0)[2:])
    torch.testing.assert_close(start[:2], torch.tensor([0.001, 0.999]))


def test_mean_field_against_its_definition():
    loc, log_scale, z = torch.randn(3, 5, 2, dtype=torch.float64)
    q = MeanField(2)(loc, log_scale)
    log_q = (-0.5 * ((z - loc) / log_scale.exp()) ** 2 - log_scale - 0.5 * math.log(2 * math.pi)).sum(-1)
    torch.testing.assert_close(q.log_prob(z), log_q)
    assert q.has_rsample


def test_mlp_is_glorot_initialized_affine_maps():
    mlp = MLP(30, 20, hidden=[50], activation="relu")
    for layer, (fan_in, fan_out) in zip(mlp.layers, [(30, 50), (50, 20)], strict=True):
        bound = math.sqrt(6 / (fan_in + fan_out))
        assert layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert (layer.bias == 0).all()
    x = torch.randn(4, 3, 30)
    by_hand = torch.relu(x @ mlp.layers[0].weight.T) @ mlp.layers[1].weight.T
    torch.testing.assert_close(mlp(x), by_hand)
    assert len(MLP(3, 2, hidden=[]).layers) == 1


def test_mlp_of_another_precision_is_refused():
    mlp, x = MLP(3, 2), torch.randn(4, 3, dtype=torch.float64)
    with pytest.raises(ContractError, match=r"weights are torch.float32 and .* torch.float64: .* by .float\(\)"):
        mlp(x)
    assert mlp.double()(x).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert MLP(3, 2)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MLP(0, 3), "at least one feature"),
        (lambda: MLP(3, 3, hidden=[0]), "every width must be at least 1"),
        (lambda: MLP(3, 3, activation="tanhh"), "'tanhh' is not a function"),
        (lambda: StandardNormal(0), "latent_dim must be at least 1"),
        (lambda: MeanField(-1), "latent_dim must be at least 1"),
        (lambda: Bernoulli(0), "event_size must be at least 1"),
        (lambda: Conditional(MLP(4, 5), MeanField(2)), r"MeanField reads 4 numbers \(2 \+ 2\), but MLP has 5"),
        (
            lambda: VAE(StandardNormal(3), Conditional(MLP(2, 6), Bernoulli(6)), Conditional(MLP(6, 4), MeanField(2))),
            "disagree about the number of latent dimensions: prior 3, posterior 2, decoder 2",
        ),
        (
            lambda: VAE(StandardNormal(2), Conditional(MLP(2, 6), Bernoulli(6)), Conditional(MLP(7, 4), MeanField(2))),
            "the encoder reads 7 pixels, the likelihood scores 6",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_state_dict_round_trip():
    def make():
        return VAE(StandardNormal(2), Conditional(MLP(2, 6), Bernoulli(6)), Conditional(MLP(6, 4), MeanField(2)))

    vae, other = make(), make()
    other.load_state_dict(vae.state_dict())
    x = torch.ones(3, 6)
    torch.testing.assert_close(vae.posterior(x).mean, other.posterior(x).mean)
    assert all(name.split(".")[0] in ("likelihood", "posterior") for name in vae.state_dict())


class Narrow(Network):
    """Promises another width than it has."""

    def forward(self, features):
        return features[..., :1]


def test_a_network_that_breaks_its_promise_is_named():
    with pytest.raises(ContractError, match=r"Narrow must map \(3, 6\) to \(3, 4\), it made \(3, 1\)"):
        Conditional(Narrow(6, 4), MeanField(2))(torch.zeros(3, 6))
    with pytest.raises(TypeError, match="Linear is no pyro_vae"):
        Conditional(torch.nn.Linear(6, 4), MeanField(2))
