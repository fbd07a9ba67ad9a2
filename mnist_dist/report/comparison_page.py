"""The page that compares several runs."""

import time
from collections.abc import Iterator
from pathlib import Path

from mnist_dist.report.charts import MAX_LEGEND, Chart, Curve, colors_of
from mnist_dist.report.comparison import CONFIDENCE, Comparison
from mnist_dist.report.parts import chart_picture, linked, or_dash, state_badge
from mnist_dist.results.page import (
    Column,
    Html,
    build_document,
    code,
    fold,
    headline,
    remark,
    section,
    side_by_side,
    table,
    text,
)
from mnist_dist.results.quantities import counted, moment_text, percent_text
from mnist_dist.run.folder import REPORT_PAGE

MAX_OPEN_ROWS = 12


def build_comparison_page(comparison: Comparison, *, output: Path) -> str:
    """The page, which will be written to `output`: its links to the runs' own pages begin there."""
    sections = [
        section(text("Runs"), *_runs(comparison, output), name="runs"),
        section(text("Curves"), *_curves(comparison), name="curves"),
        section(text("Groups"), *_groups(comparison), name="groups"),
        section(text("On the same test images"), *_mcnemar(comparison), name="mcnemar"),
    ]
    title = counted(len(comparison.records), "run")
    header = headline(
        title, "\N{APPROXIMATELY EQUAL TO}", tone="info", label="Comparison", sentence=text(_lead(comparison))
    )
    footer = text(f"Written {moment_text(time.time())}; python -m mnist_dist.report")
    return build_document(f"Comparison of {title}", header=header, sections=sections, footer=footer, has_script=True)


def _lead(comparison: Comparison) -> str:
    finished = [
        (record.results.test.accuracy, name)
        for record, name in zip(comparison.records, comparison.names, strict=True)
        if record.results
    ]
    if not finished:
        return "None of them is finished."
    accuracy, name = max(finished)
    best = f"The best on the test set is {name} with {percent_text(accuracy)}."
    if len(comparison.records) == 2:
        return f"{best} Bit-identical {_identical(comparison, 1)}."
    return best


def _identical(comparison: Comparison, index: int) -> str:
    """In which epochs a run's weights are those of the first one, in words."""
    epochs = comparison.identical_epochs(index)
    if epochs is None:
        return "unknown"
    lengths = [len(comparison.records[i].history.epochs) for i in (0, index)]
    if epochs == min(lengths):
        return f"in all {epochs} epochs" + (" that both have" if len(set(lengths)) > 1 else "")
    return f"up to epoch {epochs}" if epochs else "in no epoch"


def _runs(comparison: Comparison, output: Path) -> Iterator[Html]:
    columns = [
        Column("Run"),
        Column("State"),
        *(Column(title, "number") for title in ("Test accuracy", "Validation accuracy", "Best validation accuracy")),
        *(Column(title, "number") for title in ("Epochs", "Median epoch, s")),
        *(Column(key, "code") for key in comparison.keys),
        Column("Weights", "code"),
        Column(f"Bit-identical with {comparison.names[0]}"),
    ]
    order = sorted(
        range(len(comparison.records)),
        key=lambda i: -summary.test.accuracy if (summary := comparison.records[i].results) else 1,
    )
    rows = []
    for i in order:
        record, summary, history = (one := comparison.records[i]), one.results, one.history
        last = history.epochs[-1].val_accuracy if history.epochs else None
        rows.append(
            [
                linked(comparison.names[i], record.path / REPORT_PAGE, output=output),
                state_badge(record),
                or_dash(summary.test.accuracy if summary else None, "{:.4f}"),
                or_dash(summary.val.accuracy if summary else last, "{:.4f}"),
                or_dash(history.best.val_accuracy if history.epochs else None, "{:.4f}"),
                text(len(history.epochs)),
                or_dash(summary.timing.median_epoch_s if summary else None, "{:.3f}"),
                *(code(comparison.differing[i][key]) for key in comparison.keys),
                code(summary.weights_sha256[:12] if summary else "\N{EN DASH}"),
                text("\N{EN DASH}" if i == 0 else _identical(comparison, i)),
            ]
        )
    yield table(columns, rows, sortable=True)
    same = (
        "Everything else in their configurations is the same."
        if comparison.keys
        else "Their configurations are the same."
    )
    yield remark(text(f"A click on a title sorts. {same}"))


def _curves(comparison: Comparison) -> Iterator[Html]:
    shown = [
        (record, name)
        for record, name in zip(comparison.records, comparison.names, strict=True)
        if record.history.epochs
    ]
    if not shown:
        yield remark(text("None of them has finished an epoch."))
        return
    colors = colors_of(len(shown))

    def chart(column: str, label: str, *, percent: bool = False) -> Chart:
        curves = [
            Curve(name, record.history.column("epoch"), record.history.column(column), {"color": color})
            for (record, name), color in zip(shown, colors, strict=True)
        ]
        return Chart(curves, label, percent=percent, hides_steep_start=percent)

    validation = chart("val_accuracy", "Validation accuracy", percent=True)
    training = chart("accuracy", "Training accuracy", percent=True)
    yield side_by_side(
        [
            chart_picture(validation, name="val-accuracy", caption="Validation accuracy"),
            chart_picture(
                chart("val_loss", "Validation loss"), name="val-loss", caption="Validation loss", both_scales=True
            ),
            chart_picture(training, name="accuracy", caption="Training accuracy"),
            chart_picture(chart("loss", "Training loss"), name="loss", caption="Training loss", both_scales=True),
        ]
    )
    if len(shown) > MAX_LEGEND:
        yield remark(text("Point at a curve to see which run it is."))


def _groups(comparison: Comparison) -> Iterator[Html]:
    groups = comparison.groups()
    if not groups:
        yield remark(text("None of them is finished."))
        return
    keys = tuple(groups[0].settings)
    columns = [
        *(Column(key, "code") for key in keys),
        *(
            Column(title, "number")
            for title in ("Seeds", "Test accuracy, mean", f"\N{PLUS-MINUS SIGN} ({100 * CONFIDENCE:.0f} %)")
        ),
        *(Column(title, "number") for title in ("Lowest", "Highest")),
    ]
    rows = [
        [
            *(code(group.settings[key]) for key in keys),
            text(len(group.accuracies)),
            text(f"{group.mean:.4f}"),
            or_dash(group.half_width, "{:.4f}"),
            text(f"{min(group.accuracies):.4f}"),
            text(f"{max(group.accuracies):.4f}"),
        ]
        for group in groups
    ]
    yield remark(text("Finished runs that differ in nothing but their seed, with the confidence interval of the mean."))
    yield table(columns, rows, sortable=True)


def _mcnemar(comparison: Comparison) -> Iterator[Html]:
    first = comparison.names[0]
    rows = []
    for i, name in enumerate(comparison.names[1:], start=1):
        if (test := comparison.mcnemar(i)) is not None:
            rows.append([text(name), text(test.only_first), text(test.only_second), text(f"{test.p:.2g}")])
    if not rows:
        yield remark(text("No two of them are finished, with the same test images and predictions.npz."))
        return
    columns = [
        Column("Run"),
        *(Column(title, "number") for title in (f"Only {first} is right", "Only this run is right", "p")),
    ]
    yield remark(
        text(
            f"Each run against {first}, image by image: McNemar's exact test. A small p says that the difference is "
            "unlikely to be chance on these images; it says nothing about other seeds."
        )
    )
    shown = table(columns, rows, sortable=True)
    yield shown if len(rows) <= MAX_OPEN_ROWS else fold(text(counted(len(rows), "run")), shown)
