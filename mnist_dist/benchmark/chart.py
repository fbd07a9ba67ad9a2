"""The picture of a benchmark: every contender's epochs, fastest first, one panel per precision."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mnist_dist.benchmark.entries import OURS
from mnist_dist.benchmark.referee import EPOCH
from mnist_dist.results.png import DPI, REFERENCE_COLOR, TRAIN_COLOR, VALIDATION_COLOR, add_grid, to_png

_COLORS = {OURS: TRAIN_COLOR, "floor": REFERENCE_COLOR}
_RIVAL_COLOR = VALIDATION_COLOR


def plot_benchmark(rows: Sequence[Mapping[str, Any]], *, title: str) -> bytes:
    """PNG bytes of the epochs' seconds; see `draw_benchmark`."""
    return to_png(lambda: draw_benchmark(rows, title=title))


def draw_benchmark(rows: Sequence[Mapping[str, Any]], *, title: str) -> Figure:
    """Bars of medians with a dot for each epoch; contenders that failed are left out."""
    shown = [row for row in rows if row["part"] == EPOCH and row["status"] == "ok"]
    panels: dict[str, list[Mapping[str, Any]]] = {row["precision"]: [] for row in shown}
    for row in sorted(shown, key=lambda row: row["median_s"]):
        panels[row["precision"]].append(row)
    heights = [len(panel) + 1.5 for panel in panels.values()]
    figure = Figure(figsize=(10, 1.2 + 0.36 * sum(heights)), dpi=DPI, layout="constrained")
    figure.suptitle(title, x=0.02, ha="left", fontsize=14, parse_math=False)
    if not panels:
        return figure
    all_axes = figure.subplots(len(panels), squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    # A single epoch that was held up for seconds would squeeze all bars.
    limit = 2 * max(row["median_s"] for row in shown)
    for axes, (precision, panel) in zip(all_axes, panels.items(), strict=True):
        _draw_panel(axes, panel, title=precision, limit=limit)
    all_axes[-1].set_xlabel("Seconds an epoch, with validation: median, and each epoch as a dot", fontsize=12)
    return figure


def _draw_panel(axes: Axes, rows: Sequence[Mapping[str, Any]], *, title: str, limit: float) -> None:
    positions = range(len(rows))
    medians = [row["median_s"] for row in rows]
    axes.barh(positions, medians, color=[_COLORS.get(row["kind"], _RIVAL_COLOR) for row in rows], alpha=0.85)
    for position, row in zip(positions, rows, strict=True):
        epochs = [seconds for seconds in row["epochs_s"] if seconds <= limit]
        num_beyond = len(row["epochs_s"]) - len(epochs)
        axes.plot(epochs, [position] * len(epochs), "o", color="white", markeredgecolor="black", markersize=4)
        axes.annotate(
            f"{row['median_s']:.3f}" + (f"  ({num_beyond} beyond, up to {row['max_s']:.1f})" if num_beyond else ""),
            (max([*epochs, row["median_s"]]), position),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=10,
        )
    axes.set_yticks(positions, [row["name"] for row in rows], fontsize=10, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * limit)
    axes.set_title(title, loc="left", fontsize=12)
    add_grid(axes, "x")
