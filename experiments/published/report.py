"""What was made beside what was published: table, figure and numbers."""

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from scipy import stats

from experiments.published.rows import Row, Schedule, Table
from pyro_vae import importance_sampling, runs
from pyro_vae.data.fetched import cache_folder
from pyro_vae.data.images import Dataset, observed
from pyro_vae.runs import figures
from pyro_vae.runs.directory import changed_setting
from pyro_vae.runs.scoring import number

SAME = ("model", "top", "latent_dim", "prior", "likelihood", "posterior", "encoder", "decoder", "condition")
"""Settings that make the model of a row."""
ONE_BOUND = ("ELBO", "IWAE", "Trace_ELBO", "TraceMeanField_ELBO")
"""With one sample, these are one bound."""


class Made(NamedTuple):
    """A row that has been made, by one run for each seed, and how."""

    row: Row
    finished: list[runs.Run]
    table: Table
    schedule: Schedule


def check_is_of(row: Row, run: runs.Run) -> runs.Run:
    """A run that is of this row: of its data, with its networks and its bound; otherwise it is refused.

    Raises:
        RunError: naming what differs.
    """
    result = run.result
    for name, wanted in (("dataset", row.dataset), ("binarization", row.binarization), ("data", row.fingerprint)):
        if wanted is not None and result.get(name) != wanted:
            what = "images whose fingerprint" if name == "data" else f"data whose {name}"
            raise runs.RunError(
                f"{row.name}: {run.path} was scored on {what} is {result.get(name)}, not {wanted}: its log p(x) is "
                "not that of the published row"
            )
    wanted, found = (_settings(argv) for argv in (row.given(), [f"--config={run.path / 'config.yaml'}"]))
    for name in SAME:
        if changed := changed_setting(wanted.get(name), found.get(name), name):
            raise runs.RunError(f"{row.name}: {run.path} was run with another {changed}, that of the row first")
    bounds = [_bound(each["objective"]) for each in (wanted, found)]
    if bounds[0] != bounds[1]:
        raise runs.RunError(f"{row.name}: {run.path} was trained by {' of K = '.join(map(str, bounds[1]))} samples")
    return run


def check_common(row: Row, schedule: Schedule) -> None:
    """Refuse arguments for all rows that would make another row of this one.

    Raises:
        RunError: naming the first.
    """
    wanted, found = (_settings(argv) for argv in (row.given(), shlex.split(row.arguments(schedule, 1))))
    for name in (*SAME, "dataset", "epochs", "evidence"):
        before = 1 if name == "epochs" else wanted.get(name)
        if changed := changed_setting(before, found.get(name), name):
            raise runs.RunError(f"--common: {changed}: that is what makes {row.name}, or has an option of its own")
    if _bound(wanted["objective"]) != _bound(found["objective"]):
        raise runs.RunError(f"--common: --objective is that of {row.name}")


def _settings(argv: Sequence[str]) -> dict[str, Any]:
    return yaml.safe_load(runs.parse(runs.Settings, argv)[1])


def _bound(objective: Any) -> tuple[str, int]:
    """The name of a bound, and its number of samples; a warm-up makes no other. Of several in turn, the last one's."""
    given: dict[str, Any] = objective if isinstance(objective, dict) else {"class_path": str(objective)}
    name = given["class_path"].rpartition(".")[-1]
    arguments = given.get("init_args") or {}
    if name == "InTurn":
        return _bound(arguments["then"])
    k = int(arguments.get("num_particles", 1))
    if name == "BetaELBO" and arguments.get("beta", 1.0) == 1.0 and not arguments.get("free_bits"):
        name = "ELBO"
    return ("ELBO" if k == 1 and name in ONE_BOUND else name, k)


class Against(NamedTuple):
    """The mean of our runs minus the published number, in nats, with a 95 % interval.

    Attributes:
        ours: mean over seeds, by importance sampling.
        difference: to the published number.
        half_width: of the interval.
        seeds: whether the interval counts that other seeds would differ.
    """

    ours: float
    difference: float
    half_width: float
    seeds: bool


def against(published: float, ours: Sequence[float], mc_se: float, redraw_se: float, others_se: float = 0.0) -> Against:
    """Set the log-likelihoods of our seeds against one published run.

    The published number is that of one run on another draw of the test images' binarization: it varies as one of ours
    does. With several seeds the interval is that of one more run, by Student's t; with one the spread of seeds is not
    known, and the interval counts the noise of importance sampling and of binarization alone, both twice.

    Args:
        published: the number of the table.
        ours: one for each seed, all on one draw of the test images.
        mc_se: Monte Carlo error of one of ours.
        redraw_se: standard error of a mean over test images, over draws of their binarization.
        others_se: standard error of a mean over some test images, as an estimate of that over all; 0 of all.
    """
    mean, variance = statistics.fmean(ours), 2 * redraw_se**2 + others_se**2
    if len(ours) == 1:
        half = stats.norm.ppf(0.975) * math.sqrt(variance + 2 * mc_se**2)
    else:
        own = stats.t.ppf(0.975, len(ours) - 1) ** 2 * statistics.variance(ours) * (1 + 1 / len(ours))
        half = math.sqrt(own + stats.norm.ppf(0.975) ** 2 * variance)
    return Against(mean, mean - published, float(half), len(ours) > 1)


def redraw_error(run: runs.Run, data_dir: Path | None, num_images: int = 500, num_samples: int = 500) -> float:
    """Standard error of the mean log p(x) of a run's test images, over draws of their binarization.

    From two draws of some of the images, each scored by a few importance samples; 0 of data that are drawn once.
    """
    if run.result["binarization"] != "dynamic":
        return 0.0
    source = runs.make("dataset", run.settings.dataset, data_dir or run.settings.data_dir or cache_folder())
    if not isinstance(source, Dataset):
        raise runs.RunError(f"{run.path}: {run.result['dataset']} has no pixels that could be drawn again")
    images = source.read()
    pixels = torch.from_numpy(np.ascontiguousarray(images.test)).flatten(1)
    pixels = pixels[runs.some(len(pixels), min(num_images, len(pixels)))]
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = (
            importance_sampling(
                run.model.model,
                run.model.guide,
                observed(pixels, images.max_value, "static", generator),
                num_samples,
                num_checked=0,
            ).log_px
            for _ in range(2)
        )
    return float((first - second).std() / math.sqrt(2 * run.result["num_images"]))


def conclude(
    run_dir: Path,
    made: Sequence[Made],
    data_dir: Path | None,
    elsewhere: Mapping[str, Sequence[Path]],
) -> Path:
    """Write table, figure and numbers; return the directory."""
    lines = [_line(each, data_dir) | {"runs": [_place(run.path, run_dir) for run in each.finished]} for each in made]
    words = [
        "Nats per image, larger is better; means over seeds. Published are log-likelihoods by 5,000 importance",
        "samples; ours beside them by as many as the column says, and annealed, with a standard error. The 95 %",
        "interval is that of the difference to the published number, which is one run on another draw of the test",
        "images' binarization; with one seed it does not count that another seed would differ. Of some test images it",
        "counts that the others differ, as if they had been drawn at random: MNIST's first ones are easier.",
    ]
    parts = ["\n".join(words)]
    for table in {id(each.table): each.table for each in made}.values():
        mine = [line for line, each in zip(lines, made, strict=True) if each.table is table]
        rows = [each for each in made if each.table is table]
        parts += [f"## {table.title}", _markdown(mine, rows)]
        remarks = [*rows[0].schedule.words, *table.words]
        parts.append("What differs from the published protocol:\n\n" + "\n".join(f"- {each}" for each in remarks))
    if elsewhere:
        told = "\n".join(f"- {name}: {paths[0]}" for name, paths in elsewhere.items())
        parts.append(f"Trained elsewhere, with a schedule and a number of training images of their own:\n\n{told}")
    with runs.writing(run_dir):
        _plot(lines, run_dir / "published.png")
    devices = [*dict.fromkeys(run.result["device"] for each in made for run in each.finished)]
    result = {"rows": lines, "devices": devices}
    return runs.conclude(run_dir, "\n\n".join(parts), result, torch.device("cpu"))


def _line(made: Made, data_dir: Path | None) -> dict[str, Any]:
    """All numbers of a row."""
    results = [run.result for run in made.finished]
    first = results[0]
    redraw = redraw_error(made.finished[0], data_dir)
    left = max(0.0, 1 - first["num_images"] / made.row.num_test)
    others = first["test_log_likelihood_se"] * math.sqrt(left)
    found = against(made.row.published, [r["test_log_likelihood"] for r in results], first["mc_se"], redraw, others)
    annealed = [r["annealed_log_likelihood"] for r in results]
    annealed = None if None in annealed else statistics.fmean(annealed)
    return {
        "row": made.row.name,
        "published": made.row.published,
        **found._asdict(),
        "num_samples": first["num_samples"],
        "num_images": first["num_images"],
        "mc_se": first["mc_se"],
        "redraw_se": redraw,
        "others_se": others,
        "annealed": annealed,
        "annealed_mc_se": None if annealed is None else _root_mean(r["annealed_mc_se"] for r in results),
        "annealed_images": first["annealed_images"],
        "reliable": all(r["reliable"] is not False for r in results),
        "annealed_reliable": all(r["annealed_reliable"] is not False for r in results),
        "active_units": _units(results),
        "active_units_first_500": [r.get("active_units_first_500") for r in results],
        "published_units": made.row.units,
        "epochs": first["epochs"],
        "hours": statistics.fmean(r["train_seconds"] for r in results) / 3600,
        "num_seeds": len(results),
        "device": first["device"],
    }


def _place(path: Path, run_dir: Path) -> str:
    """Where a run is, seen from the table's directory if it is in there."""
    return str(path.relative_to(run_dir) if path.is_relative_to(run_dir) else path)


def _root_mean(errors: Any) -> float:
    """The standard error of a mean, from those of its terms."""
    found = list(errors)
    return math.sqrt(sum(each**2 for each in found)) / len(found)


def _units(results: Sequence[Mapping[str, Any]]) -> str:
    """Active units of each layer, means over seeds, the lowest layer first: ``17+5``."""
    by_site = [dict(sorted(r["active_units_by_site"].items())) for r in results]
    return "+".join(f"{statistics.fmean(each[site] for each in by_site):.3g}" for site in by_site[0])


def _markdown(lines: Sequence[Mapping[str, Any]], rows: Sequence[Made]) -> str:
    counts = sorted({f"{line['num_samples']:,}" for line in lines})
    header = ["row", "published", f"ours, {' or '.join(counts)} samples", "minus published", "95 % interval"]
    header += ["annealed", "+-", "active units", "published", "epochs", "hours", "seeds"]
    table: list[Sequence[str]] = [header]
    for line, made in zip(lines, rows, strict=True):
        low, high = (line["difference"] + side * line["half_width"] for side in (-1, 1))
        whole = line["num_images"] == made.row.num_test
        some = "" if whole else f" (first {line['num_images']:,} of {made.row.num_test:,} test images)"
        doubted = "" if line["annealed_reliable"] else " (doubted)"
        annealed = number(line["annealed"], 2) + doubted
        table.append(
            [
                line["row"] + some,
                f"{line['published']:.2f}",
                number(line["ours"], 2),
                f"{line['difference']:+.2f}",
                f"{low:+.2f} to {high:+.2f}",
                annealed,
                number(line["annealed_mc_se"], 2),
                line["active_units"],
                made.row.units or "-",
                f"{line['epochs']:,}",
                f"{line['hours']:.2f}",
                str(line["num_seeds"]),
            ]
        )
    return runs.table(table)


def _plot(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Published and made, row by row."""
    places = list(range(len(lines)))
    with figures.figure(path, 6.8, 1.4 + 0.4 * len(lines)) as axes:
        axes.scatter([x["published"] for x in lines], places, marker="x", color="C3", zorder=3, label="published")
        half = [x["half_width"] for x in lines]
        ours = [x["ours"] for x in lines]
        axes.errorbar(ours, places, xerr=half, fmt="o", color="C0", capsize=3, markersize=4, label="ours, likewise")
        known = [(x["annealed"], place, x["annealed_mc_se"]) for x, place in zip(lines, places, strict=True)]
        known = [each for each in known if each[0] is not None and math.isfinite(each[0])]
        if known:
            values, at, errors = zip(*known, strict=True)
            axes.errorbar(values, at, xerr=errors, fmt="d", color="C2", markersize=4, label="ours, annealed")
        axes.set_yticks(places, [x["row"] for x in lines])
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.set(xlabel="test log p(x), nats per image")
        axes.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)  # above all points
