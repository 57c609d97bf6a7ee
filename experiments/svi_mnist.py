"""Train one variational autoencoder, written as a Pyro program, and report its test log-likelihood with its error.

With no options: the one-layer VAE of the IWAE paper (784-200-200-50, tanh) on dynamically binarized MNIST, trained by
SVI with Pyro's Trace_ELBO, evaluated on all 10,000 test images by importance sampling. Every part can be swapped by
name, or by import path for a class of your own; a part takes its own options after its name, as in --encoder MLP
--encoder.activation relu, and --encoder.help MLP explains them. Numbers are in nats per image, larger is better.
"""

import hashlib
import json
import math
import shlex
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import pyro
import torch
import xarray as xr
import yaml
from pyro.infer import Trace_ELBO
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from experiments import plots, runs
from experiments.datasets import ENCODINGS, MNIST, Data, DataError, Dataset, cache_folder
from pyro_vae import (
    MLP,
    VAE,
    Annealing,
    Bernoulli,
    CheckpointError,
    CompiledSVI,
    Conditional,
    ContractError,
    Epoch,
    Evidence,
    Likelihood,
    MeanField,
    Network,
    Objective,
    Posterior,
    Prior,
    PyroSVI,
    StandardNormal,
    TwoLayerVAE,
    active_units,
    annealed_importance_sampling,
    check_program,
    difference_estimate,
    estimate_elbo,
    fit,
    importance_sampling,
    pareto_k_threshold,
)
from pyro_vae.networks import check_widths
from pyro_vae.vae import num_outputs

WORTH_COMPILING = 5000
"""Gradient steps above which the seconds of compiling pay; below, the compiled engine runs the graph as it is."""
T = TypeVar("T")


@dataclass(frozen=True)
class EvidenceSettings:
    """How test images are scored.

    Args:
        num_samples: importance samples per image, at least 1; literature uses 5000.
        num_images: score only the first so many test images, at least 2; null: all of them.
        annealed_images: how many of them, drawn at random, are scored by annealed importance sampling too, at least 2;
            their differences correct the mean over all. 0: none; null: all.
        annealing: settings of annealed importance sampling.
    """

    num_samples: int = 1000
    num_images: int | None = None
    annealed_images: int | None = 1000
    annealing: Annealing = field(default_factory=Annealing)

    def __post_init__(self):
        if self.num_samples < 1:
            raise ValueError(f"--evidence.num_samples must be at least 1, got {self.num_samples}")
        if self.num_images is not None and self.num_images < 2:
            raise ValueError(f"--evidence.num_images must be at least 2, got {self.num_images}")
        if self.annealed_images is not None and self.annealed_images < 2 and self.annealed_images != 0:
            raise ValueError(f"--evidence.annealed_images must be 0 or at least 2, got {self.annealed_images}")


@dataclass(frozen=True)
class TopSettings:
    """The upper layer of TwoLayerVAE, p(z2) p(z1 | z2).

    Args:
        latent_dim: dimensions of z2, at least 1; those of z1 are --latent_dim.
        hidden: width of each hidden layer of the two networks between z1 and z2.
    """

    latent_dim: int = 50
    hidden: Sequence[int] = (100, 100)

    def __post_init__(self):
        object.__setattr__(self, "hidden", tuple(self.hidden))  # a list, if it comes from the command line
        if self.latent_dim < 1:
            raise ValueError(f"--top.latent_dim must be at least 1, got {self.latent_dim}")
        check_widths("--top.hidden", self.hidden)


@dataclass(frozen=True)
class Config:
    """Settings of one run.

    Args:
        model: VAE, or TwoLayerVAE with two stochastic layers, whose prior is that of the upper one.
        top: the upper layer of TwoLayerVAE.
        dataset: source of images.
        data_dir: folder of data files and downloads; null: the user's cache folder.
        prior: p(z).
        likelihood: p(x | z), the head of the decoder.
        posterior: q(z | x), the head of the encoder.
        encoder: network from an image to the posterior's parameters.
        decoder: network from z to the likelihood's parameters.
        latent_dim: dimensions of z, at least 1.
        objective: what is maximized: an objective of pyro_vae or, as pyro.infer.Trace_ELBO, a loss of Pyro.
        engine: compiled traces loss and gradients into one graph and, for long runs, compiles it; pyro runs
            pyro.infer.SVI itself, for what cannot be traced and as a reference.
        precision: of matrix products and convolutions in training by the compiled engine; bfloat16 is faster where the
            processor has instructions for it.
        max_norm: the norm of each step's gradient, summed over the batch for a loss of Pyro, is clipped to this,
            positive, by the compiled engine; null: not.
        epochs: passes over the training images, at least 1.
        batch_size: images per gradient step, at least 1.
        lr: learning rate of Adam, positive; the peak if the schedule has one.
        schedule: of the learning rate over the whole run; stages: 1, 3, 9, .. epochs at lr 10^(-i / 7), i = 0, 1, ..
        patience: stop after so many epochs without a better validation ELBO; null: never.
        weights: evaluate the last weights, or those of the best validation ELBO.
        seed: of initialization, data order, training noise and evaluation noise, at least 0.
        device: auto takes a GPU if there is one.
        evidence: how test images are scored.
        run_dir: directory to write, new or empty; null: one under runs/, named by data set and time.
        resume: go on with the interrupted run in --run_dir, with its settings.
        tensorboard: log curves to run_dir for TensorBoard.
    """

    model: Literal["VAE", "TwoLayerVAE"] = "VAE"
    top: TopSettings = field(default_factory=TopSettings)
    dataset: Callable[[Path], Dataset] = MNIST
    data_dir: Path | None = None
    prior: Callable[[int], Prior] = StandardNormal
    likelihood: Callable[[int], Likelihood] = Bernoulli
    posterior: Callable[[int], Posterior] = MeanField
    encoder: Callable[[int, int], Network] = MLP
    decoder: Callable[[int, int], Network] = MLP
    latent_dim: int = 50
    objective: Callable[[], Objective | pyro.infer.ELBO] = Trace_ELBO
    engine: Literal["compiled", "pyro"] = "compiled"
    precision: Literal["float32", "bfloat16"] = "float32"
    max_norm: float | None = None
    epochs: int = 40
    batch_size: int = 256
    lr: float = 5e-3
    schedule: Literal["one_cycle", "constant", "stages"] = "one_cycle"
    patience: int | None = None
    weights: Literal["last", "best"] = "last"
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    evidence: EvidenceSettings = field(default_factory=EvidenceSettings)
    run_dir: Path | None = None
    resume: bool = False
    tensorboard: bool = False

    def __post_init__(self):
        for name in ("latent_dim", "epochs", "batch_size", "patience"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"--lr must be positive and finite, got {self.lr}")
        runs.check_seed(self.seed)
        if self.max_norm is not None and not self.max_norm > 0:
            raise ValueError(f"--max_norm must be positive, got {self.max_norm}")
        for name, usual in (("precision", "float32"), ("max_norm", None)):
            if self.engine == "pyro" and getattr(self, name) != usual:
                raise ValueError(f"--{name} {getattr(self, name)} needs --engine compiled")


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the experiment as told by ``argv``; return the run directory.

    Raises:
        RunError: for a mistake in ``argv`` or in what it points to.
    """
    config, text = runs.parse(Config, argv)
    settings = yaml.safe_load(text)
    for part in ("encoder", "decoder"):
        if settings[part].get("init_args", {}).get("image_shape") is not None:
            raise runs.RunError(f"--{part}.image_shape cannot be given: it is that of the data set's images")
    dataset = make("dataset", config.dataset, config.data_dir or cache_folder())
    objective = make("objective", config.objective)
    name = type(dataset).__name__
    run_dir = config.run_dir or Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    runs.check_run_dir(run_dir, text, config.resume)
    if (run_dir / "result.json").exists():
        print("This run is finished; its result:")
        report(run_dir)
        return run_dir

    device = runs.device(config.device)
    torch.manual_seed(config.seed)
    data = load(dataset, device)
    vae = make("model", build, config, data.image_shape).to(device)
    x = data.observe(torch.arange(len(data.train_pixels), device=device))
    check_pairing(vae.likelihood.head, data, dataset)
    make("prior", vae.initialize, x)
    check_observations(vae, [data.test, data.validation, x], dataset.binarization)
    if isinstance(objective, Objective):
        check_objective(objective, vae, x[:2])
    runs.open_run(run_dir, text, config.resume)
    num_parameters = sum(p.numel() for p in vae.parameters())
    print(
        f"{name}, {dataset.binarization} binarization: {len(data.train_pixels):,} training, "
        f"{len(data.validation):,} validation, {len(data.test):,} test images on {device}\n"
        f"VAE with {num_parameters:,} parameters, run directory {run_dir}"
    )

    try:
        history = train(config, vae, data, objective, run_dir)
        vae.eval()
        save_file(
            vae.state_dict(),
            run_dir / "model.safetensors",
            metadata={"image_shape": json.dumps(data.image_shape)},
        )
        result, evidence, annealed = evaluate(config, vae, data)
        result |= {
            "bits_per_dim": bits_per_dim(best(result), data, vae.likelihood.head),
            "dataset": name,
            "binarization": dataset.binarization,
            "train_seconds": sum(e.seconds for e in history),
            "epochs": len(history),
            "weights": config.weights,
            "seed": config.seed,
            "binarization_seed": dataset.binarization_seed,
            **runs.provenance(device),
        }
        importance = evidence.to_dataset(unit=result["unit"], num_samples=result["num_samples"])
        groups = {"importance": importance} | ({} if annealed is None else {"annealed": annealed})
        xr.DataTree.from_dict(groups).to_netcdf(run_dir / "evidence.nc", engine="h5netcdf")
        plots.training_curve(history, run_dir / "training.png")
        plots.evidence(evidence, result["khat_threshold"], run_dir)
        plots.pictures(vae.model, vae.guide, data, run_dir)
        runs.write_json(run_dir / "result.json", result)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(resume_hint(run_dir)) from interrupt
    except OSError as error:
        raise runs.RunError(f"--run_dir {run_dir}: {error.strerror or error}") from error
    report(run_dir)
    return run_dir


OTHERS_ERRORS = (ValueError, TypeError, AssertionError, AttributeError, LookupError, RuntimeError)
"""What the classes of a user, and of libraries, raise at what they cannot do; Pyro's losses assert."""


def make(option: str, factory: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """What ``factory`` makes; what it refuses is a user's mistake in ``option``."""
    try:
        return factory(*args, **kwargs)
    except OTHERS_ERRORS as error:
        raise runs.RunError(_refusal(error, f"--{option}: ")) from error


def _refusal(error: Exception, prefix: str = "") -> str:
    """An error in one line; one that was not raised on purpose says where it was, outside of the libraries."""
    message = _as_options(error)
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in message:
        raise error
    if isinstance(error, ContractError):  # names the class itself
        return message
    if prefix and isinstance(error, ValueError | AssertionError):
        return prefix + message
    frames = traceback.extract_tb(error.__traceback__)
    last = ([frame for frame in frames if "site-packages" not in frame.filename] or frames)[-1]
    return f"{prefix}{type(error).__name__}: {message} ({Path(last.filename).name}, line {last.lineno})"


def load(dataset: Dataset, device: torch.device | str) -> Data:
    """The data, or a RunError that says why they cannot be had."""
    try:
        return dataset.load(device)
    except DataError as error:
        raise runs.RunError(" ".join(str(error).split())) from error


def build(config: Config, image_shape: Sequence[int]) -> VAE | TwoLayerVAE:
    """The untrained model of ``config`` for images of shape ``(C, H, W)``."""
    event_size, shape = int(np.prod(image_shape)), tuple(image_shape)
    likelihood = make("likelihood", config.likelihood, event_size)
    posterior = make("posterior", config.posterior, config.latent_dim)
    decoder = make("decoder", config.decoder, config.latent_dim, num_outputs(likelihood), image_shape=shape)
    encoder = make("encoder", config.encoder, event_size, num_outputs(posterior), image_shape=shape)
    below = make("decoder", Conditional, decoder, likelihood), make("encoder", Conditional, encoder, posterior)
    return MODELS[config.model](config, *below)


def one_layer(config: Config, likelihood: Conditional, posterior: Conditional) -> VAE:
    """z -> x."""
    return VAE(make("prior", config.prior, config.latent_dim), likelihood, posterior)


def two_layers(config: Config, likelihood: Conditional, posterior: Conditional) -> TwoLayerVAE:
    """z2 -> z1 -> x."""
    bottom, top = config.latent_dim, config.top.latent_dim
    latent, top_posterior = MeanField(bottom), make("posterior", config.posterior, top)
    return TwoLayerVAE(
        make("prior", config.prior, top),
        latent=Conditional(MLP(top, num_outputs(latent), config.top.hidden), latent),
        likelihood=likelihood,
        posterior=posterior,
        top_posterior=Conditional(MLP(bottom, num_outputs(top_posterior), config.top.hidden), top_posterior),
    )


MODELS = {"VAE": one_layer, "TwoLayerVAE": two_layers}


def check_pairing(head: Likelihood, data: Data, dataset: Dataset) -> None:
    """Refuse data that are not of the kind that the likelihood scores: its numbers would not be a log-likelihood.

    Raises:
        RunError: with the option that mends it.
    """
    name, levels, wanted = type(head).__name__, head.levels, head.encoding
    if wanted is not None and data.encoding != wanted:
        mend = next(setting for setting, encoding in ENCODINGS.items() if encoding == wanted)
        raise runs.RunError(
            f"--likelihood {name} scores {wanted} pixels, but --dataset.binarization {dataset.binarization} makes "
            f"{data.encoding} pixels: choose --dataset.binarization {mend}, or another likelihood"
        )
    if wanted == "integers" and levels is not None and levels != data.levels:
        raise runs.RunError(
            f"--likelihood {name} has {levels} levels, but the pixels of {type(dataset).__name__} have {data.levels}: "
            f"add --likelihood.levels {data.levels}"
        )


def check_observations(vae: VAE | TwoLayerVAE, observations: Sequence[Tensor], binarization: str) -> None:
    """Refuse parts that break their contract, and observations that the likelihood cannot score.

    Binary observations are alike, so that a few stand for all.
    """
    size = 1000 if ENCODINGS[binarization] == "binary" else None
    try:
        for x in observations:
            for part in x[:size].split(1000):
                check_program(vae.model, vae.guide, part)
    except OTHERS_ERRORS as error:
        problem = _refusal(error)
        parts = {"prior": vae.prior, "likelihood": vae.likelihood.head, "posterior": vae.posterior.head}
        chosen = " ".join(f"--{option} {type(part).__name__}" for option, part in parts.items())
        raise runs.RunError(f"{problem} ({chosen} --dataset.binarization {binarization})") from error


def check_objective(objective: Objective, vae: VAE | TwoLayerVAE, x: Tensor) -> None:
    """Refuse an objective that cannot serve the model, before anything is written; nothing is left changed.

    Raises:
        RunError: with the option that mends it.
    """
    gpus = [x.device] if x.is_cuda else []
    try:
        with torch.random.fork_rng(gpus):
            objective(vae.model, vae.guide, x)
    except ContractError as error:
        raise runs.RunError(f"--objective {type(objective).__name__}: {_as_options(error)}") from error


def _as_options(error: Exception) -> str:
    """An error of the library in one line, with its settings named as options of the command line."""
    message = " ".join(str(error).split("Trace Shapes")[0].split())  # Pyro appends a table of shapes
    return message.replace("PyroSVI", "--engine pyro").replace('kl="sampled"', "--objective.kl sampled")


def train(
    config: Config, vae: VAE | TwoLayerVAE, data: Data, objective: Objective | pyro.infer.ELBO, run_dir: Path
) -> list[Epoch]:
    """Fit the VAE, writing metrics.csv and checkpoint.pt after every epoch."""
    writer = SummaryWriter(str(run_dir)) if config.tensorboard else None
    logged = 0

    def on_epoch(history: list[Epoch]) -> None:
        nonlocal logged
        runs.write_csv(run_dir / "metrics.csv", [row._asdict() for row in history])
        if writer:
            for row in history[logged:]:
                for name in ("objective", "train_elbo", "validation_elbo", "learning_rate"):
                    writer.add_scalar(name, getattr(row, name), row.epoch)
            writer.flush()
        logged = len(history)

    batches = data.batches(config.batch_size)
    compiled = compiled_engine(config.epochs * len(batches), max_norm=config.max_norm, precision=config.precision)
    engine = PyroSVI if config.engine == "pyro" else compiled
    try:
        return fit(
            vae,
            batches,
            data.validation,
            epochs=config.epochs,
            lr=config.lr,
            schedule=config.schedule,
            loss=objective,
            engine=engine,
            patience=config.patience,
            weights=config.weights,
            checkpoint=run_dir / "checkpoint.pt",
            resume=config.resume,
            on_epoch=on_epoch,
        )
    except CheckpointError as error:
        raise runs.RunError(f"--resume: {error}; start a new run in another --run_dir") from error
    except (ValueError, TypeError, NotImplementedError) as error:
        if not isinstance(error, ContractError) and not _raised_by_a_library(error):
            raise  # an error in somebody's own class: its traceback says where
        reason = _as_options(error)
        refused = config.engine == "compiled" and "--engine pyro" in reason
        option = "--engine compiled" if refused else f"--objective {type(objective).__name__}"
        raise runs.RunError(f"{option}: {reason}") from error
    finally:
        if writer:
            writer.close()


def compiled_engine(num_steps: int, **settings: Any) -> Callable[..., CompiledSVI]:
    """The compiled engine for a training of so many steps, with other settings of its own."""
    return partial(CompiledSVI, compiler="inductor" if num_steps > WORTH_COMPILING else "none", **settings)


def _raised_by_a_library(error: BaseException) -> bool:
    """Whether Pyro or pyro_vae itself refused what it was given, as losses do with settings they cannot serve."""
    while error.__cause__ is not None:
        error = error.__cause__
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"].split(".")[0] in ("pyro", "pyro_vae")


def evaluate(config: Config, vae: VAE | TwoLayerVAE, data: Data) -> tuple[dict[str, Any], Evidence, xr.Dataset | None]:
    """Score the test images.

    Returns:
        The entries of result.json about them; log p(x) per image, by importance sampling; the same by annealed
        importance sampling, of the images that were drawn for it.
    """
    torch.manual_seed(config.seed + 1)  # the same draws whether or not training was resumed
    start = time.perf_counter()
    settings = config.evidence
    test = data.test[: settings.num_images]
    elbo = estimate_elbo(vae.model, vae.guide, test, num_samples=10)
    evidence = importance_sampling(vae.model, vae.guide, test, settings.num_samples, progress=True)
    log_likelihood, over_images, monte_carlo = evidence.mean()
    units = active_units(vae.guide, test)
    khat = evidence.khat[~evidence.khat.isnan()]
    bad = evidence.share_bad_k(settings.num_samples)
    annealed, corrected = anneal(settings, vae, test, evidence)
    first = data.observe(torch.arange(min(500, len(data.train_pixels)), device=test.device))
    return (
        {
            "test_elbo": elbo.mean().item(),
            "test_log_likelihood": log_likelihood,
            "test_log_likelihood_se": over_images,
            "mc_se": monte_carlo,
            "num_samples": settings.num_samples,
            "num_images": len(test),
            "test_set": hashlib.sha256(test.cpu().numpy().tobytes()).hexdigest()[:16],
            "unit": vae.likelihood.head.unit,
            "median_ess": evidence.ess.median().item(),
            "share_khat_above_0_7": (khat > 0.7).double().mean().item(),
            "khat_threshold": pareto_k_threshold(settings.num_samples),
            "share_khat_above_threshold": bad,
            "reliable": reliable(bad),
            "num_invalid": int(evidence.num_invalid.sum()),
            **corrected,
            "active_units": sum(int(site.sum()) for site in units.values()),
            "active_units_by_site": {name: int(site.sum()) for name, site in units.items()},
            "active_units_first_500": sum(int(site.sum()) for site in active_units(vae.guide, first).values()),
            "evaluate_seconds": time.perf_counter() - start,
        },
        evidence,
        annealed,
    )


MANY = 0.1
"""Share of images with a bad Pareto k above which an importance-sampled log-likelihood is called unreliable."""


def reliable(share_bad_k: float | None) -> bool | None:
    """Whether an importance-sampled log-likelihood and its error may be believed; None if there is no telling."""
    return None if share_bad_k is None else share_bad_k <= MANY


def anneal(
    settings: EvidenceSettings, vae: VAE | TwoLayerVAE, test: Tensor, importance: Evidence
) -> tuple[xr.Dataset | None, dict[str, Any]]:
    """Annealed importance sampling of some of the test images, and what it says about all of them."""
    size = len(test) if settings.annealed_images is None else min(settings.annealed_images, len(test))
    names = ("log_likelihood", "mc_se", "shortfall", "acceptance", "seconds")
    names = tuple(f"annealed_{name}" for name in names)
    nothing = None, dict.fromkeys(names) | {"annealed_images": 0}
    if size == 0:
        return nothing
    among = some(len(test), size).to(test.device)
    start = time.perf_counter()
    try:
        evidence = annealed_importance_sampling(vae.model, vae.guide, test[among], settings.annealing, progress=True)
    except ContractError as error:
        print(f"no annealed estimate: {error}")
        return nothing
    estimate, error = difference_estimate(importance.log_px, evidence, among)
    acceptance, seconds = evidence.acceptance.mean().item(), time.perf_counter() - start
    values = estimate, error, evidence.shortfall(), acceptance, seconds
    return evidence.to_dataset(image=among), dict(zip(names, values, strict=True)) | {"annealed_images": size}


def some(number: int, size: int) -> Tensor:
    """``size`` of ``number`` places, drawn at random, the same in every run, so that runs can be compared on them."""
    return torch.randperm(number, generator=torch.Generator().manual_seed(0))[:size].sort().values


def best(result: dict[str, Any]) -> float:
    """The log-likelihood to be believed: the annealed one, where there is one."""
    annealed = result.get("annealed_log_likelihood")
    return result["test_log_likelihood"] if annealed is None else annealed


def bits_per_dim(log_likelihood: float, data: Data, head: Likelihood) -> float | None:
    """Bits per pixel of the image as stored; None for images of which not all is scored, or by no likelihood.

    A density of dequantized pixels, (k + u) / L in (0, 1), counts log2 L more: E_u log p((k + u) / L) - X log L is a
    lower bound of the log mass of the whole numbers k (Theis, van den Oord & Bethge 2016, section 3.1).
    """
    stored = data.encoding in ("integers", "dequantized") and not data.train_pixels.is_floating_point()
    if not stored or head.is_density is None:
        return None
    bits = -log_likelihood / (math.prod(data.image_shape) * math.log(2))
    return bits + math.log2(data.levels) if data.encoding == "dequantized" else bits


def report(run_dir: Path) -> None:
    """Print the result in ``run_dir`` as a short table."""
    result = json.loads((run_dir / "result.json").read_text())
    images = f"{result['num_images']:,}"
    samples = f"{result['num_samples']:,} samples from the guide, {images} test images: the customary number"
    share, believe = result["share_khat_above_threshold"], "another run would differ by this"
    if result.get("reliable") is False:
        samples += ", too low here"
        believe = "not to be believed here, see k"
    rows = [
        ("test", result["unit"], ""),
        ("ELBO", number(result["test_elbo"], 2), "the evidence lower bound, E_q[log p(x, z) - log q(z given x)]"),
        ("log p(x), importance sampling", number(result["test_log_likelihood"], 2), samples),
        ("  Monte Carlo error", number(result["mc_se"]), believe),
        ("  images with bad k", "-", "too few samples to tell")
        if share is None
        else (
            f"  images with k > {result['khat_threshold']:.2f}",
            f"{share:.0%}",
            "Pareto k of the weights: there, neither the estimate nor its error is to be trusted",
        ),
    ]
    if result.get("annealed_log_likelihood") is not None:
        how = f"of {result['annealed_images']:,} images; their mean difference corrects the number above"
        rows += [
            ("log p(x), annealed", number(result["annealed_log_likelihood"], 2), how),
            (
                "  error",
                number(result["annealed_mc_se"]),
                "another draw of these images, and another run, would",
            ),
            ("  low by about", number(result.get("annealed_shortfall")), "in expectation; more temperatures help"),
        ]
    rows += [
        ("error over images", number(result["test_log_likelihood_se"]), "another test set would differ by this"),
        ("active units", str(result["active_units"]), "latent units that vary with the image"),
        ("seconds", f"{result['train_seconds']:.0f} + {result['evaluate_seconds']:.0f}", "training + evaluation"),
    ]
    if result.get("bits_per_dim") is not None:
        rows.append(("bits per dimension", number(result["bits_per_dim"]), "of the image as stored; smaller is better"))
    if result["num_invalid"]:
        rows.append(("invalid weights", str(result["num_invalid"]), "log-weights that are NaN or infinite"))
    print(f"\n{runs.table(rows)}\n\n{run_dir}")


def number(value: float | None, digits: int = 3) -> str:
    """A number, or a dash for none."""
    return "-" if value is None else f"{value:.{digits}f}"


def resume_hint(run_dir: Path) -> str:
    """What to tell someone who pressed Ctrl-C."""
    if (run_dir / "checkpoint.pt").exists():
        return f"go on with: python -m experiments.svi_mnist --run_dir {shlex.quote(str(run_dir))} --resume"
    return f"no epoch was finished; {run_dir} can be deleted"


def load_config(directory: Path | str) -> Config:
    """The settings of a run.

    Raises:
        RunError: if there are none.
    """
    config, _ = runs.parse(Config, [f"--config={Path(directory) / 'config.yaml'}"])
    return config


def load_run(directory: Path | str) -> VAE | TwoLayerVAE:
    """The trained model of a finished run, on the CPU, ready for use; its data set is not needed.

    Raises:
        RunError: if ``directory`` holds no trained model.
    """
    directory = Path(directory)
    weights = directory / "model.safetensors"
    if not weights.exists():
        raise runs.RunError(f"{directory} holds no trained model (there is no model.safetensors)")
    config = load_config(directory)
    try:
        with safe_open(weights, "pt") as file:
            vae = build(config, json.loads((file.metadata() or {})["image_shape"]))
        vae.load_state_dict(load_file(weights))
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise runs.RunError(f"{weights} is damaged, or of another model: {' '.join(str(error).split())}") from error
    return vae.eval()


class Finished(NamedTuple):
    """A finished run, opened to be studied: model, data, their device, and the directory that the study writes."""

    vae: VAE | TwoLayerVAE
    data: Data
    device: torch.device
    out: Path


def open_finished(directory: Path, out: Path | None, name: str, device: str, seed: int) -> Finished:
    """Open the finished run in ``directory``, with torch seeded; the study is written to ``out``, or to ``name`` there.

    Raises:
        RunError: if there is no finished run, no such device, or anything in ``out`` already.
    """
    chosen = runs.device(device)
    out = out or directory / name
    runs.check_empty(out)
    vae, data = load_finished(directory, chosen)
    torch.manual_seed(seed)
    return Finished(vae, data, chosen, out)


def load_finished(directory: Path, device: torch.device) -> tuple[VAE | TwoLayerVAE, Data]:
    """Model and data of a finished run, on ``device``.

    Raises:
        RunError: if ``directory`` holds none, or the data cannot be had.
    """
    if not (directory / "result.json").exists():
        raise runs.RunError(f"{directory} holds no finished run (there is no result.json)")
    return load_run(directory).to(device), load_data(directory, device)


def load_data(directory: Path | str, device: torch.device | str = "cpu") -> Data:
    """The data set of a run.

    Raises:
        RunError: if it cannot be had.
    """
    config = load_config(directory)
    return load(make("dataset", config.dataset, config.data_dir or cache_folder()), device)


if __name__ == "__main__":
    runs.cli(main)
