"""How rank 0 leads all ranks through the steps of a job, and notices one that does not come along.

Values travel beside the backend's collectives (`links`), so that a rank which hangs in one can still be named: each
rank tells in which phase it is, and each step has a deadline.
"""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from mnist_dist.base.errors import EXIT_FAILURE, EXIT_LOST_PEER
from mnist_dist.base.wire import Message
from mnist_dist.launch.links import Link, Links
from mnist_dist.launch.stop import end_at_once
from mnist_dist.launch.topology import Topology

log = logging.getLogger(__name__)

_GRACE_S = 10.0
"""A rank that fails leaves the others alone in a collective; this long after it they are expected to fail as well."""


class Trouble(NamedTuple):
    """Why the ranks cannot go on together."""

    text: str
    ranks: tuple[int, ...]
    """Those that are to blame, if it is known."""


class OutOfStep(RuntimeError):
    """The ranks no longer do the same."""


class _HandedIn(NamedTuple):
    """What a rank hands in."""

    value: Any
    is_last: bool
    failure: str


class Control(Links):
    """All ranks call the same methods in the same order; the main thread computes, another one listens."""

    def __init__(self, topology: Topology, *, on_trouble: Callable[[Trouble], int]) -> None:
        """Create it; `on_trouble` is called on rank 0, at most once and in a thread, and returns all exit codes."""
        super().__init__(topology)
        self._on_trouble = on_trouble
        self._changed = threading.Condition()
        self._number = 0  # of the next value to be settled
        self._values: defaultdict[int, dict[int, _HandedIn]] = defaultdict(dict)
        self._replies: dict[int, Any] = {}
        self._phases = dict.fromkeys(range(topology.world_size), (0, "starting"))
        self._due_s: float | None = None
        self._names: dict[int, str] = {}

    def start(self, address: str) -> None:
        """Connect to rank 0 at its `address`; raises EnvironmentProblem if it cannot be reached."""
        self._start(address, thread_name="control")

    def enter(self, phase: str, *, deadline_s: float | None = None) -> None:
        """Say what this rank does next; within `deadline_s` seconds from now the last value must be settled."""
        number, _ = self._phases[self._topology.rank]
        self._phases[self._topology.rank] = (number + 1, phase)
        if deadline_s is not None:
            self._due_s = time.monotonic() + deadline_s
        if not self._topology.is_chief:
            self._send({"phase": phase})

    def settle(
        self, value: Any, decide: Callable[[list[Any]], Any], *, is_last: bool = False, failure: str = ""
    ) -> Any:
        """Hand in a JSON value; rank 0 calls `decide` on those of all ranks, and all get what it returns.

        Args:
            value: this rank's.
            decide: called on rank 0, with the values in rank order.
            is_last: whether this ends the step that began with a deadline.
            failure: why this rank could not do its part, if so; the others may wait for it in a collective.

        Raises:
            OutOfStep: another rank has ended the step already, most likely because it failed.
        """
        while True:
            number, self._number = self._number, self._number + 1
            handed_in = _HandedIn(value, is_last, failure)
            if self._topology.is_chief:
                reply = self._settle_as_chief(number, handed_in, decide)
            else:
                self._send({"number": number, "value": handed_in})
                with self._changed:
                    self._changed.wait_for(lambda number=number: number in self._replies)  # type: ignore[misc]
                    reply = self._replies.pop(number)
            if not reply["out_of_step"]:
                return reply["reply"]
            if not is_last:
                raise OutOfStep("another rank has given up")

    def _settle_as_chief(self, number: int, own: "_HandedIn", decide: Callable[[list[Any]], Any]) -> dict[str, Any]:
        with self._changed:
            self._receive(number, self._topology.rank, own)
            self._changed.wait_for(lambda: len(self._values[number]) == self._topology.world_size)
            received = self._values.pop(number)
            due_s, self._due_s = self._due_s, None  # now all wait for this rank
        reply = {"out_of_step": len({one.is_last for one in received.values()}) > 1, "reply": None}
        try:
            if not reply["out_of_step"]:
                reply["reply"] = decide([received[rank].value for rank in range(self._topology.world_size)])
        finally:
            if reply["out_of_step"] or not own.is_last:
                self._due_s = due_s
        self._send({"number": number, "reply": reply})
        return reply

    def leave(self) -> None:
        """End the connections, once nothing more is to be settled."""
        self._has_left.set()
        self._send({"done": True})
        self._say_farewell()

    def tell_why(self, reason: str, code: int) -> None:
        """Tell the connected processes why this one ends now; may be called from any thread."""
        self._has_left.set()
        self._send({"failed": reason, "code": code})
        self._say_farewell(0.2)

    def _receive(self, number: int, rank: int, value: "_HandedIn") -> None:
        self._values[number][rank] = value
        if value.failure and self._due_s is not None:
            self._due_s = min(self._due_s, time.monotonic() + _GRACE_S)
        self._changed.notify_all()

    def _heard(self, link: Link, message: Message) -> None:
        self._names[link.rank] = link.name
        if "phase" in message:
            number, _ = self._phases[link.rank]
            self._phases[link.rank] = (number + 1, str(message["phase"]))
        elif "value" in message:
            with self._changed:
                self._receive(message["number"], link.rank, _HandedIn(*message["value"]))
        elif "reply" in message:
            with self._changed:
                self._replies[message["number"]] = message["reply"]
                self._changed.notify_all()
        elif "done" in message:
            self._part(link)
        elif "failed" in message:
            self._lost(link.rank, link.name, str(message["failed"]))
        elif "end" in message:
            log.error("error: %s", message["end"])
            end_at_once(message["code"])

    def _lost(self, rank: int, name: str, how: str) -> None:
        if self._has_left.is_set():
            return
        if not self._topology.is_chief:
            log.error("error: %s is gone (%s), and with it the verdict", name, how)
            end_at_once(EXIT_LOST_PEER)
        self._end(Trouble(f"{name} is gone ({how}) in phase '{self._phases[rank][1]}'", (rank,)))

    def _look(self) -> None:
        """On rank 0: whether the time for a step is up."""
        due_s = self._due_s
        if self._topology.is_chief and due_s is not None and time.monotonic() > due_s and not self._has_left.is_set():
            with self._changed:
                came = {rank: one for values in self._values.values() for rank, one in values.items()}
            late = [rank for rank in self._phases if rank not in came]
            if late:
                failed = {rank: one.failure for rank, one in came.items() if one.failure}
                self._end(self._describe_failure(failed) if failed else self._describe_hang(late))

    def _describe_failure(self, failed: Mapping[int, str]) -> Trouble:
        """Who has failed, while the others still wait for them."""
        texts = [
            f"{self._name(rank)} failed in phase '{self._phases[rank][1]}': {text}" for rank, text in failed.items()
        ]
        return Trouble("; ".join(texts[:8]), tuple(failed))

    def _describe_hang(self, late: Sequence[int]) -> Trouble:
        """Who hangs: of the ranks that are late, those that got less far than others."""
        progress = {rank: self._phases[rank][0] for rank in self._phases}
        behind = [rank for rank in late if progress[rank] == min(progress.values())]
        blamed = behind if len(behind) < self._topology.world_size else []
        if not blamed and len(late) < self._topology.world_size:
            blamed = list(late)
        places = "; ".join(f"{self._name(rank)} is in phase '{self._phases[rank][1]}'" for rank in late[:8])
        more = f"; and {len(late) - 8} more" if len(late) > 8 else ""
        return Trouble(f"the time is up: {places}{more}", tuple(blamed))

    def _name(self, rank: int) -> str:
        return self._names.get(rank) or self._topology.describe_rank(rank)

    def _end(self, trouble: Trouble) -> NoReturn:
        """Report the trouble, and end all processes: their main threads may hang in a collective."""
        self._due_s = None
        try:
            code = self._on_trouble(trouble)
        except Exception:  # a full disk, for example; this thread must not end before the others are told
            log.exception("error: %s", trouble.text)
            code = EXIT_FAILURE
        self._send({"end": trouble.text, "code": code})
        self._say_farewell()
        end_at_once(code)
