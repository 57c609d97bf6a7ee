"""Never silently wrong: small scripts that change something between two steps, by Pyro and by CompiledSVI.

Each is tried with the change before steps that a graph would run first, that are checked against Pyro, and that are
not: a script gets the number of steps before its change.
"""

import dataclasses
import enum
import functools
import itertools
import random
import types
from collections import defaultdict, deque

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from side_by_side import Scripts, X, Y, both, by_pyro, check_same, compiled, guide, observe, prior, ran, steps
from torch import nn

script = SCRIPTS = Scripts()
pytestmark = pytest.mark.usefixtures("doubles")
AT = pytest.mark.parametrize("at", [6, pytest.param(2, marks=pytest.mark.slow)])


def scaled(beta):
    """A model whose prior weighs ``beta()``."""

    def model(x, y):
        with poutine.scale(scale=beta()):
            w = prior()
        observe(x @ w, y)

    return model


@pytest.mark.one_in(3)
@AT
@pytest.mark.parametrize("name", SCRIPTS)
def test_as_pyro_does(name, at):
    check_same(*both(SCRIPTS[name], at))


# Arguments


@script
def one_tensor_as_two_arguments(make, at):
    svi = make(lambda x, target: observe(x @ prior(), target[:, 0]))
    yield from steps(svi, at, X, X)
    yield from steps(svi, 2, X + 1, X)
    yield from steps(svi, 2, X, X)


@script
def a_closure_is_also_an_argument(make, at):
    svi = make(lambda x, y: observe((x - X) @ prior(), y))
    yield from steps(svi, at, X, Y)
    yield from steps(svi, 3, X + 1, Y)


@script
def a_view_of_an_argument_is_a_closure(make, at):
    data = X.clone()
    row = data[0]
    svi = make(lambda x, y: observe((x - row) @ prior(), y))
    yield from steps(svi, at, data, Y)
    yield from steps(svi, 3, data + 1, Y)
    data.add_(1)
    yield from steps(svi, 3, data, Y)


@script
def views_that_overlap(make, at):
    def model(whole, part):
        whole = whole.add_(0.1)  # moves the part as well, if it is one
        observe(whole[:4] @ prior() + part.sum(-1), Y[:4])

    svi = make(model)
    data = X.clone()
    yield from steps(svi, at, data, data[2:6])
    yield from steps(svi, 3, data, data[2:6].clone())
    yield from steps(svi, 2, data, data[2:6])
    yield data


@script
def data_changed_during_the_step(make, at):
    def model(x, y):
        x.add_(0.1)
        observe(x @ prior(), y)

    svi, data = make(model), X.clone()
    yield from steps(svi, at, data, Y)
    yield data
    yield from steps(svi, 4, data, Y)
    yield data


@script
def data_changed_between_steps(make, at):
    array = X.numpy().copy()
    data = torch.from_numpy(array)
    svi = make(lambda x, y: observe(x @ prior(), y))
    yield from steps(svi, at, data, Y)
    array[:] *= 2  # the tensor's memory
    yield from steps(svi, 2, data, Y)
    data.data = data.data + 1
    yield from steps(svi, 2, data, Y)


@script
def a_hashable_object(make, at):
    class Batch:
        pass

    batch = Batch()
    batch.x = X
    svi = make(lambda b: observe(b.x @ prior(), Y))
    yield from steps(svi, at, batch)
    batch.x = 3 * X
    yield from steps(svi, 3, batch)
    fresh = Batch()
    fresh.x = X
    yield from steps(svi, 3, fresh)


@script
def objects_that_are_all_equal(make, at):
    class Batch:
        def __init__(self, x):
            self.x = x

        def __eq__(self, other):
            return True

        def __hash__(self):
            return 0

    svi = make(lambda b: observe(b.x @ prior(), Y))
    yield from steps(svi, at, Batch(X))
    yield from steps(svi, 3, Batch(3 * X))
    for i in range(3):
        yield svi.step(Batch(i * X))


@script
def lists_and_dicts_that_change(make, at):
    def model(xs, settings):
        observe(sum(xs) @ prior() * settings["inner"]["scale"], Y)

    svi, xs, settings = make(model), [X], {"inner": {"scale": 1.0}}
    yield from steps(svi, at, xs, settings)
    xs.append(2 * X)
    yield from steps(svi, 2, xs, settings)
    xs[0] = 3 * X
    yield from steps(svi, 2, xs, settings)
    settings["inner"]["scale"] = 0.5
    yield from steps(svi, 3, xs, settings)


@script
def numbers_that_are_equal_but_differ(make, at):
    def model(x, y, flag):
        w = prior()
        observe(x @ w * (2.0 if flag is True else 1.0) + (0.5 if isinstance(flag, float) else 0.0), y)

    svi = make(model)
    yield from steps(svi, at, X, Y, 1)
    for flag in (True, 1.0, 1, True, True, 1.0):
        yield svi.step(X, Y, flag)


@script
def signed_zeros_and_nan(make, at):
    def model(x, y, number):
        observe(x @ prior() + np.copysign(1.0, number) + (3.0 if number != number else 0.0), y)

    svi = make(model)
    yield from steps(svi, at, X, Y, 0.0)
    for number in (-0.0, 0.0, -0.0, float("nan"), float("nan"), float("nan")):
        yield svi.step(X, Y, number)


@script
def numpy_arrays_and_numbers(make, at):
    def model(x, y, scale):
        observe(torch.as_tensor(x) @ prior() * float(scale), y)

    svi, x = make(model), X.numpy().copy()
    yield from steps(svi, at, x, Y, np.float64(1.0))
    x += 1
    yield from steps(svi, 3, x, Y, np.float64(1.0))
    yield from steps(svi, 3, x, Y, np.float64(0.5))
    yield from steps(svi, 2, x.astype(np.float32).astype(float), Y, np.float32(2.0))


@script
def other_shapes_types_and_strides(make, at):
    svi = make(lambda x, y: observe((x @ prior().to(x.dtype)).double(), y.double()))
    yield from steps(svi, at, X, Y)
    for x, y in (
        (X[:4], Y[:4]),
        (X.float(), Y),
        (X.t().contiguous().t(), Y),
        (X[:1].expand(8, 3), Y),
        (X[::2], Y[::2]),
    ):
        yield from steps(svi, 3, x, y)


@script
def an_argument_that_needs_a_gradient(make, at):
    svi = make(lambda x, y: observe(x @ prior(), y))
    yield from steps(svi, at, X, Y)
    x = X.clone().requires_grad_()
    yield from steps(svi, 3, x, Y)
    yield x.grad


@script
def iterators_are_used_up(make, at):
    svi = make(lambda rows, y: observe(torch.stack(list(rows)) @ prior(), y))
    for _ in range(at + 3):
        yield svi.step(iter(X), Y)
    rows = iter(X)
    yield svi.step(rows, Y)
    yield len(list(rows))


@script
def functions_as_arguments(make, at):
    svi = make(lambda x, y, link: observe(link(x @ prior()), y))
    for step in range(at + 4):
        k = 1.0 if step < at else 0.5 * step
        yield svi.step(X, Y, lambda m, k=k: k * m)
    for step in range(4):
        yield svi.step(X, Y, functools.partial(torch.mul, float(step)))


@script
def enums_slices_and_sizes(make, at):
    class Link(enum.Enum):
        IDENTITY = 1
        TANH = 2

    def model(x, y, link, rows, size):
        mean = x[rows] @ prior()
        observe(mean.tanh() if link is Link.TANH else mean.reshape(size), y[rows])

    svi = make(model)
    yield from steps(svi, at, X, Y, Link.IDENTITY, slice(0, 4), torch.Size([4]))
    yield from steps(svi, 3, X, Y, Link.TANH, slice(0, 4), torch.Size([4]))
    yield from steps(svi, 3, X, Y, Link.IDENTITY, slice(2, 8), torch.Size([6]))


@script
def an_integer_that_counts_on(make, at):
    svi = make(lambda x, y, i: observe(x @ prior() * (1 + i % 3) / (1 + i), y))
    for i in range(at + 6):
        yield svi.step(X, Y, i)


@script
def a_weight_that_falls_to_zero(make, at):
    def model(x, y, weight):
        w = prior()
        observe(x @ w + (weight * w.sum() if weight else 5.0), y)

    svi = make(model)
    for i in range(at + 6):
        yield svi.step(X, Y, max(0.0, 1 - i / (at + 2)))


@script
def a_number_that_turns_into_a_tensor(make, at):
    svi = make(lambda x, y, scale: observe(x @ prior() * scale, y))
    yield from steps(svi, at, X, Y, 1.0)
    yield from steps(svi, 3, X, Y, torch.tensor(0.5))
    yield from steps(svi, 3, X, Y, scale=0.5)


@script
def a_default_that_is_a_list(make, at):
    def model(x, y, *, scale=[1.0]):  # noqa: B006
        observe(x @ prior() * scale[0], y)

    svi = make(model)
    yield from steps(svi, at, X, Y)
    model.__kwdefaults__["scale"][0] = 0.5
    yield from steps(svi, 3, X, Y)
    model.__kwdefaults__ = {"scale": [2.0]}
    yield from steps(svi, 3, X, Y)


# What the programs hold


@script
def class_attributes(make, at):
    class Model(nn.Module):
        beta = 1.0

        def forward(self, x, y):
            scaled(lambda: self.beta)(x, y)

    model = Model()
    svi = make(model)
    yield from steps(svi, at, X, Y)
    Model.beta = 0.1
    yield from steps(svi, 3, X, Y)
    model.beta = 0.01
    yield from steps(svi, 3, X, Y)
    del model.beta
    yield from steps(svi, 3, X, Y)


@script
def a_method_behind_handlers(make, at):
    class Maker:
        beta = 1.0

        def model(self, x, y=None):
            with poutine.scale(scale=self.beta):
                w = prior()
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(x @ w, 1.0))

    maker = Maker()
    svi = make(poutine.mask(pyro.condition(functools.partial(maker.model), {"y": Y}), mask=True))
    yield from steps(svi, at, X)
    maker.beta = 0.01
    yield from steps(svi, 3, X)


@script
def what_is_conditioned_on(make, at):
    def model(x):
        w = prior()
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0))

    data = {"y": Y}
    svi = make(pyro.condition(model, data=data))
    yield from steps(svi, at, X)
    data["y"] = 2 * Y
    yield from steps(svi, 3, X)


@script
def arguments_of_partials(make, at):
    def model(offsets, x, y, scale):
        observe(x @ prior() * scale + offsets[0], y)

    offsets = [0.0]
    partial = functools.partial(model, offsets, scale=1.0)
    svi = make(partial)
    yield from steps(svi, at, X, Y)
    partial.keywords["scale"] = 0.5
    yield from steps(svi, 3, X, Y)
    offsets[0] = 1.0
    yield from steps(svi, 3, X, Y)


def holders():
    """Objects that hold a number, and how it is read and changed."""

    class Slots:
        __slots__ = ("beta",)

    class Hidden:
        def __init__(self):
            self._state = {"deep": [1.0]}

        @property
        def beta(self):
            return self._state["deep"][0]

        @beta.setter
        def beta(self, value):
            self._state["deep"][0] = value

    class Asked:
        def __init__(self):
            object.__setattr__(self, "_all", {"beta": 1.0})

        def __getattr__(self, name):
            return self._all[name]

        def __setattr__(self, name, value):
            self._all[name] = value

    @dataclasses.dataclass
    class Data:
        beta: float = 1.0

    class Nested:
        def __init__(self):
            self.a = types.SimpleNamespace(b=types.SimpleNamespace(beta=1.0))

        beta = property(lambda self: self.a.b.beta, lambda self, value: setattr(self.a.b, "beta", value))

    class Listed:
        def __init__(self):
            self.all = [0, [{"x": deque([1.0])}]]

        beta = property(lambda self: self.all[1][0]["x"][0], lambda self, v: self.all[1][0]["x"].__setitem__(0, v))

    class Module(nn.Module):
        beta = 1.0

    module = types.ModuleType("settings")
    made = [Slots(), Hidden(), Asked(), Data(), Nested(), Listed(), Module(), module, defaultdict(lambda: 1.0)]
    for each in made[:1] + made[7:8]:
        each.beta = 1.0
    return {type(each).__name__: each for each in made}


@pytest.mark.one_in(2)
@AT
@pytest.mark.parametrize("kind", holders())
@pytest.mark.parametrize(
    "number",
    [float, *(pytest.param(f, marks=pytest.mark.slow) for f in (np.float64, np.array, str, torch.tensor))],
    ids=lambda f: f.__name__,
)
def test_numbers_that_objects_hold(kind, number, at):
    def change(make):
        held = holders()[kind]

        def put(value):
            if kind == "defaultdict":
                held["beta"] = number(value)
            else:
                held.beta = number(value)

        put(1.0)
        svi = make(scaled(lambda: float(held["beta"] if kind == "defaultdict" else held.beta)))
        yield from steps(svi, at, X, Y)
        put(0.1)
        yield from steps(svi, 3, X, Y)
        if number is np.array:
            (held["beta"] if kind == "defaultdict" else held.beta)[...] = 0.5  # in place
            yield from steps(svi, 3, X, Y)

    check_same(*both(change))


BETA = 1.0
SETTINGS = types.SimpleNamespace(beta=1.0)


def beta_of_globals():
    return BETA * SETTINGS.beta


@script
def globals_of_a_helper(make, at):
    global BETA
    BETA, SETTINGS.beta = 1.0, 1.0
    svi = make(scaled(beta_of_globals))
    yield from steps(svi, at, X, Y)
    BETA = 0.1
    yield from steps(svi, 3, X, Y)
    SETTINGS.beta = 0.5
    yield from steps(svi, 3, X, Y)


@script
def globals_of_another_module(make, at):
    module = types.ModuleType("of_the_user")
    exec("beta = 1.0\ndef read():\n    return beta", module.__dict__)
    svi = make(scaled(lambda: module.read()))
    yield from steps(svi, at, X, Y)
    module.beta = 0.1
    yield from steps(svi, 3, X, Y)
    module.read = lambda: 0.7
    yield from steps(svi, 3, X, Y)


@script
def functions_that_are_replaced(make, at):
    class Model:
        link = staticmethod(torch.tanh)

        def mean(self, x):
            return self.link(x @ prior())

        def __call__(self, x, y):
            observe(self.mean(x), y)

    model = Model()
    svi = make(model)
    yield from steps(svi, at, X, Y)
    Model.link = staticmethod(torch.sigmoid)
    yield from steps(svi, 3, X, Y)
    model.mean = lambda x: x @ prior()
    yield from steps(svi, 3, X, Y)
    del model.mean
    Model.mean = lambda self, x: 2 * (x @ prior())
    yield from steps(svi, 3, X, Y)
    Model.__call__ = lambda self, x, y: observe(3 * self.mean(x), y)
    yield from steps(svi, 3, X, Y)


@script
def code_that_is_replaced(make, at):
    def half(m):
        return m / 2

    def double(m):
        return m * 2

    svi = make(lambda x, y: observe(half(x @ prior()), y))
    yield from steps(svi, at, X, Y)
    half.__code__ = double.__code__
    yield from steps(svi, 3, X, Y)


@script
def a_closure_that_is_rebound(make, at):
    scale, rows = 1.0, slice(0, 8)

    def model(x, y):
        observe(x[rows] @ prior() * scale, y[rows])

    svi = make(model)
    yield from steps(svi, at, X, Y)
    scale = 0.5
    yield from steps(svi, 3, X, Y)
    rows = slice(0, 3)
    yield from steps(svi, 3, X, Y)


@script
def tensors_that_are_replaced(make, at):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("shift", torch.zeros(8))
            self.plain = torch.ones(3)
            self.listed = [torch.zeros(3)]

        def forward(self, x, y):
            observe(x @ (prior() * self.plain + self.listed[0]) + self.shift, y)

    model = Model()
    svi = make(model)
    yield from steps(svi, at, X, Y)
    model.shift = torch.ones(8)
    yield from steps(svi, 3, X, Y)
    model.plain = torch.full((3,), 2.0)
    yield from steps(svi, 3, X, Y)
    model.listed[0] = torch.ones(3)
    yield from steps(svi, 3, X, Y)
    model.plain.mul_(0.5)
    model.shift.zero_()
    yield from steps(svi, 3, X, Y)
    model.plain = torch.ones(1)
    yield from steps(svi, 3, X, Y)


def with_network(network):
    def model(x, y):
        pyro.module("network", network)
        observe(x @ prior() + network(x)[:, 0], y)

    return model


@script
def modules_that_change(make, at):
    network = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 1))
    svi = make(with_network(network))
    yield from steps(svi, at, X, Y)
    network.eval()
    yield from steps(svi, 3, X, Y)
    network[1].p = 0.1
    network.train()
    yield from steps(svi, 3, X, Y)
    network[2].momentum = 0.5
    yield from steps(svi, 3, X, Y)
    yield network[2].running_mean
    network[1] = nn.Tanh()
    yield from steps(svi, 3, X, Y)


@script
def weights_loaded_and_frozen(make, at):
    network = nn.Linear(3, 1)
    svi = make(with_network(network))
    yield from steps(svi, at, X, Y)
    network.load_state_dict({"weight": torch.ones(1, 3), "bias": torch.zeros(1)})
    yield from steps(svi, 3, X, Y)
    network.weight.data = torch.full((1, 3), 0.5)
    yield from steps(svi, 3, X, Y)
    network.bias.requires_grad_(False)
    yield from steps(svi, 3, X, Y)
    yield network.bias
    network.bias.requires_grad_(True)
    yield from steps(svi, 3, X, Y)
    yield network.bias


@script
def hooks_of_modules(make, at):
    network = nn.Linear(3, 1)
    svi = make(with_network(network))
    yield from steps(svi, at, X, Y)
    handle = network.register_forward_hook(lambda module, given, output: 2 * output)
    yield from steps(svi, 3, X, Y)
    handle.remove()
    yield from steps(svi, 3, X, Y)


@script
def a_parameter_that_is_replaced(make, at):
    network = nn.Linear(3, 1)
    svi = make(with_network(network))
    yield from steps(svi, at, X, Y)
    network.weight = nn.Parameter(torch.ones(1, 3))
    yield from steps(svi, 3, X, Y)


# Programs with a state


@script
def counters(make, at):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.n = 0

        def forward(self, x, y):
            self.n += 1
            scaled(lambda: min(1.0, self.n / 5))(x, y)

    model = Model()
    svi = make(model)
    yield from steps(svi, at + 5, X, Y)
    yield model.n


@script
def counters_in_closures_and_globals(make, at):
    global BETA
    BETA, n, seen = 0.0, 0, {"runs": 0}

    def model(x, y):
        nonlocal n
        global BETA
        n += 1
        BETA += 1
        seen["runs"] += 1
        observe(x @ prior() / n, y)

    svi = make(model)
    yield from steps(svi, at + 5, X, Y)
    yield (n, BETA, seen["runs"])


@script
def lists_that_the_program_fills(make, at):
    log, last = [], deque(maxlen=2)

    def model(x, y):
        w = prior()
        log.append(len(log))
        last.append(len(log))
        observe(x @ w * len(last), y)

    svi = make(model)
    yield from steps(svi, at + 5, X, Y)
    yield (len(log), list(last))


@script
def draws_that_the_program_keeps(make, at):
    kept = []

    def model(x, y):
        w = prior()
        kept.append(w.detach())
        observe(x @ w, y)

    svi = make(model)
    yield from steps(svi, at + 5, X, Y)
    yield len(kept)
    yield torch.stack(kept)


@script
def generators_and_iterators_as_state(make, at):
    numbers = (1.0 / n for n in itertools.count(1))
    cycle = itertools.cycle([1.0, 2.0, 3.0])

    class Model:
        betas = iter([0.1 * i for i in range(1, 30)])

        def __call__(self, x, y):
            observe(x @ prior() * next(numbers) * next(cycle) + next(self.betas), y)

    svi = make(Model())
    yield from steps(svi, at + 5, X, Y)


@script
def other_random_numbers(make, at):
    own, numpy_own = random.Random(3), np.random.default_rng(3)

    def model(x, y, kind):
        shift = {
            "random": random.random,
            "numpy": np.random.rand,
            "own": own.random,
            "numpy own": numpy_own.random,
            "torch": lambda: 0.0,
        }[kind]()
        observe(x @ prior() + shift, y)

    svi = make(model)
    for kind in ("torch", "random", "numpy", "own", "numpy own"):
        yield from steps(svi, at + 3, X, Y, kind)


@script
def the_seed_is_set_inside(make, at):
    def model(x, y):
        torch.manual_seed(7)
        observe(x @ prior() + torch.randn(8), y)

    svi = make(model)
    yield from steps(svi, at + 4, X, Y)
    yield torch.rand(1)


@script
def a_generator_of_torch(make, at):
    generator = torch.Generator().manual_seed(5)
    svi = make(lambda x, y: observe(x @ prior() + torch.randn(8, generator=generator), y))
    yield from steps(svi, at + 4, X, Y)
    generator.manual_seed(5)
    yield from steps(svi, 3, X, Y)
    yield torch.rand(2, generator=generator)


@script
def random_numbers_set_aside(make, at):
    def model(x, y):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            noise = torch.randn(8)
        observe(x @ prior() + noise, y)

    yield from steps(make(model), at + 4, X, Y)


@script
def buffers_changed_in_place(make, at):
    class Model:
        def __init__(self):
            self.beta = torch.tensor(1.0)
            self.mean = nn.Module()
            self.mean.register_buffer("value", torch.zeros(8))

        def __call__(self, x, y):
            self.beta.mul_(0.9)
            w = prior()
            self.mean.value = 0.9 * self.mean.value + 0.1 * (x @ w).detach()
            with poutine.scale(scale=self.beta.clone()):
                observe(x @ w - self.mean.value, y)

    model = Model()
    svi = make(model)
    yield from steps(svi, at + 5, X, Y)
    yield model.beta
    yield model.mean.value


@script
def what_the_first_run_keeps(make, at):
    class Model:
        center = None

        def __call__(self, x, y):
            if self.center is None:
                self.center = x.mean(0)
            observe((x - self.center) @ prior(), y)

    model = Model()
    svi = make(model)
    yield from steps(svi, at, X, Y)
    yield from steps(svi, 3, X + 1, Y)
    model.center = None
    yield from steps(svi, 3, X + 1, Y)


@script
def a_cache_of_results(make, at):
    @functools.lru_cache
    def table(n):
        return torch.arange(float(n)) * scale

    scale = 1.0
    svi = make(lambda x, y: observe(x @ prior() + table(len(x)), y))
    yield from steps(svi, at, X, Y)
    scale = 2.0
    yield from steps(svi, 3, X, Y)  # the old table still
    table.cache_clear()
    yield from steps(svi, 3, X, Y)


# Values of tensors


def reads():
    """Ways in which a program may read values of its data."""
    return {
        "numpy": lambda x, m: torch.from_numpy(np.sin(x.numpy())).sum(-1) + m,
        "item": lambda x, m: m * (2.0 if x.sum().item() > 50 else 1.0),
        "bool": lambda x, m: 2 * m if x.sum() > 50 else m,
        "float": lambda x, m: m * float(x[0, 1]),
        "tolist": lambda x, m: m + sum(x[1].tolist()),
        "int as a bound": lambda x, m: m + sum(torch.ones(8) for _ in range(int(x.max()))),
        "boolean mask": lambda x, m: m + x[x > 1].sum(),
        "length of a mask": lambda x, m: m * len(x[x > 1]),
        "nonzero": lambda x, m: m + len((x > 1).nonzero()),
        "unique": lambda x, m: m + len(torch.unique(x.round())),
        "argmax": lambda x, m: m + x[x.sum(-1).argmax()].sum(),
        "index by item": lambda x, m: m + x[int(x[3, 0])].sum(),
        "equal": lambda x, m: m if torch.equal(x, X) else 2 * m,
        "allclose": lambda x, m: m if torch.allclose(x, X) else 2 * m,
        "in": lambda x, m: m if 2.3 in x else 2 * m,
        "text": lambda x, m: m * len(f"{float(x.sum()):.0f}"),
        "where": lambda x, m: m + torch.where(x > 1)[0].sum(),
        "repeats": lambda x, m: m + torch.ones(8).repeat_interleave(x[:, 0].long()).sum(),
        "histogram": lambda x, m: m + len(torch.bincount(x.flatten().long())),
        "split": lambda x, m: m + len(torch.arange(10).split(max(1, int(x.max())))),
        "iteration": lambda x, m: m + sum(1 for row in x if row[0] > 1),
        "array": lambda x, m: m + np.asarray(x).max() + float(np.array(x.sum())),
        "any of a comparison": lambda x, m: m * 2 if (x > 3).any() else m,
        "match": lambda x, m: m + {0: 1.0, 1: 2.0}.get(int(x[0, 2] > 0.5), 3.0),
        "storage": lambda x, m: m + x.untyped_storage().tolist()[8] + x.detach().numpy().sum(),
    }


@pytest.mark.one_in(3)
@AT
@pytest.mark.parametrize("how", reads())
def test_values_that_programs_read(how, at):
    def change(make):
        read = reads()[how]
        svi = make(lambda x, y: observe(read(x, x @ prior()), y))
        yield from steps(svi, at, X, Y)
        yield from steps(svi, 3, 3 * X, Y)
        yield svi.step(X, Y)

    check_same(*both(change))


@script
def a_branch_by_a_draw(make, at):
    def model(x, y):
        w = prior()
        observe(x @ w * (2.0 if w[0] > 1 else 1.0), y)

    yield from steps(make(model), at + 8, X, Y)


@script
def a_branch_by_a_parameter(make, at):
    def model(x, y):
        w = prior()
        loc = pyro.param("loc")
        observe(x @ w + (1.0 if loc[0] > 0.8 else 0.0), y)

    yield from steps(make(model), at + 8, X, Y)


@script
def names_by_values(make, at):
    def model(x, y):
        w = prior()
        for i in {int(v) for v in x[:, 0]}:
            pyro.sample(f"z_{i}", dist.Normal(w.sum(), 1.0), obs=torch.tensor(float(i)))
        observe(x @ w, y)

    svi = make(model)
    yield from steps(svi, at, X, Y)
    yield from steps(svi, 3, 2 * X, Y)


@script
def numpy_in_the_closure(make, at):
    table = np.ones(3)
    svi = make(lambda x, y: observe(x @ prior() * float(table.sum()), y))
    yield from steps(svi, at, X, Y)
    table[0] = 5
    yield from steps(svi, 3, X, Y)


# By inductor, what changes tensors in place or exchanges them


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize(
    "script",
    [
        views_that_overlap,
        data_changed_during_the_step,
        modules_that_change,
        a_generator_of_torch,
        tensors_that_are_replaced,
    ],
    ids=lambda script: script.__name__,
)
def test_as_pyro_does_by_inductor(script):
    check_same(ran(script, by_pyro, 6), ran(script, functools.partial(compiled, compiler="inductor"), 6))


# What Pyro refuses


@AT
@pytest.mark.parametrize(
    "bad", [(X, 2 * Y), (X * float("nan"), (Y > 1).double()), (X, Y * float("nan"))], ids=["support", "loc", "nan"]
)
def test_data_that_pyro_refuses(bad, at):
    """It is found at the next step that is checked, at the latest, and nothing is made of it in silence."""

    def model(x, y):
        w = prior()
        with pyro.plate("data", 8):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    def go(make):
        svi = make(model)
        yield from steps(svi, at, X, (Y > 1).double())
        yield from steps(svi, 9, *bad)

    theirs, ours = both(go)
    assert isinstance(theirs.error, ValueError)
    assert isinstance(ours.error, ValueError)
    assert len(ours.values) <= len(theirs.values) + 7
    assert "Trace Shapes" not in str(ours.error).split("\n")[0]


# What nobody can see is found by the spot checks


@AT
def test_what_cannot_be_seen_is_found(at, tmp_path):
    """A file that the program reads: the graph is made anew, then Pyro runs on, and each is said once."""
    path = tmp_path / "beta"

    def model(x, y):
        with open(path) as file, poutine.scale(scale=float(file.read())):
            w = prior()
        observe(x @ w, y)

    def go(make):
        path.write_text("1.0")
        svi = make(model)
        yield from steps(svi, at, X, Y)
        for step in range(40):
            path.write_text(str(0.5 + step))
            yield svi.step(X, Y)

    told = ran(go, compiled).told
    assert len(told) == 2, told
    assert "goes on through Pyro" in told[-1]


def test_side_effects_happen_once_a_run(capsys):
    """The program is run once at the first step, which is Pyro's, and once at the second."""

    def model(x, y):
        print("run")
        observe(x @ prior(), y)

    def go(make):
        svi = make(model, guide)
        yield from steps(svi, 2, X, Y)
        assert capsys.readouterr().out.count("run") == 2

    check_same(*both(go))
