"""How well x can be told by how many nats of z: rate and distortion of a model, by chains annealed from the prior."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.infer.evidence.blocks import Part, Work
from pyro_vae.infer.evidence.chains import Path, evaluator
from pyro_vae.infer.evidence.posterior import by_blocks
from pyro_vae.infer.evidence.result import mean_and_errors, t_factor
from pyro_vae.infer.evidence.rounds import coordinates_of, longest_step
from pyro_vae.infer.evidence.tempered import Pilot, pilot
from pyro_vae.infer.programs import Program
from pyro_vae.infer.supports import Latents
from pyro_vae.infer.trees import Data

MIN_ESS = 5.0
"""Chains that the weights must be worth; of fewer the error is not known."""


@dataclass(frozen=True)
class Tempering:
    """How chains are taken from the prior to each p(z) p(x | z)^beta.

    Args:
        num_chains: C, at least 4.
        num_temperatures: T, steps from 0 to the last beta; None: as many as give each log Z about the error below.
        error: standard error of one log Z at the last beta, in nats, that a pilot aims at, positive.
        num_leapfrogs: gradient steps of a transition, at least 1.
        target_acceptance: of the adapted step sizes, in (0, 1).
        most: temperatures at most.

    Raises:
        ValueError: if a setting is out of range.
    """

    num_chains: int = 32
    num_temperatures: int | None = None
    error: float = 0.2
    num_leapfrogs: int = 5
    target_acceptance: float = 0.8
    most: int = 5000

    def __post_init__(self):
        for name, bound in {"num_chains": 4, "num_temperatures": 1, "num_leapfrogs": 1, "most": 1}.items():
            value = getattr(self, name)
            if value is None and name == "num_temperatures":
                continue
            if not isinstance(value, int) or value < bound:
                raise ValueError(f"{name} must be a whole number of at least {bound}, got {value}")
        if not 0 < self.error < math.inf:
            raise ValueError(f"error must be positive, got {self.error}")
        if not 0 < self.target_acceptance < 1:
            raise ValueError(f"target_acceptance must be between 0 and 1, got {self.target_acceptance}")


DEFAULTS = Tempering()


class RateDistortion(NamedTuple):
    """Points of the curve, of T betas and B observations; nats per datum.

    Attributes:
        betas: shape ``(T,)``.
        rate: KL(p_beta(z | x) || p(z)), shape ``(T, B)``.
        distortion: E[-log p(x | z)] under p_beta(z | x) = p(z) p(x | z)^beta / Z_beta.
        log_z: log Z_beta.
        rate_se, distortion_se, log_z_se: their Monte Carlo standard errors.
        ess: what the chains are worth by their weights.
        reliable: whether that is enough to know the errors.
        acceptance: of all transitions, shape ``(B,)``.
        evaluations: of the model for each datum, a gradient counting as two, shape ``(B,)``.
    """

    betas: Tensor
    rate: Tensor
    distortion: Tensor
    log_z: Tensor
    rate_se: Tensor
    distortion_se: Tensor
    log_z_se: Tensor
    ess: Tensor
    reliable: Tensor
    acceptance: Tensor
    evaluations: Tensor

    def mean(self) -> dict[str, list[tuple[float, float, float]]]:
        """Of each beta the means of ``rate``, ``distortion`` and ``log_z`` over the observations, with both errors.

        Those over observations and from the chains alone, see :meth:`pyro_vae.Evidence.mean`.
        """
        return {
            name: [
                mean_and_errors(*each) for each in zip(getattr(self, name), getattr(self, f"{name}_se"), strict=True)
            ]
            for name in ("rate", "distortion", "log_z")
        }


def rate_distortion(
    model: Program,
    guide: Program,
    data: Data,
    betas: Sequence[float] | Tensor = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0),
    settings: Tempering = DEFAULTS,
    memory: int | None = None,
    compiled: bool = True,
    progress: bool = False,
    work: Work | None = None,
) -> RateDistortion:
    """The rate-distortion curve of a model's latent variables (Huang, Makhzani, Cao & Grosse 2020).

    Of all ways q to encode x in z, p_beta(z | x) = p(z) p(x | z)^beta / Z_beta has the least
    KL(q || p(z)) + beta E_q[-log p(x | z)]: with the decoder and the prior as they are, no encoder, however good,
    reaches a lower distortion D at its rate

        R(beta) = KL(p_beta || p(z)) = -beta D(beta) - log Z_beta,    D(beta) = E_(p_beta)[-log p(x | z)].

    At beta = 1, R + D = -log p(x). Chains of annealed importance sampling that begin at the prior pass all betas; D is
    the mean over them by their weights, log Z_beta that of annealed importance sampling, low in expectation, so that
    R is high (their section 4.2): an upper bound of the curve, up to the chains' errors. The guide is not used, but
    for the names of its sites.

    Args:
        model, guide, memory, compiled, progress, work: see :func:`pyro_vae.annealed_importance_sampling`.
        data: see :func:`pyro_vae.traces`; on the programs' device.
        betas: where to stand still, positive and ascending, above 1 too.
        settings: of the chains.

    Returns:
        Rates and distortions of the N observations.

    Raises:
        ValueError: if ``betas`` are not positive and ascending.
        ContractError: as :func:`pyro_vae.traces`, and if a site is discrete.
    """
    at = torch.as_tensor(betas, dtype=torch.float64)
    if at.dim() != 1 or not len(at) or not (torch.cat([at.new_zeros(1), at]).diff() > 0).all() or at.isinf().any():
        raise ValueError(f"betas must be positive and ascending, got {at.tolist()}")

    def tools(latents: Latents, whole: int) -> list[Callable]:
        return [evaluator(latents, "prior", compiled)]

    def do(latents: Latents, evaluate: Callable) -> Part:
        _, *fields = estimate(latents, at, settings, evaluate)
        return {str(i): field.movedim(-1, 0) for i, field in enumerate(fields)}

    name = "rate and distortion"
    found, _, _ = by_blocks(model, guide, data, tools, do, settings.num_chains, memory, progress, name, work)
    known = found.pop("known")
    curve = RateDistortion(at, *(field.movedim(0, -1) for field in found.values()))
    return curve._replace(reliable=curve.reliable & known)


def estimate(
    latents: Latents, betas: Tensor, settings: Tempering = DEFAULTS, evaluate: Callable | None = None
) -> RateDistortion:
    """:func:`rate_distortion` of one chunk of data."""
    evaluate = evaluate or evaluator(latents, "prior", compiled=False)
    at = betas.to(latents.like.device)
    path = Path(latents, coordinates_of(latents, "prior"), "prior", settings.num_leapfrogs, evaluate)
    longest = longest_step("prior", settings.num_leapfrogs)
    found = pilot(path, at[-1].item(), settings.num_chains, longest, settings.target_acceptance)
    placed, steps = found.place(settings.num_temperatures or _number(found, settings), at)
    state = path.evaluate(path.draw(settings.num_chains))
    log_w = torch.zeros_like(state.start, dtype=torch.float64)
    points, acceptances, wanted = [], [], set(at.tolist())
    for before, beta, step in zip(placed, placed[1:], steps[1:], strict=False):
        log_w += (beta - before) * (state.target - state.start).double()  # log p(x | z)
        state, acceptance = path.transition(state, beta.to(state.start), step)
        acceptances.append(acceptance)
        if beta.item() in wanted:
            points.append(_point(beta, log_w, (state.target - state.start).double()))
    acceptance = torch.stack(acceptances).mean(0).double()
    rows = {name: torch.stack(field) for name, field in zip(Point._fields, zip(*points, strict=True), strict=True)}
    spent = torch.full_like(acceptance, path.evaluations)
    return RateDistortion(at, **rows, acceptance=acceptance, evaluations=spent)


def _number(found: Pilot, settings: Tempering) -> int:
    """Of temperatures: with chains that mix, Var(log w) is the squared length over it (Neal 2001, section 4).

    Twice as many, since one transition forgets but a part of where it began.
    """
    allowed = math.log1p(settings.num_chains * settings.error**2)
    return math.ceil(min(settings.most, max(10, 2 * found.lengths[-1].item() ** 2 / allowed)))


class Point(NamedTuple):
    """The entries of :class:`RateDistortion` that there are for each beta, ``(B,)`` each."""

    rate: Tensor
    distortion: Tensor
    log_z: Tensor
    rate_se: Tensor
    distortion_se: Tensor
    log_z_se: Tensor
    ess: Tensor
    reliable: Tensor


def _point(beta: Tensor, log_w: Tensor, log_likelihood: Tensor) -> Point:
    """One point of the curve from log-weights and log p(x | z), ``(C, B)``."""
    size = len(log_w)
    log_z = log_w.logsumexp(0) - math.log(size)
    weight = (log_w - log_z).exp()  # of mean 1
    mean = (weight * log_likelihood).mean(0)
    # by the delta method: what each chain adds
    of_mean = weight * (log_likelihood - mean)
    of_log_z = weight - 1

    def error(each: Tensor) -> Tensor:
        return (each.var(0) / size).sqrt() * t_factor(size - 1)

    errors = error(beta * of_mean - of_log_z), error(of_mean), error(of_log_z)
    ess = weight.sum(0).square() / weight.square().sum(0)
    sound = (ess >= MIN_ESS) & mean.isfinite() & log_z.isfinite()
    return Point(beta * mean - log_z, -mean, log_z, *errors, ess, sound)
