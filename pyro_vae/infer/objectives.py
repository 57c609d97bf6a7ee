"""Training objectives: bounds on log p(x), each a reduction of the log-weights.

Below, w_k = p(x, z_k) / q(z_k | x) with z_k ~ q(z | x), k = 1..K, and w~_k = w_k / sum_j w_j. The *pathwise* gradient
follows the draws z_k(phi) into the guide's parameters phi; it needs draws that have a gradient.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from pyro_vae.errors import check_at_least_one, check_choice
from pyro_vae.infer.divergences import divergences
from pyro_vae.infer.programs import (
    Program,
    Traces,
    added,
    check_pathwise,
    leaf_traces,
    log_weights,
    log_weights_of,
    sample_sites,
    site_of,
    sum_log_prob,
    traces,
)
from pyro_vae.infer.trees import Data, first_tensor


class Objective(ABC):
    """``objective(model, guide, data)`` is a scalar loss: minus the bound, averaged over the batch, in nats per datum.

    Every objective raises a ContractError, when called, if model or guide break the rules of :func:`pyro_vae.traces`
    or if draws of the guide have no gradient where it needs one.
    """

    @abstractmethod
    def __call__(self, model: Program, guide: Program, data: Data) -> Tensor:
        """The loss for data as :func:`pyro_vae.traces` takes them; its gradient is an estimate of the bound's."""

    def advance(self, step: int) -> None:
        """Set what depends on the number of gradient steps taken before, ``step``, such as the weight of a warm-up.

        :func:`pyro_vae.fit` calls it before each step. So that an objective of your own advances under other loops
        too, call ``super().advance(step)`` in its ``advance`` and return ``self.counted(loss)`` from its ``__call__``.
        """
        self._clock().steps = step

    def counted(self, loss: Tensor) -> Tensor:
        """The loss given, watched: when it is differentiated, a step is taken, and :meth:`advance` is called with the
        new number of steps. A loss that is evaluated alone, or under ``torch.func``, does not count."""
        clock = self._clock()
        # torch.func allows no change on the side
        if clock.runs and loss.requires_grad and not is_functorch_wrapped_tensor(loss):
            once = iter((self.stepped,))  # a loss whose graph is kept may be differentiated again
            loss.register_hook(lambda _: next(once, lambda: None)())
        return loss

    def stepped(self) -> None:
        """A gradient step has been taken: called by engines whose steps differentiate a graph made beforehand."""
        self.advance(self._clock().steps + 1)

    def _clock(self) -> SimpleNamespace:
        """The number of steps taken, and whether they count now; no number of its own, which would be compiled in."""
        return vars(self).setdefault("_steps_taken", SimpleNamespace(steps=0, runs=True))


@contextmanager
def uncounted(loss: object) -> Iterator[None]:
    """Context: what happens inside, such as the tracing of a step, does not count as a step of an objective."""
    clock = loss._clock() if isinstance(loss, Objective) else SimpleNamespace(runs=True)
    before, clock.runs = clock.runs, False
    try:
        yield
    finally:
        clock.runs = before


class ELBO(Objective):
    """The evidence lower bound, E_q[log p(x, z) - log q(z | x)] (Kingma & Welling 2014, equations 2 and 3).

    Value and gradient are unbiased; the gradient is the pathwise one. With the sampled KL divergence it is that of
    Pyro's ``Trace_ELBO``, with the analytic one that of ``TraceMeanField_ELBO``, divided by the batch size.

    Args:
        num_particles: K, samples of z per datum, at least 1.
        kl: ``sampled``: log q(z | x) - log p(z) of the same draws; ``analytic``: the closed form at every site, given
            the draws of the sites before it, where torch has one.

    Raises:
        ValueError: if an argument is out of range.
        ContractError: when called, if ``analytic`` is asked for distributions without a closed form.
    """

    def __init__(self, num_particles: int = 1, kl: Literal["sampled", "analytic"] = "sampled"):
        check_at_least_one(num_particles=num_particles)
        check_choice("kl", kl, ("sampled", "analytic"))
        self.num_particles, self.kl = num_particles, kl

    def __call__(self, model: Program, guide: Program, data: Data) -> Tensor:
        both = traces(model, guide, data, self.num_particles)
        check_pathwise(both.guide)
        if self.kl == "sampled":
            return -log_weights_of(both).mean()
        return -(_log_likelihood(both) - sum(divergences(both, self.kl))).mean()


class BetaELBO(Objective):
    """The ELBO with its KL divergence multiplied by beta, warmed up, and with free bits.

    E_q[log p(x | z)] - beta sum_j max(KL_j, free_bits), where KL_j is the mean over the batch of the divergence of
    latent dimension j, if prior and posterior factorize over dimensions, else of the whole site (Higgins et al. 2017,
    equation 4; free bits: Kingma et al. 2016, equation 15). Below beta = 1 or with free bits it is not a bound
    of log p(x); above beta = 1 it is a looser one. The gradient is the pathwise one of this expression.

    The warm-up advances by itself, once for each time that the loss is differentiated: under ``pyro.infer.SVI``,
    :class:`PyroSVI`, :class:`CompiledSVI`, :func:`pyro_vae.fit` or a loop of your own. :meth:`advance` sets it to any
    step. Settings cannot be changed later.

    Args:
        beta: weight of the KL divergence, at least 0.
        warmup: gradient steps over which the weight rises linearly from 0 to beta (Sonderby et al. 2016); 0: none.
        period: gradient steps after which the warm-up begins anew (Fu et al. 2019); 0: never.
        free_bits: nats that every KL_j may have at no cost, at least 0.
        num_particles, kl: see :class:`ELBO`.

    Raises:
        ValueError: if an argument is out of range.
        ContractError: when called, as :class:`ELBO`.
    """

    def __init__(
        self,
        beta: float = 1.0,
        warmup: int = 0,
        period: int = 0,
        free_bits: float = 0.0,
        num_particles: int = 1,
        kl: Literal["sampled", "analytic"] = "sampled",
    ):
        check_at_least_one(num_particles=num_particles)
        check_choice("kl", kl, ("sampled", "analytic"))
        for name, value in (("beta", beta), ("warmup", warmup), ("period", period), ("free_bits", free_bits)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {value}")
        if period and not warmup:
            raise ValueError("period repeats the warm-up: give warmup too")
        if period and period < warmup:
            raise ValueError(f"period must be at least warmup, {warmup}, got {period}")
        self.beta, self.warmup, self.period, self.free_bits = beta, warmup, period, free_bits
        self.num_particles, self.kl = num_particles, kl
        self._weight = torch.tensor(0.0 if warmup else float(beta))  # a tensor, so that a compiled step sees it change

    def advance(self, step: int) -> None:
        """Set the weight of gradient step ``step``, counted from 0; the steps after it are counted from there."""
        super().advance(step)
        if self.warmup:
            at = step % self.period if self.period else step
            self._weight.fill_(self.beta * min(1.0, at / self.warmup))

    def __call__(self, model: Program, guide: Program, data: Data) -> Tensor:
        if self._weight.device != first_tensor(data).device:
            self._weight = self._weight.to(first_tensor(data).device)
        both = traces(model, guide, data, self.num_particles)
        check_pathwise(both.guide)
        parts = divergences(both, self.kl, by_dimension=self.free_bits > 0)
        if self.free_bits:
            total = added(each.mean((0, 1)).clamp(min=self.free_bits).sum() for each in parts)
        else:
            total = added(parts).mean()
        # a copy: the weight of the next step is set while this loss is differentiated
        return self.counted(self._weight.clone() * total - _log_likelihood(both).mean())


class IWAE(Objective):
    """The importance-weighted bound, E[log 1/K sum_k w_k] (Burda, Grosse & Salakhutdinov 2016, equation 8).

    A lower bound of log p(x) that rises with K. The gradient is the pathwise one, sum_k w~_k d log w_k (equation 14),
    unbiased for the bound; that of the guide has a signal-to-noise ratio that falls as 1 / sqrt(K) (Rainforth et al.
    2018): see :class:`DReG`.

    Args:
        num_particles: K, at least 1; one is the ELBO.
    """

    def __init__(self, num_particles: int = 50):
        check_at_least_one(num_particles=num_particles)
        self.num_particles = num_particles

    def __call__(self, model: Program, guide: Program, data: Data) -> Tensor:
        return -_log_mean(log_weights(model, guide, data, self.num_particles)).mean()


class Renyi(Objective):
    """The variational Renyi bound, log E_q[w^(1 - alpha)] / (1 - alpha), from K samples (Li & Turner 2016).

    alpha = 1 is the ELBO, alpha = 0 is :class:`IWAE`; the exact bound falls as alpha rises, is at most log p(x) for
    alpha >= 0 and at least that below. Estimated as log (1/K sum_k w_k^(1 - alpha)) / (1 - alpha), which is biased
    towards the ELBO for finite K; the pathwise gradient is unbiased for the expectation of that estimate.

    Args:
        alpha: from -1e6 to 1e6; -inf (on the command line -.inf) is VR-max, the largest of the K log-weights.
        num_particles: K, at least 1.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, alpha: float = 0.5, num_particles: int = 50):
        check_at_least_one(num_particles=num_particles)
        if not (abs(alpha) <= 1e6 or alpha == -math.inf):
            raise ValueError(f"alpha must be -inf or from -1e6 to 1e6, got {alpha}; 0 is IWAE, 1 the ELBO, -inf VR-max")
        self.alpha, self.num_particles = alpha, num_particles

    def __call__(self, model: Program, guide: Program, data: Data) -> Tensor:
        log_w = log_weights(model, guide, data, self.num_particles)
        if self.alpha == -math.inf:
            return -log_w.max(0).values.mean()
        if self.alpha == 1:
            return -log_w.mean()
        scaled = (1 - self.alpha) * log_w
        largest = scaled.detach().amax(0)
        below = torch.expm1(scaled - largest).mean(0)
        # near alpha = 1 the logarithm of a mean of ones and a little: without log1p all digits would be lost
        logarithm = torch.where(below > -0.5, below.clamp(min=-0.5).log1p() + largest, _log_mean(scaled))
        return -(logarithm / (1 - self.alpha)).mean()


class MIWAE(Objective):
    """The mean of M importance-weighted bounds of K samples each, 1/M sum_m log 1/K sum_k w_mk (Rainforth et al. 2018).

    A lower bound of log p(x), as tight as IWAE's of K samples. Value and pathwise gradient are unbiased for it, with M
    times less variance; for one budget M K it trades tightness for the signal-to-noise ratio of the guide's gradient.

    Args:
        num_groups: M, at least 1.
        num_particles: K, at least 1.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, num_groups: int = 8, num_particles: int = 8):
        check_at_least_one(num_groups=num_groups, num_particles=num_particles)
        self.num_groups, self.num_particles = num_groups, num_particles

    def __call__(self, model: Program, guide: Program, data: Data) -> Tensor:
        log_w = log_weights(model, guide, data, self.num_groups * self.num_particles)
        return -_log_mean(log_w.unflatten(0, (self.num_groups, self.num_particles)), 1).mean()


class CIWAE(Objective):
    """beta ELBO + (1 - beta) IWAE of the same K samples (Rainforth et al. 2018): a lower bound between the two.

    Value and pathwise gradient are unbiased for it.

    Args:
        beta: in [0, 1].
        num_particles: K, at least 1.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, beta: float = 0.05, num_particles: int = 64):
        check_at_least_one(num_particles=num_particles)
        if not 0 <= beta <= 1:
            raise ValueError(f"beta must be between 0, which is IWAE, and 1, the ELBO, got {beta}")
        self.beta, self.num_particles = beta, num_particles

    def __call__(self, model: Program, guide: Program, data: Data) -> Tensor:
        log_w = log_weights(model, guide, data, self.num_particles)
        return -(self.beta * log_w.mean() + (1 - self.beta) * _log_mean(log_w).mean())


class _Separated(Objective):
    """Objectives whose gradient is put together from z's part, the model's and the guide's, each with its own weights.

    log q is scored at a copy of z, for which an autoregressive ``posteriors.Flow`` must be inverted, dimension by
    dimension: ten times slower than :class:`IWAE`; with a coupling flow it is not.
    """

    def __init__(self, num_particles: int):
        check_at_least_one(num_particles=num_particles)
        self.num_particles = num_particles

    def __call__(self, model: Program, guide: Program, data: Data) -> Tensor:
        both, draws, leaves = leaf_traces(model, guide, data, self.num_particles)
        check_pathwise(both.guide)
        log_p, log_q = sum_log_prob(both.model), sum_log_prob(both.guide)
        bound, surrogate = self._bound(log_p, log_q, lambda weighted: _through_draws(weighted, draws, leaves))
        return -_with_value(bound, surrogate)

    @abstractmethod
    def _bound(self, log_p: Tensor, log_q: Tensor, through: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The bound, and something whose gradient is to be taken for the bound's; scalars.

        ``log_p`` and ``log_q``, ``(K, B)``, depend on the parameters directly, with z held fixed. ``through(weighted)``
        has, for a scalar function of them, the gradient that it has through the draws of z.
        """


class STL(_Separated):
    """The ELBO with the gradient of Roeder, Wu & Duvenaud (2017), "sticking the landing".

    The guide's parameters get the path through z alone: the score of q, whose expectation is zero, is left out. The
    gradient is unbiased, and that of the guide's parameters has no variance where q is the exact posterior; that of the
    model's has as much as the ELBO's.

    Args:
        num_particles: K, samples of z per datum, at least 1.
    """

    def __init__(self, num_particles: int = 1):
        super().__init__(num_particles)

    def _bound(self, log_p, log_q, through):
        return (log_p - log_q).mean(), log_p.mean() + through((log_p - log_q).mean())


class DReG(_Separated):
    """:class:`IWAE` with the doubly reparametrized gradient of Tucker et al. (2019).

    The guide's parameters get sum_k w~_k^2 (d log w_k / dz_k) (dz_k / dphi): unbiased as IWAE's, with a signal-to-noise
    ratio that rises with K. The model's get IWAE's gradient.

    Args:
        num_particles: K, at least 1.
    """

    def __init__(self, num_particles: int = 50):
        super().__init__(num_particles)

    def _bound(self, log_p, log_q, through):
        log_w = log_p - log_q
        weights = log_w.detach().softmax(0)
        batch = log_w.shape[1]
        return _log_mean(log_w).mean(), (weights * log_p).sum() / batch + through((weights**2 * log_w).sum() / batch)


class PIWAE(_Separated):
    """The model follows IWAE's bound of M K samples, the guide MIWAE's of K (Rainforth, Kosiorek et al. 2018).

    A tight bound for the one, a gradient with a better signal-to-noise ratio for the other. Its value is the bound of
    M K samples, a lower bound of log p(x); each part's pathwise gradient is unbiased for its own bound. A parameter
    that both share, as those of a VampPrior, gets both gradients, each for its own place.

    Args:
        num_groups: M, at least 1.
        num_particles: K, at least 1.
    """

    def __init__(self, num_groups: int = 8, num_particles: int = 8):
        check_at_least_one(num_groups=num_groups, num_particles=num_particles)
        super().__init__(num_groups * num_particles)
        self.groups = num_groups, num_particles

    def _bound(self, log_p, log_q, through):
        def miwae(log_w: Tensor) -> Tensor:
            return _log_mean(log_w.unflatten(0, self.groups), 1).mean()

        bound = _log_mean(log_p - log_q.detach()).mean()
        return bound, bound + miwae(log_p.detach() - log_q) + through(miwae(log_p - log_q))


class TVO(Objective):
    """The thermodynamic variational objective (Masrani, Le & Wood 2019), a Riemann sum of log p(x).

    log p(x) is the integral over beta from 0 to 1 of E_pi[log w], pi being proportional to q^(1 - beta) p(x, z)^beta.
    The integrand rises with beta, so that its sum over the left ends of intervals is a lower bound; with one interval
    it is the ELBO. Expectations are taken by self-normalized importance sampling from the guide, so that value and
    gradient are biased for finite K, towards those of the ELBO, the more so the worse the guide. The gradient is that
    of a covariance with the scores of p and q: no draw needs a gradient, so that
    discrete latent variables can be trained.

    Args:
        num_particles: K, at least 2.
        num_intervals: at least 1; their ends are 0, and ``smallest`` to 1 at equal ratios.
        smallest: the first beta above 0, in (0, 1).
    """

    def __init__(self, num_particles: int = 50, num_intervals: int = 5, smallest: float = 0.025):
        check_at_least_one(num_particles=num_particles, num_intervals=num_intervals)
        if num_particles < 2:
            raise ValueError("num_particles must be at least 2, for a covariance, got 1")
        if not 0 < smallest < 1:
            raise ValueError(f"smallest must be between 0 and 1, got {smallest}")
        self.num_particles = num_particles
        exponents = [i / max(1, num_intervals - 1) for i in range(num_intervals)]
        ends = [smallest ** (1 - e) for e in exponents] if num_intervals > 1 else [1.0]
        self._betas = [0.0, *ends]

    def __call__(self, model: Program, guide: Program, data: Data) -> Tensor:
        both, _, _ = leaf_traces(model, guide, data, self.num_particles)
        log_p, log_q = sum_log_prob(both.model), sum_log_prob(both.guide)
        log_w = log_p - log_q
        value: Any = 0.0
        surrogate: Any = 0.0
        for beta, above in zip(self._betas[:-1], self._betas[1:], strict=True):
            weights = (beta * log_w.detach()).softmax(0)
            mean = (weights * log_w).sum(0)
            # the samples' own mean makes the covariance too small, by (K - 1) / K where weights are equal
            score = weights * (log_w - mean).detach() * (beta * log_p + (1 - beta) * log_q)
            score = score.sum(0) * self.num_particles / (self.num_particles - 1)
            value = value + (above - beta) * mean.mean()
            surrogate = surrogate + (above - beta) * (mean + score).mean()
        return -_with_value(value, surrogate)


def _log_mean(log_w: Tensor, dim: int = 0) -> Tensor:
    """The logarithm of the mean of exponentials over ``dim``."""
    return log_w.logsumexp(dim) - math.log(log_w.shape[dim])


def _with_value(value: Tensor, surrogate: Tensor) -> Tensor:
    """A scalar with the value of one and the gradient of the other."""
    return surrogate + (value - surrogate).detach()


def _through_draws(value: Tensor, draws: dict[str, Tensor], leaves: dict[str, Tensor]) -> Tensor:
    """A scalar whose gradient is that of ``value`` through the draws."""
    if not torch.is_grad_enabled():
        return torch.zeros_like(value)
    slopes = torch.autograd.grad(value, list(leaves.values()), retain_graph=True)
    return added((slope.detach() * draw).sum() for slope, draw in zip(slopes, draws.values(), strict=True))


def _log_likelihood(both: Traces) -> Tensor:
    """log p(x | z), ``(K, B)``."""
    sites = (site_of(both.model, name) for name in sample_sites(both.model))
    return added(site["log_prob"] for site in sites if site["is_observed"])
