"""The pictures of `verify.html`: what the checks measured, as figures for a page (`results/svg.py`)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from mnist_dist.results.page import printable
from mnist_dist.results.png import REFERENCE_COLOR, TRAIN_COLOR, VALIDATION_COLOR, add_grid, shorten_name
from mnist_dist.results.quantities import bytes_text
from mnist_dist.results.svg import (
    BAD_COLOR,
    BAND_COLOR,
    MUTED_COLOR,
    SURFACE_COLOR,
    THIRD_COLOR,
    create_page_figure,
)

MAX_ROWS = 40
MAX_REPLICAS_WITH_BLOCKS = 32
MAX_LINEAR_REPLICAS = 8
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_LINES = ((TRAIN_COLOR, "o"), (VALIDATION_COLOR, "s"), (THIRD_COLOR, "^"), (MUTED_COLOR, "D"))


def draw_bandwidth(transfers: Sequence[Mapping[str, Any]]) -> Figure:
    """Bus bandwidth by size, a line for each collective."""
    figure, axes = _create(2.9)
    sizes = sorted({int(transfer["bytes"]) for transfer in transfers})
    for name, (color, marker) in zip(dict.fromkeys(t["collective"] for t in transfers), _LINES, strict=False):
        points = sorted((t["bytes"], t["bus_gb_per_s"]) for t in transfers if t["collective"] == name)
        x, y = zip(*points, strict=True)
        label = _name(str(name).replace("_", "-"))
        axes.plot(x, y, color=color, marker=marker, markersize=4, linewidth=1.6, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    shown = _spread(sizes, 6)
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_text(value)))
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("Size")
    axes.set_ylabel("Bus bandwidth, GB/s")
    add_grid(axes)
    _add_legend(figure)
    return figure


def draw_losses(run: Mapping[str, Any]) -> Figure:
    """The losses of a run and of its reference, step by step, and where they first differ."""
    figure, axes = _create(2.5)
    losses, reference = run["losses"], run["reference_losses"]
    axes.plot(range(1, len(losses) + 1), losses, color=TRAIN_COLOR, linewidth=4.5, alpha=0.6, label="all replicas")
    # Thin and on top: where both are equal, both can be seen.
    look: dict[str, Any] = {"color": REFERENCE_COLOR, "linewidth": 1.3, "linestyle": (0, (3, 2))}
    axes.plot(range(1, len(reference) + 1), reference, label="one replica", **look)
    first = run.get("first_difference")
    if first is not None:
        axes.axvline(first, color=BAD_COLOR, linewidth=1.2, label=f"first difference: step {first}")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlabel("Step")
    axes.set_ylabel("Loss")
    add_grid(axes)
    _add_legend(figure)
    return figure


def draw_noise(noise: Sequence[float], *, distance: float, limit: float) -> Figure:
    """Distances that come from rounding alone, the limit, and the distance that was measured."""
    figure, axes = _create(1.5)
    highest = max(*noise, distance, limit)
    # Plain numbers on the axis, their power of ten in its label.
    exponent = 3 * math.floor(math.log10(highest) / 3) if highest > 0 else 0
    unit = 10.0**exponent
    color = BAD_COLOR if distance > limit else TRAIN_COLOR
    look: dict[str, Any] = {"color": SURFACE_COLOR, "markeredgecolor": MUTED_COLOR, "markersize": 6}
    axes.plot([value / unit for value in noise], [1] * len(noise), "o", **look)
    axes.plot([distance / unit], [0], "D", color=color, markersize=6.5)
    axes.axvline(limit / unit, color=REFERENCE_COLOR, linewidth=1.2, linestyle=(0, (4, 2)))
    left, right = -0.03 * highest / unit, 1.06 * highest / unit
    # What is far beyond the limit would push everything else into a corner.
    logarithmic = distance > 4 * limit > 0
    if logarithmic:
        left = 0.6 * min(value for value in (*noise, limit) if value > 0) / unit
        right = 1.6 * highest / unit
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(numticks=6))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.set_xlim(left, right)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    top = axes.get_xaxis_transform()
    place: dict[str, Any] = {"xycoords": top, "xytext": (0, 2), "textcoords": "offset points"}
    axes.annotate("limit", (limit / unit, 1), ha="center", fontsize=9.5, **place)
    axes.set_yticks([0, 1], ["all replicas", "rounding alone"])
    axes.set_ylim(-0.6, 1.6)
    axes.tick_params(axis="y", length=0, colors=REFERENCE_COLOR)
    times = "" if exponent == 0 else f" (\N{MULTIPLICATION SIGN} 10{str(exponent).translate(_SUPERSCRIPTS)})"
    axes.set_xlabel(f"Distance of the weights{times}{', log scale' if logarithmic else ''}")
    add_grid(axes, "x")
    axes.spines["left"].set_visible(False)
    return figure


def draw_bands(numbers: Sequence[Mapping[str, Any]]) -> Figure:
    """Each number in its band; all bands are drawn equally wide."""
    shown = numbers[:MAX_ROWS]
    figure, axes = _create(0.75 + 0.27 * len(shown))
    for row, number in enumerate(shown):
        inside = number["low"] <= number["value"] <= number["high"]
        axes.barh(row, 2, left=-1, height=0.62, color=BAND_COLOR)
        axes.plot([0, 0], [row - 0.31, row + 0.31], color=MUTED_COLOR, linewidth=1)
        place = _place_in_band(number)
        # An arrowhead: the number lies beyond what is drawn.
        marker = "o" if abs(place) <= 1.3 else ">" if place > 0 else "<"
        color = TRAIN_COLOR if inside else BAD_COLOR
        axes.plot(min(max(place, -1.3), 1.3), row, marker, color=color, markersize=6.5)
    axes.set_yticks(range(len(shown)), [_name(number["name"]) for number in shown], parse_math=False)
    axes.set_xticks([-1, 0, 1], ["low", "mean", "high"])
    axes.set_xlim(-1.4, 1.4)
    axes.set_ylim(len(shown) - 0.45, -0.55)
    axes.tick_params(length=0)
    axes.tick_params(axis="y", colors=REFERENCE_COLOR)
    axes.spines[:].set_visible(False)
    return figure


def draw_rounds(rounds: Sequence[Sequence[Sequence[float]]], *, limit: float) -> Figure:
    """Seconds of each block, per replica and round, as multiples of the fastest replica's median of that round."""
    figure, axes = _create(2.7)
    num_replicas = len(rounds[0])
    with_blocks = num_replicas <= MAX_REPLICAS_WITH_BLOCKS
    highest = limit
    for index, (replicas, (color, _)) in enumerate(zip(rounds, _LINES, strict=False)):
        fastest = min(median(blocks) for blocks in replicas)
        shift = (index - (len(rounds) - 1) / 2) * 0.22 if with_blocks else 0
        x = [replica + shift for replica, blocks in enumerate(replicas) for _ in (blocks if with_blocks else [0])]
        y = [
            seconds / fastest for blocks in replicas for seconds in (blocks if with_blocks else [float(median(blocks))])
        ]
        look: dict[str, Any] = {"markersize": 4.5 if with_blocks else 2.5, "alpha": 0.75, "markeredgewidth": 0}
        axes.plot(x, y, "o", color=color, label=f"round {index + 1}", **look)
        highest = max(highest, *y)
    axes.axhline(limit, color=REFERENCE_COLOR, linewidth=1.2, linestyle=(0, (4, 2)), label=f"limit: {limit:g}")
    axes.set_ylim(min(0.9, 1 - 0.06 * (highest - 1)), 1 + 1.08 * (highest - 1))
    axes.set_xlim(-0.6, num_replicas - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    axes.set_xlabel("Replica")
    axes.set_ylabel("Time against the fastest")
    add_grid(axes, "y")
    _add_legend(figure, marker_scale=1 if with_blocks else 2)
    return figure


def draw_throughput(points: Sequence[Mapping[str, Any]]) -> Figure:
    """Images a second over replicas, with the line of an ideal scaling."""
    figure, axes = _create(2.7)
    highest = 0.0
    for kind, x, y in _series(points, "images_per_s"):
        color, marker = _LINES[0] if kind == "strong" else _LINES[1]
        axes.plot(x, y, color=color, marker=marker, markersize=5, linewidth=1.6, label=_name(kind))
        highest = max(highest, *y)
    smallest = min(points, key=lambda point: point["replicas"])
    each = smallest["images_per_s"] / smallest["replicas"]
    counts = sorted({point["replicas"] for point in points})
    ideal = [each * count for count in counts]
    axes.plot(counts, ideal, color=REFERENCE_COLOR, linewidth=1, linestyle=(0, (4, 2)), label="ideal", zorder=1)
    highest = max(highest, *ideal)
    if counts[-1] > MAX_LINEAR_REPLICAS:
        # With both scales logarithmic an ideal scaling is a straight line.
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, 1.05 * highest)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_ylabel("Images a second")
    _finish_scaling(figure, axes, points)
    return figure


def draw_efficiency(points: Sequence[Mapping[str, Any]]) -> Figure:
    """Efficiency over replicas; 100 % is ideal."""
    figure, axes = _create(2.7)
    for kind, x, y in _series(points, "efficiency"):
        color, marker = _LINES[0] if kind == "strong" else _LINES[1]
        axes.plot(x, y, color=color, marker=marker, markersize=5, linewidth=1.6, label=_name(kind))
    axes.axhline(1, color=REFERENCE_COLOR, linewidth=1, linestyle=(0, (4, 2)), label="ideal", zorder=1)
    axes.set_ylim(0, max(1.1, *(1.05 * point["efficiency"] for point in points)))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.set_ylabel("Efficiency")
    _finish_scaling(figure, axes, points)
    return figure


def draw_ratios(compared: Sequence[Mapping[str, Any]]) -> Figure:
    """Each time as a multiple of the reference's, the slowest first, with its limit."""
    shown = sorted(compared, key=lambda entry: -entry["ratio"])[:MAX_ROWS]
    figure, axes = _create(0.95 + 0.29 * len(shown))
    for row, entry in enumerate(shown):
        color = BAD_COLOR if entry["ratio"] > entry["limit"] else TRAIN_COLOR
        axes.barh(row, entry["ratio"] - 1, left=1, height=0.45, color=color, alpha=0.85)
        axes.plot([entry["limit"]] * 2, [row - 0.38, row + 0.38], color=REFERENCE_COLOR, linewidth=1.4)
        # In a column of their own, where no bar and no stroke crosses them.
        axes.text(1.02, row, f"{entry['ratio']:.2f}", transform=axes.get_yaxis_transform(), va="center")
    axes.axvline(1, color=MUTED_COLOR, linewidth=0.8)
    low = min(0.95, *(entry["ratio"] for entry in shown))
    high = max(1.05, *(max(entry["ratio"], entry["limit"]) for entry in shown))
    room = 0.05 * (high - low)
    axes.set_xlim(low - room, high + room)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_yticks(range(len(shown)), [_name(entry["name"]) for entry in shown], parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("Time against the reference; the stroke is the limit")
    axes.tick_params(axis="y", length=0, colors=REFERENCE_COLOR)
    add_grid(axes, "x")
    axes.spines["left"].set_visible(False)
    return figure


def _create(height: float) -> tuple[Figure, Axes]:
    figure = create_page_figure(height)
    return figure, figure.add_subplot()


def _add_legend(figure: Figure, *, marker_scale: float = 1) -> None:
    """All entries in one line above the axes, where they hide nothing."""
    legend = figure.legend(
        loc="outside upper left",
        ncols=4,
        frameon=False,
        fontsize=9.5,
        handlelength=1.5,
        columnspacing=1.2,
        borderpad=0,
        markerscale=marker_scale,
    )
    for label in legend.get_texts():
        label.set_parse_math(False)


def _finish_scaling(figure: Figure, axes: Axes, points: Sequence[Mapping[str, Any]]) -> None:
    counts = sorted({point["replicas"] for point in points})
    if counts[-1] > MAX_LINEAR_REPLICAS:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(counts if len(counts) <= 10 else _spread(counts, 8))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(x=0.06)
    axes.set_xlabel("Replicas")
    add_grid(axes)
    _add_legend(figure)


def _series(points: Sequence[Mapping[str, Any]], key: str) -> Iterable[tuple[str, list[int], list[float]]]:
    """The points of each kind, by the number of replicas."""
    for kind in dict.fromkeys(str(point["kind"]) for point in points):
        chosen = sorted((point["replicas"], point[key]) for point in points if point["kind"] == kind)
        yield kind, [replicas for replicas, _ in chosen], [value for _, value in chosen]


def _place_in_band(number: Mapping[str, Any]) -> float:
    """-1 at the low end, 0 at the mean, 1 at the high end, whose distances from the mean may differ."""
    away = number["value"] - number["mean"]
    width = number["high"] - number["mean"] if away > 0 else number["mean"] - number["low"]
    if away == 0:
        return 0.0
    return float(away / width) if width > 0 else math.copysign(math.inf, away)


def _spread(values: Sequence[int], number: int) -> list[int]:
    """At most `number` of the values, evenly spread, from the first one on."""
    return list(values[:: math.ceil(len(values) / number)])


def _name(value: object) -> str:
    return shorten_name(printable(value))
