"""The variational autoencoder as a Pyro program: a model, a guide, and the three parts they are made of."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_vae.errors import ContractError, check_at_least_one
from pyro_vae.parts.conditional import Conditional, check_made, num_outputs
from pyro_vae.parts.likelihoods import Likelihood
from pyro_vae.parts.missing import of_seen
from pyro_vae.parts.posteriors import Posterior
from pyro_vae.parts.priors import Prior
from pyro_vae.parts.wiring import beside, encoded, initialize_prior, into_support_of, mean_of, scored

__all__ = ["VAE", "Conditional", "ConditionalVAE", "TwoLayerVAE", "num_outputs"]


class VAE(nn.Module):
    """A variational autoencoder (Kingma & Welling 2014; Rezende, Mohamed & Wierstra 2014).

    ``model`` and ``guide`` are ordinary Pyro programs over a batch of flat observations, with one plate ``"data"``
    and the sites ``"z"`` and ``"x"``:

        p(x, z) = prior(z) likelihood(x | z)        q(z | x) = posterior(z | x)

    Where the prior's support is not the whole space, the guide maps the posterior into it.

    Both take booleans ``seen``, shape ``(B, X)``, beside the observations: what is false there was not seen, and counts
    for nothing; the encoder sees zeros instead. With an encoder that is :class:`pyro_vae.Incomplete`, NaN was not seen
    either. log p(x) and every bound are of what was seen then (Mattei & Frellsen 2019: IWAE is MIWAE).

    ``prior``, ``likelihood`` and ``posterior`` can be replaced at any time; nothing of them is remembered. An optimizer
    or a :class:`pyro_vae.CompiledSVI` made before trains the parts it was made with: make a new one.

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

    def __init__(self, prior: Prior, likelihood: Conditional[Likelihood], posterior: Conditional[Posterior]):
        super().__init__()
        _check_latent_dims(
            prior=prior.latent_dim, posterior=posterior.latent_dim, decoder=likelihood.network.in_features
        )
        _check_pixels(posterior, likelihood)
        self.prior = prior
        self.likelihood = likelihood
        self.posterior = posterior

    def _prior(self) -> dist.TorchDistribution:
        return check_made(self.prior, self.prior(self.posterior), (), self.prior.latent_dim)

    def model(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """p(x, z) for observations ``x``, and what was ``seen`` of them, shape ``(B, X)``."""
        x, seen = scored(x, seen, self.posterior, self.likelihood)
        with pyro.plate("data", x.shape[0], dim=-1, device=x.device):  # pyright: ignore[reportArgumentType]
            z = pyro.sample("z", self._prior())
            return pyro.sample("x", of_seen(self.likelihood(z), seen, self.likelihood.head), obs=x)

    def guide(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """q(z | x) for observations ``x``, and what was ``seen`` of them, shape ``(B, X)``."""
        x = encoded(x, seen, self.posterior, self.likelihood.head.event_size)
        with pyro.plate("data", x.shape[0], dim=-1, device=x.device):  # pyright: ignore[reportArgumentType]
            return pyro.sample("z", into_support_of(self.posterior(x), self.prior, self._prior))

    def initialize(self, x: Tensor) -> None:
        """Start every part from training images ``x``, shape ``(N, X)``. Call once, before making the optimizer."""
        self.posterior.initialize(x, self.likelihood.head)
        self.likelihood.initialize(x)
        initialize_prior(self.prior, x, self.posterior)


class TwoLayerVAE(nn.Module):
    """A VAE with two stochastic layers: z2 -> z1 -> x, inferred as x -> z1 -> z2 (Burda et al. 2016, section 5).

        p(x, z1, z2) = prior(z2) latent(z1 | z2) likelihood(x | z1)
        q(z1, z2 | x) = posterior(z1 | x) top_posterior(z2 | z1)

    A prior that asks for q(z2 | x), as the VampPrior does, is given top_posterior(z2 | E[z1 | x]).

    Args:
        prior: p(z2).
        latent: p(z1 | z2), a network with a posterior's head.
        likelihood: p(x | z1), the decoder and its head.
        posterior: q(z1 | x), the encoder and its head.
        top_posterior: q(z2 | z1), a network with a posterior's head.

    Raises:
        ValueError: if the parts disagree about the number of latent dimensions or of pixels.
    """

    def __init__(
        self,
        prior: Prior,
        latent: Conditional[Posterior],
        likelihood: Conditional[Likelihood],
        posterior: Conditional[Posterior],
        top_posterior: Conditional[Posterior],
    ):
        super().__init__()
        _check_latent_dims(
            prior=prior.latent_dim, top_posterior=top_posterior.latent_dim, latent=latent.network.in_features
        )
        _check_latent_dims(
            latent=latent.latent_dim,
            posterior=posterior.latent_dim,
            decoder=likelihood.network.in_features,
            top_posterior=top_posterior.network.in_features,
        )
        _check_pixels(posterior, likelihood)
        self.prior = prior
        self.latent = latent
        self.likelihood = likelihood
        self.posterior = posterior
        self.top_posterior = top_posterior

    def _prior(self) -> dist.TorchDistribution:
        made = self.prior(lambda x: self.top_posterior(mean_of(self.posterior(x))))
        return check_made(self.prior, made, (), self.prior.latent_dim)

    def model(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """p(x, z1, z2) for observations ``x``, and what was ``seen`` of them, shape ``(B, X)``."""
        x, seen = scored(x, seen, self.posterior, self.likelihood)
        with pyro.plate("data", x.shape[0], dim=-1, device=x.device):  # pyright: ignore[reportArgumentType]
            z2 = pyro.sample("z2", self._prior())
            z1 = pyro.sample("z1", self.latent(z2))
            return pyro.sample("x", of_seen(self.likelihood(z1), seen, self.likelihood.head), obs=x)

    def guide(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """q(z1, z2 | x) for observations ``x``, and what was ``seen`` of them, shape ``(B, X)``."""
        x = encoded(x, seen, self.posterior, self.likelihood.head.event_size)
        with pyro.plate("data", x.shape[0], dim=-1, device=x.device):  # pyright: ignore[reportArgumentType]
            z1 = pyro.sample("z1", self.posterior(x))
            return pyro.sample("z2", into_support_of(self.top_posterior(z1), self.prior, self._prior))

    def initialize(self, x: Tensor) -> None:
        """Start every part from training images ``x``, shape ``(N, X)``. Call once, before making the optimizer."""
        self.posterior.initialize(x, self.likelihood.head)
        self.likelihood.initialize(x)
        initialize_prior(self.prior, x, self.posterior)


class ConditionalVAE(nn.Module):
    """A VAE of x given a condition c, such as a label or columns of a table (Sohn, Lee & Yan 2015).

        p(x, z | c) = prior(z | c) likelihood(x | z, c)        q(z | x, c) = posterior(z | x, c)

    Each part may see c, or not: the decoder does if its network reads D + C features, z first; the encoder if it reads
    X + C, x first; the prior if it is a ``Conditional`` of C features with a posterior's head. Missing values are those
    of a :class:`VAE`; c is known.

    Args:
        prior: p(z), or p(z | c).
        likelihood: p(x | z), or p(x | z, c).
        posterior: q(z | x), or q(z | x, c).
        condition_dim: C, numbers of one condition: the classes, if c is one of them as 0 and 1.

    Raises:
        ValueError: if the parts disagree about the number of latent dimensions, or a network reads a number of features
            that fits neither with c nor without, or if no part sees c.

    >>> from pyro_vae import MLP, Bernoulli, MeanField, StandardNormal
    >>> vae = ConditionalVAE(
    ...     StandardNormal(2),
    ...     likelihood=Conditional(MLP(2 + 10, 784), Bernoulli(784)),
    ...     posterior=Conditional(MLP(784, 4), MeanField(2)),
    ...     condition_dim=10,
    ... )
    >>> vae.guide(torch.zeros(3, 784), torch.eye(10)[:3]).shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        prior: Prior | Conditional[Posterior],
        likelihood: Conditional[Likelihood],
        posterior: Conditional[Posterior],
        condition_dim: int,
    ):
        super().__init__()
        check_at_least_one(condition_dim=condition_dim)
        _check_latent_dims(prior=prior.latent_dim, posterior=posterior.latent_dim)
        self.condition_dim = condition_dim
        self.decoder_sees = _sees("decoder", likelihood, posterior.latent_dim, condition_dim)
        self.encoder_sees = _sees("encoder", posterior, likelihood.head.event_size, condition_dim)
        self.prior_sees = isinstance(prior, Conditional) and _sees("prior", prior, 0, condition_dim)
        if not (self.decoder_sees or self.encoder_sees or self.prior_sees):
            raise ValueError(f"no part reads the {condition_dim} numbers of the condition beside its own")
        self.prior = prior
        self.likelihood = likelihood
        self.posterior = posterior

    def model(self, x: Tensor, c: Tensor, seen: Tensor | None = None) -> Tensor:
        """p(x, z | c) for observations ``x``, shape ``(B, X)``, and conditions ``c``, shape ``(B, C)``."""
        self._check(x, c)
        x, seen = scored(x, seen, self.posterior, self.likelihood)
        with pyro.plate("data", x.shape[0], dim=-1, device=x.device):  # pyright: ignore[reportArgumentType]
            z = pyro.sample("z", self.prior_given(c))
            return pyro.sample("x", of_seen(self.likelihood_given(z, c), seen, self.likelihood.head), obs=x)

    def guide(self, x: Tensor, c: Tensor, seen: Tensor | None = None) -> Tensor:
        """q(z | x, c) for observations ``x``, shape ``(B, X)``, and conditions ``c``, shape ``(B, C)``."""
        self._check(x, c)
        x = encoded(x, seen, self.posterior, self.likelihood.head.event_size)
        with pyro.plate("data", x.shape[0], dim=-1, device=x.device):  # pyright: ignore[reportArgumentType]
            return pyro.sample("z", self.posterior_given(x, c))

    def sample(self, c: Tensor) -> Tensor:
        """One draw of x for each condition: ``(*, C) -> (*, X)``."""
        if not isinstance(c, Tensor) or c.shape[-1:] != (self.condition_dim,):
            shape = f"of shape {tuple(c.shape)}" if isinstance(c, Tensor) else f"a {type(c).__name__}"
            raise ContractError(f"the condition must be a tensor of shape (*, {self.condition_dim}), it is {shape}")
        with torch.no_grad():
            prior = self.prior_given(c)
            z = prior.sample() if self.prior_sees else prior.sample(c.shape[:-1])
            return self.likelihood_given(z, c).sample()

    def initialize(self, x: Tensor, c: Tensor) -> None:
        """Start every part from training data, ``(N, X)`` and ``(N, C)``. Call once, before making the optimizer."""
        self.posterior.initialize(x, self.likelihood.head, c if self.encoder_sees else None)
        self.likelihood.initialize(x)
        if isinstance(self.prior, Prior):
            initialize_prior(self.prior, x, self.posterior)
        else:
            self.prior.initialize(c)

    def likelihood_given(self, z: Tensor, c: Tensor) -> dist.TorchDistribution:
        """p(x | z, c), ``(*, D)`` and ``(*, C)``, whose batch shapes broadcast."""
        return self.likelihood(beside(z, c) if self.decoder_sees else z)

    def posterior_given(self, x: Tensor, c: Tensor) -> dist.TorchDistribution:
        """q(z | x, c), ``(*, X)`` and ``(*, C)``, whose batch shapes broadcast."""
        made = self.posterior(beside(x, c) if self.encoder_sees else x)
        return into_support_of(made, self.prior, lambda: self.prior_given(c)) if isinstance(self.prior, Prior) else made

    def prior_given(self, c: Tensor) -> dist.TorchDistribution:
        """p(z | c), of conditions ``(*, C)``; without batch shape, where it does not see them."""
        if not isinstance(self.prior, Prior):
            return self.prior(c)
        made = self.prior(_without_condition if self.encoder_sees else self.posterior)
        return check_made(self.prior, made, (), self.prior.latent_dim)

    def _check(self, x: Tensor, c: Tensor) -> None:
        size = x.shape[0]  # len(x) would fix it, where programs of any number of data are traced
        if c.shape != (size, self.condition_dim):
            raise ContractError(
                f"the condition of {size} observations must be of shape {(size, self.condition_dim)}, it is of "
                f"{tuple(c.shape)}"
            )


def _sees(name: str, part: Conditional, own: int, condition_dim: int) -> bool:
    """Whether a network reads the condition after ``own`` features."""
    read = part.network.in_features
    if read not in (own, own + condition_dim):
        raise ValueError(f"the {name} reads {read} features, it must be {own}, or {own + condition_dim} to see c")
    return read != own


def _without_condition(x: Tensor) -> dist.TorchDistribution:
    raise ContractError(
        "a prior made of posteriors, such as the VampPrior, takes q(z | x), but this encoder sees a condition too: "
        "choose another prior, or an encoder that reads x alone"
    )


def _check_latent_dims(**dims: int) -> None:
    if len(set(dims.values())) > 1:
        found = ", ".join(f"{name} {dim}" for name, dim in dims.items())
        raise ValueError(f"the parts disagree about the number of latent dimensions: {found}")


def _check_pixels(posterior: Conditional[Posterior], likelihood: Conditional[Likelihood]) -> None:
    read, scored = posterior.network.in_features, likelihood.head.event_size
    if read != scored:
        raise ValueError(f"the encoder reads {read} pixels, the likelihood scores {scored}")
