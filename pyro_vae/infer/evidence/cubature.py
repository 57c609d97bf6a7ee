"""Integrals of many positive functions at once, over boxes of one or two dimensions, which are split where needed."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_NODES = (
    0.0,
    0.207784955007898467600689403773245,
    0.405845151377397166906606412076961,
    0.586087235467691130294144691693,
    0.741531185599394439863864773280788,
    0.864864423359769072789712788640926,
    0.949107912342758524526189684047851,
    0.991455371120812639206854697526329,
)
_KRONROD = (
    0.209482141084727828012999174891714,
    0.204432940075298892414161999234649,
    0.190350578064785409913256402421014,
    0.169004726639267902826583426598550,
    0.140653259715525918745189590510238,
    0.104790010322250183839876322541518,
    0.063092092629978553290700663189204,
    0.022935322010529224963732008058970,
)
_GAUSS = (
    0.417959183673469387755102040816327,
    0.0,
    0.381830050505118944950369775488975,
    0.0,
    0.279705391489276667901467771423780,
    0.0,
    0.129484966168869693270611432679082,
    0.0,
)
NODES_PER_AXIS = 15


class Mesh(NamedTuple):
    """Cells of B boxes, with what is known of the integrand in each: tensors ``(C, B, *)``.

    Attributes:
        centre, half: of the cell and half its sides, ``(C, B, D)``.
        axis: along which the integrand is rougher.
        log_mass: the logarithm of the integral over it.
        log_error: that of its error by the rules.
        seen: the largest value of the log-integrand at a node.
        peak: that which is to be expected between the nodes.
        log_expected: the logarithm of the mass of such a peak, if it is more than what the rules find.
        bound: what is known to be larger than one factor of the integrand everywhere in the cell; 0 if nothing is.
    """

    centre: Tensor
    half: Tensor
    axis: Tensor
    log_mass: Tensor
    log_error: Tensor
    seen: Tensor
    peak: Tensor
    log_expected: Tensor
    bound: Tensor

    @property
    def log_total(self) -> Tensor:
        """The logarithm of the integral, ``(B,)``."""
        return self.log_mass.logsumexp(0)

    @property
    def error(self) -> Tensor:
        """Its error, ``(B,)``, in nats, at least 1e-6: how much may be left in cells that nothing says to split."""
        return (self.log_error.logsumexp(0) - self.log_total).exp().nan_to_num(math.inf, math.inf).clamp(min=1e-6)

    def believable(self) -> "Mesh":
        """The same with peaks no higher than elsewhere, but for the bounds.

        Far out, where distances are large, parabolas promise peaks that cannot be: the other factor of the integrand,
        the likelihood, is taken to be no larger there than it is seen to be anywhere, or expected where the bound is
        above -60 nats.
        """
        other = torch.where(self.bound > -60, torch.maximum(self.peak, self.seen), self.seen) - self.bound
        over = (self.peak - torch.maximum(self.seen, self.bound + other.amax(0))).clamp(min=0).nan_to_num(0.0)
        expected = self.log_expected - over
        unresolved = expected > self.log_mass + math.log(20)
        return self._replace(peak=self.peak - over, log_expected=torch.where(unresolved, expected, -math.inf))


def integrate(
    log_f: Callable[[Tensor], Tensor],
    bound: Callable[[Tensor, Tensor], Tensor],
    breaks: Tensor,
    num_boxes: int,
    dim: int,
    num_points: int,
    error: float,
) -> Mesh:
    """Integrals of exp(log f) over boxes, by Gauss's and Kronrod's rules of 7 and 15 points along each axis.

    As in QUADPACK (Piessens et al. 1983), the cell of the largest error is split in two, here many at a time and along
    the axis of the larger error, whose size is judged as there. A peak that is narrower than the distance of the nodes
    is seen from afar: a parabola through three log-integrands along each axis says how high it may be and how wide.
    Every other time, cells are split where that makes more mass than the rules find; half of the evaluations are for
    it, if need be. So peaks of any width are found, if their logarithm is smooth.

    Args:
        log_f: log-integrands of points of the B boxes, ``(K, B, D) -> (K, B)``; what is NaN or infinite counts as zero.
        bound: of cells with given lower and upper ends, ``(n, B, D)``, a bound on the logarithm of one factor of the
            integrand, ``(n, B)``.
        breaks: where the first cells end, along each axis, ``(n + 1,)``.
        num_boxes: B.
        dim: D, 1 or 2.
        num_points: evaluations of each box, at most, about.
        error: in nats, at which to stop.
    """
    if dim == 1:  # where points are cheap
        breaks = torch.cat([*(torch.linspace(a, b, 9).to(breaks)[:-1] for a, b in breaks.unfold(0, 2, 1)), breaks[-1:]])
    sides = torch.stack([breaks[:-1], breaks[1:]], -1)
    grid = torch.stack([torch.cartesian_prod(*[sides[:, end]] * dim).reshape(-1, dim) for end in (0, 1)])
    low, high = grid.unsqueeze(2).expand(-1, -1, num_boxes, -1)
    mesh = _cells(log_f, bound, (low + high) / 2, (high - low) / 2)
    exploring = True
    while True:
        now = mesh.believable()
        used = len(mesh.axis) * NODES_PER_AXIS**dim
        left = (num_points - used) // NODES_PER_AXIS**dim // 2
        explored = (now.log_expected.amax(0) < now.log_total + math.log(1e-4)) | (used > num_points / 2)
        if left < 1 or (explored & (now.error <= error)).all():
            return now
        urgency = torch.maximum(now.log_error, now.log_expected) if exploring else now.log_error
        exploring = not exploring
        place = urgency.topk(min(left, max(1, len(mesh.axis) // 4)), dim=0).indices
        centre, half, axis = (_at(part, place) for part in (mesh.centre, mesh.half, mesh.axis))
        along = torch.nn.functional.one_hot(axis, dim).to(half)
        shift, half = along * half / 2, half * (1 - along / 2)
        new = _cells(log_f, bound, torch.cat([centre - shift, centre + shift]), torch.cat([half, half]))
        first, second = (Mesh(*(part[piece] for part in new)) for piece in _halves(len(place)))
        merged = []
        for old, one, other in zip(mesh, first, second, strict=True):
            index = place if old.dim() == 2 else place.unsqueeze(-1).expand_as(one)
            merged.append(torch.cat([old.scatter(0, index, one), other]))
        mesh = Mesh(*merged)


def _halves(size: int) -> tuple[slice, slice]:
    return slice(None, size), slice(size, None)


def _at(part: Tensor, place: Tensor) -> Tensor:
    """Some cells of each box: ``(C, B, *), (n, B) -> (n, B, *)``."""
    return part.gather(0, place if part.dim() == 2 else place.unsqueeze(-1).expand(-1, -1, part.shape[-1]))


def _symmetric(half: tuple[float, ...], like: Tensor, sign: float = 1.0) -> Tensor:
    positive = like.new_tensor(half)
    return torch.cat([sign * positive.flip(0)[:-1], positive])


def _cells(log_f: Callable, bound: Callable, centre: Tensor, half: Tensor) -> Mesh:
    """The mesh of cells with given centres and half sides, ``(n, B, D)``."""
    count, boxes, dim = centre.shape
    x = _symmetric(_NODES, centre, -1.0)
    kronrod, gauss = _symmetric(_KRONROD, centre), _symmetric(_GAUSS, centre)
    nodes = torch.cartesian_prod(*[x] * dim).reshape(-1, 1, dim)
    points = centre.unsqueeze(1) + half.unsqueeze(1) * nodes
    f = log_f(points.reshape(-1, boxes, dim)).nan_to_num(-math.inf, -math.inf, -math.inf)
    f = f.reshape(count, *[NODES_PER_AXIS] * dim, boxes).movedim(-1, 1)  # (n, B, 15) or (n, B, 15, 15)
    flat, log_volume = f.flatten(2), half.log().sum(-1)
    top = flat.amax(-1)
    density = (flat - torch.where(top.isfinite(), top, 0.0).unsqueeze(-1)).exp()
    weights = _product([kronrod] * dim)
    mass = density @ weights
    roughness = torch.stack(
        [(density @ (weights - _product([gauss if i == j else kronrod for j in range(dim)]))).abs() for i in range(dim)]
    )
    spread = (density - mass.unsqueeze(-1) / 2**dim).abs() @ weights
    difference = roughness.sum(0)
    error = spread * (200 * difference / spread.clamp(min=1e-300)).clamp(max=1.0).pow(1.5)
    error = torch.maximum(error, 1e-15 * mass)
    peak, log_expected = _expected(f, x, dim)
    log_mass, log_error = (torch.where(top.isfinite(), each.log() + top, -math.inf) for each in (mass, error))
    return Mesh(
        centre,
        half,
        roughness.argmax(0),
        log_mass + log_volume,
        log_error + log_volume,
        top,
        peak,
        log_expected + log_volume,
        bound(centre - half, centre + half),
    )


def _product(weights: list[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.outer(*weights).flatten()


def _expected(f: Tensor, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The largest value that parabolas along the axes promise, and the log-mass of such a peak, ``(n, B)`` each.

    Args:
        f: log-integrands at the nodes ``x`` in [-1, 1] of each axis, ``(n, B, 15)`` or ``(n, B, 15, 15)``.
    """
    top, log_width = f, torch.zeros_like(f)
    for axis in range(2, 2 + dim):
        gain, width = (part.movedim(-1, axis) for part in _parabola(f.movedim(axis, -1), x))
        top, log_width = top + gain, log_width + width.log()
    peak, place = top.flatten(2).max(-1)
    return peak, peak + log_width.flatten(2).gather(-1, place.unsqueeze(-1)).squeeze(-1)


def _parabola(f: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """By how much a peak may be higher than a node that is the highest of three: half more than their parabola is.

    Also the width of its exponential, sqrt(2 pi) standard deviations, at most 2, that of the cell. At the ends of the
    axis it is that of the three last nodes, which goes on to the edge of the cell. ``(*, 15) -> (*, 15)`` each.
    """
    rise = f.diff(dim=-1) / x.diff()
    rise = torch.where(rise.isfinite(), rise, 0.0)
    half_curvature = rise.diff(dim=-1) / (x[2:] - x[:-2])  # (*, 13)
    slope = rise[..., :-1] + half_curvature * (x[1:-1] - x[:-2])
    first, last = half_curvature[..., :1], half_curvature[..., -1:]
    slopes = torch.cat(
        [rise[..., :1] - first * (x[1] - x[0]), slope, rise[..., -1:] + last * (x[-1] - x[-2])],
        -1,
    )
    curvatures = torch.cat([first, half_curvature, last], -1)
    left, right = torch.cat([x[:1] * 0 - 1, x[:-1]]) - x, torch.cat([x[1:], x[:1] * 0 + 1]) - x
    right[0], left[-1] = 0, 0
    step = torch.minimum(torch.maximum(-slopes / (2 * curvatures), left), right)
    step = torch.where(curvatures < 0, step, 0.0)
    padded = torch.nn.functional.pad(f, (1, 1), value=-math.inf)
    highest = (f >= padded[..., :-2]) & (f >= padded[..., 2:])
    gain = torch.where(highest, slopes * step + curvatures * step.square(), 0.0).clamp(min=0)
    width = torch.where(curvatures < 0, (math.pi / -curvatures.clamp(max=-1e-300)).sqrt(), 2.0).clamp(max=2.0)
    return torch.where(f.isfinite(), 1.5 * gain, 0.0), width
