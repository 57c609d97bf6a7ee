import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import binary, small_vae
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_vae import ELBO, NonFiniteError, PyroSVI


def adam(vae, lr=0.01):
    return torch.optim.Adam(vae.parameters(), lr=lr)


def weights(vae):
    return torch.cat([p.detach().flatten() for p in vae.parameters()])


def test_same_trajectory_as_textbook_pyro():
    ours, theirs = small_vae(), small_vae()
    theirs.load_state_dict(ours.state_dict())
    x = binary(20)

    engine = PyroSVI(ours.model, ours.guide, adam(ours), Trace_ELBO())
    torch.manual_seed(1)
    our_losses = [engine.step(x) for _ in range(20)]

    def model(x):
        pyro.module("vae", theirs)
        theirs.model(x)

    with pyro.get_param_store().scope():
        textbook = SVI(model, theirs.guide, pyro.optim.Adam({"lr": 0.01}), loss=Trace_ELBO())
        torch.manual_seed(1)
        their_losses = [textbook.step(x) for _ in range(20)]
    assert our_losses == pytest.approx(their_losses, rel=1e-12)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_two_engines_in_one_process_both_learn():
    vaes = [small_vae(), small_vae()]
    x = binary(50)
    before = [weights(vae) for vae in vaes]
    engines = [PyroSVI(vae.model, vae.guide, adam(vae), Trace_ELBO()) for vae in vaes]
    start = [engine.evaluate_loss(x) for engine in engines]
    for _ in range(200):
        for engine in engines:
            engine.step(x)
    for vae, engine, old, loss in zip(vaes, engines, before, start, strict=True):
        assert (weights(vae) != old).all()
        assert engine.evaluate_loss(x) < 0.9 * loss
    assert not list(pyro.get_param_store().keys())


@pytest.mark.one_in(2)
@pytest.mark.parametrize("loss", [Trace_ELBO(), TraceMeanField_ELBO(), ELBO(3)], ids=lambda loss: type(loss).__name__)
def test_evaluate_loss_is_minus_the_bound(loss):
    vae, x = small_vae(), binary(30)
    engine = PyroSVI(vae.model, vae.guide, adam(vae), loss)
    scale = 1 if isinstance(loss, ELBO) else 30  # Pyro's losses are sums over the batch
    values = torch.tensor([engine.evaluate_loss(x) / scale for _ in range(200)])
    bounds = torch.stack([-ELBO(50)(vae.model, vae.guide, x).detach() for _ in range(20)])
    error = math.hypot(values.std() / math.sqrt(200), bounds.std() / math.sqrt(20))
    assert abs(values.mean() + bounds.mean()) < 4 * error


def test_only_the_optimizers_tensors_are_trained():
    vae, x = small_vae(), binary(20)
    before = {name: p.clone() for name, p in vae.state_dict().items()}
    engine = PyroSVI(vae.model, vae.guide, torch.optim.Adam(vae.likelihood.parameters(), lr=0.01))
    engine.step(x)
    for name, value in vae.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("posterior")


@pytest.mark.slow
def test_programs_with_pyro_param():
    data = 3 + torch.randn(500, 1)

    def model(x):
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0).expand([1]).to_event(1), obs=x)

    store = pyro.get_param_store()
    with store.scope():
        guide = AutoNormal(model)
        guide(data)
        unconstrained = [store[name].unconstrained() for name in store] or list(guide.parameters())
        engine = PyroSVI(model, guide, torch.optim.Adam(unconstrained, lr=0.05))
        for _ in range(400):
            engine.step(data)
        assert guide.median(data)["mean"].item() == pytest.approx(data.mean().item(), abs=0.1)


def test_an_optimizer_of_something_else_is_refused():
    vae = small_vae()
    stranger = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="nothing would be trained"):
        PyroSVI(vae.model, vae.guide, torch.optim.Adam([stranger])).step(binary(3))


def test_a_non_finite_gradient_stops_before_the_update():
    vae, x = small_vae(), binary(5)
    vae.likelihood.network.layers[-1].bias.register_hook(lambda grad: grad * math.inf)
    before = weights(vae)
    engine = PyroSVI(vae.model, vae.guide, adam(vae))
    with pytest.raises(NonFiniteError):
        engine.step(x)
    torch.testing.assert_close(weights(vae), before, rtol=0, atol=0)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam], ids=lambda each: each.__name__)
def test_freed_parameters_start_and_frozen_ones_rest(make):
    """The slope of the loss is nearly the same in every step, so that steps of a freed parameter are equally long."""
    first, second = (torch.nn.Parameter(torch.tensor(0.0, dtype=torch.float64)) for _ in range(2))

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(first + second, 1000.0), obs=x)

    svi = PyroSVI(model, lambda x: None, make([first, second], lr=0.01))
    second.requires_grad_(False)
    values = []
    for step in range(9):
        if step in (3, 6):
            second.requires_grad_(step == 3)
        svi.step(torch.full((4,), 1000.0, dtype=torch.float64))
        values.append(second.item())
    assert values[:3] == [0, 0, 0]
    assert values[5] == pytest.approx(3 * values[3], rel=1e-2)
    assert values[3] != 0
    assert values[5:] == [values[5]] * 4
