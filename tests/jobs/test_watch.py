"""Watching real runs: in a terminal, through a pipe; a run that is killed, stopped, finished."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from support.job import NUM_EPOCHS, SINGLE, Job, stopped_after, wait_for_epoch
from support.processes import python_environment, send, wait_until
from support.runs import history_of, result_of

WATCH = ("-m", "mnist_dist.watch")
LONG = "trainer.epochs=100000"
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *words, columns: int = 80, lines: int = 30) -> None:
        self._shown = b""
        self._here, there = pty.openpty()
        fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        os.set_blocking(self._here, False)
        self.process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            env={**python_environment(), "TERM": "xterm-256color"},
            stdin=there,
            stdout=there,
            stderr=there,
            start_new_session=True,
        )
        os.close(there)

    def text(self) -> str:
        """All that was shown so far, without colours and movements."""
        with contextlib.suppress(BlockingIOError, OSError):  # nothing new; it has ended
            while data := os.read(self._here, 65536):
                self._shown += data
        return CONTROL.sub("", self._shown.decode(errors="replace"))

    def shows(self, part: str) -> bool:
        """Whether it has shown this, wherever the lines were broken."""
        return "".join(part.split()) in "".join(self.text().split())

    def wait_for(self, part: str) -> None:
        wait_until(lambda: self.shows(part) or self.process.poll() is not None)
        assert self.shows(part), self.text()

    def code(self) -> int:
        """Wait for the end; returns the exit code."""
        wait_until(lambda: [self.text(), self.process.poll() is not None][1])
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._here)


@pytest.fixture
def watch_in_terminal():
    """Watch a folder in a terminal."""
    with contextlib.ExitStack() as stack:

        def watch(folder: Path, *more, **size) -> Terminal:
            terminal = Terminal(*WATCH, f"run_dir={folder}", "every_s=0.1", *more, **size)
            stack.callback(terminal.close)
            return terminal

        yield watch


def epochs_shown(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"(\d+)/\d+ epochs", text)]


@pytest.mark.parametrize("columns", [60, 120])
def test_a_run_that_is_killed(columns, watch_in_terminal, args, start, tmp_path):
    folder = tmp_path / "run"
    terminal = watch_in_terminal(folder, columns=columns)
    terminal.wait_for(f"Waiting: run_dir={folder}: no run here")
    job = start(SINGLE, *args, LONG, f"run_dir={folder}")
    terminal.wait_for("last checkpoint: epoch")
    wait_until(lambda: len({*epochs_shown(terminal.text())} - {0}) > 3)
    job.kill()
    assert terminal.code() == 1
    text = terminal.text()
    assert "running" in text
    assert " left" in text
    assert "⠉" in text
    assert epochs_shown(text) == sorted(epochs_shown(text))
    assert terminal.shows("lost: it ended without a word: killed, or its machine was lost")
    assert epochs_shown(text)[-1] == len(history_of(folder).epochs)


def test_a_run_that_is_stopped(watch_in_terminal, args, start, tmp_path):
    folder = tmp_path / "run"
    job = start(SINGLE, *args, LONG, f"run_dir={folder}")
    wait_for_epoch(job, folder, 2)
    terminal = watch_in_terminal(folder)
    terminal.wait_for("running")
    send(job.processes, signal.SIGTERM)
    assert job.codes() == [75]
    assert terminal.code() == 75
    assert terminal.shows("stopped: stopped on request after epoch")


def test_a_run_that_finishes(watch_in_terminal, args, start, tmp_path):
    folder = tmp_path / "run"
    terminal = watch_in_terminal(folder)
    terminal.wait_for("Waiting")
    job = start(SINGLE, *args, f"run_dir={folder}")
    assert terminal.code() == 0
    assert job.codes() == [0]
    assert terminal.shows("finished: test accuracy")
    assert epochs_shown(terminal.text())[-1] == NUM_EPOCHS


def test_the_terminal_is_interrupted(watch_in_terminal, args, start, tmp_path):
    folder = tmp_path / "run"
    job = start(SINGLE, *args, LONG, f"run_dir={folder}")
    terminal = watch_in_terminal(folder)
    terminal.wait_for("last checkpoint: epoch")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.code() == 130
    assert not terminal.shows("interrupted")  # to end the view is no error
    assert job.is_running()


def test_a_pipe_gets_each_epoch_once(args, start, start_python, tmp_path):
    folder = tmp_path / "run"
    watching = start_python(*WATCH, f"run_dir={folder}", "every_s=0.1")
    wait_until(lambda: "Waiting" in watching.output())
    start(SINGLE, *args, f"run_dir={folder}")
    (result,) = watching.wait()
    assert result.returncode == 0, result.stderr
    waiting, *epochs, last = result.stdout.splitlines()
    assert waiting.startswith(f"Waiting: run_dir={folder}: no run here")
    logged = [line for line in (folder / "train.log").read_text().splitlines() if line.startswith("Epoch ")]
    assert epochs == logged[-len(epochs) :]
    assert re.fullmatch(f"{folder}  finished: test accuracy [0-9.]+%", last)


def snapshot(folder: Path) -> dict[str, tuple[bytes, float]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def look_once(run_python, folder: Path):
    return run_python(*WATCH, f"run_dir={folder}", "once=true")


def test_once_changes_nothing(args, start, run_python, tmp_path):
    folder = tmp_path / "run"
    job = start(SINGLE, *args, LONG, f"run_dir={folder}")
    with stopped_after(job, folder, 3):
        before = snapshot(folder)
        result = look_once(run_python, folder)
        assert snapshot(folder) == before
    assert result.returncode == 0, result.stderr
    assert f"{folder}  running" in result.stdout.replace("\n", "")
    assert "/100000 epochs" in result.stdout
    job.kill()
    assert look_once(run_python, folder).returncode == 1


def test_once_without_a_run(run_python, tmp_path):
    result = look_once(run_python, tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: run_dir={tmp_path}: no run here; name the folder of a run\n"


def test_a_watched_run_resumes(args, uninterrupted, train, start, start_python, tmp_path):
    """Looking at the lock must not keep the next job from taking it."""
    folder = tmp_path / "run"
    job = start(SINGLE, *args, f"run_dir={folder}")
    wait_for_epoch(job, folder, 5)
    job.kill()
    looks = "from mnist_dist.watch import *\nobserver = Observer(Path({!r}))\nwhile True: observer.look()"
    watchers: list[Job] = [start_python("-c", looks.format(str(folder))) for _ in range(2)]
    result = train(folder)
    assert result.returncode == 0, result.stderr
    assert result_of(folder) == result_of(uninterrupted)
    assert all(watcher.is_running() for watcher in watchers), [watcher.output() for watcher in watchers]
