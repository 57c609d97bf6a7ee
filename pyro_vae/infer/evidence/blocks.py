"""Estimates by fixed blocks of data, each with random numbers of its own, whoever computes it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from pyro_vae.infer.randomness import own_numbers
from pyro_vae.infer.trees import Data, data_size, first_tensor

BLOCK, OF_GPU = 256, 8
"""Observations of a block: few enough to be shared among workers, enough to fill a chunk; and on a GPU, so many times
as many, since its time goes by the number of chunks."""

Part = dict[str, Tensor]
"""What is computed at a time: tensors by name."""


class Work(Protocol):
    """Who computes the parts of an estimate, and what is kept of them."""

    def __call__(self, stage: str, do: Callable[[int], Part], number: int) -> Iterator[Part]:
        """``do(0)``, .., ``do(number - 1)``, in this order, each computed once, by whoever is at work.

        All who share a work call it for the same stages, in the same order, with functions that compute the same.

        Args:
            stage: its name, of letters, digits and dashes, once in an estimate.
            do: computes a part; it depends on nothing but its number.
            number: of parts.
        """
        ...


def here(stage: str, do: Callable[[int], Part], number: int) -> Iterator[Part]:
    """The :class:`Work` of one process alone, which keeps nothing."""
    return map(do, range(number))


def named(prefix: str, work: Work | None) -> Work:
    """The same work, for one of several estimates that are computed one after the other."""
    return lambda stage, do, number: (work or here)(f"{prefix}-{stage}", do, number)


class Blocks:
    """Parts of one estimate, with random numbers that depend on nothing but a seed, the stage, and the part's number.

    Neither chunks nor memory, nor how many work on it, nor what was drawn before changes them.

    Args:
        data: of the estimate, or any tensor on its device.
        work: who computes the parts; None: this process.

    The seed is one number of torch's generator, all that an estimate takes from it.

    Attributes:
        size: data of a block.
    """

    def __init__(self, data: Data, work: Work | None = None):
        if not isinstance(data, Tensor):
            data_size(data)  # refuses what is none
        self._work: Work = work or here
        self._device = first_tensor(data).device
        self.size = block_size(first_tensor(data))
        self._seed = int(torch.randint(2**62, (), device="cpu"))

    def apart(self, stage: str) -> AbstractContextManager[None]:
        """Context: random numbers are those of a stage that everybody computes alike."""
        return own_numbers(f"{self._seed}/{stage}", self._device)

    def each(self, stage: str, do: Callable[[int], Part], number: int) -> Iterator[Part]:
        """The results of ``do(i)`` for all i below ``number``, in this order, each with its own random numbers."""

        def keyed(i: int) -> Part:
            with self.apart(f"{stage}/{i}"):
                return do(i)

        return self._work(stage, keyed, number)

    def once(self, stage: str, do: Callable[[], Part]) -> Part:
        """The result of ``do()``, with its own random numbers."""
        (result,) = self.each(stage, lambda _: do(), 1)
        return result

    def of(self, stage: str, num_data: int, do: Callable[[slice], Part], size: int | None = None) -> Iterator[Part]:
        """The results of ``do`` of each block of ``size`` data, whose places it is given, one after the other."""
        size = size or self.size
        return self.each(stage, lambda i: do(slice(i * size, min((i + 1) * size, num_data))), -(-num_data // size))


def block_size(like: Tensor, number: int | None = None) -> int:
    """``number`` observations, by default those of a block, or as many more as a GPU takes."""
    return (BLOCK if number is None else number) * (OF_GPU if like.is_cuda else 1)


def joined(parts: Iterable[Part]) -> Part:
    """The tensors of all parts, one after the other."""
    parts = list(parts)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def power_of_two(number: int) -> int:
    """The largest power of two that is at most ``number``, at least 1, so that chunks fill a block."""
    return 1 << (max(1, number).bit_length() - 1)
