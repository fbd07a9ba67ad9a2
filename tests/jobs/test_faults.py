"""What can happen to a run folder during a run: one clear line, nothing saved is lost, and the run resumes.

Also kills at chosen moments; `test_kills.py` has random ones.
"""

import contextlib
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from support.hooks import HOOKS, WRITE_HOOK, WriteHook
from support.job import DOCTOR_HINT, HOROVOD, MIRRORED, NUM_EPOCHS, SINGLE, Job, stopped_after, wait_for_epoch
from support.mounts import mount, unmount
from support.runs import checkpoints_of, history_of, result_of, summary_of

from mnist_dist.run.checkpoint import Checkpoint

BACKWARD_CLOCK = (HOOKS / "backward_clock.py",)
LOG_LINES = ("Epoch ", "Data: ", "Strategy: ", "Run folder: ", "Model: ", "Devices: ", "Batch: ", "Reproducibility: ")


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, with their contents."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def temporaries(folder: Path) -> list[Path]:
    return list(folder.rglob(".*.tmp"))


def failure_of(job: Job) -> str:
    """The one line that a run prints besides its log when it cannot continue."""
    codes, output = job.codes(), job.output()
    assert codes == [1], output
    (line,) = [line for line in output.splitlines() if not line.startswith(LOG_LINES)]
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def check_saved(folder: Path, before: dict[str, bytes]) -> None:
    """All checkpoints are intact, and those from `before` that were not pruned are unchanged."""
    after = contents(folder)
    names = [name for name in after if name.startswith("checkpoints/epoch-")]
    assert names
    for name in names:
        Checkpoint.from_bytes(after[name])  # compares its checksum
        assert after[name] == before.get(name, after[name])


def check_goes_on(train, folder: Path, uninterrupted: Path) -> None:
    """The same command then ends as if nothing had happened."""
    result = train(folder)
    assert result.returncode == 0, result.stderr
    assert "cannot be used" not in result.stdout
    assert result_of(folder) == result_of(uninterrupted)
    assert not temporaries(folder)


@pytest.fixture
def small_disk(tmp_path):
    """A 10 MB file system in memory, which only root can mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=10m", "tmpfs", folder)
    yield folder
    unmount(folder)


@pytest.mark.parametrize("share_left", [0, 0.5], ids=["nothing is left", "half a checkpoint fits"])
def test_the_disk_is_full_while_saving(share_left, small_disk, uninterrupted, train, start, args):
    folder = small_disk / "run"
    process = start(SINGLE, *args, f"run_dir={folder}")
    with stopped_after(process, folder, 3):
        before = contents(folder)
        free = os.statvfs(small_disk)
        left = int(share_left * checkpoints_of(folder)[0].stat().st_size)
        with contextlib.suppress(OSError):
            (small_disk / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize - left))
    line = failure_of(process)
    assert line.startswith(f"{folder}/")
    assert "cannot be written (No space left on device); what was written before is kept." in line
    assert line.endswith(DOCTOR_HINT)
    check_saved(folder, before)
    assert not temporaries(folder)
    assert 3 <= len(history_of(folder).epochs) < NUM_EPOCHS
    (small_disk / "filler").unlink()
    check_goes_on(train, folder, uninterrupted)
    assert len(summary_of(folder)["resumed_from_epochs"]) == 1


GONE = "is not this run's folder any more"


def test_the_folder_is_removed(uninterrupted, train, start, args, tmp_path):
    folder = tmp_path / "run"
    process = start(SINGLE, *args, f"run_dir={folder}")
    with stopped_after(process, folder, 3):
        shutil.rmtree(folder)
    assert failure_of(process).startswith(f"{folder} {GONE}")
    assert not folder.exists()
    check_goes_on(train, folder, uninterrupted)


def test_the_folder_is_moved_away(uninterrupted, train, start, args, tmp_path):
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    process = start(SINGLE, *args, f"run_dir={folder}")
    with stopped_after(process, folder, 3):
        before = contents(folder)
        folder.rename(elsewhere)
    assert failure_of(process).startswith(f"{folder} {GONE}")
    assert not folder.exists()
    check_saved(elsewhere, before)
    elsewhere.rename(folder)
    check_goes_on(train, folder, uninterrupted)
    assert len(summary_of(folder)["resumed_from_epochs"]) == 1


def test_another_folder_takes_its_place(uninterrupted, train, start, args, tmp_path):
    """As when the folder is removed and the run is started from scratch while the first job is still training."""
    folder = tmp_path / "run"
    # Few checkpoints, so that none is just being pruned.
    process = start(SINGLE, *args, f"run_dir={folder}", "checkpoint.every_epochs=10")
    with stopped_after(process, folder, 11):
        folder.rename(tmp_path / "elsewhere")
        shutil.copytree(tmp_path / "elsewhere", folder)
        before = contents(folder)
    assert failure_of(process).startswith(f"{folder} {GONE}")
    assert contents(folder) == before
    check_goes_on(train, folder, uninterrupted)


def test_the_file_system_becomes_read_only(uninterrupted, train, start, args, tmp_path):
    folder = tmp_path / "run"
    process = start(SINGLE, *args, f"run_dir={folder}")
    with stopped_after(process, folder, 3):
        before = contents(folder)
        # A separate mount over it, since a mount that is being written to cannot be remounted.
        mount("--bind", folder, folder)
        try:
            mount("-o", "remount,bind,ro", folder)
        except BaseException:
            unmount(folder)
            raise
    try:
        line = failure_of(process)
        assert line.startswith(f"{folder}/")
        assert "cannot be written (Read-only file system); what was written before is kept." in line
        result = train(folder)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == (f"error: run_dir={folder}: cannot be written: Read-only file system{DOCTOR_HINT}\n")
        check_saved(folder, before)
    finally:
        unmount(folder)
    check_goes_on(train, folder, uninterrupted)
    assert len(summary_of(folder)["resumed_from_epochs"]) == 1


def test_write_permission_is_taken_away(uninterrupted, train, start, args, tmp_path):
    folder = tmp_path / "run"
    # Modes mean nothing to root, so root's run drops the capabilities that override them.
    prefix = [] if os.geteuid() else ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    process = start(SINGLE, *args, f"run_dir={folder}", prefix=prefix)
    with stopped_after(process, folder, 3):
        before = contents(folder)
        folder.chmod(0o555)
    line = failure_of(process)
    assert line.startswith(f"{folder}/")
    assert "cannot be written (Permission denied); what was written before is kept." in line
    check_saved(folder, before)
    folder.chmod(0o755)
    check_goes_on(train, folder, uninterrupted)
    assert len(summary_of(folder)["resumed_from_epochs"]) == 1


def test_checkpoints_is_replaced_by_a_file(uninterrupted, train, start, args, tmp_path):
    folder = tmp_path / "run"
    process = start(SINGLE, *args, f"run_dir={folder}")
    with stopped_after(process, folder, 3):
        before = contents(folder)
        (folder / "checkpoints").rename(tmp_path / "checkpoints")
        (folder / "checkpoints").write_bytes(b"not a folder")
    line = failure_of(process)
    # The latter if the run was stopped when it had just written a checkpoint, which is then gone.
    reasons = "Not a directory|No such file or directory"
    assert re.match(rf"{re.escape(str(folder))}/checkpoints cannot be written \(({reasons})\); ", line)
    after = contents(folder)
    result = train(folder)  # not as if there were no checkpoints
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: run_dir={folder}: checkpoints cannot be written: Not a directory{DOCTOR_HINT}\n"
    assert contents(folder) == after
    (folder / "checkpoints").unlink()
    (tmp_path / "checkpoints").rename(folder / "checkpoints")
    check_saved(folder, before)
    check_goes_on(train, folder, uninterrupted)
    assert len(summary_of(folder)["resumed_from_epochs"]) == 1


def test_the_clock_goes_backwards(uninterrupted, train, start, args, tmp_path):
    """In both parts of a run and between them: the newer a checkpoint, the older its file."""
    folder = tmp_path / "run"
    more = ["checkpoint.every_epochs=1000", "checkpoint.every_s=0"]
    process = start(SINGLE, *args, *more, f"run_dir={folder}", script=BACKWARD_CLOCK, fresh=True)
    wait_for_epoch(process, folder, 6)
    process.kill()
    paths = checkpoints_of(folder)
    assert len(paths) >= 3
    for number, path in enumerate(paths):
        os.utime(path, (10**9 - 3600 * number,) * 2)
    newest = int(paths[-1].stem.removeprefix("epoch-"))
    result = train(folder, *more, script=BACKWARD_CLOCK, fresh=True)
    assert result.returncode == 0, result.stderr
    assert f"Resuming after epoch {newest} of {NUM_EPOCHS}\n" in result.stdout
    assert result_of(folder) == result_of(uninterrupted)
    assert all(row.epoch_s > 0 for row in history_of(folder).epochs)
    assert min(summary_of(folder)["timing"].values()) > 0


# When the run is killed, and the epoch after which the next command resumes.
KILLS = [
    (WriteHook("config.yaml", 0.5), None),  # the very first file
    (WriteHook("history.csv", "renamed"), None),  # an epoch without a checkpoint
    (WriteHook("epoch-00005.ckpt", 0.5), 4),
    (WriteHook("epoch-00009.ckpt", "flushed"), 8),
    (WriteHook("epoch-00013.ckpt", "renamed"), 13),  # before older ones are removed
    (WriteHook("history.csv", "renamed", number=4), 15),  # 13 again, 14, 15 and 16: ahead of the checkpoints
    (WriteHook("summary.json", "flushed"), NUM_EPOCHS),  # after the last checkpoint
]


def test_killed_at_chosen_moments(uninterrupted, train, tmp_path):
    """One run, killed again and again, until the plain command ends it."""
    folder, resumed = tmp_path / "run", []
    for hook, epoch in KILLS:
        before = contents(folder)
        result = train(folder, script=WRITE_HOOK, env=hook.environment())
        assert result.returncode == -signal.SIGKILL, result.stdout + result.stderr
        assert [path.name.startswith(f".{hook.file}.") for path in temporaries(folder)] == (
            [] if hook.moment == "renamed" else [True]
        )
        lines = [line for line in result.stdout.splitlines() if line.startswith("Resuming")]
        assert lines == [f"Resuming after epoch {epoch} of {NUM_EPOCHS}" for epoch in resumed[-1:]]
        if epoch is not None:
            check_saved(folder, before)
            resumed.append(epoch)
        if hook.file == "epoch-00013.ckpt":
            epochs = [int(path.stem.removeprefix("epoch-")) for path in checkpoints_of(folder)]
            assert epochs[-4:] == [10, 11, 12, 13]
    check_goes_on(train, folder, uninterrupted)
    assert summary_of(folder)["resumed_from_epochs"] == sorted(set(resumed))  # written with each new checkpoint


def test_a_second_job_is_refused(uninterrupted, train, start, args, tmp_path):
    """Before it changes anything; once the first job is dead, even by kill -9, the folder is free."""
    folder = tmp_path / "run"
    line = f"error: run_dir={folder}: another job is training here (it holds the lock on train.log); stop it or wait"
    first = start(SINGLE, *args, f"run_dir={folder}")
    with stopped_after(first, folder, 3):
        before = contents(folder)
        second = train(folder)
        assert (second.returncode, second.stdout) == (2, "")
        assert second.stderr.startswith(line)
        assert second.stderr.count("\n") == 1
        assert contents(folder) == before
        first.kill()
    third = start(MIRRORED, *args, f"run_dir={folder}")
    with stopped_after(third, folder, 10):
        before = contents(folder)
        fourth = start(HOROVOD, *args, f"run_dir={folder}")
        assert fourth.codes() == [1]  # horovodrun's own
        assert line in fourth.output()
        assert contents(folder) == before
    assert third.codes() == [0], third.output()
    assert result_of(folder) == result_of(uninterrupted)


def test_of_two_jobs_started_at_once_one_trains(uninterrupted, start, args, tmp_path):
    folder = tmp_path / "run"
    jobs = [start(SINGLE, *args, f"run_dir={folder}") for _ in range(2)]
    codes = [job.codes() for job in jobs]
    assert sorted(codes) == [[0], [2]], [job.output() for job in jobs]
    lines = jobs[codes.index([2])].output().splitlines()
    assert lines[-1].startswith(f"error: run_dir={folder}: another job ")
    assert result_of(folder) == result_of(uninterrupted)
    assert (folder / "train.log").read_text().count("Run folder: ") == 1
