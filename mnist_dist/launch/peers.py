"""Whether all processes of the job are alive, while they train together.

When a process is lost, the backends wait a long time for it, or fail with an error that does not name it. So every
process has another connection to rank 0, over which it says every few seconds that it is alive, and why it ends when
it does. A connection that breaks or stays silent is a lost process: rank 0 tells all others, and each exits at once,
even from within a collective.
"""

import contextlib
import logging
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from mnist_dist.base.errors import (
    EXIT_FAILURE,
    EXIT_LOST_PEER,
    EXIT_USER_ERROR,
    EnvironmentProblem,
    LostTouch,
    TrainingFailed,
    UserError,
)
from mnist_dist.base.files import describe_os_error
from mnist_dist.base.wire import MAX_GREETING, Message, Wire
from mnist_dist.launch.address import join_address, split_address
from mnist_dist.launch.ports import hold_free_port
from mnist_dist.launch.stop import end_at_once
from mnist_dist.launch.topology import HorovodRun, SlurmStep, TFConfig, Topology

log = logging.getLogger(__name__)

_ALIVE_EVERY_S = 2.0
# A process whose machine is frozen or unreachable keeps its connection. Once a collective has failed, less is enough.
_SILENCE_S, _SUSPICIOUS_SILENCE_S = 30.0, 10.0
_JOIN_S = 30.0
# A process that ends with an error says why; usually all have the same error, and time to report it themselves.
_GRACE_S = 5.0
_FAREWELL_S, _HASTY_FAREWELL_S = 2.0, 0.2


@dataclass
class _Link:
    """The connection to one other process."""

    name: str
    wire: Wire
    heard_s: float = field(default_factory=time.monotonic)


class PeerWatch:
    """Watches the other processes of a job in the block `watching`; ends this one when another is lost."""

    def __init__(self, topology: Topology) -> None:
        """Start to listen, on rank 0."""
        self._topology = topology
        self._token = secrets.token_hex(8)
        self._links: list[_Link] = []
        self._missing = set(range(1, topology.world_size)) if topology.is_chief else set()
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._has_left, self._is_ending = threading.Event(), threading.Event()
        self._silence_s = _SILENCE_S
        self.address = ""
        """`host:port:token` on rank 0, which the others need in order to connect."""
        if topology.world_size > 1 and topology.is_chief:
            server = hold_free_port()
            self._selector.register(server, selectors.EVENT_READ)
            self.address = f"{join_address(_own_host(topology), server.getsockname()[1])}:{self._token}"

    @contextlib.contextmanager
    def watching(self, address: str, *, start_silence_s: float = _SILENCE_S) -> Iterator[None]:
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
        if not self._topology.is_chief:
            self._connect(address)
        thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        thread.start()
        try:
            yield
        except BaseException as error:
            if not isinstance(error, (UserError, TrainingFailed)):
                # A failed collective is usually a lost process; the other thread will notice in a moment, and end this
                # process with a better message.
                self._silence_s = _SUSPICIOUS_SILENCE_S
                if self._is_ending.wait(_SUSPICIOUS_SILENCE_S + _ALIVE_EVERY_S):
                    thread.join()
            self._leave(_last_words(error))
            raise
        self._leave({"done": True})

    def started(self) -> None:
        """Note that all processes have loaded their libraries."""
        self._silence_s = min(self._silence_s, _SILENCE_S)

    def tell_why(self, reason: str, code: int) -> None:
        """Tell the connected processes why this one ends now; may be called from any thread."""
        self._leave({"failed": reason, "code": code}, farewell_s=_HASTY_FAREWELL_S)

    def _connect(self, watch_address: str) -> None:
        address, _, self._token = watch_address.rpartition(":")
        name = self._topology.describe_rank(0, host=split_address(address)[0])
        try:
            connection = socket.create_connection(split_address(address), timeout=_JOIN_S)
        except OSError as error:
            raise EnvironmentProblem(
                f"{name} cannot be reached at {address} ({describe_os_error(error)}): it has ended, or a firewall "
                "blocks the connection"
            ) from error
        self._add(_Link(name, Wire(connection)))
        self._send({"token": self._token, "rank": self._topology.rank, "host": socket.gethostname()})

    def _add(self, link: _Link) -> None:
        link.wire.connection.settimeout(_FAREWELL_S)
        self._links.append(link)
        self._selector.register(link.wire.connection, selectors.EVENT_READ, link)

    def _watch(self) -> None:
        """The thread: listen to all, and say that this process is alive."""
        started_s = now = time.monotonic()
        said_s = 0.0
        while not self._has_left.is_set():
            for key, _ in self._selector.select(timeout=_ALIVE_EVERY_S / 4):
                if key.data is None:
                    self._accept(key.fileobj)  # type: ignore[arg-type]
                elif key.data in self._links:
                    self._listen(key.data, key.data.wire.receive_ready)
            before, now = now, time.monotonic()
            if now - before > _ALIVE_EVERY_S:
                # This process itself was stopped, most likely with all others (a suspended job): their silence means
                # nothing.
                for link in self._links:
                    link.heard_s = now
            if now - said_s >= _ALIVE_EVERY_S:
                self._send({})
                said_s = now
            for link in tuple(self._links):
                if now - link.heard_s > self._silence_s:
                    self._lose(link.name, f"silent for {self._silence_s:.0f} s")
            if self._missing and now - started_s > _JOIN_S:
                self._lose(self._topology.describe_rank(min(self._missing)), "it came, and ended before all had come")

    def _accept(self, server: socket.socket) -> None:
        """Let a newcomer in if it is another rank; once all have come, stop listening."""
        try:
            connection, _ = server.accept()
        except OSError:
            return
        wire = Wire(connection)
        try:
            hello = wire.receive(timeout_s=_FAREWELL_S, max_bytes=MAX_GREETING)
            if hello["token"] != self._token:
                raise ValueError("a stranger")
            self._missing.remove(hello["rank"])
            name = self._topology.describe_rank(hello["rank"], host=str(hello["host"]))
        except (OSError, ValueError, KeyError, TypeError):
            wire.close()
            return
        link = _Link(name, wire)
        self._add(link)
        self._listen(link, wire.arrived)  # more messages may have come with its first
        if not self._missing:
            self._selector.unregister(server)
            server.close()

    def _listen(self, link: _Link, receive: Callable[[], list[Message]]) -> None:
        """Receive another process's messages, and act on them."""
        try:
            messages = receive()
        except TimeoutError:
            return
        except (OSError, ValueError):
            self._lose(link.name, "its connection broke")
            return
        link.heard_s = time.monotonic()
        for message in messages:
            if "done" in message:
                self._links.remove(link)
                self._selector.unregister(link.wire.connection)
            elif "failed" in message:
                self._end(f"{link.name} ended: {message['failed']}", message["code"], grace_s=_GRACE_S)
            elif "end" in message:
                self._end(message["end"], message["code"], grace_s=message["grace_s"])

    def _lose(self, name: str, how: str) -> None:
        self._end(
            f"{name} is gone ({how}), so this process ends too; what was saved is kept, and the same command "
            "resumes from there",
            EXIT_LOST_PEER,
            grace_s=0,
        )

    def _end(self, text: str, code: int, *, grace_s: float) -> None:
        """End this process (on rank 0 all others too), unless it ends by itself within `grace_s` seconds."""
        if self._has_left.is_set():
            return
        if grace_s == 0:
            self._is_ending.set()
        self._send({"end": text, "code": code, "grace_s": grace_s})
        if self._has_left.wait(grace_s):
            return
        log.error("error: %s", " ".join(text.splitlines()))
        self._say_farewell()
        end_at_once(code)

    def _send(self, message: Message) -> None:
        """Send to all connections: from rank 0 to all ranks, from the others to rank 0."""
        with self._lock:
            for link in tuple(self._links):
                with contextlib.suppress(OSError):  # `_listen` notices a broken connection
                    link.wire.send(message)

    def _leave(self, message: Message, *, farewell_s: float = _FAREWELL_S) -> None:
        self._has_left.set()
        self._send(message)
        self._say_farewell(farewell_s)

    def _say_farewell(self, farewell_s: float = _FAREWELL_S) -> None:
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


def _last_words(error: BaseException) -> Message:
    """What to tell the others about the error that ends this process."""
    codes = {UserError: EXIT_USER_ERROR, LostTouch: EXIT_LOST_PEER}
    code = next((code for kind, code in codes.items() if isinstance(error, kind)), EXIT_FAILURE)
    return {"failed": str(error)[:500] or type(error).__name__, "code": code}


def _own_host(topology: Topology) -> str:
    """The name or address under which the others reach this process's machine."""
    if topology.local_size == topology.world_size:
        return "127.0.0.1"
    launcher = topology.launcher
    if isinstance(launcher, TFConfig):
        return split_address(launcher.addresses[topology.rank])[0]
    if isinstance(launcher, SlurmStep):
        return launcher.hosts[topology.rank]
    assert isinstance(launcher, HorovodRun), launcher
    store = launcher.store or "localhost:1"
    try:
        with socket.create_connection(split_address(store), timeout=_JOIN_S) as probe:
            return str(probe.getsockname()[0])
    except OSError as error:
        raise EnvironmentProblem(
            f"horovodrun's store at {store} cannot be reached ({describe_os_error(error)})"
        ) from error
