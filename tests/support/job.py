"""Jobs in processes of their own: to start, to kill, and what they leave. Without TensorFlow, for scripts too."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from mnist_dist.results.history import EpochMetrics, History, from_csv

CHECKOUT = Path(__file__).resolve().parent.parent
# What a launcher or a batch job leaves in the environment would make one process of many of every run in here.
LAUNCHER_VARIABLES = ("SLURM_", "HOROVOD_", "OMPI_", "PMI", "TF_CONFIG", "CUDA_VISIBLE_DEVICES")
NUM_EPOCHS = 40
SINGLE, MIRRORED, HOROVOD = ("single", 1), ("mirrored", 2), ("horovod", 2)
TRAIN = ("-m", "mnist_dist.train")
HELD = (str(CHECKOUT / "tests" / "held.py"),)


def job_name(job) -> str:
    """How a job, (strategy, processes or replicas), is called in the list of tests."""
    return f"{job[0]} x{job[1]}"


def horovodrun() -> str:
    """The launcher; without Horovod the test is skipped, but fails where nothing may be skipped (CI)."""
    path = Path(sys.executable).with_name("horovodrun")
    if not path.is_file():
        reason = "Horovod is not installed: make horovod"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return str(path)


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on just now."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [server.getsockname()[1] for server in servers]


def tf_configs(addresses) -> list[str]:
    """TF_CONFIG for each worker of `multiworker`."""
    cluster = {"worker": list(addresses)}
    return [
        json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}}) for index in range(len(addresses))
    ]


def python_environment() -> dict[str, str]:
    """Environment variables with which `python -m mnist_dist...` runs from any folder, installed or not."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)}
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path}


def command(job, *args, script=TRAIN) -> list[str]:
    strategy, size = job
    launcher = [horovodrun(), "-np", str(size)] if strategy == "horovod" else []
    replicas = [f"strategy.num_replicas={size}"] if strategy == "mirrored" else []
    return [*launcher, sys.executable, *map(str, script), f"strategy={strategy}", *replicas, *map(str, args)]


def start_job(job, *args, output: Path, env: dict[str, str], cwd: Path, script=TRAIN, prefix=()) -> subprocess.Popen:
    """Start a job in a process group of its own; all that it prints goes to the file `output`.

    `script` replaces `-m mnist_dist.train`, and `prefix` are words before the whole command.
    """
    with output.open("w") as log:
        process = subprocess.Popen(
            [*prefix, *command(job, *args, script=script)],
            env=env,
            cwd=cwd,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    process.output = output
    return process


def descendants(pid: int) -> list[int]:
    """A process and all that it has started, whatever session they are in (horovodrun gives each its own)."""
    children: list[int] = []
    with contextlib.suppress(OSError):  # it ends just now
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                children += [int(word) for word in path.read_text().split()]
    return [pid, *(process for child in children for process in descendants(child))]


def freeze(process: subprocess.Popen) -> list[int]:
    """Stop the process and all that it has started, those too that are only just being started; returns all of them."""
    frozen: set[int] = set()
    while new := set(descendants(process.pid)) - frozen:
        send(new, signal.SIGSTOP)
        frozen |= new
        while any(may_start_processes(pid) for pid in new):
            time.sleep(0.001)
    return sorted(frozen)


def may_start_processes(pid: int) -> bool:
    """Whether a process that was told to stop still runs. If it waits in the kernel, it stops before it does more."""
    with contextlib.suppress(OSError):  # it ends just now
        for path in Path(f"/proc/{pid}/task").glob("*/stat"):
            with contextlib.suppress(OSError):
                if path.read_text().rpartition(")")[2].split()[0] in "RS":
                    return True
    return False


def is_alive(pid: int) -> bool:
    """Whether there is such a process, and not only its exit code, which nobody has asked for yet."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def send(pids, number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def kill(process: subprocess.Popen) -> None:
    """kill -9 the process and all that it has started."""
    if process.poll() is None:
        pids = freeze(process)
        send(pids, signal.SIGKILL)
        while any(is_alive(pid) for pid in pids):
            time.sleep(0.001)
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


def trainings(process: subprocess.Popen) -> list[int]:
    """The processes of a job that train, in the order of their start."""
    found = []
    for pid in sorted(descendants(process.pid)):
        with contextlib.suppress(OSError):
            words = tuple(Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0"))
            found += [pid] if words[1:3] == TRAIN or words[1:2] == HELD else []
    return found


def rank_of(pid: int) -> int:
    """The rank of a process that trains, as its launcher told it."""
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    match = re.search(rb'(?:\0HOROVOD_RANK=|"index": )(\d+)', b"\0" + environment)
    return int(match[1]) if match else 0


def ranks_of(processes) -> dict[int, int]:
    """The processes that train, of those that a user has started and of what these have started, by rank."""
    found = {}
    for process in processes:
        for pid in trainings(process):
            with contextlib.suppress(OSError):  # it ends just now
                found[rank_of(pid)] = pid
    return found


class Result(NamedTuple):
    """What must not depend on interruptions."""

    weights_sha256: str
    num_correct: tuple[int, ...]
    rows: tuple[EpochMetrics, ...]


def result_of(folder: Path) -> Result:
    summary = summary_of(folder)
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
