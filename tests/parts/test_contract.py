"""What every part promises, by `pyro_vae.testing` and by oracles. A new part is tested by one line of a dictionary."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from pyro_vae import (
    MLP,
    VAE,
    Bernoulli,
    Conditional,
    Gaussian,
    MeanField,
    StandardNormal,
    TwoLayerVAE,
    fit,
    log_weights,
    testing,
    traces,
)
from pyro_vae.parts import likelihoods, posteriors, priors
from pyro_vae.parts.likelihoods import (
    Beta,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogistic,
    LocationScale,
    NegativeBinomial,
    Poisson,
)
from pyro_vae.parts.networks import ConvDecoder, ConvEncoder, GatedMLP, Network, RecurrentDecoder, RecurrentEncoder
from pyro_vae.parts.pixels import Autoregressive, PixelDecoder
from pyro_vae.parts.posteriors import FullRank, LowRank
from pyro_vae.parts.priors import DiagonalNormal, GaussianMixture, VampPrior
from pyro_vae.parts.residual import ConvResidual, Residual

PRIORS = {
    "StandardNormal": StandardNormal,
    "DiagonalNormal": DiagonalNormal,
    "GaussianMixture": lambda d: GaussianMixture(d, components=3),
    "VampPrior": lambda d: VampPrior(d, components=3),
    "VampPrior of data": lambda d: VampPrior(d, components=3, learned=False),
    "FlowPrior": lambda d: priors.Flow(d, hidden=[16]),
    "FlowPrior coupling spline": lambda d: priors.Flow(d, "coupling", "spline", transforms=2, hidden=[16]),
    "LaplacePrior": priors.Laplace,
    "StudentTPrior": lambda d: priors.StudentT(d, df=8.0),
    "UniformPrior": lambda d: priors.Uniform(d, -2.0, 3.0),
}
POSTERIORS = {
    "MeanField": MeanField,
    "FullRank": FullRank,
    "LowRank": lambda d: LowRank(d, rank=1),
    "FlowPosterior": lambda d: posteriors.Flow(d, hidden=[16], context=4),
    "FlowPosterior spline": lambda d: posteriors.Flow(d, transform="spline", hidden=[16], context=4),
    "FlowPosterior coupling": lambda d: posteriors.Flow(d, "coupling", hidden=[16], context=4),
}
SHAPES = {1: (1, 1, 1), 4: (1, 2, 2), 6: (1, 2, 3), 56: (1, 8, 7)}
LIKELIHOODS = {
    "Bernoulli": Bernoulli,
    "ContinuousBernoulli": ContinuousBernoulli,
    "Gaussian": Gaussian,
    "Gaussian fixed": lambda x: Gaussian(x, scale=0.3),
    "Gaussian per pixel": lambda x: Gaussian(x, scale="per_pixel"),
    "LaplaceLikelihood": likelihoods.Laplace,
    "LaplaceLikelihood per pixel": lambda x: likelihoods.Laplace(x, scale="per_pixel"),
    "Beta": Beta,
    "DiscretizedLogistic": lambda x: DiscretizedLogistic(x, levels=17),
    "DiscretizedLogistic mixture": lambda x: DiscretizedLogistic(x, levels=17, components=3),
    "Categorical": lambda x: Categorical(x, levels=17),
    "Poisson": Poisson,
    "NegativeBinomial": NegativeBinomial,
    "PixelDecoder": lambda x: PixelDecoder(x, 2, channels=4, context=1, window=1, force=x < 56, image_shape=SHAPES[x]),
}
SHAPE = (1, 8, 7)  # neither square nor a power of two
ENCODERS = {
    "MLP": MLP,
    "GatedMLP": GatedMLP,
    "ConvEncoder": lambda *a, **k: ConvEncoder(*a, channels=[4, 8], **k),
    "ConvEncoder residual": lambda *a, **k: ConvEncoder(*a, channels=[4], blocks=1, **k),
    "RecurrentEncoder": lambda *a, **k: RecurrentEncoder(*a, hidden=16, **k),
}
DECODERS = {
    "MLP": MLP,
    "GatedMLP": GatedMLP,
    "ConvDecoder": lambda *a, **k: ConvDecoder(*a, channels=[8, 4], **k),
    "ConvDecoder residual": lambda *a, **k: ConvDecoder(*a, channels=[4], blocks=1, **k),
    "RecurrentDecoder": lambda *a, **k: RecurrentDecoder(*a, hidden=16, **k),
}
PIXELS = math.prod(SHAPE)
SEQUENCE = (9, 3)  # an odd number of steps
OVER_TIME = {name: make for name, make in (ENCODERS | DECODERS).items() if name.startswith(("Conv", "Recurrent"))} | {
    "RecurrentEncoder both ways": lambda *a, **k: RecurrentEncoder(*a, hidden=8, bidirectional=True, **k),
    "RecurrentDecoder both ways": lambda *a, **k: RecurrentDecoder(*a, hidden=8, bidirectional=True, **k),
}


def named(constructors):
    return pytest.mark.parametrize("make", list(constructors.values()), ids=list(constructors))


@pytest.mark.slow
@named(PRIORS)
def test_prior_keeps_the_contract(make):
    testing.check_prior(make)


@pytest.mark.slow
@named(POSTERIORS)
def test_posterior_keeps_the_contract(make):
    testing.check_posterior(make)


@pytest.mark.one_in(2)
@named(LIKELIHOODS)
def test_likelihood_keeps_the_contract(make):
    testing.check_likelihood(make, (1 if make is not LIKELIHOODS["PixelDecoder"] else 4, 6))  # one has no neighbours


@named(ENCODERS)
def test_encoder_keeps_the_contract(make):
    testing.check_network(make, PIXELS, 6, SHAPE)


@named(OVER_TIME)
@pytest.mark.parametrize("together", [1, 2])
def test_network_of_sequences_keeps_the_contract(make, together):
    """Two together: a series with its mask, or two outputs of each entry."""
    entries = together * math.prod(SEQUENCE)
    is_decoder = make(27, 27, image_shape=SEQUENCE).start_at.__func__ is not Network.start_at
    testing.check_network(make, *((5, entries) if is_decoder else (entries, 6)), SEQUENCE, [(), (4, 3)])


def test_networks_of_hierarchies_keep_the_contract():
    for make in (Residual, lambda n, m, image_shape: Residual(n, m, blocks=2, hidden=5, image_shape=image_shape)):
        testing.check_network(make)
    testing.check_network(ConvResidual, 112, 56)
    testing.check_network(ConvResidual, 56, 112)
    testing.check_network(ConvResidual, 27, 27, (9, 3))


def test_networks_of_sequences_read_steps_as_torch_does():
    x, mask = torch.randn(5, 7, 2), torch.rand(5, 7, 2).round()
    flat = torch.cat([x.flatten(1), mask.flatten(1)], 1)
    by_step = torch.cat([x, mask], -1)  # (N, T, 2 F)
    encoder = RecurrentEncoder(28, 4, hidden=3, bidirectional=True, image_shape=(7, 2))
    _, (forward, back) = encoder.rows(by_step)
    assert torch.allclose(encoder(flat), encoder.output(torch.cat([forward, back], -1)), atol=1e-6)
    encoder = ConvEncoder(28, 4, channels=[3], image_shape=(7, 2))
    (convolution, activation), *_ = encoder.convolutions
    found = activation(nn.functional.conv1d(by_step.mT, convolution.weight, convolution.bias, stride=2, padding=1))
    assert torch.allclose(encoder(flat), encoder.output(found.flatten(1)), atol=1e-6)
    decoder = RecurrentDecoder(4, 28, hidden=3, image_shape=(7, 2))
    z = torch.randn(5, 4)
    steps = decoder.output(decoder.rows(z.unsqueeze(1).expand(-1, 7, -1))[0])  # (N, T, two outputs of F)
    assert torch.allclose(decoder(z).reshape(5, 2, 7, 2), steps.reshape(5, 7, 2, 2).transpose(1, 2), atol=1e-6)
    decoder = ConvDecoder(4, 14, channels=[3], image_shape=(7, 2))
    for module in decoder.modules():  # one output depends on its neighbours in time alone
        if isinstance(module, nn.Linear):
            nn.init.ones_(module.weight)
    gradient = torch.autograd.functional.jacobian(lambda start: decoder.convolutions(start), torch.ones(1, 3, 4))
    reached = gradient.squeeze().abs().sum((0, 2)) > 0  # (T, start)
    assert [row.nonzero().flatten().tolist() for row in reached] == [[0], [0, 1], [1], [1, 2], [2], [2, 3], [3]]


@pytest.mark.parametrize("make", OVER_TIME.values(), ids=OVER_TIME)
def test_a_shape_that_does_not_fit_is_refused(make):
    for shape in (None, (27,), (2, 3, 4, 5)):
        with pytest.raises(ValueError, match=r"needs image_shape, \(C, H, W\) of an image or \(T, F\) of a sequence"):
            make(27, 27, image_shape=shape)
    with pytest.raises(ValueError, match=r"27 features must be a multiple of the 10 entries of image_shape \(5, 2\)"):
        make(27, 27, image_shape=(5, 2))


def vae_with(prior=StandardNormal, posterior=MeanField, likelihood=Bernoulli, encoder=MLP, decoder=MLP, latent_dim=2):
    head, tail = posterior(latent_dim), likelihood(PIXELS)
    vae = VAE(
        prior(latent_dim),
        Conditional(decoder(latent_dim, sum(tail.sizes), image_shape=SHAPE), tail),
        Conditional(encoder(PIXELS, sum(head.sizes), image_shape=SHAPE), head),
    )
    vae.initialize(data_for(tail, 20))
    return vae


def data_for(head, size):
    """Observations ``(size, PIXELS)`` of the kind that the head scores."""
    if head.encoding == "binary":
        return torch.bernoulli(torch.full((size, PIXELS), 0.4))
    if head.encoding == "dequantized":
        return (torch.randint(17, (size, PIXELS)) + torch.rand(size, PIXELS)) / 17
    return torch.randint(17, (size, PIXELS)).float()


def head_distribution(head, scale=0.5):
    """The head's distribution for random raw outputs."""
    return head(*(scale * torch.randn(n, dtype=torch.float64) for n in head.sizes))


def jitter(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.double()


def check_density(q, sample_size=20_000):
    """The density integrates to one over a rectangle around its samples, and has their moments."""
    samples = q.sample((sample_size,))
    low, high = samples.mean(0) - 12 * samples.std(0), samples.mean(0) + 12 * samples.std(0)
    middles = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    z = low + (high - low) * torch.cartesian_prod(middles, middles)
    inside = q.support.check(z)
    log_p = q.log_prob(torch.where(inside[:, None], z, samples[0])).detach()
    p = torch.where(inside, log_p, -math.inf).exp() * (high - low).prod() / len(z)
    assert p.sum().item() == pytest.approx(1, abs=0.01)
    mean = p @ z
    covariance = (p[:, None] * (z - mean)).T @ (z - mean)
    standard_error = covariance.diagonal().sqrt() / math.sqrt(sample_size)
    assert ((samples.mean(0) - mean).abs() < 5 * standard_error + 0.01).all()
    torch.testing.assert_close(samples.T.cov(), covariance, rtol=0.15, atol=0.05)


@pytest.mark.slow  # by quadrature; the contract's check is by sampling
@named(PRIORS)
def test_prior_is_a_normalized_density_with_its_samples(make):
    vae = jitter(vae_with(prior=make, latent_dim=2))
    vae.posterior.network = _Tame(vae.posterior.network)
    p = vae.prior(vae.posterior)
    assert (p.batch_shape, p.event_shape) == ((), (2,))
    torch.manual_seed(1)
    check_density(p)


class _Tame(nn.Module):
    """Keeps a random encoder's scales of order one, so that a grid can resolve its densities."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.out_features = network.out_features

    def forward(self, x):
        return torch.tanh(self.network(x))


@pytest.mark.slow  # by quadrature; the contract's check is by sampling
@named(POSTERIORS)
def test_posterior_is_a_normalized_density_with_its_samples(make):
    q = head_distribution(jitter(make(2)))
    assert (q.batch_shape, q.event_shape) == ((), (2,))
    assert q.has_rsample
    check_density(q)


@pytest.mark.one_in(2)
@named(POSTERIORS)
def test_posterior_stays_sane_on_noise_images(make):
    """Trained on digits-like images, shown pixels far outside: draws stay finite and of the encoder's own scale."""
    vae = vae_with(posterior=make, latent_dim=4)
    x = data_for(vae.likelihood.head, 64)
    fit(vae, [x] * 20, epochs=1, lr=3e-3, progress=False)
    noise = 100 * torch.randn(64, PIXELS)
    head = vae.posterior.head
    loc, *others = vae.posterior.network(noise).split(head.sizes, dim=-1)
    bounded = [v.clamp(-5, 5) for v in others] if not isinstance(head, posteriors.Flow) else others
    z = head(loc, *bounded).sample((50,))
    assert z.isfinite().all()
    assert log_weights(vae.model, vae.guide, torch.bernoulli(torch.full((64, PIXELS), 0.5)), 5).isfinite().all()


def support_grid(head):
    """Points of the support, and the width that each stands for."""
    if head.encoding == "binary":
        return torch.tensor([0.0, 1.0]).double(), 1.0
    if head.encoding == "integers":
        return torch.arange(head.levels or 3000).double(), 1.0
    if isinstance(head, LocationScale):
        return torch.arange(-30, 30, 1e-4, dtype=torch.float64), 1e-4
    t = torch.arange(-36, 36, 1e-4, dtype=torch.float64)  # x = sigmoid(t) resolves poles at both ends
    return torch.sigmoid(t), torch.sigmoid(t) * torch.sigmoid(-t) * 1e-4


@named(LIKELIHOODS)
def test_likelihood_is_normalized_with_its_mean_and_samples(make):
    head = make(1).double()
    q = head_distribution(head)
    x, width = support_grid(head)
    p = q.log_prob(x[:, None]).exp().detach() * width
    assert p.sum().item() == pytest.approx(1, abs=2e-3)
    mean = (p @ x).item()
    std = math.sqrt((p @ (x - mean) ** 2).item())
    if not isinstance(q, Autoregressive):  # whose mean has no formula
        assert q.mean.item() == pytest.approx(mean, abs=2e-3 * max(1, mean))
    samples = q.sample((40_000,))[:, 0].double()
    assert samples.mean().item() == pytest.approx(mean, abs=5 * std / 200 + 1e-4)
    assert samples.std().item() == pytest.approx(std, rel=0.1)


@pytest.mark.slow
@named(LIKELIHOODS)
def test_likelihood_starts_near_its_best_without_a_latent(make):
    """The marginal start is at most 0.25 nats per pixel below what free raw outputs reach by optimization."""
    head = make(PIXELS)
    x = data_for(head, 500)
    start = [v.clone().requires_grad_() for v in head.marginal(x)]
    log_prob = head(*start).log_prob(x).mean() / PIXELS
    best = log_prob.item()
    optim = torch.optim.Adam([*start, *head.parameters()], lr=0.02)
    for _ in range(200):
        loss = -head(*start).log_prob(x).mean() / PIXELS
        best = max(best, -loss.item())
        optim.zero_grad()
        loss.backward()
        optim.step()
    assert best - log_prob.item() < 0.25


def softplus(x):
    return math.log1p(math.exp(x))


def negative_binomial(k, mean=softplus(1.0), r=softplus(2.0)):  # noqa: B008
    return stats.nbinom(r, r / (r + mean)).logpmf(k)


def beta(x, mean=0.6, concentration=0.01 + softplus(3.0)):  # noqa: B008
    return stats.beta(mean * concentration, (1 - mean) * concentration).logpdf(x)


def discretized_logistic(k, scale=1e-3 + softplus(-1.0)):  # noqa: B008
    cdf = stats.logistic(0.6, scale).cdf
    return np.log(np.where(k == 3, 1, cdf((k + 1) / 4)) - np.where(k == 0, 0, cdf(k / 4)))


@pytest.mark.parametrize(
    ("head", "outputs", "exact"),
    [
        (Gaussian(1, scale=0.3), [0.4], stats.norm(0.4, 0.3).logpdf),
        (likelihoods.Laplace(1, scale=0.3), [0.4], stats.laplace(0.4, 0.3).logpdf),
        (Poisson(1), [2.0], stats.poisson(softplus(2.0)).logpmf),
        (NegativeBinomial(1), [1.0, 2.0], negative_binomial),
        (Beta(1), [math.log(1.5), 3.0], beta),
        (ContinuousBernoulli(1), [-25.0], stats.truncexpon(25.0, scale=1 / 25).logpdf),
        (ContinuousBernoulli(1), [0.01], lambda x: stats.truncexpon(0.01, scale=100).logpdf(1 - x)),
        (DiscretizedLogistic(1, levels=4), [0.1, 1.0], discretized_logistic),
        (Bernoulli(1), [0.7], stats.bernoulli(1 / (1 + math.exp(-0.7))).logpmf),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_likelihood_against_scipy(head, outputs, exact):
    head = head.double()
    q = head(*(torch.tensor([v], dtype=torch.float64) for v in outputs))
    whole = {"binary": 2, "integers": head.levels or 30, "dequantized": None}[head.encoding]
    x = torch.arange(whole).double() if whole else torch.linspace(0.01, 0.99, 30, dtype=torch.float64)
    np.testing.assert_allclose(q.log_prob(x[:, None]).numpy(), exact(x.numpy()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("prior", "exact"),
    [
        (StandardNormal(2), stats.norm().logpdf),
        (priors.Laplace(2), stats.laplace(0, math.sqrt(0.5)).logpdf),
        (priors.StudentT(2, df=3.0), stats.t(3.0).logpdf),
        (priors.Uniform(2, -3.0, 3.0), stats.uniform(-3, 6).logpdf),
    ],
)
def test_prior_against_scipy(prior, exact):
    z = torch.randn(20, 2, dtype=torch.float64).clamp(-2.9, 2.9)
    np.testing.assert_allclose(prior.double()().log_prob(z).numpy(), exact(z.numpy()).sum(-1), rtol=1e-9)


def test_vamp_prior_is_the_mixture_of_posteriors():
    vae = jitter(vae_with(prior=lambda d: VampPrior(d, components=4)))
    z = torch.randn(6, 2, dtype=torch.float64)
    u = vae.prior.pseudo_inputs.clamp(0, 1)
    each = torch.stack([vae.posterior(u_c).log_prob(z) for u_c in u])
    torch.testing.assert_close(vae.prior(vae.posterior).log_prob(z), each.logsumexp(0) - math.log(4))
    assert not any(name.startswith("prior.posterior") for name in vae.state_dict())


def test_vamp_prior_without_pseudo_inputs_says_so():
    with pytest.raises(RuntimeError, match="call initialize"):
        VampPrior(2)(MeanField(2))
    with pytest.raises(ValueError, match="components is 100, but there are only 3"):
        VampPrior(2).initialize(torch.zeros(3, 5))


def test_uniform_prior_draws_stay_inside_and_their_density_is_transformed():
    vae = jitter(vae_with(prior=lambda d: priors.Uniform(d, -2.0, 3.0)))
    vae.posterior.network = _Tame(vae.posterior.network)
    x = data_for(vae.likelihood.head, 5).double()
    model_trace, guide_trace = traces(vae.model, vae.guide, x, 50)
    z = guide_trace.nodes["z"]["value"]
    assert ((z > -2) & (z < 3)).all()
    # by hand: z = 5 sigmoid(y) - 2, so log q(z) = log q(y) - log(5 s (1 - s))
    s = (z + 2) / 5
    y = torch.logit(s)
    by_hand = vae.posterior(x).log_prob(y) - (5 * s * (1 - s)).log().sum(-1)
    torch.testing.assert_close(guide_trace.nodes["z"]["log_prob"], by_hand, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model_trace.nodes["z"]["log_prob"], torch.full((50, 5), -2 * math.log(5)).double())


CASES = (
    {f"prior {name}": {"prior": make} for name, make in PRIORS.items()}
    | {f"posterior {name}": {"posterior": make} for name, make in POSTERIORS.items()}
    | {f"likelihood {name}": {"likelihood": make} for name, make in LIKELIHOODS.items()}
    | {f"encoder {name}": {"encoder": make} for name, make in ENCODERS.items()}
    | {f"decoder {name}": {"decoder": make} for name, make in DECODERS.items()}
)
every_part = pytest.mark.parametrize("parts", list(CASES.values()), ids=list(CASES))


@every_part
def test_every_parameter_gets_a_gradient(parts):
    vae = vae_with(**parts)
    x = data_for(vae.likelihood.head, 16)
    jittered = copy.deepcopy(vae)
    with torch.no_grad():
        for p in jittered.parameters():
            p.add_(0.05 * torch.randn_like(p))
    log_w = log_weights(jittered.model, jittered.guide, x, 4)
    assert log_w.shape == (4, 16)
    (-log_w.mean()).backward()
    without = [
        name for name, p in jittered.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert not without


@every_part
def test_state_dict_round_trip_without_duplicates(parts):
    vae, other = vae_with(**parts), vae_with(**parts)
    state = vae.state_dict()
    addresses = [value.data_ptr() for value in state.values() if value.numel()]
    assert len(addresses) == len(set(addresses))
    fresh = vae_with(**parts)
    if isinstance(fresh.prior, VampPrior):
        fresh.prior = VampPrior(2, fresh.prior.components, fresh.prior.pseudo_inputs.requires_grad)  # never initialized
    fresh.load_state_dict(state)
    x = data_for(vae.likelihood.head, 3)
    results = []
    for each in (vae, fresh, other):
        torch.manual_seed(1)
        results.append(log_weights(each.model, each.guide, x, 2))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@every_part
def test_repr_names_the_part(parts):
    text = repr(vae_with(**parts))
    assert all(name in text for name in ("(prior)", "(likelihood)", "(posterior)", "(network)", "(head)"))


@named(DECODERS)
@pytest.mark.parametrize("images", [1, 3])
def test_decoder_keeps_the_contract_and_starts_where_told(make, images):
    testing.check_network(make, 5, images * PIXELS, SHAPE)
    network, z = make(5, images * PIXELS, image_shape=SHAPE), torch.randn(3, 4, 5)
    before = network(z).detach()
    start = torch.randn(images * PIXELS)
    network.start_at(start)
    torch.testing.assert_close(network(z) - before, start.expand_as(before), rtol=1e-4, atol=1e-5)


def two_layer(top=StandardNormal, head=MeanField):
    def conditional(inputs, tail):
        return Conditional(MLP(inputs, sum(tail.sizes), hidden=[8]), tail)

    vae = TwoLayerVAE(
        top(2),
        latent=conditional(2, MeanField(3)),
        likelihood=conditional(3, Bernoulli(PIXELS)),
        posterior=conditional(PIXELS, MeanField(3)),
        top_posterior=conditional(3, head(2)),
    )
    vae.initialize(torch.bernoulli(torch.full((20, PIXELS), 0.4)))
    return vae


@pytest.mark.parametrize("make", [StandardNormal, VampPrior, priors.Uniform], ids=lambda m: m.__name__)
def test_two_layer_log_weights_by_hand(make):
    top = (lambda d: VampPrior(d, components=4)) if make is VampPrior else make
    vae = jitter(two_layer(top))
    x = torch.bernoulli(torch.full((5, PIXELS), 0.4)).double()
    torch.manual_seed(1)
    _, guide_trace = traces(vae.model, vae.guide, x, 3)
    z1, z2 = (guide_trace.nodes[name]["value"] for name in ("z1", "z2"))
    torch.manual_seed(1)
    log_w = log_weights(vae.model, vae.guide, x, 3)
    prior = vae.prior(lambda u: vae.top_posterior(vae.posterior(u).mean))
    log_p = prior.log_prob(z2) + vae.latent(z2).log_prob(z1) + vae.likelihood(z1).log_prob(x)
    log_q2 = guide_trace.nodes["z2"]["log_prob"] if make is priors.Uniform else vae.top_posterior(z1).log_prob(z2)
    torch.testing.assert_close(log_w, log_p - vae.posterior(x).log_prob(z1) - log_q2, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("posterior", list(POSTERIORS))
@pytest.mark.parametrize("prior", list(PRIORS))
def test_every_prior_trains_with_every_posterior(prior, posterior):
    vae = vae_with(PRIORS[prior], POSTERIORS[posterior], latent_dim=3)
    check_that_it_learns(vae)


@pytest.mark.slow
@pytest.mark.parametrize(
    "network", [("MLP", "MLP"), ("ConvEncoder", "ConvDecoder"), ("RecurrentEncoder", "RecurrentDecoder")]
)
@pytest.mark.parametrize("likelihood", list(LIKELIHOODS))
def test_every_likelihood_trains_with_every_network(likelihood, network):
    encoder, decoder = network
    vae = vae_with(likelihood=LIKELIHOODS[likelihood], encoder=ENCODERS[encoder], decoder=DECODERS[decoder])
    check_that_it_learns(vae)


def check_that_it_learns(vae):
    """A few steps on images of two kinds: the bound rises."""
    x = data_for(vae.likelihood.head, 64)
    x[:32, : PIXELS // 2] = x[0, 0]
    history = fit(vae, [x] * 10, epochs=3, lr=3e-3, schedule="constant", progress=False)
    assert history[-1].train_elbo > history[0].train_elbo
