"""A batch job on the cluster of `slurm_cluster.py`, and how it ended. Without TensorFlow."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest

from support import CHECKOUT
from support.processes import LAUNCHER_VARIABLES
from support.slurm_cluster import THREE_NODES

JOB_S = 400  # on a busy machine; seconds on an idle one
FINAL_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE")


class Batch(NamedTuple):
    """How a batch job ended."""

    returncode: int
    job_id: str
    log: str
    folder: Path
    state: str
    num_restarts: int

    @property
    def summary(self) -> dict:
        return json.loads((self.folder / "summary.json").read_text())


@dataclass(frozen=True)
class Job:
    """A batch job or an array task; calling it waits for its end."""

    job_id: str
    log: Path
    folder: Path
    ask: Callable[..., str]

    def __call__(self, *, is_node_lost: bool = False) -> Batch:
        """Wait for its end; if a node is lost, Slurm still waits for that when the script has ended."""
        ends = (*FINAL_STATES, "COMPLETING") if is_node_lost else FINAL_STATES
        # sbatch --wait polls only every 32 s. A job that is requeued passes through other states.
        wait_until(lambda: self.told("JobState") in ends, self)
        codes = [
            int(code) for code in re.findall(r" ExitCode=(\d+):", self.ask("scontrol", "show", "job", self.job_id))
        ]
        state, restarts = self.told("JobState"), int(self.told("Restarts"))
        return Batch(max(codes), self.job_id, self.text(), self.folder, state, restarts)

    def told(self, key: str) -> str:
        """What `scontrol show job` says about it."""
        return re.findall(rf"\b{key}=(\S+)", self.ask("scontrol", "show", "job", self.job_id))[-1]

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def is_training(self, *, start: int) -> bool:
        """Whether it has finished some epochs since its `start`-th requeue."""
        _, put_back, since = self.text().rpartition(f"restarted {start} time(s)\n")
        return bool(put_back) and since.count("\nEpoch ") >= 3

    def processes(self) -> list[int]:
        """The PID of each rank's process."""
        steps = self.ask("squeue", "--noheader", "--steps", f"--jobs={self.told('JobId')}", "--format=%i %j")
        # An earlier step may still be listed, as long as Slurm waits for a lost node.
        number = max(map(int, re.findall(r"\.(\d+) training$", steps, re.MULTILINE)))
        step = f"{self.told('JobId')}.{number}"
        found = {}
        for node in THREE_NODES:
            with contextlib.suppress(subprocess.CalledProcessError):  # a node without any of them, or that is not there
                for line in self.ask("scontrol", "listpids", step, node).splitlines():
                    pid, *_, rank = line.split()
                    if rank.isdecimal():
                        found.setdefault(int(rank), int(pid))
        return [found[rank] for rank in sorted(found)]

    def signal_one(self, rank: int, number: signal.Signals, *, start: int = 0) -> None:
        """Signal only one process, in the middle of training.

        `scancel --signal` only knows jobs and steps, and signals all tasks of a step. So we ask Slurm for the task's
        process, like a user who types `srun --jobid=... --overlap --nodelist=... kill -USR2 ...`.
        """
        wait_until(lambda: self.is_training(start=start), self)
        os.kill(self.processes()[rank], number)


def wait_until(condition: Callable[[], bool], job: Job, *, timeout_s: float = JOB_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            told = job.ask("scontrol", "show", "job", job.job_id)
            pytest.fail(f"waited {timeout_s} s in vain\n{told}\n{job.text() or 'no log'}")
        time.sleep(0.1)


def environment_of_user(cluster: dict[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in cluster.items() if not name.startswith(LAUNCHER_VARIABLES)}
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    return {**kept, "PYTHONPATH": path, "SLURM_CONF": cluster["SLURM_CONF"]}


def submitter(environment: dict[str, str], desk: Path) -> Callable[..., Job]:
    """A function for `sbatch OPTIONS slurm/SCRIPT.sh ARGUMENTS`; `site` is the text of a site.sh just for this job."""

    def ask(*command: str) -> str:
        return subprocess.run(
            command, cwd=desk, env=environment, stdout=subprocess.PIPE, text=True, timeout=60, check=True
        ).stdout

    def start(*arguments, script="train", options=(), log="", task="", site="") -> Job:
        kind = {"train": "job"}.get(script, script)
        log = log or kind + "-{}.log"
        if site:
            path = desk / "slurm" / f"site-{len(list((desk / 'slurm').iterdir()))}.sh"
            path.write_text((desk / "slurm" / "site.sh").read_text() + site + "\n")
            options = [*options, f"--export=ALL,MNIST_DIST_SITE={path}"]
        number = ask("sbatch", "--parsable", *options, f"slurm/{script}.sh", *arguments).strip()
        job_id = number + task
        return Job(job_id, desk / "runs" / log.format(number), desk / "runs" / f"{kind}-{job_id}", ask)

    return start
