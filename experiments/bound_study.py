"""Does a tighter bound make a better model? The comparison of Burda et al. (2016), Table 1, at a budget of choice.

One- and two-layer VAEs of that paper (784-200-200-50; h1 of 100 units, h2 of 50) are trained by the ELBO averaged over
K samples, by IWAE and by DReG with K samples, from the same seeds; batches of 20, Adam, stages of 3^i epochs at a rate
of 0.001 10^(-i / 7). The paper has 8 stages, 3,280 epochs; --stages 3, the default, has 13 epochs; --stages 8 is the
whole schedule, for a GPU. Another difference from the paper: 5,000 training images are held out here.

Two numbers stand for log p(x): the paper's, importance sampling with 5,000 samples, and the annealed one by which the
bounds are judged here, since importance sampling from the guide is low, by more the worse the guide fits.
"""

import itertools
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from pyro_vae import cli, runs
from pyro_vae.runs.scoring import number

TWO = "--model TwoLayerVAE --latent_dim 100 --top.latent_dim 50 --top.hidden [100,100]"


class Published(NamedTuple):
    """Table 1 of Burda et al. (2016), MNIST: test log-likelihood, active units."""

    log_likelihood: float
    active_units: str


PUBLISHED = {
    "1 layer, VAE, K=1": Published(-86.76, "19"),
    "1 layer, VAE, K=5": Published(-86.47, "20"),
    "1 layer, IWAE, K=5": Published(-85.54, "22"),
    "1 layer, VAE, K=50": Published(-86.35, "20"),
    "1 layer, IWAE, K=50": Published(-84.78, "25"),
    "2 layers, VAE, K=1": Published(-85.33, "16+5"),
    "2 layers, VAE, K=5": Published(-85.01, "17+5"),
    "2 layers, IWAE, K=5": Published(-83.89, "21+5"),
    "2 layers, VAE, K=50": Published(-84.78, "17+5"),
    "2 layers, IWAE, K=50": Published(-82.90, "26+7"),
}
OBJECTIVES = {"VAE": "ELBO", "IWAE": "IWAE", "DReG": "DReG"}


def contenders() -> dict[str, str]:
    """Arguments of every layer count, bound and K; with K = 1 all bounds are one."""
    result = {}
    for layers, model in (("1 layer", ""), ("2 layers", TWO)):
        for k, names in ((1, ["VAE"]), (5, OBJECTIVES), (50, OBJECTIVES)):
            for name in names:
                objective = f"--objective {OBJECTIVES[name]} --objective.num_particles {k}"
                result[f"{layers}, {name}, K={k}"] = f"{model} {objective}".strip()
    return result


@dataclass(frozen=True)
class Settings(runs.StudySettings):
    """Settings of the study.

    Args:
        contenders: for each name, the arguments of pyro-vae train that make it; the first is the reference.
        common: arguments of pyro-vae train for all runs, beside the paper's --schedule stages --lr 1e-3
            --batch_size 20, of which the last two can be overridden; --help there lists them.
        stages: of the learning-rate schedule, from 1 to 8: (3^stages - 1) / 2 epochs.
        seeds: runs of each contender, at least 1.
        run_dir: directory to write, new or empty; null: one under runs/, named by time.
        resume: go on with the interrupted study in --run_dir; what is finished is not run again.
    """

    contenders: dict[str, str] = field(default_factory=contenders)
    common: str = "--evidence.num_samples 5000 --evidence.num_images 2000 --evidence.annealed_images 300"
    stages: int = 3
    seeds: int = 1

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.stages <= 8:
            raise ValueError(f"--stages must be from 1 to 8, got {self.stages}")
        for option in ("--epochs", "--schedule"):
            if any(argument.split("=")[0] == option for argument in shlex.split(self.common)):
                raise ValueError(f"--common: {option} is that of the study, which --stages sets")

    def arguments(self) -> list[str]:
        """The paper's settings, then those of ``common``."""
        paper = f"--schedule stages --epochs {self.epochs} --lr 1e-3 --batch_size 20"
        paper += " --encoder.activation tanh --decoder.activation tanh"
        return [*paper.split(), *super().arguments()]

    @property
    def epochs(self) -> int:
        """Of all stages together."""
        return (3**self.stages - 1) // 2


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the study as told by ``argv``; return its directory.

    Raises:
        RunError: for a mistake in ``argv``.
    """
    done = runs.run_study(Settings, argv, "bound_study")
    finished = {name: [runs.load(path) for path in paths] for name, paths in done.directories.items()}
    same_data = all(run.result["dataset"] == "MNIST" for each in finished.values() for run in each)
    more: dict[str, Any] = {"by layer": [units_by_layer(each) for each in finished.values()]}
    text = [between_bounds(finished), ""]
    if same_data:
        known = [PUBLISHED.get(s.name) for s in done.summaries]
        more["published"] = [f"{each.log_likelihood:.2f}" if each else "" for each in known]
        more["units there"] = [each.active_units if each else "" for each in known]
        text.append(
            "Published: Burda et al. (2016), Table 1, after 3,280 epochs, by importance sampling; here after "
            f"{cast(Settings, done.settings).epochs}."
        )
    return runs.report_study(done, "Does a tighter bound make a better model?", more, "\n".join(text))


def units_by_layer(finished: list[runs.Run]) -> str:
    """Active units of each layer, means over seeds: ``17+5``."""
    units = np.array([list(run.result["active_units_by_site"].values()) for run in finished])
    return "+".join(f"{mean:g}" for mean in units.mean(0).round(1))


def between_bounds(finished: dict[str, list[runs.Run]]) -> str:
    """A table of the differences between bounds of the same layers and K, paired by seed and image."""
    rows = [("difference of log p(x)", "nats", "+- seeds", "+- images")]
    for layers, k in dict.fromkeys((name.split(", ")[0], name.split(", ")[-1]) for name in finished):
        for other, bound in itertools.combinations(OBJECTIVES, 2):
            ours, reference = (finished.get(f"{layers}, {each}, {k}") for each in (bound, other))
            if ours and reference:
                estimator = "annealed" if runs.annealed_alike([*ours, *reference]) else "importance"
                d = runs.difference(list(zip(ours, reference, strict=True)), estimator)
                errors = number(d.difference_seed_error, 2), number(d.difference_image_error, 2)
                rows.append((f"{layers}, {k}: {bound} minus {other}", f"{d.difference:+.2f}", *errors))
    return runs.table(rows)


if __name__ == "__main__":
    cli.guarded(main)
