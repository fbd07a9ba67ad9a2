"""Jobs that tests start, stop and compare: commands, processes, and what a run folder holds."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from mnist_dist.history import EpochMetrics, History, from_csv

NUM_EPOCHS = 40
SINGLE, MIRRORED, HOROVOD = ("single", 1), ("mirrored", 2), ("horovod", 2)
TRAIN = ("-m", "mnist_dist.train")


def horovodrun() -> str:
    """The launcher; without Horovod the test is skipped, but fails where nothing may be skipped (CI)."""
    path = Path(sys.executable).with_name("horovodrun")
    if not path.is_file():
        reason = "Horovod is not installed: make horovod"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return str(path)


class Result(NamedTuple):
    """What must not depend on interruptions."""

    weights_sha256: str
    num_correct: tuple[int, ...]
    rows: tuple[EpochMetrics, ...]


def result_of(folder: Path) -> Result:
    summary = json.loads((folder / "summary.json").read_text())
    rows = tuple(dataclasses.replace(row, epoch_s=0.0, images_per_s=0.0) for row in history_of(folder).epochs)
    return Result(
        summary["weights_sha256"], tuple(summary[name]["num_correct"] for name in ("train", "val", "test")), rows
    )


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def history_of(folder: Path) -> History:
    return from_csv((folder / "history.csv").read_text())


def checkpoints_of(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("epoch-*.ckpt"))


def command(job, *args, script=TRAIN) -> list[str]:
    strategy, size = job
    launcher = [horovodrun(), "-np", str(size)] if strategy == "horovod" else []
    replicas = [f"strategy.num_replicas={size}"] if strategy == "mirrored" else []
    return [*launcher, sys.executable, *map(str, script), f"strategy={strategy}", *replicas, *map(str, args)]


def descendants(pid: int) -> list[int]:
    """A process and all that it has started, whatever session they are in (horovodrun gives each its own)."""
    children = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children += [int(word) for word in path.read_text().split()]
    return [pid, *(process for child in children for process in descendants(child))]


def kill(process: subprocess.Popen) -> None:
    """kill -9 the process and all that it has started."""
    if process.poll() is None:
        for pid in descendants(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()


def wait_for_epoch(process: subprocess.Popen, folder: Path, epoch: int) -> None:
    """Wait until `history.csv` has so many epochs, or the job has ended."""
    while process.poll() is None:
        with contextlib.suppress(OSError, ValueError):
            if len(history_of(folder).epochs) >= epoch:
                return
        time.sleep(0.002)


@contextlib.contextmanager
def stopped_after(process: subprocess.Popen, folder: Path, epoch: int) -> Iterator[None]:
    """Hold a job of one process still, somewhere after `epoch`, while the block runs."""
    wait_for_epoch(process, folder, epoch)
    process.send_signal(signal.SIGSTOP)
    state = os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    assert state.si_code == os.CLD_STOPPED, process.output.read_text()
    yield
    process.send_signal(signal.SIGCONT)
