"""Which prior is best, by how much, and how sure is that? Priors x seeds, same networks, same budget.

Every prior is trained from the same seeds as the standard normal, so that differences are paired by seed and image.
With no options: MNIST, 20 epochs, 3 seeds, 500 importance samples for each of the first
2,000 test images.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pyro_vae import cli, runs

PRIORS = {
    "StandardNormal": "--prior StandardNormal",
    "DiagonalNormal": "--prior DiagonalNormal",
    "GaussianMixture": "--prior GaussianMixture",
    "VampPrior": "--prior VampPrior",
    "VampPrior of data": "--prior VampPrior --prior.learned false",
    "FlowPrior": "--prior Flow",
    "LaplacePrior": "--prior Laplace",
    "StudentTPrior": "--prior StudentT",
    "UniformPrior": "--prior Uniform",
}


@dataclass(frozen=True)
class Settings(runs.StudySettings):
    """Settings of the study.

    Args:
        contenders: for each name, the arguments of pyro-vae train that make it; the first is the reference.
            A prior of your own: --contenders.Horseshoe '--prior my_package.Horseshoe' adds one to the usual ones.
        common: arguments of pyro-vae train for all runs; --help there lists them.
        seeds: runs of each contender, at least 1.
        run_dir: directory to write, new or empty; null: one under runs/, named by time.
        resume: go on with the interrupted study in --run_dir; what is finished is not run again.
    """

    contenders: dict[str, str] = field(default_factory=lambda: dict(PRIORS))
    common: str = "--epochs 20 --evidence.num_samples 500 --evidence.num_images 2000"


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the study as told by ``argv``; return its directory.

    Raises:
        RunError: for a mistake in ``argv``.
    """
    return runs.report_study(runs.run_study(Settings, argv, "prior_study"), "Which prior is best?")


if __name__ == "__main__":
    cli.guarded(main)
