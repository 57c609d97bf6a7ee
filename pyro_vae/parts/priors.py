"""Priors p(z)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn

from pyro_vae.parts.distributions import FlowDistribution, make_flow
from pyro_vae.parts.inputs import Inputs

PosteriorMap = Callable[[Tensor], TorchDistribution]
"""Maps observations ``(*, X)`` to q(z | x), batch shape ``(*)``."""


class Prior(nn.Module, ABC):
    """A distribution over the latent variable.

    ``forward(posterior)`` returns a Pyro distribution with batch shape ``()`` and event shape ``(latent_dim,)``.
    ``posterior`` maps observations ``(*, X)`` to the distribution q(z | x); most priors ignore it.

    Args:
        latent_dim: number D of latent dimensions, at least 1.

    Raises:
        ValueError: if ``latent_dim`` is below 1.
    """

    def __init__(self, latent_dim: int):
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {latent_dim}")
        self.latent_dim = latent_dim

    @abstractmethod
    def forward(self, posterior: PosteriorMap | None = None) -> TorchDistribution:
        """The prior distribution."""

    def support(self, posterior: TorchDistribution) -> constraints.Constraint | None:
        """The support of z, if it is known without making the distribution, which the guide else does to ask it.

        ``posterior`` is a q(z | x) that is at hand. Override where ``forward`` is costly. Default: ``None``.
        """
        return None

    def initialize(self, x: Tensor) -> None:
        """Start from training images ``x``, shape ``(N, X)``; called once before the optimizer is made."""


class StandardNormal(Prior):
    """p(z) = N(0, I).

    Args:
        latent_dim: number D of latent dimensions.

    >>> round(StandardNormal(2)().log_prob(torch.zeros(2)).item(), 4)
    -1.8379
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, latent_dim: int):
        super().__init__(latent_dim)
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(latent_dim), persistent=False)

    def forward(self, posterior: PosteriorMap | None = None) -> TorchDistribution:
        return dist.Normal(self.loc, self.scale).to_event(1)


class DiagonalNormal(Prior):
    """A normal distribution with learned mean and diagonal covariance; it starts as the standard normal.

    Args:
        latent_dim: number D of latent dimensions.
    """

    def __init__(self, latent_dim: int):
        super().__init__(latent_dim)
        self.loc = nn.Parameter(torch.zeros(latent_dim))
        self.log_scale = nn.Parameter(torch.zeros(latent_dim))

    def forward(self, posterior: PosteriorMap | None = None) -> TorchDistribution:
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)


class GaussianMixture(Prior):
    """A mixture of normals with learned weights, means and diagonal covariances.

    The means start about 2 standard deviations from the origin, whatever D: further out, components find no data.

    Args:
        latent_dim: number D of latent dimensions.
        components: normal distributions in the mixture, at least 1.

    Raises:
        ValueError: if ``components`` is below 1.
    """

    def __init__(self, latent_dim: int, components: int = 10):
        super().__init__(latent_dim)
        if components < 1:
            raise ValueError(f"components must be at least 1, got {components}")
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(2 / math.sqrt(latent_dim) * torch.randn(components, latent_dim))
        self.log_scale = nn.Parameter(torch.zeros(components, latent_dim))

    def forward(self, posterior: PosteriorMap | None = None) -> TorchDistribution:
        normals = dist.Normal(self.loc, self.log_scale.exp()).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), normals)


class VampPrior(Prior):
    """The variational mixture of posteriors, 1/C sum_c q(z | u_c), for C pseudo-inputs u_c (Tomczak & Welling 2018).

    The encoder is that of the guide. Pseudo-inputs start as training images; ``initialize`` must be called once, or
    trained weights loaded. Learned ones are kept as the encoder sees them, standardized.

    Args:
        latent_dim: number D of latent dimensions.
        components: pseudo-inputs, at least 1; the paper has 500, which cost as much as 500 images more per step.
        learned: train the pseudo-inputs, kept in the range of the training data; otherwise they stay the training
            images that they start as.

    Raises:
        ValueError: if ``components`` is below 1, or exceeds the number of training images.
        RuntimeError: by ``forward``, if there are no pseudo-inputs yet.
    """

    logits: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, latent_dim: int, components: int = 100, learned: bool = True):
        super().__init__(latent_dim)
        if components < 1:
            raise ValueError(f"components must be at least 1, got {components}")
        self.components = components
        self.pseudo_inputs = nn.Parameter(torch.empty(components, 0), requires_grad=learned)
        self.inputs = Inputs(1)
        self.register_buffer("logits", torch.zeros(components), persistent=False)
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.ones(()))

    def initialize(self, x: Tensor) -> None:
        if self.components > len(x):
            raise ValueError(f"components is {self.components}, but there are only {len(x)} training images")
        chosen = torch.randperm(len(x), device=x.device)[: self.components]
        if not self.pseudo_inputs.requires_grad:
            self.inputs = Inputs(1).to(x.device)  # untouched
        seen = self.inputs(x)
        if seen.min() < 0 or seen.max() > 1:
            self.low, self.high = seen.amin(0), seen.amax(0)
        # a learned input in the interior of the range has a gradient
        margin = 0.05 * (self.high - self.low) if self.pseudo_inputs.requires_grad else 0.0
        self.pseudo_inputs.data = seen[chosen].clamp(self.low + margin, self.high - margin)

    def forward(self, posterior: PosteriorMap | None = None) -> TorchDistribution:
        if not self.pseudo_inputs.numel():
            raise RuntimeError("VampPrior has no pseudo-inputs yet: call initialize(x) with training images")
        if posterior is None:
            raise TypeError(
                "VampPrior is made of posteriors: give its forward the map from observations to q(z | x), as in "
                "prior(vae.posterior)"
            )
        shown = self.inputs.inverse(self.pseudo_inputs.clamp(self.low, self.high))
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), posterior(shown))

    def support(self, posterior: TorchDistribution) -> constraints.Constraint | None:
        """That of the posteriors, of which it is a mixture."""
        return posterior.support

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        if (saved := state_dict.get(prefix + "pseudo_inputs")) is not None:
            self.pseudo_inputs.data = self.pseudo_inputs.new_empty(saved.shape)
        for name, usual in (("low", 0.0), ("high", 1.0)):  # which earlier versions had for all data
            saved = state_dict.setdefault(prefix + name, getattr(self, name).new_tensor(usual))
            setattr(self, name, getattr(self, name).new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class Flow(Prior):
    """A normalizing flow of zuko: a standard normal through learned invertible maps.

    Args:
        latent_dim: number D of latent dimensions, at least 2.
        architecture: autoregressive (Papamakarios et al. 2017) is scored in one pass and sampled in D; coupling
            (Dinh et al. 2017) does both in one.
        transform: of one dimension: affine, or a monotonic rational-quadratic spline (Durkan et al. 2019).
        transforms: invertible maps one after the other, at least 1.
        hidden: width of each hidden layer of the networks inside.

    Raises:
        ValueError: if ``latent_dim`` is below 2 or ``transforms`` below 1.
    """

    def __init__(
        self,
        latent_dim: int,
        architecture: Literal["autoregressive", "coupling"] = "autoregressive",
        transform: Literal["affine", "spline"] = "affine",
        transforms: int = 3,
        hidden: Sequence[int] = (64, 64),
    ):
        super().__init__(latent_dim)
        self.flow = make_flow(latent_dim, 0, architecture, transform, transforms, hidden)

    def forward(self, posterior: PosteriorMap | None = None) -> TorchDistribution:
        return FlowDistribution(self.flow, self.latent_dim)


class Laplace(Prior):
    """Independent Laplace latents of mean 0 and variance 1.

    Args:
        latent_dim: number D of latent dimensions.
    """

    loc: Tensor

    def __init__(self, latent_dim: int):
        super().__init__(latent_dim)
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)

    def forward(self, posterior: PosteriorMap | None = None) -> TorchDistribution:
        return dist.Laplace(self.loc, math.sqrt(0.5)).to_event(1)


class StudentT(Prior):
    """Independent Student-t latents of mean 0 and scale 1.

    Args:
        latent_dim: number D of latent dimensions.
        df: degrees of freedom, positive.

    Raises:
        ValueError: if ``df`` is not positive.
    """

    loc: Tensor

    def __init__(self, latent_dim: int, df: float = 5.0):
        super().__init__(latent_dim)
        if not 0 < df < math.inf:
            raise ValueError(f"df must be positive and finite, got {df}")
        self.df = df
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)

    def forward(self, posterior: PosteriorMap | None = None) -> TorchDistribution:
        return dist.StudentT(self.loc.new_tensor(self.df), self.loc, self.loc.new_tensor(1.0)).to_event(1)


class Uniform(Prior):
    """Latents uniform between two bounds; the guide maps the posterior into them.

    Args:
        latent_dim: number D of latent dimensions.
        low: lower bound.
        high: upper bound, above ``low``.

    Raises:
        ValueError: if the bounds are not finite and in order.
    """

    low: Tensor
    high: Tensor

    def __init__(self, latent_dim: int, low: float = -1.0, high: float = 1.0):
        super().__init__(latent_dim)
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"low must be below high, both finite, got {low} and {high}")
        self.register_buffer("low", torch.full((latent_dim,), low), persistent=False)
        self.register_buffer("high", torch.full((latent_dim,), high), persistent=False)

    def forward(self, posterior: PosteriorMap | None = None) -> TorchDistribution:
        return dist.Uniform(self.low, self.high).to_event(1)
