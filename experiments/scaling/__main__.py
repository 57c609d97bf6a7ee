"""How do seconds and memory grow, with the data, with the model, and with the number of workers?

Usage: python -m experiments.scaling [options]

Parts: growth, seconds and memory of importance sampling, of annealing and of a training step against the number of
images, samples, latent dimensions, pixels and units of a layer, each with the others held; evidence, annealed log p(x)
of some images by one worker and by two, whose digits must be the same; studies, the same for a study, and on a Ray
cluster of two nodes, where Ray is installed; parallel, a training step on two processes. An exponent is the slope of
log seconds over log value. Nothing else should run on the machine meanwhile.

Table, figure and numbers are written to a directory; experiments.scaling.costs makes a page of them.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Literal

import torch

from experiments.scaling.rows import Exponent, Row, exponents, lines
from pyro_vae import cli, runs
from pyro_vae.runs import figures

Name = Literal["growth", "evidence", "studies", "parallel"]
MODULES: dict[str, str] = {
    name: f"experiments.scaling.{name}" for name in ("growth", "evidence", "studies", "parallel")
}


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement.

    Args:
        parts: what is measured.
        run_dir: directory to write, new or empty; null: one under runs/.
        resume: go on with what is there; parts that are finished are not measured again.
        images: sizes of the data, each at least 2.
        samples: temperatures, samples of a training step, tenths of the importance samples, each at least 2.
        latent_dims: of z, each at least 1.
        pixels: of an image, each a square.
        widths: units of each of two hidden layers, each at least 1.
        tries: of which the median counts, at least 1.
        workers: how many share an evaluation or a study, each at least 1.
        num_images: test images of the shared evaluation, at least 2; there may be fewer in the data set.
        common: arguments of pyro-vae train for the run that is evaluated, and for those of the study.
        num_runs: of the study, at least 1.
        seed: of all noise, at least 0.
        device: auto takes a GPU if there is one.
    """

    parts: Sequence[Name] = ("growth", "evidence", "studies", "parallel")
    run_dir: Path | None = None
    resume: bool = False
    images: Sequence[int] = (128, 512, 2048)
    samples: Sequence[int] = (4, 8, 16, 32)
    latent_dims: Sequence[int] = (5, 10, 20, 40)
    pixels: Sequence[int] = (196, 784, 3136)
    widths: Sequence[int] = (100, 200, 400)
    tries: int = 3
    workers: Sequence[int] = (1, 2)
    num_images: int = 2000
    common: str = (
        "--dataset MNIST --epochs 5 --evidence.num_samples 100 --evidence.num_images 1000 --evidence.annealed_images 0"
    )
    num_runs: int = 8
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self):
        for name in ("images", "samples", "latent_dims", "pixels", "widths", "workers"):
            runs.check_numbers(f"--{name}", getattr(self, name))
        if min(self.images) < 2 or min(self.samples) < 2 or self.num_images < 2:
            raise ValueError("--images, --samples and --num_images must be at least 2")
        if any(round(each**0.5) ** 2 != each for each in self.pixels):
            raise ValueError(f"--pixels must be squares, such as 784, got {list(self.pixels)}")
        if not self.parts:
            raise ValueError("--parts: there is none")
        if self.tries < 1 or self.num_runs < 1:
            raise ValueError("--tries and --num_runs must be at least 1")
        runs.check_seed(self.seed)


Measure = Callable[[Settings, Path], list[Row]]
"""Each part's module has a function ``measure`` of the settings and of a directory for what it leaves."""


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure as told by ``argv``; return the directory with the result.

    Raises:
        RunError: for a mistake in ``argv``, or where digits depend on the number of workers.
    """
    settings, text = runs.parse(Settings, argv, prog="python -m experiments.scaling")
    device = runs.choose_device(settings.device)
    run_dir = settings.run_dir or Path("runs") / f"scaling-{date.today()}"
    runs.open_run(run_dir, text, settings.resume)
    found: list[Row] = []
    for part in settings.parts:
        print(f"\n=== {part}")
        found += _measured(part, settings, run_dir)
    fitted = exponents(found)
    plot(found, run_dir / "scaling.png")
    result = {"date": f"{date.today()}", "rows": [row._asdict() for row in found]}
    result |= {"exponents": [vars(each) for each in fitted]}
    return runs.conclude(run_dir, report(found, fitted), result, device)


def _measured(part: str, settings: Settings, run_dir: Path) -> list[Row]:
    """The rows of a part, measured now or, by an interrupted command, before."""
    kept = run_dir / f"{part}.json"
    if not kept.exists():
        torch.manual_seed(settings.seed)
        rows = import_module(f"experiments.scaling.{part}").measure(settings, run_dir / part)
        runs.write_json(kept, {"rows": [row._asdict() for row in rows]})
    return [Row(**row) for row in json.loads(kept.read_text())["rows"]]


def report(rows: Sequence[Row], fitted: Sequence[Exponent]) -> str:
    """Exponents, then all measurements."""
    parts = []
    if fitted:
        table = [("what", "grows with", "exponent", "error", "seconds, smallest", "largest")]
        ends = {key: (line[0], line[-1]) for key, line in lines(rows).items()}
        for each in fitted:
            first, last = ends[each.what, each.by]
            error = "-" if each.error != each.error else f"{each.error:.2f}"
            smallest, largest = (f"{row.seconds:.3g} at {row.value:,.0f}" for row in (first, last))
            table.append((each.what, each.by, f"{each.exponent:.2f}", error, smallest, largest))
        parts.append(runs.table(table))
    workers = [row for row in rows if row.by == "workers"]
    if workers:
        table = [("what", "workers", "seconds", "times as fast", "note")]
        for line in lines(workers).values():
            table += [
                (row.what, f"{row.value:.0f}", f"{row.seconds:.3g}", f"{line[0].seconds / row.seconds:.2f}", row.note)
                for row in line
            ]
        parts.append(runs.table(table))
    table = [("what", "by", "value", "seconds", "MiB", "note")]
    for row in rows:
        memory = "-" if row.mebibytes is None else f"{row.mebibytes:.0f}"
        table.append((row.what, row.by, f"{row.value:,.0f}", f"{row.seconds:.3g}", memory, row.note))
    return "\n\n".join([*parts, runs.table(table)])


def plot(rows: Sequence[Row], path: Path) -> None:
    """Seconds against each of what grows."""
    axes_of = list(dict.fromkeys(row.by for row in rows))
    with figures.figure(path, 3.4 * len(axes_of), 3.4, columns=len(axes_of)) as panels:
        for axes, by in zip(panels if len(axes_of) > 1 else [panels], axes_of, strict=True):
            for (what, _), line in lines(row for row in rows if row.by == by).items():
                axes.plot([row.value for row in line], [row.seconds for row in line], "o-", markersize=4, label=what)
            axes.set(xscale="log", yscale="log", xlabel=by, ylabel="seconds")
            axes.legend(fontsize="x-small")


if __name__ == "__main__":
    cli.guarded(main)
