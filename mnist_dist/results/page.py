"""The skeleton of a page: one self-contained HTML file, light or dark, for a desk, a phone or a printer.

`Html` is text that is safe to put into a page; `text` makes it from any other text. The checker of types then finds
what was not escaped. Elements are closed as in XML, so that the whole page can be read by an XML parser too.
"""

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal, NewType

Html = NewType("Html", str)
"""Text that may stand in a page as it is."""

Tone = Literal["good", "bad", "warn", "unsure", "info", "quiet"]
"""How something is meant; `page.css` has a pair of colours for each."""

# A browser shows none of them, XML forbids most, and lone surrogates (from file names) cannot be written as UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")

# Nothing is loaded and nothing runs, even if somebody's text found a way through.
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
    return Html(html.escape(printable(value)))


def join(parts: Iterable[Html], separator: str = "") -> Html:
    """All parts, one after the other."""
    return Html(html.escape(separator).join(parts))


def lines(parts: Iterable[Html]) -> Html:
    """The parts below each other."""
    return Html("<br />".join(parts))


def build_document(title: str, *, header: Html, sections: Iterable[Html], footer: Html) -> str:
    """The whole file."""
    css = resources.files("mnist_dist.results").joinpath("page.css").read_text("utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta http-equiv="Content-Security-Policy" content="{text(_POLICY)}" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<meta name="color-scheme" content="light dark" />
<title>{text(title)}</title>
<link rel="icon" href="data:," />
<style>
{css}</style>
</head>
<body>
<header>
{header}
</header>
<main>
{join(sections, chr(10))}
</main>
<footer>
{footer}
</footer>
</body>
</html>
"""


def headline(word: str, glyph: str, *, tone: Tone, label: str, sentence: Html) -> Html:
    """What the page comes to: a large word, and a sentence."""
    return Html(
        f'<p class="label">{text(label)}</p>\n<div class="headline {tone}">'
        f'<span class="seal" aria-hidden="true">{text(glyph)}</span>'
        f'<div><h1>{text(word)}</h1><p class="lead">{sentence}</p></div></div>'
    )


def section(title: Html, *parts: Html, name: str = "") -> Html:
    """A part of the page with a heading; `name` is its address in the page."""
    address = f' id="{text(name)}"' if name else ""
    return Html(f"<section{address}>\n<h2>{title}</h2>\n{join(parts, chr(10))}\n</section>")


def badge(word: str, glyph: str, tone: Tone) -> Html:
    """A status: a sign and a word, in a colour that says the same."""
    return Html(f'<span class="badge {tone}"><span aria-hidden="true">{text(glyph)}</span> {text(word)}</span>')


def remark(sentence: Html, tone: Tone = "quiet") -> Html:
    """A sentence in a section."""
    return Html(f'<p class="remark {tone}">{sentence}</p>')


def code(value: object) -> Html:
    """A name or a value of a program."""
    return Html(f"<code>{text(value)}</code>")


def command_line(value: str) -> Html:
    """A command, broken into lines where the screen ends."""
    return Html(f'<pre class="command"><code>{text(value)}</code></pre>')


def table(
    columns: Sequence[Column], rows: Iterable[Sequence[Html]], *, caption: str = "", stacked: bool = False
) -> Html:
    """A table, which scrolls in a box of its own if it is wider than the screen.

    Args:
        columns: From left to right.
        rows: A cell for each column.
        caption: Stands above it.
        stacked: On a phone the cells of a row stand below each other instead, and nothing is out of sight.
    """
    title = f"<caption>{text(caption)}</caption>" if caption else ""
    head = "".join(f'<th scope="col" class="{column.kind}">{text(column.title)}</th>' for column in columns)
    body = "\n".join(_row(columns, row, stacked=stacked) for row in rows)
    # The focus lets a keyboard scroll it.
    return Html(
        f'<div class="table{" stacked" if stacked else ""}" tabindex="0"><table>{title}<thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _row(columns: Sequence[Column], cells: Sequence[Html], *, stacked: bool) -> str:
    tags = [
        f'<td class="{column.kind}"' + (f' data-title="{text(column.title)}">' if stacked else ">")
        for column in columns
    ]
    return "<tr>" + "".join(f"{tag}{cell}</td>" for tag, cell in zip(tags, cells, strict=True)) + "</tr>"


def facts(pairs: Iterable[tuple[str, Html]], *, kind: Literal["few", "many"] = "few") -> Html:
    """Names with their values: a few beside each other, or many in columns."""
    entries = "".join(f"<div><dt>{text(name)}</dt><dd>{value}</dd></div>" for name, value in pairs)
    return Html(f'<dl class="{kind}">{entries}</dl>')


def fold(summary: Html, content: Html) -> Html:
    """What is shown when asked for; no script is needed."""
    return Html(f"<details><summary>{summary}</summary>\n{content}\n</details>")


def picture(svg: str, *, caption: str) -> Html:
    """An `<svg>` of `svg.py` with a line above it."""
    return Html(f"<figure><figcaption>{text(caption)}</figcaption>{svg}</figure>")


def side_by_side(parts: Iterable[Html]) -> Html:
    """As many of the parts in a row as there is room for."""
    return Html('<div class="side-by-side">' + "\n".join(parts) + "</div>")


def share_bar(share: float) -> Html:
    """A bar for a part of a whole, from 0 to 1; what it says stands in words beside it."""
    percent = 100 * min(max(share, 0.0), 1.0)
    return Html(f'<span class="bar" aria-hidden="true"><span style="width: {percent:.1f}%"></span></span>')


def cell_grid(corner: str, columns: Sequence[str], rows: Iterable[tuple[str, Sequence[bool]]], *, caption: str) -> Html:
    """A row of cells for each name; cells that are True stand out."""
    head = "".join(f'<th scope="col" class="cell">{text(title)}</th>' for title in columns)
    body = "\n".join(
        f'<tr><th scope="row" class="number">{text(name)}</th>{"".join(_cell(odd) for odd in cells)}</tr>'
        for name, cells in rows
    )
    return Html(
        f'<div class="table cells" tabindex="0"><table><caption>{text(caption)}</caption>'
        f'<thead><tr><th scope="col">{text(corner)}</th>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
    )


def _cell(odd: bool) -> str:
    return '<td class="cell bad">\N{MULTIPLICATION X}</td>' if odd else '<td class="cell good">=</td>'


def swatch(glyph: str, tone: Tone) -> Html:
    """A sign as it stands in a cell, to explain it."""
    return Html(f'<span class="swatch {tone}">{text(glyph)}</span>')
