"""What a page says of one run: its number, whether to believe it, what was run, its data, and what its model draws."""

import inspect
import math
import pydoc
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
import yaml
from markupsafe import escape

from pyro_vae.callbacks import Epoch
from pyro_vae.data.datasets import Data
from pyro_vae.data.images import ImageData
from pyro_vae.data.sequences import SequenceData
from pyro_vae.errors import RunError, is_of_no_number
from pyro_vae.runs.directory import flat, noun_of, read_csv, several
from pyro_vae.runs.loading import Run
from pyro_vae.runs.parsing import settings_text
from pyro_vae.runs.reading import evaluation_of, yaml_of
from pyro_vae.runs.reporting import drawing
from pyro_vae.runs.reporting.page import Column, Figures, Folded, Gallery, Grid, Page, Rows, Section, Text, Verdicts
from pyro_vae.runs.reporting.showing import Shown
from pyro_vae.runs.reporting.words import verdict
from pyro_vae.runs.scoring import number, rows_of
from pyro_vae.runs.settings import Settings

MOST_ROWS = 10_000
"""Of a sortable table."""
IN_GALLERY = 10
"""Data of each kind: the worst, the best, the least sure."""


class Told(NamedTuple):
    """A finished run as it is reported: its name, what its training recorded, and if they are here, model and data.

    ``absent`` says why they are not.
    """

    name: str
    run: Run
    history: list[Epoch]
    vae: Any = None
    data: Data | None = None
    absent: str = ""

    @property
    def noun(self) -> str:
        return noun_of(self.run.result)


def history_of(directory: Path) -> list[Epoch]:
    """What ``metrics.csv`` has of a training; nothing, if it is not there or damaged: no number rests on it."""
    try:
        rows = read_csv(directory / "metrics.csv")
        return [Epoch(int(row["epoch"]), *(float(row[name]) for name in Epoch._fields[1:])) for row in rows]
    except (RunError, ValueError, KeyError, TypeError):
        return []


def run_page(told: Told) -> Page:
    """The page of one finished run."""
    result = told.run.result
    versions = result.get("versions") or {}
    about = [str(result.get("dataset") or "data"), str(result["unit"]), str(result.get("device") or "")]
    version = versions.get("pyro_vae")
    footer = "pyro_vae " + str(version or "of an unknown version") + f", commit {result.get('commit') or 'unknown'}"
    sections = [
        Section("May the number be believed?", belief(told)),
        Section("What was run", settings_of(told.run.path)),
        Section("Training", training_of(told)),
        Section("Evidence", evidence_of(told)),
        Section(f"{told.noun.capitalize()} by {told.noun}", data_of(told)),
        Section("What the model draws", drawn_by(told)),
    ]
    return Page(f"Run {told.name}", ", ".join(filter(None, about)), sections, footer)


def unfinished_page(name: str, directory: Path) -> Page:
    """The page of a run that is on its way, or was interrupted: it has no number yet."""
    history = history_of(directory)
    line = "This run is not finished: it has no log-likelihood, and nothing here stands for one."
    how = f" {len(history)} epoch{'s are' if len(history) != 1 else ' is'} done." if history else " No epoch is done."
    blocks = [Figures(drawing.curves(history, "datum"))] if history else [Text("There is nothing to draw yet.")]
    sections = [
        Section("Not finished", [Text(line + how + " Train with --resume to finish it.")]),
        Section("What is run", settings_of(directory)),
        Section("Training so far", blocks),
    ]
    return Page(f"Run {name}, not finished", "training", sections)


def belief(told: Told) -> list[Any]:
    """The number, whether to believe it and why, and all numbers with their meanings."""
    found = verdict(told.run.result, told.run.evidence, told.history)
    error = "" if found.error is None else f" ± {number(found.error)} (Monte Carlo error)"
    value = "no number" if not math.isfinite(found.value) else number(found.value, 2).replace("-", "\u2212")
    over = number(told.run.result["test_log_likelihood_se"])
    headline = f"log p(x) is {value}{error}, {told.run.result['unit']}. Another test set would differ by ± {over}."
    return [
        Text(headline),
        Verdicts(found.believed, found.answer, found.claims),
        Grid(
            f"All numbers, in {told.run.result['unit']}; larger is better",
            ("number", "value", "what it is"),
            [(name.replace("  ", "\u2003"), *others) for name, *others in rows_of(told.run.result)],
        ),
    ]


def settings_of(directory: Path) -> list[Any]:
    """Settings that are not the default, and the others behind a line."""
    try:
        changed, same = settings_apart(directory)
    except RunError as error:
        return [Text(f"The settings cannot be read: {error}")]
    # escaped here, so that they are shown as they are typed, with their hyphens
    rows = [(name, escape(value), escape(default)) for name, value, default in changed]
    blocks: list[Any] = [Grid("Settings that differ from the defaults", ("setting", "here", "default"), rows)]
    if not rows:
        blocks = [Text("All settings are the defaults.")]
    usual = Grid("Settings that are the defaults", ("setting", "value"), [(n, escape(value)) for n, value in same])
    return [*blocks, Folded("Settings that are the defaults", [usual])]


def settings_apart(directory: Path) -> tuple[list[tuple[str, str, str]], list[tuple[str, str]]]:
    """Settings of a run that differ from the defaults, each with its default, and those that do not, as typed.

    Raises:
        RunError: if they cannot be read.
    """
    content = yaml_of(directory / "config.yaml")
    given = _by_option(content)
    usual = _usual()
    usual |= _own_defaults(content, given, usual)
    changed = [(n, value, usual.get(n, "\u2013")) for n, value in given.items() if value != usual.get(n)]
    return changed, [(name, value) for name, value in given.items() if value == usual.get(name)]


def _usual() -> dict[str, str]:
    """The defaults of all settings, by option."""
    return _by_option(yaml.safe_load(settings_text(Settings())))


def _by_option(content: dict[str, Any]) -> dict[str, str]:
    """Settings as they are typed, by the options that make them."""
    return {name: _setting(value) for name, value in flat(content, "--")}


def _own_defaults(
    content: Mapping[str, Any], given: Mapping[str, str], usual: Mapping[str, str], prefix: str = "--"
) -> dict[str, str]:
    """What parts are made with if they are told nothing, by option: of classes that are not the default ones."""
    found: dict[str, str] = {}
    for name, value in content.items():
        if not isinstance(value, dict):
            continue
        path, option = value.get("class_path"), f"{prefix}{name}"
        told = value.get("init_args") or {} if path else value
        if path and given.get(option) != usual.get(option):
            defaults = _arguments(path)
            found |= {f"{option}.{each}": _setting(defaults[each]) for each in told if each in defaults}
        found |= _own_defaults(told, given, usual, f"{option}.")
    return found


def _arguments(path: str) -> dict[str, Any]:
    """The defaults of a class of this library, of Pyro or of torch; of others nothing is imported."""
    if path.partition(".")[0] not in ("pyro_vae", "pyro", "torch"):
        return {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # names of earlier versions
            parameters = inspect.signature(pydoc.locate(path)).parameters  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError, pydoc.ErrorDuringImport):
        return {}
    return {name: each.default for name, each in parameters.items() if each.default is not each.empty}


def _setting(value: Any) -> str:
    """A setting as YAML; a class by its name alone, whose module versions move."""
    if not isinstance(value, str):
        value = list(value) if isinstance(value, tuple) else value
        try:
            return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
        except yaml.YAMLError:
            value = value.__name__ if isinstance(value, type) else str(value)
    is_path = "." in value and value.replace(".", "").isidentifier()
    return value.rpartition(".")[2] if is_path else value


def training_of(told: Told) -> list[Any]:
    if not told.history:
        return [Text("What training recorded, metrics.csv, is not here.")]
    seconds = sum(row.seconds for row in told.history)
    text = f"{several(len(told.history), 'epoch')} in {seconds:,.0f} s."
    return [Text(text), Figures(drawing.curves(told.history, told.noun))]


def evidence_of(told: Told) -> list[Any]:
    """Log p(x) over data, and estimates against their budget."""
    blocks: list[Any] = [Figures(drawing.evidence(told.run.importance, told.run.result, told.noun))]
    found = estimates(told)
    rows = [(each.name, number(each.value), number(each.error), f"{each.seconds:.2g}") for each in found]
    header = ("estimate", "log p(x)", "Monte Carlo error", f"seconds per {told.noun}")
    blocks.append(Grid("Estimates against budget", header, rows))
    if len(found) > 1:
        blocks.append(Figures(drawing.budget(found, told.noun)))
    else:
        blocks.append(
            Text("pyro-vae evaluate scores it again, by other estimators or with more samples; all that is shown here.")
        )
    return blocks


def estimates(told: Told) -> list[drawing.Estimate]:
    """Every estimate of log p(x) of test data that is known: those of the run, and of its evaluations."""
    result = told.run.result
    annealing = result.get("annealed_seconds") or 0.0
    found = [
        (
            f"importance, {result['num_samples']:,} samples",
            max(result["evaluate_seconds"] - annealing, 1e-9) / result["num_images"],
            *(result["test_log_likelihood"], result["mc_se"]),
        )
    ]
    if result.get("annealed_images") and annealing:
        name = f"annealed, {result['annealed_images']:,} of {result['num_images']:,}"
        found.append(
            (
                name,
                annealing / result["annealed_images"],
                result.get("annealed_log_likelihood"),
                result.get("annealed_mc_se"),
            )
        )
    for directory in sorted((told.run.path / "evaluations").glob("*/result.json")):
        try:
            again, _ = evaluation_of(directory.parent)
        except RunError:
            continue  # half done, or none
        if again.get("split") == "test" and again.get("log_likelihood") is not None:
            name = f"{directory.parent.name}, {again['num_images']:,} of {result['num_images']:,}"
            found.append((name, again["seconds"] / again["num_images"], again["log_likelihood"], again["mc_se"]))
    known = [each for each in found if None not in each and all(map(math.isfinite, each[1:]))]
    return [drawing.Estimate(*each) for each in known]


def data_of(told: Told) -> list[Any]:
    """The worst, the best and the least sure data, and a sortable table of all."""
    importance, noun, known = told.run.importance, told.noun, best_known(told.run)
    places = importance["datum"].values
    kept, text = excerpt(known, noun)
    blocks: list[Any] = [Text(text)] if text else []
    if told.absent:
        blocks.append(Text(f"The data themselves are not shown: {told.absent}"))
    ranks, threshold = ranked(known), told.run.result["khat_threshold"] or 0.7
    slow = told.vae is None or told.data is None or drawing.pixel_by_pixel(told.vae, told.data)
    shown = None if told.data is None else Shown(told.data, None if slow else told.vae)
    blocks += [] if shown is None else [Text(note) for note in shown.notes]
    if shown is not None:
        for title, order in ranks.items():
            some = order[:IN_GALLERY]
            about = [f"log p(x) {number(float(known['log_px'].values[i]), 1)}{_sureness(known, i)}" for i in some]
            heading = f"The {title}" + ", each with its reconstruction" * (not slow)
            items = shown.items([int(places[i]) for i in some], about)
            blocks.append(Gallery(heading, items, _warning(known, some, threshold)))
    caption = f"Test {noun}s, by importance sampling: nats, larger is better; a button in the head sorts"
    annealed = frozenset(places[known["annealed"].values].tolist())
    columns = columns_of(told, kept)
    rows = Rows(caption, columns, noun, sorted_by=[each.title for each in columns].index("log p(x)"), keep=annealed)
    return [*blocks, *with_data(rows, shown, places[priority(ranks, kept)].tolist())]


def with_data(rows: Rows, shown: Shown | None, places: Sequence[int]) -> list[Any]:
    """A sortable table with as many of the data themselves as it has room for, and a line if that is not all."""
    if shown is None:
        return [rows]
    pictures, (names, values), lines = shown.pictures(places), shown.values(places), shown.lines(places)
    number_shown = max(len(pictures), len(lines), len(values) if names != [""] else 0)
    text = Text(f"The {number_shown:,} worst, best and least sure {rows.noun}s are shown themselves.")
    known = {"pictures": pictures, "names": names, "values": values, "lines": lines, "size": shown.size}
    return [*[text][: 0 < number_shown < len(places)], rows._replace(**known)]


def best_known(run: Run) -> xr.Dataset:
    """What is known best of each datum: ``log_px`` and ``mc_se`` annealed where they are, ``annealed`` tells where.

    ``reliable`` is false where an annealed datum failed a check.
    """
    importance, annealed = run.importance, run.annealed
    fields = {name: drawing.field(importance, name).astype(float) for name in ("log_px", "mc_se", "khat", "ess")}
    is_annealed = np.zeros(importance.sizes["datum"], bool)
    reliable = ~is_annealed
    if annealed is not None:
        among = np.searchsorted(importance["datum"].values, annealed["datum"].values)
        is_annealed[among] = True
        for name in ("log_px", "mc_se"):
            fields[name][among] = annealed[name].values
        passed = drawing.field(annealed, "reliable")
        reliable[among] = np.where(np.isfinite(passed.astype(float)), passed.astype(float), 1.0) > 0
    content = {name: ("datum", values) for name, values in (fields | {"annealed": is_annealed}).items()}
    return xr.Dataset(content | {"reliable": ("datum", reliable)}, coords={"datum": importance["datum"].values})


def _sureness(known: xr.Dataset, place: int) -> str:
    """How a datum was estimated: annealed; or else its Pareto k and effective sample size, as far as they are known."""
    if known["annealed"].values[place]:
        failed = ", not reliable" * (not known["reliable"].values[place])
        return f", annealed \u00b1 {number(float(known['mc_se'].values[place]), 2)}{failed}"
    k, ess = (float(drawing.field(known, name)[place]) for name in ("khat", "ess"))
    return f", k {k:.2f}" * math.isfinite(k) + f", ESS {ess:.0f}" * math.isfinite(ess)


def _warning(known: xr.Dataset, some: np.ndarray, threshold: float) -> str:
    """A line on those of a gallery whose log p(x) is not to be trusted; empty if there are none."""
    bad = int(((known["khat"].values > threshold) & ~known["annealed"].values)[some].sum())
    if not bad:
        return ""
    told = f"{bad:,} of these {len(some):,} have a Pareto k above {threshold:.2f} and are not annealed"
    return f"{told}: their log p(x) may be too low by an unknown amount, so that their order is not sure."


def ranked(known: xr.Dataset) -> dict[str, np.ndarray]:
    """Rows in the order of what is wrong with them: worst first, best first, least sure first.

    Where a datum is annealed, ``known`` has that of it, and k says nothing of how sure it is.
    """
    log_px, khat, error = (drawing.field(known, name) for name in ("log_px", "khat", "mc_se"))
    sure = np.where(np.isfinite(khat), khat, np.where(np.isneginf(khat), -1.0, error))
    if "annealed" in known:
        of_annealed = np.where(known["reliable"].values, -1.0 + np.tanh(error), np.inf)
        sure = np.where(known["annealed"].values, of_annealed, sure)
    sure = np.where(np.isfinite(log_px), sure, np.inf)  # of what is no number nothing is sure
    by = {"worst": np.nan_to_num(log_px, nan=np.inf), "best": -np.nan_to_num(log_px, nan=-np.inf), "least sure": -sure}
    return {name: np.argsort(values, kind="stable") for name, values in by.items()}


def excerpt(known: xr.Dataset, noun: str) -> tuple[np.ndarray, str]:
    """Rows of a sortable table, all or ``MOST_ROWS`` of them, and a line that says how many are left out."""
    size = known.sizes["datum"]
    if size <= MOST_ROWS:
        return np.arange(size), ""
    each = MOST_ROWS // 5
    ends = np.unique(np.concatenate([order[:each] for order in ranked(known).values()]))
    annealed = np.flatnonzero(known["annealed"].values) if "annealed" in known else np.arange(0)
    room = len(annealed) <= each
    ends = np.union1d(ends, annealed) if room else ends
    others = np.setdiff1d(np.arange(size), ends)
    drawn = np.random.default_rng(0).choice(others, MOST_ROWS - len(ends), replace=False)
    text = f"{size - MOST_ROWS:,} of {size:,} {noun}s are left out of the table: it has the {each:,} worst, best and "
    text += "least sure, " + f"the {len(annealed):,} annealed, " * (room and len(annealed) > 0)
    return np.sort(np.concatenate([ends, drawn])), text + f"and {len(drawn):,} drawn at random. evidence.nc has all."


def priority(ranks: Mapping[str, np.ndarray], kept: np.ndarray) -> np.ndarray:
    """The rows of a table in the order in which they are worth showing: from the ends of all columns."""
    inside = np.isin(np.stack(list(ranks.values())), kept)
    orders = [order[known] for order, known in zip(ranks.values(), inside, strict=True)]
    mixed = np.stack(orders, 1).ravel()
    _, first = np.unique(mixed, return_index=True)
    return mixed[np.sort(first)]


def columns_of(told: Told, kept: np.ndarray) -> list[Column]:
    """The columns of a sortable table of one run."""
    importance, annealed = told.run.importance, told.run.annealed
    places = importance["datum"].values[kept]
    columns = [Column(told.noun, places.tolist(), 0, "place in the test set"), *places_of(told.data, places)]
    for name, title, digits, about in (
        ("log_px", "log p(x)", 2, "by importance sampling, nats"),
        ("mc_se", "error", 3, "Monte Carlo error, nats"),
        ("khat", "k", 2, "Pareto k: above the threshold, not to be trusted"),
        ("ess", "ESS", 0, "effective sample size"),
    ):
        columns.append(Column(title, rounded(drawing.field(importance, name)[kept], digits), digits, about))
    if annealed is not None:
        known = dict(zip(annealed["datum"].values.tolist(), annealed["log_px"].values.tolist(), strict=True))
        values = np.array([known.get(place, math.nan) for place in places.tolist()])
        columns.append(
            Column("annealed", rounded(values, 2), 2, "log p(x) by annealed importance sampling, where drawn for it")
        )
    labels = None if told.data is None else told.data.test_labels
    if labels is not None:
        columns.append(Column("class", labels.cpu()[torch.as_tensor(places)].tolist(), 0))
    return columns


def places_of(data: Data | None, places: Sequence[int] | np.ndarray) -> list[Column]:
    """A column that leads back to the file of the user, where test data are counted otherwise there."""
    if data is None or data.origin is None or data.origin.noun == "file":  # whose names stand with the pictures
        return []
    noun, of, found = data.origin
    return [Column(noun, [found[place] for place in places], 0, f"{noun} in {of}")]  # pyright: ignore[reportArgumentType]


def rounded(values: Any, digits: int) -> list[float | None]:
    """Numbers for a page; None for NaN and infinities."""
    return [round(each, digits) if math.isfinite(each) else None for each in np.asarray(values, float).tolist()]


def drawn_by(told: Told) -> list[Any]:
    """What the model makes of data and of nothing: reconstructions, samples, traversals, the map of its latents."""
    vae, data = told.vae, told.data
    if vae is None or data is None:
        return [Text(f"Nothing is drawn: {told.absent or 'neither model nor data were asked for'}")]
    try:
        with torch.random.fork_rng([data.device] if data.device.type == "cuda" else []):
            torch.manual_seed(0)
            found = drawing.latent_map(vae, data)
            if drawing.pixel_by_pixel(vae, data):
                text = "Its decoder draws pixel by pixel, which takes too long here: see samples.png of the run."
                return [Text(text), Figures(found)]
            if isinstance(data, ImageData):
                found = drawing.images(vae, data) + found
            elif isinstance(data, SequenceData):
                found = drawing.sequences(vae, data) + found
            elif data.schema.columns:
                found = drawing.columns(vae, data) + found
    except (ValueError, RuntimeError) as error:
        if not is_of_no_number(error):
            raise
        return [Text("Nothing is drawn: draws or latents are NaN or infinite.")]
    return [Figures(found)] if found else [Text("There is nothing to draw of data of this kind.")]


def settings_that_differ(runs: Sequence[Told]) -> list[Any]:
    """Settings in which runs differ from each other."""
    contents, usual = [], _usual()
    for told in runs:
        try:
            contents.append(_by_option(yaml_of(told.run.path / "config.yaml")))
        except RunError:
            contents.append({})
    names = dict.fromkeys(name for content in contents for name in content)
    rows = [(name, *(content.get(name, usual.get(name, "\u2013")) for content in contents)) for name in names]
    rows = [(row[0], *map(escape, row[1:])) for row in rows if len(set(row[1:])) > 1]
    if not rows:
        return [Text("Their settings are the same.")]
    return [Grid("Settings that differ", ("setting", *(told.name for told in runs)), rows)]
