"""Processes: fork them off ready, stop them with their descendants, see them end. Without TensorFlow."""

import contextlib
import ctypes
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from support import CHECKOUT

# With a launcher's or batch job's variables, every run in here would take itself for one process of many.
LAUNCHER_VARIABLES = ("SLURM_", "HOROVOD_", "OMPI_", "PMI", "TF_CONFIG", "CUDA_VISIBLE_DEVICES")
LIGHT_LIBRARIES = (
    "hydra._internal.core_plugins.basic_sweeper", "mnist_dist.benchmark.report", "mnist_dist.benchmark.startup",
    "mnist_dist.cli.main", "mnist_dist.data.load", "mnist_dist.data.splits", "mnist_dist.engine.footprint",
    "mnist_dist.run.input", "mnist_dist.run.saving",
)  # fmt: skip
"""What a command imports before TensorFlow, but for the module that is the command."""
LIBRARIES = (
    *LIGHT_LIBRARIES, "tensorflow", "keras", "sklearn.model_selection", "mnist_dist.engine.actions",
    "mnist_dist.engine.build", "mnist_dist.results.curves", "mnist_dist.strategy.choose",
)  # fmt: skip
_PR_SET_CHILD_SUBREAPER = 36


@functools.cache
def cache_folder() -> tempfile.TemporaryDirectory[str]:
    """What tests cache, and the secret of their jobs: not in the user's home. Removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="mnist_dist-caches-")


def python_environment() -> dict[str, str]:
    """The environment in which `python -m mnist_dist...` runs from any folder, installed or not."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER_VARIABLES)}
    path = os.pathsep.join(filter(None, [str(CHECKOUT), str(CHECKOUT / "tests"), os.environ.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path, "XDG_CACHE_HOME": cache_folder().name}


class ForkServer:
    """Starts Python programs instantly: `forkserver.py` has imported their libraries."""

    def __init__(self, libraries: Iterable[str]) -> None:
        # We adopt orphans, so that the programs can be waited for as if started here.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._server = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("forkserver.py"), *libraries],
            # As in the package while it imports TensorFlow and Keras (`Console.tensorflow_start`).
            env={**python_environment(), "TF_CPP_MIN_LOG_LEVEL": "2", "KERAS_HOME": os.devnull},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def start(self, words, *, env: dict[str, str], cwd: Path, printed: tuple[Path, Path]) -> psutil.Process:
        """Run `python *words`; its output goes to the two files `printed`."""
        request = {
            "words": [*map(str, words)],
            "env": env,
            "cwd": str(cwd),
            "printed": [str(path) for path in printed],
        }
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return psutil.Process(int(self._server.stdout.readline()))


@functools.cache
def fork_server(libraries: tuple[str, ...] = LIBRARIES) -> ForkServer:
    """The fork server that has imported these; it ends with this process."""
    return ForkServer(libraries)


def family(process: psutil.Process) -> list[psutil.Process]:
    """A process and all its descendants, whatever session they are in (horovodrun gives each its own)."""
    with contextlib.suppress(psutil.NoSuchProcess):  # it is just ending
        return [process, *process.children(recursive=True)]
    return [process]


def freeze(process: psutil.Process) -> list[psutil.Process]:
    """Stop a process and all its descendants, even those just being started; returns all of them."""
    frozen: set[psutil.Process] = set()
    while new := set(family(process)) - frozen:
        send(new, signal.SIGSTOP)
        frozen |= new
        while any(may_start_processes(one) for one in new):
            time.sleep(0.001)
    return sorted(frozen, key=lambda one: one.pid)


def may_start_processes(process: psutil.Process) -> bool:
    """Whether a process that was told to stop still runs. If it waits in the kernel, it stops before doing more."""
    with contextlib.suppress(OSError):  # it is just ending
        for path in Path(f"/proc/{process.pid}/task").glob("*/stat"):
            with contextlib.suppress(OSError):
                if path.read_text().rpartition(")")[2].split()[0] in "RS":
                    return True
    return False


def send(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs and is not a zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    return False


def kill(process: psutil.Process) -> None:
    """kill -9 the process and all its descendants."""
    if is_alive(process):
        frozen = freeze(process)
        send(frozen, signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, frozen)))


def wait_until(condition, *, timeout_s: float = 120, every_s: float = 0.005):
    """Wait until `condition()` is true and return its value; fails if it takes too long."""
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain"
        time.sleep(every_s)
    return result
