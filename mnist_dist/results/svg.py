"""Figures as SVG inside a page: text stays text, and the colours are those of the page's theme.

The figures are the ones that `png.py` turns into PNG bytes. The colours named there and below stand for CSS variables
of `page.css`; any other colour is kept as it is, and black is the colour of the text around the picture.
"""

import io
import json
import math
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter

from mnist_dist.results.page import Html, printable
from mnist_dist.results.png import GRID_COLOR, REFERENCE_COLOR, TRAIN_COLOR, VALIDATION_COLOR

# A phone's screen is hardly wider: a figure of this width is shown there at its own size, with letters one can read.
WIDTH_INCHES = 4.7

# Okabe and Ito's green is the third one that goes with the two of `png.py`.
THIRD_COLOR = "#009E73"
MUTED_COLOR = "#57606A"
BAND_COLOR = "#DCEBF5"
BAD_COLOR = "#B3261E"
SURFACE_COLOR = "#FFFFFE"
"""What the figure stands on. White itself is kept, for cells that are light in any theme."""

_THEME = {
    TRAIN_COLOR: "var(--series-1)",
    VALIDATION_COLOR: "var(--series-2)",
    THIRD_COLOR: "var(--series-3)",
    REFERENCE_COLOR: "var(--ink)",
    GRID_COLOR: "var(--grid)",
    MUTED_COLOR: "var(--muted)",
    BAND_COLOR: "var(--band)",
    BAD_COLOR: "var(--bad)",
    SURFACE_COLOR: "var(--surface)",
    "#000000": "currentColor",
}
_VARIABLES = {color.lower(): variable for color, variable in _THEME.items()}

_SETTINGS = {
    "axes.edgecolor": MUTED_COLOR,
    "axes.labelcolor": MUTED_COLOR,
    "axes.linewidth": 0.7,
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "svg.fonttype": "none",
    "xtick.color": MUTED_COLOR,
    "ytick.color": MUTED_COLOR,
}
# Matplotlib measures with its own font, which is wider than those that browsers choose: no label is cut off.
_FAMILY = "'DejaVu Sans', sans-serif"


def create_page_figure(height: float) -> Figure:
    """An empty figure for a page, as wide as a phone; the height is in inches."""
    # The page has margins of its own; the strip keeps the ends of the outer labels.
    layout = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.04)
    return Figure(figsize=(WIDTH_INCHES, height), layout=layout)


def to_svg(draw: Callable[[], Figure], *, name: str, title: str, shows_values: bool = False) -> Html:
    """An `<svg>` element of the figure that `draw` makes; the same figure gives the same text.

    Args:
        draw: Called with the settings of a page in force, whatever the user's own matplotlibrc says.
        name: Letters, digits and "-", unlike that of any other figure of the page: the ids in it begin with this.
        title: What the picture shows, for those who cannot see it.
        shows_values: The first axes' curves, those with a label, show their values to a pointer (`page.js`).
    """
    with style.context(["default", _SETTINGS]):
        figure = draw()
        for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
            patch.set_visible(False)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)  # type: ignore[no-untyped-call]
    root = ElementTree.fromstring(buffer.getvalue())
    _make_part_of_page(root, name=name, title=title)
    if shows_values:
        root.set("data-chart", printable(json.dumps(_chart_of(figure.axes[0], root.get("viewBox", "")))))
    return Html(ElementTree.tostring(root, encoding="unicode"))


def _chart_of(axes: Axes, view_box: str) -> dict[str, Any]:
    """Where the axes are in the picture, and the points of their curves."""
    width, height = map(float, view_box.split()[2:])
    place = axes.get_position()
    sides = {
        side: {
            "range": list(axis.get_view_interval()),
            "log": axis.get_scale() == "log",
            "percent": isinstance(axis.get_major_formatter(), PercentFormatter),
            "label": axis.get_label_text(),
        }
        for side, axis in (("x", axes.xaxis), ("y", axes.yaxis))
    }
    curves = [
        {
            "name": line.get_label(),
            "color": _VARIABLES.get(to_hex(line.get_color()), to_hex(line.get_color())),
            "x": _rounded(line.get_xdata()),
            "y": _rounded(line.get_ydata()),
        }
        for line in axes.lines
        if not str(line.get_label()).startswith("_")
    ]
    box = [place.x0 * width, (1 - place.y1) * height, place.width * width, place.height * height]
    return {"box": [round(value, 2) for value in box], **sides, "curves": curves}


def _rounded(values: npt.ArrayLike) -> list[float | None]:
    """To six digits, and None for what JSON has no number for."""
    numbers = np.asarray(values, dtype=np.float64).tolist()
    return [float(f"{number:.6g}") if math.isfinite(number) else None for number in numbers]


def _make_part_of_page(root: ElementTree.Element, *, name: str, title: str) -> None:
    """Turn Matplotlib's document into an element of a page, in place."""
    view_box = root.get("viewBox", "")
    for element in root.iter():
        # In HTML an inline <svg> needs no namespaces.
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        element.text, element.tail = (part if part and part.strip() else None for part in (element.text, element.tail))
    for parent in list(root.iter()):
        for child in list(parent):
            # Its one rule is for every element of the page; page.css has it for figures only.
            if child.tag in ("metadata", "style"):
                parent.remove(child)
    _rename_ids(root, name)
    for element in root.iter():
        _clean_attributes(element)
    width = view_box.split()[2]
    root.attrib = {
        "class": "plot",
        "viewBox": view_box,
        "style": f"--width: {width}",
        "fill": "currentColor",
        "role": "img",
        "aria-labelledby": f"{name}-title",
    }
    label = ElementTree.Element("title", {"id": f"{name}-title"})
    label.text = title
    root.insert(0, label)


def _rename_ids(root: ElementTree.Element, name: str) -> None:
    """Number the ids that something refers to, beginning with `name`; drop all others.

    Matplotlib's own are random: with these the same figure gives the same text.
    """
    references = re.compile(r"url\(#([^)]+)\)")
    used: dict[str, str] = {}
    for element in root.iter():
        found = [match for value in element.attrib.values() for match in references.findall(value)]
        found += [element.get("href", "")[1:]] if element.get("href", "").startswith("#") else []
        for old in found:
            used.setdefault(old, f"{name}-{len(used)}")
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key == "id" and value not in used:
                del element.attrib[key]
            elif key == "id":
                element.set(key, used[value])
            elif key == "href" and value.startswith("#"):
                element.set(key, f"#{used[value[1:]]}")
            else:
                element.set(key, references.sub(lambda match: f"url(#{used[match[1]]})", value))


def _clean_attributes(element: ElementTree.Element) -> None:
    """Bring in the theme, and leave out what no one sees: line breaks, and digits beyond a hundredth of a point."""
    for key in ("d", "x", "y", "width", "height", "transform", "points"):
        if key in element.attrib:
            numbers = re.sub(
                r"-?\d+\.\d+", lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), element.attrib[key]
            )
            element.set(key, " ".join(numbers.split()))
    if element.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]
    if "style" in element.attrib:
        rules = (rule.partition(":") for rule in element.attrib["style"].replace(_FAMILY, "var(--font)").split(";"))
        values = {key.strip(): value.strip() for key, _, value in rules}
        element.set("style", "; ".join(f"{key}: {_VARIABLES.get(value, value)}" for key, value in values.items()))
