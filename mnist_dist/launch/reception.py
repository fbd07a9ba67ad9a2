"""Where the ranks of a job meet: a server that lets in one process per rank, and tells all others why not."""

import hashlib
import os
import socket
import threading
import time
from collections.abc import Collection
from typing import NamedTuple

from mnist_dist.base.errors import UserError
from mnist_dist.base.wire import Message, Wire
from mnist_dist.launch.address import join_address
from mnist_dist.launch.gate import Gate
from mnist_dist.launch.topology import Step, TFConfig, Topology

FIRST_TOPIC = "start"
READ_TIMEOUT_S = 5.0
"""The timeout for a connection, and for sending a message."""


class RankTaken(UserError):
    """Another process of the job has this one's rank; the job continues without this one."""

    def __init__(self, topology: Topology, holder: str) -> None:
        super().__init__(
            f"rank {topology.rank} is taken: {holder} has it; give each process of the job its own "
            f"{topology.launcher.rank_variable}, and start no more than {topology.world_size}"
        )


class Guest(NamedTuple):
    """A rank that has come."""

    text: str
    """What it hands in."""
    wire: Wire


class Reception:
    """Answers those that come through the gate, in its thread, on behalf of one process."""

    def __init__(self, server: socket.socket, topology: Topology, *, key: bytes, topic: str = FIRST_TOPIC) -> None:
        """On rank 0, let guests in that come for `topic`; on other ranks, only tell them which process this is.

        The server is closed at the end. `key` is that of the gate.
        """
        self._topology = topology
        self.address = join_address(*server.getsockname()[:2])
        """At which it listens."""
        self._job, self._topic = job_id(topology), topic
        self._guests: dict[int, Guest] = {}
        self._holders: dict[int, str] = {}
        self._awaited: set[int] = set()
        self._may_enter = topology.is_chief
        self._changed = threading.Condition()
        self._gate = Gate(server, key, admit=self._admit, expected=topology.world_size)

    def wait_for_all(self, topic: str, deadline: float, ranks: Collection[int]) -> dict[int, Guest]:
        """The ranks that have come, once all `ranks` are here or the deadline has passed; then no more are let in."""
        with self._changed:
            if topic != self._topic:
                self._topic, self._guests, self._may_enter = topic, {}, True
            self._awaited = set(ranks) - {self._topology.rank}
            self._changed.wait_for(self._is_complete, timeout=deadline - time.monotonic())
            self._may_enter = False
            return self._guests

    @property
    def num_refused(self) -> int:
        """How many have come that have another secret."""
        return self._gate.num_refused

    def end(self) -> None:
        """Stop answering."""
        self._gate.close()

    def _is_complete(self) -> bool:
        """Whether all ranks are here; one that has come and gone may be started again, and is waited for."""
        if self._awaited <= self._guests.keys():
            for rank in [rank for rank, guest in self._guests.items() if _has_gone(guest.wire.connection)]:
                self._guests.pop(rank).wire.close()
        return self._awaited <= self._guests.keys()

    def _admit(self, wire: Wire, message: Message) -> None:
        wire.connection.settimeout(READ_TIMEOUT_S)
        with self._changed:
            self._answer(message, wire)

    def _answer(self, message: Message, wire: Wire) -> None:
        """Let a process in, or tell it why not and raise ValueError."""
        rank, answer = message["rank"], {"job": self._job, "who": own_name(), "size": self._topology.world_size}
        guest = self._guests.get(rank)
        if guest and self._may_enter and _has_gone(guest.wire.connection):
            guest = None  # and was started again
        can_enter = self._may_enter and message["topic"] == self._topic and guest is None
        if message["job"] != self._job:
            wire.send(answer)
            raise ValueError("of another job")
        if rank not in range(self._topology.world_size):
            raise ValueError("no rank")
        if message["topic"] not in (self._topic, FIRST_TOPIC):
            raise ValueError("too early")
        if rank == self._topology.rank or not can_enter:
            wire.send({**answer, "taken": self._holders.get(rank, own_name())})
            raise ValueError("a spare process")
        wire.send(answer)
        self._holders[rank] = str(message["who"])
        self._guests[rank] = Guest(str(message["text"]), wire)
        self._changed.notify_all()


def own_name() -> str:
    """This process, in words by which the user can find it."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def job_id(topology: Topology) -> str:
    """What the processes of one job have in common, so that two jobs on one port do not mix."""
    parts: tuple[str, ...] = ()
    if isinstance(topology.launcher, TFConfig):
        parts = topology.launcher.addresses
    elif isinstance(topology.launcher, Step):
        parts = (topology.launcher.step_id, *topology.launcher.hosts)
    return hashlib.sha256(",".join(parts).encode()).hexdigest()


def _has_gone(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(READ_TIMEOUT_S)
