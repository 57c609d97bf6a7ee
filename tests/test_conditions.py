"""p(x | c) and p(c | x), by the normal distribution."""

import math

import pyro
import pytest
import torch
from scipy import stats

from pyro_vae import (
    MLP,
    Bernoulli,
    Conditional,
    ConditionalVAE,
    ContractError,
    Gaussian,
    Incomplete,
    MeanField,
    StandardNormal,
    check_program,
    class_posterior,
    fit,
    importance_sampling,
    quadrature,
)
from pyro_vae.parts.priors import VampPrior

D, X, C = 2, 5, 3


def linear(prior=True, decoder=True, encoder=True):
    """A ConditionalVAE of affine networks: p(x | c) is normal; its means ``(C, X)`` and covariances ``(C, X, X)``."""
    torch.manual_seed(0)
    vae = ConditionalVAE(
        Conditional(MLP(C, 2 * D, hidden=[]), MeanField(D)) if prior else StandardNormal(D),
        Conditional(MLP(D + C * decoder, X, hidden=[]), Gaussian(X, scale=0.5)),
        Conditional(Incomplete(MLP(2 * X + C * encoder, 2 * D, hidden=[]), X), MeanField(D)),
        condition_dim=C,
    ).double()
    weight = vae.likelihood.network.layers[0].weight.detach()
    mean = torch.zeros(C, X).double()
    if decoder:
        mean = mean + weight[:, D:].mT
    weight = weight[:, :D]
    scale = torch.ones(C, D).double()
    if prior:
        loc, log_scale = vae.prior(torch.eye(C).double()).base_dist.loc.detach(), None
        log_scale = vae.prior(torch.eye(C).double()).base_dist.scale.detach().log()
        mean, scale = mean + loc @ weight.mT, log_scale.exp()
    covariance = (weight * scale.unsqueeze(1).square()) @ weight.mT + 0.25 * torch.eye(X).double()
    return vae, mean, covariance


def log_density(x, mean, covariance):
    """log p(x | c), ``(B, C)``, of what is no NaN."""
    rows = []
    for row in x:
        known = ~row.isnan()
        rows.append(
            [
                stats.multivariate_normal(m[known].numpy(), s[known][:, known].numpy()).logpdf(row[known].numpy())
                for m, s in zip(mean, covariance, strict=True)
            ]
        )
    return torch.as_tensor(rows)


@pytest.mark.parametrize("sees", [(True, True, True), (False, True, False), (True, False, True), (True, False, False)])
def test_log_px_given_c_is_that_of_the_normal(sees):
    vae, mean, covariance = linear(*sees)
    x, c = torch.randn(6, X).double(), torch.eye(C).double().repeat(2, 1)
    x[1, 2] = x[4, :3] = math.nan
    check_program(vae.model, vae.guide, (x, c))
    wanted = log_density(x, mean, covariance)[torch.arange(6), torch.arange(6) % C]
    found = quadrature(vae.model, vae.guide, {"x": x, "c": c})
    torch.testing.assert_close(found.log_px, wanted, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_class_posteriors_are_bayes_rule():
    vae, mean, covariance = linear()
    x = torch.randn(7, X).double()
    x[3, 1:4] = math.nan
    prior = torch.tensor([0.6, 0.3, 0.1]).double()
    wanted = (log_density(x, mean, covariance) + prior.log()).log_softmax(-1)
    found = class_posterior(vae.model, vae.guide, x, torch.eye(C).double(), prior, estimate=quadrature)
    torch.testing.assert_close(found.log_prob, wanted, rtol=0, atol=1e-6)
    assert found.reliable.all()
    assert torch.equal(found.predicted, wanted.argmax(-1))
    torch.testing.assert_close(found.evidence[1].log_px, log_density(x, mean, covariance)[:, 1], rtol=0, atol=1e-6)


def test_errors_of_class_posteriors_are_those_of_many_runs():
    vae, mean, covariance = linear()
    x = torch.randn(1, X).double()
    wanted = log_density(x, mean, covariance).log_softmax(-1)

    def estimate(model, guide, data):
        return importance_sampling(model, guide, data, 2000, num_checked=0, compiled=False)

    pyro.set_rng_seed(0)
    runs = [class_posterior(vae.model, vae.guide, x.repeat(50, 1), torch.eye(C).double(), estimate=estimate)]
    z = (runs[0].log_prob - wanted) / runs[0].mc_se
    assert 0.7 < z.std() < 1.3
    assert z.mean().abs() < 0.4


@pytest.mark.slow
def test_class_posteriors_by_annealing():
    vae, mean, covariance = linear()
    x = torch.randn(3, X).double()
    wanted = log_density(x, mean, covariance).log_softmax(-1)
    found = class_posterior(vae.model, vae.guide, x, torch.eye(C).double())
    assert found.reliable.all()
    assert ((found.log_prob - wanted).abs() < 4 * found.mc_se).all()


@pytest.mark.slow
def test_training_with_labels_separates_them():
    torch.manual_seed(0)
    c = torch.eye(2)[torch.arange(256) % 2]
    x = torch.bernoulli(torch.where(c[:, :1] == 1, 0.9, 0.1).expand(-1, 6))
    vae = ConditionalVAE(
        StandardNormal(1),
        Conditional(MLP(1 + 2, 6, hidden=[]), Bernoulli(6)),
        Conditional(MLP(6 + 2, 2, hidden=[]), MeanField(1)),
        condition_dim=2,
    )
    vae.initialize(x, c)
    fit(vae, list(zip(x.split(32), c.split(32), strict=True)), epochs=15, lr=0.1, progress=False)
    means = [vae.sample(torch.eye(2)[i].expand(500, 2)).mean() for i in range(2)]
    assert means[0] > 0.8
    assert means[1] < 0.2
    found = class_posterior(vae.model, vae.guide, x[:20], torch.eye(2), estimate=quadrature)
    assert torch.equal(found.predicted, torch.arange(20) % 2)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((3, 4, 3), "the decoder reads 4 features, it must be 2, or 5 to see c"),
        ((3, 2, 7), "the encoder reads 7 features, it must be 5, or 8 to see c"),
        ((4, 2, 5), "the prior reads 4 features"),
        ((None, 2, 5), "no part reads the 3 numbers of the condition"),
    ],
)
def test_parts_that_do_not_fit_are_refused(widths, message):
    prior, decoder, encoder = widths
    with pytest.raises(ValueError, match=message):
        ConditionalVAE(
            StandardNormal(D) if prior is None else Conditional(MLP(prior, 2 * D), MeanField(D)),
            Conditional(MLP(decoder, X), Bernoulli(X)),
            Conditional(MLP(encoder, 2 * D), MeanField(D)),
            C,
        )


def test_conditions_that_make_no_sense_are_refused():
    vae, *_ = linear()
    x = torch.randn(4, X).double()
    with pytest.raises(ContractError, match=r"must be of shape \(4, 3\), it is of \(4,\)"):
        vae.model(x, torch.zeros(4).double())
    with pytest.raises(ContractError, match=r"must be a tensor of shape \(\*, 3\), it is a int"):
        vae.sample(4)
    with pytest.raises(ContractError, match=r"must be a tensor of shape \(\*, 3\), it is of shape \(4, 2\)"):
        vae.sample(torch.zeros(4, 2).double())
    with pytest.raises(ValueError, match="at least 2 classes"):
        class_posterior(vae.model, vae.guide, x, torch.eye(3)[:1])
    with pytest.raises(ValueError, match=r"prior must be positive numbers of shape \(3,\)"):
        class_posterior(vae.model, vae.guide, x, torch.eye(3).double(), torch.tensor([1.0, 0.0, 1.0]))
    vae.prior, vae.prior_sees = VampPrior(D, components=2).double(), False
    vae.prior.initialize(x)
    with pytest.raises(ContractError, match="this encoder sees a condition too"):
        vae.model(x, torch.eye(4)[:, :3].double())
