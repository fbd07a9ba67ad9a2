"""The lock on a run folder: one job at a time trains there."""

import os
import weakref
from pathlib import Path

from mnist_dist.base.errors import EnvironmentProblem, UserError
from mnist_dist.base.files import describe_os_error, is_open_as, open_locked, replace_locked


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

        Raises UserError if another job has it.
        """
        self._path, folder = log_path, log_path.parent
        try:
            try:
                self._descriptor = open_locked(log_path, wait_s=self._wait_s)
            except BlockingIOError:
                if not self._holder_is_lost:
                    raise
            if self._holder_is_lost:
                # Even if its lock is free: on some file systems it ends before the process, or is not seen elsewhere.
                old, self._descriptor = self._descriptor, replace_locked(log_path)
                if old is not None:
                    os.close(old)
        except BlockingIOError as error:
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

    def is_still_there(self) -> bool:
        """Whether the file is still the one that was locked; True where none was (`evaluate`)."""
        return self._descriptor is None or is_open_as(self._descriptor, self._path)

    def check(self) -> None:
        """Raise FileNotFoundError unless `is_still_there`."""
        if not self.is_still_there():
            raise FileNotFoundError(self._path)
