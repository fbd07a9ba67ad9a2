"""Checkpoint files: only intact ones are used; which are kept; what is left when writing fails."""

import errno
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mnist_dist.base import files
from mnist_dist.base.files import read_regular, write_atomically
from mnist_dist.config.train import CheckpointConfig
from mnist_dist.results.history import EpochMetrics, History
from mnist_dist.run import checkpoint
from mnist_dist.run.checkpoint import Checkpoint, CheckpointFolder, ResumePoint
from mnist_dist.run.saving import PeriodicCheckpoints


def make(num_epochs: int, *, val_accuracy=lambda epoch: epoch / 100) -> Checkpoint:
    rows = [EpochMetrics(n, 0.1 + n / 3, 0.9, 0.2, val_accuracy(n), 1e-3, 0.6, 1e5) for n in range(1, num_epochs + 1)]
    state = {
        "weights": np.random.default_rng(num_epochs).normal(size=50).astype(np.float32),
        "loss_scale": np.array(2.0**15, np.float32),
        "global_step": np.array(97 * num_epochs, np.int64),
    }
    return Checkpoint(ResumePoint(History(tuple(rows)), {"seed": "0"}, 2, 512, resumed_from_epochs=(3, 4)), state)


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    assert one.point == other.point
    assert one.state.keys() == other.state.keys()
    for name, value in one.state.items():
        assert (value.dtype, value.shape) == (other.state[name].dtype, other.state[name].shape)
        np.testing.assert_array_equal(value, other.state[name])


def names(folder: CheckpointFolder) -> list[str]:
    return sorted(path.name for path in folder.path.iterdir())


@pytest.fixture
def folder(tmp_path) -> CheckpointFolder:
    """With the checkpoints of epochs 1 to 3."""
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for epoch in (1, 2, 3):
        folder.save(make(epoch), keep=3)
    return folder


def test_reads_back_to_the_same_bits(folder):
    assert_same(folder.load_newest(), make(3))


def test_there_may_be_none(tmp_path):
    assert CheckpointFolder(tmp_path / "checkpoints").load_newest() is None


def test_the_newest_and_the_best_are_kept(tmp_path):
    accuracies = {1: 0.5, 2: 0.9, 3: 0.6, 4: 0.9, 5: 0.7, 6: 0.8, 7: 0.1}
    folder = CheckpointFolder(tmp_path)
    for epoch in accuracies:
        folder.save(make(epoch, val_accuracy=accuracies.get), keep=2)
    assert names(folder) == ["epoch-00002.ckpt", "epoch-00006.ckpt", "epoch-00007.ckpt"]


def test_not_every_epoch_need_be_saved(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for epoch in (5, 10, 15):
        folder.save(make(epoch), keep=1)
    assert names(folder) == ["epoch-00015.ckpt"]


DAMAGES = {
    "truncated": lambda data: data[:-1],
    "truncated in the header": lambda data: data[:20],
    "half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"x",
    "of zeros": lambda data: bytes(len(data)),
    "of another kind": lambda data: b"PK" + data,
    "of a later version": lambda data: data.replace(b"checkpoint 1", b"checkpoint 2"),
    "of another epoch": lambda data: make(9).to_bytes(),
    **{
        f"with bit {place} flipped": lambda data, place=place: (
            data[: place // 8] + bytes([data[place // 8] ^ (1 << place % 8)]) + data[place // 8 + 1 :]
        )
        for place in np.random.default_rng(0).integers(0, 8 * len(make(3).to_bytes()), 20).tolist()
    },
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_an_earlier_one_is_used(damage, folder, logged):
    newest = folder.path / "epoch-00003.ckpt"
    newest.write_bytes(DAMAGES[damage](newest.read_bytes()))
    assert_same(folder.load_newest(), make(2))
    (line,) = logged()
    assert line.startswith(f"{newest} cannot be used: ")
    assert "\n" not in line
    folder.save(make(3), keep=3)  # the run continues
    assert_same(folder.load_newest(), make(3))
    assert len(logged()) == 1


def test_an_unreadable_one(folder, logged):
    newest = folder.path / "epoch-00003.ckpt"
    newest.unlink()
    newest.mkdir()
    assert_same(folder.load_newest(), make(2))
    assert logged() == [f"{newest} cannot be used (Is a directory); trying an earlier checkpoint"]


def test_a_pipe_is_not_waited_for(folder, logged):
    newest = folder.path / "epoch-00003.ckpt"
    newest.unlink()
    os.mkfifo(newest)
    assert_same(folder.load_newest(), make(2))
    assert logged() == [f"{newest} cannot be used (Not a regular file); trying an earlier checkpoint"]


def test_one_that_may_be_readable_later(folder, monkeypatch):
    """Another user's, or on a server that is down: its epochs are not trained again, so it is not removed."""

    def read(path: Path) -> bytes:
        if path.name == "epoch-00003.ckpt":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read_regular(path)

    monkeypatch.setattr(checkpoint, "read_regular", read)
    with pytest.raises(PermissionError):
        folder.load_newest()


def test_all_are_damaged(folder, logged):
    for path in folder.path.iterdir():
        path.write_bytes(b"")
    assert folder.load_newest() is None
    assert len(logged()) == 3


def test_a_missing_one_is_not_reported(folder, logged):
    (folder.path / "epoch-00003.ckpt").unlink()
    assert_same(folder.load_newest(), make(2))
    assert logged() == []


def test_damaged_ones_of_later_epochs_are_removed_when_the_run_resumes(folder):
    (folder.path / "epoch-00003.ckpt").write_bytes(b"")
    folder.save(make(2), keep=3)
    assert names(folder) == ["epoch-00001.ckpt", "epoch-00002.ckpt"]


def test_other_files_are_left_alone(folder):
    others = {"epoch-x.ckpt", "epoch-9.ckpt", "notes.txt"}
    for name in others:
        (folder.path / name).touch()
    assert_same(folder.load_newest(), make(3))
    folder.save(make(4), keep=3)
    assert others < set(names(folder))


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failure_while_saving_leaves_all_earlier_ones(function, folder, monkeypatch):
    def fail(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(files.os, function, fail)
        with pytest.raises(OSError, match="No space left"):
            folder.save(make(4), keep=3)
    assert names(folder) == [f"epoch-0000{epoch}.ckpt" for epoch in (1, 2, 3)]
    assert_same(folder.load_newest(), make(3))


def test_killed_at_any_moment_of_a_save(folder):
    """The process ends before the n-th file system operation of a save, for every n."""
    for moment in range(30):
        child = os.fork()
        if child == 0:
            left = iter(range(moment))

            def watch(event, _, left=left):
                if (event.startswith("os.") or event == "open") and next(left, None) is None:
                    os._exit(9)

            sys.addaudithook(watch)
            folder.save(make(4), keep=3)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        newest = folder.load_newest()
        assert newest.point.epoch in (3, 4)
        assert_same(newest, make(newest.point.epoch))
        if os.waitstatus_to_exitcode(status) == 0:
            break
    assert moment > 5
    assert newest.point.epoch == 4
    files.remove_temporaries(folder.path)  # the children's, as the next start does
    assert names(folder) == [f"epoch-0000{epoch}.ckpt" for epoch in (2, 3, 4)]


def test_the_folder_is_moved_away_while_it_is_written(folder, monkeypatch):
    def write_and_move(path, content, **options):
        write_atomically(path, content, **options)
        folder.path.rename(folder.path.with_name("elsewhere"))

    monkeypatch.setattr(checkpoint, "write_atomically", write_and_move)
    with pytest.raises(FileNotFoundError):
        folder.save(make(4), keep=1)
    assert_same(CheckpointFolder(folder.path.with_name("elsewhere")).load_newest(), make(4))


def test_a_history_of_many_epochs(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(make(2000, val_accuracy=lambda epoch: 1 / 3), keep=1)
    assert_same(folder.load_newest(), make(2000, val_accuracy=lambda epoch: 1 / 3))


# When they are written


class FakeFolder:
    """Takes the checkpoints."""

    def __init__(self):
        self.saved = []

    def save_checkpoint(self, create, *, keep):
        assert keep == 3
        self.saved.append(create())


def history_of(num_epochs: int) -> History:
    return make(num_epochs).point.history


def periodic(folder, *, start_epoch=0, every_epochs=3, every_s=10.0, clock=lambda: 0.0) -> PeriodicCheckpoints:
    config = CheckpointConfig(every_epochs=every_epochs, every_s=every_s, keep=3)
    start = replace(make(1).point, history=history_of(start_epoch) if start_epoch else History())
    return PeriodicCheckpoints(folder, config, start, read_state=dict, clock=clock)


def test_by_epochs_and_by_seconds_whichever_is_first():
    """And again at the end, unless one was just saved."""
    folder, now = FakeFolder(), [0.0]
    checkpoints = periodic(folder, clock=lambda: now[0])
    for epoch, now[0] in ((1, 0.0), (2, 1.0), (3, 2.0), (4, 9.0), (5, 13.0), (6, 14.0), (7, 15.0)):
        checkpoints(history_of(epoch))
    for _ in range(2):
        checkpoints.catch_up(history_of(7))
    assert [checkpoint.point.epoch for checkpoint in folder.saved] == [3, 5, 6, 7]
    assert folder.saved[-1].point == replace(make(1).point, history=history_of(7))


def test_after_a_restart():
    folder = FakeFolder()
    checkpoints = periodic(folder, start_epoch=2, every_epochs=100, every_s=100.0)
    checkpoints.catch_up(history_of(2))
    assert folder.saved == []  # that is where it resumed from
    checkpoints.catch_up(history_of(3))
    assert len(folder.saved) == 1
