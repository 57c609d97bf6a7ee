"""Better likelihood, much slower sampling? A gated PixelCNN and a MADE beside a VAE, on the same binarized images.

Usage: python -m experiments.pixelcnn RUN_DIR [options]

RUN_DIR holds a finished VAE. On its data two models without latent variables are trained, which give each pixel a
probability given those before it, row by row, so that log p(x) is exact: a gated PixelCNN (van den Oord et al. 2016,
"Conditional image generation with PixelCNN decoders"), small, with dilated layers so that few of them see far (Yu and
Koltun 2016), and MADE (Germain et al. 2015). The measures, fixed before anything was run: log p(x) in nats per test
image, paired image by image with the VAE's annealed estimate, or the importance-sampled one if the run has no other;
and seconds to draw one image in a batch of 16, for which MADE passes its network once per pixel, and the PixelCNN
computes of each pixel what the others have not been told yet.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyro
import torch
import torch.nn.functional as F
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor, nn
from tqdm import trange

from pyro_vae import cli, fit, runs
from pyro_vae.data.images import ImageData
from pyro_vae.errors import check_widths
from pyro_vae.infer.flows import import_zuko
from pyro_vae.parts.pixels import Autoregressive, PixelDecoder
from pyro_vae.runs import figures
from pyro_vae.runs.kept import Kept, at_home, is_concluded


@dataclass(frozen=True)
class Settings:
    """Settings of one comparison.

    Args:
        run: directory of a finished run on binary images of one channel; may stand first, without --run.
        run_dir: directory to write, new or empty; null: pixelcnn in the run's directory.
        channels: of the PixelCNN, at least 1.
        layers: gated layers of the PixelCNN, at least 1; the first looks 3 pixels far, the others 1, 2, 4, 1, 2, 4, ...
            further: four of them 10 pixels to the sides and up. What lies beyond is not seen.
        epochs: of the PixelCNN, at least 1.
        hidden: width of each hidden layer of MADE; at least as many units as pixels, or some see too little.
        made_epochs: of MADE, at least 1.
        batch_size: images per gradient step, at least 1.
        lr: peak learning rate of Adam, positive.
        precision: of products and convolutions in training; bfloat16 is faster where the processor has it.
        seed: of both trainings and the samples, at least 0.
        device: auto takes a GPU if there is one.
        resume: go on with the interrupted comparison in --run_dir, with its settings.
    """

    run: Path
    run_dir: Path | None = None
    channels: int = 12
    layers: int = 4
    epochs: int = 1
    hidden: Sequence[int] = (1600,)
    made_epochs: int = 2
    batch_size: int = 50
    lr: float = 5e-3
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    device: str = "auto"
    resume: bool = False

    def __post_init__(self):
        for name in ("channels", "layers", "epochs", "made_epochs", "batch_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        object.__setattr__(self, "hidden", tuple(self.hidden))
        check_widths("--hidden", self.hidden)
        if not self.hidden:
            raise ValueError("--hidden must name at least one layer")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"--lr must be positive and finite, got {self.lr}")
        runs.check_seed(self.seed)


# Two ways to p(x) without latents


class MADE(nn.Module):
    """Fully connected layers, masked so that each pixel's logit sees the pixels before it (Germain et al. 2015).

    The masks are those of ``zuko.nn.MaskedMLP``, in which the n-th hidden unit sees the first n pixels.

    Args:
        size: pixels X.
        hidden: width of each hidden layer.
    """

    def __init__(self, size: int, hidden: Sequence[int] = (1600,)):
        super().__init__()
        self.size = size
        before = torch.ones(size, size, dtype=torch.bool).tril(-1)
        self.layers = import_zuko().nn.MaskedMLP(before, list(hidden))

    def forward(self) -> Autoregressive:
        """p(x)."""
        return Autoregressive(self._score, self._draw, BINARY, self.size)

    def _score(self, x: Tensor) -> Tensor:
        return -F.binary_cross_entropy_with_logits(self.layers(x), x, reduction="none")

    def _draw(self, shape: torch.Size) -> Tensor:
        """One pass for each pixel."""
        x = next(self.parameters()).new_zeros(shape)
        for i in range(shape[-1]):
            x[..., i] = torch.bernoulli(self.layers(x)[..., i].sigmoid())
        return x


BINARY = constraints.independent(constraints.boolean, 1)


class PixelCNN(nn.Module):
    """The likelihood of the library whose pixels see their neighbours, told nothing else.

    Args:
        image_shape: ``(1, H, W)``.
        channels: of both stacks.
        layers: gated layers; the first looks 3 pixels far, the others, dilated, 1, 2, 4, 1, 2, 4, ... further.

    Raises:
        ValueError: if images have several channels.
    """

    def __init__(self, image_shape: Sequence[int], channels: int = 12, layers: int = 4):
        super().__init__()
        sees = 3 + sum((1, 2, 4)[i % 3] for i in range(layers - 1))
        settings: dict[str, Any] = {
            "receptive_field": sees,
            "layers": layers,
            "channels": channels,
            "context": 0,
            "window": 3,
        }
        self.head = PixelDecoder(math.prod(image_shape), **settings, force=True, image_shape=image_shape)

    def forward(self) -> TorchDistribution:
        """p(x)."""
        return self.head(next(self.parameters()).new_zeros(self.head.event_size))


class AutoregressiveModel(nn.Module):
    """A Pyro program without latent sites, whose ELBO is log p(x) itself.

    Args:
        network: makes p(x).
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def model(self, x: Tensor) -> Tensor:
        """p(x) for observations ``(B, X)``."""
        with pyro.plate("data", len(x), dim=-1, device=x.device):  # pyright: ignore[reportArgumentType]
            return pyro.sample("x", self.network(), obs=x)

    def guide(self, x: Tensor) -> None:
        """Nothing is latent."""

    def log_px(self, x: Tensor) -> Tensor:
        """log p(x), exact, in nats: ``(B, X) -> (B,)``."""
        with torch.no_grad():
            return torch.cat([self.network().log_prob(part) for part in x.split(500)])


# The comparison


class Row(NamedTuple):
    """One model: log p(x) of each test image, exact or the VAE's best estimate; training time; seconds per image drawn.

    Attributes:
        name: of the model.
        parameters: how many it has.
        log_px: shape ``(N,)``.
        train_seconds: on this machine, the VAE's where it was trained.
        draw_seconds: for one image, in a batch of 16.
        samples: 16 images, ``(16, X)``.
    """

    name: str
    parameters: int
    log_px: np.ndarray
    train_seconds: float
    draw_seconds: float
    samples: Tensor


DRAWN = 16


def main(argv: Sequence[str] | None = None) -> Path:
    """Train and compare as told by ``argv``; return the directory written.

    Raises:
        RunError: for a mistake in ``argv``, or a run on other than binary images of one channel.
    """
    settings, text = runs.parse(Settings, argv, first="run")
    run_dir = settings.run_dir or settings.run / "pixelcnn"
    if is_concluded(run_dir, text, settings.resume):
        return run_dir
    opened = runs.open_finished(settings.run, run_dir, "pixelcnn", settings.device, settings.seed, settings.resume)
    if opened.data.encoding != "binary" or opened.data.image_shape[0] != 1:
        raise runs.RunError(f"{settings.run}: its images must be binary and of one channel, as MNIST's")
    with at_home(run_dir, text, settings.resume) as kept:
        return compare(settings, opened, kept)


def compare(settings: Settings, opened: runs.Finished, kept: Kept) -> Path:
    """Train both, compare them with the VAE and write what was found; return the directory."""
    vae, data, device, run_dir = opened
    finished = runs.load(settings.run)
    test = data.test[: finished.result["num_images"]]
    draw = lambda: figures.decode(vae.model, DRAWN, test, draw=True)  # noqa: E731
    seconds, samples = clock(draw, repetitions=20)
    parameters = sum(p.numel() for p in vae.parameters())
    importance = finished.importance["log_px"].values
    rows = [Row("VAE", parameters, importance, finished.result["train_seconds"], seconds, samples)]
    for name, network, epochs in networks(settings, data):
        rows.append(train(name, network.to(device), epochs, settings, data, test, kept))
    with runs.writing(run_dir):
        plot(rows, finished, data, run_dir)
    result = {
        "models": [
            {
                "name": row.name,
                "parameters": row.parameters,
                "log_likelihood": float(row.log_px.mean()),
                "train_seconds": row.train_seconds,
                "draw_seconds": row.draw_seconds,
            }
            for row in rows
        ],
        "vae": {name: finished.result[name] for name in ("test_log_likelihood", "annealed_log_likelihood")},
        "differences": {row.name: against(row, finished)[0]._asdict() for row in rows[1:]},
        "settings": {name: getattr(settings, name) for name in SETTINGS},
    }
    return runs.conclude(run_dir, report(rows, finished), result, device)


SETTINGS = ("channels", "layers", "epochs", "hidden", "made_epochs", "batch_size", "lr", "precision", "seed")


def networks(settings: Settings, data: ImageData) -> list[tuple[str, nn.Module, int]]:
    """Name, untrained network and epochs of each model."""
    made = MADE(data.test.shape[1], settings.hidden)
    pixelcnn = PixelCNN(data.image_shape, settings.channels, settings.layers)
    return [("MADE", made, settings.made_epochs), ("PixelCNN", pixelcnn, settings.epochs)]


def train(
    name: str, network: nn.Module, epochs: int, settings: Settings, data: ImageData, test: Tensor, kept: Kept
) -> Row:
    """A model trained on ``data``, its exact log p(x) of test images and its samples."""
    model = AutoregressiveModel(network)
    batches = data.batches(settings.batch_size)
    # a PixelCNN's step takes some ten times as long as a VAE's, so that compiling pays after a tenth of the steps
    engine = runs.compiled_engine(10 * epochs * len(batches), precision=settings.precision)
    print(f"{name}: {num_parameters(network):,} parameters")
    how = {"epochs": epochs, "lr": settings.lr, "engine": engine}
    history = kept.train(
        name,
        model,
        lambda callbacks: fit(model, batches, data.validation, callbacks=callbacks, **how),
        {"data": data.fingerprint},
    )
    model.eval()
    log_px = model.log_px(test).double().cpu().numpy()
    seconds, samples = clock(lambda: network().sample((DRAWN,)), repetitions=1)
    return Row(name, num_parameters(network), log_px, sum(row.seconds for row in history), seconds, samples)


def num_parameters(network: nn.Module) -> int:
    """How many a network has, without the weights that a mask removes."""
    removed = sum(int((~mask.bool()).sum()) for name, mask in network.named_buffers() if name.endswith("mask"))
    return sum(p.numel() for p in network.parameters()) - removed


def clock(draw: Callable[[], Tensor], repetitions: int) -> tuple[float, Tensor]:
    """Median seconds per image of drawing a batch, and the last batch."""
    seconds, samples = [], torch.empty(0)
    for _ in trange(repetitions, desc="samples", leave=False):
        start = time.perf_counter()
        samples = draw()
        if samples.is_cuda:
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / len(samples))
    return statistics.median(seconds), samples


def against(row: Row, finished: runs.Run) -> tuple[runs.Difference, str]:
    """log p(x) of an exact model minus the VAE's, on the same images; and how the VAE's was estimated."""
    vae = finished.importance if finished.annealed is None else finished.annealed
    places = vae["datum"].values if finished.annealed is not None else np.arange(len(row.log_px))
    difference = row.log_px[places] - vae["log_px"].values
    size = len(difference)
    mc_se = float(np.sqrt((vae["mc_se"].values ** 2).sum())) / size
    se = float(difference.std(ddof=1)) / size**0.5
    how = "importance sampling" if finished.annealed is None else f"annealed, {size:,} images"
    return runs.Difference(float(difference.mean()), se, mc_se), how


def report(rows: Sequence[Row], finished: runs.Run) -> str:
    """The comparison in Markdown."""
    result = finished.result
    header = ("", "log p(x)", "error over images", "minus the VAE", "error", "parameters", "train s", "ms per sample")
    table: list[tuple[str, ...]] = [header]
    for row in rows:
        error = f"{row.log_px.std(ddof=1) / len(row.log_px) ** 0.5:.2f}"
        milliseconds = 1000 * row.draw_seconds
        drawing = f"{milliseconds:,.0f}" if milliseconds >= 1000 else f"{milliseconds:.3g}"
        tail = f"{row.parameters:,}", f"{row.train_seconds:,.0f}", drawing
        if row is rows[0]:
            name = "VAE, importance sampling" + (", too low" if result.get("reliable") is False else "")
            table.append((name, f"{row.log_px.mean():.2f}", error, "", "", *tail))
            if finished.annealed is not None:
                table.append(("VAE, annealed", f"{result['annealed_log_likelihood']:.2f}", error, *[""] * 5))
        else:
            d, _ = against(row, finished)
            numbers = f"{row.log_px.mean():.2f}", error, f"{d.mean:+.2f}", f"{math.hypot(d.se, d.mc_se):.2f}"
            table.append((f"{row.name}, exact", *numbers, *tail))
    _, how = against(rows[1], finished)
    vae, *others = rows
    slower = ", ".join(f"{row.name} {row.draw_seconds / vae.draw_seconds:,.0f} times" for row in others)
    lines = [
        runs.table(table),
        "",
        f"Nats per image, {len(vae.log_px):,} test images of {result['dataset']}, {result['binarization']} "
        f"binarization; differences paired by image ({how}).",
        f"To draw one image takes, compared with the VAE's time: {slower}.",
    ]
    if result["dataset"] in ("MNIST", "StaticMNIST"):
        lines.append(
            'Published, on the static binarization: PixelCNN -81.30 (van den Oord et al. 2016, "Pixel recurrent neural '
            'networks"), MADE with two hidden layers and 32 masks -86.64, with one layer and one mask -88.40 (Germain '
            "et al. 2015)."
        )
    return "\n".join(lines)


def plot(rows: Sequence[Row], finished: runs.Run, data: ImageData, run_dir: Path) -> None:
    """Samples side by side, and log p(x) against the time that a sample takes."""
    shown = min(DRAWN, len(data.test))
    images = torch.stack([data.test[:shown], *(row.samples[:shown] for row in rows)])
    labels = ["test images", *(row.name for row in rows)]
    figures.image_grid(data.picture(images), data.image_shape, run_dir / "samples.png", "Draws of x", labels)
    with figures.figure(run_dir / "likelihood_and_speed.png", 5.6, 3.6) as axes:
        for number, row in enumerate(rows):
            value = runs.best(finished.result) if number == 0 else row.log_px.mean()
            axes.plot(1000 * row.draw_seconds, value, "o", color=f"C{number}")
            axes.annotate(row.name, (1000 * row.draw_seconds, value), xytext=(6, 4), textcoords="offset points")
        axes.margins(0.2)
        axes.set(xscale="log", xlabel="milliseconds per sample", ylabel="log p(x), nats per image")
        axes.set_title("Likelihood against the price of a sample")


if __name__ == "__main__":
    cli.guarded(main)
