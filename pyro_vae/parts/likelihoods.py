"""Likelihoods p(x | z): heads that turn a decoder's raw outputs into a distribution over one observation."""

import math
from abc import ABC, abstractmethod
from typing import Literal

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from pyro_vae.parts import distributions

Encoding = Literal["binary", "dequantized", "integers"]
"""What an observation's entries are: 0 or 1; reals in (0, 1), pixel k drawn from [k, k + 1) / levels; whole numbers."""


class Likelihood(nn.Module, ABC):
    """Raw outputs in, distribution out.

    ``forward(*parameters)`` takes one tensor ``(*, n_i)`` per entry of ``sizes`` and returns a Pyro distribution
    with batch shape ``(*)`` and event shape ``(event_size,)``. An n_i of m X entries is laid out as m images.

    Args:
        event_size: number X of entries of one flat observation, at least 1.

    Attributes:
        sizes: how many raw outputs each parameter takes; their sum is the decoder's ``out_features``.
        encoding: what the observations must be; None if any will do that lie in the distribution's support.
        levels: how many values a whole number can take; None if any.
        is_density: whether log p(x) is a density (else a probability mass); None for a score that is neither.
        filler: a value in the support, which stands where nothing was seen, and counts for nothing; a number, or one of
            each entry, ``(X,)``.

    Raises:
        ValueError: if ``event_size`` is below 1.
    """

    sizes: tuple[int, ...]
    encoding: Encoding | None = None
    levels: int | None = None
    is_density: bool | None = False
    filler: float | Tensor = 0.0

    def __init__(self, event_size: int):
        super().__init__()
        if event_size < 1:
            raise ValueError(f"event_size must be at least 1, got {event_size}")
        self.event_size = event_size
        self.sizes = (event_size,)

    def unit(self, noun: str = "image") -> str:
        """The unit of log p(x), of what one datum is called. Numbers of different units mean different things and are
        never compared."""
        kinds = {True: "density", False: "mass", None: "score that is no likelihood"}
        return f"nats per {noun}, {kinds[self.is_density]}"

    @abstractmethod
    def forward(self, *parameters: Tensor) -> TorchDistribution:
        """The distribution of x given raw outputs ``(*, n_i)``."""

    def initialize(self, x: Tensor) -> None:
        """Start the head's own numbers from training data ``x``, shape ``(N, X)``. Default: nothing."""

    def marginal(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """Raw outputs ``(n_i,)`` under which the head alone describes ``x``, shape ``(N, X)``, well.

        An untrained decoder starts there. Default: ``None``, no such start.
        """
        return None


class Bernoulli(Likelihood):
    """Independent binary pixels, parametrized by their logits; log p(x) is a mass.

    Args:
        event_size: number X of pixels.

    >>> round(Bernoulli(2)(torch.tensor([0.0, 100.0])).log_prob(torch.tensor([1.0, 1.0])).item(), 4)
    -0.6931
    """

    encoding = "binary"

    def forward(self, logits: Tensor) -> TorchDistribution:
        return distributions.BernoulliVector(logits)

    def marginal(self, x: Tensor) -> tuple[Tensor, ...]:
        """The logit of the mean image, its probabilities clipped to [0.001, 0.999] (the IWAE authors' code)."""
        return (torch.logit(x.mean(0), eps=1e-3),)


class ContinuousBernoulli(Likelihood):
    """Independent pixels in (0, 1) with density proportional to exp(l x) (Loaiza-Ganem & Cunningham 2019).

    Args:
        event_size: number X of pixels.
    """

    encoding = "dequantized"
    is_density = True

    def forward(self, logits: Tensor) -> TorchDistribution:
        return distributions.ContinuousBernoulli(logits).to_event(1)

    def marginal(self, x: Tensor) -> tuple[Tensor, ...]:
        """Natural parameters that give the mean image, by bisection."""
        mean = x.mean(0)
        low, high = torch.full_like(mean, -300.0), torch.full_like(mean, 300.0)
        for _ in range(40):
            middle = (low + high) / 2
            above = distributions.ContinuousBernoulli(middle).mean > mean
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (low,)


class LocationScale(Likelihood):
    """Base of likelihoods with a location per pixel and a scale that is fixed, learned, or an output per pixel.

    Args:
        event_size: number X of pixels.
        scale: a positive number fixes the scale; learned: one parameter for all pixels; per_pixel: the decoder outputs
            it, beside the location of each pixel.
        min_scale: smallest scale that can be learned, positive; keeps constant pixels from an infinite density.
        features: F of sequences (T, F), each with a learned scale of its own; null: one for all.

    Raises:
        ValueError: if a scale is not positive, or ``features`` does not divide ``event_size`` or has no use.
    """

    encoding = "dequantized"
    is_density = True

    def __init__(
        self,
        event_size: int,
        scale: float | Literal["learned", "per_pixel"] = "learned",
        min_scale: float = 1e-3,
        features: int | None = None,
    ):
        super().__init__(event_size)
        if not min_scale > 0:
            raise ValueError(f"min_scale must be positive, got {min_scale}")
        if scale not in ("learned", "per_pixel") and not (isinstance(scale, float | int) and scale > 0):
            raise ValueError(f"scale must be positive, 'learned' or 'per_pixel', got {scale}")
        if features is not None and (scale != "learned" or features < 1 or event_size % features):
            raise ValueError(f"features must divide {event_size} entries, whose scale is learned, got {features}")
        self.min_scale = min_scale
        if scale == "per_pixel":
            self.sizes = (event_size, event_size)
        elif scale == "learned":
            start = _inverse_softplus(torch.tensor(0.2))
            self.raw_scale = nn.Parameter(start if features is None else start.repeat(features))
        else:
            self.register_buffer("fixed_scale", torch.tensor(float(scale)), persistent=False)

    fixed_scale: Tensor

    @staticmethod
    @abstractmethod
    def family(loc: Tensor, scale: Tensor) -> TorchDistribution:
        """The distribution of one pixel."""

    def forward(self, loc: Tensor, raw_scale: Tensor | None = None) -> TorchDistribution:
        if raw_scale is None:
            raw_scale = getattr(self, "raw_scale", None)
        scale = self.fixed_scale if raw_scale is None else self.min_scale + F.softplus(raw_scale)
        if scale.dim() == 1 and loc.shape[-1] != len(scale):
            scale = scale.repeat(loc.shape[-1] // len(scale))
        return self.family(loc, scale.expand_as(loc)).to_event(1)

    def marginal(self, x: Tensor) -> tuple[Tensor, ...]:
        """Mean and standard deviation of each pixel."""
        return (x.mean(0), _inverse_softplus(x.std(0).clamp(min=1e-2)))[: len(self.sizes)]


class Gaussian(LocationScale):
    """Independent normal pixels.

    Args:
        event_size: number X of pixels.
        scale: a positive number fixes the scale; learned: one parameter for all pixels; per_pixel: the decoder outputs
            it, beside the location of each pixel.
        min_scale: smallest scale that can be learned, positive; keeps constant pixels from an infinite density.
        features: F of sequences (T, F), each with a learned scale of its own; null: one for all.
    """

    family = staticmethod(dist.Normal)


class Laplace(LocationScale):
    """Independent Laplace pixels: heavier tails than the normal.

    Args:
        event_size: number X of pixels.
        scale: a positive number fixes the scale; learned: one parameter for all pixels; per_pixel: the decoder
            outputs it.
        min_scale: smallest scale that can be learned, positive; keeps constant pixels from an infinite density.
        features: F of sequences (T, F), each with a learned scale of its own; null: one for all.
    """

    family = staticmethod(dist.Laplace)


class Beta(Likelihood):
    """Independent beta pixels in (0, 1), by mean sigmoid(a) and concentration 0.01 + softplus(b).

    Args:
        event_size: number X of pixels.
    """

    encoding = "dequantized"
    is_density = True
    filler = 0.5

    def __init__(self, event_size: int):
        super().__init__(event_size)
        self.sizes = (event_size, event_size)

    def forward(self, logits: Tensor, raw_concentration: Tensor) -> TorchDistribution:
        concentration = 0.01 + F.softplus(raw_concentration)
        # sigmoid underflows in float32 below -88; a shape parameter must stay positive
        first, second = (concentration * torch.sigmoid(v.clamp(min=-40)) for v in (logits, -logits))
        return dist.Beta(first, second).to_event(1)

    def marginal(self, x: Tensor) -> tuple[Tensor, ...]:
        """Method of moments."""
        mean, variance = x.mean(0), x.var(0).clamp(min=1e-6)
        concentration = (mean * (1 - mean) / variance - 1).clamp(0.1, 1000.0)
        return torch.logit(mean), _inverse_softplus(concentration - 0.01)


class DiscretizedLogistic(Likelihood):
    """Whole numbers 0..L-1: masses of a logistic distribution, or of a mixture, on bins (Salimans et al. 2017).

    Bin k is [k, k + 1) / L; the first and last bins take the tails.

    Args:
        event_size: number X of pixels.
        levels: number L of values, at least 2: 256 for 8-bit images, 17 for Digits.
        components: logistic distributions mixed in each pixel, at least 1.

    Raises:
        ValueError: if ``levels`` or ``components`` is too small.
    """

    encoding = "integers"
    levels: int

    def __init__(self, event_size: int, levels: int = 256, components: int = 1):
        super().__init__(event_size)
        _check_levels(levels)
        if components < 1:
            raise ValueError(f"components must be at least 1, got {components}")
        self.levels = levels
        self.components = components
        self.sizes = (components * event_size,) * (2 if components == 1 else 3)

    def forward(self, *outputs: Tensor) -> TorchDistribution:
        parameters = (v.unflatten(-1, (self.components, self.event_size)).movedim(-2, -1) for v in outputs)
        loc, raw_scale, *logits = parameters  # (*, X, M)
        scale = 1e-3 + F.softplus(raw_scale - 2)
        if not logits:
            return distributions.DiscretizedLogistic(0.5 + loc[..., 0], scale[..., 0], self.levels).to_event(1)
        bins = distributions.DiscretizedLogistic(0.5 + loc, scale, self.levels)
        return dist.MixtureSameFamily(dist.Categorical(logits=logits[0]), bins).to_event(1)

    def marginal(self, x: Tensor) -> tuple[Tensor, ...]:
        """Mean and standard deviation of each pixel; the components of a mixture are spread around it."""
        x = (x + 0.5) / self.levels
        mean, std = x.mean(0), x.std(0).clamp(min=0.02)
        offsets = (
            torch.linspace(-1, 1, self.components, device=x.device)[:, None]
            if self.components > 1
            else x.new_zeros(1, 1)
        )
        loc = mean - 0.5 + offsets * std
        raw_scale = 2 + _inverse_softplus(std * math.sqrt(3) / math.pi).expand_as(loc)
        return tuple(v.flatten() for v in (loc, raw_scale, torch.zeros_like(loc))[: len(self.sizes)])


class Categorical(Likelihood):
    """Whole numbers 0..L-1 with a free probability each.

    Args:
        event_size: number X of pixels.
        levels: number L of values, at least 2: 256 for 8-bit images, 17 for Digits.

    Raises:
        ValueError: if ``levels`` is below 2.
    """

    encoding = "integers"
    levels: int

    def __init__(self, event_size: int, levels: int = 256):
        super().__init__(event_size)
        _check_levels(levels)
        self.levels = levels
        self.sizes = (levels * event_size,)

    def forward(self, logits: Tensor) -> TorchDistribution:
        logits = logits.unflatten(-1, (self.levels, self.event_size)).movedim(-2, -1)
        return distributions.WholeNumbers(logits=logits).to_event(1)

    def marginal(self, x: Tensor) -> tuple[Tensor, ...]:
        """Logarithms of the relative frequencies, every value counted once more than it occurs."""
        counts = torch.stack([(x == level).sum(0) for level in range(self.levels)])
        return ((counts + 1.0).log().flatten() - math.log(len(x)),)


class Poisson(Likelihood):
    """Counts 0, 1, 2, ... with rates softplus(output).

    Args:
        event_size: number X of pixels.
    """

    encoding = "integers"

    def forward(self, raw_rate: Tensor) -> TorchDistribution:
        return dist.Poisson(F.softplus(raw_rate).clamp(min=1e-6)).to_event(1)

    def marginal(self, x: Tensor) -> tuple[Tensor, ...]:
        """The mean of each pixel."""
        return (_inverse_softplus(x.mean(0).clamp(min=1e-3)),)


class NegativeBinomial(Likelihood):
    """Counts 0, 1, 2, ... by mean m = softplus(a) and dispersion r = softplus(b): variance m + m^2 / r.

    Args:
        event_size: number X of pixels.
        link: log makes them m = exp(a) and r = exp(b), which suits counts of any size, whose log p(x) is then computed
            in double precision: it is a small difference of large numbers.
    """

    encoding = "integers"

    def __init__(self, event_size: int, link: Literal["softplus", "log"] = "softplus"):
        super().__init__(event_size)
        if link not in ("softplus", "log"):
            raise ValueError(f"link must be softplus or log, got {link}")
        self.sizes = (event_size, event_size)
        self.link = link

    def forward(self, raw_mean: Tensor, raw_dispersion: Tensor) -> TorchDistribution:
        if self.link == "log":
            log_mean, log_dispersion = raw_mean.clamp(-14.0, 20.0), raw_dispersion.clamp(-7.0, 12.0)
            made = distributions.ExactNegativeBinomial(log_dispersion.exp(), logits=log_mean - log_dispersion)
            return made.to_event(1)
        mean, dispersion = (F.softplus(v).clamp(min=1e-6) for v in (raw_mean, raw_dispersion))
        return dist.NegativeBinomial(dispersion, logits=mean.log() - dispersion.log()).to_event(1)

    def marginal(self, x: Tensor) -> tuple[Tensor, ...]:
        """Method of moments."""
        mean = x.mean(0).clamp(min=1e-3)
        dispersion = (mean.square() / (x.var(0) - mean).clamp(min=1e-3)).clamp(1e-2, 1e3)
        if self.link == "log":
            return mean.log(), dispersion.log()
        return _inverse_softplus(mean), _inverse_softplus(dispersion)


def _check_levels(levels: int) -> None:
    if levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels}")


def _inverse_softplus(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-x))
