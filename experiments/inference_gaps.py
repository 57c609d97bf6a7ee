"""How much of log p(x) does the encoder's bound lose because its family is too small, and how much because one network
serves all images? On training and on test images? (Cremer, Li & Duvenaud 2018)

Usage: python -m experiments.inference_gaps RUN_DIR [options]

With L[q] the ELBO of the encoder and q* the best posterior of its family for an image alone,

    log p(x) - L[q] = (log p(x) - L[q*]) + (L[q*] - L[q]) = approximation gap + amortization gap

log p(x) is estimated twice, by annealed importance sampling and by importance sampling from a Laplace approximation of
each posterior. Both are low in expectation, so that on each split the one of higher mean is taken. q* is found for two
families, factorized Gaussians and flows. Table, figure and values of each image are written to a directory of its own.
"""

import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import xarray as xr
from torch import Tensor

from pyro_vae import (
    Annealing,
    ContractError,
    Evidence,
    annealed_importance_sampling,
    cli,
    importance_sampling,
    inference_gaps,
    runs,
)
from pyro_vae.infer.diagnostics import pareto_k_threshold
from pyro_vae.infer.evidence.gaps import Family, InferenceGaps
from pyro_vae.infer.evidence.local import local_flow, local_mean_field
from pyro_vae.infer.programs import Program
from pyro_vae.runs import figures
from pyro_vae.runs.scoring import number

SPLITS = ("test", "train")
FAMILIES: dict[Family, str] = {"mean_field": "mean field", "flow": "flow"}
ESTIMATORS = {
    "annealed": "annealed importance sampling",
    "importance": "importance sampling from the Laplace approximation",
}
WIDENING = 1.1
"""Of the Laplace proposal's standard deviations: lightens the tail of the weights."""


@dataclass(frozen=True)
class Settings:
    """Settings of one study of a run.

    Args:
        run: directory of a finished run; may stand first, without --run.
        run_dir: directory to write, new or empty; null: inference_gaps in the run's directory.
        family: the encoder's own, with which its gaps are taken; both are optimized in any case.
        num_images: how many of each split, drawn at random, the same each time, at least 2.
        num_samples: samples per image of importance sampling and of each bound, at least 2.
        num_steps: steps of each optimization of q*, at least 1; if more of them change the gaps, these are too few.
        annealing: settings of annealed importance sampling.
        seed: of all estimates and optimizations, at least 0.
        device: auto takes a GPU if there is one.
    """

    run: Path
    run_dir: Path | None = None
    family: Literal["mean_field", "flow"] = "mean_field"
    num_images: int = 100
    num_samples: int = 1000
    num_steps: int = 300
    annealing: Annealing = field(default_factory=Annealing)
    seed: int = 0
    device: str = "auto"

    def __post_init__(self):
        for name, bound in {"num_images": 2, "num_samples": 2, "num_steps": 1}.items():
            if (value := getattr(self, name)) < bound:
                raise ValueError(f"--{name} must be at least {bound}, got {value}")
        runs.check_seed(self.seed)


class Split(NamedTuple):
    """What is found on the images of one split.

    Attributes:
        among: their places in the split, shape ``(n,)``.
        evidence: by each of ``ESTIMATORS``.
        chosen: the one of them that stands for log p(x).
        gaps: the bounds and gaps.
        seconds: by stage of the work.
    """

    among: Tensor
    evidence: dict[str, Evidence]
    chosen: str
    gaps: InferenceGaps
    seconds: dict[str, float]


def main(argv: Sequence[str] | None = None) -> Path:
    """Take the gaps apart as told by ``argv``; return the directory written.

    Raises:
        RunError: for a mistake in ``argv``, or if the model has discrete latent variables.
    """
    settings, _ = runs.parse(Settings, argv, first="run")
    opened = runs.open_finished(settings.run, settings.run_dir, "inference_gaps", settings.device, settings.seed)
    vae, data, device, run_dir = opened
    runs.make_directory(run_dir)
    splits = {}
    try:
        for name in SPLITS:
            x, among = runs.some_images(data, name, settings.num_images)
            print(f"{len(x):,} {name} images")
            splits[name] = study(settings, vae.model, vae.guide, x, among)
    except (ContractError, ValueError) as error:
        raise runs.RunError(f"{settings.run}: {' '.join(str(error).split())}") from error
    result = summarize(settings, splits, vae.likelihood.head.unit()) | runs.provenance(device)
    with runs.writing(run_dir):
        groups = {name: dataset(split, result["unit"]) for name, split in splits.items()}
        runs.write_evidence(run_dir / "gaps.nc", groups)
        plot(result, splits, run_dir / "gaps.png")
    return runs.conclude(run_dir, report(result), result, device)


def study(settings: Settings, model: Program, guide: Program, x: Tensor, among: Tensor) -> Split:
    """Estimate log p(x) of observations ``(n, X)`` twice, and take apart what the guide's bound loses."""
    seconds = {}

    def timed(stage: str, function, *args, **settings) -> Any:
        start = time.perf_counter()
        found = function(model, guide, *args, **settings, progress=True)
        seconds[stage] = time.perf_counter() - start
        return found

    evidence = {
        "annealed": timed("annealed", annealed_importance_sampling, x, settings.annealing),
        "importance": timed("importance", importance_sampling, x, settings.num_samples, "laplace", WIDENING),
    }
    chosen = higher(evidence)
    mean_field = timed("mean_field", local_mean_field, x, num_steps=settings.num_steps)
    flow = timed("flow", local_flow, x, mean_field, num_steps=settings.num_steps)
    bounds = {"mean_field": mean_field, "flow": flow, "num_samples": settings.num_samples}
    gaps = timed("bounds", inference_gaps, evidence[chosen], x, **bounds)
    return Split(among, evidence, chosen, gaps, seconds)


def higher(evidence: dict[str, Evidence]) -> str:
    """The estimator of the higher mean, NaN being the lowest of all."""
    means = {name: each.mean()[0] for name, each in evidence.items()}
    return max(means, key=lambda name: -math.inf if math.isnan(means[name]) else means[name])


def summarize(settings: Settings, splits: dict[str, Split], unit: str) -> dict[str, Any]:
    """Entries of the JSON file: means, each with its error over images and its Monte Carlo error, and settings."""
    threshold = pareto_k_threshold(settings.num_samples)
    result: dict[str, Any] = {"run": str(settings.run), "unit": unit, "family": settings.family, "splits": {}}
    for name, split in splits.items():
        estimates = {key: mean_log_weight(*each.mean()) for key, each in split.evidence.items()}
        for key, each in split.evidence.items():
            estimates[key]["num_invalid"] = int(each.num_invalid.sum())
        bad = split.evidence["importance"].share_bad_k()
        estimates["importance"] |= {"khat_threshold": threshold, "share_khat_above_threshold": bad}
        estimates["annealed"]["acceptance"] = split.evidence["annealed"].acceptance.mean().item()
        result["splits"][name] = {
            "num_images": len(split.among),
            "log_px_from": split.chosen,
            "log_px": estimates,
            "gaps": {key: mean_log_weight(*each) for key, each in split.gaps.mean().items()},
            "seconds": split.seconds,
        }
    numbers = {name: getattr(settings, name) for name in ("num_images", "num_samples", "num_steps", "seed")}
    total = sum(sum(split.seconds.values()) for split in splits.values())
    return (
        result
        | {"settings": numbers | {"widening": WIDENING, "annealing": asdict(settings.annealing)}}
        | {"seconds": total}
    )


def mean_log_weight(mean: float, se: float, mc_se: float) -> dict[str, Any]:
    return {"mean": mean, "se": se, "mc_se": mc_se}


def dataset(split: Split, unit: str) -> xr.Dataset:
    """Values of each image, along the dimension ``datum``, numbered by its place in the split."""
    values = split.gaps._asdict()
    for name, each in split.evidence.items():
        values |= {f"{name}_{field}": getattr(each, field) for field in ("log_px", "mc_se", "ess", "khat")}
    variables = {name: ("datum", value.cpu().numpy()) for name, value in values.items()}
    attributes = {"unit": unit, "log_px_from": split.chosen}
    return xr.Dataset(variables, coords={"datum": split.among.cpu().numpy()}, attrs=attributes)


def report(result: dict[str, Any]) -> str:
    """The table of bounds and gaps, with what has to be known about it."""
    family = result["family"]
    own = FAMILIES[family]
    entries = {
        "log p(x)": "log_px",
        "L[q*], flow": "elbo_flow",
        "L[q*], mean field": "elbo_mean_field",
        "L[q], encoder": "elbo",
        "approximation gap": f"approximation_gap_{family}",
        "amortization gap": f"amortization_gap_{family}",
        "total gap": "inference_gap",
    }
    header = [result["unit"]]
    for name, split in result["splits"].items():
        header += [f"{split['num_images']:,} {name} images", "over images", "Monte Carlo"]
    rows = [header]
    for label, key in entries.items():
        found = (split["gaps"][key] for split in result["splits"].values())
        rows.append([label])
        for each in found:
            rows[-1] += [number(each["mean"]), *(f"+- {number(each[error])}" for error in ("se", "mc_se"))]
    lines = [
        f"Inference gaps of {result['run']}. The gaps are those of the family {own}, the encoder's own: approximation "
        f"gap = log p(x) - L[q*], {own}; amortization gap = L[q*], {own} - L[q]; total gap = log p(x) - L[q]. Other "
        "images would differ by the error over images, another run on the same ones by the Monte Carlo error.",
        "",
        runs.table(rows),
        "",
        *(f"- {_source(name, split)}" for name, split in result["splits"].items()),
        *(f"- {line}" for line in _doubts(result)),
        f"- {_command(result)}: {result['seconds']:.0f} seconds on {result['device']}",
    ]
    return "\n".join(lines)


def _source(name: str, split: dict[str, Any]) -> str:
    """Which estimate of log p(x) was taken, and what the other one says."""
    estimates, chosen = split["log_px"], split["log_px_from"]
    bad, threshold = (estimates["importance"][key] for key in ("share_khat_above_threshold", "khat_threshold"))
    known = "unknown share" if bad is None else f"{bad:.0%}"
    notes = {"annealed": "", "importance": f" (Pareto k above {threshold:.2f}: {known} of the images)"}
    means = {key: f"{label}, {number(estimates[key]['mean'])}{notes[key]}" for key, label in ESTIMATORS.items()}
    return f"log p(x), {name}: the higher, of {means.pop(chosen)}, and {means.popitem()[1]}"


def _doubts(result: dict[str, Any]) -> list[str]:
    """Gaps that cannot be negative, and are."""
    reasons = {
        "approximation": "log p(x) is too low: more --annealing.num_temperatures, or --num_samples",
        "amortization": "--family is not the encoder's, or --num_steps are too few",
    }
    lines = []
    for name, split in result["splits"].items():
        for gap, reason in reasons.items():
            each = split["gaps"][f"{gap}_gap_{result['family']}"]
            if each["mean"] < -2 * each["mc_se"]:
                lines.append(f"the {gap} gap, {name}, is below zero, as no such gap can be: {reason}")
    return lines


def _command(result: dict[str, Any]) -> str:
    """What to type for the same again: defaults are left out but for the most telling ones."""
    settings = {name: value for name, value in result["settings"].items() if name not in ("annealing", "widening")}
    defaults = asdict(Annealing())
    for name, value in result["settings"]["annealing"].items():
        if value != defaults[name]:
            settings[f"annealing.{name}"] = value
    options = " ".join(f"--{name} {value}" for name, value in {"family": result["family"], **settings}.items())
    return f"`python -m experiments.inference_gaps {shlex.quote(result['run'])} {options}`"


def plot(result: dict[str, Any], splits: dict[str, Split], path: Path) -> None:
    """Bars from the encoder's ELBO up to log p(x), for each split and family; and the gaps of each image."""
    family: Family = result["family"]
    families = sorted(FAMILIES, key=lambda key: key != family)
    with figures.figure(path, width=12, height=4.6, columns=2, width_ratios=(1.9, 1)) as (bars, each):
        places, labels, whose = [], [], ("for comparison", "the encoder's")
        for row, (name, split) in enumerate(result["splits"].items()):
            gaps = split["gaps"]
            ends = f"L[q] = {gaps['elbo']['mean']:.2f}, log p(x) = {gaps['log_px']['mean']:.2f}"
            bars.text(0, 0.55 - 3 * row, f"{split['num_images']:,} {name} images: {ends}", weight="bold")
            for shift, key in enumerate(families):
                places.append(-3 * row - shift)
                labels.append(f"{FAMILIES[key]}\n({whose[key == family]})")
                _bar(bars, places[-1], gaps, key, own=key == family, named=places[-1] == 0)
        bars.set_yticks(places, labels)
        bars.set_ylim(places[-1] - 0.6, 1.1)
        bars.grid(axis="y", visible=False)
        bars.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderaxespad=0.2)
        bars.set_xlabel("nats per image above the encoder's ELBO L[q]; lines: standard errors over images")
        for color, (name, split) in zip(("C2", "C4"), splits.items(), strict=True):
            pair = (gap(family)[0].cpu() for gap in (split.gaps.approximation_gap, split.gaps.amortization_gap))
            each.scatter(*pair, s=22, color=color, alpha=0.75, linewidths=0, label=name)
        each.set_xlim(left=min(0, each.get_xlim()[0]))
        each.set_ylim(bottom=min(0, each.get_ylim()[0]))
        each.legend()
        each.set(xlabel="approximation gap, nats", ylabel="amortization gap, nats")
        each.set_title(f"Each image, {FAMILIES[family]}", fontsize=10)


def _bar(axes, place: float, gaps: dict[str, Any], family: Family, own: bool, named: bool) -> None:
    """From L[q], at 0, to L[q*] of ``family``, and on to log p(x); paler if the family is not the encoder's own."""
    start = 0.0
    names = {"amortization": "amortization gap: L[q*] - L[q]", "approximation": "approximation gap: log p(x) - L[q*]"}
    for (kind, label), color in zip(names.items(), ("C0", "C1"), strict=True):
        size = gaps[f"{kind}_gap_{family}"]["mean"]
        style = {"alpha": 1.0 if own else 0.4, "label": label if named else None}
        axes.barh(place, size, left=start, height=0.8, color=color, **style)
        if size > 0.05 * gaps["inference_gap"]["mean"]:  # else there is no room
            axes.text(start + size / 2, place, f"{size:.2f}", ha="center", va="center", color="white" if own else "0.2")
        start += size
    # below each other, so that they do not overlap where a gap is small
    for end, drop in ((gaps[f"amortization_gap_{family}"], 0.2), (gaps["inference_gap"], 0.3)):
        axes.errorbar(end["mean"], place - drop, xerr=end["se"], color="0.2", capsize=2, linewidth=1)


if __name__ == "__main__":
    cli.guarded(main)
