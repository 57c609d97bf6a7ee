"""The rows of published tables: what was published, and the arguments of pyro-vae train that make the same model."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

ScheduleName = Literal["paper", "short", "turns"]


class Schedule(NamedTuple):
    """How the rows of a table are trained.

    Attributes:
        batch_size: of a gradient step.
        arguments: of pyro-vae train, for optimizer, rate, and when to stop.
        epochs: all there are, or at most; None: as many as the budget has.
        warmup: share of the epochs, at least of ``epochs``, over which the weight of the KL divergence rises to 1.
        words: what differs from the published protocol.
        first: share of the epochs in which the ELBO of one sample is trained, before the bound of the row.
    """

    batch_size: int
    arguments: str
    epochs: int | None
    warmup: float
    words: Sequence[str]
    first: float = 0.0


@dataclass(frozen=True)
class Row:
    """A row of a published table.

    Attributes:
        name: of the row, and of its directory.
        published: test log-likelihood, nats per image, by 5,000 importance samples.
        units: active units, layer by layer; empty: not published.
        dataset, binarization: of the data; log p(x) of others means something else.
        fingerprint: of the content of the data; None: not known.
        num_train: training images.
        num_test: test images.
        data, model, objective: arguments of pyro-vae train.
    """

    name: str
    published: float
    units: str
    dataset: str
    binarization: str
    fingerprint: str | None
    num_train: int
    num_test: int
    data: str
    model: str
    objective: str

    def steps(self, schedule: Schedule) -> int:
        """Gradient steps of an epoch."""
        return -(-self.num_train // schedule.batch_size)

    @property
    def takes_turns(self) -> bool:
        """Whether the bound is another than the ELBO of one sample, which is cheaper."""
        return not self.objective.endswith("num_particles 1")

    def given(self) -> list[str]:
        """Arguments of pyro-vae train for data, model and bound alone."""
        return shlex.split(f"{self.data} {self.model} {self.objective}")

    def arguments(self, schedule: Schedule, epochs: int) -> str:
        """Arguments of pyro-vae train that train this row in so many epochs."""
        objective, first = self.objective, "ELBO"
        warmup = round(schedule.warmup * (schedule.epochs or epochs) * self.steps(schedule))
        turn = round(schedule.first * epochs) * self.steps(schedule) if self.takes_turns else 0
        if warmup and not turn and "IWAE" not in objective:
            objective = objective.replace("ELBO", f"BetaELBO --objective.warmup {warmup}")
        elif warmup:  # a bound of several samples is no sum with a weight for its KL divergence
            first, turn = f"BetaELBO --objective.first.warmup {warmup}", turn or warmup
        if turn:
            then = objective.replace("--objective", "--objective.then")
            objective = (
                f"--objective pyro_vae.infer.turns.InTurn --objective.first {first} {then} --objective.steps {turn}"
            )
        budget = f"--batch_size {schedule.batch_size} --epochs {epochs}"
        return " ".join([self.data, self.model, objective, budget, USUAL, schedule.arguments])


class Table(NamedTuple):
    """A published table.

    Attributes:
        title: with its source.
        rows: that are made again.
        usual: the names, or patterns, of rows that are made if none are asked for.
        schedules: by name.
        words: what differs from the published protocol, whatever the schedule.
    """

    title: str
    rows: Sequence[Row]
    usual: Sequence[str]
    schedules: Mapping[ScheduleName, Schedule]
    words: Sequence[str]


USUAL = "--engine compiled --precision float32 --max_norm null"
"""Settings that are written down, so that no row depends on the defaults of pyro-vae train."""

MNIST = "bf864fe25589d1b8"

TANH = " ".join(f"--{part} MLP --{part}.hidden [200,200] --{part}.activation tanh" for part in ("encoder", "decoder"))
PARTS = "--prior StandardNormal --posterior MeanField --likelihood Bernoulli"
LAYERS = {
    1: f"--model VAE --latent_dim 50 {TANH} {PARTS}",
    2: f"--model TwoLayerVAE --latent_dim 100 --top.latent_dim 50 --top.hidden [100,100] {TANH} {PARTS}",
}
"""Networks of Burda et al. (2016), appendix C."""

IWAE_FIGURES = {
    ("mnist", 1): [
        *((1, "vae", 86.76, "19"), (5, "vae", 86.47, "20"), (5, "iwae", 85.54, "22")),
        *((50, "vae", 86.35, "20"), (50, "iwae", 84.78, "25")),
    ],
    ("mnist", 2): [
        *((1, "vae", 85.33, "16+5"), (5, "vae", 85.01, "17+5"), (5, "iwae", 83.89, "21+5")),
        *((50, "vae", 84.78, "17+5"), (50, "iwae", 82.90, "26+7")),
    ],
    ("omniglot", 1): [
        *((1, "vae", 108.11, "28"), (5, "vae", 107.62, "28"), (5, "iwae", 106.12, "34")),
        *((50, "vae", 107.80, "28"), (50, "iwae", 104.67, "41")),
    ],
    ("omniglot", 2): [
        *((1, "vae", 107.58, "28+4"), (5, "vae", 106.31, "30+5"), (5, "iwae", 104.79, "38+6")),
        *((50, "vae", 106.30, "30+5"), (50, "iwae", 103.38, "44+7")),
    ],
}
"""Burda et al. (2016), Table 1: by data and stochastic layers, K, bound, negative log-likelihood, active units."""


def _iwae_rows() -> list[Row]:
    data = {
        "mnist": ("MNIST", "dynamic", MNIST, 59_600, 10_000, "--dataset MNIST --dataset.num_validation 400"),
        "omniglot": ("Omniglot", "dynamic", None, 23_000, 8_070, "--dataset Omniglot --dataset.num_validation 1345"),
    }
    rows = []
    for (name, layers), figures in IWAE_FIGURES.items():
        *what, arguments = data[name]
        arguments += " --dataset.binarization dynamic"
        for k, bound, value, units in figures:
            objective = f"--objective {'ELBO' if bound == 'vae' else 'IWAE'} --objective.num_particles {k}"
            title = f"{name}-{layers}-{bound}-k{k}"
            rows.append(Row(title, -value, units, *what, arguments, LAYERS[layers], objective))  # pyright: ignore
    return rows


SHORT = Schedule(
    250,
    "--schedule one_cycle --lr 4e-3 --weights last --optimizer adam",
    None,
    0.1,
    (
        "The schedule is not the paper's, which has 3,280 epochs of batches of 20 at eight rates from 1e-3 to 1e-4: "
        "here batches of 250, a rate that rises to 4e-3 and falls to 0 in one cycle, and as many epochs as are told; "
        "in the first tenth of them the weight of the KL divergence of the ELBO rises to 1, which is trained, with one "
        "sample, before an IWAE.",
    ),
)
IWAE = Table(
    "Burda, Grosse & Salakhutdinov (2016), Importance weighted autoencoders, Table 1",
    _iwae_rows(),
    ("mnist-1-*",),
    {
        "paper": Schedule(
            20,
            "--schedule stages --lr 1e-3 --weights last --optimizer torch.optim.Adam --optimizer.betas [0.9,0.999] "
            "--optimizer.eps 5e-6 --optimizer.fused true",
            3280,
            0.0,
            (
                "Adam: the paper has beta1 = 0.9, which is taken here, the authors' code 0.99. Their eps of 1e-4 is "
                "for gradients summed over the 20 images of a batch; for means, as here, it is 5e-6. Their second "
                "moments start at 1, and are corrected as if at 0, where they start here.",
                "Batches of 20: drawn anew in each epoch here, the same ones in the same order in the authors' code.",
            ),
        ),
        "short": SHORT,
        "turns": SHORT._replace(
            words=(
                SHORT.words[0].removesuffix(".")
                + "; of these the first 80 % train the ELBO of one sample, and only the others the bound of the row "
                "(the paper's Table 2 goes on likewise from a VAE to an IWAE of K = 50: -84.88).",
            ),
            first=0.8,
        ),
    },
    (
        "Data: of MNIST 59,600 training images, the last 400 are held out, as in the authors' code; the paper says "
        "60,000. Training images are binarized anew at each use, as published; test images are drawn once, with "
        "another seed than theirs.",
        "Start: Glorot-uniform weights, and the decoder's last bias at the logit of the mean image, as in the code; "
        "the encoder's last layer is drawn for means and scales together.",
        "Active units are those whose E[z | x] varies by more than 0.01 over test images; in the code, over the first "
        "500 training images.",
        "Omniglot, 2 layers, K = 1: the table has 107.58 for the VAE and 107.56 for the IWAE, which are one model.",
    ),
)

GATED = " ".join(f"--{part} GatedMLP --{part}.hidden [300,300]" for part in ("encoder", "decoder"))
CLIPPED = "experiments.published.parts.Clipped"
VAMP = f"--model VAE --latent_dim 40 {GATED} --posterior {CLIPPED}Gaussian --likelihood {CLIPPED}Bernoulli"
PRIORS = {"normal": "--prior StandardNormal", "vamp": "--prior VampPrior --prior.components 500"}
VAMP_FIGURES = {
    ("static", "normal"): -88.56,
    ("static", "vamp"): -85.57,
    ("dynamic", "normal"): -84.50,
    ("dynamic", "vamp"): -82.38,
}
"""Tomczak & Welling (2018), Table 1, VAE (L = 1)."""


def _vamp_rows() -> list[Row]:
    rows = []
    for (binarization, prior), value in VAMP_FIGURES.items():
        dataset, known = ("StaticMNIST", None) if binarization == "static" else ("MNIST", MNIST)
        data = f"--dataset {dataset} --dataset.binarization {binarization} --dataset.num_validation 10000"
        model = f"{VAMP} {PRIORS[prior]}"
        name = f"vamp-{binarization}-{prior}"
        rows.append(Row(name, value, "", dataset, binarization, known, 50_000, 10_000, data, model, "--objective ELBO"))
    return rows


VAMPPRIOR = Table(
    "Tomczak & Welling (2018), VAE with a VampPrior, Table 1, MNIST",
    _vamp_rows(),
    ("vamp-dynamic-*",),
    {
        "paper": Schedule(
            100,
            "--schedule constant --lr 5e-4 --optimizer experiments.published.parts.AdamNormGrad --patience 150 "
            "--weights best",
            2000,
            0.05,
            (
                "Rate: 5e-4, of the paper's 1e-4 and 5e-4, between which validation images chose.",
                "Warm-up: linear in steps over 100 epochs; published in epochs.",
                "Training ends after 150 epochs without a better validation ELBO, and the best weights are scored; in "
                "the paper after 50, which are counted only when the warm-up is over.",
            ),
        ),
        "short": Schedule(
            100,
            "--schedule trapezoid --lr 2e-3 --weights last --optimizer adam",
            None,
            0.1,
            (
                "The schedule is not the paper's, which has at most 2,000 epochs of Adam on normalized gradients, 100 "
                "of them for warm-up: here Adam, a rate of 2e-3 that falls linearly to 0 in the last 40 % of the "
                "steps, as many epochs as told, and a warm-up of a tenth of them.",
            ),
        ),
    },
    (
        "Data: 50,000, 10,000 and 10,000 images, as published. Of dynamic MNIST, validation and test images are drawn "
        "once, as published, with another generator.",
        "Pseudo-inputs start as training images; in the paper they are drawn from N(0.05, 0.01).",
        "Start: He-normal weights but for the last layers, which are Glorot-uniform here, and the decoder's last bias "
        "at the logit of the mean image.",
        "Log-variances of q are clipped to [-6, 2] and pixels' probabilities to [1e-5, 1 - 1e-5], as in the authors' "
        "code.",
        "Left out: HVAE (L = 2), -86.05 and with VampPrior -83.19 on static, -82.42 and -81.24 on dynamic MNIST. Its "
        "q(z2 | x) q(z1 | x, z2) and p(x | z1, z2) are not those of TwoLayerVAE, q(z1 | x) q(z2 | z1) and p(x | z1), "
        "and its gated networks with two branches are not the residual ones of HierarchicalVAE.",
    ),
)
TABLES = {"iwae": IWAE, "vampprior": VAMPPRIOR}
