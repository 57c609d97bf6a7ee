"""Colour images: what does it take to model 8-bit pixels of photographs, and what must the encoder see of them?

Patches of 32 x 32 pixels, three colours, are cut at random from the two photographs that scikit-learn ships: training
patches from their left two thirds, test patches from the rest. VAEs with a discretized logistic likelihood learn them
as whole numbers 0..255; log p(x) of the test patches is a mass, given as bits per dimension, smaller is better. The
encoder sees pixel / 255, as :class:`pyro_vae.VAE` does it, or, as contenders, the whole numbers as they are. A model
without latent variables, a logistic distribution for each pixel and colour, is there to compare with.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from pyro_vae import MLP, VAE, Conditional, MeanField, StandardNormal, cli, fit, importance_sampling, runs
from pyro_vae.errors import NonFiniteError
from pyro_vae.parts.likelihoods import DiscretizedLogistic
from pyro_vae.parts.networks import ConvDecoder, ConvEncoder, Network
from pyro_vae.runs import figures
from pyro_vae.runs.summaries import standard_error

SIDE = 32
SHAPE = (3, SIDE, SIDE)
SIZE = math.prod(SHAPE)
NETWORKS: dict[str, tuple[Callable[..., Network], Callable[..., Network]]] = {
    "MLP": (MLP, MLP),
    "convolutions": (ConvEncoder, ConvDecoder),
}
SEEN = ("pixel / 255", "pixel")


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison.

    Args:
        num_train: patches to learn from, at least 2.
        num_test: patches to score, at least 2.
        latent_dim: at least 1.
        epochs: of each training, at least 1.
        lr: largest learning rate, positive.
        num_seeds: trainings of each model, at least 2.
        seed: of patches and trainings, at least 0.
        run_dir: directory to write, new or empty; null: one under runs/, named by time.
    """

    num_train: int = 1500
    num_test: int = 100
    latent_dim: int = 50
    epochs: int = 8
    lr: float = 2e-3
    num_seeds: int = 2
    seed: int = 0
    run_dir: Path | None = None

    def __post_init__(self):
        for name, bound in {"num_train": 2, "num_test": 2, "latent_dim": 1, "epochs": 1, "num_seeds": 2}.items():
            if (value := getattr(self, name)) < bound:
                raise ValueError(f"--{name} must be at least {bound}, got {value}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"--lr must be positive and finite, got {self.lr}")
        runs.check_seed(self.seed)


class Measured(NamedTuple):
    """One training: bits per dimension of the test patches, NaN if it broke down, and seconds."""

    bits: float
    seconds: float


def main(argv: Sequence[str] | None = None) -> Path:
    """Compare as told by ``argv``; return the directory written.

    Raises:
        RunError: for a mistake in ``argv``.
    """
    settings, text = runs.parse(Settings, argv)
    run_dir = runs.run_dir_for("colour", settings.run_dir)
    runs.open_run(run_dir, text, resume=None)
    train, test = patches(settings)
    found: dict[tuple[str, str], list[Measured]] = {}
    shown = {}
    each = [(name, seen, seed) for name in NETWORKS for seen in SEEN for seed in range(settings.num_seeds)]
    for name, seen, seed in tqdm(each, desc="trainings", unit="model"):
        torch.manual_seed(settings.seed + seed)
        vae = vae_of(name, seen, settings.latent_dim, train)
        found.setdefault((name, seen), []).append(measure(vae, settings, train, test))
        if seen == SEEN[0]:
            shown[name] = reconstructions(vae, test[:12])
    result = summarize(found, bits_without_latents(train, test))
    with runs.writing(run_dir):
        rows = torch.stack([test[:12] / 255, *shown.values()])
        figures.image_grid(rows, SHAPE, run_dir / "reconstructions.png", "Test patches", ["x", *shown])
    return runs.conclude(run_dir, report(result, settings), result, torch.device("cpu"))


def patches(settings: Settings) -> tuple[Tensor, Tensor]:
    """Training and test patches, ``(N, X)``, whole numbers 0..255."""
    torch.manual_seed(settings.seed)
    photographs = [torch.tensor(image).permute(2, 0, 1).float() for image in load_sample_images().images]
    border = photographs[0].shape[2] * 2 // 3
    left, right = ([photo[:, :, part] for photo in photographs] for part in (slice(border), slice(border, None)))
    return cut(left, settings.num_train), cut(right, settings.num_test)


def cut(photographs: Sequence[Tensor], number: int) -> Tensor:
    """Patches from random places of photographs ``(3, H, W)``: ``(number, X)``."""
    found = []
    for i in range(number):
        photo = photographs[i % len(photographs)]
        top, left = (int(torch.randint(size - SIDE + 1, ())) for size in photo.shape[1:])
        found.append(photo[:, top : top + SIDE, left : left + SIDE].flatten())
    return torch.stack(found)


def vae_of(name: str, seen: str, latent_dim: int, x: Tensor) -> VAE:
    """A VAE of networks of this name, whose encoder sees the pixels ``x``, shape ``(N, X)``, as told."""
    head, posterior = DiscretizedLogistic(SIZE), MeanField(latent_dim)
    encoder, decoder = NETWORKS[name]
    vae = VAE(
        StandardNormal(latent_dim),
        Conditional(decoder(latent_dim, sum(head.sizes), image_shape=SHAPE), head),
        Conditional(encoder(SIZE, sum(posterior.sizes), image_shape=SHAPE), posterior),
    )
    if seen == SEEN[0]:
        vae.initialize(x)
    else:
        vae.likelihood.initialize(x)  # the encoder is left as it is
    return vae


def measure(vae: VAE, settings: Settings, train: Tensor, test: Tensor) -> Measured:
    """Train one model and score the test patches."""
    start = time.perf_counter()
    try:
        fit(
            vae, DataLoader(cast(Any, train), 100, shuffle=True), epochs=settings.epochs, lr=settings.lr, progress=False
        )
    except NonFiniteError:
        return Measured(math.nan, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    evidence = importance_sampling(vae.model, vae.guide, test, 100, compiled=False, num_checked=0)
    return Measured(bits(evidence.log_px), seconds)


def bits(log_px: Tensor) -> float:
    """Bits per dimension of log p(x) in nats per patch, ``(N,)``."""
    return -log_px.mean().item() / SIZE / math.log(2)


def bits_without_latents(train: Tensor, test: Tensor) -> float:
    """Those of a logistic distribution for each pixel and colour, of the training patches' mean and deviation."""
    head = DiscretizedLogistic(SIZE)
    return bits(head(*head.marginal(train)).log_prob(test))


def reconstructions(vae: VAE, x: Tensor) -> Tensor:
    """Means of p(x given z) at the mean of q(z given x), as intensities from 0 to 1; ``(N, X)``."""
    with torch.no_grad():
        return vae.likelihood(vae.posterior(x).mean).mean / 255


def summarize(found: dict[tuple[str, str], list[Measured]], without: float) -> dict[str, Any]:
    """Means over seeds, for the JSON file."""
    models = [
        {
            "networks": name,
            "encoder_sees": seen,
            "bits_per_dim": [each.bits for each in trained],
            "mean": statistics.fmean(each.bits for each in trained),
            "se_over_seeds": standard_error([each.bits for each in trained]),
            "seconds": statistics.fmean(each.seconds for each in trained),
        }
        for (name, seen), trained in found.items()
    ]
    return {"without_latents": without, "models": models}


def report(result: dict[str, Any], settings: Settings) -> str:
    """The table, as Markdown."""
    rows: list[tuple[str, ...]] = [("networks", "the encoder sees", "bits per dimension", "seconds")]
    rows.append(("none: no latent variables", "-", f"{result['without_latents']:.2f}", "-"))
    for model in result["models"]:
        mean = f"{model['mean']:.2f} +- {model['se_over_seeds']:.2f}" if math.isfinite(model["mean"]) else "nan"
        rows.append((model["networks"], model["encoder_sees"], mean, f"{model['seconds']:.1f}"))
    return "\n".join(
        [
            f"Bits per dimension of {settings.num_test} test patches of 32 x 32 x 3 whole numbers, mass, by importance "
            "sampling from the encoder, which makes them high, if anything; standard errors over "
            f"{settings.num_seeds} seeds. NaN: the training broke down.",
            "",
            runs.table(rows),
        ]
    )


if __name__ == "__main__":
    cli.guarded(main)
