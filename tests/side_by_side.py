"""A training script run by ``pyro.infer.SVI`` and by ``CompiledSVI``, from one seed, and what each of them gave."""

import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor

from pyro_vae.errors import ContractError
from pyro_vae.infer import CompiledSVI

Make = Callable[..., Any]
"""``make(model, guide, optim, loss)`` gives an engine; what is left out is :func:`guide`, Adam and ``Trace_ELBO``."""

X = torch.arange(24.0, dtype=torch.float64).reshape(8, 3) / 10
Y = X[:, 0].clone()


def prior(*args: object) -> Tensor:
    return pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def observe(mean: Tensor, y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def guide(*args: object, **kwargs: object) -> None:
    loc = pyro.param("loc", torch.ones(3))
    pyro.sample("w", dist.Normal(loc, 0.1).to_event(1))


def steps(svi: Any, number: int, *args: object, **kwargs: object) -> Iterator[Any]:
    return (svi.step(*args, **kwargs) for _ in range(number))


class Scripts(dict[str, Callable[..., Iterator[Any]]]):
    """The scripts of a module by name, which are added by decorating them."""

    def __call__(self, function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        self[function.__name__] = function
        return function


class Ran(NamedTuple):
    values: list[Any]
    error: BaseException | None
    told: list[str]
    store: dict[str, Tensor]
    drawn: Tensor


def ran(script: Callable[..., Iterator[Any]], make: Make, *args: object) -> Ran:
    """All that a script gives, a number at a time, until it ends or raises."""
    pyro.clear_param_store()
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(0)
    values, error = [], None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for value in script(make, *args):
                values.append(value.detach().clone() if isinstance(value, Tensor) else value)
        except Exception as raised:
            error = raised
    store = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    pyro.clear_param_store()
    return Ran(values, error, [str(each.message) for each in caught], store, torch.rand(2, dtype=torch.float64))


def by_pyro(model: Any, guide: Any = guide, optim: Any = None, loss: Any = None) -> SVI:
    return SVI(model, guide, optim or pyro.optim.Adam({"lr": 0.05}), loss or Trace_ELBO())


def compiled(
    model: Any, guide: Any = guide, optim: Any = None, loss: Any = None, compiler: Any = "none"
) -> CompiledSVI:
    return CompiledSVI(model, guide, optim or pyro.optim.Adam({"lr": 0.05}), loss or Trace_ELBO(), compiler=compiler)


def both(script: Callable[..., Iterator[Any]], *args: object) -> tuple[Ran, Ran]:
    """A script by Pyro, and by CompiledSVI."""
    return ran(script, by_pyro, *args), ran(script, compiled, *args)


def check_same(theirs: Ran, ours: Ran) -> None:
    """The values are equal one by one, errors come at the same value, and store and generator end the same."""
    if theirs.error is None:
        assert ours.error is None, f"after {len(ours.values)} values: {ours.error!r}"
    for i, (a, b) in enumerate(zip(ours.values, theirs.values, strict=False)):
        assert type(a) is type(b), i
        if isinstance(b, float | Tensor):
            a, b = (torch.as_tensor(v).double() for v in (a, b))
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, equal_nan=True, msg=lambda m, i=i: f"value {i}: {m}")
        else:
            assert a == b, i
    assert len(ours.values) == len(theirs.values), ours.error
    if theirs.error is not None:
        assert isinstance(ours.error, type(theirs.error) | ContractError), f"{ours.error!r} for {theirs.error!r}"
    assert list(ours.store) == list(theirs.store)
    for name, value in theirs.store.items():
        torch.testing.assert_close(ours.store[name], value, rtol=1e-6, atol=1e-9, equal_nan=True, msg=name)
    assert torch.equal(ours.drawn, theirs.drawn), "other random numbers were drawn"
