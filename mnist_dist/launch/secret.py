"""The secret that the processes of a job share, and the keys that are made of it.

Whoever starts the processes may hand it to them in MNIST_DIST_SECRET. Without it all processes of a user share the one
in a file that only this user can read, in the user's home, which most clusters have on all nodes. It is read only when
several processes have to meet, and is part of no configuration, message or report.
"""

import contextlib
import errno
import functools
import hmac
import logging
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from mnist_dist.base.errors import EnvironmentProblem, UserError
from mnist_dist.base.files import describe_os_error
from mnist_dist.launch.topology import HorovodRun, Topology

log = logging.getLogger(__name__)

SECRET_VARIABLE = "MNIST_DIST_SECRET"
"""The environment variable with the secret, the same for all processes of a job."""
SAME_FOR_ALL = f"set {SECRET_VARIABLE} to the same value for all processes of the job"
_MIN_LENGTH = 16
_MAX_BYTES = 4096
# No home, or none that can be written: the same whenever a process of the job looks. Others may pass.
_NO_PLACE = (errno.ENOENT, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EPERM)


def meeting_key(topology: Topology, address: str) -> bytes:
    """The key of a meeting at an address, as all ranks spell it; raises UserError if there is no usable secret."""
    return _derive(_read_secret(topology), f"meeting {address}")


def watch_key(topology: Topology, token: str) -> bytes:
    """The key of one process's watch, which has told its token to the others; raises as `meeting_key` does."""
    return _derive(_read_secret(topology), f"watch {token}")


def _derive(secret: bytes, purpose: str) -> bytes:
    return hmac.digest(secret, purpose.encode(), "sha256")


def _read_secret(topology: Topology, environ: Mapping[str, str] = os.environ) -> bytes:
    if given := environ.get(SECRET_VARIABLE, "").strip():
        if len(given) < _MIN_LENGTH:
            raise UserError(
                f"{SECRET_VARIABLE} has {len(given)} characters, at least {_MIN_LENGTH} are needed: "
                f"export {SECRET_VARIABLE}=$(openssl rand -hex 24), or unset it"
            )
        return given.encode(errors="surrogateescape")
    if isinstance(topology.launcher, HorovodRun):
        # Its processes meet over its store, which is open to anybody: the watch's token, told there, is all there is.
        return b""
    return _read_own_secret(environ)


def _read_own_secret(environ: Mapping[str, str]) -> bytes:
    """This user's secret, which the first process that needs it creates."""
    home = environ.get("XDG_CACHE_HOME", "").strip() or "~/.cache"
    try:
        return _read_or_create(Path(home).expanduser().absolute() / "mnist_dist" / "private")
    except RuntimeError:  # no home
        pass
    except OSError as error:
        if error.errno not in _NO_PLACE:
            raise EnvironmentProblem(
                f"the secret in {home} cannot be read ({describe_os_error(error)}); start again, or {SAME_FOR_ALL}"
            ) from error
    folder = Path(tempfile.gettempdir()) / f"mnist_dist-{os.geteuid()}"
    _tell_place(folder)
    try:
        return _read_or_create(folder)
    except OSError as error:
        raise EnvironmentProblem(
            f"a secret can be kept neither in {home} nor in the folder for temporary files "
            f"({describe_os_error(error)}); {SAME_FOR_ALL}"
        ) from error


@functools.cache
def _tell_place(folder: Path) -> None:
    log.warning("The secret of jobs is in %s on each machine: %s if it has several", folder, SAME_FOR_ALL)


def _read_or_create(folder: Path) -> bytes:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    _check_private(folder, folder.lstat(), is_kind=stat.S_ISDIR, repair="chmod 700 it")
    path = folder / "secret"
    try:
        return _read_private(path)
    except FileNotFoundError:
        _create(path)
        return _read_private(path)


def _create(path: Path) -> None:
    """Write a new secret, whole at once, unless another process is faster."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_hex(32) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_private(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as stream:
        # What others could read may be known to them.
        _check_private(path, os.fstat(descriptor), is_kind=stat.S_ISREG, repair="remove it")
        content = stream.read(_MAX_BYTES).strip()
    if len(content) < _MIN_LENGTH:
        raise UserError(f"{path}: holds no secret of {_MIN_LENGTH} characters; remove it, and a new one will be made")
    return content


def _check_private(path: Path, found: os.stat_result, *, is_kind: Callable[[int], bool], repair: str) -> None:
    """Raise UserError unless a file or folder is this user's, and closed to all others."""
    if not is_kind(found.st_mode):
        problem = "it is a link, or something else that does not belong there"
    elif found.st_uid != os.geteuid():
        problem = f"it belongs to the user with the number {found.st_uid}"
    elif found.st_mode & 0o077:
        problem = f"others can open it (mode {stat.S_IMODE(found.st_mode):03o})"
    else:
        return
    raise UserError(f"{path}: no place for a secret, {problem}; {repair}, or {SAME_FOR_ALL}")
