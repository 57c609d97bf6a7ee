"""References that no integral gives: found once, and kept with their errors in ``references.json``.

Usage: python -m experiments.evidence_benchmark.certify [NAME ...]

stochastic_volatility: a bootstrap particle filter, whose p(x) is unbiased. All others: a sandwich. Sequential Monte
Carlo from the prior, and Hamiltonian chains after it, give draws of the posterior, which place kernels: one at the
mean, or one at each of many draws where there may be several modes. Importance samples from Student-t kernels give an
estimate that is low in expectation, E_q[p(x, z) / q(z)] = p(x); other draws of the posterior, weighed with normal
kernels that are cut off where the posterior is low, so that no weight is large, one that is high, E_p[q(z) / p(x, z)]
= 1 / p(x) (Gelfand & Dey 1994; Robert & Wraith 2009). The reference is the former; its error is three of its standard
errors, or the distance of the two where that is more. This is code of its own, which shares with the library's
estimators nothing but the log-density of a program.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Chi2

from experiments.evidence_benchmark import certified, frozen
from pyro_vae.infer.supports import Latents
from pyro_vae.runs import write_json


@dataclass(frozen=True)
class Plan:
    """How one reference is found.

    Args:
        programs: makes the programs and data.
        num_kernels: 1 where the posterior has one mode.
        width: of the kernels, in the posterior's standard deviations.
        num_particles: of each datum, drawn or moved at a time.
        num_rounds: how often so many are drawn for the lower estimate.
    """

    programs: Callable
    num_kernels: int = 1
    width: float = 1.0
    num_particles: int = 2000
    num_rounds: int = 200


def _digits():
    """The frozen VAE, in float64."""
    vae, x = frozen.frozen(10)
    vae = vae.double()
    return (vae.model, vae.guide), x.double()


PLANS = {
    "logistic_breast_cancer": Plan(lambda: certified.logistic_regression("breast_cancer")),
    "logistic_wine": Plan(lambda: certified.logistic_regression("wine")),
    "cox_process_8x8": Plan(lambda: certified.cox_process(8)),
    "cox_process_10x10": Plan(lambda: certified.cox_process(10)),
    "digits_10d": Plan(_digits, num_kernels=64, width=0.7, num_particles=500),
}
LogDensity = Callable[[Tensor], Tensor]


class Chains:
    """Hamiltonian Monte Carlo of B data at p(u) p(x | u)^beta."""

    num_leapfrogs = 8

    def __init__(self, log_prior: LogDensity, log_likelihood: LogDensity):
        self.log_prior, self.log_likelihood = log_prior, log_likelihood

    def _value_and_gradient(self, u: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        u = u.detach().requires_grad_()
        value = self.log_prior(u) + beta * self.log_likelihood(u)
        (gradient,) = torch.autograd.grad(value.sum(), u)
        return value.detach(), gradient.nan_to_num()

    def transition(self, u: Tensor, beta: float, factor: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """u ``(K, B, D)``, factors of the inverse mass ``(B, D, D)``, step sizes ``(B,)``; and acceptance ``(B,)``."""
        momentum = torch.randn_like(u)
        size = (step * (0.7 + 0.6 * torch.rand_like(step))).unsqueeze(-1)
        value, gradient = self._value_and_gradient(u, beta)
        energy = value - 0.5 * momentum.square().sum(-1)
        new, new_value = u, value
        for leap in range(self.num_leapfrogs):
            kick = size * torch.einsum("bji,kbj->kbi", factor, gradient)
            momentum = momentum + (0.5 if leap == 0 else 1.0) * kick
            new = new + size * torch.einsum("bij,kbj->kbi", factor, momentum)
            new_value, gradient = self._value_and_gradient(new, beta)
        momentum = momentum + 0.5 * size * torch.einsum("bji,kbj->kbi", factor, gradient)
        log_ratio = new_value - 0.5 * momentum.square().sum(-1) - energy
        probability = torch.where(log_ratio.isnan(), -math.inf, log_ratio).clamp(max=0).exp()
        accepted = torch.rand_like(probability) < probability
        return torch.where(accepted.unsqueeze(-1), new, u), probability.mean(0)

    def posterior(self, u: Tensor, num_more: int, thinning: int = 3) -> Tensor:
        """Draws of the posterior, ``(num_more K, B, D)``, from K draws of the prior.

        The temperatures are those that leave each datum 0.8 of its effective sample size.
        """
        beta, step = 0.0, u.new_full(u.shape[1:2], 0.3)
        factor = covariance_factor(u)
        while beta < 1:
            with torch.no_grad():
                log_likelihood = self.log_likelihood(u)
            before, beta = beta, next_beta(log_likelihood, beta)
            places = torch.multinomial(((beta - before) * log_likelihood).softmax(0).mT, len(u), replacement=True).mT
            u = u.gather(0, places.unsqueeze(-1).expand_as(u))
            for _ in range(2):
                factor = covariance_factor(u)
                u, acceptance = self.transition(u, beta, factor, step)
                step = (step * (acceptance - 0.8).exp()).clamp(1e-4, 1.0)
        kept = []
        for _ in range(10 + num_more):  # the first ones are no draws yet
            for _ in range(thinning):
                u, _ = self.transition(u, 1.0, factor, step)
            kept.append(u)
        return torch.cat(kept[10:])


def next_beta(log_likelihood: Tensor, beta: float, share: float = 0.8) -> float:
    """The highest temperature that leaves every datum this share of its effective sample size."""

    def enough(delta: float) -> bool:
        log_w = delta * log_likelihood
        return bool(((2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp() > share * len(log_w)).all())

    low, high = 0.0, 1 - beta
    if enough(high):
        return 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return beta + max(low, 1e-6)


def covariance_factor(u: Tensor, shrink: float = 0.03) -> Tensor:
    """Cholesky factors ``(B, D, D)`` of the covariances of draws ``(K, B, D)``, shrunk that much to their diagonals."""
    centred = u - u.mean(0)
    covariance = torch.einsum("kbi,kbj->bij", centred, centred) / (len(u) - 1)
    diagonal = torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))
    return torch.linalg.cholesky((1 - shrink) * covariance + shrink * diagonal)


class Kernels:
    """An even mixture of M kernels, for each of B data: normal, or Student-t of ``df`` degrees.

    Centres are drawn to the mean, so that the mixture is about as wide as the draws (West 1993).
    """

    def __init__(self, draws: Tensor, num_kernels: int, width: float, df: float | None):
        mean, factor = draws.mean(0), covariance_factor(draws, shrink=0.0)
        among = draws[torch.randperm(len(draws))[:num_kernels]] if num_kernels > 1 else mean.unsqueeze(0)
        self.centres = mean + math.sqrt(max(0.0, 1 - width**2)) * (among - mean)  # (M, B, D)
        self.factor, self.df = width * factor, df

    def sample(self, num: int) -> Tensor:
        """Draws ``(num, B, D)``."""
        size = self.centres.shape[1:]
        which = torch.randint(len(self.centres), (num, size[0]))
        e = torch.randn(num, *size, dtype=self.centres.dtype)
        if self.df:
            e = e / (Chi2(self.df).sample((num, size[0], 1)).to(e) / self.df).sqrt()
        centre = self.centres.gather(0, which.unsqueeze(-1).expand(num, *size))
        return centre + torch.einsum("bij,kbj->kbi", self.factor, e)

    def log_prob(self, u: Tensor) -> Tensor:
        """log q of draws ``(K, B, D)``: ``(K, B)``."""
        dim = u.shape[-1]
        apart = [
            torch.linalg.solve_triangular(self.factor, each.permute(1, 2, 0), upper=False) for each in (u, self.centres)
        ]
        squares = torch.cdist(*(each.mT.contiguous() for each in apart)).square()  # (B, K, M)
        if self.df:
            constant = (
                math.lgamma((self.df + dim) / 2) - math.lgamma(self.df / 2) - dim / 2 * math.log(self.df * math.pi)
            )
            log_kernels = constant - (self.df + dim) / 2 * torch.log1p(squares / self.df)
        else:
            log_kernels = -0.5 * squares - dim / 2 * math.log(2 * math.pi)
        log_det = self.factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return log_kernels.logsumexp(-1).mT - math.log(len(self.centres)) - log_det


def log_mean(log_w: Tensor) -> tuple[Tensor, Tensor]:
    """log of the mean of weights ``(K, B)``, and its standard error."""
    mean = log_w.logsumexp(0) - math.log(len(log_w))
    return mean, (log_w - mean).exp().std(0) / len(log_w) ** 0.5


def sandwich(plan: Plan, num_more: int = 60) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lower and upper estimates, and the standard error of each, ``(B,)``.

    Args:
        plan: of the task.
        num_more: how many times ``num_particles`` draws of the posterior; half of them place the kernels.
    """
    (model, guide), data = plan.programs()
    latents = Latents(model, guide, data)
    chains = Chains(lambda u: latents.log_joint(u)[0], lambda u: latents.log_joint(u)[1])
    draws = chains.posterior(latents.sample_prior(plan.num_particles), num_more)
    placing, weighed = draws.chunk(2)
    wide = Kernels(placing, plan.num_kernels, 1.1 * plan.width, df=10.0)
    near = Kernels(placing, plan.num_kernels, plan.width, df=None)

    def log_joint(u: Tensor) -> Tensor:
        log_prior, log_likelihood = latents.log_joint(u)
        return log_prior + log_likelihood

    with torch.no_grad():
        lowest = log_joint(placing[:: max(1, len(placing) // plan.num_particles)]).quantile(0.2, dim=0)
        low, inside, high = [], [], []
        for _ in range(plan.num_rounds):
            u = wide.sample(plan.num_particles)
            low.append(log_joint(u) - wide.log_prob(u))
        for u in weighed.split(plan.num_particles):
            inside.append(log_joint(near.sample(len(u))) > lowest)
            value = log_joint(u)
            high.append(torch.where(value > lowest, near.log_prob(u) - value, -math.inf))
    mass = torch.cat(inside).double().mean(0)
    (lower, lower_error), (inverse, upper_error) = log_mean(torch.cat(low)), log_mean(torch.cat(high))
    upper_error = torch.hypot(upper_error, ((1 / mass - 1) / len(weighed)).sqrt())
    return lower, mass.log() - inverse, lower_error, upper_error


def certify(name: str) -> dict:
    """The entry of ``references.json`` of one task."""
    torch.manual_seed(0)
    start = time.perf_counter()
    if name == "stochastic_volatility":
        _, x = certified.stochastic_volatility()
        log_px, error = log_mean(torch.stack([certified.log_px_by_particles(x, 200_000) for _ in range(20)]))
        error, source = 3 * error, "particle filter of 20 x 200,000 particles"
    else:
        plan = PLANS[name]
        log_px, upper, error, upper_error = sandwich(plan)
        width = upper - log_px
        print(
            f"upper - lower {width.mean():.4f}, of {width.abs().max():.4f} at most; standard errors, at most, "
            f"{error.max():.4f} and {upper_error.max():.4f}"
        )
        error = torch.maximum(3 * error, width.abs())
        samples = plan.num_rounds * plan.num_particles
        source = f"sandwich of mean width {width.mean():.4f}; {samples:,} importance samples"
    took = time.perf_counter() - start
    print(f"{name}: {log_px.mean():.4f} on average, error at most {error.max():.4f}; {took:.0f} seconds", flush=True)
    return {"log_px": log_px.tolist(), "error": error.tolist(), "source": source}


if __name__ == "__main__":
    known = json.loads(certified.STORED.read_text()) if certified.STORED.exists() else {}
    for name in sys.argv[1:] or ["stochastic_volatility", *PLANS]:
        known[name] = certify(name)
        write_json(certified.STORED, known)
