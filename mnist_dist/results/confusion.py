"""The picture of a confusion matrix and what it says of each class, from numbers and names only: no model."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from mnist_dist.results.png import GRID_COLOR, create_figure, shorten_name, to_png

MAX_CLASSES_WITH_COUNTS = 20
MAX_CLASS_LABELS = 60


def plot_confusion_matrix(matrix: np.ndarray, *, dataset: str, split: str, class_names: Sequence[str]) -> bytes:
    """PNG bytes of a split's confusion matrix, with the accuracy in its title; see `draw_confusion_matrix`."""
    title = f"{dataset}, {split} set: {np.trace(matrix) / matrix.sum():.2%} correct"
    return to_png(lambda: draw_confusion_matrix(matrix, class_names=class_names, title=title))


def draw_confusion_matrix(matrix: np.ndarray, *, class_names: Sequence[str], title: str) -> Figure:
    """Counts as text, on a colour that shows their share of the class's examples.

    Args:
        matrix: Counts of shape (n, n); `matrix[i, j]` examples of class i were predicted as class j.
        class_names: n names, in the order of the rows.
        title: Stands above the picture.
    """
    num_classes = len(class_names)
    assert matrix.shape == (num_classes, num_classes), f"{matrix.shape} for {num_classes} class names"
    # A class may have no examples; its row then stays blank.
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    # Room for the names is added to that for the cells, which long names would squeeze otherwise.
    side = min(max(6.5, 0.19 * num_classes), 12.0)
    names_room = max(0.085 * len(shorten_name(name)) for name in class_names)
    figure = create_figure(side + names_room + 2.5, side + names_room + 1.25)
    axes = figure.add_subplot()
    # On a linear scale an error of 1% would look like none; the square root lifts small shares.
    norm = PowerNorm(gamma=0.5, vmin=0, vmax=1)
    cells = np.ma.masked_equal(shares, 0)
    image = axes.imshow(cells, cmap=colormaps["Blues"].with_extremes(bad="white"), norm=norm)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1])
    bar.ax.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    bar.set_label("Share of the true class", fontsize=12)
    axes.set_title(title, fontsize=15, pad=12, parse_math=False)
    axes.set_xlabel("Predicted class", fontsize=13)
    axes.set_ylabel("True class", fontsize=13)
    _label_classes(axes, class_names)
    if num_classes <= MAX_CLASSES_WITH_COUNTS:
        _write_counts(axes, matrix, dark=norm(shares) > 0.6)
    return figure


def _label_classes(axes: Axes, class_names: Sequence[str]) -> None:
    num_classes = len(class_names)
    positions = range(0, num_classes, math.ceil(num_classes / MAX_CLASS_LABELS))
    names = [shorten_name(class_names[i]) for i in positions]
    size = 12 if num_classes <= 12 else 10 if num_classes <= 30 else 7
    # Side by side there is room for a digit or a word; longer names stand upright.
    room = 80 / num_classes
    rotation = 90 if max(len(name) for name in names) > room else 0
    axes.set_xticks(positions, names, rotation=rotation, fontsize=size, parse_math=False)
    axes.set_yticks(positions, names, fontsize=size, parse_math=False)
    axes.tick_params(length=0)
    if num_classes > MAX_CLASS_LABELS:
        return
    # Lines between the cells, not through them.
    axes.set_xticks(np.arange(num_classes - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(num_classes - 1) + 0.5, minor=True)
    axes.grid(which="minor", color=GRID_COLOR, linewidth=0.6)
    axes.tick_params(which="minor", length=0)


def _write_counts(axes: Axes, matrix: np.ndarray, *, dark: np.ndarray) -> None:
    """Write the counts, shape (n, n), into all cells except zeros; white where `dark` (same shape)."""
    # Cells are about 490 points divided by n wide, a digit 0.65 of the font size: the longest count must fit.
    num_digits = max(len(str(int(matrix.max()))), 3)
    size = min(14.0, 490 / len(matrix) * 0.8 / (0.65 * num_digits))
    for i, j in np.argwhere(matrix):
        color = "white" if dark[i, j] else "black"
        axes.text(j, i, f"{int(matrix[i, j])}", ha="center", va="center", fontsize=size, color=color)


def class_report(confusion: npt.NDArray[np.int64], *, class_names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 score and support (examples) of each class, by scikit-learn.

    `confusion` has the shape (num_classes, num_classes); [i, j] counts examples of class i predicted as class j. A
    class that was never predicted has precision 0.
    """
    from sklearn.metrics import precision_recall_fscore_support

    # The scores depend on the confusion matrix only, so examples are made up from it.
    actual, predicted = (np.repeat(side, confusion.reshape(-1)) for side in np.indices(confusion.shape).reshape(2, -1))
    columns = precision_recall_fscore_support(actual, predicted, labels=range(len(class_names)), zero_division=0)
    keys = ("precision", "recall", "f1", "support")
    return {
        name: dict(zip(keys, (column[index].item() for column in columns), strict=True))
        for index, name in enumerate(class_names)
    }
