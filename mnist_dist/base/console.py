"""What the terminal shows: plain lines, a live progress bar, and a copy of the lines in a file.

Modules log through the standard library (`logging.getLogger(__name__)`); `Console` decides where the lines go.
"""

import contextlib
import faulthandler
import gc
import logging
import logging.handlers
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import rich.console
import rich.progress
import rich.table

from mnist_dist.base.surroundings import settings_of_keras


class _Terminal(rich.console.Console):
    def on_broken_pipe(self) -> None:
        """Print nothing more: the reader has ended (`| head`, `| tee` and Ctrl-C), but the run must not."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_LOG_WIDTH = 140
_terminal = _Terminal(highlight=False, markup=False, emoji=False, soft_wrap=True)
_logger = logging.getLogger("mnist_dist")
job_log = logging.getLogger("mnist_dist.job")
"""For lines that are the same on every process of a job, warnings included: only the chief shows them."""
# Where errors go while file descriptor 2 is redirected.
_errors: TextIO | None = None


class _TerminalHandler(logging.Handler):
    """Lines to standard output, errors to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # the reader has ended
            if record.levelno >= logging.ERROR:
                print(self.format(record), file=_errors or sys.stderr, flush=True)
                return
            style = "bold yellow" if record.levelno == logging.WARNING else None
            _terminal.print(self.format(record), style=style)


class _LogFile(logging.FileHandler):
    """Appends lines to a file; what does not fit on a full disk is only on the terminal."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the standard library's name)
        """Ignore it: if the disk is full, the next file that matters ends the run with one clear line."""

    def close(self) -> None:
        """Close the file, whether or not its last lines can be written."""
        with contextlib.suppress(OSError):
            super().close()


class Console:
    """The log of one run: the terminal from the start, and a file once there is a run folder."""

    def __init__(self, *, rank: int = 0, world_size: int = 1) -> None:
        """Open the log of one process; ranks other than 0 show only warnings, marked with their number."""
        self._is_chief = rank == 0
        self._prefix = "" if self._is_chief else f"[rank {rank}/{world_size}] "
        self._held_back = b""
        self._early = logging.handlers.MemoryHandler(capacity=100_000, flushLevel=logging.CRITICAL + 1)
        self._handlers: list[logging.Handler] = [_TerminalHandler(), self._early]
        for handler in self._handlers:
            handler.setFormatter(logging.Formatter(self._prefix.replace("%", "%%") + "%(message)s"))

    def __enter__(self) -> "Console":
        _logger.setLevel(logging.INFO if self._is_chief else logging.WARNING)
        job_log.setLevel(logging.INFO if self._is_chief else logging.ERROR)
        _logger.propagate = False
        for handler in self._handlers:
            _logger.addHandler(handler)
        return self

    def __exit__(self, *_: object) -> None:
        for handler in reversed(self._handlers):
            _logger.removeHandler(handler)
            handler.close()

    @contextlib.contextmanager
    def tensorflow_start(self, *, messages: bool = False) -> Iterator[None]:
        """While TensorFlow is imported and started: keep its messages off the terminal, unless asked for.

        If the block fails, `show_held_back` shows them.

        Garbage collection is off: imported objects stay anyway, and scanning them repeatedly takes a fifth of the time.
        """
        gc.disable()
        try:
            with settings_of_keras(), contextlib.nullcontext() if messages else self._holding_back():
                yield
        finally:
            gc.freeze()
            gc.enable()

    @contextlib.contextmanager
    def _holding_back(self) -> Iterator[None]:
        """Hold back what TensorFlow writes in the block, for when the block fails; our own errors are shown at once."""
        global _errors
        # Read by TensorFlow's C++ side when it is first imported: 2 leaves errors only.
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
        # But until its logging is set up, it writes to file descriptor 2 regardless.
        stderr = os.dup(2)
        with tempfile.TemporaryFile() as kept, os.fdopen(stderr, "w") as _errors:
            os.dup2(kept.fileno(), 2)
            was_enabled = faulthandler.is_enabled()
            faulthandler.enable(_errors)  # a crash loses the messages, but at least shows where it was
            try:
                yield
            except BaseException:
                kept.seek(0)
                self._held_back = kept.read()
                raise
            finally:
                os.dup2(stderr, 2)
                faulthandler.disable()
                if was_enabled:
                    faulthandler.enable()
                _errors = None

    def show_held_back(self) -> None:
        """Show what TensorFlow wrote before it failed."""
        with contextlib.suppress(OSError):
            os.write(2, self._held_back)

    def log_to(self, path: Path) -> None:
        """Append all lines, earlier ones included, to the file `path` too."""
        if not self._is_chief:
            return
        file = _LogFile(path, encoding="utf-8")
        self._early.setTarget(file)
        self._early.close()  # passes on the lines that it has kept
        _logger.removeHandler(self._early)
        _logger.addHandler(file)
        self._handlers.append(file)


def show_table(table: rich.table.Table, last_line: str) -> None:
    """Print a table and a line below it, as wide as the terminal, or as a page of a log where there is none."""
    if not _terminal.is_terminal:
        _terminal.width = _LOG_WIDTH
    _terminal.print(table, soft_wrap=False)
    _terminal.print(last_line)


@contextlib.contextmanager
def progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """A live progress bar while the block runs, if there is a terminal; call what it yields with (done, total)."""
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("left"),
        rich.progress.TimeRemainingColumn(),
    )
    shown = _terminal.is_terminal and _logger.isEnabledFor(logging.INFO)  # not on the other ranks
    with rich.progress.Progress(*columns, console=_terminal, transient=True, disable=not shown) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
