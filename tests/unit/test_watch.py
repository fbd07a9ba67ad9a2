"""What a terminal shows of a run."""

import dataclasses
import io
import json
import os
import time
import types

import pytest
import rich.console

from mnist_dist.base.errors import UserError
from mnist_dist.results.history import EpochMetrics, History, to_csv
from mnist_dist.results.text_chart import draw_text_curves
from mnist_dist.run import record as record_module
from mnist_dist.run.events import Event
from mnist_dist.run.record import RunRecord, read_record
from mnist_dist.watch import Look, NothingToSee, Observer, PlainLines, WatchConfig, build_view


def history(num_epochs: int, *, epoch_s: float = 0.5) -> History:
    return History(
        tuple(
            EpochMetrics(n, 1 / n, 1 - 0.5 / n, 2 / n, 1 - 0.6 / n, 1e-3, epoch_s, 123456.7)
            for n in range(1, num_epochs + 1)
        )
    )


@pytest.fixture
def look(tmp_path):
    """A run after some epochs of 150."""

    def look(num_epochs: int, *, is_alive=True, reason="", **more) -> Look:
        record = RunRecord(
            tmp_path, {"trainer": {"epochs": 150}}, history(num_epochs), None, (), is_alive=is_alive, damage=""
        )
        record = dataclasses.replace(record, **more)
        pace = 2.0 if num_epochs else None
        checkpoint = (num_epochs, 3.2) if num_epochs else None
        return Look(record, reason, checkpoint, ("Batch: 512", "Epoch 12/150 - 0.5s " + "x" * 90), pace)

    return look


def shown(look: Look, *, width: int, height: int = 30, encoding="utf-8") -> list[str]:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    terminal = rich.console.Console(file=stream, width=width, height=height, highlight=False)
    terminal.print(build_view(look, terminal))
    stream.flush()
    return stream.buffer.getvalue().decode(encoding).splitlines()


@pytest.mark.parametrize("width", [60, 120])
def test_a_run_that_is_running(width, look, tmp_path):
    lines = shown(look(12), width=width)
    text = "\n".join(lines)
    assert "".join(lines).startswith(str(tmp_path))
    for part in (
        "running", "12/150 epochs   8%", "120.0 epochs/min   123,457 images/s   0:01:09 left",
        "last checkpoint: epoch 12, 0:00:03 ago", "loss  train 0.0833  validation 0.1667",
        "accuracy  train 95.83%  validation 95.00%", "Batch: 512", "Epoch 12/150",
    ):  # fmt: skip
        assert part in text
    assert max(map(len, lines)) <= width
    assert len(lines) <= 30
    (titles,) = {line.count("train") for line in lines if "loss  train" in line}
    assert titles == (2 if width == 120 else 1)


@pytest.mark.parametrize("height", [24, 50])
@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_it_fits_the_terminal(width, height, look):
    lines = shown(look(100), width=width, height=height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize("num_epochs", [0, 1, 2, 5000])
def test_any_number_of_epochs(num_epochs, look):
    text = "\n".join(shown(look(num_epochs), width=60))
    assert ("no epoch yet" in text) == ("no checkpoint yet" in text) == (num_epochs == 0)
    assert f"{num_epochs}/{max(num_epochs, 150)} epochs" in text


def test_a_run_that_has_ended_says_why(look):
    lines = shown(look(12, is_alive=False, events=(Event(kind="started", time=0, epoch=0),), reason="killed"), width=80)
    text = " ".join(" ".join(lines).split())  # the folder's name may be long
    assert "lost: killed" in text
    assert "left" not in text


def test_a_run_that_ended_early_is_done(look):
    config = {"trainer": {"epochs": 150, "stop_at_val_accuracy": 0.9}}
    accuracy = types.SimpleNamespace(accuracy=0.91)
    summary = types.SimpleNamespace(epochs_completed=12, test=accuracy)
    text = "\n".join(shown(look(12, is_alive=False, config=config, summary=summary), width=100))
    assert "12/12 epochs 100%" in text
    assert "12/150 epochs   8%" in "\n".join(shown(look(12, config=config, summary=summary), width=100))  # it goes on


def test_damage_is_named(look):
    lines = shown(look(0, damage="history.csv is damaged (it is empty)"), width=60)
    assert "history.csv is damaged" in " ".join(" ".join(lines).split())


def test_incidents_are_counted(look):
    events = tuple(
        Event(kind=kind, time=time, epoch=epoch)
        for kind, time, epoch in [("started", 0.0, 0), ("lost", 9.0, 3), ("started", 29.0, 1), ("lost", 30.0, 1)]
    )
    assert "1 incident: 2 epochs computed again, 21 s lost" in shown(look(12, events=events), width=100)
    events += (Event(kind="started", time=34.0, epoch=1),)
    assert "2 incidents: 2 epochs computed again, 25 s lost" in shown(look(12, events=events), width=100)
    lines = shown(look(12, events=events[:2]), width=100)[1:]  # the first one has the folder's name
    assert not any("incident" in line for line in lines)


def test_a_terminal_without_unicode(look):
    text = "\n".join(shown(look(12), width=80, encoding="ascii"))
    assert "*" in text
    assert text.isascii()


def ramp(num_epochs: int) -> History:
    """Losses that fall from 2 to 1 in a straight line, with those of validation at 2."""
    losses = [2 - n / (num_epochs - 1) for n in range(num_epochs)]
    return History(tuple(EpochMetrics(n, x, 0, 2.0, 0, 0, 1, 1) for n, x in enumerate(losses, start=1)))


def test_a_straight_line():
    lines = draw_text_curves(ramp(5), metric="loss", width=19, height=7).plain.splitlines()
    assert lines == [
        "loss  train 1.0000  validation 2.0000",
        "  2.000 │⠙⢍⠉⠉⠉⠉⠉⠉⠉⠉",
        "        │  ⠑⢄      ",
        "  1.500 │    ⠑⢄    ",
        "        │      ⠑⢄  ",
        "  1.000 │        ⠑⢄",
        "  epoch └1────────5",
    ]


def test_both_curves_have_their_colours():
    text = draw_text_curves(ramp(5), metric="loss", width=60, height=10)
    top, *_, bottom, _ = text.split("\n")[1:]
    assert {str(span.style) for span in top.spans} == {"dark_orange"}  # validation, above the first of training
    assert {str(span.style) for span in bottom.spans} == {"bright_blue"}


@pytest.fixture
def folder(tmp_path):
    """A run after 3 epochs."""
    path = tmp_path / "runs/first"
    (path / "checkpoints").mkdir(parents=True)
    (path / "config.yaml").write_text("trainer:\n  epochs: 20\n")
    (path / "history.csv").write_text(to_csv(history(3)))
    (path / "checkpoints/epoch-00002.ckpt").touch()
    (path / "checkpoints/epoch-00003.ckpt").touch()
    (path / "train.log").write_text("".join(f"line {n}\n" for n in range(3000)))
    (path / "events.jsonl").write_text(json.dumps({"kind": "started", "time": 0.0, "epoch": 0}) + "\n")
    return path


def test_what_is_read(folder):
    found = Observer(folder).look()
    assert found.num_epochs == 20
    assert len(found.record.history.epochs) == 3
    assert found.checkpoint[0] == 3
    assert found.log == ("line 2996", "line 2997", "line 2998", "line 2999")
    assert found.record.state == "lost"
    assert found.reason == "it ended without a word: killed, or its machine was lost"


def test_another_clock_that_is_ahead(folder):
    os.utime(folder / "checkpoints/epoch-00003.ckpt", (time.time() + 3600,) * 2)
    assert Observer(folder).look().checkpoint == (3, 0.0)


def test_half_of_a_folder(folder):
    (folder / "history.csv").write_bytes(b"")
    (folder / "train.log").unlink()
    found = Observer(folder).look()
    assert found.record.damage == "history.csv is damaged (it is empty)"
    assert (found.log, found.epochs_per_s) == ((), None)
    (folder / "config.yaml").write_text("trainer: [\n")
    assert Observer(folder).look().num_epochs == 1
    (folder / "config.yaml").write_text("trainer: 7\n")
    assert Observer(folder).look().num_epochs == 1


def test_there_is_no_run_yet(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(NothingToSee, match="no run here"):
            Observer(path).look()


def test_a_folder_of_runs(folder):
    with pytest.raises(UserError, match=f"a folder of runs; name one: run_dir={folder}$") as caught:
        Observer(folder.parent).look()
    assert not isinstance(caught.value, NothingToSee)


def test_the_pace(folder):
    now = 0.0
    observer = Observer(folder, clock=lambda: now)
    assert observer.look().epochs_per_s == 2  # as the run says
    for num_epochs in range(4, 90):
        now += 4
        (folder / "history.csv").write_text(to_csv(history(num_epochs)))
        found = observer.look()
    assert found.epochs_per_s == 0.25  # as seen from here
    (folder / "history.csv").write_text(to_csv(history(80)))
    assert observer.look().epochs_per_s == 2


def test_a_run_that_ends_while_it_is_read_is_not_lost(folder, monkeypatch):
    def ends(_):
        with (folder / "events.jsonl").open("a") as stream:
            stream.write(json.dumps({"kind": "stopped", "time": 1.0, "epoch": 3, "reason": "why"}) + "\n")
        return False

    monkeypatch.setattr(record_module, "is_locked", ends)
    found = read_record(folder)
    assert (found.state, found.reason) == ("stopped", "why")


@pytest.mark.parametrize(
    "values, line",
    [
        ({"run_dir": None}, "run_dir=None: say which run to watch: run_dir=runs/..."),
        ({"every_s": 0}, "every_s=0: must be from 0.1"),
    ],
)
def test_values_out_of_range(values, line):
    with pytest.raises(UserError, match=line):
        WatchConfig(**{"run_dir": "runs/first", "every_s": 1, **values})


def test_plain_lines(look, capsys):
    show = PlainLines(rich.console.Console(highlight=False, width=60))
    for found in ("Waiting", "Waiting", look(0), look(1), look(1), look(3), look(2), look(3, is_alive=False)):
        show(found)
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split(" - ")[0] for line in lines] == [
        "Waiting",
        "Epoch 1/150",
        "Epoch 2/150",
        "Epoch 3/150",
        "Epoch 3/150",
    ]
    assert last.endswith("  lost")
