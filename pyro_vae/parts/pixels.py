"""Likelihoods of images whose pixels see their neighbours: autoregressive ones, told z."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from pyro_vae.errors import check_at_least_one
from pyro_vae.parts.likelihoods import Bernoulli, Likelihood


class Autoregressive(TorchDistribution):
    """p(x) = prod_i p(x_i | x_1, .., x_(i-1)) over vectors. Means, and what is known of some entries, have no formula.

    Args:
        score: log p(x_i | x_1, .., x_(i-1)) of every entry: ``(*, X) -> (*, X)``.
        draw: draws of a shape ``(*, X)``.
        support: of x.
        event_size: X.
        batch_shape: of independent vectors.
    """

    arg_constraints = {}  # noqa: RUF012  # pyright: ignore[reportAssignmentType]

    def __init__(
        self,
        score: Callable[[Tensor], Tensor],
        draw: Callable[[torch.Size], Tensor],
        support: constraints.Constraint,
        event_size: int,
        batch_shape: Sequence[int] = (),
        validate_args: bool | None = None,
    ):
        self.score, self.draw, self._support = score, draw, support
        super().__init__(torch.Size(batch_shape), torch.Size([event_size]), validate_args=validate_args)

    @constraints.dependent_property(event_dim=1)
    def support(self) -> constraints.Constraint:
        return self._support

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "Autoregressive":
        made = self.score, self.draw, self._support, self.event_shape[0]
        return type(self)(*made, batch_shape, validate_args=self._validate_args)

    def log_prob(self, x: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(x)
        log_prob = self.score(x).sum(-1)
        return log_prob.expand(torch.broadcast_shapes(self.batch_shape, log_prob.shape))

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            return self.draw(self._extended_shape(sample_shape))


class PixelDecoder(Likelihood):
    """Each pixel given z and the pixels before it, row by row, in a window: p(x | z) = prod_i p(x_i | x_<i, z).

    A gated PixelCNN (van den Oord et al. 2016, "Conditional image generation with PixelCNN decoders"), told z as in a
    PixelVAE (Gulrajani et al. 2017). log p(x | z) is exact, in one pass. The decoder network says the raw outputs of
    each pixel's own distribution, as for a likelihood without neighbours, and ``context`` more images that every layer
    is told; what the neighbours say is added to them. The pixels that one pixel sees are those up to
    ``receptive_field`` rows above and columns beside it: what a small window cannot tell is left to z (Chen et al.
    2017, "Variational lossy autoencoder").

    Draws go pixel by pixel, with all that does not change kept. E[x | z] has no formula, nor has log p of some of the
    pixels, so that missing values are refused.

    Args:
        event_size: number X of pixels.
        receptive_field: how far a pixel sees, in pixels, at least 1.
        layers: gated layers, at least 1. The first sees a window of pixels; what is left of the receptive field is
            shared out to the others, dilated (Yu & Koltun 2016), in the ratio 1 : 2 : 4 : 1 : .. ; a layer with no
            share sees the pixel's own features alone, which is much faster.
        channels: of each layer, at least 1.
        context: images of X numbers that the decoder network makes for the layers, at least 0.
        window: how far the first layer sees at most, at least 1.
        pixel: likelihood of one pixel given all that it sees.
        force: take a receptive field that covers the image too, whose latents would have nothing to tell.
        image_shape: shape ``(1, H, W)`` of an image; null: that of the data, or a square.

    Raises:
        ValueError: if a number is out of range, images are not of one channel, or the receptive field covers them or
            has gaps.

    >>> head = PixelDecoder(64, receptive_field=2, channels=4, context=1)
    >>> head(torch.zeros(7, 64), torch.zeros(7, 64)).log_prob(torch.zeros(7, 64)).shape
    torch.Size([7])
    """

    def __init__(
        self,
        event_size: int,
        receptive_field: int = 4,
        layers: int = 3,
        channels: int = 32,
        context: int = 4,
        window: int = 6,
        pixel: Callable[[int], Likelihood] = Bernoulli,
        force: bool = False,
        image_shape: Sequence[int] | None = None,
    ):
        super().__init__(event_size)
        check_at_least_one(receptive_field=receptive_field, layers=layers, channels=channels, window=window)
        if context < 0:
            raise ValueError(f"context must be at least 0, got {context}")
        self.image_shape = _one_channel(image_shape, event_size)
        height, width = self.image_shape[1:]
        if receptive_field >= max(height, width) - 1 and not force:
            raise ValueError(
                f"receptive_field {receptive_field} covers the image of {height} x {width} pixels, so that the latents "
                "would idle: choose a smaller one, or force true"
            )
        self.receptive_field, self.context, self.pixel = receptive_field, context, pixel
        self.head = pixel(1)
        self.encoding, self.levels, self.is_density = self.head.encoding, self.head.levels, self.head.is_density
        self.filler = self.head.filler
        self.sizes = tuple(event_size * n for n in (*self.head.sizes, *[context][: context > 0]))
        self.neighbours = _Neighbours(
            (height, width), reaches(receptive_field, layers, window), channels, context, sum(self.head.sizes)
        )

    def forward(self, *outputs: Tensor) -> TorchDistribution:
        own = torch.cat([self._spread(each) for each in outputs[: len(self.head.sizes)]], -1)  # (*, H, W, n)
        told = self._spread(outputs[-1]) if self.context else None

        def score(x: Tensor) -> Tensor:
            seen = self._shown(x).to(own.dtype).unflatten(-1, self.image_shape[1:])
            raw = own + self.neighbours(seen, told)
            made = self.head(*raw.flatten(-3, -2).split(self.head.sizes, -1))
            return made.log_prob(x.unsqueeze(-1))

        def draw(shape: torch.Size) -> Tensor:
            return self._drawn(shape, own, told)

        support = self.head(*(own.new_zeros(n) for n in self.head.sizes)).support
        return Autoregressive(
            score, draw, cast(constraints.Constraint, support), self.event_size, outputs[0].shape[:-1]
        )

    def initialize(self, x: Tensor) -> None:
        self.head.initialize(x.reshape(-1, 1))

    def marginal(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """That of the same likelihood without neighbours, who say nothing at first."""
        own = self.pixel(self.event_size).marginal(x)
        return None if own is None else (*own, x.new_zeros(self.context * self.event_size))[: len(self.sizes)]

    def _spread(self, flat: Tensor) -> Tensor:
        """``(*, n X)``, laid out as n images, as ``(*, H, W, n)``."""
        return flat.unflatten(-1, (-1, *self.image_shape[1:])).movedim(-3, -1)

    def _shown(self, x: Tensor) -> Tensor:
        """What neighbours see of pixels."""
        if self.encoding != "integers":
            return x
        return x.log1p() if self.levels is None else x / (self.levels - 1)

    def _drawn(self, shape: torch.Size, own: Tensor, told: Tensor | None) -> Tensor:
        def rows(each: Tensor) -> Tensor:
            return each.expand(*shape[:-1], *each.shape[-3:]).reshape(-1, *each.shape[-3:])

        own, context = rows(own), None if told is None else rows(told)
        x = own.new_zeros(own.shape[:-1])

        def pixel(said: Tensor, row: int, column: int) -> Tensor:
            raw = own[:, row, column] + said
            x[:, row, column] = self.head(*raw.split(self.head.sizes, -1)).sample().squeeze(-1)
            return self._shown(x[:, row, column])

        self.neighbours.draw(x, context, pixel)
        return x.reshape(shape)


def reaches(receptive_field: int, layers: int, window: int) -> list[int]:
    """How far each layer looks: the first, up to ``window``, and the others, in the ratio 1 : 2 : 4 : 1 : .. .

    Raises:
        ValueError: if pixels between would not be seen.

    >>> reaches(10, 4, window=3), reaches(4, 3, window=6)
    ([3, 1, 2, 4], [4, 0, 0])
    """
    first = min(window, receptive_field)
    weights = [(1, 2, 4)[i % 3] for i in range(layers - 1)]
    ends = [round((receptive_field - first) * sum(weights[:i]) / max(1, sum(weights))) for i in range(layers)]
    made = [first, *(after - before for before, after in pairwise(ends))]
    if sum(made) < receptive_field or any(each > sum(made[:i]) for i, each in enumerate(made) if i):
        raise ValueError(
            f"receptive_field {receptive_field} has gaps with {layers} layers and a window of {window}: take more "
            "layers, or a wider window"
        )
    return made


class _Neighbours(nn.Module):
    """What the pixels before say of each pixel, ``(*, H, W, outputs)``.

    One stack sees the rows above, and the other is shown that, z, and the pixels to the left, so that nothing is in a
    blind spot. What must not be seen is cut off by padding on one side. The rows above are read once for all z.
    """

    def __init__(self, shape: tuple[int, int], reach: Sequence[int], channels: int, context: int, outputs: int):
        super().__init__()
        self.height, self.width = shape
        self.channels = channels
        self.layers = nn.ModuleList(_Layer(channels, each, context, i == 0) for i, each in enumerate(reach))
        self.layers.to(memory_format=torch.channels_last)  # faster on a CPU
        last = nn.Linear(channels, outputs)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.output = nn.Sequential(nn.SiLU(), nn.Linear(channels, channels), nn.SiLU(), last)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Of pixels ``(*, H, W)`` and context ``(*, H, W, C)``, whose leading dimensions broadcast."""
        first, *_ = layers = cast(list[_Layer], list(self.layers))
        flat = x.reshape(-1, 1, self.height, self.width)
        above: list[Tensor | None] = []
        features = flat
        for layer in layers:
            if not layer.reach:
                above.append(None)
                continue
            features = flat if layer is first else _gate(features, 1)
            side, top = layer.reach, layer.reach - (layer is first)
            features = layer.above(F.pad(features, (side, side, layer.reach, 0))[:, :, : self.height + top])
            above.append(layer.show(features.movedim(1, -1)).unflatten(0, x.shape[:-2] or (1,)))
        if not x.shape[:-2]:
            above = [None if each is None else each.squeeze(0) for each in above]

        def told(number: int) -> Tensor | None:
            return layers[number].told_with(above[number], context)

        def before(number: int, features: Tensor) -> Tensor:
            return F.pad(features, (0, 0, layers[number].reach, 0))[..., : self.width, :]

        windows = F.pad(x, (first.reach, 0))[..., :-1].unfold(-1, first.reach, 1)
        return self._of_pixels(windows, told, before)

    def _of_pixels(
        self, windows: Tensor, told: Callable[[int], Tensor | None], before: Callable[[int, Tensor], Tensor]
    ) -> Tensor:
        """The second stack, of all pixels or of one: ``windows`` to the left, ``(*, first reach)``."""
        layers = cast(list[_Layer], list(self.layers))
        features = layers[0](windows, told(0))
        for number, layer in enumerate(layers[1:], 1):
            given = torch.cat([features, before(number, features)], -1) if layer.reach else features
            features = features + layer(given, told(number))
        return self.output(features)

    def draw(self, like: Tensor, context: Tensor | None, pixel: Callable[[Tensor, int, int], Tensor]) -> None:
        """Go through the pixels of N images, with what was seen before kept.

        Args:
            like: of N rows.
            context: ``(N, H, W, C)``.
            pixel: given what the pixels before say, ``(N, outputs)``, and row and column, draws pixels, ``(N,)``.
        """
        first, *others = layers = cast(list[_Layer], list(self.layers))
        reach, number = first.reach, len(like)
        canvas = like.new_zeros(number, reach + self.height, reach + self.width + reach)
        dilated = [(each.reach, number if each.reach else 0) for each in others]
        kept = [like.new_zeros(n, self.channels, self.height + d, self.width + 2 * d) for d, n in dilated]
        lines = [like.new_zeros(n, self.width + d, self.channels) for d, n in dilated]
        for row in range(self.height):
            above = self._rows_above(row, canvas, kept)
            context_row = None if context is None else context[:, row]
            told = [layer.told_with(each, context_row) for layer, each in zip(layers, above, strict=True)]
            for column in range(self.width):

                def at(i: int, told=told, column=column) -> Tensor | None:
                    return None if (each := told[i]) is None else each[:, column]

                def before(i: int, features: Tensor, column=column) -> Tensor:
                    lines[i - 1][:, layers[i].reach + column] = features
                    return lines[i - 1][:, column]

                said = self._of_pixels(canvas[:, reach + row, column : column + reach], at, before)
                canvas[:, reach + row, reach + column] = pixel(said, row, column)

    def _rows_above(self, row: int, canvas: Tensor, kept: list[Tensor]) -> list[Tensor | None]:
        """What layers show of the rows above one, ``(N, W, 2 channels)``; ``kept`` are the features of those above."""
        first, *others = cast(list[_Layer], list(self.layers))
        features = first.one_row(canvas[:, None, row : row + first.reach], 1)
        above: list[Tensor | None] = [first.show(features.movedim(1, -1).squeeze(1))]
        for layer, rows in zip(others, kept, strict=True):
            if not layer.reach:
                above.append(None)
                continue
            reach = layer.reach
            rows[:, :, reach + row, reach : reach + self.width] = _gate(features, 1).squeeze(2)
            features = layer.one_row(rows[:, :, [row, row + reach]], reach)
            above.append(layer.show(features.movedim(1, -1).squeeze(1)))
        return above


class _Layer(nn.Module):
    """One gated layer of both stacks: tanh(a) sigmoid(b).

    Args:
        channels: of the features.
        reach: how far it looks, up, to the left, and above to both sides.
        context: numbers that each pixel is told.
        is_first: it is given pixels, in a window of so many, and not the pixel itself; others are dilated.
    """

    def __init__(self, channels: int, reach: int, context: int, is_first: bool):
        super().__init__()
        self.reach = reach
        self.down = None
        if is_first:
            self.above = nn.Conv2d(1, 2 * channels, (reach, 2 * reach + 1))
            self.left = nn.Linear(reach, 2 * channels)
        else:
            if reach:
                self.above = nn.Conv2d(channels, 2 * channels, (2, 3), dilation=reach)
                self.down = nn.Linear(2 * channels, 2 * channels, bias=False)
            self.left = nn.Linear(channels * (1 + (reach > 0)), 2 * channels)
        self.told = nn.Linear(context, 2 * channels, bias=False) if context else None
        self.out = nn.Linear(channels, channels)

    def forward(self, given: Tensor, told: Tensor | None) -> Tensor:
        """``(*, given)`` and what is added, ``(*, 2 channels)``, to ``(*, channels)``."""
        both = self.left(given)
        return self.out(_gate(both if told is None else both + told, -1))

    def told_with(self, above: Tensor | None, context: Tensor | None) -> Tensor | None:
        """What a pixel is told of the rows above, if anything, and of its context: ``(*, 2 channels)``."""
        if self.told is None or context is None:
            return above
        told = self.told(context)
        return told if above is None else above + told

    def show(self, above: Tensor) -> Tensor:
        """What the second stack is shown of the first: ``(*, 2 channels)``."""
        return above if self.down is None else self.down(above)

    def one_row(self, rows: Tensor, dilation: int) -> Tensor:
        """What it sees in just the rows that it looks at, ``(N, channels, rows, W + 2 reach)``, one below the other."""
        return F.conv2d(rows, self.above.weight, self.above.bias, dilation=(1, dilation))


def _gate(features: Tensor, dim: int) -> Tensor:
    one, other = features.chunk(2, dim)
    return one.tanh() * other.sigmoid()


def _one_channel(image_shape: Sequence[int] | None, event_size: int) -> tuple[int, int, int]:
    side = math.isqrt(event_size)
    shape = (1, side, side) if image_shape is None else tuple(image_shape)
    if len(shape) != 3 or shape[0] != 1 or math.prod(shape) != event_size:
        told = f"{event_size} entries" if image_shape is None else f"{event_size} entries of shape {shape}"
        raise ValueError(f"a PixelDecoder is for images of one channel, (1, H, W), and these are {told}")
    return shape
