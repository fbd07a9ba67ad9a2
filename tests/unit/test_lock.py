"""Two jobs and one run folder: who gets the lock."""

import pytest

from mnist_dist.base.errors import UserError
from mnist_dist.config.compose import compose_config
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
