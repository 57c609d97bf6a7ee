"""Never silently wrong: what programs compute with, how they read numbers that change, and where they hold things."""

import array
import functools
import math
import operator
import types
import warnings
import weakref
from collections import ChainMap, OrderedDict, UserDict
from contextvars import ContextVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from side_by_side import Scripts, X, Y, both, check_same, guide, observe, prior, steps
from torch import nn
from torch.distributions import constraints

script = SCRIPTS = Scripts()
pytestmark = pytest.mark.usefixtures("doubles")
AT = pytest.mark.parametrize("at", [pytest.param(6, marks=pytest.mark.slow)])


@AT
@pytest.mark.parametrize("name", SCRIPTS)
def test_as_pyro_does(name, at):
    check_same(*both(SCRIPTS[name], at))


# Numbers that change are tensors in graphs: ways in which programs treat numbers otherwise than tensors


def treatments():
    return {
        "if": lambda m, t: m * 2 if t > 0.5 else m,
        "math": lambda m, t: m * math.exp(t),
        "numpy": lambda m, t: m * float(np.sqrt(t + 1)),
        "type": lambda m, t: m * t if isinstance(t, float) else m * t + 7,
        "kind": lambda m, t: m * t if type(t) is float else m * t + 7,
        "text": lambda m, t: m + len(f"{t:.3f}") * t,
        "repr": lambda m, t: m + len(repr(t)),
        "int": lambda m, t: m * int(10 * t),
        "round": lambda m, t: m + round(t, 1),
        "range": lambda m, t: m + sum(range(int(10 * t))),
        "power": lambda m, t: m + t**3 + 2**t,
        "floor": lambda m, t: m + 5 * t // 1 + (7 * t) % 1,
        "max": lambda m, t: m + max(t, 0.3) + min(1, 2 * t),
        "tensor": lambda m, t: m + torch.tensor(t) + torch.full((8,), t) + torch.ones(8) * torch.as_tensor(t),
        "tensor of a list": lambda m, t: m + torch.tensor([t, 2 * t]).sum(),
        "dictionary": lambda m, t: m * {1 - i / 10: float(i) for i in range(11)}[t],
        "in": lambda m, t: m * (2 if t in (0.0, 0.1) else 1),
        "is integer": lambda m, t: m * (2 if t.is_integer() else 1),
        "hash": lambda m, t: m + hash(t) % 7,
        "clamp": lambda m, t: m.clamp(max=t),
        "lerp": lambda m, t: torch.lerp(m, torch.zeros(8), t),
        "dropout": lambda m, t: nn.functional.dropout(m, t / 2),
        "scale": lambda m, t: _scaled(m, t + 0.1),
        "distribution": lambda m, t: m + pyro.sample("e", dist.Normal(t, 1.0 + t), obs=torch.tensor(0.3)),
        "single precision": lambda m, t: m + (torch.ones(8, dtype=torch.float32) * t).double(),
        "integers": lambda m, t: m + torch.arange(8) * t,
        "in place": lambda m, t: m + torch.zeros(8).add_(torch.ones(8), alpha=t),
        "item": lambda m, t: m + (t if not isinstance(t, torch.Tensor) else t.item()),
    }


def _scaled(m, t):
    with poutine.scale(scale=t):
        return m + pyro.sample("e", dist.Normal(0.0, 1.0), obs=torch.tensor(0.3))


FEW = "if", "math", "type", "text", "dictionary", "distribution", "scale"


@pytest.mark.one_in(2)
@pytest.mark.parametrize("how", [pytest.param(k, marks=[] if k in FEW else pytest.mark.slow) for k in treatments()])
def test_numbers_that_change(how):
    """A weight that falls from 1 to 0 in fifths, and begins again."""

    def weights(make):
        treat = treatments()[how]
        svi = make(lambda x, y, t: observe(treat(x @ prior(), t), y))
        for step in range(9):
            yield svi.step(X, Y, 1 - 2 * (step % 6) / 10)

    check_same(*both(weights))


@script
def a_division_by_a_number_that_falls(make, at):
    svi = make(lambda x, y, t: observe(x @ prior() / (1 / t), y))
    for step in range(at + 1):
        yield svi.step(X, Y, float(at - step))


@script
def a_number_among_keywords_and_defaults(make, at):
    def model(x, y, *, weights=(1.0, {"a": 0.5})):
        observe(x @ prior() * weights[0] + weights[1]["a"], y)

    svi = make(model)
    yield from steps(svi, at, X, Y)
    for step in range(5):
        yield svi.step(X, Y, weights=(1.0, {"a": 0.1 * step}))
    yield from steps(svi, 2, X, Y)


@script
def an_integer_turns_into_a_float(make, at):
    svi = make(lambda x, y, n: observe(x @ prior() + torch.full((8,), n).double() / 3 * n, y))
    for step in range(at + 4):
        yield svi.step(X, Y, step if step < at else float(step))


# What programs compute with


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return 0.5 * gradient


def inner_gradient(x, w):
    leaf = w.detach().requires_grad_()
    with torch.enable_grad():
        (g,) = torch.autograd.grad((x @ leaf).square().sum(), leaf, create_graph=True)
    return x @ w + g.detach().sum() / 100


def gradient_of_the_draw(x, w):
    if not w.requires_grad:
        return x @ w
    (g,) = torch.autograd.grad((w**3).sum(), w, create_graph=True)
    return x @ (w + g)


def by_script(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x @ w) if bool(w.sum() > -100) else x @ w


def scripted(x, w):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is going
        return torch.jit.script(by_script)(x, w)


def contents():
    """Networks and functions ``(x, w) -> mean``, made anew for each run."""
    attention, recurrent = nn.MultiheadAttention(3, 1, batch_first=True), nn.LSTM(3, 4, num_layers=2, dropout=0.3)
    embedding, spectral = nn.Embedding(4, 3, max_norm=0.7), nn.utils.parametrizations.spectral_norm(nn.Linear(3, 1))
    weight_norm, conv = nn.utils.parametrizations.weight_norm(nn.Linear(3, 1)), nn.Conv1d(1, 2, 3, padding=1)
    layer, lazy, group = nn.LayerNorm(3), nn.LazyLinear(1), nn.GroupNorm(3, 3)
    instance = nn.InstanceNorm1d(3, track_running_stats=True)
    found = {
        "attention": (attention, lambda x, w: attention(x[None], x[None], x[None])[0][0] @ w),
        "lstm": (recurrent, lambda x, w: recurrent(x)[0].sum(-1) + x @ w),
        "embedding": (embedding, lambda x, w: embedding(torch.arange(8) % 4) @ w),
        "spectral": (spectral, lambda x, w: spectral(x)[:, 0] + x @ w),
        "weight norm": (weight_norm, lambda x, w: weight_norm(x)[:, 0] + x @ w),
        "convolution": (conv, lambda x, w: conv(x[:, None]).sum((1, 2)) + x @ w),
        "layer norm": (layer, lambda x, w: layer(x) @ w),
        "group norm": (group, lambda x, w: group(x) @ w),
        "instance norm": (instance, lambda x, w: instance(x.t()[None])[0].t() @ w),
        "lazy": (lazy, lambda x, w: lazy(x)[:, 0] + x @ w),
    }
    plain = {
        "straight through": lambda x, w: Straight.apply(x @ w),
        "inner gradient": inner_gradient,
        "gradient of the draw": gradient_of_the_draw,
        "checkpoint": lambda x, w: torch.utils.checkpoint.checkpoint(lambda w: (x @ w).tanh(), w, use_reentrant=False),
        "vmap": lambda x, w: torch.func.vmap(lambda row: (row * w).sum())(x),
        "jacobian": lambda x, w: x @ torch.func.jacrev(lambda v: v.square().sum())(w),
        "jit": scripted,
        "complex": lambda x, w: torch.fft.fft(x @ w).abs(),
        "linear algebra": lambda x, w: x @ torch.linalg.solve(torch.eye(3) + torch.outer(w, w), w),
        "cholesky": lambda x, w: x @ torch.linalg.cholesky(torch.eye(3) + torch.outer(w, w)).sum(-1),
        "eigenvalues": lambda x, w: x @ torch.linalg.eigvalsh(torch.eye(3) + torch.outer(w, w)),
        "sparse": lambda x, w: torch.sparse.mm(x.to_sparse(), w[:, None])[:, 0],
        "sorting": lambda x, w: x @ w.sort().values + w.topk(2).values.sum(),
        "scatter": lambda x, w: torch.zeros(8).index_add(0, torch.tensor([0, 0, 1]), w) + x @ w,
        "gather": lambda x, w: x[torch.arange(8), torch.arange(8) % 3] * w[0] + w.cumsum(0)[2],
        "einsum": lambda x, w: torch.einsum("bi,i->b", x, w),
        "padding": lambda x, w: nn.functional.pad(x, (1, 0)) @ torch.cat([w[:1], w]),
        "item assignment": lambda x, w: _assigned(x, w),
        "gumbel": lambda x, w: x @ nn.functional.gumbel_softmax(w, hard=True),
        "noise": lambda x, w: x @ w + torch.randn(8) + torch.rand(8).exponential_() + torch.randint(3, (8,)),
        "permutation": lambda x, w: x[torch.randperm(8)] @ w,
        "multinomial": lambda x, w: x @ w + torch.multinomial(w.exp(), 8, replacement=True),
        "mask of a draw": lambda x, w: (x * (torch.rand(8, 3) < 0.7)) @ w,
        "cond": lambda x, w: torch.where(w.sum() > 3, x @ w, 2 * x @ w),
        "stop": lambda x, w: x @ w.detach() + x @ w,
        "no grad": lambda x, w: _without(x, w),
        "nan to num": lambda x, w: torch.nan_to_num(x / x, 1.0) @ w,
        "buffers": lambda x, w: x @ w + torch.tensor([1.0, 2.0]).sum() + torch.zeros(1),
        "time of types": lambda x, w: (x.float() @ w.float()).double(),
        "unbind": lambda x, w: sum(row * each for row, each in zip(x.unbind(1), w, strict=True)),
    }
    return found | {name: (None, f) for name, f in plain.items()}


def _assigned(x, w):
    out = torch.zeros(8)
    out[:4] = x[:4] @ w
    out[4:] += w.sum()
    return out


def _without(x, w):
    with torch.no_grad():
        base = x @ w
    return base + (x @ w - base).tanh()


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", contents())
def test_what_programs_compute(kind):
    def contained(make):
        module, mean = contents()[kind]

        def model(x, y):
            if module is not None:
                pyro.module("module", module)
            observe(mean(x, prior()), y)

        if kind == "lazy":
            module(X)
        svi = make(model)
        yield from steps(svi, 4, X, Y)
        yield from steps(svi, 5, X + 1, Y)
        if module is not None:
            for buffer in module.buffers():
                yield buffer.double()

    theirs, ours = both(contained)
    check_same(theirs, ours)
    assert not [told for told in ours.told if "CompiledSVI" in told], "a reason to go on through Pyro"


# Sites of other kinds


@script
def observations_in_part(make, at):
    def model(x, y, mask):
        w = prior()
        with pyro.plate("data", 8):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y, obs_mask=mask)

    def both_guide(x, y, mask):
        guide()
        with pyro.plate("data", 8):
            pyro.sample("y_unobserved", dist.Normal(pyro.param("m", torch.zeros(8)), 0.1))

    svi = make(model, both_guide)
    yield from steps(svi, at, X, Y, Y > 1)
    yield from steps(svi, 3, X, Y, Y > 0.5)


@script
def data_that_are_there_or_not(make, at):
    def model(x, y=None):
        w = prior()
        with pyro.plate("data", 8):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    def both_guide(x, y=None):
        guide()
        if y is None:
            with pyro.plate("data", 8):
                pyro.sample("y", dist.Normal(pyro.param("m", torch.zeros(8)), 0.1))

    svi = make(model, both_guide)
    yield from steps(svi, at, X, Y)
    yield from steps(svi, 3, X)
    yield from steps(svi, 3, X, Y)


@script
def parameters_kept_in_bounds(make, at):
    def model(x, y):
        with torch.no_grad():
            pyro.param("loc").clamp_(max=0.9)
        observe(x @ prior(), y)

    yield from steps(make(model), at + 4, X, Y)


@script
def a_trace_within(make, at):
    def model(x, y):
        with poutine.block():
            inner = poutine.trace(prior).get_trace()
        observe(x @ prior() + inner.nodes["w"]["value"].sum() + inner.log_prob_sum(), y)

    yield from steps(make(model), at + 4, X, Y)


@script
def constraints_exchanged_in_the_store(make, at):
    store = pyro.get_param_store()
    svi = make(lambda x, y: observe(x @ prior(), y))
    yield from steps(svi, at, X, Y)
    state = store.get_state()
    state["constraints"]["loc"] = constraints.positive
    store.set_state(state)
    yield from steps(svi, 3, X, Y)


@script
def steps_of_the_optimizer_are_wrapped(make, at):
    optim = pyro.optim.Adam({"lr": 0.05})
    svi, calls = make(lambda x, y: observe(x @ prior(), y), optim=optim), []
    yield from steps(svi, at, X, Y)
    for each in optim.optim_objs.values():
        each.step = lambda step=each.step: (calls.append(1), step())
    yield from steps(svi, 4, X, Y)
    yield len(calls)


@script
def clipping_is_added(make, at):
    optim = pyro.optim.Adam({"lr": 0.05})
    svi = make(lambda x, y: observe(x @ prior(), y), optim=optim)
    yield from steps(svi, at, X, Y)
    for p in optim.grad_clip:
        optim.grad_clip[p] = lambda p: p.grad.clamp_(-0.01, 0.01)
    yield from steps(svi, 4, X, Y)


# Where programs hold things


@script
def a_handler_that_is_held(make, at):
    handler = poutine.scale(scale=1.0)

    def model(x, y):
        with handler:
            w = prior()
        observe(x @ w, y)

    svi = make(model)
    yield from steps(svi, at, X, Y)
    handler.scale = 0.1
    yield from steps(svi, 3, X, Y)


@script
def a_distribution_that_is_held(make, at):
    held = {"prior": dist.Normal(torch.zeros(3), 1.0)}

    def model(x, y):
        observe(x @ pyro.sample("w", held["prior"].to_event(1)), y)

    svi = make(model)
    yield from steps(svi, at, X, Y)
    held["prior"].scale = torch.full((3,), 0.3)
    yield from steps(svi, 3, X, Y)
    held["prior"].loc.add_(1.0)
    yield from steps(svi, 3, X, Y)
    held["prior"] = dist.Laplace(torch.zeros(3), 1.0)
    yield from steps(svi, 3, X, Y)


def boxes():
    """Containers of a number, with how it is read and put."""

    class Indexed:
        def __init__(self):
            self.hidden = (1.0,)

        def __getitem__(self, key):
            return self.hidden[key]

        def __setitem__(self, key, value):
            self.hidden = (value,)

    class Frozen(types.SimpleNamespace):
        pass

    class Late:
        @functools.cached_property
        def value(self):
            return self.beta

        beta = 1.0

    class Meta(type):
        beta = 1.0

    class OfMeta(metaclass=Meta):
        pass

    held = Frozen(beta=1.0)
    get, put = operator.itemgetter(0), lambda box, v: operator.setitem(box, 0, v)
    late = (lambda b: b.value), lambda b, v: (b.__dict__.clear(), setattr(b, "beta", v))
    listed, modules = nn.ParameterList([torch.ones(())]), nn.ModuleDict({"a": nn.Dropout(0.5)})
    return {
        "array": (array.array("d", [1.0]), get, put),
        "bytes": (bytearray([1]), get, lambda b, v: operator.setitem(b, 0, int(10 * v) + 1)),
        "memory": (memoryview(bytearray([1])), get, lambda b, v: operator.setitem(b, 0, int(10 * v) + 1)),
        "user dictionary": (UserDict({0: 1.0}), get, put),
        "ordered dictionary": (OrderedDict({0: 1.0}), get, put),
        "chain": (ChainMap({}, {0: 1.0}), get, put),
        "indexed": (Indexed(), get, put),
        "namespace": (Frozen(beta=1.0), lambda b: b.beta, lambda b, v: setattr(b, "beta", v)),
        "cached property": (Late(), *late),
        "record": (np.array([(1.0,)], dtype=[("beta", float)]), lambda b: b["beta"][0], lambda b, v: b["beta"].fill(v)),
        "objects": (np.array([1.0], dtype=object), get, put),
        "masked": (np.ma.array([1.0]), get, put),
        "set": ({1.0}, lambda b: next(iter(b)), lambda b, v: (b.clear(), b.add(v))),
        "tensor": (torch.ones(1), lambda b: b[0], put),
        "parameter list": (
            listed,
            lambda b: b[0].detach(),
            lambda b, v: b[0].data.fill_(v),
        ),
        "module dictionary": (
            modules,
            lambda b: b["a"].p,
            lambda b, v: setattr(b["a"], "p", v),
        ),
        "context": (ContextVar("beta", default=1.0), lambda b: b.get(), lambda b, v: b.set(v)),
        "weak reference": (weakref.ref(held), lambda b: b().beta, lambda b, v, held=held: setattr(held, "beta", v)),
        "metaclass": (OfMeta, lambda b: b.beta, lambda b, v: setattr(Meta, "beta", v)),
        "function": (lambda: None, lambda f: getattr(f, "beta", 1.0), lambda f, v: setattr(f, "beta", v)),
    }


@AT
@pytest.mark.parametrize("kind", boxes())
def test_boxes_of_numbers(kind, at):
    def change(make):
        box, get, put = boxes()[kind]

        def model(x, y):
            with poutine.scale(scale=float(get(box)) + 0.5):
                w = prior()
            observe(x @ w, y)

        svi = make(model)
        yield from steps(svi, at, X, Y)
        put(box, 0.1)
        yield from steps(svi, 3, X, Y)
        put(box, 0.2)
        yield from steps(svi, 3, X, Y)

    check_same(*both(change))


class Held(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.zeros(8), torch.ones(8)
        self.listed = [self.a, (self.b, 1)]

    def forward(self, x, y):
        observe(x @ prior() + self.a - 2 * self.b + self.listed[0] * self.listed[1][0], y)


@script
def tensors_held_in_several_places(make, at):
    model = Held()
    svi = make(model)
    yield from steps(svi, at, X, Y)
    model.a = torch.full((8,), 0.5)
    yield from steps(svi, 3, X, Y)
    model.a = model.b
    yield from steps(svi, 3, X, Y)
    model.listed[1] = (torch.zeros(8), 1)
    yield from steps(svi, 3, X, Y)
    model.b = model.a * 2
    yield from steps(svi, 5, X, Y)


@script
def tensors_held_that_come_to_need_gradients(make, at):
    model = Held()
    svi = make(model)
    yield from steps(svi, at, X, Y)
    model.a = torch.zeros(8, requires_grad=True)
    yield from steps(svi, 3, X, Y)
    yield model.a.grad
    model.a = nn.Parameter(torch.ones(8))
    yield from steps(svi, 3, X, Y)
    model.b.requires_grad_(True)
    yield from steps(svi, 3, X, Y)
    yield model.b.grad


@script
def tensors_held_of_another_layout(make, at):
    model = Held()
    svi = make(model)
    yield from steps(svi, at, X, Y)
    for other in (torch.ones(16)[::2], torch.ones(1).expand(8), torch.ones(8, dtype=torch.float32), torch.ones(())):
        model.b = other
        yield from steps(svi, 3, X, Y)


@script
def tensors_held_that_are_like_those_before_or_not(make, at):
    model = Held()

    def counting(x, y):
        observe(x @ prior() + model.a * model.a.numel() + len(model.listed[0].shape), y)

    svi = make(counting)
    yield from steps(svi, at, X, Y)
    model.a = torch.full((8,), 0.5)
    yield from steps(svi, 5, X, Y)
    model.a = torch.full((1,), 0.25)
    yield from steps(svi, 5, X, Y)
    model.a = torch.full((8,), 0.125)
    yield from steps(svi, 5, X, Y)


@script
def a_tensor_held_is_an_argument_too(make, at):
    model = Held()
    svi = make(lambda x, y: model(x, y))
    yield from steps(svi, at, X, model.a)
    yield from steps(svi, 3, X, Y)
    model.a = Y
    yield from steps(svi, 3, X, Y)


@script
def tensors_held_and_changed_by_the_program(make, at):
    model = Held()

    def changing(x, y):
        model.a.add_(0.1)
        model.b = model.b * 0.9
        model(x, y)

    svi = make(changing)
    yield from steps(svi, at, X, Y)
    model.a = torch.zeros(8)
    yield from steps(svi, 5, X, Y)
    yield model.a
    yield model.b
    model.a = model.b
    yield from steps(svi, 3, X, Y)
    yield model.a


@script
def a_tensor_held_that_decides(make, at):
    model = Held()

    def deciding(x, y):
        if model.a.sum() > 0:
            x = 2 * x
        model(x[: int(model.b[0] * 8)], y[:8])

    svi = make(deciding)
    yield from steps(svi, at, X, Y)
    model.a = torch.ones(8)
    yield from steps(svi, 3, X, Y)
    model.a = torch.full((8,), -1.0)
    yield from steps(svi, 3, X, Y)


@script
def mini_batches_by_a_cursor(make, at):
    class Cursor:
        start = 0

        def __call__(self):
            rows = slice(self.start, self.start + 4)
            observe(X[rows] @ prior(), Y[rows])

    model = Cursor()
    svi = make(model)
    for step in range(at + 14):
        model.start = step % 3
        yield svi.step()


@script
def many_states_in_turns(make, at):
    weight = [1.0]
    svi = make(lambda x, y: observe(x @ prior() * weight[0], y))
    for step in range(60 if at == 6 else 30):
        weight[0] = 1.0 + step % (2 * at)
        yield svi.step(X, Y)


@script
def losses_with_state(make, at):
    class Counting(Trace_ELBO):
        number, seen = 0, None

        def loss_and_grads(self, model, guide, *args, **kwargs):
            self.number += 1
            return super().loss_and_grads(model, guide, *args, **kwargs) * self.number

    svi = make(lambda x, y: observe(x @ prior(), y), loss=Counting())
    yield from steps(svi, at + 4, X, Y)
