"""Quality against time: log p(x) of test images against seconds of training, for recipes, and the table of records.

Usage: python -m experiments.speedrun [RECIPE ...] [options]

A recipe is a YAML file of settings, as pyro-vae train --config takes it: one of experiments/recipes by its name, or any
other by its path. Each is trained from several seeds, one training at a time, in a process of its own that finds
nothing compiled before. Seconds are those of the epochs: steps, compiling, and the validation ELBO after each epoch;
fetching data and scoring are not counted. Then all 10,000 test images of dynamic MNIST are scored, by annealed
importance sampling (of as many as the recipe's --evidence.annealed_images, which correct the mean over all) and by
importance sampling. A recipe may stop when it likes: what it reached in the seconds it took is one point.

Tracks, and the boards on which one record stands each:
  A  the network of the IWAE paper (784-200-200-50, standard normal prior, mean field): seconds to -88.00, to -87.00,
     and to -86.76 by 5,000 importance samples, the paper's own value and estimator;
  B  any VAE whose pixels are independent given z: the best within 3 minutes and within 20;
  C  any VAE whose latents carry at least 5 nats (KL): the best within 20 minutes and within 150.

The rule: a target is reached if log p(x) is above it by more than its error (over seeds and Monte Carlo); a record is
beaten by less time, beyond the error of the difference, or, where time is limited, by a log p(x) that is better by more
than the error of the difference, or as good in less time. Three seeds are needed, in track C one. No record is what was
trained from code or recipes that are not committed, with --common, or what is not reliable. Records of one machine are
not compared with those of another. Nothing else should run on the machine meanwhile.

To enter: put a file into experiments/recipes, commit it, and run python -m experiments.speedrun NAME. Ctrl-C, and the
same command with --run_dir DIR --resume goes on.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

import torch
from matplotlib.ticker import NullFormatter

from experiments.speedrun import records
from experiments.speedrun.records import HOME, ROOT, Entry, Record, Verdict, pair
from experiments.speedrun.tracks import BOARDS, CUSTOMARY, TEST_SET, Name, Recipe, fingerprint, model_of, recipes
from pyro_vae import cli, runs
from pyro_vae.data.fetched import cache_folder
from pyro_vae.runs import figures
from pyro_vae.runs.build import load_dataset
from pyro_vae.runs.directory import read_csv, several
from pyro_vae.runs.reading import json_of, text_of, yaml_of
from pyro_vae.runs.studies import do_all
from pyro_vae.runs.workers import Shared

PUBLISHED = {
    "VAE (Burda et al. 2016)": -86.76,
    "IWAE, K = 50 (Burda et al. 2016)": -84.78,
    "VampPrior (Tomczak & Welling 2018)": -82.38,
    "PixelHVAE, VampPrior (Tomczak & Welling 2018)": -78.45,
}
"""log p(x) of dynamic MNIST by 5,000 importance samples, after hundreds to thousands of epochs."""
TABLE = HOME.relative_to(ROOT)


@dataclass(frozen=True)
class Settings:
    """Settings of the speedrun.

    Args:
        recipes: names of files in experiments/recipes, or paths of others; may stand first, without --recipes; none:
            all in experiments/recipes.
        tracks: to each of which all recipes must belong; null: each enters every track to which it belongs; []: none,
            for recipes on other data, to look at.
        seeds: trainings of each recipe, at least 1.
        threads: of the processor, for each training, at least 1.
        device: cpu, or cuda; auto takes a GPU if there is one.
        common: more arguments of pyro-vae train for all trainings, to try something: nothing is a record then.
        records: directory of the table of records, which new ones are written to; null: it is neither read nor written.
        run_dir: directory to write, new or empty; null: one under runs/.
        resume: go on with what is there; trainings that are finished are not done again.
    """

    recipes: Sequence[str] = ()
    tracks: Sequence[Name] | None = None
    seeds: int = 3
    threads: int = 2
    device: str = "cpu"
    common: str = ""
    records: Path | None = TABLE
    run_dir: Path | None = None
    resume: bool = False

    def __post_init__(self):
        if self.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {self.seeds}")
        most = os.cpu_count() or 1
        if not 1 <= self.threads <= most:
            raise ValueError(f"--threads must be in 1..{most}, the threads of this machine, got {self.threads}")
        try:
            shlex.split(self.common)
        except ValueError as error:
            raise ValueError(f"--common: {error}") from error


class Alone:
    """Who trains: this process, one training at a time, so that seconds are seconds."""

    workers, ray, cpus_per_run, gpus_per_run = 1, False, 1, 0.0


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure as told by ``argv``; return the directory with the result.

    Raises:
        RunError: for a mistake in ``argv`` or in a recipe, or if a training failed.
    """
    settings, text = runs.parse(Settings, argv, first="recipes", prog="python -m experiments.speedrun")
    found = recipes(settings.recipes, settings.tracks)
    device = runs.choose_device(settings.device)
    known = [] if settings.records is None else records.load(settings.records)
    run_dir = settings.run_dir or Path("runs") / f"speedrun-{date.today()}"
    for recipe in found:  # what is fetched, is now
        source = runs.make("dataset", recipe.settings.dataset, recipe.settings.data_dir or cache_folder())
        data = load_dataset(source, "cpu", recipe.settings.conditions)
        model_of(recipe.settings, data.schema)  # which refuses what would fail after other trainings
    runs.open_run(run_dir, text, settings.resume)
    trainings = {_name(recipe, seed): (recipe, seed) for seed in range(settings.seeds) for recipe in found}
    print(f"{len(trainings)} trainings in {run_dir}, one after the other")
    if failed := do_all(partial(_shared, settings, trainings, device), run_dir, Alone()):
        (name, reason), *_ = failed.items()
        raise runs.RunError(f"{name}: {reason}; the same command with --run_dir {run_dir} --resume tries it again")
    entries = [_entry(recipe, run_dir, settings) for recipe in found]
    verdicts, now = records.enter(entries, known)
    if settings.records is not None and len(now) > len(known):
        records.save(settings.records, now)
        plot(entries, now, {}, settings.records / "records.png")
    curves = {recipe.name: curve(run_dir / _name(recipe, 0)) for recipe in found}
    with runs.writing(run_dir):
        plot(entries, now, curves, run_dir / "speedrun.png")
    result = {"entries": [vars(each) for each in entries], "verdicts": [each._asdict() for each in verdicts]}
    return runs.conclude(run_dir, report(entries, verdicts), result, device)


# Trainings


def _name(recipe: Recipe, seed: int) -> str:
    return f"{runs.slug(recipe.name)}-seed{seed}"


def _marks(run_dir: Path, name: str) -> Path:
    """What is to be known of a training beside its result; its last file."""
    return run_dir / f"{name}.json"


def _shared(
    settings: Settings, trainings: Mapping[str, tuple[Recipe, int]], device: torch.device, run_dir: Path
) -> Shared:
    """All trainings, as work of which what is done can be seen."""

    def do(name: str) -> None:
        recipe, seed = trainings[name]
        before = records.clean_commit()
        train(arguments(recipe, seed, settings), run_dir / name, settings.threads)
        known = {"commit": before if before == records.clean_commit() else None, "date": f"{date.today()}"}
        known |= {"machine": records.machine(device, settings.threads)}
        runs.write_json(_marks(run_dir, name), known | {"doubts": _doubts(recipe, run_dir / name, settings, device)})
        result = runs.load(run_dir / name).result
        value = runs.number(result["annealed_log_likelihood"], 2)
        print(f"{name}: {result['train_seconds']:.0f} s, log p(x) {value}")

    return Shared(run_dir, list(trainings), do, lambda name: _marks(run_dir, name).exists())


def arguments(recipe: Recipe, seed: int, settings: Settings) -> list[str]:
    """Arguments of pyro-vae train for one training, but for where it is."""
    given = [f"--config={recipe.path}", f"--seed={seed}", f"--device={settings.device}"]
    if "A" in recipe.tracks:  # the paper's estimator
        given.append(f"--evidence.num_samples={CUSTOMARY}")
    return [*given, *shlex.split(settings.common)]


def train(argv: Sequence[str], directory: Path, threads: int) -> None:
    """Train and score in a process of its own, to which nothing is known that was compiled before.

    Args:
        argv: arguments of pyro-vae train.
        directory: of the run, which is gone on with if it was begun; what it prints is written beside it.
        threads: of the processor.

    Raises:
        RunError: with the last line of what the process said, if it failed.
    """
    resume = ["--resume"] * (directory / "config.yaml").exists()
    command = [sys.executable, "-m", "pyro_vae", "train", *argv, f"--run_dir={directory}", *resume]
    log = directory.with_name(f"{directory.name}.log")
    with tempfile.TemporaryDirectory() as cold:
        environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), f"{threads}")
        environment |= {"TORCHINDUCTOR_CACHE_DIR": cold, "TRITON_CACHE_DIR": str(Path(cold) / "triton")}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with log.open("a", encoding="utf-8") as file:
            done = subprocess.run(command, env=os.environ | environment, stdout=file, stderr=file, check=False)
    if done.returncode:
        said = [line for line in text_of(log).splitlines() if line.strip()]
        raise runs.RunError(said[-1] if said else f"pyro-vae train ended with status {done.returncode}")


def _doubts(recipe: Recipe, directory: Path, settings: Settings, device: torch.device) -> list[str]:
    """Why a training is no part of a record, beside its numbers."""
    result, doubts = runs.load(directory).result, []
    if settings.common:
        doubts.append("--common changes the recipe")
    if not recipe.is_kept:
        doubts.append("its file is not in experiments/recipes")
    if fingerprint(yaml_of(directory / "config.yaml")) != recipe.fingerprint and not settings.common:
        doubts.append("the recipe has changed since it was trained")
    if result["test_set"] != TEST_SET:
        doubts.append("it is scored on other images than the test images of dynamic MNIST")
    threads = several(settings.threads, "thread")
    if device.type == "cpu" and not result["device"].endswith(f", {threads}"):
        doubts.append(f"it was trained by {result['device']}, not {threads}")
    return doubts


# What came out


def _entry(recipe: Recipe, run_dir: Path, settings: Settings) -> Entry:
    """The entry of a recipe all of whose seeds are finished."""
    names = [_name(recipe, seed) for seed in range(settings.seeds)]
    finished = [runs.load(run_dir / name).result for name in names]
    marks = [json_of(_marks(run_dir, name)) for name in names]
    return records.entry_of(recipe.name, recipe.fingerprint, "".join(recipe.tracks), finished, marks)


def curve(directory: Path) -> list[tuple[float, float]]:
    """Seconds of training so far, and the validation ELBO, after each epoch of a run."""
    points, seconds = [], 0.0
    for row in read_csv(directory / "metrics.csv"):
        seconds += float(row["seconds"])
        points.append((seconds, float(row["validation_elbo"])))
    return points


def report(entries: Sequence[Entry], verdicts: Sequence[Verdict]) -> str:
    """What each recipe reached, and what became of it on each board."""
    rows = [("recipe", "tracks", "seeds", "seconds", "log p(x), annealed", "importance", "samples", "ELBO", "KL")]
    rows += [
        (
            each.recipe,
            each.tracks or "-",
            f"{each.num_seeds}",
            pair(each.seconds, each.seconds_error, 1),
            pair(each.annealed, each.annealed_error),
            pair(each.importance, each.importance_error),
            f"{each.num_samples:,}",
            f"{each.elbo:.2f}",
            f"{each.kl:.2f}",
        )
        for each in entries
    ]
    decided = [("board", "record?", "why")]
    decided += [(each.board, "yes" if each.is_record else "no", each.reason) for each in verdicts]
    parts = ["Nats per image, larger is better; errors over seeds and Monte Carlo.", runs.table(rows)]
    return "\n\n".join(parts + [runs.table(decided)] * bool(verdicts))


def plot(
    entries: Sequence[Entry], kept: Sequence[Record], curves: Mapping[str, Sequence[tuple[float, float]]], path: Path
) -> None:
    """log p(x) against seconds: entries, the front of the records, published values; and the ELBO on the way."""
    with figures.figure(path, 11 if curves else 6.4, 4.4, columns=1 + bool(curves)) as panels:
        axes = panels[0] if curves else panels
        for name, value in PUBLISHED.items():
            axes.axhline(value, color="0.7", lw=0.8, ls="--")
            axes.annotate(name, (0.01, value), xycoords=("axes fraction", "data"), va="bottom", fontsize=6, color="0.4")
        for track in dict.fromkeys(board.track for board in BOARDS):
            best = front([record.entry for record in kept if record.board.startswith(track)])
            axes.step(*zip(*best, strict=True), where="post", label=f"records, track {track}") if best else None
        for each in entries:
            axes.errorbar(
                each.seconds, each.annealed, each.annealed_error, each.seconds_error, fmt="o", label=each.recipe
            )
        axes.set(xscale="log", xlabel="seconds of training", ylabel="test log p(x), annealed, nats per image")
        axes.legend(fontsize=7) if entries or kept else None
        for name, points in curves.items():
            seconds, elbo = zip(*points, strict=True)
            panels[1].plot(seconds, elbo, label=name, marker="." if len(points) == 1 else None)
        if curves:
            late = [elbo for points in curves.values() for _, elbo in points[len(points) // 4 :]]
            panels[1].set(xscale="log", xlabel="seconds of training", ylabel="validation ELBO on the way, seed 0")
            panels[1].xaxis.set_minor_formatter(NullFormatter())
            panels[1].set_ylim(min(late) - 0.5, max(late) + 0.5)
            panels[1].legend(fontsize=7)


def front(entries: Sequence[Entry]) -> list[tuple[float, float]]:
    """Seconds and values of those than which no other is both faster and better."""
    best: list[tuple[float, float]] = []
    for each in sorted(entries, key=lambda entry: (entry.seconds, -entry.annealed)):
        if not best or each.annealed > best[-1][1]:
            best.append((each.seconds, each.annealed))
    return best


if __name__ == "__main__":
    cli.guarded(main)
