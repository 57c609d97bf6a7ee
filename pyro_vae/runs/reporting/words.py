"""Whether a log-likelihood may be believed, in words: what speaks for it, what against it, and what is not known."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr

from pyro_vae.callbacks import Epoch
from pyro_vae.infer.evidence.opinion import contradicts
from pyro_vae.runs.comparing import Difference
from pyro_vae.runs.directory import noun_of, several
from pyro_vae.runs.scoring import BY_ROUNDING, FEW_DOUBTED, MANY, MORE_ELSEWHERE, best, number, unreliable

FEW_ANNEALED = 20
"""Annealed data below which the error of a mean over others, which they correct, is itself hardly known."""
MOST_ERROR = 1.0
"""Nats, the error of a mean above which it is called no more than that."""


class Claim(NamedTuple):
    """One sentence: whether it speaks for the number, or against it, or, None, neither; ``of`` names another number."""

    good: bool | None
    text: str
    of: str = "it"


class Verdict(NamedTuple):
    """Whether a number is to be believed: None, if nobody knows, or, ``guarded``, only within a large error."""

    believed: bool | None
    value: float
    error: float | None
    answer: str
    claims: list[Claim]
    guarded: bool = False

    @property
    def short(self) -> str:
        """In a word or three."""
        if self.guarded:
            return "only within its error"
        return {True: "yes", False: "no", None: "not known"}[self.believed]


Result = Mapping[str, Any]


def verdict(result: Result, evidence: Mapping[str, xr.Dataset], history: Sequence[Epoch] = ()) -> Verdict:
    """What is to be thought of the log-likelihood in ``result.json``.

    Args:
        result: what is in it, of any version.
        evidence: of the same run, by estimator.
        history: of its training, as far as it is known.
    """
    value, annealed = best(dict(result)), bool(result.get("annealed_images"))
    value = math.nan if value is None else value  # JSON has null for it
    believed = result.get("annealed_reliable" if annealed else "reliable")
    believed = False if not math.isfinite(value) else believed
    claims = _of_numbers(result)
    claims += _of_annealing(result) + _of_both(result, evidence) if annealed else []
    claims += [*_of_importance(result, annealed), *_of_weights(result, history)]
    error = result.get("annealed_mc_se" if annealed else "mc_se")
    answer = {
        True: "Yes: it may be believed, within its error.",
        False: "No: do not believe this number.",
        None: "Not known: this run does not say whether its number may be believed.",
    }[believed]
    if any(claim.good is False and claim.of == "it" for claim in claims) and believed:
        answer = "Yes, with a reservation: read what speaks against it."
    few = _is_little(result, error) if annealed and believed else ""
    answer = f"Only within its error of \u00b1 {number(error)}: {few}." if few else answer
    return Verdict(None if few else believed, value, error, answer, claims, bool(few))


def _is_little(result: Result, error: float | None) -> str:
    """Why little speaks for a mean that annealed data correct; empty if enough does."""
    size, whole, noun = result["annealed_images"], result["num_images"], noun_of(dict(result))
    told = f"{size:,} of {several(whole, noun)} {'was' if size == 1 else 'were'} annealed"
    if size < min(FEW_ANNEALED, whole):
        return told
    return "" if error is not None and error <= MOST_ERROR else f"{told}, and their correction is that uncertain"


def _of_numbers(result: Result) -> list[Claim]:
    """Data without a finite log p(x), and weights that are no number."""
    noun, claims = noun_of(result := dict(result)), []
    for name, of in (("", "importance sampling"), ("annealed_", "annealing")):
        if lost := result.get(f"{name}num_not_finite"):
            claims.append(
                Claim(False, f"By {of}, log p(x) of {several(lost, noun)} is NaN or infinite: no mean is left.")
            )
    if lost := result.get("num_invalid"):
        claims.append(Claim(None, f"{lost:,} log-weights were NaN or infinite, and count as zero."))
    return claims


def _of_annealing(result: Result) -> list[Claim]:
    """The estimate by annealed importance sampling, which corrects the other one."""
    noun, believed = noun_of(dict(result)), result.get("annealed_reliable")
    share, size = result.get("annealed_share_reliable"), result["annealed_images"]
    whole = result["num_images"]
    of = f"Annealed importance sampling of {f'{size:,} of ' * (size < whole)}{several(whole, noun)}"
    if result.get("annealed_log_likelihood") is None:
        return [Claim(False, f"{of} made no number.")]
    if believed is None:
        return [Claim(None, f"{of} gave it; the version that wrote this run did not check it.")]
    if believed:
        told = f"passed its checks for {share:.1%} of them" if share is not None else "passed its checks"
        claims = [Claim(True, f"{of} {told}; their mean difference to importance sampling corrects that of all.")]
    elif share is not None and share < 1 - FEW_DOUBTED:
        claims = [Claim(False, f"{of}: {unreliable(share, noun + 's')}.")]
    else:
        claims = [Claim(False, f"{of}: its error is too large, or a log mass is above 0. Score more {noun}s.")]
    if (low := result.get("annealed_shortfall")) is not None and low >= 0.005:
        claims.append(Claim(None, f"In expectation it is low by about {low:.2f} nats; more temperatures help."))
    return claims


def _of_both(result: Result, evidence: Mapping[str, xr.Dataset]) -> list[Claim]:
    """Annealed and importance-sampled log p(x) of the same data, side by side."""
    if "annealed" not in evidence:
        return []
    noun, annealed = noun_of(dict(result)), evidence["annealed"]
    importance = evidence["importance"].sel(datum=annealed["datum"])
    pairs = [(each["log_px"].values, each["mc_se"].values) for each in (annealed, importance)]
    (ours, error), (theirs, other) = pairs
    gap = ours - theirs
    if not np.isfinite(gap).all() or len(gap) < 2:
        return []
    more = int(contradicts(*(torch.from_numpy(np.asarray(each, float)) for each in (ours, error, theirs, other))).sum())
    claims = []
    if more:
        told = f"Importance sampling finds more of p(x) than annealing for {several(more, noun)} of {len(gap):,}"
        claims.append(Claim(more <= FEW_DOUBTED * len(gap) and None, f"{told}: there the two contradict each other."))
    mean, spread = float(gap.mean()), float(gap.std(ddof=1)) / math.sqrt(len(gap))
    if mean > 2 * spread and mean > 0.005:
        told = f"Of the same {noun}s, importance sampling is {mean:.2f} nats lower (± {spread:.2f})"
        claims.append(Claim(None, f"{told}: that is what it misses."))
    else:
        speaks = True if len(gap) >= min(FEW_ANNEALED, result["num_images"]) else None  # of two data all may agree
        more = mean if abs(mean) >= 0.005 else 0.0  # which has no sign
        told = f"Of the same {noun}s, importance sampling agrees: {more:+.2f} nats (± {spread:.2f})."
        claims.append(Claim(speaks, told))
    return claims


def _of_importance(result: Result, annealed: bool) -> list[Claim]:
    """Pareto k and effective sample size of importance sampling."""
    noun, share = noun_of(dict(result)), result["share_khat_above_threshold"]
    elsewhere = ""
    if annealed:
        size, whole = result["annealed_images"], result["num_images"]
        corrected = f" {size:,} of {several(whole, noun)} were annealed: their mean difference stands in for that."
        elsewhere = corrected if size < whole else " The annealed number does not rest on it."
    of = "importance sampling" if annealed else "it"
    claims = []
    if share is None:
        claims.append(
            Claim(None, "Importance sampling: too few samples to know Pareto k, which says when to believe it.")
        )
    else:
        threshold = result["khat_threshold"] or 0.7
        told = f"Pareto k of the importance weights is above {threshold:.2f} for {share:.1%} of the {noun}s"
        if share > MANY:
            why = "there the estimate may be too low by an unknown amount, and so may its error"
            claims.append(Claim(False, f"{told}: {why}.{elsewhere}", of))
        else:
            claims.append(Claim(True, f"{told}: few enough for the mean of all."))
    if result.get("reliable") is False and not result.get("num_not_finite") and (share is None or share <= MANY):
        why = BY_ROUNDING if share is None else MORE_ELSEWHERE
        claims.append(Claim(False, f"Importance sampling is {why}.{elsewhere}", of))
    if result.get("median_ess") is not None:
        told = f"Half of the {noun}s have an effective sample size below {result['median_ess']:,.0f}"
        claims.append(Claim(None, f"{told}, of {result['num_samples']:,} importance samples."))
    return claims


def _of_weights(result: Result, history: Sequence[Epoch]) -> list[Claim]:
    """Which weights were scored, and whether others were better."""
    known = [row for row in history if math.isfinite(row.validation_elbo)]
    if not known:
        return []
    top, last = max(known, key=lambda row: row.validation_elbo), history[-1]
    if result.get("weights") == "best":
        return [
            Claim(None, f"The weights are those of epoch {top.epoch} of {len(history)}, the best by validation ELBO.")
        ]
    told = f"The weights are those of the last epoch, {last.epoch}"
    lead = top.validation_elbo - last.validation_elbo
    if not lead > 0.5:  # that of NaN is not
        return [Claim(None, f"{told}; no epoch was better by more than 0.5 nats of validation ELBO.")]
    better = f"epoch {top.epoch} had a validation ELBO {lead:.2f} nats higher"
    return [Claim(None, f"{told}; {better}, and --weights best would have taken it.")]


def better(name: str, other: str, d: Difference, noun: str, doubted: Sequence[str]) -> Claim:
    """Whether one run is better than another, by how much, and how sure that is.

    Args:
        name, other: of the two runs.
        d: the difference of log p(x), of the first to the other.
        noun: what a datum is called.
        doubted: names of runs whose own number is not to be believed.
    """
    told = d.sentence(name, other, noun)
    if not d.is_told:
        return Claim(None, told)
    hedge = f" But the log-likelihood of {' and of '.join(doubted)} is not to be believed." if doubted else ""
    return Claim(not doubted or None, told + hedge)
