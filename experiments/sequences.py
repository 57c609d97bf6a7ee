"""How close do VAEs of sequences come to a process whose log p(x) is known, with which networks?

The sequences are of two numbers at each of up to 24 steps: noisy views of a state of two dimensions that turns, fades
and is pushed at random, a linear state-space model. Lengths are drawn from 8 to 24. A Kalman filter gives log p(x) of
the process itself, which no model exceeds in expectation; what a VAE falls short by is its divergence from the process.

All VAEs have the same latent dimensions, likelihood and training; encoder and decoder are affine, fully connected,
convolutional over time, or recurrent. log p(x) is annealed, and differences to the process are paired by sequence.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from pyro_vae import (
    MLP,
    VAE,
    Annealing,
    Conditional,
    Evidence,
    Incomplete,
    MeanField,
    StandardNormal,
    annealed_importance_sampling,
    cli,
    fit,
    runs,
)
from pyro_vae.data import SequenceData
from pyro_vae.data.sequences import entries_head
from pyro_vae.parts.networks import ConvDecoder, ConvEncoder, RecurrentDecoder, RecurrentEncoder
from pyro_vae.runs import figures

STEPS, FEATURES, SHORTEST = 24, 2, 8
NETWORKS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "affine": (partial(MLP, hidden=[]), partial(MLP, hidden=[])),
    "MLP": (partial(MLP, hidden=[100]), partial(MLP, hidden=[100])),
    "convolutional": (partial(ConvEncoder, channels=[32, 64]), partial(ConvDecoder, channels=[64, 32])),
    "recurrent": (
        partial(RecurrentEncoder, hidden=32, bidirectional=True),
        partial(RecurrentDecoder, hidden=32, bidirectional=True),
    ),
}
CHAINS = Annealing(num_checked=4)


class Process:
    """z_0 ~ N(0, I), z_t ~ N(A z_(t-1), q^2 I), x_t ~ N(b + C z_t, diag(r)^2): a state that turns once in 12 steps."""

    move = 0.97 * np.array(
        [[math.cos(math.pi / 6), -math.sin(math.pi / 6)], [math.sin(math.pi / 6), math.cos(math.pi / 6)]]
    )
    step = 0.15
    loc, show, noise = np.array([5.0, -20.0]), np.array([[1.0, 0.0], [6.0, 6.0]]), np.array([0.3, 3.0])

    def draw(self, size: int, generator: np.random.Generator) -> np.ndarray:
        """Sequences ``(size, T, F)`` with NaN behind their ends."""
        z, x = generator.normal(size=(size, 2)), []
        for t in range(STEPS):
            z = z @ self.move.T + self.step * generator.normal(size=z.shape) if t else z
            x.append(self.loc + z @ self.show.T + self.noise * generator.normal(size=(size, FEATURES)))
        lengths = generator.integers(SHORTEST, STEPS + 1, size)
        seen = np.arange(STEPS) < lengths[:, None]
        return np.where(seen[:, :, None], np.stack(x, 1), np.nan).astype(np.float32)

    def log_px(self, x: np.ndarray) -> np.ndarray:
        """log p(x) of each sequence, by a Kalman filter."""
        return np.array([self._filter(each[~np.isnan(each).any(1)].astype(float)) for each in x])

    def _filter(self, x: np.ndarray) -> float:
        mean, covariance, total = np.zeros(2), np.eye(2), 0.0
        for t, seen in enumerate(x):
            if t:
                mean = self.move @ mean
                covariance = self.move @ covariance @ self.move.T + self.step**2 * np.eye(2)
            predicted = self.show @ covariance @ self.show.T + np.diag(self.noise**2)
            off = seen - self.loc - self.show @ mean
            total += float(stats.multivariate_normal(cov=predicted).logpdf(off))
            gain = covariance @ self.show.T @ np.linalg.inv(predicted)
            mean, covariance = mean + gain @ off, covariance - gain @ self.show @ covariance
        return total


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison.

    Args:
        num_train: sequences to train on, at least 100; a tenth as many more are for validation.
        num_test: sequences that are scored, at least 2.
        latent_dim: dimensions of z, at least 1.
        epochs: of each training, at least 1.
        lr: learning rate, positive.
        seed: of sequences and trainings, at least 0.
        run_dir: directory to write, new or empty; null: one under runs/, named by time.
    """

    num_train: int = 2000
    num_test: int = 50
    latent_dim: int = 8
    epochs: int = 25
    lr: float = 1e-2
    seed: int = 0
    run_dir: Path | None = None

    def __post_init__(self):
        for name, bound in {"num_train": 100, "num_test": 2, "latent_dim": 1, "epochs": 1}.items():
            if (value := getattr(self, name)) < bound:
                raise ValueError(f"--{name} must be at least {bound}, got {value}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"--lr must be positive and finite, got {self.lr}")
        runs.check_seed(self.seed)


class Trained(NamedTuple):
    """A VAE, its number of parameters, its validation ELBO, the seconds it took, and log p(x) of the test sequences."""

    vae: VAE
    num_parameters: int
    validation_elbo: float
    seconds: float
    evidence: Evidence


def main(argv: Sequence[str] | None = None) -> Path:
    """Compare as told by ``argv``; return the directory written.

    Raises:
        RunError: for a mistake in ``argv``.
    """
    settings, text = runs.parse(Settings, argv)
    run_dir = runs.run_dir_for("sequences", settings.run_dir)
    runs.open_run(run_dir, text, resume=None)
    process, generator = Process(), np.random.default_rng(settings.seed)
    sizes = settings.num_train, settings.num_train // 10, settings.num_test
    parts = [process.draw(size, generator) for size in sizes]
    exact = torch.from_numpy(process.log_px(parts[2]))
    data = SequenceData(*parts, kind="real")
    trained = {name: train(name, data, settings) for name in NETWORKS}
    with runs.writing(run_dir):
        plot(trained, data, exact, run_dir)
    result = {"exact": exact.mean().item(), "networks": {name: numbers(each, exact) for name, each in trained.items()}}
    return runs.conclude(run_dir, report(result, data, settings), result, torch.device("cpu"))


def train(name: str, data: SequenceData, settings: Settings) -> Trained:
    """Train the VAE with these networks, and score the test sequences."""
    torch.manual_seed(settings.seed)
    encoder, decoder = NETWORKS[name]
    shape, size, dim = data.schema.shape, data.schema.size, settings.latent_dim
    head, tail = entries_head(data.schema), MeanField(dim)
    vae = VAE(
        StandardNormal(dim),
        Conditional(decoder(dim, sum(head.sizes), image_shape=shape), head),
        Conditional(Incomplete(encoder(2 * size, 2 * dim, image_shape=shape), size, features=shape[1]), tail),
    )
    vae.initialize(data.train)
    history = fit(vae, data.batches(100), data.validation, epochs=settings.epochs, lr=settings.lr)
    evidence = annealed_importance_sampling(vae.model, vae.guide, data.test, CHAINS, progress=True)
    seconds = sum(each.seconds for each in history)
    num_parameters = sum(p.numel() for p in vae.parameters())
    return Trained(vae, num_parameters, history[-1].validation_elbo, seconds, evidence)


def numbers(trained: Trained, exact: Tensor) -> dict[str, Any]:
    """What the table says of one VAE; the difference is to log p(x) of the process, with its error over sequences."""
    gap = trained.evidence.log_px.double().cpu() - exact
    log_p, _, monte_carlo = trained.evidence.mean()
    reliable = trained.evidence.reliable
    return {
        "log_px": log_p,
        "mc_se": monte_carlo,
        "difference": gap.mean().item(),
        "difference_se": gap.std().item() / math.sqrt(len(gap)),
        "reliable": None if reliable is None else reliable.double().mean().item(),
        "validation_elbo": trained.validation_elbo,
        "num_parameters": trained.num_parameters,
        "train_seconds": trained.seconds,
    }


def report(result: dict[str, Any], data: SequenceData, settings: Settings) -> str:
    """log p(x) and differences, as Markdown."""
    rows = [("networks", "parameters", "log p(x)", "minus the process's", "Monte Carlo", "training, seconds")]
    rows += [
        (
            name,
            f"{each['num_parameters']:,}",
            f"{each['log_px']:.2f}",
            f"{each['difference']:+.2f} +- {each['difference_se']:.2f}",
            f"{each['mc_se']:.3f}",
            f"{each['train_seconds']:.0f}",
        )
        for name, each in result["networks"].items()
    ]
    rows.append(("the process itself", "-", f"{result['exact']:.2f}", "0", "exact", "-"))
    mean = statistics.fmean(lengths(data.test))
    return "\n".join(
        [
            f"{settings.num_test} test sequences of {SHORTEST} to {STEPS} steps of {FEATURES} numbers, {mean:.1f} in "
            f"the mean; {settings.num_train:,} to train on; {settings.latent_dim} latent dimensions. Nats per "
            "sequence, a density in the units of x; errors of differences are over sequences.",
            "",
            runs.table(rows),
        ]
    )


def lengths(x: Tensor) -> list[int]:
    """Of flat sequences ``(N, T * F)``: how many steps were seen."""
    return (~x.isnan()).reshape(len(x), STEPS, FEATURES).any(2).sum(1).tolist()


def plot(trained: dict[str, Trained], data: SequenceData, exact: Tensor, run_dir: Path) -> None:
    """Differences by length; and two sequences, with what each VAE makes of them, beyond their ends too."""
    with figures.figure(run_dir / "differences.png", 5.4, 3.6) as axes:
        for name, each in trained.items():
            axes.plot(lengths(data.test), each.evidence.log_px.double().cpu() - exact, "o", ms=3, label=name)
        axes.axhline(0, color="0.4", lw=1)
        axes.set(xlabel="steps", ylabel="nats", title="log p(x) of VAEs, minus that of the process")
        axes.legend(fontsize="small")
    some = data.test[:3]
    with figures.figure(run_dir / "reconstructions.png", 9, 2.6, len(some), sharey=True) as row:
        for name, each in trained.items():
            means = figures.decode(each.vae.model, len(some), data.test, figures.posterior_mean(each.vae.guide, some))
            for axes, mean in zip(row, means.cpu(), strict=True):
                axes.plot(range(STEPS), mean[::FEATURES], lw=1.2, label=name)
        for axes, x in zip(row, some.cpu(), strict=True):
            axes.plot(range(STEPS), x[::FEATURES], "k.", ms=4)
            axes.set_xlabel("step")
        row[0].legend(fontsize="x-small")


if __name__ == "__main__":
    cli.guarded(main)
