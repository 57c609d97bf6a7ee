"""CompiledSVI on programs of kinds found in Pyro's examples: losses and parameters are those of pyro.infer.SVI."""

import warnings
from functools import partial
from typing import Any

import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormalMessenger
from pyro.optim import SGD, Adam  # pyright: ignore[reportAttributeAccessIssue]
from torch.utils._pytree import tree_leaves

from pyro_vae.infer import CompiledSVI

X = torch.tensor([0.0, 20.0, 40.0])


def trained(make, calls, loss, **settings):
    """Losses, parameters, warnings, how many steps were a graph's alone, and the next random number."""
    torch.manual_seed(0)
    engine: Any = partial(CompiledSVI, **settings) if settings else SVI
    with (
        pyro.get_param_store().scope(),
        warnings.catch_warnings(record=True) as caught,
        pytest.MonkeyPatch.context() as m,
    ):
        warnings.simplefilter("always")
        alone, applied = [], CompiledSVI._apply
        m.setattr(CompiledSVI, "_apply", lambda *args: alone.append(1) or applied(*args))
        losses = calls(engine(*make(), Adam({"lr": 0.05}), loss))
        params = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    return losses, params, [str(each.message) for each in caught], len(alone), torch.rand(())


def as_pyro(make, calls=lambda svi: [svi.step(X) for _ in range(12)], loss=None):
    """The warnings of CompiledSVI, and how many steps were a graph's alone, after a comparison."""
    loss = loss or Trace_ELBO()
    losses, params, _, _, drawn = trained(make, calls, loss)
    found = trained(make, calls, loss, compiler="none")
    torch.testing.assert_close(torch.tensor(tree_leaves(found[0])), torch.tensor(tree_leaves(losses)))
    torch.testing.assert_close(found[1], params)
    assert found[4] == drawn
    return found[2:4]


def two_components():
    """Which component a datum has is drawn, and chooses its location."""

    def model(x):
        locs = pyro.param("locs", torch.tensor([0.0, 20.0]))
        for i, each in enumerate(x):
            which = pyro.sample(f"which_{i}", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample(f"x_{i}", dist.Normal(locs[which], 10.0), obs=each)

    def guide(x):
        weights = pyro.param("weights", torch.full((len(x), 2), 0.5), constraint=constraints.simplex)
        for i in range(len(x)):
            pyro.sample(f"which_{i}", dist.Categorical(weights[i]))

    return model, guide


@pytest.mark.parametrize("loss", [Trace_ELBO(), TraceGraph_ELBO()], ids=lambda loss: type(loss).__name__)
def test_draws_may_be_indices(loss):
    caught, alone = as_pyro(two_components, loss=loss)
    assert not caught
    assert alone == 12 - 6  # without Pyro's own first step, the traced one, and checks at uses 1, 2, 4, 8


def if_drawn():
    """Another computation for each value of what is drawn."""

    def model(x):
        which = pyro.sample("which", dist.Bernoulli(0.5))
        loc = x.new_tensor(0.0) if which else x[x > pyro.param("a", torch.tensor(1.0)).exp()].sum()
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 10.0), obs=x)

    def guide(x):
        pyro.sample("which", dist.Bernoulli(pyro.param("p", torch.tensor(0.5), constraint=constraints.unit_interval)))

    return model, guide


def chosen_by_a_mask():
    """How many are chosen depends on what is drawn; they are stacked."""

    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        parts = [z[z > 0][:1].sum().reshape(1).expand(int((z > 0).sum())), z.new_zeros(2)]
        shift = torch.stack(parts).sum() if len(parts[0]) == 2 else parts[0].sum()
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(shift, 10.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.zeros(4)), 1.0).to_event(1))

    return model, guide


@pytest.mark.parametrize("make", [if_drawn, chosen_by_a_mask])
def test_what_depends_on_draws_runs_through_pyro_and_says_why(make):
    caught, _ = as_pyro(make, lambda svi: [svi.step(X) for _ in range(24)])
    assert all("look at the values of tensors that are drawn" in each for each in caught)
    assert len(caught) <= 1


def test_a_handler_that_hides_all_is_none():
    def blocked(svi):
        with poutine.block():
            return [svi.step(X) for _ in range(12)]

    caught, alone = as_pyro(two_components, blocked)
    assert not caught
    assert alone

    def partly(svi):
        with poutine.block(hide=["which_1"]):
            return [svi.step(X) for _ in range(12)]

    caught, alone = as_pyro(two_components, partly)
    assert len(caught) == 1
    assert "a handler is around the step, BlockMessenger" in caught[0]
    assert not alone


LOSSES = []
epoch = 0


class Trainer:
    """Programs and their training in one class, as people write it."""

    base = 1.0

    def __init__(self):
        self.scale, self.losses, self.epoch, self.lazy = 10.0, [], 0, {"never": 0}

    def loc(self):
        return self.base * pyro.param("loc", torch.zeros(()))

    def model(self, x):
        if not hasattr(self, "half"):
            self.half = torch.tensor(0.5)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.loc() * self.half, self.width()), obs=x)

    def width(self):
        return self.scale

    def guide(self, x):
        pass

    def fit(self, svi, num_steps=12):
        global epoch
        for _ in range(num_steps):
            self.losses.append(svi.step(X))
            LOSSES.append(self.losses[-1])
            self.epoch = epoch = epoch + 1
            self.lazy["never"] += 1
        return list(self.losses)


class DynamicTrainer(Trainer):
    """All of its attributes count."""

    def width(self):
        return self.scale * getattr(self, "factor", 1.0)


class ModuleTrainer(torch.nn.Module):
    """The same as a module."""

    def __init__(self):
        super().__init__()
        self.layer, self.losses, self.epoch = torch.nn.Linear(1, 1), [], 0
        torch.nn.init.constant_(self.layer.weight, 0.5)

    def forward(self, x):
        pyro.module("layer", self.layer)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.layer(x[:, None])[:, 0], 10.0), obs=x)

    def fit(self, svi):
        for self.epoch in range(12):
            self.losses.append(svi.step(X))
        return self.losses


def nothing(x):
    pass


def programs_of(kind):
    trainer = kind()
    return (trainer, nothing) if isinstance(trainer, torch.nn.Module) else (trainer.model, trainer.guide)


def trainer_of(svi):
    return getattr(svi.model, "__self__", svi.model)


@pytest.mark.parametrize("kind", [Trainer, ModuleTrainer])
def test_what_training_keeps_is_no_setting_of_the_programs(kind):
    caught, alone = as_pyro(partial(programs_of, kind), lambda svi: trainer_of(svi).fit(svi))
    assert not caught
    assert alone >= 5


@pytest.mark.parametrize("kind", [Trainer, DynamicTrainer])
def test_what_the_programs_code_names_is_watched(kind):
    def calls(svi):
        trainer = trainer_of(svi)
        losses = trainer.fit(svi, 4)
        trainer.scale = 5.0
        losses += trainer.fit(svi, 4)
        trainer.base = 2.0  # hides the attribute of the class
        losses += trainer.fit(svi, 4)
        trainer.loc = lambda: pyro.param("loc") + 1.0  # hides the method
        losses += trainer.fit(svi, 4)
        trainer.factor = 3.0  # which only getattr knows
        losses += trainer.fit(svi, 4)
        del trainer.half  # made anew by the model
        losses += trainer.fit(svi, 4)
        trainer.half = torch.tensor(0.25)
        losses += trainer.fit(svi, 4)
        with pytest.MonkeyPatch.context() as m:
            m.setattr(Trainer, "loc", lambda self: pyro.param("loc") - 1.0)
            del trainer.loc
            return losses + trainer.fit(svi, 4)

    as_pyro(partial(programs_of, kind), calls)


def grey_pixels():
    """The Bernoulli likelihood of numbers between 0 and 1, which validation would refuse."""

    def model(x):
        logits = pyro.param("logits", torch.zeros(3))
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Bernoulli(logits=logits, validate_args=False).to_event(1), obs=x.expand(4, 3) / 50)

    return model, nothing


def test_validation_that_a_distribution_switches_off_stays_off():
    caught, alone = as_pyro(grey_pixels)
    assert not caught
    assert alone == 12 - 6


def test_the_loss_is_a_function_as_svi_has_it():
    def calls(svi):
        found = [svi.loss(svi.model, svi.guide, X) for _ in range(2)]
        return [*found, svi.loss_and_grads(svi.model, svi.guide, X), svi.step(X), *(svi.step(X) for _ in range(4))]

    as_pyro(two_components, calls)


def test_arguments_of_svi_that_few_give():
    def loss(model, guide, x):
        return Trace_ELBO().differentiable_loss(model, guide, x)

    def loss_and_grads(model, guide, x):
        value = loss(model, guide, x)
        (2 * value).backward()
        return value

    def make():
        return Trainer().model, nothing

    steps = {}
    for engine in (SVI, partial(CompiledSVI, compiler="none")):
        with pyro.get_param_store().scope(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            svi = engine(*make(), SGD({"lr": 1.0}), loss, loss_and_grads=loss_and_grads, num_samples=3, num_steps=2)
            steps[engine] = torch.tensor([svi.step(X) for _ in range(8)])
    torch.testing.assert_close(*steps.values())
    assert steps[SVI][0] > steps[SVI][1] + 0.15  # 0.09 if the gradient were not doubled


def test_kinds_of_a_large_graph_are_traced_later(monkeypatch):
    def calls(svi):
        return [svi.step(X[:n]) for n in (3, 3, 3, 3, *(2,) * 20)]

    _, alone = as_pyro(lambda: (Trainer().model, nothing), calls)
    monkeypatch.setattr("pyro_vae.infer.compiled.NODES_PER_CALL", 20)
    caught, later = as_pyro(lambda: (Trainer().model, nothing), calls)
    assert not caught
    assert 1 <= later < alone


@pytest.mark.parametrize("num_particles", [1, 2])
def test_hooks_see_and_change_gradients(num_particles):
    def calls(svi):
        losses, seen = [svi.step(X)], {"locs": [], "weights": []}
        for name, p in pyro.get_param_store().named_parameters():
            p.register_hook(lambda gradient, name=name: seen[name].append(gradient.norm().item()))
            p.register_hook(lambda gradient, name=name: gradient.clamp(max=0.01) if name == "locs" else None)
        return losses + [svi.step(X) for _ in range(13)] + seen["locs"] + seen["weights"]

    caught, alone = as_pyro(two_components, calls, Trace_ELBO(num_particles=num_particles))
    if num_particles == 1:
        assert not caught
        assert alone >= 5
    else:
        assert "the loss has several backward passes" in caught[0]
        assert not alone


@pytest.mark.parametrize("most", [20, 58, 73])  # the latter two within what Pyro wraps in an error of its own
def test_a_step_of_very_many_operations_runs_through_pyro(most, monkeypatch):
    monkeypatch.setattr("pyro_vae.infer.tracing.MOST_OPERATIONS", most)
    caught, alone = as_pyro(two_components)
    assert len(caught) == 1
    assert f"they have more than {most} operations" in caught[0]
    assert not alone


def test_a_parameter_that_lies_in_memory_as_no_gradient_does():
    def model(x):
        prior: Any = dist.Normal(0.0, 10.0).expand([1])
        loc = pyro.sample("loc", prior.to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 10.0), obs=x)

    def make():
        return model, AutoNormalMessenger(model)

    caught, alone = as_pyro(make)  # with parameters of stride 0
    assert not caught  # torch warns of gradients that are to be added up and lie so as well
    assert alone
