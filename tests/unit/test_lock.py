"""Two jobs and one run folder: who gets the lock."""

import errno
import functools
import gc
from pathlib import Path

import numpy as np
import pytest

from mnist_dist.base import files
from mnist_dist.base.errors import LostTouch, TrainingFailed, UserError
from mnist_dist.base.files import write_atomically
from mnist_dist.config.compose import compose_config
from mnist_dist.launch.losses import Loss
from mnist_dist.launch.topology import Step, Topology
from mnist_dist.results.history import EpochMetrics, History
from mnist_dist.run import checkpoint
from mnist_dist.run import input as run_input
from mnist_dist.run.checkpoint import Checkpoint, ResumePoint
from mnist_dist.run.folder import RunFolder
from mnist_dist.run.lock import HOLDER


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


@pytest.fixture
def ended(tmp_path) -> None:
    """A run folder that nobody has."""
    RunFolder(tmp_path / "run").create(compose_config())
    gc.collect()


def take_over(path) -> RunFolder:
    folder = RunFolder(path)
    folder.claim(holder_is_lost=True)
    return folder


def test_only_a_lost_holder_is_replaced(frozen, logged):
    with pytest.raises(LostTouch, match="a process that trained here before has not ended within 0 s"):
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


@pytest.fixture
def note(tmp_path):
    """Notes a loss, as a launcher does; returns the path of the file."""

    def note(*hosts: str, job: str = "job") -> Path:
        path = tmp_path / f"{job}.losses"
        with path.open("a") as stream:
            stream.write(Loss(0.0, hosts, "no answer").to_line())  # clocks of machines differ
        return path

    return note


@pytest.fixture
def start_on(tmp_path, monkeypatch):
    """Claims the folder for rank 0 on a host, and begins to train there."""
    monkeypatch.setattr(run_input, "_ENDING_S", 0.3)

    def start_on(host: str, losses: Path | None) -> RunFolder:
        folder = RunFolder(tmp_path / "run")
        launcher = Step((host, "z"), ("a:1",), "1")
        run_input.claim(folder, Topology(launcher, world_size=2, losses=losses))
        return folder

    return start_on


def test_the_lost_holder_may_have_frozen_in_its_start(ended, start_on, note):
    """Where nobody had trained before, and before it could write anything else."""
    path = note("a")
    lost = start_on("b", path)
    assert (lost.path / HOLDER).read_text() == f'{{"host": "b", "losses": "{path}", "known_losses": 1}}\n'
    with pytest.raises(LostTouch, match="a process on b that trained here before has not ended within 0 s"):
        start_on("c", note("a"))
    folder = start_on("c", note("d", "b"))
    assert not lost._lock.is_still_there()
    assert folder._lock.is_still_there()


def test_a_lost_holder_before_there_is_a_run(start_on, note, monkeypatch):
    """It has the lock, but not written `config.yaml` yet."""

    def freeze(_):
        raise OSError("frozen")

    lost = start_on("a", note("x"))
    with monkeypatch.context() as frozen, pytest.raises(TrainingFailed, match="frozen"):
        frozen.setattr(RunFolder, "_remove_temporaries", freeze)
        lost.create(compose_config())
    assert {path.name for path in lost.path.iterdir()} == {"train.log", HOLDER}
    lost.check_usable()
    folder = start_on("b", note("a"))
    folder.create(compose_config())
    assert not lost._lock.is_still_there()
    assert folder._lock.is_still_there()


def test_a_holder_that_starts_after_the_loss_is_not_lost(ended, start_on, note):
    """Its machine is back; the file of losses stays."""
    path = note("a")
    healthy = start_on("a", path)
    for host in ("a", "b"):
        with pytest.raises(LostTouch, match="a process on a that"):
            start_on(host, path)
    assert healthy._lock.is_still_there()


@pytest.mark.parametrize("own", ["none", "other"])
def test_losses_of_another_job_say_nothing_about_the_holder(own, ended, start_on, note):
    healthy = start_on("a", None if own == "none" else note("x", job=own))
    with pytest.raises(LostTouch):
        start_on("b", note("a"))
    with pytest.raises(UserError, match="another job is training here"):
        start_on("b", None)
    assert healthy._lock.is_still_there()


@pytest.mark.parametrize("content", [None, "", "{", "[]", "[" * 10**5, '{"host": 5}', "\x00"])
def test_a_holder_of_whom_nothing_is_known_is_not_lost(content, frozen, start_on, note):
    """An earlier version wrote no note."""
    (frozen.path / HOLDER).unlink()
    if content is not None:
        (frozen.path / HOLDER).write_text(content)
    with pytest.raises(LostTouch, match="a process that trained"):
        start_on("b", note("a"))


def test_others_wait_for_a_chief_that_waits(tmp_path, note):
    config, path = compose_config("strategy.start_timeout_s=60"), tmp_path / "job.losses"
    chief, other = (Topology(Step(("a", "b"), ("a:1",), "1"), rank, 2, losses=path) for rank in (0, 1))
    assert [run_input.start_timeout_s(config, one) for one in (chief, other, Topology())] == [60, 60, 60]
    note("x")
    assert [run_input.start_timeout_s(config, one) for one in (chief, other, Topology())] == [60, 150, 60]


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


def test_frozen_when_it_has_removed_old_checkpoints(frozen, monkeypatch):
    """Its successor is just writing one."""
    unlink, taken = Path.unlink, []

    def unlink_and_freeze(path, **options):
        unlink(path, **options)
        if not taken:
            taken.append(take_over(frozen.path))
            (path.parent / ".epoch-00004.ckpt.12345678.tmp").touch()

    monkeypatch.setattr(Path, "unlink", unlink_and_freeze)
    frozen.save_checkpoint(lambda: checkpoint_of(3), keep=2)
    assert taken
    assert names(frozen) == [".epoch-00004.ckpt.12345678.tmp", "epoch-00002.ckpt", "epoch-00003.ckpt"]


def names(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.checkpoints.path.iterdir())
