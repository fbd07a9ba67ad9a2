"""Jobs that lose processes or machines and are started again, as a launcher does: the folder, and what it says."""

import json
import signal
import socket
import time

import pytest
from support.hooks import WRITE_HOOK, WriteHook
from support.job import DOCTOR_HINT, HOROVOD, SINGLE, wait_for_epoch
from support.processes import wait_until
from support.runs import history_of, result_of, summary_of

from mnist_dist.base.errors import EXIT_FAILURE, EXIT_LOST_PEER, EXIT_OK, EXIT_USER_ERROR
from mnist_dist.launch.losses import LOSSES_VARIABLE, Loss

NODES = ("127.0.0.2", "127.0.0.3")
GONE = "is not this run's folder any more"

# Considers a process that is silent for 3 s lost.
IMPATIENT = """
from mnist_dist import train
from mnist_dist.launch import links
links.SILENCE_S, links.ALIVE_EVERY_S = 3.0, 0.2
train.main()
"""


# Waits 1 s for a process of an earlier start to end.
HASTY = """
from mnist_dist import train
from mnist_dist.run import input
input._ENDING_S = 1.0
train.main()
"""


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def launched(tmp_path):
    """The environment of each start by a launcher."""
    return {LOSSES_VARIABLE: str(tmp_path / "losses")}


@pytest.fixture
def note(tmp_path, launched):
    """Notes a loss as a launcher does; returns the environment of the next start."""

    def note(*hosts, how="node does not answer") -> dict[str, str]:
        with (tmp_path / "losses").open("a") as stream:
            stream.write(Loss(time.time(), hosts, how).to_line())
        return launched

    return note


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def events_of(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_a_frozen_chief_is_replaced(uninterrupted, start, train, note, launched, args, folder):
    """Its whole machine is frozen; when it wakes up, it finds that others have gone on, and touches nothing."""
    arguments = [*args, f"run_dir={folder}"]
    job = start(HOROVOD, *arguments, launcher="srun", nodes=NODES, script=("-c", IMPATIENT), env=launched)
    wait_for_epoch(job, folder, 3)
    chief, other = job.processes
    chief.suspend()
    assert other.wait(60) == EXIT_LOST_PEER
    # Nobody else gets its lock, nor does a job that has lost another machine.
    refused = train(folder)
    assert refused.returncode == EXIT_USER_ERROR and "another job is training here" in refused.stderr
    refused = train(folder, env=note("127.0.0.9"), script=("-c", HASTY))
    expected = (
        f"a process on {NODES[0]} that trained here before has not ended within 1 s (it holds the lock on train.log)"
    )
    assert refused.returncode == EXIT_LOST_PEER and expected in refused.stderr
    result = train(folder, env=note(NODES[0]))
    assert result.returncode == EXIT_OK, result.stderr
    assert f"{folder}: taken over from a process on a machine that was lost\n" in result.stdout
    assert result_of(folder) == result_of(uninterrupted)
    (incident,) = summary_of(folder)["incidents"]
    assert (incident["ranks"], incident["hosts"]) == ([0], ["127.0.0.9", NODES[0]])
    before = contents(folder)
    chief.resume()
    assert chief.wait(60) in (EXIT_FAILURE, EXIT_LOST_PEER)
    assert contents(folder) == before


MOMENTS = [
    WriteHook("epoch-00004.ckpt", 0.5),
    WriteHook("epoch-00004.ckpt", "flushed"),
    WriteHook("epoch-00004.ckpt", "renamed"),
    WriteHook("history.csv", 1, number=4),
    WriteHook("history.csv", "flushed", number=4),
    WriteHook("events.jsonl", 0.5, number=2),
    WriteHook("events.jsonl", "flushed", number=2),
    WriteHook("summary.json", "flushed"),
]


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda hook: f"{hook.file} {hook.moment}")
def test_frozen_in_the_middle_of_a_write(moment, uninterrupted, start, train, note, launched, args, folder, tmp_path):
    hook = WriteHook(moment.file, moment.moment, moment.number, signs=tmp_path)
    job = start(SINGLE, *args, f"run_dir={folder}", script=WRITE_HOOK, env={**launched, **hook.environment()})
    wait_until(lambda: hook.is_held or not job.is_running())
    result = train(folder, env=note(socket.gethostname()))
    assert result.returncode == EXIT_OK, result.stderr
    assert result_of(folder) == result_of(uninterrupted)
    before = contents(folder)
    assert not [path for path in before if path.suffix == ".tmp"]
    hook.release()
    (end,) = job.wait(60)
    assert end.returncode == EXIT_FAILURE and GONE in end.stderr, end.stderr
    assert contents(folder) == before


def test_a_chief_that_starts_is_not_taken_for_the_one_before(uninterrupted, start, train, note, args, folder, tmp_path):
    """The run was lost on this machine, which is back: of two that start again, the first one trains."""
    job = start(SINGLE, *args, f"run_dir={folder}")
    wait_for_epoch(job, folder, 3)
    job.kill()
    env, hook = note(socket.gethostname()), WriteHook("config.yaml", "flushed", signs=tmp_path)
    first = start(SINGLE, *args, f"run_dir={folder}", script=WRITE_HOOK, env={**env, **hook.environment()})
    wait_until(lambda: hook.is_held or not first.is_running())
    assert train(folder, env=env, script=("-c", HASTY)).returncode == EXIT_LOST_PEER
    hook.release()
    assert first.codes() == [EXIT_OK], first.output()
    assert result_of(folder) == result_of(uninterrupted)


def test_a_chief_that_is_just_ending_is_waited_for(uninterrupted, start, train, note, args, folder, tmp_path):
    """On a machine that answers, and so it is not replaced."""
    hook = WriteHook("history.csv", "flushed", number=4, signs=tmp_path)
    job = start(SINGLE, *args, f"run_dir={folder}", script=WRITE_HOOK, env=hook.environment())
    wait_until(lambda: hook.is_held or not job.is_running())
    restart = start(SINGLE, *args, f"run_dir={folder}", env=note(how="rank 1: Killed"))
    log = (folder / "train.log").stat().st_ino
    time.sleep(2)
    assert restart.is_running()
    job.kill()
    assert restart.codes() == [EXIT_OK], restart.output()
    assert (folder / "train.log").stat().st_ino == log
    assert result_of(folder) == result_of(uninterrupted)
    (incident,) = summary_of(folder)["incidents"]
    assert (incident["ranks"], incident["hosts"], incident["how"]) == ([], [], "rank 1: Killed")


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_rank_is_in_summary_and_report(lost, uninterrupted, start, train, note, args, folder):
    job = start(HOROVOD, *args, "checkpoint.every_epochs=4", f"run_dir={folder}", launcher="srun", nodes=NODES)
    wait_for_epoch(job, folder, 6)
    job.processes[lost].kill()
    codes = job.codes()
    assert codes == [-signal.SIGKILL, EXIT_LOST_PEER] if lost == 0 else [EXIT_LOST_PEER, -signal.SIGKILL]
    reached = len(history_of(folder).epochs)
    result = train(folder, env=note(NODES[lost]))
    assert result.returncode == EXIT_OK, result.stderr
    assert result_of(folder) == result_of(uninterrupted)
    (resumed,) = summary_of(folder)["resumed_from_epochs"]
    (incident,) = summary_of(folder)["incidents"]
    assert (incident["ranks"], incident["hosts"], incident["epoch"]) == ([lost], [NODES[lost]], reached)
    assert incident["epochs_computed_again"] == reached - resumed == reached % 4
    how = "node does not answer" if lost == 0 else "its connection broke; node does not answer"
    assert incident["how"] == how
    started, end, again, _ = events_of(folder)
    assert started["facts"]["hosts"] == list(NODES)
    assert end["kind"] == ("lost" if lost == 0 else "failed")
    assert end["lost"] == (None if lost == 0 else {"rank": 1, "host": NODES[1], "how": "its connection broke"})
    assert [loss["hosts"] for loss in again["losses"]] == [[NODES[lost]]]
    assert incident["time"] == end["time"]
    rows = history_of(folder).epochs[resumed:reached]
    assert started["time"] < end["last_epoch_time"] <= end["time"]
    spent = again["time"] - end["last_epoch_time"] + sum(row.epoch_s for row in rows)
    assert rows == () or incident["seconds_lost"] == pytest.approx(spent)
    page = (folder / "report.html").read_text()
    assert f"{NODES[lost]} (rank {lost})" in page and how in page


def test_started_again_by_hand(start, train, args, folder):
    """Nobody has noted anything: what the folder says is enough."""
    job = start(SINGLE, *args, f"run_dir={folder}")
    wait_for_epoch(job, folder, 3)
    job.kill()
    assert train(folder, "trainer.epochs=50").returncode == EXIT_OK
    (incident,) = summary_of(folder)["incidents"]
    assert (incident["ranks"], incident["how"]) == ([0], "the run ended without a word")
    assert "the run ended without a word" in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    "hook",
    [
        WriteHook("history.csv", 0, number=2),
        WriteHook("events.jsonl", 0.5, number=2),
        WriteHook("events.jsonl", "renamed"),
    ],
    ids=["before its first epoch ends", "before its start is noted", "before its history is cut"],
)
def test_epochs_without_a_checkpoint_are_lost_once(hook, uninterrupted, start, train, args, folder):
    """The run is killed, started again from the beginning, and killed before it has finished an epoch."""
    rarely = "checkpoint.every_epochs=1000"
    job = start(SINGLE, *args, rarely, f"run_dir={folder}")
    wait_for_epoch(job, folder, 3)
    job.kill()
    reached = len(history_of(folder).epochs)
    killed = train(folder, rarely, script=WRITE_HOOK, env=hook.environment())
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert train(folder, rarely).returncode == EXIT_OK
    again = [incident["epochs_computed_again"] for incident in summary_of(folder)["incidents"]]
    assert [number for number in again if number] == [reached]
    assert result_of(folder) == result_of(uninterrupted)


def test_a_job_that_did_not_lose_anything(uninterrupted):
    assert summary_of(uninterrupted)["incidents"] == []
    assert "Incidents" not in (uninterrupted / "report.html").read_text()


def test_losses_that_cannot_be_read(train, folder):
    result = train(folder, env={LOSSES_VARIABLE: "x" * 300})
    assert result.returncode == EXIT_USER_ERROR
    expected = f"error: {LOSSES_VARIABLE}={'x' * 300}: cannot be read: File name too long{DOCTOR_HINT}\n"
    assert result.stderr == expected
    assert not folder.exists()


def test_fast_says_that_bits_may_differ(start, train, note, args, folder):
    """Fewer replicas are left."""
    fast = [*args[:-1], "trainer.epochs=400", "reproducibility=fast"]
    job = start(HOROVOD, *fast, f"run_dir={folder}", launcher="srun", nodes=NODES)
    wait_for_epoch(job, folder, 2)
    job.processes[1].kill()
    assert EXIT_LOST_PEER in job.codes()
    epochs = len(history_of(folder).epochs) + 1
    result = train(folder, f"trainer.epochs={epochs}", "reproducibility=fast", env=note(NODES[1]))
    assert result.returncode == EXIT_OK, result.stderr
    line = "Replicas: 2 until now, 1 from now on; with reproducibility=fast that may change the last bits\n"
    assert line in result.stdout
