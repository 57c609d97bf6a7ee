"""A study: the same run for several contenders and seeds, and differences paired by seed. Shared by the *_study files."""

import json
import math
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import compare, runs, svi_mnist


class Summary(NamedTuple):
    """What the seeds of one contender say. Errors are standard errors over seeds; None for a single seed."""

    name: str
    elbo: float
    log_likelihood: float
    error: float | None
    difference: float
    difference_error: float | None
    share_khat: float
    active_units: float
    seconds: float
    unit: str
    bits_per_dim: float | None


def run_all(contenders: dict[str, str], seeds: int, common: Sequence[str], run_dir: Path) -> dict[str, list[Path]]:
    """Run every contender with every seed, one seed after the other; finished runs are not run again.

    Args:
        contenders: for each name, the command line arguments that make it.
        seeds: how many, from 0 on.
        common: arguments of all runs.
        run_dir: where each run gets a directory of its own.
    """
    result: dict[str, list[Path]] = {name: [] for name in contenders}
    for seed in range(seeds):
        for name, arguments in contenders.items():
            directory = run_dir / f"{slug(name)}-seed{seed}"
            if not (directory / "result.json").exists():
                print(f"\n--- {name}, seed {seed}")
                argv = [*common, *shlex.split(arguments), f"--seed={seed}", f"--run_dir={directory}"]
                svi_mnist.main([*argv, "--resume"] if (directory / "config.yaml").exists() else argv)
            result[name].append(directory)
    return result


def slug(name: str) -> str:
    """A name as a directory's: ``Gaussian, per pixel`` becomes ``Gaussian-per-pixel``."""
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())


def summarize(directories: dict[str, list[Path]], reference: str) -> list[Summary]:
    """One line per contender; differences are to the contender ``reference`` of the same unit, paired by seed and image."""
    summaries = []
    for name, paths in directories.items():
        finished = [compare.read(path) for path in paths]
        others = [compare.read(path) for path in directories[reference]]
        differences = [compare.compare(run, other).mean for run, other in zip(finished, others, strict=True)]
        results = [run.result for run in finished]
        summaries.append(
            Summary(
                name,
                mean(results, "test_elbo"),
                mean(results, "test_log_likelihood"),
                standard_error([r["test_log_likelihood"] for r in results]),
                statistics.fmean(differences),
                standard_error(differences),
                mean(results, "share_khat_above_0_7"),
                mean(results, "active_units"),
                mean(results, "train_seconds"),
                results[0]["unit"],
                None if results[0].get("bits_per_dim") is None else mean(results, "bits_per_dim"),
            )
        )
    return summaries


def table(summaries: Sequence[Summary], reference: str) -> str:
    """The summaries as a Markdown table."""
    bits = any(s.bits_per_dim is not None for s in summaries)
    header = ["", "ELBO", "log p(x)", "+-", f"minus {reference}", "+-", "k > 0.7", "active units", "train s"]
    rows = [tuple(header + ["bits/dim"] * bits)]
    for s in summaries:
        paired = ("", "") if s.name == reference else (f"{s.difference:+.2f}", _number(s.difference_error))
        row = [s.name, f"{s.elbo:.2f}", f"{s.log_likelihood:.2f}", _number(s.error), *paired]
        row += [f"{s.share_khat:.0%}", f"{s.active_units:.1f}", f"{s.seconds:.0f}"]
        rows.append(tuple(row + [_number(s.bits_per_dim, 3)] * bits))
    return runs.table(rows)


def mean(results: Sequence[dict[str, Any]], name: str) -> float:
    """Mean over runs of one entry of result.json."""
    return statistics.fmean(math.nan if r[name] is None else r[name] for r in results)


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of ``values``; None for a single one."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def write(run_dir: Path, title: str, text: str, summaries: Sequence[Summary], provenance: dict[str, Any]) -> None:
    """Write table.md and summary.json."""
    runs.write_text(run_dir / "table.md", f"# {title}\n\n{text}\n")
    content = {"summaries": [s._asdict() for s in summaries], **provenance}
    runs.write_text(run_dir / "summary.json", json.dumps(content, indent=2) + "\n")


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
