"""What has a VAE's latent space learned? Manifold, traversals, interpolations and samples, each with a number.

Usage: python -m experiments.latent_space RUN_DIR [options]

Pictures of a finished run: with two latent dimensions the manifold, decoded from a grid of the prior's quantiles; from
the code of one test image, each active unit moved through the prior's quantiles, all others held; straight and
spherical lines (White 2016, "Sampling generative networks") between codes of test images; samples, and the training
image nearest to each. The measures, fixed before anything was run:

- interpolation: the confidence of a classifier trained here in what is decoded halfway between two test images of
  different classes, spherical minus straight, paired;
- copying: the distance from a draw of x to the nearest training image, beside that from a test image: copies would be
  nearer;
- blur: the variance of the Laplacian of an image (Pech-Pacheco et al. 2000), over that of training images as stored, of
  means of p(x | z) and of draws of x: 1 is as sharp as the data. --others adds runs with other likelihoods.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor

from pyro_vae import active_units, cli, runs
from pyro_vae.data.images import ImageData
from pyro_vae.infer.programs import Program
from pyro_vae.runs import figures
from pyro_vae.runs.judge import Judge, grey, nearest, pairs_of_classes
from pyro_vae.runs.scoring import number


@dataclass(frozen=True)
class Settings:
    """Settings of one study of a run.

    Args:
        run: directory of a finished run; may stand first, without --run.
        run_dir: directory to write, new or empty; null: latent_space in the run's directory.
        manifold: draw the grid over two latent dimensions; null: if the run has as many.
        others: directories of finished runs on the same data set, whose blur is measured too.
        num_images: images of each kind that are measured, at least 20.
        seed: of all draws, at least 0.
        device: auto takes a GPU if there is one.
    """

    run: Path
    run_dir: Path | None = None
    manifold: bool | None = None
    others: Sequence[Path] = ()
    num_images: int = 1000
    seed: int = 0
    device: str = "auto"

    def __post_init__(self):
        if self.num_images < 20:
            raise ValueError(f"--num_images must be at least 20, got {self.num_images}")
        runs.check_seed(self.seed)


class Mean(NamedTuple):
    """A mean with its standard error."""

    value: float
    error: float


def main(argv: Sequence[str] | None = None) -> Path:
    """Draw and measure as told by ``argv``; return the directory written.

    Raises:
        RunError: for a mistake in ``argv``, if the manifold is asked for and there are not two latent dimensions, or if
            another run is on another data set.
    """
    settings, _ = runs.parse(Settings, argv, first="run")
    opened = runs.open_finished(
        settings.run, settings.run_dir, "latent_space", settings.device, settings.seed, may_be_deep=False
    )
    vae, data, device, run_dir = opened
    space = Space(vae.model, vae.guide, data)
    if settings.manifold and space.dim != 2:
        raise runs.RunError(f"--manifold: {settings.run} has {space.dim} latent dimensions, the manifold needs 2")
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # the run's numbers are as without others
        others = [open_other(each, data) for each in settings.others]
    judge = None if data.train_labels is None else Judge(data)
    runs.make_directory(run_dir)
    with runs.writing(run_dir):
        if space.dim == 2 and settings.manifold is not False:
            manifold(space, run_dir / "manifold.png")
        units = traversals(space, run_dir / "traversals.png")
        interpolations(space, run_dir / "interpolations.png")
        nearest_images(space, run_dir / "nearest.png")
    between = None if judge is None else halfway(space, judge, settings.num_images)
    copied = copying(space, settings.num_images)
    spaces = {settings.run: space} | dict(zip(settings.others, others, strict=True))
    blurs = {str(path): blur(each, settings.num_images) for path, each in spaces.items()}
    result = {
        "active_units": units,
        "halfway": None if between is None else {name: each._asdict() for name, each in between.items()},
        "copying": copied,
        "blur": {path: {name: each._asdict() for name, each in by.items()} for path, by in blurs.items()},
        "settings": {"num_images": settings.num_images, "seed": settings.seed},
    }
    return runs.conclude(run_dir, report(units, between, copied, blurs), result, device)


class Space:
    """The latent site next to the data of a (model, guide), and how it is decoded.

    Args:
        model, guide: see :func:`pyro_vae.traces`; of several latent sites the guide's first is the one.
        data: what they were trained on.

    Attributes:
        site: its name.
        dim: D.
        codes: E_q[z] of the first 5,000 test images, ``(N, D)``.
    """

    def __init__(self, model: Program, guide: Program, data: ImageData):
        self.model, self.guide, self.data = model, guide, data
        codes = figures.posterior_mean(guide, data.test[:5000])
        self.site = next(iter(codes))
        self.codes = codes[self.site].flatten(1)
        self.dim = self.codes.shape[1]

    def prior(self, size: int) -> Tensor:
        """Draws of the prior, ``(size, D)``."""
        with torch.no_grad():
            x = self.data.test.new_zeros(size, self.data.test.shape[1])
            site: Any = poutine.trace(poutine.uncondition(self.model)).get_trace(x).nodes[self.site]
            return site["value"]

    def quantiles(self, levels: Tensor) -> Tensor:
        """Of each dimension of the prior, from many draws: ``(len(levels), D)``."""
        return torch.quantile(self.prior(20_000), levels.to(self.codes), dim=0)

    def decode(self, z: Tensor, draw: bool = False) -> Tensor:
        """Means of p(x | z), or draws of x, for codes ``(N, D)``: ``(N, X)``."""
        return figures.decode(self.model, len(z), self.data.test, {self.site: z}, draw)

    def picture(self, x: Tensor, rows: int, path: Path, title: str, labels: Sequence[str] | None = None) -> None:
        """Images ``(N, X)`` in so many rows, as a file."""
        figures.image_grid(self.data.picture(x).unflatten(0, (rows, -1)), self.data.image_shape, path, title, labels)


def open_other(directory: Path, data: ImageData) -> Space:
    """The latent space of another finished run on the same images.

    Raises:
        RunError: if it is unfinished, or on other images.
    """
    vae, its_data = runs.load_finished(directory, data.device, may_be_told=False, may_be_deep=False)
    its_data = runs.images_of(its_data)
    if not (its_data.train_pixels.shape == data.train_pixels.shape and its_data.train_pixels.equal(data.train_pixels)):
        raise runs.RunError(f"--others: {directory} was trained on other images")
    return Space(vae.model, vae.guide, its_data)


def manifold(space: Space, path: Path, side: int = 20) -> None:
    """Means decoded from a grid of the prior's quantiles, from 1 % to 99 % in each of two dimensions."""
    levels = torch.linspace(0.01, 0.99, side)
    first, second = space.quantiles(levels).unbind(-1)
    z = torch.stack([first.repeat(side), second.flip(0).repeat_interleave(side)], dim=-1)
    space.picture(space.decode(z), side, path, "The manifold: z through the prior's quantiles")


def traversals(space: Space, path: Path, columns: int = 11) -> list[int]:
    """Each active unit moved through the prior's quantiles, the most active first; return their numbers."""
    active = active_units(space.guide, space.data.test[:5000])[space.site].flatten()
    spread = space.codes.var(0)
    units = [unit for unit in spread.argsort(descending=True).tolist() if active[unit]]
    if not units:
        return []
    quantiles = space.quantiles(torch.linspace(0.01, 0.99, columns))
    z = space.codes[0].repeat(len(units), columns, 1)
    for row, unit in enumerate(units):
        z[row, :, unit] = quantiles[:, unit]
    title = "Active units, from the 1 % to the 99 % quantile of the prior"
    space.picture(space.decode(z.flatten(0, 1)), len(units), path, title, [f"unit {unit}" for unit in units])
    return units


def straight(start: Tensor, end: Tensor, t: Tensor) -> Tensor:
    """(1 - t) start + t end, for ``(*, D)`` and t that broadcasts to them."""
    return (1 - t) * start + t * end


def spherical(start: Tensor, end: Tensor, t: Tensor) -> Tensor:
    """Along the great circle, with the angle w between the two: (sin((1 - t) w) start + sin(t w) end) / sin w."""
    cosine = F.cosine_similarity(start, end, dim=-1).clamp(-1, 1).unsqueeze(-1)
    w = cosine.acos()
    along = (torch.sin((1 - t) * w) * start + torch.sin(t * w) * end) / w.sin()
    return torch.where(w.sin() > 1e-6, along, straight(start, end, t))


LINES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"straight": straight, "spherical": spherical}


def interpolations(space: Space, path: Path, pairs: int = 4, columns: int = 11) -> None:
    """Some pairs of test images, along either line."""
    pairs = min(pairs, len(space.codes) // 2)
    t = torch.linspace(0, 1, columns, device=space.codes.device)[:, None]
    rows = [line(space.codes[i], space.codes[i + pairs], t) for i in range(pairs) for line in LINES.values()]
    labels = list(LINES) * pairs
    space.picture(space.decode(torch.cat(rows)), len(rows), path, "From one test image to another", labels)


def halfway(space: Space, judge: Judge, size: int) -> dict[str, Mean]:
    """The judge's confidence halfway between test images of different classes, along either line, and the difference.

    Beside them its confidence in what is decoded from the codes themselves.
    """
    labels = cast(Tensor, space.data.test_labels)[: len(space.codes)]
    start, end = (space.codes[each] for each in pairs_of_classes(labels, size))
    half = torch.tensor(0.5, device=start.device)
    found = {
        name: judge.confidence(space.data.picture(space.decode(line(start, end, half)))) for name, line in LINES.items()
    }
    codes = judge.confidence(space.data.picture(space.decode(start)))
    return {
        "at the codes": mean(codes),
        **{name: mean(each) for name, each in found.items()},
        "spherical minus straight": mean(found["spherical"] - found["straight"]),
    }


def mean(values: Tensor) -> Mean:
    """Of a sample ``(N,)``."""
    return Mean(values.mean().item(), values.std().item() / math.sqrt(len(values)))


def training_observations(space: Space) -> Tensor:
    """All training images ``(N, X)``, noisy ones drawn once."""
    return runs.some_images(space.data, "train", None)[0]


def nearest_images(space: Space, path: Path, columns: int = 12) -> None:
    """Draws of x, with their means above and the nearest training images below."""
    z = space.prior(columns)
    means, draws = space.decode(z), space.decode(z, draw=True)
    known = training_observations(space)
    _, index = nearest(draws, known)
    labels = ["mean of p(x | z)", "draw of x", "nearest training image"]
    rows, title = torch.cat([means, draws, known[index]]), "Samples, and the training images nearest to them"
    space.picture(rows, 3, path, title, labels)


def copying(space: Space, size: int) -> dict[str, float]:
    """Medians of the distance to the nearest training image; and the share of draws nearer than 99 % of test images."""
    known = training_observations(space)
    drawn, _ = nearest(space.decode(space.prior(size), draw=True), known)
    tested, _ = nearest(space.data.test[:size], known)
    return {
        "draws": drawn.median().item(),
        "test images": tested.median().item(),
        "share of draws nearer than 1 % of test images": (drawn < tested.quantile(0.01)).double().mean().item(),
    }


def sharpness(images: Tensor, shape: Sequence[int]) -> Tensor:
    """The variance of the Laplacian of images ``(N, X)`` of shape ``(C, H, W)``, averaged over channels: ``(N,)``."""
    kernel = images.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])[None, None]
    channels = images.reshape(-1, 1, *shape[1:])
    return F.conv2d(channels, kernel).flatten(1).var(-1).reshape(len(images), -1).mean(-1)


def blur(space: Space, size: int) -> dict[str, Mean]:
    """Sharpness of decoded images over that of training images, with the standard error of the ratio."""
    data = space.data
    z, codes = space.prior(size), space.codes[:size]
    pixels = grey(data)
    some = torch.randperm(len(pixels), device=pixels.device)[:size]
    truth = mean(sharpness(pixels[some], data.image_shape))
    images = {
        "training observations": data.observe(some),
        "samples, mean": space.decode(z),
        "samples, draw": space.decode(z, draw=True),
        "reconstructions, mean": space.decode(codes),
        "reconstructions, draw": space.decode(codes, draw=True),
    }
    result = {}
    for name, x in images.items():
        found = mean(sharpness(data.picture(x).clamp(0, 1), data.image_shape))
        ratio = found.value / truth.value
        result[name] = Mean(ratio, ratio * math.hypot(found.error / found.value, truth.error / truth.value))
    return result


def report(
    units: list[int], between: dict[str, Mean] | None, copied: dict[str, float], blurs: dict[str, dict[str, Mean]]
) -> str:
    """All numbers in Markdown."""
    lines = [f"{len(units)} active units.", ""]
    if between is not None:
        rows = [("confidence in decoded images", "mean", "+-")]
        rows += [(name, number(each.value), number(each.error)) for name, each in between.items()]
        note = "Halfway between test images of different classes; the errors are over images, for this one classifier."
        lines += [runs.table(rows), "", note, ""]
    rows = [("distance to the nearest training image", "")]
    rows += [(name, f"{value:.1%}" if "share" in name else f"{value:.2f}") for name, value in copied.items()]
    lines += [runs.table(rows), ""]
    rows = [("sharpness relative to training images", *next(iter(blurs.values())))]
    for path, by in blurs.items():
        rows.append((path, *(f"{each.value:.2f} +- {each.error:.2f}" for each in by.values())))
    lines.append(runs.table(rows))
    return "\n".join(lines)


if __name__ == "__main__":
    cli.guarded(main)
