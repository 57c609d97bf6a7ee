"""Distributions with a location and a scale of their own, and the variables that are freed of them."""

from typing import Any, cast

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import LowerCholeskyAffine
from torch import Tensor
from torch.distributions import Independent, Transform
from torch.distributions.transforms import AffineTransform, ComposeTransform, ExpTransform

from pyro_vae.infer.supports import without_mask


def own_scale(fn: Any) -> Transform | None:
    """The map from a standardized variable to that of a distribution with a location and a scale; None if it has none.

    A positive variable of a scale has a logarithm with a location.
    """
    fn = base_of(fn)
    if isinstance(fn, dist.MultivariateNormal):
        return _Factors(fn.loc, fn.scale_tril)
    if isinstance(fn, dist.HalfNormal | dist.HalfCauchy):
        return ComposeTransform([ExpTransform(), AffineTransform(0.0, fn.scale)])
    if isinstance(fn, dist.LogNormal):
        return ComposeTransform([AffineTransform(fn.loc, fn.scale), ExpTransform()])
    if isinstance(fn, dist.Normal | dist.StudentT | dist.Cauchy | dist.Laplace):
        return AffineTransform(fn.loc, fn.scale)
    return None


def base_of(fn: Any) -> Any:
    """A distribution without its mask and without the dimensions that are taken for one event."""
    fn = without_mask(fn)
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn


def is_the_same(fns: list[Any], values: list[Tensor]) -> bool:
    """Whether several runs' distributions of a site are one."""
    pairs = ((fn.log_prob(value), fns[0].log_prob(value)) for fn, value in zip(fns, values, strict=True))
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in pairs)


def is_normal(fn: Any) -> bool:
    """Whether the standardized variable of a distribution is N(0, I)."""
    return isinstance(base_of(fn), dist.Normal | dist.MultivariateNormal | dist.LogNormal)


def is_moved(fns: list[Any], like: Tensor) -> bool:
    """Whether several runs' distributions of a site differ in location or scale; ``like`` is a value of it."""
    found = [own_scale(fn) for fn in fns]
    if None in found:
        return False
    first, *others = cast(list[Any], found)
    zero = torch.zeros_like(like)
    return any(not torch.equal(first(at), other(at)) for other in others for at in (zero, zero + 1))


class _Factors(LowerCholeskyAffine):
    """Pyro's transform by a Cholesky factor, also of a batch of them."""

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1).expand(x.shape[:-1])
