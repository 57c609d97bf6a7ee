"""How long the rows of a table will take here, and how many epochs fit into a budget: from a short timing of each."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from pyro_vae import annealed_importance_sampling, importance_sampling, runs
from pyro_vae.data.datasets import Data
from pyro_vae.data.fetched import cache_folder
from pyro_vae.infer.diagnostics import mean_log_weights
from pyro_vae.infer.engines import Engine
from pyro_vae.infer.trees import data_size, select
from pyro_vae.optimizers import make_optimizer
from pyro_vae.runs.build import Model
from pyro_vae.runs.scoring import MOST_VALIDATION
from pyro_vae.runs.training import WORTH_COMPILING, optimizer_of, prepare
from pyro_vae.training import RECENT

TIMED_IMAGES, TIMED_SAMPLES = 200, 200
"""Test images and samples of the timed estimate by importance sampling."""
WARM = 20
"""Steps that are not timed: the first ones make the graph, and compare it with Pyro's own."""
TIMED_ANNEALED = 8
"""Test images of the timed estimate by annealing."""


class Plan(NamedTuple):
    """What a row takes, in seconds.

    Attributes:
        epochs: of its training.
        steps: gradient steps of an epoch.
        step: of one of them.
        epoch: with the ELBO after it.
        scoring: of its test and validation images; rough, since an untrained model was timed.
    """

    epochs: int
    steps: int
    step: float
    epoch: float
    scoring: float

    @property
    def seconds(self) -> float:
        """All in all, of one seed."""
        return self.epochs * self.epoch + self.scoring


class Budget(NamedTuple):
    """How many epochs a row gets.

    Attributes:
        epochs: so many.
        hours: or as many as this allows for training.
        most: but not more than this.
    """

    epochs: int | None
    hours: float | None
    most: int | None

    def allows(self, epoch: float) -> int:
        """Epochs of so many seconds each, at least 1."""
        within = [each for each in (self.epochs, self.most) if each is not None]
        if self.hours is not None:
            within.append(int(3600 * self.hours / epoch))
        return max(1, min(within))


def measured(settings: runs.Settings, budget: Budget, seconds: float = 1.0) -> Plan:
    """The plan of a run, from so many seconds of its steps, and from a few images scored.

    Raises:
        RunError: for what is wrong with the settings, or if the data cannot be had.
    """
    device = runs.choose_device(settings.device)
    data = runs.load_dataset(runs.make("dataset", settings.dataset, settings.data_dir or cache_folder()), device)
    steps = len(data.batches(settings.batch_size))
    least = 1 if budget.hours is not None else budget.allows(math.inf)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        vae, step, epoch = _timed_epoch(settings, data, least * steps, seconds)
        if least * steps <= WORTH_COMPILING < budget.allows(epoch) * steps:  # what is that long is compiled
            vae, step, epoch = _timed_epoch(settings, data, WORTH_COMPILING + 1, seconds)
        scoring = _scoring(settings.evidence, vae, data)
    return Plan(budget.allows(epoch), steps, step, epoch, scoring)


def in_turn(first: Plan, then: Plan, share: float, budget: Budget) -> Plan:
    """The plan of a run whose epochs are of one kind in this share of them, and of another in the rest: means."""
    step, epoch = (share * a + (1 - share) * b for a, b in ((first.step, then.step), (first.epoch, then.epoch)))
    return Plan(budget.allows(epoch), then.steps, step, epoch, then.scoring)


def _timed_epoch(settings: runs.Settings, data: Data, num_steps: int, seconds: float) -> tuple[Model, float, float]:
    """A model after some steps, the seconds of one of a training of so many, and those of an epoch."""
    objective = runs.make("objective", settings.objective)
    vae = prepare(settings, data, objective)
    optimizer = make_optimizer(optimizer_of(settings), list(vae.parameters()), settings.lr)
    engine = runs.compiled_engine(num_steps)(vae.model, vae.guide, optimizer, objective)
    step = _timed_step(engine, data, settings.batch_size, seconds)
    elbo = _timed(lambda: mean_log_weights(vae.model, vae.guide, data.validation), data.device)
    elbos = elbo * (1 + min(RECENT, data.num_train) / data_size(data.validation))
    return vae, step, len(data.batches(settings.batch_size)) * step + elbos


def _timed_step(engine: Engine, data: Data, batch_size: int, seconds: float) -> float:
    number, start = -WARM, math.nan
    while True:
        for batch in data.batches(batch_size):
            engine.step(batch)
            number += 1
            if number == 0:  # what is done once is done
                start = _now(data.device)
            elif number > 0 and number % 20 == 0 and (now := _now(data.device)) - start > seconds:
                return (now - start) / number


def _scoring(evidence: runs.EvidenceSettings, vae: Model, data: Data) -> float:
    """Seconds of scoring, from a few images and samples."""
    test = data_size(data.test) if evidence.num_images is None else min(evidence.num_images, data_size(data.test))
    images, samples = min(TIMED_IMAGES, test), min(TIMED_SAMPLES, evidence.num_samples)
    some = select(data.test, slice(images))
    one = _timed(lambda: importance_sampling(vae.model, vae.guide, some, samples, num_checked=0), data.device)
    sampled = test + min(MOST_VALIDATION, data_size(data.validation))
    total = one * sampled / images * evidence.num_samples / samples
    annealed = test if evidence.annealed_images is None else min(evidence.annealed_images, test)
    if annealed:
        few = select(data.test, slice(min(TIMED_ANNEALED, annealed)))
        how = replace(evidence.annealing, num_checked=0)
        one = _timed(lambda: annealed_importance_sampling(vae.model, vae.guide, few, how), data.device)
        total += one * annealed / data_size(few)
    return total


def _timed(what: Callable[[], object], device: torch.device) -> float:
    start = _now(device)
    what()
    return _now(device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def plan_table(plans: Mapping[str, Plan], seeds: int, workers: int) -> str:
    """Plans as Markdown, with the hours of all together."""
    rows: list[Sequence[str]] = [
        ("row", "ms a step", "steps an epoch", "epochs", "hours of training", "of scoring, about")
    ]
    for name, plan in plans.items():
        training, scoring = plan.epochs * plan.epoch / 3600, plan.scoring / 3600
        rows.append(
            (
                name,
                f"{1000 * plan.step:.2f}",
                f"{plan.steps:,}",
                f"{plan.epochs:,}",
                f"{training:.2f}",
                f"{scoring:.2f}",
            )
        )
    total = seeds * sum(plan.seconds for plan in plans.values()) / 3600 / max(1, min(workers, seeds * len(plans)))
    told = f"{seeds} seeds" if seeds > 1 else "1 seed"
    shared = f", {workers} runs at a time" if workers > 1 else ""
    return f"{runs.table(rows)}\n\nAltogether, {told} of each{shared}: about {total:.2f} hours."
