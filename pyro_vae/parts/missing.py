"""Entries that nobody saw: what an encoder sees of them, and likelihoods that score the others."""

from typing import Any, cast

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from pyro_vae.errors import ContractError
from pyro_vae.parts.networks import Network
from pyro_vae.parts.pixels import Autoregressive


class Incomplete(Network):
    """An encoder of data with gaps: entries that are NaN were not seen.

    Entries are standardized, by means and standard deviations of what was seen of the training data (``initialize``;
    saved with the model); those not seen are zero then, the mean (Mattei & Frellsen 2019, section 3.1). A VAE with such
    an encoder takes NaN for what nobody saw.

    Args:
        network: maps ``(*, in_features)`` to the raw outputs, with ``event_size`` more inputs if it is given the mask.
        event_size: number X of entries, which are the first features; conditions after them pass as they are.
        mask: append for each entry 1 if it was seen, 0 if not.
        features: F of sequences ``(T, F)``: each has one mean and one standard deviation, for all steps, of which some
            may hardly ever be seen; None: each entry its own.

    Raises:
        ValueError: if the network has not inputs enough, or ``features`` does not divide the entries.

    >>> from pyro_vae import MLP
    >>> encoder = Incomplete(MLP(6, 4), event_size=3)
    >>> encoder(torch.tensor([[0.5, float("nan"), 1.0]])).shape
    torch.Size([1, 4])
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, network: Network, event_size: int, mask: bool = True, features: int | None = None):
        inputs = network.in_features - event_size if mask else network.in_features
        if inputs < event_size:
            told = f"{event_size} entries and as many of the mask" if mask else f"{event_size} entries"
            raise ValueError(f"{type(network).__name__} reads {network.in_features} features, it needs {told}")
        check_features(features, event_size)
        super().__init__(inputs, network.out_features)
        self.network, self.event_size, self.mask, self.features = network, event_size, mask, features
        self.register_buffer("loc", torch.zeros(event_size))
        self.register_buffer("scale", torch.ones(event_size))

    def forward(self, features: Tensor) -> Tensor:
        x, others = features[..., : self.event_size], features[..., self.event_size :]
        seen = ~x.isnan()
        shown = torch.where(seen, (x - self.loc) / self.scale, 0.0)
        return self.network(torch.cat([shown, *([seen.to(shown)] if self.mask else []), others], -1))

    def initialize(self, x: Tensor) -> None:
        """Take means and standard deviations from what was seen of ``x``, shape ``(N, X)``."""
        x = x if self.features is None else x.reshape(-1, self.features)
        seen = ~x.isnan()
        count = seen.sum(0).clamp(min=1)
        mean = torch.where(seen, x, 0.0).sum(0) / count
        scale = (torch.where(seen, x - mean, 0.0).square().sum(0) / count).sqrt()
        repeats = self.event_size // len(mean)
        self.loc.copy_(mean.repeat(repeats))
        self.scale.copy_(torch.where(scale > 0, scale, 1.0).repeat(repeats))

    def start_at(self, output: Tensor) -> None:
        self.network.start_at(output)

    def shrink(self, factor: float) -> None:
        self.network.shrink(factor)


def check_features(features: int | None, event_size: int) -> None:
    """Refuse a number of features that does not divide the entries of a sequence.

    Raises:
        ValueError: saying so.
    """
    if features is not None and (features < 1 or event_size % features):
        raise ValueError(f"features must divide the {event_size} entries, got {features}")


def check_flat(x: Tensor, size: int) -> None:
    """Refuse observations that are not ``(B, size)``, of real numbers.

    Raises:
        ContractError: which says what would do.
    """
    if x.dim() != 2 or x.shape[1] != size or not x.is_floating_point():
        flat = x.dim() > 1 and x[:1].numel() == size
        mend = ": x.flatten(1).float() is, and pyro_vae.training.FlatBatches(loader) for a loader" if flat else ""
        raise ContractError(
            f"observations must be real numbers of shape (B, {size}), these are {x.dtype} of shape "
            f"{tuple(x.shape)}{mend}"
        )


def check_seen(x: Tensor, seen: Tensor) -> Tensor:
    """Refuse a mask that is not one of ``x``.

    Raises:
        ContractError: if it is not boolean or of another shape.
    """
    if seen.dtype != torch.bool or seen.shape != x.shape:
        raise ContractError(
            f"seen must be booleans of the observations' shape {tuple(x.shape)}, true for what was seen; it is of "
            f"{seen.dtype} and shape {tuple(seen.shape)}: labels of a loader are dropped by "
            "pyro_vae.training.FlatBatches(loader)"
        )
    return seen


def without_gaps(x: Tensor) -> Tensor:
    """``x``, shape ``(N, X)``, with what each column has seen in turn in place of its NaN: for statistics of columns.

    A column that nobody has seen stays as it is.
    """
    missing = x.isnan()
    if not missing.any():
        return x
    x = x.clone()
    for column in missing.any(0).nonzero().squeeze(1).tolist():
        known = x[~missing[:, column], column]
        if len(known):
            places = torch.arange(int(missing[:, column].sum()), device=x.device) % len(known)
            x[missing[:, column], column] = known[places]
    return x


def independent_entries(made: Any, part: nn.Module) -> TorchDistribution:
    """The distribution of each entry by itself, batch shape ``(*, X)``, of one of independent entries.

    Raises:
        ContractError: if it is of another kind.
    """
    if isinstance(made, dist.Independent) and made.reinterpreted_batch_ndims == 1 and not made.base_dist.event_shape:
        return cast(TorchDistribution, made.base_dist)
    if isinstance(made, Autoregressive):
        raise ContractError(
            f"{type(part).__name__}: log p of some entries has no formula where each depends on those before it: "
            "choose a likelihood of independent entries, such as Bernoulli, for data of which not all was seen"
        )
    raise ContractError(
        f"{type(part).__name__} makes a {type(made).__name__}, whose entries cannot be scored one by one, as missing "
        "values and columns of several kinds need: let it end in .to_event(1)"
    )


def of_seen(made: TorchDistribution, seen: Tensor | None, part: nn.Module) -> TorchDistribution:
    """The distribution in which only entries count that were seen, booleans ``(B, X)``; None: all."""
    if seen is None:
        return made
    return cast(TorchDistribution, independent_entries(made, part).mask(seen).to_event(1))
