"""`sbatch slurm/train.sh` on a real Slurm: two nodes with two fake GPUs each, all on this machine."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support import CHECKOUT
from support.batch import JOB_S, Batch, wait_until
from support.job import SINGLE, start_job
from support.launchers import horovodrun
from support.runs import summary_of

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]


@pytest.fixture(scope="module")
def expected(small, tmp_path_factory):
    """The digest of the weights that the same training run gives without Slurm."""
    return train_plainly(small, tmp_path_factory.mktemp("plain"))


def train_plainly(arguments, folder: Path) -> str:
    """Train without Slurm, on one device; returns the digest of the weights."""
    job = start_job(SINGLE, *arguments, f"run_dir={folder / 'run'}", printed_to=folder)
    assert job.codes() == [0], job.output()
    return summary_of(folder / "run")["weights_sha256"]


def check(batch: Batch, expected: str, *, strategy: str, world_size: int, num_replicas: int) -> None:
    assert batch.returncode == 0, batch.log
    summary = batch.summary
    assert summary["strategy"] == strategy
    assert summary["world_size"] == world_size
    assert summary["num_replicas"] == num_replicas
    assert summary["weights_sha256"] == expected, batch.log


def test_mirrored(submit, small, expected, desk):
    """One process with all GPUs of its node (fake ones, so two logical CPUs). The user names the folder."""
    arguments = "strategy=mirrored", "strategy.num_replicas=2", "run_dir=runs/of my own"
    batch = submit(*small, *arguments, options=["--gpus-per-node=2"])()
    assert not batch.folder.exists()
    batch = batch._replace(folder=desk / "runs" / "of my own")
    check(batch, expected, strategy="mirrored", world_size=1, num_replicas=2)
    assert f"Job {batch.job_id} on 127.0.0.1: 1 node(s), 1 process(es) on each with 2 core(s), 2 GPU(s)" in batch.log
    assert f"Slurm: job {batch.job_id} on 127.0.0.1, restarted 0 time(s)" in batch.log
    assert (batch.folder / "train.log").is_file()


def test_horovod_over_two_nodes(submit, small, expected):
    """One process per GPU, started by plain srun."""
    horovodrun()
    batch = submit(*small, "strategy=horovod", options=["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2"])()
    check(batch, expected, strategy="horovod", world_size=4, num_replicas=4)


def test_two_jobs_at_the_same_time(submit, small, expected):
    """No GPUs here: `auto` picks Horovod. The other job shares both nodes at the same time.

    Multiworker runs one process on each node, however many tasks the options allow.
    """
    horovodrun()
    options = ["--nodes=2", "--cpus-per-task=1"]
    waits = [
        submit(*small, options=[*options, "--ntasks-per-node=1"]),
        submit(*small, "strategy=multiworker", options=[*options, "--ntasks-per-node=2"]),
    ]
    first, second = (wait() for wait in waits)
    check(first, expected, strategy="horovod", world_size=2, num_replicas=2)
    check(second, expected, strategy="multiworker", world_size=2, num_replicas=2)
    assert "Strategy: horovod (2 processes were started by slurm, and Horovod is installed)" in first.log
    assert f"Slurm: job {second.job_id} on 127.0.0.[1-2], restarted 0 time(s)" in second.log
    assert first.folder != second.folder


@pytest.mark.parametrize(
    ("arguments", "options", "fragments"),
    [
        (
            ["strategy=horovod"],
            ["--gpus-per-node=2"],
            ["strategy=horovod needs one task per GPU", "1 task(s) and 2 GPU(s)", "#SBATCH --ntasks-per-node=2"],
        ),
        (["strategy=mirrored"], ["--nodes=2"], ["strategy=mirrored trains on one node", "#SBATCH --nodes=1"]),
        (["strategy=singel"], [], ["singel"]),
    ],
)
def test_what_does_not_fit_is_one_line(submit, small, arguments, options, fragments):
    batch = submit(*small, *arguments, options=options)()
    assert batch.returncode == 2, batch.log
    (line,) = [line for line in batch.log.splitlines() if line.startswith("error: ")]
    for fragment in fragments:
        assert fragment in line
    assert not batch.folder.exists()
    assert batch.num_restarts == 0


@pytest.fixture(scope="module")
def long(small):
    """The arguments of a training run that lasts long enough to be looked at."""
    return [*small, "trainer.epochs=150"]


@pytest.fixture(scope="module")
def undisturbed(long, tmp_path_factory):
    """The digest of the weights that the long training run gives without Slurm."""
    return train_plainly(long, tmp_path_factory.mktemp("plain"))


def check_put_back(batch: Batch, times: int, digest: str, *, reason: str) -> None:
    """Check that the job was requeued that many times, resumed each time, and ended as if nothing had happened."""
    assert batch.returncode == 0, batch.log
    assert batch.state == "COMPLETED"
    assert batch.num_restarts == times, batch.log
    assert batch.log.count(f"Job {batch.job_id} goes back into the queue: {reason}; it will resume from ") == times
    assert re.findall(r"^Job .* restarted (\d+) time", batch.log, re.MULTILINE) == [str(n) for n in range(times + 1)]
    resumed = [int(epoch) for epoch in re.findall(r"^Resuming after epoch (\d+) of", batch.log, re.MULTILINE)]
    assert resumed == batch.summary["resumed_from_epochs"]
    assert len(resumed) == times
    assert batch.summary["weights_sha256"] == digest, batch.log


def test_stop_request_to_one_task(submit, long, undisturbed):
    """All tasks stop after the same epoch, and the job is requeued once."""
    horovodrun()
    job = submit(*long, "strategy=horovod", options=["--nodes=2", "--cpus-per-task=1"])
    job.signal_one(1, signal.SIGUSR2)
    batch = job()
    check_put_back(batch, 1, undisturbed, reason="stopped on request")
    assert batch.log.count("Stopped on request after epoch ") == 1
    assert batch.log.count("SIGUSR2: stopping after this epoch") == 1
    assert batch.summary["world_size"] == 2


def test_a_job_array(submit, long, undisturbed):
    """Each task has its own folder, and %a stands for its number. One of them is preempted.

    By hand, the way `scancel` does it: the signal goes to all processes of this array task and of no other.
    """
    options = ["--array=0-1", "--output=runs/array-%A_%a.log"]
    first = submit(*long, "strategy=single", "seed=%a", options=options, log="array-{}_0.log", task="_0")
    number = first.job_id.removesuffix("_0")
    second = replace(
        first,
        job_id=f"{number}_1",
        log=first.log.with_name(f"array-{number}_1.log"),
        folder=first.folder.with_name(f"job-{number}_1"),
    )
    wait_until(lambda: first.is_training(start=0), first)
    first.ask("scancel", "--signal=USR2", first.job_id)
    batches = first(), second()
    check_put_back(batches[0], 1, undisturbed, reason="stopped on request")
    assert (batches[1].returncode, batches[1].num_restarts) == (0, 0), batches[1].log
    assert [batch.summary["seed"] for batch in batches] == [0, 1]
    assert batches[1].summary["weights_sha256"] != undisturbed
    assert f"Slurm: job {number}_0 on" in batches[0].log


def test_slurm_preempts(submit, long, undisturbed):
    """For a job in a higher-priority partition; training stops by itself within the grace time."""
    options = ["--nodes=2", "--cpus-per-task=1"]
    job = submit(*long, "strategy=multiworker", options=options)
    wait_until(lambda: job.is_training(start=0), job)
    urgent = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"]
    job.ask("sbatch", *urgent)
    check_put_back(job(), 1, undisturbed, reason="stopped on request")


def test_the_time_is_nearly_up(submit, long, undisturbed):
    """Slurm checks every 30 s whether the warning is due, and counts those 30 s as already over.

    Training must not finish before that, so its process is frozen until the signal is pending. The next start gets more
    time, so that it is not warned as well.
    """
    job = submit(*long, "strategy=single", options=["--time=1", "--signal=USR2@25"])
    wait_until(lambda: job.is_training(start=0) or int(job.told("Restarts")) > 0, job)
    for pid in job.processes() if int(job.told("Restarts")) == 0 else []:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # the warning was faster
            os.kill(pid, signal.SIGSTOP)
            wait_until(lambda pid=pid: is_pending(pid, signal.SIGUSR2), job)
            os.kill(pid, signal.SIGCONT)
    wait_until(lambda: int(job.told("Restarts")) > 0, job)
    job.ask("scontrol", "update", f"JobId={job.job_id}", "TimeLimit=10")
    batch = job()
    assert batch.returncode == 0, batch.log
    assert batch.num_restarts >= 1
    assert batch.log.count("goes back into the queue: stopped on request;") == batch.num_restarts
    assert "TIME LIMIT" not in batch.log
    assert batch.summary["weights_sha256"] == undisturbed


def is_pending(pid: int, number: signal.Signals) -> bool:
    masks = re.findall(r"^(?:Sig|Shd)Pnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return any(int(mask, 16) & 1 << number - 1 for mask in masks)


def test_a_process_is_lost(submit, long, undisturbed):
    """First the last one, then the chief: each time the others end soon, and all are started again in the same job."""
    horovodrun()
    job = submit(*long, "strategy=horovod", options=["--nodes=2", "--cpus-per-task=1"])
    for times, rank in enumerate([1, 0], start=1):
        job.signal_one(rank, signal.SIGKILL)
        wait_until(
            lambda times=times: job.text().count(" goes on with 2 node(s): a process ") == times, job, timeout_s=60
        )
        wait_until(lambda: job.text().rpartition(" goes on with ")[2].count("\nEpoch ") >= 3, job)
    batch = job()
    assert (batch.state, batch.returncode, batch.num_restarts) == ("COMPLETED", 0, 0), batch.log
    assert len(batch.summary["resumed_from_epochs"]) == 2
    assert batch.summary["weights_sha256"] == undisturbed


def test_a_cancelled_job_does_not_come_back(submit, long):
    """Even though it has enough time to save a checkpoint and say that it was stopped."""
    job = submit(*long, "strategy=single")
    wait_until(lambda: job.is_training(start=0), job)
    job.ask("scancel", job.job_id)
    batch = job()
    assert (batch.state, batch.num_restarts) == ("CANCELLED", 0), batch.log
    assert "Stopped on request after epoch" in batch.log
    assert "goes back" not in batch.log
    assert "is not put back" not in batch.log


def test_a_failed_training_does_not_come_back(submit, small):
    job = submit(*small, "strategy=multiworker", "optimizer.learning_rate=1e30", options=["--nodes=2"])
    batch = job()
    assert (batch.state, batch.returncode, batch.num_restarts) == ("FAILED", 1, 0), batch.log
    assert "goes back" not in batch.log


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        ("exit 2", "sleep 60", 2),  # srun ends the second one with SIGTERM, so srun's own exit code is 143
        ("exit 1", "trap '' TERM; sleep 1; kill -9 $$", 1),
        ("trap '' TERM; sleep 0.5; exit 1", "exit 76", 1),  # the one that noticed the other was missing was faster
        ("exit 127", "sleep 60", 127),
    ],
)
def test_only_the_first_failure_counts(first, second, code, submit):
    """Not what it does to the others. Two small shell scripts stand in for Python."""
    site = f"launcher=(bash -c 'if ((SLURM_PROCID)); then {quoted(second)}; else {quoted(first)}; fi')"
    batch = submit(options=["--nodes=2"], site=site)()
    assert (batch.state, batch.returncode, batch.num_restarts) == ("FAILED", code, 0), batch.log
    assert "goes back" not in batch.log


def quoted(command: str) -> str:
    """Escape text for use between single quotes."""
    return command.replace("'", "'\\''")


def test_requeues_are_limited(submit):
    """A job killed at each start before its first checkpoint is given up after some requeues, and a line says so.

    Each time it tries once more before it goes back into the queue.
    """
    batch = submit("seed=3", "+x=a b", site="max_requeues=2; launcher=(bash -c 'kill -9 $$')")()
    assert (batch.state, batch.num_restarts) == ("FAILED", 2), batch.log
    assert batch.log.count("goes back into the queue: a process of the job was lost") == 2
    assert batch.log.count(f"Job {batch.job_id} goes on with 1 node(s): a process of the job was lost; it resumes") == 3
    (line,) = [line for line in batch.log.splitlines() if line.startswith("error: ")]
    assert "it was 2 time(s) already, with no checkpoint; max_requeues=2 in slurm/train.sh" in line
    assert line.endswith(rf"sbatch slurm/train.sh seed=3 +x=a\ b run_dir=runs/job-{batch.job_id}")


def test_a_process_that_takes_too_much_memory_does_not_come_back(submit):
    """It would run out again.

    A small shell script prints what Slurm says when a memory limit is hit, and is killed when the line has reached the
    log: the last words of a killed process may be lost.
    """
    line = "srun: error: node1: task 0: Out Of Memory"
    is_logged = "grep -q Out.Of.Memory runs/job-$SLURM_JOB_ID.log"
    task = f'echo "{line}" >&2; until {is_logged}; do sleep 0.1; done; kill -9 $$'
    batch = submit(site=f"launcher=(bash -c '{task}')")()
    assert (batch.state, batch.num_restarts) == ("FAILED", 0), batch.log
    assert line in batch.log
    assert "goes back" not in batch.log


def test_requeueing_is_not_allowed(submit):
    """The line has Slurm's own words and what to type."""
    refuses = """scontrol() { [[ $1 != requeue ]] && command scontrol "$@" || { echo 'Access denied' >&2; false; }; }"""
    site = f"launcher=(bash -c 'exit 75'); {refuses}"
    batch = submit(site=site)()
    assert (batch.state, batch.returncode, batch.num_restarts) == ("FAILED", 75, 0), batch.log
    (line,) = [line for line in batch.log.splitlines() if line.startswith("error: ")]
    assert "is not put back into the queue: stopped on request, but Access denied. To resume from no checkpoint" in line
    assert line.endswith(f"sbatch slurm/train.sh run_dir=runs/job-{batch.job_id}")


def test_a_signal_to_the_script(submit):
    """`--signal=B:...` and `scancel --batch` signal only the script, which forwards them to a stand-in for training."""
    task = 'trap "exit 75" USR2; ((SLURM_RESTART_COUNT)) && exit 0; echo ready; while :; do sleep 0.1; done'
    job = submit(site=f"launcher=(bash -c '{task}')")
    wait_until(lambda: "ready" in job.text(), job)
    job.ask("scancel", "--batch", "--signal=TERM", job.job_id)
    batch = job()
    assert (batch.state, batch.num_restarts) == ("COMPLETED", 1), batch.log
    assert batch.log.count("goes back into the queue: stopped on request") == 1


def test_the_doctor_looks_at_two_nodes(environment, desk, small):
    """One table for both, printed by rank 0; each sees the other's lock; the one that differs is marked."""
    words = [word for word in small if not word.startswith("trainer")]
    words += ["run_dir=runs/doctor", "json=true", "timeout_s=120"]
    task = 'if ((SLURM_PROCID)); then export TF_ENABLE_ONEDNN_OPTS=0; fi; exec "$0" -m mnist_dist.doctor "$@"'
    options = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--mpi=none", "--kill-on-bad-exit=1"]
    command = ["srun", *options, "bash", "-c", task, sys.executable, *words]
    result = subprocess.run(
        command, cwd=desk, env=environment, capture_output=True, text=True, timeout=JOB_S, check=False
    )
    assert result.returncode == 1, result.stdout + result.stderr
    told = json.loads(result.stdout)
    assert [rank["rank"] for rank in told["ranks"]] == [0, 1]
    rows = {row["name"]: row for row in told["rows"]}
    assert rows["lock seen by ranks"]["status"] == "ok"
    assert "sees the lock" in rows["lock seen by ranks"]["found"]
    (deviation,) = rows["variables"]["deviations"]
    assert (deviation["rank"], deviation["status"], deviation["fix"]) == (1, "error", "unset TF_ENABLE_ONEDNN_OPTS")
    assert rows["KillWait"]["status"] == "warning"
    assert rows["KillWait"]["found"].startswith("10 s to finish the epoch")
    assert "SIGUSR2@90" in rows["KillWait"]["fix"]
    assert rows["RequeueExit"]["status"] == "ok"
    assert "gives up a dead node after 300 s" in rows["SlurmdTimeout"]["found"]
    assert (rows["UnkillableStepTimeout"]["status"], rows["UnkillableStepTimeout"]["found"][:6]) == ("ok", "180 s:")
    assert {name for name, row in rows.items() if row["status"] == "error"} == {"variables"}
    assert not (desk / "runs" / "doctor").exists()


@pytest.mark.parametrize("name", ["train", "verify", "sweep"])
def test_outside_a_job(name, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    script = CHECKOUT / "slurm" / f"{name}.sh"
    result = subprocess.run(
        ["bash", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert re.search(f"this is a batch script: sbatch .*slurm/{name}.sh", result.stderr)


def test_the_scripts_are_clean():
    scripts = [CHECKOUT / "slurm" / "site.sh.example", *(CHECKOUT / "slurm").glob("*.sh")]
    scripts += (CHECKOUT / "scripts").rglob("*.sh")
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck") is None:
        pytest.fail("no shellcheck") if os.environ.get("CI") else pytest.skip("no shellcheck")
    subprocess.run(["shellcheck", "--shell=bash", "--external-sources", *scripts], check=True)
