"""Counts: what does a negative binomial likelihood gain over a Poisson, and an encoder that sees logarithms?

A matrix of 2,000 x 60 counts is made by a known process: two latent factors, means that they multiply, and a gamma
scatter around these, so that counts are over-dispersed and some exceed a thousand, as in documents and single cells,

    z ~ N(0, I),    x_j ~ NegativeBinomial(mean exp(a_j + w_j z), dispersion 2).

Its log p(x) is known by quadrature over z, and no model can have more on average. VAEs of two latent dimensions learn
1,800 rows; their log p(x) of the other 200 is by importance sampling from a Student-t at each posterior's mode. What
the encoder sees is log(1 + count) standardized, as :class:`pyro_vae.VAE` does it, or, as contenders, the counts divided
by the largest, or as they are.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from pyro_vae import (
    MLP,
    VAE,
    Conditional,
    Likelihood,
    MeanField,
    StandardNormal,
    cli,
    fit,
    importance_sampling,
    quadrature,
    runs,
)
from pyro_vae.parts.likelihoods import NegativeBinomial, Poisson
from pyro_vae.runs import figures
from pyro_vae.runs.summaries import standard_error

HEADS: dict[str, type[Likelihood]] = {"negative binomial": NegativeBinomial, "Poisson": Poisson}
SEEN = ("log(1 + count), standardized", "count / largest", "count")
MODELS = [("negative binomial", seen) for seen in SEEN] + [("Poisson", SEEN[0])]
LATENTS = 2


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison.

    Args:
        num_data: rows of the matrix, at least 20; a tenth of them is the test set.
        num_columns: at least 1.
        epochs: of each training, at least 1.
        num_seeds: trainings of each model, at least 2.
        seed: of the matrix and the trainings, at least 0.
        run_dir: directory to write, new or empty; null: one under runs/, named by time.
    """

    num_data: int = 2000
    num_columns: int = 60
    epochs: int = 30
    num_seeds: int = 3
    seed: int = 0
    run_dir: Path | None = None

    def __post_init__(self):
        for name, bound in {"num_data": 20, "num_columns": 1, "epochs": 1, "num_seeds": 2}.items():
            if (value := getattr(self, name)) < bound:
                raise ValueError(f"--{name} must be at least {bound}, got {value}")
        runs.check_seed(self.seed)


class Process(nn.Module):
    """The process that makes the counts, as a Pyro program.

    Args:
        num_columns: J.
    """

    dispersion = 2.0

    def __init__(self, num_columns: int):
        super().__init__()
        self.level = 1 + torch.randn(num_columns)
        self.weight = 0.7 * torch.randn(LATENTS, num_columns)

    def model(self, x: Tensor) -> None:
        """p(x, z) of counts ``(B, J)``."""
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENTS), 1.0).to_event(1))
            pyro.sample("x", self.counts(z), obs=x)

    def guide(self, x: Tensor) -> None:
        """The prior: quadrature takes only the sites of a guide."""
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(LATENTS), 1.0).to_event(1))

    def counts(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z)."""
        log_mean = self.level + z @ self.weight
        return dist.NegativeBinomial(self.dispersion, logits=log_mean - math.log(self.dispersion)).to_event(1)


class Measured(NamedTuple):
    """One model of one seed: log p(x) of each test row in nats, shape ``(N,)``; the standard error of their mean that
    is due to sampling; the share of rows whose number is to be trusted; and seconds of training."""

    log_px: Tensor
    mc_se: float
    reliable: float
    seconds: float


def main(argv: Sequence[str] | None = None) -> Path:
    """Compare as told by ``argv``; return the directory written.

    Raises:
        RunError: for a mistake in ``argv``.
    """
    settings, text = runs.parse(Settings, argv)
    run_dir = runs.run_dir_for("counts", settings.run_dir)
    runs.open_run(run_dir, text, resume=None)
    torch.manual_seed(settings.seed)
    process = Process(settings.num_columns)
    with torch.no_grad():
        x = process.counts(torch.randn(settings.num_data, LATENTS)).sample()
    train, test = x.split([settings.num_data - settings.num_data // 10, settings.num_data // 10])
    truth = quadrature(process.model, process.guide, test, num_points=1024)
    found: dict[tuple[str, str], list[Measured]] = {}
    each = [(*model, seed) for model in MODELS for seed in range(settings.num_seeds)]
    for head, seen, seed in tqdm(each, desc="trainings", unit="model"):
        torch.manual_seed(settings.seed + seed)
        vae = vae_of(HEADS[head](settings.num_columns), seen, train)
        found.setdefault((head, seen), []).append(measure(vae, settings.epochs, train, test))
    result = summarize(found, truth.log_px, x)
    with runs.writing(run_dir):
        plot(result, run_dir / "counts.png")
    return runs.conclude(run_dir, report(result, settings), result, torch.device("cpu"))


def measure(vae: VAE, epochs: int, train: Tensor, test: Tensor) -> Measured:
    """Train one model and score the test rows."""
    start = time.perf_counter()
    fit(vae, DataLoader(cast(Any, train), 100, shuffle=True), epochs=epochs, lr=5e-3, progress=False)
    seconds = time.perf_counter() - start
    evidence = importance_sampling(
        vae.model, vae.guide, test, 1000, proposal="laplace", df=5.0, compiled=False, num_checked=0
    )
    mc_se = evidence.mc_se.square().sum().sqrt().item() / len(test)
    reliable = cast(Tensor, evidence.reliable).double().mean().item()
    return Measured(evidence.log_px, mc_se, reliable, seconds)


def vae_of(head: Likelihood, seen: str, x: Tensor) -> VAE:
    """A VAE whose encoder sees the counts ``x``, shape ``(N, J)``, as told."""
    size = x.shape[1]
    vae = VAE(
        StandardNormal(LATENTS),
        Conditional(MLP(LATENTS, sum(head.sizes), hidden=[64, 64]), head),
        Conditional(MLP(size, 2 * LATENTS, hidden=[64, 64]), MeanField(LATENTS)),
    )
    if seen == SEEN[0]:
        vae.initialize(x)
        return vae
    vae.likelihood.initialize(x)  # the encoder is left as it is, but for this
    if seen == SEEN[1] and vae.posterior.inputs is not None:
        vae.posterior.inputs.load_state_dict(
            {
                "loc": torch.zeros(size),
                "scale": torch.full((size,), float(x.max())),
                "counts": torch.zeros(size, dtype=torch.bool),
            }
        )
    return vae


def summarize(found: dict[tuple[str, str], list[Measured]], truth: Tensor, x: Tensor) -> dict[str, Any]:
    """Means over test rows and seeds, and differences to the process, for the JSON file."""
    models = []
    for (head, seen), trained in found.items():
        means = [each.log_px.mean().item() for each in trained]
        below = (truth - torch.stack([each.log_px for each in trained]).mean(0)).double()
        models.append(
            {
                "likelihood": head,
                "encoder_sees": seen,
                "log_px": means,
                "mean": statistics.fmean(means),
                "se_over_seeds": standard_error(means),
                "below_the_process": below.mean().item(),
                "below_se": below.std().item() / math.sqrt(len(below)),
                "largest_mc_se": max(each.mc_se for each in trained),
                "reliable": statistics.fmean(each.reliable for each in trained),
                "seconds": statistics.fmean(each.seconds for each in trained),
            }
        )
    of_process = {"log_px": truth.mean().item(), "se": truth.std().item() / math.sqrt(len(truth))}
    return {"process": of_process, "largest_count": x.max().item(), "models": models}


def report(result: dict[str, Any], settings: Settings) -> str:
    """The table, as Markdown."""
    rows: list[tuple[str, ...]] = [("likelihood", "the encoder sees", "log p(x)", "below the process", "seconds")]
    rows.append(("the process itself", "-", f"{result['process']['log_px']:.2f}", "0.00", "-"))
    for model in result["models"]:
        mean, below = (
            f"{model[name]:.2f} +- {model[error]:.2f}"
            for name, error in (("mean", "se_over_seeds"), ("below_the_process", "below_se"))
        )
        rows.append((model["likelihood"], model["encoder_sees"], mean, below, f"{model['seconds']:.1f}"))
    mc_se = max(model["largest_mc_se"] for model in result["models"])
    reliable = min(model["reliable"] for model in result["models"])
    return "\n".join(
        [
            f"Mean log p(x) of {settings.num_data // 10} test rows of {settings.num_columns} counts, the largest of "
            f"all {result['largest_count']:.0f}, in nats per row, mass. Standard errors over {settings.num_seeds} "
            "seeds, and over rows of the mean difference to the process; those of importance sampling are at most "
            f"{mc_se:.3f}, with {reliable:.0%} of the rows to be trusted, or more.",
            "",
            runs.table(rows),
        ]
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """How far each model is below the process."""
    models = result["models"]
    with figures.figure(path, 6.4, 3.0) as axes:
        places = range(len(models))[::-1]
        below, errors = ([model[name] for model in models] for name in ("below_the_process", "below_se"))
        axes.barh(places, below, 0.6, xerr=errors, capsize=2)
        axes.set_yticks(places, [f"{model['likelihood']}, {model['encoder_sees']}" for model in models])
        axes.set(xscale="log", xlabel="nats per row below the process that made the counts", title="Counts")


if __name__ == "__main__":
    cli.guarded(main)
