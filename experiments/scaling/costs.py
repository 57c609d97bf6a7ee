"""The page on what large studies cost, from what was measured.

Usage: python -m experiments.scaling.costs RESULT.json [PAGE.md]

Without PAGE.md it is printed. Each figure is the largest measurement of a line, times the ratio of sizes to the power
of the line's exponent.
"""

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.scaling.rows import Exponent, Row, lines
from pyro_vae import cli, runs
from pyro_vae.files import whole

TASKS = {
    "1,000,000 images": {"images": 1_000_000},
    "10,000 images of 64x64x3": {"images": 10_000, "pixels": 64 * 64 * 3},
    "1,000,000 images of 64x64x3": {"images": 1_000_000, "pixels": 64 * 64 * 3},
}
"""What is wanted, by name: sizes that differ from the measured ones."""
MACHINES = (1, 10, 100)
DAY = 86_400
STEP = "training step"


def main(argv: Sequence[str] | None = None) -> None:
    """Make the page that ``argv`` asks for.

    Raises:
        RunError: if the numbers cannot be read, or the page not be written.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    if not 1 <= len(given) <= 2:
        raise runs.RunError("usage: python -m experiments.scaling.costs RESULT.json [PAGE.md]")
    try:
        result = json.loads(Path(given[0]).read_text(encoding="utf-8"))
        text = page(result)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise runs.RunError(f"{given[0]} holds no measurements of experiments.scaling: {error}") from error
    if len(given) == 1:
        print(text)
        return
    with runs.writing(given[1]), whole(Path(given[1])) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def extrapolated(
    what: str, sizes: Mapping[str, float], rows: Sequence[Row], fitted: Sequence[Exponent]
) -> tuple[float, float]:
    """Seconds of ``what`` at some sizes, the others as measured, and by what factor they may be wrong.

    The start is the measurement at the largest number of images, which of a training step is the batch. The factor is
    that of two standard errors of the exponents.

    Raises:
        ValueError: if a line is missing.
    """
    known = {(each.what, each.by): each for each in fitted}
    measured = lines(rows)
    if (what, "images") not in measured:
        raise ValueError(f"there is no line of {what} against images")
    start = measured[what, "images"][-1]
    seconds, doubt = start.seconds, 0.0
    for by, value in sizes.items():
        if what == STEP and by == "images":  # an epoch has as many steps of the largest batch as it takes
            seconds *= value / start.value
            continue
        if (what, by) not in known:
            raise ValueError(f"there is no exponent of {what} against {by}")
        line = known[what, by]
        here = start.value if by == "images" else _middle(measured[what, by])
        seconds *= (value / here) ** line.exponent
        doubt += (0 if math.isnan(line.error) else line.error * math.log(value / here)) ** 2
    return seconds, math.exp(2 * math.sqrt(doubt))


def _middle(line: Sequence[Row]) -> float:
    """The size at which the other lines were measured, see :mod:`experiments.scaling.growth`."""
    return line[len(line) // 2].value


def page(result: dict[str, Any]) -> str:
    """The page, in Markdown.

    Raises:
        ValueError: if a line is missing.
    """
    rows = [Row(**row) for row in result["rows"]]
    fitted = [Exponent(**each | {"error": each["error"] or math.nan}) for each in result["exponents"]]
    introduction = INTRODUCTION.format(date=result["date"], device=result["device"])
    return "\n\n".join([introduction, _exponents(fitted), _largest(rows, fitted), _workers(rows), OUTLOOK])


def _exponents(fitted: Sequence[Exponent]) -> str:
    by = list(dict.fromkeys(each.by for each in fitted))
    table = [("seconds of", *by)]
    for what in dict.fromkeys(each.what for each in fitted):
        cells = {each.by: each for each in fitted if each.what == what}
        table.append((what, *(_number(cells[name]) if name in cells else "-" for name in by)))
    about = "The exponent of each size, others held, with its standard error:"
    return f"## How seconds grow\n\n{about}\n\n{runs.table(table)}"


def _number(each: Exponent) -> str:
    return f"{each.exponent:.2f}" + ("" if math.isnan(each.error) else f" +- {each.error:.2f}")


def _largest(rows: Sequence[Row], fitted: Sequence[Exponent]) -> str:
    table = [("what", "of", "seconds", "within a factor of", *(f"days, {n} machine{'s' * (n > 1)}" for n in MACHINES))]

    def add(what: str, of: str, seconds: float, factor: str) -> None:
        table.append((what, of, f"{seconds:.2g}", factor, *(f"{seconds / DAY / n:.2g}" for n in MACHINES)))

    for task, sizes in TASKS.items():
        for what in (what for what, by in lines(rows) if by == "images"):
            seconds, factor = extrapolated(what, sizes, rows, fitted)
            add("an epoch of training" if what == STEP else what, task, seconds, f"{factor:.1f}")
    for row in rows:
        if (study := re.fullmatch(r"study of (\d+) runs", row.what)) and row.value == 1:
            add("study", "1,000 such runs", row.seconds / int(study[1]) * 1000, "-")
    about = "On so many machines like that one, whose work is divided evenly; runs of the study had one thread."
    return f"## What large ones cost\n\n{about}\n\n{runs.table(table)}"


def _workers(rows: Sequence[Row]) -> str:
    table = [("what", "workers", "seconds", "times as fast")]
    for (_, by), line in lines(rows).items():
        for row in line if by == "workers" and len(line) > 1 else ():
            table.append((row.what, f"{row.value:.0f}", f"{row.seconds:.3g}", f"{line[0].seconds / row.seconds:.2f}"))
    return f"## What workers gain\n\n{runs.table(table)}"


INTRODUCTION = """# What it costs

How long evidence and training take, how that grows, and on how many machines it is bearable. The numbers are those of
`python -m experiments.scaling` on {date}, {device}; `python -m experiments.scaling.costs` made this page of them. What
is beyond the measured sizes is extrapolated by the fitted exponents, and no better than these."""

OUTLOOK = """## How work is divided

`pyro-vae evaluate RUN --workers 2` has the blocks of data, of 256 each, computed by two processes of one thread. The
same command in other shells, or as the tasks of an array of jobs on machines that share the directory, joins them. Each
block has random numbers of its own, and its results are a file in `blocks/` until all are there: no digit depends on
how many worked, on the memory they had, or on who was killed on the way, and after a kill the same command goes on.
Tasks of an array that may come when all is done take `--resume`, and print the result then. Another type of processor,
or another version of torch, may round differently: the promise is about workers. `pyro-vae study --workers 2` divides
runs in the same way."""


if __name__ == "__main__":
    cli.guarded(main)
