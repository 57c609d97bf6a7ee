"""Coordinates in which a narrow, slanting or heavy-tailed function of one or two dimensions fills a box."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_vae.infer.evidence.cubature import Mesh

_REACH, _BULK = 40.0, 8.0  # nats below the largest integrand: where the grid ends, and where it is to be fine
_BULK_WIDTH = 2.5  # half the width of the bulk in units of the axes: sinh is near linear there, exponential beyond
_LOWEST = -1e100


class Frame(NamedTuple):
    """Coordinates t of each observation: u = centre + axes sinh(t), for t in the box from low to high."""

    centre: Tensor  # (B, D)
    axes: Tensor  # (B, D, D)
    low: Tensor  # (B, D)
    high: Tensor  # (B, D)

    def t(self, unit: Tensor) -> Tensor:
        """Points of the unit cube ``(K, D)``, stretched to the boxes: ``(K, B, D)``."""
        return torch.lerp(self.low, self.high, unit.unsqueeze(1))


def prior_frame(u: Tensor) -> Frame:
    """Ten standard deviations to both sides of the median of draws ``(K, D)``, by quantiles, which far draws spare."""
    lower, centre, upper = u.quantile(u.new_tensor([0.16, 0.5, 0.84]), dim=0)
    reach = u.new_full((1, u.shape[1]), math.asinh(10))
    return Frame(centre[None], torch.diag_embed((upper - lower).clamp(min=1e-12) / 2)[None], -reach, reach)


def unit_grid(num_points: int, dim: int, device: torch.device) -> Tensor:
    """An odd number of equally spaced points per dimension, so that every other one still ends at both ends."""
    n = num_points if dim == 1 else math.isqrt(num_points)
    line = torch.linspace(0, 1, n - 1 + n % 2, dtype=torch.float64, device=device)
    return torch.cartesian_prod(*[line] * dim).reshape(-1, dim)


def fit_to_cells(frame: Frame, mesh: Mesh) -> Frame:
    """A frame that holds all cells that may matter."""
    ends = torch.stack([mesh.centre - mesh.half, mesh.centre + mesh.half]).sinh()  # (2, C, B, D)
    which = torch.cartesian_prod(*[torch.arange(2, device=ends.device)] * ends.shape[-1]).reshape(-1, ends.shape[-1])
    corners = torch.cat([torch.stack([ends[i, ..., d] for d, i in enumerate(corner)], -1) for corner in which])
    density = mesh.peak - log_cosh(mesh.centre)
    bulk = (density > density.amax(0) - _BULK) * (ends[1] - ends[0]).prod(-1)
    reach = mesh.peak > mesh.peak.amax(0) - _REACH
    fitted, _ = _refit(frame, corners, *(each.repeat(len(which), 1).unsqueeze(-1) for each in (bulk, reach)))
    finite = torch.stack([part.isfinite().flatten(1).all(1) for part in fitted]).all(0)
    return choose(finite, fitted, frame)


def zoom(frame: Frame, unit: Tensor, values: Tensor) -> tuple[Frame, Tensor]:
    """Fit the frame to the log-integrand ``(K, B)`` seen on its grid; whether it fitted already, ``(B,)``."""
    t = frame.t(unit)
    reach, cut_off = _near_peak(values, unit, _REACH)
    bulk, _ = _near_peak(values - log_cosh(t), unit, _BULK)  # by density: a heavy tail has bulk on any scale of t
    zoomed, scale = _refit(frame, t.sinh(), bulk, reach)
    wider = cut_off.double().unsqueeze(-1)  # e times as far
    zoomed = zoomed._replace(low=zoomed.low - wider, high=zoomed.high + wider)
    peak = unit[torch.where(values.isfinite(), values, _LOWEST).argmax(0)]
    shifted = frame._replace(low=frame.low - (peak == 0).double(), high=frame.high + (peak == 1).double())
    outside = ((peak == 0) | (peak == 1)).any(1)  # the integrand still rises: go there before zooming in
    return choose(outside, shifted, zoomed), ~outside & ~cut_off & ((scale > 0.5) & (scale < 2)).all(-1)


def _refit(frame: Frame, y: Tensor, bulk: Tensor, reach: Tensor) -> tuple[Frame, Tensor]:
    """The frame whose bulk and reach are those of points y = sinh(t) of another, and its scales relative to that.

    Args:
        y: ``(K, B, D)``.
        bulk: how much a point counts for the width, ``(K, B, 1)``.
        reach: whether it is to be inside.
    """
    mean = (y * bulk).sum(0) / bulk.sum(0)
    centred = (y - mean) * bulk.sqrt()
    covariance = torch.einsum("kbi,kbj->bij", centred, centred) / bulk.sum(0).unsqueeze(-1)
    turn = torch.linalg.eigh(covariance).eigenvectors
    if y.shape[-1] == 2:  # heavy tails of a product lie along its axes: turn those only for a clear correlation
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        clear = covariance[:, 0, 1].square() > 0.25 * variance.prod(-1)
        turn = torch.where(clear[:, None, None], turn, torch.eye(2, dtype=turn.dtype, device=turn.device))
    y = torch.einsum("bji,kbj->kbi", turn, y)
    low, high = _range(y, bulk > 0)
    shift, scale = (low + high) / 2, (high - low) / (2 * _BULK_WIDTH)
    low, high = _range(torch.asinh((y - shift) / scale), reach)
    turned = frame.axes @ turn
    centre = frame.centre + (turned @ shift.unsqueeze(-1)).squeeze(-1)
    return Frame(centre, turned * scale.unsqueeze(-2), low, high), scale


def choose(mask: Tensor, first: Frame, second: Frame) -> Frame:
    """The first frame for the observations of a mask ``(B,)``, the second for the others."""
    return Frame(*(torch.where(mask.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(first, second, strict=True)))


def _near_peak(values: Tensor, unit: Tensor, nats: float) -> tuple[Tensor, Tensor]:
    """The points within some nats of the largest of ``values`` ``(K, B)``, and their neighbours, ``(K, B, 1)``.

    Also whether the edge of the grid is among the former, ``(B,)``. A peak may lie between the points: where f is
    quadratic, the parabola through a point and its neighbours along an axis, where it is the highest of the three, says
    by how much: this is added before points are compared, so that, of several peaks narrower than the grid's spacing,
    none is lost only because it is further from a point.
    """
    dim = unit.shape[1]
    n = round(len(unit) ** (1 / dim))
    f = torch.where(values.isfinite(), values, _LOWEST).T.unflatten(1, (n,) * dim)  # (B, n) or (B, n, n)
    optimistic = f.clone()
    for axis in range(1, dim + 1):
        rise = f.diff(dim=axis)
        rise = torch.where(rise.abs() < -_LOWEST / 2, rise, 0).movedim(axis, -1)  # an infinite f says nothing
        left, right = rise[..., :-1], -rise[..., 1:]
        peaked = torch.where((left >= 0) & (right >= 0), 1.5 * (left - right).square() / (8 * (left + right)), 0)
        peaked = peaked.nan_to_num(0.0)  # flat
        optimistic += F.pad(peaked, (1, 1)).movedim(-1, axis)
    near = optimistic >= f.flatten(1).amax(1).view(-1, *[1] * dim) - nats
    dilated = (F.max_pool1d if dim == 1 else F.max_pool2d)(near.double(), 3, 1, 1) > 0
    at_edge = ((unit == 0) | (unit == 1)).any(1)
    return dilated.flatten(1).T.unsqueeze(-1), near.flatten(1)[:, at_edge].any(1)


def log_cosh(t: Tensor) -> Tensor:
    """The sum of log cosh over the last dimension."""
    return (t.abs() + torch.log1p(torch.exp(-2 * t.abs())) - math.log(2)).sum(-1)


def _range(y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest over the first dimension, where the mask is true."""
    return torch.where(mask, y, math.inf).amin(0), torch.where(mask, y, -math.inf).amax(0)
