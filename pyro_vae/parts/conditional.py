"""A conditional distribution: a network and the head that reads its outputs."""

from typing import Generic, TypeVar, cast

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_vae.errors import ContractError
from pyro_vae.infer.supports import innermost
from pyro_vae.parts.inputs import Inputs, calm
from pyro_vae.parts.likelihoods import Likelihood
from pyro_vae.parts.missing import Incomplete, without_gaps
from pyro_vae.parts.networks import Network
from pyro_vae.parts.posteriors import Posterior

Head = TypeVar("Head", bound=Likelihood | Posterior, covariant=True)


class Conditional(nn.Module, Generic[Head]):
    """A conditional distribution: a network followed by the head that reads its outputs.

    What fits together is checked here, once: to change a part of it, make another one, as in ``vae.likelihood =
    Conditional(MLP(50, 784), Gaussian(784))``, and put it in its place; network and head inside are never replaced.

    Args:
        network: maps the condition ``(*, C)`` to ``(*, sum(head.sizes))``.
        head: a likelihood or a posterior.

    Raises:
        TypeError: if the network is not a ``Network``.
        ValueError: if the network's width is not the sum of the head's sizes.
        ContractError: if the head does not say its sizes; by ``forward``, if the network's output has another shape
            than it promises, or the head returns no Pyro distribution, or one of another batch or event shape,
            or a mass where it says density.
    """

    def __init__(self, network: Network, head: Head):
        super().__init__()
        if not isinstance(network, Network):
            raise TypeError(f"{type(network).__name__} is no pyro_vae.Network: make it a subclass")
        if network.out_features != (wanted := num_outputs(head)):
            raise ValueError(
                f"{type(head).__name__} reads {wanted} numbers ({' + '.join(map(str, head.sizes))}), "
                f"but {type(network).__name__} has {network.out_features} outputs"
            )
        self.network = network
        self.head = head
        self.inputs: Inputs | None = None if isinstance(head, Likelihood) else Inputs(network.in_features)

    @property
    def latent_dim(self) -> int:
        """Dimensions of the head's variable, where that is latent."""
        return cast(Posterior, self.head).latent_dim

    def forward(self, condition: Tensor) -> dist.TorchDistribution:
        """The distribution given ``condition``, shape ``(*, C)``: batch shape ``(*)``."""
        outputs = self.network(condition if self.inputs is None else self.inputs(condition))
        batch = condition.shape[:-1]
        if outputs.shape != (expected := (*batch, self.network.out_features)):
            raise ContractError(
                f"{type(self.network).__name__} must map {tuple(condition.shape)} to {expected}, "
                f"it made {tuple(outputs.shape)}"
            )
        size = cast(Likelihood, self.head).event_size if hasattr(self.head, "event_size") else self.latent_dim
        made = check_made(self.head, self.head(*outputs.split(self.head.sizes, dim=-1)), batch, size)
        if isinstance(self.head, Likelihood) and self.head.is_density is not None:
            is_density = not innermost(made.support).is_discrete
            if is_density != self.head.is_density:
                raise ContractError(
                    f"{type(self.head).__name__} says is_density = {self.head.is_density}, but its log p(x) is a "
                    f"{'density' if is_density else 'mass'}, on {made.support}: set is_density = {is_density}"
                )
        return made

    def initialize(self, x: Tensor, scored: Likelihood | None = None, c: Tensor | None = None) -> None:
        """Start from training data ``x``, shape ``(N, X)``, of which NaN was not seen: the head; the encoder, whose
        input is standardized as suits the likelihood that scores x, and conditions ``c``, shape ``(N, C)``, if it sees
        them, are not; or the decoder at the outputs that suit x."""
        if self.inputs is not None:
            if scored is not None:
                self.inputs.initialize(without_gaps(x), scored)
            # a network that knows of gaps sees NaN in what is standardized; others start from the data as they are
            self.network.initialize(self.inputs.first(x) if isinstance(self.network, Incomplete) else x)
            read = x if c is None else torch.cat([x, c.to(x)], -1)
            if scored is not None and self.network.in_features == read.shape[1]:
                calm(self.network, self.head.sizes, self.inputs(read))
            return
        x, head = without_gaps(x), cast(Likelihood, self.head)
        head.initialize(x)
        if (outputs := head.marginal(x)) is not None:
            self.network.start_at(torch.cat(outputs))


def num_outputs(head: Likelihood | Posterior) -> int:
    """How many raw outputs of a network the head reads.

    Raises:
        ContractError: if it does not say.
    """
    sizes = getattr(head, "sizes", None)
    if not isinstance(sizes, tuple) or not sizes or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise ContractError(
            f"{type(head).__name__} must set self.sizes, a tuple of how many raw outputs each argument of its forward "
            f"takes, it has {sizes}"
        )
    return sum(sizes)


def check_made(part: nn.Module, made: object, batch: tuple[int, ...], size: int) -> dist.TorchDistribution:
    """Refuse what a part made unless it is a Pyro distribution of these shapes; a later error would be less clear."""
    name, kind = type(part).__name__, type(made).__name__
    if not isinstance(made, TorchDistributionMixin):
        raise ContractError(f"{name} must return a distribution of pyro.distributions, it made {kind}")
    made = cast(dist.TorchDistribution, made)
    shapes = tuple(made.batch_shape), tuple(made.event_shape)
    if shapes != (expected := (tuple(batch), (size,))):
        mend = "; add .to_event(1)" if shapes == ((*batch, size), ()) else ""
        raise ContractError(
            f"{name} must return batch shape {expected[0]} and event shape {expected[1]}, "
            f"it made {kind} of {shapes[0]} and {shapes[1]}{mend}"
        )
    return made
