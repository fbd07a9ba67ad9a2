"""Processes that this one starts and that end with it, and waiting for them and for signals at once."""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mnist_dist.base.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED
from mnist_dist.launch.stop import SIGNALS

_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Share:
    """What of this machine a child may use; by default all that this process may."""

    cores: Collection[int] = ()
    """Numbers of the cores."""
    variables: Mapping[str, str] | None = None
    """Environment variables, on top of those of this process."""


def start_child(
    words: Sequence[str],
    *,
    output: int | None = None,
    inherited: Sequence[int] = (),
    share: Share | None = None,
    stdin: int = subprocess.DEVNULL,
) -> "subprocess.Popen[bytes]":
    """Start a program that is asked to stop (SIGTERM) when this process ends in any way, kill -9 included.

    To be called in the main thread: the system takes the end of the calling thread for that of the process.

    Args:
        words: the program and its arguments.
        output: a descriptor for standard output and errors; by default those of this process.
        inherited: further descriptors that the program keeps open.
        share: its part of the machine.
        stdin: a descriptor for standard input, or subprocess.PIPE.

    Raises:
        OSError: the program cannot be started.
    """
    parent, share = os.getpid(), share or Share()

    def in_child() -> None:
        # This process's handlers would note a signal in its pipe, and starting the program would forget it.
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:  # it has ended before that took effect
            os._exit(EXIT_PREEMPTED)
        if share.cores:
            os.sched_setaffinity(0, share.cores)

    return subprocess.Popen(
        words,
        stdin=stdin,
        stdout=output,
        stderr=output,
        pass_fds=inherited,
        env={**os.environ, **(share.variables or {})},
        # Ctrl-C reaches a terminal's whole group of processes, but each child should get one signal only: ours.
        start_new_session=True,
        preexec_fn=in_child,
    )


class Stopped(Exception):
    """A signal ends the work early."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


class Signals:
    """Signals to this process, and the ends of its children, as values; a context manager, for the main thread."""

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        self._reading, self._writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, _noted) for number in (*SIGNALS, signal.SIGCHLD)}
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._reading)
        os.close(self._writing)

    def wait(self, timeout_s: float | None = None) -> list[signal.Signals]:
        """Wait until a signal has come or a child has ended, at most so long; returns which of `SIGNALS` have come."""
        select.select([self._reading], [], [], timeout_s)
        with contextlib.suppress(BlockingIOError):
            return [signal.Signals(number) for number in os.read(self._reading, 4096) if number in SIGNALS]
        return []

    def sleep(self, timeout_s: float) -> None:
        """Wait so long, or until a child has ended; raises Stopped if one of `SIGNALS` has come."""
        for number in self.wait(timeout_s):
            raise Stopped(number)


def exit_code_of(stopped_by: signal.Signals) -> int:
    """What to exit with when a signal has ended the work early."""
    return EXIT_INTERRUPTED if stopped_by is signal.SIGINT else EXIT_PREEMPTED


def _noted(number: int, frame: object) -> None:
    """The number is in the pipe by now."""
