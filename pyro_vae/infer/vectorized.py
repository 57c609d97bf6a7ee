"""What a program does for one draw of its latent variables, done for many."""

import contextlib
import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.func import vmap
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from pyro_vae.infer.scales import base_of
from pyro_vae.infer.tracing import first_line


class Vectorized:
    """Runs functions of one vector for K of them at once by :func:`torch.func.vmap`; where that fails, in a loop.

    Args:
        numbers: how many the largest tensors of a run hold together: so many runs are done at once that theirs take no
            more than 64 MiB each.
    """

    def __init__(self, numbers: int):
        self.at_a_time = max(1, 2**24 // max(1, numbers))
        self.at_once = self.draws_at_once = True

    def each(self, function: Callable[[Tensor], Any], u: Tensor) -> Any:
        """A tree of tensors that a function makes of one vector, of each: ``(K, D)`` to tensors ``(K, *)``."""
        with NaNFactors():
            if not self.at_once:
                return tree_map(lambda *found: torch.stack(found), *map(function, u))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop")  # faster than the loop all the same
                return vmap(function, chunk_size=self.at_a_time)(u)

    def draws(self, draw: Callable[[], Tensor], like: Tensor, num_samples: int) -> Tensor:
        """Independent results of a function that draws, ``(D,)`` each: ``(K, D)``, without gradients."""
        with torch.no_grad(), NaNFactors():
            if self.draws_at_once:
                with contextlib.suppress(Exception), _DrawsOfMany(), _ByGammas():  # some distributions cannot
                    many = vmap(lambda _: draw(), randomness="different", chunk_size=self.at_a_time)
                    return many(like.new_zeros(num_samples))
                self.draws_at_once = False
            return torch.stack([draw() for _ in range(num_samples)])

    def check(self, function: Callable[[Tensor], Any], u: Tensor) -> None:
        """Find out whether a function can be done at once to these vectors, and warn if it cannot."""
        self.at_once = False
        wanted = tree_flatten(self.each(function, u))[0]
        self.at_once = True
        try:
            found = tree_flatten(self.each(function, u))[0]
            if all(map(_alike, found, wanted)):
                return
            reason = "its numbers are others then"
        except Exception as error:  # one by one it has run: something in it cannot be done to many
            reason = first_line(error)
        self.at_once = False
        warnings.warn(f"the program is run for one draw after the other, which is slow: {reason}", stacklevel=4)


def _alike(a: Tensor, b: Tensor) -> bool:
    relative = 1e-9 if b.dtype == torch.float64 else 1e-4
    return torch.allclose(a, b.to(a.dtype), rtol=relative, atol=relative, equal_nan=True)


class NaNFactors(TorchFunctionMode):
    """A Cholesky factor of what is not positive definite is NaN, where it would end the runs of all others.

    Numbers that are put where a mask says, as torch's Multinomial does, are put so that vmap can.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.linalg.cholesky, torch.cholesky, torch.Tensor.cholesky):
            factor, info = torch.linalg.cholesky_ex(*args, **kwargs)
            return torch.where((info == 0)[..., None, None], factor, torch.nan)
        if func is torch.Tensor.__setitem__:
            whole, where, value = args
            if isinstance(where, Tensor) and where.dtype == torch.bool and isinstance(value, int | float):
                return whole.masked_fill_(where.reshape(*where.shape, *[1] * (whole.dim() - where.dim())), value)
        return func(*args, **kwargs)


class _DrawsOfMany(TorchFunctionMode):
    """What torch's distributions draw in place, which vmap does not do, is drawn into a new tensor."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        plain = len(args) == 1 and not kwargs
        if func is torch.Tensor.normal_ and plain:
            return torch.randn_like(args[0])
        if func is torch.Tensor.exponential_ and plain:
            return -torch.log1p(-torch.rand_like(args[0]))
        if func is torch.Tensor.cauchy_ and plain:
            return torch.tan(math.pi * (torch.rand_like(args[0]) - 0.5))
        if func is torch.Tensor.uniform_ and len(args) == 3:
            return args[1] + (args[2] - args[1]) * torch.rand_like(args[0])
        if func is torch.Tensor.clamp_:  # vmap has no rule for it in place
            return args[0].copy_(torch.clamp(*args, **kwargs))
        return func(*args, **kwargs)


class _ByGammas(Messenger):
    """Beta, Dirichlet and LKJ variables are made of gamma variables, since vmap has no rule for torch's way."""

    def _pyro_sample(self, msg: Any) -> None:
        fn = base_of(msg["fn"])
        if msg["value"] is not None or not isinstance(fn, dist.Beta | dist.Dirichlet | dist.LKJCholesky):
            return
        if isinstance(fn, dist.LKJCholesky):
            fn = copy.copy(fn)
            fn._beta = _Beta(fn._beta)
            msg["value"] = fn.sample()
        elif isinstance(fn, dist.Beta):
            msg["value"] = _Beta(fn).sample()
        else:
            gammas = dist.Gamma(fn.concentration, 1.0).sample()
            msg["value"] = gammas / gammas.sum(-1, keepdim=True)


class _Beta:
    """The draws of a Beta distribution."""

    def __init__(self, fn: Any):
        self.fn = fn

    def sample(self, *_: Any) -> Tensor:
        first, second = (dist.Gamma(each, 1.0).sample() for each in (self.fn.concentration1, self.fn.concentration0))
        limits = torch.finfo(first.dtype)
        return (first / (first + second)).clamp(limits.tiny, 1 - limits.eps)
