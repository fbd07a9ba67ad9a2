"""Atomic writes, locks within a process, and the check for a writable folder."""

import errno
import os
import stat

import pytest

from mnist_dist.base import files
from mnist_dist.base.files import (
    check_writable,
    file_lock,
    is_open_as,
    open_locked,
    remove_temporaries,
    write_atomically,
)


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, b"one")
    assert path.read_bytes() == b"one"
    write_atomically(path, b"2")
    assert path.read_bytes() == b"2"
    assert list(path.parent.iterdir()) == [path]


def test_a_new_file_survives_a_power_failure(tmp_path, monkeypatch):
    """The content is flushed before the file gets its name; the folder, which has the name, is flushed afterwards."""
    steps = []
    fsync, replace = os.fsync, os.replace

    def flush(descriptor):
        steps.append(("flush", str(files.Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    def rename(source, target, **options):
        steps.append(("rename", source))
        replace(source, target, **options)

    monkeypatch.setattr(files.os, "fsync", flush)
    monkeypatch.setattr(files.os, "replace", rename)
    write_atomically(tmp_path / "a.txt", b"one")
    temporary = steps[1][1]
    assert temporary.startswith(".a.txt.")
    assert steps == [("flush", str(tmp_path / temporary)), ("rename", temporary), ("flush", str(tmp_path))]


def test_the_old_content_stays_while_the_new_is_written(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_atomically(path, b"old")
    seen = []
    monkeypatch.setattr(files.os, "fsync", lambda _: seen.append(path.read_bytes()))
    write_atomically(path, b"new")
    assert seen == [b"old", b"new"]  # the file before the old content was replaced, then the folder
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failure_leaves_the_old_content_and_no_temporary_file(function, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_atomically(path, b"old")

    def fail(*_, **__):
        raise OSError("the disk is full")

    monkeypatch.setattr(files.os, function, fail)
    with pytest.raises(OSError, match="disk is full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_system_that_cannot_flush_folders(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", refuse_folders)
    write_atomically(tmp_path / "a.txt", b"new")
    assert (tmp_path / "a.txt").read_bytes() == b"new"


def test_what_a_killed_writer_leaves_is_removed_and_nothing_else(tmp_path, monkeypatch):
    write_atomically(tmp_path / "a.txt", b"kept")
    (tmp_path / ".hidden").touch()
    with monkeypatch.context() as killed:  # kill -9: nobody cleans up
        killed.setattr(files.os, "replace", lambda *_, **__: None)
        write_atomically(tmp_path / "a.txt", b"lost")
    assert len(list(tmp_path.iterdir())) == 3
    remove_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", ".hidden"}


def test_a_folder_in_the_way_leaves_no_temporary_file(tmp_path):
    (tmp_path / "a.txt" / "b").mkdir(parents=True)
    with pytest.raises(OSError):
        write_atomically(tmp_path / "a.txt", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_an_interrupt_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a.txt", b"new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_follows_the_umask(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "a.txt", b"")
        assert os.umask(umask) == umask  # left as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == mode


@pytest.mark.parametrize("parent", ["a file", "/proc"])
def test_unwritable_places_raise_oserror(parent, tmp_path):
    (tmp_path / "a file").write_bytes(b"")
    folder = tmp_path / parent / "x"  # joining to an absolute `parent` gives just that
    for action in (lambda: write_atomically(folder / "y", b""), lambda: check_writable(folder)):
        with pytest.raises(OSError):
            action()
    with pytest.raises(OSError), file_lock(folder / "lock"):
        pass


def test_check_writable_leaves_nothing_behind(tmp_path):
    check_writable(tmp_path)
    check_writable(tmp_path / "not" / "yet")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        check_writable(tmp_path / "file")


def test_check_writable_of_a_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_writable(files.Path("runs/x"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_moved_away_while_it_is_written_to(tmp_path, monkeypatch):
    """What takes its place is left alone."""
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    write_atomically(folder / "a.txt", b"old")
    fsync, moves = os.fsync, iter([True])

    def move(descriptor):
        if next(moves, False):
            folder.rename(elsewhere)
            folder.mkdir()
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", move)
    write_atomically(folder / "a.txt", b"new")
    assert list(folder.iterdir()) == []
    assert (elsewhere / "a.txt").read_bytes() == b"new"


def test_a_lock_that_is_taken_is_refused(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"a line\n")
    first = open_locked(path)
    with pytest.raises(BlockingIOError):
        open_locked(path)
    assert path.read_bytes() == b"a line\n"
    os.close(first)
    os.close(open_locked(path))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks(number, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    for descriptor in [open_locked(tmp_path / "log") for _ in range(2)]:
        assert is_open_as(descriptor, tmp_path / "log")
        os.close(descriptor)


def test_other_errors_of_a_lock_are_raised(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output"):
        open_locked(tmp_path / "log")


def test_a_lock_is_that_of_the_file_that_is_there(tmp_path, monkeypatch):
    """Whoever waits for a lock while the file is replaced, as by a take-over, waits for that of the new file."""
    path, new = tmp_path / "log", tmp_path / "new"
    holders = [open_locked(path)]

    def replace_it(_):
        if len(holders) == 1:
            holders.append(open_locked(new))
            new.rename(path)
            os.close(holders[0])

    with monkeypatch.context() as patched:
        patched.setattr(files.time, "sleep", replace_it)
        with pytest.raises(BlockingIOError):
            open_locked(path)
    os.close(holders[1])
    descriptor = open_locked(path)
    assert is_open_as(descriptor, path)
    os.close(descriptor)


def test_what_the_client_of_a_file_system_has_cached_does_not_count(tmp_path, monkeypatch):
    path = tmp_path / "log"
    descriptor = open_locked(path)
    cached = path.stat()
    path.rename(tmp_path / "old")
    path.touch()
    monkeypatch.setattr(files.Path, "stat", lambda *_, **__: cached)
    assert not is_open_as(descriptor, path)
    os.close(descriptor)


def test_whether_a_file_is_still_in_its_place(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    path = folder / "log"
    descriptor = open_locked(path)
    assert is_open_as(descriptor, path)
    folder.rename(elsewhere)
    assert not is_open_as(descriptor, path)
    folder.write_bytes(b"")
    assert not is_open_as(descriptor, path)
    assert is_open_as(descriptor, elsewhere / "log")
    (elsewhere / "log").unlink()
    (elsewhere / "log").write_bytes(b"")
    assert not is_open_as(descriptor, elsewhere / "log")
    os.close(descriptor)


def test_a_write_that_may_not_be_makes_no_temporary_file(tmp_path):
    """Its process may be ended before it could remove the file."""

    def refuse():
        raise FileNotFoundError(list(tmp_path.iterdir()))

    with pytest.raises(FileNotFoundError, match=r"\[\]"):
        write_atomically(tmp_path / "a.txt", b"", check=refuse)
