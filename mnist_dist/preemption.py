"""A signal becomes a flag, which the training reads between two epochs."""

import signal
from types import FrameType


class StopRequest:
    """Whether somebody asked this process to stop: Ctrl-C, a batch system's SIGTERM or SIGUSR2."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)

    def __init__(self) -> None:
        self._came = False

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self._came

    def listen(self) -> None:
        """From now on a signal is a request, until the process ends; a second one changes nothing."""
        for number in self.SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = True
