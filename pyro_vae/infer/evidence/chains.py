"""Hamiltonian chains between a start and the posterior, of many observations at once, and what their weights say."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyro_vae.infer.compiling import Compiled
from pyro_vae.infer.evidence.laplace import Coordinates
from pyro_vae.infer.supports import Latents

Start = Literal["normal", "guide", "prior"]


class State(NamedTuple):
    """Chains at e, with the log-densities of both ends of the path and their gradients."""

    e: Tensor  # (C, B, D)
    start: Tensor  # (C, B)
    target: Tensor
    start_gradient: Tensor  # (C, B, D)
    target_gradient: Tensor

    def select(self, chains: Tensor) -> "State":
        """The chains with these numbers ``(C, B)``."""
        return State(*(a.gather(0, _like(chains, a)) for a in self))


class Mixture(NamedTuple):
    """The normals of which each row's start is one, J a row: the row's own share of them is its part of the target.

    Attributes:
        loc: shape ``(R, J, D)``.
        inverse: of their factors, shape ``(R, J, D, D)``.
        log_weight: log of their weights over the determinants of their factors, shape ``(R, J)``.
        own: which of them is the row's, shape ``(R,)``.
    """

    loc: Tensor
    inverse: Tensor
    log_weight: Tensor
    own: Tensor

    def select(self, among: Any) -> "Mixture":
        """Those of some of the rows: a slice, places ``(n,)``, or a mask."""
        return Mixture(*(each[among] for each in self))

    def log_share(self, u: Tensor) -> Tensor:
        """The logarithm of the row's own share of the mixture at u: ``(K, R, D) -> (K, R)``."""
        e = torch.einsum("rjde,krje->krjd", self.inverse, u.unsqueeze(2) - self.loc)
        terms = self.log_weight - 0.5 * e.square().sum(-1)
        own = terms.gather(-1, self.own.view(1, -1, 1).expand(len(u), -1, 1)).squeeze(-1)
        return own - terms.logsumexp(-1)


class Path:
    """The densities start(e)^(1 - beta) p(x, e)^beta of B observations, in whitened coordinates e.

    Args:
        latents: of the observations.
        coordinates: in which the start is about a unit ball, or exactly if it is ``normal``.
        start: normal: N(0, I) in e; guide: q(z | x); prior: p(z).
        num_leapfrogs: of a transition.
        evaluate: what :func:`evaluator` gives.
        mixture: a row for each of several modes of an observation, the target being split between them; None: not.

    Attributes:
        evaluations: how often the model was evaluated for each row, a gradient counting as two.
    """

    def __init__(
        self,
        latents: Latents,
        coordinates: Coordinates,
        start: Start,
        num_leapfrogs: int,
        evaluate: Callable[..., tuple[Tensor, ...]],
        mixture: Mixture | None = None,
    ):
        self.latents, self.coordinates, self.num_leapfrogs = latents, coordinates, num_leapfrogs
        self.start: Start = start
        self._evaluate, self.mixture, self.evaluations = evaluate, mixture, 0

    def select(self, among: Any) -> "Path":
        """The same for some of the rows: a slice or places ``(n,)``."""
        mixture = None if self.mixture is None else self.mixture.select(among)
        rows = self.coordinates.select(among)
        return Path(self.latents.select(among), rows, self.start, self.num_leapfrogs, self._evaluate, mixture)

    def draw(self, num_chains: int) -> Tensor:
        """e of the start, shape ``(C, B, D)``."""
        loc = self.coordinates.loc
        if self.start == "normal":
            return torch.randn(num_chains, *loc.shape, dtype=loc.dtype, device=loc.device)
        sample = self.latents.sample_guide if self.start == "guide" else self.latents.sample_prior
        return self.coordinates.from_latents(sample(num_chains))

    def evaluate(self, e: Tensor) -> State:
        self.evaluations += 2 * len(e)
        return State(e, *self._evaluate(e, self.latents.data, self.coordinates, self.mixture or ()))

    def transition(self, state: State, beta: Tensor, step: Tensor) -> tuple[State, Tensor]:
        """Hamiltonian Monte Carlo (Neal 2011, section 5.3.2) that leaves the density at ``beta`` unchanged.

        ``beta`` is one number, or one of each observation, ``(B,)``. ``step`` is the step size of each observation,
        ``(B,)``, of each of its coordinates, ``(B, D)``, or of each chain, ``(C, B, 1)``; it is varied at random by a
        fifth, so that no trajectory keeps returning to where it began. Returns the chains and the mean acceptance
        probability of each observation.
        """
        weight = beta.unsqueeze(-1) if beta.dim() else beta

        def log_density(at: State) -> Tensor:
            return (1 - beta) * at.start + beta * at.target

        def gradient(at: State) -> Tensor:
            return (1 - weight) * at.start_gradient + weight * at.target_gradient

        jitter = 0.8 + 0.4 * torch.rand_like(state.start[0])
        size = (step.unsqueeze(-1) if step.dim() == 1 else step) * jitter.unsqueeze(-1)
        size = size.to(state.e.dtype)
        momentum = torch.randn_like(state.e)
        energy = log_density(state) - 0.5 * momentum.square().sum(-1)
        new, momentum = state, momentum + 0.5 * size * gradient(state)
        for leapfrog in range(1, self.num_leapfrogs + 1):
            new = self.evaluate(new.e + size * momentum)
            half = 0.5 if leapfrog == self.num_leapfrogs else 1.0
            momentum = momentum + half * size * gradient(new)
        log_ratio = log_density(new) - 0.5 * momentum.square().sum(-1) - energy
        probability = torch.where(log_ratio.isnan(), -math.inf, log_ratio).clamp(max=0).exp()
        accepted = torch.rand_like(probability) < probability
        pairs = zip(new, state, strict=True)
        chosen = (torch.where(accepted if a.dim() == 2 else accepted.unsqueeze(-1), a, b) for a, b in pairs)
        return State(*chosen), probability.mean(0)


Evaluate = Callable[..., tuple[Tensor, ...]]
"""What :func:`evaluator` gives."""


def evaluator(latents: Latents, start: Start, compiled: bool, rows: int = 0, often: float = 100) -> Evaluate:
    """What evaluates both ends of the path for :class:`Path`, for any data of the same programs.

    Args:
        latents: of any of the data.
        start: see :class:`Path`.
        compiled: whether what is called often is compiled.
        rows: of a chunk that is compiled at its first call, since there are many of its size.
        often: calls of others before they are.
    """
    return in_graphs(partial(_evaluate, latents, start), compiled, rows, often)


def in_graphs(function: Evaluate, compiled: bool, rows: int, often: float = 100) -> Evaluate:
    """A function whose first argument is e, ``(C, B, D)``, compiled where B is ``rows``, or its shape comes often."""
    return Compiled(function, often, lambda e, *_: e.shape[1] == rows) if compiled else function


def anew(evaluate: Any) -> Any:
    """The same function for another part of an estimate, see :meth:`Compiled.anew`."""
    return evaluate.anew() if isinstance(evaluate, Compiled) else evaluate


@torch.enable_grad()
def _evaluate(
    latents: Latents, start: Start, e: Tensor, data: Any, coordinates: Any, mixture: Any
) -> tuple[Tensor, ...]:
    """The entries of :class:`State` after e: log-densities of both ends of the path, and their gradients."""
    latents, coordinates, e = latents.of(data), Coordinates(*coordinates), e.detach().requires_grad_()
    u = coordinates.to_latents(e)
    if start == "guide":
        log_prior, log_likelihood, log_guide = latents.log_joint_and_guide(u)
    else:
        log_prior, log_likelihood = latents.log_joint(u)
    target = log_prior + log_likelihood + coordinates.log_det
    if mixture:
        target = target + Mixture(*mixture).log_share(u)
    (target_gradient,) = torch.autograd.grad(target.sum(), e, retain_graph=start != "normal")
    if start == "normal":
        log_start = -0.5 * (e.square().sum(-1) + e.shape[-1] * math.log(2 * math.pi))
        start_gradient = -e
    else:
        log_start = (log_prior if start == "prior" else log_guide) + coordinates.log_det
        (start_gradient,) = torch.autograd.grad(log_start.sum(), e)
    return tuple(each.detach() for each in (log_start, target, start_gradient, target_gradient))


def anneal(path: Path, betas: Tensor, state: State, steps: Tensor) -> tuple[Tensor, State, Tensor]:
    """Take chains from one end of the path to the other, whichever ``betas`` begins with.

    Args:
        betas: shape ``(T + 1,)``.
        steps: frozen step sizes of each transition, shape ``(T - 1, B)``.

    Returns:
        Log-weights ``(C, B)``; the chains after the last transition, at the last temperature but one; mean acceptance
        ``(B,)``, NaN without a transition.
    """
    log_w = torch.zeros_like(state.start, dtype=torch.float64)
    acceptances = []
    for t in range(1, len(betas)):
        log_w += (betas[t] - betas[t - 1]).double() * (state.target - state.start).double()
        if t == len(betas) - 1:
            break
        state, acceptance = path.transition(state, betas[t], steps[t - 1])
        acceptances.append(acceptance)
    mean = torch.stack(acceptances).mean(0) if acceptances else torch.full_like(log_w[0], math.nan)
    return log_w, state, mean.double()


def warm_up(path: Path, betas: Tensor, num_chains: int, longest: float, target: float) -> Tensor:
    """Step sizes of each transition, ``(T - 1, B)``, from chains of their own that go the whole way."""
    state, step, steps = path.evaluate(path.draw(num_chains)), torch.full_like(path.coordinates.log_det, longest), []
    for beta in betas[1:-1]:
        state, acceptance = path.transition(state, beta, step)
        step = (step * torch.exp(0.5 * (acceptance - target))).clamp(max=longest)
        steps.append(step)
    return torch.stack(steps) if steps else step.new_zeros(0, len(step))


def resample(log_w: Tensor, num: int | None = None) -> Tensor:
    """Systematic resampling: numbers of chains ``(num, B)``, each as often as its share of the weights tells.

    ``num`` is how many are wanted; None: as many as there are.
    """
    num = num or len(log_w)
    share = (log_w - log_w.amax(0)).exp()
    share = torch.where(share.sum(0).isfinite() & (share.sum(0) > 0), share, torch.ones_like(share))
    edges = (share / share.sum(0)).cumsum(0)
    comb = torch.arange(num, device=log_w.device).unsqueeze(1) + torch.rand_like(log_w[:1])
    found = torch.searchsorted(edges.T.contiguous(), (comb / num).T.contiguous()).T
    return found.clamp(max=len(log_w) - 1)


def bennett(forward: Tensor, backward: Tensor, effective: Tensor) -> tuple[Tensor, Tensor]:
    """Bennett's acceptance ratio (Bennett 1976, equations 12a and 12b) of chains that go to and fro.

    Args:
        forward: log-weights of chains from the start, of mean Z, shape ``(C, B)``.
        backward: log-weights of chains from the target back, of mean 1 / Z, as many.
        effective: how many of the latter are independent, shape ``(B,)``.

    Returns:
        log Z, and its standard error from the variances over chains of the two means that are made equal, ``(B,)``.
    """
    inverse = -backward
    low = torch.minimum(forward.amin(0), inverse.amin(0)) - 1
    high = torch.maximum(forward.amax(0), inverse.amax(0)) + 1
    low, high = low.nan_to_num(neginf=-1e30), high.nan_to_num(posinf=1e30)
    for _ in range(100):
        middle = (low + high) / 2
        above = torch.sigmoid(forward - middle).mean(0) > torch.sigmoid(middle - inverse).mean(0)
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    log_z = torch.where((forward.isnan() | backward.isnan()).any(0), math.nan, (low + high) / 2)
    variance = torch.zeros_like(log_z)
    for log_w, count in ((forward - log_z, len(forward)), (log_z - inverse, effective)):
        each = torch.sigmoid(log_w)
        variance = variance + each.var(0) / each.mean(0).square() / count
    return log_z, variance.sqrt()


def _like(chains: Tensor, a: Tensor) -> Tensor:
    return chains if a.dim() == 2 else chains.unsqueeze(-1).expand(-1, -1, a.shape[-1])
