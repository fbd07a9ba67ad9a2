"""The loss and accuracy curves of a run, and `plot_run`: all its pictures.

From numbers and names only: no model, no device.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from mnist_dist.results.confusion import plot_confusion_matrix
from mnist_dist.results.history import History, Metric, steep_epochs
from mnist_dist.results.png import (
    REFERENCE_COLOR,
    TRAIN_COLOR,
    VALIDATION_COLOR,
    add_grid,
    create_figure,
    shorten_name,
    to_png,
)
from mnist_dist.results.reference import Reference


@dataclass(frozen=True)
class _Curve:
    """One line of a picture: its legend entry, its points and how it is drawn."""

    label: str
    epochs: tuple[float, ...]
    values: tuple[float, ...]
    line: Mapping[str, Any]


def plot_run(
    history: History,
    confusion: np.ndarray,
    *,
    dataset: str,
    class_names: Sequence[str],
    reference: Reference | None,
) -> Iterator[tuple[str, bytes]]:
    """The pictures of a run, each with its file's name; `confusion` is that of the test set."""
    for metric in get_args(Metric):
        yield f"{metric}.png", plot_curves(history, metric=metric, dataset=dataset, reference=reference)
    picture = plot_confusion_matrix(confusion, dataset=dataset, split="test", class_names=class_names)
    yield "confusion_matrix.png", picture


def plot_curves(history: History, *, metric: Metric, dataset: str, reference: Reference | None) -> bytes:
    """PNG bytes of the train and validation curves of one metric; see `draw_curves`."""
    return to_png(lambda: draw_curves(history, metric=metric, dataset=dataset, reference=reference))


def draw_curves(history: History, *, metric: Metric, dataset: str, reference: Reference | None) -> Figure:
    """The train and validation curves of one metric over the epochs of a run, with the best epoch marked.

    Args:
        history: At least one epoch.
        metric: Which one to draw.
        dataset: Its name, for the title.
        reference: Curves to compare with, or None; drawn as far as the run goes.
    """
    figure = create_figure(10, 6.25)
    axes = figure.add_subplot()
    num_epochs = len(history.epochs)
    curves = _run_curves(history, metric)
    if reference is not None:
        curves += _reference_curves(reference, metric, num_epochs)
    for curve in curves:
        axes.plot(curve.epochs, curve.values, label=curve.label, **curve.line)

    axes.set_title(f"{metric.capitalize()} on {dataset}", loc="left", fontsize=17, pad=30, parse_math=False)
    axes.set_xlabel("Epoch", fontsize=13)
    margin = max(0.5, 0.015 * num_epochs)
    axes.set_xlim(1 - margin, num_epochs + margin)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    if metric == "accuracy":
        _set_accuracy_axis(axes, curves, num_epochs)
    else:
        _set_loss_axis(axes, curves)
    _mark_best_epoch(axes, history, metric)

    axes.tick_params(labelsize=12)
    add_grid(axes)
    # Outside the axes the legend cannot hide a curve, wherever the curves happen to be.
    legend = figure.legend(loc="outside lower center", ncols=2, fontsize=12, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # A "$" in a file's name is not a formula.
    return figure


def _run_curves(history: History, metric: Metric) -> list[_Curve]:
    epochs = tuple(history.column("epoch"))
    # One epoch is a point, which only a marker shows; with many epochs markers would hide the line.
    marker_size = 6 if len(epochs) <= 40 else 0
    # With thousands of epochs the line is so jagged that it must be thin.
    width = 2.0 if len(epochs) <= 400 else 1.0
    train = {"color": TRAIN_COLOR, "marker": "s", "markersize": marker_size, "linewidth": width}
    validation = {**train, "color": VALIDATION_COLOR, "marker": "o"}
    return [
        _Curve("train", epochs, tuple(history.column(metric)), train),
        _Curve("validation", epochs, tuple(history.column(f"val_{metric}")), validation),
    ]


def _reference_curves(reference: Reference, metric: Metric, num_epochs: int) -> list[_Curve]:
    shown = [i for i, epoch in enumerate(reference.columns["epoch"]) if epoch <= num_epochs]
    epochs = tuple(reference.columns["epoch"][i] for i in shown)
    name = shorten_name(reference.name)
    marker_size = 9 if num_epochs <= 40 else 0
    # Above the run's own lines and dot, which would hide it if the run equals its reference.
    line = {"color": REFERENCE_COLOR, "linewidth": 1.0, "zorder": 5, "markersize": marker_size}
    train = {**line, "linestyle": (0, (5, 2)), "marker": "+"}
    validation = {**line, "linestyle": (0, (1, 1.5)), "marker": "x"}
    curves = []
    for label, column, look in (("train", metric, train), ("validation", f"val_{metric}", validation)):
        values = tuple(reference.columns[column][i] for i in shown)
        curves.append(_Curve(f"{label}, {name}", epochs, values, look))
    return curves


def _set_accuracy_axis(axes: Axes, curves: Iterable[_Curve], num_epochs: int) -> None:
    """Percent, over the range of the accuracies after the first steep epochs."""
    points = [point for curve in curves for point in zip(curve.epochs, curve.values, strict=True)]
    num_steep = steep_epochs(num_epochs)
    low = min(value for epoch, value in points if epoch > num_steep)
    high = max(value for _, value in points)
    margin = max(0.05 * (high - low), 0.001)
    axes.set_ylim(low - margin, high + margin)
    ticks = MaxNLocator(nbins=11, steps=[1, 2, 2.5, 5, 10]).tick_values(low - margin, high + margin)
    # The margin makes room for the line's width; the axis must not show an accuracy of 101%.
    axes.set_yticks([tick for tick in ticks if max(0, low - margin) <= tick <= min(1 + 1e-9, high + margin)])
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    axes.set_ylabel("Accuracy", fontsize=13)
    lowest = min(value for _, value in points)
    if lowest < low - margin:
        axes.set_xlabel(f"Epoch (the axis is cut: the lowest accuracy is {lowest:.1%})", fontsize=13)


def _set_loss_axis(axes: Axes, curves: Iterable[_Curve]) -> None:
    """Logarithmic if the losses span a factor of ten or more, which keeps late epochs apart."""
    values = [value for curve in curves for value in curve.values]
    axes.set_ylabel("Loss", fontsize=13)
    if min(values) <= 0 or max(values) < 10 * min(values):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel("Loss (log scale)", fontsize=13)


def _mark_best_epoch(axes: Axes, history: History, metric: Metric) -> None:
    """A dot, and a line up to the best epoch's number and value."""
    best = history.best
    value = best.val_accuracy if metric == "accuracy" else best.val_loss
    axes.axvline(best.epoch, color=VALIDATION_COLOR, linewidth=1.0, linestyle=":", zorder=1)
    axes.scatter(best.epoch, value, s=90, color=VALIDATION_COLOR, edgecolors="black", zorder=4)
    text = f"best epoch {best.epoch}: validation accuracy {best.val_accuracy:.2%}"
    if metric == "loss":
        text += f", loss {value:.4f}"
    # Above the axes, where no curve can be; it grows away from the nearer edge of the picture.
    position = best.epoch / (len(history.epochs) + 1)
    axes.annotate(
        text,
        xy=(best.epoch, 1),
        xycoords=axes.get_xaxis_transform(),
        xytext=(0, 5),
        textcoords="offset points",
        ha="left" if position < 0.35 else "right" if position > 0.65 else "center",
        fontsize=12,
        color="#A04000",
    )
