"""A lock in the run folder, held by rank 0 and tried by the ranks of other nodes."""

import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mnist_dist.base.files import describe_os_error
from mnist_dist.doctor.children.folder import nearest_folder

_LOOK_S = 0.2


def probe(run_dir: Path, held: str | None) -> Iterator[tuple[str, Any]]:
    """Hold a lock until this process is asked to end; or, if rank 0 holds one at `held`, try to get it."""
    if held is not None:
        yield "lock", _try(Path(held))
        return
    parent = os.getppid()  # when it is killed, nothing may stay behind
    path = nearest_folder(run_dir) / f".doctor-{secrets.token_hex(4)}.tmp"
    try:
        with path.open("xb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield "held", str(path)
            while os.getppid() == parent:
                time.sleep(_LOOK_S)
    finally:
        path.unlink(missing_ok=True)


def _try(path: Path) -> str:
    """What becomes of it: refused | granted | absent, or why it cannot be told."""
    try:
        descriptor = os.open(path, os.O_WRONLY)
    except FileNotFoundError:
        return "absent"
    except OSError as error:
        return describe_os_error(error)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "refused"
    except OSError as error:
        return describe_os_error(error)
    finally:
        os.close(descriptor)
    return "granted"
