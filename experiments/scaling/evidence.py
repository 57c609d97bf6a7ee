"""Annealed log p(x) of test images by several workers of one thread each: seconds, and whether a digit differs."""

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.scaling.rows import Row, seconds_of
from pyro_vae import runs
from pyro_vae.runs.reading import groups_of, json_of

if TYPE_CHECKING:
    from experiments.scaling.__main__ import Settings

WHAT = "annealed evidence"


def measure(settings: "Settings", run_dir: Path) -> list[Row]:
    """Rows of each number of workers: of the whole command, and of what it does once all is imported.

    Raises:
        RunError: if a command fails, or two of them do not give the same digits.
    """
    run, rows = trained(settings, run_dir / "run"), []
    imports = seconds_of([sys.executable, "-c", "import pyro_vae.runs"])
    rows.append(Row("imports", "workers", 1, imports, note="that every process begins with"))
    paths = []
    with tempfile.TemporaryDirectory() as cache:
        for workers, cold in [(min(settings.workers), True), *((n, False) for n in sorted(settings.workers))]:
            paths.append(run / "evaluations" / (f"workers-{workers}" + "-cold" * cold))
            seconds = _evaluated(run, paths[-1], workers, settings, cache)
            inside, more = json_of(paths[-1] / "result.json")["seconds"], ", nothing compiled before" * cold
            rows += [
                Row(f"{WHAT}{more}", "workers", workers, inside, note="without imports"),
                Row(f"{WHAT}{more}, whole command", "workers", workers, seconds),
            ]
            print(f"{workers} workers{more}: {inside:.1f} s, the whole command {seconds:.1f} s")
    first, *others = paths
    for path in others:
        same_digits(first, path)
    return rows


def trained(settings: "Settings", run_dir: Path) -> Path:
    """The run that is evaluated, trained now, or by an interrupted command."""
    resume = ["--resume"] if (run_dir / "config.yaml").exists() else []
    argv = [*settings.common.split(), f"--run_dir={run_dir}", f"--seed={settings.seed}", *resume]
    return runs.train(*runs.parse(runs.Settings, argv)).path


def _evaluated(run: Path, path: Path, workers: int, settings: "Settings", cache: str) -> float:
    """Seconds of the command; what it compiles is kept in ``cache``, for the next one."""
    command = [sys.executable, "-m", "pyro_vae", "evaluate", str(run), f"--num_images={settings.num_images}"]
    command += [f"--workers={workers}", f"--run_dir={path}", "--resume", f"--device={settings.device}"]
    return seconds_of(command, TORCHINDUCTOR_CACHE_DIR=cache)


def same_digits(path: Path, other: Path) -> None:
    """Refuse evaluations of which a digit differs.

    Raises:
        RunError: naming what differs.
    """
    groups, others = (groups_of(each / "evidence.nc") for each in (path, other))
    for name, group in groups.items():
        for variable in group:
            a, b = group[variable].values, others[name][variable].values
            if not np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
                raise runs.RunError(f"{variable} of {name} differs between {path} and {other}")
