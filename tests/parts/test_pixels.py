"""Decoders that see their neighbours: normalized, causal, drawn as scored, and refused where they have no formula."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from pyro_vae import (
    MLP,
    VAE,
    Annealing,
    Bernoulli,
    Conditional,
    ContractError,
    Incomplete,
    MeanField,
    StandardNormal,
    annealed_importance_sampling,
    check_program,
    importance_sampling,
)
from pyro_vae.infer.diagnostics import kl_by_datum, kl_divergence
from pyro_vae.infer.programs import mean_of
from pyro_vae.parts.likelihoods import Categorical
from pyro_vae.parts.pixels import PixelDecoder, reaches

KINDS = {
    "window": {"receptive_field": 2, "layers": 2},
    "dilated": {"receptive_field": 4, "layers": 4, "window": 2},  # reaches 2, 0, 1, 1
    "no context": {"receptive_field": 3, "layers": 2, "window": 2, "context": 0},
}


def head_of(shape, **settings):
    """With large weights, in float64."""
    torch.manual_seed(0)
    settings = {"channels": 5, "context": 2, "force": True} | settings
    made = PixelDecoder(math.prod(shape), image_shape=(1, *shape), **settings)
    with torch.no_grad():
        for each in made.parameters():
            each.add_(0.5 * torch.randn_like(each))
    return made.double()


def outputs(head, *batch):
    return [torch.randn(*batch, n, dtype=torch.float64) for n in head.sizes]


def every_image(pixels, levels=2):
    return torch.tensor(list(itertools.product(range(levels), repeat=pixels)), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_each_pixel_sees_those_before_it_in_the_window_and_no_others(kind):
    head = head_of((9, 8), **KINDS[kind])
    context = torch.randn(9, 8, head.context, dtype=torch.float64) if head.context else None
    points = torch.randn(3, 9, 8, dtype=torch.float64)
    jacobian = sum(
        torch.autograd.functional.jacobian(lambda x: head.neighbours(x, context)[..., 0], x).abs() for x in points
    )
    row, column = (each.flatten() for each in torch.meshgrid(torch.arange(9), torch.arange(8), indexing="ij"))
    up, right = row[:, None] - row, column - column[:, None]  # of what is seen, from who sees
    before = (up > 0) | ((up == 0) & (right < 0))
    near = (up <= head.receptive_field) & (right.abs() <= head.receptive_field)
    assert torch.equal(jacobian.reshape(72, 72) > 0, before & near)


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_of_all_images_sum_to_one_and_draws_have_them(kind):
    head, x = head_of((3, 3), **KINDS[kind]), every_image(9)
    made = head(*outputs(head, 2))
    p = made.log_prob(x[:, None]).exp().detach()  # (512, 2)
    torch.testing.assert_close(p.sum(0), torch.ones_like(p[0]), rtol=0, atol=1e-12)
    torch.manual_seed(1)
    draws = made.sample((5_000,))
    assert draws.shape == (5_000, 2, 9)
    place = (draws * 2.0 ** torch.arange(8, -1, -1)).sum(-1).long()
    found = torch.stack([place[:, i].bincount(minlength=512) for i in range(2)], -1)
    expected = 5_000 * p
    often = expected > 5
    chi2 = (((found - expected).square() / expected) * often).sum(0)
    rest = torch.stack([(each * ~often).sum(0) for each in (found, expected)])
    assert ((chi2 - often.sum(0)).abs() < 6 * (2 * often.sum(0)).sqrt()).all()
    assert ((rest[0] - rest[1]).abs() < 6 * rest[1].sqrt() + 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_draws_from_what_was_kept_are_those_of_a_pass_for_each_pixel(kind):
    head = head_of((5, 7), **KINDS[kind])
    raw = outputs(head, 4)
    own, context = head._spread(raw[0]), head._spread(raw[1]) if head.context else None
    torch.manual_seed(2)
    x = torch.zeros(3, 4, 5, 7, dtype=torch.float64)
    for row, column in itertools.product(range(5), range(7)):
        logits = (own + head.neighbours(x, context))[..., row, column, 0]
        x[..., row, column] = torch.bernoulli(logits.sigmoid())
    torch.manual_seed(2)
    drawn = head(*raw).sample((3,))
    assert torch.equal(drawn, x.flatten(-2))
    assert 0.1 < drawn.mean() < 0.9


def test_leading_dimensions_broadcast():
    head = head_of((4, 3), **KINDS["dilated"])
    raw, x = outputs(head, 3, 2), torch.randint(2, (2, 12)).double()
    found = head(*raw).log_prob(x)
    alone = [head(*(each[k, b] for each in raw)).log_prob(x[b]) for k in range(3) for b in range(2)]
    torch.testing.assert_close(found.flatten(), torch.stack(alone))
    torch.testing.assert_close(head(*raw).expand([5, 3, 2]).log_prob(x), found.expand(5, 3, 2))


def test_other_pixels():
    head = head_of((2, 2), pixel=partial(Categorical, levels=3), **KINDS["window"])
    made = head(*outputs(head))
    assert (head.encoding, head.levels) == ("integers", 3)
    p = made.log_prob(every_image(4, 3)).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    draws = made.sample((4000,))
    torch.testing.assert_close(draws.mean(0), p @ every_image(4, 3), rtol=0, atol=0.08)


def vae_of(head, latent_dim=1, **kind):
    torch.manual_seed(3)
    size = head.event_size
    decoder = MLP(latent_dim, sum(head.sizes), hidden=[6], **kind)
    return VAE(
        StandardNormal(latent_dim),
        likelihood=Conditional(decoder, head),
        posterior=Conditional(MLP(size, 2 * latent_dim, hidden=[6]), MeanField(latent_dim)),
    ).double()


@pytest.mark.slow
def test_a_vae_of_it_is_normalized_and_estimated_like_any_other():
    vae, x = vae_of(head_of((2, 3), **KINDS["window"])), every_image(6)
    nodes, weights = (torch.tensor(each) for each in np.polynomial.hermite_e.hermegauss(100))
    scores = vae.likelihood(nodes[:, None]).log_prob(x[:, None]).detach()
    exact = (scores + weights.log() - math.log(2 * math.pi) / 2).logsumexp(1)
    assert exact.exp().sum().item() == pytest.approx(1, abs=1e-6)
    found = importance_sampling(vae.model, vae.guide, x[::9], 500, compiled=False, num_checked=0)
    assert ((found.log_px - exact[::9]).abs() < 6 * found.mc_se + 1e-3).all()
    settings = Annealing(num_temperatures=20, num_checked=0)
    found = annealed_importance_sampling(vae.model, vae.guide, x[::9], settings, compiled=False)
    assert ((found.log_px - exact[::9]).abs() < 6 * found.mc_se + 1e-3).all()


def test_kl_by_datum_is_that_of_the_data():
    vae, x = vae_of(head_of((2, 3), **KINDS["window"]), latent_dim=2), every_image(6)
    each = kl_by_datum(vae.model, vae.guide, x, 400)["z"]
    exact = torch.distributions.kl_divergence(vae.posterior(x), vae.prior()).detach()
    torch.testing.assert_close(each, exact, rtol=0, atol=0.3)
    whole = kl_divergence(vae.model, vae.guide, x, 1000)["z"].sum()
    assert each.mean().item() == pytest.approx(whole.item(), abs=0.05)


def test_a_mean_is_that_of_draws():
    head = head_of((2, 3), **KINDS["window"])
    made, x = head(*outputs(head, 5)), every_image(6)
    exact = made.log_prob(x[:, None]).exp().T @ x
    torch.manual_seed(4)
    torch.testing.assert_close(mean_of(made, 5000, at_once=999), exact.detach(), rtol=0, atol=0.04)


def test_what_was_not_seen_is_refused_in_one_line():
    vae, x = vae_of(head_of((2, 3), **KINDS["window"])), every_image(6)
    seen = torch.rand(x.shape) < 0.5
    with pytest.raises(ContractError, match="PixelDecoder: log p of some entries has no formula") as caught:
        vae.model(x, seen)
    assert "\n" not in str(caught.value)
    vae.posterior = Conditional(Incomplete(MLP(12, 2), 6), MeanField(1)).double()
    with pytest.raises(ContractError, match="has no formula"):
        vae.model(torch.where(seen, x, math.nan))


class _OfOthers(PixelDecoder):
    """Normalized by the rows of the batch, as a batch normalization in training mode does."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        neighbours = self.neighbours.forward
        self.neighbours.forward = lambda x, context: self.of_others(neighbours(x, context))

    @staticmethod
    def of_others(said):
        return said - said.mean(-4, keepdim=True)


def test_a_decoder_that_sees_other_rows_is_caught():
    settings = {"receptive_field": 2, "channels": 4, "context": 1, "image_shape": (1, 4, 4)}
    x = torch.randint(2, (30, 16)).double()
    for kind in (PixelDecoder, _OfOthers):
        head = kind(16, **settings)
        nn.init.normal_(head.neighbours.output[-1].weight)
        vae = vae_of(head)
        if kind is PixelDecoder:
            check_program(vae.model, vae.guide, x)
            continue
        with pytest.raises(ContractError, match="model site 'x' change if a datum is scored without the others"):
            check_program(vae.model, vae.guide, x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"receptive_field": 7}, "receptive_field 7 covers the image of 8 x 8 pixels, so that the latents would idle"),
        ({"receptive_field": 0}, "receptive_field must be a whole number of at least 1"),
        (
            {"receptive_field": 6, "window": 2, "layers": 2},
            "receptive_field 6 has gaps with 2 layers and a window",
        ),
        ({"context": -1}, "context must be at least 0, got -1"),
        ({"image_shape": (4, 4, 4)}, r"for images of one channel, \(1, H, W\), and these are 64 entries of shape"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PixelDecoder(64, **settings)
    with pytest.raises(ValueError, match="these are 12 entries"):
        PixelDecoder(12)


def test_reaches_fill_the_receptive_field():
    assert reaches(17, 7, window=3) == [3, 1, 2, 4, 1, 2, 4]
    assert reaches(4, 3, window=6) == [4, 0, 0]
    assert reaches(7, 3, window=6) == [6, 0, 1]


def test_it_starts_as_the_likelihood_without_neighbours():
    head, x = PixelDecoder(64), torch.bernoulli(torch.full((50, 64), 0.3))
    start = head.marginal(x)
    expected = Bernoulli(64)(*Bernoulli(64).marginal(x)).log_prob(x)
    torch.testing.assert_close(head(*start).log_prob(x), expected)
