"""Exact evidence: in closed form, by quadrature over few latent dimensions, by a sum over discrete latents."""

import math
from functools import partial

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Independent

from pyro_vae.errors import ContractError
from pyro_vae.infer.checks import check_parts
from pyro_vae.infer.evidence.blocks import Blocks, Part, joined
from pyro_vae.infer.evidence.cubature import Mesh, integrate
from pyro_vae.infer.evidence.frames import Frame, choose, fit_to_cells, log_cosh, prior_frame, unit_grid, zoom
from pyro_vae.infer.evidence.result import Evidence
from pyro_vae.infer.evidence.weights import reduce_log_weights
from pyro_vae.infer.programs import (
    Program,
    added,
    find_non_finite,
    latent_sites,
    particle_trace,
    sample_sites,
    scoring,
    site_of,
    traces,
)
from pyro_vae.infer.randomness import without_effect
from pyro_vae.infer.supports import Latents, innermost, unmasked_log_prob
from pyro_vae.infer.trees import Data, data_size, first_tensor, select, split


def quadrature(
    model: Program, guide: Program, data: Data, num_points: int = 2**14, batch_size: int | None = None
) -> Evidence:
    """log p(x) by quadrature over all latent variables, of one or two dimensions in all, twice over.

    The coordinates u are those of :class:`Latents` in which priors are standard normal where they can be, and have no
    tails. Each observation is integrated in two ways:

    - Cells that are split where the error is (:func:`.cubature.integrate`), over all t that a program could reach, in
      u = c + A sinh(t). Modes of any number and width, funnels and kinks are found by it.
    - The trapezoidal rule on a grid fitted to the integrand, found by zooming in from what the cells found on the
      region within 40 nats of the largest value. For smooth integrands that decay, its error falls exponentially with
      the number of points per dimension (Trefethen & Weideman 2014, "The exponentially convergent trapezoidal rule",
      theorem 5.1). Its grid is turned along a ridge.

    Where these two do not agree, cells are tried again, more of them: along the turned axes, then from others.
    The result of smallest error is taken, of those than which none is surely larger.

    Args:
        model, guide: see :func:`pyro_vae.traces`; of the guide only the sites matter, and draws, as a check.
        data: likewise.
        num_points: points of an observation's grid, at least 1024; with two dimensions, its root in each. Cells may
            take eight times as many.
        batch_size: has no effect any more; chunks are of one size, so that numbers do not depend on it.

    Returns:
        Evidence in nats per datum. ``mc_se`` is the quadrature's own error: of the trapezoidal rule the difference
        between the results of all points and of every other point (in each dimension), far above the error of the
        former once it is small; of the cells what Gauss's and Kronrod's rules tell. ``reliable`` says that it is below
        0.01, that two ways agree within their errors and none finds more, and that importance sampling from prior and
        guide, 256 draws each, finds no mass besides. Where no way agrees, ``mc_se`` is at least the distance to the
        next. ``num_invalid`` counts the points of the grid whose log-integrand is NaN or +inf; a NaN makes ``log_px``
        NaN. All else is NaN.

    Raises:
        ContractError: if there are more than two latent dimensions or discrete ones, if the integral diverges or the
            integrand is finite nowhere, or as :func:`pyro_vae.check_program`.
        ValueError: if ``num_points`` is below 1024.
    """
    if num_points < 1024:
        raise ValueError(f"num_points must be at least 1024, got {num_points}")
    without_effect(batch_size)
    with scoring(model, guide):
        blocks = Blocks(data)
        with blocks.apart("checks"):
            check_parts(model, guide, data)
            latents = Latents(model, guide, data, gaussian=True)
        if not 1 <= latents.dim <= 2:
            raise ContractError(
                f"quadrature is for 1 or 2 latent dimensions, the model has D = {latents.dim}: use "
                "annealed_importance_sampling"
            )
        with blocks.apart("start"):
            start = prior_frame(latents.prior_draws(1001).double())
        few = max(1, _ROWS // len(unit_grid(num_points // 4, latents.dim, latents.like.device)))

        def do(among: slice) -> Part:
            return _integrals(_Integrand(latents.select(among), max(1, _ROWS // few)), start, num_points)

        found = joined(blocks.of("quadrature", latents.size, do, few))
    count = len(unit_grid(num_points, latents.dim, latents.like.device))
    return _exact_evidence(count, **found)


_ROWS = 2**15
"""Pairs of a point and an observation scored at a time."""


def _integrals(integrand: "_Integrand", start: Frame, num_points: int) -> Part:
    """The fields of :func:`_exact_evidence`, ``(B,)`` each."""
    latents = integrand.latents
    dim, device = latents.dim, latents.like.device
    start = Frame(*(part.expand(data_size(latents.data), *part.shape[1:]) for part in start))
    mesh = _cells(integrand, start, 2 * num_points)
    _check_ends(latents, mesh)
    ways = [(mesh.log_total, mesh.error)]
    coarse, fine = (unit_grid(points, dim, device) for points in (num_points // 4, num_points))
    frame, found = _locate(integrand, fit_to_cells(start, mesh), coarse)
    log_px, error, invalid = _integrate(integrand, frame, found, fine)
    ways.append((log_px, error))
    for attempt in range(4):
        log_px, error, agreed = _choose_way(*(torch.stack(each) for each in zip(*ways, strict=True)))
        if attempt == 3 or (agreed & (error < 1e-3)).all():
            break
        # more cells where these two do not agree: along the grid's axes, then others, then along axes fitted to those
        axes = (frame, start, fit_to_cells(start, mesh))[attempt]
        mesh = _cells(integrand, axes, 8 * num_points, stretch=0.8 if attempt == 1 else 1.0)
        ways.append((mesh.log_total, mesh.error))
    log_px = torch.where(invalid > 0, math.nan, log_px)
    reliable = agreed & (error < 0.01) & (invalid == 0) & ~_contradicted(latents, log_px)
    evaluations = torch.full_like(log_px, integrand.evaluations + 2 * _PROBES)
    return {"log_px": log_px, "error": error, "invalid": invalid, "reliable": reliable, "evaluations": evaluations}


def _choose_way(log_px: Tensor, error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best of several results ``(W, B)``, its error, and whether another one agrees with it, ``(B,)`` each.

    Mass can be missed, so that a smaller result says nothing against a larger one. Where none is sure, the largest is
    taken.
    """
    error = torch.where(log_px.isfinite(), error.nan_to_num(math.inf, math.inf), math.inf)
    sure = error < 0.1
    excess = log_px - log_px.unsqueeze(1)  # (W, W, B), of the last way over the one before
    allowed = 5 * (error + error.unsqueeze(1)) + 1e-6
    exceeded = (sure & (excess > allowed)).any(1)
    best = torch.where(exceeded, math.inf, error).argmin(0, keepdim=True)
    fallback = log_px.nan_to_num(-math.inf).argmax(0, keepdim=True)
    best = torch.where(sure.gather(0, best), best, fallback)
    chosen, least = log_px.gather(0, best)[0], error.gather(0, best)[0]
    others = torch.arange(len(error), device=error.device)[:, None] != best
    apart = torch.where(others, (log_px - chosen).abs().nan_to_num(math.inf), math.inf)
    agreed = (sure & (apart < 5 * (error + least) + 1e-6)).any(0) & (least < 0.1)
    return chosen, torch.where(agreed, least, torch.maximum(least, apart.amin(0))), agreed


class _Integrand:
    """log p(x, u) |du / dt| of a few data, ``rows`` points at a time, and how often each was evaluated."""

    def __init__(self, latents: Latents, rows: int):
        self.latents = latents
        self.evaluations = 0
        self._rows = rows

    def __call__(self, frame: Frame, t: Tensor) -> Tensor:
        """At the points t ``(K, B, D)`` of a frame: ``(K, B)``."""
        log_det = torch.linalg.slogdet(frame.axes).logabsdet
        values = []
        for part in t.split(self._rows):
            u = frame.centre + torch.einsum("bij,kbj->kbi", frame.axes, part.sinh())
            log_prior, log_likelihood = self.latents.log_joint(u.to(self.latents.like))
            values.append(log_prior.double() + log_likelihood.double() + log_cosh(part) + log_det)
        self.evaluations += len(t)
        return torch.cat(values)


_BREAKS = (1.0, 2.5, 5.0, 14.5, 35.0)  # of t: sinh of the last two is 1e6 and 1e15
_PROBES = 256


def _cells(integrand: _Integrand, frame: Frame, num_points: int, stretch: float = 1.0) -> Mesh:
    """All of the plane in the coordinates t of a frame, by cells, the first of which may be stretched."""
    # no tail of a standard normal prior is as long
    breaks = frame.low.new_tensor(_BREAKS[:-1] if integrand.latents.standard else _BREAKS)
    breaks = stretch * torch.cat([-breaks.flip(0), breaks])  # a node at zero, where ridges often are

    def bound(low: Tensor, high: Tensor) -> Tensor:
        """Of the logarithm of exp(-u^2 / 2), for standard normal u."""
        ends = torch.stack([low.sinh(), high.sinh()]).unsqueeze(-2) * frame.axes  # (2, n, B, D, D)
        low, high = frame.centre + ends.amin(0).sum(-1), frame.centre + ends.amax(0).sum(-1)
        least = torch.maximum(low, -high).clamp(min=0)  # the smallest |u| in the cell
        return -0.5 * (least.square() * integrand.latents.normal).sum(-1)

    boxes, dim = frame.low.shape
    return integrate(partial(integrand, frame), bound, breaks, boxes, dim, num_points, error=1e-6)


def _check_ends(latents: Latents, mesh: Mesh) -> None:
    """Refuse integrands that are finite nowhere, or that do not fall."""
    highest = mesh.seen.amax(0)
    if highest.isneginf().any():
        culprit = find_non_finite(latents.model, latents.guide, latents.data) or "log p(x, z)"
        raise ContractError(f"no value of the latent variables gives a datum a finite density: see the {culprit}")
    ends = mesh.centre.abs() + mesh.half
    at_end = (ends > ends.max() - 1e-6) & (mesh.seen > highest - 2).unsqueeze(-1)
    for d in range(latents.dim):
        if at_end[..., d].any():
            raise ContractError(
                f"the integral over site '{latents.site_at(d)}' diverges, or log p(x) is infinite: its integrand falls "
                "nowhere, a million times as far as its prior is wide: check that prior and likelihood are densities"
            )


def _contradicted(latents: Latents, log_px: Tensor) -> Tensor:
    """Whether draws from the prior or the guide find more mass than there is said to be, ``(B,)``."""
    found = torch.zeros_like(log_px, dtype=torch.bool)
    of_prior = latents.log_joint(latents.sample_prior(_PROBES))[1]
    log_prior, log_likelihood, log_guide = latents.log_joint_and_guide(latents.sample_guide(_PROBES))
    for log_w in (of_prior, log_prior + log_likelihood - log_guide):
        evidence = reduce_log_weights([log_w.double()], _PROBES)
        excess = evidence.log_px - log_px
        # by Markov's inequality an unbiased estimate is e^7 times the truth once in 1,000 times
        found |= (excess > 7) | ((evidence.mc_se < 0.3) & (excess > 4 * evidence.mc_se + 0.05))
    return found


def _locate(integrand: _Integrand, frame: Frame, unit: Tensor) -> tuple[Frame, Tensor]:
    """The frame that fits each observation's integrand, and whether it was found, ``(B,)``."""
    found = torch.zeros(len(frame.low), dtype=torch.bool, device=unit.device)
    for _ in range(20):
        zoomed, settled = zoom(frame, unit, integrand(frame, frame.t(unit)))
        frame = choose(found, frame, zoomed)
        found |= settled
        if found.all():
            break
    return frame, found


def _integrate(integrand: _Integrand, frame: Frame, found: Tensor, unit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p(x) by the trapezoidal rule, its error, and the number of invalid points, ``(B,)`` each."""
    dim = unit.shape[1]
    n = round(len(unit) ** (1 / dim))
    index = torch.arange(len(unit), device=unit.device)
    every_other = (index % 2 == 0) if dim == 1 else (index % n % 2 == 0) & (index // n % 2 == 0)
    values = integrand(frame, frame.t(unit))
    total, thinned = values.logsumexp(0), values[every_other].logsumexp(0)
    invalid = (values.isnan() | values.isposinf()).sum(0)
    log_cell = ((frame.high - frame.low) / (n - 1)).log().sum(-1)
    error = (total - thinned - dim * math.log(2)).abs()
    return total + log_cell, torch.where(found, error, math.inf), invalid * found


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
        +inf, and ``reliable`` says that there are none; all else is NaN.

    Raises:
        ContractError: if a latent site is continuous or has no finite list of values, if there are more values than
            ``limit``, or as :func:`pyro_vae.check_program`.
        ValueError: if ``batch_size`` is below 1.
    """
    _check_batch_size(batch_size)
    with scoring(model, guide):
        check_parts(model, guide, data)
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
            results.append((log_px, torch.zeros_like(log_px), invalid, invalid == 0, torch.full_like(log_px, count)))
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


def _exact_evidence(
    num_points: int, log_px: Tensor, error: Tensor, invalid: Tensor, reliable: Tensor, evaluations: Tensor
) -> Evidence:
    nan = torch.full_like(log_px, math.nan)
    return Evidence(log_px, error, nan, nan, invalid, nan, num_points, reliable, evaluations)
