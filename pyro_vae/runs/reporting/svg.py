"""Figures of matplotlib as SVG inside a page: text as text, in the colours of the page, and without inline styles.

A strict Content-Security-Policy takes no ``style`` attribute, so that what matplotlib writes in one becomes attributes
of their own.
"""

import re
from collections.abc import Callable
from io import BytesIO
from typing import NamedTuple
from xml.etree import ElementTree

from markupsafe import Markup

from pyro_vae.errors import is_of_no_number

HREF = "{http://www.w3.org/1999/xlink}href"


class Drawn(NamedTuple):
    """A figure: its SVG, what it shows, for readers who do not see it, and a line below it."""

    svg: Markup
    alt: str
    caption: str = ""

    @property
    def is_wide(self) -> bool:
        """Whether it needs a line of its own."""
        found = re.search(r'width="(\d+)"', self.svg)
        return found is not None and int(found[1]) > 720


def drawn(name: str, draw: Callable[[BytesIO], None], alt: str, caption: str = "") -> Drawn | None:
    """What ``draw`` writes to a buffer as SVG; None of numbers that are NaN or infinite, which cannot be drawn.

    Args:
        name: of the figure, one word, different for each on a page.
        draw: writes SVG, as :func:`pyro_vae.runs.figures.save_figure` does to what is no path.
        alt: what it shows.
        caption: below it.
    """
    buffer = BytesIO()
    try:
        draw(buffer)
    except (ValueError, RuntimeError) as error:
        if not is_of_no_number(error):
            raise
        return None
    return Drawn(inline(buffer.getvalue().decode(), name, alt), alt, caption)


def inline(svg: str, name: str, alt: str) -> Markup:
    """A document of SVG that matplotlib wrote as an element of HTML; ``name`` begins its ids."""
    svg = re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", svg)  # what XML has no room for
    root = ElementTree.fromstring(svg[svg.index("<svg") :])
    for parent in list(root.iter()):
        for child in list(parent):
            if _tag(child) in ("metadata", "style", "title"):
                parent.remove(child)
    named = set(re.findall(r'(?:url\(#|href="#)([\w.:-]+)', svg))
    for element in root.iter():
        _plain(element, name, named)
    size = [float(each) for each in root.attrib["viewBox"].split()[2:]]
    root.attrib.update(width=f"{size[0] * 4 / 3:.0f}", height=f"{size[1] * 4 / 3:.0f}", fill="currentColor")
    root.attrib |= {"role": "img", "aria-label": alt, "stroke-linejoin": "round", "stroke-linecap": "butt"}
    root.attrib.pop("version", None)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _plain(element: ElementTree.Element, name: str, named: set[str]) -> None:
    """An element of SVG without namespaces, without inline style, and with ids that are its figure's own."""
    element.tag = _tag(element)
    element.tail = None
    if element.tag != "text" and element.tag != "tspan":
        element.text = None
    attributes = element.attrib
    for rule in attributes.pop("style", "").split(";"):
        key, colon, value = (part.strip() for part in rule.partition(":"))
        if key == "font":
            found = re.search(r"([\d.]+)px", value)
            key, value = "font-size", found[1] if found else "10"
        if colon:
            attributes[key] = value
    if HREF in attributes:
        attributes["href"] = "".join(attributes.pop(HREF).split())
    for key, value in list(attributes.items()):
        if key == "id":
            if value in named:
                attributes[key] = f"{name}-{value}"
            else:
                del attributes[key]
        elif key == "href" and value.startswith("#"):
            attributes[key] = f"#{name}-{value[1:]}"
        elif "url(#" in value:
            attributes[key] = value.replace("url(#", f"url(#{name}-")
        elif value == "#000000":
            attributes[key] = "currentColor"
        elif key == "fill" and value == "#ffffff":
            attributes[key] = "none"
        elif key in ("d", "x", "y", "points", "transform"):
            attributes[key] = re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", value).replace("\n", "")
