"""How well does a VAE fill in what is missing from a table, beside scikit-learn's imputers?

Of three of scikit-learn's data sets a fifth of all entries is hidden at random, and every method sees the rest of the
same table. The measure, fixed beforehand: the root mean squared error on the hidden entries, each column in units of
its standard deviation, so that its mean has about 1; averaged over several draws of what is hidden, with a standard
error, and differences to IterativeImputer paired by draw.

The VAE is trained by the bound of MIWAE (Mattei & Frellsen 2019) on the table with its gaps; imputations are means of
p(x_missing | x_seen), by annealed chains. Its network and latent dimensions are those, of a few, that fill in best a
further tenth of the entries, which are hidden from it in a first training: none of the hidden ones is looked at.
"""

import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.exceptions import ConvergenceWarning
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer
from torch import Tensor
from tqdm import tqdm

from pyro_vae import (
    IWAE,
    MLP,
    VAE,
    Annealing,
    Conditional,
    Gaussian,
    Incomplete,
    MeanField,
    StandardNormal,
    cli,
    impute,
    runs,
)
from pyro_vae.parts.mixed import Scaled
from pyro_vae.runs import figures
from pyro_vae.runs.summaries import standard_error

TABLES: dict[str, Callable] = {"wine": load_wine, "breast cancer": load_breast_cancer, "diabetes": load_diabetes}
IMPUTERS: dict[str, Callable] = {
    "mean": SimpleImputer,
    "nearest neighbours": KNNImputer,
    "iterative": lambda: IterativeImputer(random_state=0),
}
REFERENCE, OURS = "iterative", "VAE"
Errors = dict[str, dict[str, list[float]]]
"""By table and method, one for each draw."""


@dataclass(frozen=True)
class Shape:
    """A VAE to be tried: latent dimensions, and widths of the decoder's hidden layers; none is factor analysis."""

    latent_dim: int
    hidden: tuple[int, ...]

    def __str__(self) -> str:
        return f"D = {self.latent_dim}, {'affine' if not self.hidden else f'{self.hidden[0]} hidden'}"


CHAINS = Annealing(num_chains=32, num_temperatures=8)
SHAPES = (Shape(5, (64,)), Shape(10, ()), Shape(10, (64,)))


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison.

    Args:
        missing: share of the entries that are hidden, in (0, 1).
        num_draws: of what is hidden, at least 2.
        steps: of the training, at least 1; a quarter of it for each shape that is tried.
        seed: of draws and trainings, at least 0.
        run_dir: directory to write, new or empty; null: one under runs/, named by time.
    """

    missing: float = 0.2
    num_draws: int = 3
    steps: int = 1200
    seed: int = 0
    run_dir: Path | None = None

    def __post_init__(self):
        if not 0 < self.missing < 1:
            raise ValueError(f"--missing must be between 0 and 1, got {self.missing}")
        for name, bound in {"num_draws": 2, "steps": 1}.items():
            if (value := getattr(self, name)) < bound:
                raise ValueError(f"--{name} must be at least {bound}, got {value}")
        runs.check_seed(self.seed)


def main(argv: Sequence[str] | None = None) -> Path:
    """Compare as told by ``argv``; return the directory written.

    Raises:
        RunError: for a mistake in ``argv``.
    """
    settings, text = runs.parse(Settings, argv)
    run_dir = runs.run_dir_for("missing", settings.run_dir)
    runs.open_run(run_dir, text, resume=None)
    errors, chosen, coverage = study(settings)
    with runs.writing(run_dir):
        plot(errors, run_dir / "imputation.png")
    result = {"errors": errors, "chosen": chosen, "coverage": coverage}
    return runs.conclude(run_dir, report(errors, chosen, coverage, settings), result, torch.device("cpu"))


def study(settings: Settings) -> tuple[Errors, dict[str, list[str]], dict[str, list[float]]]:
    """Errors of all methods; the shapes chosen; and how often 90 % intervals of the VAE hold what was hidden."""
    errors: Errors = {name: {} for name in TABLES}
    chosen: dict[str, list[str]] = {name: [] for name in TABLES}
    coverage: dict[str, list[float]] = {name: [] for name in TABLES}
    total = len(TABLES) * settings.num_draws
    with tqdm(total=total, desc="draws of what is hidden", unit="draw") as bar:
        for name, load in TABLES.items():
            x = torch.tensor(load().data, dtype=torch.float32)
            unit = x.std(0)
            for draw in range(settings.num_draws):
                torch.manual_seed(settings.seed + draw)
                hidden = torch.rand(x.shape) < settings.missing
                seen = x.masked_fill(hidden, math.nan)
                centre = seen.nanmean(0)
                for method, make in IMPUTERS.items():
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", ConvergenceWarning)
                        filled = make().fit_transform(((seen - centre) / unit).numpy().astype(np.float64))
                    filled = torch.tensor(filled).to(x) * unit + centre
                    errors[name].setdefault(method, []).append(error(filled, x, unit, hidden))
                shape = choose(seen, settings.steps)
                chosen[name].append(str(shape))
                vae = train(seen, shape, settings.steps)
                found = impute(vae.model, vae.guide, seen, num_draws=200, chains=CHAINS, num_checked=0)
                errors[name].setdefault(OURS, []).append(error(found.mean, x, unit, hidden))
                low, high = (found.draws.quantile(q, 0) for q in (0.05, 0.95))
                coverage[name].append(((low <= x) & (x <= high))[hidden].float().mean().item())
                bar.update()
    return errors, chosen, coverage


def error(filled: Tensor, x: Tensor, unit: Tensor, among: Tensor) -> float:
    """Root mean squared error of some entries, each in the unit of its column."""
    return ((filled - x) / unit)[among].square().mean().sqrt().item()


def choose(seen: Tensor, steps: int) -> Shape:
    """The shape that fills in a tenth of what was seen best, trained without it."""
    held = (torch.rand(seen.shape) < 0.1) & ~seen.isnan()
    unit = torch.where(seen.isnan(), seen.nanmean(0), seen).std(0)
    rest = seen.masked_fill(held, math.nan)
    scores = {}
    for shape in SHAPES:
        vae = train(rest, shape, max(1, steps // 4))
        filled = impute(vae.model, vae.guide, rest, 200, num_draws=1, num_checked=0).mean
        scores[shape] = error(filled, seen, unit, held)
    return min(scores, key=lambda shape: scores[shape])


def train(seen: Tensor, shape: Shape, steps: int) -> VAE:
    """A VAE of a table with gaps, ``(N, X)``."""
    size = seen.shape[1]
    head = Scaled(Gaussian(size, scale="per_pixel"))
    vae = VAE(
        StandardNormal(shape.latent_dim),
        Conditional(MLP(shape.latent_dim, sum(head.sizes), hidden=shape.hidden), head),
        Conditional(Incomplete(MLP(2 * size, 2 * shape.latent_dim, hidden=[64]), size), MeanField(shape.latent_dim)),
    )
    vae.initialize(seen)
    optim = torch.optim.Adam(vae.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optim, 1e-2, total_steps=steps)
    bound = IWAE(10)
    for _ in range(steps):
        optim.zero_grad()
        bound(vae.model, vae.guide, seen[torch.randint(len(seen), (64,))]).backward()
        optim.step()
        schedule.step()
    return vae


def report(errors: Errors, chosen: dict[str, list[str]], coverage: dict[str, list[float]], settings: Settings) -> str:
    """Errors and differences, as Markdown."""
    methods = [*IMPUTERS, OURS]
    rows: list[tuple[str, ...]] = [("table", *methods, f"{OURS} minus {REFERENCE}", "90 % intervals hold", "chosen")]
    for name, by in errors.items():
        paired = [ours - theirs for ours, theirs in zip(by[OURS], by[REFERENCE], strict=True)]
        cells = [f"{statistics.fmean(by[method]):.3f} +- {standard_error(by[method]):.3f}" for method in methods]
        difference = f"{statistics.fmean(paired):+.3f} +- {standard_error(paired):.3f}"
        held = f"{100 * statistics.fmean(coverage[name]):.0f} %"
        rows.append((name, *cells, difference, held, "; ".join(dict.fromkeys(chosen[name]))))
    return "\n".join(
        [
            f"Root mean squared error on hidden entries, {settings.missing:.0%} of all, in standard deviations of each "
            f"column; standard errors over {settings.num_draws} draws of what is hidden.",
            "",
            runs.table(rows),
        ]
    )


def plot(errors: Errors, path: Path) -> None:
    """A group of bars for each table."""
    methods = [*IMPUTERS, OURS]
    with figures.figure(path, 6.4, 3.4) as axes:
        for i, method in enumerate(methods):
            places = [j + (i - 1.5) * 0.2 for j in range(len(errors))]
            means = [statistics.fmean(by[method]) for by in errors.values()]
            spread = [standard_error(by[method]) or math.nan for by in errors.values()]
            axes.bar(places, means, 0.18, yerr=spread, capsize=2, label=method)
        axes.set_xticks(range(len(errors)), list(errors))
        axes.set(ylabel="error on hidden entries", title="Imputation")
        axes.legend(fontsize="small")


if __name__ == "__main__":
    cli.guarded(main)
