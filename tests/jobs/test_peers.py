"""A process of a job is lost or ends for a reason: all others end at once as well, and say which it was."""

import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from support.job import wait_for_epoch
from support.launchers import local_addresses, tf_config
from support.processes import is_alive

from mnist_dist.base.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_LOST_PEER, EXIT_OK, EXIT_USER_ERROR
from mnist_dist.launch.gate import enter
from mnist_dist.launch.secret import watch_key
from mnist_dist.launch.topology import TFConfig, Topology

# A rank that agrees, watches, and then does what its argument says, without TensorFlow.
PEER = """
import json, os, signal, sys, time
from mnist_dist.launch import links, peers
from mnist_dist.base.errors import TrainingFailed, UserError
from mnist_dist.cli.main import _guarded
from mnist_dist.launch.rendezvous import Rendezvous
from mnist_dist.launch.environment import read_topology

topology = read_topology()
links._JOIN_S = 5.0
links.SILENCE_S, peers._SUSPICIOUS_SILENCE_S, links.ALIVE_EVERY_S = 3.0, 2.0, 0.2
watch = peers.PeerWatch(topology)

def main():
    address = Rendezvous(topology, timeout_s=30).exchange(watch.address)[0]
    if "early" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
    with watch.watching(address):
        watch.started()
        for word in sys.argv[1:]:
            if word == "wait":
                time.sleep(600)
            elif word == "raise":
                raise RuntimeError("collective failed")
            elif word == "full":
                raise TrainingFailed("run/history.csv cannot be written")
            elif word == "user":
                raise UserError("data.path=x: no such file")
            elif word == "interrupt":
                watch.tell_why("interrupted", 130)
                return 130
            elif word == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif word == "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
            else:
                time.sleep(float(word))
    return 0

sys.exit(_guarded(main))
"""


@pytest.fixture
def run_peers(start_python):
    """Start one rank per list of words; returns (exit code, errors) of each one that ends by itself."""

    def run(*words, frozen=(), suspend_s=0):
        environments = tf_config(local_addresses(len(words)))
        jobs = [start_python("-c", PEER, *own, env=env) for own, env in zip(words, environments, strict=True)]
        if suspend_s:
            time.sleep(3)  # they have met by then
            for job in jobs:
                job.freeze()
            time.sleep(suspend_s)
            for job in jobs:
                job.processes[0].resume()
        results = [job.wait(60)[0] for rank, job in enumerate(jobs) if rank not in frozen]
        # The port is not compared.
        return [(result.returncode, re.sub(r"(127\.0\.0\.1):\d+", r"\1", result.stderr)) for result in results]

    return run


def gone(rank: int, how: str = "its connection broke") -> tuple[int, str]:
    return (
        EXIT_LOST_PEER,
        f"error: rank {rank} (127.0.0.1) is gone ({how}), so this process ends too; what was saved is kept, and the "
        "same command resumes from there\n",
    )


def test_all_end_normally(run_peers):
    assert run_peers([0.5], [1], [0]) == [(EXIT_OK, "")] * 3


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_lost_rank_ends_all_others(lost, run_peers):
    words = [["wait"], ["wait"], ["wait"]]
    words[lost] = [0.5, "kill"]
    ends = run_peers(*words)
    assert ends.pop(lost) == (-signal.SIGKILL, "")
    assert ends == [gone(lost)] * 2


@pytest.mark.parametrize("lost", [0, 2])
def test_a_rank_is_lost_before_it_watches(lost, run_peers):
    words = [["wait"], ["wait"], ["wait"]]
    words[lost] = ["early"]
    ends = run_peers(*words)
    assert ends.pop(lost) == (-signal.SIGKILL, "")
    if lost == 2:
        assert ends == [gone(2, "it came, and ended before all had come")] * 2
    for code, error in ends:
        assert code in (EXIT_LOST_PEER, EXIT_USER_ERROR)
        assert error.startswith(f"error: rank {lost} (127.0.0.1) ")


def test_a_collective_fails_first(run_peers):
    """The backend's own error comes before the broken connection is noticed: still the lost rank is reported."""
    assert run_peers(["wait"], [0.5, "kill"], [0.5, "raise"])[2] == gone(1)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank_is_lost(frozen, run_peers):
    words = [["wait"], ["wait"], ["wait"]]
    words[frozen] = [0.5, "freeze"]
    assert run_peers(*words, frozen=[frozen]) == [gone(frozen, "silent for 3 s")] * 2


def test_a_frozen_rank_is_lost_sooner_once_a_collective_fails(run_peers):
    ends = run_peers([1, "raise"], [0.5, "freeze"], frozen=[1])
    assert ends == [gone(1, "silent for 2 s")]


def test_a_job_that_is_suspended_as_a_whole_continues(run_peers):
    """The way `scontrol suspend` does it: no rank hears from any other for a while."""
    assert run_peers([12], [12], [12], suspend_s=5) == [(EXIT_OK, "")] * 3


@pytest.mark.parametrize("failed", [0, 1])
def test_a_rank_that_fails_says_why(failed, run_peers):
    words = [["wait"], ["wait"], ["wait"]]
    words[failed] = [0.5, "full"]
    ends = run_peers(*words)
    assert ends.pop(failed) == (EXIT_FAILURE, "error: run/history.csv cannot be written\n")
    assert ends == [(EXIT_FAILURE, f"error: rank {failed} (127.0.0.1) ended: run/history.csv cannot be written\n")] * 2


def test_ranks_that_fail_together_each_report_their_own_failure(run_peers):
    ends = run_peers([0.5, "user"], [1, "user"], [1.5, "user"])
    assert ends == [(EXIT_USER_ERROR, "error: data.path=x: no such file\n")] * 3


def test_ctrl_c_in_one_interrupts_all(run_peers):
    interrupted, other = run_peers([0.5, "interrupt"], ["wait"])
    assert interrupted == (EXIT_INTERRUPTED, "")
    assert other == (EXIT_INTERRUPTED, "error: rank 0 (127.0.0.1) ended: interrupted\n")


def test_a_bug_shows_its_traceback_and_ends_the_others(run_peers):
    (code, error), other = run_peers([0.5, "raise"], ["wait"])
    assert code == 1
    assert error.endswith("RuntimeError: collective failed\n")
    assert other == (EXIT_FAILURE, "error: rank 0 (127.0.0.1) ended: collective failed\n")


@pytest.fixture
def chief(python_environment):
    """Rank 0 of two, which waits for the end of its input, and what rank 1 needs to know: the address, and the key."""
    code = """
import sys
from mnist_dist.launch.peers import PeerWatch
from mnist_dist.launch.topology import TFConfig, Topology
chief = PeerWatch(Topology(TFConfig(("127.0.0.1:1", "127.0.0.1:2")), 0, 2, 0, 2))
print(chief.address, flush=True)
with chief.watching(chief.address):
    sys.stdin.read()
"""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code], env=python_environment, text=True, **pipes) as process:
        host, port, token = process.stdout.readline().strip().split(":")
        yield process, (host, int(port)), watch_key(Topology(TFConfig(("127.0.0.1:1",))), token)
        process.kill()


def test_strangers_are_ignored(chief):
    """Programs that connect without this job's key and then leave."""
    process, address, _ = chief
    for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b'{"rank": 1, "host": ""}\n', b"[]\n", b"\xff\n"):
        with socket.create_connection(address) as connection:
            connection.sendall(words)
    time.sleep(1)
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(timeout=30) == 0


def test_a_stranger_who_drips_is_soon_cut_off(chief):
    process, address, _ = chief
    with socket.create_connection(address, timeout=20) as connection:
        connection.sendall(b"m")
        assert connection.recv(100).startswith(b"mnist")
        assert connection.recv(1) == b""
    assert process.poll() is None


def test_a_stranger_whose_line_never_ends_is_cut_off(chief):
    process, address, _ = chief
    with socket.create_connection(address, timeout=20) as connection, pytest.raises(ConnectionError):
        for _ in range(1000):
            connection.sendall(b"x" * 2**20)
    assert process.poll() is None


@pytest.mark.parametrize("pause_s", [0, 1])
@pytest.mark.parametrize(
    ("word", "code", "error"),
    [
        (b'{}\n{"failed": "no memory", "code": 1}\n', EXIT_FAILURE, "rank 1 (127.0.0.1:2) ended: no memory"),
        (b"\xff[oops\n", EXIT_LOST_PEER, "rank 1 (127.0.0.1:2) is gone (its connection broke), so this process"),
        (b'{"fail', EXIT_LOST_PEER, "rank 1 (127.0.0.1:2) is gone (its connection broke), so this process"),
    ],
)
def test_what_comes_after_the_greeting(word, code, error, pause_s, chief):
    """In the same chunk, and bytes that are not a message at all."""
    process, address, key = chief
    hello = b'{"rank": 1, "host": "x"}\n'
    with socket.create_connection(address) as connection:
        enter(connection, key, timeout_s=20)
        for chunk in (hello, word) if pause_s else (hello + word,):
            connection.sendall(chunk)
            time.sleep(pause_s)
        connection.shutdown(socket.SHUT_WR)
        assert process.wait(timeout=30) == code
    assert process.stderr.read().startswith(f"error: {error}")


def test_a_rank_that_connects_and_is_done_at_once(chief):
    process, address, key = chief
    with socket.create_connection(address) as connection:
        enter(connection, key, timeout_s=20)
        connection.sendall(b'{"rank": 1, "host": ""}\n{"done": true}\n')
    time.sleep(1)
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(timeout=30) == EXIT_OK


@pytest.mark.parametrize(
    ("strategy", "size", "launcher", "lost"),
    [
        ("horovod", 2, None, 1), ("horovod", 3, "srun", 0), ("horovod", 3, "srun", 1), ("multiworker", 2, None, 0),
        ("multiworker", 2, None, 1),
    ],
)  # fmt: skip
def test_a_lost_rank_in_training(strategy, size, launcher, lost, small_npz, start, tmp_path):
    folder = tmp_path / "run"
    arguments = ["data=npz", f"data.path={small_npz}", "trainer.epochs=100000", f"run_dir={folder}"]
    job = start((strategy, size), *arguments, launcher=launcher)
    wait_for_epoch(job, folder, 2)
    assert job.is_running(), job.output()
    ranks = job.ranks()
    assert sorted(ranks) == list(range(size))
    ranks[lost].kill()
    codes = job.codes(60)
    output = job.output()
    lines = [line for line in output.splitlines() if "is gone" in line]
    assert len(lines) == size - 1, output
    for line in lines:
        assert f"error: rank {lost} (" in line
    # horovodrun ends with a traceback of its own.
    under_horovodrun = len(codes) == 1
    assert "Traceback" not in (output.partition("is gone")[0] if under_horovodrun else output)
    assert sorted(codes) == ([1] if under_horovodrun else [-signal.SIGKILL, *[EXIT_LOST_PEER] * (size - 1)])
    assert not any(map(is_alive, ranks.values()))


# Trains, and considers a process that is silent for 3 s lost, but only once all have started.
IMPATIENT = """
from mnist_dist import train
from mnist_dist.launch import links
links.SILENCE_S, links.ALIVE_EVERY_S = 3.0, 0.2
train.main()
"""


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank_in_training(frozen, small_npz, start, tmp_path):
    """The long timeout is only for the start-up; once training, 3 s count and not the 10 minutes of the start-up."""
    folder = tmp_path / "run"
    arguments = ["data=npz", f"data.path={small_npz}", "trainer.epochs=100000", f"run_dir={folder}"]
    job = start(("multiworker", 2), *arguments, "strategy.start_timeout_s=600", script=("-c", IMPATIENT))
    wait_for_epoch(job, folder, 2)
    ranks = job.ranks()
    ranks[frozen].suspend()
    assert ranks[1 - frozen].wait(60) == EXIT_LOST_PEER
    assert re.search(rf"error: rank {frozen} \(.*\) is gone \(silent for 3 s\)", job.output())
