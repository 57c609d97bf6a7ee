"""Do the hand-rolled ELBO and Pyro agree, like for like, and what does each cost?

Four contenders train the default VAE of experiments.svi_mnist: the ELBO by hand with a sampled and with a closed-form
KL divergence, and pyro.infer's Trace_ELBO and TraceMeanField_ELBO, which are the same two estimators. They start from
the same weights and take their steps side by side, on the same batches and the same noise, so that what is left
between a hand-rolled contender and its twin in Pyro is rounding. Compared are the value per image, the mean and
variance of the gradient, the training curves and the seconds per step. Numbers are in nats per image, larger is better.
"""

import contextlib
import copy
import itertools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pyro
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from tqdm import tqdm, trange

from pyro_vae import VAE, NonFiniteError, PyroSVI, check_program, cli, estimate_elbo, log_weights, runs
from pyro_vae.data.fetched import MNIST, cache_folder
from pyro_vae.data.images import Dataset, ImageData
from pyro_vae.errors import DataError
from pyro_vae.handrolled import elbo
from pyro_vae.infer.programs import find_non_finite
from pyro_vae.runs import figures


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison.

    Args:
        dataset: source of images; binary observations only.
        data_dir: folder of data files and downloads; null: the user's cache folder.
        seeds: training runs per contender, at least 1; from 2 on there are errors over seeds.
        epochs: passes over the training images, at least 1.
        batch_size: images per gradient step, at least 1; also those that value, gradient and time are measured on.
        lr: learning rate of Adam, constant, positive.
        gradient_samples: noise draws for the gradient's mean and variance, even, at least 4.
        test_samples: samples of z per test image for the final ELBO, at least 1.
        timing_steps: timed steps per contender, at least 2.
        device: auto takes a GPU if there is one.
        run_dir: directory to write, new or empty; null: one under runs/, named by data set and time.
    """

    dataset: Callable[[Path], Dataset] = MNIST
    data_dir: Path | None = None
    seeds: int = 5
    epochs: int = 3
    batch_size: int = 256
    lr: float = 2e-3
    gradient_samples: int = 200
    test_samples: int = 10
    timing_steps: int = 200
    device: str = "auto"
    run_dir: Path | None = None

    def __post_init__(self):
        least = {"seeds": 1, "epochs": 1, "batch_size": 1, "gradient_samples": 4, "test_samples": 1, "timing_steps": 2}
        for name, bound in least.items():
            if (value := getattr(self, name)) < bound:
                raise ValueError(f"--{name} must be at least {bound}, got {value}")
        if self.gradient_samples % 2:
            raise ValueError(f"--gradient_samples must be even, got {self.gradient_samples}")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"--lr must be positive and finite, got {self.lr}")


@dataclass(frozen=True)
class Contender:
    """One way to compute the ELBO: by hand, or by a loss of Pyro."""

    sampled_kl: bool
    pyro_loss: type[Trace_ELBO] | None = None

    def loss(self, vae: VAE, x: Tensor) -> Tensor:
        """Minus the one-sample ELBO, summed over observations ``(B, X)``: a scalar to differentiate, in nats."""
        if self.pyro_loss:
            return self.pyro_loss().differentiable_loss(vae.model, vae.guide, x)
        return -by_hand(vae, x, self.sampled_kl).sum()

    def value(self, vae: VAE, x: Tensor) -> float:
        """The one-sample ELBO, summed over observations ``(B, X)``, as it is evaluated without gradients, in nats."""
        with torch.no_grad():
            if self.pyro_loss:
                return -self.pyro_loss().loss(vae.model, vae.guide, x)
            return by_hand(vae, x, self.sampled_kl).sum().item()

    def stepper(self, vae: VAE, lr: float) -> Callable[[Tensor], Tensor | float]:
        """A function that takes one step of Adam on observations ``(B, X)`` and returns the loss: a sum, in nats."""
        optim = torch.optim.Adam(vae.parameters(), lr=lr)
        if self.pyro_loss:
            return PyroSVI(vae.model, vae.guide, optim, self.pyro_loss()).step

        def step(x: Tensor) -> Tensor:
            loss = self.loss(vae, x)
            optim.zero_grad()
            loss.backward()
            optim.step()
            return loss.detach()

        return step


SAMPLED, CLOSED = "by hand, sampled KL", "by hand, closed-form KL"
TRACE, MEAN_FIELD = "Trace_ELBO", "TraceMeanField_ELBO"
CONTENDERS = {
    SAMPLED: Contender(sampled_kl=True),
    CLOSED: Contender(sampled_kl=False),
    TRACE: Contender(sampled_kl=True, pyro_loss=Trace_ELBO),
    MEAN_FIELD: Contender(sampled_kl=False, pyro_loss=TraceMeanField_ELBO),
}
TWINS = {TRACE: SAMPLED, MEAN_FIELD: CLOSED}
CLOSED_AND_SAMPLED = {CLOSED: SAMPLED, MEAN_FIELD: TRACE}
UNVALIDATED = ", no validation"
PAIRS = [(CLOSED, SAMPLED), (TRACE, SAMPLED), (MEAN_FIELD, SAMPLED), (MEAN_FIELD, CLOSED)]
LINES = {
    SAMPLED: {"color": "C0", "linewidth": 3, "alpha": 0.5},
    CLOSED: {"color": "C3", "linewidth": 3, "alpha": 0.5},
    TRACE: {"color": "C0", "linewidth": 1.2, "linestyle": "--"},
    MEAN_FIELD: {"color": "C3", "linewidth": 1.2, "linestyle": "--"},
}
WARM_UP = 20
STEP_NOISE, GRADIENT_NOISE, VALUE_NOISE, EVALUATION_NOISE = (k * 10**12 for k in range(1, 5))
"""Where each use of noise starts to count its seeds."""
Estimate = tuple[float, float | None]
"""A number and its standard error, which one observation alone does not have."""
Table = tuple[str, list[tuple[str, ...]]]
"""A line on what the table says, and its rows, the header first."""


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the comparison as told by ``argv``; return the run directory.

    Raises:
        RunError: for a mistake in ``argv`` or in what it points to.
    """
    settings, text = runs.parse(Settings, argv)
    device = runs.choose_device(settings.device)
    try:
        dataset = settings.dataset(settings.data_dir or cache_folder())
        data = dataset.load(device)
        untrained = initial_vae(data, seed=0)
        check_program(untrained.model, untrained.guide, data.test)
    except (DataError, ValueError, TypeError) as error:
        raise runs.RunError(" ".join(str(error).split())) from error
    name = type(dataset).__name__
    run_dir = runs.run_dir_for(f"elbo_comparison-{name}", settings.run_dir)
    runs.open_run(run_dir, text, resume=None)
    print(f"{name} on {device}: {settings.seeds} seeds, {settings.epochs} epochs, run directory {run_dir}")

    start = time.perf_counter()
    training = train(settings, data)
    with noise(VALUE_NOISE, device):
        x = data.observe(torch.arange(min(settings.batch_size, len(data.train_pixels)), device=device))
    stages = {"before training": untrained, "after training": training.vae}
    result = {
        "unit": "nats per image, mass",
        "values": compare_values(training.vae, data.test[: settings.batch_size]),
        "gradients": {stage: compare_gradients(v, x, settings.gradient_samples, stage) for stage, v in stages.items()},
        "training": summarize_training(training),
        "seconds_per_step": summarize_times(time_steps(training.vae, x, settings.lr, settings.timing_steps)),
        "dataset": name,
        "batch_size": len(x),
        "train_size": len(data.train_pixels),
        "test_size": len(data.test),
        "num_parameters": sum(p.numel() for p in training.vae.parameters()),
        "total_seconds": time.perf_counter() - start,
        **runs.provenance(device),
    }
    with runs.writing(run_dir):
        plot_curves(training, run_dir / "curves.png")
        plot_gradient_noise(result["gradients"], run_dir / "gradient_variance.png")
    return runs.conclude(run_dir, report(result), result, device)


def by_hand(vae: VAE, x: Tensor, sampled_kl: bool) -> Tensor:
    """The hand-rolled one-sample ELBO of observations ``(B, X)``: shape ``(B,)``, nats per image."""
    return elbo(vae.posterior.network, vae.likelihood.network, x, sampled_kl=sampled_kl)


def initial_vae(data: ImageData, seed: int) -> VAE:
    """The untrained VAE of ``seed``: the default one of svi_mnist, for the images of ``data``, on their device."""
    device = data.train_pixels.device
    with noise(seed, device):
        vae = cast(VAE, runs.build(runs.Settings(), data.schema)).to(device)
        vae.initialize(data.observe(torch.arange(len(data.train_pixels), device=device)))
    return vae


@contextlib.contextmanager
def noise(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers inside are those of ``seed``; outside, where data are shuffled and binarized, they go on."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


# Value per image


def compare_values(vae: VAE, x: Tensor) -> dict[str, dict[str, Any]]:
    """Differences between the ELBO by Pyro and by hand, for the same weights, observations ``(B, X)`` and noise.

    Returns:
        For ``float32`` and ``float64``: the ELBO per image, the largest difference of the latents (0 if the noise is
        the same indeed), and for each comparison the ``largest`` and ``mean`` absolute difference over images, in nats
        per image, and the ``largest_relative`` one.
    """
    result = {}
    for dtype in (torch.float32, torch.float64):
        cast, y = copy.deepcopy(vae).to(dtype), x.to(dtype)
        total = {name: _with_noise(0, y, contender.value, cast) / len(y) for name, contender in CONTENDERS.items()}
        result[str(dtype).removeprefix("torch.")] = {
            "elbo": total,
            "latents": latent_difference(cast, y),
            "log_weights, a batch": log_weight_difference(cast, y),
            **{f"{name}, image by image": image_by_image(cast, y, name, twin) for name, twin in TWINS.items()},
            **{f"{name}, a batch's mean": difference(total[name], total[twin]) for name, twin in TWINS.items()},
        }
    return result


def _with_noise(index: int, x: Tensor, function: Callable[[VAE, Tensor], Any], vae: VAE) -> Any:
    with noise(VALUE_NOISE + index, x.device):
        return function(vae, x)


def latent_difference(vae: VAE, x: Tensor) -> float:
    """The largest difference between Pyro's z ~ q(z | x) and mu + sigma * torch.randn_like(mu), for the same seed."""

    def draw(vae: VAE, x: Tensor) -> Tensor:
        loc, log_scale = vae.posterior.network(x).chunk(2, dim=-1)
        return loc + log_scale.exp() * torch.randn_like(loc)

    with torch.no_grad():
        ours, theirs = (_with_noise(0, x, function, vae) for function in (draw, VAE.guide))
    return (ours - theirs).abs().max().item()


def log_weight_difference(vae: VAE, x: Tensor) -> dict[str, float]:
    """Per image of a batch ``(B, X)``: what pyro_vae reduces from Pyro's traces, against the sampled KL by hand."""
    with torch.no_grad():
        theirs = _with_noise(0, x, lambda vae, x: log_weights(vae.model, vae.guide, x, 1)[0], vae)
        ours = _with_noise(0, x, lambda vae, x: by_hand(vae, x, sampled_kl=True), vae)
    return difference(theirs.cpu().numpy(), ours.cpu().numpy())


def image_by_image(vae: VAE, x: Tensor, name: str, twin: str) -> dict[str, float]:
    """Pyro gives a batch one number, so that its value per image is that of batches of one: contender against twin."""
    values = [
        [_with_noise(index, image, CONTENDERS[each].value, vae) for index, image in enumerate(x.split(1))]
        for each in (name, twin)
    ]
    return difference(*np.array(values))


def difference(first: np.ndarray | float, second: np.ndarray | float) -> dict[str, float]:
    """Largest, mean and largest relative absolute difference of two arrays of the same shape."""
    distance = np.abs(first - second)
    return {
        "largest": float(distance.max()),
        "mean": float(distance.mean()),
        "largest_relative": float((distance / np.abs(second)).max()),
    }


# Gradient


class MeanDifference:
    """Whether two estimators have the same mean, from the differences of their values for the same noise.

    Fed with independent pairs of such differences, vectors ``(P,)``, so that nothing needs to be stored: half the
    squared distance of a pair estimates the variance, summed over P, without bias.
    """

    def __init__(self):
        self.total: Any = 0.0
        self.variances: list[float] = []
        self.squares: list[float] = []
        self._previous: Tensor | None = None

    def add(self, first: Tensor, second: Tensor) -> None:
        """Add one pair of differences, ``(P,)`` each."""
        self.total = self.total + first + second
        spread = first - second
        self.variances.append(0.5 * spread.square().sum().item())
        if self._previous is not None:
            self.squares.append((spread @ self._previous).item() ** 2 / 4)  # estimates tr(covariance^2)
        self._previous = spread

    def in_standard_errors(self) -> tuple[float, float]:
        """Length of the mean difference over its standard error, the root of the summed squared ones: about 1 if the
        means are equal; and the standard deviation that it has then, from a chi-square approximation."""
        variance = statistics.fmean(self.variances)
        mean_square = self.total.square().sum().item() / (2 * len(self.variances))
        return (mean_square / variance) ** 0.5, (statistics.fmean(self.squares) / 2) ** 0.5 / variance


def compare_gradients(vae: VAE, x: Tensor, num_samples: int, title: str) -> dict[str, Any]:
    """Mean and variance of each contender's gradient of the mean ELBO of a batch ``(B, X)``, over noise alone.

    Noise draws come in independent pairs (g, g'): |g - g'|^2 / 2 estimates the variance, summed over parameters, and
    g.g' the squared norm of the mean gradient, both without bias and with a standard error over pairs.

    Returns:
        For ``encoder`` and ``decoder``: ``noise_to_signal``, variance over squared norm of the mean gradient;
        ``variance_ratio`` to the sampled KL by hand, for the same noise; ``norm`` of the mean gradient, in nats per
        image and unit of parameter; ``largest_relative_difference`` of the gradient of a draw to that of the twin. And
        ``mean_difference`` of closed-form and sampled KL in the encoder: see ``MeanDifference.in_standard_errors``.
    """
    parts: dict[str, list[Tensor]] = {
        "encoder": list(vae.posterior.parameters()),
        "decoder": list(vae.likelihood.parameters()),
    }
    variances, signals = defaultdict(list), defaultdict(list)
    relative = defaultdict(float)
    means = {name: MeanDifference() for name in CLOSED_AND_SAMPLED}
    for pair in trange(num_samples // 2, desc=f"gradients {title}", unit="pair"):
        draws = [{name: gradient(c, vae, x, parts, 2 * pair + i) for name, c in CONTENDERS.items()} for i in (0, 1)]
        for part in parts:
            for name in CONTENDERS:
                first, second = (draw[name][part] for draw in draws)
                variances[part, name].append(0.5 * (first - second).square().sum().item())
                signals[part, name].append((first @ second).item())
            for name, twin in TWINS.items():
                for draw in draws:
                    distance = (draw[name][part] - draw[twin][part]).norm() / draw[twin][part].norm()
                    relative[part, name] = max(relative[part, name], distance.item())
        for closed, sampled in CLOSED_AND_SAMPLED.items():
            means[closed].add(*(draw[closed]["encoder"] - draw[sampled]["encoder"] for draw in draws))

    result: dict[str, Any] = {
        part: {
            "noise_to_signal": {name: ratio(variances[part, name], signals[part, name]) for name in CONTENDERS},
            "variance_ratio": {name: ratio(variances[part, name], variances[part, SAMPLED]) for name in CONTENDERS},
            "norm": {name: max(0.0, statistics.fmean(signals[part, name])) ** 0.5 for name in CONTENDERS},
            "largest_relative_difference": {name: relative[part, name] for name in TWINS},
        }
        for part in parts
    }
    return result | {"mean_difference": {name: each.in_standard_errors() for name, each in means.items()}}


def gradient(
    contender: Contender, vae: VAE, x: Tensor, parts: dict[str, list[Tensor]], index: int
) -> dict[str, Tensor]:
    """The gradient of the loss per image for noise number ``index``: for each part one flat float64 vector."""
    with noise(GRADIENT_NOISE + index, x.device):
        loss = contender.loss(vae, x) / len(x)
    grads = iter(torch.autograd.grad(loss, [p for group in parts.values() for p in group]))
    return {part: torch.cat([next(grads).flatten() for _ in group]).double() for part, group in parts.items()}


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """The ratio of two means over the same independent draws, with its standard error by the delta method.

    >>> ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    (0.5, 0.0)
    """
    above, below = np.array(numerators), np.array(denominators)
    value = above.mean() / below.mean()
    return float(value), float((above - value * below).std(ddof=1) / len(above) ** 0.5 / abs(below.mean()))


# Training


class Training(NamedTuple):
    """Curves and results of all seeds, in nats per image, and one trained VAE.

    Attributes:
        validation: validation ELBO by contender, ``(seeds, epochs)``.
        test: final test ELBO by contender, ``(seeds,)``.
        weights: distance of the final weights to those of the twin, relative to their norm, by Pyro contender,
            ``(seeds,)``.
        vae: as the sampled KL by hand has trained it, for the first seed.
    """

    validation: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    vae: VAE


def train(settings: Settings, data: ImageData) -> Training:
    """Train every contender for every seed, side by side.

    Raises:
        NonFiniteError: if training meets a NaN or an infinity.
    """
    num_steps = settings.seeds * settings.epochs * len(data.batches(settings.batch_size))
    with tqdm(total=num_steps, desc="training", unit="step") as bar:
        *curves, vaes = zip(*(train_seed(settings, data, seed, bar) for seed in range(settings.seeds)), strict=True)
    stacked = [{name: np.array([e[name] for e in each]) for name in each[0]} for each in curves]
    validation, test, weights = stacked
    return Training(validation, test, weights, vaes[0])


def train_seed(settings: Settings, data: ImageData, seed: int, bar: tqdm) -> tuple[dict, dict, dict, VAE]:
    """One seed of :func:`train`: the fields of a Training, without their dimension of seeds."""
    device = data.train_pixels.device
    start = initial_vae(data, seed)
    vaes = {name: copy.deepcopy(start) for name in CONTENDERS}
    steppers = {name: contender.stepper(vaes[name], settings.lr) for name, contender in CONTENDERS.items()}
    validation = {name: [] for name in CONTENDERS}
    step_noise = itertools.count(STEP_NOISE + 10**7 * seed)
    torch.manual_seed(seed)  # of the order of the data and of their binarization
    for _ in range(settings.epochs):
        for x in data.batches(settings.batch_size):
            index = next(step_noise)
            for name, step in steppers.items():
                with noise(index, device):
                    take_step(step, vaes[name], x, name)
            bar.update()
        for name, vae in vaes.items():
            validation[name].append(evaluate(vae, data.validation, num_samples=1))
        bar.set_postfix(seed=seed, validation=f"{validation[SAMPLED][-1]:.2f}")
    test = {name: evaluate(vae, data.test, settings.test_samples) for name, vae in vaes.items()}
    flat = {name: parameters_to_vector(vae.parameters()).detach().double() for name, vae in vaes.items()}
    weights = {name: ((flat[name] - flat[twin]).norm() / flat[twin].norm()).item() for name, twin in TWINS.items()}
    return validation, test, weights, vaes[SAMPLED]


def take_step(step: Callable[[Tensor], object], vae: VAE, x: Tensor, name: str) -> None:
    """One training step; where Pyro meets a NaN, or its validation refuses one, say whose step and which site.

    Raises:
        NonFiniteError: in these cases.
    """
    try:
        step(x)
    except (NonFiniteError, ValueError) as error:
        site = find_non_finite(vae.model, vae.guide, x)
        if site is None and not isinstance(error, NonFiniteError):
            raise
        place = f"{site} is NaN or infinite" if site else error
        raise NonFiniteError(f"{name}: {place}; a smaller --lr may help") from error


def evaluate(vae: VAE, x: Tensor, num_samples: int) -> float:
    """The ELBO of observations ``(N, X)``, nats per image: for all contenders the same estimator and noise.

    Raises:
        NonFiniteError: if it is NaN or infinite.
    """
    with noise(EVALUATION_NOISE, x.device):
        value = estimate_elbo(vae.model, vae.guide, x, num_samples).double().mean().item()
    if not np.isfinite(value):
        raise NonFiniteError(f"the ELBO after an epoch is {value}; a smaller --lr may help")
    return value


def mean_and_error(values: np.ndarray) -> Estimate:
    """The mean over seeds with its standard error, which one seed alone does not have."""
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return float(values.mean()), error


def summarize_training(training: Training) -> dict[str, Any]:
    """Means over seeds with standard errors, paired differences, and the curves themselves."""
    return {
        "test_elbo": {name: mean_and_error(values) for name, values in training.test.items()},
        "test_difference": [
            {
                "contender": name,
                "minus": other,
                "difference": mean_and_error(training.test[name] - training.test[other]),
                "largest": float(np.abs(training.test[name] - training.test[other]).max()),
            }
            for name, other in PAIRS
        ],
        "largest_distance_of_weights": {name: float(values.max()) for name, values in training.weights.items()},
        "test_elbo_by_seed": {name: values.tolist() for name, values in training.test.items()},
        "validation_elbo_by_seed_and_epoch": {name: values.tolist() for name, values in training.validation.items()},
    }


# Seconds per step


def time_steps(vae: VAE, x: Tensor, lr: float, num_steps: int) -> dict[str, np.ndarray]:
    """Seconds of training steps on observations ``(B, X)``: by contender, ``(num_steps,)``.

    The contenders take turns in a new random order each round, so that what else the machine does hits all alike.
    Pyro's also run with its validation off, which it is not by default.
    """
    variants = [(name, name, True) for name in CONTENDERS] + [(name + UNVALIDATED, name, False) for name in TWINS]
    steppers = {label: CONTENDERS[name].stepper(copy.deepcopy(vae), lr) for label, name, _ in variants}
    seconds = {label: [] for label in steppers}
    order = np.random.default_rng(0)
    for _ in trange(WARM_UP + num_steps, desc="timing", unit="round"):
        for index in order.permutation(len(variants)):
            label, _, validation = variants[index]
            with pyro.validation_enabled(validation):
                seconds[label].append(_seconds(steppers[label], x))
    return {label: np.array(values[WARM_UP:]) for label, values in seconds.items()}


def _seconds(step: Callable[[Tensor], object], x: Tensor) -> float:
    synchronize = partial(torch.cuda.synchronize, x.device) if x.device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    step(x)
    synchronize()
    return time.perf_counter() - start


def summarize_times(seconds: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Median and quartiles of the seconds of each contender, and its median over that of the sampled KL by hand."""
    quartiles = {name: np.quantile(values, (0.25, 0.5, 0.75)).tolist() for name, values in seconds.items()}
    return {
        name: {"median": median, "lower_quartile": low, "upper_quartile": high, "ratio": median / quartiles[SAMPLED][1]}
        for name, (low, median, high) in quartiles.items()
    }


# Tables and figures


def report(result: dict[str, Any]) -> str:
    """All tables as Markdown, each with a line on what it says."""
    tables = {
        "Value per image": _value_table,
        "Variance of the gradient": _variance_table,
        "Agreement of the gradients": _agreement_table,
        "Training": _test_table,
        "Paired differences of the test ELBO": _paired_table,
        "Seconds per step": _time_table,
    }
    parts = []
    for title, make in tables.items():
        line, rows = make(result)
        parts.append(f"## {title}\n\n{line}\n\n{runs.table(rows)}")
    return "\n\n".join(parts)


def _value_table(result: dict[str, Any]) -> Table:
    values = result["values"]
    comparisons = [key for key in values["float32"] if key not in ("elbo", "latents")]
    worst = {dtype: max(values[dtype][key]["largest"] for key in comparisons) for dtype in values}
    latents = max(each["latents"] for each in values.values())
    line = (
        f"For the same weights, images and seed, Pyro and its twin by hand differ by at most {worst['float32']:.1e} "
        f"nats per image in float32 and {worst['float64']:.1e} in float64, of an ELBO of "
        f"{values['float32']['elbo'][SAMPLED]:.1f}. Their latents differ by at most {latents:.1g}."
    )
    header = ("Pyro against its twin", "precision", "largest difference", "mean", "largest relative")
    return line, [header] + [
        (key, dtype, *(f"{values[dtype][key][number]:.1e}" for number in ("largest", "mean", "largest_relative")))
        for key in comparisons
        for dtype in values
    ]


def _variance_table(result: dict[str, Any]) -> Table:
    stages = result["gradients"]
    ratios = [f"{_pm(each['encoder']['variance_ratio'][CLOSED])} {stage}" for stage, each in stages.items()]
    line = (
        "Variance over noise of a batch's gradient, summed over parameters, over the squared norm of its mean; and its "
        "ratio to that of the sampled KL by hand. In the encoder the closed form has the fraction "
        f"{' and '.join(ratios)}; the decoder does not see the KL."
    )
    columns = [(part, what) for part in ("encoder", "decoder") for what in ("noise_to_signal", "variance_ratio")]
    header = ("weights", "contender", "encoder", "encoder, ratio", "decoder", "decoder, ratio")
    return line, [header] + [
        (stage, name, *(_pm(each[part][what][name]) for part, what in columns))
        for stage, each in stages.items()
        for name in CONTENDERS
    ]


def _agreement_table(result: dict[str, Any]) -> Table:
    line = (
        "For the same noise, Pyro's gradient is its twin's up to the relative differences below, the largest of all "
        "draws. The mean gradients of closed-form and sampled KL, if equal, are about 1 standard error apart; the "
        "number after ± is how far from 1 chance takes it."
    )
    rows: list[tuple[str, ...]] = [("weights", "comparison", "encoder", "decoder", "standard errors between means")]
    for stage, each in result["gradients"].items():
        for name, twin in TWINS.items():
            relative = (f"{each[part]['largest_relative_difference'][name]:.1e}" for part in ("encoder", "decoder"))
            rows.append((stage, f"{name} - {twin}", *relative, ""))
        for closed, sampled in CLOSED_AND_SAMPLED.items():
            rows.append((stage, f"{closed} - {sampled}", "", "", _pm(each["mean_difference"][closed])))
    return line, rows


def _test_table(result: dict[str, Any]) -> Table:
    distances = result["training"]["largest_distance_of_weights"]
    line = (
        "Test ELBO after training, nats per image, mean over seeds ± standard error. Fed with the same batches and "
        f"noise, {TRACE} ends with its twin's weights but for {distances[TRACE]:.1e} of their norm, {MEAN_FIELD} but "
        f"for {distances[MEAN_FIELD]:.1e} (the largest over seeds)."
    )
    elbos = result["training"]["test_elbo"].items()
    return line, [("contender", "test ELBO"), *((name, _pm(value)) for name, value in elbos)]


def _paired_table(result: dict[str, Any]) -> Table:
    line = (
        "For the same seed, nats per image: what the choice of KL estimator changes, beside what remains between Pyro "
        "and its twin, where only rounding differs."
    )
    header = ("difference", "mean", "standard error", "largest over seeds")
    return line, [header] + [
        (
            f"{each['contender']} - {each['minus']}",
            *("-" if number is None else f"{number:.2g}" for number in (*each["difference"], each["largest"])),
        )
        for each in result["training"]["test_difference"]
    ]


def _time_table(result: dict[str, Any]) -> Table:
    times = result["seconds_per_step"]
    line = (
        f"A training step on {result['batch_size']} images, milliseconds, in turns on {result['device']}: {TRACE} "
        f"takes {times[TRACE]['ratio']:.2f} times as long as its twin by hand, and with Pyro's validation off "
        f"{times[TRACE + UNVALIDATED]['ratio']:.2f} times. The step is that of PyroSVI, "
        "which also registers the parameters and checks that the gradient is finite."
    )
    names = ("median", "lower_quartile", "upper_quartile")
    return line, [("contender", "median", "lower quartile", "upper quartile", "ratio of medians")] + [
        (label, *(f"{1e3 * each[name]:.2f}" for name in names), f"{each['ratio']:.2f}") for label, each in times.items()
    ]


def _pm(estimate: Estimate) -> str:
    """A number with its standard error to two digits; alone where it has none, or one that is mere rounding."""
    value, error = estimate
    if not error or error < 1e-6 * abs(value):
        return f"{value:.3f}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def plot_curves(training: Training, path: Path) -> None:
    """Validation ELBO against epochs, and the sizes of its paired differences, a thin line per seed."""
    epochs = np.arange(1, training.validation[SAMPLED].shape[1] + 1)
    with figures.figure(path, width=11, height=4.2, columns=2) as (curves, differences):
        for name, values in training.validation.items():
            curves.plot(epochs, values.T, color=LINES[name]["color"], linewidth=0.4, alpha=0.5)
            curves.plot(epochs, values.mean(0), label=name, marker=".", **LINES[name])
        curves.set(xlabel="epoch", ylabel="validation ELBO, nats per image", title="Training curves", xticks=epochs)
        curves.legend()
        for color, (name, other) in zip(("C2", "C0", "C3"), (PAIRS[0], PAIRS[1], PAIRS[3]), strict=True):
            # Below 1e-7 there is only the rounding of the mean itself; exact agreement would have no place at all.
            sizes = np.abs(training.validation[name] - training.validation[other]).clip(min=1e-7)
            differences.plot(epochs, sizes.T, color=color, linewidth=0.4, alpha=0.6)
            differences.plot(epochs, sizes.mean(0), color=color, marker=".", label=f"{name} - {other}")
        differences.set(
            xlabel="epoch",
            ylabel="size of the difference, nats per image",
            title="Paired differences",
            yscale="log",
            xticks=epochs,
        )
        differences.legend()


def plot_gradient_noise(stages: dict[str, Any], path: Path) -> None:
    """Noise-to-signal ratio of each contender's gradient, encoder and decoder apart."""
    with figures.figure(path, width=11, height=4.2, columns=2, sharey=True) as panels:
        for axes, part in zip(panels, ("encoder", "decoder"), strict=True):
            for shift, (stage, each) in zip((-0.1, 0.1), stages.items(), strict=True):
                values, errors = np.array([each[part]["noise_to_signal"][name] for name in CONTENDERS]).T
                place = np.arange(len(CONTENDERS)) + shift
                axes.errorbar(place, values, yerr=2 * errors, fmt="o", markersize=4, capsize=4, label=stage)
            kept = ", ".join(f"{_pm(each[part]['variance_ratio'][CLOSED])} {stage}" for stage, each in stages.items())
            axes.set_title(f"{part}: closed form / sampled\n{kept}", fontsize=10)
            labels = [name.replace(", ", ",\n").replace("MeanField", "\nMeanField") for name in CONTENDERS]
            axes.set_xticks(range(len(CONTENDERS)), labels)
            axes.set(yscale="log")
        panels[0].set_ylabel("variance / squared norm of the mean gradient")
        panels[1].legend(title="bars: 2 standard errors", loc="lower right")


if __name__ == "__main__":
    cli.guarded(main)
