"""What a task of the benchmark is."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_vae.infer.programs import Program
from pyro_vae.infer.trees import Data, data_size


@dataclass(frozen=True)
class Task:
    """A program whose log p(x) is known.

    Args:
        name: short, of letters, digits and underscores.
        model, guide, data: as :func:`pyro_vae.traces` takes them. A program whose latent variables are those of a
            whole data set has that as its one datum.
        reference: log p(x) of each datum, nats, shape ``(B,)``.
        error: how far the reference may be off, nats, shape ``(B,)``: certified, not a standard error.
        source: where the reference comes from.

    Raises:
        ValueError: if the shapes do not agree, or if reference or error are not finite.
    """

    name: str
    model: Program
    guide: Program
    data: Data
    reference: Tensor
    error: Tensor
    source: str

    def __post_init__(self):
        shape = (data_size(self.data),)
        for name, value in (("reference", self.reference), ("error", self.error)):
            if value.shape != shape or not value.isfinite().all():
                raise ValueError(f"task {self.name}: {name} must be {shape[0]} finite numbers, got {value}")


def draws(seed: int) -> np.random.RandomState:
    """Random numbers whose stream numpy promises never to change, so that the tasks stay what they are."""
    return np.random.RandomState(seed)


def double(values) -> Tensor:
    """Numbers as a tensor in float64."""
    return torch.as_tensor(np.asarray(values, dtype=np.float64))
