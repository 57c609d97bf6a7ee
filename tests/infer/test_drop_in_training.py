"""Never silently wrong: what a script does with store, optimizer and engines, and what is around a step."""

import contextlib
import copy
import os
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from side_by_side import Scripts, X, Y, both, by_pyro, check_same, compiled, guide, observe, prior, ran, steps
from torch import nn
from torch.distributions import Distribution, constraints

script = SCRIPTS = Scripts()
pytestmark = pytest.mark.usefixtures("doubles")
AT = pytest.mark.parametrize("at", [pytest.param(6, marks=pytest.mark.slow)])


def model(x, y):
    observe(x @ prior(), y)


@AT
@pytest.mark.parametrize("name", SCRIPTS)
def test_as_pyro_does(name, at):
    check_same(*both(SCRIPTS[name], at))


def unconstrained(name="loc"):
    return pyro.get_param_store()._params[name]


# What the first version could not do


@script
def a_parameter_of_the_model(make, at):
    def noisy(x, y):
        w = prior()
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x @ w, pyro.param("sigma", torch.tensor(1.0))), obs=y)

    noisy(X, Y)
    yield from steps(make(noisy), at + 2, X, Y)
    yield pyro.param("sigma")


@script
def a_plate_that_is_a_loop(make, at):
    def looped(x, y):
        w = prior()
        for i in pyro.plate("data", 8):
            pyro.sample(f"y{i}", dist.Normal(x[i] @ w, 1.0), obs=y[i])

    yield from steps(make(looped), at + 2, X, Y)


@script
def correlations(make, at):
    def correlated(y):
        cholesky = pyro.sample("L", dist.LKJCholesky(3, 1.0))
        with pyro.plate("data", 8):
            pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=cholesky), obs=y)

    yield from steps(make(correlated, AutoNormal(correlated)), at + 2, X)


@script
def a_site_that_is_masked(make, at):
    def masked(y):
        pyro.sample("u", dist.Normal(0.0, 1.0).mask(False))
        observe(pyro.sample("m", dist.Normal(0.0, 1.0)), y)

    def masked_guide(y):
        pyro.sample("u", dist.Normal(0.0, 1.0).mask(False))
        pyro.sample("m", dist.Normal(pyro.param("l", torch.tensor(0.0)), 1.0))

    yield from steps(make(masked, masked_guide, loss=TraceMeanField_ELBO()), at + 2, Y)


@script
def modules_in_the_store(make, at):
    network = nn.Linear(3, 1)

    def registered(x, y):
        pyro.module("network", network)
        observe(x @ prior() + network(x)[:, 0], y)

    yield from steps(make(registered), at + 2, X, Y)
    yield tuple(pyro.get_param_store().keys())


# Gradients


@script
def gradients_left_by_another_step(make, at):
    network = nn.Linear(3, 1)

    def either(x, y, use):
        if use:
            pyro.module("network", network)
        observe(x @ prior() + (network(x)[:, 0] if use else 0.0), y)

    svi = make(either)
    yield from steps(svi, at, X, Y, True)
    yield from steps(svi, 3, X, Y, False)
    yield network.weight
    yield from steps(svi, 3, X, Y, True)
    yield network.weight


@script
def gradients_left_by_the_user(make, at):
    svi = make(model)
    yield from steps(svi, at, X, Y)
    (3 * unconstrained().sum()).backward()
    yield from steps(svi, 2, X, Y)
    unconstrained().grad = torch.full((3,), -2.0)
    yield from steps(svi, 2, X, Y)
    unconstrained().grad = None
    yield from steps(svi, 2, X, Y)


@script
def a_network_without_pyro_module(make, at):
    """Its gradients add up, and nothing ever steps."""
    network = nn.Linear(3, 1)
    svi = make(lambda x, y: observe(x @ prior() + network(x)[:, 0], y))
    yield from steps(svi, at + 3, X, Y)
    yield network.weight
    yield network.weight.grad


@script
def hooks_of_gradients(make, at):
    seen = []
    svi = make(model)
    yield from steps(svi, at, X, Y)
    handle = unconstrained().register_hook(lambda g: 3 * g.clamp(max=1.0))
    unconstrained().register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.sum().item()))
    yield from steps(svi, 3, X, Y)
    handle.remove()
    yield from steps(svi, 3, X, Y)
    yield tuple(round(each, 6) for each in seen)


@script
def hooks_of_draws(make, at):
    """A gradient that the program itself changes on its way."""

    def hooked(x, y):
        w = prior()
        if w.requires_grad:
            w.register_hook(lambda g: 0.5 * g)
        observe(x @ w, y)

    yield from steps(make(hooked), at + 4, X, Y)


@script
def parameters_frozen_and_freed(make, at):
    svi = make(model)
    yield from steps(svi, at, X, Y)
    unconstrained().requires_grad_(False)
    yield from steps(svi, 3, X, Y)
    yield pyro.param("loc")
    unconstrained().requires_grad_(True)
    yield from steps(svi, 3, X, Y)


@script
def without_gradients(make, at):
    svi = make(model)
    yield from steps(svi, at, X, Y)
    with torch.no_grad():
        yield from steps(svi, 3, X, Y)
    yield pyro.param("loc")
    yield from steps(svi, 3, X, Y)


@script
def nothing_to_train(make, at):
    svi = make(lambda x: None, lambda x: None)
    yield from steps(svi, at + 2, X)


# The store


@script
def the_store_is_cleared(make, at):
    svi = make(model)
    yield from steps(svi, at, X, Y)
    pyro.clear_param_store()
    yield from steps(svi, 4, X, Y)


@script
def an_entry_is_replaced(make, at):
    store = pyro.get_param_store()
    svi = make(model)
    yield from steps(svi, at, X, Y)
    store["loc"] = torch.full((3,), 0.3)
    yield from steps(svi, 3, X, Y)
    del store["loc"]
    yield from steps(svi, 3, X, Y)
    pyro.param("loc").data.fill_(0.1)
    yield from steps(svi, 3, X, Y)
    unconstrained().data = torch.zeros(3)
    yield from steps(svi, 3, X, Y)


@script
def another_constraint(make, at):
    svi = make(model)
    yield from steps(svi, at, X, Y)
    del pyro.get_param_store()["loc"]
    pyro.param("loc", torch.ones(3), constraint=constraints.positive)
    yield from steps(svi, 3, X, Y)


@script
def another_shape_in_the_store(make, at):
    svi = make(model)
    yield from steps(svi, at, X, Y)
    pyro.get_param_store()["loc"] = torch.tensor(0.5)  # broadcasts in the guide
    yield from steps(svi, 3, X, Y)


@script
def a_state_loaded_into_the_store(make, at):
    store = pyro.get_param_store()
    svi = make(model)
    yield from steps(svi, at, X, Y)
    state = copy.deepcopy({k: dict(v) for k, v in store.get_state().items()})
    yield from steps(svi, 3, X, Y)
    store.set_state(state)
    yield from steps(svi, 3, X, Y)


@script
def a_store_around(make, at):
    store = pyro.get_param_store()
    svi = make(model)
    yield from steps(svi, at, X, Y)
    with store.scope() as inside:
        yield from steps(svi, 3, X, Y)
    yield from steps(svi, 3, X, Y)
    with store.scope(inside):
        yield from steps(svi, 3, X, Y)
        yield pyro.param("loc")
    yield from steps(svi, 1, X, Y)


@script
def entries_exchanged(make, at):
    def two(x, y):
        loc = pyro.param("a", torch.ones(3)) - 2 * pyro.param("b", torch.zeros(3))
        pyro.sample("w", dist.Normal(loc, 0.1).to_event(1))

    svi = make(model, two)
    yield from steps(svi, at, X, Y)
    store = pyro.get_param_store()
    a, b = pyro.param("a").detach().clone(), pyro.param("b").detach().clone()
    store["a"], store["b"] = b, a
    yield from steps(svi, 3, X, Y)


@script
def a_parameter_born_late(make, at):
    def late(x, y, on=False):
        w = prior()
        observe(x @ w * (pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive) if on else 1.0), y)

    svi = make(late)
    yield from steps(svi, at, X, Y)
    yield from steps(svi, 3, X, Y, on=True)
    yield from steps(svi, 2, X, Y)


@script
def a_guide_that_changes_its_sites(make, at):
    sites = ["w"]

    def three(x, y):
        for name in sites:
            loc = pyro.param(f"loc_{name}", torch.ones(3))
            pyro.sample(name, dist.Normal(loc, 0.1).to_event(1))

    def with_two(x, y):
        w = prior()
        v = pyro.sample("v", dist.Normal(torch.zeros(3), 1.0).to_event(1)) if "v" in sites else 0.0
        observe(x @ (w + v), y)

    svi = make(with_two, three)
    yield from steps(svi, at, X, Y)
    sites.append("v")
    yield from steps(svi, 3, X, Y)
    sites.remove("w")
    yield from steps(svi, 3, X, Y)


@script
def a_name_that_is_used_twice(make, at):
    twice = []

    def repeated(x, y):
        w = prior()
        for _ in twice:
            prior()
        observe(x @ w, y)

    svi = make(repeated)
    yield from steps(svi, at, X, Y)
    twice.append(1)
    yield svi.step(X, Y)


# Optimizers and schedules


@script
def rates_that_are_changed(make, at):
    optim = pyro.optim.Adam({"lr": 0.05})
    svi = make(model, optim=optim)
    yield from steps(svi, at, X, Y)
    for each in optim.optim_objs.values():
        each.param_groups[0]["lr"] = 0.5
    yield from steps(svi, 3, X, Y)
    yield pyro.param("loc")
    optim.optim_objs.clear()
    optim.pt_optim_args = {"lr": 0.01}
    yield from steps(svi, 3, X, Y)


@script
def states_loaded_into_the_optimizer(make, at):
    optim = pyro.optim.Adam({"lr": 0.05})
    svi = make(model, optim=optim)
    yield from steps(svi, at, X, Y)
    state = copy.deepcopy(optim.get_state())
    yield from steps(svi, 3, X, Y)
    for each in optim.optim_objs.values():
        each.load_state_dict(copy.deepcopy(state["loc"]))
    yield from steps(svi, 3, X, Y)
    optim.optim_objs.clear()
    optim.set_state(state)
    yield from steps(svi, 3, X, Y)


@script
def another_optimizer(make, at):
    svi = make(model)
    yield from steps(svi, at, X, Y)
    svi.optim = pyro.optim.SGD({"lr": 0.01, "momentum": 0.9})
    yield from steps(svi, 4, X, Y)


@script
def schedules(make, at):
    optim = pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.5})
    svi = make(model, optim=optim)
    yield from steps(svi, at, X, Y)
    for _ in range(4):
        optim.step()
        yield from steps(svi, 2, X, Y)


@script
def a_schedule_by_the_loss(make, at):
    settings = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.01}, "patience": 0, "factor": 0.1}
    optim = pyro.optim.ReduceLROnPlateau(settings)
    svi = make(model, optim=optim)
    for _ in range(at + 4):
        loss = svi.step(X, Y)
        optim.step(loss)
        yield loss


@script
def another_model_and_guide(make, at):
    svi = make(model)
    yield from steps(svi, at, X, Y)
    svi.model = lambda x, y: observe(2 * x @ prior(), y)
    yield from steps(svi, 3, X, Y)
    svi.guide = poutine.scale(guide, scale=0.5)
    yield from steps(svi, 3, X, Y)


@script
def losses_that_change(make, at):
    loss = Trace_ELBO()
    svi = make(model, loss=loss)
    yield from steps(svi, at, X, Y)
    loss.num_particles = 3
    yield from steps(svi, 3, X, Y)
    loss.vectorize_particles, loss.max_plate_nesting = False, 1
    loss.num_particles = 1
    yield from steps(svi, 3, X, Y)


@script
def a_loss_with_a_weight(make, at):
    weight = [1.0]

    def loss(model, guide, *args):
        return weight[0] * Trace_ELBO().differentiable_loss(model, guide, *args)

    svi = make(model, loss=loss)
    yield from steps(svi, at, X, Y)
    weight[0] = 0.1
    yield from steps(svi, 3, X, Y)


# Several engines


@script
def two_engines_over_one_store(make, at):
    network = nn.Linear(3, 1)

    def other(x, y):
        pyro.module("network", network)
        observe(2 * x @ prior() + network(x)[:, 0], y)

    one, two = make(model), make(other, loss=TraceMeanField_ELBO())
    yield from steps(one, at, X, Y)
    for _ in range(4):
        yield two.step(X, Y)
        yield one.step(X, Y)
        yield one.step(X, Y)


@script
def two_engines_over_one_optimizer(make, at):
    network = nn.Linear(3, 1)

    def other(x, y):
        pyro.module("network", network)
        observe(2 * x @ prior() + network(x)[:, 0], y)

    optim = pyro.optim.Adam({"lr": 0.05})
    one, two = make(model, optim=optim), make(other, optim=optim)
    yield from steps(one, at, X, Y)
    for _ in range(4):
        yield two.step(X, Y)
        yield one.step(X, Y)
    yield network.weight


@script
def beside_an_engine_of_pyro(make, at):
    optim = pyro.optim.Adam({"lr": 0.05})
    one, two = make(model, optim=optim), by_pyro(lambda x, y: observe(3 * x @ prior(), y), optim=optim)
    yield from steps(one, at, X, Y)
    for _ in range(4):
        yield two.step(X, Y)
        yield one.step(X, Y)


@script
def beside_training_by_hand(make, at):
    svi = make(model)
    yield from steps(svi, at, X, Y)
    by_hand = torch.optim.SGD([unconstrained()], lr=0.01)
    for _ in range(3):
        Trace_ELBO().differentiable_loss(model, guide, X, Y).backward()
        by_hand.step()
        by_hand.zero_grad()
        yield svi.step(X, Y)


@script
def losses_evaluated_between(make, at):
    svi = make(model)
    yield from steps(svi, at, X, Y)
    for _ in range(3):
        yield svi.evaluate_loss(X, Y)
        yield svi.step(X, Y)
        yield svi.evaluate_loss(X[:4], Y[:4])
        yield svi.step(X, Y)


@script
def losses_evaluated_first(make, at):
    svi = make(model)
    yield from (svi.evaluate_loss(X, Y) for _ in range(at))
    yield from steps(svi, 4, X, Y)


# What is around a step


@script
def seeds_set_between_steps(make, at):
    svi = make(model)
    yield from steps(svi, at, X, Y)
    for _ in range(4):
        pyro.set_rng_seed(3)
        yield svi.step(X, Y)


HANDLERS = {
    "scale": lambda: poutine.scale(scale=0.5),
    "mask": lambda: poutine.mask(mask=torch.arange(8) % 2 == 0),
    "mask False": lambda: poutine.mask(mask=False),
    "condition": lambda: poutine.condition(data={"w": torch.ones(3)}),
    "substitute": lambda: poutine.substitute(data={"loc": torch.zeros(3)}),
    "block": poutine.block,
    "seed": lambda: poutine.seed(rng_seed=5),
    "infer_config": lambda: poutine.infer_config(config_fn=lambda site: {"was_here": True}),
    "reparam": lambda: poutine.reparam(config={}),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "validation off": lambda: pyro.validation_enabled(False),
    "anomalies": torch.autograd.detect_anomaly,
    "saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: 0.5 * t),
    "device": lambda: torch.device("cpu"),
}


@AT
@pytest.mark.parametrize("kind", HANDLERS)
def test_handlers_around_a_step(kind, at):
    def around(make):
        def in_single_precision(x, y):
            observe((x.float() @ prior().float()).double(), y)

        svi = make(in_single_precision if kind == "autocast" else model)
        yield from steps(svi, at, X, Y)
        for _ in range(3):
            with HANDLERS[kind]():
                yield svi.step(X, Y)
        yield from steps(svi, 3, X, Y)

    theirs, ours = both(around)
    if kind == "inference_mode":  # whose gradients Pyro cannot go on with
        assert isinstance(theirs.error, RuntimeError)
        ours = ours._replace(values=ours.values[: len(theirs.values)], error=theirs.error, store=theirs.store)
        ours = ours._replace(drawn=theirs.drawn)
    check_same(theirs, ours)


@script
def traces_around_a_step(make, at):
    svi = make(model)
    yield from steps(svi, at, X, Y)
    for _ in range(4):
        with poutine.trace(param_only=True) as tracer:
            yield svi.step(X, Y)
        yield tuple(tracer.trace.nodes)


@script
def a_handler_of_the_user(make, at):
    class Doubled(poutine.messenger.Messenger):
        seen = 0

        def _pyro_sample(self, msg):
            Doubled.seen += 1
            if msg["name"] == "y":
                msg["scale"] = 2 * msg["scale"]

    Doubled.seen = 0
    svi = make(model)
    yield from steps(svi, at, X, Y)
    with Doubled():
        yield from steps(svi, 4, X, Y)
    yield from steps(svi, 2, X, Y)
    yield Doubled.seen


@script
def handlers_that_stay(make, at):
    data = {"y": Y}

    def unseen(x):
        w = prior()
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0))

    svi = make(unseen, guide)
    with poutine.condition(data=data), poutine.scale(scale=0.3):
        yield from steps(svi, at, X)
        data["y"] = 2 * Y
        yield from steps(svi, 3, X)


@script
def another_default_type(make, at):
    def made(x, y):
        observe((x @ prior() + torch.tensor(1.0) / 3).double(), y)

    def point(x, y):
        pyro.sample("w", dist.Delta(pyro.param("loc", torch.ones(3)), event_dim=1))

    svi = make(made, point)
    yield from steps(svi, at, X, Y)
    torch.set_default_dtype(torch.float32)
    try:
        yield from steps(svi, 3, X, Y)
    finally:
        torch.set_default_dtype(torch.float64)
    yield from steps(svi, 3, X, Y)


@script
def validation_of_distributions(make, at):
    def bernoulli(x, y):
        w = prior()
        with pyro.plate("data", 8):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    svi = make(bernoulli)
    yield from steps(svi, at, X, (Y > 1).double())
    pyro.enable_validation(False)
    try:
        yield from steps(svi, 3, X, 2 * (Y > 1).double())
    finally:
        pyro.enable_validation(True)
        Distribution.set_default_validate_args(True)
    yield from steps(svi, 3, X, (Y > 1).double())


# Interrupted, copied, sent


@AT
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MemoryError, StopIteration])
def test_errors_of_the_program(error, at):
    """It is raised, and then training goes on as if nothing had been."""

    def interrupted(make):
        raises = []

        def failing(x, y):
            w = prior()
            if raises:
                raise raises.pop()
            observe(x @ w, y)

        svi = make(failing)
        yield from steps(svi, at, X, Y)
        for _ in range(2):
            raises.append(error())
            try:
                svi.step(X, Y)
            except error:
                yield "raised"
            yield from steps(svi, 4, X, Y)
        yield len(pyro.poutine.runtime._PYRO_STACK)

    check_same(*both(interrupted))


@script
def errors_after_some_runs(make, at):
    """A program that counts its runs and fails at one of them."""
    runs = [0]

    def failing(x, y):
        runs[0] += 1
        w = prior()
        if runs[0] == at + 1:
            raise RuntimeError("once")
        observe(x @ w, y)

    svi = make(failing)
    yield from steps(svi, at, X, Y)
    with contextlib.suppress(RuntimeError):
        yield svi.step(X, Y)
    yield from steps(svi, 5, X, Y)
    yield runs[0]


@script
def wrong_arguments(make, at):
    svi = make(model)
    yield from steps(svi, at, X, Y)
    for args in ((X,), (X, Y, Y), (X[:, :2], Y), ("x", Y)):
        try:
            svi.step(*args)
        except (TypeError, RuntimeError, AttributeError) as error:
            yield type(error).__name__
    yield from steps(svi, 3, X, Y)


@script
def copies_of_a_guide(make, at):
    automatic = AutoNormal(model)
    svi = make(model, automatic)
    yield from steps(svi, at, X, Y)
    twin = copy.deepcopy(automatic)
    again = pickle.loads(pickle.dumps(AutoDiagonalNormal(prior)))
    yield from steps(svi, 3, X, Y)
    yield automatic.median()["w"]
    for each in (twin, again):
        other = make(model, each)
        yield from steps(other, 3, X, Y)
    yield from steps(svi, 3, X, Y)


@script
def copies_of_an_engine(make, at):
    svi = make(model)
    yield from steps(svi, at, X, Y)
    twin = copy.deepcopy(svi)
    yield from steps(svi, 3, X, Y)
    yield from steps(twin, 3, X, Y)
    yield from steps(svi, 3, X, Y)


def test_an_engine_that_is_pickled():
    """Graphs are left behind."""
    pyro.clear_param_store()
    svi = compiled(model, AutoNormal(model))
    for _ in range(4):
        svi.step(X, Y)
    loaded = pickle.loads(pickle.dumps(svi))
    torch.manual_seed(1)
    before = svi.evaluate_loss(X, Y)
    torch.manual_seed(1)
    assert loaded.evaluate_loss(X, Y) == before
    pyro.clear_param_store()


@script
def steps_of_other_threads(make, at):
    svi = make(model)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(at + 4):
            yield pool.submit(svi.step, X, Y).result()
            yield svi.step(X, Y)


def test_threads_at_once():
    """Pyro's store and stack are one for all threads: the engine lets one step at a time."""

    def crowd(make):
        engines = [make(model) for _ in range(3)]
        with ThreadPoolExecutor(3) as pool:
            for _ in range(10):
                list(pool.map(lambda svi: svi.step(X, Y), engines))
        yield len(pyro.poutine.runtime._PYRO_STACK)
        yield bool(pyro.param("loc").isfinite().all())

    ours = ran(crowd, compiled)
    assert ours.error is None
    assert ours.values == [0, True]


def test_a_forked_process_steps_on():
    pyro.clear_param_store()
    svi = compiled(model)
    for _ in range(5):
        svi.step(X, Y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of threads, which this test does not use
        child = os.fork()
    if child == 0:
        os._exit(0 if all(0 < svi.step(X, Y) < 1e6 for _ in range(3)) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert svi.step(X, Y) > 0
    pyro.clear_param_store()


@script
def a_step_within_a_step(make, at):
    """A program that trains another."""

    def inner_guide(x, y):
        pyro.sample("w", dist.Normal(pyro.param("inner", torch.ones(3)), 0.1).to_event(1))

    inner = make(model, inner_guide)

    def outer(x, y):
        with poutine.block():
            loss = inner.step(x, y)
        observe(x @ prior() + loss / 100, y)

    yield from steps(make(outer), at + 4, X, Y)


@script
def baselines_in_the_store(make, at):
    """Entries of the store that the loss replaces at each step."""

    def draws(x, y):
        probs = pyro.param("probs", torch.full((8,), 0.4), constraint=constraints.unit_interval)
        infer = {"baseline": {"use_decaying_avg_baseline": True}}
        with pyro.plate("data", 8):
            pyro.sample("on", dist.Bernoulli(probs), infer=infer)

    def switched(x, y):
        with pyro.plate("data", 8):
            on = pyro.sample("on", dist.Bernoulli(0.5 * torch.ones(8)))
            pyro.sample("y", dist.Normal(on * x[:, 0], 1.0), obs=y)

    svi = make(switched, draws, loss=TraceGraph_ELBO())
    yield from steps(svi, at + 5, X, Y)
    del pyro.get_param_store()["__baseline_avg_downstream_cost_on"]
    yield from steps(svi, 3, X, Y)
