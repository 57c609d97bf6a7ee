"""Score a finished run again: another estimator of log p(x), more samples, other images, training images.

Usage: python -m experiments.evaluate RUN_DIR [options]

The result is printed and written to RUN_DIR/evaluations, as JSON and, for each image, as netCDF; nothing there is ever
overwritten.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import xarray as xr
from torch import Tensor

from experiments import runs, svi_mnist
from experiments.datasets import Data
from experiments.svi_mnist import number
from pyro_vae import (
    CREMER_2018,
    WU_2017,
    Annealing,
    ContractError,
    annealed_importance_sampling,
    bidirectional_monte_carlo,
    importance_sampling,
    pareto_k_threshold,
)

PUBLISHED = {"wu_2017": WU_2017, "cremer_2018": CREMER_2018}


@dataclass(frozen=True)
class Config:
    """Settings of one evaluation.

    Args:
        run: directory of a finished run; may stand first, without --run.
        estimator: importance; annealed: annealed importance sampling; bdmc: bidirectional Monte Carlo, which encloses
            log p(x) of images that the model itself draws.
        split: test or training images.
        num_images: how many of them, drawn at random, the same in every evaluation, at least 2; null: all.
        num_samples: importance samples per image, at least 1; literature uses 5000.
        proposal: of importance sampling: the guide, or a Gaussian at each posterior's mode with its curvature.
        widening: factor of the Laplace proposal's standard deviations, positive; 1.1 lightens the weights' tail.
        annealing: settings of annealed importance sampling.
        published: annealing as published, in place of --annealing: Wu et al. 2017, or the code of Cremer et al. 2018;
            both take 10,000 temperatures, which --annealing.num_temperatures may lower.
        seed: of the estimate, at least 0.
        device: auto takes a GPU if there is one.
        name: of the files to write; null: made of the estimator and the split.
    """

    run: Path
    estimator: Literal["importance", "annealed", "bdmc"] = "annealed"
    split: Literal["test", "train"] = "test"
    num_images: int | None = 500
    num_samples: int = 5000
    proposal: Literal["guide", "laplace"] = "guide"
    widening: float = 1.0
    annealing: Annealing = field(default_factory=Annealing)
    published: Literal["wu_2017", "cremer_2018"] | None = None
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    name: str | None = None

    def __post_init__(self):
        if self.num_images is not None and self.num_images < 2:
            raise ValueError(f"--num_images must be at least 2, got {self.num_images}")
        if self.num_samples < 1:
            raise ValueError(f"--num_samples must be at least 1, got {self.num_samples}")
        if not self.widening > 0:
            raise ValueError(f"--widening must be positive, got {self.widening}")
        if self.widening != 1 and self.proposal == "guide":
            raise ValueError("--widening is for --proposal laplace; the guide is taken as it is")
        runs.check_seed(self.seed)
        importance = self.estimator == "importance"
        if not importance and (self.proposal != "guide" or self.num_samples != Config.num_samples):
            raise ValueError(f"--num_samples and --proposal are for --estimator importance, not {self.estimator}")
        if importance and (self.annealing != Annealing() or self.published):
            raise ValueError("--annealing and --published are for --estimator annealed or bdmc, not importance")
        if self.published and replace(self.annealing, num_temperatures=None) != Annealing():
            raise ValueError("--published leaves only --annealing.num_temperatures to choose")
        if self.estimator == "bdmc" and self.split == "train":
            raise ValueError("--split train: --estimator bdmc scores images that the model draws, of neither split")
        if self.name is not None and (not self.name.strip(".") or Path(self.name).name != self.name):
            raise ValueError(f"--name must be a plain file name, got {self.name}")


def main(argv: Sequence[str] | None = None) -> Path:
    """Evaluate as told by ``argv``; return the JSON file written.

    Raises:
        RunError: for a mistake in ``argv``, or if the estimator cannot serve the model.
    """
    config, _ = runs.parse(Config, argv, first="run")
    device = runs.device(config.device)
    name = config.name or ("bdmc" if config.estimator == "bdmc" else f"{config.estimator}-{config.split}")
    path = config.run / "evaluations" / f"{name}.json"
    for each in (path, path.with_suffix(".nc")):
        if each.exists():
            raise runs.RunError(f"{each} exists and is never overwritten: choose another --name")
    vae, data = svi_mnist.load_finished(config.run, device)
    x, among = images(data, config.split, config.num_images)
    runs.make(path.parent)
    torch.manual_seed(config.seed)
    start = time.perf_counter()
    try:
        result, evidence = estimate(config, vae.model, vae.guide, x)
    except (ContractError, ValueError) as error:
        raise runs.RunError(f"--estimator {config.estimator}: {error}") from error
    result |= {
        "estimator": config.estimator,
        "split": "simulated" if config.estimator == "bdmc" else config.split,
        "num_images": len(x),
        "unit": vae.likelihood.head.unit,
        "seconds": time.perf_counter() - start,
        "seed": config.seed,
        **runs.provenance(device),
    }
    with runs.writing(path):
        groups = {group: each.to_dataset(image=among) for group, each in evidence.items()}
        xr.DataTree.from_dict(groups).to_netcdf(path.with_suffix(".nc"), engine="h5netcdf")
        runs.write_json(path, result)
    report(result)
    print(f"\n{path}")
    return path


def images(data: Data, split: str, size: int | None) -> tuple[Tensor, Tensor]:
    """Some observations ``(n, X)``, the same ones each time, and their places in the split; noisy ones drawn once."""
    whole = len(data.test if split == "test" else data.train_pixels)
    among = svi_mnist.some(whole, whole if size is None else min(size, whole)).to(data.test.device)
    if split == "test":
        return data.test[among], among
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return data.observe(among), among


def estimate(config: Config, model, guide, x: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Entries of the JSON file, and evidence by group of the netCDF file."""
    annealing = PUBLISHED.get(config.published, config.annealing)
    if config.published and config.annealing.num_temperatures:
        annealing = replace(annealing, num_temperatures=config.annealing.num_temperatures)
    if config.estimator == "bdmc":
        sandwich = bidirectional_monte_carlo(model, guide, x, annealing, progress=True)
        width, error = sandwich.width()
        lower, upper = (each.log_px.mean().item() for each in (sandwich.lower, sandwich.upper))
        result = {"lower": lower, "upper": upper, "width": width, "width_se": error, "annealing": asdict(annealing)}
        return result, {"lower": sandwich.lower, "upper": sandwich.upper}
    if config.estimator == "annealed":
        evidence = annealed_importance_sampling(model, guide, x, annealing, progress=True)
        settings: dict[str, Any] = {"annealing": asdict(annealing), "acceptance": evidence.acceptance.mean().item()}
    else:
        evidence = importance_sampling(
            model, guide, x, config.num_samples, config.proposal, config.widening, progress=True
        )
        bad = evidence.share_bad_k(config.num_samples)
        settings = {"num_samples": config.num_samples, "proposal": config.proposal, "widening": config.widening}
        settings |= {"khat_threshold": pareto_k_threshold(config.num_samples), "share_khat_above_threshold": bad}
        settings |= {"reliable": svi_mnist.reliable(bad)}
    log_likelihood, over_images, monte_carlo = evidence.mean()
    result = {"log_likelihood": log_likelihood, "log_likelihood_se": over_images, "mc_se": monte_carlo}
    result |= {"shortfall": evidence.shortfall()}
    return result | {"num_invalid": int(evidence.num_invalid.sum())} | settings, {config.estimator: evidence}


def report(result: dict[str, Any]) -> None:
    """Print the result as a short table."""
    rows = [(f"{result['num_images']:,} {result['split']} images", result["unit"], "")]
    if "width" in result:
        rows = [
            (f"{result['num_images']:,} simulated images", result["unit"], ""),
            ("lower", number(result["lower"]), "annealed from the start to the posterior: low in expectation"),
            ("upper", number(result["upper"]), "annealed back from the exact posterior: high in expectation"),
            ("width", number(result["width"]), f"+- {result['width_se']:.3f} over images"),
        ]
    else:
        believe = "another run would differ by this"
        if "reliable" in result and result["reliable"] is None:
            believe = "too few samples to tell whether it may be believed"
        if result.get("reliable") is False:
            share, threshold = result["share_khat_above_threshold"], result["khat_threshold"]
            believe = f"not to be believed: {share:.0%} of the images have a Pareto k above {threshold:.2f}"
        rows += [
            (f"log p(x), {result['estimator']}", number(result["log_likelihood"]), ""),
            ("  Monte Carlo error", number(result["mc_se"]), believe),
            ("  low by about", number(result["shortfall"]), "in expectation, if that error may be believed"),
            ("  error over images", number(result["log_likelihood_se"]), "other images would differ by this"),
        ]
    rows.append(("seconds", f"{result['seconds']:.0f}", ""))
    print(f"\n{runs.table(rows)}")


if __name__ == "__main__":
    runs.cli(main)
