"""What models of this library share: what the encoder is shown, what is scored, how a posterior suits a prior."""

import copy
import math
from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_vae.errors import ContractError
from pyro_vae.infer.supports import innermost, into_support, is_whole_space
from pyro_vae.parts.conditional import Conditional
from pyro_vae.parts.likelihoods import Likelihood
from pyro_vae.parts.missing import Incomplete, check_flat, check_seen, without_gaps
from pyro_vae.parts.posteriors import Posterior
from pyro_vae.parts.priors import Prior, VampPrior


def beside(x: Tensor, c: Tensor) -> Tensor:
    """A condition beside what it belongs to, as a network reads both."""
    batch = torch.broadcast_tensors(x[..., 0], c[..., 0])[0].shape
    return torch.cat([x.expand(*batch, x.shape[-1]), c.to(x).expand(*batch, c.shape[-1])], -1)


def initialize_prior(prior: Prior, x: Tensor, posterior: Conditional[Posterior]) -> None:
    """Start a prior; one that is made of posteriors is told how the encoder sees x."""
    if isinstance(prior, VampPrior) and posterior.inputs is not None:
        prior.inputs = copy.deepcopy(posterior.inputs)
    prior.initialize(without_gaps(x))


def scored(
    x: Tensor, seen: Tensor | None, posterior: Conditional[Posterior], likelihood: Conditional[Likelihood]
) -> tuple[Tensor, Tensor | None]:
    """What the likelihood scores, and which entries of it count, None if all do; the others are possible values."""
    check_flat(x, likelihood.head.event_size)
    if isinstance(posterior.network, Incomplete):
        known = ~x.isnan()
        seen = known if seen is None else check_seen(x, seen) & known
    elif seen is not None:
        check_seen(x, seen)
    return (x, None) if seen is None else (torch.where(seen, x, likelihood.head.filler), seen)


def encoded(x: Tensor, seen: Tensor | None, posterior: Conditional[Posterior], size: int | None = None) -> Tensor:
    """What the encoder is shown: NaN where nothing was seen, if it knows what that means, otherwise zero.

    Others than ``size`` entries are refused."""
    if size is not None:
        check_flat(x, size)
    if seen is None:
        return x
    return torch.where(check_seen(x, seen), x, _unseen(posterior))


def _unseen(posterior: Conditional[Posterior]) -> float | Tensor:
    if isinstance(posterior.network, Incomplete) or posterior.inputs is None:
        return math.nan
    return 0.0 if posterior.inputs.is_identity else posterior.inputs.neutral


def mean_of(posterior: dist.TorchDistribution) -> Tensor:
    """The mean of q(z1 | x); a posterior that has none is refused."""
    try:
        return posterior.mean
    except NotImplementedError as error:
        raise ContractError(
            f"a prior made of posteriors, such as the VampPrior, takes the mean of q(z1 | x), which "
            f"{type(posterior).__name__} has not: choose another prior, or a Gaussian posterior"
        ) from error


def into_support_of(
    posterior: dist.TorchDistribution, prior: Prior, build: Callable[[], dist.TorchDistribution]
) -> dist.TorchDistribution:
    """Map a posterior over the whole space into the prior's support, where that is smaller, by torch's ``biject_to``.

    A posterior that has a support of its own keeps it. The prior is asked each time, since it may be replaced.
    """
    if not is_whole_space(posterior.support):
        return posterior
    support = prior.support(posterior)
    if support is None:
        support = build().support
    if is_whole_space(support):
        return posterior
    if innermost(support).is_discrete:
        raise ContractError(
            f"a posterior over the reals, {type(posterior).__name__}, cannot serve a prior with the discrete "
            f"support {support}: choose a posterior with that support"
        )
    # the transform remembers its last point: its inverse is inexact near the support's boundary
    return dist.TransformedDistribution(posterior, [into_support(support).with_cache(1)])
