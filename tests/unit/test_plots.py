"""Plots: the labels and markers a reader needs, and the resulting picture."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from mnist_dist.base.errors import UserError
from mnist_dist.results.confusion import draw_confusion_matrix, plot_confusion_matrix
from mnist_dist.results.curves import Metric, draw_curves, plot_curves
from mnist_dist.results.history import EpochMetrics, History, to_csv
from mnist_dist.results.png import DPI, MAX_NAME_LENGTH, TRAIN_COLOR, VALIDATION_COLOR
from mnist_dist.results.reference import REFERENCE_COLUMNS, Reference, load_reference

HEADER = "epoch,loss,accuracy,val_loss,val_accuracy\n"


def create_history(val_accuracies: Sequence[float]) -> History:
    rows = [
        EpochMetrics(i, 1 / i, 1 - 0.5 / i, 2 / i, val_accuracy, 1e-3, 1.0, 1.0)
        for i, val_accuracy in enumerate(val_accuracies, start=1)
    ]
    return History(tuple(rows))


def create_original_history(num_epochs: int) -> History:
    """The original run, with its last epoch repeated if more are asked for."""
    original = load_reference("original")
    assert original is not None
    rows = []
    for i in range(num_epochs):
        values = (original.columns[name][min(i, 149)] for name in REFERENCE_COLUMNS[1:])
        rows.append(EpochMetrics(i + 1, *values, 1e-3, 1.0, 1.0))
    return History(tuple(rows))


def decode(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"))


def get_legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def get_texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


# Reference curves


def test_no_reference() -> None:
    assert load_reference(None) is None


def test_the_original_run_as_a_reference() -> None:
    original = load_reference("original")
    assert original is not None
    assert original.name == "original run"
    assert load_reference("seed") == original  # its earlier name
    assert original.columns["epoch"] == tuple(range(1, 151))
    assert (original.columns["val_loss"][-1], original.columns["val_accuracy"][-1]) == (0.0771, 0.9843)
    assert (original.columns["loss"][0], original.columns["accuracy"][0]) == (0.7091, 0.7776)
    assert sum(original.columns["val_accuracy"][-20:]) / 20 == pytest.approx(0.9837, abs=5e-5)
    assert max(original.columns["val_accuracy"][:10]) < 0.98 <= original.columns["val_accuracy"][10]


def test_history_of_a_run_is_a_reference(tmp_path: Path) -> None:
    path = tmp_path / "run_a" / "history.csv"
    path.parent.mkdir()
    history = create_history([0.5, 0.75])
    path.write_text(to_csv(history))
    reference = load_reference(str(path))
    assert reference is not None
    assert reference.name == "run_a/history.csv"
    assert set(reference.columns) == set(REFERENCE_COLUMNS)
    assert reference.columns["val_accuracy"] == (0.5, 0.75)
    assert reference.columns["loss"] == (1.0, 0.5)


def test_reference_from_a_spreadsheet(tmp_path: Path) -> None:
    """Byte-order mark, CRLF, spaces after commas, other order, extra columns, quotes."""
    path = tmp_path / "sheet.csv"
    path.write_bytes(
        b"\xef\xbb\xbfval_accuracy, epoch, note, loss, accuracy, val_loss\r\n"
        b'0.5, 1, "a, b", 0.3, 0.4, 0.2\r\n\r\n0.6, 2, , 1e-2, 1, 0\r\n'
    )
    reference = load_reference(str(path))
    assert reference is not None
    assert reference.columns["epoch"] == (1.0, 2.0)
    assert reference.columns["loss"] == (0.3, 0.01)
    assert reference.columns["val_accuracy"] == (0.5, 0.6)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (HEADER.encode(), "has a header but no epochs"),
        (b"epoch,loss,accuracy\n1,2,0.3\n", "has no column val_loss, val_accuracy"),
        (HEADER.replace(",", ";").encode(), "has no column epoch, loss, accuracy, val_loss, val_accuracy"),
        (HEADER.encode() + b"1,0.3,0.4,0.2,0.5\n2,bad,0.4,0.2,0.5\n", "line 3 has loss='bad'; write a number"),
        (HEADER.encode() + b"1,0.3,0.4\n", "line 2 has val_loss=None; write a number"),
        (HEADER.encode() + b"1,0.3,,0.2,0.5\n", "line 2 has accuracy=''; write a number"),
        (HEADER.encode() + b"1,nan,0.4,0.2,0.5\n", "line 2 has loss='nan'; write a number"),
        (HEADER.encode() + b"1,0.3,0.4,0.2,98.5\n", "line 2 has val_accuracy=98.5; write accuracies as fractions"),
        (HEADER.encode() + b"0,0.3,0.4,0.2,0.5\n", "epochs that do not count upwards"),
        (HEADER.encode() + b"2,0.3,0.4,0.2,0.5\n2,0.3,0.4,0.2,0.5\n", "epochs that do not count upwards"),
        (HEADER.encode() + b'1,0.3,0.4,0.2,"0.5\n', "unexpected end of data"),
        (b"\xff\xfe\x00\x01", "is not a text file"),
    ],
)
def test_bad_reference_is_one_clear_line(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "mine.csv"
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        load_reference(str(path))
    message = str(raised.value)
    assert problem in message
    assert message.startswith(f"plots.reference={path} ")
    assert "plots.reference=null" in message
    assert "\n" not in message


def test_missing_reference_and_folder_as_reference(tmp_path: Path) -> None:
    for path in (tmp_path / "no.csv", tmp_path):
        with pytest.raises(UserError, match=r"^plots\.reference=.* cannot be read \(.+\); check the path"):
            load_reference(str(path))


# Curves


@pytest.mark.parametrize("num_epochs", [1, 3, 150, 3000])
@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_curves_are_a_png_of_report_size(num_epochs: int, metric: Metric) -> None:
    png = plot_curves(
        create_original_history(num_epochs), metric=metric, dataset="mnist", reference=load_reference("original")
    )
    pixels = decode(png)
    assert pixels.shape == (1000, 1600, 3)
    for color in (TRAIN_COLOR, VALIDATION_COLOR):
        rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        # More than the legend's two lines: the markers and curves in the axes themselves.
        assert np.all(pixels[:850] == rgb, axis=-1).sum() > 50, f"{color} is not in the picture"


@pytest.mark.parametrize(("metric", "label"), [("loss", "Loss"), ("accuracy", "Accuracy")])
def test_curves_say_what_they_show(metric: Metric, label: str) -> None:
    figure = draw_curves(create_history([0.5, 0.6]), metric=metric, dataset="mnist", reference=None)
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == f"{label} on mnist"
    assert axes.get_xlabel() == "Epoch"
    assert axes.get_ylabel() == label
    assert get_legend(figure) == ["train", "validation"]


def test_curves_hold_the_numbers_of_the_history() -> None:
    history = create_history([0.5, 0.6, 0.4])
    for metric in ("loss", "accuracy"):
        figure = draw_curves(history, metric=metric, dataset="mnist", reference=None)
        lines = {line.get_label(): line for line in figure.axes[0].lines}
        for label, column in (("train", metric), ("validation", f"val_{metric}")):
            assert list(lines[label].get_xdata()) == [1, 2, 3]
            assert list(lines[label].get_ydata()) == history.column(column)


def test_best_epoch_is_marked_with_number_and_value() -> None:
    history = create_history([0.5, 0.875, 0.875, 0.6])
    accuracy = draw_curves(history, metric="accuracy", dataset="mnist", reference=None)
    assert get_texts(accuracy) == ["best epoch 2: validation accuracy 87.50%"]
    assert accuracy.axes[0].collections[0].get_offsets().tolist() == [[2, 0.875]]
    loss = draw_curves(history, metric="loss", dataset="mnist", reference=None)
    assert get_texts(loss) == ["best epoch 2: validation accuracy 87.50%, loss 1.0000"]
    assert loss.axes[0].collections[0].get_offsets().tolist() == [[2, 1.0]]


@pytest.mark.parametrize("best", [1, 2, 20, 39, 40])
def test_annotation_is_above_the_axes_and_inside_the_picture(best: int) -> None:
    history = create_history([0.9 if epoch == best else 0.5 for epoch in range(1, 41)])
    figure = draw_curves(history, metric="loss", dataset="mnist", reference=load_reference("original"))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    frame = axes.get_window_extent()
    text = axes.texts[0].get_window_extent()
    assert text.y0 > frame.y1, "the text covers the curves"
    assert not text.overlaps(axes.title.get_window_extent())
    assert text.x0 > 0
    assert text.x1 < figure.bbox.x1
    assert frame.width > 0.85 * figure.bbox.width, "the text squeezes the axes"
    assert figure.legends[0].get_window_extent().y1 < axes.xaxis.label.get_window_extent().y0


def test_one_epoch_shows_markers_and_one_tick() -> None:
    figure = draw_curves(create_history([0.5]), metric="accuracy", dataset="mnist", reference=None)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]
    assert all(line.get_markersize() > 0 for line in axes.lines[:2])


def test_reference_has_its_own_curves_and_legend_entries() -> None:
    history = create_original_history(3)
    original = load_reference("original")
    assert original is not None
    figure = draw_curves(history, metric="loss", dataset="mnist", reference=original)
    assert get_legend(figure) == ["train", "validation", "train, original run", "validation, original run"]
    line = next(line for line in figure.axes[0].lines if line.get_label() == "validation, original run")
    assert list(line.get_ydata()) == list(original.columns["val_loss"][:3]), "drawn as far as the run goes"
    with_reference = plot_curves(history, metric="loss", dataset="mnist", reference=original)
    without = plot_curves(history, metric="loss", dataset="mnist", reference=None)
    assert (decode(with_reference) != decode(without)).any()


def test_short_reference_and_odd_names() -> None:
    columns = dict.fromkeys(REFERENCE_COLUMNS, (0.5,)) | {"epoch": (2.0,)}
    reference = Reference("$^$" + "x" * 100 + "/history.csv", columns)
    figure = draw_curves(create_history([0.5]), metric="accuracy", dataset="a $^$", reference=reference)
    figure.draw_without_rendering()
    entry = get_legend(figure)[2]
    assert entry.startswith("train, $^$xx")
    assert entry.endswith("history.csv")
    assert len(entry) <= len("train, ") + MAX_NAME_LENGTH
    assert figure.axes[0].get_title(loc="left") == "Accuracy on a $^$"


def test_accuracy_axis_keeps_the_late_epochs_apart() -> None:
    figure = draw_curves(create_original_history(150), metric="accuracy", dataset="mnist", reference=None)
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    assert 0.93 < low < 0.97
    assert high > 0.9965
    assert "the lowest accuracy is 77.8%" in axes.get_xlabel(), "a cut axis must say so"
    figure.draw_without_rendering()
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(labels) >= 4
    assert all(label.endswith("%") for label in labels)


def test_accuracy_axis_shows_a_late_collapse_and_a_short_run_in_full() -> None:
    collapse = create_history([0.9] * 100 + [0.1])
    assert draw_curves(collapse, metric="accuracy", dataset="mnist", reference=None).axes[0].get_ylim()[0] < 0.1
    short = draw_curves(create_original_history(3), metric="accuracy", dataset="mnist", reference=None).axes[0]
    assert short.get_ylim()[0] < 0.7776
    assert short.get_xlabel() == "Epoch"


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_accuracy_ticks_stay_between_0_and_100_percent(value: float) -> None:
    history = History(tuple(EpochMetrics(i, 1.0, value, 1.0, value, 1e-3, 1.0, 1.0) for i in (1, 2)))
    axes = draw_curves(history, metric="accuracy", dataset="mnist", reference=None).axes[0]
    ticks = axes.get_yticks()
    assert len(ticks) >= 1
    assert min(ticks) >= 0
    assert max(ticks) <= 1 + 1e-9


def test_loss_axis_is_logarithmic_only_when_that_helps() -> None:
    def get_scale(losses: Sequence[float]) -> str:
        rows = [EpochMetrics(i, x, 0.5, x, 0.5, 1e-3, 1.0, 1.0) for i, x in enumerate(losses, start=1)]
        figure = draw_curves(History(tuple(rows)), metric="loss", dataset="mnist", reference=None)
        figure.draw_without_rendering()
        return figure.axes[0].get_yscale()

    assert get_scale([0.7, 0.1, 0.01]) == "log"
    assert get_scale([0.7, 0.5]) == "linear"
    assert get_scale([0.7, 0.0]) == "linear", "zero has no logarithm"


def test_same_input_gives_same_bytes_whatever_the_user_configured() -> None:
    history = create_original_history(10)

    def plot() -> bytes:
        return plot_curves(history, metric="loss", dataset="mnist", reference=None)

    first = plot()
    settings = {"axes.facecolor": "black", "font.size": 30, "savefig.dpi": 40, "savefig.bbox": "tight"}
    with matplotlib.rc_context(settings):
        assert plot() == first
        assert matplotlib.rcParams["font.size"] == 30, "the caller's settings are left alone"
    assert b"Software" not in first
    assert b"matplotlib" not in first.lower()


# Confusion matrix


def create_matrix(num_classes: int) -> np.ndarray:
    """Shape (n, n): 100 correct each, and class 0 taken for class 1 seven times."""
    matrix = np.diag(np.full(num_classes, 100))
    matrix[0, 1] = 7
    return matrix


@pytest.mark.parametrize("num_classes", [2, 10, 26, 50])
def test_confusion_matrix_is_a_png_of_report_size(num_classes: int) -> None:
    names = [str(i) for i in range(num_classes)]
    png = plot_confusion_matrix(create_matrix(num_classes), dataset="mnist", split="test", class_names=names)
    height, width, _ = decode(png).shape
    assert 1000 <= height <= 2200
    assert 1200 <= width <= 2500
    assert png == plot_confusion_matrix(create_matrix(num_classes), dataset="mnist", split="test", class_names=names)


def test_confusion_matrix_has_true_rows_predicted_columns_and_no_zeros() -> None:
    figure = draw_confusion_matrix(create_matrix(3), class_names=["a", "b", "$^$"], title="Test $^$")
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert axes.get_title() == "Test $^$"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Predicted class", "True class")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "$^$"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "$^$"]
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    # A position is (x, y): x is the predicted class, y the true class.
    assert texts == {(0, 0): "100", (1, 0): "7", (1, 1): "100", (2, 2): "100"}
    shares = axes.images[0].get_array()
    assert shares[0, :2].tolist() == pytest.approx([100 / 107, 7 / 107]), "shares of the true class"
    assert shares.mask[1, 0], "zero cells stay blank"


def test_confusion_matrix_with_a_class_without_examples() -> None:
    matrix = create_matrix(3)
    matrix[2] = 0
    with np.errstate(all="raise"):
        figure = draw_confusion_matrix(matrix, class_names=["a", "b", "c"], title="")
    assert figure.axes[0].images[0].get_array().mask[2].all()


def test_counts_are_left_out_where_they_would_not_be_readable() -> None:
    for num_classes, is_counted in ((20, True), (21, False)):
        names = [str(i) for i in range(num_classes)]
        figure = draw_confusion_matrix(create_matrix(num_classes), class_names=names, title="")
        assert bool(figure.axes[0].texts) is is_counted


@pytest.mark.parametrize(("num_classes", "count"), [(2, 7), (10, 60000), (20, 10000), (20, 1234567)])
def test_counts_fit_into_their_cells(num_classes: int, count: int) -> None:
    matrix = np.full((num_classes, num_classes), count)
    names = [f"a rather long-winded name of class {i}" for i in range(num_classes)]
    figure = draw_confusion_matrix(matrix, class_names=names, title="")
    figure.draw_without_rendering()
    axes = figure.axes[0]
    width = axes.get_window_extent().width
    assert width > 5.5 * DPI, "long names squeeze the cells"
    assert max(text.get_window_extent().width for text in axes.texts) < 0.95 * width / num_classes


@pytest.mark.parametrize(
    "names",
    [
        [str(i) for i in range(10)],
        [f"class {i}" for i in range(26)],
        ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot"],
        [f"very long name that never seems to end {i}" for i in range(50)],
        [f"{i}" for i in range(150)],
    ],
)
def test_class_names_do_not_overlap(names: list[str]) -> None:
    figure = draw_confusion_matrix(create_matrix(len(names)), class_names=names, title="")
    figure.draw_without_rendering()
    axes = figure.axes[0]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        boxes = [label.get_window_extent() for label in labels]
        assert not any(boxes[i].overlaps(boxes[i + 1]) for i in range(len(boxes) - 1))
        assert all(box.x0 >= 0 and box.y0 >= 0 for box in boxes)


def test_confusion_matrix_with_the_wrong_number_of_names_is_a_bug() -> None:
    with pytest.raises(AssertionError, match=r"\(3, 3\) for 2 class names"):
        draw_confusion_matrix(create_matrix(3), class_names=["a", "b"], title="")
