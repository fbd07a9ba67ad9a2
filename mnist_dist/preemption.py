"""A signal becomes a flag, which the training reads between two epochs."""

import contextlib
import os
import signal
from types import FrameType


class StopRequest:
    """Whether somebody asked this process to stop: Ctrl-C, a batch system's SIGTERM or SIGUSR2."""

    def __init__(self) -> None:
        self._came = False
        self._signals: set[signal.Signals] = set()

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self._came

    def listen(self, *signals: signal.Signals) -> None:
        """From now on these are requests, whoever had them before; a second one changes nothing.

        For the main thread, as Python wants it.
        """
        for number in signals:
            signal.signal(number, self._note)
            # Libraries between two machines should not see their system calls end early.
            signal.siginterrupt(number, False)
        self._signals.update(signals)

    def close(self) -> None:
        """Ignore them, as the process is ending by itself: else Python's own end makes them deadly again."""
        for number in self._signals:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        is_first, self._came = not self._came, True
        if is_first:
            # Not through the log, which this may have interrupted in the middle of a line. Whoever reads it may have
            # ended by the same Ctrl-C.
            with contextlib.suppress(OSError):
                os.write(2, f"{signal.Signals(number).name}: stopping after this epoch\n".encode())
