"""The columns of a table in a trained model: each one's part of the bound, and what the model draws beside the data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.data.datasets import Column, Data
from pyro_vae.errors import ContractError
from pyro_vae.infer.programs import Program, sample_sites, site_of, traces
from pyro_vae.infer.trees import Data as Tree
from pyro_vae.infer.trees import call, first_tensor
from pyro_vae.runs import figures
from pyro_vae.runs.directory import write_csv

MOST_SHOWN = 24
"""Columns that a figure has room for."""


def column_parts(model: Program, guide: Program, data: Tree, num_samples: int = 50) -> Tensor:
    """E_q[log p(x_j given z)] of each entry, shape ``(B, X)``, nats; NaN where it was not seen.

    It is how well an entry is told by the z that q(z given x) draws, having seen it: the sum over a row, minus
    KL(q || p(z)), is the ELBO. It is not log p(x_j), nor log p of x_j given the others, which
    :func:`pyro_vae.infer.evidence.log_conditional` estimates.

    Args:
        model, guide: of a VAE whose likelihood is of independent entries.
        data: what they are called with, the observations ``(B, X)`` first.
        num_samples: draws of z.

    Raises:
        ContractError: if the observations have no entries that are scored one by one.
    """
    x = first_tensor(data)
    with torch.no_grad():
        trace = traces(model, guide, data, num_samples).model
        (site,) = (site_of(trace, name) for name in sample_sites(trace) if site_of(trace, name)["is_observed"])
        entries = getattr(site["fn"], "base_dist", None)
        if entries is None or entries.batch_shape[-2:] != x.shape:
            raise ContractError(f"the entries of a {type(site['fn']).__name__} cannot be scored one by one")
        return torch.where(x.isnan(), x, entries.log_prob(site["value"]).mean(0))


def draws(model: Program, data: Tree) -> Tensor:
    """One draw of x from the model for each datum, given its condition if there is one, shape ``(B, X)``."""
    with torch.no_grad():
        nodes: Any = poutine.trace(lambda: call(poutine.uncondition(model), data)).get_trace().nodes
    (site,) = (site for site in nodes.values() if site.get("infer", {}).get("was_observed"))
    return site["value"]


def write_columns(model: Program, guide: Program, data: Data, run_dir: Path) -> None:
    """Write ``columns.csv``, each column's kind, gaps and part of the test rows' bound; and draw their marginals."""
    columns, test = data.schema.columns, data.test
    x = first_tensor(test)
    parts = column_parts(model, guide, test)
    rows = [
        {
            "column": column.name,
            "kind": column.kind,
            "test_missing": x[:, place].isnan().double().mean().item(),
            "test_reconstruction": parts[:, place].nanmean().item(),
        }
        for place, column in enumerate(columns)
    ]
    write_csv(run_dir / "columns.csv", rows)
    some = data.observe(torch.arange(min(5000, data.num_train), device=data.device))
    marginals(columns, first_tensor(some), draws(model, some), run_dir / "marginals.png")


def marginals(columns: Sequence[Column], x: Tensor, drawn: Tensor, path: figures.Place) -> None:
    """Histograms of each column, of data ``x`` and of draws of the model, both ``(N, X)``."""
    shown = columns[:MOST_SHOWN]
    width = min(4, len(shown))
    height = -(-len(shown) // width)
    with figures.figure(path, 2.6 * width, 2.2 * height, width, rows=height, squeeze=False) as axes:
        for place, (column, cell) in enumerate(zip(shown, axes.flat, strict=False)):
            both = [each[:, place].cpu().double().numpy() for each in (x, drawn)]
            both = [each[np.isfinite(each)] for each in both]
            bins = _bins(column, both[0])
            inside = [each.clip(bins[0], bins[-1]) for each in both]
            weights = [np.full(len(each), 1 / max(1, len(each))) for each in both]
            cell.hist(inside, bins=bins, weights=weights, label=["training data", "drawn by the model"])
            cell.set_title(figures.plain(column.name), fontsize=9)
            if column.values:
                names = [figures.plain(v) if isinstance(v, str) else f"{v:g}" for v in column.values]
                cell.set_xticks(range(len(names)), names, rotation=30 if len(names) > 3 else 0, fontsize=7)
        for cell in list(axes.flat)[len(shown) :]:
            cell.set_axis_off()
        axes.flat[0].legend(fontsize=7)


def _bins(column: Column, x: np.ndarray) -> np.ndarray:
    """Edges of bins: one for each value, or for the whole range of the data, or for nearly all of it."""
    if column.values:
        return np.arange(len(column.values) + 1) - 0.5
    low, high = np.quantile(x, [0.002, 0.998])
    if column.kind == "count" and high - low < 25:
        return np.arange(low, high + 2) - 0.5
    return np.linspace(low, cast(float, high) if high > low else low + 1, 26)
