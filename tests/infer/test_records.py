"""Records of steps, on a CPU: a CUDA graph's stand-in keeps operations and their memory, and runs them again."""

import contextlib

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_vae.infer import CompiledSVI, PyroSVI
from pyro_vae.infer.graphs import Input, Record
from pyro_vae.infer.tracing import put_back, written


class Recorded(TorchDispatchMode):
    """Like ``torch.cuda.CUDAGraph``: what is recorded does not happen, and each replay does it on the same memory."""

    replays = 0

    def __init__(self):
        super().__init__()
        self.operations, self.before, self.made = [], [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.before += [(x, x.clone()) for x in written(func, args, kwargs) if id(x) not in self.made]
        result = func(*args, **kwargs)
        self.made |= {id(x) for x in tree_leaves(result) if not any(x is y for y, _ in self.before)}
        self.operations.append((func, args, kwargs, result))
        return result

    @torch.no_grad()
    def replay(self):
        Recorded.replays += 1
        for func, args, kwargs, result in self.operations:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextlib.contextmanager
def recording(record, **_):
    noise = torch.get_rng_state()
    try:
        with record:
            yield
    finally:
        torch.set_rng_state(noise)
        put_back(reversed(record.before))


@pytest.fixture
def records(monkeypatch):
    """Steps are recorded as on a GPU; gives the class that counts replays."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(Recorded, "replays", 0)

    def recorder(svi, graph, call):
        return Record(graph, lambda result: svi._apply(graph, result), svi._steps.is_recordable)

    monkeypatch.setattr(CompiledSVI, "_recorder", recorder)
    return Recorded


class Changes:
    """What a user does between two steps, given the optimizer, and once more at the next."""

    @staticmethod
    def nothing(optim):
        pass

    @staticmethod
    def rate(optim):
        optim.param_groups[0]["lr"] *= 0.5

    @staticmethod
    def momenta(optim):
        optim.param_groups[0]["betas"] = (0.5, optim.param_groups[0]["betas"][1])

    @staticmethod
    def loaded_twice(optim):
        optim.load_state_dict(optim.state_dict())
        optim.load_state_dict(optim.state_dict())

    @staticmethod
    def begun_anew(optim):
        optim.state.clear()

    @staticmethod
    def one_state(optim):
        state = next(iter(optim.state.values()))
        state["exp_avg"] = state["exp_avg"] + 1.0

    @staticmethod
    def parameters(optim):
        for p in optim.param_groups[0]["params"]:
            p.data = p.data + 0.5

    @staticmethod
    def gradients(optim):
        for p in optim.param_groups[0]["params"]:
            p.grad = torch.full_like(p, 3.0)

    @staticmethod
    def hooks_on_steps(optim):
        def turn(optim, *_):
            for p in optim.param_groups[0]["params"]:
                p.grad.neg_()

        optim.register_step_pre_hook(turn)

    @staticmethod
    def another_step(optim):
        step = optim.step
        optim.step = lambda: [step(), step()]


def trained(engine, change, changed=(14, 22)):
    """Losses and parameters of 28 steps; data change at each, the optimizer at some."""
    torch.manual_seed(0)
    layer = nn.Linear(5, 2).double()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(layer(x) + 0.1 * z, 1.0).to_event(1), obs=x[:, :2])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    optim = torch.optim.Adam(layer.parameters(), lr=0.1, fused=True)
    optim.param_groups[0]["capturable"] = True  # which torch refuses to make on a CPU
    svi = engine(model, guide, optim, **({"compiler": "none"} if engine is CompiledSVI else {}))
    losses = []
    for step in range(28):
        if step in changed:
            change(optim)
        losses.append(svi.step(torch.randn(20, 5, dtype=torch.float64)))
    return torch.tensor([float(loss) for loss in losses]), [p.detach() for p in layer.parameters()]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "change",
    [f for name, f in vars(Changes).items() if isinstance(f, staticmethod) and name != "nothing"],
    ids=lambda f: f.__name__,
)
def test_a_replayed_step_sees_what_changed(records, change):
    found = trained(CompiledSVI, change)
    assert records.replays > 4
    torch.testing.assert_close(found, trained(PyroSVI, change), rtol=1e-6, atol=1e-9)


def every_step(optim):
    optim.param_groups[0]["lr"] *= 0.99


def test_a_rate_that_changes_at_every_step_is_not_recorded(records):
    made, calls = Record._make, []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Record, "_make", lambda *args: calls.append(1) or made(*args))
        trained(CompiledSVI, every_step, changed=range(28))
    assert not calls


INPUTS = {
    "dense": lambda: torch.randn(4, 6),
    "turned": lambda: torch.randn(6, 4).mT,
    "columns": lambda: torch.randn(4, 18)[:, ::3],
    "a slice": lambda: torch.randn(9, 6)[3:7],
    "one row": lambda: torch.randn(1, 6).expand(4, 6),
    "one number": lambda: torch.randn(()).expand(4, 6),
    "empty": lambda: torch.randn(0, 6),
    "a number": lambda: torch.randn(()),
    "a row of a column": lambda: torch.randn(6, 6)[:1, 2:3],
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_of_a_record_keep_their_strides(name):
    torch.manual_seed(0)
    x, y = INPUTS[name](), INPUTS[name]()
    held = Input(x)
    assert held.tensor.stride() == x.stride()
    assert held.is_small(x)
    assert held.tensor.equal(x)
    assert held.tensor.data_ptr() != x.data_ptr() or not x.numel()
    held.take(y)
    assert held.tensor.equal(y)


class Refusing(Recorded):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._fused_adam_.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_a_step_that_cannot_be_recorded_leaves_no_gradients(records, monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Refusing)
    with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph"):
        found = trained(CompiledSVI, Changes.nothing)
    assert records.replays == 0
    torch.testing.assert_close(found, trained(PyroSVI, Changes.nothing), rtol=1e-6, atol=1e-9)
