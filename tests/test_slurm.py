"""`sbatch slurm/train.sh` on a real Slurm: two nodes with two pretended GPUs each, on this machine."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from jobs import CHECKOUT, LAUNCHER_VARIABLES, horovodrun
from slurm_cluster import missing_programs, run_cluster

pytestmark = pytest.mark.slurm

_JOB_S = 400  # on a busy machine; seconds on an idle one


@pytest.fixture(scope="module")
def cluster():
    """The cluster's environment variables; without Slurm the test is skipped, but fails where nothing may be (CI)."""
    if missing := missing_programs():
        reason = f"not installed: {', '.join(missing)}; apt-get install slurm-wlm munge"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    with run_cluster() as environment:
        yield environment


class Batch(NamedTuple):
    """What became of a batch job."""

    returncode: int
    job_id: str
    log: str
    folder: Path

    @property
    def summary(self) -> dict:
        return json.loads((self.folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """The folder that a user submits from, with blanks in its name."""
    folder = tmp_path_factory.mktemp("my own") / "two words"
    (folder / "runs").mkdir(parents=True)
    (folder / "slurm").mkdir()
    shutil.copy(CHECKOUT / "slurm" / "train.sh", folder / "slurm")
    (folder / "slurm" / "site.sh").write_text(f"python='{sys.executable}'\nexport FROM_THE_SITE=yes\n")
    return folder


@pytest.fixture(scope="module")
def small(small_npz, desk):
    """The arguments of a short training, whose data has a blank in its path too."""
    path = shutil.copy(small_npz, desk / "small data.npz")
    return ["data=npz", f"data.path={path}", "trainer.epochs=2"]


@pytest.fixture(scope="module")
def submit(cluster, desk):
    """Start `sbatch OPTIONS slurm/train.sh ARGUMENTS`; the call of what it returns waits for the end."""
    kept = {name: value for name, value in cluster.items() if not name.startswith(LAUNCHER_VARIABLES)}
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    environment = {**kept, "PYTHONPATH": path, "SLURM_CONF": cluster["SLURM_CONF"]}

    def ask(*command: str) -> str:
        return subprocess.run(
            command, cwd=desk, env=environment, stdout=subprocess.PIPE, text=True, timeout=60, check=True
        ).stdout

    def start(*arguments, options=(), log="job-{}.log"):
        job_id = ask("sbatch", "--parsable", *options, "slurm/train.sh", *arguments).strip()

        def wait() -> Batch:
            path = desk / "runs" / log.format(job_id)
            deadline = time.monotonic() + _JOB_S
            # sbatch --wait would look every 32 s only.
            while re.search(r"JobState=(PENDING|RUNNING|COMPLETING)", told := ask("scontrol", "show", "job", job_id)):
                if time.monotonic() > deadline:
                    pytest.fail(f"the job does not end\n{told}\n{path.read_text() if path.exists() else 'no log'}")
                time.sleep(0.5)
            codes = [int(code) for code in re.findall(r" ExitCode=(\d+):", told)]
            text = path.read_text() if path.exists() else ""
            return Batch(max(codes), job_id, text, desk / "runs" / f"job-{job_id}")

        return wait

    return start


@pytest.fixture(scope="module")
def expected(run_python, small, tmp_path_factory):
    """The digest of the weights that the same training gives without Slurm."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    result = run_python("-m", "mnist_dist.train", *small, "strategy=single", f"run_dir={folder}")
    assert result.returncode == 0, result.stderr
    return json.loads((folder / "summary.json").read_text())["weights_sha256"]


def check(batch: Batch, expected: str, *, strategy: str, world_size: int, num_replicas: int) -> None:
    assert batch.returncode == 0, batch.log
    summary = batch.summary
    assert summary["strategy"] == strategy
    assert summary["world_size"] == world_size
    assert summary["num_replicas"] == num_replicas
    assert summary["weights_sha256"] == expected, batch.log


def test_mirrored(submit, small, expected):
    """One process with all GPUs of its node; the GPUs being pretended, two logical CPUs."""
    batch = submit(*small, "strategy=mirrored", "strategy.num_replicas=2", options=["--gpus-per-node=2"])()
    check(batch, expected, strategy="mirrored", world_size=1, num_replicas=2)
    assert f"Job {batch.job_id} on 127.0.0.1: 1 node(s), 1 process(es) on each with 2 core(s), 2 GPU(s)" in batch.log
    assert f"Slurm: job {batch.job_id} on 127.0.0.1, restarted 0 time(s)" in batch.log
    assert (batch.folder / "train.log").is_file()


def test_multiworker_over_two_nodes(submit, small, expected):
    """One process on each node, however many tasks the script would allow."""
    options = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2"]
    batch = submit(*small, "strategy=multiworker", options=options)()
    check(batch, expected, strategy="multiworker", world_size=2, num_replicas=2)
    assert f"Slurm: job {batch.job_id} on 127.0.0.[1-2], restarted 0 time(s)" in batch.log


def test_horovod_over_two_nodes(submit, small, expected):
    """A process for each GPU, started by plain srun."""
    horovodrun()
    batch = submit(*small, "strategy=horovod", options=["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2"])()
    check(batch, expected, strategy="horovod", world_size=4, num_replicas=4)


def test_two_jobs_at_one_time(submit, small, expected):
    """No GPUs here: `auto` takes Horovod. The other job shares both nodes, at the same time."""
    horovodrun()
    options = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1"]
    waits = [submit(*small, options=options), submit(*small, "strategy=multiworker", options=options)]
    first, second = (wait() for wait in waits)
    check(first, expected, strategy="horovod", world_size=2, num_replicas=2)
    check(second, expected, strategy="multiworker", world_size=2, num_replicas=2)
    assert "Strategy: horovod (2 processes were started by slurm, and Horovod is installed)" in first.log
    assert first.folder != second.folder


def test_an_array(submit, small, desk, expected):
    """Its tasks have folders of their own, and %a stands for the number of each."""
    options = ["--array=0-1", "--output=runs/array-%A_%a.log"]
    batch = submit(*small, "seed=%a", options=options, log="array-{}_0.log")()
    assert batch.returncode == 0, batch.log
    summaries = [
        json.loads((desk / "runs" / f"job-{batch.job_id}_{task}" / "summary.json").read_text()) for task in range(2)
    ]
    assert [summary["seed"] for summary in summaries] == [0, 1]
    assert summaries[0]["weights_sha256"] == expected
    assert summaries[1]["weights_sha256"] != expected
    assert f"Slurm: job {batch.job_id}_0 on" in batch.log


def test_the_users_run_dir_is_taken(submit, small, desk):
    batch = submit(*small, "strategy=single", "run_dir=runs/of my own")()
    assert batch.returncode == 0, batch.log
    assert (desk / "runs" / "of my own" / "summary.json").is_file()
    assert not batch.folder.exists()


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


def test_outside_of_a_job(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    script = CHECKOUT / "slurm" / "train.sh"
    result = subprocess.run(
        ["bash", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "this is a batch script: sbatch slurm/train.sh" in result.stderr


def test_the_scripts_are_clean():
    scripts = [CHECKOUT / "slurm" / name for name in ("train.sh", "site.sh.example")]
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck") is None:
        pytest.fail("no shellcheck") if os.environ.get("CI") else pytest.skip("no shellcheck")
    subprocess.run(["shellcheck", "--shell=bash", *scripts], check=True)
