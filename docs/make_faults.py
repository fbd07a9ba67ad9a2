"""Measures the tables of docs/faults.md: on this machine, by ssh to it, and on a Slurm cluster of three nodes on it.

    PYTHONPATH=. python docs/make_faults.py [REPEATS]

Prints the rows in Markdown, each with the median of REPEATS (3) measurements and their range, in seconds.
"""

import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import psutil
from support import soak_nodes
from support.batch import Job as BatchJob
from support.batch import environment_of_user, submitter, wait_until
from support.data import create_small_arrays
from support.job import Job, start_job, wait_for_epoch
from support.processes import family, freeze, is_alive, kill, python_environment, send
from support.runs import history_of
from support.scanner import Scanner
from support.slurm_cluster import THREE_NODES, configure, frozen_controller, lost_node, revive_all
from support.soak import no_room, small_disk
from support.sshd import Hosts, run_hosts

FIRST, SECOND, THIRD = THREE_NODES
# What each part of the time ends with: a line of the log.
PARTS = {
    "detect": r" is gone \(|^srun: error: |: stopping after this epoch$|(?=^Job \S+ goes back into the queue|^Lost: )",
    "end": r"; asking which of its \d+ nodes answer$|^Job \S+ goes back into the queue|^Lost: ",
    "ask": r"^Job \S+ goes on with |^Job \S+ on \S+: .* restarted 1 time|Starting again from ",
    "start": r"^Resuming after epoch ",
    "trace": r"^Epoch ",
}
MAX_S = 300
READY = "\nEpoch 60/"
"""What a job has printed when it is disturbed."""


def time_parts(read: Callable[[], str], fault: AbstractContextManager[object]) -> dict[str, float]:
    """Seconds of each part, from the fault to the first new epoch, by what the job prints."""
    began, position = time.monotonic(), len(read())
    found: dict[str, float] = {}
    with fault:
        for name, pattern in PARTS.items():
            # Epochs that were finished while the fault was made do not count.
            while not (match := re.compile(pattern, re.MULTILINE).search(text := read(), position)):
                if time.monotonic() - began > MAX_S:
                    raise RuntimeError(f"no {pattern} in\n{text}")
                time.sleep(0.02)
            found[name] = time.monotonic() - began - sum(found.values())
            position = match.end()
    return found


# Under Slurm

Fault = Callable[[BatchJob, dict[str, str]], AbstractContextManager[object]]


@contextlib.contextmanager
def kill_rank(job: BatchJob, _: dict[str, str]) -> Iterator[None]:
    """Kill the process of the last rank."""
    os.kill(job.processes()[-1], signal.SIGKILL)
    yield


@contextlib.contextmanager
def freeze_rank(job: BatchJob, _: dict[str, str]) -> Iterator[None]:
    """Stop the process of the last rank."""
    os.kill(job.processes()[-1], signal.SIGSTOP)
    yield


def lose(node: str, number: signal.Signals) -> Fault:
    """A fault that hits all that runs on a node."""
    return lambda _, environment: lost_node(environment, node, number)


SILENCE_S = 45


@contextlib.contextmanager
def lose_without_controller(_: BatchJob, environment: dict[str, str]) -> Iterator[None]:
    """Kill a node while nobody answers Slurm's commands."""
    with lost_node(environment, SECOND, signal.SIGKILL), contextlib.ExitStack() as stack:
        stack.enter_context(frozen_controller(environment))
        threading.Timer(SILENCE_S, stack.close).start()
        yield


@contextlib.contextmanager
def preempt(job: BatchJob, _: dict[str, str]) -> Iterator[None]:
    """Let a job that ends at once have the nodes."""
    job.ask("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=true")
    yield


DEFAULTS = {"SlurmdTimeout": 300, "MessageTimeout": 10}
"""Slurm's own; seconds."""

FAULTS: dict[str, tuple[Fault, int, dict[str, int]]] = {
    "a rank is killed": (kill_rank, 3, {}),
    "a rank freezes": (freeze_rank, 3, {}),
    "a node is killed": (lose(SECOND, signal.SIGKILL), 3, {}),
    "a node freezes": (lose(SECOND, signal.SIGSTOP), 3, {}),
    "a node freezes, and Slurm gives it up first (15 s)": (lose(SECOND, signal.SIGSTOP), 3, {"SlurmdTimeout": 15}),
    "the node of the batch script is killed (15 s)": (lose(FIRST, signal.SIGKILL), 2, {"SlurmdTimeout": 15}),
    "the same (60 s)": (lose(FIRST, signal.SIGKILL), 2, {"SlurmdTimeout": 60}),
    "the node of the batch script freezes (15 s)": (lose(FIRST, signal.SIGSTOP), 2, {"SlurmdTimeout": 15}),
    "the same, with `MessageTimeout=5`": (
        lose(FIRST, signal.SIGSTOP),
        2,
        {"SlurmdTimeout": 15, "MessageTimeout": 5},
    ),
    f"a node is killed, and Slurm's controller does not answer for {SILENCE_S} s": (lose_without_controller, 3, {}),
    "the job is preempted": (preempt, 3, {}),
}


def measure(
    fault: Fault, nodes: int, settings: dict[str, int], words: list[str], environment: dict[str, str], desk: Path
) -> dict[str, float]:
    """Seconds of each part, for a job of so many nodes under a Slurm with these settings."""
    revive_all(environment)
    configure(environment, **{**DEFAULTS, **settings})
    options = [f"--nodes={nodes}", "--cpus-per-task=1"]
    job = submitter(environment_of_user(environment), desk)(*words, options=options)
    wait_until(lambda: READY in job.text(), job)
    found = time_parts(job.text, fault(job, environment))
    job.ask("scancel", job.job_id)
    return found


# By mnist_dist.launch

LAUNCHED: dict[str, Callable[[Hosts, psutil.Process], object]] = {
    "a process is killed": lambda _, supervisor: rank_of(supervisor, 0).kill(),
    "a process freezes": lambda _, supervisor: rank_of(supervisor, 0).suspend(),
    "a host is killed": lambda hosts, _: kill(hosts.daemons[THIRD]),
    "the host of rank 0 freezes": lambda hosts, _: freeze(hosts.daemons[SECOND]),
}


def rank_of(supervisor: psutil.Process, rank: int) -> psutil.Process:
    """The process of a rank on this host."""
    return next(one for one in family(supervisor) if one.environ().get("MNIST_DIST_RANK") == str(rank))


def measure_launched(name: str, root: Path, words: list[str]) -> dict[str, float]:
    """Seconds of each part; three processes, here or on three hosts."""
    folder = Path(tempfile.mkdtemp(dir=root))
    printed = folder / "printed"
    words = ["train", *words, f"run_dir={folder / 'run'}"]
    with run_hosts(folder, (SECOND, THIRD)) as hosts, printed.open("w") as stream:
        where = ["-H", f"{SECOND}:1,{FIRST}:1,{THIRD}:1", "--ssh", hosts.command] if "host" in name else ["-np", "3"]
        supervisor = psutil.Popen(
            [sys.executable, "-m", "mnist_dist.launch", *where, *words],
            env=python_environment(),
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        began = time.monotonic()
        while READY not in printed.read_text():
            if supervisor.poll() is not None or time.monotonic() - began > MAX_S:
                raise RuntimeError(printed.read_text())
            time.sleep(0.02)

        @contextlib.contextmanager
        def fault() -> Iterator[None]:
            LAUNCHED[name](hosts, supervisor)
            yield

        found = time_parts(printed.read_text, fault())
        kill(supervisor)
        supervisor.wait()
    return found


# By hand: from the fault to the end of all that is left, and from the same command to its first new epoch


def kill_one(job: Job, _: Path) -> None:
    """Kill the last rank."""
    send([job.ranks()[max(job.ranks())]], signal.SIGKILL)


def freeze_one(job: Job, _: Path) -> None:
    """Stop the last rank."""
    send([job.ranks()[max(job.ranks())]], signal.SIGSTOP)


def kill_all(job: Job, _: Path) -> None:
    """Kill all ranks at once."""
    send(job.freeze(), signal.SIGKILL)


def ask_to_stop(job: Job, _: Path) -> None:
    """Signal one rank."""
    send([job.ranks()[0]], signal.SIGUSR2)


def damage(job: Job, folder: Path) -> None:
    """Kill all ranks, and flip a byte of the newest checkpoint."""
    kill_all(job, folder)
    newest = max((folder / "checkpoints").glob("epoch-*.ckpt"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)


def fill_disk(_: Job, folder: Path) -> AbstractContextManager[None]:
    """Leave no room; the next command has some again."""
    return no_room(folder)


PLAIN: dict[str, Callable[[Job, Path], AbstractContextManager[None] | None]] = {
    "a rank is killed": kill_one,
    "a rank freezes": freeze_one,
    "all ranks are killed": kill_all,
    "a signal to one rank": ask_to_stop,
    "the newest checkpoint is damaged": damage,
    "the disk is full": fill_disk,
}
KIND = ("horovod", 3)


def measure_plain(
    act: Callable[..., AbstractContextManager[None] | None], root: Path, words: list[str]
) -> dict[str, float]:
    """Seconds to the end of the processes that still run, and of the next command to its first new epoch."""
    folder = Path(tempfile.mkdtemp(dir=root))
    disk = folder / "disk"
    disk.mkdir()
    run = disk / "run"
    words = [*words, f"run_dir={run}"]
    with small_disk(disk) if act is fill_disk else nullcontext():
        job = start_job(KIND, *words, printed_to=folder, fresh=True, launcher="srun")
        wait_for_epoch(job, run, 60)
        began = time.monotonic()
        with act(job, run) or nullcontext():
            while any(map(runs, job.processes)):
                time.sleep(0.005)
            ended = time.monotonic()
        job.kill()
        reached = len(history_of(run).epochs)
        again = start_job(KIND, *words, printed_to=folder, fresh=True, launcher="srun")
        begun = time.monotonic()
        wait_for_epoch(again, run, reached + 1)
        found = {"to the end": ended - began, "the same command again, to a new epoch": time.monotonic() - begun}
        again.kill()
    return found


SUSPENDED_S = 20


def measure_suspension(kind: tuple[str, int], root: Path, words: list[str]) -> dict[str, float]:
    """Seconds from the end of a suspension to the first new epoch."""
    folder = Path(tempfile.mkdtemp(dir=root))
    run = folder / "run"
    job = start_job(kind, *words, f"run_dir={run}", printed_to=folder, fresh=True, launcher="srun")
    wait_for_epoch(job, run, 60)
    frozen = job.freeze()
    reached = len(history_of(run).epochs)
    time.sleep(SUSPENDED_S)
    began = time.monotonic()
    send(frozen, signal.SIGCONT)
    wait_for_epoch(job, run, reached + 1)
    found = {"to a new epoch": time.monotonic() - began}
    job.kill()
    return found


def measure_scan(kind: tuple[str, int], root: Path, words: list[str]) -> dict[str, float]:
    """How many seconds more it takes to an epoch if strangers connect to all ports, again and again."""
    took = []
    for is_scanned in (False, True):
        folder = Path(tempfile.mkdtemp(dir=root))
        with Scanner() if is_scanned else nullcontext(Scanner()) as scanner:
            began = time.monotonic()
            options = {"fresh": True, "launcher": "srun", "started": scanner.processes}
            job = start_job(kind, *words, f"run_dir={folder / 'run'}", printed_to=folder, **options)
            wait_for_epoch(job, folder / "run", 60)
            took.append(time.monotonic() - began)
        job.kill()
    return {"longer to epoch 60 by": took[1] - took[0]}


def runs(process: psutil.Process) -> bool:
    """Whether it is neither stopped nor at its end."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return is_alive(process) and process.status() != psutil.STATUS_STOPPED
    return False


def print_rows(faults: Mapping[str, Callable[[], dict[str, float]]], repeats: int) -> None:
    """Measure, and print a table."""
    has_head = False
    for name, once in faults.items():
        rows = [once() for _ in range(repeats)]
        print(f"{name}: {json.dumps(rows)}", file=sys.stderr)
        if not has_head:
            print("| fault | " + " | ".join(rows[0]) + " | in all |\n|---|" + "---|" * (len(rows[0]) + 1))
            has_head = True
        totals = [sum(row.values()) for row in rows]
        cells = [f"{statistics.median(row[part] for row in rows):.1f}" for part in rows[0]]
        whole = f"**{statistics.median(totals):.0f}** ({min(totals):.0f} to {max(totals):.0f})"
        print("| " + " | ".join([name, *cells, whole]) + " |", flush=True)


def main() -> None:
    """Measure everything."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        np.savez(root / "small.npz", **create_small_arrays())
        words = ["data=npz", f"data.path={root / 'small.npz'}", "trainer.epochs=400"]
        print_rows({fault: partial(measure_plain, act, root, words) for fault, act in PLAIN.items()}, repeats)
        suspended = f"all ranks are suspended for {SUSPENDED_S} s"
        print_rows({suspended: partial(measure_suspension, KIND, root, words)}, repeats)
        print_rows({"strangers scan the ports": partial(measure_scan, KIND, root, words)}, repeats)
        words.append("strategy=horovod")
        print_rows({fault: partial(measure_launched, fault, root, words) for fault in LAUNCHED}, repeats)
        with soak_nodes.cluster_with_desk(root) as (environment, desk):
            print_rows(
                {fault: partial(measure, *how, words, environment, desk) for fault, how in FAULTS.items()},
                repeats,
            )


if __name__ == "__main__":
    main()
