"""`sbatch slurm/verify.sh` on a real Slurm of two nodes: good ones, and with what can happen to one of them."""

import json
import os
import shlex
import shutil
import signal

import pytest
from support import CHECKOUT
from support.batch import Batch, environment_of_user, submitter, wait_until
from support.hooks import HOOKS
from support.launchers import horovodrun
from support.slurm_cluster import NODES, daemon_of, lost_node, run_cluster

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]

TWO_NODES = ("--nodes=2", "--cpus-per-task=1")
FILES = {"verify.json", "verify.html", "suspects.txt", "verify.log"}
STEP = "checks=[identity,exact]"


def verifier(submit, small):
    """A function that starts `sbatch slurm/verify.sh` on both nodes."""
    horovodrun()
    words = [word for word in small if not word.startswith("trainer")]

    def start(*arguments, site="", options=TWO_NODES):
        return submit("strategy=horovod", *words, *arguments, script="verify", options=options, site=site)

    return start


@pytest.fixture
def verify(submit, small):
    return verifier(submit, small)


def with_fault(fault: str) -> str:
    """Lines of a site.sh that start verify with a fault; see tests/support/hooks/faulty_verify.py."""
    start = f'shift 3; exec "$python" {shlex.quote(str(HOOKS / "faulty_verify.py"))} "$@"'
    path = shlex.quote(str(CHECKOUT / "tests"))
    return f"""
        export FAULT={fault} PYTHONPATH="$PYTHONPATH":{path}
        launcher=(bash -c 'python=$1; {start}' bash)
    """


def played(first: str, second: str) -> str:
    """Lines of a site.sh with which two small shell scripts stand in for Python."""
    return f"launcher=(bash -c {shlex.quote(f'if ((SLURM_PROCID)); then {second}; else {first}; fi')})"


def last_line(batch: Batch) -> str:
    return batch.log.splitlines()[-1]


def suspects(batch: Batch) -> list[str]:
    return (batch.folder / "suspects.txt").read_text().splitlines()


def report(batch: Batch) -> dict:
    assert {path.name for path in batch.folder.iterdir()} >= FILES
    return json.loads((batch.folder / "verify.json").read_text())


def check_fails(batch: Batch, *, blames: str) -> None:
    """Check that rank 0 wrote down who is to blame, and that the job ended with it."""
    assert batch.state in ("FAILED", "COMPLETING"), batch.log
    assert batch.returncode == 1, batch.log
    assert report(batch)["verdict"] == "FAIL"
    assert suspects(batch) == [blames]
    assert last_line(batch).startswith(f"FAIL: runs/verify-{batch.job_id} ")


def check_has_no_verdict(batch: Batch, *, blames: list[str], says: str = "") -> None:
    """Check that the script itself speaks."""
    assert batch.state in ("FAILED", "COMPLETING"), batch.log
    assert batch.returncode == 1, batch.log
    assert last_line(batch).startswith("FAIL: no verdict: ")
    assert says in last_line(batch)
    assert last_line(batch).endswith(f"; suspects: {' '.join(blames) or 'none'}")
    assert suspects(batch) == blames
    assert not (batch.folder / "verify.json").exists()


def test_two_good_nodes(verify):
    batch = verify("checks=[identity,collectives,exact]")()
    assert (batch.state, batch.returncode) == ("COMPLETED", 0), batch.log
    told = report(batch)
    assert told["verdict"] == "PASS"
    assert [rank["host"] for rank in told["ranks"]] == [*NODES]
    assert suspects(batch) == []
    assert f"Job {batch.job_id} on 127.0.0.[1-2]: 2 node(s), 1 process(es) on each with 1 core(s)" in batch.log
    assert batch.log.count("PASS: no fault found") == 1
    assert last_line(batch) == f"PASS: runs/verify-{batch.job_id} (verify.html, verify.json, suspects.txt)"


def test_a_slow_node(verify):
    """Its steps sleep, which other processes on this machine do not explain, however busy they are."""
    for _ in range(3):  # unless they leave it no core at all
        batch = verify("checks=[identity,slow_rank]", site=with_fault("slow_rank:1"))()
        assert (batch.state, batch.returncode) == ("COMPLETED", 0), batch.log
        told = report(batch)
        if told["verdict"] == "DEGRADED":
            break
        (check,) = [check for check in told["checks"] if check["name"] == "slow_rank"]
        assert check["status"] == "inconclusive", batch.log
    assert told["verdict"] == "DEGRADED", batch.log
    assert suspects(batch) == [NODES[1]]
    assert last_line(batch).startswith("DEGRADED: ")


def judge(verdict: str) -> str:
    """The shell commands by which a stand-in for rank 0 writes a verdict."""
    return 'mkdir FOLDER; echo \' "verdict": "VERDICT",\' >FOLDER/verify.json'.replace(
        "FOLDER", "runs/verify-$SLURM_JOB_ID"
    ).replace("VERDICT", verdict)


def test_strict_makes_a_slow_node_a_failure(verify):
    batch = verify(site=played(f"{judge('DEGRADED')}; exit 1", "exit 1"))()
    assert (batch.state, batch.returncode) == ("FAILED", 1), batch.log
    assert last_line(batch).startswith("DEGRADED: ")


def test_a_process_ends_badly_after_a_good_verdict(verify):
    batch = verify(site=played(judge("PASS"), "sleep 1; exit 1"))()
    assert (batch.state, batch.returncode) == ("FAILED", 1), batch.log
    assert last_line(batch).startswith("FAIL: the verdict was PASS, but then: ")
    assert "task 1: Exited with exit code 1" in last_line(batch)


def test_rank_0_has_time_to_write_its_verdict(verify):
    """Though another process has been killed."""
    batch = verify(site=played(f"sleep 8; {judge('FAIL')}; exit 1", "kill -9 $$"))()
    assert (batch.state, batch.returncode) == ("FAILED", 1), batch.log
    assert last_line(batch).startswith(f"FAIL: runs/verify-{batch.job_id} "), batch.log


def test_a_killed_process(verify):
    """Rank 0 is not ended with it, but says which one it was; the next job keeps away from its node."""
    batch = verify(STEP, site=with_fault("killed:1"))()
    check_fails(batch, blames=NODES[1])
    assert f"rank 1 ({NODES[1]}) is gone (its connection broke)" in batch.log
    check_is_excluded(verify, f"./runs/verify-{batch.job_id}/suspects.txt")


def check_is_excluded(verify, path: str) -> None:
    """Check that `sbatch --exclude` accepts the file."""
    job = verify("--help", options=["--nodes=1", f"--exclude={path}"], site=played("true", "true"))
    batch = job()
    assert job.told("ExcNodeList") == NODES[1]
    assert job.told("NodeList") == NODES[0], batch.log


def test_the_first_process_is_killed(verify):
    batch = verify(STEP, site=with_fault("killed:0"))()
    check_has_no_verdict(batch, blames=[NODES[0]], says=f"{NODES[0]}: task 0: Killed")


def test_frozen_processes(verify):
    """They are noticed by their silence, of 30 s; then srun ends them. Two jobs at the same time."""
    second, first = (verify(STEP, site=with_fault(f"freeze:{rank}") + "settle_s=10") for rank in (1, 0))
    check_fails(second(), blames=NODES[1])
    check_has_no_verdict(first(), blames=[NODES[0]])


@pytest.mark.parametrize(
    ("first", "second", "says", "blames"),
    [
        ("sleep 1; exit 76", "exit 127", "task 1: Exited with exit code 127", [NODES[1]]),
        ("sleep 1; exit 1", "kill -9 $$", "task 1: Killed", [NODES[1]]),  # it did not come
        ("exit 127", "exit 127", "Exited with exit code 127", []),
        ("exit 0", "exit 0", "exit code 0 of srun", []),
        ("sleep 1; exit 2", "kill -9 $$", "task 1: Killed", [NODES[1]]),
    ],
)
def test_no_verdict(first, second, says, blames, verify):
    check_has_no_verdict(verify(site=played(first, second))(), blames=blames, says=says)


def test_no_hang(verify):
    """Neither a process that does not end, nor srun, for which a shell function stands in."""
    endless = "trap '' TERM; sleep 300; sleep 300"
    jobs = [
        verify(site=played(endless, endless) + "; limit_s=5"),
        verify(site="srun() { sleep 300; }; limit_s=5"),
        verify(site=played(judge("PASS"), endless) + "; settle_s=3"),
        verify(site=f"srun() {{ {judge('PASS')}; sleep 300; }}; settle_s=3"),
    ]
    batches = [job() for job in jobs]
    for batch in batches[:2]:
        check_has_no_verdict(batch, blames=[], says="srun did not end within ")
    for batch in batches[2:]:
        assert (batch.state, batch.returncode) == ("FAILED", 1), batch.log
        assert last_line(batch).startswith("FAIL: the verdict was PASS, but then: ")


def test_the_time_is_up(verify):
    """Slurm ends the processes and the script; the latter has a moment left."""
    job = verify(site=played("echo ready; sleep 300", "sleep 300"))
    wait_until(lambda: "ready" in job.text(), job)
    job.ask("scancel", "--batch", "--signal=TERM", job.job_id)
    check_has_no_verdict(job(), blames=[], says="its time was up, or it was cancelled")


def test_wrong_usage(verify):
    """Exit code 2, and not the cluster's fault."""
    batch = verify("checks=[colectives]")()
    assert (batch.state, batch.returncode) == ("FAILED", 2), batch.log
    assert "FAIL" not in batch.log
    assert not batch.folder.exists()


def test_an_old_verdict_does_not_count(verify, desk):
    folder = desk / "runs" / "old one"
    folder.mkdir()
    (folder / "verify.json").write_text('{\n "verdict": "PASS"\n}\n')
    batch = verify("run_dir='runs/old one'")()
    assert (batch.state, batch.returncode) == ("FAILED", 2), batch.log
    assert last_line(batch) == "error: run_dir=runs/old one: holds a verification already; name another run_dir"


@pytest.fixture
def fragile(cluster, desk, small, tmp_path):
    """A cluster of its own, whose second node may be lost, and a function to verify it."""
    shutil.copytree(desk / "slurm", tmp_path / "slurm")
    (tmp_path / "runs").mkdir()  # the numbers of its jobs begin again
    with run_cluster() as environment:
        yield environment, verifier(submitter(environment_of_user(environment), tmp_path), small)


def wait_for_checks(job) -> None:
    wait_until(lambda: "  2 identity " in job.text(), job)


def test_a_stopped_daemon(fragile):
    """Slurm's own daemon on a node is not needed by what already runs there. But it is for the next job."""
    environment, verify = fragile
    job = verify("checks=[identity,collectives,exact]", site="settle_s=10")
    wait_for_checks(job)
    os.kill(daemon_of(environment, NODES[1]), signal.SIGTERM)
    batch = job(is_node_lost=True)
    assert batch.returncode == 0, batch.log
    assert (report(batch)["verdict"], suspects(batch)) == ("PASS", [])


def test_a_node_is_lost_before_the_start(fragile):
    """Slurm does not know yet."""
    environment, verify = fragile
    os.kill(daemon_of(environment, NODES[1]), signal.SIGKILL)
    check_has_no_verdict(verify(STEP)(is_node_lost=True), blames=[NODES[1]], says=f"failed on node {NODES[1]}")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_node_is_lost(number, fragile):
    """With all that runs there."""
    environment, verify = fragile
    job = verify("checks=[identity,collectives,exact,interruption]", site="settle_s=10")
    wait_for_checks(job)
    with lost_node(environment, NODES[1], number):
        check_fails(job(is_node_lost=True), blames=NODES[1])


def test_slurm_gives_a_node_up(fragile):
    """It notices a frozen node sooner than rank 0, which goes by its silence, and leaves rank 0 alone until then."""
    environment, verify = fragile
    job = verify(STEP, site=with_fault("hang:1") + "settle_s=10")
    wait_for_checks(job)
    with lost_node(environment, NODES[1], signal.SIGSTOP):
        job.ask("scontrol", "update", f"NodeName={NODES[1]}", "State=DOWN", "Reason=test")
        check_fails(job(is_node_lost=True), blames=NODES[1])
