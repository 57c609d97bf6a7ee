"""Train one variational autoencoder, written as a Pyro program, and report its test log-likelihood with its error.

With no options: the one-layer VAE of the IWAE paper (784-200-200-50, with SiLU) on dynamically binarized MNIST, trained
by SVI with Pyro's Trace_ELBO, whose KL divergence is warmed up, and scored on all 10,000 test images. Every part can be
swapped by name, or by import path for a class of your own; a part takes its own options after its name, as in --encoder
MLP --encoder.activation relu, and --encoder.help MLP explains them. Numbers are in nats per datum; larger is better.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from pyro.infer import ELBO, ReweightedWakeSleep, Trace_ELBO
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pyro_vae.data.datasets import Source
from pyro_vae.data.fetched import MNIST
from pyro_vae.errors import check_widths
from pyro_vae.hierarchical import Inference, check_levels
from pyro_vae.infer.evidence.annealing import Annealing
from pyro_vae.infer.objectives import Objective
from pyro_vae.parts.likelihoods import Bernoulli, Likelihood
from pyro_vae.parts.networks import MLP, Activation, Network
from pyro_vae.parts.posteriors import MeanField, Posterior
from pyro_vae.parts.priors import Prior, StandardNormal
from pyro_vae.runs.given import check_made, check_name, check_project

ScheduleClass = Callable[[Optimizer, int, int], LRScheduler]
"""Made of the optimizer, the number of steps of an epoch, and the number of epochs."""

DEFAULT_NETWORK = partial(MLP, activation="silu")
"""The network of the IWAE paper, with another nonlinearity, which trains faster."""


def check_numbers(option: str, numbers: Sequence[int], least: int = 1) -> None:
    """Refuse a list of settings that is empty, names one twice, or holds one that is too small.

    Raises:
        ValueError: naming the option.
    """
    if not numbers or min(numbers) < least or len(set(numbers)) < len(numbers):
        raise ValueError(f"{option} must be different numbers of at least {least}, got {list(numbers)}")


def check_seed(seed: int) -> None:
    """Refuse a seed that torch does not take.

    Raises:
        ValueError: naming the option.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed must be at least 0 and below 2^63, got {seed}")


@dataclass(frozen=True)
class EvidenceSettings:
    """How test images are scored.

    Args:
        num_samples: importance samples per image, at least 1; literature uses 5000.
        num_images: score only this many test images, the first ones, at least 2; null: all of them.
        annealed_images: how many of them, drawn at random, are scored by annealed importance sampling too, at least 2;
            their differences correct the mean over all. 0: none; null: all.
        annealing: settings of annealed importance sampling.
    """

    num_samples: int = 1000
    num_images: int | None = None
    annealed_images: int | None = 1500
    annealing: Annealing = field(default_factory=Annealing)

    def __post_init__(self):
        check_made(self)
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
        check_made(self)
        object.__setattr__(self, "hidden", tuple(self.hidden))  # a list, if it comes from the command line
        if self.latent_dim < 1:
            raise ValueError(f"--top.latent_dim must be at least 1, got {self.latent_dim}")
        check_widths("--top.hidden", self.hidden)


@dataclass(frozen=True)
class LevelsSettings:
    """The levels of HierarchicalVAE, from the one next to x up to the top.

    Args:
        latent_dims: dimensions of z1, z2, .., at least two numbers of at least 1; --prior is that of the last.
        widths: of the states that pass each level on the ways up and down, one for each, or one for all; --encoder
            makes the first, --decoder reads it.
        blocks: residual blocks of each level on either way, at least 1.
        inference: of a level's z: top_down, by x and the levels above it (Child 2021); precision_weighted, by x, and
            multiplied by its prior given those above (Sonderby et al. 2016), for --posterior MeanField; bottom_up, by
            the level below it (Burda et al. 2016).
        activation: of the networks inside.
    """

    latent_dims: Sequence[int] = (32, 16, 8)
    widths: Sequence[int] = (200,)
    blocks: int = 1
    inference: Inference = "top_down"
    activation: Activation = "silu"

    def __post_init__(self):
        check_made(self)
        for name in ("latent_dims", "widths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # a list, if it comes from the command line
        check_levels("--levels.latent_dims", self.latent_dims, "--levels.widths", self.widths)
        if self.blocks < 1:
            raise ValueError(f"--levels.blocks must be at least 1, got {self.blocks}")


@dataclass(frozen=True)
class Settings:
    """Settings of one run.

    Args:
        model: VAE, or HierarchicalVAE with several levels of z, of --levels.latent_dims dimensions, whose prior is that
            of the top, or TwoLayerVAE with two as in the IWAE paper.
        top: the upper layer of TwoLayerVAE.
        levels: those of HierarchicalVAE.
        condition: what the model is told beside x, so that it is p(x given c): label, or the name of a column of a
            table or '[several, names]'; null: nothing.
        condition_in: which parts are told: prior, decoder, encoder. The decoder reads c after z, the encoder after x,
            or, if it is a network of images, sees x + A c; a prior that is told is Gaussian given c.
        condition_hidden: width of each hidden layer of the network of a prior that is told.
        dataset: source of data.
        data_dir: folder of data files and downloads; null: the user's cache folder.
        prior: p(z).
        likelihood: p(x | z), the head of the decoder; of a table, Bernoulli stands for heads by the kinds of columns.
        posterior: q(z | x), the head of the encoder.
        encoder: network from an image to the posterior's parameters; one that is named has its own defaults, MLP tanh.
        decoder: network from z to the likelihood's parameters.
        missing: what the encoder sees of data with gaps, standardized: zeros in their place, and with mask, for each
            entry, whether it was seen; with IWAE as objective, the bound is the one of MIWAE.
        latent_dim: dimensions of z, at least 1.
        objective: what is maximized: an objective of pyro_vae or, as pyro.infer.Trace_ELBO, a loss of Pyro.
        warmup: share of the steps before a loss of Pyro counts its KL in full; null: 0.1 with Trace_ELBO, else 0.
        engine: compiled traces loss and gradients into one graph and, for long runs, compiles it; short ones of
            recurrent networks, whose graphs are slower than Pyro while they are not compiled, are Pyro's; pyro runs
            pyro.infer.SVI itself, for what cannot be traced and as a reference.
        precision: of matrix products and convolutions in training by the compiled engine; bfloat16 is faster where the
            processor has instructions for it.
        max_norm: the norm of each step's gradient, summed over the batch for a loss of Pyro, is clipped to this,
            positive, by the compiled engine; null: not.
        epochs: passes over the training images, at least 1.
        batch_size: images per gradient step, at least 1; of several processes, those of all together.
        optimizer: adam, or the import path of an optimizer of torch or of your own, such as torch.optim.AdamW, whose
            options follow it: --optimizer.weight_decay 0.01.
        lr: learning rate, positive; the peak if the schedule has one.
        schedule: of the learning rate over the whole run; stages: 1, 3, 9, .. epochs at lr 10^(-i / 7), i = 0, 1, ..;
            trapezoid: up, constant until 0.6 of all steps, and down to zero, or, with options of it,
            pyro_vae.optimizers.Trapezoid --schedule.constant_until 0.8; or the import path of a class of your own.
        patience: stop after this many epochs without a better validation ELBO; null: never.
        weights: evaluate the last weights, those of the best validation ELBO, or the average over steps, of which later
            ones count more.
        average_decay: of that average, above 0 and below 1: about 1 / (1 - average_decay) of the last steps count.
        seed: of initialization, data order, training noise and evaluation noise, at least 0.
        device: auto takes a CUDA device if there is one; or cpu, cuda, cuda:1; or mps, for training alone: log p(x) is
            then computed on the CPU, in double precision, which mps lacks. One run on several devices: torchrun
            --nproc-per-node N -m pyro_vae train, on cuda:0, cuda:1, .., or with cpu in N processes.
        evidence: how test images are scored.
        run_dir: directory to write, new or empty; null: one under runs/, named by data set and time.
        resume: go on with the interrupted run in --run_dir, with its settings, in any number of processes.
        tensorboard: log curves to run_dir for TensorBoard.
        wandb: log settings, curves, result and figures to Weights & Biases, too: true, to its project pyro-vae, or the
            name of a project, or ENTITY/PROJECT. Without a login or a server, offline, in run_dir/wandb.
        mlflow: the same to MLflow, at MLFLOW_TRACKING_URI: true, to its experiment pyro-vae, or the name of one.
        report: write report.html to run_dir at the end, a page on the run; false: pyro-vae report writes it later.
    """

    MAIN: ClassVar[tuple[str, ...]] = (
        *("model", "dataset", "condition", "prior", "likelihood", "posterior", "encoder", "decoder", "latent_dim"),
        *("objective", "warmup", "epochs", "lr", "seed", "device", "run_dir", "resume", "report"),
    )
    """What ``--help`` shows."""
    ALSO: ClassVar[dict[str, str]] = {
        name: f"evidence.{name}" for name in ("num_samples", "num_images", "annealed_images", "annealing")
    }
    """Options as :class:`EvaluationSettings` calls them, and what they are here."""
    REFUSED: ClassVar[tuple[type, ...]] = (ReweightedWakeSleep,)
    """Losses that :func:`pyro_vae.fit` does not take: of several values."""

    model: Literal["VAE", "TwoLayerVAE", "HierarchicalVAE"] = "VAE"
    top: TopSettings = field(default_factory=TopSettings)
    levels: LevelsSettings = field(default_factory=LevelsSettings)
    condition: Sequence[str] | str | None = None
    condition_in: Sequence[Literal["prior", "decoder", "encoder"]] = ("decoder", "encoder")
    condition_hidden: Sequence[int] = (100,)
    dataset: Callable[[Path], Source] = MNIST
    data_dir: Path | None = None
    prior: Callable[[int], Prior] = StandardNormal
    likelihood: Callable[[int], Likelihood] = Bernoulli
    posterior: Callable[[int], Posterior] = MeanField
    encoder: Callable[[int, int], Network] = DEFAULT_NETWORK
    decoder: Callable[[int, int], Network] = DEFAULT_NETWORK
    missing: Literal["mask", "zeros"] = "mask"
    latent_dim: int = 50
    objective: Callable[[], Objective | ELBO] = Trace_ELBO
    warmup: float | None = None
    engine: Literal["compiled", "pyro"] = "compiled"
    precision: Literal["float32", "bfloat16"] = "float32"
    max_norm: float | None = None
    epochs: int = 40
    batch_size: int = 256
    optimizer: Literal["adam"] | Callable[[list[Tensor]], Optimizer] = "adam"
    lr: float = 5e-3
    schedule: Literal["one_cycle", "constant", "stages", "trapezoid"] | ScheduleClass = "one_cycle"
    patience: int | None = None
    weights: Literal["last", "best", "average"] = "last"
    average_decay: float = 0.999
    seed: int = 0
    device: str = "auto"
    evidence: EvidenceSettings = field(default_factory=EvidenceSettings)
    run_dir: Path | None = None
    resume: bool = False
    tensorboard: bool = False
    wandb: bool | str = False
    mlflow: bool | str = False
    report: bool = True

    def __post_init__(self):
        check_made(self)
        for name in ("latent_dim", "epochs", "batch_size", "patience"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"--lr must be positive and finite, got {self.lr}")
        check_seed(self.seed)
        for name in ("wandb", "mlflow"):
            check_project(name, getattr(self, name))
        if not 0 < self.average_decay < 1:
            raise ValueError(f"--average_decay must be above 0 and below 1, got {self.average_decay}")
        if self.max_norm is not None and not self.max_norm > 0:
            raise ValueError(f"--max_norm must be positive, got {self.max_norm}")
        for name, usual in (("precision", "float32"), ("max_norm", None)):
            if self.engine == "pyro" and getattr(self, name) != usual:
                raise ValueError(f"--{name} {getattr(self, name)} needs --engine compiled")
        loss = self.objective.func if isinstance(self.objective, partial) else self.objective
        if isinstance(loss, type) and issubclass(loss, self.REFUSED):
            raise ValueError(f"--objective {loss.__name__} has several values; choose one that has one, such as IWAE")
        self._check_warmup(loss)
        self._check_condition()
        if self.model == "HierarchicalVAE" and self.latent_dim != Settings.latent_dim:
            raise ValueError(f"--latent_dim {self.latent_dim}: HierarchicalVAE has --levels.latent_dims, of each level")
        if self.model != "HierarchicalVAE" and self.levels != LevelsSettings():
            raise ValueError(f"--levels is for --model HierarchicalVAE, not {self.model}")

    def _check_warmup(self, loss: object) -> None:
        if self.warmup is None:
            return
        if not 0 <= self.warmup < 1:
            raise ValueError(f"--warmup must be at least 0 and below 1, a share of all steps, got {self.warmup}")
        if self.warmup and isinstance(loss, type) and not issubclass(loss, ELBO):
            raise ValueError(
                f"--warmup is for a loss of Pyro, not for --objective {loss.__name__}; "
                "BetaELBO has --objective.warmup, and InTurn may have it as --objective.first"
            )

    @property
    def conditions(self) -> tuple[str, ...]:
        """The names of what the model is told."""
        return (self.condition,) if isinstance(self.condition, str) else tuple(self.condition or ())

    def _check_condition(self) -> None:
        for name in ("condition_in", "condition_hidden"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # a list, if it comes from the command line
        parts = self.condition_in
        check_widths("--condition_hidden", self.condition_hidden)
        if not parts or len(set(parts)) < len(parts) or not set(parts) <= {"prior", "decoder", "encoder"}:
            raise ValueError(f"--condition_in must be different ones of prior, decoder, encoder, got {list(parts)}")
        names = self.conditions
        if self.condition is None:
            if set(parts) != {"decoder", "encoder"}:
                raise ValueError("--condition_in needs --condition, what the parts are told")
            return
        if not names or len(set(names)) < len(names):
            raise ValueError(f"--condition must be different names, got {list(names)}")
        if self.model != "VAE":
            raise ValueError(f"--condition is for --model VAE, {self.model} takes none")
        prior = self.prior.func if isinstance(self.prior, partial) else self.prior
        if "prior" in parts and prior is not StandardNormal:
            raise ValueError("--prior cannot be chosen with prior in --condition_in: it is a Gaussian given c")


EVALUATION = """Score a finished run again: another estimator of log p(x), more samples, other images, training images.

Usage: pyro-vae evaluate RUN [options]

The result is printed and written to a directory in RUN/evaluations, as result.json and, for each datum, evidence.nc;
nothing is ever overwritten."""


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of one evaluation.

    Args:
        run: directory of a finished run, or hf://USER/NAME; may stand first, without --run.
        estimator: importance; annealed: annealed importance sampling; bdmc: bidirectional Monte Carlo, which encloses
            log p(x) of images that the model itself draws; sandwich: the same of the images of the split, from long
            posterior chains; smc, bridge, thermodynamic: other estimators, to compare with.
        split: test or training images.
        num_images: how many of them, drawn at random, the same in every evaluation, at least 2; null: all.
        num_samples: importance samples per image, at least 1; literature uses 5000. This, --num_images and --annealing
            may be called as pyro-vae train calls them, --evidence.num_samples, and there as here.
        proposal: of importance sampling: the guide, or a Gaussian at each posterior's mode with its curvature.
        widening: factor of the Laplace proposal's standard deviations, positive; 1.1 lightens the weights' tail.
        annealing: settings of annealed importance sampling.
        published: annealing as published, in place of --annealing: Wu et al. 2017, or the code of Cremer et al. 2018;
            both take 10,000 temperatures, which --annealing.num_temperatures may lower.
        seed: of the estimate, at least 0.
        device: auto takes a CUDA device if there is one; or cpu, cuda, cuda:1.
        name: of the directory in the run's evaluations; null: made of the estimator and the split.
        run_dir: directory to write, new or empty, in place of that one.
        trust: build whatever classes the run's settings name; false: only those of pyro_vae; null: false for a run of
            hf://, else true.
        resume: print the result where this evaluation is finished already, which is refused otherwise. One that was
            interrupted is gone on with by the same command in any case.
        workers: processes that share the blocks of data, each with one thread of the processor; null: as many as torch
            has threads, on a GPU one. No digit depends on it.
        ray: let a Ray cluster compute, one thread, or on a GPU one GPU, for each of its workers: one that is started
            on this machine, or at an address: auto, host:port or ray://host:port.
    """

    DESCRIPTION: ClassVar[str] = EVALUATION
    ALSO: ClassVar[dict[str, str]] = {f"evidence.{name}": name for name in ("num_samples", "num_images", "annealing")}
    """Options as :class:`Settings` calls them, and what they are here."""
    BEGINS: ClassVar[bool] = True
    MAIN: ClassVar[tuple[str, ...]] = (
        *("run", "estimator", "split", "num_images", "num_samples", "proposal", "seed", "device", "name", "run_dir"),
        *("workers", "ray"),
    )

    run: Path
    estimator: Literal["importance", "annealed", "bdmc", "sandwich", "smc", "bridge", "thermodynamic"] = "annealed"
    split: Literal["test", "train"] = "test"
    num_images: int | None = 500
    num_samples: int = 5000
    proposal: Literal["guide", "laplace"] = "guide"
    widening: float = 1.0
    annealing: Annealing = field(default_factory=Annealing)
    published: Literal["wu_2017", "cremer_2018"] | None = None
    seed: int = 0
    device: str = "auto"
    name: str | None = None
    run_dir: Path | None = None
    trust: bool | None = None
    resume: bool = False
    workers: int | None = None
    ray: bool | str = False

    def __post_init__(self):
        check_made(self)
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers must be at least 1, got {self.workers}")
        if self.ray and self.workers is not None:
            raise ValueError("--workers are processes on this machine, --ray is a cluster: choose one of them")
        if self.num_images is not None and self.num_images < 2:
            raise ValueError(f"--num_images must be at least 2, got {self.num_images}")
        if self.num_samples < 1:
            raise ValueError(f"--num_samples must be at least 1, got {self.num_samples}")
        if not 0 < self.widening < float("inf"):
            raise ValueError(f"--widening must be positive and finite, got {self.widening}")
        if self.widening != 1 and self.proposal == "guide":
            raise ValueError("--widening is for --proposal laplace; the guide is taken as it is")
        check_seed(self.seed)
        importance = self.estimator == "importance"
        if not importance and (self.proposal != "guide" or self.num_samples != EvaluationSettings.num_samples):
            raise ValueError(f"--num_samples and --proposal are for --estimator importance, not {self.estimator}")
        if self.estimator not in ("annealed", "bdmc", "sandwich") and (self.annealing != Annealing() or self.published):
            raise ValueError(
                f"--annealing and --published are for --estimator annealed, bdmc or sandwich, not {self.estimator}"
            )
        if self.published and replace(self.annealing, num_temperatures=None) != Annealing():
            raise ValueError("--published leaves only --annealing.num_temperatures to choose")
        if self.estimator == "bdmc" and self.split == "train":
            raise ValueError("--split train: --estimator bdmc scores images that the model draws, of neither split")
        if self.name is not None:
            check_name("--name", self.name)
            if not self.name.strip(".") or Path(self.name).name != self.name or self.name.startswith("-"):
                raise ValueError(f"--name must be a plain file name, got {self.name}")
