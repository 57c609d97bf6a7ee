"""Unknown classes summed out: by hand, by brute force, compiled."""

import math

import pyro
import pytest
import torch
from pyro.infer import TraceEnum_ELBO

from pyro_vae import (
    MLP,
    Annealing,
    Bernoulli,
    CompiledSVI,
    Conditional,
    ConditionalVAE,
    ContractError,
    Gaussian,
    Incomplete,
    MeanField,
    PyroSVI,
    SemiSupervisedELBO,
    SemiSupervisedVAE,
    StandardNormal,
    annealed_importance_sampling,
    check_program,
    class_posterior,
    fit,
    importance_sampling,
    log_weights,
    quadrature,
)

D, X, L, B = 2, 5, 3, 7
P_Y = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
Y = torch.tensor([0, -1, 2, -1, -1, 1, -1])


def made(prior=False, gaps=False, decoder=True, encoder=True, dim=D):
    """A small VAE of classes in float64, and data for it."""
    torch.manual_seed(0)
    encoder_net = MLP(X * (1 + gaps) + L * encoder, 2 * dim, hidden=[4])
    classifier = MLP(X * (1 + gaps), L, hidden=[4])
    vae = SemiSupervisedVAE(
        ConditionalVAE(
            Conditional(MLP(L, 2 * dim, hidden=[]), MeanField(dim)) if prior else StandardNormal(dim),
            Conditional(MLP(dim + L * decoder, X, hidden=[4]), Gaussian(X, scale=2.0)),
            Conditional(Incomplete(encoder_net, X) if gaps else encoder_net, MeanField(dim)),
            condition_dim=L,
        ).double(),
        Incomplete(classifier, X) if gaps else classifier,
        P_Y,
    ).double()
    x = torch.randn(B, X).double()
    if gaps:
        x[1, 2] = x[2, :3] = math.nan
    return vae, x


def by_hand(vae, x, y, noise, alpha=0.0, known_weight=1.0):
    """Minus equation 9 for a datum on average, class by class; ``noise`` is ``(K, B, D)`` of each class."""
    every = []
    for c in range(L):
        one_of_them = torch.eye(L).double()[c].expand(len(x), L)
        loc, scale = (getattr(vae.conditional.posterior_given(x, one_of_them).base_dist, n) for n in ("loc", "scale"))
        z = loc + scale * noise[c]
        log_w = vae.conditional.likelihood_given(z, one_of_them).log_prob(x) + math.log(P_Y[c])
        log_w = log_w + vae.conditional.prior_given(one_of_them).log_prob(z)
        every.append((log_w - torch.distributions.Normal(loc, scale).log_prob(z).sum(-1)).mean(0))
    log_q = vae.classify(x)
    total = 0.0
    for b, label in enumerate(y.tolist()):
        if label >= 0:
            total += known_weight * (every[label][b] + alpha * log_q[b, label])
        else:
            total += sum(log_q[b, c].exp() * (every[c][b] - log_q[b, c]) for c in range(L))
    return -total / ((y >= 0).sum() * known_weight + (y < 0).sum())


def gradients(loss, vae):
    found = torch.autograd.grad(loss, list(vae.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(vae.parameters(), found, strict=True)]


@pytest.mark.parametrize("y", [Y, Y.clamp(min=0), torch.full_like(Y, -1)], ids=["some", "all", "none"])
@pytest.mark.parametrize(("prior", "settings"), [(False, (0.0, 1.0, 1)), (True, (0.7, 0.25, 3))])
def test_the_bound_and_its_gradient_are_the_sum_by_hand(prior, settings, y):
    vae, x = made(prior)
    pyro.set_rng_seed(1)
    loss = SemiSupervisedELBO(vae, *settings)(vae.model, vae.guide, (x, y))
    pyro.set_rng_seed(1)
    noise = torch.normal(torch.zeros(L, settings[-1], B, D).double(), 1.0)
    wanted = by_hand(vae, x, y, noise, *settings[:2])
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-10)
    for found, expected in zip(gradients(loss, vae), gradients(wanted, vae), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_pyros_own_enumeration_takes_the_programs():
    vae, x = made()
    pyro.set_rng_seed(1)
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(vae.model, vae.guide, x, Y)
    pyro.set_rng_seed(1)
    wanted = by_hand(vae, x, Y, torch.normal(torch.zeros(L, 1, B, D).double(), 1.0))
    assert loss / B == pytest.approx(wanted.item(), abs=1e-10)


def test_with_all_classes_known_the_bound_is_the_conditional_one():
    vae, x = made(prior=True)
    y = Y.clamp(min=0)
    pyro.set_rng_seed(2)
    with torch.no_grad():
        ours = log_weights(vae.model, vae.guide, (x, y), 4000)
        theirs = log_weights(vae.conditional.model, vae.conditional.guide, (x, torch.eye(L).double()[y]), 4000)
    difference = ours.mean(0) - theirs.mean(0) - P_Y[y].log()
    assert (difference.abs() < 5 * (ours.var(0) / 4000 + theirs.var(0) / 4000).sqrt()).all()


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "shape",
    [{}, {"prior": True, "gaps": True}, {"prior": True, "decoder": False}, {"encoder": False}],
    ids=str,
)
def test_marginal_programs_sum_the_classes_out(shape):
    vae, x = made(**shape, dim=1)
    check_program(vae.model, vae.guide, (x, Y))
    check_program(vae.marginal_model, vae.marginal_guide, (x, Y))
    given = {"x": x.repeat(L, 1), "c": torch.eye(L).double().repeat_interleave(B, 0)}
    joint = quadrature(vae.conditional.model, vae.conditional.guide, given).log_px.view(L, B).T + P_Y.log()
    wanted = torch.where(Y >= 0, joint.gather(1, Y.clamp(min=0).unsqueeze(1)).squeeze(1), joint.logsumexp(1))
    found = quadrature(vae.marginal_model, vae.marginal_guide, (x, Y))
    torch.testing.assert_close(found.log_px, wanted, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_estimators_agree_on_log_px():
    vae, x = made(dim=1)
    with torch.no_grad():  # a guide as wide as the prior, nearly
        vae.conditional.posterior.network.layers[-1].weight.mul_(0.1)
    data, marginal = (x[:4], Y[:4]), (vae.marginal_model, vae.marginal_guide)
    exact = quadrature(*marginal, data).log_px
    for estimate in (
        importance_sampling(vae.model, vae.guide, data, 5000, num_checked=0, compiled=False),
        importance_sampling(*marginal, data, 5000, num_checked=0, compiled=False),
        annealed_importance_sampling(*marginal, data, Annealing(num_chains=16, num_checked=0), compiled=False),
    ):
        assert ((estimate.log_px - exact).abs() < 5 * estimate.mc_se).all()


def test_compiled_steps_are_those_of_pyro():
    runs = []
    for engine in (PyroSVI, CompiledSVI):
        vae, x = made()
        options = {"compiler": "none", "fallback": False} if engine is CompiledSVI else {}
        svi = engine(
            vae.model, vae.guide, torch.optim.SGD(vae.parameters(), 0.01), SemiSupervisedELBO(vae, 0.5, 0.3), **options
        )
        pyro.set_rng_seed(3)
        order = [torch.randperm(B, generator=torch.Generator().manual_seed(i)) for i in range(5)]
        runs.append([float(svi.step(x[some], Y[some])) for some in order])
    assert runs[1] == pytest.approx(runs[0], abs=1e-9)
    assert runs[0][0] != runs[0][-1]


def test_a_classifier_that_is_sure_leaves_the_bound_finite():
    vae, x = made()
    vae, x = vae.float(), x.float()
    with torch.no_grad():
        vae.classifier.network.layers[-1].weight.mul_(1e4)
    loss = SemiSupervisedELBO(vae, 1.0)(vae.model, vae.guide, (x, Y))
    assert loss.isfinite()
    assert all(each.isfinite().all() for each in gradients(loss, vae))
    guided = pyro.poutine.trace(vae.guide).get_trace(x, Y).nodes["y_unobserved"]["fn"]
    assert (guided.log_prob(torch.arange(L).unsqueeze(-1)).exp() > 0).all()  # Pyro skips zeros, which changes the graph


@pytest.mark.slow
def test_few_labels_and_many_observations_make_a_classifier():
    torch.manual_seed(0)
    truth = torch.arange(100) % 2
    x = torch.bernoulli(torch.where(truth.unsqueeze(1) == 1, 0.9, 0.1).expand(-1, 6))
    y = torch.where(torch.arange(100) < 4, truth, -1)
    vae = SemiSupervisedVAE(
        ConditionalVAE(
            StandardNormal(1),
            Conditional(MLP(1 + 2, 6, hidden=[]), Bernoulli(6)),
            Conditional(MLP(6 + 2, 2, hidden=[]), MeanField(1)),
            condition_dim=2,
        ),
        MLP(6, 2, hidden=[]),
    )
    vae.initialize(x, y)
    batches = list(zip(x.split(50), y.split(50), strict=True))
    history = fit(vae, batches, (x, y), epochs=8, lr=0.2, loss=SemiSupervisedELBO(vae, alpha=5.0), progress=False)
    assert history[-1].validation_elbo > history[0].validation_elbo
    assert (vae.classify(x).argmax(-1) == truth).float().mean() > 0.95
    found = class_posterior(vae.conditional.model, vae.conditional.guide, x[:20], torch.eye(2), estimate=quadrature)
    assert (found.predicted == truth[:20]).float().mean() > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classifier": MLP(X + 1, L)}, "the classifier must map 5 pixels to 3 classes"),
        ({"classifier": Incomplete(MLP(X, L), X, mask=False)}, "must both be Incomplete"),
        ({"class_prob": torch.tensor([1.0, 0.0, 1.0])}, "class_prob must be 3 positive numbers"),
        ({"class_prob": torch.ones(2)}, "class_prob must be 3 positive numbers"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    conditional = made()[0].conditional
    with pytest.raises(ValueError, match=message):
        SemiSupervisedVAE(conditional, **{"classifier": MLP(X, L), **change})


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (Y.double(), "must be integers of shape"),
        (Y.unsqueeze(1), "must be integers of shape"),
        (torch.where(Y == 1, 3, Y), "the label of row 5 is 3, it must be from 0 to 2, or -1 where unknown"),
        (torch.where(Y == 1, -2, Y), "row 5 is -2"),
    ],
)
def test_labels_that_are_none_are_refused(y, message):
    vae, x = made()
    with pytest.raises(ContractError, match=message):
        check_program(vae.model, vae.guide, (x, y))


def test_labels_may_be_integers_of_any_width():
    vae, x = made()
    values = []
    for y in (Y.clamp(min=0), Y.clamp(min=0).byte()):
        pyro.set_rng_seed(0)
        values.append(SemiSupervisedELBO(vae, alpha=1.0)(vae.model, vae.guide, (x, y)))
    assert torch.equal(*values)


@pytest.mark.parametrize("setting", [{"alpha": -1.0}, {"alpha": math.inf}, {"known_weight": 0.0}, {"num_particles": 0}])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        SemiSupervisedELBO(made()[0], **setting)
