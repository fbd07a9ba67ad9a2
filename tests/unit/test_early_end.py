"""When a run ends before its last epoch, and who takes it for finished then."""

import dataclasses
import json
import types

import pytest

from mnist_dist.config.compose import compose_config
from mnist_dist.results.history import EpochMetrics, History, to_csv
from mnist_dist.run.early_end import early_end
from mnist_dist.run.folder import RunFolder
from mnist_dist.run.record import read_record

RISING = (0.5, 0.7, 0.9)
FALLING = (0.9, 0.8, 0.7)


def history_with(accuracies) -> History:
    return History(
        tuple(EpochMetrics(n, 1.0, 0.5, 1.0, value, 0.1, 1.0, 1.0) for n, value in enumerate(accuracies, start=1))
    )


def rules(*overrides: str):
    return compose_config(*(f"trainer.{text}" for text in overrides)).trainer


@pytest.mark.parametrize(
    ("overrides", "accuracies", "reason"),
    [
        ([], FALLING * 40, ""),
        (["stop_at_val_accuracy=0.9"], RISING, "reached 0.9000 (trainer.stop_at_val_accuracy=0.9)"),
        (["stop_at_val_accuracy=0.9"], FALLING, "reached 0.9000"),  # trained further before that was asked for
        (["stop_at_val_accuracy=0.9"], RISING[:2], ""),
        (["stop_at_val_accuracy=0.91"], RISING, ""),
        (["stop_at_val_accuracy=1"], (0.5, 1.0), "reached 1.0000"),
        (["stop_at_val_accuracy=0.1"], (), ""),
        (["patience=2"], FALLING, "has not risen above the 0.9000 of epoch 1 (trainer.patience=2)"),
        (["patience=2"], FALLING[:2], ""),
        (["patience=3"], FALLING, ""),
        (["patience=1"], RISING, ""),
        (["patience=1"], (0.5, 0.5), "of epoch 1"),  # as high is not higher
        (["patience=1"], (0.5,), ""),
        (["patience=2", "stop_at_val_accuracy=0.9"], (*RISING, 0.1, 0.1), "reached 0.9000"),
        (["patience=2", "epochs=3"], FALLING, ""),  # that is not early
        (["patience=1", "epochs=2"], FALLING, ""),
    ],
)
def test_reasons(overrides, accuracies, reason):
    found = early_end(rules(*overrides), history_with(accuracies))
    assert bool(found) == bool(reason)
    assert reason in found


@pytest.fixture
def folder(tmp_path):
    """A run folder with three epochs of 150, of a run that did not live to note its end."""

    def leave(*overrides: str):
        found = RunFolder(tmp_path / "run")
        found.create(compose_config("data=digits", *overrides))
        (found.path / "history.csv").write_text(to_csv(history_with(FALLING)))
        started = {"kind": "started", "time": 1.0, "epoch": 0}
        (found.path / "events.jsonl").write_text(f"{json.dumps(started)}\n")
        return read_record(found.path, is_alive=False)

    return leave


def test_results_after_an_early_end_are_results(folder):
    record = dataclasses.replace(folder("trainer.patience=2"), summary=types.SimpleNamespace(epochs_completed=3))
    assert (record.state, record.results) == ("finished", record.summary)
    assert record.reason == early_end(rules("patience=2"), history_with(FALLING))


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        (["trainer.patience=3"], {}),  # asked for more since then
        (["trainer.patience=2"], {"summary": None}),
        (["trainer.patience=2"], {"summary": types.SimpleNamespace(epochs_completed=2)}),
        (["trainer.patience=2"], {"config": {"trainer": {"epochs": 150}}}),
        (["trainer.patience=2"], {"config": {"trainer": {"epochs": "many"}}}),
        (["trainer.patience=2"], {"config": {"trainer": {"epochs": 150, "patience": 0}}}),
        (["trainer.patience=2"], {"config": {"trainer": 3}}),
        (["trainer.patience=2"], {"config": {}}),
    ],
)
def test_other_results_are_not(overrides, changes, folder):
    found = {"summary": types.SimpleNamespace(epochs_completed=3), **changes}
    record = dataclasses.replace(folder(*overrides), **found)
    assert (record.state, record.results, record.early_end) == ("lost", None, "")
