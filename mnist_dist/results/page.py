"""The skeleton of a page: one self-contained HTML file, light or dark, for a desk, a phone or a printer.

The elements are macros of Jinja2 in `elements.html`, which escapes every text that is not `Html` already. Elements are
closed as in XML, so that the whole page can be read by an XML parser too.
"""

import base64
import functools
import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

Html = Markup
"""Text that may stand in a page as it is."""

Tone = Literal["good", "bad", "warn", "unsure", "info", "quiet"]
"""How something is meant; `page.css` has a pair of colours for each."""

# A browser shows none of them, XML forbids most, and lone surrogates (from file names) cannot be written as UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")

# Nothing is loaded, and nothing runs but the page's own script, even if somebody's text found a way through.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    kind: Literal["text", "number", "code", "prose"] = "text"
    """Numbers stand right-aligned. Only prose is broken into lines."""


def printable(value: object) -> str:
    """The text of a value, with a replacement for what cannot be shown."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", str(value))


def text(value: object) -> Html:
    """The text of a value, escaped."""
    return escape(printable(value))


def join(parts: Iterable[Html], separator: str = "") -> Html:
    """All parts, one after the other."""
    return escape(separator).join(parts)


def lines(parts: Iterable[Html]) -> Html:
    """The parts below each other."""
    return Html("<br />").join(parts)


def load_files() -> None:
    """Read the files that pages are made from, for programs that make one hours later."""
    _elements()
    for name in ("page.css", "page.js"):
        _read(name)


@functools.cache
def _read(name: str) -> str:
    return resources.files("mnist_dist.results").joinpath(name).read_text("utf-8")


@functools.cache
def _elements() -> Any:
    environment = Environment(
        loader=PackageLoader("mnist_dist.results", ""),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(value),
        undefined=StrictUndefined,
    )
    return environment.get_template("elements.html").module


def _element(name: str, *values: object) -> Html:
    return Html(getattr(_elements(), name)(*values))


def build_document(
    title: str, *, header: Html, sections: Iterable[Html], footer: Html, has_script: bool = False
) -> str:
    """The whole file; with `has_script`, tables can be sorted and curves show their values to a pointer."""
    script, policy = "", _POLICY
    if has_script:
        # Inside a comment of JavaScript, XML's own quotation: "<" and "&" mean themselves to both kinds of parser.
        script = f"//<![CDATA[\n{_read('page.js')}//]]>"
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
    parts = (policy, Html(_read("page.css")), Html(script), header, list(sections), footer)
    return str(_element("document", title, *parts))


def headline(word: str, glyph: str, *, tone: Tone, label: str, sentence: Html) -> Html:
    """What the page comes to: a large word, and a sentence."""
    return _element("headline", word, glyph, tone, label, sentence)


def section(title: Html, *parts: Html, name: str = "") -> Html:
    """A part of the page with a heading; `name` is its address in the page."""
    return _element("section", title, parts, name)


def badge(word: str, glyph: str, tone: Tone) -> Html:
    """A status: a sign and a word, in a colour that says the same."""
    return _element("badge", word, glyph, tone)


def remark(sentence: Html, tone: Tone = "quiet") -> Html:
    """A sentence in a section."""
    return _element("remark", sentence, tone)


def code(value: object) -> Html:
    """A name or a value of a program."""
    return _element("code", value)


def link(value: object, address: str) -> Html:
    """A link to a file beside the page, or to a part of it (`#name`)."""
    return _element("link", value, address)


def command_line(value: str) -> Html:
    """A command, broken into lines where the screen ends."""
    return _element("command_line", value)


def table(
    columns: Sequence[Column],
    rows: Iterable[Sequence[Html]],
    *,
    caption: str = "",
    stacked: bool = False,
    sortable: bool = False,
) -> Html:
    """A table, which scrolls in a box of its own if it is wider than the screen.

    Args:
        columns: From left to right.
        rows: A cell for each column.
        caption: Stands above it.
        stacked: On a phone the cells of a row stand below each other instead, and nothing is out of sight.
        sortable: A click on a column's title sorts by it, in a page that has a script.
    """
    return _element("table", columns, list(rows), caption, stacked, sortable)


def facts(pairs: Iterable[tuple[str, Html]], *, kind: Literal["few", "many"] = "few") -> Html:
    """Names with their values: a few beside each other, or many in columns."""
    return _element("facts", list(pairs), kind)


def fold(summary: Html, content: Html) -> Html:
    """What is shown when asked for; no script is needed."""
    return _element("fold", summary, content)


def picture(svg: Html, *, caption: str) -> Html:
    """An `<svg>` of `svg.py` with a line above it."""
    return _element("picture", svg, caption)


def two_scales(linear: Html, logarithmic: Html, *, caption: str, name: str) -> Html:
    """The same curves with two axes, and a switch between them that needs no script; `name` is unique in the page."""
    return _element("two_scales", linear, logarithmic, caption, name)


def thumbnails(images: Iterable[tuple[bytes, str, Html]], *, caption: str) -> Html:
    """Small pictures side by side: PNG bytes, what they show for those who cannot see them, and a line below."""
    sources = [(f"data:image/png;base64,{base64.b64encode(png).decode()}", label, line) for png, label, line in images]
    return _element("thumbnails", sources, caption)


def confusion_table(names: Sequence[str], matrix: npt.NDArray[np.int64]) -> Html:
    """A confusion matrix of few classes; `matrix[i, j]` examples of class i were predicted as class j."""
    rows = []
    for name, counts in zip(names, matrix.tolist(), strict=True):
        cells = []
        for other, count in zip(names, counts, strict=True):
            share = count / max(1, sum(counts))
            title = f"{count:,} of {sum(counts):,} images of class {name} were taken for {other}"
            # The square root lifts small shares, which would not be seen otherwise.
            cells.append((count, f"{100 * math.sqrt(share):.0f}", title, name == other))
        rows.append((name, cells))
    return _element("confusion_table", names, rows)


def side_by_side(parts: Iterable[Html]) -> Html:
    """As many of the parts in a row as there is room for."""
    return _element("side_by_side", list(parts))


def share_bar(share: float) -> Html:
    """A bar for a part of a whole, from 0 to 1; what it says stands in words beside it."""
    return _element("share_bar", f"{100 * min(max(share, 0.0), 1.0):.1f}")


def cell_grid(corner: str, columns: Sequence[str], rows: Iterable[tuple[str, Sequence[bool]]], *, caption: str) -> Html:
    """A row of cells for each name; cells that are True stand out."""
    return _element("cell_grid", corner, columns, list(rows), caption)


def swatch(glyph: str, tone: Tone) -> Html:
    """A sign as it stands in a cell, to explain it."""
    return _element("swatch", glyph, tone)
