"""The Laplace approximation of the posterior, and coordinates in which a density of about its shape is a unit ball."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pyro_vae.infer.programs import added
from pyro_vae.infer.supports import Latents

NUMBERS = 2**24
"""Entries of the matrices ``(B, D, D)`` that are made at once."""


class Coordinates(NamedTuple):
    """Whitened coordinates e of B observations: u = loc + factor e. Densities of e count log \\|du / de\\|.

    Attributes:
        loc: shape ``(B, D)``.
        factor: shape ``(B, D, D)``.
        log_det: log \\|det factor\\|, shape ``(B,)``.
    """

    loc: Tensor
    factor: Tensor
    log_det: Tensor

    def to_latents(self, e: Tensor) -> Tensor:
        """u of e, ``(K, B, D)`` both."""
        return self.loc + torch.einsum("bij,kbj->kbi", self.factor, e)

    def from_latents(self, u: Tensor) -> Tensor:
        """e of u, ``(K, B, D)`` both."""
        return torch.linalg.solve_ex(self.factor, (u - self.loc).unsqueeze(-1))[0].squeeze(-1)

    def select(self, among: Any) -> "Coordinates":
        """The same for some of the observations."""
        return Coordinates(*(each[among] for each in self))


def diagonal(loc: Tensor, scale: Tensor) -> Coordinates:
    """Coordinates that are scaled one by one: ``loc`` and ``scale`` have shape ``(B, D)``."""
    return Coordinates(loc, torch.diag_embed(scale), scale.log().sum(-1))


@torch.enable_grad()
def laplace_approximation(
    latents: Latents,
    num_steps: int = 20,
    num_polishing: int = 4,
    num_refinements: int = 8,
    num_samples: int = 16,
    start: Tensor | None = None,
) -> Coordinates:
    """The Gaussian at the mode of each p(u | x), with the curvature there, moved towards the Gaussian nearest in KL.

    From the guide's mean, Adam climbs log p(x, u), all observations at once, in units of the prior's width. Then the
    exact Hessian, one row per dimension, gives the precision; its eigenvalues are raised to at least the prior's,
    since a posterior is seldom wider than the prior and a mode need not have been reached, unless the posterior is
    normal: latent variables that depend on each other, as the states of a process do, are wider together than each
    alone. Newton's steps with that one Hessian, each taken if it climbs, end the search.

    A posterior is skewed, so that its mode is not its middle: :func:`_refine` shifts and rescales the Gaussian. A
    Gaussian posterior is found exactly, and left alone.

    Costs, in evaluations of the decoder per observation, a gradient counting as two: 2 (``num_steps + num_polishing +
    1``) for the mode, 2 D + 2 for the Hessian, 2 (``num_refinements + 1``) ``num_samples`` for the refinement; 6 more
    where an eigenvalue is below the prior's.

    Args:
        latents: the observations' latent variables.
        num_steps: of Adam, at least 0.
        num_polishing: Newton's steps, at least 0.
        num_refinements: steps towards the nearest Gaussian; 0 is Laplace's own approximation.
        num_samples: draws for each of these, an even number.
        start: where a climb has ended, shape ``(B, D)``, in place of one from the guide's mean.

    Returns:
        Coordinates in which the approximation is N(0, I).
    """
    _, width = prior_location_and_width(latents)
    loc = climb(latents, latents.sample_guide(32).mean(0), width, num_steps) if start is None else start
    eigenvalues, vectors = _eigen(-_hessian(latents, loc), width)
    normal = _is_normal(latents, loc, width[:, None] * vectors, eigenvalues)
    eigenvalues = torch.where(normal.unsqueeze(-1), eigenvalues, eigenvalues.clamp(min=1))
    factor = width[:, None] * vectors * eigenvalues.rsqrt().unsqueeze(-2)
    loc = _polish(latents, loc, factor, num_polishing)
    approximation = Coordinates(loc, factor, width.log().sum() - 0.5 * eigenvalues.log().sum(-1))
    return _refine(latents, approximation, num_refinements, num_samples) if num_refinements else approximation


def laplace_cost(dim: int, num_steps: int = 20) -> int:
    """Evaluations that :func:`laplace_approximation` takes by default, after ``num_steps`` of its climb."""
    return 2 * num_steps + 2 * 5 + 2 * dim + 2 + 2 * 9 * 16


def observations_at_once(rows: int, dim: int) -> int:
    """``rows``, or fewer where there are many dimensions: an observation has matrices ``(D, D)`` of its own."""
    return max(1, min(rows, NUMBERS // dim**2))


def prior_location_and_width(latents: Latents) -> tuple[Tensor, Tensor]:
    """Median of p(u), and half the width of its central 68 %: mean and standard deviation if it is normal; ``(D,)``."""
    at = torch.tensor([0.16, 0.5, 0.84]).to(latents.like)
    low, median, high = latents.prior_draws(2048).quantile(at, dim=0)
    return median, (high - low).clamp(min=1e-6) / 2


def _gradient(log_density: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    """A log-density and its gradient: ``(*, D) -> (*), (*, D)``."""
    at = at.detach().requires_grad_()
    value = log_density(at)
    (gradient,) = torch.autograd.grad(value.sum(), at)
    return value.detach(), gradient


def log_joint(latents: Latents, u: Tensor) -> Tensor:
    """log p(x, u): ``(*, B, D) -> (*, B)``."""
    return added(latents.log_joint(u)) if u.dim() == 3 else added(latents.log_joint(u.unsqueeze(0))).squeeze(0)


@torch.enable_grad()
def climb(latents: Latents, u: Tensor, width: Tensor, num_steps: int, lr: float = 0.15) -> Tensor:
    """The best points that Adam meets on its way up log p(x, u), its steps shrinking linearly: ``(*, B, D)``."""
    first, second = torch.zeros_like(u), torch.zeros_like(u)
    best, highest = u, u.new_full(u.shape[:-1], -math.inf)
    for step in range(num_steps):
        value, gradient = _gradient(partial(log_joint, latents), u)
        higher = value > highest
        best, highest = torch.where(higher[..., None], u, best), torch.where(higher, value, highest)
        gradient = torch.nan_to_num(gradient * width)
        first = 0.9 * first + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient.square()
        direction = first / (1 - 0.9 ** (step + 1)) / ((second / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
        u = u + lr * (1 - step / num_steps) * width * direction
    return best


def _hessian(latents: Latents, u: Tensor) -> Tensor:
    """Second derivatives of log p(x, u): ``(B, D) -> (B, D, D)``."""
    u = u.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(log_joint(latents, u).sum(), u, create_graph=True)
    rows = [torch.autograd.grad(gradient[:, d].sum(), u, retain_graph=True)[0] for d in range(latents.dim)]
    hessian = torch.stack(rows, 1).nan_to_num()
    return (hessian + hessian.mT) / 2


def _eigen(hessian: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of second derivatives ``(B, D, D)`` in units of ``width``, ``(D,)``."""
    scaled = hessian * width * width[:, None]
    if scaled.isfinite().all():
        return torch.linalg.eigh(scaled)
    precise = hessian.cpu().double() * width.cpu().double() * width.cpu().double()[:, None]
    most = torch.finfo(hessian.dtype).max ** 0.5  # of which the root of a matrix can be told
    values, vectors = torch.linalg.eigh(precise.nan_to_num(0.0, most, -most).clamp(-1e150, 1e150))
    return values.clamp(max=torch.finfo(hessian.dtype).max).to(hessian), vectors.to(hessian)


def cholesky(matrices: Tensor) -> Tensor:
    """Their factors, ``(B, D, D)``, of NaN where a matrix has none."""
    factor, info = torch.linalg.cholesky_ex(matrices)
    return factor.masked_fill((info > 0)[..., None, None], math.nan)


def _is_normal(latents: Latents, loc: Tensor, axes: Tensor, precisions: Tensor) -> Tensor:
    """Whether p(u | x) is normal with these precisions along these axes, as far as it is seen at two points: ``(B,)``.

    Asked only where one of them is below 1; otherwise false.
    """
    result = torch.zeros(len(loc), dtype=torch.bool, device=loc.device)
    least = precisions.amin(-1)
    asked = ((least < 1) & (least > 1e-6)).nonzero().squeeze(1)
    if len(asked) == 0:
        return result
    some, loc, axes, precisions = latents.select(asked), loc[asked], axes[asked], precisions[asked]
    signs = torch.ones_like(precisions)
    signs[:, 1::2] = -1
    e = 2 * torch.stack([torch.zeros_like(signs), signs, -signs.abs()])
    _, gradient = _gradient(partial(log_joint, some), loc + torch.einsum("bij,kbj->kbi", axes, e * precisions.rsqrt()))
    along = torch.einsum("bij,kbi->kbj", axes, gradient) * precisions.rsqrt()
    residual = (along - along[0] + e).abs().amax((0, 2))
    # Hessians of single precision are off by some of it
    result[asked] = residual < 20 * torch.finfo(loc.dtype).eps ** 0.5 * (1 if loc.dtype == torch.float64 else 0.3)
    return result


def _polish(latents: Latents, u: Tensor, factor: Tensor, num_steps: int) -> Tensor:
    """Newton's steps with a fixed covariance factor factor', each as long as the last one that climbed allows."""
    if num_steps == 0:
        return u
    log_density = partial(log_joint, latents)
    value, gradient = _gradient(log_density, u)
    length = torch.ones_like(value, dtype=u.dtype)  # which may be another than that of log p(x, u)
    for _ in range(num_steps):
        step = (factor @ (factor.mT @ gradient.unsqueeze(-1))).squeeze(-1)
        new = u + length[:, None] * step
        new_value, new_gradient = _gradient(log_density, new)
        higher = new_value > value
        u, gradient = torch.where(higher[:, None], new, u), torch.where(higher[:, None], new_gradient, gradient)
        value = torch.where(higher, new_value, value)
        length = torch.where(higher, length, length / 4)
    return u


def _refine(latents: Latents, approximation: Coordinates, num_steps: int, num_samples: int) -> Coordinates:
    """Move Gaussians N(0, I) of e towards those nearest in KL(q || p), which have (Opper & Archambeau 2009, eq. 6-7)

        E_q[r] = 0,    E_q[dr / de] = 0,    with r = d/de (log p(x, e) - log q(e)),

    by shifting them along E_q[r] and scaling each axis by half of E_q[dr_d / de_d] = E_q[r_d e_d] (Stein's identity).
    Axes are those of the Hessian. Where the bound did not rise, the first one is kept.
    """
    now, first, elbo = approximation, None, None
    for step in range(num_steps + 1):
        half = torch.randn(num_samples // 2, *now.loc.shape, dtype=now.loc.dtype, device=now.loc.device)
        e = torch.cat([half, -half])
        log_joint, target_gradient = _gradient(lambda e, at=now: whitened_log_joint(latents, at, e), e)
        elbo = (log_joint + 0.5 * e.square().sum(-1)).mean(0)
        if first is None:
            first = elbo
        if step == num_steps:
            break
        rate = 0.5 * (1 - step / num_steps)
        residual = torch.nan_to_num(target_gradient + e)
        shift = (rate * residual.mean(0)).clamp(-1, 1)
        growth = (rate * (residual * e).mean(0)).clamp(-0.5, 0.5) / 2
        loc = now.loc + (now.factor @ shift.unsqueeze(-1)).squeeze(-1)
        now = Coordinates(loc, now.factor * growth.exp().unsqueeze(-2), now.log_det + growth.sum(-1))
    higher = cast(Tensor, elbo) > cast(Tensor, first)
    pairs = zip(now, approximation, strict=True)
    return Coordinates(*(torch.where(higher.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in pairs))


def whitened_log_joint(latents: Latents, coordinates: Coordinates, e: Tensor) -> Tensor:
    """log p(x, e) of whitened e: ``(K, B, D) -> (K, B)``."""
    return sum(latents.log_joint(coordinates.to_latents(e))) + coordinates.log_det
