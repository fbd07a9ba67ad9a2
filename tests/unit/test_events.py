"""The events of a run, and what its record makes of them."""

import dataclasses
import json
import logging
import os
import types
from pathlib import Path

import pytest

from mnist_dist.base.errors import Diverged, EnvironmentFailed, UserError
from mnist_dist.base.files import is_locked, open_locked
from mnist_dist.config.compose import compose_config
from mnist_dist.results.history import EpochMetrics, History
from mnist_dist.run.events import EVENTS, EventLog, read_events
from mnist_dist.run.folder import RunFolder
from mnist_dist.run.record import read_record
from mnist_dist.train import write_report


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    """A run folder with two epochs."""
    found = RunFolder(tmp_path / "run")
    found.create(compose_config("data=digits", "trainer.epochs=5"))
    rows = tuple(EpochMetrics(i, 1.0, 0.5, 1.0, 0.5, 1e-3, 1.0, 100.0) for i in (1, 2))
    found.write_history(History(rows))
    return found


def kinds(path: Path) -> list[str]:
    return [event.kind for event in read_events(path)]


def test_events_follow_each_other(folder):
    ended = []
    log = EventLog(folder, at_end=lambda: ended.append(kinds(folder.path)))
    log.started(0, {"strategy": "single"})
    log.ended("stopped", "asked to")
    log.started(2, {})
    log.ended("finished")
    events = read_events(folder.path)
    assert [(event.kind, event.epoch) for event in events] == [
        ("started", 0), ("stopped", 2), ("started", 2), ("finished", 2),
    ]  # fmt: skip
    assert events[0].facts == {"strategy": "single"}
    assert events[1].reason == "asked to"
    assert ended == [["started", "stopped"], ["started", "stopped", "started", "finished"]]


def test_the_end_says_when_the_last_epoch_was_finished(folder):
    """Before the end, or before this start: then that is what counts."""
    log, history = EventLog(folder), folder.path / "history.csv"
    log.started(0, {})
    finished = read_events(folder.path)[0].time + 5
    os.utime(history, (finished, finished))
    log.failed("rank 1 is gone")
    log.started(2, {})
    os.utime(history, (1, 1))
    log.failed("rank 1 is gone")
    log.started(2, {})
    history.unlink()
    log.failed("rank 1 is gone")
    events = read_events(folder.path)
    assert [end.last_epoch_time for end in events[1::2]] == [finished, events[2].time, events[4].time]
    assert [start.last_epoch_time for start in events[::2]] == [None, None, None]


def test_the_next_start_notes_what_was_lost(folder):
    EventLog(folder).started(0, {})
    EventLog(folder).started(1, {})
    started, lost, again = read_events(folder.path)
    assert (started.kind, lost.kind, lost.epoch, again.kind, again.epoch) == ("started", "lost", 2, "started", 1)
    assert lost.time == max(started.time, (folder.path / "history.csv").stat().st_mtime)


def test_a_run_ends_once_and_only_if_it_has_started(folder):
    log = EventLog(folder)
    log.ended("failed", "never started")
    assert kinds(folder.path) == []
    log.started(0, {})
    log.ended("failed", "first")
    log.ended("failed", "second")
    assert [event.reason for event in read_events(folder.path)] == ["", "first"]


def test_errors_are_noted_and_pass(folder):
    log = EventLog(folder)
    with pytest.raises(UserError), log.noting_failure():
        raise UserError("before it started")
    with pytest.raises(Diverged), log.noting_failure():
        log.started(0, {})
        raise Diverged("the loss\nbecame nan")
    last = read_events(folder.path)[-1]
    assert (last.kind, last.reason, last.error) == ("failed", "the loss became nan", "Diverged")


def test_other_ranks_write_nothing(tmp_path):
    log = EventLog(RunFolder(tmp_path, is_writer=False))
    log.started(0, {})
    log.ended("finished")
    assert list(tmp_path.iterdir()) == []


def test_damaged_lines_are_left_out(folder):
    good = {"kind": "started", "time": 1.0, "epoch": 0}
    lines = [
        "",
        "{",
        "[]",
        "null",
        '{"kind": "started"}',
        '{"a": 1}',
        json.dumps({**good, "time": "now"}),
        json.dumps(good),
    ]
    (folder.path / EVENTS).write_bytes("\n".join(lines).encode() + b"\n\xff\xfe")
    assert kinds(folder.path) == ["started"]


@pytest.mark.parametrize(
    ("steps", "state", "reason"),
    [
        ([], "lost", "it ended without a word: killed, or its machine was lost"),
        (["started"], "lost", "it ended without a word: killed, or its machine was lost"),
        (["started", ("stopped", "asked to")], "stopped", "asked to"),
        (["started", ("failed", "no more disk")], "failed", "no more disk"),
        (["started", ("finished", "")], "lost", "it ended without a word: killed, or its machine was lost"),
    ],
)
def test_state(folder, steps, state, reason):
    log = EventLog(folder)
    for step in steps:
        log.started(0, {}) if step == "started" else log.ended(*step)
    found = read_record(folder.path, is_alive=False)
    assert (found.state, found.reason) == (state, reason)
    assert read_record(folder.path, is_alive=True).state == "running"


def test_the_log_has_the_reason_of_a_run_that_could_not_note_it(folder):
    EventLog(folder).started(0, {})
    (folder.path / "train.log").write_text("Epoch 1/5\nerror: rank 1 is gone\n")
    assert read_record(folder.path, is_alive=False).reason == "rank 1 is gone"


def test_alive_while_the_lock_is_held(folder, tmp_path):
    assert read_record(folder.path).state == "running"  # by this process
    path = tmp_path / "lock"
    assert not is_locked(path)
    descriptor = open_locked(path)
    assert is_locked(path)
    with pytest.raises(BlockingIOError):
        open_locked(path)
    os.close(descriptor)
    assert not is_locked(path)


def test_no_run(tmp_path):
    with pytest.raises(UserError, match="no run here"):
        read_record(tmp_path)


def test_damage_is_told_and_the_rest_is_read(folder):
    (folder.path / "summary.json").write_text("{")
    (folder.path / "predictions.npz").write_bytes(b"no")
    found = read_record(folder.path, is_alive=False)
    assert len(found.history.epochs) == 2
    assert "summary.json is damaged" in found.damage
    with pytest.raises(ValueError, match="not such an archive"):
        found.load_predictions()
    (folder.path / "predictions.npz").unlink()
    assert found.load_predictions() is None


def test_a_lost_run_has_ended_when_it_last_wrote_its_history(folder):
    EventLog(folder).started(0, {})
    found = read_record(folder.path, is_alive=False)
    assert [event.kind for event in found.events] == ["started", "lost"]
    assert found.events[-1].epoch == 2
    assert [event.kind for event in read_record(folder.path, is_alive=True).events] == ["started"]
    assert kinds(folder.path) == ["started"]  # reading notes nothing


@pytest.mark.parametrize("last", ["started", "failed", "stopped", "finished"])
def test_complete_results_count_whatever_was_noted(folder, last, monkeypatch):
    log = EventLog(folder)
    log.started(0, {})
    if last != "started":
        log.ended(last)
    record = read_record(folder.path, is_alive=False)
    complete = dataclasses.replace(record, summary=types.SimpleNamespace(epochs_completed=5))
    assert (complete.state, complete.results) == ("finished", complete.summary)
    further = dataclasses.replace(record, summary=types.SimpleNamespace(epochs_completed=4))
    assert (further.state == "finished") == (further.results is not None) == (last == "finished")


def test_what_finished_unnoted_is_noted_later(folder):
    ended = []
    log = EventLog(folder, at_end=lambda: ended.append(1))
    log.settle()
    assert (kinds(folder.path), ended) == ([], [])  # a run of an earlier version is left as it is
    EventLog(folder).started(0, {})
    log.settle()
    log.settle()
    assert (kinds(folder.path), ended) == (["started", "finished"], [1])


def test_an_end_that_cannot_be_noted_hides_no_error(folder):
    log = EventLog(folder)
    with pytest.raises(Diverged), log.noting_failure():
        log.started(0, {})
        (folder.path / EVENTS).unlink()
        (folder.path / EVENTS).mkdir()
        raise Diverged("the loss became nan")
    log = EventLog(folder)
    with pytest.raises(EnvironmentFailed, match=r"events\.jsonl cannot be read: Is a directory"):
        log.started(0, {})
    log.failed("a peer is gone")


def test_reasons_of_errors_that_nobody_has_thought_of(folder):
    for error, reason in [
        (KeyError("x"), "KeyError: 'x'"),
        (MemoryError(), "out of memory, of which this process may use"),
        (KeyboardInterrupt(), "interrupted"),
    ]:
        log = EventLog(folder)
        with pytest.raises(type(error)), log.noting_failure():
            log.started(0, {})
            raise error
        assert read_events(folder.path)[-1].reason.startswith(reason)


def test_a_report_that_cannot_be_made_ends_no_run(folder, monkeypatch, logged):
    def fail(record):
        raise ZeroDivisionError("no luck")

    monkeypatch.setattr("mnist_dist.report.run_page.build_run_page", fail)
    write_report(folder, compose_config("data=digits", "report=false"))
    assert logged(logging.WARNING) == []
    write_report(folder, compose_config("data=digits"))
    assert logged(logging.WARNING) == ["report.html was not written: ZeroDivisionError: no luck"]
    assert not (folder.path / "report.html").exists()
