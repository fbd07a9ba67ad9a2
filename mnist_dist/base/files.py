"""Writing files so that no reader or crash ever sees half of one; locks between processes."""

import contextlib
import errno
import fcntl
import io
import itertools
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from mnist_dist.base.errors import UserError

_TEMPORARY = ".tmp"
_LOOK_S, _LOOKING_S = 0.05, 0.15
_HAS_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def expand_path(key: str, value: str) -> Path:
    """The path that a key names, with `~` expanded; raises UserError if there is no such user."""
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise UserError(f"{key}={value}: no such user's home folder; write the path out") from error


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file for reading, not a FIFO or device, which might block or never end; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # without, a FIFO would wait for a writer
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Is a directory" if path.is_dir() else "Not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path) -> bytes:
    """The content of a file, as `open_regular` opens it; raises OSError."""
    with open_regular(path) as stream:
        return stream.read()


def write_atomically(path: Path, content: bytes, *, check: Callable[[], None] = lambda: None) -> None:
    """Replace `path` by `content` atomically, flushed to disk, in a folder that exists; raises OSError.

    `check` is called first, and right before `path` is replaced, and may raise to prevent it.
    """
    check()  # a process that is ended meanwhile would leave its temporary file
    # Relative to the folder opened here: if it is moved meanwhile, nothing is written to what takes its place.
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        temporary = _temporary_name(path)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=folder)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            check()
            os.replace(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)
            raise
        _flush_folder(folder)
    finally:
        os.close(folder)


def _temporary_name(path: Path) -> str:
    return f".{path.name}.{secrets.token_hex(4)}{_TEMPORARY}"


def is_temporary(path: Path) -> bool:
    """Whether `path` has the name of a file that `write_atomically` leaves if its process is killed."""
    return path.name.startswith(".") and path.suffix == _TEMPORARY


def remove_temporaries(folder: Path, *, of: str = "") -> None:
    """Remove what killed processes left of `write_atomically` in `folder`; only for the only writer of these files.

    By default of all files, else of those whose names begin with `of`.
    """
    for path in filter(is_temporary, folder.glob(f".{of}*")):
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make the folder `path` if there is none, but not its parents; raises OSError."""
    with contextlib.suppress(FileExistsError):  # if it is a file, writing into it will fail
        path.mkdir()


def path_by_time() -> Path:
    """What a new folder of a run, a sweep or a grid is called: `runs/`, date and time."""
    return Path("runs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def make_new_folder(path: Path) -> Path:
    """Make the folder `path` and its parents; if it exists `path_2`, and so on. Returns which; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        made = path if number == 1 else path.with_name(f"{path.name}_{number}")
        with contextlib.suppress(FileExistsError):
            made.mkdir()
            return made
    raise AssertionError


def _flush_folder(descriptor: int) -> None:
    """Make a new name in an open folder survive a power failure; raises OSError."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems do not support it
            raise


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` (created if needed); waits for other processes; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(_open_lock(path), "wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # released when the file is closed, or its process dies
        yield


@contextlib.contextmanager
def polled_lock(path: Path, *, wait: Callable[[int], object]) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` (created if needed, but not its folder); raises OSError.

    While another process holds it, `wait` is called before each further look, with their number so far.
    """
    with os.fdopen(_open_lock(path), "wb") as stream:
        for looks in itertools.count():
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                wait(looks)
        yield


def _open_lock(path: Path) -> int:
    # For writing, which NFS requires for locks; not blocking, since a FIFO would wait for a reader.
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o666)


def open_locked(path: Path, *, wait_s: float = 0.0) -> int:
    """Open the file `path` (created if needed, else not changed) with an exclusive lock; returns the descriptor.

    The lock ends when the descriptor is closed (in all processes that have inherited it) or the process ends in any
    way. On a file system without locks the file is opened without one. Raises BlockingIOError if another process still
    holds the lock after `wait_s` seconds, and OSError.
    """
    deadline = time.monotonic() + max(wait_s, _LOOKING_S)  # `is_locked` may just be looking
    while True:
        descriptor = _open_lock(path)  # anew each time: the file may have been replaced
        try:
            _lock_if_possible(descriptor)
            if is_open_as(descriptor, path):
                return descriptor
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path))
        except OSError as error:
            os.close(descriptor)
            if not isinstance(error, BlockingIOError) or time.monotonic() >= deadline:
                raise
        time.sleep(_LOOK_S)


def _lock_if_possible(descriptor: int) -> None:
    """Lock an open file, if its file system has locks; raises BlockingIOError if another process has, and OSError."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _HAS_NO_LOCKS:
            raise


def replace_locked(path: Path) -> int:
    """Put a copy in the place of the file `path`, with the lock of `open_locked`; returns the descriptor.

    Whoever holds the lock of the old file keeps it, and may learn by `is_open_as` what has happened. Raises OSError.
    """
    copy = path.with_name(_temporary_name(path))
    descriptor = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _lock_if_possible(descriptor)  # before anybody else can open it by its name
        with os.fdopen(descriptor, "wb", closefd=False) as stream:
            stream.write(read_regular(path))
        os.fsync(descriptor)
        copy.replace(path)
    except BaseException:
        os.close(descriptor)
        copy.unlink(missing_ok=True)
        raise
    return descriptor


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of `open_locked` on the file `path`, on any machine that sees the file.

    Looking takes a lock too, for an instant. False where the file system has no locks, or there is no file; raises
    OSError if the file cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _HAS_NO_LOCKS:
            raise
    finally:
        os.close(descriptor)
    return False


def is_open_as(descriptor: int, path: Path) -> bool:
    """Whether `path` is still the open file, not removed, moved or replaced since."""
    try:
        # Opening asks the server of a network file system, where `stat` may answer from a cache.
        found = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            return os.path.samestat(os.fstat(descriptor), os.fstat(found))
        finally:
            os.close(found)
    except OSError as error:
        # Other errors prove nothing; the next write will meet them.
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


def check_writable(folder: Path) -> None:
    """Raise OSError unless files can be written in `folder`, or it can be created; leaves nothing behind."""
    ancestors = (folder, *folder.absolute().parents)
    number, place = next((n, path) for n, path in enumerate(ancestors) if path.exists() or path.is_symlink())
    try:
        place.stat()
    except OSError as error:
        raise OSError(error.errno, f"{place} is a link to {place.readlink()}: {error.strerror}") from error
    for missing in ancestors[:number]:
        with contextlib.suppress(FileNotFoundError):
            (place / missing.name).stat()  # the name may be too long
    with tempfile.TemporaryFile(dir=place):
        pass


def describe_os_error(error: OSError) -> str:
    """The shortest true description of a network or file error."""
    reason = getattr(error, "reason", error)
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return " ".join(text.split())
