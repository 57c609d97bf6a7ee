"""A page of blocks as one file of HTML: nothing is fetched, and nothing that data or names say is ever executed.

Whatever comes from data, names and settings is escaped: as text by Jinja, as data by JSON in which no ``<`` is left.
The page has one script and one style of its own, which its Content-Security-Policy names by their hashes; it allows
nothing else, and no request at all.
"""

import base64
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pyro_vae.errors import RunError
from pyro_vae.files import bytes_in
from pyro_vae.runs.directory import write_text, writing
from pyro_vae.runs.reporting.svg import Drawn
from pyro_vae.runs.reporting.words import Claim

MOST_BYTES = 3_000_000
"""Of a page, below which it is kept by leaving out what is heaviest."""
MARK = '<meta name="generator" content="pyro-vae report">'
"""By which a page is known as one of this command, which it may overwrite."""
FOLDER = Path(__file__).parent / "templates"


class Text(NamedTuple):
    """A paragraph."""

    text: str
    kind = "text"


class Verdicts(NamedTuple):
    """An answer to whether to believe it (None: not known), and the reasons."""

    believed: bool | None
    answer: str
    claims: Sequence[Claim]
    kind = "verdicts"


class Grid(NamedTuple):
    """A table of text, with a header; a cell may be a pair of text and the address of a page beside this one."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    kind = "grid"


class Figures(NamedTuple):
    """Figures side by side, where there is room."""

    drawn: Sequence[Drawn]
    kind = "figures"


class Strip(NamedTuple):
    """A small chart of a sequence: lines as paths of SVG, of what was seen and of what was made of it."""

    size: tuple[int, int]
    seen: str
    made: str
    alt: str


class Item(NamedTuple):
    """A datum in a gallery: a line about it, pictures (base64 of PNG) with what they show, a chart, or values."""

    about: str
    pictures: Sequence[tuple[str, str]] = ()
    values: Sequence[tuple[str, str, str]] = ()
    strip: Strip | None = None


class Gallery(NamedTuple):
    """Some data with what the model makes of them."""

    title: str
    items: Sequence[Item]
    note: str = ""
    kind = "gallery"


class Column(NamedTuple):
    """A column of a sortable table: numbers, None where there is none, or words."""

    title: str
    values: Sequence[float | None] | Sequence[str]
    digits: int = 0
    about: str = ""


class Rows(NamedTuple):
    """A sortable table of data; the first column is the place of each in the test set.

    Attributes:
        caption: what its rows are.
        columns: of numbers.
        noun: what a row is called.
        pictures: base64 of PNG by place, of some.
        names: of what ``values`` has.
        values: texts by place, of some.
        lines: charts by place, of some, as paths of SVG within ``size``.
        size: width and height of such a chart.
        sorted_by: the place of the column that it is sorted by at first, ascending.
        keep: places whose rows stay where every second one is left out, unless they are most.
    """

    caption: str
    columns: Sequence[Column]
    noun: str = "image"
    pictures: Mapping[int, str] = {}
    names: Sequence[str] = ()
    values: Mapping[int, Sequence[str]] = {}
    sorted_by: int = 1
    keep: frozenset[int] = frozenset()
    lines: Mapping[int, str] = {}
    size: tuple[int, int] = (0, 0)
    kind = "rows"

    @property
    def has_data(self) -> bool:
        """Whether some of the data themselves are shown."""
        return bool(self.pictures or self.values or self.lines)

    def content(self) -> dict[str, Any]:
        """What the script of the page reads."""
        columns = [{"title": each.title, "digits": each.digits, "values": each.values} for each in self.columns]
        texts = {"pictures": dict(self.pictures), "names": list(self.names), "values": dict(self.values)}
        charts = {"lines": dict(self.lines), "size": list(self.size)}
        return {"noun": self.noun, "sortedBy": self.sorted_by, "columns": columns, **texts, **charts}


class Folded(NamedTuple):
    """Blocks behind a line that opens them."""

    title: str
    blocks: Sequence[Any]
    kind = "folded"


class Section(NamedTuple):
    """Blocks under a heading."""

    title: str
    blocks: Sequence[Any]


class Page(NamedTuple):
    """A whole page."""

    title: str
    subtitle: str
    sections: Sequence[Section]
    footer: str = ""


def render(page: Page) -> str:
    """A page as HTML, below ``MOST_BYTES``: what is heaviest is left out, and the page says so.

    Raises:
        RunError: if that does not help.
    """
    for _ in range(100):
        html = _render(page)
        if len(html.encode()) < MOST_BYTES:
            return html
        page = _without_heaviest(page)
    raise RunError(f"the page would be larger than {MOST_BYTES:,} bytes: name fewer runs")


def _render(page: Page) -> str:
    loader = FileSystemLoader(FOLDER)
    environment = Environment(
        autoescape=True,
        finalize=_with_minus,
        loader=loader,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return environment.get_template("report.html").render(
        page=page, style=Markup(style), script=Markup(script), policy=Markup(policy), mark=Markup(MARK)
    )


def _with_minus(value: Any) -> Any:
    """Text with minus signs where numbers are negative; what is escaped already, as data are, stays as it is."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return re.sub(r"(?<![\w.,/)-])-(?=\d+(?:[.,]\d+)*(?![\w-]|[.,]\d))", "\u2212", value)


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _without_heaviest(page: Page) -> Page:
    """The page without the block that takes most room; of a sortable table, without its data, or half its rows."""
    weights = {
        (s, b): len(json.dumps(block, default=str))
        for s, section in enumerate(page.sections)
        for b, block in enumerate(section.blocks)
    }
    heaviest = max(weights, key=lambda place: weights[place])
    sections = list(page.sections)
    blocks = list(sections[heaviest[0]].blocks)
    block = blocks[heaviest[1]]
    left_out = Text("Left out here, so that the page stays small: " + _told(block))
    if isinstance(block, Rows) and block.has_data:
        without = block._replace(pictures={}, names=(), values={}, lines={})
        blocks[heaviest[1] : heaviest[1] + 1] = [left_out, without]
    elif isinstance(block, Rows) and len(block.columns[0].values) > 200:
        blocks[heaviest[1] : heaviest[1] + 1] = [left_out, _halved(block)]
    else:
        blocks[heaviest[1]] = left_out
    sections[heaviest[0]] = sections[heaviest[0]]._replace(blocks=blocks)
    return page._replace(sections=sections)


def _told(block: Any) -> str:
    if isinstance(block, Rows):
        return "the data themselves." if block.has_data else "every second row of this table."
    return {"figures": "figures.", "gallery": "data with their reconstructions."}.get(block.kind, "a part.")


def _halved(block: Rows) -> Rows:
    places = block.columns[0].values
    keep = block.keep if len(block.keep) <= len(places) // 4 else frozenset()
    kept = [row for row, place in enumerate(places) if row % 2 == 0 or place in keep]
    return block._replace(
        columns=[each._replace(values=[each.values[row] for row in kept]) for each in block.columns], keep=keep
    )


def check_page(out: Path, place: str | None = None) -> None:
    """Refuse a place where a page cannot be written: only an earlier page of this command is ever overwritten.

    Args:
        out: where.
        place: what a message calls it; None: its path.

    Raises:
        RunError: if it has another ending, or there is anything else.
    """
    place = place or str(out)
    if out.suffix not in (".html", ".htm"):
        raise RunError(f"{place}: expected a file named .html")
    if not os.path.lexists(out):
        if not out.parent.is_dir():
            raise RunError(f"{place}: there is no directory {out.parent}")
        return
    other = (
        f"{place} exists, and is no report of this command, which is all that it overwrites: choose another by --out"
    )
    if out.is_symlink() or not out.is_file():
        raise RunError(other)
    with writing(place):
        if MARK.encode() not in bytes_in(out)[:4000]:
            raise RunError(other)


def write_page(page: Page, out: Path, place: str | None = None) -> None:
    """Write a page, whole or not at all.

    Raises:
        RunError: as :func:`check_page` and :func:`render`, and if it cannot be written.
    """
    check_page(out, place)
    html = render(page)
    with writing(place or str(out)):
        write_text(out, html)
