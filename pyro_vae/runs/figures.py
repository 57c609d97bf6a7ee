"""Figures. A model is drawn through traces of (model, guide), so any amortized Pyro program is drawn alike."""

import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import matplotlib
import numpy as np
import torch
import xarray as xr
from matplotlib.figure import Figure
from pyro import poutine
from scipy.special import stdtrit
from torch import Tensor

from pyro_vae.callbacks import Epoch
from pyro_vae.data.datasets import Data
from pyro_vae.data.images import ImageData
from pyro_vae.data.sequences import SequenceData
from pyro_vae.errors import is_of_no_number
from pyro_vae.files import whole
from pyro_vae.infer.evidence.result import Evidence
from pyro_vae.infer.programs import Program, mean_of, posterior_samples
from pyro_vae.infer.trees import Data as Tree
from pyro_vae.infer.trees import call, select
from pyro_vae.parts.pixels import Autoregressive
from pyro_vae.runs.directory import noun_of

STYLE: dict[Any, Any] = {
    "figure.dpi": 110,
    "savefig.bbox": "tight",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "font.size": 10,
    "svg.fonttype": "none",
    "svg.hashsalt": "pyro_vae",
}
Latents = dict[str, Tensor]
Place = Path | IO[bytes]
"""Where a figure is written: a path, as PNG; or a buffer, as SVG."""


def plain(name: str) -> str:
    """A name as it is, where matplotlib would read what stands between two dollars as a formula."""
    return name.replace("$", r"\$")


def figure(path: Place, width: float = 6, height: float = 4, columns: int = 1, **subplots: Any) -> "_Figure":
    """Context: axes of one figure, in so many ``rows`` if told so, saved to ``path`` at the end."""
    return _Figure(path, width, height, columns, subplots)


def save_figure(drawn: Any, path: Place) -> None:
    """Write a figure as a whole PNG, or none of it; to what is no path, as SVG without a background."""
    if not isinstance(path, Path):
        with warnings.catch_warnings(), matplotlib.rc_context({"savefig.bbox": "standard"}):
            warnings.filterwarnings("ignore", "Glyph")  # whoever shows the text has a font for it
            drawn.savefig(path, format="svg", transparent=True, metadata={"Date": None})
        return
    with whole(path) as partial:
        drawn.savefig(partial, format="png")


class _Figure:
    def __init__(self, path: Place, width: float, height: float, columns: int, subplots: dict):
        self.path = path
        self.arguments = width, height, columns, subplots

    def __enter__(self) -> Any:
        width, height, columns, subplots = self.arguments
        rows = subplots.pop("rows", 1)
        self._style = matplotlib.rc_context(STYLE)
        self._style.__enter__()
        self.figure = Figure(figsize=(width, height), layout="constrained")
        return self.figure.subplots(rows, columns, **subplots)

    def __exit__(self, *error):
        if error[0] is None:
            save_figure(self.figure, self.path)
        return self._style.__exit__(*error)


def training_curve(history: Sequence[Epoch], path: Place, noun: str = "image") -> None:
    """Training and validation bound against epochs."""
    epochs = [row.epoch for row in history]
    with figure(path) as axes:
        marker = "o" if len(epochs) == 1 else None  # a line of one point cannot be seen
        axes.plot(epochs, [row.objective for row in history], marker=marker, color="0.7", label="objective, as trained")
        axes.plot(epochs, [row.train_elbo for row in history], marker=marker, label="training ELBO")
        axes.plot(epochs, [row.validation_elbo for row in history], marker=marker, label="validation ELBO")
        later = history[len(history) // 20 :]
        values = [value for row in later for value in (row.objective, row.train_elbo, row.validation_elbo)]
        if np.isfinite(values).all():
            low, high = np.quantile(values, 0.05), max(values)
            axes.set_ylim(low - 0.05 * (high - low) - 0.1, high + 0.1 * (high - low) + 0.1)
        axes.set(xlabel="epoch", ylabel=f"nats per {noun}", title="Training")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc="lower right")


def evidence(importance: Evidence, result: dict[str, Any], run_dir: Path) -> None:
    """Histogram of log p(x), and Pareto k, with its threshold, against effective sample size.

    Args:
        importance: importance-sampled, of the test images.
        result: what is in ``result.json``: whether the mean is reliable, and the annealed one, if there is one.
        run_dir: to write ``log_px.png`` and ``pareto_k.png`` to.
    """
    log_px, ess, khat = (getattr(importance, name).cpu().numpy() for name in ("log_px", "ess", "khat"))
    log_px, noun = log_px[np.isfinite(log_px)], noun_of(result)
    annealed = result.get("annealed_log_likelihood")
    with figure(run_dir / "log_px.png") as axes:
        axes.hist(log_px, bins=60, color="C0", alpha=0.8)
        if len(log_px):
            too_low = ", too low" if result.get("reliable") is False else ""
            axes.axvline(log_px.mean(), color="C3", label=f"mean {log_px.mean():.2f}{too_low}")
        if annealed is not None:
            axes.axvline(annealed, color="C2", ls="--", label=f"mean {annealed:.2f}, annealed")
        if axes.lines:
            axes.legend(loc="upper left")
        title = f"Log-likelihood per test {noun}, by importance sampling"
        axes.set(xlabel="log p(x), nats", ylabel=f"test {noun}s", title=title)
    known = np.isfinite(khat)  # few samples have no k, and bounded weights have k = -inf
    with figure(run_dir / "pareto_k.png") as axes:
        axes.scatter(ess[known], khat[known], s=4, alpha=0.4, linewidths=0)
        if not known.all():
            axes.text(0.02, 0.02, f"no finite k: {(~known).sum():,} {noun}s", transform=axes.transAxes)
        threshold = result["khat_threshold"]
        label = f"threshold {threshold:.2f}: above it, not to be trusted"
        axes.axhline(threshold, color="C3", lw=1, label=label)
        axes.legend(loc="upper right")
        axes.set(
            xscale="log" if known.any() else "linear",
            xlabel="effective sample size",
            ylabel="Pareto k",
            title=f"How reliable is each {noun}'s estimate?",
        )


def paired_differences(differences: Mapping[str, tuple[float, float, float]], path: Place, title: str) -> None:
    """Mean differences of log p(x) as a forest plot of ArviZ: the thick bars are intervals of 50 %, the thin of 95 %.

    They are those of Student's t, whose quantiles ArviZ is given as draws.

    Args:
        differences: by name: the mean, nats, its standard error, and degrees of freedom.
        path: of the PNG, or a buffer for SVG.
        title: above the plot.
    """
    draws = np.empty((1, 2000, len(differences)))
    places = (np.arange(draws.shape[1]) + 0.5) / draws.shape[1]
    for column, (mean, error, freedom) in enumerate(differences.values()):
        error = error if freedom > 0 and math.isfinite(error) else 0.0  # one datum has no interval
        draws[0, :, column] = mean + error * stdtrit(min(max(freedom, 1.0), 1e9), places)
    dims = "chain", "draw", "run"  # names of runs are no names of variables, since paths have slashes
    sample = xr.Dataset({"difference": (dims, draws)}, coords={"run": [plain(name) for name in differences]})
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ announces its next version once a day
        import arviz

        az: Any = arviz  # of whichever version

        if int(az.__version__.split(".")[0]) == 0:
            canvas = Figure(figsize=(7, 1.5 + 0.4 * len(differences)), layout="constrained")
            axes = canvas.subplots()
            az.plot_forest(sample, combined=True, hdi_prob=0.95, ax=axes, textsize=10)
            axes.axvline(0, color="C3", lw=1)
            labels = (label.get_text() for label in axes.get_yticklabels())  # of ArviZ: difference[name]
            axes.set_yticks(axes.get_yticks(), [label.removeprefix("difference")[1:-1] for label in labels])
            axes.set_title(plain(title))
            save_figure(canvas, path)
        else:
            plot = az.plot_forest(
                xr.DataTree.from_dict({"posterior": sample}),
                combined=True,
                ci_kind="eti",
                ci_probs=(0.5, 0.95),
                backend="matplotlib",
            )
            plot.viz["figure"].item().suptitle(plain(title))
            save_figure(plot, path)


def posterior_mean(guide: Program, x: Tree, num_samples: int = 64) -> Latents:
    """Latents of each observation by site, averaged over draws of the guide."""
    with torch.no_grad():
        return {name: z.mean(0) for name, z in posterior_samples(guide, x, num_samples).items()}


def decode(
    model: Program,
    size: int,
    like: Tensor,
    latents: Latents | None = None,
    draw: bool = False,
    condition: Tensor | None = None,
) -> Tensor:
    """Mean, or a draw, of x for ``size`` observations ``(size, X)``, given their latents or else draws of the prior.

    A model that is told a condition takes one of each, ``(size, C)``. A mean without a formula is that of 20 draws.
    """
    observed = _observed(model, size, like, latents, condition)
    return observed["value"] if draw else mean_of(observed["fn"], 20)


def _observed(model: Program, size: int, like: Tensor, latents: Latents | None, condition: Tensor | None) -> Any:
    """The observed site of ``size`` data, with a draw of x."""
    program = poutine.condition(poutine.uncondition(model), data=latents or {})
    x = like.new_zeros(size, like.shape[-1])
    with torch.no_grad():
        nodes: Any = call(poutine.trace(program).get_trace, x if condition is None else (x, condition)).nodes
    (observed,) = (site for site in nodes.values() if site.get("infer", {}).get("was_observed"))
    return observed


def pictures(model: Program, guide: Program, data: Data, run_dir: Path) -> None:
    """The latent space; of images, reconstructions, prior samples and interpolations too."""
    try:
        _pictures(model, guide, data, run_dir)
    except (ValueError, RuntimeError) as error:
        if not is_of_no_number(error):
            raise
        print(f"not all pictures: draws or latents are NaN or infinite ({textwrap.shorten(str(error), 150)})")


def _pictures(model: Program, guide: Program, data: Data, run_dir: Path) -> None:
    latent_scatter(guide, data, run_dir / "latent_space.png")
    if isinstance(data, ImageData):
        (_images_given if data.schema.condition else _images)(model, guide, data, run_dir)
    if isinstance(data, SequenceData):
        _sequences(model, guide, data, run_dir)


def _sequences(model: Program, guide: Program, data: SequenceData, run_dir: Path) -> None:
    """Four test sequences with their reconstructions, and as many draws of the model."""
    some = data.test[:4]
    means = decode(model, len(some), data.test, posterior_mean(guide, some))
    draws = decode(model, len(some), data.test, draw=True)
    titles = {"reconstructions.png": "Test sequences (dots), and their reconstructions", "samples.png": "Samples"}
    for (name, title), dots, lines in zip(titles.items(), (some, None), (means, draws), strict=True):
        sequence_row(data.schema.shape, dots, lines, run_dir / name, title)


def sequence_row(shape: Sequence[int], dots: Tensor | None, lines: Tensor, path: Place, title: str = "") -> None:
    """A few sequences ``(N, T * F)`` of shape ``(T, F)`` side by side, as lines, with dots of others if there are."""
    steps, features = shape
    with figure(path, 2.8 * len(lines), 2.4, len(lines), sharey=True, squeeze=False) as rows:
        for place, axes in enumerate(rows[0]):
            for feature in range(min(features, 4)):
                of = slice(feature, None, features)
                axes.plot(range(steps), lines[place, of].cpu(), color=f"C{feature}", lw=1.2)
                if dots is not None:
                    axes.plot(range(steps), dots[place, of].cpu(), ".", color=f"C{feature}", ms=5)
            axes.set_xlabel("step")
        rows[0][0].figure.suptitle(title)


def _images(model: Program, guide: Program, data: ImageData, run_dir: Path) -> None:
    shape = data.image_shape
    originals = data.test[:10]
    reconstructed = decode(model, len(originals), data.test, posterior_mean(guide, originals))
    rows = torch.stack([originals, reconstructed])
    image_grid(
        data.picture(rows), shape, run_dir / "reconstructions.png", "Test images (top) and their reconstructions"
    )
    by_draws = isinstance(_observed(model, 1, data.test, None, None)["fn"], Autoregressive)
    samples = decode(model, 100, data.test, draw=by_draws)
    image_grid(
        data.picture(samples).unflatten(0, (10, 10)),
        shape,
        run_dir / "samples.png",
        "Draws of x" if by_draws else "Means of p(x | z), z from the prior",
    )
    ends = posterior_mean(guide, data.test[:12])
    half = min(12, len(data.test)) // 2
    steps = torch.linspace(0, 1, 10, device=data.test.device)[:, None]
    between = {
        name: torch.cat([(1 - steps) * z[i] + steps * z[i + half] for i in range(half)]) for name, z in ends.items()
    }
    grid = data.picture(decode(model, 10 * half, data.test, between)).unflatten(0, (half, 10))
    image_grid(
        grid,
        shape,
        run_dir / "interpolation.png",
        "From one test image to another, straight through latent space",
    )


MOST_ROWS = 20
"""Classes that are drawn, the first ones."""


def _images_given(model: Program, guide: Program, data: ImageData, run_dir: Path) -> None:
    """Images of a model that is told the class: what it says of each."""
    shape, (column,), (test, told) = data.image_shape, data.schema.condition, data.test
    classes = column.encode(torch.arange(len(column.values), device=test.device))[:MOST_ROWS]
    labels = [str(value) for value in column.values[: len(classes)]]
    codes = posterior_mean(guide, select(data.test, slice(10)))
    mean = decode(model, len(test[:10]), test, codes, condition=told[:10])
    title = "Test images (top) and their reconstructions"
    image_grid(data.picture(torch.stack([test[:10], mean])), shape, run_dir / "reconstructions.png", title)
    image_grid(
        data.picture(samples_given(model, test, classes)),
        shape,
        run_dir / "samples.png",
        "Means of p(x | z, class), a row for each class, z of the same noise in a column",
        labels,
    )
    of_others = [decode(model, len(test[:10]), test, codes, condition=c.expand(len(test[:10]), -1)) for c in classes]
    rows = torch.stack([test[:10], *of_others])
    title = "Test images (top), and the same z with each class in place of theirs"
    image_grid(data.picture(rows), shape, run_dir / "other_classes.png", title, ["", *labels])


def samples_given(model: Program, like: Tensor, classes: Tensor, number: int = 10) -> Tensor:
    """Means of x given each of L conditions ``(L, C)``, shape ``(L, number, X)``; z is of the same noise for all."""
    rows, gpus = [], [like.device] if like.device.type == "cuda" else []
    for c in classes:
        with torch.random.fork_rng(gpus):
            rows.append(decode(model, number, like, condition=c.expand(number, -1)))
    return torch.stack(rows)


def image_grid(
    images: Tensor, shape: Sequence[int], path: Place, title: str = "", labels: Sequence[str] | None = None
) -> None:
    """Images ``(rows, columns, X)`` of shape ``(C, H, W)`` as one picture, with a label for each row if there are."""
    rows, columns = images.shape[:2]
    channels, height, width = shape
    tiles = images.detach().cpu().reshape(rows, columns, channels, height, width)
    tiles = torch.nn.functional.pad(tiles, (1, 1, 1, 1), value=0.2)
    canvas = tiles.permute(0, 3, 1, 4, 2).reshape(rows * (height + 2), columns * (width + 2), channels).clamp(0, 1)
    if channels not in (1, 3):  # no colours that a picture could show
        canvas, channels = canvas.mean(-1, keepdim=True), 1
    with figure(path, 0.62 * columns, 0.62 * rows + 0.3) as axes:
        axes.imshow(
            (canvas.squeeze(-1) if channels == 1 else canvas).numpy(),
            cmap="gray_r",
            vmin=0,
            vmax=1,
            interpolation="nearest",
        )
        axes.set_title(title)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.set_xticks([])
        centres = [(row + 0.5) * (height + 2) for row in range(rows)]
        axes.set_yticks(centres if labels else [], [plain(label) for label in labels] if labels else None)
        axes.tick_params(length=0)


def latent_scatter(guide: Program, data: Data, path: Place, num_images: int = 5000) -> None:
    """Posterior means of test images in the plane of their largest variance, coloured by class."""
    x = select(data.test, slice(num_images))
    latents = posterior_mean(guide, x)
    z = torch.cat([site.flatten(1) for site in latents.values()], dim=1)
    z = z - z.mean(0)
    if z.shape[1] > 2:
        _, _, directions = torch.linalg.svd(z, full_matrices=False)
        z = z @ directions[:2].mT
    labels = None if data.test_labels is None else data.test_labels[:num_images].numpy()
    z = torch.nn.functional.pad(z, (0, 2 - min(2, z.shape[1]))).cpu().numpy()
    colours = {} if labels is None else {"c": labels, "cmap": "tab10"}
    with figure(path, 5.6, 4.6) as axes:
        points = axes.scatter(z[:, 0], z[:, 1], s=5, alpha=0.6, linewidths=0, rasterized=True, **colours)
        if labels is not None:
            axes.legend(*points.legend_elements(), title="class", loc="center left", bbox_to_anchor=(1, 0.5))
        axes.set(
            xlabel="first principal component", ylabel="second", title=f"Posterior means of test {data.schema.noun}s"
        )
