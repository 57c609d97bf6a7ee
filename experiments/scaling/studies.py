"""A study by several workers of one thread each, and on a Ray cluster of two nodes of one: seconds of the command."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.scaling.rows import Row, seconds_of
from pyro_vae import runs

if TYPE_CHECKING:
    from experiments.scaling.__main__ import Settings

COMMON = "--dataset Digits --epochs 20"
"""Arguments of pyro-vae train for all runs of the study."""


def measure(settings: "Settings", run_dir: Path) -> list[Row]:
    """Rows of each number of workers, and of a Ray cluster of as many nodes, where Ray is installed.

    Raises:
        RunError: if a command fails, or two of them do not give the same numbers.
    """
    what, rows, found = f"study of {settings.num_runs} runs", [], {}
    for workers in sorted(settings.workers):
        path = run_dir / f"workers-{workers}"
        seconds = _studied(path, [f"--workers={workers}"], settings)
        rows.append(Row(what, "workers", workers, seconds, note="the whole command"))
        found[path] = _numbers(path)
        print(f"{workers} workers: {seconds:.1f} s")
    if find_spec("ray") is not None:
        path, nodes = run_dir / "ray", max(settings.workers)
        with _cluster(nodes) as address:
            seconds = _studied(path, [f"--ray={address}"], settings)
        rows.append(Row(f"{what}, Ray", "nodes", nodes, seconds, note="the whole command; the cluster was there"))
        found[path] = _numbers(path)
        print(f"Ray, {nodes} nodes: {seconds:.1f} s")
    (first, numbers), *others = found.items()
    for path, each in others:
        if each != numbers:
            raise runs.RunError(f"{first} and {path} do not have the same numbers")
    return rows


def _studied(path: Path, options: list[str], settings: "Settings") -> float:
    """Seconds of the command, whose runs have one thread each."""
    command = [sys.executable, "-m", "pyro_vae", "study", "--contenders.a=--latent_dim 10", f"--common={COMMON}"]
    command += [f"--seeds={settings.num_runs}", f"--run_dir={path}", *options]
    with tempfile.TemporaryDirectory() as cache:
        return seconds_of(command, OMP_NUM_THREADS="1", TORCHINDUCTOR_CACHE_DIR=cache)


def _numbers(path: Path) -> list[list[float]]:
    """What the runs of a study say, rounded: a worker's first run and its second do not meet the same caches."""
    results = [runs.load(each.parent).result for each in sorted(path.glob("*/result.json"))]
    names = ("test_elbo", "test_log_likelihood", "validation_log_likelihood")
    return [[round(result[name], 3) for name in names] for result in results]


@contextlib.contextmanager
def _cluster(nodes: int) -> Iterator[str]:
    """Context: the address of a Ray cluster on this machine, of so many nodes of one processor each."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster  # pyright: ignore[reportMissingImports]

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=1)
        yield str(cluster.address)
    finally:
        cluster.shutdown()
