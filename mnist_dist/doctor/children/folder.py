"""Whether the run folder's file system does what a training relies on; what is made there is removed again."""

import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mnist_dist.base.errors import UserError
from mnist_dist.base.files import describe_os_error
from mnist_dist.run.folder import RunFolder

_CONTENT = b"\0" * 1_000_000


def probe(run_dir: str | None, may_resume: bool) -> Iterator[tuple[str, Any]]:
    """Try one thing after the other, so that the last answer shows what hangs."""
    folder = RunFolder.from_config(run_dir)
    yield "path", str(folder.path)
    try:
        folder.check_usable(may_resume=may_resume)
    except UserError as error:
        yield "refused", str(error)
        return
    place = nearest_folder(folder.path)
    system = os.statvfs(place)
    yield (
        "space",
        {
            "place": str(place),
            "free": system.f_bavail * system.f_frsize,
            # Some file systems count no files.
            "free_files": system.f_favail if system.f_files else None,
        },
    )
    with tempfile.TemporaryDirectory(prefix=".doctor-", suffix=".tmp", dir=place) as name:
        for what, attempt in (("write", _write), ("rename", _rename), ("fsync of a folder", _flush), ("flock", _lock)):
            yield what, _try(attempt, Path(name))


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the one above it in which it would be made."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def _try(attempt: Callable[[Path], str], folder: Path) -> dict[str, Any]:
    started_s = time.monotonic()
    try:
        problem = attempt(folder)
    except OSError as error:
        problem = describe_os_error(error)
    return {"problem": problem, "seconds": time.monotonic() - started_s}


def _write(folder: Path) -> str:
    with (folder / "written").open("wb") as stream:
        stream.write(_CONTENT)
        stream.flush()
        os.fsync(stream.fileno())
    return ""


def _rename(folder: Path) -> str:
    (folder / "other").write_bytes(b"")
    (folder / "written").replace(folder / "other")
    same = (folder / "other").read_bytes() == _CONTENT
    return "" if same and not (folder / "written").exists() else "the file has other content than was written to it"


def _flush(folder: Path) -> str:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a training does without, too
            raise
    finally:
        os.close(descriptor)
    return ""


def _lock(folder: Path) -> str:
    """Hold a lock, and let another process try to get it."""
    path = folder / "locked"
    with path.open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        child = os.fork()
        if child == 0:
            os._exit(_lock_in_vain(path))
        _, status = os.waitpid(child, 0)
    return "" if os.waitstatus_to_exitcode(status) == 0 else "two processes got the same lock"


def _lock_in_vain(path: Path) -> int:
    """0 if another process holds the lock."""
    try:
        with path.open("wb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return 0
    except OSError:
        return 2
    return 1
