"""`report.html` of one run: what became of it, its curves, mistakes, times, configuration and machines."""

import io
import shlex
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from hydra.errors import HydraException
from matplotlib.image import imsave
from omegaconf.errors import OmegaConfBaseException

from mnist_dist.base.array import Array
from mnist_dist.base.errors import UserError
from mnist_dist.config.compare import flatten
from mnist_dist.config.compose import compose_config
from mnist_dist.data.splits import SPLIT_NAMES
from mnist_dist.report.charts import Chart, Curve, draw_progress, run_curves
from mnist_dist.report.parts import LOOKS, chart_picture, settings, versions_of
from mnist_dist.results.confusion import MAX_CLASSES_WITH_COUNTS, class_report, draw_confusion_matrix
from mnist_dist.results.page import (
    Column,
    Html,
    build_document,
    code,
    command_line,
    confusion_table,
    facts,
    fold,
    headline,
    picture,
    remark,
    section,
    side_by_side,
    table,
    text,
    thumbnails,
)
from mnist_dist.results.png import TRAIN_COLOR
from mnist_dist.results.predictions import PREDICTIONS, Mistakes, Predictions
from mnist_dist.results.quantities import as_value, counted, moment_text, percent_text, seconds_text
from mnist_dist.results.reference import Reference, load_reference
from mnist_dist.results.svg import to_svg
from mnist_dist.run.events import Event
from mnist_dist.run.incidents import Incident
from mnist_dist.run.record import RunRecord

_NUM_SUREST = 12
_NO_METADATA: dict[str, Any] = {"Software": None}


def build_run_page(record: RunRecord) -> str:
    """The page of a run, finished or not."""
    sections = [
        section(text("Results"), *_results(record), name="results"),
        section(text("Curves"), *_curves(record), name="curves"),
    ]
    if record.results is not None:
        sections.append(section(text("Mistakes"), *_mistakes(record), name="mistakes"))
    sections += [
        section(text("Time"), *_time(record), name="time"),
        section(text("Configuration"), *_configuration(record), name="configuration"),
        section(text("Versions and machines"), *_machines(record), name="machines"),
    ]
    glyph, tone = LOOKS[record.state]
    word = record.state.capitalize()
    label = f"Training run {record.path}"
    header = headline(word, glyph, tone=tone, label=label, sentence=text(_lead(record)))
    footer = text(f"Written {moment_text(time.time())} from the files in {record.path}; python -m mnist_dist.report")
    return build_document(
        f"{word}: {record.path.name}", header=header, sections=sections, footer=footer, has_script=True
    )


def _lead(record: RunRecord) -> str:
    done, asked = len(record.history.epochs), record.num_epochs
    progress = f"{done} of {counted(asked, 'epoch')}" if asked else counted(done, "epoch")
    if record.results:
        test = record.results.test
        return (
            f"{percent_text(test.accuracy)} of {test.num_examples:,} test images are classified correctly "
            f"after {counted(record.results.epochs_completed, 'epoch')}"
            + (f" of {asked}: {record.early_end}." if record.early_end else ".")
        )
    if record.state == "running":
        return f"{progress} so far; this page does not change by itself."
    reason = record.reason[:1].upper() + record.reason[1:]
    return f"{reason.rstrip('.')}. It had finished {progress}."


# Results and curves


def _results(record: RunRecord) -> Iterator[Html]:
    if record.damage:
        yield remark(text(f"Not all files could be used: {record.damage}."), "warn")
    if record.summary and not record.results:
        epochs = counted(record.summary.epochs_completed, "epoch")
        yield remark(text(f"It was finished after {epochs}, and then trained further: summary.json is of that time."))
    summary = record.results
    if summary is None:
        if not record.history.epochs:
            yield remark(text("No epoch was finished."))
            return
        best, last = record.history.best, record.history.epochs[-1]
        yield facts(
            [
                ("Validation accuracy", text(f"{percent_text(last.val_accuracy)} (epoch {last.epoch})")),
                ("Best", text(f"{percent_text(best.val_accuracy)} (epoch {best.epoch})")),
                ("Training accuracy", text(percent_text(last.accuracy))),
            ]
        )
        return
    columns = [
        Column("Split"),
        *(Column(title, "number") for title in ("Accuracy", "Loss", "Correct", "Wrong", "Images")),
    ]
    rows = []
    for name in SPLIT_NAMES:
        split = getattr(summary, name)
        wrong = split.num_examples - split.num_correct
        values = (f"{split.loss:.4f}", f"{split.num_correct:,}", f"{wrong:,}", f"{split.num_examples:,}")
        rows.append([text(name), text(percent_text(split.accuracy)), *map(text, values)])
    yield table(columns, rows)
    yield facts(
        [
            ("Avoidable bias", text(f"{summary.avoidable_bias_percent:.2f} %")),
            ("Variance", text(f"{summary.variance_percent:.2f} %")),
            ("Data set", text(summary.dataset.name)),
            ("Strategy", text(f"{summary.strategy}, {counted(summary.num_replicas, 'replica')}")),
            ("Global batch", text(f"{summary.global_batch_size:,}")),
            ("Precision", text(summary.precision)),
            ("Reproducibility", text(summary.reproducibility)),
            ("Weights (SHA-256)", code(summary.weights_sha256[:16])),
        ]
    )


def _curves(record: RunRecord) -> Iterator[Html]:
    history = record.history
    if not history.epochs:
        yield remark(text("No epoch was finished, so there are no curves."))
        return
    reference, problem = _reference(record)
    if problem:
        yield remark(text(problem), "warn")
    best = history.best
    accuracy = Chart(run_curves(history, "accuracy", reference), "Accuracy", percent=True, hides_steep_start=True)
    rate = Curve("learning rate", history.column("epoch"), history.column("learning_rate"), {"color": TRAIN_COLOR})
    yield remark(
        text(
            f"The best epoch by validation accuracy is {best.epoch}: {percent_text(best.val_accuracy)}, "
            f"loss {best.val_loss:.4f}."
        )
    )
    yield side_by_side(
        [
            chart_picture(accuracy, name="accuracy", caption="Accuracy"),
            chart_picture(
                Chart(run_curves(history, "loss", reference), "Loss"), name="loss", caption="Loss", both_scales=True
            ),
            chart_picture(
                Chart([rate], "Learning rate", from_zero=True),
                name="rate",
                caption="Learning rate, at the end of each epoch",
            ),
        ]
    )


def _reference(record: RunRecord) -> tuple[Reference | None, str]:
    """The curves that the run was compared with, or why they cannot be read."""
    name = flatten(record.config).get("plots.reference")
    try:
        return load_reference(name if isinstance(name, str) else None), ""
    except UserError as error:
        return None, str(error)


# Mistakes


def _mistakes(record: RunRecord) -> Iterator[Html]:
    try:
        predictions = record.load_predictions()
    except ValueError as error:
        yield remark(text(f"{PREDICTIONS} is damaged: {error}."), "warn")
        return
    if predictions is None:
        yield remark(text(f"There is no {PREDICTIONS}; runs of earlier versions did not write it."))
        return
    test, names = predictions.splits["test"].confusion, predictions.class_names
    if len(names) <= MAX_CLASSES_WITH_COUNTS:
        yield side_by_side([confusion_table(names, test), _classes(predictions)])
    else:
        svg = to_svg(
            lambda: draw_confusion_matrix(test, class_names=names, title=""),
            name="confusion-matrix",
            title="Confusion matrix of the test set",
        )
        yield side_by_side(
            [picture(svg, caption="Test set"), fold(text(f"{len(names):,} classes"), _classes(predictions))]
        )
    wrong = predictions.mistakes
    if not len(wrong.example):
        yield remark(text("No test image is classified wrongly."), "good")
        return
    yield remark(
        text("The most frequent mistakes, each with the test images of which the model was surest (its probability):")
    )
    off_diagonal = test * (1 - np.eye(len(names), dtype=test.dtype))
    shown = dict.fromkeys(zip(wrong.label.tolist(), wrong.predicted.tolist(), strict=True))
    pairs = sorted(shown, key=lambda pair: -off_diagonal[pair])[:6]
    yield side_by_side(
        [
            _gallery(
                predictions,
                np.flatnonzero((wrong.label == label) & (wrong.predicted == predicted))[:5],
                f"{names[label]} taken for {names[predicted]}: {counted(int(test[label, predicted]), 'time')}",
                is_pair=True,
            )
            for label, predicted in pairs
        ]
    )
    yield _gallery(
        predictions, np.arange(min(_NUM_SUREST, len(wrong.example))), "Of all mistakes, the surest", is_pair=False
    )


def _gallery(predictions: Predictions, which: Array, caption: str, *, is_pair: bool) -> Html:
    wrong, names = predictions.mistakes, predictions.class_names
    images = []
    for i in which:
        true, answer, percent = names[wrong.label[i]], names[wrong.predicted[i]], f"{100 * wrong.probability[i]:.1f} %"
        label = f"Test image {wrong.example[i]}: a {true}, taken for {answer} with probability {percent}"
        line = percent if is_pair else f"{true} \N{RIGHTWARDS ARROW} {answer}"
        images.append((_png(wrong, int(i)), label, text(line)))
    return thumbnails(images, caption=caption)


def _png(wrong: Mistakes, index: int) -> bytes:
    image, buffer = wrong.images[index], io.BytesIO()
    image = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
    if image.ndim == 3 and image.shape[-1] not in (3, 4):
        image = image.mean(axis=-1)  # channels that no screen has
    imsave(buffer, image, cmap="gray_r", vmin=0, vmax=255, format="png", metadata=_NO_METADATA)
    return buffer.getvalue()


def _classes(predictions: Predictions) -> Html:
    report = class_report(predictions.splits["test"].confusion, class_names=predictions.class_names)
    columns = [Column("Class"), *(Column(title, "number") for title in ("Precision", "Recall", "F1", "Images"))]
    rows = []
    for name, row in report.items():
        scores = (f"{row[key]:.4f}" for key in ("precision", "recall", "f1"))
        rows.append([text(name), *map(text, scores), text(f"{row['support']:,.0f}")])
    return table(columns, rows, caption="Test images by class", sortable=True)


# Time


def _time(record: RunRecord) -> Iterator[Html]:
    history = record.history
    pictures = []
    if history.epochs:
        epochs = history.column("epoch")
        for name, caption, column in (
            ("epoch-time", "Seconds per epoch, with validation", "epoch_s"),
            ("throughput", "Training images per second", "images_per_s"),
        ):
            curve = Curve(caption.partition(",")[0].lower(), epochs, history.column(column), {"color": TRAIN_COLOR})
            pictures.append(chart_picture(Chart([curve], caption.partition(",")[0]), name=name, caption=caption))
    if record.events:
        svg = to_svg(
            lambda: draw_progress(record.events, history, now=time.time()),
            name="progress",
            title="Finished epochs over time, with stops and resumes",
        )
        pictures.append(picture(svg, caption="Progress, stops and resumes"))
    if summary := record.results:
        timing = asdict(summary.timing)
        names = {
            "startup_s": "Start-up",
            "first_epoch_s": "First epoch",
            "median_epoch_s": "Median epoch",
            "total_s": "All, since the last start",
        }
        yield facts([(title, text(seconds_text(timing[key]))) for key, title in names.items()])
    yield side_by_side(pictures)
    if record.incidents:
        yield _incidents(record)
    if record.events:
        yield _sessions(record)
    else:
        yield remark(text("This run has no events.jsonl, so it is unknown when it was started and stopped."))


def _incidents(record: RunRecord) -> Html:
    columns = [
        Column("When"),
        Column("Lost", "prose"),
        Column("Noticed", "prose"),
        Column("At epoch", "number"),
        Column("Epochs computed again", "number"),
        Column("Time lost", "number"),
    ]
    rows = []
    for one in record.incidents:
        values = (moment_text(one.time), _lost(one), one.how, one.epoch, one.epochs_computed_again)
        rows.append([*map(text, values), text(seconds_text(one.seconds_lost))])
    return table(columns, rows, caption="Incidents", stacked=True)


def _lost(incident: Incident) -> str:
    """The machines and ranks that are known to have been lost."""
    ranks = ", ".join(map(str, incident.ranks))
    ranks = f"rank {ranks}" if len(incident.ranks) == 1 else f"ranks {ranks}" if ranks else ""
    hosts = ", ".join(incident.hosts)
    return f"{hosts} ({ranks})" if hosts and ranks else hosts or ranks or "unknown"


def _sessions(record: RunRecord) -> Html:
    columns = [
        *(Column(title) for title in ("Started", "Ended")),
        Column("After epoch", "number"),
        Column("To epoch", "number"),
        Column("Strategy"),
        Column("Hosts"),
        Column("End", "prose"),
    ]
    rows, events = [], record.events
    for number, start in enumerate(events):
        if start.kind != "started":
            continue
        end = events[number + 1] if number + 1 < len(events) else None
        still = record.is_alive and end is None
        word = end.kind if end else "running" if still else record.state
        reason = end.reason if end else "" if still else record.reason
        rows.append(
            [
                text(moment_text(start.time)),
                text(moment_text(end.time) if end else "\N{EN DASH}"),
                text(start.epoch),
                text(end.epoch if end else len(record.history.epochs)),
                text(f"{start.facts.get('strategy', '')} x{start.facts.get('num_replicas', '?')}"),
                text(", ".join(_hosts(start))),
                text(f"{word}: {reason}" if reason else word),
            ]
        )
    return table(columns, rows, caption="Starts", stacked=True)


def _hosts(start: Event) -> list[str]:
    """Each host once, with the number of its processes where they are several."""
    hosts = start.hosts
    return [
        f"{host} ({hosts.count(host)} processes)" if hosts.count(host) > 1 else host for host in dict.fromkeys(hosts)
    ]


# Configuration and machines


def _configuration(record: RunRecord) -> Iterator[Html]:
    values = flatten(record.config)
    if not values:
        yield remark(text("config.yaml is missing or damaged."), "warn")
        return
    defaults = _defaults(values)
    differing = {
        key: value
        for key, value in values.items()
        if key != "run_dir" and as_value(value) != as_value(defaults.get(key, "\N{EN DASH}"))
    }
    if differing:
        rows = [
            [code(key), code(as_value(value)), code(as_value(defaults.get(key, "\N{EN DASH}")))]
            for key, value in differing.items()
        ]
        yield table([Column("Key"), Column("Value"), Column("Default")], rows, caption="What is not the default")
    else:
        yield remark(text("Every value is the default."))
    yield fold(text(f"All {counted(len(values), 'key')}"), settings(values.items()))
    yield remark(text("To train this again, into another folder:"))
    yield command_line(
        f"python -m mnist_dist.train --config-dir {shlex.quote(str(record.path))} --config-name config "
        "run_dir=ANOTHER_FOLDER"
    )


def _defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of all keys; those of a choice are those of the one in `values`, by dotted key."""
    plain = flatten(asdict(compose_config()))
    names = [f"{group}.name" for group in ("augment", "model", "optimizer")]
    try:
        groups = [f"{name.removesuffix('.name')}={values[name]}" for name in names if name in values]
        if "model.factory" in values:  # it has no default
            groups.append(f"model.factory={values['model.factory']}")
        chosen = flatten(asdict(compose_config(*groups)))
    except (HydraException, OmegaConfBaseException, UserError):  # a choice that this version does not have
        chosen = plain
    return {**chosen, **{name: plain[name] for name in names}}


def _machines(record: RunRecord) -> Iterator[Html]:
    yield facts([(name, text(version)) for name, version in versions_of([record]).items()])
    starts = [event for event in record.events if event.kind == "started"]
    if starts:
        last = starts[-1]
        found = last.facts.get("devices")
        devices = found if isinstance(found, list) else []
        yield facts(
            [
                ("Hosts", text(", ".join(_hosts(last)) or "unknown")),
                ("Processes", text(last.facts.get("world_size", "unknown"))),
                ("Devices of rank 0", text(", ".join(map(str, devices)) or "unknown")),
            ]
        )
