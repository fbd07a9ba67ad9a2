"""Whether all processes of the job are alive, while they train together.

When a process is lost, the backends wait a long time for it, or fail with an error that does not name it. So every
process has another connection to rank 0 (`links`), over which it says every few seconds that it is alive, and why it
ends when it does. Rank 0 tells all others of a lost process, and each exits at once, even from within a collective.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mnist_dist.base.errors import EXIT_FAILURE, EXIT_LOST_PEER, EXIT_USER_ERROR, LostTouch, TrainingFailed, UserError
from mnist_dist.base.wire import Message
from mnist_dist.launch import links
from mnist_dist.launch.links import FAREWELL_S, Link, Links
from mnist_dist.launch.stop import end_at_once
from mnist_dist.launch.topology import Topology

log = logging.getLogger(__name__)

# Once a collective has failed, less silence is enough.
_SUSPICIOUS_SILENCE_S = 10.0
# A process that ends with an error says why; usually all have the same error, and time to report it themselves.
_GRACE_S = 5.0
_HASTY_FAREWELL_S = 0.2
_LAST_ACT_S = 3.0


@dataclass(frozen=True)
class PeerEnd:
    """Why this process must end: another one has."""

    text: str
    code: int
    """The exit code."""
    rank: int | None = None
    """The other process, if it is gone without having said why."""
    how: str = ""
    """How that was noticed."""


class PeerWatch(Links):
    """Watches the other processes of a job in the block `watching`; ends this one when another is lost."""

    def __init__(self, topology: Topology) -> None:
        """Start to listen, on rank 0."""
        super().__init__(topology)
        self.at_loss: Callable[[PeerEnd], None] = lambda _: None
        """Called before this process ends because of another one; may take `_LAST_ACT_S` seconds."""
        self._is_ending = threading.Event()

    @contextlib.contextmanager
    def watching(self, address: str, *, start_silence_s: float = links.SILENCE_S) -> Iterator[None]:
        """While the block runs, no other process may end; `address` is rank 0's.

        If one ends without a message, this process exits at once with EXIT_LOST_PEER; if it says why, this process
        exits with the same code, unless it leaves the block by itself first.

        Until `started` is called a process may be silent for `start_silence_s` seconds, since loading a library may
        block all its threads.

        Raises:
            EnvironmentProblem: rank 0 cannot be reached there.
        """
        if self._topology.world_size == 1:
            yield
            return
        self._silence_s = start_silence_s
        thread = self._start(address, thread_name="peers")
        try:
            yield
        except BaseException as error:
            if not isinstance(error, (UserError, TrainingFailed)):
                # A failed collective is usually a lost process; the other thread will notice in a moment, and end this
                # process with a better message.
                self._silence_s = _SUSPICIOUS_SILENCE_S
                if self._is_ending.wait(_SUSPICIOUS_SILENCE_S + links.ALIVE_EVERY_S):
                    thread.join()
            self._leave(_last_words(error))
            raise
        self._leave({"done": True})

    def started(self) -> None:
        """Note that all processes have loaded their libraries."""
        self._silence_s = min(self._silence_s, links.SILENCE_S)

    def tell_why(self, reason: str, code: int) -> None:
        """Tell the connected processes why this one ends now; may be called from any thread."""
        self._leave({"failed": reason, "code": code}, farewell_s=_HASTY_FAREWELL_S)

    def _heard(self, link: Link, message: Message) -> None:
        if "done" in message:
            self._part(link)
        elif "failed" in message:
            self._end(PeerEnd(f"{link.name} ended: {message['failed']}", message["code"]), grace_s=_GRACE_S)
        elif "end" in message:
            self._end(PeerEnd(message["end"], message["code"]), grace_s=message["grace_s"])

    def _lost(self, rank: int, name: str, how: str) -> None:
        text = (
            f"{name} is gone ({how}), so this process ends too; what was saved is kept, and the same command "
            "resumes from there"
        )
        self._end(PeerEnd(text, EXIT_LOST_PEER, rank, how), grace_s=0)

    def _end(self, end: PeerEnd, *, grace_s: float) -> None:
        """End this process (on rank 0 all others too), unless it ends by itself within `grace_s` seconds."""
        if self._has_left.is_set():
            return
        if grace_s == 0:
            self._is_ending.set()
        self._send({"end": end.text, "code": end.code, "grace_s": grace_s})
        if self._has_left.wait(grace_s):
            return
        log.error("error: %s", " ".join(end.text.splitlines()))
        self._say_farewell()
        # In a thread, since it may block; the main thread is in a collective that will not end.
        last_act = threading.Thread(target=self.at_loss, args=(end,), daemon=True)
        last_act.start()
        last_act.join(_LAST_ACT_S)
        end_at_once(end.code)

    def _leave(self, message: Message, *, farewell_s: float = FAREWELL_S) -> None:
        self._has_left.set()
        self._send(message)
        self._say_farewell(farewell_s)


def _last_words(error: BaseException) -> Message:
    """What to tell the others about the error that ends this process."""
    codes = {UserError: EXIT_USER_ERROR, LostTouch: EXIT_LOST_PEER}
    code = next((code for kind, code in codes.items() if isinstance(error, kind)), EXIT_FAILURE)
    return {"failed": str(error)[:500] or type(error).__name__, "code": code}
