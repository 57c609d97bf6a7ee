"""Never silently wrong: far places in which Python holds what programs read, and what programs leave behind."""

import contextlib
import itertools
import math
import operator
import os
import sys
import types

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from side_by_side import Scripts, X, Y, both, check_same, observe, prior, steps
from torch import nn
from torch.distributions import constraints

script = SCRIPTS = Scripts()
pytestmark = pytest.mark.usefixtures("doubles")
BETA = 1.0


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", SCRIPTS)
def test_as_pyro_does(name):
    check_same(*both(SCRIPTS[name]))


def module(**held):
    made = types.ModuleType("settings_of_a_test")
    vars(made).update(held)
    sys.modules[made.__name__] = made
    return made


class Base:
    weight = 1.0

    def scaled(self, m):
        return m * self.weight


class Sub(Base):
    @classmethod
    def of_class(cls, m):
        return m * cls.weight


class Other:
    weight = 3.0

    def scaled(self, m):
        return m * self.weight + 1


def imported(m):
    import settings_of_a_test

    return m * settings_of_a_test.beta


def imported_from(m):
    from settings_of_a_test import beta

    return m * beta


def places():
    """How a program reads a number, and how that is changed behind its back."""
    noted = torch.ones(8)
    noted.scale = 1.0
    other_data = torch.ones(1)
    numbers, table = [1.0] * 3000, dict.fromkeys(range(3000), 1.0)
    array, frame = np.ones((8, 20_000)), pd.DataFrame({"a": [1.0] * 8})
    nested = types.SimpleNamespace(a=types.SimpleNamespace(b=1.0))
    far = operator.attrgetter("a.b")
    behind, lazy = module(beta=1.0), types.ModuleType("lazy")
    lazy.__getattr__ = lambda name: 1.0
    os.environ["BETA_OF_A_TEST"] = "1"
    instance, child, orphan = Base(), type("Child", (Sub,), {}), type("Orphan", (Base,), {})()
    return {
        "a note on a tensor": (lambda m: m * noted * noted.scale, lambda: setattr(noted, "scale", 3.0)),
        "data of another shape": (
            lambda m: m * other_data + len(other_data),
            lambda: setattr(other_data, "data", torch.arange(8.0)),
        ),
        "environment": (
            lambda m: m * float(os.environ["BETA_OF_A_TEST"]),
            lambda: os.environ.update(BETA_OF_A_TEST="3"),
        ),
        "number of a library": (lambda m: m * math.tau, lambda: setattr(math, "tau", 3.0)),
        "function of a library": (lambda m: nn.functional.silu(m), lambda: setattr(nn.functional, "silu", torch.tanh)),
        "getter": (lambda m: m * far(nested), lambda: setattr(nested.a, "b", 3.0)),
        "globals": (lambda m: m * globals()["BETA"], lambda: globals().update(BETA=3.0)),
        "import": (imported, lambda: setattr(behind, "beta", 3.0)),
        "import of a name": (imported_from, lambda: setattr(behind, "beta", 3.0)),
        "attributes that a module makes": (
            lambda m: m * lazy.anything,
            lambda: setattr(lazy, "__getattr__", lambda name: 3.0),
        ),
        "a long list": (lambda m: m * sum(numbers), lambda: numbers.__setitem__(slice(None), [3.0] * 3000)),
        "a large dictionary": (lambda m: m * sum(table.values()), lambda: table.update(dict.fromkeys(table, 3.0))),
        "a large array": (lambda m: m * float(array.mean()), lambda: array.fill(3.0)),
        "a table": (lambda m: m * torch.tensor(frame["a"].values), lambda: frame.__setitem__("a", [3.0] * 8)),
        "a class's own": (lambda m: child.of_class(m), lambda: setattr(child, "weight", 3.0)),
        "another class": (lambda m: instance.scaled(m), lambda: setattr(instance, "__class__", Other)),
        "another base": (lambda m: orphan.scaled(m), lambda: setattr(type(orphan), "__bases__", (Other,))),
        "length of the store": (
            lambda m: m + len(pyro.get_param_store()),
            lambda: pyro.get_param_store().setdefault("beside", torch.ones(1)),
        ),
        "deterministic algorithms": (
            lambda m: m * (1 + torch.are_deterministic_algorithms_enabled()),
            lambda: torch.use_deterministic_algorithms(True),
        ),
    }


@pytest.mark.one_in(2)
@pytest.mark.parametrize("place", places())
def test_places_of_numbers(place, monkeypatch):
    for owner, name in ((math, "tau"), (nn.functional, "silu")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setitem(globals(), "BETA", 1.0)
    monkeypatch.setenv("BETA_OF_A_TEST", "1")

    def changed(make):
        for owner, name, value in ((math, "tau", 6.0), (nn.functional, "silu", torch.sigmoid)):
            setattr(owner, name, value)
        globals()["BETA"] = 1.0
        torch.use_deterministic_algorithms(False)
        read, change = places()[place]

        def model(x, y):
            observe(read(x @ prior()), y)

        svi = make(model)
        yield from steps(svi, 4, X, Y)
        change()
        yield from steps(svi, 2, X, Y)

    try:
        check_same(*both(changed))
    finally:
        torch.use_deterministic_algorithms(False)
        sys.modules.pop("settings_of_a_test", None)


# What steps leave behind


@script
def a_draw_is_kept_on_an_object(make):
    class Model:
        last = torch.zeros(3)

        def __call__(self, x, y):
            w = prior()
            self.last = w.detach().clone()
            observe(x @ w, y)

    model = Model()
    svi = make(model)
    for _ in range(8):
        yield svi.step(X, Y)
        yield model.last.clone()


@script
def a_handler_of_the_user_in_the_program(make):
    seen = []

    class Seeing(poutine.messenger.Messenger):
        def _pyro_post_sample(self, msg):
            seen.append(msg["name"])

    def model(x, y):
        with Seeing():
            observe(x @ prior(), y)

    yield from steps(make(model), 7, X, Y)
    yield len(seen)


@script
def an_iterator_that_seldom_changes(make):
    numbers = itertools.chain([1.0] * 5, [3.0] * 9)

    def model(x, y):
        observe(x @ prior() * next(numbers), y)

    yield from steps(make(model), 8, X, Y)


@script
def a_constraint_that_is_changed(make):
    within = constraints.interval(0.0, 2.0)

    def bounded(x, y):
        pyro.sample("w", dist.Normal(pyro.param("loc", torch.ones(3), constraint=within), 0.1).to_event(1))

    svi = make(lambda x, y: observe(x @ prior(), y), bounded)
    yield from steps(svi, 4, X, Y)
    within.upper_bound = 5.0
    yield from steps(svi, 2, X, Y)


@script
def an_error_that_the_program_catches(make):
    def model(x, y):
        try:
            w = pyro.sample("w", dist.Normal(torch.zeros(3), -1.0 if x.sum() > 100 else 1.0).to_event(1))
        except ValueError:
            w = prior()
        observe(x @ w, y)

    svi = make(model)
    for large in (False, False, False, True, True, True, False):
        yield svi.step(X * 100 if large else X, Y)


@script
def gradients_of_what_another_step_did_not_meet(make):
    network = nn.Linear(3, 1)

    def model(x, y):
        pyro.module("network", network)
        observe(network(x).squeeze(-1) + x @ prior(), y)

    whole = make(model, optim=pyro.optim.Adam({"lr": 0.01}))
    part = make(poutine.block(model, hide_types=["param"]))
    for i in range(12):
        yield (whole if i % 3 else part).step(X, Y)


@script
def gradients_that_are_sparse(make):
    table = nn.Embedding(4, 1, sparse=True)

    def model(x, y):
        pyro.module("table", table)
        observe(table(torch.arange(8) % 4).squeeze(-1) + x @ prior(), y)

    yield from steps(make(model, optim=pyro.optim.SGD({"lr": 0.001})), 6, X, Y)


@script
def a_parameter_becomes_invalid(make):
    def model(x, y):
        mean, scale = x @ prior(), pyro.param("scale", torch.tensor(1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, scale), obs=y)

    svi = make(model)
    yield from steps(svi, 4, X, Y)
    pyro.param("scale").data.fill_(-1.0)
    yield svi.step(X, Y)


@script
def arguments_with_notes(make):
    x = X.clone()
    x.scale = 1.0

    def model(x, y):
        observe(x @ prior() * getattr(x, "scale", 7.0), y)

    svi = make(model)
    yield from steps(svi, 4, x, Y)
    x.scale = 3.0
    yield from steps(svi, 2, x, Y)


def test_an_error_of_the_program_is_no_reason_to_stay_with_pyro():
    failing = [False]

    def model(x, y):
        w = prior()
        if failing[0]:
            raise RuntimeError("not now")
        observe(x @ w, y)

    def interrupted(make):
        svi = make(model)
        for step in range(8):
            failing[0] = step in (1, 5)
            try:
                yield svi.step(X, Y)
            except RuntimeError as error:
                yield str(error)

    theirs, ours = both(interrupted)
    check_same(theirs, ours)
    assert not ours.told


def test_a_context_that_decorates_holds_no_iterator_that_matters():
    @contextlib.contextmanager
    def tempered(scale):
        with poutine.scale(scale=scale):
            yield

    @tempered(0.5)
    def model(x, y):
        observe(x @ prior(), y)

    theirs, ours = both(lambda make: steps(make(model), 7, X, Y))
    check_same(theirs, ours)
    assert not ours.told
