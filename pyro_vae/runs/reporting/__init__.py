"""A report: one self-contained page of HTML on a run, on several runs, on a study or on a search.

``report([run])`` writes ``report.html``, which opens from disk and asks nobody for anything. Training and studies write
theirs by :func:`report_after`, whose failure loses nothing.
"""

import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from pyro_vae.data.datasets import Data
from pyro_vae.errors import RunError
from pyro_vae.runs.given import check_made, check_trust
from pyro_vae.runs.hub import home_of, is_downloaded, named
from pyro_vae.runs.loading import Run, load
from pyro_vae.runs.reading import json_of, yaml_of
from pyro_vae.runs.reporting.contents import Told, history_of, run_page, unfinished_page
from pyro_vae.runs.reporting.page import Page, check_page, write_page
from pyro_vae.runs.reporting.searched import search_page
from pyro_vae.runs.reporting.several import comparison_page, study_page

FILE = "report.html"


@dataclass(frozen=True)
class ReportSettings:
    """Settings of a report.

    Args:
        runs: directories of finished runs, or hf://USER/NAME, the reference first, or of one study or search; may stand
            first, without --runs.
        out: the page to write, a new file named .html, or an earlier report; null: report.html in the run, study or
            search, or of several runs in the current directory.
        run_dir: directory to write report.html to, in place of --out.
        data: show the data themselves and what the model draws, for which both are read; false: numbers alone.
        trust: build whatever classes the runs' settings name; false: only those of pyro_vae; null: false for runs of
            hf://, else true.
    """

    DESCRIPTION: ClassVar[str] = (
        "One page of HTML on a run, several runs, a study or a search: is the number to be believed, which data are\n"
        "worst, which run is better and by how much. It opens from disk and fetches nothing.\n\n"
        "Usage: pyro-vae report RUN [RUN ...] [options]\n\n"
        "Of one run: log p(x) with its errors and whether to believe it, in words; settings that differ from the\n"
        "defaults; training; estimates against budget; every datum, sortable by log p(x), Pareto k and effective\n"
        "sample size, with the data themselves; reconstructions, samples, traversals and the map of the latents.\n"
        "Of several runs: differences to the first, paired by datum, with intervals, and a leaderboard; runs whose\n"
        "numbers mean different things, such as another unit, are not ranked together. Of a study: the same of its\n"
        "contenders. Of a search: what the validation data choose, all trials, which settings mattered, and the\n"
        "training of the best. Only an earlier report is ever overwritten. pyro-vae train and study write theirs at\n"
        "their end."
    )

    runs: Sequence[Path]
    out: Path | None = None
    run_dir: Path | None = None
    data: bool = True
    trust: bool | None = None

    def __post_init__(self):
        check_made(self)
        if self.out is not None and self.run_dir is not None:
            raise ValueError("--out is a file and --run_dir a directory for it: give one of them")


def report(
    runs: Sequence[Run | Path | str] | Run | Path | str,
    out: Path | str | None = None,
    data: bool = True,
    trust: bool | None = None,
) -> Path:
    """Write a page on finished runs, or their directories, or on one study or search; return its path.

    Args:
        runs: one or several, the reference first.
        out: the page, a new file named .html, or an earlier report; None: ``report.html`` in the run, study or search,
            or of several runs in the current directory.
        data: show the data themselves and what the model draws; False: numbers alone.
        trust: see :func:`pyro_vae.runs.load`.

    Raises:
        RunError: if there is nothing to report, or anything else is where the page would be.
    """
    check_trust(trust)
    given = [runs] if isinstance(runs, Run | Path | str) else list(runs)
    given = [run if isinstance(run, Run) else home_of(run) for run in given]
    if not given:
        raise RunError("name a run directory to report")
    paths = [Path(run) for run in given]
    if len({path.resolve() for path in paths}) < len(paths):
        raise RunError("a run is named twice: name each run directory once")
    given_out = out is not None
    out = Path(out) if out is not None else (paths[0] if len(paths) == 1 else Path()) / FILE
    if not given_out and is_downloaded(out.parent):
        raise RunError(f"{named(out.parent)} was downloaded, and nothing is written there: name the page by --out")
    place = f"--out {out}" if given_out else str(out)
    kinds = [kind_of(path) for path in paths]
    check_page(out, place)
    with torch.random.fork_rng([]):  # models that are made, and drawn from
        page = _page(given, paths, kinds, out, data, trust)
    write_page(page, out, place)
    return out


def kind_of(directory: Path) -> str:
    """What a directory holds: a ``run``, one ``unfinished``, a ``study``, or a ``search``.

    Raises:
        RunError: if it is none of these.
    """
    result, config = directory / "result.json", directory / "config.yaml"
    if os.path.lexists(result):
        content = json_of(result)
        if "summaries" in content:
            return "study"
        if "trials" in content:
            return "search"
        if "test_elbo" not in content and ("estimator" in content or "differences" in content):
            raise RunError(f"{directory} is no run, but what was found of one: name the directory of the run")
        return "run"
    if os.path.lexists(directory / "summary.json"):
        return "study"
    if not os.path.lexists(config):
        raise RunError(f"{directory} holds no run (there is no config.yaml)")
    if {"contenders", "space"} & yaml_of(config).keys():
        raise RunError(f"{directory} is a study that is not finished: give its command again with --resume")
    return "unfinished"


def _page(
    given: Sequence[Run | Path | str],
    paths: Sequence[Path],
    kinds: Sequence[str],
    out: Path,
    data: bool,
    trust: bool | None,
) -> Page:
    names = [_name(path) for path in paths]
    if len(paths) == 1:
        if kinds[0] == "study":
            return study_page(paths[0], names[0], out.parent)
        if kinds[0] == "search":
            return search_page(paths[0], names[0], out.parent)
        if kinds[0] == "unfinished":
            return unfinished_page(names[0], paths[0])
        return run_page(_told(given[0], names[0], data, True, trust))
    if odd := [path for path, kind in zip(paths, kinds, strict=True) if kind != "run"]:
        if (kind := kinds[paths.index(odd[0])]) in ("study", "search"):
            raise RunError(f"{odd[0]} is a {kind}: to compare runs, name the directories of runs alone")
        raise RunError(f"{odd[0]} is not finished: to compare runs, all must be finished")
    names = names if len(set(names)) == len(names) else [str(path) for path in paths]
    told: list[Told] = []
    for run, name in zip(given, names, strict=True):
        told.append(_told(run, name, data, False, trust, told))
    return comparison_page(told)


def _name(path: Path) -> str:
    return named(path) if is_downloaded(path) else path.resolve().name or str(path)


def _told(
    given: Run | Path | str, name: str, data: bool, model: bool, trust: bool | None, others: Sequence[Told] = ()
) -> Told:
    """A run with its data and its model, if they are asked for and can be had; data of others are not read again."""
    run = given if isinstance(given, Run) else load(given, trust)
    told = Told(name, run, history_of(run.path))
    if not data:
        return told._replace(absent="they were not asked for")
    content = [run.result.get(entry) for entry in ("data", "test_set")]
    alike = (each.data for each in others if [each.run.result.get(entry) for entry in ("data", "test_set")] == content)
    known = next(alike, None) if all(content) else None
    try:
        return told._replace(vae=run.model if model else None, data=known or run.data)
    except RunError as error:
        return told._replace(absent=str(error))


def report_after(run_dir: Path, vae: Any, data: Data) -> None:
    """Write the page of a run that was finished just now, with its model and data at hand.

    The run is whole without it: whatever goes wrong is one line on stderr.
    """

    def write() -> None:
        run = load(run_dir)
        with torch.random.fork_rng([]):
            page = run_page(Told(_name(run_dir), run, history_of(run_dir), vae, data))
        write_page(page, run_dir / FILE)

    quietly(write, run_dir)


def report_study_after(run_dir: Path) -> None:
    """Write the page of a study or search that was finished just now; whatever goes wrong is one line on stderr."""
    quietly(lambda: report([run_dir]), run_dir)


def quietly(write: Callable[[], object], run_dir: Path) -> None:
    """Write a page; whatever goes wrong is told in one line on stderr."""
    try:
        write()
    except Exception as error:  # the run itself is finished, and must not be lost to its picture
        reason = textwrap.shorten(str(error) or type(error).__name__, 300)
        hint = f"the run is finished; pyro-vae report {run_dir} tries again"
        print(f"no report ({type(error).__name__}: {reason}): {hint}", file=sys.stderr)
