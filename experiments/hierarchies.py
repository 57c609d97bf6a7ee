"""How many latent dimensions of a deep hierarchy does annealing stand?

Usage: python -m experiments.hierarchies [options]

Hierarchies of L levels of D latent variables each, whose log p(x) is known: linear-Gaussian ones, in closed form, and
curved ones, of D chains z_L -> .. -> z_1 -> x with a bent mean and a Bernoulli pixel at the end, each by quadrature
over one dimension after the other. On data that the models draw, annealed importance sampling is compared with the
truth: its error with the one it states, in how many seconds; and importance sampling from a factorized guide beside it.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyro_vae import (
    MLP,
    Annealing,
    Bernoulli,
    Conditional,
    Gaussian,
    MeanField,
    Network,
    StandardNormal,
    annealed_importance_sampling,
    cli,
    importance_sampling,
    runs,
)
from pyro_vae.hierarchical import HierarchicalVAE, Level
from pyro_vae.infer import Latents
from pyro_vae.infer.evidence.result import Evidence
from pyro_vae.infer.trees import first_tensor
from pyro_vae.parts.posteriors import FullRank

STEP, NOISE = 0.6, 0.7
"""Standard deviations: of z_l given z_(l+1), and of a linear model's x given z_1."""


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison.

    Args:
        sizes: levels x latent variables of each, as in '[4x16, 8x128]'; at least 2 levels.
        kinds: linear and curved.
        num_data: data that each model draws, at least 2.
        num_samples: importance samples of each, at least 1.
        annealing: settings of annealed importance sampling.
        run_dir: directory to write, new or empty; null: one under runs/, named by time.
        seed: of models, data and chains, at least 0.
        device: auto takes a GPU if there is one.
    """

    sizes: Sequence[str] = ("4x16", "4x64", "8x128")
    kinds: Sequence[Literal["linear", "curved"]] = ("linear", "curved")
    num_data: int = 16
    num_samples: int = 1000
    annealing: Annealing = field(default_factory=Annealing)
    run_dir: Path | None = None
    seed: int = 0
    device: str = "auto"

    def __post_init__(self):
        for size in self.sizes:
            both = size.split("x")
            if len(both) != 2 or not all(n.isdecimal() and int(n) > 0 for n in both) or int(both[0]) < 2:
                raise ValueError(f"--sizes: expected levels x variables, at least 2 levels, such as 4x16, got {size}")
        if not self.sizes or not self.kinds:
            raise ValueError("--sizes and --kinds: name at least one")
        if self.num_data < 2 or self.num_samples < 1:
            raise ValueError("--num_data must be at least 2, --num_samples at least 1")
        runs.check_seed(self.seed)


class Task(NamedTuple):
    """A hierarchy, data that it has drawn, shape ``(N, X)``, and their log p(x), ``(N,)``."""

    vae: HierarchicalVAE
    x: Tensor
    log_px: Tensor


def main(argv: Sequence[str] | None = None) -> Path:
    """Compare as told by ``argv``; return the directory written.

    Raises:
        RunError: for a mistake in ``argv``.
    """
    settings, _ = runs.parse(Settings, argv)
    device = runs.choose_device(settings.device)
    run_dir = runs.run_dir_for("hierarchies", settings.run_dir)
    runs.make_directory(run_dir)
    rows = []
    for kind in settings.kinds:
        for size in settings.sizes:
            torch.manual_seed(settings.seed)
            levels, dim = map(int, size.split("x"))
            task = (linear if kind == "linear" else curved)(levels, dim, settings.num_data)
            rows.append(
                {"kind": kind, "levels": levels, "dim": dim, "num_data": settings.num_data}
                | measure(task, settings, device)
            )
            print(line(rows[-1]))
    text = "\n".join([*HEAD, *map(line, rows)])
    return runs.conclude(run_dir, text, {"rows": rows}, device)


def measure(task: Task, settings: Settings, device: torch.device) -> dict[str, Any]:
    """Errors of both estimators, in nats per datum, and their seconds."""
    vae, x = task.vae.to(device), task.x.to(device)
    result = {}
    start = time.perf_counter()
    annealed = annealed_importance_sampling(vae.model, vae.guide, x, settings.annealing)
    result["annealed"] = judged(annealed, task.log_px) | {"seconds": time.perf_counter() - start}
    start = time.perf_counter()
    sampled = importance_sampling(vae.model, vae.guide, x, settings.num_samples, num_checked=0)
    result["importance"] = judged(sampled, task.log_px) | {"seconds": time.perf_counter() - start}
    return result


def judged(found: Evidence, log_px: Tensor) -> dict[str, float]:
    """How far estimates are from the truth, and what they say of it."""
    error, stated = found.log_px.cpu().double() - log_px, found.mc_se.cpu().double()
    reliable = torch.ones_like(error) if found.reliable is None else found.reliable.cpu().double()
    evaluations = torch.full_like(error, math.nan) if found.evaluations is None else found.evaluations.cpu().double()
    return {
        "bias": error.mean().item(),
        "rms": error.square().mean().sqrt().item(),
        "stated": stated.square().mean().sqrt().item(),
        "covered": (error.abs() < 1.96 * stated).double().mean().item(),
        "reliable": reliable.mean().item(),
        "evaluations": evaluations.mean().item(),
    }


HEAD = (
    "| model | latents | error (rms), nats | mean error | stated | covered | reliable | evaluations | seconds a datum "
    "| importance sampling: mean error |",
    "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    a, size = row["annealed"], f"{row['levels']} x {row['dim']}"
    return (
        f"| {row['kind']}, {size} | {row['levels'] * row['dim']:,} | {a['rms']:.3f} | {a['bias']:+.3f} "
        f"| {a['stated']:.3f} | {a['covered']:.0%} | {a['reliable']:.0%} | {a['evaluations']:,.0f} "
        f"| {a['seconds'] / row['num_data']:.1f} | {row['importance']['bias']:+.2f} |"
    )


def linear(levels: int, dim: int, num_data: int, exact: bool = False) -> Task:
    """z_L ~ N(0, I), z_l ~ N(A_l z_(l+1), 0.6^2 I), A_l 0.8 times orthogonal, x ~ N(W z_1, 0.7^2 I); in float64.

    The guide is factorized, with the posterior's means and standard deviations; or, if ``exact``, the posterior.
    """
    maps = [math.sqrt(1 - STEP**2) * torch.linalg.qr(torch.randn(dim, dim).double())[0] for _ in range(levels - 1)]
    weight = torch.randn(dim, dim).double() / math.sqrt(dim)
    covariance = joint_covariance(maps, weight)
    places = [slice(dim * n, dim * (n + 1)) for n in range(levels + 1)]  # of x, z_1, .. z_L
    made = []
    for n in range(1, levels + 1):
        given = [*range(dim)] + [*range(dim * (n + 1), dim * (n + 2))] * (exact and n < levels)
        loc, spread = conditional(covariance, places[n], given)
        loc = torch.cat([loc, torch.zeros(dim, dim * (n < levels) - loc.shape[1] + dim).double()], 1)
        q = fixed_normal(loc, spread, FullRank(dim) if exact else MeanField(dim))
        p = fixed_normal(maps[n - 1], STEP**2 * torch.eye(dim).double(), MeanField(dim)) if n < levels else None
        made.append(Level(q, p))
    decoder = MLP(dim, dim, hidden=[])
    set_affine(decoder, weight, torch.zeros(dim).double())
    head = Gaussian(dim, scale=NOISE)
    vae = HierarchicalVAE(StandardNormal(dim), made, Conditional(decoder, head)).double()
    head.fixed_scale.fill_(NOISE)
    of_x = torch.distributions.MultivariateNormal(torch.zeros(dim).double(), covariance[places[0], places[0]])
    x = of_x.sample((num_data,))
    return Task(vae, x, of_x.log_prob(x))


def joint_covariance(maps: Sequence[Tensor], weight: Tensor) -> Tensor:
    """That of (x, z_1, .., z_L), of D numbers each."""
    dim, levels = len(weight), len(maps) + 1
    eye = torch.eye(dim).double()
    # each variable is a linear map of the noises of (x, z_1, .., z_L)
    rows = [torch.zeros(dim, dim * (levels + 1)).double() for _ in range(levels + 1)]
    rows[levels][:, dim * levels :] = eye
    for n in range(levels - 1, 0, -1):
        rows[n] = maps[n - 1] @ rows[n + 1]
        rows[n][:, dim * n : dim * (n + 1)] += STEP * eye
    rows[0] = weight @ rows[1]
    rows[0][:, :dim] += NOISE * eye
    every = torch.cat(rows)
    return every @ every.mT


def conditional(covariance: Tensor, place: slice, given: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The regression of one variable on others, and the covariance that is left."""
    known, cross = covariance[given][:, given], covariance[place][:, given]
    weight = torch.linalg.solve(known, cross.mT).mT
    return weight, covariance[place, place] - weight @ cross.mT


def fixed_normal(loc: Tensor, covariance: Tensor, head: MeanField | FullRank) -> Conditional:
    """N(loc c, covariance) given c, or that with its variances alone."""
    network, dim = MLP(loc.shape[1], sum(head.sizes), hidden=[]), len(loc)
    bias = [torch.zeros(dim).double(), covariance.diagonal().log() / 2]
    if isinstance(head, FullRank):
        tril = torch.linalg.cholesky(covariance)
        below = (tril / tril.diagonal())[torch.tril_indices(dim, dim, -1).unbind()]
        bias = [torch.zeros(dim).double(), tril.diagonal().log(), below]
    weight = torch.zeros(sum(head.sizes), loc.shape[1]).double()
    weight[:dim] = loc
    set_affine(network, weight, torch.cat(bias))
    return Conditional(network, head)


def set_affine(network: MLP, weight: Tensor, bias: Tensor) -> None:
    network.double()
    for name, value in (("weight", weight), ("bias", bias)):
        network.layers[0].get_parameter(name).data = value.clone()


class Bent(Network):
    """z -> tanh(z), or another function of each number, and the logarithm of a standard deviation."""

    def __init__(self, dim: int, log_scale: float):
        super().__init__(dim, 2 * dim)
        self.log_scale = log_scale

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([bent(features), torch.full_like(features, self.log_scale)], -1)


def bent(z: Tensor) -> Tensor:
    """The mean of z_l given z_(l+1)."""
    return 1.2 * torch.tanh(z)


class Logits(Network):
    """The logit of each pixel, of its own z."""

    def __init__(self, dim: int):
        super().__init__(dim, dim)

    def forward(self, features: Tensor) -> Tensor:
        return 3 * features - 0.5


def curved(levels: int, dim: int, num_data: int) -> Task:
    """D chains z_L ~ N(0, 1), z_l ~ N(1.2 tanh(z_(l+1)), 0.6^2), x ~ Bernoulli(logit = 3 z_1 - 0.5); in float64.

    The guide of z_l is N(0.5 x, 0.8^2).
    """
    made = []
    for n in range(1, levels + 1):
        network = MLP(dim * (1 + (n < levels)), 2 * dim, hidden=[])
        weight = torch.zeros(2 * dim, network.in_features).double()
        weight[:dim, :dim] = 0.5 * torch.eye(dim)
        set_affine(network, weight, torch.tensor([0.0, math.log(0.8)]).double().repeat_interleave(dim))
        p = Conditional(Bent(dim, math.log(STEP)), MeanField(dim)) if n < levels else None
        made.append(Level(Conditional(network, MeanField(dim)), p))
    likelihood = Conditional(Logits(dim), Bernoulli(dim))
    vae = HierarchicalVAE(StandardNormal(dim), made, likelihood).double()
    data, _ = Latents(vae.model, vae.guide, torch.zeros(num_data, dim).double()).simulate()
    x = first_tensor(data)
    one = probability_of_one(levels)
    return Task(vae, x, torch.where(x == 1, math.log(one), math.log1p(-one)).sum(-1))


def probability_of_one(levels: int) -> float:
    """p(x = 1) of one chain, by the trapezoidal rule for one z after the other."""
    grid = torch.linspace(-9, 9, 2001).double()
    step = float(grid[1] - grid[0])
    density = torch.exp(-0.5 * grid**2) / math.sqrt(2 * math.pi)
    for _ in range(levels - 1):
        kernel = torch.exp(-0.5 * ((grid - bent(grid)[:, None]) / STEP) ** 2) / (STEP * math.sqrt(2 * math.pi))
        density = step * density @ kernel
    return float(step * (density * torch.sigmoid(3 * grid - 0.5)).sum())


if __name__ == "__main__":
    cli.guarded(main)
