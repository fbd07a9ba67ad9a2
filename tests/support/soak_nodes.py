"""For `soak.py`: nodes of a Slurm job are lost at random moments, on a cluster of three nodes on this machine."""

import contextlib
import random
import shutil
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from support import CHECKOUT
from support.batch import Job, environment_of_user, submitter, wait_until
from support.slurm_cluster import THREE_NODES, leftovers, lost_node, revive, run_cluster

NUM_EPOCHS = 300
UNHURT_EPOCHS = 20
"""A job that finishes so many after a loss does not need the node, which was a spare; else it finishes one at most."""


class Loss(NamedTuple):
    """A node is lost."""

    number: signal.Signals
    """What all that runs on it gets: SIGKILL, or SIGSTOP."""
    node: str
    num_epochs: int
    """After so many more epochs."""

    def __str__(self) -> str:
        how = "killed" if self.number is signal.SIGKILL else "frozen"
        return f"node {self.node} {how} after {self.num_epochs} more epochs"


def draw_losses(seed: int) -> tuple[str, int, list[Loss]]:
    """Strategy, number of spare nodes, and what happens; the first node also has the batch script."""
    draw = random.Random(seed)
    nodes = draw.sample(THREE_NODES, k=2)
    numbers = [draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP]) for _ in nodes]
    losses = [Loss(number, node, draw.randint(1, 60)) for number, node in zip(numbers, nodes, strict=True)]
    return draw.choice(["horovod", "multiworker"]), draw.choice([0, 0, 1]), losses


@contextlib.contextmanager
def cluster_with_desk(root: Path) -> Iterator[tuple[dict[str, str], Path]]:
    """A cluster, and the folder that its user submits from."""
    desk = root / "desk"
    (desk / "runs").mkdir(parents=True)
    (desk / "slurm").mkdir()
    for script in (CHECKOUT / "slurm").glob("*.sh"):
        shutil.copy(script, desk / "slurm")
    (desk / "slurm" / "site.sh").write_text(f"python='{sys.executable}'\n")
    with run_cluster(THREE_NODES, slurmd_timeout_s=45) as environment:
        yield environment, desk


def lose_nodes(seed: int, args, environment: dict[str, str], desk: Path) -> tuple[list[Loss], Path]:
    """Train under Slurm, lose nodes, and wait for the end; returns what was lost and the run folder.

    Raises AssertionError unless the job ends as COMPLETED and leaves nothing running.
    """
    strategy, spares, losses = draw_losses(seed)
    submit = submitter(environment_of_user(environment), desk)
    job = submit(*args, f"strategy={strategy}", f"spare_nodes={spares}", options=["--nodes=3", "--cpus-per-task=1"])
    made: list[Loss] = []
    with contextlib.ExitStack() as lost:
        for loss in losses:
            goal = num_epochs(job) + loss.num_epochs
            wait_until(lambda goal=goal: num_epochs(job) >= min(goal, NUM_EPOCHS), job)
            before = num_starts(job)
            assert not has_ended(job), f"{loss}: too late"
            lost.enter_context(lost_node(environment, loss.node, loss.number))
            made.append(loss)
            wait_until(partial(has_come, job, before + 1, num_epochs(job) + UNHURT_EPOCHS), job)
            if num_starts(job) > before:  # else it was a spare, and stays lost at the next loss
                lost.close()
                for one in made:
                    revive(environment, one.node)
    for one in made:
        revive(environment, one.node)
    batch = job()
    assert (batch.state, batch.returncode) == ("COMPLETED", 0), batch.log
    for node in THREE_NODES:
        assert not (left := leftovers(environment, node)), left
    return made, batch.folder


def num_epochs(job: Job) -> int:
    with contextlib.suppress(FileNotFoundError):
        return (job.folder / "history.csv").read_text().count("\n") - 1
    return 0


def num_starts(job: Job) -> int:
    """How often it was started or requeued, whether in the same allocation or not."""
    return job.text().count(" goes on with ") + int(job.told("Restarts"))


def has_come(job: Job, starts: int, epochs: int) -> bool:
    """Whether it was started so often, has so many epochs, or has ended."""
    return num_starts(job) >= starts or num_epochs(job) >= epochs or has_ended(job)


def has_ended(job: Job) -> bool:
    return "\nResults: " in job.text()
