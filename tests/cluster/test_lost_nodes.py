"""A node of a job is lost, on a real Slurm of three nodes: the job goes on with the others, to the same bits."""

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.batch import Batch, Job, wait_until
from support.job import SINGLE, start_job
from support.launchers import horovodrun
from support.runs import Result, result_of
from support.slurm_cluster import (
    THREE_NODES,
    configure,
    daemon_of,
    frozen_controller,
    leftovers,
    lost_node,
    revive,
    revive_all,
    run_cluster,
)

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("lost nodes")]

SLURMD_TIMEOUT_S = 15
FIRST, SECOND, THIRD = THREE_NODES
ON_ALL = ("--nodes=3", "--cpus-per-task=1")


@pytest.fixture(scope="module")
def cluster():
    with run_cluster(THREE_NODES, slurmd_timeout_s=SLURMD_TIMEOUT_S) as environment:
        yield environment


@pytest.fixture(autouse=True)
def _all_nodes_are_there(cluster):
    revive_all(cluster)


@pytest.fixture(scope="module")
def long(small):
    """The arguments of a training that lasts long enough to be disturbed, twice."""
    return [*small, "trainer.epochs=250"]


@pytest.fixture(scope="module")
def expected(long, tmp_path_factory) -> Result:
    """What the same training gives without Slurm, on one device, uninterrupted."""
    folder = tmp_path_factory.mktemp("plain")
    job = start_job(SINGLE, *long, f"run_dir={folder / 'run'}", printed_to=folder)
    assert job.codes() == [0], job.output()
    return result_of(folder / "run")


@pytest.fixture
def start(submit, long):
    """Start a training on all three nodes."""
    horovodrun()

    def submitted(*words, options=ON_ALL, strategy="horovod", **log) -> Job:
        return submit(*long, f"strategy={strategy}", *words, options=options, **log)

    return submitted


def state_of(cluster, node: str) -> str:
    command = ["sinfo", "--noheader", "--partition=test", f"--nodes={node}", "--format=%t"]
    return subprocess.run(command, env=cluster, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def num_epochs(job: Job) -> int:
    """How many epochs are in the history so far."""
    with contextlib.suppress(FileNotFoundError):
        return (job.folder / "history.csv").read_text().count("\n") - 1
    return 0


def wait_for_epochs(job: Job, number: int) -> None:
    """Wait until so many more epochs are finished, by whichever step."""
    reached = num_epochs(job) + number
    wait_until(lambda: num_epochs(job) >= reached, job)


def wait_for_restart(job: Job, times: int = 1) -> None:
    wait_until(lambda: job.text().count(" goes on with ") == times, job)


def check(cluster, job: Job, expected: Result, *, restarts: int = 0, processes: int, lost=()) -> Batch:
    """Check that the job has ended as if nothing had happened, with so many processes in the end."""
    batch = job()
    assert (batch.state, batch.returncode, batch.num_restarts) == ("COMPLETED", 0, restarts), batch.log
    found = result_of(batch.folder)
    assert found == expected, batch.log
    assert batch.summary["world_size"] == processes
    incidents = batch.summary["incidents"]
    assert all(incident["how"] and incident["seconds_lost"] > 0 for incident in incidents)
    if batch.summary["resumed_from_epochs"]:  # not lost before anything was noted
        assert {host for incident in incidents for host in incident["hosts"]} >= {*lost}
        assert len(incidents) == len(batch.summary["resumed_from_epochs"])
    assert not list(batch.folder.rglob(".*.tmp"))
    beside = {path.name for path in batch.folder.parent.glob(f"*{batch.job_id}*")} - {batch.folder.name}
    suspects = Path(f"{batch.folder}.suspects.txt")
    assert (suspects.read_text().split() if suspects.exists() else []) == [*lost]
    assert beside <= {f"job-{batch.job_id}{ending}" for ending in (".log", ".losses", ".suspects.txt", ".requeues")}
    for node in THREE_NODES:
        assert leftovers(cluster, node) == []
    return batch


@pytest.mark.parametrize("seed", range(10))
def test_at_a_random_moment(seed, cluster, start, expected):
    """All that runs on a node is killed; in every other case after Slurm itself has given the node up."""
    draw = random.Random(seed)
    node, strategy = draw.choice([SECOND, THIRD]), draw.choice(["horovod", "multiworker"])
    job = start(strategy=strategy)
    if draw.random() < 0.3:
        wait_until(lambda: "restarted 0 time(s)" in job.text(), job)
        time.sleep(draw.uniform(0, 6))
    else:
        wait_for_epochs(job, draw.randint(1, 150))
    with contextlib.ExitStack() as stack:
        if seed % 2:
            stack.enter_context(lost_node(cluster, node, signal.SIGSTOP))
            wait_until(lambda: state_of(cluster, node).startswith("down"), job)
        stack.enter_context(lost_node(cluster, node, signal.SIGKILL))
        batch = check(cluster, job, expected, processes=2, lost=[node])
    assert batch.log.count(f"goes on with 2 node(s): lost node(s) {node}; it resumes from ") == 1


def test_the_step_on_the_first_node(cluster, start, expected):
    """Rank 0 and Slurm's daemon of the step are lost, but not the batch script: the node still answers."""
    job = start()
    wait_for_epochs(job, 20)
    with lost_node(cluster, FIRST, signal.SIGKILL, spares_script=True):
        pass
    batch = check(cluster, job, expected, processes=3)
    assert batch.log.count("goes on with 3 node(s): a process of the job was lost; it resumes from ") == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_node_of_the_batch_script(number, cluster, start, expected):
    """Another node notices, and the job goes back into the queue: there are two other nodes for it."""
    job = start(options=["--nodes=2", "--cpus-per-task=1"])
    wait_for_epochs(job, 20)
    with lost_node(cluster, FIRST, number):
        wait_until(lambda: "\nResults: " in job.text(), job)
    batch = check(cluster, job, expected, restarts=1, processes=2, lost=[FIRST])
    if number is signal.SIGSTOP:  # the old rank 0 has its lock on the run folder to the end
        assert "taken over from a process on a machine that was lost" in batch.log
    assert "the node of the batch script does not answer" in Path(f"{batch.folder}.losses").read_text()


@pytest.mark.parametrize(("node", "restarts", "silent_s"), [(SECOND, 0, 40), (FIRST, 1, 70)])
def test_slurms_controller_does_not_answer_at_that_moment(node, restarts, silent_s, cluster, start, expected):
    """The batch script, or another node's watch over it, waits; longer than its question takes."""
    job = start(options=ON_ALL if restarts == 0 else ["--nodes=2", "--cpus-per-task=1"])
    wait_for_epochs(job, 20)
    with lost_node(cluster, node, signal.SIGKILL):
        with frozen_controller(cluster):
            time.sleep(silent_s)
            assert " goes " not in job.text()
        wait_until(lambda: "\nResults: " in job.text(), job)
    check(cluster, job, expected, restarts=restarts, processes=2, lost=[node])


def test_no_time_is_left_to_go_on(cluster, start, expected):
    """The next start would not be warned before the time is up, so the job goes back into the queue."""
    job = start(options=[*ON_ALL, "--time=2", "--signal=USR2@1"])
    wait_for_epochs(job, 20)
    os.kill(job.processes()[1], signal.SIGKILL)
    batch = check(cluster, job, expected, restarts=1, processes=3)
    assert "goes back into the queue: a process of the job was lost; it will resume from epoch-" in batch.log


def test_a_loss_that_cannot_be_noted(cluster, start, expected):
    job = start()
    wait_for_epochs(job, 20)
    losses = Path(f"{job.folder}.losses")
    losses.mkdir()
    os.kill(job.processes()[1], signal.SIGKILL)
    wait_for_restart(job)
    losses.rmdir()
    batch = check(cluster, job, expected, processes=3)
    assert f"warning: this loss could not be noted beside runs/job-{batch.job_id}" in batch.log


@pytest.mark.parametrize("slurm_notices", [True, False])
def test_a_frozen_node(slurm_notices, cluster, start, expected):
    """The other processes notice after 30 s; Slurm may be faster, if it is set to less."""
    configure(cluster, SlurmdTimeout=SLURMD_TIMEOUT_S if slurm_notices else 300)
    job = start()
    wait_for_epochs(job, 20)
    with lost_node(cluster, SECOND, signal.SIGSTOP):
        wait_until(lambda: "\nResults: " in job.text(), job)
    configure(cluster, SlurmdTimeout=SLURMD_TIMEOUT_S)
    revive(cluster, SECOND)
    batch = check(cluster, job, expected, processes=2, lost=[SECOND])
    losses = Path(f"{batch.folder}.losses").read_text()
    by_ranks = f"rank 1 ({SECOND}) is gone (silent for 30 s)"
    assert by_ranks in losses or (slurm_notices and f"Node failure on {SECOND}" in losses)
    assert ("Node failure on" in job.text()) == ("a node was lost; asking" in job.text())


def test_two_nodes_one_after_the_other(cluster, start, expected):
    job = start()
    wait_for_epochs(job, 20)
    with lost_node(cluster, THIRD, signal.SIGKILL):
        wait_for_restart(job)
        wait_for_epochs(job, 20)
        with lost_node(cluster, SECOND, signal.SIGKILL):
            batch = check(cluster, job, expected, processes=1, lost=[THIRD, SECOND])
    assert [line for line in batch.log.splitlines() if " goes on with 1 node(s)" in line]


def test_a_spare_node_takes_over(cluster, start, expected):
    job = start("spare_nodes=1")
    wait_for_epochs(job, 20)
    with lost_node(cluster, SECOND, signal.SIGKILL):
        batch = check(cluster, job, expected, processes=2, lost=[SECOND])
    assert f"Job {batch.job_id} on 127.0.0.[1-3]: 2 node(s), 1 process(es) on each" in batch.log
    assert f"Slurm: job {batch.job_id} on 127.0.0.[1-2], restarted 0 time(s)" in batch.log
    assert f"Slurm: job {batch.job_id} on 127.0.0.[1,3], restarted 0 time(s)" in batch.log


def test_a_node_that_comes_back_is_not_used(cluster, start, expected):
    job = start()
    wait_for_epochs(job, 20)
    with lost_node(cluster, SECOND, signal.SIGKILL):
        wait_for_restart(job)
    revive(cluster, SECOND)
    wait_for_epochs(job, 20)
    os.kill(job.processes()[1], signal.SIGKILL)
    batch = check(cluster, job, expected, processes=2, lost=[SECOND])
    assert batch.log.count(f"Slurm: job {batch.job_id} on 127.0.0.[1,3], restarted 0 time(s)") == 2


def test_a_node_that_is_only_cut_off(cluster, start, expected):
    """It is dropped like one that is dead; once it can be reached again, its watch over the batch script is ended."""
    job = start()
    wait_for_epochs(job, 20)
    assert any("guard" in command for command in leftovers(cluster, SECOND))
    slurmd, process = daemon_of(cluster, SECOND), job.processes()[1]
    os.kill(slurmd, signal.SIGSTOP)
    try:
        os.kill(process, signal.SIGKILL)
        wait_for_restart(job)
    finally:
        os.kill(slurmd, signal.SIGCONT)
    wait_until(lambda: leftovers(cluster, SECOND) == [], job)
    assert job.told("JobState") == "RUNNING"
    check(cluster, job, expected, processes=2, lost=[SECOND])


def test_fewer_than_min_nodes(cluster, start, expected):
    """The job waits in the queue until there are as many nodes again as it had asked for."""
    job = start("min_nodes=3")
    wait_for_epochs(job, 20)
    with lost_node(cluster, SECOND, signal.SIGKILL):
        wait_until(lambda: "goes back into the queue" in job.text(), job)
    revive(cluster, SECOND)
    batch = check(cluster, job, expected, restarts=1, processes=3, lost=[SECOND])
    assert f"goes back into the queue: lost node(s) {SECOND}; it will resume from epoch-" in batch.log


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["spare_nodes=1"], "spare_nodes=1 and min_nodes=1"),
        (["min_nodes=2"], "spare_nodes=0 and min_nodes=2"),
        (["min_nodes=two"], "min_nodes=two: must be a whole number"),
    ],
)
def test_more_than_the_job_has(words, fragment, submit, small):
    batch = submit(*small, *words)()
    assert (batch.state, batch.returncode) == ("FAILED", 2), batch.log
    (line,) = [line for line in batch.log.splitlines() if line.startswith("error: ")]
    assert fragment in line


def test_several_processes_on_each_node(cluster, start, expected):
    """With (fake) GPUs, one for each process, and as a task of an array."""
    options = ["--nodes=3", "--ntasks-per-node=2", "--gpus=6", "--cpus-per-task=1", "--array=0-0"]
    job = start(options=[*options, "--output=runs/job-%A_%a.log"], log="job-{}_0.log", task="_0")
    wait_for_epochs(job, 20)
    with lost_node(cluster, SECOND, signal.SIGKILL):
        batch = check(cluster, job, expected, processes=4, lost=[SECOND])
    assert "goes on with 2 node(s)" in batch.log
