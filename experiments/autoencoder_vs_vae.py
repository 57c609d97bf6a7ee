"""What does a VAE have that an autoencoder has not? Reconstruction, samples, interpolation, and holes in latent space.

Three models of the same networks are trained on the same binarized images: autoencoders with a squared error (L2) and
with cross-entropy, and a VAE. The measures, fixed before anything was run:

- reconstruction: cross-entropy, nats per test image, and squared error, of the decoded code (for the VAE E_q[z]);
- samples: Frechet distance between decoded draws of z ~ N(0, I) and training images, in the features of a classifier
  trained here, and that classifier's confidence; also after a Gaussian, or a mixture of ten, is fitted to the codes of
  training images (for the VAE draws of q), which gives the autoencoder the density that it lacks;
- interpolation: the same two numbers for points halfway between the codes of two test images of different classes;
- holes: the median distance from a draw of N(0, I) to the nearest code of a training image, over that from the code of
  a test image; 1 if the prior's draws fall where the codes are.

What is judged are means of p(x | z), comparable to grey images, which are the means of the binary data. A claim holds,
or does not, where Student's 95 % interval of its difference over seeds leaves 0 out. The distance of reconstructions
stands beside the others: what is lost by coding alone, before anything is drawn or halved.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn
from tqdm import tqdm

from pyro_vae import MLP, VAE, Bernoulli, Conditional, Likelihood, MeanField, Network, StandardNormal, cli, fit, runs
from pyro_vae.data.fetched import MNIST, cache_folder
from pyro_vae.data.images import Dataset, ImageData
from pyro_vae.runs import figures
from pyro_vae.runs.judge import Judge, nearest, pairs_of_classes
from pyro_vae.runs.kept import Kept, at_home, is_concluded
from pyro_vae.runs.summaries import standard_error


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison.

    Args:
        dataset: source of labelled images; binary observations only.
        data_dir: folder of data files and downloads; null: the user's cache folder.
        latent_dims: sizes of the code, each at least 1.
        epochs: passes over the training images, at least 1.
        batch_size: images per gradient step, at least 1.
        lr: peak learning rate of Adam, positive.
        seeds: trainings of each model, at least 1; from 2 on there are errors over seeds.
        num_images: decoded images of each kind that are judged, at least 100; as many as test images, if those are
            fewer.
        device: auto takes a GPU if there is one.
        run_dir: directory to write, new or empty; null: one under runs/, named by data set and time.
        resume: go on with the interrupted comparison in --run_dir, with its settings.
    """

    dataset: Callable[[Path], Dataset] = MNIST
    data_dir: Path | None = None
    latent_dims: Sequence[int] = (2, 10, 50)
    epochs: int = 2
    batch_size: int = 256
    lr: float = 5e-3
    seeds: int = 2
    num_images: int = 5000
    device: str = "auto"
    run_dir: Path | None = None
    resume: bool = False

    def __post_init__(self):
        for name, bound in {"epochs": 1, "batch_size": 1, "seeds": 1, "num_images": 100}.items():
            if (value := getattr(self, name)) < bound:
                raise ValueError(f"--{name} must be at least {bound}, got {value}")
        runs.check_numbers("--latent_dims", self.latent_dims)
        if not 0 < self.lr < math.inf:
            raise ValueError(f"--lr must be positive and finite, got {self.lr}")


class Autoencoder(nn.Module):
    """x -> z -> x with nothing drawn: a Pyro program without latent sites, whose ELBO is log p(x | z(x)).

    Args:
        encoder: from x to z.
        likelihood: the decoder and what it is scored by.
    """

    def __init__(self, encoder: Network, likelihood: Conditional):
        super().__init__()
        self.encoder = encoder
        self.likelihood = likelihood

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        """All on one point: z(x)."""
        return dist.Delta(self.encoder(x)).to_event(1)

    def model(self, x: Tensor) -> Tensor:
        """p(x | z(x)) for observations ``(B, X)``."""
        with pyro.plate("data", len(x), dim=-1, device=x.device):  # pyright: ignore[reportArgumentType]
            return pyro.sample("x", self.likelihood(self.encoder(x)), obs=x)

    def guide(self, x: Tensor) -> None:
        """Nothing is latent."""

    def initialize(self, x: Tensor) -> None:
        """As a VAE's."""
        self.likelihood.initialize(x)


class SquaredError(Likelihood):
    """N(sigmoid(output), I / 2), whose log-density is minus the squared error, up to a constant.

    Args:
        event_size: number X of pixels.
    """

    is_density = True

    def forward(self, logits: Tensor) -> dist.TorchDistribution:
        return dist.Normal(logits.sigmoid(), math.sqrt(0.5)).to_event(1)

    def marginal(self, x: Tensor) -> tuple[Tensor, ...]:
        return (torch.logit(x.mean(0), eps=1e-3),)


AE_L2, AE_CE, OURS = "autoencoder, L2", "autoencoder, cross-entropy", "VAE"
Model = Autoencoder | VAE


def build(kind: str, latent_dim: int, pixels: int) -> Model:
    """An untrained model of one of the three kinds."""
    head = SquaredError(pixels) if kind == AE_L2 else Bernoulli(pixels)
    likelihood = Conditional(MLP(latent_dim, pixels), head)
    if kind == OURS:
        posterior = Conditional(MLP(pixels, 2 * latent_dim), MeanField(latent_dim))
        return VAE(StandardNormal(latent_dim), likelihood, posterior)
    return Autoencoder(MLP(pixels, latent_dim), likelihood)


class Measures(NamedTuple):
    """What one trained model is worth; see the experiment for what is measured. Distances: smaller is better.

    Attributes:
        cross_entropy, squared_error: of reconstructions, per image.
        reconstructions, prior, gaussian, mixture, midpoints: Frechet distance of decoded images, whose codes are those
            of test images, N(0, I), a Gaussian or a mixture fitted to codes, halfway between two codes.
        reconstructions_confidence, ..: mean confidence of the judge in the same images.
        holes: how far draws of N(0, I) are from the codes.
    """

    cross_entropy: float
    squared_error: float
    reconstructions: float
    prior: float
    gaussian: float
    mixture: float
    midpoints: float
    reconstructions_confidence: float
    prior_confidence: float
    gaussian_confidence: float
    mixture_confidence: float
    midpoints_confidence: float
    holes: float


TITLES = {
    "cross_entropy": "cross-entropy",
    "squared_error": "squared error",
    "reconstructions": "reconstructions",
    "prior": "samples N(0, I)",
    "gaussian": "samples, Gaussian",
    "mixture": "samples, mixture",
    "midpoints": "midpoints",
    "reconstructions_confidence": "confidence reconstructions",
    "prior_confidence": "confidence N(0, I)",
    "gaussian_confidence": "confidence, Gaussian",
    "mixture_confidence": "confidence, mixture",
    "midpoints_confidence": "confidence midpoints",
    "holes": "holes",
}
CLAIMS = {
    "the autoencoder reconstructs better (nats)": (AE_CE, "cross_entropy", OURS, "cross_entropy"),
    "the VAE's samples are nearer to the data": (OURS, "prior", AE_CE, "prior"),
    "the VAE's midpoints are nearer to the data": (OURS, "midpoints", AE_CE, "midpoints"),
    "the VAE has fewer holes": (OURS, "holes", AE_CE, "holes"),
    "the VAE's samples beat those of an autoencoder with a mixture": (OURS, "prior", AE_CE, "mixture"),
}
"""Each says that the first number is smaller than the second."""


def main(argv: Sequence[str] | None = None) -> Path:
    """Compare as told by ``argv``; return the directory written.

    Raises:
        RunError: for a mistake in ``argv``, or data without labels or not binary.
    """
    settings, text = runs.parse(Settings, argv)
    dataset = runs.make("dataset", settings.dataset, settings.data_dir or cache_folder())
    name = type(dataset).__name__
    run_dir = runs.run_dir_for(f"autoencoder_vs_vae-{name}", settings.run_dir)
    if is_concluded(run_dir, text, settings.resume):
        return run_dir
    device = runs.choose_device(settings.device)
    data = runs.images_of(runs.load_dataset(dataset, device))
    if dataset.binarization not in ("dynamic", "static"):
        raise runs.RunError(
            f"--dataset.binarization {dataset.binarization}: binary pixels drawn from grey ones are needed, with which "
            "decoded means are compared: choose dynamic"
        )
    with at_home(run_dir, text, settings.resume) as kept:
        return compare(settings, data, run_dir, kept)


def compare(settings: Settings, data: ImageData, run_dir: Path, kept: Kept) -> Path:
    """Train and measure every model and write what was found; return the directory."""
    torch.manual_seed(0)
    judge = Judge(data)
    size = min(settings.num_images, len(data.test))
    floor = judge.floor(size)
    measured: dict[tuple[str, int], list[Measures]] = {}
    first: dict[tuple[str, int], Model] = {}
    each = [(kind, dim, seed) for seed in range(settings.seeds) for dim in settings.latent_dims for kind in KINDS]
    for kind, dim, seed in tqdm(each, desc="models", unit="model"):
        model = train(settings, kind, dim, data, seed, kept)
        found = kept.once(_file(kind, dim, seed), partial(_measured, model, dim, data, judge, size))
        measured.setdefault((kind, dim), []).append(Measures(**found))
        first.setdefault((kind, dim), model)
    lesson = report(settings, measured, judge.accuracy, floor)
    torch.manual_seed(0)  # whatever was measured now, and whatever before
    with runs.writing(run_dir):
        plot_distances(settings, measured, floor, run_dir / "distances.png")
        pictures(settings, first, data, run_dir)
    result = {
        "measures": {f"{kind}, {dim}": [m._asdict() for m in each] for (kind, dim), each in measured.items()},
        "judge": {"accuracy": judge.accuracy, "floor": floor},
    }
    return runs.conclude(run_dir, lesson, result, data.device)


def _file(kind: str, latent_dim: int, seed: int) -> str:
    return f"{runs.slug(kind)}-{latent_dim}-seed{seed}"


def _measured(model: Model, latent_dim: int, data: ImageData, judge: Judge, size: int) -> dict[str, float]:
    return measure(model, latent_dim, data, judge, size)._asdict()


KINDS = (AE_L2, AE_CE, OURS)


def train(settings: Settings, kind: str, latent_dim: int, data: ImageData, seed: int, kept: Kept) -> Model:
    """A model trained on ``data``, the same networks and batches for every kind."""
    torch.manual_seed(seed)
    model = build(kind, latent_dim, data.test.shape[1]).to(data.test.device)
    model.initialize(data.observe(torch.arange(len(data.train_pixels), device=data.test.device)))
    batches = data.batches(settings.batch_size)
    engine = runs.compiled_engine(settings.epochs * len(batches))
    how = {"epochs": settings.epochs, "lr": settings.lr, "engine": engine, "progress": False}
    kept.train(
        _file(kind, latent_dim, seed),
        model,
        lambda callbacks: fit(model, batches, callbacks=callbacks, **how),
        {"data": data.fingerprint},
    )
    return model.eval()


def measure(model: Model, latent_dim: int, data: ImageData, judge: Judge, num_images: int) -> Measures:
    """All measures of one trained model."""
    with torch.no_grad():
        codes = model.posterior(data.test).mean
        logits = torch.cat([model.likelihood.network(part) for part in codes.split(1000)])
        cross_entropy = F.binary_cross_entropy_with_logits(logits, data.test, reduction="none").sum(-1).mean()
        squared_error = (data.test - logits.sigmoid()).square().sum(-1).mean()
        some = torch.randperm(len(data.train_pixels), device=data.test.device)[:10_000]
        known = model.posterior(data.observe(some)).sample()
        fresh = model.posterior(data.test).sample()
    noise = torch.randn(num_images, latent_dim, device=data.test.device)
    drawn = {
        "reconstructions": codes[:num_images],
        "prior": noise,
        "gaussian": fitted(known, 1, num_images),
        "mixture": fitted(known, 10, num_images),
        "midpoints": midpoints(codes, data, num_images),
    }
    images = {name: decode(model, z) for name, z in drawn.items()}
    return Measures(
        cross_entropy.item(),
        squared_error.item(),
        **{name: judge.distance(each) for name, each in images.items()},
        **{f"{name}_confidence": judge.confidence(each).mean().item() for name, each in images.items()},
        holes=nearest(noise, known)[0].median().item() / nearest(fresh, known)[0].median().item(),
    )


def decode(model: Model, z: Tensor) -> Tensor:
    """Means of p(x | z) for codes ``(N, D)``."""
    with torch.no_grad():
        return torch.cat([model.likelihood(part).mean for part in z.split(1000)])


def fitted(codes: Tensor, components: int, size: int) -> Tensor:
    """Draws ``(size, D)`` from a mixture of Gaussians with full covariances, fitted to codes ``(N, D)``."""
    seed = int(torch.randint(2**31, ()))
    mixture = GaussianMixture(min(components, len(codes)), random_state=seed).fit(codes.double().cpu().numpy())
    return torch.from_numpy(mixture.sample(size)[0]).to(codes)[torch.randperm(size)]


def midpoints(codes: Tensor, data: ImageData, size: int) -> Tensor:
    """Points ``(size, D)`` halfway between codes of two test images of different classes, drawn at random."""
    one, other = pairs_of_classes(cast(Tensor, data.test_labels), size)
    return (codes[one] + codes[other]) / 2


def report(settings: Settings, measured: dict[tuple[str, int], list[Measures]], accuracy: float, floor: float) -> str:
    """The comparison in Markdown: every measure, and each claim with its difference."""
    rows = [("code", "model", *TITLES.values())]
    for (kind, dim), each in sorted(measured.items(), key=lambda item: item[0][1]):
        rows.append((str(dim), kind, *(with_error([getattr(m, name) for m in each]) for name in TITLES)))
    claims = [("claim", *(f"code of {dim}" for dim in settings.latent_dims))]
    for claim, (one, measure_one, other, measure_other) in CLAIMS.items():
        cells = []
        for dim in settings.latent_dims:
            pairs = zip(measured[one, dim], measured[other, dim], strict=True)
            cells.append(verdict([getattr(a, measure_one) - getattr(b, measure_other) for a, b in pairs]))
        claims.append((claim, *cells))
    lines = [
        runs.table(rows),
        "",
        "Reconstructions, samples and midpoints: Frechet distance to the training images in the features of a "
        f"classifier ({accuracy:.1%} right on images held out); as many other training images have "
        f"{floor:.2f}. {settings.epochs} epochs; means over seeds 0 to {settings.seeds - 1}"
        + (", with standard errors." if settings.seeds > 1 else "."),
        "",
        runs.table(claims),
        "",
        "Differences: first minus second, so that a claim holds where it is negative; undecided where Student's 95 % "
        "interval over seeds includes 0, or with a single seed.",
    ]
    return "\n".join(lines)


def with_error(values: Sequence[float]) -> str:
    """A mean over seeds, with its standard error if there is one."""
    return rounded(statistics.fmean(values), standard_error(values))


def rounded(value: float, error: float | None, sign: str = "") -> str:
    """A number with its error, both to two digits of the error; with three of its own, if it has none."""
    if not error:
        return f"{value:{sign}.3g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:{sign}.{digits}f} +- {error:.{digits}f}"


def verdict(differences: Sequence[float]) -> str:
    """A claimed negative difference over seeds, and whether it is one."""
    mean, error = statistics.fmean(differences), standard_error(differences)
    if error is None:
        return f"undecided: {rounded(mean, None, '+')}"
    decided = abs(mean) > stats.t.ppf(0.975, len(differences) - 1) * error
    word = ("holds" if mean < 0 else "does not hold") if decided else "undecided"
    return f"{word}: {rounded(mean, error, '+')}"


def plot_distances(
    settings: Settings, measured: dict[tuple[str, int], list[Measures]], floor: float, path: Path
) -> None:
    """Frechet distances against the size of the code."""
    names = {"prior": "z ~ N(0, I)", "mixture": "z ~ mixture fitted to codes", "midpoints": "halfway between two codes"}
    dims = sorted(set(settings.latent_dims))
    with figures.figure(path, 11, 3.4, columns=3, sharey=True) as panels:
        for axes, (name, title) in zip(panels, names.items(), strict=True):
            for kind in KINDS:
                values = [[getattr(m, name) for m in measured[kind, dim]] for dim in dims]
                errors = [standard_error(each) or 0.0 for each in values]
                axes.errorbar(dims, [statistics.fmean(v) for v in values], errors, marker="o", capsize=2, label=kind)
            axes.axhline(floor, color="0.4", lw=1, ls=":", label="training images, another set")
            axes.set(xscale="log", yscale="log", xlabel="size of the code", title=title)
            axes.set_xticks(dims, [str(dim) for dim in dims])
            axes.minorticks_off()
        panels[0].set_ylabel("Frechet distance to the data")
        panels[0].legend(fontsize="small")


def pictures(settings: Settings, models: dict[tuple[str, int], Model], data: ImageData, run_dir: Path) -> None:
    """Decoded draws, interpolations, and the codes of test images, of the models of the first seed."""
    shape, order = data.image_shape, sorted(models, key=lambda key: key[1])
    labels = [f"{kind}, {dim}" for kind, dim in order]
    draws = [decode(models[key], torch.randn(12, key[1], device=data.test.device)) for key in order]
    figures.image_grid(torch.stack(draws), shape, run_dir / "samples.png", "Decoded z ~ N(0, I)", labels)
    classes = cast(Tensor, data.test_labels)
    other = int((classes != classes[0]).nonzero()[0])
    steps = torch.linspace(0, 1, 12, device=data.test.device)[:, None]
    between = []
    for key in order:
        with torch.no_grad():
            start, end = models[key].posterior(data.test[[0, other]]).mean
        between.append(decode(models[key], (1 - steps) * start + steps * end))
    title = "From one test image to another, straight through the code"
    figures.image_grid(torch.stack(between), shape, run_dir / "interpolations.png", title, labels)
    dim = min(settings.latent_dims)
    with figures.figure(run_dir / "codes.png", 11, 3.8, columns=3) as panels:
        for axes, kind in zip(panels, KINDS, strict=True):
            x = data.test[:5000]
            with torch.no_grad():
                z = models[kind, dim].posterior(x).sample().cpu()
            z = F.pad(z, (0, max(0, 2 - dim)))
            axes.scatter(z[:, 0], z[:, 1], c=classes[: len(x)], cmap="tab10", s=3, alpha=0.6, linewidths=0)
            circle = torch.linspace(0, 2 * math.pi, 100)
            axes.plot(2 * circle.cos(), 2 * circle.sin(), color="0.2", lw=1)
            axes.set(title=kind, aspect="equal", adjustable="datalim")
        panels[0].set_xlabel("codes of test images by class; circle: two standard deviations of N(0, I)", loc="left")


if __name__ == "__main__":
    cli.guarded(main)
