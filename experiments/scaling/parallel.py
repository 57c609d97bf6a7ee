"""A training step of two processes of one thread each, 512 images in each, against one of 512 images in one process.

Usage: python -m experiments.scaling.parallel

Four things are timed in turn, several times: one process steps while the other waits; both step, each for itself; both
take the step together; gradients are summed and nothing else. So what the machine's memory costs, which two processes
share, is seen apart from what communication costs. Nothing else should run on the machine meanwhile.
"""

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from experiments.scaling.rows import Row
from pyro_vae import ELBO, VAE, CompiledSVI, cli
from pyro_vae.errors import RunError
from pyro_vae.infer.parallel import DataParallel, Processes
from pyro_vae.parts.conditional import Conditional
from pyro_vae.parts.likelihoods import Bernoulli
from pyro_vae.parts.networks import MLP
from pyro_vae.parts.posteriors import MeanField
from pyro_vae.parts.priors import StandardNormal

if TYPE_CHECKING:
    from experiments.scaling.__main__ import Settings


class Step(NamedTuple):
    """What is timed: the sizes of a network, a process's rows of a batch, steps of a turn, turns, and the compiler."""

    pixels: int = 784
    width: int = 400
    latent_dim: int = 50
    rows: int = 512
    steps: int = 30
    turns: int = 5
    compiler: Literal["inductor", "none"] = "inductor"


class Seconds(NamedTuple):
    """Medians over turns, of a turn's median, in seconds: of the slower process where both do it."""

    alone: float
    side_by_side: float
    together: float
    sum_of_gradients: float

    @property
    def efficiency(self) -> float:
        """Of two processes: 1 if both together take as long for two batches as one process for one."""
        return self.alone / self.together


def measure(settings: "Settings", run_dir: Path) -> list[Row]:
    """Rows of one process and of two, for the same number of images."""
    del run_dir  # nothing is left there
    return rows_of(step := Step(turns=settings.tries), seconds_of(step))


def rows_of(step: Step, seconds: Seconds) -> list[Row]:
    """Rows of one process, which takes two batches one after the other, and of two."""
    what = f"training step of {2 * step.rows:,} images"
    apart = f"{1000 * seconds.sum_of_gradients:.1f} ms are communication"
    return [
        Row(what, "workers", 1, 2 * seconds.alone, note=f"{step.rows} after {step.rows}"),
        Row(what, "workers", 2, seconds.together, note=f"efficiency {seconds.efficiency:.2f}; {apart}"),
        Row("the same, each process for itself", "workers", 2, seconds.side_by_side),
        Row("sum of gradients alone", "workers", 2, seconds.sum_of_gradients),
    ]


def seconds_of(step: Step) -> Seconds:
    """Time a step in two new processes.

    Raises:
        RunError: if one of them fails.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        started = [context.Process(target=_process, args=(rank, folder, step), daemon=True) for rank in range(2)]
        for process in started:
            process.start()
        for process in started:
            process.join()
        if any(process.exitcode for process in started):
            raise RunError("a process of the timed training failed, and says why above")
        return Seconds(*json.loads((Path(folder) / "seconds.json").read_text()))


def _process(rank: int, folder: str, step: Step) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    processes = Processes()
    x = torch.bernoulli(torch.full((2 * step.rows, step.pixels), 0.3))
    single, both = _engine(step), DataParallel(_engine(step), processes)
    gradients = torch.zeros(sum(p.numel() for p in single.steps.held))
    timed: list[tuple[Callable[[], Any], bool]] = [
        (lambda: single.step(x[: step.rows]), rank == 0),
        (lambda: single.step(x[: step.rows]), True),
        (lambda: both.step(x), True),
        (lambda: dist.all_reduce(gradients), True),
    ]
    found: list[list[float]] = [[] for _ in timed]
    for _ in range(step.turns + 1):
        for seconds, (function, mine) in zip(found, timed, strict=True):
            dist.barrier()
            seconds.append(max(processes.gather(_median(function, step.steps) if mine else 0.0)))
    if rank == 0:
        # of the first turn, in which graphs are traced and compiled, nothing counts
        medians = [statistics.median(each[1:]) for each in found]
        (Path(folder) / "seconds.json").write_text(json.dumps(medians))
    dist.destroy_process_group()


def _median(function: Callable[[], Any], steps: int) -> float:
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _engine(step: Step) -> CompiledSVI:
    likelihood, posterior = Bernoulli(step.pixels), MeanField(step.latent_dim)
    vae = VAE(
        StandardNormal(step.latent_dim),
        Conditional(MLP(step.latent_dim, sum(likelihood.sizes), [step.width]), likelihood),
        Conditional(MLP(step.pixels, sum(posterior.sizes), [step.width]), posterior),
    )
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3, fused=True)
    return CompiledSVI(vae.model, vae.guide, optimizer, ELBO(), compiler=step.compiler)


def main() -> None:
    """Measure, and print what was found."""
    from pyro_vae import runs  # takes seconds, which the timed processes need not wait for

    step = Step()
    rows = [("what", "processes", "ms", "note")]
    rows += [
        (row.what, f"{row.value:.0f}", f"{1000 * row.seconds:.1f}", row.note) for row in rows_of(step, seconds_of(step))
    ]
    print(runs.table(rows))


if __name__ == "__main__":
    cli.guarded(main)
