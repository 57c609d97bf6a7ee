"""Exact evidence: in closed form, by quadrature over few latent dimensions, by a sum over discrete latents."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor
from torch.distributions import Independent

from pyro_vae.errors import ContractError
from pyro_vae.infer.checks import check_program
from pyro_vae.infer.evidence.result import Evidence
from pyro_vae.infer.programs import Program, added, latent_sites, particle_trace, sample_sites, scoring, site_of, traces
from pyro_vae.infer.supports import Latents, innermost, unmasked_log_prob
from pyro_vae.infer.trees import Data, data_size, first_tensor, select, split


def quadrature(
    model: Program, guide: Program, data: Data, num_points: int = 2**14, batch_size: int = 2**15
) -> Evidence:
    """log p(x) by the trapezoidal rule over all latent variables, of one or two dimensions in all.

    ``log p(x) = log sum_i exp(log p(x, u_i)) |cell_i|``, in the unconstrained coordinates u of :class:`Latents`. Each
    observation has a grid of its own, u = c + A sinh(t) with t equally spaced, which resolves a narrow posterior and
    reaches heavy tails. It is found by zooming in from the prior's range on the region within 40 nats of the largest
    integrand, which leaves out a share of about exp(-40). For smooth integrands that decay, the error falls
    exponentially with the number of points per dimension (Trefethen & Weideman 2014, "The exponentially convergent
    trapezoidal rule", theorem 5.1); at a kink, as the Laplace density has, with its square.

    A mode is missed if no point of the first, coarse grid comes near it: a quarter of ``num_points``, over ten standard
    deviations of the prior to both sides, further out where the integrand still rises there.

    Args:
        model, guide: see :func:`pyro_vae.traces`; of the guide only the sites matter.
        data: likewise.
        num_points: points of an observation's grid, at least 1024; with two dimensions, its root in each.
        batch_size: pairs of a point and an observation scored at a time.

    Returns:
        Evidence in nats per datum. ``mc_se`` is the quadrature's own error: the difference between the results of all
        points and of every other point (in each dimension), far above the error of the former once it is small;
        infinite where the region of the mass was not found. ``num_invalid`` counts the points whose log-integrand is
        NaN or +inf; a NaN makes ``log_px`` NaN. All else is NaN.

    Raises:
        ContractError: if there are more than two latent dimensions or discrete ones, or as
            :func:`pyro_vae.check_program`.
        ValueError: if ``num_points`` is below 1024 or ``batch_size`` below 1.
    """
    if num_points < 1024:
        raise ValueError(f"num_points must be at least 1024, got {num_points}")
    _check_batch_size(batch_size)
    with scoring(model, guide):
        for part in split(data, 1000):
            check_program(model, guide, part)
        latents = Latents(model, guide, data)
        if not 1 <= latents.dim <= 2:
            raise ContractError(
                f"quadrature is for 1 or 2 latent dimensions, the model has D = {latents.dim}: use "
                "annealed_importance_sampling"
            )
        prior_draws = latents.prior_draws(1001)
        start = _prior_frame(prior_draws.double())
        score = partial(_log_integrand, dtype=prior_draws.dtype, batch_size=batch_size)
        coarse, fine = (
            _unit_grid(points, latents.dim, latents.like.device) for points in (num_points // 4, num_points)
        )
        results = []
        for few in split(data, max(1, batch_size // len(coarse))):
            part = Latents(model, guide, few)
            frame, found = _locate(part, start, coarse, score)
            results.append(_integrate(part, frame, found, fine, score))
    return _exact_evidence(len(fine), *(torch.cat(field) for field in zip(*results, strict=True)))


class _Frame(NamedTuple):
    """Coordinates t of each observation: u = centre + axes sinh(t), for t in the box from low to high."""

    centre: Tensor  # (B, D)
    axes: Tensor  # (B, D, D)
    low: Tensor  # (B, D)
    high: Tensor  # (B, D)

    def t(self, unit: Tensor) -> Tensor:
        """Points of the unit cube ``(K, D)``, stretched to the boxes: ``(K, B, D)``."""
        return torch.lerp(self.low, self.high, unit.unsqueeze(1))


_REACH, _BULK = 40.0, 8.0  # nats below the largest integrand: where the grid ends, and where it is to be fine


_BULK_WIDTH = 2.5  # half the width of the bulk in units of the axes: sinh is near linear there, exponential beyond


_LOWEST = -1e100


def _prior_frame(u: Tensor) -> _Frame:
    """Ten standard deviations to both sides of the median of draws ``(K, D)``, by quantiles, which far draws spare."""
    lower, centre, upper = u.quantile(u.new_tensor([0.16, 0.5, 0.84]), dim=0)
    reach = u.new_full((1, u.shape[1]), math.asinh(10))
    return _Frame(centre[None], torch.diag_embed((upper - lower).clamp(min=1e-12) / 2)[None], -reach, reach)


def _unit_grid(num_points: int, dim: int, device: torch.device) -> Tensor:
    """An odd number of equally spaced points per dimension, so that every other one still ends at both ends."""
    n = num_points if dim == 1 else math.isqrt(num_points)
    line = torch.linspace(0, 1, n - 1 + n % 2, dtype=torch.float64, device=device)
    return torch.cartesian_prod(*[line] * dim).reshape(-1, dim)


def _log_integrand(
    latents: Latents, frame: _Frame, unit: Tensor, dtype: torch.dtype, batch_size: int
) -> Iterator[Tensor]:
    """log p(x, u) |du / dt| at the points ``unit``, in chunks ``(k, B)``, in the order of the points."""
    log_det = torch.linalg.slogdet(frame.axes).logabsdet
    for part in unit.split(max(1, batch_size // data_size(latents.data))):
        t = frame.t(part)
        u = frame.centre + torch.einsum("bij,kbj->kbi", frame.axes, t.sinh())
        log_prior, log_likelihood = latents.log_joint(u.to(dtype))
        yield log_prior.double() + log_likelihood.double() + _log_cosh(t) + log_det


def _locate(latents: Latents, start: _Frame, unit: Tensor, score: Callable) -> tuple[_Frame, Tensor]:
    """The frame that fits each observation's integrand, and whether it was found, ``(B,)``."""
    frame = _Frame(*(part.expand(data_size(latents.data), *part.shape[1:]) for part in start))
    found = torch.zeros(data_size(latents.data), dtype=torch.bool, device=unit.device)
    for _ in range(60):
        values = torch.cat(list(score(latents, frame, unit)))
        zoomed, settled = _zoom(frame, unit, values)
        frame = _choose(found, frame, zoomed)
        found |= settled
        if found.all():
            break
    return frame, found


def _zoom(frame: _Frame, unit: Tensor, values: Tensor) -> tuple[_Frame, Tensor]:
    """Fit the frame to the log-integrand ``(K, B)`` seen on its grid; whether it fitted already, ``(B,)``."""
    t = frame.t(unit)
    reach, cut_off = _near_peak(values, unit, _REACH)
    bulk, _ = _near_peak(values - _log_cosh(t), unit, _BULK)  # by density: a heavy tail has bulk on any scale of t
    y = t.sinh()
    centred = (y - (y * bulk).sum(0) / bulk.sum(0)) * bulk
    covariance = torch.einsum("kbi,kbj->bij", centred, centred)
    turn = torch.linalg.eigh(covariance).eigenvectors
    if unit.shape[1] == 2:  # heavy tails of a product lie along its axes: turn those only for a clear correlation
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        clear = covariance[:, 0, 1].square() > 0.25 * variance.prod(-1)
        turn = torch.where(clear[:, None, None], turn, torch.eye(2, dtype=turn.dtype, device=turn.device))
    y = torch.einsum("bji,kbj->kbi", turn, y)
    low, high = _range(y, bulk)
    shift, scale = (low + high) / 2, (high - low) / (2 * _BULK_WIDTH)
    low, high = _range(torch.asinh((y - shift) / scale), reach)
    wider = cut_off.double().unsqueeze(-1)  # e times as far
    turned = frame.axes @ turn
    zoomed = _Frame(
        frame.centre + (turned @ shift.unsqueeze(-1)).squeeze(-1),
        turned * scale.unsqueeze(-2),
        low - wider,
        high + wider,
    )
    peak = unit[torch.where(values.isfinite(), values, _LOWEST).argmax(0)]
    shifted = frame._replace(low=frame.low - (peak == 0).double(), high=frame.high + (peak == 1).double())
    outside = ((peak == 0) | (peak == 1)).any(1)  # the integrand still rises: go there before zooming in
    return _choose(outside, shifted, zoomed), ~outside & ~cut_off & ((scale > 0.5) & (scale < 2)).all(-1)


def _choose(mask: Tensor, first: _Frame, second: _Frame) -> _Frame:
    """The first frame for the observations of a mask ``(B,)``, the second for the others."""
    return _Frame(*(torch.where(mask.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(first, second, strict=True)))


def _near_peak(values: Tensor, unit: Tensor, nats: float) -> tuple[Tensor, Tensor]:
    """The points within some nats of the largest of ``values`` ``(K, B)``, and their neighbours, ``(K, B, 1)``.

    Also whether the edge of the grid is among the former, ``(B,)``. A peak may lie between the points: where f is
    quadratic it is at most D/8 times the sum of f's second differences higher than the nearest of them, which is a
    maximum along at least one axis. Half the second differences along such axes are added before points are compared,
    so that, of several peaks narrower than the grid's spacing, none is lost only because it is further from a point.
    """
    dim = unit.shape[1]
    n = round(len(unit) ** (1 / dim))
    f = torch.where(values.isfinite(), values, _LOWEST).T.unflatten(1, (n,) * dim)  # (B, n) or (B, n, n)
    optimistic = f.clone()
    for axis in range(1, dim + 1):
        rise = f.diff(dim=axis)
        rise = torch.where(rise.abs() < -_LOWEST / 2, rise, 0).movedim(axis, -1)  # an infinite f says nothing
        left, right = rise[..., :-1], -rise[..., 1:]
        peaked = torch.where((left >= 0) & (right >= 0), (left + right) / 2, 0)
        optimistic += F.pad(peaked, (1, 1)).movedim(-1, axis)
    near = optimistic >= f.flatten(1).amax(1).view(-1, *[1] * dim) - nats
    dilated = (F.max_pool1d if dim == 1 else F.max_pool2d)(near.double(), 3, 1, 1) > 0
    at_edge = ((unit == 0) | (unit == 1)).any(1)
    return dilated.flatten(1).T.unsqueeze(-1), near.flatten(1)[:, at_edge].any(1)


def _log_cosh(t: Tensor) -> Tensor:
    """The sum of log cosh over the last dimension."""
    return (t.abs() + torch.log1p(torch.exp(-2 * t.abs())) - math.log(2)).sum(-1)


def _range(y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest over the first dimension, where the mask is true."""
    return torch.where(mask, y, math.inf).amin(0), torch.where(mask, y, -math.inf).amax(0)


def _integrate(
    latents: Latents, frame: _Frame, found: Tensor, unit: Tensor, score: Callable
) -> tuple[Tensor, Tensor, Tensor]:
    """log p(x), its error, and the number of invalid points, ``(B,)`` each."""
    dim = unit.shape[1]
    n = round(len(unit) ** (1 / dim))
    index = torch.arange(len(unit), device=unit.device)
    every_other = (index % 2 == 0) if dim == 1 else (index % n % 2 == 0) & (index // n % 2 == 0)
    total, thinned = (torch.full_like(frame.low[:, 0], -math.inf) for _ in range(2))
    invalid = torch.zeros_like(found, dtype=torch.long)
    first = 0
    for values in score(latents, frame, unit):
        kept = every_other[first : first + len(values)]
        total = torch.logaddexp(total, values.logsumexp(0))
        thinned = torch.logaddexp(thinned, values[kept].logsumexp(0))
        invalid += (values.isnan() | values.isposinf()).sum(0)
        first += len(values)
    log_cell = ((frame.high - frame.low) / (n - 1)).log().sum(-1)
    error = (total - thinned - dim * math.log(2)).abs()
    return total + log_cell, torch.where(found, error, math.inf), invalid


def enumeration(model: Program, guide: Program, data: Data, limit: int = 2**16, batch_size: int = 2**15) -> Evidence:
    """log p(x) = log sum_z p(x, z), over all values z of all latent variables, which are discrete.

    Args:
        model, guide: see :func:`pyro_vae.traces`; of the guide only the sites matter. A site may depend on others, but
            not the values it can take.
        data: likewise.
        limit: the largest number of values z.
        batch_size: pairs of a value and an observation scored at a time.

    Returns:
        Evidence in nats per datum. ``mc_se`` is 0; ``num_invalid`` counts the values whose log-probability is NaN or
        +inf; all else is NaN.

    Raises:
        ContractError: if a latent site is continuous or has no finite list of values, if there are more values than
            ``limit``, or as :func:`pyro_vae.check_program`.
        ValueError: if ``batch_size`` is below 1.
    """
    _check_batch_size(batch_size)
    with scoring(model, guide):
        for part in split(data, 1000):
            check_program(model, guide, part)
        model_trace, _ = traces(model, guide, select(data, slice(1)), 1)
        choices = {name: _choices(name, site_of(model_trace, name)) for name in latent_sites(model_trace)}
        observed = [name for name in sample_sites(model_trace) if name not in choices]
        count = math.prod(len(values) ** elements for values, elements, _ in choices.values())
        if count > limit:
            sizes = " * ".join(
                f"{len(values)}^{elements} at '{name}'" for name, (values, elements, _) in choices.items()
            )
            raise ContractError(
                f"the latent variables take {count} values together ({sizes}), more than the limit of {limit}: raise "
                "the limit, or use importance_sampling"
            )
        device, results = first_tensor(data).device, []
        for part in split(data, max(1, batch_size // min(count, 1024))):
            log_px = torch.full((data_size(part),), -math.inf, dtype=torch.float64, device=device)
            invalid = torch.zeros_like(log_px, dtype=torch.long)
            for index in torch.arange(count, device=device).split(max(1, batch_size // data_size(part))):
                values = {
                    name: z.unsqueeze(1).expand(-1, data_size(part), *z.shape[1:])
                    for name, z in _decode(index, choices).items()
                }
                trace = particle_trace(poutine.condition(model, data=values), part, len(index))
                trace.compute_log_prob()
                # of the part of an obs_mask site that was not seen, nothing; what is masked sums to one over its values
                latent = (unmasked_log_prob(site_of(trace, name)) for name in choices)
                seen = (site_of(trace, name)["log_prob"] for name in observed)
                log_joint = (added(latent) + added(seen)).double()
                log_px = torch.logaddexp(log_px, log_joint.logsumexp(0))
                invalid += (log_joint.isnan() | log_joint.isposinf()).sum(0)
            results.append((log_px, torch.zeros_like(log_px), invalid))
    return _exact_evidence(count, *(torch.cat(field) for field in zip(*results, strict=True)))


def _choices(name: str, site: dict) -> tuple[Tensor, int, torch.Size]:
    """What one element of a discrete site can be, ``(V, *)``, its number of elements, and the site's event shape."""
    fn = base = site["fn"]
    while isinstance(base, Independent):
        base = base.base_dist
    if not innermost(fn.support).is_discrete:
        raise ContractError(
            f"site '{name}' is continuous ({type(base).__name__}), it has no values to sum over: use quadrature if "
            "there are at most 2 latent dimensions, else importance_sampling"
        )
    try:
        values = base.enumerate_support(expand=False)
    except NotImplementedError:
        raise ContractError(
            f"site '{name}' ({type(base).__name__} on {base.support}) has no finite list of values: use "
            "importance_sampling"
        ) from None
    values = values.reshape(-1, *base.event_shape).to(site["value"].dtype)
    return values, math.prod(fn.event_shape[: len(fn.event_shape) - len(base.event_shape)]), fn.event_shape


def _decode(index: Tensor, choices: dict[str, tuple[Tensor, int, torch.Size]]) -> dict[str, Tensor]:
    """The combinations of values with these numbers ``(K,)``, by site: ``(K, *event_shape)``."""
    decoded = {}
    for name, (values, elements, shape) in choices.items():
        digits = []
        for _ in range(elements):
            digits.append(index % len(values))
            index = index // len(values)
        decoded[name] = values[torch.stack(digits, -1)].reshape(-1, *shape)
    return decoded


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def _exact_evidence(num_points: int, log_px: Tensor, error: Tensor, invalid: Tensor) -> Evidence:
    nan = torch.full_like(log_px, math.nan)
    return Evidence(log_px, error, ess=nan, khat=nan, num_invalid=invalid, acceptance=nan, num_samples=num_points)
