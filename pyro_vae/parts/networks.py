"""Networks: from the features of each datum to the raw outputs that a head turns into a distribution."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_vae.errors import check_widths

Activation = Literal["tanh", "relu", "elu", "gelu", "silu", "softplus"]


class Network(nn.Module, ABC):
    """A map from ``(*, in_features)`` to ``(*, out_features)``, for any number of leading dimensions.

    Args:
        in_features: features of one input, at least 1.
        out_features: raw outputs, at least 1: the sum of the ``sizes`` of the head that reads them.
        image_shape: shape ``(C, H, W)`` of one image, for networks that reshape flat observations inside.
            A run passes it; a network that has no use for it ignores it.

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

    def initialize(self, x: Tensor) -> None:
        """Of an encoder: start from training data ``x``, shape ``(N, X)``. Default: nothing."""

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
        activation: Activation = "tanh",
        image_shape: Sequence[int] | None = None,
    ):
        super().__init__(in_features, out_features, image_shape)
        check_widths("hidden", hidden)
        self.activate = _Activation(activation)
        self.layers = nn.ModuleList(nn.Linear(m, n) for m, n in pairwise([in_features, *hidden, out_features]))
        for layer in self.layers:
            nn.init.xavier_uniform_(layer.get_parameter("weight"))
            nn.init.zeros_(layer.get_parameter("bias"))

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            features = self.activate(layer(features))
        return self.layers[-1](features)

    def start_at(self, output: Tensor) -> None:
        with torch.no_grad():
            self.layers[-1].get_parameter("bias").copy_(output)


class GatedMLP(Network):
    """Layers h * sigmoid(g), both affine in the layer below: as in the VampPrior paper (Tomczak & Welling 2018).

    Args:
        in_features: features of one input.
        out_features: raw outputs.
        hidden: width of each hidden layer, each at least 1.
        image_shape: not used, observations are flat.

    Raises:
        ValueError: if a width is below 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: Sequence[int] = (300, 300),
        image_shape: Sequence[int] | None = None,
    ):
        super().__init__(in_features, out_features, image_shape)
        check_widths("hidden", hidden)
        self.layers = nn.ModuleList(nn.Linear(m, 2 * n) for m, n in pairwise([in_features, *hidden]))
        self.output = nn.Linear([in_features, *hidden][-1], out_features)
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.get_parameter("weight"))
            nn.init.zeros_(layer.get_parameter("bias"))
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers:
            features = F.glu(layer(features))
        return self.output(features)

    def start_at(self, output: Tensor) -> None:
        with torch.no_grad():
            self.output.bias.copy_(output)


class _Activation(nn.Module):
    """A function of torch.nn.functional as a module."""

    def __init__(self, activation: Activation):
        super().__init__()
        if not hasattr(F, activation):
            raise ValueError(f"activation: '{activation}' is not a function of torch.nn.functional")
        self.activation = activation

    def forward(self, features: Tensor) -> Tensor:
        return getattr(F, self.activation)(features)

    def extra_repr(self) -> str:
        return self.activation


class _Residual(nn.Module):
    """x + g(x), with two convolutions in g; the second starts at zero, so the block starts as the identity."""

    def __init__(self, channels: int, activation: Activation):
        super().__init__()
        self.activate = _Activation(activation)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.get_parameter("bias"))

    def forward(self, images: Tensor) -> Tensor:
        return images + self.second(self.activate(self.first(self.activate(images))))


def _residuals(blocks: int, channels: int, activation: Activation) -> list[_Residual]:
    if blocks < 0:
        raise ValueError(f"blocks must be at least 0, got {blocks}")
    return [_Residual(channels, activation) for _ in range(blocks)]


class ConvEncoder(Network):
    """Strided convolutions, each halving height and width, then one affine layer.

    Args:
        in_features: pixels of one image.
        out_features: raw outputs.
        channels: channels of each convolution, each at least 1.
        blocks: residual blocks after each convolution (He et al. 2016), 0 for a plain network.
        activation: the nonlinearity after each convolution.
        image_shape: shape ``(C, H, W)`` of one image.

    Raises:
        ValueError: if a number of channels is below 1, or ``image_shape`` is missing or not of ``in_features`` pixels.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        channels: Sequence[int] = (32, 64),
        blocks: int = 0,
        activation: Activation = "relu",
        image_shape: Sequence[int] | None = None,
    ):
        super().__init__(in_features, out_features, image_shape)
        check_widths("channels", channels)
        self.image_shape = _check_image(image_shape, in_features)
        *_, height, width = self.image_shape
        self.convolutions = nn.Sequential()
        for m, n in pairwise([self.image_shape[0], *channels]):
            residual = _residuals(blocks, n, activation)
            convolution = nn.Conv2d(m, n, 3, stride=2, padding=1)
            self.convolutions.append(nn.Sequential(convolution, *residual, _Activation(activation)))
            height, width = -(-height // 2), -(-width // 2)
        self.output = nn.Linear([self.image_shape[0], *channels][-1] * height * width, out_features)

    def forward(self, features: Tensor) -> Tensor:
        images = self.convolutions(features.reshape(-1, *self.image_shape))
        return self.output(images.flatten(1)).reshape(*features.shape[:-1], self.out_features)


class ConvDecoder(Network):
    """One affine layer, then transposed convolutions, each doubling height and width up to those of the image.

    Args:
        in_features: latent dimensions.
        out_features: raw outputs: a multiple of the pixels, laid out as that many images, each with a bias of its own.
        channels: channels below each transposed convolution, each at least 1.
        blocks: residual blocks before each transposed convolution (He et al. 2016), 0 for a plain network.
        activation: the nonlinearity before each transposed convolution.
        image_shape: shape ``(C, H, W)`` of one image.

    Raises:
        ValueError: if a number of channels is below 1, or ``image_shape`` is missing or its pixels do not divide
            ``out_features``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        channels: Sequence[int] = (64, 32),
        blocks: int = 0,
        activation: Activation = "relu",
        image_shape: Sequence[int] | None = None,
    ):
        super().__init__(in_features, out_features, image_shape)
        check_widths("channels", channels)
        *_, height, width = _check_image(image_shape, out_features, multiple=True)
        sizes = [(height, width)]
        for _ in channels:
            sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
        sizes.reverse()  # from coarse to fine
        planes = out_features // (height * width)
        self.start_shape = (channels[0], *sizes[0])
        self.input = nn.Linear(in_features, channels[0] * sizes[0][0] * sizes[0][1])
        self.convolutions = nn.Sequential()
        for (m, n), (h, w) in zip(pairwise([*channels, planes]), sizes[1:], strict=True):
            residual = _residuals(blocks, m, activation)
            # from n to 2 n - 1, or to 2 n with a padding of 1
            convolution = nn.ConvTranspose2d(m, n, 3, stride=2, padding=1, output_padding=(1 - h % 2, 1 - w % 2))
            self.convolutions.append(nn.Sequential(*residual, _Activation(activation), convolution))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, features: Tensor) -> Tensor:
        images = self.input(features.reshape(-1, self.in_features)).unflatten(-1, self.start_shape)
        return self.convolutions(images).reshape(*features.shape[:-1], self.out_features) + self.bias

    def start_at(self, output: Tensor) -> None:
        with torch.no_grad():
            self.bias.copy_(output)


class RecurrentEncoder(Network):
    """The rows of an image read as a sequence by a GRU; its last state, through one affine layer.

    Args:
        in_features: pixels of one image.
        out_features: raw outputs.
        hidden: width of the state, at least 1.
        image_shape: shape ``(C, H, W)`` of one image.

    Raises:
        ValueError: if ``hidden`` is below 1, or ``image_shape`` is missing or not of ``in_features`` pixels.
    """

    def __init__(
        self, in_features: int, out_features: int, hidden: int = 200, image_shape: Sequence[int] | None = None
    ):
        super().__init__(in_features, out_features, image_shape)
        check_widths("hidden", [hidden])
        self.image_shape = channels, _, width = _check_image(image_shape, in_features)
        self.rows = nn.GRU(channels * width, hidden, batch_first=True)
        self.output = nn.Linear(hidden, out_features)

    def forward(self, features: Tensor) -> Tensor:
        images = features.reshape(-1, *self.image_shape)
        _, last = self.rows(images.movedim(2, 1).flatten(2))
        return self.output(last[0]).reshape(*features.shape[:-1], self.out_features)


class RecurrentDecoder(Network):
    """A GRU that is shown z at every step and writes one row of the image after the other.

    Args:
        in_features: latent dimensions.
        out_features: raw outputs: a multiple of the pixels, laid out as that many images, each with a bias of its own.
        hidden: width of the state, at least 1.
        image_shape: shape ``(C, H, W)`` of one image.

    Raises:
        ValueError: if ``hidden`` is below 1, or ``image_shape`` is missing or does not divide ``out_features``.
    """

    def __init__(
        self, in_features: int, out_features: int, hidden: int = 200, image_shape: Sequence[int] | None = None
    ):
        super().__init__(in_features, out_features, image_shape)
        check_widths("hidden", [hidden])
        _, self.height, self.width = _check_image(image_shape, out_features, multiple=True)
        self.planes = out_features // (self.height * self.width)
        self.rows = nn.GRU(in_features, hidden, batch_first=True)
        self.output = nn.Linear(hidden, self.planes * self.width)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, features: Tensor) -> Tensor:
        shown = features.reshape(-1, 1, self.in_features).expand(-1, self.height, -1)
        states, _ = self.rows(shown)
        rows = self.output(states).unflatten(-1, (self.planes, self.width))  # (N, H, planes, W)
        return rows.movedim(1, 2).reshape(*features.shape[:-1], self.out_features) + self.bias

    def start_at(self, output: Tensor) -> None:
        with torch.no_grad():
            self.bias.copy_(output)


def _check_image(image_shape: Sequence[int] | None, features: int, multiple: bool = False) -> tuple[int, int, int]:
    if image_shape is None or len(image_shape) != 3:
        raise ValueError(f"a network of images needs image_shape (C, H, W), got {image_shape}")
    size = math.prod(image_shape)
    if (features % size if multiple else features != size) or features == 0:
        relation = "a multiple of" if multiple else "equal to"
        raise ValueError(
            f"{features} features must be {relation} the {size} pixels of image_shape {tuple(image_shape)}"
        )
    channels, height, width = image_shape
    return channels, height, width
