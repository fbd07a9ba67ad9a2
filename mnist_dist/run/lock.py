"""The lock on a run folder: one job at a time trains there."""

import contextlib
import json
import os
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mnist_dist.base.errors import EnvironmentProblem, LostTouch, UserError
from mnist_dist.base.files import describe_os_error, is_open_as, open_locked, read_regular, replace_locked
from mnist_dist.launch.losses import Loss
from mnist_dist.run.summary import read_as

HOLDER = ".holder.json"
"""The file in a run folder in which whoever takes the lock notes who it is, for those who come later."""


@dataclass(frozen=True)
class Holder:
    """A process that takes the lock."""

    host: str = ""
    """Its machine, as its launcher calls it."""
    losses: str = ""
    """The file with the losses of its job (`launch.losses`); empty if there is none."""
    known_losses: int = 0
    """How many were in that file when it started: so none of these is its own."""

    def to_json(self) -> str:
        """As in the file."""
        return json.dumps(asdict(self)) + "\n"

    def is_lost(self, path: Path | None, losses: Sequence[Loss]) -> bool:
        """Whether its machine was lost since, as the losses in the file `path` say."""
        is_its_own_job = self.losses == str(path or "")  # another one says nothing about this process
        return is_its_own_job and any(self.host in loss.hosts for loss in losses[self.known_losses :])


def read_holder(folder: Path) -> Holder:
    """Who took the lock of the run folder last; nobody, if that was an earlier version. Raises OSError."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        holder: Holder = read_as(Holder, json.loads(read_regular(folder / HOLDER)), "it")
        return holder
    return Holder()


class FolderLock:
    """A lock on the log file of a run folder, which stays open until this process ends anyway."""

    def __init__(self, *, wait_s: float = 0.0, holder_is_lost: bool = False) -> None:
        """Wait `wait_s` seconds for another process that has the lock; not at all, but take over, if it is lost."""
        self._wait_s = 0.0 if holder_is_lost else wait_s
        self._holder_is_lost = holder_is_lost
        self._path = Path()
        self._descriptor: int | None = None

    @property
    def is_held(self) -> bool:
        """Whether this process has the lock."""
        return self._descriptor is not None

    def take(self, log_path: Path) -> bool:
        """Take the lock, and keep it until this process ends; returns whether it was taken over from a lost process.

        Raises UserError if another job has it; LostTouch if it was waited for, since a later start may find it ended.
        """
        self._path, folder = log_path, log_path.parent
        try:
            self._descriptor = self._open()
        except BlockingIOError as error:
            if self._wait_s:
                raise LostTouch(
                    f"run_dir={folder}: a process{self._holder_host()} that trained here before has not ended within "
                    f"{self._wait_s:.0f} s (it holds the lock on {log_path.name}); once it has, the same command "
                    "resumes"
                ) from error
            raise UserError(
                f"run_dir={folder}: another job is training here (it holds the lock on {self._path.name}); stop "
                "it or wait until it ends, or name another run_dir"
            ) from error
        except OSError as error:
            reason = f"{self._path.name} cannot be written: {describe_os_error(error)}"
            raise EnvironmentProblem(f"run_dir={folder}: {reason}") from error
        # When the process ends the kernel closes it, after everything else.
        weakref.finalize(self, os.close, self._descriptor).atexit = False
        return self._holder_is_lost

    def _open(self) -> int:
        if not self._holder_is_lost:
            return open_locked(self._path, wait_s=self._wait_s)
        old = None
        with contextlib.suppress(BlockingIOError):
            old = open_locked(self._path)
        try:
            # Even if the lock is free: it may have ended before the process, or be one that other machines do not see.
            return replace_locked(self._path)
        finally:
            if old is not None:
                os.close(old)

    def _holder_host(self) -> str:
        with contextlib.suppress(OSError):
            if host := read_holder(self._path.parent).host:
                return f" on {host}"
        return ""

    def is_still_there(self) -> bool:
        """Whether the file is still the one that was locked; True where none was (`evaluate`)."""
        return self._descriptor is None or is_open_as(self._descriptor, self._path)

    def check(self) -> None:
        """Raise FileNotFoundError unless `is_still_there`."""
        if not self.is_still_there():
            raise FileNotFoundError(self._path)
