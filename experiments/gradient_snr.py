"""How much signal has the gradient of each bound, and how does that change with the number of samples K?

Usage: python -m experiments.gradient_snr RUN_DIR [options]

On a trained VAE and a fixed batch of training images, gradients g of each bound are drawn many times; all their noise
is that of z. The signal-to-noise ratio is |E[g]| / sqrt(E|g - E[g]|^2), of the model's parameters and of the guide's.
More samples tighten the bound of Burda et al. (2016), IWAE, and help the model's gradient, but the guide's ratio falls
as 1 / sqrt(K) (Rainforth et al. 2018). That of DReG, whose expectation is the same, rises (Tucker et al. 2019).

The estimators: ELBO and STL (Roeder et al. 2017), whose K samples are averaged; IWAE and DReG; MIWAE and PIWAE of
sqrt(K) groups of sqrt(K) samples. Table, figure and numbers are written to a directory of their own.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from pyro_vae import ELBO, IWAE, VAE, ContractError, DReG, Objective, TwoLayerVAE, cli, runs
from pyro_vae.infer.objectives import MIWAE, PIWAE, STL
from pyro_vae.runs import figures

PARTS = ("guide", "model")


def _square(make: Callable[[int, int], Objective]) -> Callable[[int], Objective | None]:
    """The objective of sqrt(K) groups of sqrt(K) samples, where K is a square above 1."""
    return lambda k: make(math.isqrt(k), math.isqrt(k)) if k > 1 and math.isqrt(k) ** 2 == k else None


ESTIMATORS: dict[str, Callable[[int], Objective | None]] = {
    "ELBO": ELBO,
    "STL": STL,
    "IWAE": IWAE,
    "DReG": DReG,
    "MIWAE": _square(MIWAE),
    "PIWAE": _square(PIWAE),
}


@dataclass(frozen=True)
class Settings:
    """Settings of one study of a run.

    Args:
        run: directory of a finished run; may stand first, without --run.
        run_dir: directory to write, new or empty; null: gradient_snr in the run's directory.
        num_particles: the K, each at least 1; MIWAE and PIWAE take those that are squares.
        num_images: images of the batch, at least 1, drawn at random from the training images; all, if there are fewer.
        num_draws: gradients of each estimator, at least 20; a multiple of 10.
        seed: of the images and the noise, at least 0.
        device: auto takes a GPU if there is one.
    """

    run: Path
    run_dir: Path | None = None
    num_particles: Sequence[int] = (1, 4, 16, 64, 256)
    num_images: int = 20
    num_draws: int = 200
    seed: int = 0
    device: str = "auto"

    def __post_init__(self):
        runs.check_numbers("--num_particles", self.num_particles)
        if self.num_images < 1:
            raise ValueError(f"--num_images must be at least 1, got {self.num_images}")
        if self.num_draws < 20 or self.num_draws % BLOCKS:
            raise ValueError(f"--num_draws must be a multiple of {BLOCKS} of at least 20, got {self.num_draws}")
        runs.check_seed(self.seed)


BLOCKS = 10
"""Draws are taken in so many blocks, whose ratios show how sure their mean is."""


class Ratio(NamedTuple):
    """A signal-to-noise ratio with its standard error, and the two of which it is the ratio."""

    ratio: float
    error: float
    signal: float
    noise: float


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure as told by ``argv``; return the directory written.

    Raises:
        RunError: for a mistake in ``argv``.
    """
    settings, _ = runs.parse(Settings, argv, first="run")
    vae, data, device, run_dir = runs.open_finished(
        settings.run, settings.run_dir, "gradient_snr", settings.device, settings.seed
    )
    x = data.observe(torch.randperm(len(data.train_pixels))[: settings.num_images].to(device))
    parameters = split(vae)
    pairs = [(name, k) for k in settings.num_particles for name in ESTIMATORS]
    objectives = {(name, k): made for name, k in pairs if (made := ESTIMATORS[name](k)) is not None}
    ratios: dict[str, dict[int, dict[str, Ratio]]] = {name: {} for name in ESTIMATORS}
    runs.make_directory(run_dir)
    try:
        with tqdm(total=len(objectives) * settings.num_draws, unit="gradient", desc="gradients") as bar:
            for (name, k), objective in objectives.items():
                ratios[name][k] = measure(vae, objective, x, parameters, settings.num_draws, bar.update)
    except ContractError as error:
        raise runs.RunError(f"{settings.run}: {error}") from error
    ratios = {name: each for name, each in ratios.items() if each}
    slopes = {name: {part: slope(each, part) for part in PARTS} for name, each in ratios.items()}
    text = report(ratios, slopes, settings, len(x))
    with runs.writing(run_dir):
        plot(ratios, run_dir / "gradient_snr.png")
    result = {
        "ratios": {
            name: {str(k): {part: r._asdict() for part, r in parts.items()} for k, parts in each.items()}
            for name, each in ratios.items()
        },
        "slopes": slopes,
        "settings": {"num_images": len(x), "num_draws": settings.num_draws, "seed": settings.seed},
    }
    return runs.conclude(run_dir, text, result, device)


def split(vae: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The guide's parameters and the model's; one that both use, as a VampPrior does, counts as the guide's."""
    guide = [p for name, p in vae.named_parameters() if name.startswith(("posterior.", "top_posterior."))]
    return {"guide": guide, "model": [p for p in vae.parameters() if all(p is not each for each in guide)]}


def measure(
    vae: VAE | TwoLayerVAE,
    objective: Objective,
    x: Tensor,
    parameters: dict[str, list[nn.Parameter]],
    num_draws: int,
    update: Callable[[], object] = lambda: None,
) -> dict[str, Ratio]:
    """The signal-to-noise ratio of ``objective``'s gradient on observations ``(B, X)``, for each part's parameters."""
    every = [p for each in parameters.values() for p in each]
    sizes = [sum(p.numel() for p in each) for each in parameters.values()]
    blocks: dict[str, list[tuple[float, float]]] = {part: [] for part in parameters}
    per_block = num_draws // BLOCKS
    for _ in range(BLOCKS):
        total: Any = 0.0
        squares = dict.fromkeys(parameters, 0.0)
        for _ in range(per_block):
            gradients = torch.autograd.grad(objective(vae.model, vae.guide, x), every, materialize_grads=True)
            flat = torch.cat([g.flatten() for g in gradients]).double()
            total = total + flat
            for part, g in zip(parameters, flat.split(sizes), strict=True):
                squares[part] += g.square().sum().item()
            update()
        for part, mean in zip(parameters, (total / per_block).split(sizes), strict=True):
            variance = (squares[part] - per_block * mean.square().sum().item()) / (per_block - 1)
            blocks[part].append((mean.square().sum().item() - variance / per_block, variance))
    return {part: ratio(each) for part, each in blocks.items()}


def ratio(blocks: Iterable[tuple[float, float]]) -> Ratio:
    """The ratio of unbiased estimates of |E[g]|^2 and of the variance, by blocks; its error by the jackknife."""
    signal, variance = np.array(list(blocks)).T
    n = len(signal)

    def root(s: float, v: float) -> float:
        return math.sqrt(max(s, 0.0) / v) if v > 0 else math.nan

    left_out = [root(np.delete(signal, i).mean(), np.delete(variance, i).mean()) for i in range(n)]
    error = math.sqrt((n - 1) * np.var(left_out))
    whole = signal.mean(), variance.mean()
    return Ratio(root(*whole), error, math.sqrt(max(whole[0], 0.0)), math.sqrt(whole[1]))


def slope(ratios: dict[int, dict[str, Ratio]], part: str) -> float:
    """d log ratio / d log K by least squares; NaN with fewer than two K of a positive ratio."""
    points = [(math.log(k), math.log(r.ratio)) for k, each in ratios.items() if (r := each[part]).ratio > 0]
    if len(points) < 2:
        return math.nan
    x, y = zip(*points, strict=True)
    return float(np.polyfit(x, y, 1)[0])


def report(
    ratios: dict[str, dict[int, dict[str, Ratio]]],
    slopes: dict[str, dict[str, float]],
    settings: Settings,
    num_images: int,
) -> str:
    """A table for the guide's gradient and one for the model's."""
    ks = list(settings.num_particles)
    lines = []
    for part in PARTS:
        rows = [(f"signal-to-noise of the {part}'s gradient", *(f"K = {k}" for k in ks), "slope")]
        for name, each in ratios.items():
            cells = [f"{each[k][part].ratio:.3g} +- {each[k][part].error:.1g}" if k in each else "" for k in ks]
            rows.append((name, *cells, f"{slopes[name][part]:+.2f}" if math.isfinite(slopes[name][part]) else "-"))
        lines += [runs.table(rows), ""]
    lines.append(
        f"{num_images} training images, {settings.num_draws} draws of each gradient. Slope: of log ratio over "
        "log K; -0.5 is 1 / sqrt(K)."
    )
    return "\n".join(lines)


def plot(ratios: dict[str, dict[int, dict[str, Ratio]]], path: Path) -> None:
    """Ratios against K, the guide's and the model's side by side."""
    with figures.figure(path, 9, 3.6, columns=2) as panels:
        for axes, part in zip(panels, PARTS, strict=True):
            for name, each in ratios.items():
                values = [r[part] for r in each.values()]
                errors = [v.error for v in values]
                axes.errorbar(list(each), [v.ratio for v in values], errors, marker="o", markersize=4, label=name)
            axes.set(xscale="log", yscale="log", xlabel="K", ylabel="signal-to-noise ratio", title=f"{part}'s gradient")
        panels[0].legend(fontsize="small")


if __name__ == "__main__":
    cli.guarded(main)
