"""Networks: from the features of each datum to the raw outputs that a head turns into a distribution."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn


class ContractError(ValueError):
    """A part, a program or an observation is not what it promises to be."""


class Network(nn.Module, ABC):
    """A map from ``(*, in_features)`` to ``(*, out_features)``, for any number of leading dimensions.

    Args:
        in_features: features of one input, at least 1.
        out_features: raw outputs, at least 1: the sum of the ``sizes`` of the head that reads them.
        image_shape: shape ``(C, H, W)`` of one image, for networks that reshape flat observations inside.
            The experiments pass it; a network that has no use for it ignores it.

    Raises:
        ValueError: if a number of features is below 1.
    """

    def __init__(self, in_features: int, out_features: int, image_shape: Sequence[int] | None = None):
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(f"a network needs at least one feature on each side, got {in_features} -> {out_features}")
        self.in_features = in_features
        self.out_features = out_features

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Map ``(*, in_features)`` to ``(*, out_features)``."""

    def start_at(self, output: Tensor) -> None:
        """Make the untrained network's output lie around ``output``, shape ``(out_features,)``. Default: nothing."""


class MLP(Network):
    """Fully connected layers with Glorot-uniform weights and zero biases.

    With its defaults this is the one-layer network of the IWAE paper (Burda, Grosse & Salakhutdinov 2016,
    arXiv 1509.00519, appendix C): 784-200-200 to the latent parameters, and the mirror image for the decoder.

    Args:
        in_features: features of one input.
        out_features: raw outputs.
        hidden: width of each hidden layer, each at least 1; an empty list makes the map affine.
        activation: the nonlinearity between layers.
        image_shape: not used, observations are flat.

    Raises:
        ValueError: if a width is below 1.

    >>> MLP(784, 100)(torch.zeros(7, 3, 784)).shape
    torch.Size([7, 3, 100])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: Sequence[int] = (200, 200),
        activation: Literal["tanh", "relu", "elu", "gelu", "silu", "softplus"] = "tanh",
        image_shape: Sequence[int] | None = None,
    ):
        super().__init__(in_features, out_features, image_shape)
        if any(width < 1 for width in hidden):
            raise ValueError(f"hidden: every width must be at least 1, got {list(hidden)}")
        if not hasattr(nn.functional, activation):
            raise ValueError(f"activation: '{activation}' is not a function of torch.nn.functional")
        self.activation = activation
        self.layers = nn.ModuleList(nn.Linear(m, n) for m, n in pairwise([in_features, *hidden, out_features]))
        for layer in self.layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        activate = getattr(nn.functional, self.activation)
        for layer in self.layers[:-1]:
            features = activate(layer(features))
        return self.layers[-1](features)

    def start_at(self, output: Tensor) -> None:
        with torch.no_grad():
            self.layers[-1].bias.copy_(output)
