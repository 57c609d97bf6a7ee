"""Networks: from the features of each datum to the raw outputs that a head turns into a distribution."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_vae.errors import ContractError, check_at_least_one, check_widths

Activation = Literal["tanh", "relu", "elu", "gelu", "silu", "softplus"]


class Network(nn.Module, ABC):
    """A map from ``(*, in_features)`` to ``(*, out_features)``, for any number of leading dimensions.

    Args:
        in_features: features of one input, at least 1.
        out_features: raw outputs, at least 1: the sum of the ``sizes`` of the head that reads them.
        image_shape: shape ``(C, H, W)`` of one image, or ``(T, F)`` of one sequence, for networks that reshape flat
            observations inside. A run passes it; a network that has no use for it ignores it.

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

    def shrink(self, factor: float) -> None:
        """Make the untrained network's outputs ``factor`` as large: by default its last affine layer."""
        scale([module for module in self.modules() if isinstance(module, nn.Linear)][-1:], factor)


def scale(layers: Iterable[nn.Module], factor: float) -> None:
    """Scale the parameters of layers."""
    with torch.no_grad():
        for p in (p for layer in layers for p in layer.parameters()):
            p.mul_(factor)


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
        weight = self.layers[0].get_parameter("weight")
        if features.dtype != weight.dtype and not torch.is_autocast_enabled(features.device.type):
            raise ContractError(
                f"weights are {weight.dtype} and what they are applied to is {features.dtype}: bring the data to "
                f"{weight.dtype}, or the model to that of the data, as by .float() or .double()"
            )
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


class Told(Network):
    """A network of images, or any other, that is told a condition c beside its features x: it reads x + A c.

    A has a plane for each number of c, learned, and zero at first. A network of any number of features, such as the
    MLP, is better made with C more of them.

    Args:
        network: reads x alone.
        condition_dim: C, numbers of one condition, at least 1.

    Raises:
        ValueError: if ``condition_dim`` is below 1.

    >>> Told(ConvEncoder(64, 4, image_shape=(1, 8, 8)), 10)(torch.zeros(3, 64 + 10)).shape
    torch.Size([3, 4])
    """

    def __init__(self, network: Network, condition_dim: int):
        check_at_least_one(condition_dim=condition_dim)
        super().__init__(network.in_features + condition_dim, network.out_features)
        self.planes = nn.Linear(condition_dim, network.in_features, bias=False)
        nn.init.zeros_(self.planes.weight)
        self.network = network

    def forward(self, features: Tensor) -> Tensor:
        x, c = features.split([self.network.in_features, self.in_features - self.network.in_features], -1)
        return self.network(x + self.planes(c))

    def initialize(self, x: Tensor) -> None:
        self.network.initialize(x)

    def start_at(self, output: Tensor) -> None:
        self.network.start_at(output)

    def shrink(self, factor: float) -> None:
        self.network.shrink(factor)


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

    def __init__(self, channels: int, activation: Activation, convolution: type[nn.Conv1d | nn.Conv2d]):
        super().__init__()
        self.activate = _Activation(activation)
        self.first = convolution(channels, channels, 3, padding=1)
        self.second = convolution(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.get_parameter("bias"))

    def forward(self, images: Tensor) -> Tensor:
        return images + self.second(self.activate(self.first(self.activate(images))))


def _residuals(blocks: int, channels: int, activation: Activation, dims: int) -> list[_Residual]:
    if blocks < 0:
        raise ValueError(f"blocks must be at least 0, got {blocks}")
    return [_Residual(channels, activation, (nn.Conv1d, nn.Conv2d)[dims - 1]) for _ in range(blocks)]


class _Grid:
    """Where the entries of flat observations lie: images ``(C, H, W)``, or sequences ``(T, F)``, F channels over time.

    Several of them may stand one after the other, such as an observation and the mask of what was seen of it: each
    has channels of its own.
    """

    def __init__(self, shape: Sequence[int] | None, features: int):
        if shape is None or len(shape) not in (2, 3):
            raise ValueError(
                f"this network needs image_shape, (C, H, W) of an image or (T, F) of a sequence, got {shape}"
            )
        size = math.prod(shape)
        if features % size or features == 0:
            raise ValueError(
                f"{features} features must be a multiple of the {size} entries of image_shape {tuple(shape)}"
            )
        self.shape = (features // size, *shape)
        self.is_sequence = len(shape) == 2
        self.sides: tuple[int, ...] = self.shape[1:2] if self.is_sequence else self.shape[2:]
        self.channels = features // math.prod(self.sides)

    def spread(self, flat: Tensor) -> Tensor:
        """``(*, features)`` as ``(N, channels, *sides)``."""
        if self.is_sequence:
            return flat.reshape(-1, *self.shape).mT.flatten(1, 2)
        return flat.reshape(-1, self.channels, *self.sides)

    def flatten(self, spread: Tensor) -> Tensor:
        """``(N, channels, *sides)`` as ``(N, features)``."""
        return (spread.unflatten(1, (self.shape[0], -1)).mT if self.is_sequence else spread).flatten(1)

    def rows(self, flat: Tensor) -> Tensor:
        """``(*, features)`` as ``(N, T, features / T)``: the rows of images, or steps of sequences."""
        height, width = self.shape[-2:]
        return flat.reshape(-1, flat.shape[-1] // (height * width), height, width).movedim(2, 1).flatten(2)

    def from_rows(self, rows: Tensor) -> Tensor:
        """``(N, T, features / T)`` as ``(N, features)``."""
        return rows.unflatten(-1, (-1, self.shape[-1])).movedim(1, 2).flatten(1)


class ConvEncoder(Network):
    """Strided convolutions, each halving height and width, or the length of a sequence, then one affine layer.

    Args:
        in_features: entries of one image or sequence, or of several, one after the other: its mask is such a second.
        out_features: raw outputs.
        channels: channels of each convolution, each at least 1.
        blocks: residual blocks after each convolution (He et al. 2016), 0 for a plain network.
        activation: the nonlinearity after each convolution.
        image_shape: shape ``(C, H, W)`` of one image, or ``(T, F)`` of one sequence.

    Raises:
        ValueError: if a number of channels is below 1, or ``image_shape`` is missing or does not divide
            ``in_features``.

    >>> ConvEncoder(2 * 24 * 3, 8, image_shape=(24, 3))(torch.zeros(7, 144)).shape
    torch.Size([7, 8])
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
        self.grid = _Grid(image_shape, in_features)
        sides = self.grid.sides
        self.convolutions = nn.Sequential()
        for m, n in pairwise([self.grid.channels, *channels]):
            residual = _residuals(blocks, n, activation, len(sides))
            convolution = (nn.Conv1d, nn.Conv2d)[len(sides) - 1](m, n, 3, stride=2, padding=1)
            self.convolutions.append(nn.Sequential(convolution, *residual, _Activation(activation)))
            sides = _halved(sides)
        self.output = nn.Linear([self.grid.channels, *channels][-1] * math.prod(sides), out_features)

    def forward(self, features: Tensor) -> Tensor:
        found = self.convolutions(self.grid.spread(features))
        return self.output(found.flatten(1)).reshape(*features.shape[:-1], self.out_features)


class ConvDecoder(Network):
    """One affine layer, then transposed convolutions, each doubling height and width, or length, up to the shape.

    Args:
        in_features: latent dimensions.
        out_features: raw outputs: a multiple of the entries of an image or a sequence, laid out as that many of them,
            each entry with a bias of its own.
        channels: channels below each transposed convolution, each at least 1.
        blocks: residual blocks before each transposed convolution (He et al. 2016), 0 for a plain network.
        activation: the nonlinearity before each transposed convolution.
        image_shape: shape ``(C, H, W)`` of one image, or ``(T, F)`` of one sequence.

    Raises:
        ValueError: if a number of channels is below 1, or ``image_shape`` is missing or does not divide
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
        self.grid = _Grid(image_shape, out_features)
        sizes = [self.grid.sides]
        for _ in channels:
            sizes.append(_halved(sizes[-1]))
        sizes.reverse()  # from coarse to fine
        self.start_shape = (channels[0], *sizes[0])
        self.input = nn.Linear(in_features, math.prod(self.start_shape))
        self.convolutions = nn.Sequential()
        for (m, n), sides in zip(pairwise([*channels, self.grid.channels]), sizes[1:], strict=True):
            residual = _residuals(blocks, m, activation, len(sides))
            # from n to 2 n - 1, or to 2 n with a padding of 1
            padding = tuple(1 - side % 2 for side in sides)
            transposed: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d)[len(sides) - 1]
            convolution = transposed(m, n, 3, stride=2, padding=1, output_padding=padding)
            self.convolutions.append(nn.Sequential(*residual, _Activation(activation), convolution))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, features: Tensor) -> Tensor:
        start = self.input(features.reshape(-1, self.in_features)).unflatten(-1, self.start_shape)
        made = self.grid.flatten(self.convolutions(start))
        return made.reshape(*features.shape[:-1], self.out_features) + self.bias

    def start_at(self, output: Tensor) -> None:
        with torch.no_grad():
            self.bias.copy_(output)


class RecurrentEncoder(Network):
    """The steps of a sequence, or the rows of an image, read by a GRU; its last state, through one affine layer.

    Args:
        in_features: entries of one image or sequence, or of several, one after the other: its mask is such a second.
        out_features: raw outputs.
        hidden: width of the state, at least 1.
        bidirectional: read from the end to the start too, by a second GRU, whose last state stands beside.
        image_shape: shape ``(C, H, W)`` of one image, or ``(T, F)`` of one sequence.

    Raises:
        ValueError: if ``hidden`` is below 1, or ``image_shape`` is missing or does not divide ``in_features``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: int = 200,
        bidirectional: bool = False,
        image_shape: Sequence[int] | None = None,
    ):
        super().__init__(in_features, out_features, image_shape)
        check_widths("hidden", [hidden])
        self.grid = _Grid(image_shape, in_features)
        width = in_features // self.grid.shape[-2]
        self.rows = nn.GRU(width, hidden, batch_first=True, bidirectional=bidirectional)
        self.output = nn.Linear(hidden * (1 + bidirectional), out_features)

    def forward(self, features: Tensor) -> Tensor:
        _, last = self.rows(self.grid.rows(features))
        return self.output(last.movedim(0, 1).flatten(1)).reshape(*features.shape[:-1], self.out_features)


class RecurrentDecoder(Network):
    """A GRU that is shown z at every step and writes one step of a sequence, or row of an image, after the other.

    Args:
        in_features: latent dimensions.
        out_features: raw outputs: a multiple of the entries of an image or a sequence, laid out as that many of them,
            each entry with a bias of its own.
        hidden: width of the state, at least 1.
        bidirectional: a second GRU goes from the end to the start; each step is written from the states of both.
        image_shape: shape ``(C, H, W)`` of one image, or ``(T, F)`` of one sequence.

    Raises:
        ValueError: if ``hidden`` is below 1, or ``image_shape`` is missing or does not divide ``out_features``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: int = 200,
        bidirectional: bool = False,
        image_shape: Sequence[int] | None = None,
    ):
        super().__init__(in_features, out_features, image_shape)
        check_widths("hidden", [hidden])
        self.grid = _Grid(image_shape, out_features)
        self.height = self.grid.shape[-2]
        self.rows = nn.GRU(in_features, hidden, batch_first=True, bidirectional=bidirectional)
        self.output = nn.Linear(hidden * (1 + bidirectional), out_features // self.height)
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, features: Tensor) -> Tensor:
        shown = features.reshape(-1, 1, self.in_features).expand(-1, self.height, -1)
        states, _ = self.rows(shown)
        made = self.grid.from_rows(self.output(states))
        return made.reshape(*features.shape[:-1], self.out_features) + self.bias

    def start_at(self, output: Tensor) -> None:
        with torch.no_grad():
            self.bias.copy_(output)


def _halved(sides: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-side // 2) for side in sides)
