"""What signals do: until training begins they end the process, from then on they ask it to save and stop."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import NoReturn

from mnist_dist.base.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
"""Ctrl-C, and the signals of batch systems."""
_GRACE_S, _REPORT_S = 0.4, 0.4


class StopRequest:
    """Whether this process was asked to stop by a signal; a context manager, for the main thread.

    A separate thread handles signals: the main thread may be waiting for something that signals do not interrupt, such
    as a file on a dead network mount, or be busy in a library.
    """

    def __init__(self, *, tell_others: Callable[[str, int], None], has_others: bool) -> None:
        """Create it; `tell_others(reason, exit code)` is called if a signal ends one process of several."""
        self._tell_others = tell_others
        self._has_others = has_others
        self._lock = threading.Lock()
        self._has_begun = False
        self._has_left = threading.Event()
        self._ended_by: signal.Signals | None = None
        self._came = False

    def __call__(self) -> bool:
        """Whether a signal has come since the training began."""
        return self._came

    def __enter__(self) -> "StopRequest":
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reading,), name="signals", daemon=True).start()
        for number in SIGNALS:
            signal.signal(number, _leave_it_to_the_thread)
            # Communication libraries should not see their system calls interrupted.
            signal.siginterrupt(number, False)
        # Otherwise the system would interrupt this thread; threads started from here on inherit the mask.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        return self

    def __exit__(self, _: type | None, error: BaseException | None, __: TracebackType | None) -> None:
        """Ignore signals from now on, as the process is ending by itself: Python's shutdown would make them fatal."""
        self._has_left.set()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if self._ended_by is not None and isinstance(error, Exception):
            # Both at once: usually the launcher stops this process because of an error in it or in another one.
            log.error("error: %s", " ".join(str(error).splitlines()))
            end_at_once(_exit_code(self._ended_by))

    def training_begins(self) -> None:
        """From now on a signal is a request to stop after the epoch; a second one changes nothing."""
        with self._lock:
            self._has_begun = True

    def _watch(self, pipe: int) -> None:
        while True:
            (number,) = os.read(pipe, 1)
            if number in SIGNALS:
                self._note(signal.Signals(number))

    def _note(self, number: signal.Signals) -> None:
        with self._lock:
            if not self._has_begun:
                self._end(number)
                return
            is_first, self._came = not self._came, True
        if is_first:
            # Not through the log, which may be in the middle of a line. The reader may have ended by the same Ctrl-C.
            with contextlib.suppress(OSError):
                os.write(2, f"{number.name}: stopping after this epoch\n".encode())

    def _end(self, number: signal.Signals) -> None:
        """End the process within a second, whatever the main thread does."""
        self._ended_by = number
        if self._has_others and self._has_left.wait(_GRACE_S):
            return  # the main thread ends the process, and says why
        code = _exit_code(number)
        # In a thread, since it may block (on a lock, a full pipe).
        report = threading.Thread(target=self._report, args=(number, code), daemon=True)
        report.start()
        report.join(_REPORT_S)
        os._exit(code)

    def _report(self, number: signal.Signals, code: int) -> None:
        self._tell_others("interrupted" if number is signal.SIGINT else f"{number.name} before the training", code)
        if number is signal.SIGINT:
            log.error("error: interrupted")
        else:
            log.warning("%s: stopped before training began; run the same command again to start it", number.name)
        end_at_once(code)


def end_at_once(code: int) -> NoReturn:
    """End this process at once, after flushing its output: a normal exit of the backends waits for other processes."""
    logging.shutdown()
    if os.isatty(1):
        os.write(1, b"\x1b[?25h")  # the live bar has hidden the cursor
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _exit_code(number: signal.Signals) -> int:
    return EXIT_INTERRUPTED if number is signal.SIGINT else EXIT_PREEMPTED


def _leave_it_to_the_thread(number: int, frame: FrameType | None) -> None:
    """Python calls this in the main thread, at some point; by then the signal thread knows."""
