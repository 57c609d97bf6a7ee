"""Does the derivation of the lecture hold, step by step? From the bent coin to the reparametrized gradient.

1. Maximum likelihood: 400 heads in 1,000 tosses. The likelihood of a coin peaks at theta = 0.4; stochastic variational
   inference on a Pyro program without latent variables, whose bound is the log-likelihood, finds the same.
2. The decomposition, for any q, on two models whose truth is known (a linear-Gaussian VAE in closed form; a Bernoulli
   decoder of one latent dimension by quadrature):

       log p(x) = E_q[log p(x | z)] - KL(q || p(z)) + KL(q || p(z | x))

   so that the first two terms are a bound, which touches where q is the posterior.
3. The gradient reaches the encoder through z = mu + sigma eps, or by the score function, with more noise; through a z
   that is merely drawn it does not.

Everything is compared with a closed form or with an independent computation, in float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_vae import (
    MLP,
    VAE,
    Bernoulli,
    Conditional,
    LinearGaussianVAE,
    MeanField,
    PyroSVI,
    StandardNormal,
    cli,
    log_weights,
    quadrature,
    runs,
)
from pyro_vae.infer.programs import Program
from pyro_vae.runs import figures


@dataclass(frozen=True)
class Settings:
    """Settings of the lesson.

    Args:
        tosses: of the bent coin, at least 2.
        heads: how many of them, at least 1 % and at most 99 %.
        num_draws: of each gradient and each log-weight, at least 100.
        dims: latent dimensions of the models on which gradients are drawn, each at least 1.
        steps: of each training by a noisy gradient, at least 1.
        seed: of models and draws, at least 0.
        run_dir: directory to write, new or empty; null: one under runs/, named by time.
    """

    tosses: int = 1000
    heads: int = 400
    num_draws: int = 20_000
    dims: Sequence[int] = (1, 2, 5, 10, 20, 50)
    steps: int = 1000
    seed: int = 0
    run_dir: Path | None = None

    def __post_init__(self):
        if not 0.01 <= self.heads / max(1, self.tosses) <= 0.99:
            raise ValueError(f"--heads must be from 1 % to 99 % of --tosses, got {self.heads} of {self.tosses}")
        if self.num_draws < 100:
            raise ValueError(f"--num_draws must be at least 100, got {self.num_draws}")
        runs.check_numbers("--dims", self.dims)
        if self.steps < 1:
            raise ValueError(f"--steps must be at least 1, got {self.steps}")
        runs.check_seed(self.seed)


def main(argv: Sequence[str] | None = None) -> Path:
    """Go through the derivation as told by ``argv``; return the directory written.

    Raises:
        RunError: for a mistake in ``argv``.
    """
    settings, text = runs.parse(Settings, argv)
    run_dir = runs.run_dir_for("derivation", settings.run_dir)
    runs.open_run(run_dir, text, resume=None)
    torch.manual_seed(settings.seed)
    coin = toss(settings.heads, settings.tosses)
    truths = {"linear-Gaussian, closed form": linear_gaussian(), "Bernoulli decoder, quadrature": bernoulli()}
    terms = {name: decompose(truth, settings.num_draws) for name, truth in truths.items()}
    torch.manual_seed(settings.seed)  # so that these models do not depend on how many draws the part before took
    gradients = [noise(dim, settings.num_draws) for dim in settings.dims]
    dim = max(settings.dims)
    vae, x = linear_gaussian_vae(dim, dim)
    curves = {name: train(vae, x, kind, settings.steps) for name, kind in NORMALS.items()}
    shifts, bounds, log_px = touch()
    lesson = report(settings, coin, terms, gradients, curves)
    with runs.writing(run_dir):
        plot_coin(coin, run_dir / "coin.png")
        plot_bound(shifts, bounds, log_px, run_dir / "bound.png")
        plot_gradients(gradients, curves, dim, run_dir / "gradients.png")
    result = {
        "coin": {name: value for name, value in coin._asdict().items() if isinstance(value, float)},
        "decomposition": {name: [each._asdict() for each in rows] for name, rows in terms.items()},
        "gradients": [each._asdict() for each in gradients],
        "final_gap": {name: curve[settings.steps] for name, curve in curves.items()},
    }
    return runs.conclude(run_dir, lesson, result, torch.device("cpu"))


# 1. Maximum likelihood


class Coin(NamedTuple):
    """The likelihood of a coin, and where it peaks.

    Attributes:
        grid, log_likelihood: the curve, over theta between 0 and 1, in nats for all tosses together.
        peak: where the curve is highest.
        trained: theta after stochastic variational inference.
        exact: heads / tosses.
        error: standard error of theta, from the curvature at the peak.
    """

    grid: Tensor
    log_likelihood: Tensor
    peak: float
    trained: float
    exact: float
    error: float


class BentCoin(nn.Module):
    """A Pyro program without latent variables: its guide is empty, so that its ELBO is the log-likelihood."""

    def __init__(self):
        super().__init__()
        self.logit = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def model(self, x: Tensor) -> Tensor:
        """p(x) for tosses ``x``, shape ``(N,)``."""
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("x", dist.Bernoulli(logits=self.logit), obs=x)

    def guide(self, x: Tensor) -> None:
        """Nothing is latent."""


def toss(heads: int, tosses: int) -> Coin:
    """The likelihood of ``heads`` in ``tosses``, on a grid, by SVI, and by calculus."""
    grid = torch.linspace(0, 1, 10 * tosses + 1, dtype=torch.float64)[1:-1]

    def log_likelihood(theta: Tensor) -> Tensor:
        return heads * theta.log() + (tosses - heads) * (-theta).log1p()

    x = (torch.arange(tosses) < heads).double()
    coin = BentCoin()
    # 4 / tosses is one over the largest curvature in the logit, so that each step comes nearer
    svi = PyroSVI(coin.model, coin.guide, torch.optim.SGD([coin.logit], lr=4 / tosses), Trace_ELBO())
    for _ in range(MOST_STEPS):
        before = coin.logit.item()
        svi.step(x)
        if abs(coin.logit.item() - before) < 1e-12:
            break
    exact = torch.tensor(heads / tosses, dtype=torch.float64)
    curvature = torch.autograd.functional.hessian(log_likelihood, exact)
    curve = log_likelihood(grid)
    peak = grid[curve.argmax()].item()
    return Coin(grid, curve, peak, coin.logit.sigmoid().item(), exact.item(), (-cast(Tensor, curvature)).rsqrt().item())


MOST_STEPS = 10_000


# 2. The decomposition


class Terms(NamedTuple):
    """The decomposition of log p(x) for one q, in nats.

    Attributes:
        q: its name.
        reconstruction: E_q[log p(x | z)].
        kl_prior: KL(q || p(z)).
        kl_posterior: KL(q || p(z | x)).
        log_px: by another way than through these terms.
        error: reconstruction - kl_prior + kl_posterior - log_px.
        sampled: the ELBO by draws of Pyro's programs; None if q cannot be drawn from.
        sampled_error: its standard error.
        spread: standard deviation of one log-weight.
    """

    q: str
    reconstruction: float
    kl_prior: float
    kl_posterior: float
    log_px: float
    error: float
    sampled: float | None
    sampled_error: float | None
    spread: float | None

    @property
    def elbo(self) -> float:
        """The first two terms."""
        return self.reconstruction - self.kl_prior


class Guess(NamedTuple):
    """Some q with its terms: name, reconstruction, KL to the prior and to the posterior; q, if it can be drawn from."""

    name: str
    reconstruction: Tensor
    kl_prior: Tensor
    kl_posterior: Tensor
    q: dist.TorchDistribution | None


class Truth(NamedTuple):
    """A model, one observation ``(1, X)``, its log p(x), and what is known of several q."""

    model: Program
    x: Tensor
    log_px: float
    guesses: list[Guess]


def linear_gaussian_vae(dim: int, size: int) -> tuple[LinearGaussianVAE, Tensor]:
    """A random one, with an observation ``(1, size)`` drawn from it."""
    weight = torch.randn(size, dim, dtype=torch.float64) / math.sqrt(dim)
    mean = torch.randn(size, dtype=torch.float64)
    vae = LinearGaussianVAE(weight, mean, scale=0.7)
    z = torch.randn(dim, dtype=torch.float64)
    return vae, (weight @ z + mean + vae.scale * torch.randn(size, dtype=torch.float64)).unsqueeze(0)


def linear_gaussian() -> Truth:
    """Everything in closed form: all distributions are Gaussian."""
    dim, size = 3, 6
    vae, x = linear_gaussian_vae(dim, size)
    zero, eye = torch.zeros(1, dim, dtype=torch.float64), torch.eye(dim, dtype=torch.float64)
    prior, posterior = dist.MultivariateNormal(zero, eye), vae.posterior(x)
    best = vae.optimal_mean_field(x)
    candidates = {
        "the prior": prior,
        "a guess": dist.MultivariateNormal(zero + 0.5, 0.3 * eye),
        "the best factorized": dist.MultivariateNormal(best.mean, best.variance.diag_embed()),
        "the posterior": posterior,
    }
    guesses = []
    for name, q in candidates.items():
        misfit = (x - q.mean @ vae.weight.mT - vae.mean).square().sum()
        spread = (vae.weight @ q.covariance_matrix[0] @ vae.weight.mT).trace()
        constant = size * math.log(2 * math.pi * vae.scale**2)
        reconstruction = -0.5 * ((misfit + spread) / vae.scale**2 + constant)
        guesses.append(Guess(name, reconstruction, kl_divergence(q, prior), kl_divergence(q, posterior), q))
    return Truth(vae.model, x, vae.log_px(x).item(), guesses)


def bernoulli() -> Truth:
    """Integrals over one latent dimension by sums over a fine grid; log p(x) by ``pyro_vae.quadrature``."""
    size = 8
    decoder = MLP(1, size, hidden=[16])
    vae = VAE(
        StandardNormal(1),
        likelihood=Conditional(decoder, Bernoulli(size)),
        posterior=Conditional(MLP(size, 2, hidden=[16]), MeanField(1)),
    ).double()
    with torch.no_grad():
        for layer in decoder.layers:  # strong enough for a posterior that is not Gaussian
            layer.get_parameter("weight").mul_(3)
        x = vae.likelihood(torch.ones(1, 1, dtype=torch.float64)).sample()
        z = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
        width = z[1] - z[0]
        log_likelihood = vae.likelihood(z[:, None]).log_prob(x)
        log_prior = vae.prior().log_prob(z[:, None])
        log_joint = log_prior + log_likelihood
        log_posterior = log_joint - (log_joint.logsumexp(0) + width.log())  # normalized on the grid itself
        encoder = vae.posterior(x)
        one = torch.ones(1, 1, dtype=torch.float64)
        posterior_mean = (log_posterior.exp() * z).sum() * width
        posterior_scale = ((log_posterior.exp() * (z - posterior_mean).square()).sum() * width).sqrt()
        candidates = {
            "the prior": dist.Normal(0 * one, one).to_event(1),
            "an untrained encoder's": encoder,
            "Gaussian of its moments": dist.Normal(posterior_mean * one, posterior_scale * one).to_event(1),
            "the posterior": None,
        }
        guesses = []
        for name, q in candidates.items():
            log_q = log_posterior if q is None else q.log_prob(z[:, None, None]).squeeze(-1)
            weight = log_q.exp() * width
            kl_prior = (weight * (log_q - log_prior)).sum() if q is None else normal_kl(q).sum()
            kl_posterior = (weight * (log_q - log_posterior)).sum()
            guesses.append(Guess(name, (weight * log_likelihood).sum(), kl_prior, kl_posterior, q))
        log_px = quadrature(vae.model, vae.guide, x).log_px
    return Truth(vae.model, x, log_px.item(), guesses)


def normal_kl(q: dist.Independent) -> Tensor:
    """KL(q || N(0, I)) of a factorized Gaussian, in closed form: not by the grid of the other terms."""
    return 0.5 * (q.variance + q.mean.square() - 1 - q.variance.log()).sum(-1)


def decompose(truth: Truth, num_draws: int) -> list[Terms]:
    """The terms of each q, their sum against log p(x), and the ELBO by ``num_draws`` draws of Pyro's programs."""
    result = []
    for name, *parts, q in truth.guesses:
        reconstruction, kl_prior, kl_posterior = (part.item() for part in parts)
        sampled: Sequence[float | None] = (None, None, None)
        if q is not None:
            log_w = log_weights(truth.model, partial(guide_of, q), truth.x, num_draws)
            spread = log_w.std().item()
            sampled = log_w.mean().item(), spread / math.sqrt(num_draws), spread
        error = reconstruction - kl_prior + kl_posterior - truth.log_px
        result.append(Terms(name, reconstruction, kl_prior, kl_posterior, truth.log_px, error, *sampled))
    return result


def guide_of(q: dist.TorchDistribution, x: Tensor) -> Tensor:
    """The Pyro program that draws z from ``q``, whose batch is that of ``x``."""
    with pyro.plate("data", len(x), dim=-1):
        return pyro.sample("z", q)


def touch() -> tuple[Tensor, dict[str, Tensor], float]:
    """Bounds of a Gaussian q against how far its mean is from the posterior's, and log p(x), in two dimensions."""
    weight = torch.tensor([[1, 0.9], [0.9, 1], [1, 0.8], [0.8, 1]], dtype=torch.float64)  # correlates z_1 and z_2
    vae = LinearGaussianVAE(weight, torch.zeros(4, dtype=torch.float64), scale=0.7)
    x = torch.tensor([[1.0, 0.5, -0.5, 1.0]], dtype=torch.float64)
    posterior, best = vae.posterior(x), vae.optimal_mean_field(x)
    shifts = torch.linspace(-1.5, 1.5, 61, dtype=torch.float64)
    loc = posterior.mean + shifts[:, None] * torch.tensor([1.0, 0.0], dtype=torch.float64)
    moved = dist.MultivariateNormal(loc, posterior.covariance_matrix)
    bounds = {
        "q with the posterior's covariance": vae.log_px(x) - kl_divergence(moved, posterior.expand([len(loc)])),
        "the best factorized q": vae.elbo(x.expand(len(loc), -1), loc, best.stddev.expand_as(loc)),
    }
    return shifts, bounds, vae.log_px(x).item()


# 3. The gradient


class Noise(NamedTuple):
    """The gradient of the ELBO by mean and log-scale of a factorized Gaussian q, by one draw of z.

    Attributes:
        dim: latent dimensions.
        signal: norm of the exact gradient.
        pathwise, score: noise of each estimator, the root of its variance summed over parameters.
        pathwise_off, score_off: distance of the mean of all draws to the exact gradient, in its standard errors: about
            1 for an estimator that is right on average.
        ratio: of the two variances.
        drawn: whether a z that is merely drawn has a gradient of log p(x | z) by q's parameters.
    """

    dim: int
    signal: float
    pathwise: float
    score: float
    pathwise_off: float
    score_off: float
    ratio: float
    drawn: bool


class DrawnNormal(dist.Normal):
    """A normal distribution whose draws carry no gradient, so that Pyro's Trace_ELBO takes the score function."""

    has_rsample = False


NORMALS: dict[str, type[dist.Normal]] = {"pathwise": dist.Normal, "score function": DrawnNormal}


def noise(dim: int, num_draws: int) -> Noise:
    """Gradients at q = p(z) for a random linear-Gaussian VAE, each row of a batch of one observation a draw."""
    vae, x = linear_gaussian_vae(dim, dim)
    start = torch.zeros(1, dim, dtype=torch.float64, requires_grad=True)
    log_scale = torch.zeros(1, dim, dtype=torch.float64, requires_grad=True)
    exact = torch.cat(torch.autograd.grad(vae.elbo(x, start, log_scale.exp()).sum(), [start, log_scale]), -1)
    roots, off = [], []
    for normal in NORMALS.values():
        own = [p.detach().expand(num_draws, dim).clone().requires_grad_() for p in (start, log_scale)]
        guide = partial(factorized, normal, *own)
        loss = Trace_ELBO().differentiable_loss(vae.model, guide, x.expand(num_draws, -1))
        draws = -torch.cat(torch.autograd.grad(loss, own), -1)
        variance = draws.var(0).sum()
        roots.append(variance.sqrt().item())
        off.append(((draws.mean(0) - exact).norm() / (variance / num_draws).sqrt()).item())
    z = dist.Normal(start, log_scale.exp()).sample()
    log_likelihood = dist.Normal(z @ vae.weight.mT + vae.mean, vae.scale).log_prob(x).sum()
    (pathwise, score), (pathwise_off, score_off) = roots, off
    drawn = log_likelihood.requires_grad
    return Noise(dim, exact.norm().item(), pathwise, score, pathwise_off, score_off, (score / pathwise) ** 2, drawn)


def factorized(normal: type[dist.Normal], loc: Tensor, log_scale: Tensor, x: Tensor) -> Tensor:
    """The Pyro program that draws z from a factorized Gaussian of this kind, ``(B, D)``."""
    with pyro.plate("data", len(x), dim=-1):
        return pyro.sample("z", normal(loc, log_scale.exp()).to_event(1))


def train(vae: LinearGaussianVAE, x: Tensor, normal: type[dist.Normal], steps: int) -> dict[int, float]:
    """KL(q || p(z | x)) above its smallest, after each tenth step of Pyro's SVI, one draw each, from q = p(z)."""
    dim = vae.weight.shape[1]
    loc, log_scale = (nn.Parameter(torch.zeros(1, dim, dtype=torch.float64)) for _ in range(2))
    optim = torch.optim.Adam([loc, log_scale], lr=0.02)
    svi = PyroSVI(vae.model, partial(factorized, normal, loc, log_scale), optim, Trace_ELBO())
    curve = {}
    for step in range(steps + 1):
        if step % 10 == 0 or step == steps:
            curve[step] = vae.gaps(x, loc.detach(), log_scale.detach().exp()).amortization.item()
        svi.step(x)
    return curve


# What is written


def report(
    settings: Settings,
    coin: Coin,
    terms: dict[str, list[Terms]],
    gradients: list[Noise],
    curves: dict[str, dict[int, float]],
) -> str:
    """The lesson in Markdown."""
    rows: list[tuple[str, ...]] = [
        (f"{settings.heads} heads in {settings.tosses:,} tosses", "theta"),
        ("heads / tosses", f"{coin.exact:.6f}"),
        ("peak of the curve", f"{coin.peak:.6f}"),
        ("SVI, Pyro program without latents", f"{coin.trained:.6f}"),
        ("standard error, from the curvature", f"{coin.error:.6f}"),
    ]
    lines = ["## Maximum likelihood", "", runs.table(rows), "", "## log p(x) = reconstruction - KL + KL", ""]
    for title, each in terms.items():
        rows = [(title, "E_q[log p(x given z)]", "KL(q, prior)", "ELBO", "KL(q, posterior)", "ELBO + KL", "error")]
        rows[0] += ("ELBO sampled in Pyro", "+-", "spread of log w")
        for t in each:
            exact = t.reconstruction, t.kl_prior, t.elbo, t.kl_posterior, t.elbo + t.kl_posterior
            sampled = ("-",) * 3 if t.sampled is None else (f"{t.sampled:.4f}", f"{t.sampled_error:.1g}")
            cells = sampled if t.spread is None else (*sampled, f"{t.spread:.2g}")
            rows.append((t.q, *(f"{value:.6f}" for value in exact), f"{t.error:+.0e}", *cells))
        lines += [runs.table(rows), "", f"log p(x) = {each[0].log_px:.6f} nats, by another way.", ""]
    rows = [("latent dimensions", "exact gradient", "noise, pathwise", "noise, score function", "ratio of variances")]
    rows[0] += ("pathwise off by", "score function off by", "z merely drawn")
    for g in gradients:
        numbers = (f"{value:.3g}" for value in (g.signal, g.pathwise, g.score, g.ratio))
        reached = "has a gradient" if g.drawn else "no gradient"
        rows.append((str(g.dim), *numbers, f"{g.pathwise_off:.2f}", f"{g.score_off:.2f}", reached))
    lines += ["## The gradient of the ELBO by mu and log sigma, from one draw of z", "", runs.table(rows), ""]
    lines.append(
        f"{settings.num_draws:,} draws. Noise: root of the summed variances. Off by: distance of their mean to the "
        "exact gradient, in standard errors, about 1 if the estimator is right on average."
    )
    ends = ", ".join(f"{name} {curve[settings.steps]:.3g}" for name, curve in curves.items())
    lines.append(
        f"\nAfter {settings.steps:,} steps in {max(settings.dims)} dimensions, one draw each, q is above the best "
        f"factorized one by (nats of KL): {ends}; at the start {next(iter(curves.values()))[0]:.3g}."
    )
    return "\n".join(lines)


def plot_coin(coin: Coin, path: Path) -> None:
    """The likelihood against theta, relative to its peak."""
    with figures.figure(path, 5.2, 3.2) as axes:
        axes.plot(coin.grid, (coin.log_likelihood - coin.log_likelihood.max()).exp())
        axes.axvline(coin.trained, color="C3", lw=1, label=f"SVI: {coin.trained:.4f} +- {coin.error:.4f}")
        axes.set_xlim(max(0, coin.exact - 10 * coin.error), min(1, coin.exact + 10 * coin.error))
        axes.set(xlabel="theta", ylabel="likelihood / its maximum", title="A bent coin")
        axes.legend()


def plot_bound(shifts: Tensor, bounds: dict[str, Tensor], log_px: float, path: Path) -> None:
    """Bounds against the distance between q and the posterior."""
    with figures.figure(path, 5.2, 3.2) as axes:
        axes.axhline(log_px, color="0.3", lw=1, label="log p(x)")
        for name, values in bounds.items():
            axes.plot(shifts, values, label=name)
        axes.set(xlabel="mean of q minus mean of p(z | x)", ylabel="nats", title="The bound touches at the posterior")
        axes.legend(fontsize="small")


def plot_gradients(gradients: list[Noise], curves: dict[str, dict[int, float]], dim: int, path: Path) -> None:
    """Noise against dimensions; and trainings by the two gradients."""
    with figures.figure(path, 9.5, 3.4, columns=2) as (noise, training):
        dims = [g.dim for g in gradients]
        for name, values in zip(NORMALS, zip(*((g.pathwise, g.score) for g in gradients), strict=True), strict=True):
            noise.plot(dims, values, marker="o", markersize=4, label=name)
        noise.set(xscale="log", yscale="log", xlabel="latent dimensions", ylabel="noise: root of summed variances")
        noise.set_title("One draw of the gradient")
        noise.legend()
        for name, curve in curves.items():
            training.plot(list(curve), list(curve.values()), label=name)
        training.set(yscale="log", xlabel="step", ylabel="nats above the best factorized q")
        training.set_title(f"Training in {dim} dimensions")
        training.legend()


if __name__ == "__main__":
    cli.guarded(main)
