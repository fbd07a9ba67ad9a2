"""The loss and accuracy curves of a run in characters, for a terminal."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from rich.text import Text

from mnist_dist.results.history import History, Metric, steep_epochs

TRAIN_STYLE, VALIDATION_STYLE = "bright_blue", "dark_orange"
# The dots of a Braille character: the bit of each, by row and column.
_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
_LABEL_WIDTH = 7


def draw_text_curves(history: History, *, metric: Metric, width: int, height: int, ascii_only: bool = False) -> Text:
    """The train and validation curves of one metric, over all epochs so far.

    Args:
        history: At least one epoch.
        metric: Which one to draw.
        width: Of the text, in characters.
        height: Of the text, in lines; two of them are the title and the axis of the epochs.
        ascii_only: Draw with ASCII characters, for terminals that have no others.
    """
    columns, rows = max(width - _LABEL_WIDTH - 2, 10), max(height - 2, 2)
    train, validation = np.array(history.column(metric)), np.array(history.column(f"val_{metric}"))
    to_scale, label = _scale(metric, train, validation)
    shown = to_scale(np.concatenate([train, validation])[_after_steep_epochs(metric, len(train))])
    low, high = shown.min(), shown.max()
    if high - low < 1e-9:  # one epoch, or a metric that stands still
        low, high = low - 0.005, high + 0.005
    cells = [
        _trace((to_scale(values) - low) / (high - low), rows=rows, columns=columns) for values in (train, validation)
    ]
    corner, stroke, tick = ("+", "-", "|") if ascii_only else ("└", "─", "│")
    text = _title(history, metric)
    for row in range(rows):
        at = 1 - row / (rows - 1)
        is_labelled = row in (0, rows // 2, rows - 1)
        text.append(f"\n{label(low + at * (high - low)) if is_labelled else '':>{_LABEL_WIDTH}} {tick}")
        for dots in zip(cells[0][row], cells[1][row], strict=True):
            style = VALIDATION_STYLE if dots[1] else TRAIN_STYLE
            bits = dots[0] | dots[1]
            text.append(" " if not bits else "*" if ascii_only else chr(0x2800 + bits), style)
    last = str(len(train))
    text.append(f"\n{'epoch':>{_LABEL_WIDTH}} {corner}1{last.rjust(columns - 1, stroke)}" if len(train) > 1 else "")
    return text


def _title(history: History, metric: Metric) -> Text:
    def show(value: float) -> str:
        return f"{value:.2%}" if metric == "accuracy" else f"{value:.4f}"

    last = history.epochs[-1]
    return Text.assemble(
        (metric, "bold"),
        (f"  train {show(getattr(last, metric))}", TRAIN_STYLE),
        (f"  validation {show(getattr(last, f'val_{metric}'))}", VALIDATION_STYLE),
    )


def _scale(
    metric: Metric, *curves: npt.NDArray[np.float64]
) -> tuple[Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]], Callable[[float], str]]:
    """What puts values on the axis, and what writes a place on it; logarithmic as in the pictures (`curves`)."""
    if metric == "accuracy":
        return np.asarray, lambda place: f"{place:.1%}"
    values = np.concatenate(curves)
    if values.min() > 0 and values.max() >= 10 * values.min():
        return np.log10, lambda place: f"{10**place:.3g}"
    return np.asarray, lambda place: f"{place:.3f}"


def _after_steep_epochs(metric: Metric, num_epochs: int) -> npt.NDArray[np.bool_]:
    """Which points set the range, of train and validation: as in the pictures, no accuracies of the first epochs."""
    num_steep = steep_epochs(num_epochs) if metric == "accuracy" else 0
    return np.tile(np.arange(1, num_epochs + 1) > num_steep, 2)


def _trace(shares: npt.NDArray[np.float64], *, rows: int, columns: int) -> npt.NDArray[np.int64]:
    """The bits of each character, shape (rows, columns), for a line through heights from 0 to 1; lower ones are cut."""
    num_x, num_y = 2 * columns, 4 * rows
    grid = np.zeros((num_y, num_x), np.int64)
    last_x = num_x - 1 if len(shares) > 1 else 0
    heights = np.interp(np.linspace(0, len(shares) - 1, last_x + 1), np.arange(len(shares)), shares)
    ys = np.round((1 - heights) * (num_y - 1)).astype(int)
    for x, y in enumerate(ys):
        before = ys[max(x - 1, 0)]
        # A steep line has no gaps: it begins next to the dot before.
        first, last = sorted((int(y), int(before + np.sign(y - before))))
        grid[max(first, 0) : max(last + 1, 0), x] = 1
    bits: npt.NDArray[np.int64] = np.einsum("ryxc,yc->rx", grid.reshape(rows, 4, columns, 2), _DOTS)
    return bits
