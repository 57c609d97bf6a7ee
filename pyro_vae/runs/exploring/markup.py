"""What a page shows, as HTML: text from data and from runs is escaped here, and is never code."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from pyro_vae.runs.exploring.explorer import Estimate, Explorer, Unit

BARS = 40
"""Of a histogram."""


def picture(explorer: Explorer, x: Any, caption: str, alt: str = "") -> str:
    """An image ``shape`` with a line below it."""
    height, width = explorer.schema.shape[1:]
    size = f"aspect-ratio: {width} / {height}"
    png = f"data:image/png;base64,{explorer.png(x)}"
    told = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img src="{png}" alt="{escape(alt or caption)}" style="{size}">{told}</figure>'


def pictures(explorer: Explorer, rows: Any, captions: Sequence[str], label: str) -> str:
    """Images ``(N, *shape)`` beside each other."""
    each = "".join(picture(explorer, x, told) for x, told in zip(rows, captions, strict=True))
    return f'<div class="strip" role="group" aria-label="{escape(label)}">{each}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], label: str) -> str:
    """A table whose first column names the rows."""
    top = "".join(f'<th scope="col">{escape(each)}</th>' for each in head)
    body = "".join(
        f'<tr><th scope="row">{escape(str(first))}</th>' + "".join(f"<td>{escape(str(each))}</td>" for each in rest)
        for first, *rest in rows
    )
    box = f'<div class="box" tabindex="0" role="region" aria-label="{escape(label)}">'
    return f"{box}<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def frame(rows: Any, label: str) -> str:
    """A DataFrame, a column in each line."""
    columns = [(name, *(cell(value) for value in rows[name])) for name in rows]
    return table(["column", *(str(number + 1) for number in range(len(rows)))], columns, label)


def cell(value: Any) -> str:
    """An entry of a row."""
    if value is None or (isinstance(value, float | np.floating) and math.isnan(value)):
        return "not seen"
    return f"{value:.5g}" if isinstance(value, int | float | np.number) else str(value)


def notes(lines: Iterable[str], kind: str = "note") -> str:
    """Lines of text."""
    return "".join(f'<p class="{kind}">{escape(line)}</p>' for line in lines)


def name(unit: Unit, units: Sequence[Unit]) -> str:
    """Of a unit; with its site, where there are several."""
    several = len({each.site for each in units}) > 1
    return f"{unit.site} unit {unit.place}" if several else f"unit {unit.place}"


def posterior(units: Sequence[Unit], loc: Mapping[str, Any], scale: Mapping[str, Any]) -> str:
    """Mean and standard deviation of q(z | x) of active units."""
    rows = [
        (name(unit, units), *(f"{each[unit.site][0, unit.place].item():.3f}" for each in (loc, scale)))
        for unit in units
    ]
    return table(("unit", "mean", "deviation"), rows, "q(z given x) of each active unit, the most active first")


def scores(explorer: Explorer, first: Estimate, annealed: Estimate | str | None) -> str:
    """log p(x), its error and its place; of the annealed estimate, or that it is on its way, or why there is none."""
    rows = [_row("importance sampling, at once", first)]
    if isinstance(annealed, Estimate):
        rows.append(_row("annealed importance sampling", annealed))
    waiting = annealed if isinstance(annealed, str) else "" if annealed else "the annealed estimate is on its way"
    label = f"log p(x), {explorer.unit}"
    told = table(("estimate", "log p(x)", "error", "to be believed", "higher than"), rows, label)
    best = annealed if isinstance(annealed, Estimate) else first
    return f"<h3>{escape(label)}</h3>{told}{notes([waiting] if waiting else [])}" + histogram(explorer, best)


def _row(title: str, found: Estimate) -> tuple[str, ...]:
    if not math.isfinite(found.log_px):
        return title, str(found.log_px), "-", "no: it is no number", "-"
    good = "not known" if found.reliable is None else "yes" if found.reliable else "no"
    place = "-" if found.below is None else f"{found.below:.1%}"
    return title, f"{found.log_px:.2f}", f"{found.mc_se:.2f}", good, place


def histogram(explorer: Explorer, found: Estimate) -> str:
    """log p(x) of test data, and where this datum is among them."""
    estimator = found.among
    _, known = explorer.scores(estimator)
    noun = explorer.schema.noun
    if found.below is None or not len(known):
        return notes([f"Its place among the test {noun}s is not told: some of it was not seen, or nothing is finite."])
    low, high = np.quantile(known, 0.005), known.max()
    low, high = min(low, found.log_px), max(high, found.log_px)
    span = (high - low) or 1.0
    low, high = low - 0.02 * span, high + 0.02 * span
    counts, _ = np.histogram(known, BARS, (low, high))
    wide, tall = 400 / BARS, 80 / counts.max()
    bars = "".join(
        f'<rect x="{i * wide:.1f}" y="{85 - count * tall:.1f}" width="{wide - 1:.1f}" height="{count * tall:.1f}"/>'
        for i, count in enumerate(counts)
    )
    at = 400 * (found.log_px - low) / (high - low)
    by = "annealed importance sampling"
    if estimator == "importance":
        by = f"importance sampling of {explorer.run.result['num_samples']:,} draws"
    told = f"log p(x) of {found.number:,} test {noun}s, by {by}: this {noun} is higher than {found.below:.1%} of them"
    axis = f'<text x="2" y="98">{low:.0f}</text><text x="398" y="98" text-anchor="end">{high:.0f} nats</text>'
    mark = f'<path class="here" d="M{at:.1f} 2V88"/>'
    svg = f'<svg viewBox="0 0 400 102" role="img" aria-label="{escape(told)}">{bars}{mark}{axis}</svg>'
    return f"<figure class='wide'>{svg}<figcaption>{escape(told)}</figcaption></figure>"
