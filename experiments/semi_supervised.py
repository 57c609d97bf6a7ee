"""How far do a hundred labels go, if many more observations come without?

Usage: python -m experiments.semi_supervised [options]

As in Kingma, Rezende, Mohamed & Welling (2014), some labels, as many of each class, are drawn from the training images,
several times. The measure, fixed beforehand, is the error on all test images, with a standard error over draws of
labels, each with new weights; differences are paired by draw:

- labels alone: logistic regression on pixels, and a network;
- M1: a VAE trained on all training images without their labels, and logistic regression on its features E_q[z];
- M2: a VAE of image and class, trained on all training images and the few labels, unknown classes summed out. It has
  two answers: its classifier q(y | x), and Bayes' rule with p(x | y), by importance sampling.

Beside them log p(x) of the test images by M2, with the class summed out, and by M1's VAE. All have the same
observations, redrawn in each step where binarization is dynamic, and the same numbers of hidden units, steps and images
in a step. The default of alpha was chosen by the error on validation images, no other setting by any error.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyro
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from tqdm import tqdm

from pyro_vae import (
    ELBO,
    MLP,
    VAE,
    Bernoulli,
    CompiledSVI,
    Conditional,
    ConditionalVAE,
    MeanField,
    SemiSupervisedELBO,
    SemiSupervisedVAE,
    StandardNormal,
    class_posterior,
    cli,
    importance_sampling,
    runs,
)
from pyro_vae.data.fetched import Digits, cache_folder
from pyro_vae.data.images import Dataset, ImageData
from pyro_vae.infer.evidence.result import Evidence
from pyro_vae.infer.programs import Program
from pyro_vae.infer.trees import Data
from pyro_vae.runs import figures
from pyro_vae.runs.judge import classes
from pyro_vae.runs.summaries import standard_error


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison.

    Args:
        dataset: source of labelled images; binary observations only.
        data_dir: folder of data files and downloads; null: the user's cache folder.
        labels: of each class, at least 1.
        num_train: training images, with labels or without; null: all.
        num_draws: of the labels, at least 2.
        latent_dim: of z, at least 1.
        hidden: units of each network's hidden layer, at least 1.
        steps: of each training, 100 images without labels and up to 50 with them in each, at least 1.
        lr: peak learning rate of Adam, positive.
        alpha: the weight of classification is alpha N / M if M of N images have labels; the paper's is 0.1.
        num_samples: of z for each class, for log p(x) and p(y | x), at least 1.
        seed: of draws and trainings, at least 0.
        run_dir: directory to write, new or empty; null: one under runs/, named by data set and time.
    """

    dataset: Callable[[Path], Dataset] = Digits
    data_dir: Path | None = None
    labels: int = 10
    num_train: int | None = None
    num_draws: int = 5
    latent_dim: int = 8
    hidden: int = 64
    steps: int = 800
    lr: float = 3e-3
    alpha: float = 1.0
    num_samples: int = 100
    seed: int = 0
    run_dir: Path | None = None

    def __post_init__(self):
        for name, bound in {
            "labels": 1,
            "num_draws": 2,
            "latent_dim": 1,
            "hidden": 1,
            "steps": 1,
            "num_samples": 1,
        }.items():
            if (value := getattr(self, name)) < bound:
                raise ValueError(f"--{name} must be at least {bound}, got {value}")
        if self.num_train is not None and self.num_train < 1:
            raise ValueError(f"--num_train must be at least 1, got {self.num_train}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"--lr must be positive and finite, got {self.lr}")
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"--alpha must be at least 0 and finite, got {self.alpha}")
        runs.check_seed(self.seed)


LOGISTIC, NETWORK = "labels alone, logistic regression", "labels alone, network"
M1, M2, BAYES = "M1, logistic regression", "M2, q(y given x)", "M2, p(y given x)"
VAES, SUMMED = "M1's VAE", "M2, class summed out"
PAIRS = ((M2, M1), (M2, NETWORK), (M1, LOGISTIC), (BAYES, M2))
"""Compared by draw."""
Errors = dict[str, list[float]]
"""By method, one for each draw."""


class Images(NamedTuple):
    """What one draw of labels leaves.

    Attributes:
        data: all images.
        few: places of the training images with a label, ``(M,)``.
        others: places of those without, ``(N - M,)``.
        labels: of the former, ``(M,)``.
    """

    data: ImageData
    few: Tensor
    others: Tensor
    labels: Tensor

    def batch(self) -> tuple[Tensor, Tensor]:
        """Observations ``(B, X)`` and labels ``(B,)``: 100 images without one, -1, and up to 50 with one."""
        others = self.others[torch.randint(len(self.others), (100,))]
        told = torch.randperm(len(self.few))[:50]
        labels = torch.cat([torch.full((len(others),), -1), self.labels[told]])
        return self.data.observe(torch.cat([others, self.few[told]])), labels


def main(argv: Sequence[str] | None = None) -> Path:
    """Compare as told by ``argv``; return the directory written.

    Raises:
        RunError: for a mistake in ``argv``, or data without labels, with too few of a class, or not binary.
    """
    settings, text = runs.parse(Settings, argv)
    dataset = runs.make("dataset", settings.dataset, settings.data_dir or cache_folder())
    name = type(dataset).__name__
    run_dir = runs.run_dir_for(f"semi_supervised-{name}", settings.run_dir)
    runs.check_run_dir(run_dir, text, resume=None)
    data = runs.images_of(runs.load_dataset(dataset, torch.device("cpu")))
    if data.encoding != "binary":
        raise runs.RunError(f"--dataset.binarization {dataset.binarization}: binary observations are needed")
    size = min(settings.num_train or data.num_train, data.num_train)
    rarest = int(classes(data)[0][:size].bincount().min())
    if settings.labels > rarest:
        raise runs.RunError(f"--labels {settings.labels}: one class has only {rarest} of {size:,} training images")
    runs.open_run(run_dir, text, resume=None)
    errors: Errors = {}
    log_px: Errors = {}
    for draw in tqdm(range(settings.num_draws), desc="draws of labels", unit="draw"):
        measured, scored = study(settings, drawn(data, settings.labels, size, settings.seed + draw), draw)
        for method, error in measured.items():
            errors.setdefault(method, []).append(error)
        for model, value in scored.items():
            log_px.setdefault(model, []).append(value)
    with runs.writing(run_dir):
        plot(errors, run_dir / "errors.png")
    result = {"errors": errors, "log_px": log_px}
    return runs.conclude(run_dir, report(errors, log_px, settings, data), result, torch.device("cpu"))


def drawn(data: ImageData, labels: int, size: int, seed: int) -> Images:
    """Labels of each class, of the first ``size`` training images."""
    truth, _ = classes(data)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    few = torch.cat([order[truth[order] == each][:labels] for each in range(int(truth.max()) + 1)])
    return Images(data, few, order[~torch.isin(order, few)], truth[few])


def study(settings: Settings, images: Images, draw: int) -> tuple[dict[str, float], dict[str, float]]:
    """Errors of all methods on test images, and log p(x) of them by M1's VAE and by M2."""
    torch.manual_seed(settings.seed + draw)
    pyro.set_rng_seed(settings.seed + draw)
    data = images.data
    truth, test = classes(data)[1], data.test
    fixed = data.observe(images.few)
    errors = {LOGISTIC: linear(fixed, images.labels, test, truth)}
    network = train_network(settings, images)
    vae = train_m1(settings, images)
    m2 = train_m2(settings, images)
    with torch.no_grad():
        errors[NETWORK] = error(network(test), truth)
        errors[M1] = linear(vae.posterior(fixed).mean, images.labels, vae.posterior(test).mean, truth)
        errors[M2] = error(m2.classify(test), truth)
    conditional, every = m2.conditional, torch.eye(m2.num_classes)
    bayes = class_posterior(conditional.model, conditional.guide, test, every, estimate=by(settings.num_samples))
    errors[BAYES] = error(bayes.log_prob, truth)
    of_class = torch.stack([each.log_px for each in bayes.evidence])
    scored = {
        VAES: by(settings.num_samples * m2.num_classes)(vae.model, vae.guide, test).log_px.mean().item(),
        SUMMED: (of_class.logsumexp(0) - math.log(m2.num_classes)).mean().item(),
    }
    return errors, scored


def by(num_samples: int) -> Callable[[Program, Program, Data], Evidence]:
    """Importance sampling from the guide."""
    return lambda model, guide, data: importance_sampling(model, guide, data, num_samples, num_checked=0)


def train_network(settings: Settings, images: Images) -> nn.Module:
    """The classifier of M2, trained on the labels alone."""
    network = MLP(images.data.test.shape[1], int(images.labels.max()) + 1, hidden=[settings.hidden])
    optim, schedule = optimizer(network, settings)
    for _ in range(settings.steps):
        x, y = images.batch()
        optim.zero_grad()
        F.cross_entropy(network(x[y >= 0]), y[y >= 0]).backward()
        optim.step()
        schedule.step()
    return network


def train_m1(settings: Settings, images: Images) -> VAE:
    """A VAE of the images, without labels."""
    pixels, dim = images.data.test.shape[1], settings.latent_dim
    vae = VAE(
        StandardNormal(dim),
        Conditional(MLP(dim, pixels, hidden=[settings.hidden]), Bernoulli(pixels)),
        Conditional(MLP(pixels, 2 * dim, hidden=[settings.hidden]), MeanField(dim)),
    )
    vae.initialize(images.batch()[0])
    optim, schedule = optimizer(vae, settings)
    svi = CompiledSVI(vae.model, vae.guide, optim, ELBO(), compiler="none")
    for _ in range(settings.steps):
        svi.step(images.batch()[0])
        schedule.step()
    return vae.eval()


def train_m2(settings: Settings, images: Images) -> SemiSupervisedVAE:
    """A VAE of image and class, by equation 9 of the paper, divided by the number of images."""
    pixels, dim, count = images.data.test.shape[1], settings.latent_dim, int(images.labels.max()) + 1
    vae = SemiSupervisedVAE(
        ConditionalVAE(
            StandardNormal(dim),
            Conditional(MLP(dim + count, pixels, hidden=[settings.hidden]), Bernoulli(pixels)),
            Conditional(MLP(pixels + count, 2 * dim, hidden=[settings.hidden]), MeanField(dim)),
            condition_dim=count,
        ),
        MLP(pixels, count, hidden=[settings.hidden]),
    )
    vae.initialize(*images.batch())
    optim, schedule = optimizer(vae, settings)
    in_batch = (images.batch()[1] >= 0).sum().item()
    with_label, without = len(images.few) / in_batch, len(images.others) / 100  # how often each is used, relatively
    alpha = settings.alpha * (len(images.few) + len(images.others)) / len(images.few)
    loss = SemiSupervisedELBO(vae, alpha, known_weight=with_label / without)
    svi = CompiledSVI(vae.model, vae.guide, optim, loss, compiler="none")
    for _ in range(settings.steps):
        svi.step(*images.batch())
        schedule.step()
    return vae.eval()


def optimizer(
    module: nn.Module, settings: Settings
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.OneCycleLR]:
    """Adam, and its schedule."""
    optim = torch.optim.Adam(module.parameters(), settings.lr, fused=True)
    return optim, torch.optim.lr_scheduler.OneCycleLR(optim, settings.lr, total_steps=settings.steps)


def linear(x: Tensor, labels: Tensor, test: Tensor, truth: Tensor) -> float:
    """The error of logistic regression."""
    fitted = LogisticRegression(max_iter=1000).fit(x.numpy(), labels.numpy())
    return float((fitted.predict(test.numpy()) != truth.numpy()).mean())


def error(log_p: Tensor, truth: Tensor) -> float:
    """How often the most probable class is not the true one."""
    return (log_p.argmax(-1) != truth).float().mean().item()


def report(errors: Errors, log_px: Errors, settings: Settings, data: ImageData) -> str:
    """Errors and differences in per cent, log p(x) in nats, as Markdown."""
    rows = [("method", "error, per cent"), *((name, in_per_cent(each)) for name, each in errors.items())]
    pairs = [("the first", "minus the second", "per cent")]
    for name, other in PAIRS:
        pairs.append((name, other, in_per_cent(paired(errors[name], errors[other]), "+")))
    scores = [("model", "log p(x), nats"), *((name, with_error(each)) for name, each in log_px.items())]
    scores.append(("difference", with_error(paired(log_px[SUMMED], log_px[VAES]), "+")))
    return "\n".join(
        [
            f"{data.title}: errors on {len(data.test):,} test images, from {settings.labels} labels of each class; "
            f"standard errors over {settings.num_draws} draws of the labels.",
            "",
            runs.table(rows),
            "",
            "Differences, paired by draw:",
            "",
            runs.table(pairs),
            "",
            "log p(x) of the test images, by importance sampling:",
            "",
            runs.table(scores),
        ]
    )


def paired(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Differences by draw."""
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def in_per_cent(values: Sequence[float], sign: str = "") -> str:
    return with_error([100 * value for value in values], sign, 1)


def with_error(values: Sequence[float], sign: str = "", digits: int = 2) -> str:
    """A mean with its standard error."""
    return f"{statistics.fmean(values):{sign}.{digits}f} +- {standard_error(values) or math.nan:.{digits}f}"


def plot(errors: Errors, path: Path) -> None:
    """A bar for each method, a point for each draw."""
    with figures.figure(path, 6.4, 2.8) as axes:
        for place, (name, each) in enumerate(errors.items()):
            colour = f"C{('labels', 'M1', 'M2').index(name.split()[0].rstrip(','))}"
            axes.barh(place, 100 * statistics.fmean(each), color=colour, alpha=0.5)
            axes.plot([100 * value for value in each], [place] * len(each), ".", color=colour)
        axes.set_yticks(range(len(errors)), list(errors))
        axes.invert_yaxis()
        axes.set(xlabel="error on test images, per cent")


if __name__ == "__main__":
    cli.guarded(main)
