"""What a page says of a search for settings: what the validation data choose, and which settings mattered."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from scipy.stats import rankdata

from pyro_vae.errors import RunError
from pyro_vae.runs import figures
from pyro_vae.runs.comparing import MUST_AGREE
from pyro_vae.runs.directory import noun_of, several
from pyro_vae.runs.reading import (
    check_entries,
    damaged,
    dict_of,
    is_flag,
    is_number,
    is_text,
    json_of,
    list_of,
    or_null,
    result_of,
    yaml_of,
)
from pyro_vae.runs.reporting import drawing
from pyro_vae.runs.reporting.contents import history_of
from pyro_vae.runs.reporting.page import Figures, Grid, Page, Section, Text, Verdicts
from pyro_vae.runs.reporting.svg import Drawn, drawn
from pyro_vae.runs.reporting.words import Claim
from pyro_vae.runs.scoring import best, number

FEW_TRIALS = 8
"""Finished trials below which it is not said which settings mattered."""
MOST_CURVES, MOST_SETTINGS = 8, 9
"""Trials, the best ones, whose training is drawn; settings that validation values are drawn against."""
TITLES = {"validation_log_likelihood": "log p(x)", "validation_elbo": "ELBO"}

Trial = Mapping[str, Any]


def search_page(directory: Path, name: str, beside: Path) -> Page:
    """The page of a finished search; ``beside`` is the directory of the page, from which trials are linked.

    Raises:
        RunError: if its result is damaged, or trials are scored in other units or on other data.
    """
    content, trials = _read(directory)
    results = _results(directory, content, trials)
    kept = content["best"]["name"]
    what, noun = TITLES.get(str(content["by"]), str(content["by"])), noun_of(content)
    sections = [
        Section("Which settings?", _answer(content, trials, results.get(kept), what)),
        Section("All trials", [_table(trials, directory, beside, f"Validation {what}, {content['unit']}", noun)]),
        Section("Which settings mattered?", _mattered(trials, f"validation {what}, nats per {noun}")),
        Section("Training", _curves(directory, trials)),
        Section("What was searched", _settings(directory)),
    ]
    return Page(f"Search {name}", f"{content['search']}, {several(len(trials), 'trial')}", sections)


def _read(directory: Path) -> tuple[dict[str, Any], list[Trial]]:
    """What ``result.json`` of a search holds, and its trials, the best one first."""
    path = directory / "result.json"
    content = json_of(path)
    needed = {**dict.fromkeys(("search", "by", "unit"), is_text), "best": is_mapping, "trials": list_of(is_mapping)}
    check_entries(path, content, needed, {})
    known = {
        "name": lambda value: is_text(value) and Path(value).name == value,
        "values": dict_of(lambda value: isinstance(value, str)),
        **dict.fromkeys(("validation", "validation_se", "seconds"), or_null(is_number)),
        "reason": lambda value: isinstance(value, str),
    }
    for each in content["trials"]:
        check_entries(path, each, known, {})
    check_entries(path, content["best"], {"name": is_text}, {})
    trials = sorted(content["trials"], key=lambda each: -_or_lowest(each["validation"]))
    if content["best"]["name"] not in [each["name"] for each in trials if each["validation"] is not None]:
        raise damaged(path, "'best' is none of its trials that have a validation value")
    if len({tuple(each["values"]) for each in trials}) > 1:
        raise damaged(path, "its trials are of different settings")
    return content, trials


def is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _or_lowest(value: float | None) -> float:
    return -math.inf if value is None else value


def _results(directory: Path, content: Mapping[str, Any], trials: Sequence[Trial]) -> dict[str, dict[str, Any]]:
    """What ``result.json`` of each trial that is here holds, all of which mean the same.

    Raises:
        RunError: if they do not, or the search says another value of one.
    """
    found: dict[str, dict[str, Any]] = {}
    for each in trials:
        if each["validation"] is None or not (directory / each["name"] / "result.json").exists():
            continue
        result = found[each["name"]] = result_of(directory / each["name"])
        value = result.get(content["by"])
        if value is None or not math.isclose(value, each["validation"], rel_tol=1e-6, abs_tol=1e-6):
            raise damaged(directory / "result.json", f"{content['by']} of {each['name']} is {value} in its own")
    units = {"the search": {"unit": content["unit"]}} | found
    first = next(iter(found), "the search")
    for name, result in units.items():
        for entry in MUST_AGREE if name in found else ("unit",):
            if (ours := result.get(entry)) != (theirs := units[first].get(entry)):
                raise RunError(
                    f"{directory}: {name} and {first} cannot be ranked together: {entry} is {ours!r} and {theirs!r}"
                )
    return found


def _answer(content: Mapping[str, Any], trials: Sequence[Trial], result: dict[str, Any] | None, what: str) -> list[Any]:
    """Which trial the validation data choose, by how much, and what the test data say of it alone."""
    known = [each for each in trials if each["validation"] is not None]
    first = next(each for each in known if each["name"] == content["best"]["name"])
    answer = f"The validation data choose {first['name']}, of {several(len(trials), 'trial')}: {_values(first)}."
    error = number(first["validation_se"], 2)
    claims = [Claim(None, f"Its validation {what} is {first['validation']:.2f} ± {error}, {content['unit']}.")]
    if len(known) > 1:
        second = next(each for each in known if each is not first)
        gap = first["validation"] - second["validation"]
        text = f"{second['name']} ({_values(second)}) is {gap:.2f} lower. The error above is one over data, which all "
        text += "trials share, so that differences are surer than single values; by how much was not kept."
        claims.append(Claim(None, text))
    if result is None:
        claims.append(Claim(None, "Its own directory is not here, so that its test value is not told."))
    else:
        estimator = "importance sampling" if result.get("annealed_log_likelihood") is None else "annealing"
        text = f"Its test log p(x), by {estimator}, is {number(best(result), 2)}; it was chosen without it. That of no "
        claims.append(
            Claim(None, text + "other trial is shown: pyro-vae report on its directory says if to believe it.")
        )
        doubted = is_flag(sure := result.get("validation_reliable")) and not sure
        if doubted and content["by"] == "validation_log_likelihood":
            text = "Its validation log p(x) is not to be believed, since too many Pareto k are bad; a search --by "
            claims.append(Claim(False, text + "validation_elbo does not rest on them.", "it"))
    if lost := len(trials) - len(known):
        claims.append(
            Claim(False, f"{several(lost, 'trial')} of {len(trials)} have no validation value.", "the search")
        )
    return [Verdicts(None, answer, claims)]


def _values(trial: Trial) -> str:
    return ", ".join(f"{name} {_short(text)}" for name, text in trial["values"].items())


def _short(text: str) -> str:
    """A value as a table shows it."""
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text


def _table(trials: Sequence[Trial], directory: Path, beside: Path, title: str, noun: str) -> Grid:
    """All trials, the best one first; those that have a page beside this one are linked."""
    rows = []
    here = beside.resolve() == directory.resolve()
    for each in trials:
        page = f"{quote(each['name'])}/report.html"
        name = (each["name"], page) if here and (directory / each["name"] / "report.html").exists() else each["name"]
        numbers = number(each["validation"], 2), number(each["validation_se"], 2), number(each["seconds"], 0)
        rows.append((name, *map(_short, each["values"].values()), *numbers, each["reason"]))
    header = ("trial", *trials[0]["values"], "validation", f"± over {noun}s", "train s", "why it has none")
    return Grid(f"{title}; larger is better", header, rows)


def explained(values: Sequence[str], found: Sequence[float]) -> float:
    """The share of the spread of the ranks of ``found`` that a setting alone explains, in 0..1.

    Of numbers it is that of Spearman's correlation, of words that of their groups; both are corrected for what is
    expected by chance (adjusted R^2, and Kelley's epsilon^2). NaN where it cannot be told: of a setting that does not
    vary, or whose values are all different words.
    """
    ranks, n = rankdata(found), len(found)
    numbers = _numbers(values)
    different = len(set(values))
    if n < 3 or different < 2 or not np.ptp(ranks) or (numbers is None and different == n):
        return math.nan
    if numbers is not None and different > 2:
        share, used = float(np.corrcoef(rankdata(numbers), ranks)[0, 1]) ** 2, 1
    else:
        groups = [ranks[[value == each for value in values]] for each in sorted(set(values))]
        share = 1 - sum(float(((each - each.mean()) ** 2).sum()) for each in groups) / float(n * ranks.var())
        used = different - 1
    return max(0.0, 1 - (1 - share) * (n - 1) / (n - 1 - used))


def _numbers(values: Sequence[str]) -> np.ndarray | None:
    try:
        numbers = np.array([float(value) for value in values])
    except ValueError:
        return None
    return numbers if np.isfinite(numbers).all() else None


def _mattered(trials: Sequence[Trial], title: str) -> list[Any]:
    """How much single settings explain, where that can be told, and the validation values against them."""
    known = [each for each in trials if each["validation"] is not None]
    found = [each["validation"] for each in known]
    names = list(trials[0]["values"])
    columns = {name: [each["values"][name] for each in known] for name in names}
    plots = [each for name in names[:MOST_SETTINGS] if (each := _against(name, columns[name], found, title))]
    if len(known) < FEW_TRIALS:
        text = f"{several(len(known), 'trial')} are too few to say; that takes {FEW_TRIALS}."
        return [Text(text), Figures(plots)]
    shares = {name: explained(columns[name], found) for name in names}
    order = sorted(names, key=lambda name: -(shares[name] if math.isfinite(shares[name]) else -1))
    rows = [(name, f"{shares[name]:.0%}" if math.isfinite(shares[name]) else "\u2013") for name in order]
    caption = (
        f"Share of the spread of ranks of {len(known)} trials that each setting explains alone, less what chance would"
    )
    return [
        Grid(f"{caption}; rough, and blind to settings that matter only together", ("setting", "share"), rows),
        Figures(plots),
    ]


def _against(name: str, values: Sequence[str], found: Sequence[float], title: str) -> Drawn | None:
    """Validation values against one setting."""
    draw = partial(_scatter, name, values, found, title)
    top = int(np.argmax(found))
    told = f"{title} of {several(len(found), 'trial')} against {name}; the best, {found[top]:.2f}, has "
    told += f"{_short(values[top])}." + " Triangles are lower still." * (min(found) < _floor(found))
    return drawn(f"setting-{name.encode().hex()}", draw, told[0].upper() + told[1:])


def _scatter(name: str, values: Sequence[str], found: Sequence[float], title: str, out: Any) -> None:
    numbers, heights = _numbers(values), np.array(found)
    floor = _floor(found)
    low = heights < floor
    with figures.figure(out, 4, 3) as axes:
        if numbers is None or len(set(values)) < 3:
            groups = list(dict.fromkeys(values)) if numbers is None else sorted(set(values), key=float)
            across = np.array([groups.index(value) for value in values])
            axes.set_xticks(range(len(groups)), [figures.plain(_short(each)[:16]) for each in groups])
            axes.margins(x=0.2)
        else:
            across = numbers
            if numbers.min() > 0 and numbers.max() > 20 * numbers.min():
                axes.set_xscale("log")
        axes.scatter(across[~low], heights[~low], s=14)
        if low.any():
            axes.scatter(across[low], np.full(low.sum(), floor), s=20, marker="v", color="C3")
        axes.set(xlabel=figures.plain(name), ylabel=title.split(",")[0])


def _floor(found: Sequence[float]) -> float:
    """Below it values are drawn as triangles: what diverged would hide the others."""
    low, middle = np.quantile(found, (0.1, 0.5))
    return float(low - 3 * (middle - low) - 1)


def _curves(directory: Path, trials: Sequence[Trial]) -> list[Any]:
    """The training of the best trials."""
    some = [each["name"] for each in trials if each["validation"] is not None][:MOST_CURVES]
    histories = {name: history for name in some if (history := history_of(directory / name))}
    if not histories:
        return [Text("What training recorded is not here.")]
    text = "All trials." if len(some) == len(trials) else f"The best {len(some)} of {len(trials)} trials."
    return [Text(text), Figures(drawing.several_curves(histories))]


def _settings(directory: Path) -> list[Any]:
    """The space, and what all trials have in common."""
    try:
        content = yaml_of(directory / "config.yaml")
    except RunError as error:
        return [Text(f"The settings of the search cannot be read: {error}")]
    space = content.get("space")
    rows = [(f"--space.{name}", str(text)) for name, text in space.items()] if isinstance(space, dict) else []
    rows += [
        (f"--{name}", str(value)) for name, value in content.items() if name != "space" and value not in (None, "")
    ]
    return [Grid("Settings of the search", ("setting", "value"), rows)]
