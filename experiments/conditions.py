"""What does a VAE gain from being told the class, and how good a classifier does it make?

Two VAEs alike but for the label, which encoder and decoder of one of them are told, are trained on digits of 8 x 8
pixels (scikit-learn ships them). The numbers, fixed beforehand, all on the same test images, are

- log p(x) of the one, and log p(x given label) of the other: different quantities, never ranked against each other;
- log p(x) = log sum_c p(c) p(x given c) of the second, with the label summed out: this is the same quantity as that of
  the first, and their difference is paired by image;
- p(c given x) by Bayes' rule from the second: accuracy and log-loss of a classifier trained to generate, beside a
  logistic regression and a support-vector machine of scikit-learn, on the same binary pixels, at their defaults;
- log p(x given label) where labels are shuffled: what a wrong label costs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC
from torch import Tensor

from pyro_vae import MLP, annealed_importance_sampling, cli, runs
from pyro_vae.data.fetched import Digits
from pyro_vae.infer.evidence import Evidence
from pyro_vae.infer.trees import first_tensor, select
from pyro_vae.runs import figures


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison.

    Args:
        epochs: of each training, at least 1.
        latent_dim: dimensions of z, at least 1.
        num_images: test images, drawn at random, at least 2; null: all.
        seed: of trainings and estimates, at least 0.
        run_dir: directory to write, new or empty; null: one under runs/, named by time.
    """

    epochs: int = 60
    latent_dim: int = 8
    num_images: int | None = 300
    seed: int = 0
    run_dir: Path | None = None

    def __post_init__(self):
        for name in ("epochs", "latent_dim"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        if self.num_images is not None and self.num_images < 2:
            raise ValueError(f"--num_images must be at least 2, got {self.num_images}")
        runs.check_seed(self.seed)


class Mean(NamedTuple):
    """A mean over images, its Monte Carlo error (0: it is exact), and its standard error over images."""

    value: float
    mc_se: float
    se: float


def main(argv: Sequence[str] | None = None) -> Path:
    """Compare as told by ``argv``; return the directory written.

    Raises:
        RunError: for a mistake in ``argv``.
    """
    settings, text = runs.parse(Settings, argv)
    run_dir = runs.run_dir_for("conditions", settings.run_dir)
    runs.open_run(run_dir, text, resume=None)
    plain, told = (train(settings, condition, run_dir) for condition in (None, "label"))
    classified = runs.classify(told, num_images=settings.num_images, seed=settings.seed)
    likelihoods = score(settings, plain, told, classified)
    classifiers = classify(settings, told, classified)
    with runs.writing(run_dir):
        draw(told, run_dir / "samples.png")
    result = {"log_likelihood": likelihoods, "classifiers": classifiers, "num_images": classified.result["num_images"]}
    return runs.conclude(run_dir, report(likelihoods, classifiers, classified.result), result, torch.device("cpu"))


def train(settings: Settings, condition: str | None, run_dir: Path) -> runs.Run:
    """A finished run, told the condition or nothing."""
    return runs.train(
        runs.Settings(
            dataset=Digits,
            condition=condition,
            encoder=partial(MLP, hidden=(200,)),
            decoder=partial(MLP, hidden=(200,)),
            latent_dim=settings.latent_dim,
            epochs=settings.epochs,
            batch_size=64,
            seed=settings.seed,
            device="cpu",
            evidence=runs.EvidenceSettings(num_samples=100, annealed_images=0),
            run_dir=run_dir / ("told" if condition else "plain"),
        )
    )


def score(settings: Settings, plain: runs.Run, told: runs.Run, classified: runs.Classified) -> dict[str, Mean]:
    """Means over the same test images, nats."""
    prior = torch.tensor(classified.result["prior"])
    summed, summed_error = runs.without_class(classified.posterior, prior)
    (x, c), _ = runs.some_images(told.data, "test", settings.num_images)
    torch.manual_seed(settings.seed)
    alone = annealed_importance_sampling(plain.model.model, plain.model.guide, x, progress=True)
    given = annealed_importance_sampling(told.model.model, told.model.guide, (x, c), progress=True)
    wrong = select(c, torch.randperm(len(c)))
    shuffled = annealed_importance_sampling(told.model.model, told.model.guide, (x, wrong), progress=True)
    both = (alone.mc_se.double().square() + summed_error.square()).sqrt()
    return {
        "plain": of_evidence(alone),
        "told": of_evidence(given),
        "shuffled": of_evidence(shuffled),
        "summed": mean(summed, summed_error),
        "difference": mean(summed - alone.log_px.double(), both),
    }


def mean(values: Tensor, errors: Tensor) -> Mean:
    """Mean of values with errors of their own, ``(B,)`` each."""
    size = len(values)
    return Mean(values.mean().item(), errors.square().sum().sqrt().item() / size, values.std().item() / math.sqrt(size))


def of_evidence(evidence: Evidence) -> Mean:
    """The mean of log p(x) over data."""
    return mean(evidence.log_px.double(), evidence.mc_se.double())


def classify(settings: Settings, told: runs.Run, classified: runs.Classified) -> dict[str, dict[str, Any]]:
    """Right answers of each classifier, with errors; the generative one first."""
    data = told.data
    _, among = runs.some_images(data, "test", settings.num_images)
    assert data.train_labels is not None
    assert data.test_labels is not None
    torch.manual_seed(settings.seed)
    train = first_tensor(data.observe(torch.arange(data.num_train))).numpy()
    test, right = first_tensor(data.test)[among].numpy(), data.test_labels[among].numpy()
    hits = (classified.posterior.predicted.numpy() == right).astype(float)
    result = classified.result
    found = {
        "VAE told the label": {"accuracy": result["accuracy"], "se": result["accuracy_se"], "mc_se": result["mc_se"]}
    }
    found["VAE told the label"] |= {"log_loss": result["log_loss"], "log_loss_se": result["log_loss_se"]}
    for name, model in (("logistic regression", LogisticRegression(max_iter=2000)), ("support-vector machine", SVC())):
        model.fit(train, data.train_labels.numpy())
        theirs = np.equal(model.predict(test), right).astype(float)
        found[name] = {"accuracy": theirs.mean(), "se": _se(theirs), "difference": (hits - theirs).mean()}
        found[name]["difference_se"] = _se(hits - theirs)
        if isinstance(model, LogisticRegression):
            loss = -model.predict_log_proba(test)[np.arange(len(right)), np.searchsorted(model.classes_, right)]
            found[name] |= {"log_loss": loss.mean(), "log_loss_se": _se(loss)}
    return {name: {key: float(value) for key, value in row.items()} for name, row in found.items()}


def _se(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def draw(told: runs.Run, path: Path) -> None:
    """Means of p(x given z, label), a row for each label."""
    data = runs.images_of(told.data)
    (column,) = data.schema.condition
    classes = column.encode(torch.arange(len(column.values)))
    torch.manual_seed(0)
    images = data.picture(figures.samples_given(told.model.model, first_tensor(data.test), classes, 15))
    title = "Told the label: a row for each, z of the same noise in a column"
    figures.image_grid(images, data.image_shape, path, title, [str(value) for value in column.values])


ROWS = {
    "plain": ("VAE", "log p(x)", "mass of x"),
    "told": ("VAE told the label", "log p(x given label)", "mass of x given the label: another quantity"),
    "shuffled": ("VAE told a wrong label", "log p(x given another's label)", "labels shuffled among the images"),
    "summed": ("VAE told the label", "log p(x) = log sum p(c) p(x given c)", "mass of x: the label summed out"),
    "difference": ("the fourth minus the first", "log p(x)", "paired by image"),
}


def report(likelihoods: dict[str, Mean], classifiers: dict[str, dict[str, Any]], result: dict[str, Any]) -> str:
    """Both tables, as Markdown."""
    rows: list[tuple[str, ...]] = [
        ("model", "quantity", "nats per image", "Monte Carlo error", "error over images", "")
    ]
    for key, (model, quantity, remark) in ROWS.items():
        found = likelihoods[key]
        sign = "+" if key == "difference" else ""
        rows.append((model, quantity, f"{found.value:{sign}.3f}", f"{found.mc_se:.3f}", f"{found.se:.3f}", remark))
    table: list[tuple[str, ...]] = [("classifier", "accuracy", "VAE minus it, paired", "log-loss, nats")]
    for name, row in classifiers.items():
        difference = f"{row['difference']:+.3f} +- {row['difference_se']:.3f}" if "difference" in row else ""
        loss = f"{row['log_loss']:.3f} +- {row['log_loss_se']:.3f}" if "log_loss" in row else ""
        table.append((name, f"{row['accuracy']:.3f} +- {row['se']:.3f}", difference, loss))
    size = f"{result['num_images']:,} test images"
    return "\n".join(
        [
            f"Digits, binarized; {size}, annealed importance sampling. log p(x) and log p(x given label) are different "
            "quantities: only the first and the fourth line may be compared.",
            "",
            runs.table(rows),
            "",
            f"Classes of the same {size}; errors are over images. Monte Carlo error of the VAE's log-loss: "
            f"{result['mc_se']:.3f}; {result['share_undecided']:.1%} of its answers are within two errors of a tie.",
            "",
            runs.table(table),
        ]
    )


if __name__ == "__main__":
    cli.guarded(main)
