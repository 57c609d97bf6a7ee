"""Deep hierarchies against closed forms, quadrature, TwoLayerVAE, and Pyro's own steps."""

import math

import pytest
import torch
import yaml
from pyro import poutine

from experiments.hierarchies import bent, curved, joint_covariance, linear, probability_of_one
from pyro_vae import (
    ELBO,
    MLP,
    Annealing,
    Bernoulli,
    BetaELBO,
    CompiledSVI,
    Conditional,
    ContractError,
    DReG,
    Gaussian,
    Incomplete,
    MeanField,
    PyroSVI,
    StandardNormal,
    TwoLayerVAE,
    annealed_importance_sampling,
    bidirectional_monte_carlo,
    check_program,
    importance_sampling,
    log_weights,
    runs,
)
from pyro_vae.data.fetched import Digits
from pyro_vae.hierarchical import HierarchicalVAE, Level, residual_levels
from pyro_vae.infer.diagnostics import kl_divergence
from pyro_vae.infer.programs import particle_trace, sample_sites, traces
from pyro_vae.parts.posteriors import Flow, FullRank
from pyro_vae.parts.priors import Uniform, VampPrior
from pyro_vae.parts.residual import ConvResidual, Residual

INFERENCES = ["top_down", "precision_weighted", "bottom_up"]
PIXELS, DIMS, WIDTHS = 12, (4, 3, 2), (6, 5, 5)
QUICK = Annealing(num_temperatures=8, num_chains=32, num_leapfrogs=2, num_climbs=0, num_checked=0)
SHORT = Annealing(num_temperatures=2, num_chains=2, num_leapfrogs=1, num_warmup_chains=2, num_climbs=1, num_checked=0)


def binary(batch=5):
    return torch.bernoulli(torch.full((batch, PIXELS), 0.4, dtype=torch.float64))


def conditional(inputs, head):
    return Conditional(MLP(inputs, sum(head.sizes), hidden=[8]), head)


def hierarchy(inference="top_down", prior=None, encoder=None, posterior=MeanField, head=None):
    torch.manual_seed(3)
    levels = residual_levels(
        encoder or MLP(PIXELS, WIDTHS[0], [8]), DIMS, WIDTHS, inference=inference, posterior=posterior
    )
    likelihood = conditional(WIDTHS[0], head or Bernoulli(PIXELS))
    vae = HierarchicalVAE(prior or StandardNormal(DIMS[-1]), levels, likelihood, inference).double()
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return vae


def test_with_the_exact_posterior_every_log_weight_is_log_px():
    task = linear(3, 4, 6, exact=True)
    log_w = log_weights(task.vae.model, task.vae.guide, task.x, 5)
    torch.testing.assert_close(log_w, task.log_px.expand(5, -1), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_closed_form_and_quadrature_are_right():
    """Annealing, which knows neither, finds them, and importance sampling in a few dimensions."""
    for task in (linear(2, 2, 3), curved(3, 2, 3)):
        programs = task.vae.model, task.vae.guide, task.x
        annealed = annealed_importance_sampling(*programs, QUICK, compiled=False)
        assert annealed.reliable.all()
        assert ((annealed.log_px - task.log_px).abs() < 4 * annealed.mc_se).all()
        sampled = importance_sampling(*programs, 5_000, num_checked=0, compiled=False)
        assert ((sampled.log_px - task.log_px).abs() < 5 * sampled.mc_se + 0.02).all()


def test_draws_of_the_model_have_the_marginals_they_should():
    torch.manual_seed(0)
    task = linear(3, 2, 3)
    weight = task.vae.likelihood.network.layers[0].weight
    maps = [level.prior.network.layers[0].weight[:2] for level in task.vae.levels[:2]]
    with torch.no_grad():
        trace = particle_trace(poutine.uncondition(task.vae.model), task.x, 5000)
        wanted = joint_covariance(maps, weight)
    drawn = torch.cat([trace.nodes[name]["value"] for name in ("x", "z1", "z2", "z3")], -1).flatten(0, 1)
    assert (drawn.mT.cov() - wanted).abs().max() < 0.06 * wanted.max()
    assert abs(wanted[2:, 2:].diagonal() - 1).max() < 1e-12
    assert curved(3, 40, 200).x.mean().item() == pytest.approx(probability_of_one(3), abs=0.02)
    assert bent(torch.tensor(0.0)) == 0


@pytest.mark.parametrize("inference", INFERENCES)
def test_the_elbo_is_reconstruction_minus_the_kl_of_each_level(inference):
    vae, x = hierarchy(inference), binary()
    torch.manual_seed(1)
    with torch.no_grad():
        both = traces(vae.model, vae.guide, x, 7)
    torch.manual_seed(1)
    parts = kl_divergence(vae.model, vae.guide, x, 7)
    assert list(parts) == ["z3", "z2", "z1"]
    assert sample_sites(both.guide) == (["z1", "z2", "z3"] if inference == "bottom_up" else ["z3", "z2", "z1"])
    assert {name: part.shape[0] for name, part in parts.items()} == {"z1": 4, "z2": 3, "z3": 2}
    torch.manual_seed(1)
    elbo = log_weights(vae.model, vae.guide, x, 7).mean()
    told = both.model.nodes["x"]["log_prob"].mean() - sum(part.sum() for part in parts.values())
    assert elbo.item() == pytest.approx(told.item(), rel=1e-9)


def test_states_by_hand():
    vae, x = hierarchy(), binary()
    with torch.no_grad():
        guide = poutine.trace(vae.guide).get_trace(x)
        z1, z2, z3 = (guide.nodes[f"z{n}"]["value"] for n in (1, 2, 3))
        one, two, three = vae.levels
        d1 = one.up(x)
        d2 = two.up(d1)
        h2 = three.down(z3)
        h1 = two.down(torch.cat([h2, z2], -1))
        h0 = one.down(torch.cat([h1, z1], -1))
        log_q = three.posterior(three.up(d2)).log_prob(z3) + two.posterior(torch.cat([d2, h2], -1)).log_prob(z2)
        log_q += one.posterior(torch.cat([d1, h1], -1)).log_prob(z1)
        log_p = vae.prior().log_prob(z3) + two.prior(h2).log_prob(z2) + one.prior(h1).log_prob(z1)
        log_p += vae.likelihood(h0).log_prob(x)
        model = poutine.trace(poutine.replay(vae.model, guide)).get_trace(x)
    torch.testing.assert_close(guide.log_prob_sum(), log_q.sum())
    torch.testing.assert_close(model.log_prob_sum(), log_p.sum())


def test_precisions_are_weighed():
    """q(z_l | ..) is the product of both densities, up to a factor."""
    vae, x = hierarchy("precision_weighted"), binary()
    with torch.no_grad():
        guide = poutine.trace(vae.guide).get_trace(x)
        h2 = vae.levels[2].below(None, guide.nodes["z3"]["value"])
        seen, prior = vae.levels[1].posterior(vae._states(x)[1]), vae.levels[1].prior(h2)
        z = torch.randn(9, 5, 3).double()
        rest = guide.nodes["z2"]["fn"].log_prob(z) - seen.log_prob(z) - prior.log_prob(z)
    torch.testing.assert_close(rest, rest[:1].expand_as(rest))
    odd = hierarchy("precision_weighted", posterior=FullRank)
    with pytest.raises(ContractError, match="not of a MultivariateNormal: infer top_down"):
        odd.guide(x)


def test_two_levels_from_below_are_a_two_layer_vae():
    x, results = binary(), []
    for deep in (False, True):
        torch.manual_seed(1)
        prior = VampPrior(2, components=4)
        latent, likelihood = conditional(2, MeanField(3)), conditional(3, Bernoulli(PIXELS))
        posterior, top = conditional(PIXELS, MeanField(3)), conditional(3, MeanField(2))
        if deep:
            levels = [Level(posterior, latent), Level(top)]
            vae = HierarchicalVAE(prior, levels, likelihood, "bottom_up").double()
        else:
            vae = TwoLayerVAE(prior, latent, likelihood, posterior, top).double()
        vae.initialize(x)
        optimizer = torch.optim.Adam(vae.parameters(), 1e-2)
        svi = PyroSVI(vae.model, vae.guide, optimizer)
        losses = torch.tensor([svi.step(x) for _ in range(3)])
        results.append((losses, log_weights(vae.model, vae.guide, x, 4)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("inference", "loss"),
    [
        pytest.param("top_down", lambda: BetaELBO(warmup=5, free_bits=0.1), marks=pytest.mark.slow),
        pytest.param("precision_weighted", lambda: ELBO(2, kl="analytic"), marks=pytest.mark.slow),
        pytest.param("bottom_up", lambda: DReG(3), marks=pytest.mark.slow),
        ("top_down", lambda: None),
    ],
)
def test_a_compiled_step_is_that_of_pyro(inference, loss):
    x, results = binary(), []
    for engine, settings in ((PyroSVI, {}), (CompiledSVI, {"compiler": "none", "fallback": False})):
        vae = hierarchy(inference)
        svi = engine(vae.model, vae.guide, torch.optim.Adam(vae.parameters(), 1e-2), loss(), **settings)
        torch.manual_seed(2)
        losses = [float(svi.step(x)) for _ in range(3)]
        results.append((losses, [p.detach() for p in vae.parameters()]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-9)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def of_image(shape=(1, 6, 7)):
    """Maps of two and three channels on 3 x 4 places, latents one channel each."""
    places, pixels = (1, 3, 4), math.prod(shape)
    up = ConvResidual(24, 36, image_shape=places)
    heads = [MeanField(12), MeanField(12)]
    networks = [ConvResidual(24 + 36, 24, image_shape=places), ConvResidual(36, 24, image_shape=places)]
    q = [Conditional(network, head) for network, head in zip(networks, heads, strict=True)]
    prior = Conditional(ConvResidual(36, 24, image_shape=places), MeanField(12))
    down = [ConvResidual(36 + 12, 24, image_shape=places), ConvResidual(12, 36, image_shape=places)]
    levels = [Level(q[0], prior, MLP(pixels, 24, [8]), down[0]), Level(q[1], None, up, down[1])]
    return HierarchicalVAE(StandardNormal(12), levels, conditional(24, Bernoulli(pixels)))


MODELS = {
    **{name: lambda name=name: hierarchy(name) for name in INFERENCES},
    "uniform": lambda: hierarchy(prior=Uniform(2, -2.0, 3.0)),
    "vamp": lambda: hierarchy(prior=VampPrior(2, components=4)),
    "vamp from below": lambda: hierarchy("bottom_up", VampPrior(2, components=4)),
    "flow": lambda: hierarchy(posterior=lambda dim: Flow(dim, "coupling", hidden=[8], context=4)),
    "incomplete": lambda: hierarchy(encoder=Incomplete(MLP(2 * PIXELS, WIDTHS[0], [8]), PIXELS)),
}


@pytest.mark.parametrize("name", MODELS)
def test_parts_are_swapped_and_rows_stay_apart(name):
    vae, x = MODELS[name](), binary(20)
    if name == "incomplete":
        x[torch.rand_like(x) < 0.2] = math.nan
    vae.initialize(x)
    check_program(vae.model, vae.guide, x[:5])
    torch.manual_seed(1)
    assert log_weights(vae.model, vae.guide, x, 3).isfinite().all()
    saved = MODELS[name]()
    saved.load_state_dict(vae.state_dict())
    torch.manual_seed(1)
    first = log_weights(saved.model, saved.guide, x, 3)
    torch.manual_seed(1)
    assert torch.equal(log_weights(vae.model, vae.guide, x, 3), first)


def test_what_the_encoder_sees_is_standardized():
    x = 40 * torch.randn(300, PIXELS).double() - 7
    vae = hierarchy(head=Gaussian(PIXELS))
    vae.initialize(x)
    seen = vae.levels[0].inputs(x)
    assert seen.mean(0).abs().max() < 1e-6
    assert (seen.std(0) - 1).abs().max() < 0.01


@pytest.mark.slow
def test_estimators_take_it():
    vae, x = hierarchy(), binary(3)
    annealed = annealed_importance_sampling(vae.model, vae.guide, x, QUICK, compiled=False)
    sampled = importance_sampling(vae.model, vae.guide, x, 5_000, num_checked=0, compiled=False)
    assert annealed.reliable.all()
    assert ((annealed.log_px - sampled.log_px).abs() < 4 * torch.hypot(annealed.mc_se, sampled.mc_se) + 0.02).all()
    bounds = bidirectional_monte_carlo(vae.model, vae.guide, x, SHORT, compiled=False)
    assert bounds.lower.log_px.isfinite().all()


@pytest.mark.slow
def test_many_levels_start_calm_and_learn():
    torch.manual_seed(0)
    levels = residual_levels(MLP(PIXELS, 16, [16]), [2] * 12, [16])
    vae = HierarchicalVAE(StandardNormal(2), levels, conditional(16, Bernoulli(PIXELS)))
    x = torch.bernoulli(torch.full((50, 1), 0.5)).expand(50, PIXELS).contiguous()
    vae.initialize(x)
    optimizer = torch.optim.Adam(vae.parameters(), 5e-3)
    losses = []
    for _ in range(25):
        loss = -log_weights(vae.model, vae.guide, x, 1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    sizes = [float(level.posterior.network.layers[0].weight.grad.norm()) for level in vae.levels]
    assert min(sizes) > 0
    assert losses[0] < 40
    assert losses[-1] < 0.8 * PIXELS * math.log(2)


def test_convolutional_levels():
    vae = of_image()
    x = torch.bernoulli(torch.full((5, 42), 0.4))
    check_program(vae.model, vae.guide, x)
    assert log_weights(vae.model, vae.guide, x, 2).shape == (2, 5)


def test_a_state_passes_a_level_that_has_learned_nothing():
    for make, shape in ((Residual, None), (ConvResidual, (1, 2, 2))):
        network = make(12, 8, depth=10**12, image_shape=shape)
        state = torch.randn(3, 12)
        state[:, 8:] = 0  # of z
        torch.testing.assert_close(network(state), state[:, :8], rtol=1e-4, atol=1e-4)
        assert (network(torch.randn(3, 12))[:, :8] != 0).all()
    sizes = []
    for depth in (1, 25):
        torch.manual_seed(0)
        network = Residual(60, 50, depth=depth)
        sizes.append((network.blocks[0].second.weight.std().item(), network.passes.weight[:, 50:].std().item()))
    assert [large / 5 for large in sizes[0]] == pytest.approx(sizes[1])


def swapped(**parts):
    one = {"posterior": conditional(7, MeanField(3)), "prior": conditional(2, MeanField(3)), "down": Residual(5, 4)}
    levels = [Level(**one | {"up": Residual(PIXELS, 5)} | parts), Level(conditional(5, MeanField(2)))]
    return lambda: HierarchicalVAE(StandardNormal(2), levels, conditional(4, Bernoulli(PIXELS)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (swapped(up=Residual(PIXELS, 6)), "level 1: posterior has 7, top_down 8 features read"),
        (swapped(up=Residual(9, 5)), f"level 1: up has 9, what is below {PIXELS} features read"),
        (swapped(prior=conditional(3, MeanField(3))), "level 1: prior has 3, the state above 2 features read"),
        (swapped(prior=conditional(2, MeanField(4))), "level 1: prior has 4, posterior 3 latent dimensions"),
        (swapped(prior=None), r"level 1: prior missing: p\(z \| h\) must be given"),
        (swapped(down=Residual(6, 4)), "level 1: down has 6, state and z 5 features read"),
        (swapped(down=None), "the decoder has 4, level 1 below z 3 features read"),
        (lambda: hierarchy(prior=StandardNormal(5)), "the top posterior has 2, the prior 5 latent dimensions"),
        (lambda: hierarchy("sideways"), "inference must be top_down or precision_weighted or bottom_up, got sideways"),
        (lambda: residual_levels(MLP(9, 5), [3], [5]), r"at least two levels, got \[3\]: with one it is a VAE"),
        (lambda: residual_levels(MLP(9, 5), [3, 0], [5]), r"latent_dims: every width must be at least 1, got \[3, 0\]"),
        (lambda: residual_levels(MLP(9, 5), [3, 2], [5, 5, 5]), "widths must be one for each of the 2 levels"),
        (lambda: HierarchicalVAE(StandardNormal(2), [], None), "at least two levels, got 0"),
    ],
)
def test_levels_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_way_must_be_a_network():
    with pytest.raises(TypeError, match="up: Linear is no"):
        Level(conditional(3, MeanField(2)), up=torch.nn.Linear(3, 3))


DEEP = ["--model=HierarchicalVAE", "--dataset=Digits"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([*DEEP, "--levels.latent_dims=[3]"], "--levels.latent_dims: a hierarchy has at least two levels, got [3]"),
        ([*DEEP, "--levels.latent_dims=[3,0]"], "--levels.latent_dims: every width must be at least 1, got [3, 0]"),
        ([*DEEP, "--levels.widths=[9,0,9]"], "--levels.widths: every width must be at least 1"),
        ([*DEEP, "--levels.widths=[9,9]"], "--levels.widths must be one for each of the 3 levels"),
        ([*DEEP, "--levels.blocks=0"], "--levels.blocks must be at least 1, got 0"),
        ([*DEEP, "--levels.inference=sideways"], "--levels.inference"),
        ([*DEEP, "--latent_dim=3"], "--latent_dim 3: HierarchicalVAE has --levels.latent_dims"),
        ([*DEEP, "--condition=label"], "--condition is for --model VAE"),
        (["--levels.blocks=2"], "--levels is for --model HierarchicalVAE, not VAE"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(argv, words):
    with pytest.raises(runs.RunError) as caught:
        runs.parse(runs.Settings, argv)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_levels_are_built_from_settings():
    argv = [
        "--levels.latent_dims=[5,4,3]",
        "--levels.widths=[9,8,7]",
        "--posterior=FullRank",
        "--prior=GaussianMixture",
    ]
    settings, text = runs.parse(runs.Settings, [*DEEP, *argv, "--encoder.hidden=[6]"])
    again, _ = runs.parse(runs.Settings, [f"--levels={yaml.safe_load(text)['levels']}", *DEEP])
    assert again.levels == settings.levels
    data = Digits("unused").load()
    vae = runs.build(settings, data.schema)
    vae.initialize(data.observe(torch.arange(100)))
    assert [level.latent_dim for level in vae.levels] == [5, 4, 3]
    assert (
        [level.up.out_features for level in vae.levels]
        == [9, 8, 7]
        == [level.down.out_features for level in vae.levels]
    )
    assert isinstance(vae.levels[1].posterior.head, FullRank)
    assert log_weights(vae.model, vae.guide, data.test[:5], 2).isfinite().all()
    settings, _ = runs.parse(runs.Settings, [*DEEP, "--posterior=LowRank", "--posterior.rank=20"])
    with pytest.raises(runs.RunError, match="--posterior: rank must be from 1 to latent_dim, which is 16"):
        runs.build(settings, data.schema)
