"""Does an encoder trained without labels make a good classifier from few of them?

Usage: python -m experiments.few_labels RUN_DIR [options]

RUN_DIR holds a finished run on labelled images; its decoder is dropped. Some labels of each class are drawn from the
training images, several times, and what is learned from them is scored on all test images. The measure, fixed before
anything was run, is the accuracy on test images, with a standard error over draws of the labels; each method on the
encoder's features is compared, paired by draw, with the same on other features, and fine-tuning with new weights:

- logistic regression, and k nearest neighbours (k = 5, or all labels of one class if there are fewer), on the encoder's
  features E_q[z], on as many principal components of all training images, and on pixels;
- the encoder's network, down to its raw outputs, with one more layer, all of it trained: from new weights, and,
  fine-tuned, from its own.

All see the same observations, as binarized as those that the encoder was trained on, and no setting was tuned.
"""

import copy
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from tqdm import tqdm

from pyro_vae import Network, cli, runs
from pyro_vae.data.images import ImageData
from pyro_vae.infer.programs import Program
from pyro_vae.runs import figures
from pyro_vae.runs.judge import classes
from pyro_vae.runs.kept import Kept, at_home, is_concluded
from pyro_vae.runs.summaries import standard_error


@dataclass(frozen=True)
class Settings:
    """Settings of one study of a run.

    Args:
        run: directory of a finished run on labelled images; may stand first, without --run.
        run_dir: directory to write, new or empty; null: few_labels in the run's directory.
        labels: of each class, each at least 1.
        num_draws: of the labels, at least 2.
        num_steps: of each training of a network, Adam at 0.001, at most 128 images each, at least 1.
        seed: of the draws and trainings, at least 0.
        device: auto takes a GPU if there is one.
        resume: go on with the interrupted study in --run_dir, with its settings.
    """

    run: Path
    run_dir: Path | None = None
    labels: Sequence[int] = (1, 5, 10, 50, 100)
    num_draws: int = 20
    num_steps: int = 200
    seed: int = 0
    device: str = "auto"
    resume: bool = False

    def __post_init__(self):
        runs.check_numbers("--labels", self.labels)
        for name, bound in {"num_draws": 2, "num_steps": 1}.items():
            if (value := getattr(self, name)) < bound:
                raise ValueError(f"--{name} must be at least {bound}, got {value}")
        runs.check_seed(self.seed)


FEATURES, COMPONENTS, PIXELS = "encoder's features", "principal components", "pixels"
LOGISTIC, NEIGHBOURS = "logistic regression", "nearest neighbours"
SCRATCH, FINE_TUNED = "network, new weights", "network, fine-tuned encoder"
PAIRS = [
    *((f"{FEATURES}, {how}", f"{what}, {how}") for how in (LOGISTIC, NEIGHBOURS) for what in (PIXELS, COMPONENTS)),
    (f"{FEATURES}, {LOGISTIC}", SCRATCH),
    (FINE_TUNED, SCRATCH),
    (FINE_TUNED, f"{PIXELS}, {LOGISTIC}"),
]
"""What the claim is about: that the first is better than the second."""
Accuracies = dict[str, dict[int, list[float]]]
"""By method and labels of each class, one for each draw."""


def main(argv: Sequence[str] | None = None) -> Path:
    """Classify as told by ``argv``; return the directory written.

    Raises:
        RunError: for a mistake in ``argv``, or a run on images without labels or with too few of some class.
    """
    settings, written = runs.parse(Settings, argv, first="run")
    run_dir = settings.run_dir or settings.run / "few_labels"
    if is_concluded(run_dir, written, settings.resume):
        return run_dir
    vae, data, device, _ = runs.open_finished(
        settings.run, run_dir, "few_labels", settings.device, settings.seed, settings.resume, may_be_deep=False
    )
    rarest = int(classes(data)[0].bincount().min())
    if max(settings.labels) > rarest:
        raise runs.RunError(f"--labels {max(settings.labels)}: one class has only {rarest} training images")
    x = data.observe(torch.arange(len(data.train_pixels), device=device))
    fresh = runs.build(runs.load_settings(settings.run), data.schema).to(device)
    networks = {SCRATCH: fresh.posterior.network, FINE_TUNED: vae.posterior.network}
    with torch.no_grad():
        see = cast(nn.Module, vae.posterior.inputs)  # as the network was trained to see images
        seen = see(x), see(data.test)
    with at_home(run_dir, written, settings.resume) as kept:
        spaces = representations(vae.guide, x, data.test)
        accuracies = study(settings, spaces, networks, seen, data, kept)
        return conclude(accuracies, settings, spaces, run_dir, device)


def conclude(
    accuracies: Accuracies,
    settings: Settings,
    spaces: dict[str, tuple[np.ndarray, np.ndarray]],
    run_dir: Path,
    device: torch.device,
) -> Path:
    """Write what was found; return the directory."""
    text = report(accuracies, settings, spaces)
    with runs.writing(run_dir):
        plot(accuracies, run_dir / "accuracy.png")
    result = {
        "accuracies": {name: {str(n): each for n, each in by.items()} for name, by in accuracies.items()},
        "differences": {
            f"{name} minus {other}": {str(n): against(accuracies, name, other, n) for n in settings.labels}
            for name, other in PAIRS
        },
        "settings": {name: getattr(settings, name) for name in ("labels", "num_draws", "num_steps", "seed")},
    }
    return runs.conclude(run_dir, text, result, device)


def representations(guide: Program, x: Tensor, test: Tensor) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Training and test images ``(N, X)`` as features, components and pixels: pairs of ``(N, F)``, by name."""
    features = encode(guide, x), encode(guide, test)
    flat = x.cpu().numpy(), test.cpu().numpy()
    components = PCA(min(features[0].shape[1], *flat[0].shape), random_state=0).fit(flat[0])
    return {
        FEATURES: features,
        COMPONENTS: (components.transform(flat[0]), components.transform(flat[1])),
        PIXELS: flat,
    }


def encode(guide: Program, x: Tensor) -> np.ndarray:
    """E_q[z] of images ``(N, X)``, all latent sites beside each other: ``(N, D)``."""
    parts = []
    for part in x.split(1000):
        sites = figures.posterior_mean(guide, part)
        parts.append(torch.cat([site.flatten(1) for site in sites.values()], dim=1).cpu())
    return torch.cat(parts).numpy()


def study(
    settings: Settings,
    spaces: dict[str, tuple[np.ndarray, np.ndarray]],
    networks: dict[str, Network],
    seen: tuple[Tensor, Tensor],
    data: ImageData,
    kept: Kept,
) -> Accuracies:
    """The accuracy of every method on test images, for every number of labels and every draw of them.

    ``seen`` are training and test images ``(N, X)`` as networks see them.
    """
    accuracies: Accuracies = {}
    generator = torch.Generator().manual_seed(settings.seed)
    about = {"data": data.fingerprint}
    for draw in tqdm(range(settings.num_draws), desc="draws of labels", unit="draw"):
        order = torch.randperm(len(classes(data)[0]), generator=generator)
        if (found := kept.tensors(f"draw{draw}", about)) is None:
            weights, right = one_draw(settings, order, spaces, networks, seen, data)
            kept.keep(f"draw{draw}", weights, right, about)
        else:
            _, right = found
        for name, number, accuracy in right:
            accuracies.setdefault(name, {}).setdefault(number, []).append(accuracy)
    return accuracies


def one_draw(
    settings: Settings,
    order: Tensor,
    spaces: dict[str, tuple[np.ndarray, np.ndarray]],
    networks: dict[str, Network],
    seen: tuple[Tensor, Tensor],
    data: ImageData,
) -> tuple[dict[str, Tensor], list[tuple[str, int, float]]]:
    """Weights of the networks trained on the first labels of each class in ``order``, and each method's accuracy."""
    x, test_images = seen
    train_labels, test_labels = classes(data)
    num_classes = int(train_labels.max()) + 1
    weights: dict[str, Tensor] = {}
    right: list[tuple[str, int, float]] = []

    def record(name: str, number: int, predicted: np.ndarray) -> None:
        right.append((name, number, float((predicted == test_labels.numpy()).mean())))

    for number in settings.labels:
        known = torch.cat([order[train_labels[order] == each][:number] for each in range(num_classes)])
        labels = train_labels[known]
        for space, (train, test) in spaces.items():
            for name, make in CLASSIFIERS.items():
                with warnings.catch_warnings():  # a thousand steps will do
                    warnings.simplefilter("ignore", ConvergenceWarning)
                    fitted = make(number).fit(train[known.numpy()], labels.numpy())
                record(f"{space}, {name}", number, fitted.predict(test))
        for name, network in networks.items():
            model = supervised(network, num_classes, x[known], labels.to(x.device), settings.num_steps)
            weights |= {f"{name}, {number} labels: {key}": value for key, value in model.state_dict().items()}
            with torch.no_grad():
                predicted = torch.cat([model(part).argmax(-1) for part in test_images.split(1000)])
            record(name, number, predicted.cpu().numpy())
    return weights, right


CLASSIFIERS: dict[str, Callable[[int], LogisticRegression | KNeighborsClassifier]] = {
    LOGISTIC: lambda number: LogisticRegression(max_iter=1000),
    NEIGHBOURS: lambda number: KNeighborsClassifier(min(5, number)),
}


def supervised(network: Network, num_classes: int, x: Tensor, labels: Tensor, num_steps: int) -> nn.Module:
    """A copy of an encoder's network with one more layer, trained on images ``(N, X)`` and labels ``(N,)``."""
    network = copy.deepcopy(network)
    model = nn.Sequential(network, nn.Linear(network.out_features, num_classes).to(x.device))
    optim = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    for _ in range(num_steps):
        few = torch.randint(len(x), (128,), device=x.device) if len(x) > 128 else slice(None)
        loss = F.cross_entropy(model(x[few]), labels[few])
        optim.zero_grad()
        loss.backward()
        optim.step()
    return model


def against(accuracies: Accuracies, name: str, other: str, number: int) -> tuple[float, float]:
    """Accuracy of a method minus that of another, paired by draw, and its standard error over draws."""
    pairs = zip(accuracies[name][number], accuracies[other][number], strict=True)
    differences = [ours - theirs for ours, theirs in pairs]
    return statistics.fmean(differences), _error(differences)


def _error(values: Sequence[float]) -> float:
    """The standard error of a mean, NaN of one number."""
    error = standard_error(values)
    return math.nan if error is None else error


def report(accuracies: Accuracies, settings: Settings, spaces: dict[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """Accuracies, and differences to the reference, in per cent, as Markdown."""
    header = "labels of each class", *map(str, settings.labels)
    rows: list[tuple[str, ...]] = [header]
    others = [("the first", "minus the second", *header[1:])]
    for name, by in accuracies.items():
        each = ((100 * statistics.fmean(by[n]), 100 * _error(by[n])) for n in settings.labels)
        rows.append((name, *(f"{mean:.1f} +- {error:.1f}" for mean, error in each)))
    for name, other in PAIRS:
        pairs = (against(accuracies, name, other, n) for n in settings.labels)
        others.append((name, other, *(f"{100 * mean:+.1f} +- {100 * error:.1f}" for mean, error in pairs)))
    dims = spaces[FEATURES][0].shape[1]
    return "\n".join(
        [
            f"Accuracy on {len(spaces[PIXELS][1]):,} test images, per cent, with standard errors over "
            f"{settings.num_draws} draws of the labels; {dims} features.",
            "",
            runs.table(rows),
            "",
            "Differences, paired by draw, for each number of labels of each class:",
            "",
            runs.table(others),
        ]
    )


def plot(accuracies: Accuracies, path: Path) -> None:
    """Accuracy against the number of labels; a colour for what is learned from, a line for how."""
    colours = {FEATURES: "C0", COMPONENTS: "C2", PIXELS: "C1", SCRATCH: "C3", FINE_TUNED: "C4"}
    with figures.figure(path, 7.2, 4.2) as axes:
        for name, by in accuracies.items():
            kind = name if name in colours else name.split(", ")[0]
            mean = [100 * statistics.fmean(each) for each in by.values()]
            error = [100 * (standard_error(each) or math.nan) for each in by.values()]
            style = {"ls": "--" if NEIGHBOURS in name else "-", "marker": "o", "markersize": 3, "capsize": 2}
            axes.errorbar(list(by), mean, error, color=colours[kind], label=name, **style)
        axes.set(xscale="log", xlabel="labels of each class", ylabel="accuracy on test images, per cent")
        axes.set_xticks(list(by), [str(number) for number in by])
        axes.minorticks_off()
        axes.legend(fontsize="small", loc="lower right")


if __name__ == "__main__":
    cli.guarded(main)
