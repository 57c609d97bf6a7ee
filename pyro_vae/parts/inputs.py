"""What an encoder sees of an observation: its input standardized, as a part of the saved model."""

from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.infer.programs import evaluating
from pyro_vae.parts.likelihoods import Likelihood
from pyro_vae.parts.mixed import Mixed
from pyro_vae.parts.networks import Network

LEAST = 0.1
"""No entry of counts is taken for less spread than this share of them all: one that is hardly ever seen would jump."""


class Inputs(nn.Module):
    """An affine map of each entry, or of log(1 + entry): from what is stored to what the encoder sees.

    It is the identity until ``initialize``, and in models that earlier versions saved.

    Args:
        size: entries X, and conditions after them, which pass as they are.
    """

    loc: Tensor
    scale: Tensor
    counts: Tensor

    def __init__(self, size: int):
        super().__init__()
        self._take(torch.zeros(size), torch.ones(size), torch.zeros(size, dtype=torch.bool))

    def _take(self, loc: Tensor, scale: Tensor, counts: Tensor) -> None:
        for name, value in (("loc", loc), ("scale", scale), ("counts", counts)):
            self.register_buffer(name, value)
        self._has_counts = bool(counts.any())
        self.is_identity = not self._has_counts and bool((loc == 0).all() and (scale == 1).all())

    def forward(self, x: Tensor) -> Tensor:
        """What the encoder sees of ``x``, shape ``(*, X)``."""
        if self.is_identity:
            return x
        if self._has_counts:
            x = torch.where(self.counts, x.clamp(min=0).log1p(), x)
        return (x - self.loc) / self.scale

    def first(self, x: Tensor) -> Tensor:
        """What the encoder sees of the first entries, ``x`` of shape ``(N, X)``, without the conditions after them."""
        others = len(self.loc) - x.shape[-1]
        return self(torch.nn.functional.pad(x, (0, others)))[..., : x.shape[-1]]

    def inverse(self, seen: Tensor) -> Tensor:
        """The x, shape ``(*, X)``, that is seen so."""
        if self.is_identity:
            return seen
        x = self.loc + self.scale * seen
        # the other branch must be finite for its gradient
        return torch.where(self.counts, torch.where(self.counts, x, 0.0).expm1(), x) if self._has_counts else x

    @property
    def neutral(self) -> Tensor:
        """What the encoder sees as zero: it stands where nothing was seen."""
        return self.inverse(torch.zeros_like(self.loc))

    def initialize(self, x: Tensor, head: Likelihood) -> None:
        """Standardize what the likelihood's head scores, as training data ``x``, shape ``(N, X)``, are.

        Binary and dequantized entries, and all in [0, 1], are seen as they are; whole numbers below a known number of
        levels, divided by the largest; counts, as log(1 + count), and reals, by their mean and standard deviation.
        """
        loc, scale, counts = (value.clone() for value in (self.loc, self.scale, self.counts))
        for part, columns in heads_of(head, torch.arange(x.shape[1], device=x.device)):
            mine = x[:, columns]
            if part.encoding == "integers" and part.levels is not None:
                scale[columns] = max(1.0, part.levels - 1.0)
            elif part.encoding == "integers":
                counts[columns], mine = True, mine.clamp(min=0).log1p()
                loc[columns] = mine.mean(0)
                spread = mine.std(0, correction=0)
                scale[columns] = _positive(spread.clamp(min=LEAST * float(mine.std(correction=0))))
            elif mine.min() < 0 or mine.max() > 1:
                loc[columns], scale[columns] = mine.mean(0), _positive(mine.std(0, correction=0))
        self._take(loc, scale, counts)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = [state_dict.get(prefix + name) for name in ("loc", "scale", "counts")]
        if any(value is None for value in saved):  # of an earlier version
            like, size = self.loc, len(self.loc)
            saved = [like.new_zeros(size), like.new_ones(size), like.new_zeros(size, dtype=torch.bool)]
        loc, scale, counts = (value.to(self.loc.device) for value in saved if value is not None)
        self._take(loc.to(self.loc.dtype), scale.to(self.loc.dtype), counts)
        state_dict |= {prefix + "loc": loc, prefix + "scale": scale, prefix + "counts": counts}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _positive(scale: Tensor) -> Tensor:
    """Scales, with 1 for an entry of one value."""
    return torch.where(scale > 1e-6 * scale.max().clamp(min=1e-6), scale, 1.0)


def heads_of(head: Likelihood, columns: Tensor) -> list[tuple[Likelihood, Tensor]]:
    """The heads that entries have, of which Mixed has several, and their places."""
    if not isinstance(head, Mixed):
        return [(head, columns)]
    heads: list[Any] = list(head.heads)
    parts = columns[head._order].split([part.event_size for part in heads])
    return [found for part, mine in zip(heads, parts, strict=True) for found in heads_of(part, mine)]


def calm(network: Network, sizes: tuple[int, ...], features: Tensor) -> None:
    """Shrink the outputs of an untrained encoder until its second output, the log scale of most posteriors, is
    within +-1 on ``features``, shape ``(N, C)``: so that no start overflows, whatever the data."""
    some = features[:: max(1, len(features) // 5000)]
    with torch.no_grad(), evaluating(network):
        try:
            outputs = network(some).split(sizes, -1)
        except Exception:  # of a network of the user's: a look at the program tells what is wrong, and where
            return
        largest = outputs[min(1, len(outputs) - 1)].abs().max()
        if largest > 0.9 and largest.isfinite():
            network.shrink(float(0.9 / largest))
