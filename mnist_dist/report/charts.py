"""The pictures of reports, as figures for a page (`results/svg.py`)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from mnist_dist.results.history import History, steep_epochs
from mnist_dist.results.page import printable
from mnist_dist.results.png import REFERENCE_COLOR, TRAIN_COLOR, VALIDATION_COLOR, add_grid, shorten_name
from mnist_dist.results.reference import Reference
from mnist_dist.results.svg import BAD_COLOR, MUTED_COLOR, THIRD_COLOR, create_page_figure
from mnist_dist.run.events import Event

MAX_LEGEND = 10
"""More curves than these are told apart by pointing at them, not by a legend."""


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    look: Mapping[str, Any] = field(default_factory=dict)
    """How matplotlib's `plot` draws it."""


@dataclass(frozen=True)
class Chart:
    """Curves over a common axis."""

    curves: Sequence[Curve]
    y_label: str
    x_label: str = "Epoch"
    percent: bool = False
    log: bool = False
    from_zero: bool = False
    hides_steep_start: bool = False
    """The vertical axis leaves out what the first epochs have, which would flatten all others into one line."""


def draw_chart(chart: Chart) -> Figure:
    """The curves, with a legend if they are few."""
    figure = create_page_figure(2.9)
    axes = figure.add_subplot()
    for curve in chart.curves:
        marker = "o" if len(curve.x) == 1 else ""
        look = {"linewidth": 1.6 if len(curve.x) <= 400 else 1.0, "marker": marker, "markersize": 4, **curve.look}
        (line,) = axes.plot(curve.x, curve.y, **look)
        line.set_label(_name(curve.name))
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.margins(x=0.02)
    if chart.log and all(value > 0 for curve in chart.curves for value in curve.y):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
    if chart.hides_steep_start and not chart.log:
        _hide_steep_start(axes, chart.curves)
    if chart.from_zero:
        axes.set_ylim(0, 1.1 * max(value for curve in chart.curves for value in curve.y) or 1)
    if chart.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    add_grid(axes)
    if 1 < len(chart.curves) <= MAX_LEGEND:
        _add_legend(figure, num_columns=2)
    return figure


def draw_progress(events: Sequence[Event], history: History, *, now: float) -> Figure:
    """Finished epochs over the time of day, and where the run was stopped, lost and resumed."""
    figure = create_page_figure(2.6)
    axes = figure.add_subplot()
    first = events[0].time
    unit_s, unit = _unit_of((events[-1].time if events[-1].kind != "started" else now) - first)
    starts = [number for number, event in enumerate(events) if event.kind == "started"]
    for number in starts:
        start, ends = events[number], events[number + 1 : number + 2]
        end_time, end_epoch = (ends[0].time, ends[0].epoch) if ends else (now, len(history.epochs))
        epochs = range(start.epoch, max(start.epoch, end_epoch) + 1)
        times = [0.0]
        for row in history.epochs[start.epoch : end_epoch]:
            times.append(times[-1] + row.epoch_s)
        times += [times[-1]] * (len(epochs) - len(times))
        # The epochs' own times leave out checkpoints and the like: spread over the time until the end.
        stretch = (end_time - start.time) / times[-1] if times[-1] > 0 else 1.0
        x = [(start.time - first + stretch * time) / unit_s for time in times]
        axes.plot(x, list(epochs), color=TRAIN_COLOR, linewidth=2.0, label="_")
    for kind, label, color, marker in (
        ("started", "resumed", THIRD_COLOR, "^"),
        ("stopped", "stopped", VALIDATION_COLOR, "s"),
        ("lost", "lost", BAD_COLOR, "X"),
        ("failed", "failed", BAD_COLOR, "D"),
        ("finished", "finished", MUTED_COLOR, "o"),
    ):
        found = [event for event in events if event.kind == kind and event is not events[0]]
        if found:
            x = [(event.time - first) / unit_s for event in found]
            axes.plot(
                x, [event.epoch for event in found], color=color, marker=marker, markersize=6, linestyle="", label=label
            )
    axes.set_xlabel(f"Time since the first start, {unit}")
    axes.set_ylabel("Epochs finished")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    add_grid(axes)
    if any(event is not events[0] for event in events):
        _add_legend(figure, num_columns=5)
    return figure


def run_curves(history: History, metric: str, reference: Reference | None) -> list[Curve]:
    """Train and validation curves of a metric, and those of the reference as far as the run goes."""
    epochs = history.column("epoch")
    curves = [
        Curve("train", epochs, history.column(metric), {"color": TRAIN_COLOR}),
        Curve("validation", epochs, history.column(f"val_{metric}"), {"color": VALIDATION_COLOR}),
    ]
    if reference is not None:
        shown = sum(epoch <= len(epochs) for epoch in reference.columns["epoch"])
        for name, column, dashes in (("train", metric, (5, 2)), ("validation", f"val_{metric}", (1, 1.5))):
            look = {"color": REFERENCE_COLOR, "linewidth": 1.0, "linestyle": (0, dashes)}
            values = reference.columns[column][:shown]
            curves.append(Curve(f"{name}, {reference.name}", reference.columns["epoch"][:shown], values, look))
    return curves


def colors_of(count: int) -> list[str]:
    """As many colours that can be told apart: of a palette, or along a scale if they are many."""
    few = [TRAIN_COLOR, VALIDATION_COLOR, THIRD_COLOR, "#CC79A7", "#8A6FD1", "#B8860B", "#4D8FAC", "#A0522D"]
    scale = colormaps["turbo"]
    return few[:count] if count <= len(few) else [to_hex(scale(0.05 + 0.9 * i / (count - 1))) for i in range(count)]


def draw_importances(importances: Mapping[str, float]) -> Figure:
    """A bar for each searched key, the most important on top."""
    figure = create_page_figure(0.7 + 0.34 * len(importances))
    axes = figure.add_subplot()
    names = sorted(importances, key=lambda name: importances[name])
    axes.barh(range(len(names)), [importances[name] for name in names], color=TRAIN_COLOR, height=0.6)
    axes.set_yticks(range(len(names)), [_name(name) for name in names], parse_math=False)
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.set_xlim(0, 1)
    add_grid(axes, "x")
    return figure


def draw_search(values: Sequence[tuple[int, float]]) -> Figure:
    """What each trial reached, by number, and the best so far."""
    numbers, reached = zip(*values, strict=True)
    best = [max(reached[: i + 1]) for i in range(len(reached))]
    figure = create_page_figure(2.7)
    axes = figure.add_subplot()
    axes.plot(numbers, reached, color=TRAIN_COLOR, linestyle="", marker="o", markersize=4, label="trial")
    axes.step(numbers, best, where="post", color=VALIDATION_COLOR, linewidth=1.6, label="best so far")
    axes.set_xlabel("Trial")
    axes.set_ylabel("Validation accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    add_grid(axes)
    _add_legend(figure, num_columns=2)
    return figure


@dataclass(frozen=True)
class Scale:
    """One of several parallel axes."""

    key: str
    values: Sequence[float]
    """One for each line."""
    ends: tuple[float, float]
    is_log: bool = False
    names: Sequence[str] = ()
    """What stands for 0, 1, 2, ..."""

    def place(self, value: float) -> float:
        """From 0 at the lower end to 1 at the upper one."""
        low, high, here = (math.log(x) if self.is_log else x for x in (*self.ends, value))
        return (here - low) / (high - low)


def draw_parallel(scales: Sequence[Scale], results: Sequence[float]) -> Figure:
    """A line for each trial over the axes of the searched keys and the result; the better ones are darker."""
    figure = create_page_figure(3.1)
    axes = figure.add_subplot()
    low, high = min(results), max(results)
    reached = (low, high) if low < high else (low - 0.5, high + 0.5)
    all_scales = [*scales, Scale("validation accuracy", results, reached)]
    for i in sorted(range(len(results)), key=lambda i: results[i]):
        good = all_scales[-1].place(results[i])
        y = [scale.place(scale.values[i]) for scale in all_scales]
        axes.plot(range(len(y)), y, color=TRAIN_COLOR, alpha=0.12 + 0.88 * good**2, linewidth=0.8 + 1.4 * good**2)
    for x, scale in enumerate(all_scales):
        axes.axvline(x, color=MUTED_COLOR, linewidth=0.7)
        ends = scale.ends if not scale.names else range(len(scale.names))
        names = scale.names or [f"{end:.3g}" for end in scale.ends]
        for value, name in zip(ends, names, strict=True) if len(names) <= MAX_LEGEND else ():
            side = "right" if x == len(all_scales) - 1 else "left"
            place = (x + (-0.04 if side == "right" else 0.04), scale.place(value))
            axes.annotate(_name(name), place, ha=side, va="center", fontsize=7.5, color=MUTED_COLOR, parse_math=False)
    # Full keys would overlap; the part behind the dot is what tells them apart.
    labels = [_name(scale.key.rpartition(".")[2].replace("_", "\n")) for scale in all_scales]
    axes.set_xticks(range(len(all_scales)), labels, fontsize=8, parse_math=False)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.margins(x=0.06)
    return figure


def _hide_steep_start(axes: Axes, curves: Sequence[Curve]) -> None:
    points = [(x, y) for curve in curves for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
    if not points:
        return
    steep = steep_epochs(max(x for x, _ in points))
    low = min((y for x, y in points if x > steep), default=0.0)
    high = max(y for _, y in points)
    margin = max(0.05 * (high - low), 0.001)
    axes.set_ylim(low - margin, min(high + margin, 1.0005))


def _unit_of(seconds: float) -> tuple[float, str]:
    units = ((86_400, "days"), (3600, "h"), (60, "min"))
    return next(((size, name) for size, name in units if seconds >= 2 * size), (1, "s"))


def _name(name: str) -> str:
    """Short, and without what tells matplotlib to leave it out of the legend."""
    return shorten_name(printable(name)).lstrip("_") or " "


def _add_legend(figure: Figure, *, num_columns: int) -> None:
    legend = figure.legend(loc="outside lower center", ncols=num_columns, fontsize=9, frameon=False, handlelength=1.6)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a "$" is not a formula
