"""Two jobs and one run folder: who gets the lock."""

import errno
import functools

import numpy as np
import pytest

from mnist_dist.base import files
from mnist_dist.base.errors import TrainingFailed, UserError
from mnist_dist.base.files import write_atomically
from mnist_dist.config.compose import compose_config
from mnist_dist.results.history import EpochMetrics, History
from mnist_dist.run import checkpoint
from mnist_dist.run.checkpoint import Checkpoint, ResumePoint
from mnist_dist.run.folder import RunFolder


def contents(folder) -> dict[str, bytes]:
    """All files below a folder, with their contents."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_started_while_another_job_was_starting(tmp_path):
    """That job does not know how far the run has got, so it must not train there, even if nobody else does any more."""
    config = compose_config()
    late, early = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    for folder in (late, early):
        folder.claim()
    early.create(config)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="another job is training here"):
        late.create(config)
    del folder, early
    with pytest.raises(UserError, match="another job has started a run here"):
        late.create(config)
    assert contents(tmp_path) == before


def test_two_new_runs_of_the_same_second(tmp_path, monkeypatch):
    """Each has its own folder and lock."""
    monkeypatch.chdir(tmp_path)
    first, second = RunFolder.from_config(None), RunFolder.from_config(None)
    second.path = first.path
    for folder in (first, second):
        folder.claim()
    for folder in (first, second):
        folder.create(compose_config())
    assert second.path == first.path.with_name(f"{first.path.name}_2")
    for folder in (first, second):
        other = RunFolder(folder.path)
        with pytest.raises(UserError, match="another job is training here"):
            other.claim()


def checkpoint_of(epoch: int) -> Checkpoint:
    rows = tuple(EpochMetrics(i, 1.0, 0.5, 1.0, i / 100, 1e-3, 1.0, 100.0) for i in range(1, epoch + 1))
    return Checkpoint(ResumePoint(History(rows), {"seed": "0"}, 1, 64), {"weights": np.zeros(3)})


@pytest.fixture
def frozen(tmp_path) -> RunFolder:
    """A run folder with two checkpoints, of a process that will be taken for lost."""
    folder = RunFolder(tmp_path / "run")
    folder.create(compose_config())
    for epoch in (1, 2):
        folder.save_checkpoint(functools.partial(checkpoint_of, epoch), keep=2)
    return folder


def take_over(path) -> RunFolder:
    folder = RunFolder(path)
    folder.claim(holder_is_lost=True)
    return folder


def test_only_a_lost_holder_is_replaced(frozen, logged):
    with pytest.raises(UserError, match="another job is training here"):
        RunFolder(frozen.path).claim(wait_s=0.3)
    frozen.log_path.write_bytes(b"a line\n")
    before = contents(frozen.path)
    folder = take_over(frozen.path)
    assert contents(frozen.path) == before
    assert logged() == [f"{frozen.path}: taken over from a process on a machine that was lost"]
    with pytest.raises(UserError, match="another job is training here"):
        RunFolder(frozen.path).claim()
    folder.write_text("history.csv", "new")
    with pytest.raises(TrainingFailed, match="is not this run's folder any more"):
        frozen.write_text("history.csv", "old")
    assert (frozen.path / "history.csv").read_text() == "new"


@pytest.mark.parametrize("locks", ["of each machine", "unsupported"])
def test_a_lost_holder_is_replaced_whatever_the_locks_say(locks, frozen, monkeypatch):
    """They may be those of one machine only, or have ended with a lease, or there are none."""
    number = errno.ENOTSUP if locks == "unsupported" else 0

    def lock(*_):
        if number:
            raise OSError(number, "no locks here")

    monkeypatch.setattr(files.fcntl, "flock", lock)
    folder = take_over(frozen.path)
    folder.write_text("history.csv", "new")
    with pytest.raises(TrainingFailed, match="is not this run's folder any more"):
        frozen.write_text("history.csv", "old")
    assert (frozen.path / "history.csv").read_text() == "new"


def test_a_lost_holder_before_there_is_a_run(tmp_path):
    """It had the lock, but not written `config.yaml` yet."""
    lost = RunFolder(tmp_path)
    lost._lock.take(lost.log_path)
    folder = take_over(tmp_path)
    folder.create(compose_config())
    assert not lost._lock.is_still_there()
    assert folder._lock.is_still_there()


def test_frozen_before_its_file_is_there(frozen):
    """While it prepares the content."""
    taken = []

    def create() -> Checkpoint:
        taken.append(take_over(frozen.path))
        return checkpoint_of(3)

    with pytest.raises(TrainingFailed, match="is not this run's folder any more"):
        frozen.save_checkpoint(create, keep=2)
    assert names(frozen) == ["epoch-00001.ckpt", "epoch-00002.ckpt"]


def test_frozen_before_it_removes_old_checkpoints(frozen, monkeypatch):
    """It must not remove those of its successor, which it does not know."""
    taken = []

    def write_and_freeze(path, content, **options):
        write_atomically(path, content, **options)
        if not taken:
            taken.append(take_over(frozen.path))
            taken[0].save_checkpoint(lambda: checkpoint_of(4), keep=3)

    monkeypatch.setattr(checkpoint, "write_atomically", write_and_freeze)
    with pytest.raises(TrainingFailed, match="is not this run's folder any more"):
        frozen.save_checkpoint(lambda: checkpoint_of(3), keep=2)
    assert names(frozen) == ["epoch-00002.ckpt", "epoch-00003.ckpt", "epoch-00004.ckpt"]


def names(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.checkpoints.path.iterdir())
