"""First contact of the processes of one job, before any of them starts TensorFlow or takes a GPU.

Every rank hands in a text and gets the texts of all. It waits for a bounded time and names who is missing, where the
backends wait long, abort, or do not say for whom. The way depends on the launcher: rank 0 listens for a moment at the
address that TensorFlow will use afterwards (TF_CONFIG), or at a port of its host that follows from the number of the
job (Slurm); or all use the key-value store that horovodrun serves to its processes.
"""

import contextlib
import hashlib
import itertools
import json
import random
import socket
import time
import urllib.request
from typing import Any, BinaryIO

from mnist_dist.errors import UserError
from mnist_dist.topology import Topology

_RETRY_S = 0.2
_READ_TIMEOUT_S = 5.0
_OWN_PORTS = range(20_000, 32_768)  # Linux gives out those above by itself, to whoever asks next


def exchange(text: str, *, topology: Topology, timeout_s: float, topic: str = "start") -> list[str]:
    """Hand in this rank's text and return those of all ranks, in their order.

    It may be called again, by all ranks alike, with another topic; but not over horovodrun's store.

    Raises:
        UserError: somebody did not come within `timeout_s` seconds, or has ended; the message names who.
    """
    if topology.world_size == 1:
        return [text]
    deadline = time.monotonic() + timeout_s
    if topology.store:
        texts = _over_store(text, topology, deadline)
    elif topology.is_chief:
        texts = _as_chief(text, topology, deadline, job=_job_id(topology, topic))
    else:
        texts = _as_other(text, topology, deadline, timeout_s, job=_job_id(topology, topic))
    missing = [rank for rank in range(topology.world_size) if rank not in texts]
    if missing:
        names = ", ".join(describe_rank(rank, topology) for rank in missing)
        raise UserError(
            f"{names} did not come within {timeout_s:.0f} s; start all "
            f"{topology.world_size} processes, check that they can reach each other, or allow more time with "
            "strategy.start_timeout_s"
        )
    return [texts[rank] for rank in range(topology.world_size)]


def check_own_port(topology: Topology) -> None:
    """Raise UserError if this process cannot listen at its own address, where the others will look for it."""
    if not topology.addresses:
        return
    address = topology.addresses[topology.rank]
    try:
        socket.create_server(("", _split(address)[1])).close()
    except OSError as error:
        raise UserError(f"{address}: cannot listen there ({error.strerror}); is another job running?") from error


def hold_free_port() -> socket.socket:
    """A socket bound to a port of this host that nobody listens on, and nobody else gets until it is closed."""
    for port in random.SystemRandom().sample(_OWN_PORTS, 100):
        held = socket.socket()
        try:
            held.bind(("", port))
        except OSError:
            held.close()
            continue
        return held
    raise UserError(f"no free port from {_OWN_PORTS.start} to {_OWN_PORTS.stop - 1} on this machine")


def exchange_addresses(topology: Topology, *, timeout_s: float) -> list[str]:
    """`host:port` of all ranks, each with a port that is free now; to be used at once, before others take it."""
    if topology.addresses or topology.world_size == 1:
        return list(topology.addresses)
    with hold_free_port() as held:
        own = f"{topology.hosts[topology.rank]}:{held.getsockname()[1]}"
        return exchange(own, topology=topology, timeout_s=timeout_s, topic="addresses")


def describe_rank(rank: int, topology: Topology, *, host: str = "") -> str:
    """A rank and its place, in words; `host` where the launcher did not tell."""
    places = topology.addresses or topology.hosts
    place = places[rank] if places else host
    return f"rank {rank} ({place})" if place else f"rank {rank}"


def _over_store(text: str, topology: Topology, deadline: float) -> dict[int, str]:
    """Through horovodrun's store; what is missing at the deadline is left out."""
    base = f"http://{topology.store}/mnist_dist/"
    texts: dict[int, str] = {}
    # Proxies are for the world outside; the store is the launcher's own.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(base + str(topology.rank), data=text.encode(), method="PUT")
    try:
        opener.open(request, timeout=_READ_TIMEOUT_S).close()
    except OSError as error:
        raise UserError(f"horovodrun's store at {topology.store} cannot be reached ({error})") from error
    while len(texts) < topology.world_size:
        for rank in set(range(topology.world_size)) - set(texts):
            try:
                with opener.open(base + str(rank), timeout=_READ_TIMEOUT_S) as answer:
                    texts[rank] = answer.read().decode()
            except OSError:
                continue  # not there yet
        if time.monotonic() > deadline:
            break
        time.sleep(_RETRY_S)
    return texts


def _as_chief(text: str, topology: Topology, deadline: float, *, job: str) -> dict[int, str]:
    """Rank 0: collect until all have come or the time is up, then tell everyone."""
    texts, peers = {0: text}, {}
    with _first_contact(topology) as server:
        while len(texts) < topology.world_size and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                peer, _ = server.accept()
            except OSError:
                continue  # the time is up
            try:
                peer.settimeout(min(left, _READ_TIMEOUT_S))
                with peer.makefile("rb") as stream:
                    message = _receive(stream)
                rank = message["rank"]
                if message["job"] != job or rank in texts or rank not in range(topology.world_size):
                    raise ValueError("of another job")
                _send(peer, {"job": job})
                texts[rank], peers[rank] = str(message["text"]), peer
            except (OSError, ValueError, KeyError, TypeError):
                peer.close()  # a stranger knocked
    answer = {"texts": {str(rank): text for rank, text in texts.items()}}
    for peer in peers.values():
        with peer:
            try:
                _send(peer, answer)
            except OSError:
                continue  # gone again: its own launcher will say so
    return texts


def _first_contact(topology: Topology) -> socket.socket:
    """Listen at the first contact that is free."""
    contacts = _contacts(topology)
    for contact in contacts:
        try:
            return socket.create_server(("", _split(contact)[1]))
        except OSError as error:
            reason = error.strerror
    raise UserError(f"{', '.join(contacts)}: cannot listen there ({reason}); is another job running?")


def _as_other(text: str, topology: Topology, deadline: float, timeout_s: float, *, job: str) -> dict[int, str]:
    """Other ranks: knock at rank 0 until it answers or the time is up, then wait for what all have said."""
    contacts = _contacts(topology)
    for contact in itertools.cycle(contacts):
        try:
            connection = _greet(contact, text, topology, job=job)
        except (OSError, ValueError, KeyError, TypeError):
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


def _greet(contact: str, text: str, topology: Topology, *, job: str) -> socket.socket:
    """Hand in the text at `contact`; raises OSError, ValueError, KeyError or TypeError unless rank 0 is there."""
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(socket.create_connection(_split(contact), timeout=_READ_TIMEOUT_S))
        _send(connection, {"job": job, "rank": topology.rank, "text": text})
        # Whoever listens there may be of another job, or no program of ours.
        connection.settimeout(3 * _READ_TIMEOUT_S)
        with connection.makefile("rb", buffering=0) as stream:  # what comes after the greeting stays unread
            if _receive(stream)["job"] != job:
                raise ValueError("of another job")
        stack.pop_all()
        return connection


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(stream: BinaryIO | socket.SocketIO) -> dict[str, Any]:
    message = json.loads(stream.readline())
    if not isinstance(message, dict):
        raise ValueError("not a message of ours")
    return message


def _job_id(topology: Topology, topic: str) -> str:
    """What the processes of one job have in common, so that two jobs on one port do not mix, nor two exchanges."""
    parts = [topic, topology.step, *topology.addresses, *topology.hosts]
    return hashlib.sha256(",".join(parts).encode()).hexdigest()


def _contacts(topology: Topology) -> tuple[str, ...]:
    return topology.contacts or topology.addresses[:1]


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)
