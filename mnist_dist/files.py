"""Writing files so that a reader, or a crash, never meets half of one."""

import contextlib
import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

_TEMPORARY = ".tmp"


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step, flushed to disk; creates the folder; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_TEMPORARY)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files private; others may read results as far as the user's umask lets them.
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def remove_temporaries(folder: Path) -> None:
    """Remove what `write_atomically` leaves in `folder` when its process is killed; for the only writer there."""
    for path in folder.glob(f".*{_TEMPORARY}"):
        path.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Make a new name in `folder` outlast a power failure; raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such thing
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` (created if needed); waits for other processes; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # released when the file is closed, or its process dies
        yield


def check_writable(folder: Path) -> None:
    """Raise OSError unless files can be made in `folder`, or it can be created; leaves nothing behind."""
    ancestor = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    with tempfile.TemporaryFile(dir=ancestor):
        pass


def describe_os_error(error: OSError) -> str:
    """The shortest true description of a network or file error."""
    reason = getattr(error, "reason", error)
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return " ".join(text.split())
