"""Pages of runs and of comparisons, from records without files: well-formed, and not to be broken by any text."""

import dataclasses
import math
import os
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from mnist_dist.launch.losses import Loss
from mnist_dist.report.comparison import Comparison
from mnist_dist.report.comparison_page import build_comparison_page
from mnist_dist.report.run_page import _defaults, build_run_page
from mnist_dist.results.history import EpochMetrics, History
from mnist_dist.results.page import printable
from mnist_dist.results.predictions import Mistakes, Predictions, SplitPredictions
from mnist_dist.results.sums import SplitMetrics
from mnist_dist.run.events import Event
from mnist_dist.run.incidents import Incident
from mnist_dist.run.record import RunRecord
from mnist_dist.run.summary import DatasetSummary, Summary, Timing

HOSTILE = "</title></style><script>alert('a')</script>]]>\"&amp;\x00\x1b[31m\ud800\u202e$x_{$"


def create_history(epochs: int = 12, **changes) -> History:
    rows = [
        EpochMetrics(i, 1 / i, 1 - 0.5 / i, 1.1 / i, 1 - 0.6 / i, 1e-3, 0.5, 9e4, "a" * 64)
        for i in range(1, epochs + 1)
    ]
    return History(tuple(dataclasses.replace(row, **changes) for row in rows))


def create_predictions(num_classes: int = 3, shape: tuple[int, ...] = (8, 8), name: str = "class") -> Predictions:
    generator = np.random.default_rng(1)
    confusion = generator.integers(1, 9, size=(num_classes, num_classes)) + 90 * np.eye(num_classes, dtype=int)
    correct = np.arange(confusion.sum()) < np.trace(confusion)
    label = np.arange(7) % num_classes
    mistakes = Mistakes(
        images=generator.integers(256, size=(7, *shape)).astype(np.uint8),
        example=np.arange(7),
        label=label,
        predicted=(label + 1) % num_classes,
        probability=np.linspace(1, 0.4, 7, dtype=np.float32),
    )
    names = tuple(f"{name}{i}" for i in range(num_classes))
    return Predictions(names, {"test": SplitPredictions(confusion, correct)}, mistakes)


def create_record(**changes) -> RunRecord:
    facts = {"strategy": "single", "num_replicas": 1, "world_size": 1, "hosts": ["here", "here"], "devices": ["CPU:0"]}
    events = (
        Event(kind="started", time=1.8e9, epoch=0, facts=facts),
        Event(kind="lost", time=1.8e9 + 100, epoch=7),
        Event(kind="started", time=1.8e9 + 300, epoch=6, facts=facts),
        Event(kind="failed", time=1.8e9 + 400, epoch=12, reason="no more disk", error="TrainingFailed"),
    )
    record = RunRecord(
        path=Path("runs/one"),
        config={"seed": 3, "optimizer": {"name": "sgd"}, "trainer": {"epochs": 40}, "plots": {"reference": "original"}},
        history=create_history(),
        summary=None,
        events=events,
        is_alive=False,
        damage="",
    )
    return dataclasses.replace(record, **changes)


_SPLIT = SplitMetrics(0.1, 0.9, 90, 100)
SUMMARY = Summary(
    status="finished", dataset=DatasetSummary("npz", "ab", 100, 100, 100), strategy="single", world_size=1,
    num_replicas=1, global_batch_size=1, per_replica_batch_size=1, precision="float32", seed=0, epochs_completed=12,
    train=_SPLIT, val=_SPLIT, test=_SPLIT, avoidable_bias_percent=0.0, variance_percent=0.0, weights_sha256="c" * 64,
    timing=Timing(1.0, 1.0, 1.0, 1.0), resumed_from_epochs=(), versions={},
)  # fmt: skip

STRANGE = {
    "failed": {},
    "no epochs": {"history": History()},
    "one epoch": {"history": create_history(1)},
    "many epochs": {"history": create_history(3000)},
    "no numbers": {
        "history": create_history(val_loss=math.nan, val_accuracy=math.nan, accuracy=math.nan, loss=math.inf)
    },
    "all zero": {"history": create_history(loss=0.0, val_loss=0.0, epoch_s=0.0, images_per_s=0.0, learning_rate=0.0)},
    "no events": {"events": ()},
    "one start": {"events": create_record().events[:1]},
    "events without facts": {"events": tuple(dataclasses.replace(e, facts={}) for e in create_record().events)},
    "facts of other kinds": {
        "events": tuple(
            dataclasses.replace(e, facts=dict.fromkeys(("hosts", "devices", "versions", "strategy"), 5))
            for e in create_record().events
        )
    },
    "impossible times": {"events": tuple(dataclasses.replace(e, time=1e300) for e in create_record().events)},
    "times that go back": {"events": tuple(dataclasses.replace(e, time=-e.time) for e in create_record().events)},
    "no configuration": {"config": {}},
    "configuration of another kind": {
        "config": {"trainer": [1], "plots": "a", "optimizer": {"name": 7}, "model": None}
    },
    "unknown optimizer": {"config": {"optimizer": {"name": "lion"}, "model": {"name": "../x"}}},
    "no such reference": {"config": {"plots": {"reference": "missing.csv"}}},
    "running": {"is_alive": True},
    "damage": {"damage": "summary.json is damaged"},
}


def check_page(page: str) -> ElementTree.Element:
    """Check that it is well-formed, stands alone, and has no script but its own; returns it as a tree."""
    assert page.encode("utf-8")
    root = ElementTree.fromstring(page)
    assert len(list(root.iter("script"))) == 1
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    for element in root.iter():
        for key, value in element.attrib.items():
            assert not key.startswith("on")
            if key in ("src", "href"):
                assert value.startswith(("#", "data:")) or not re.match("[a-z]+:|/", value), value
    return root


@pytest.mark.filterwarnings("error::UserWarning")  # they would be printed to the terminal of the run
@pytest.mark.parametrize("name", STRANGE)
def test_any_run_has_a_page(name):
    root = check_page(build_run_page(create_record(**STRANGE[name])))
    assert [section.get("id") for section in root.iter("section")][-3:] == ["time", "configuration", "machines"]


@pytest.mark.parametrize("name", STRANGE)
def test_any_runs_can_be_compared(name):
    comparison = Comparison.of([create_record(), create_record(**STRANGE[name])])
    check_page(build_comparison_page(comparison, output=Path("page.html")))


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3), (8, 8, 2), (8, 8, 7), (1, 1)])
@pytest.mark.parametrize("num_classes", [2, 10, 40])
def test_mistakes_of_any_data(shape, num_classes, monkeypatch):
    predictions = create_predictions(num_classes, shape)
    record = create_record(load_predictions=lambda: predictions)
    monkeypatch.setattr(RunRecord, "results", SUMMARY)
    root = check_page(build_run_page(record))
    assert len(list(root.iter("img"))) >= 7
    (mistakes,) = [section for section in root.iter("section") if section.get("id") == "mistakes"]
    is_table = any("confusion" in element.get("class", "") for element in mistakes.iter("div"))
    assert is_table == (num_classes <= 20)


def test_hostile_texts_are_text(monkeypatch):
    events = tuple(
        dataclasses.replace(
            event,
            reason=HOSTILE,
            facts={"hosts": [HOSTILE], "devices": [HOSTILE], "strategy": HOSTILE},
            losses=(Loss(1.8e9, (HOSTILE,), HOSTILE),),
        )
        for event in create_record().events
    )
    record = create_record(
        path=Path("runs") / HOSTILE.replace("/", "").replace("\0", ""),
        config={HOSTILE: {HOSTILE: HOSTILE}, "plots": {"reference": HOSTILE}},
        events=events,
        damage=HOSTILE,
        load_predictions=lambda: create_predictions(name=HOSTILE),
    )
    shown = " ".join(printable(HOSTILE).split())
    root = check_page(build_run_page(record))
    assert shown in " ".join("".join(root.itertext()).split())
    root = check_page(build_comparison_page(Comparison.of([record, create_record()]), output=Path("page.html")))
    assert shown in " ".join("".join(root.itertext()).split())
    monkeypatch.setattr(RunRecord, "results", SUMMARY)
    check_page(build_run_page(record))


def test_incidents():
    root = check_page(build_run_page(create_record()))
    (table,) = [table for table in root.iter("table") if "Epochs computed again" in "".join(table.itertext())]
    row = [" ".join("".join(cell.itertext()).split()) for cell in table.iter("td")]
    assert row[1:] == ["here (rank 0)", "the run ended without a word", "7", "1", "3 min 20 s"]
    assert "Incidents" not in build_run_page(create_record(events=create_record().events[2:]))


@pytest.mark.parametrize(
    ("ranks", "hosts", "shown"),
    [
        ((2, 3), ("b", "c"), "b, c (ranks 2, 3)"),
        ((2,), (), "rank 2"),
        ((), ("b",), "b"),
        ((), (), "unknown"),
    ],
)
def test_what_was_lost(ranks, hosts, shown, monkeypatch):
    monkeypatch.setattr(RunRecord, "incidents", [Incident(1.8e9, 7, ranks, hosts, "silent", 1, 30.0)])
    assert f">{shown}</td>" in build_run_page(create_record())


def test_a_run_that_was_trained_further_shows_no_old_results():
    page = build_run_page(create_record(summary=SUMMARY))
    assert "It was finished after 12 epochs, and then trained further" in page
    assert "90.00 %" not in page and 'id="mistakes"' not in page
    page = build_run_page(create_record(summary=dataclasses.replace(SUMMARY, epochs_completed=40)))
    assert "90.00 %" in page and 'id="mistakes"' in page


def test_a_run_that_ended_early_says_why():
    config = {"trainer": {"epochs": 40, "patience": 12}}
    history = create_history(13, val_accuracy=0.5)
    page = build_run_page(
        create_record(config=config, history=history, summary=dataclasses.replace(SUMMARY, epochs_completed=13))
    )
    assert "after 13 epochs of 40: the validation accuracy has not risen above the 0.5000 of epoch 1" in page
    assert "(trainer.patience=12)." in page


def test_damaged_predictions_are_told():
    def fail():
        raise ValueError("it is torn")

    summary = dataclasses.replace(SUMMARY, epochs_completed=40)
    page = build_run_page(create_record(summary=summary, load_predictions=fail))
    assert "predictions.npz is damaged: it is torn." in page


def test_links_to_folders_whose_names_are_no_text(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff\xfe")
    folder.mkdir()
    (folder / "report.html").touch()
    runs = [create_record(path=folder), create_record(path=tmp_path / "other")]
    root = check_page(build_comparison_page(Comparison.of(runs), output=tmp_path / "page.html"))
    assert [link.get("href") for link in root.iter("a")] == ["%FF%FE/report.html"]


def test_a_page_is_small():
    assert len(build_run_page(create_record(history=create_history(150))).encode()) < 200_000


def test_what_is_not_the_default_comes_first():
    root = check_page(build_run_page(create_record()))
    (section,) = [section for section in root.iter("section") if section.get("id") == "configuration"]
    table = section.find(".//tbody")
    keys = ["".join(row[0].itertext()) for row in table]
    assert keys == ["seed", "optimizer.name", "trainer.epochs", "plots.reference"]
    assert ["".join(cell.itertext()) for cell in table[0]] == ["seed", "3", "0"]


def test_defaults_are_those_of_the_choices():
    values = {"model.name": "keras", "model.factory": "net:build", "augment.name": "affine", "optimizer.name": "adamw"}
    found = _defaults(values)
    assert (found["augment.max_degrees"], found["optimizer.weight_decay"]) == (10.0, 0.004)
    assert (found["model.name"], found["augment.name"], found["optimizer.name"]) == ("mlp", "none", "adam")


def test_progress_has_stops_losses_and_resumes():
    root = check_page(build_run_page(create_record()))
    (time,) = [section for section in root.iter("section") if section.get("id") == "time"]
    text = " ".join("".join(time.itertext()).split())
    for word in ("resumed", "lost", "failed", "failed: no more disk", "here (2 processes)", "single x1"):
        assert word in text
