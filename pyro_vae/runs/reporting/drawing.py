"""The figures of a report: what was recorded of a run, and what its model draws."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from pyro import poutine
from torch import Tensor

from pyro_vae.callbacks import Epoch
from pyro_vae.data.datasets import Data
from pyro_vae.data.images import ImageData
from pyro_vae.data.sequences import SequenceData
from pyro_vae.infer.trees import call, data_size, first_tensor, select, tensors
from pyro_vae.parts.pixels import Autoregressive
from pyro_vae.runs import figures
from pyro_vae.runs.columns import draws, marginals
from pyro_vae.runs.reporting.svg import Drawn, drawn

UNITS, STEPS, REACH = 8, 11, 3.0
"""Of a traversal: units, steps, and how far they go, in units of z."""


class Estimate(NamedTuple):
    """One estimate of log p(x): what made it, seconds per datum, the mean, and its Monte Carlo error."""

    name: str
    seconds: float
    value: float
    error: float


def field(evidence: xr.Dataset, name: str) -> np.ndarray:
    """A diagnostic of each datum; NaN where the file has none of this name."""
    return evidence[name].values if name in evidence else np.full(evidence.sizes["datum"], np.nan)


def curves(history: Sequence[Epoch], noun: str) -> list[Drawn]:
    """The bound against epochs."""
    known = [row for row in history if math.isfinite(row.validation_elbo)]
    told = "Evidence lower bound against epochs, of training and validation data."
    if known:
        top, last = max(known, key=lambda row: row.validation_elbo), known[-1]
        told += f" The validation ELBO goes from {known[0].validation_elbo:.2f} to {last.validation_elbo:.2f} nats per "
        told += f"{noun}; it is highest at epoch {top.epoch}, {top.validation_elbo:.2f}."
    return _some(drawn("curves", lambda out: figures.training_curve(history, out, noun), told, told))


def several_curves(histories: Mapping[str, Sequence[Epoch]]) -> list[Drawn]:
    """Validation bounds of several runs against epochs."""

    def draw(out: BytesIO) -> None:
        with figures.figure(out) as axes:
            for name, history in histories.items():
                epochs, bounds = [row.epoch for row in history], [row.validation_elbo for row in history]
                axes.plot(epochs, bounds, marker="o" if len(epochs) == 1 else None, label=_short(name))
            finals = [row.validation_elbo for each in histories.values() for row in each[len(each) // 20 :]]
            finals = [each for each in finals if math.isfinite(each)]
            if finals:
                low, high = np.quantile(finals, 0.05), max(finals)
                axes.set_ylim(low - 0.05 * (high - low) - 0.1, high + 0.1 * (high - low) + 0.1)
            axes.set(xlabel="epoch", ylabel="nats per datum", title="Validation ELBO")
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.legend(loc="lower right")

    ends = ", ".join(f"{name} {history[-1].validation_elbo:.2f}" for name, history in histories.items() if history)
    return _some(drawn("curves", draw, f"Validation ELBO of each run against epochs; at the end: {ends}."))


def evidence(importance: xr.Dataset, result: Mapping[str, Any], noun: str) -> list[Drawn]:
    """Histogram of log p(x) over data, and Pareto k against effective sample size."""
    log_px, ess, khat = (field(importance, name) for name in ("log_px", "ess", "khat"))
    finite = log_px[np.isfinite(log_px)]

    def histogram(out: BytesIO) -> None:
        with figures.figure(out, 5, 3.6) as axes:
            axes.hist(finite, bins=min(40, max(1, len(finite))), alpha=0.8)
            axes.set(xlabel="log p(x), nats", ylabel=f"test {noun}s", title=f"Log-likelihood per test {noun}")

    known = np.isfinite(khat) & np.isfinite(ess) & (ess > 0)
    threshold = result["khat_threshold"] or 0.7

    def reliability(out: BytesIO) -> None:
        with figures.figure(out, 5, 3.6) as axes:
            axes.scatter(ess[known], khat[known], s=4, alpha=0.4, linewidths=0, rasterized=True)
            axes.axhline(threshold, color="C3", lw=1, label=f"threshold {threshold:.2f}")
            axes.legend(loc="upper right")
            axes.set_xscale("log")
            _few_ticks(axes.xaxis, ess[known])
            axes.set(xlabel="effective sample size", ylabel="Pareto k", title="How sure is each estimate?")

    found = []
    if len(finite):
        low, middle, high = np.quantile(finite, (0.05, 0.5, 0.95))
        told = f"Histogram of log p(x) of {len(log_px):,} test {noun}s by importance sampling: half are below "
        told += f"{middle:.1f} nats, 5 % below {low:.1f}, 5 % above {high:.1f}."
        found += _some(drawn("histogram", histogram, told, told))
    if known.any():
        told = f"Pareto k against effective sample size: {(khat > threshold).mean():.0%} of the {noun}s are above "
        told += f"{threshold:.2f}, where an estimate by importance sampling is not to be trusted."
        found += _some(drawn("reliability", reliability, told, told))
    return found


def _few_ticks(axis: Any, values: np.ndarray) -> None:
    """Plain numbers along a logarithmic axis, at 1, 2, 5, or of more than three decades at powers of 10."""
    within = values.max() / values.min()
    axis.set_major_locator(
        LogLocator(subs=(1.0,) if within > 1000 else (1.0, 2.0, 5.0)) if within > 3 else MaxNLocator(5)
    )
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())  # where there is less than a decade, they overlap


def budget(estimates: Sequence[Estimate], noun: str) -> list[Drawn]:
    """Log-likelihoods against the seconds per datum that they took."""

    def draw(out: BytesIO) -> None:
        with figures.figure(out, 6, 3.6) as axes:
            for number, each in enumerate(estimates):
                colour = f"C{number % 10}"
                axes.errorbar(each.seconds, each.value, yerr=2 * each.error, fmt="o", capsize=3, color=colour)
                axes.annotate(
                    _short(each.name), (each.seconds, each.value), (5, 5), textcoords="offset points", fontsize=8
                )
            axes.set(
                xlabel=f"seconds per {noun}, in a logarithmic scale",
                ylabel=f"nats per {noun}",
                title="log p(x) against budget",
            )
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks([each.seconds for each in estimates], [f"{each.seconds:.2g}" for each in estimates])
            axes.margins(0.25)

    told = "; ".join(f"{each.name}: {each.value:.2f} in {each.seconds:.2g} s" for each in estimates)
    told = f"Estimates of log p(x) against seconds per {noun}, with two standard errors. {told}."
    return _some(drawn("budget", draw, told))


def pixel_by_pixel(vae: Any, data: Data) -> bool:
    """Whether a model draws an observation entry by entry, which takes too long for a page."""
    with torch.no_grad():
        nodes: Any = call(poutine.trace(vae.model).get_trace, select(data.test, slice(1))).nodes
    return any(site.get("is_observed") and isinstance(site["fn"], Autoregressive) for site in nodes.values())


def images(vae: Any, data: ImageData) -> list[Drawn]:
    """Reconstructions, samples and traversals of a model of images."""
    model, guide, shape = vae.model, vae.guide, data.image_shape
    like = first_tensor(data.test)
    some = select(data.test, slice(10))
    _, *conditions = tensors(some)
    told = conditions[0] if data.schema.condition else None
    codes = figures.posterior_mean(guide, some)
    size = data_size(some)
    rows = torch.stack([first_tensor(some), figures.decode(model, size, like, codes, condition=told)])
    found = _grid(data, "reconstructions", rows, f"The first {size} test images (top) and their reconstructions.")
    if told is None:
        samples = figures.decode(model, 60, like).unflatten(0, (5, 12))
        found += _grid(
            data, "samples", samples, "Sixty images that the model makes: means of p(x | z), z drawn from the prior."
        )
    else:
        (column,) = data.schema.condition
        classes = column.encode(torch.arange(len(column.values), device=like.device))[: figures.MOST_ROWS]
        labels = [str(value) for value in column.values[: len(classes)]]
        samples = figures.samples_given(model, like, classes)
        about = (
            f"Images that the model makes, a row for each class: {', '.join(labels)}; z of the same noise in a column."
        )
        found += _grid(data, "samples", samples, about, labels)
    return found + _traversals(model, guide, data, codes, told, shape)


def _traversals(
    model: Any, guide: Any, data: ImageData, codes: figures.Latents, told: Tensor | None, shape: Sequence[int]
) -> list[Drawn]:
    """What single units of z do, those that vary most with the data, from the code of the first test image."""
    spread = figures.posterior_mean(guide, select(data.test, slice(500)), 16)
    units = [
        (float(variance), name, unit)
        for name, each in spread.items()
        if each.dim() == 2 and len(each) > 1
        for unit, variance in enumerate(each.var(0))
    ]
    chosen = sorted(units, reverse=True)[:UNITS]
    if not chosen:
        return []
    like = first_tensor(data.test)
    rows = []
    for _, name, unit in chosen:
        latents = {site: each[:1].expand(STEPS, *each.shape[1:]).clone() for site, each in codes.items()}
        latents[name][:, unit] = torch.linspace(-REACH, REACH, STEPS, device=like.device)
        condition = None if told is None else told[:1].expand(STEPS, -1)
        rows.append(figures.decode(model, STEPS, like, latents, condition=condition))
    several = len({name for _, name, _ in units}) > 1
    labels = [f"{name} " * several + f"unit {unit}" for _, name, unit in chosen]
    about = (
        f"The first test image with one unit of z in each row, from -{REACH:.0f} to {REACH:.0f}: {', '.join(labels)}, "
    )
    about += "which vary most with the data."
    return _grid(data, "traversals", torch.stack(rows), about, labels)


def _grid(data: ImageData, name: str, rows: Tensor, about: str, labels: Sequence[str] | None = None) -> list[Drawn]:
    pictures = data.picture(rows)

    def draw(out: BytesIO) -> None:
        figures.image_grid(pictures, data.image_shape, out, labels=labels)

    return _some(drawn(name, draw, about, about))


def latent_map(vae: Any, data: Data) -> list[Drawn]:
    """Posterior means of test data in the plane of their largest variance."""
    noun, size = data.schema.noun, min(2000, data_size(data.test))
    told = f"Posterior means of z of {size:,} test {noun}s in the plane in which they vary most"
    told += ", coloured by class." if data.test_labels is not None else "."
    return _some(drawn("latents", lambda out: figures.latent_scatter(vae.guide, data, out, size), told, told))


def columns(vae: Any, data: Data) -> list[Drawn]:
    """Histograms of the columns of a table, of the data and of draws of the model."""
    some = data.observe(torch.arange(min(2000, data.num_train), device=data.device))
    shown, made = first_tensor(some), draws(vae.model, some)
    told = "Histograms of each column, of training data and of what the model draws: "
    told += ", ".join(column.name for column in data.schema.columns[:24]) + "."
    draw = partial(marginals, data.schema.columns, shown, made)
    return _some(drawn("marginals", draw, told, "Each column, of training data and of draws of the model."))


def sequences(vae: Any, data: SequenceData) -> list[Drawn]:
    """Test sequences with their reconstructions, and draws of the model."""
    some = data.test[:4]
    means = figures.decode(vae.model, len(some), data.test, figures.posterior_mean(vae.guide, some))
    made = figures.decode(vae.model, len(some), data.test, draw=True)
    found = []
    for name, title, dots, lines in (
        ("reconstructions", "Test sequences (dots), and their reconstructions (lines).", some, means),
        ("samples", "Sequences that the model draws.", None, made),
    ):
        draw = partial(figures.sequence_row, data.schema.shape, dots, lines)
        found += _some(drawn(name, draw, title, title))
    return found


def forest(draw: Callable[[Any], None], names: Sequence[str], told: Sequence[str], caption: str) -> list[Drawn]:
    """Differences of log p(x) with intervals, drawn by ``draw``; ``told`` is each in words, ``caption`` on bars."""
    alt = f"Differences of log p(x) with their intervals, of {', '.join(names)}. {' '.join(told)}"
    return _some(drawn("differences", draw, alt, caption))


def _short(name: str) -> str:
    """A name that a figure has room for."""
    return figures.plain(name if len(name) <= 40 else "…" + name[-39:])


def _some(found: Drawn | None) -> list[Drawn]:
    return [] if found is None else [found]
