"""How well can x be told by how many nats of z? Is it the prior or the decoder that makes one model better?

Usage: python -m experiments.rate_distortion RUN_DIR [RUN_DIR ...] [options]

A model's log p(x) is one point of a curve: at each rate, the least distortion E[-log p(x | z)] that any encoder reaches
with its prior and its decoder (Huang, Makhzani, Cao & Grosse 2020). Chains annealed from the prior to
p(z) p(x | z)^beta give the whole curve, and are an upper bound of the rate. Of several runs on the same images, rates
at equal distortion are compared, paired by image: models of equal log p(x) may differ in what they do with few nats,
or with many. The encoders do not enter.
"""

import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xarray as xr
from torch import Tensor

from pyro_vae import ContractError, cli, rate_distortion, runs
from pyro_vae.infer.evidence import RateDistortion, Tempering
from pyro_vae.infer.evidence.result import mean_and_errors
from pyro_vae.runs import figures
from pyro_vae.runs.build import Model
from pyro_vae.runs.scoring import number

ERRORS = "over images", "chains"


@dataclass(frozen=True)
class Settings:
    """Settings of the curves.

    Args:
        runs: directories of finished runs on the same data; may stand first, without --runs.
        run_dir: directory to write, new or empty; null: rate_distortion in the first run's directory.
        num_images: of the test set, drawn at random, the same each time, at least 2.
        betas: where the curves are taken, positive and ascending; at 1, rate plus distortion is -log p(x).
        tempering: settings of the chains.
        seed: of all chains, at least 0.
        device: auto takes a GPU if there is one.
    """

    runs: Sequence[Path]
    run_dir: Path | None = None
    num_images: int = 50
    betas: Sequence[float] = (0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.5, 5.0)
    tempering: Tempering = field(default_factory=Tempering)
    seed: int = 0
    device: str = "auto"

    def __post_init__(self):
        if not self.runs:
            raise ValueError("--runs: name at least one finished run")
        if len(set(self.runs)) < len(self.runs):
            raise ValueError(f"--runs names a run twice: {', '.join(map(str, self.runs))}")
        if self.num_images < 2:
            raise ValueError(f"--num_images must be at least 2, got {self.num_images}")
        betas = [0.0, *self.betas]
        if len(betas) < 2 or any(low >= high for low, high in pairwise(betas)):
            raise ValueError(f"--betas must be positive and ascending, got {list(self.betas)}")
        runs.check_seed(self.seed)


class Curve(NamedTuple):
    """The curve of one run on the images ``(n,)`` of the test set that are numbered ``among``."""

    found: RateDistortion
    among: Tensor
    unit: str
    seconds: float

    def rate_at(self, distortion: float) -> Tensor | None:
        """What each image adds to the rate at a mean distortion, ``(n,)``, their mean; None beyond the curve's ends.

        Between two betas the curve is taken to be straight. Its slope is -beta, so that an image whose distortion is
        higher than the mean would take beta times that more nats.
        """
        found, means = self.found, self.found.distortion.mean(1)
        below = (means <= distortion).nonzero()
        if not len(below) or (place := int(below[0])) == 0:
            return None
        share = (means[place - 1] - distortion) / (means[place - 1] - means[place])
        rate, distortions, beta = (
            torch.lerp(each[place - 1], each[place], share) for each in (found.rate, found.distortion, found.betas)
        )
        return rate + beta * (distortions - distortion)

    def error_at(self, distortion: float) -> float:
        """The error of the mean of :meth:`rate_at` from the chains alone, at the nearest beta."""
        nearest = int((self.found.distortion.mean(1) - distortion).abs().argmin())
        each = torch.hypot(self.found.rate_se[nearest], self.found.betas[nearest] * self.found.distortion_se[nearest])
        return mean_and_errors(each, each)[2]


def main(argv: Sequence[str] | None = None) -> Path:
    """Draw the curves of the runs in ``argv``; return the directory written.

    Raises:
        RunError: for a mistake in ``argv``, if runs are not on the same images, or a model has discrete latent
            variables.
    """
    settings, _ = runs.parse(Settings, argv, first="runs")
    first, *others = settings.runs
    opened = runs.open_finished(first, settings.run_dir, "rate_distortion", settings.device, settings.seed)
    vae, data, device, run_dir = opened
    x, among = runs.some_images(data, "test", settings.num_images)
    vaes: dict[Path, Model] = {first: vae}
    for path in others:
        other, its_data = runs.load_finished(path, device, may_be_told=False)
        same = its_data.test.shape == data.test.shape and torch.equal(its_data.test, data.test)
        if not same or other.likelihood.head.unit() != vae.likelihood.head.unit():
            raise runs.RunError(f"{path} is on other images than {first}, or measures them in another unit")
        vaes[path] = other
    runs.make_directory(run_dir)
    curves = {}
    for path, each in vaes.items():
        print(f"{path}: {len(x):,} test images")
        torch.manual_seed(settings.seed)
        start = time.perf_counter()
        try:
            found = rate_distortion(each.model, each.guide, x, settings.betas, settings.tempering, progress=True)
        except ContractError as error:
            raise runs.RunError(f"{path}: {' '.join(str(error).split())}") from error
        unit = each.likelihood.head.unit()
        curves[str(path)] = Curve(RateDistortion(*(e.cpu() for e in found)), among, unit, time.perf_counter() - start)
    result = summarize(settings, curves)
    with runs.writing(run_dir):
        groups = {f"run_{i}": dataset(path, curve) for i, (path, curve) in enumerate(curves.items())}
        runs.write_evidence(run_dir / "curves.nc", groups)
        plot(result, run_dir / "rate_distortion.png")
    return runs.conclude(run_dir, report(result), result, device)


def summarize(settings: Settings, curves: dict[str, Curve]) -> dict[str, Any]:
    """Entries of the JSON file: points of each curve, and differences of rate from the first at equal distortion."""
    names = ("num_images", "betas", "seed")
    first = next(iter(curves.values()))
    chosen = {name: getattr(settings, name) for name in names} | {"tempering": asdict(settings.tempering)}
    result: dict[str, Any] = {
        "unit": first.unit,
        "num_images": len(first.among),
        "settings": chosen | {"betas": list(settings.betas)},
        "runs": {},
    }
    for path, curve in curves.items():
        found = curve.found
        means = found.mean()
        points = []
        for i, beta in enumerate(found.betas.tolist()):
            point: dict[str, Any] = {"beta": beta, "share_reliable": found.reliable[i].double().mean().item()}
            for name, values in means.items():
                point |= dict(zip((name, f"{name}_se", f"{name}_mc_se"), values[i], strict=True))
            points.append(point)
        result["runs"][path] = {
            "points": points,
            "seconds": curve.seconds,
            "evaluations": found.evaluations.mean().item(),
            "acceptance": found.acceptance.mean().item(),
            "from_first": [] if curve is first else differences(first, curve),
        }
    return result


def differences(first: Curve, other: Curve) -> list[dict[str, float]]:
    """Rate of another run minus that of the first one, at the mean distortions of the first, paired by image."""
    lines = []
    for distortion in first.found.distortion.mean(1).tolist():
        pair = first.rate_at(distortion), other.rate_at(distortion)
        if pair[0] is None or pair[1] is None:
            continue
        mean, se, _ = mean_and_errors(pair[1] - pair[0], torch.zeros_like(pair[0]))
        mc_se = (first.error_at(distortion) ** 2 + other.error_at(distortion) ** 2) ** 0.5
        lines.append({"distortion": distortion, "rate": pair[0].mean().item(), "mean": mean, "se": se, "mc_se": mc_se})
    return lines


def dataset(path: str, curve: Curve) -> xr.Dataset:
    """Values of each image along ``beta`` and ``datum``, numbered by its place in the test set."""
    fields = {name: value for name, value in curve.found._asdict().items() if name != "betas"}
    variables = {name: (("beta", "datum")[2 - v.dim() :], v.numpy()) for name, v in fields.items()}
    at = {"beta": curve.found.betas.numpy(), "datum": curve.among.cpu().numpy()}
    return xr.Dataset(variables, coords=at, attrs={"run": path, "unit": curve.unit})


def report(result: dict[str, Any]) -> str:
    """The tables, with what has to be known about them."""
    sections = [
        f"Rate KL(p_beta(z | x) || p(z)) and distortion E[-log p(x | z)], {result['unit']}, means over "
        f"{result['num_images']:,} test images. Other images would differ by the first error, other chains by the "
        "second. At beta = 1 their sum is -log p(x). The rate is high in expectation, by about half of the squared "
        "error of one image's."
    ]
    for path, run in result["runs"].items():
        rows: list[tuple[str, ...]] = [
            ("beta", "rate", "over images", "chains", "distortion", "over images", "chains", "sum", "reliable")
        ]
        for point in run["points"]:
            cells = [f"{point['beta']:g}"]
            for name in ("rate", "distortion"):
                cells += [number(point[name]), *(f"+- {number(point[f'{name}_{error}'])}" for error in ("se", "mc_se"))]
            total = point["rate"] + point["distortion"]
            rows.append((*cells, number(total), f"{point['share_reliable']:.0%}"))
        cost = f"{run['evaluations']:,.0f} evaluations of the decoder per image, {run['seconds']:.0f} seconds"
        sections.append(f"## {path}\n\n{runs.table(rows)}\n\n{cost}")
    first = next(iter(result["runs"]))
    for path, run in result["runs"].items():
        if lines := run["from_first"]:
            rows: list[tuple[str, ...]] = [
                ("distortion", f"rate of {first}", f"{path} minus it", "over images", "chains")
            ]
            for each in lines:
                cells = (number(each[name]) for name in ("distortion", "rate"))
                errors = (f"+- {number(each[name])}" for name in ("se", "mc_se"))
                rows.append((*cells, f"{each['mean']:+.3f}", *errors))
            sections.append(f"## Rate of {path} at equal distortion, paired by image\n\n{runs.table(rows)}")
    doubtful = [path for path, run in result["runs"].items() if any(p["share_reliable"] < 1 for p in run["points"])]
    if doubtful:
        sections.append(
            f"Not reliable in part: the chains of {', '.join(doubtful)} are worth too few by their weights; a smaller "
            "--tempering.error helps."
        )
    sections.append(_command(result))
    return "\n\n".join(sections)


def _command(result: dict[str, Any]) -> str:
    """What to type for the same again."""
    settings = dict(result["settings"])
    defaults = asdict(Tempering())
    options = [
        f"--tempering.{name} {value}" for name, value in settings.pop("tempering").items() if value != defaults[name]
    ]
    options += [f"--{name} {shlex.quote(str(value))}" for name, value in settings.items()]
    return f"`python -m experiments.rate_distortion {shlex.join(result['runs'])} {' '.join(options)}`"


def plot(result: dict[str, Any], path: Path) -> None:
    """The curves, and what the others take more or less than the first at equal distortion."""
    several = len(result["runs"]) > 1
    with figures.figure(path, width=10 if several else 5.5, height=4.2, columns=2 if several else 1) as axes:
        curves = axes[0] if several else axes
        for i, (name, run) in enumerate(result["runs"].items()):
            values = {key: [point[key] for point in run["points"]] for key in run["points"][0]}
            spread = {"xerr": values["rate_mc_se"], "yerr": values["distortion_mc_se"], "capsize": 2}
            curves.errorbar(values["rate"], values["distortion"], marker="o", ms=4, color=f"C{i}", label=name, **spread)
            if 1.0 in values["beta"]:
                at = values["beta"].index(1.0)
                curves.plot(values["rate"][at], values["distortion"][at], "o", ms=9, mfc="none", color=f"C{i}")
        curves.set(xlabel="rate, nats per image", ylabel=f"distortion, {result['unit']}")
        curves.set_title("circles: beta = 1, where the sum is -log p(x)", fontsize=10)
        curves.legend(fontsize=8)
        if several:
            axes[1].axhline(0, color="C0", lw=1)
            for i, (name, run) in enumerate(result["runs"].items()):
                lines = run["from_first"]
                at, mean, se = ([line[key] for line in lines] for key in ("distortion", "mean", "se"))
                if lines:
                    axes[1].errorbar(at, mean, yerr=se, marker="o", ms=4, color=f"C{i}", capsize=2, label=name)
            axes[1].set(xlabel=f"distortion, {result['unit']}", ylabel="rate minus that of the first, nats")
            axes[1].set_title("lines: errors over images, paired", fontsize=10)


if __name__ == "__main__":
    cli.guarded(main)
