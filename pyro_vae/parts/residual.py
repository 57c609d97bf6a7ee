"""Networks of blocks that add to what passes through them: the ways up and down of a deep hierarchy."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pyro_vae.errors import check_at_least_one
from pyro_vae.parts.networks import Activation, Network, _Activation, _Grid, scale


class Residual(Network):
    """h + g(h), block after block, with two affine layers in each g (He et al. 2016).

    What passes is brought to the outputs' width first: it is left alone where the widths agree; else an affine map
    starts as the identity of the first features, as many as both sides have, and at random for the others. So a state
    of a hierarchy, which comes first, passes a level that has learned nothing yet, and z is added to it.

    Args:
        in_features: features of one input.
        out_features: raw outputs, the width of what passes.
        blocks: at least 1.
        hidden: width inside a block, at least 1; null: that of the outputs.
        depth: blocks, or levels, that follow each other in the whole model; what is added to the state starts
            1 / sqrt(depth) as large, so that many of them add up to no more than one (Child 2021, and its code).
        activation: before each affine layer.
        image_shape: not used, observations are flat.

    Raises:
        ValueError: if a number is below 1.

    >>> Residual(8 + 3, 8)(torch.zeros(7, 2, 11)).shape
    torch.Size([7, 2, 8])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        blocks: int = 1,
        hidden: int | None = None,
        depth: int = 1,
        activation: Activation = "silu",
        image_shape: Sequence[int] | None = None,
    ):
        super().__init__(in_features, out_features, image_shape)
        hidden = out_features if hidden is None else hidden
        check_at_least_one(blocks=blocks, hidden=hidden, depth=depth)
        self.passes = (
            nn.Identity() if in_features == out_features else _passing(nn.Linear(in_features, out_features), depth)
        )
        self.blocks = nn.Sequential(
            *(
                _Block(nn.Linear(out_features, hidden), nn.Linear(hidden, out_features), activation, depth)
                for _ in range(blocks)
            )
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.blocks(self.passes(features))

    def shrink(self, factor: float) -> None:
        _shrink(self.passes, self.blocks, factor)


class ConvResidual(Network):
    """The same of images: convolutions of 3 x 3 in the blocks, of 1 x 1 where channels differ.

    Features are maps ``(C, H, W)``, laid out flat, one channel after the other: so a state and latent variables of the
    same height and width, one after the other, are the channels of one image.

    Args:
        in_features: C H W of the input; a multiple of H W.
        out_features: C H W of the output; a multiple of H W.
        blocks: at least 1.
        hidden: channels inside a block, at least 1; null: those of the outputs.
        depth: see :class:`Residual`.
        activation: before each convolution.
        image_shape: ``(C, H, W)``, of which only H and W count, or ``(T, F)`` of sequences, of which T does.

    Raises:
        ValueError: if a number is below 1, or features are no multiple of the places.

    >>> ConvResidual(6 * 49, 4 * 49, image_shape=(1, 7, 7))(torch.zeros(5, 294)).shape
    torch.Size([5, 196])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        blocks: int = 1,
        hidden: int | None = None,
        depth: int = 1,
        activation: Activation = "silu",
        image_shape: Sequence[int] | None = None,
    ):
        super().__init__(in_features, out_features, image_shape)
        places = (image_shape[0], 1) if image_shape and len(image_shape) == 2 else (1, *(image_shape or ())[1:])
        self.read, self.made = (_Grid(image_shape and places, size) for size in (in_features, out_features))
        m, n = self.read.channels, self.made.channels
        hidden = n if hidden is None else hidden
        check_at_least_one(blocks=blocks, hidden=hidden, depth=depth)
        convolution = (nn.Conv1d, nn.Conv2d)[len(self.read.sides) - 1]
        self.passes = nn.Identity() if m == n else _passing(convolution(m, n, 1), depth)
        self.blocks = nn.Sequential(
            *(
                _Block(convolution(n, hidden, 3, padding=1), convolution(hidden, n, 3, padding=1), activation, depth)
                for _ in range(blocks)
            )
        )

    def forward(self, features: Tensor) -> Tensor:
        made = self.made.flatten(self.blocks(self.passes(self.read.spread(features))))
        return made.reshape(*features.shape[:-1], self.out_features)

    def shrink(self, factor: float) -> None:
        _shrink(self.passes, self.blocks, factor)


Layer = nn.Linear | nn.Conv1d | nn.Conv2d


class _Block(nn.Module):
    """h + second(first(h)), with the activation before each; ``second`` starts 1 / sqrt(depth) as large."""

    def __init__(self, first: Layer, second: Layer, activation: Activation, depth: int):
        super().__init__()
        self.activate, self.first, self.second = _Activation(activation), first, second
        for layer in (first, second):
            _glorot(layer)
        with torch.no_grad():
            second.weight.mul_(1 / math.sqrt(depth))

    def forward(self, features: Tensor) -> Tensor:
        return features + self.second(self.activate(self.first(self.activate(features))))


def _shrink(passes: nn.Module, blocks: nn.Sequential, factor: float) -> None:
    """What passes and what is added, smaller; where widths agree, all of the input passes still."""
    scale([passes, *(cast(_Block, block).second for block in blocks)], factor)


def _glorot(layer: Layer) -> None:
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _passing(layer: Layer, depth: int) -> Layer:
    """A map from m to n features that starts as the identity of the first ones."""
    _glorot(layer)
    with torch.no_grad():
        n, m = layer.weight.shape[:2]
        same = min(n, m)
        layer.weight[:same] = 0
        layer.weight[:same, :same].copy_(torch.eye(same).view(same, same, *[1] * (layer.weight.dim() - 2)))
        if m > n:  # what comes after the state is added to it
            nn.init.xavier_uniform_(layer.weight[:, n:]).mul_(1 / math.sqrt(depth))
    return layer
