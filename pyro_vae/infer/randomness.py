"""The random number generators that a step may use."""

import hashlib
import pickle
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch


class Randomness:
    """The states of all random number generators that a step may use: torch's, Python's, NumPy's.

    Args:
        devices: GPUs whose generators count.
        generators: further ones, that programs hold.
        others: whether those count that are not torch's, which takes a while.
    """

    def __init__(self, devices: Iterable[torch.device] = (), generators: Iterable[Any] = (), others: bool = True):
        self._torch = [_Generator(torch.get_rng_state, torch.set_rng_state)]
        for device in devices:
            self._torch.append(
                _Generator(partial(torch.cuda.get_rng_state, device), partial(torch.cuda.set_rng_state, device=device))
            )
        self._others = []
        for each in generators:
            if isinstance(each, torch.Generator):
                self._torch.append(_Generator(each.get_state, each.set_state))
        if others:
            self._add_others(generators)

    def _add_others(self, generators: Iterable[Any]) -> None:
        self._others = [
            _Generator(random.getstate, random.setstate),
            _Generator(partial(np.random.get_state, legacy=False), np.random.set_state),
        ]
        for each in generators:
            if isinstance(each, random.Random):
                self._others.append(_Generator(each.getstate, each.setstate))
            elif isinstance(each, np.random.RandomState):
                self._others.append(_Generator(partial(each.get_state, legacy=False), each.set_state))
            elif not isinstance(each, torch.Generator):
                bits = each.bit_generator
                self._others.append(_Generator(partial(getattr, bits, "state"), partial(setattr, bits, "state")))

    def restore(self) -> None:
        """Put all of them back."""
        for each in (*self._torch, *self._others):
            each.write(each.state)

    def is_drawn_elsewhere(self) -> bool:
        """Whether random numbers have been drawn since that are not torch's."""
        return any(pickle.dumps(each.read()) != pickle.dumps(each.state) for each in self._others)


class _Generator:
    """One generator of random numbers, with the state that it had."""

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], object]):
        self.read, self.write, self.state = read, write, read()


@contextmanager
def own_numbers(key: str, device: torch.device) -> Iterator[None]:
    """Context: torch's random numbers, on the CPU and on ``device``, are those of a key; afterwards they go on as if
    nothing had been drawn."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        for each in devices:
            index = torch.cuda.current_device() if each.index is None else each.index
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


def without_effect(batch_size: int | None) -> None:
    """Tell who gives a function a batch size that its numbers, and so its work, do not depend on it any more."""
    if batch_size is not None:
        told = "batch_size has no effect any more: blocks of data are of one size, so that numbers do not depend on it"
        warnings.warn(told, DeprecationWarning, stacklevel=3)
