"""The variational autoencoder as a Pyro program: a model, a guide, and the three parts they are made of."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.likelihoods import Likelihood
from pyro_vae.networks import ContractError, Network
from pyro_vae.posteriors import Posterior
from pyro_vae.priors import Prior


class Conditional(nn.Module):
    """A conditional distribution: a network followed by the head that reads its outputs.

    Args:
        network: maps the condition ``(*, C)`` to ``(*, sum(head.sizes))``.
        head: a likelihood or a posterior.

    Raises:
        TypeError: if the network is no ``Network``.
        ValueError: if the network's width is not the sum of the head's sizes.
        ContractError: by ``forward``, if the network's output has another width than it declares.
    """

    def __init__(self, network: Network, head: Likelihood | Posterior):
        super().__init__()
        if not isinstance(network, Network):
            raise TypeError(f"{type(network).__name__} is no pyro_vae.Network: make it a subclass")
        if network.out_features != sum(head.sizes):
            raise ValueError(
                f"{type(head).__name__} reads {sum(head.sizes)} numbers ({' + '.join(map(str, head.sizes))}), "
                f"but {type(network).__name__} has {network.out_features} outputs"
            )
        self.network = network
        self.head = head

    def forward(self, condition: Tensor) -> dist.TorchDistribution:
        """The distribution given ``condition``, shape ``(*, C)``: batch shape ``(*)``."""
        outputs = self.network(condition)
        if outputs.shape[-1] != self.network.out_features:
            raise ContractError(
                f"{type(self.network).__name__} promises {self.network.out_features} outputs, not {outputs.shape[-1]}"
            )
        return self.head(*outputs.split(self.head.sizes, dim=-1))

    def initialize(self, x: Tensor) -> None:
        """Start the network at the outputs that suit ``x``, shape ``(N, X)``, where the head knows them."""
        if isinstance(self.head, Likelihood) and (outputs := self.head.marginal(x)) is not None:
            self.network.start_at(torch.cat(outputs))


class VAE(nn.Module):
    """A variational autoencoder (Kingma & Welling 2014; Rezende, Mohamed & Wierstra 2014).

    ``model`` and ``guide`` are ordinary Pyro programs over a batch of flat observations, with one plate ``"data"``
    and the sites ``"z"`` and ``"x"``:

        p(x, z) = prior(z) likelihood(x | z)        q(z | x) = posterior(z | x)

    Args:
        prior: p(z).
        likelihood: p(x | z), the decoder and its head.
        posterior: q(z | x), the encoder and its head.

    Raises:
        ValueError: if the parts disagree about the number of latent dimensions or of pixels.

    >>> from pyro_vae import MLP, Bernoulli, MeanField, StandardNormal
    >>> vae = VAE(
    ...     StandardNormal(50),
    ...     likelihood=Conditional(MLP(50, 784), Bernoulli(784)),
    ...     posterior=Conditional(MLP(784, 100), MeanField(50)),
    ... )
    >>> vae.guide(torch.zeros(3, 784)).shape
    torch.Size([3, 50])
    """

    def __init__(self, prior: Prior, likelihood: Conditional, posterior: Conditional):
        super().__init__()
        latent_dims = (prior.latent_dim, posterior.head.latent_dim, likelihood.network.in_features)
        if len(set(latent_dims)) > 1:
            raise ValueError(
                "prior, posterior and decoder disagree about the number of latent dimensions: "
                f"{latent_dims[0]}, {latent_dims[1]} and {latent_dims[2]}"
            )
        if posterior.network.in_features != likelihood.head.event_size:
            raise ValueError(
                f"the encoder reads {posterior.network.in_features} pixels, "
                f"the likelihood scores {likelihood.head.event_size}"
            )
        self.prior = prior
        self.likelihood = likelihood
        self.posterior = posterior

    def model(self, x: Tensor) -> Tensor:
        """p(x, z) for observations ``x``, shape ``(B, X)``."""
        with pyro.plate("data", x.shape[0], dim=-1, device=x.device):
            z = pyro.sample("z", self.prior(self.posterior))
            return pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x: Tensor) -> Tensor:
        """q(z | x) for observations ``x``, shape ``(B, X)``."""
        with pyro.plate("data", x.shape[0], dim=-1, device=x.device):
            return pyro.sample("z", self.posterior(x))

    def initialize(self, x: Tensor) -> None:
        """Start every part from training images ``x``, shape ``(N, X)``. Call once, before making the optimizer."""
        for part in (self.posterior, self.likelihood, self.prior):
            part.initialize(x)
