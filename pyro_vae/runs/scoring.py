"""Scores of a trained model: those of its run, and those of a finished run by another estimator or on other data."""

import hashlib
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import xarray as xr
from torch import Tensor

from pyro_vae.data.datasets import Data, Schema, names_of
from pyro_vae.data.images import ImageData
from pyro_vae.errors import ContractError
from pyro_vae.infer.diagnostics import active_units, estimate_elbo, kl_by_datum, pareto_k_threshold
from pyro_vae.infer.evidence.annealed import annealed_importance_sampling
from pyro_vae.infer.evidence.blocks import Work
from pyro_vae.infer.evidence.importance import importance_sampling
from pyro_vae.infer.evidence.opinion import contradicts
from pyro_vae.infer.evidence.result import Evidence, beyond_rounding, difference_estimate, pick
from pyro_vae.infer.randomness import own_numbers
from pyro_vae.infer.trees import Data as Tree
from pyro_vae.infer.trees import data_size, first_tensor, select, tensors
from pyro_vae.parts.likelihoods import Likelihood
from pyro_vae.runs.build import Model
from pyro_vae.runs.directory import (
    noun_of,
    table,
)
from pyro_vae.runs.reading import result_of
from pyro_vae.runs.settings import EvidenceSettings, Settings


def some_images(data: Data, split: str, size: int | None) -> tuple[Any, Tensor]:
    """Some observations, the same ones each time, and their places in the split; noisy ones drawn once."""
    whole = data_size(data.test) if split == "test" else data.num_train
    among = some(whole, whole if size is None else min(size, whole)).to(data.device)
    if split == "test":
        return select(data.test, among), among
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return data.observe(among), among


def reliable_share(evidence: Evidence) -> dict[str, Any]:
    """The share of data that passed every check, and whether that is enough for their mean to be believed."""
    finite = evidence.log_px.isfinite()
    share = (cast(Tensor, evidence.reliable) & finite).double().mean().item()
    return {"share_reliable": share, "reliable": share >= 1 - FEW_DOUBTED and bool(finite.all())}


Works = Callable[[str], Work | None]
"""Who computes the parts of each of a run's estimates, by name."""


def nobody_else(name: str) -> None:
    """The :data:`Works` of a process alone, which keeps nothing."""


def score_test(
    run: Settings, vae: Model, data: Data, works: Works = nobody_else
) -> tuple[dict[str, Any], Evidence, xr.Dataset | None]:
    """Score the test images; their estimates are called ``test`` and ``annealed``.

    Returns:
        The entries of result.json about them; log p(x) per image, by importance sampling; the same by annealed
        importance sampling, of the images that were drawn for it.
    """
    torch.manual_seed(run.seed + 1)  # the same draws whether or not training was resumed
    start = time.perf_counter()
    settings = run.evidence
    test = select(data.test, slice(settings.num_images))
    elbo = estimate_elbo(vae.model, vae.guide, test, num_samples=10)
    sampled = partial(importance_sampling, vae.model, vae.guide, test, settings.num_samples)
    evidence = sampled(progress=True, work=works("test"))
    log_likelihood, over_images, monte_carlo = evidence.mean()
    units = active_units(vae.guide, test)
    khat = evidence.khat[~evidence.khat.isnan()]
    bad = evidence.share_bad_k()
    annealed, corrected = anneal(settings, vae, test, evidence, works("annealed"))
    first = data.observe(torch.arange(min(500, data.num_train), device=data.device))
    return (
        {
            "test_elbo": elbo.mean().item(),
            "test_log_likelihood": log_likelihood,
            "test_log_likelihood_se": over_images,
            "mc_se": monte_carlo,
            "num_samples": settings.num_samples,
            "num_images": data_size(test),
            "test_set": content_hash(test),
            "unit": unit_of(vae, data.schema),
            "median_ess": evidence.ess.median().item(),
            "share_khat_above_0_7": (khat > 0.7).double().mean().item(),
            "khat_threshold": pareto_k_threshold(settings.num_samples),
            "share_khat_above_threshold": bad,
            "reliable": believable(evidence) if math.isfinite(elbo.mean().item()) else False,
            "num_invalid": int(evidence.num_invalid.sum()),
            "num_not_finite": num_not_finite(evidence),
            **corrected,
            **_divergence(vae, test),
            "active_units": sum(int(site.sum()) for site in units.values()),
            "active_units_by_site": {name: int(site.sum()) for name, site in units.items()},
            "active_units_first_500": None
            if data.num_train < 2
            else sum(int(site.sum()) for site in active_units(vae.guide, first).values()),
            "evaluate_seconds": time.perf_counter() - start,
        },
        evidence,
        annealed,
    )


def _divergence(vae: Model, test: Tree) -> dict[str, Any]:
    """What the latents carry: the divergence of q(z | x) from the prior, with the error over data and draws."""
    with own_numbers("kl", first_tensor(test).device):
        by_site = kl_by_datum(vae.model, vae.guide, test)
    each = torch.stack(list(by_site.values())).sum(0)
    error = each.std().item() / math.sqrt(len(each)) if len(each) > 1 else math.nan
    means = {name: values.mean().item() for name, values in by_site.items()}
    return {"kl": each.mean().item(), "kl_se": error, "kl_by_site": means}


def unit_of(vae: Model, schema: Schema) -> str:
    """The unit of log p(x), or of log p(x given c): numbers of different units are never compared."""
    told = f", given {names_of(schema.condition)}" if schema.condition else ""
    return vae.likelihood.head.unit(schema.noun) + told


def content_hash(x: Tree) -> str:
    """A short hash of observations, by which runs know whether they were scored on the same."""
    known = hashlib.sha256()
    for each in tensors(x):
        known.update(each.cpu().numpy().tobytes())
    return known.hexdigest()[:16]


MOST_VALIDATION = 1000
"""Validation images of which log p(x) is estimated: choices among models need no more, and all are scored often."""


def score_validation(run: Settings, vae: Model, data: Data, works: Works = nobody_else) -> dict[str, Any]:
    """The entries of result.json that models are chosen by: what a test set is asked once, these are asked often.

    The ELBO is that of all validation images; log p(x), by importance sampling, that of some, the same in every run.
    """
    torch.manual_seed(run.seed + 2)  # whatever the test set took
    settings, everything = run.evidence, data.validation
    size = data_size(everything)
    x = select(everything, some(size, min(MOST_VALIDATION, size)).to(data.device))
    sampled = partial(importance_sampling, vae.model, vae.guide, x, settings.num_samples)
    evidence = sampled(progress=True, num_checked=0, work=works("validation"))
    log_likelihood, over_images, monte_carlo = evidence.mean()
    return {
        "validation_elbo": estimate_elbo(vae.model, vae.guide, everything, num_samples=10).mean().item(),
        "validation_log_likelihood": log_likelihood,
        "validation_log_likelihood_se": over_images,
        "validation_mc_se": monte_carlo,
        "validation_reliable": believable(evidence),
        "validation_num_not_finite": num_not_finite(evidence),
        "num_validation_images": data_size(x),
    }


MORE_ELSEWHERE = "not to be believed: chains from the prior find more of p(x)"
BY_ROUNDING = "not to be believed: rounding alone changes it by half a nat"
MANY = 0.1
"""Share of images with a bad Pareto k above which an importance-sampled log-likelihood is called unreliable."""


def share_doubted(evidence: Evidence) -> float | None:
    """The share of importance-sampled data that failed a check, of k or of a second opinion; None if k is not known."""
    return None if evidence.share_bad_k() is None else 1 - reliable_share(evidence)["share_reliable"]


def num_not_finite(evidence: Evidence) -> int:
    """Of how many data log p(x) is NaN or infinite: their mean is no number then."""
    return int((~evidence.log_px.isfinite()).sum())


def believable(evidence: Evidence) -> bool | None:
    """Whether the mean of importance-sampled evidence may be believed; None if that is not known.

    Not where rounding alone changes it by half a nat, however few the samples: runs compute in single precision.
    """
    lost = num_not_finite(evidence) or not beyond_rounding(evidence.log_px.mean(), torch.float32)
    return False if lost else reliable(share_doubted(evidence))


def reliable(share_bad_k: float | None) -> bool | None:
    """Whether an importance-sampled log-likelihood and its error may be believed; None if that is not known."""
    return None if share_bad_k is None else share_bad_k <= MANY


FEW_DOUBTED = 0.01
"""Share of images that are not reliable up to which the mean over all of them is."""


def doubted(evidence: Evidence, importance: Evidence) -> Evidence:
    """Annealed evidence, not reliable where importance sampling of the same data finds more, for whatever reason."""
    more = contradicts(evidence.log_px, evidence.mc_se, importance.log_px, importance.mc_se)
    return evidence._replace(reliable=cast(Tensor, evidence.reliable) & ~(more & (importance.mc_se < 0.3)))


def anneal(
    settings: EvidenceSettings, vae: Model, test: Tree, importance: Evidence, work: Work | None = None
) -> tuple[xr.Dataset | None, dict[str, Any]]:
    """Annealed importance sampling of some of the test images, and what it says about all of them."""
    whole = data_size(test)
    size = whole if settings.annealed_images is None else min(settings.annealed_images, whole)
    names = ("log_likelihood", "mc_se", "shortfall", "acceptance", "share_reliable", "reliable", "seconds")
    names = tuple(f"annealed_{name}" for name in names)
    nothing = None, dict.fromkeys(names) | {"annealed_images": 0}
    if size == 0:
        return nothing
    among = some(whole, size).to(first_tensor(test).device)
    start = time.perf_counter()
    try:
        evidence = annealed_importance_sampling(
            vae.model, vae.guide, select(test, among), settings.annealing, progress=True, work=work
        )
    except ContractError as error:
        print(f"no annealed estimate: {error}")
        return nothing
    except torch.linalg.LinAlgError as error:  # of numbers that overflow  # pyright: ignore[reportPrivateImportUsage]
        print(f"no annealed estimate: {' '.join(str(error).split())}")
        lost = {"annealed_images": size, "annealed_num_not_finite": size, "annealed_share_reliable": 0.0}
        return None, nothing[1] | lost | {"annealed_reliable": False}
    evidence = doubted(evidence, pick(importance, among))
    estimate, error = difference_estimate(importance, evidence, among)
    acceptance, seconds = evidence.acceptance.mean().item(), time.perf_counter() - start
    share = cast(Tensor, evidence.reliable).double().mean().item()
    believed = share >= 1 - FEW_DOUBTED and sensible(estimate, error, evidence, vae.likelihood.head)
    values = estimate, error, evidence.shortfall(), acceptance, share, believed, seconds
    counts = {"annealed_images": size, "annealed_num_not_finite": num_not_finite(evidence)}
    return evidence.to_dataset(among), dict(zip(names, values, strict=True)) | counts


def sensible(estimate: float, error: float, evidence: Evidence, head: Likelihood) -> bool:
    """Whether the mean over all data may be what it is said to be, by that of some.

    No log mass is above 0, and an error above the spread of log p(x) over data says that the others are not known.
    """
    spread = max(evidence.log_px.std().item(), 1.0) if evidence.log_px.numel() > 1 else 1.0
    possible = head.is_density is not False or estimate <= error
    return math.isfinite(estimate) and error <= spread and possible


def some(number: int, size: int) -> Tensor:
    """``size`` of ``number`` places, drawn at random, the same in every run, so that runs can be compared on them."""
    return torch.randperm(number, generator=torch.Generator().manual_seed(0))[:size].sort().values


def best(result: dict[str, Any]) -> float:
    """The log-likelihood to be believed: the annealed one, where there is one."""
    annealed = result.get("annealed_log_likelihood")
    if annealed is None and result.get("annealed_images"):
        return math.nan  # it was tried, and is no number: the other is not to be believed in its place
    return result["test_log_likelihood"] if annealed is None else annealed


def bits_per_dim(log_likelihood: float, data: Data, head: Likelihood) -> float | None:
    """Bits per pixel of the image as stored; None for images of which not all is scored, or by no likelihood.

    A density of dequantized pixels, (k + u) / L in (0, 1), counts log2 L more: E_u log p((k + u) / L) - X log L is a
    lower bound of the log mass of the whole numbers k (Theis, van den Oord & Bethge 2016, section 3.1).
    """
    if not isinstance(data, ImageData) or data.encoding not in ("integers", "dequantized"):
        return None
    if data.train_pixels.is_floating_point() or head.is_density is None:
        return None
    bits = -log_likelihood / (data.schema.size * math.log(2))
    return bits + math.log2(data.max_value + 1) if data.encoding == "dequantized" else bits


def report_run(run_dir: Path) -> None:
    """Print the result in ``run_dir`` as a short table."""
    result = result_of(run_dir)
    print(f"\n{table([('test', result['unit'], ''), *rows_of(result)])}\n\n{run_dir}")


def _is_lower(result: dict[str, Any]) -> bool:
    """Whether importance sampling is lower than annealing by more than both errors."""
    annealed = result.get("annealed_log_likelihood")
    if annealed is None:
        return False
    error = math.hypot(result["mc_se"] or 0.0, result.get("annealed_mc_se") or 0.0)
    return annealed - result["test_log_likelihood"] > 2 * error


def rows_of(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Each number of a run with its meaning and with what speaks against it: name, number, and what it says."""
    noun = noun_of(result)
    tests = f"{result['num_images']:,} test {noun}s"
    samples = f"{result['num_samples']:,} samples from the guide, {tests}: the customary number"
    share, believe = result["share_khat_above_threshold"], "another run would differ by this"
    if result.get("reliable") is False:
        samples += ", too low here" if _is_lower(result) else ", which may be too low"
        believe = "not to be believed here, see k" if share is not None and share > MANY else MORE_ELSEWHERE
        believe = BY_ROUNDING if share is None else believe
        believe = "not to be believed: it is no number" if result.get("num_not_finite") else believe
    rows = [
        ("ELBO", number(result["test_elbo"], 2), "the evidence lower bound, E_q[log p(x, z) - log q(z given x)]"),
        ("log p(x), importance sampling", number(result["test_log_likelihood"], 2), samples),
        ("  Monte Carlo error", number(result["mc_se"]), believe),
        (f"  {noun}s with bad k", "-", "too few samples to tell")
        if share is None
        else (
            f"  {noun}s with k > {result['khat_threshold']:.2f}",
            f"{share:.0%}",
            "Pareto k of the weights: there, neither the estimate nor its error is to be trusted",
        ),
    ]
    if result.get("annealed_log_likelihood") is not None or result.get("annealed_images"):
        how = f"of {result['annealed_images']:,} {noun}s; their mean difference corrects the number above"
        rows += [
            ("log p(x), annealed", number(result["annealed_log_likelihood"], 2), how),
            (
                "  error",
                number(result["annealed_mc_se"]),
                f"another draw of these {noun}s, and another run, would",
            ),
            ("  low by about", number(result.get("annealed_shortfall")), "in expectation; more temperatures help"),
        ]
        if result.get("annealed_reliable") is False:
            share = result["annealed_share_reliable"]
            why = "its error is too large, or a log mass is above 0: score more of them"
            why = unreliable(share, noun + "s") if share < 1 - FEW_DOUBTED else why
            why = "it is no number" if result.get("annealed_num_not_finite") else why
            rows.append((f"  reliable {noun}s", f"{share:.1%}", f"not to be believed: {why}"))
    rows += [
        (f"error over {noun}s", number(result["test_log_likelihood_se"]), "another test set would differ by this"),
        *_of_validation(result),
        *_of_latents(result),
        ("active units", str(result["active_units"]), f"latent units that vary with the {noun}"),
        ("seconds", f"{result['train_seconds']:.0f} + {result['evaluate_seconds']:.0f}", "training + evaluation"),
    ]
    if result.get("bits_per_dim") is not None:
        rows.append(("bits per dimension", number(result["bits_per_dim"]), "of the image as stored; smaller is better"))
    rows += lost_rows(result)
    if result.get("num_invalid"):
        rows.append(("invalid weights", str(result["num_invalid"]), "log-weights that are NaN or infinite"))
    return rows


def lost_rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """How many data have no finite log p(x), where there are any."""
    names = {"": "importance sampling", "annealed_": "annealed", "validation_": "validation"}
    counts = {names[each]: result.get(f"{each}num_not_finite") for each in names}
    found = [f"{count:,} {name}" for name, count in counts.items() if count]
    told = f"{noun_of(result)}s whose log p(x) is NaN or infinite: their mean is no number"
    return [("not finite", ", ".join(found), told)] if found else []


def _of_validation(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What models are chosen by; earlier versions did not write it."""
    log_likelihood = result.get("validation_log_likelihood")
    if not result.get("num_validation_images"):
        return []
    rows = f"{result['num_validation_images']:,} {noun_of(result)}s"
    how = f"importance sampling, {rows}: choose models by this, not by the test set"
    return [("validation", number(log_likelihood, 2), how)]


def _of_latents(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """How many of the nats are told by the latents; earlier versions did not write it."""
    if result.get("kl") is None:
        return []
    by_site = ", ".join(f"{name} {number(value, 2)}" for name, value in result.get("kl_by_site", {}).items())
    several = f": {by_site}" if "," in by_site else ""
    how = f"of q(z given x) from the prior, what the latents carry, error {number(result.get('kl_se'))}{several}"
    return [("KL divergence", number(result["kl"], 2), how)]


def unreliable(share: float, images: str) -> str:
    """What is wrong where only a share of the estimates is reliable, and what would mend it."""
    return (
        f"{1 - share:.1%} of the {images} failed a check; more --annealing.num_climbs or most_temperatures may mend "
        "it, or --annealing.start prior"
    )


def number(value: float | None, digits: int = 3) -> str:
    """A number, or a dash for none, and for NaN and infinities."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"
