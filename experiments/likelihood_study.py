"""Which likelihood suits grey images, and why is Bernoulli cross-entropy on grey pixels none?

Likelihoods x seeds, same networks, same budget. Densities of dequantized pixels and masses of whole numbers are kept
apart. Every likelihood is also set against itself with free parameters for each pixel and no latent variable, which
says what the latent variable is worth. Cross-entropy on grey pixels is trained as many VAEs are, and its number is
set beside the integral that a likelihood would have equal to one.

With no options: MNIST in grey, 20 epochs, 3 seeds, 200 importance samples for each of the first 2,000 test images.
A mixture of logistic distributions (--likelihood.components 5) and Categorical, whose decoder has 200,704 outputs for
256 levels, are not among the usual contenders: on a CPU they take many times as long as the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from tqdm import tqdm

from pyro_vae import Conditional, Likelihood, cli, importance_sampling, runs
from pyro_vae.data.images import ImageData
from pyro_vae.parts import distributions
from pyro_vae.parts.conditional import num_outputs
from pyro_vae.parts.likelihoods import ContinuousBernoulli
from pyro_vae.runs import figures

DENSITY = "--dataset.binarization dequantized --likelihood"
MASS = "--dataset.binarization integers --likelihood"
LIKELIHOODS = {
    "Gaussian": f"{DENSITY} Gaussian",
    "Gaussian, scale per pixel": f"{DENSITY} Gaussian --likelihood.scale per_pixel --lr 1e-3",  # diverges at 5e-3
    "LaplaceLikelihood": f"{DENSITY} Laplace",
    "Beta": f"{DENSITY} Beta",
    "ContinuousBernoulli": f"{DENSITY} ContinuousBernoulli",
    "DiscretizedLogistic": f"{MASS} DiscretizedLogistic",
    "NegativeBinomial": f"{MASS} NegativeBinomial",
    "Poisson": f"{MASS} Poisson",
    "cross-entropy": f"{DENSITY} experiments.likelihood_study.CrossEntropy",
}


@dataclass(frozen=True)
class Settings(runs.StudySettings):
    """Settings of the study.

    Args:
        contenders: for each name, the arguments of pyro-vae train that make it; the first of each unit and
            kind of data is the reference. A likelihood of your own: --contenders.Cauchy '--likelihood
            my_package.CauchyPixels --dataset.binarization dequantized' adds one to the usual ones.
        common: arguments of pyro-vae train for all runs; --help there lists them.
        seeds: runs of each contender, at least 1.
        run_dir: directory to write, new or empty; null: one under runs/, named by time.
        resume: go on with the interrupted study in --run_dir; what is finished is not run again.
    """

    contenders: dict[str, str] = field(default_factory=lambda: dict(LIKELIHOODS))
    common: str = "--epochs 20 --evidence.num_samples 200 --evidence.num_images 2000"


class CrossEntropy(Likelihood):
    """The formula of the Bernoulli, x log p + (1 - x) log(1 - p), applied to grey pixels: a score, no likelihood.

    Its exponential does not integrate to one over the images, so that it is not to be compared with anything.

    Args:
        event_size: number X of pixels.
    """

    encoding = "dequantized"
    is_density = None

    def forward(self, logits: Tensor) -> TorchDistribution:
        return _Unnormalized(logits).to_event(1)

    def marginal(self, x: Tensor) -> tuple[Tensor, ...]:
        """The logit of the mean image."""
        return (torch.logit(x.mean(0), eps=1e-3),)


class _Unnormalized(distributions.ContinuousBernoulli):
    def log_normalizer(self) -> Tensor:
        return F.softplus(self.logits)  # and not log (exp(l) - 1) / l

    @property
    def mean(self) -> Tensor:
        return torch.sigmoid(self.logits)


class Score(NamedTuple):
    """What cross-entropy on grey pixels says, and what it means; nats per image, means over test images.

    Attributes:
        score: log of the mean of exp(score) over z, as if it were log p(x).
        log_integral: log of the integral of exp(score) over all images, given z: 0 for a likelihood.
        log_likelihood: log p(x) of the same decoder after division by that integral: a continuous Bernoulli.
    """

    score: float
    log_integral: float
    log_likelihood: float


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the study as told by ``argv``; return its directory.

    Raises:
        RunError: for a mistake in ``argv``.
    """
    settings, run_dir, directories, summaries = runs.run_study(Settings, argv, "likelihood_study")
    free, scores, pictures = {}, {}, {}
    for name, (first, *_) in directories.items():
        run = runs.load(first)
        data = runs.images_of(run.data)
        head = run.model.likelihood.head
        free[name] = without_latent(head, data, run.settings.evidence.num_images, progress=name)
        if head.is_density is None:
            scores[name] = score(run)
        if not pictures:
            pictures["test images"] = side_by_side(data, *data.test[:16].split(8))
        pictures[name] = samples(first, data)
    sections = []
    for reference in dict.fromkeys(s.reference for s in summaries):
        group = [s for s in summaries if s.reference == reference]
        unit = group[0].unit
        columns = {"no latent": [f"{free[s.name]:.2f}" for s in group]}
        sections.append(f"## {unit[0].upper()}{unit[1:]}\n\n{runs.summary_table(group, columns)}")
        if len(group) > 1:
            with runs.writing(run_dir):
                runs.forest(group, run_dir / f"differences-to-{runs.slug(reference)}.png", unit)
    sections += [_explain(name, each) for name, each in scores.items()]
    title = "Prior samples: means of p(x | z) (left) and draws from it (right)"
    rows = torch.stack(list(pictures.values()))
    with runs.writing(run_dir):
        figures.image_grid(rows, data.image_shape, run_dir / "samples.png", title, list(pictures))
    title = (
        f"Larger is better; means over seeds 0 to {settings.seeds - 1}, with standard errors over seeds and images.\n"
        f"log p(x) is {runs.estimators(summaries)}; importance sampling is too low in images with a bad Pareto k.\n"
        "'No latent' is the same likelihood with free parameters for each pixel. A density's bits per dimension bound\n"
        "those of the mass that it makes, from above."
    )
    extra = {"without_latent": free, "scores": {name: each._asdict() for name, each in scores.items()}}
    runs.write_study(run_dir, "\n\n".join([title, *sections]), summaries, directories, **extra)
    return run_dir


def without_latent(
    head: Likelihood, data: ImageData, num_images: int | None = None, steps: int = 500, progress: str | None = None
) -> float:
    """Mean test log p(x), in nats, of the head alone, its raw outputs free parameters of each pixel, without a latent.

    Trained on all training images by Adam, from the head's own start if it has one.

    Args:
        head: the likelihood; its own parameters are trained too.
        data: its observations.
        num_images: score only the first so many test images; None: all of them.
        steps: gradient steps, each of up to 1,000 images.
        progress: what to call the progress bar; None for no bar.
    """
    torch.manual_seed(0)
    number = len(data.train_pixels)
    start = head.marginal(data.observe(torch.arange(number)))
    outputs = [v.clone() for v in start] if start is not None else [torch.zeros(n) for n in head.sizes]
    assert sum(v.numel() for v in outputs) == num_outputs(head)
    parameters = [*(v.requires_grad_() for v in outputs), *head.parameters()]
    optim = torch.optim.Adam(parameters, lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, steps)
    for _ in tqdm(range(steps), desc=f"{progress}, no latent", disable=progress is None):
        loss = -head(*outputs).log_prob(data.observe(torch.randint(number, (min(number, 1000),)))).mean()
        optim.zero_grad()
        loss.backward()
        optim.step()
        schedule.step()
    with torch.no_grad():
        return (
            torch.cat([head(*outputs).log_prob(x) for x in data.test[:num_images].split(1000)]).double().mean().item()
        )


def score(run: runs.Run) -> Score:
    """What the number of a run with ``CrossEntropy`` means, scored as the run was."""
    settings = run.settings.evidence
    vae, x = runs.load_model(run.path), run.data.test[: settings.num_images]
    torch.manual_seed(0)
    with torch.no_grad():
        logits = vae.likelihood.network(vae.posterior(x).mean)
        log_integral = (distributions.ContinuousBernoulli(logits).log_normalizer() - F.softplus(logits)).sum(-1)
    vae.likelihood = Conditional(vae.likelihood.network, ContinuousBernoulli(x.shape[1]))
    log_likelihood, *_ = importance_sampling(vae.model, vae.guide, x, settings.num_samples).mean()
    return Score(run.result["test_log_likelihood"], log_integral.mean().item(), log_likelihood)


def _explain(name: str, each: Score) -> str:
    return (
        f"### Why {name} is no likelihood\n\n"
        f"It says {each.score:.2f} nats (seed 0). A likelihood integrates to one over all images, and the logarithm\n"
        f"of that is 0; here, given z, it is {each.log_integral:.2f}. Divided by its integral, the same decoder is\n"
        f"a continuous Bernoulli and reaches {each.log_likelihood:.2f} nats, to be set beside the densities above."
    )


def samples(run: Path, data: ImageData, columns: int = 8) -> Tensor:
    """Means of p(x | z) and draws from it, z from the prior, as one row of pictures."""
    vae = runs.load_model(run)
    torch.manual_seed(0)
    return side_by_side(data, *(figures.decode(vae.model, columns, data.test, draw=draw) for draw in (False, True)))


def side_by_side(data: ImageData, left: Tensor, right: Tensor) -> Tensor:
    """Two groups of observations as one row of pictures, with a gap."""
    return data.picture(torch.cat([left, torch.zeros_like(left[:1]), right]))


if __name__ == "__main__":
    cli.guarded(main)
