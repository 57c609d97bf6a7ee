"""Coordinates in which independent real numbers are standard normal, whatever their distributions were."""

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

LogDensity = Callable[[Tensor], Tensor]
"""Log-densities of D numbers u, one by one and independent: ``(T, D) -> (T, D)``, in double precision, in nats."""


class Map(Protocol):
    """An increasing map from v to u of a tensor's numbers, one by one, with its inverse.

    Attributes:
        misfit: by how many nats, at most, the density of v differs from N(0, 1) where ``|v| < 6``.
    """

    misfit: float

    def __call__(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """u and log du/dv: ``(*, *shape)`` each."""
        ...

    def inverse(self, u: Tensor) -> Tensor:
        """v of u: ``(*, *shape)``, without gradients."""
        ...


class Affine:
    """u = loc + scale v, for loc and scale of the shape of u."""

    misfit = 0.0

    def __init__(self, loc: Tensor, scale: Tensor):
        self.loc, self.scale = loc, scale
        self._log_scale = scale.log()

    def __call__(self, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.loc + self.scale * v, self._log_scale.expand_as(v)

    def inverse(self, u: Tensor) -> Tensor:
        return (u - self.loc) / self.scale

    @property
    def is_identity(self) -> bool:
        return bool((self.loc == 0).all() and (self.scale == 1).all())


class Tabulated:
    """u = F^-1(Phi(v)) of each number, by monotone cubics between knots that are equally spaced in v, linear beyond.

    The cubic has the right values and slopes, phi(v) / p(u), at both its knots (Hermite's), so that u is once
    continuously differentiable. Densities count the slope of the cubic itself, which makes them exact whatever the
    error of the interpolation, about 1e-6 nats for smooth densities.

    Args:
        knots: u at v = -8, -8 + 1/64 .. 8, for each of R distributions: ``(R, 1025)``, increasing.
        slopes: du/dv there, each at most twice the mean slope to its left and right (up to three times, the cubic is
            monotone: Fritsch & Carlson 1980).
        kind: which of the R distributions each number has, of the shape of u.
        like: a tensor of the type of u.
    """

    end, per_unit = 8, 64
    misfit = math.nan

    def __init__(self, knots: Tensor, slopes: Tensor, kind: Tensor, like: Tensor):
        width = 1 / self.per_unit
        secants = knots.diff() / width
        first, last = slopes[:, :-1], slopes[:, 1:]
        square, cube = (3 * secants - 2 * first - last) / width, (first + last - 2 * secants) / width**2
        inner = torch.stack([knots[:, :-1], first, square, cube], -1)
        left, right = (
            torch.stack([start, slope, torch.zeros_like(slope), torch.zeros_like(slope)], -1)[:, None]
            for start, slope in (
                (knots[:, 0] - slopes[:, 0] * width, slopes[:, 0]),
                (knots[:, -1], slopes[:, -1]),
            )
        )
        cubics = torch.cat([left, inner, right], 1)  # one more cell at each end, without a bound
        self._cells = cubics.shape[1]
        self._knots = knots
        self._kind, self._offset = kind, kind * self._cells
        self._exact = cubics.flatten(0, 1)
        self._cubics = self._exact.to(like)

    def __call__(self, v: Tensor) -> tuple[Tensor, Tensor]:
        position = (v.detach() + (self.end + 1 / self.per_unit)) * self.per_unit
        cell = position.nan_to_num(0.0).clamp(0, self._cells - 1).floor()
        x = v - self._left_end(cell)
        start, slope, square, cube = self._cubics[self._offset + cell.long()].unbind(-1)
        u = start + x * (slope + x * (square + x * cube))
        return u, (slope + x * (2 * square + 3 * x * cube)).log()

    def _left_end(self, cell: Tensor) -> Tensor:
        return cell / self.per_unit - (self.end + 1 / self.per_unit)

    def inverse(self, u: Tensor) -> Tensor:
        flat = u.detach().double().reshape(-1, self._kind.numel()).T.contiguous()  # (D, N)
        cell = torch.searchsorted(self._knots[self._kind.flatten()], flat)
        start, slope, square, cube = self._exact[self._offset.reshape(-1, 1) + cell].unbind(-1)
        linear = (flat - start) / slope
        low, high = torch.zeros_like(flat), torch.full_like(flat, 1 / self.per_unit)
        x = linear.clamp(low, high)
        for _ in range(20):  # Newton's steps, or halves where they leave the interval that holds the root
            excess = start + x * (slope + x * (square + x * cube)) - flat
            low, high = torch.where(excess <= 0, x, low), torch.where(excess >= 0, x, high)
            step = x - excess / (slope + x * (2 * square + 3 * x * cube))
            x = torch.where((step >= low) & (step <= high), step, (low + high) / 2)
        x = torch.where((cell == 0) | (cell == self._cells - 1) | flat.isnan(), linear, x)
        return (self._left_end(cell) + x).T.reshape(u.shape).to(u)


def gaussianize(log_density: LogDensity, draws: Tensor, shape: torch.Size, like: Tensor) -> Map | None:
    """The map from standard normal v to numbers u that have given densities; None where it is not found.

    The density is integrated from both sides, so that either tail keeps its digits, on a mesh that becomes equally
    spaced in v: that of the first pass is u = median + width sinh(t), whose ends no tail reaches, and draws, which show
    where the mass is; each of the passes that follow adds points at equal distances of the v seen before, and where the
    rule is worst. What cannot be normalized, or is too rough for that, is left alone. A normal distribution gives an
    affine map.

    Args:
        log_density: of u, its D numbers in one row.
        draws: some of u, ``(S, D)``, which tell the location and width.
        shape: of u, D numbers.
        like: a tensor of the type, and on the device, of u.
    """
    draws = draws.double().nan_to_num(0.0, 1e30, -1e30)
    spread = _Spread(log_density, draws)
    own = draws[:, spread.first]
    low, median, high = own.quantile(own.new_tensor([0.16, 0.5, 0.84]), dim=0)
    t = torch.linspace(-70, 70, 1025, dtype=own.dtype, device=own.device)[:, None]
    mesh = _Mesh(spread, torch.cat([own, median + (high - low).clamp(min=1e-12) / 2 * t.sinh()]))
    end, per_unit = Tabulated.end, Tabulated.per_unit
    dense = torch.linspace(-end - 1, end + 1, 2 * (end + 1) * per_unit + 1, dtype=own.dtype, device=own.device)
    for passes in range(10):
        mesh = _Mesh(spread, torch.cat([mesh.u, mesh.at(dense), mesh.rough]))
        if passes >= 2 and (mesh.log_total.abs() < 1e-5).all():
            break
    if not (mesh.log_total.abs() < 1e-3).all():
        return None
    v = torch.linspace(-end, end, 2 * end * per_unit + 1, dtype=own.dtype, device=own.device)[:, None]
    u = mesh.near(v)
    log_p = spread(u) - mesh.log_total
    loc, scale = _normal(spread, u[len(u) // 4], u[len(u) // 2], u[-1 - len(u) // 4])
    misfit = log_p + scale.log() + 0.5 * ((u - loc) / scale).square() + 0.5 * math.log(2 * math.pi)
    if (misfit.abs() < 1e-4).all():
        return Affine(*(each[spread.kind].reshape(shape).to(like) for each in (loc, scale)))
    secants = u.diff(dim=0) * per_unit
    least = torch.minimum(*(F.pad(secants, (0, 0, *side), value=math.inf) for side in ((1, 0), (0, 1))))
    slopes = (-0.5 * v.square() - 0.5 * math.log(2 * math.pi) - log_p).exp()
    slopes = torch.minimum(torch.maximum(slopes, 0.05 * least), 2 * least)  # of a density with jumps or poles
    u, slopes = _cut(v, u, slopes, 1e-20 * torch.finfo(like.dtype).max)
    if not ((u.diff(dim=0) > 0).all() and u.isfinite().all() and (slopes > 0).all()):
        return None
    made = Tabulated(u.T.contiguous(), slopes.T, spread.kind.reshape(shape), like)
    made.misfit = _misfit(made, spread, mesh.log_total, shape, like)
    return made


def _misfit(made: Tabulated, spread: "_Spread", log_total: Tensor, shape: torch.Size, like: Tensor) -> float:
    """The largest difference between log p(v) and N(0, 1), half-way between the knots."""
    half = 1 / (2 * made.per_unit)
    v = torch.linspace(half - 6, 6 - half, 12 * made.per_unit, dtype=like.dtype, device=like.device)
    both = made(v.view(-1, *[1] * len(shape)).expand(-1, *shape))
    u, log_slope = (each.reshape(len(v), -1)[:, spread.first] for each in both)
    log_p = spread(u.double()) - log_total + log_slope
    return (log_p + (0.5 * v.square() + 0.5 * math.log(2 * math.pi))[:, None]).abs().max().item()


class _Spread:
    """Log-densities of R different distributions, ``(G, R) -> (G, R)``, from those of D numbers, many of them alike.

    Points are spread over the numbers that share a distribution, so that 50 latent variables cost no more than one.
    """

    def __init__(self, log_density: LogDensity, draws: Tensor):
        self.log_density = log_density
        at = draws.flatten().sort().values
        at = at[torch.linspace(0, len(at) - 1, 33, device=at.device).long()]
        seen = log_density(at[:, None].expand(-1, draws.shape[1])).nan_to_num(0.0)
        _, self.kind, counts = seen.T.unique(dim=0, return_inverse=True, return_counts=True)
        ordered = self.kind.argsort(stable=True)
        starts = counts.cumsum(0) - counts
        self.first = ordered[starts]
        self._places = ordered[starts + torch.arange(int(counts.min()), device=at.device)[:, None]]  # (m, R)

    def __call__(self, u: Tensor) -> Tensor:
        size, share = len(u), len(self._places)
        rows = F.pad(u.T, (0, -size % share), value=0.0).T.reshape(-1, *self._places.shape)  # (T, m, R)
        values = []
        for part in rows.split(max(1, 2**22 // self.kind.numel())):
            full = part[:, 0, self.kind]
            full[:, self._places] = part
            values.append(self.log_density(full)[:, self._places])
        return torch.cat(values).flatten(0, 1)[:size].nan_to_num(-math.inf, -math.inf, -math.inf)


class _Mesh:
    """Points u ``(G, R)``, in order, with v = Phi^-1(F(u)) by Simpson's rule, and the logarithm of the whole mass."""

    def __init__(self, log_density: LogDensity, u: Tensor):
        self.u = u.sort(0).values
        width = self.u.diff(dim=0)
        values = log_density(torch.cat([self.u, self.u[:-1] + width / 2]))
        self.log_p, middle = values[: len(u)], values[len(u) :]
        corners = torch.stack([self.log_p[:-1], middle + math.log(4), self.log_p[1:]])
        log_mass = corners.logsumexp(0) + width.log() - math.log(6)
        trapezoid = corners[::2].logsumexp(0) + width.log() - math.log(2)
        worst = (log_mass.exp() - trapezoid.exp()).abs().topk(256, dim=0).indices
        self.rough = (self.u[:-1] + width / 2).gather(0, worst)  # where more points are needed most
        below = F.pad(log_mass.logcumsumexp(0), (0, 0, 1, 0), value=-math.inf)
        above = F.pad(log_mass.flip(0).logcumsumexp(0).flip(0), (0, 0, 0, 1), value=-math.inf)
        self.log_total = below[-1]
        v = torch.where(
            below < above,
            torch.special.ndtri((below - self.log_total).exp()),
            -torch.special.ndtri((above - self.log_total).exp()),
        )
        self.v = v.nan_to_num(0.0).clamp(-40, 40).cummax(0).values

    def _bracket(self, v: Tensor) -> Tensor:
        """The point after each v, ``(n, R)``."""
        wanted = v.reshape(1, -1).expand(self.v.shape[1], -1).contiguous()
        return torch.searchsorted(self.v.T.contiguous(), wanted).T.clamp(1, len(self.v) - 1)

    def at(self, v: Tensor) -> Tensor:
        """About the u of each v, ``(n, R)``."""
        after = self._bracket(v)
        ends = [(self.v.gather(0, i), self.u.gather(0, i)) for i in (after - 1, after)]
        (v_low, u_low), (v_high, u_high) = ends
        return torch.lerp(u_low, u_high, ((v.reshape(-1, 1) - v_low) / (v_high - v_low).clamp(min=1e-300)).clamp(0, 1))

    def near(self, v: Tensor) -> Tensor:
        """The u of each v, ``(n, R)``, from the point nearest in v, and the slope there."""
        after = self._bracket(v)
        v_low, v_high = (self.v.gather(0, i) for i in (after - 1, after))
        nearest = torch.where(v - v_low < v_high - v, after - 1, after)
        near_v = self.v.gather(0, nearest)
        log_slope = -0.5 * near_v.square() - 0.5 * math.log(2 * math.pi) - self.log_p.gather(0, nearest)
        u = self.u.gather(0, nearest) + (v - near_v) * (log_slope + self.log_total).clamp(max=700).exp()
        return u.clamp(self.u.gather(0, after - 1), self.u.gather(0, after))


def _normal(log_density: LogDensity, *u: Tensor) -> tuple[Tensor, Tensor]:
    """Location and scale of the normal distributions whose log-density has the values at three points, ``(R,)``."""
    x, y = torch.stack(u), log_density(torch.stack(u))
    first, second = (y[1:] - y[:-1]) / x.diff(dim=0)
    curvature = (second - first) / (x[2] - x[0])  # half the second derivative, -1 / (2 scale^2)
    variance = -0.5 / curvature
    loc = (x[0] + x[1]) / 2 + variance * first
    scale = variance.sqrt()
    # rounded where that is all that keeps it from being the identity
    exact = (loc.abs() < 1e-6 * scale) & ((scale - 1).abs() < 1e-6)
    return torch.where(exact, 0.0, loc), torch.where(exact, 1.0, scale)


def _cut(v: Tensor, u: Tensor, slopes: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Go on linearly where u or its slope is too large for the type of u, from the last knot that is not."""
    fits = (u.abs() < largest) & (slopes < largest)
    index = torch.arange(len(u), device=u.device)[:, None].expand_as(u)
    middle = len(u) // 2
    low = torch.where(fits | (index > middle), -1, index).amax(0) + 1
    high = torch.where(fits | (index < middle), len(u), index).amin(0) - 1
    place = index.clamp(low, high.clamp(min=low))
    edge = slopes.gather(0, place)
    return u.gather(0, place) + edge * (v - v[place, 0]), edge
