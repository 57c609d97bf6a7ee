"""Kullback-Leibler divergences of the latent sites of two programs, in closed form or by draws."""

from collections.abc import Iterator
from typing import Any

import torch
from pyro import distributions as dist
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae.errors import ContractError
from pyro_vae.infer.programs import Traces, sample_sites, site_of


def divergences(both: Traces, kl: str, by_dimension: bool = False) -> Iterator[Tensor]:
    """KL(q || p) of each latent site, ``(K, B)``, or an estimate; by number if both factorize, and asked."""
    for name in sample_sites(both.guide):
        site, prior = site_of(both.guide, name), site_of(both.model, name)
        q, p = site["fn"], prior["fn"]
        if by_dimension and (parts := _of_numbers(q)) and (others := _of_numbers(p)):
            q, p = parts, others
        if kl == "analytic":
            try:
                closed = _divergence(q, p).expand(*site["log_prob"].shape, *q.batch_shape[2:])
            except NotImplementedError as error:
                raise ContractError(
                    f"torch has no closed form of the KL divergence from {_name(q)} to {_name(p)} at site '{name}': "
                    'take kl="sampled"'
                ) from error
            yield _masked(closed, site)
        elif q is site["fn"]:
            yield site["log_prob"] - prior["log_prob"]
        else:
            yield _masked(q.log_prob(site["value"]) - p.log_prob(site["value"]), site)


def _masked(kl: Tensor, site: dict[str, Any]) -> Tensor:
    """``(K, B)`` or ``(K, B, *event_shape)``, zero where the site is masked."""
    mask = site["mask"]
    if isinstance(mask, Tensor):
        mask = mask.view(*mask.shape, *[1] * (kl.dim() - 2))
    return scale_and_mask(kl, mask=mask)


def _divergence(q: dist.TorchDistribution, p: dist.TorchDistribution) -> Tensor:
    """KL(q || p) in closed form; torch knows more of them for normal distributions with covariances than without."""
    parts, others = _factors(q), _factors(p)
    if (parts is None) != (others is None):
        q, p = (_with_covariance(made, each) for made, each in ((q, parts), (p, others)))
    return kl_divergence(q, p)


def _with_covariance(made: dist.TorchDistribution, parts: dist.TorchDistribution | None) -> dist.TorchDistribution:
    if not isinstance(parts, torch.distributions.Normal):
        return made
    return dist.MultivariateNormal(parts.loc, scale_tril=parts.scale.diag_embed())


def _name(made: dist.TorchDistribution) -> str:
    return type(made if (parts := _factors(made)) is None else parts).__name__


def _factors(made: dist.TorchDistribution) -> dist.TorchDistribution | None:
    """The distribution of each dimension of a vector, if they are independent by construction."""
    if isinstance(made, torch.distributions.Independent) and made.event_dim == made.reinterpreted_batch_ndims == 1:
        return made.base_dist
    return None


def _of_numbers(made: dist.TorchDistribution) -> dist.TorchDistribution | None:
    """The distribution of each number of an event of any shape, if they are independent by construction."""
    base = made
    while isinstance(base, torch.distributions.Independent):
        base = base.base_dist
    return base if made.event_shape and not base.event_shape else None
