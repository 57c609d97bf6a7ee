"""Do the engines train the same VAE? Pyro's own SVI, the compiled step, and its products in bfloat16, x seeds.

A step of CompiledSVI draws the noise that a step of Pyro's SVI would draw, but rounds otherwise, so that trajectories
part; bfloat16 rounds products to 8 significant bits. Differences in log p(x), which is always computed in float32, are
paired by seed and image. With no options: MNIST, 24 epochs, which is enough for the step to be compiled, 5 seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pyro_vae import cli, runs

ENGINES = {
    "Pyro SVI": "--engine pyro",
    "CompiledSVI": "--engine compiled",
    "CompiledSVI, bfloat16": "--engine compiled --precision bfloat16",
}


@dataclass(frozen=True)
class Settings(runs.StudySettings):
    """Settings of the study.

    Args:
        contenders: for each name, the arguments of pyro-vae train that make it; the first is the reference.
        common: arguments of pyro-vae train for all runs; --help there lists them.
        seeds: runs of each contender, at least 1.
        run_dir: directory to write, new or empty; null: one under runs/, named by time.
        resume: go on with the interrupted study in --run_dir; what is finished is not run again.
    """

    contenders: dict[str, str] = field(default_factory=lambda: dict(ENGINES))
    common: str = "--epochs 24 --evidence.num_samples 500 --evidence.num_images 2000 --evidence.annealed_images 500"
    seeds: int = 5


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the study as told by ``argv``; return its directory.

    Raises:
        RunError: for a mistake in ``argv``.
    """
    return runs.report_study(runs.run_study(Settings, argv, "engine_study"), "Do the engines train the same VAE?")


if __name__ == "__main__":
    cli.guarded(main)
