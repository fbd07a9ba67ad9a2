"""Jobs that start while strangers knock at everything that listens, and who may not be one of a job."""

import os
import re
import socket
import threading
import time

import pytest
from support.launchers import local_addresses, tf_config
from support.runs import summary_of
from support.scanner import Scanner

from mnist_dist.base.errors import EXIT_USER_ERROR
from mnist_dist.launch.gate import MAX_NEWCOMERS
from mnist_dist.launch.ports import hold_free_port

SECRET = "correct-horse-battery-staple"


@pytest.fixture
def own_ports():
    """Ports of our range for two ranks."""
    held = [hold_free_port() for _ in range(2)]
    numbers = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return dict(enumerate(numbers))


@pytest.mark.parametrize(
    ("strategy", "launcher"), [("multiworker", None), ("multiworker", "srun"), ("horovod", "srun")]
)
def test_a_port_scanner_during_a_job(strategy, launcher, own_ports, uninterrupted, args, start, tmp_path):
    """Rank 1 comes late, so that all that listens is found."""
    folder = tmp_path / "run"
    with Scanner() as scanner:
        options = {"launcher": launcher, "ports": None if launcher else own_ports, "delays_s": {1: 2}}
        options["started"] = scanner.processes
        job = start((strategy, 2), *args, f"run_dir={folder}", **options)
        codes = job.codes(300)
    assert codes == [0, 0], job.output()
    assert summary_of(folder)["weights_sha256"] == summary_of(uninterrupted)["weights_sha256"]
    assert len(scanner.greeted) >= 2, scanner.greeted  # the meeting and the watch
    assert not scanner.elsewhere
    assert "Traceback" not in job.output()


def test_a_flood_that_begins_before_rank_0_listens(own_ports, uninterrupted, args, start, tmp_path):
    """More than may wait at once, and never fewer."""
    is_over, folder = threading.Event(), tmp_path / "run"

    def flood():
        held = []
        while not is_over.is_set():
            try:
                held.append(socket.create_connection(("127.0.0.1", own_ports[0]), timeout=5))
            except OSError:
                time.sleep(0.001)
            if len(held) > MAX_NEWCOMERS:
                held.pop(0).close()

    floods = [threading.Thread(target=flood) for _ in range(2)]
    for one in floods:
        one.start()
    try:
        job = start(("multiworker", 2), *args, f"run_dir={folder}", ports=own_ports)
        assert job.codes(300) == [0, 0], job.output()
    finally:
        is_over.set()
        for one in floods:
            one.join(60)
    assert summary_of(folder)["weights_sha256"] == summary_of(uninterrupted)["weights_sha256"]


@pytest.fixture
def start_with(start_python, args):
    """Start a rank for each environment, at addresses of its own."""

    def begin(folder, *environments):
        common = ("-m", "mnist_dist.train", *args, "strategy=multiworker", f"run_dir={folder}")
        workers = tf_config(local_addresses(len(environments)))
        return [start_python(*common, env={**worker, **env}) for worker, env in zip(workers, environments, strict=True)]

    return begin


def test_ranks_with_different_secrets(start_with, tmp_path):
    """Each ends with one line, and nothing is written."""
    first, second = start_with(tmp_path / "run", {"MNIST_DIST_SECRET": SECRET}, {"MNIST_DIST_SECRET": SECRET[::-1]})
    ((result,), output) = second.wait(60), second.output()
    assert result.returncode == EXIT_USER_ERROR
    line = (
        r"\[rank 1/2\] error: 127\.0\.0\.1:\d+: a process of mnist_dist is there, with another secret than "
        "rank 1: it is another job's, or set MNIST_DIST_SECRET to the same value for all processes of the job\n"
    )
    assert re.fullmatch(line, result.stderr)
    first.kill()
    for text in (output, first.output()):
        assert SECRET not in text and SECRET[::-1] not in text
    assert not (tmp_path / "run").exists()


def test_a_secret_is_written_nowhere(start_with, tmp_path):
    """Not into the run folder, and not into what the ranks print."""
    folder = tmp_path / "run"
    jobs = start_with(folder, *[{"MNIST_DIST_SECRET": SECRET}] * 2)
    for job in jobs:
        assert job.codes(300) == [0], job.output()
        assert SECRET not in job.output()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path


def test_a_short_secret(start_with, tmp_path):
    (job, _) = start_with(tmp_path / "run", *[{"MNIST_DIST_SECRET": "hunter2"}] * 2)
    ((result,)) = job.wait(60)
    assert result.returncode == EXIT_USER_ERROR
    assert result.stderr.startswith("error: MNIST_DIST_SECRET has 7 characters, at least 16 are needed: export ")
    assert result.stderr.count("\n") == 1 and "hunter2" not in result.stderr


def test_a_single_process_needs_no_secret(args, run_python, tmp_path):
    command = ("-m", "mnist_dist.train", *args, "trainer.epochs=1", f"run_dir={tmp_path / 'run'}")
    result = run_python(*command, env={"MNIST_DIST_SECRET": "short", "XDG_CACHE_HOME": str(tmp_path / "cache")})
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "cache").exists()


# Twenty processes that need the secret at the same moment, without TensorFlow.
RACE = """
import os, sys, time
from mnist_dist.launch.secret import meeting_key
from mnist_dist.launch.topology import TFConfig, Topology
at = time.monotonic() + 1
for _ in range(20):
    if os.fork() == 0:
        while time.monotonic() < at:
            pass
        os.write(1, meeting_key(Topology(TFConfig(("127.0.0.1:1",))), "127.0.0.1:1").hex().encode() + b"\\n")
        os._exit(0)
for _ in range(20):
    os.wait()
"""


@pytest.mark.parametrize("home", ["home", "/dev/null"])
def test_many_that_create_the_secret_at_once(home, run_python, tmp_path):
    """In a home folder that is new, and among the temporary files if it cannot be written."""
    environment = {"HOME": str(tmp_path / home), "XDG_CACHE_HOME": "", "TMPDIR": str(tmp_path), "MNIST_DIST_SECRET": ""}
    result = run_python("-c", RACE, env=environment, fresh=True)
    keys = result.stdout.split()
    assert (len(keys), len(set(keys))) == (20, 1), result.stderr
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert (path.name, path.stat().st_mode & 0o777, path.stat().st_uid) == ("secret", 0o600, os.geteuid())
