"""How all pictures look, and how they become PNG bytes.

Nothing here writes a file or needs a display (pyplot is not used), and the same figure gives the same bytes.
"""

import io
from collections.abc import Callable
from typing import Literal

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

DPI = 160
PADDING_INCHES = 0.12
MAX_NAME_LENGTH = 28

# Two colours of the Okabe-Ito palette, told apart with any colour vision and in greyscale print.
TRAIN_COLOR = "#0072B2"
VALIDATION_COLOR = "#D55E00"
REFERENCE_COLOR = "#333333"
GRID_COLOR = "#DDDDDD"


def to_png(draw: Callable[[], Figure]) -> bytes:
    """PNG bytes of the figure that `draw` makes."""
    # The user's own matplotlibrc must not change (or, with LaTeX switched on, break) the pictures.
    with style.context("default"):
        canvas = FigureCanvasAgg(draw())
        buffer = io.BytesIO()
        # Not `savefig`, which would draw everything twice. By default the file names the version of Matplotlib; equal
        # pictures should be equal files.
        canvas.print_png(buffer, metadata={"Software": None})  # type: ignore[no-untyped-call]
    return buffer.getvalue()


def create_figure(width: float, height: float) -> Figure:
    """An empty figure, sized in inches, whose parts make room for each other."""
    layout = ConstrainedLayoutEngine(w_pad=PADDING_INCHES, h_pad=PADDING_INCHES)
    return Figure(figsize=(width, height), dpi=DPI, layout=layout)


def add_grid(axes: Axes, axis: Literal["both", "x", "y"] = "both") -> None:
    """Quiet lines behind the data, and no frame above and to the right of it."""
    axes.grid(axis=axis, color=GRID_COLOR, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def shorten_name(name: str) -> str:
    """At most `MAX_NAME_LENGTH` characters; the middle goes, since names often differ at their ends."""
    if len(name) <= MAX_NAME_LENGTH:
        return name
    half = (MAX_NAME_LENGTH - 1) // 2
    return f"{name[:half]}…{name[-half:]}"
