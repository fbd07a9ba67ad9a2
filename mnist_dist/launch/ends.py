"""How the processes of a start have ended, and what that means for the job."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from mnist_dist.base.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_LOST_PEER, EXIT_OK, EXIT_PREEMPTED

SSH_FAILED = 255
"""ssh's own exit code: no connection, or it broke."""
_BY_SIGNAL = 128
_ORDERLY = (EXIT_OK, EXIT_PREEMPTED, EXIT_LOST_PEER, EXIT_INTERRUPTED)


@dataclass(frozen=True)
class End:
    """How a process has ended by itself, not by a signal from its launcher."""

    name: str
    """The rank and its host, in words."""
    code: int
    """As a shell reports it: 128 and the signal's number for a process that was killed."""

    @property
    def was_lost(self) -> bool:
        """Whether it was killed, or its host lost."""
        return self.code > _BY_SIGNAL and self.code != EXIT_INTERRUPTED

    @property
    def has_failed(self) -> bool:
        """Whether the same would only happen again."""
        return self.code not in _ORDERLY and not self.was_lost

    def describe(self) -> str:
        """In words."""
        number = self.code - _BY_SIGNAL
        if self.code == SSH_FAILED:
            return f"{self.name}: ssh has lost it"
        if self.was_lost:
            known = {one.value: one.name for one in signal.Signals}
            return f"{self.name} was killed by {known.get(number, f'signal {number}')}"
        why = ", because another process is gone" if self.code == EXIT_LOST_PEER else ""
        return f"{self.name} ended with exit code {self.code}{why}"


@dataclass(frozen=True)
class Outcome:
    """What the ends of all processes mean."""

    code: int
    """The exit code of the job, if it ends here."""
    how: str
    """The end that was the cause of the others, in words."""

    @property
    def is_loss(self) -> bool:
        """Whether the same may work on what is left."""
        return self.code == EXIT_LOST_PEER

    @property
    def may_be_loss(self) -> bool:
        """Whether it is one if a host does not answer any more: a rank may fail since another one is gone."""
        return self.is_loss or self.code not in _ORDERLY


def judge(ends: Sequence[End], *, num_processes: int) -> Outcome:
    """What the ends mean, in the order in which they came; of those at the same time lost processes first.

    The cause counts: a process that is killed makes others fail, one that fails makes others end with EXIT_LOST_PEER.
    """
    for end in ends:
        if end.was_lost:
            return Outcome(EXIT_LOST_PEER, end.describe())
        if end.has_failed:
            return Outcome(end.code if end.code <= 2 else EXIT_FAILURE, end.describe())
    for code in (EXIT_LOST_PEER, EXIT_INTERRUPTED, EXIT_PREEMPTED):
        for end in ends:
            if end.code == code:
                return Outcome(code, end.describe())
    if len(ends) < num_processes:
        return Outcome(EXIT_LOST_PEER, "the others were ended")
    return Outcome(EXIT_OK, "")
