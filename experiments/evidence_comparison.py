"""Which estimator of log p(x) is right sooner, per evaluation of the decoder, and which says that it is not?

Usage: python -m experiments.evidence_comparison RUN_DIR [options]

The ELBO, importance sampling from the guide and from a Laplace approximation with growing numbers of samples, annealed
importance sampling from the same two with growing numbers of temperatures, on the same test and training images, and
bidirectional Monte Carlo on images that the model draws. All but the last are low in expectation: of two that disagree
by more than their errors, the higher is nearer the truth. The most careful chains from the guide are the reference,
since nothing but the guide and the model enters them. Evaluations are counted as they happen, adaptation included: one
for each z that is decoded, two if its gradient is taken, two for each row of a Hessian.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vae import (
    VAE,
    Annealing,
    ContractError,
    Evidence,
    TwoLayerVAE,
    annealed_importance_sampling,
    bidirectional_monte_carlo,
    cli,
    estimate_elbo,
    importance_sampling,
    runs,
)
from pyro_vae.infer.supports import Latents
from pyro_vae.runs import figures
from pyro_vae.runs.scoring import number


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison.

    Args:
        run: directory of a finished run; may stand first, without --run.
        num_images: of the test set, of the training set, and simulated; at least 2.
        guide_samples: numbers of importance samples from the guide.
        laplace_samples: numbers of importance samples from the Laplace approximation, whose standard deviations are
            widened by a tenth.
        guide_temperatures: numbers of temperatures from the guide, with 10 leapfrogs; the largest is the reference.
        laplace_temperatures: numbers of temperatures from the Laplace approximation.
        seed: of all estimates, at least 0.
        device: auto takes a GPU if there is one.
        run_dir: directory to write, new or empty; null: evidence_comparison inside the run.
    """

    run: Path
    num_images: int = 100
    guide_samples: Sequence[int] = (1, 10, 100, 1000, 5000)
    laplace_samples: Sequence[int] = (1, 10, 100, 1000, 5000)
    guide_temperatures: Sequence[int] = (20, 50, 100, 300)
    laplace_temperatures: Sequence[int] = (2, 5, 10, 20, 50)
    seed: int = 0
    device: str = "auto"
    run_dir: Path | None = None

    def __post_init__(self):
        if self.num_images < 2:
            raise ValueError(f"--num_images must be at least 2, got {self.num_images}")
        runs.check_seed(self.seed)
        for name in ("guide_samples", "laplace_samples", "guide_temperatures", "laplace_temperatures"):
            if any(value < 1 for value in getattr(self, name)):
                raise ValueError(f"--{name} must all be at least 1, got {list(getattr(self, name))}")
        if not self.guide_temperatures:
            raise ValueError("--guide_temperatures: there must be one, the reference")


@dataclass
class Row:
    """One estimate of one split: means over images, in nats, and what they cost."""

    split: str
    num_images: int
    estimator: str
    setting: int
    evaluations: float
    seconds: float
    log_px: float
    mc_se: float
    difference: float
    difference_mc_se: float
    share_bad_k: float | None
    acceptance: float | None


def main(argv: Sequence[str] | None = None) -> Path:
    """Compare as told by ``argv``; return the directory written.

    Raises:
        RunError: for a mistake in ``argv``, or if the model has discrete latent variables.
    """
    settings, written = runs.parse(Settings, argv, first="run")
    opened = runs.open_finished(settings.run, settings.run_dir, "evidence_comparison", settings.device, settings.seed)
    vae, data, device, run_dir = opened
    vae.requires_grad_(False)
    runs.make_directory(run_dir)
    try:
        rows = [
            row
            for split in ("test", "train")
            for row in compare(settings, vae, runs.some_images(data, split, settings.num_images)[0], split)
        ]
        sandwiches = bidirectional(settings, vae, data.test[: settings.num_images])
    except ContractError as error:
        raise runs.RunError(str(error)) from error
    unit = vae.likelihood.head.unit()
    content = {"unit": unit, "rows": [asdict(row) for row in rows], "sandwiches": sandwiches}
    sections = [
        f"log p(x), {unit}, means over images. Evaluations: of the decoder, per image. Differences are from the\n"
        "reference, the last line, on the same images, with their Monte Carlo error."
    ]
    for split in ("test", "train"):
        here = [row for row in rows if row.split == split]
        sections.append(f"## {here[0].num_images:,} {split} images\n\n{table(here)}")
    simulated = min(settings.num_images, len(data.test))
    title = f"## Bidirectional Monte Carlo, {simulated:,} images drawn from the model"
    sections.append(f"{title}\n\n{sandwich_table(sandwiches)}")
    text = "\n\n".join(sections)
    with runs.writing(run_dir):
        figure(rows, unit, run_dir / "evidence.png")
        runs.write_text(run_dir / "config.yaml", written)
    return runs.conclude(run_dir, text, content, device)


def compare(settings: Settings, vae: VAE | TwoLayerVAE, x: Tensor, split: str) -> list[Row]:
    """All estimates of one split; the reference comes last."""
    model, guide = vae.model, vae.guide
    hessian = 2 * Latents(model, guide, x).dim
    plans: list[tuple[str, int, int, Callable[[], Evidence]]] = []
    counted: dict[str, Any] = {"compiled": False, "progress": True}  # a compiled decoder could not be counted

    def sampled(num: int, **proposal: Any) -> Callable[[], Evidence]:
        return lambda: importance_sampling(model, guide, x, num, num_checked=0, **counted, **proposal)

    def annealed(**settings: Any) -> Callable[[], Evidence]:
        return lambda: annealed_importance_sampling(model, guide, x, Annealing(num_checked=0, **settings), **counted)

    def bound() -> Evidence:
        draws = torch.stack([estimate_elbo(model, guide, x) for _ in range(100)]).double()
        nothing = torch.full_like(draws[0], math.nan)
        return Evidence(draws.mean(0), draws.std(0) / 10, nothing, nothing, nothing, nothing)

    plans.append(("ELBO", 100, 0, bound))
    for num in settings.guide_samples:
        plans.append(("importance, guide", num, 0, sampled(num)))
    for num in settings.laplace_samples:
        plans.append(("importance, Laplace", num, hessian, sampled(num, proposal="laplace", widening=1.1)))
    for num in settings.laplace_temperatures:
        plans.append(("annealed, Laplace", num, hessian, annealed(num_temperatures=num)))
    for num in sorted(settings.guide_temperatures):
        plans.append(("annealed, guide", num, 0, annealed(start="guide", num_temperatures=num, num_leapfrogs=10)))
    found = []
    with CountedDecodes(vae) as counter:
        for name, num, extra, run in plans:
            print(f"{split}: {name}, {num}")
            counter.rows, start = 0, time.perf_counter()
            evidence = run()
            found.append((name, num, counter.rows / len(x) + extra, time.perf_counter() - start, evidence))
    reference, rows = found[-1][-1], []
    for name, num, evaluations, seconds, evidence in found:
        mean, _, monte_carlo = evidence.mean()
        bad = evidence.share_bad_k()
        acceptance = evidence.acceptance.mean().item()
        difference = mean - reference.mean()[0]
        error = (evidence.mc_se.square() + reference.mc_se.square()).sum().sqrt().item() / len(x)
        rows.append(
            Row(split, len(x), name, num, evaluations, seconds, mean, monte_carlo, difference, error, bad, acceptance)
        )
    return rows


def bidirectional(settings: Settings, vae: VAE | TwoLayerVAE, like: Tensor) -> list[dict[str, float]]:
    """Widths of the sandwich for each number of temperatures from the Laplace approximation."""
    result = []
    for num in settings.laplace_temperatures:
        print(f"simulated: bidirectional, {num}")
        torch.manual_seed(settings.seed)  # the same images for each
        sandwich = bidirectional_monte_carlo(vae.model, vae.guide, like, Annealing(num_temperatures=num), progress=True)
        width, error = sandwich.width()
        lower, upper = (each.log_px.mean().item() for each in (sandwich.lower, sandwich.upper))
        result.append({"temperatures": num, "lower": lower, "upper": upper, "width": width, "width_se": error})
    return result


class CountedDecodes:
    """Context that counts how many z a VAE decodes, twice where a gradient is wanted, in ``rows``."""

    def __init__(self, vae: VAE | TwoLayerVAE):
        self.network, self.rows = vae.likelihood.network, 0

    def __enter__(self) -> "CountedDecodes":
        self._hook = self.network.register_forward_hook(self._count)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _count(self, network, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.rows += output[..., 0].numel() * (2 if output.requires_grad else 1)


def table(rows: Sequence[Row]) -> str:
    """Rows of one split as a Markdown table."""
    header = ("", "K or T", "evaluations", "seconds", "log p(x)", "+-", "difference", "+-", "bad k", "acceptance")
    lines: list[tuple[str, ...]] = [header]
    for row in rows:
        last = row is rows[-1]
        lines.append(
            (
                row.estimator,
                f"{row.setting:,}",
                f"{row.evaluations:,.0f}",
                f"{row.seconds:.1f}",
                number(row.log_px),
                number(None if math.isnan(row.mc_se) else row.mc_se),
                "" if last else f"{row.difference:+.3f}",
                "" if last or math.isnan(row.difference_mc_se) else number(row.difference_mc_se),
                "" if row.share_bad_k is None else f"{row.share_bad_k:.0%}",
                "" if row.acceptance is None or math.isnan(row.acceptance) else f"{row.acceptance:.2f}",
            )
        )
    return runs.table(lines)


def sandwich_table(sandwiches: Sequence[dict[str, float]]) -> str:
    """Sandwiches as a Markdown table."""
    rows: list[tuple[str, ...]] = [("temperatures", "lower", "upper", "width", "+-")]
    for each in sandwiches:
        numbers = (number(each[name]) for name in ("lower", "upper", "width", "width_se"))
        rows.append((str(each["temperatures"]), *numbers))
    return runs.table(rows)


def figure(rows: Sequence[Row], unit: str, path: Path) -> None:
    """Estimates against evaluations of the decoder, test and training images side by side."""
    with figures.figure(path, 10, 4.2, columns=2) as both:
        for axes, split in zip(both, ("test", "train"), strict=True):
            here = [row for row in rows if row.split == split]
            for estimator in dict.fromkeys(row.estimator for row in here if row.estimator != "ELBO"):
                line = sorted((row for row in here if row.estimator == estimator), key=lambda row: row.evaluations)
                at, value = [row.evaluations for row in line], [row.log_px for row in line]
                axes.errorbar(at, value, yerr=[row.mc_se for row in line], marker="o", ms=4, capsize=2, label=estimator)
            axes.axhline(here[-1].log_px, color="0.4", lw=1, ls="--", label="reference")
            axes.axhline(here[0].log_px, color="0.7", lw=1, ls=":", label="ELBO")
            axes.set(xscale="log", xlabel="evaluations of the decoder per image", title=f"{split} images")
        both[0].set_ylabel(f"log p(x), {unit}")
        both[1].legend(fontsize=8)


if __name__ == "__main__":
    cli.guarded(main)
