"""A connection between rank 0 and each other rank, beside the backend's own: a thread listens, and says "alive".

A connection that breaks or stays silent is a lost process. What the messages say is up to the subclasses.
"""

import contextlib
import queue
import secrets
import selectors
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from mnist_dist.base.errors import EnvironmentProblem
from mnist_dist.base.files import describe_os_error
from mnist_dist.base.wire import Garbled, Message, Wire
from mnist_dist.launch.address import join_address, split_address
from mnist_dist.launch.gate import Gate, Refused, enter
from mnist_dist.launch.interfaces import LOOPBACK, meeting_point
from mnist_dist.launch.ports import listen_anywhere
from mnist_dist.launch.secret import SAME_FOR_ALL, watch_key
from mnist_dist.launch.topology import HorovodRun, Topology

ALIVE_EVERY_S = 2.0
SILENCE_S = 30.0
"""A process whose machine is frozen or unreachable keeps its connection."""
_JOIN_S = 30.0
_RETRY_S = 0.2
FAREWELL_S = 2.0


@dataclass
class Link:
    """The connection to one other process."""

    rank: int
    name: str
    wire: Wire
    heard_s: float = field(default_factory=time.monotonic)


class Links(ABC):
    """This process's connections: on rank 0 to all other ranks, on the others to rank 0."""

    def __init__(self, topology: Topology) -> None:
        """Start to listen, on rank 0; raises UserError if there is no usable secret."""
        self._topology = topology
        self._links: list[Link] = []
        self._parted: list[Link] = []
        self._missing = set(range(1, topology.world_size)) if topology.is_chief else set()
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._has_left = threading.Event()
        self._silence_s = SILENCE_S  # read here, so that tests may shorten it
        self.address = ""
        """`host:port:token` on rank 0, which the others need in order to connect."""
        self._gate: Gate | None = None
        self._newcomers: queue.SimpleQueue[tuple[Wire, Message]] = queue.SimpleQueue()
        if topology.world_size > 1 and topology.is_chief:
            self._open_gate(secrets.token_hex(16))

    @abstractmethod
    def _heard(self, link: Link, message: Message) -> None:
        """Act on a message; called by the thread."""

    @abstractmethod
    def _lost(self, rank: int, name: str, how: str) -> None:
        """Act on the loss of a process; called by the thread."""

    def _look(self) -> None:  # noqa: B027 (some have nothing to look at)
        """Called by the thread several times a second."""

    def _start(self, address: str, *, thread_name: str) -> threading.Thread:
        """Connect to rank 0 at its `address`, and start the thread; raises EnvironmentProblem if it is not there."""
        if not self._topology.is_chief:
            self._connect(address)
        thread = threading.Thread(target=self._run, name=thread_name, daemon=True)
        thread.start()
        return thread

    def _open_gate(self, token: str) -> None:
        key = watch_key(self._topology, token)
        server, host, port = listen_anywhere(_own_host(self._topology))
        self.address = f"{join_address(host, port)}:{token}"
        reader, self._bell = socket.socketpair()
        self._bell.setblocking(False)
        self._selector.register(reader, selectors.EVENT_READ)
        self._gate = Gate(server, key, admit=self._admit, expected=self._topology.world_size)

    @property
    def _join_s(self) -> float:
        """How long ranks may take to connect: rank 0 lets nobody in while it loads a library."""
        return max(_JOIN_S, self._silence_s)

    def _admit(self, wire: Wire, hello: Message) -> None:
        """Acknowledge one that has come: until then it may be gone, and tries again. Called in the gate's thread."""
        wire.connection.settimeout(FAREWELL_S)
        wire.send({})
        self._newcomers.put((wire, hello))
        with contextlib.suppress(BlockingIOError):  # then it rings already
            self._bell.send(b"!")

    def _connect(self, address: str) -> None:
        address, _, token = address.rpartition(":")
        name = self._topology.describe_rank(0, host=split_address(address)[0])
        key, deadline = watch_key(self._topology, token), time.monotonic() + self._join_s
        while True:
            try:
                connection = socket.create_connection(split_address(address), timeout=self._join_s)
            except OSError as error:
                raise EnvironmentProblem(
                    f"{name} cannot be reached at {address} ({describe_os_error(error)}): it has ended, or a firewall "
                    "blocks the connection"
                ) from error
            try:
                # Its process may be busy with loading a library.
                wire = enter(connection, key, timeout_s=self._join_s)
                wire.send({"rank": self._topology.rank, "host": socket.gethostname()})
                wire.receive(timeout_s=self._join_s)
                break
            except (OSError, Garbled) as error:
                connection.close()
                if time.monotonic() > deadline:
                    reason = f"it has another secret; {SAME_FOR_ALL}" if isinstance(error, Refused) else str(error)
                    raise EnvironmentProblem(f"{name} does not let this process in at {address}: {reason}") from error
            time.sleep(_RETRY_S)
        self._add(Link(0, name, wire))

    def _add(self, link: Link) -> None:
        """Listen to it; more messages may have come with its first."""
        link.wire.connection.settimeout(FAREWELL_S)
        self._links.append(link)
        self._selector.register(link.wire.connection, selectors.EVENT_READ, link)
        self._listen(link, link.wire.arrived)

    def _part(self, link: Link) -> None:
        """Listen to a process no more; its connection stays open until this process ends too."""
        self._links.remove(link)
        self._selector.unregister(link.wire.connection)
        self._parted.append(link)

    def _run(self) -> None:
        """The thread: listen to all, and say that this process is alive."""
        started_s = now = time.monotonic()
        said_s = 0.0
        while not self._has_left.is_set():
            for key, _ in self._selector.select(timeout=ALIVE_EVERY_S / 4):
                if key.data is None:
                    self._welcome(key.fileobj)  # type: ignore[arg-type]
                elif key.data in self._links:
                    self._listen(key.data, key.data.wire.receive_ready)
            before, now = now, time.monotonic()
            if now - before > ALIVE_EVERY_S:
                # This process itself was stopped, most likely with all others (a suspended job): their silence means
                # nothing.
                for link in self._links:
                    link.heard_s = now
                started_s += now - before
            if now - said_s >= ALIVE_EVERY_S:
                self._send({})
                said_s = now
            for link in tuple(self._links):
                if now - link.heard_s > self._silence_s:
                    self._lost(link.rank, link.name, f"silent for {self._silence_s:.0f} s")
            if self._missing and now - started_s > self._join_s:
                rank = min(self._missing)
                self._lost(rank, self._topology.describe_rank(rank), "it came, and ended before all had come")
            self._look()

    def _welcome(self, bell: socket.socket) -> None:
        """Add those that have come through the gate; close it once all have."""
        bell.recv(4096)
        while not self._newcomers.empty():
            wire, hello = self._newcomers.get()
            try:
                self._missing.remove(hello["rank"])
                name = self._topology.describe_rank(hello["rank"], host=str(hello["host"]))
            except (KeyError, TypeError):
                wire.close()
                continue
            self._add(Link(hello["rank"], name, wire))
        if not self._missing and self._gate is not None:
            self._gate.close()

    def _listen(self, link: Link, receive: Callable[[], list[Message]]) -> None:
        """Receive another process's messages, and act on them."""
        try:
            messages = receive()
        except TimeoutError:
            return
        except (OSError, ValueError):
            self._lost(link.rank, link.name, "its connection broke")
            return
        link.heard_s = time.monotonic()
        for message in messages:
            self._heard(link, message)

    def _send(self, message: Message) -> None:
        """Send to all connections: from rank 0 to all ranks, from the others to rank 0."""
        with self._lock:
            for link in tuple(self._links):
                with contextlib.suppress(OSError):  # `_listen` notices a broken connection
                    link.wire.send(message)

    def _say_farewell(self, farewell_s: float = FAREWELL_S) -> None:
        """Close the connections so that the last message arrives: only after all that was received is read."""
        deadline = time.monotonic() + farewell_s
        links = tuple(self._links)  # the other thread may still remove some
        for link in links:
            with contextlib.suppress(OSError):
                link.wire.connection.shutdown(socket.SHUT_WR)
        for link in links:
            with contextlib.suppress(OSError):
                while (left := deadline - time.monotonic()) > 0:
                    link.wire.connection.settimeout(left)
                    if not link.wire.connection.recv(65536):
                        break


def _own_host(topology: Topology) -> str:
    """The name or address under which the others reach this process's machine."""
    if topology.local_size == topology.world_size:
        return LOOPBACK
    if host := topology.host_of(topology.rank):
        return meeting_point(host, topology)
    launcher = topology.launcher
    assert isinstance(launcher, HorovodRun), launcher
    store = launcher.store or "localhost:1"
    try:
        with socket.create_connection(split_address(store), timeout=_JOIN_S) as probe:
            return str(probe.getsockname()[0])
    except OSError as error:
        raise EnvironmentProblem(
            f"horovodrun's store at {store} cannot be reached ({describe_os_error(error)})"
        ) from error
