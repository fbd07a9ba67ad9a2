"""The first meeting of the processes of a job, before any of them starts TensorFlow or uses a GPU.

Every rank hands in a text and gets the texts of all. The wait is bounded and the missing ranks are named, whereas the
backends wait long, abort, or do not say for which rank. How they meet depends on the launcher: rank 0 listens for a
moment at the address that TensorFlow will use afterwards (TF_CONFIG), or on a port of its host derived from the job's
number (Slurm); or all use the key-value store that horovodrun serves to its processes.

The first process to come with a rank keeps it; another process with the same rank is told so, and ends.
"""

import contextlib
import os
import socket
import time
from collections.abc import Collection, Iterator, Sequence
from types import TracebackType

from mnist_dist.base.errors import EnvironmentProblem
from mnist_dist.launch.address import join_address, split_address
from mnist_dist.launch.interfaces import meeting_point
from mnist_dist.launch.ports import hold_and_listen, hold_free_port, listen, share_port
from mnist_dist.launch.reception import FIRST_TOPIC, READ_TIMEOUT_S, Reception
from mnist_dist.launch.secret import SAME_FOR_ALL, meeting_key
from mnist_dist.launch.store import exchange_over_store
from mnist_dist.launch.topology import Alone, HorovodRun, Step, TFConfig, Topology
from mnist_dist.launch.visit import describe_listener, visit

_OTHER_SECRET = f"it is another job's, or {SAME_FOR_ALL}"


class Rendezvous:
    """How this process exchanges texts with the others of its job; a context manager, which releases its port."""

    def __init__(self, topology: Topology, *, timeout_s: float) -> None:
        """Create it; each exchange waits for the others for `timeout_s` seconds."""
        self.topology = topology
        self._timeout_s = timeout_s
        self._at_own_port: Reception | None = None
        self._held: socket.socket | None = None  # reserves the own port on all interfaces
        self._hint = ""  # why ranks may be missing

    def __enter__(self) -> "Rendezvous":
        return self

    def __exit__(self, _: type | None, __: BaseException | None, ___: TracebackType | None) -> None:
        if self._at_own_port:
            self._at_own_port.end()
            self._at_own_port = None
        if self._held:
            self._held.close()
            self._held = None

    def hold_own_port(self) -> None:
        """With TF_CONFIG: listen at this process's own address, until TensorFlow does (`serving_addresses`).

        Raises:
            RankTaken: another process of this job listens there.
            EnvironmentProblem: another program does.
        """
        launcher = self.topology.launcher
        if self.topology.world_size == 1 or not isinstance(launcher, TFConfig) or self._at_own_port:
            return
        address = launcher.addresses[self.topology.rank]
        key = meeting_key(self.topology, address)
        host, port = split_address(address)
        try:
            self._held, server = hold_and_listen(meeting_point(host, self.topology), port)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise EnvironmentProblem(describe_listener(address, self.topology, reason=reason)) from error
        self._at_own_port = Reception(server, self.topology, key=key)

    def exchange(self, text: str, *, topic: str = FIRST_TOPIC) -> list[str]:
        """Hand in this rank's text and return those of all ranks, in rank order.

        All ranks may call it again with another topic.

        Raises:
            RankTaken: another process has this one's rank.
            UserError: a rank did not come in time, or has ended; the message names it.
        """
        texts = self._meet(text, topic=topic, ranks=range(self.topology.world_size), timeout_s=self._timeout_s)
        self._check_complete(texts)
        return [texts[rank] for rank in range(self.topology.world_size)]

    def collect(
        self, text: str, *, topic: str, ranks: Collection[int] | None = None, timeout_s: float | None = None
    ) -> dict[int, str]:
        """Hand in this rank's text and return those of the ranks that have come in time, by rank; names no missing one.

        Args:
            text: what this rank hands in.
            topic: what the texts are about; another one each time.
            ranks: which ranks to wait for, the same on every rank; by default all.
            timeout_s: how long to wait for them; by default as long as in an exchange.

        Raises:
            RankTaken: another process has this one's rank.
            UserError: rank 0 has ended, or this process cannot wait for others.
        """
        expected = range(self.topology.world_size) if ranks is None else ranks
        texts = self._meet(text, topic=topic, ranks=expected, timeout_s=timeout_s or self._timeout_s)
        own = self.topology.rank
        # Without rank 0 a rank knows only about itself.
        return {rank: texts[rank] for rank in sorted(texts)} if 0 in texts else {own: text}

    @contextlib.contextmanager
    def serving_addresses(self) -> Iterator[list[str]]:
        """`host:port` of all ranks; while the block runs only a server of this process can listen at its own address.

        The server must share its port (SO_REUSEPORT). No rank enters the block before all have come: a TensorFlow
        server that waits for a lost process waits forever, and blocks all Python threads.
        """
        topology, launcher = self.topology, self.topology.launcher
        if topology.world_size == 1:
            yield []
            return
        with contextlib.ExitStack() as stack:
            if isinstance(launcher, TFConfig):
                self.hold_own_port()
                addresses = self.exchange(launcher.addresses[topology.rank], topic="addresses")
                assert self._at_own_port is not None and self._held is not None
                held = stack.enter_context(self._held)
                self._at_own_port.end()
                self._at_own_port = self._held = None
            else:
                assert isinstance(launcher, Step), launcher  # horovodrun's processes have no such addresses
                held = stack.enter_context(hold_free_port())
                own = join_address(launcher.hosts[topology.rank], held.getsockname()[1])
                addresses = self.exchange(own, topic="addresses")
            share_port(held)
            yield addresses

    def _meet(self, text: str, *, topic: str, ranks: Collection[int], timeout_s: float) -> dict[int, str]:
        """The texts of the ranks that have come; without rank 0, empty texts of all others."""
        topology, launcher = self.topology, self.topology.launcher
        if topology.world_size == 1 or isinstance(launcher, Alone):
            return {topology.rank: text}
        deadline = time.monotonic() + timeout_s
        if isinstance(launcher, HorovodRun):
            return exchange_over_store(text, launcher, topology, topic=topic, ranks=ranks, deadline=deadline)
        addresses = launcher.addresses[:1] if isinstance(launcher, TFConfig) else launcher.meeting_addresses
        if topology.is_chief:
            return self._receive_all(text, addresses, topic=topic, ranks=ranks, deadline=deadline)
        # Rank 0 may have started up to `timeout_s` later than this process, and then waits longer.
        answer_s = 2 * timeout_s + READ_TIMEOUT_S
        texts, refused = visit(text, addresses, topology, topic=topic, deadline=deadline, answer_s=answer_s)
        self._hint = f" (at {', '.join(refused)} is a process with another secret: {_OTHER_SECRET})" if refused else ""
        return texts

    def _receive_all(
        self, text: str, addresses: Sequence[str], *, topic: str, ranks: Collection[int], deadline: float
    ) -> dict[int, str]:
        """Rank 0: collect until all `ranks` have come or the time is up, then tell everyone."""
        reception = self._at_own_port or self._receive_at_first(addresses, topic=topic)
        guests = reception.wait_for_all(topic, deadline, ranks)
        if reception is not self._at_own_port:
            reception.end()
        refused = f"; somebody with another secret knocked: {_OTHER_SECRET}" if reception.num_refused else ""
        self._hint = f" (rank 0 listened at {reception.address}{refused})"
        texts = {0: text, **{rank: guest.text for rank, guest in guests.items()}}
        answer = {"texts": {str(rank): text for rank, text in texts.items()}}
        for guest in guests.values():
            with contextlib.suppress(OSError):  # it has just ended: its launcher will report it
                guest.wire.send(answer)
            guest.wire.close()
        return texts

    def _check_complete(self, texts: dict[int, str]) -> None:
        size = self.topology.world_size
        if missing := [rank for rank in range(size) if rank not in texts]:
            raise EnvironmentProblem(
                f"{self.topology.describe_ranks(missing)} did not come within {self._timeout_s:.0f} s{self._hint}; "
                f"start all {size} processes, check that they can reach each other, or allow more time with "
                "strategy.start_timeout_s"
            )

    def _receive_at_first(self, addresses: Sequence[str], *, topic: str) -> Reception:
        """A reception at the first address that is free."""
        for address in addresses:
            host, port, key = *split_address(address), meeting_key(self.topology, address)
            try:
                server = listen(meeting_point(host, self.topology), port)
            except OSError as error:
                reason = os.strerror(error.errno or 0)
            else:
                return Reception(server, self.topology, key=key, topic=topic)
        raise EnvironmentProblem(f"{', '.join(addresses)}: cannot listen there ({reason}); is another job running?")
