"""Models of strangers take no more memory and time to be made than their weights do."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_vae.errors import RunError

SPARE, TIMES = 2**24, 64
"""Numbers that a model may take beside its weights, and how many times as many as these."""
SPARE_TENSORS, TIMES_TENSORS = 10_000, 100
"""The same of tensors."""


class _Bounded(TorchDispatchMode):
    """Adds up what is made, before it is made."""

    def __init__(self, numbers: int, tensors: int, refusal: str):
        super().__init__()
        self._numbers, self._tensors, self._refusal = numbers, tensors, refusal

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        self._tensors -= 1
        self._numbers -= _size(func, args)
        if min(self._numbers, self._tensors) < 0:
            raise RunError(self._refusal)
        return func(*args, **(kwargs or {}))


def _size(func: Any, args: Sequence[Any]) -> int:
    """How many numbers an operation makes, at most: of a shape or a count given, or of tensors that broadcast."""
    first = args[0] if args else None
    if isinstance(first, list | tuple) and all(isinstance(each, int) for each in first):
        return prod(first)
    if isinstance(first, int):  # eye(n), arange(n)
        return first**2 if "eye" in str(func) else first
    shapes = [each.shape for each in args if isinstance(each, Tensor)]
    try:
        return prod(torch.broadcast_shapes(*shapes)) if shapes else 0
    except RuntimeError:  # of a matrix product, say
        return max(map(prod, shapes))


@contextmanager
def bounded_by(weights: Mapping[str, Tensor], directory: Path) -> Iterator[None]:
    """Context: what is made inside is the model of these weights, or is refused before it takes memory.

    Raises:
        RunError: if it takes much more.
    """
    numbers = SPARE + TIMES * sum(each.numel() for each in weights.values())
    refusal = (
        f"{directory / 'config.yaml'}: a model of these settings is far larger than {directory / 'model.safetensors'}"
    )
    with _Bounded(numbers, SPARE_TENSORS + TIMES_TENSORS * len(weights), refusal):
        yield
