"""Signals: before training they end the process, whatever it waits for; after that they are requests."""

import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from support.job import SINGLE, TRAIN
from support.launchers import local_addresses, tf_config
from support.processes import family, send, wait_until

from mnist_dist.base.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED

SETUP = """
import os, signal, sys, time
import numpy  # its threads take signals too
from mnist_dist.launch.stop import StopRequest

told = []
request = StopRequest(tell_others=lambda *words: print(*words, flush=True), has_others=False)
"""

TRAINING = """
with request:
    request.training_begins()
    assert not request()
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        os.kill(os.getpid(), number)
        while not request():
            time.sleep(0.01)
    time.sleep(0.1)
"""

# A signal that comes after Python has restored its own handlers.
AT_THE_END = """
import ctypes

class Late:
    def __del__(self, kill=ctypes.CDLL(None).kill, pid=os.getpid(), number=int(signal.SIGTERM)):
        kill(pid, number)

ctypes.late = Late()
"""

# What the main thread does in the meantime; `argv[1]` is a FIFO that nobody writes to.
WAITS = {
    "sleep": "time.sleep(600)",
    "FIFO": "open(sys.argv[1])",
    "busy": "while True: pass",
    # As on a dead network mount, where nothing but the end of the process can wake it: it waits for a
    # child that shares its memory (CLONE_VM, CLONE_VFORK and SIGCHLD) and does nothing.
    "uninterruptible": """
import ctypes
libc = ctypes.CDLL(None)
stack = ctypes.create_string_buffer(65536)
top = ctypes.c_void_p((ctypes.addressof(stack) + 65536) & ~15)
libc.clone(ctypes.cast(libc.pause, ctypes.c_void_p), top, 0x100 | 0x4000 | 17, None)
""",
}


def run(program: str, python_environment) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=python_environment, capture_output=True, text=True, timeout=60, check=False)


def test_in_training_a_signal_is_a_request_and_a_second_one_changes_nothing(python_environment):
    result = run(SETUP + TRAINING, python_environment)
    assert (result.returncode, result.stderr) == (0, "SIGTERM: stopping after this epoch\n")


@pytest.mark.parametrize("inside", [False, True])
def test_no_signal_is_deadly_after_the_end(inside, python_environment):
    """Python restores the default handlers when it exits; the exit code must not become a signal's."""
    training = "with request:\n    request.training_begins()\n" if inside else ""
    program = SETUP + training + AT_THE_END + "raise SystemExit(75)\n"
    assert run(program, python_environment).returncode == (75 if inside else -signal.SIGTERM)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, EXIT_INTERRUPTED), (signal.SIGTERM, EXIT_PREEMPTED), (signal.SIGUSR2, EXIT_PREEMPTED)],
    ids=lambda value: getattr(value, "name", None),
)
@pytest.mark.parametrize("wait", WAITS)
def test_before_training_a_signal_ends_the_process(wait, number, code, python_environment, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    children: list[psutil.Process] = []
    lines = [f"    {line}" for line in ["print('ready', flush=True)", *WAITS[wait].strip().splitlines()]]
    process = subprocess.Popen(
        [sys.executable, "-c", "\n".join([SETUP, "with request:", *lines]), tmp_path / "fifo"],
        env=python_environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        if wait == "uninterruptible":
            wait_until(lambda: state(process.pid) == "D")
        _, *children = family(psutil.Process(process.pid))
        process.send_signal(number)
        assert process.wait(timeout=30) == code
    finally:
        process.kill()
        send(children, signal.SIGKILL)  # they hold the pipes as well
        printed, _ = process.communicate(timeout=30)
    reason = "interrupted" if number is signal.SIGINT else f"{number.name} before the training"
    assert printed == f"{reason} {code}\n"


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


SIGNALS = [("SIGTERM", 75), ("SIGUSR2", 75), ("SIGINT", 130)]


def line_of(name: str) -> str:
    if name == "SIGINT":
        return "error: interrupted"
    return f"{name}: stopped before training began; run the same command again to start it"


@pytest.mark.parametrize(("name", "code"), SIGNALS)
def test_while_it_waits_for_the_digits_of_another_process(name, code, start, tmp_path):
    """Forever, on a shared disk whose locks have a dead owner."""
    (tmp_path / "cache").mkdir()
    with (tmp_path / "cache" / "digits-v1.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start(SINGLE, "data=digits", f"data.cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path}/run")
        (waiting,) = process.processes
        wait_until(lambda: waits_for_lock(waiting.pid))
        waiting.send_signal(getattr(signal, name))
        assert process.codes(30) == [code]
    assert process.output() == f"{line_of(name)}\n"
    assert not (tmp_path / "run").exists()


def waits_for_lock(pid: int) -> bool:
    return any("->" in line and f" {pid} " in line for line in Path("/proc/locks").read_text().splitlines())


# A rank that has met the others and is about to spend a long time loading TensorFlow.
HELD = """
import os, time
from pathlib import Path
from mnist_dist import train

def load(run_input, job, console):
    Path(os.environ["SIGNS"], str(job.topology.rank)).touch()
    time.sleep(600)

train.build = load
train.main()
"""


@pytest.mark.parametrize(("name", "code"), SIGNALS)
def test_one_of_two_processes_ends_both(name, code, args, start, tmp_path):
    job = start(("multiworker", 2), *args, f"run_dir={tmp_path}/run", script=("-c", HELD), env={"SIGNS": str(tmp_path)})
    wait_until(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
    job.processes[1].send_signal(getattr(signal, name))
    chief, other = job.wait(60)
    assert (chief.returncode, other.returncode) == (code, code)
    told = re.sub(r":[0-9]+", "", chief.stderr)
    reason = "interrupted" if name == "SIGINT" else f"{name} before the training"
    assert told == f"error: rank 1 (127.0.0.1) ended: {reason}\n"
    assert other.stdout + other.stderr == f"[rank 1/2] {line_of(name)}\n"


@pytest.mark.parametrize(("name", "code"), SIGNALS)
@pytest.mark.parametrize("rank", [0, 1])
def test_while_it_waits_for_the_others(rank, name, code, args, start_python, tmp_path):
    addresses = local_addresses(2)
    job = start_python(*TRAIN, *args, f"run_dir={tmp_path}/run", env=tf_config(addresses)[rank])
    host, _, port = addresses[0].partition(":")
    if rank == 0:
        wait_until(lambda: socket.socket().connect_ex((host, int(port))) == 0)
    else:
        with socket.create_server((host, int(port))) as server:
            server.settimeout(30)
            server.accept()[0].close()
    job.processes[0].send_signal(getattr(signal, name))
    assert job.codes(30) == [code]
    prefix = "[rank 1/2] " if rank else ""
    assert job.output() == f"{prefix}{line_of(name)}\n"
    assert not (tmp_path / "run").exists()
