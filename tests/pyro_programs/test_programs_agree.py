"""CompiledSVI against ``pyro.infer.SVI``, program by program: same seed, same losses, same store, same optimizer."""

import random
import re
import warnings
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.poutine.runtime
import pytest
import torch
from pyro.infer import SVI, Predictive
from torch import Tensor

from pyro_programs import Program, discrete, losses, networks, regression, scripts
from pyro_vae.infer import CompiledSVI

NUM_STEPS = 20
ALL = {make.__name__: make for module in (regression, networks, discrete, losses, scripts) for make in module.PROGRAMS}

WITH_INDUCTOR = list(ALL)[::9]  # which takes seconds for each
LONG = (
    *discrete.PROGRAMS[2:],
    losses.attend_and_count,
    losses.decaying_average_baseline,
    losses.importance_weighted,
    networks.flow_likelihood,
    networks.flow_guide,
    regression.learned_centering,
)


class Outcome(NamedTuple):
    losses: list[Any]
    after: dict[str, Any]
    """What is asked for after training."""
    store: dict[str, Tensor]
    optim: dict[str, Any]
    told: list[str]
    messages: list[int]
    """How many statements of Pyro each step ran."""
    drawn: Tensor


@pytest.fixture(autouse=True)
def usual_type(request):
    """Programs draw in the default type: double, so that 1e-6 tells a different formula from rounding."""
    name = request.node.callspec.params["name"]
    torch.set_default_dtype(torch.float32 if name.endswith("float32") else torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    pyro.clear_param_store()


@pytest.fixture
def statements(monkeypatch):
    """A counter of the statements that Pyro's handlers processed: none while a graph runs."""
    counts = [0]
    process = pyro.poutine.runtime.default_process_message

    def counted(msg):
        counts[0] += 1
        return process(msg)

    monkeypatch.setattr(pyro.poutine.runtime, "default_process_message", counted)
    return counts


def trained(name: str, engine: Any, statements: list[int], **settings: object) -> Outcome:
    pyro.clear_param_store()
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program: Program = ALL[name]()
        optim = program.optim()
        loss = program.plain if program.plain is not None and engine is SVI else program.loss
        svi = engine(program.model, program.guide, optim, loss(), **settings)
        losses, messages = [], []
        for step, (args, kwargs) in enumerate(program.steps(NUM_STEPS)):
            if program.before is not None:
                program.before(step)
            before = statements[0]
            losses.append(svi.step(*args, **kwargs))
            messages.append(statements[0] - before)
            if program.epoch is not None and (step + 1) % program.epoch == 0:
                optim.step()
        told = [str(each.message) for each in caught]
        if program.before is not None:
            program.before(NUM_STEPS)
        args, kwargs = program.calls[0]
        after = {}
        with suppress(NotImplementedError):  # the loss has a gradient alone
            after["loss"] = svi.evaluate_loss(*args, **kwargs)
        if program.predict:
            after |= Predictive(program.model, guide=program.guide, num_samples=3)(*args, **kwargs)
    store = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    return Outcome(losses, after, store, dict(sorted(optim.get_state().items())), told, messages, torch.rand(3))


def close(ours: Any, theirs: Any, tolerance: float, where: str) -> None:
    """Compare numbers in dictionaries and sequences of any depth."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs), where
        for key in theirs:
            close(ours[key], theirs[key], tolerance, f"{where}.{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            close(*pair, tolerance, f"{where}[{i}]")
    elif isinstance(theirs, Tensor | float | int) and not isinstance(theirs, bool):
        ours, theirs = torch.as_tensor(ours).detach().double(), torch.as_tensor(theirs).detach().double()
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda m: f"{where}: {m}")
    else:
        assert callable(theirs) or ours == theirs, where


def check(name: str, statements: list[int], **settings: object) -> None:
    # Rounding of single precision, over 20 steps that amplify it.
    tolerance = 1e-3 if name.endswith("float32") else 1e-6
    theirs = trained(name, SVI, statements)
    ours = trained(name, CompiledSVI, statements, **settings)
    assert all(type(a) is type(b) for a, b in zip(ours.losses, theirs.losses, strict=True))
    for field in ("losses", "store", "after", "optim", "drawn"):
        close(getattr(ours, field), getattr(theirs, field), tolerance, field)

    program = ALL[name]()
    told = [message for message in ours.told if message not in theirs.told]
    quiet = sum(not count for count in ours.messages)
    if program.compiled:
        assert quiet >= (3 if len(program.calls) > 2 else 7), f"Pyro's statements per step: {ours.messages}; {told}"
        assert not told or program.told is not None, told
    else:
        assert not quiet, ours.messages
        assert len(told) == 1, told
    for message in told:
        assert program.told is None or re.search(program.told, message), message


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if make in LONG else name for name, make in ALL.items()]
)
def test_as_pyro_does(name, statements):
    check(name, statements, compiler="none")


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("name", WITH_INDUCTOR)
def test_compiled_by_inductor(name, statements):
    check(name, statements, compiler="inductor")
