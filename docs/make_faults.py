"""Measures the table of docs/faults.md on a Slurm cluster of three nodes on this machine.

    PYTHONPATH=. python docs/make_faults.py [REPEATS]

Prints the rows in Markdown, each with the median of REPEATS (3) measurements and their range.
"""

import contextlib
import json
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
from support import soak_nodes
from support.batch import Job, environment_of_user, submitter, wait_until
from support.data import create_small_arrays
from support.slurm_cluster import THREE_NODES, lost_node, revive, set_slurmd_timeout

FIRST, SECOND, _ = THREE_NODES
# What each part of the time ends with: a line of the log.
PARTS = {
    "detect": r" is gone \(|^srun: error: ",
    "end and probe": r"^Job \S+ goes on with |^Job \S+ on \S+: .* restarted 1 time",
    "start": r"^Resuming after epoch ",
    "trace": r"^Epoch ",
}

Fault = Callable[[Job, dict[str, str]], contextlib.AbstractContextManager[object]]


@contextlib.contextmanager
def kill_rank(job: Job, _: dict[str, str]) -> Iterator[None]:
    """Kill the process of the last rank."""
    os.kill(job.processes()[-1], signal.SIGKILL)
    yield


def lose(node: str, number: signal.Signals, *, slurmd_timeout_s: int = 300) -> Fault:
    """A fault that hits all that runs on a node."""

    @contextlib.contextmanager
    def fault(_: Job, environment: dict[str, str]) -> Iterator[None]:
        set_slurmd_timeout(environment, slurmd_timeout_s)
        with lost_node(environment, node, number):
            yield

    return fault


FAULTS: dict[str, tuple[Fault, list[str]]] = {
    "a rank is killed": (kill_rank, ["--nodes=3"]),
    "a node is killed": (lose(SECOND, signal.SIGKILL), ["--nodes=3"]),
    "a node freezes": (lose(SECOND, signal.SIGSTOP), ["--nodes=3"]),
    "a node freezes, and Slurm gives it up first (15 s)": (
        lose(SECOND, signal.SIGSTOP, slurmd_timeout_s=15),
        ["--nodes=3"],
    ),
    "the node of the batch script is killed": (lose(FIRST, signal.SIGKILL, slurmd_timeout_s=60), ["--nodes=2"]),
    "the node of the batch script freezes": (lose(FIRST, signal.SIGSTOP, slurmd_timeout_s=60), ["--nodes=2"]),
}


def measure(fault: Fault, options: list[str], environment: dict[str, str], desk: Path) -> dict[str, float]:
    """Seconds of each part, from the fault to the first new epoch."""
    for node in THREE_NODES:
        revive(environment, node)
    words = ["data=npz", f"data.path={desk / 'small.npz'}", "trainer.epochs=400", "strategy=horovod"]
    job = submitter(environment_of_user(environment), desk)(*words, options=[*options, "--cpus-per-task=1"])
    wait_until(lambda: "\nEpoch 60/" in job.text(), job)
    began, before = time.monotonic(), len(job.text())
    found: dict[str, float] = {}
    with fault(job, environment):
        patterns = iter(PARTS.items())
        name, pattern = next(patterns)
        position = before
        while True:
            text = job.text()
            # Epochs that were finished while the fault was made do not count.
            if match := re.compile(pattern, re.MULTILINE).search(text, position):
                found[name] = time.monotonic() - began - sum(found.values())
                position = match.end()
                following = next(patterns, None)
                if following is None:
                    break
                name, pattern = following
            elif time.monotonic() - began > 300:
                raise RuntimeError(f"no {pattern} in\n{text[before:]}")
            time.sleep(0.02)
    job.ask("scancel", job.job_id)
    return found


def main() -> None:
    """Measure everything."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print("| fault | " + " | ".join(PARTS) + " | to the first new epoch |")
    print("|---|" + "---|" * (len(PARTS) + 1))
    with (
        tempfile.TemporaryDirectory() as folder,
        soak_nodes.cluster_with_desk(Path(folder)) as (environment, desk),
    ):
        np.savez(desk / "small.npz", **create_small_arrays())
        for name, (fault, options) in FAULTS.items():
            rows = [measure(fault, options, environment, desk) for _ in range(repeats)]
            print(f"{name}: {json.dumps(rows)}", file=sys.stderr)
            totals = [sum(row.values()) for row in rows]
            cells = [f"{statistics.median(row[part] for row in rows):.1f}" for part in PARTS]
            whole = f"**{statistics.median(totals):.0f} s** ({min(totals):.0f} to {max(totals):.0f})"
            print("| " + " | ".join([name, *cells, whole]) + " |", flush=True)


if __name__ == "__main__":
    main()
