"""Stopping and resuming a run with the same command gives the same bits; kills are in test_kills.py."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from support.job import HOROVOD, MIRRORED, NUM_EPOCHS, SINGLE, TRAIN, Job, job_name, wait_for_epoch
from support.processes import kill, send
from support.runs import checkpoints_of, history_of, result_of, summary_of

from mnist_dist.base.errors import EXIT_LOST_PEER


@pytest.mark.parametrize(
    ("job", "signals"),
    [(SINGLE, ["SIGTERM"]), (MIRRORED, ["SIGINT", "SIGINT"]), (HOROVOD, ["SIGUSR2"])],
    ids=lambda value: job_name(value) if isinstance(value, tuple) else " ".join(value),
)
def test_stopped_on_request(job, signals, args, uninterrupted, start, tmp_path):
    """Only the last of several processes is asked."""
    folder = tmp_path / "run"
    more = [*args, f"run_dir={folder}", "checkpoint.every_epochs=1000"]
    process = start(job, *more)
    wait_for_epoch(process, folder, 2)
    frozen = process.freeze()  # or it might finish in the meantime
    last = process.ranks()[max(process.ranks())]
    for name in signals:
        last.send_signal(getattr(signal, name))
    send(frozen, signal.SIGCONT)
    codes = process.codes()
    output = process.output()
    assert codes == [1 if job == HOROVOD else 75], output  # horovodrun's own
    reached = len(history_of(folder).epochs)
    log = (folder / "train.log").read_text()
    assert log.endswith(f"\nStopped on request after epoch {reached}; run the same command again to resume\n")
    assert output.count("Traceback") == (1 if job == HOROVOD else 0)  # horovodrun's own
    process = start(SINGLE, *more)
    assert process.codes() == [0], process.output()
    assert summary_of(folder)["resumed_from_epochs"] == [reached]
    assert result_of(folder) == result_of(uninterrupted)


def stop_for_a_while(processes, seconds) -> None:
    send(processes, signal.SIGSTOP)
    time.sleep(seconds)
    send(processes, signal.SIGCONT)


@pytest.mark.parametrize("stopped", [[0], [1], [0, 1]], ids=str)
def test_ranks_of_horovod_that_are_stopped_and_continued(stopped, args, uninterrupted, start, tmp_path):
    process = start(HOROVOD, *args, f"run_dir={tmp_path / 'run'}", launcher="srun")
    wait_for_epoch(process, tmp_path / "run", 2)
    ranks = process.ranks()
    stop_for_a_while([ranks[rank] for rank in stopped], 3)
    assert process.codes() == [0, 0], process.output()
    assert result_of(tmp_path / "run") == result_of(uninterrupted)


def test_a_rank_that_is_stopped_for_longer_than_its_backend_waits(args, uninterrupted, start, tmp_path):
    """No rank is lost, but Horovod has given up: after 30 s by default, 10 days in this package, and 2 s here."""
    more = [*args, f"run_dir={tmp_path / 'run'}"]
    process = start(HOROVOD, *more, env={"HOROVOD_GLOO_TIMEOUT_SECONDS": "2"}, launcher="srun")
    wait_for_epoch(process, tmp_path / "run", 2)
    stop_for_a_while([process.ranks()[1]], 5)
    assert EXIT_LOST_PEER in process.codes(), process.output()
    told = "error: the processes of this job cannot reach each other any more (UnknownError in a collective)"
    assert told in process.output()
    process = start(SINGLE, *more)
    assert process.codes() == [0], process.output()
    assert result_of(tmp_path / "run") == result_of(uninterrupted)


@pytest.mark.parametrize("stream", ["stdout", "both"])
def test_stopped_when_nobody_reads_the_output_any_more(stream, args, python_environment, tmp_path):
    """Ctrl-C ends `| tee log` as well, and then nobody reads the output."""
    folder = tmp_path / "run"
    stderr = subprocess.STDOUT if stream == "both" else subprocess.DEVNULL
    command = [sys.executable, *TRAIN, "strategy=single", *args, f"run_dir={folder}"]
    process = psutil.Popen(command, env=python_environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=stderr)
    with contextlib.ExitStack() as stack:
        stack.callback(kill, process)
        wait_for_epoch(Job([process], []), folder, 2)
        process.suspend()
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        process.resume()
        assert process.wait(120) == 75
    assert checkpoints_of(folder)[-1].stem == f"epoch-{len(history_of(folder).epochs):05d}"
    assert "Stopped on request after" in (folder / "train.log").read_text()


def copy_as_if_killed(uninterrupted: Path, folder: Path, *, epoch: int) -> Path:
    """A copy in the state of a run that was killed after `epoch`, one of its last three."""
    shutil.copytree(uninterrupted, folder)
    for name in ("summary.json", "model.keras"):
        (folder / name).unlink()
    for path in checkpoints_of(folder):
        if int(path.stem.removeprefix("epoch-")) > epoch:
            path.unlink()
    return folder


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "bit-flipped": flip_a_bit,
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint(damage, uninterrupted, train, tmp_path):
    """`history.csv` is also ahead of the one that is used, as after a kill between the two."""
    folder = copy_as_if_killed(uninterrupted, tmp_path / "run", epoch=NUM_EPOCHS - 1)
    newest = checkpoints_of(folder)[-1]
    DAMAGES[damage](newest)
    result = train(folder)
    assert result.returncode == 0, result.stderr
    assert f"Resuming after epoch {NUM_EPOCHS - 2} of {NUM_EPOCHS}\n" in result.stdout
    warnings = [line for line in result.stdout.splitlines() if "cannot be used" in line]
    assert [line.split(" cannot")[0] for line in warnings] == ([] if damage == "missing" else [str(newest)])
    assert result_of(folder) == result_of(uninterrupted)
    assert summary_of(folder)["resumed_from_epochs"] == [NUM_EPOCHS - 2]


def test_no_checkpoint_is_left_of_an_unfinished_run(uninterrupted, train, tmp_path):
    folder = copy_as_if_killed(uninterrupted, tmp_path / "run", epoch=0)
    result = train(folder)
    assert result.returncode == 0, result.stderr
    assert "Resuming" not in result.stdout
    assert result_of(folder) == result_of(uninterrupted)


def test_killed_after_the_last_epoch(uninterrupted, train, tmp_path):
    """Only the results are written."""
    folder = copy_as_if_killed(uninterrupted, tmp_path / "run", epoch=NUM_EPOCHS)
    result = train(folder)
    assert result.returncode == 0, result.stderr
    assert f"Resuming after epoch {NUM_EPOCHS} of {NUM_EPOCHS}\n" in result.stdout
    assert "Epoch " not in result.stdout
    assert result_of(folder) == result_of(uninterrupted)


def test_more_epochs_resume_a_finished_run(uninterrupted, train, tmp_path):
    folder = tmp_path / "run"
    for epochs in (3, 5, NUM_EPOCHS):
        result = train(folder, f"trainer.epochs={epochs}", "checkpoint.every_epochs=2", "checkpoint.keep=1")
        assert result.returncode == 0, result.stderr
        assert len(history_of(folder).epochs) == epochs
    assert result_of(folder) == result_of(uninterrupted)
    assert summary_of(folder)["resumed_from_epochs"] == [3, 5]
    result = train(folder, "trainer.epochs=2")
    assert result.returncode == 0
    assert "finished: nothing to do" in result.stdout


def test_a_finished_run_without_checkpoints_is_not_trained_again(uninterrupted, train, tmp_path):
    folder = copy_as_if_killed(uninterrupted, tmp_path / "run", epoch=0)
    (folder / "summary.json").write_bytes((uninterrupted / "summary.json").read_bytes())
    result = train(folder, "trainer.epochs=100")
    assert result.returncode == 2
    assert f"finished after {NUM_EPOCHS}, and no checkpoint to resume from is left" in result.stderr


@pytest.mark.parametrize(
    ("more", "fragments"),
    [
        (["seed=1", "trainer.epochs=50"], ["seed was 0, is now 1"]),
        (["batch.num_shards=4", "model.dropout=0.1"], ["batch.num_shards was 8", "model.dropout was 0.4, is now 0.1"]),
        (["reproducibility=fast"], ["reproducibility was exact, is now fast"]),
        (["precision=mixed_bfloat16"], ["precision.name was float32"]),
        (["resume=never"], ["resume=never: ", "already holds a run", "resume=auto"]),
        (["trainer.epochs=3"], ["trainer.epochs=3: ", f"already has {NUM_EPOCHS - 1}"]),
    ],
)
def test_what_does_not_resume(more, fragments, uninterrupted, train, tmp_path):
    folder = copy_as_if_killed(uninterrupted, tmp_path / "run", epoch=NUM_EPOCHS - 1)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = train(folder, *more)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    for fragment in fragments:
        assert fragment in line
    assert "trainer.epochs was" not in line
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_other_data_does_not_resume(uninterrupted, small_arrays, train, tmp_path):
    folder = copy_as_if_killed(uninterrupted, tmp_path / "run", epoch=NUM_EPOCHS - 1)
    np.savez(tmp_path / "other.npz", **{**small_arrays, "y_test": small_arrays["y_test"][::-1]})
    result = train(folder, f"data.path={tmp_path / 'other.npz'}")
    assert result.returncode == 2
    assert "another configuration (the data was " in result.stderr


def test_resume_never_in_a_new_folder(train, tmp_path):
    assert train(tmp_path / "run", "resume=never", "trainer.epochs=1").returncode == 0


def test_fast_resumes_with_another_number_of_replicas(args, train, run_job, tmp_path):
    folder = tmp_path / "run"
    assert train(folder, "reproducibility=fast", "trainer.epochs=2").returncode == 0
    (result,) = run_job(MIRRORED, *args, f"run_dir={folder}", "trainer.epochs=4")  # auto stays what it was
    assert result.returncode == 0, result.stderr
    assert "Resuming after epoch 2 of 4\nReplicas: 1 until now, 2 from now on" in result.stdout
    assert [row.epoch for row in history_of(folder).epochs] == [1, 2, 3, 4]


def test_weak_scaling_needs_the_same_number_of_replicas(args, train, run_job, tmp_path):
    folder = tmp_path / "run"
    assert train(folder, "batch.scaling=weak", "trainer.epochs=2").returncode == 0
    (result,) = run_job(MIRRORED, *args, f"run_dir={folder}", "trainer.epochs=4", "batch.scaling=weak")
    assert result.returncode == 2
    assert "with 2 replicas a step has 128 images, but in this run it has 64" in result.stderr


@pytest.mark.parametrize(
    "more", [["optimizer=sgd", "optimizer.momentum=0.9"], ["precision=mixed_float16", "model=cnn"]], ids=str
)
def test_the_whole_state_resumes(more, train, tmp_path):
    """Momentum, and the loss scale with its count of good steps, which grow in between."""
    growth = ["precision.loss_scale_growth_steps=11"]
    for name, epochs in (("whole", [4]), ("parts", [2, 4])):
        for number in epochs:
            result = train(tmp_path / name, *more, *growth, f"trainer.epochs={number}")
            assert result.returncode == 0, result.stderr
    assert result_of(tmp_path / "parts") == result_of(tmp_path / "whole")


def test_seconds_save_earlier_than_epochs(train, tmp_path):
    more = ["trainer.epochs=3", "checkpoint.every_epochs=1000"]
    for every_s, epochs in ((0, [1, 2, 3]), (300, [3])):
        folder = tmp_path / f"every {every_s} s"
        result = train(folder, *more, f"checkpoint.every_s={every_s}")
        assert result.returncode == 0, result.stderr
        assert [path.name for path in checkpoints_of(folder)] == [f"epoch-0000{epoch}.ckpt" for epoch in epochs]
