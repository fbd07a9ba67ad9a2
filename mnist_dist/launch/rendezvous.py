"""First contact of the processes of one job, before any of them starts TensorFlow or takes a GPU.

Every rank hands in a text and gets the texts of all. It waits for a bounded time and names who is missing, where the
backends wait long, abort, or do not say for whom. The way depends on the launcher: rank 0 listens for a moment at the
address that TensorFlow will use afterwards (TF_CONFIG), or at a port of its host that follows from the number of the
job (Slurm); or all use the key-value store that horovodrun serves to its processes.

Who comes first has a rank; another process with the same number is told so, and ends.
"""

import contextlib
import hashlib
import itertools
import json
import os
import random
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from mnist_dist.base.errors import UserError
from mnist_dist.launch.topology import Topology, join_address, split_address

_RETRY_S = 0.2
_READ_TIMEOUT_S, _ANSWER_S = 5.0, 15.0
_ENDING_S = 3.0  # so long the server of a job that ends may still be there
_NAMED_RANKS = 8
_FIRST_TOPIC = "start"
_PATIENCE_S = 3.0
_OWN_PORTS = range(20_000, 32_768)  # Linux gives out those above by itself, to whoever asks next


class RankTaken(UserError):
    """Another process of this job has the rank of this one; the job goes on without it."""

    def __init__(self, topology: Topology, holder: str) -> None:
        number = {"horovod": "HOROVOD_RANK", "slurm": "SLURM_PROCID"}.get(topology.launcher, "index in TF_CONFIG")
        super().__init__(
            f"rank {topology.rank} is taken: {holder} has it; give each process of the job its own {number}, and start "
            f"no more than {topology.world_size}"
        )


class _StartedError(ValueError):
    """TensorFlow's server answers where a process that waits for others was expected."""


def exchange(text: str, *, topology: Topology, timeout_s: float, topic: str = _FIRST_TOPIC) -> list[str]:
    """Hand in this rank's text and return those of all ranks, in their order.

    It may be called again, by all ranks alike, with another topic; but not over horovodrun's store.

    Raises:
        RankTaken: another process has this one's rank.
        UserError: somebody did not come within `timeout_s` seconds, or has ended; the message names who.
    """
    if topology.world_size == 1:
        return [text]
    deadline = time.monotonic() + timeout_s
    if topology.store:
        texts = _over_store(text, topology, deadline)
    elif topology.is_chief:
        texts = _as_chief(text, topology, deadline, topic=topic)
    else:
        texts = _as_other(text, topology, deadline, timeout_s, topic=topic)
    missing = [rank for rank in range(topology.world_size) if rank not in texts]
    if missing:
        names = ", ".join(describe_rank(rank, topology) for rank in missing[:_NAMED_RANKS])
        more = f" and {len(missing) - _NAMED_RANKS} more" if len(missing) > _NAMED_RANKS else ""
        raise UserError(
            f"{names}{more} did not come within {timeout_s:.0f} s; start all "
            f"{topology.world_size} processes, check that they can reach each other, or allow more time with "
            "strategy.start_timeout_s"
        )
    return [texts[rank] for rank in range(topology.world_size)]


def hold_own_port(topology: Topology) -> None:
    """Listen at this process's own address, until TensorFlow does (`serving_addresses`).

    Raises:
        RankTaken: another process of this job listens there.
        UserError: another program does.
    """
    global _own_port
    if topology.world_size > 1 and topology.addresses:
        _own_port = _receive_at_own_port(topology)


def listen(port: int) -> socket.socket:
    """A server at a port of this machine, for IPv4 and IPv6 where there is both; raises OSError."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _share_port(server: socket.socket) -> None:
    """Listen no more, but keep the port from all but servers of this user that share theirs."""
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    with contextlib.suppress(OSError):
        server.shutdown(socket.SHUT_RDWR)  # wakes whoever waits for somebody


def hold_free_port() -> socket.socket:
    """A server at a port of this host that nobody had, and nobody else gets until it is closed."""
    for port in random.SystemRandom().sample(_OWN_PORTS, 100):
        with contextlib.suppress(OSError):
            return listen(port)
    raise UserError(f"no free port from {_OWN_PORTS.start} to {_OWN_PORTS.stop - 1} on this machine")


@contextlib.contextmanager
def serving_addresses(topology: Topology, *, timeout_s: float) -> Iterator[list[str]]:
    """`host:port` of all ranks; while the block runs a server of this process can listen at its own, and no other.

    It has to be one that shares its port (SO_REUSEPORT). All ranks get here before any goes on: a server of TensorFlow
    that waits for a process that is gone waits for ever, and stops all threads of Python.
    """
    global _own_port
    if topology.world_size == 1:
        yield []
        return
    if topology.addresses:
        _own_port = _own_port or _receive_at_own_port(topology)
        own = topology.addresses[topology.rank]
    else:
        held = hold_free_port()
        own = join_address(topology.hosts[topology.rank], held.getsockname()[1])
    addresses = exchange(own, topology=topology, timeout_s=timeout_s, topic="addresses")
    if _own_port:
        held, _own_port = _own_port.end(), None
    else:
        _share_port(held)
    with held:
        yield addresses


def describe_rank(rank: int, topology: Topology, *, host: str = "") -> str:
    """A rank and its place, in words; `host` where the launcher did not tell."""
    places = topology.addresses or topology.hosts
    place = places[rank] if places else host
    return f"rank {rank} ({place})" if place else f"rank {rank}"


def _over_store(text: str, topology: Topology, deadline: float) -> dict[int, str]:
    """Through horovodrun's store; what is missing at the deadline is left out."""
    base = f"http://{topology.store}/mnist_dist/"
    # Proxies are for the world outside; the store is the launcher's own.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def read(rank: int) -> dict[str, Any] | None:
        try:
            with opener.open(base + str(rank), timeout=_READ_TIMEOUT_S) as answer:
                return dict(json.loads(answer.read()))
        except (OSError, ValueError, TypeError):
            return None  # not there yet

    own = {"who": _who(), "size": topology.world_size, "text": text}
    if before := read(topology.rank):
        raise RankTaken(topology, str(before.get("who")))
    request = urllib.request.Request(base + str(topology.rank), data=json.dumps(own).encode(), method="PUT")
    try:
        opener.open(request, timeout=_READ_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(f"horovodrun's store at {topology.store} cannot be reached ({error})") from error
    texts: dict[int, str] = {}
    while True:
        for rank in set(range(topology.world_size)) - set(texts):
            if time.monotonic() > deadline:
                return texts
            if (found := read(rank)) is None:
                continue
            if rank == topology.rank and found != own:  # it came at the same time
                raise RankTaken(topology, str(found.get("who")))
            if found.get("size") != topology.world_size:
                raise UserError(
                    f"rank {rank} has HOROVOD_SIZE={found.get('size')}, rank {topology.rank} has "
                    f"HOROVOD_SIZE={topology.world_size}; start all processes with one horovodrun"
                )
            texts[rank] = str(found.get("text"))
        if len(texts) == topology.world_size:
            return texts
        time.sleep(_RETRY_S)


class _Guest(NamedTuple):
    text: str
    connection: socket.socket


class _Reception:
    """Listens in a thread of its own: takes in the first process of each rank, and tells all others why not them."""

    def __init__(self, server: socket.socket, topology: Topology, *, topic: str = _FIRST_TOPIC) -> None:
        self._server, self._topology = server, topology
        self._job, self._topic = _job_id(topology), topic
        self._guests: dict[int, _Guest] = {}
        self._holders: dict[int, str] = {}
        self._may_enter, self._has_ended = topology.is_chief, False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="rendezvous", daemon=True)
        self._thread.start()

    def wait_for_all(self, topic: str, deadline: float) -> dict[int, _Guest]:
        """All ranks that have come, once they are complete or the time is up; nobody is let in any more."""
        with self._changed:
            if topic != self._topic:
                self._topic, self._guests, self._may_enter = topic, {}, True
            self._changed.wait_for(
                lambda: len(self._guests) == self._topology.world_size - 1, timeout=deadline - time.monotonic()
            )
            self._may_enter = False
            return self._guests

    def end(self) -> socket.socket:
        """Answer no more; returns the socket, which keeps the port until it is closed."""
        self._has_ended = True
        _share_port(self._server)
        self._thread.join(_RETRY_S)
        return self._server

    def _run(self) -> None:
        while not self._has_ended:
            try:
                connection, _ = self._server.accept()
            except OSError:
                time.sleep(_RETRY_S / 10)
                continue
            try:
                connection.settimeout(_READ_TIMEOUT_S)
                with connection.makefile("rb") as stream:
                    message = _receive(stream)
                with self._changed:
                    self._answer(message, connection)
            except (OSError, ValueError, KeyError, TypeError):
                connection.close()  # a stranger knocked

    def _answer(self, message: dict[str, Any], connection: socket.socket) -> None:
        """Let somebody in, or say why not, and raise ValueError."""
        rank, answer = message["rank"], {"job": self._job, "who": _who(), "size": self._topology.world_size}
        guest = self._guests.get(rank)
        if guest and self._may_enter and _has_gone(guest.connection):
            guest = None  # and was started again
        can_enter = self._may_enter and message["topic"] == self._topic and guest is None
        if message["job"] != self._job:
            _send(connection, answer)
            raise ValueError("of another job")
        if rank not in range(self._topology.world_size):
            raise ValueError("no rank")
        if message["topic"] not in (self._topic, _FIRST_TOPIC):
            raise ValueError("too early")
        if rank == self._topology.rank or not can_enter:
            _send(connection, {**answer, "taken": self._holders.get(rank, _who())})
            raise ValueError("a spare process")
        _send(connection, answer)
        self._holders[rank] = str(message["who"])
        self._guests[rank] = _Guest(str(message["text"]), connection)
        self._changed.notify_all()


_own_port: _Reception | None = None


def _receive_at_own_port(topology: Topology) -> _Reception:
    address = topology.addresses[topology.rank]
    try:
        return _Reception(listen(split_address(address)[1]), topology)
    except OSError as error:
        raise UserError(_describe_listener(address, topology, reason=os.strerror(error.errno or 0))) from error


def _as_chief(text: str, topology: Topology, deadline: float, *, topic: str) -> dict[int, str]:
    """Rank 0: collect until all have come or the time is up, then tell everyone."""
    reception = _own_port or _Reception(_first_contact(topology), topology, topic=topic)
    guests = reception.wait_for_all(topic, deadline)
    if reception is not _own_port:
        reception.end().close()
    texts = {0: text, **{rank: guest.text for rank, guest in guests.items()}}
    answer = {"texts": {str(rank): text for rank, text in texts.items()}}
    for guest in guests.values():
        with guest.connection as connection, contextlib.suppress(OSError):  # gone again: its own launcher will say so
            _send(connection, answer)
    return texts


def _first_contact(topology: Topology) -> socket.socket:
    """Listen at the first contact that is free."""
    contacts = _contacts(topology)
    for contact in contacts:
        try:
            return listen(split_address(contact)[1])
        except OSError as error:
            reason = os.strerror(error.errno or 0)
    raise UserError(f"{', '.join(contacts)}: cannot listen there ({reason}); is another job running?")


def _as_other(text: str, topology: Topology, deadline: float, timeout_s: float, *, topic: str) -> dict[int, str]:
    """Other ranks: knock at rank 0 until it answers or the time is up, then wait for what all have said."""
    contacts = _contacts(topology)
    started_s = None
    for contact in itertools.cycle(contacts):
        try:
            connection = _greet(contact, text, topology, topic=topic)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, _StartedError) and topology.addresses:
                started_s = started_s or time.monotonic()
                if time.monotonic() > started_s + _ENDING_S:
                    raise UserError(
                        f"rank {topology.rank} is taken: the job of {describe_rank(0, topology)} has started, with all "
                        "its processes; wait for its end, or give this one's job other addresses"
                    ) from error
            if time.monotonic() > deadline:
                # Nothing is known of the others but that rank 0, who would know, is not there.
                break
            if contact == contacts[-1]:
                time.sleep(_RETRY_S)
            continue
        # Rank 0 may have started later than this process by up to the same time, and then waits longer.
        connection.settimeout(2 * timeout_s + _READ_TIMEOUT_S)
        with connection, connection.makefile("rb") as stream:
            try:
                answer = _receive(stream)
            except (OSError, ValueError) as error:
                raise UserError(f"{describe_rank(0, topology)} is gone: it ended before all had come") from error
            return {int(rank): str(text) for rank, text in answer["texts"].items()}
    return dict.fromkeys(range(1, topology.world_size), "")


def _greet(
    contact: str, text: str, topology: Topology, *, topic: str, patience_s: float | None = None
) -> socket.socket:
    """Hand in the text at `contact`, and wait `patience_s` seconds (15 by default) for an answer.

    Raises:
        RankTaken: another process has handed in this rank's.
        UserError: this job's address is another one's.
        OSError, ValueError, KeyError, TypeError: rank 0 is not there.
    """
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(socket.create_connection(split_address(contact), timeout=_READ_TIMEOUT_S))
        job = _job_id(topology)
        _send(connection, {"job": job, "topic": topic, "rank": topology.rank, "who": _who(), "text": text})
        # Whoever listens there may be of another job, or no program of ours.
        connection.settimeout(patience_s or _ANSWER_S)
        with connection.makefile("rb", buffering=0) as stream:  # what comes after the greeting stays unread
            answer = _receive(stream)
        if answer["job"] != job:
            if not topology.addresses:  # Slurm's jobs may have contacts in common
                raise ValueError("of another job")
            raise UserError(
                f"{contact}: {answer['who']} is there, of another job with {answer['size']} processes, not the "
                f"{topology.world_size} that TF_CONFIG names here; give all processes of a job the same addresses, and "
                "each job its own"
            )
        if "taken" in answer:
            raise RankTaken(topology, str(answer["taken"]))
        stack.pop_all()
        return connection


def _describe_listener(address: str, topology: Topology, *, reason: str) -> str:
    """Why this process cannot listen at its address; raises RankTaken if a process that waits has its rank."""
    who = "another program has this port"
    try:
        _greet(address, "", topology, topic=_FIRST_TOPIC, patience_s=_PATIENCE_S).close()
    except _StartedError:
        return (
            f"rank {topology.rank} is taken: a training that runs already has {address}; wait for its end, or give "
            "this process's job other addresses, and each process its own index"
        )
    except RankTaken:
        raise
    except UserError:
        who = "a process of another job has this port"
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return f"{address}: cannot listen there ({reason}): {who}; end it, or give rank {topology.rank} another port"


def _who() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _has_gone(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(_READ_TIMEOUT_S)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(stream: BinaryIO | socket.SocketIO) -> dict[str, Any]:
    line = stream.readline()
    if line.startswith(b"\0"):  # of HTTP/2, in which TensorFlow's server greets
        raise _StartedError
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("not a message of ours")
    return message


def _job_id(topology: Topology) -> str:
    """What the processes of one job have in common, so that two jobs on one port do not mix."""
    parts = [topology.step, *topology.addresses, *topology.hosts]
    return hashlib.sha256(",".join(parts).encode()).hexdigest()


def _contacts(topology: Topology) -> tuple[str, ...]:
    return topology.contacts or topology.addresses[:1]
