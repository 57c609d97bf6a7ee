"""What every estimator of log p(x) returns."""

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_vae.errors import need_extra
from pyro_vae.infer.diagnostics import pareto_k_threshold

if TYPE_CHECKING:
    import xarray as xr


class Evidence(NamedTuple):
    """Estimates of log p(x) with errors and diagnostics, one entry per datum; NaN where an estimator has none.

    x is all that the model observes, of several sites together, without what was masked; where the model is passed
    more, it is log p(x | c), given the rest.

    Attributes:
        log_px: log p(x), nats, shape ``(B,)``.
        mc_se: its Monte Carlo standard error, nats.
        ess: effective sample size of the weights.
        khat: Pareto shape of the largest weights; above :func:`pyro_vae.pareto_k_threshold` neither ``log_px`` nor
            ``mc_se`` can be trusted.
        num_invalid: how many log-weights were NaN or infinite. A weight of zero (log-weight ``-inf``) counts in the
            average as zero; a NaN makes ``log_px`` NaN.
        acceptance: acceptance rate of the estimator's Markov transitions.
        num_samples: importance samples, chains or points behind each estimate; not one entry per datum.
        reliable: whether every check of the estimator was passed, of booleans. False: neither ``log_px`` nor ``mc_se``
            is to be believed.
        evaluations: how often the model was evaluated; a gradient counts as two.
    """

    log_px: Tensor
    mc_se: Tensor
    ess: Tensor
    khat: Tensor
    num_invalid: Tensor
    acceptance: Tensor
    num_samples: int = 0
    reliable: Tensor | None = None
    evaluations: Tensor | None = None

    def mean(self) -> tuple[float, float, float]:
        """Mean of ``log_px``, its standard error over observations, and its Monte Carlo error alone, in nats.

        The first error is std(log_px) / sqrt(B): how far another test set of this size would differ. The second is
        sqrt(sum mc_se^2) / B: how far another run of the estimator on the same observations would.

        Nothing is left out: where one entry is NaN, so are the mean and the errors.
        """
        return mean_and_errors(self.log_px, self.mc_se)

    def shortfall(self) -> float:
        """By how many nats, about, the mean of ``log_px`` is low in expectation: half the mean squared error.

        The logarithm of an unbiased estimate with relative error s is low by s^2 / 2. Unlike the error of the mean it
        does not shrink with more observations. NaN where one error is.
        """
        return self.mc_se.square().mean().item() / 2

    def share_bad_k(self, num_samples: int | None = None) -> float | None:
        """The share of data whose k is above :func:`pareto_k_threshold`; None if none has a k.

        Where others have one, a datum whose weights are NaN counts as above.
        """
        if num_samples is not None:
            warnings.warn("share_bad_k() needs no number: the evidence knows it", DeprecationWarning, stacklevel=2)
        if self.khat.isnan().all():  # as of fewer than 21 samples
            return None
        return (~(self.khat <= pareto_k_threshold(self.num_samples))).double().mean().item()

    def to_dataset(
        self, datum: Tensor | None = None, *, image: Tensor | None = None, **attributes: Any
    ) -> "xr.Dataset":
        """One variable per field along the dimension ``datum``, numbered by ``datum``, ``(B,)``, or from 0.

        ``num_samples`` and ``attributes`` are attributes of the data set; ``image`` is the old name of ``datum``.
        """
        if image is not None:
            warnings.warn("to_dataset(datum=...) is the new spelling of image=", DeprecationWarning, stacklevel=2)
            datum = image
        need_extra("runs", ["xarray"])
        import xarray as xr  # here: sampling alone should not wait for it

        fields = {name: value for name, value in self._asdict().items() if isinstance(value, Tensor)}
        data = {name: ("datum", value.detach().cpu().numpy()) for name, value in fields.items()}
        number = np.arange(self.log_px.numel()) if datum is None else datum.cpu().numpy()
        return xr.Dataset(data, coords={"datum": number}, attrs={"num_samples": self.num_samples} | attributes)


def as_part(evidence: Evidence) -> dict[str, Tensor]:
    """The evidence as tensors by name, whose first dimension is the datum."""
    fields = evidence._asdict() | {"num_samples": torch.full_like(evidence.num_invalid, evidence.num_samples)}
    return {name: value for name, value in fields.items() if value is not None}


def from_part(part: Mapping[str, Tensor]) -> Evidence:
    """What :func:`as_part` gave; it may be of several blocks. Where it has ``known``, it is reliable only if so."""
    fields: dict[str, Any] = {name: part.get(name) for name in Evidence._fields}
    fields["num_samples"] = int(part["num_samples"][0])
    if "known" in part:
        fields["reliable"] = fields["reliable"] & part["known"]
    return Evidence(**fields)


def concatenate(parts: Iterable[Evidence]) -> Evidence:
    """Evidence of the data of all parts, one after the other."""
    parts = list(parts)
    fields = zip(*parts, strict=True)
    joined: list[Any] = [torch.cat(field) if isinstance(field[0], Tensor) else field[0] for field in fields]
    return Evidence(*joined)


def pick(evidence: Evidence, among: Tensor) -> Evidence:
    """The evidence of some of the data."""
    picked: list[Any] = [each[among] if isinstance(each, Tensor) else each for each in evidence]
    return Evidence(*picked)


def t_factor(freedom: int) -> float:
    """By how much an error from few draws is widened, so that 1.96 times it is a 95 % interval of Student's t.

    Quantiles of t by the expansion of Abramowitz & Stegun 1964, 26.7.5: within 1 % from 3 degrees of freedom on.
    """
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return 1 + sum(term / max(freedom, 1) ** (i + 1) for i, term in enumerate(terms)) / z


def log_mean_of_groups(log_z: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of the mean of estimates ``(G, B)`` of p(x), and its error from their spread, ``(B,)`` each."""
    whole = log_z.logsumexp(0) - math.log(len(log_z))
    error = (log_z - whole).exp().std(0) / len(log_z) ** 0.5
    return whole, error * t_factor(len(log_z) - 1)


def rounding(log_px: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding alone may do to log p(x) of programs that compute in ``dtype``, ``(B,)``: no error is smaller."""
    return 4 * torch.finfo(dtype).eps * log_px.abs().clamp(min=1)


def beyond_rounding(log_px: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether log p(x) is finite, and rounding alone does not change it by half a nat, ``(B,)``.

    An absurd value, of millions of nats, is otherwise as precise as all draws that round to it alike say.
    """
    return log_px.isfinite() & (rounding(log_px, dtype) < 0.5)


def mean_and_errors(values: Tensor, mc_se: Tensor) -> tuple[float, float, float]:
    """Mean of values ``(B,)``, its standard error over observations, and its error from theirs; see Evidence.mean."""
    size = values.numel()
    over_data = values.std(correction=1).item() / size**0.5 if size > 1 else float("nan")
    return values.mean().item(), over_data, mc_se.square().sum().sqrt().item() / size


def difference_estimate(rough: Tensor | Evidence, fine: Evidence, among: Tensor) -> tuple[float, float]:
    """The mean of ``fine`` over N observations, n of which were tried, from ``rough`` estimates of all of them.

    mean(rough) + mean over the n of (fine - rough), the difference estimator of survey sampling: its error is that of
    the differences, which vary far less from one observation to another than log p(x) does. Where ``rough`` is evidence
    and n is at least 100, ``fine`` is foretold from its diagnostics by least squares (the regression estimator, Cochran
    1977, section 7.1, with several variables), and only what is left counts. Where ``rough`` says nothing of ``fine``,
    as where importance sampling is hopeless, the estimate is the mean of ``fine`` alone.

    Args:
        rough: log p(x) of all observations, shape ``(N,)``, or evidence of them.
        fine: evidence of the n observations.
        among: their places, drawn at random without replacement, shape ``(n,)``, n at least 2.

    Returns:
        The estimate, and its standard error: sqrt((1 - n / N) Var(rest) / n + n / N mc^2), with ``mc`` the Monte Carlo
        error of the mean of ``fine`` (Cochran 1977, sections 7.2-7.3, and 13.9). How far another draw of ``among`` and
        another run of the fine estimator would differ. Where ``rough`` varies far more over all than over those tried,
        it has the error of the extrapolation too. NaN, both, where a log p(x) is not finite.
    """
    start = (rough.log_px if isinstance(rough, Evidence) else rough).double()
    value = fine.log_px.double()
    if not (start.isfinite().all() and value.isfinite().all()):
        return math.nan, math.nan
    size = value.numel()
    share = size / start.numel()
    correction, variance = 0.0, 0.0
    if share < 1 and isinstance(rough, Evidence) and size >= 100:
        correction, variance = _by_regression(rough, value, among)
    elif share < 1:
        correction, variance = _by_difference(start, value, among)
    error = fine.mean()[2]
    return value.mean().item() + correction, math.sqrt((1 - share) * variance + share * error * error)


def _by_difference(start: Tensor, value: Tensor, among: Tensor) -> tuple[float, float]:
    """What the mean of n values lacks of that of all, by rough ones; and its variance, without finite population.

    The rough values are taken as they are unless it is plain that they do not help: differences that vary more than the
    values do, and rough values or differences that vary by far more than chance lets the n values vary less than all.
    A nearer choice, by which of two like variances is the smaller in this draw, would state errors that are too small.
    """
    size = value.numel()
    rough = start - start.median()  # no digits are lost to what all share
    tried = rough[among]
    gap = (rough.mean() - tried.mean()).item()
    of_rest, of_value, of_tried, of_all = (
        each.var().item() if size > 1 else math.nan for each in (value - tried, value, tried, rough)
    )
    floor = max(of_value, 1.0)  # values that are all alike, as of copies of a row, say nothing of the others
    if max(of_rest, of_all) <= 4 * floor * _most_variance(size - 1):
        return gap, of_rest / size
    if not of_rest < floor:
        return 0.0, of_value / size
    # what is foretold of a wide range by a narrow one: at most the whole gap is wrong
    if not of_rest < of_tried:
        return 0.0, max(of_value / size, gap * gap)
    return gap, max(of_rest / size, gap * gap * of_rest / of_tried)


def _most_variance(freedom: int) -> float:
    """By how much a variance may exceed that of a normal sample, but for one sample in a thousand.

    From P(chi^2 < c) < (c / 2)^(k / 2) / Gamma(k / 2 + 1).
    """
    half = freedom / 2
    return half / math.exp((math.log(1e-3) + math.lgamma(half + 1)) / half) if freedom > 0 else math.inf


def _by_regression(rough: Evidence, value: Tensor, among: Tensor) -> tuple[float, float]:
    """The same by least squares on the diagnostics of all, of free coefficients; none if they foretell nothing.

    The variance has a term for the coefficients: where all observations lie far from those tried, they extrapolate,
    which is left where what they foretell there is within three of its errors.
    """
    size = value.numel()
    columns = [rough.log_px, rough.mc_se, rough.khat, rough.ess.clamp(min=1).log()]
    known = [each.double() for each in columns if each.isfinite().all() and each.double().std() > 0]
    # the median first: no digits are lost to what all share
    scaled = [(each - each.median()) / (each - each.median()).std() for each in known]
    design = torch.stack([each for each in scaled if each[among].std() > 1e-6] or [0 * rough.log_px.double()], 1).cpu()
    tried = design[among.cpu()]
    gap, inverse = design.mean(0) - tried.mean(0), torch.linalg.pinv(tried - tried.mean(0), rtol=1e-10)
    centred = (value - value.mean()).cpu()
    fit = inverse @ centred
    rest = (centred - (tried - tried.mean(0)) @ fit).square().sum().item() / (size - 1 - design.shape[1])
    leverage, told = (gap @ inverse).square().sum().item(), (gap @ fit).item()
    if leverage > 1 / size and told * told < 9 * rest * leverage:
        return 0.0, centred.var().item() / size
    return told, rest * (1 / size + leverage / (1 - size / len(design)))
