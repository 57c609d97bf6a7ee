"""Likelihoods of columns that differ in kind: heads side by side, and those that images have no use for."""

from collections.abc import Sequence
from typing import Literal, cast

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from pyro_vae.parts import distributions
from pyro_vae.parts.likelihoods import Likelihood, LocationScale
from pyro_vae.parts.missing import check_features, independent_entries


class LogNormal(LocationScale):
    """Independent positive numbers, whose logarithms are normal; log p(x) is a density of x, not of log x.

    Args:
        event_size: number X of entries.
        scale: of the logarithm: a positive number fixes it; learned: one parameter for all entries; per_pixel: the
            decoder outputs it, beside the location of each entry.
        min_scale: smallest scale that can be learned, positive.
        features: F of sequences (T, F), each with a learned scale of its own; null: one for all.
        standardized: locations and scales are in units of each entry's logarithm in the training data, its mean and
            standard deviation (``initialize``; saved with the model).
    """

    encoding = None
    filler = 1.0
    family = staticmethod(dist.LogNormal)
    log_loc: Tensor
    log_scale: Tensor

    def __init__(
        self,
        event_size: int,
        scale: float | Literal["learned", "per_pixel"] = "learned",
        min_scale: float = 1e-3,
        features: int | None = None,
        standardized: bool = False,
    ):
        super().__init__(event_size, scale, min_scale, features)
        self.standardized = standardized
        if standardized:
            self.register_buffer("log_loc", torch.zeros(event_size))
            self.register_buffer("log_scale", torch.ones(event_size))

    def forward(self, loc: Tensor, raw_scale: Tensor | None = None) -> TorchDistribution:
        made = super().forward(loc, raw_scale)
        if not self.standardized:
            return made
        unit = made.base_dist  # pyright: ignore[reportAttributeAccessIssue]
        return dist.LogNormal(self.log_loc + self.log_scale * unit.loc, self.log_scale * unit.scale).to_event(1)

    def initialize(self, x: Tensor) -> None:
        """Take the units of ``x``, shape ``(N, X)``, if it has some; an entry of one value keeps its own."""
        if self.standardized:
            logs = x.log()
            scale = logs.std(0) if len(x) > 1 else torch.zeros_like(logs[0])
            self.log_loc.copy_(logs.mean(0))
            self.log_scale.copy_(torch.where(scale > 0, scale, 1.0))

    def marginal(self, x: Tensor) -> tuple[Tensor, ...]:
        """Mean and standard deviation of each entry's logarithm, in its unit."""
        logs = x.log()
        return super().marginal((logs - self.log_loc) / self.log_scale if self.standardized else logs)


class Ordinal(Likelihood):
    """Ordered values 0..L-1: P(x <= k) = sigmoid(t_k - output), with learned thresholds t_0 < t_1 < ... of each entry.

    The cumulative logit model (McCullagh 1980, "Regression models for ordinal data", section 2.3).

    Args:
        event_size: number X of entries.
        levels: number L of values, at least 2.

    Raises:
        ValueError: if ``levels`` is below 2.
    """

    encoding = "integers"
    levels: int

    def __init__(self, event_size: int, levels: int):
        super().__init__(event_size)
        if levels < 2:
            raise ValueError(f"levels must be at least 2, got {levels}")
        self.levels = levels
        start = torch.linspace(-2, 2, levels - 1) if levels > 2 else torch.zeros(1)
        self.first = nn.Parameter(start[:1].repeat(event_size, 1))
        self.log_gaps = nn.Parameter(start.diff().log().repeat(event_size, 1))

    def thresholds(self) -> Tensor:
        """t, shape ``(X, L - 1)``, ascending."""
        return torch.cat([self.first, self.first + self.log_gaps.exp().cumsum(-1)], -1)

    def forward(self, outputs: Tensor) -> TorchDistribution:
        ends = self.thresholds() - outputs.unsqueeze(-1)  # (*, X, L - 1)
        below, above = F.logsigmoid(ends[..., :1]), F.logsigmoid(-ends[..., -1:])
        lower, upper = ends[..., :-1], ends[..., 1:]  # of the values between: as a DiscretizedLogistic's bins
        between = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(lower - upper))
        return distributions.WholeNumbers(logits=torch.cat([below, between, above], -1)).to_event(1)

    def initialize(self, x: Tensor) -> None:
        """Put the thresholds where the relative frequencies of ``x``, shape ``(N, X)``, have them."""
        counts = torch.stack([(x == level).sum(0) for level in range(self.levels)], -1) + 0.5
        share = counts.cumsum(-1)[:, :-1] / counts.sum(-1, keepdim=True)
        ends = torch.logit(share)
        with torch.no_grad():
            self.first.copy_(ends[:, :1])
            self.log_gaps.copy_(ends.diff(dim=-1).log())

    def marginal(self, x: Tensor) -> tuple[Tensor, ...]:
        """Zeros: the thresholds alone tell the frequencies."""
        return (x.new_zeros(self.event_size),)


class Scaled(Likelihood):
    """A density of entries in any unit: that of (x - loc) / scale by another head, times 1 / scale.

    ``initialize`` makes loc and scale the means and standard deviations of the training data; they are saved with the
    model, and log p(x) is in the units of x.

    Args:
        head: a likelihood of real entries, such as ``Gaussian(3)``, whose distribution is one of independent entries.
        features: F of sequences ``(T, F)``: each has one loc and one scale, for all steps; None: each entry its own.

    Raises:
        ValueError: if the head is no density, or ``features`` does not divide its entries.
    """

    loc: Tensor
    scale: Tensor
    is_density = True

    def __init__(self, head: Likelihood, features: int | None = None):
        super().__init__(head.event_size)
        if not head.is_density:
            raise ValueError(f"{type(head).__name__} is no density: whole numbers have no scale")
        check_features(features, head.event_size)
        self.head, self.features = head, features
        self.sizes = head.sizes
        self.register_buffer("loc", torch.zeros(head.event_size))
        self.register_buffer("scale", torch.ones(head.event_size))

    def forward(self, *parameters: Tensor) -> TorchDistribution:
        entries = independent_entries(self.head(*parameters), self.head)
        return cast(TorchDistribution, distributions.Scaled(entries, self.loc, self.scale).to_event(1))

    def initialize(self, x: Tensor) -> None:
        """Take location and scale from ``x``, shape ``(N, X)``; a column of one value keeps its own unit."""
        values = x if self.features is None else x.reshape(-1, self.features)
        scale = values.std(0) if len(values) > 1 else torch.zeros_like(values[0])
        repeats = self.event_size // len(scale)
        self.loc.copy_(values.mean(0).repeat(repeats))
        self.scale.copy_(torch.where(scale > 0, scale, 1.0).repeat(repeats))
        self.head.initialize((x - self.loc) / self.scale)

    def marginal(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """That of the head, in its unit."""
        return self.head.marginal((x - self.loc) / self.scale)


class Mixed(Likelihood):
    """Heads side by side, each for columns of its own: log p(x) is the sum of theirs.

    It is a density where any of them is one. A column whose entry was not seen counts for nothing, see
    :class:`pyro_vae.VAE`.

    Args:
        heads: likelihoods whose distributions are of independent entries, as all of this library are.
        columns: which entries of x each head scores, in its order; None: one head after the other. Each of the X
            entries has one head.

    Raises:
        ValueError: if there is no head, or if the columns are not each of 0..X-1 once, as many as the heads score; or
            if a head's log p(x) is no likelihood.

    >>> from pyro_vae.likelihoods import Bernoulli, Categorical, Gaussian
    >>> head = Mixed([Gaussian(2), Bernoulli(1), Categorical(1, levels=3)], columns=[[0, 3], [1], [2]])
    >>> head.sizes
    (2, 1, 3)
    >>> made = head(torch.zeros(2), torch.zeros(1), torch.zeros(3))
    >>> round(made.log_prob(torch.tensor([0.0, 1.0, 2.0, 0.0])).exp().item(), 2)
    0.66
    """

    _order: Tensor
    _fillers: Tensor

    def __init__(self, heads: Sequence[Likelihood], columns: Sequence[Sequence[int]] | None = None):
        super().__init__(sum(head.event_size for head in heads) or 1)
        if not heads:
            raise ValueError("Mixed needs at least one head")
        for head in heads:
            if head.is_density is None:
                raise ValueError(f"{type(head).__name__} scores what is no likelihood: it has no place beside others")
        self.heads = nn.ModuleList(heads)
        self.sizes = tuple(size for head in heads for size in head.sizes)
        self.is_density = any(head.is_density for head in heads)
        flat = list(range(self.event_size))
        if columns is not None:
            _check_columns(heads, columns)
            flat = [int(column) for each in columns for column in each]
        order = torch.tensor(flat)
        self.register_buffer("_order", order, persistent=False)
        fillers = torch.cat([torch.as_tensor(head.filler).float().expand(head.event_size) for head in heads])
        self.register_buffer("_fillers", fillers[order.argsort()], persistent=False)

    @property
    def filler(self) -> Tensor:
        """A value in the support of each entry, shape ``(X,)``."""
        return self._fillers

    def forward(self, *parameters: Tensor) -> TorchDistribution:
        parts, first = [], 0
        for head in cast(Sequence[Likelihood], self.heads):
            mine = parameters[first : first + len(head.sizes)]
            parts.append(independent_entries(head(*mine), head))
            first += len(head.sizes)
        return cast(TorchDistribution, distributions.Columns(parts, self._order).to_event(1))

    def initialize(self, x: Tensor) -> None:
        for head, part in self._split(x):
            head.initialize(part)

    def marginal(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of each head; zeros of one that knows none."""
        outputs: list[Tensor] = []
        for head, part in self._split(x):
            found = head.marginal(part)
            outputs += [x.new_zeros(size) for size in head.sizes] if found is None else found
        return tuple(outputs)

    def _split(self, x: Tensor) -> list[tuple[Likelihood, Tensor]]:
        heads = cast(Sequence[Likelihood], self.heads)
        parts = x[..., self._order].split([head.event_size for head in heads], -1)
        return list(zip(heads, parts, strict=True))


def _check_columns(heads: Sequence[Likelihood], columns: Sequence[Sequence[int]]) -> None:
    if len(columns) != len(heads):
        raise ValueError(f"columns must be one list for each of {len(heads)} heads, got {len(columns)}")
    for head, each in zip(heads, columns, strict=True):
        if len(each) != head.event_size:
            raise ValueError(f"{type(head).__name__} scores {head.event_size} entries, but columns gives {list(each)}")
    flat, wanted = sorted(int(c) for each in columns for c in each), list(range(sum(h.event_size for h in heads)))
    if flat != wanted:
        raise ValueError(f"columns must name each entry 0..{wanted[-1]} once, got {[list(each) for each in columns]}")
