"""What a page says of several runs, and of a study: which is better, by how much, and how sure that is."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from pyro_vae.errors import RunError
from pyro_vae.runs import figures
from pyro_vae.runs.comparing import MUST_AGREE, Difference, annealed_alike, difference_of
from pyro_vae.runs.directory import noun_of
from pyro_vae.runs.loading import load
from pyro_vae.runs.reporting import drawing
from pyro_vae.runs.reporting.contents import (
    Told,
    belief,
    best_known,
    excerpt,
    history_of,
    places_of,
    priority,
    ranked,
    rounded,
    settings_that_differ,
    with_data,
)
from pyro_vae.runs.reporting.page import Column, Figures, Folded, Grid, Page, Rows, Section, Text, Verdicts
from pyro_vae.runs.reporting.showing import Shown
from pyro_vae.runs.reporting.words import Claim, better, verdict
from pyro_vae.runs.scoring import MANY, number
from pyro_vae.runs.summaries import Summary, choice, estimators, forest, load_study

MOST_RUNS = 8
"""That a sortable table has columns for, the first ones."""


def comparison_page(runs: Sequence[Told]) -> Page:
    """The page of several finished runs; those whose numbers mean different things are not ranked together."""
    groups = alike(runs)
    sections = []
    if len(groups) > 1:
        sections.append(Section("Not all can be compared", _unlike(groups)))
    for group in groups:
        title = "Which is better?" if len(groups) == 1 else f"Runs like {group[0].name}"
        sections.append(Section(title, _group(group)))
    histories = {told.name: told.history for told in runs if told.history}
    curves = [Figures(drawing.several_curves(histories))] if histories else []
    sections += [Section("Training", curves)] if len(groups) == 1 and curves else []
    sections.append(Section("What was run", settings_that_differ(runs)))
    sections += [Section(f"{group[0].noun.capitalize()} by {group[0].noun}", _rows(group)) for group in groups]
    each = [Folded(told.name, belief(told)) for told in runs]
    sections.append(Section("May each number be believed?", each))
    return Page(f"{len(runs)} runs", ", ".join(told.name for told in runs), sections)


def alike(runs: Sequence[Told]) -> list[list[Told]]:
    """Runs whose numbers mean the same, together."""
    groups: dict[str, list[Told]] = {}
    for told in runs:
        groups.setdefault(repr([told.run.result.get(name) for name in MUST_AGREE]), []).append(told)
    return list(groups.values())


def _unlike(groups: Sequence[Sequence[Told]]) -> list[Any]:
    """Why groups of runs are not ranked against each other."""
    firsts = [group[0].run.result for group in groups]
    odd = [name for name in MUST_AGREE if len({repr(result.get(name)) for result in firsts}) > 1]
    rows = [
        (", ".join(told.name for told in group), *(str(result.get(name) or "\u2013") for name in odd))
        for group, result in zip(groups, firsts, strict=True)
    ]
    text = "These runs are not ranked against each other, since their numbers mean different things: compared are only "
    return [Text(text + "those of one line."), Grid("What differs", ("runs", *odd), rows)]


def _group(group: Sequence[Told]) -> list[Any]:
    """Differences of each run to the first one, and their order."""
    first, *others = group
    doubtful = {told.name: verdict(told.run.result, told.run.evidence).believed is False for told in group}
    runs = [told.run for told in group]
    estimator = "annealed" if annealed_alike(runs) else "importance"
    size, noun = first.run.importance.sizes["datum"], first.noun
    annealed = first.run.evidence["annealed"].sizes["datum"] if estimator == "annealed" else 0
    how = "annealed" if annealed == size else "importance sampling"
    how += f", corrected by the {annealed:,} that are annealed" * (0 < annealed < size)
    how = f"differences are paired over {size:,} test {noun}s, {how}; {first.run.result['unit']}"
    if not others:
        return [Text("There is nothing to compare it with."), _board([(first, None)], how)]
    claims, found, told_of = [], {}, {}
    for told in others:
        try:
            found[told.name] = difference_of(told.run, first.run, estimator)
        except RunError as error:
            claims.append(Claim(False, str(error)))
            continue
        doubted = [each for each in (told.name, first.name) if doubtful[each]]
        claims.append(better(told.name, first.name, found[told.name], first.noun, doubted))
        told_of[told.name] = claims[-1].text
    order = [(first, None), *((told, found[told.name]) for told in others if told.name in found)]
    order.sort(key=lambda pair: -_or(pair[1].mean, -math.inf) if pair[1] else 0.0)
    good = {told.name: (d.mean, d.se, d.freedom) for told, d in order if d is not None and not d.num_not_finite}
    blocks: list[Any] = [Verdicts(None, _answer(order), claims)]
    if good:
        draw = partial(_forest_of, good, f"log p(x) of each minus that of {first.name}, nats per {first.noun}")
        caption = "Thin bars are 95 % intervals, as above; thick bars are 50 % intervals; at the red line there is no "
        caption += f"difference, and right of it a run is better than {first.name}."
        blocks.append(Figures(drawing.forest(draw, list(good), list(told_of.values()), caption)))
    return [*blocks, _board(order, how)]


def _forest_of(differences: dict[str, tuple[float, float, float]], title: str, out: Any) -> None:
    figures.paired_differences(differences, out, title)


def _or(value: float, other: float) -> float:
    return value if math.isfinite(value) else other


def _answer(order: Sequence[tuple[Told, Difference | None]]) -> str:
    """Which runs are better than the reference, which are worse, and of which that cannot be told."""
    reference = next(told.name for told, d in order if d is None)
    found = [(told.name, d) for told, d in order if d is not None]
    if not found:
        return "They cannot be compared."
    better_ones = [name for name, d in found if d.is_told and d.mean > 0]
    worse = [name for name, d in found if d.is_told and d.mean < 0]
    same = [name for name, d in found if not d.is_told]
    kinds = (("Better than", better_ones), ("Worse than", worse), ("No difference can be told to", same))
    return " ".join(f"{kind} {reference}: {', '.join(names)}." for kind, names in kinds if names)


def _board(order: Sequence[tuple[Told, Difference | None]], how: str) -> Grid:
    """The leaderboard of runs that can be compared."""
    rows = []
    for rank, (told, d) in enumerate(order):
        result = told.run.result
        found = verdict(result, told.run.evidence)
        difference = ("reference", "", "", "", "")
        if d is not None:
            known = math.isfinite(d.mean)
            difference = (_signed(d.mean), d.interval if known else "\u2013", d.count(told.noun), number(d.se))
            difference += (number(d.mc_se),)
        more = (
            number(result.get("validation_log_likelihood"), 2),
            str(result["active_units"]),
            f"{result['train_seconds']:.0f}",
        )
        rows.append((f"{rank + 1}", told.name, number(found.value), *difference, found.short, *more))
    noun, reference = order[0][0].noun, next(told.name for told, d in order if d is None)
    header = (
        "rank",
        "run",
        "log p(x)",
        f"minus {reference}",
        "95 % interval",
        "of",
        f"± over {noun}s",
        "± Monte Carlo",
        "believed",
        "validation",
        "active units",
        "train s",
    )
    return Grid(f"Leaderboard: {how}", header, rows)


def _signed(value: float | None) -> str:
    return "\u2013" if value is None or not math.isfinite(value) else f"{value:+.3f}"


def _rows(group: Sequence[Told]) -> list[Any]:
    """Log p(x) of each datum in each run, and the difference of the second to the first."""
    first, *others = group
    others = [told for told in others if told.run.importance.sizes == first.run.importance.sizes][: MOST_RUNS - 1]
    noun, size = first.noun, first.run.importance.sizes["datum"]
    known = [best_known(told.run) for told in (first, *others)]
    kept, text = excerpt(known[0], noun)
    places = known[0]["datum"].values
    fine = np.logical_and.reduce([each["annealed"].values for each in known])
    found = [
        np.where(fine, each["log_px"].values, told.run.importance["log_px"].values)[kept]
        for each, told in zip(known, (first, *others), strict=True)
    ]
    shown = next((told.data for told in group if told.data is not None), None)
    columns = [Column(noun, places[kept].tolist(), 0, "place in the test set"), *places_of(shown, places[kept])]
    for told, log_px in zip((first, *others), found, strict=True):
        columns.append(Column(f"log p(x), {told.name}", rounded(log_px, 2), 2, "nats"))
    for told, log_px in zip(others, found[1:], strict=True):
        columns.append(Column(f"{told.name} minus {first.name}", rounded(log_px - found[0], 2), 2, "nats"))
    by_first = next(i for i, each in enumerate(columns) if each.title.startswith("log p(x), "))
    sorted_by = len(columns) - 1 if others else by_first
    sure = np.logical_and.reduce([each["reliable"].values for each in known])
    words = np.where(fine, np.where(sure, "annealed", "annealed, not reliable"), "importance")[kept].tolist()
    columns += [Column("estimator", words, 0, "of all runs alike")] if fine.any() else []
    keep = frozenset(places[fine].tolist())
    caption = f"Test {noun}s, {_how(int(fine.sum()), size, len(known))}; nats, larger is better"
    rows = Rows(caption, columns, noun, sorted_by=sorted_by, keep=keep)
    some = places[priority(ranked(known[0]), kept)].tolist()
    of = None if shown is None else Shown(shown)
    notes = [Text(note) for note in ([text] if text else []) + _doubts((first, *others), fine)]
    return [*notes, *([] if of is None else map(Text, of.notes)), *with_data(rows, of, some)]


def _how(annealed: int, size: int, runs: int) -> str:
    """By which estimator the numbers of a table of several runs are."""
    if annealed == size:
        return "annealed"
    where = "both" if runs == 2 else "all"
    return "by importance sampling" + f", but for the {annealed:,} that are annealed in {where}" * (annealed > 0)


def _doubts(group: Sequence[Told], fine: np.ndarray) -> list[str]:
    """Lines on numbers of a table of several runs that are not to be trusted."""
    shares = []
    for told in group:
        khat = told.run.importance["khat"].values[~fine] if "khat" in told.run.importance else np.empty(0)
        shares.append(float((khat > (told.run.result["khat_threshold"] or 0.7)).mean()) if len(khat) else 0.0)
    bad = [f"{share:.0%} ({told.name})" for told, share in zip(group, shares, strict=True) if share > MANY]
    if not bad:
        return []
    which = f"the {group[0].noun}s" + " that are not annealed" * bool(fine.any())
    text = f"Pareto k is bad for {', '.join(bad)} of {which}: there single numbers and differences of this table are "
    return [text + "not to be trusted."]


# Studies


def study_page(directory: Path, name: str, beside: Path) -> Page:
    """The page of a finished study; ``beside`` is the directory of the page, from which its runs are linked."""
    summaries = load_study(directory)
    groups: dict[str, list[Summary]] = {}
    for each in summaries:
        groups.setdefault(each.reference, []).append(each)
    sections = []
    if len(groups) > 1:
        text = "Contenders of other units, or scored on other data, are not ranked together: a table for each kind."
        sections.append(Section("Not all can be compared", [Text(text)]))
    for reference, group in groups.items():
        title = "Which is better?" if len(groups) == 1 else f"Contenders like {reference}"
        sections.append(Section(title, _contenders(group)))
    runs = sorted(each.parent for each in directory.glob("*/result.json"))
    sections.append(Section("Its runs", _runs_of(runs, directory, beside)))
    return Page(f"Study {name}", summaries[0].unit, sections)


def _contenders(group: Sequence[Summary]) -> list[Any]:
    """Contenders that can be compared: in words, as a figure, and as a table in their order."""
    reference = group[0].reference
    claims = [_difference_of(each) for each in group if each.name != reference]
    chosen = "".join(choice(group)[1:]) or "There is nothing to choose from."
    blocks: list[Any] = [Verdicts(None, chosen, claims)]
    if claims:
        names = [each.name for each in group if each.name != reference]
        draw = partial(forest, group, title=f"log p(x) minus that of {figures.plain(reference)}")
        caption = (
            "Bars are 95 % intervals, as above; grey dots are the seeds; at the red line there is no difference, and "
        )
        caption += f"right of it a contender is better than {reference}."
        blocks.append(Figures(drawing.forest(draw, names, [claim.text for claim in claims], caption)))
    alike = len({each.estimator for each in group}) == 1  # else importance sampling is what all have
    values = {each.name: each.log_likelihood if alike else each.importance_sampled for each in group}
    order = sorted(group, key=lambda each: -_or(values[each.name], -math.inf))
    rows = [_row(rank, each, values[each.name], reference) for rank, each in enumerate(order)]
    header = (
        "rank",
        "contender",
        "log p(x)",
        "± seeds",
        f"minus {reference}",
        "± seeds",
        "± data",
        "ELBO",
        "bad k",
        "validation",
    )
    how = "" if alike else "log p(x) by importance sampling, which all have; differences "
    caption = f"Leaderboard by log p(x) of the test data: {how}{estimators(group)}; {group[0].unit}; means over seeds, "
    caption += "larger is better; models are chosen by the validation column"
    return [*blocks, Grid(caption, (*header, "active units", "train s"), rows)]


def _difference_of(each: Summary) -> Claim:
    """How much better a contender is than its reference, and how sure that is."""
    if not math.isfinite(each.difference):
        return Claim(None, f"{each.name} cannot be compared with {each.reference}: log p(x) is not finite.")
    margin, noun = each.margin(), noun_of({"unit": each.unit})
    seeds = (
        "one seed alone: others may differ by more"
        if each.difference_seed_error is None
        else f"over {len(each.differences)} seeds and over data"
    )
    interval = f"95 % interval {each.difference - margin:+.3f} to {each.difference + margin:+.3f}, {seeds}"
    told = f"{each.name} minus {each.reference}: {each.difference:+.3f} nats per {noun} ({interval})"
    if not abs(each.difference) > margin:
        return Claim(None, f"{told}: no difference can be told.")
    return Claim(True, f"{told}: {each.name if each.difference > 0 else each.reference} is better.")


def _row(rank: int, each: Summary, value: float, reference: str) -> tuple[str, ...]:
    difference = ("reference", "", "")
    if each.name != reference:
        difference = _signed(each.difference), number(each.difference_seed_error), number(each.difference_image_error)
    share = f"{each.share_khat:.0%}" if math.isfinite(each.share_khat) else "\u2013"
    numbers = (
        number(each.elbo, 2),
        share,
        number(each.validation, 2),
        number(each.active_units, 1),
        number(each.seconds, 0),
    )
    return (f"{rank + 1}", each.name, number(value, 2), number(each.seed_error, 2), *difference, *numbers)


def _runs_of(paths: Sequence[Path], directory: Path, beside: Path) -> list[Any]:
    """The runs of a study, each with its number and whether to believe it, and their curves."""
    rows, histories = [], {}
    for path in paths:
        try:
            run = load(path)
        except RunError as error:
            rows.append((path.name, "\u2013", "\u2013", str(error)))
            continue
        found, page = verdict(run.result, run.evidence), path / "report.html"
        linked = page.exists() and beside.resolve() == directory.resolve()
        name = (path.name, f"{quote(path.name)}/report.html") if linked else path.name
        rows.append((name, number(found.value, 2), number(found.error), found.short))
        histories[path.name] = history_of(path)
    blocks: list[Any] = [Grid("Each run", ("run", "log p(x)", "± Monte Carlo", "believed"), rows)]
    text = "pyro-vae report on the directory of a run makes a page of it, with its data and pictures."
    histories = {name: history for name, history in histories.items() if history}
    return [*blocks, Text(text), *([Figures(drawing.several_curves(histories))] if 0 < len(histories) <= 20 else [])]
