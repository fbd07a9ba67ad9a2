"""First contact of the processes of one job, before any of them starts TensorFlow or takes a GPU.

Every rank hands in a text and gets the texts of all. It waits for a bounded time and names who is missing, where the
backends wait long, abort, or do not say for whom. The way depends on the launcher: over the ranks' own addresses
(TF_CONFIG, Slurm), where rank 0 listens for a moment at the address that TensorFlow will use afterwards; or over the
key-value store that horovodrun serves to its processes.
"""

import hashlib
import json
import socket
import time
import urllib.request
from typing import Any

from mnist_dist.errors import UserError
from mnist_dist.topology import Topology

_RETRY_S = 0.2
_READ_TIMEOUT_S = 5.0


def exchange(text: str, *, topology: Topology, timeout_s: float) -> list[str]:
    """Hand in this rank's text and return those of all ranks, in their order.

    Raises:
        UserError: somebody did not come within `timeout_s` seconds; the message names who.
    """
    if topology.world_size == 1:
        return [text]
    deadline = time.monotonic() + timeout_s
    if topology.store:
        texts = _over_store(text, topology, deadline)
    elif topology.is_chief:
        texts = _as_chief(text, topology, deadline)
    else:
        texts = _as_other(text, topology, deadline, timeout_s)
    missing = [rank for rank in range(topology.world_size) if rank not in texts]
    if missing:
        raise UserError(
            f"{', '.join(_name(rank, topology) for rank in missing)} did not come within {timeout_s:.0f} s; start all "
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


def _as_chief(text: str, topology: Topology, deadline: float) -> dict[int, str]:
    """Rank 0: collect until all have come or the time is up, then tell everyone."""
    texts, peers = {0: text}, {}
    with socket.create_server(("", _split(topology.addresses[0])[1])) as server:
        while len(texts) < topology.world_size and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                peer, _ = server.accept()
                message = _receive(peer, timeout_s=min(left, _READ_TIMEOUT_S))
                rank = message["rank"]
                if message["job"] != _job_id(topology) or rank in texts or rank not in range(topology.world_size):
                    raise ValueError("of another job")
                texts[rank], peers[rank] = str(message["text"]), peer
            except (OSError, ValueError, KeyError, TypeError):
                continue  # the time is up, or a stranger knocked
    answer = {"texts": {str(rank): text for rank, text in texts.items()}}
    for peer in peers.values():
        with peer:
            try:
                _send(peer, answer)
            except OSError:
                continue  # gone again: its own launcher will say so
    return texts


def _as_other(text: str, topology: Topology, deadline: float, timeout_s: float) -> dict[int, str]:
    """Other ranks: knock at rank 0 until it answers or the time is up."""
    while True:
        try:
            with socket.create_connection(_split(topology.addresses[0]), timeout=_READ_TIMEOUT_S) as connection:
                _send(connection, {"job": _job_id(topology), "rank": topology.rank, "text": text})
                # Rank 0 may have started later than this process by up to the same time, and then waits longer.
                answer = _receive(connection, timeout_s=2 * timeout_s + _READ_TIMEOUT_S)
                return {int(rank): str(text) for rank, text in answer["texts"].items()}
        except (OSError, ValueError, KeyError, TypeError):
            if time.monotonic() > deadline:
                # Nothing is known of the others but that rank 0, who would know, is not there.
                return dict.fromkeys(range(1, topology.world_size), "")
            time.sleep(_RETRY_S)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket, *, timeout_s: float) -> dict[str, Any]:
    connection.settimeout(timeout_s)
    with connection.makefile("rb") as stream:
        message = json.loads(stream.readline())
    if not isinstance(message, dict):
        raise ValueError("not a message of ours")
    return message


def _job_id(topology: Topology) -> str:
    """What the processes of one job have in common, so that two jobs on one port do not mix."""
    return hashlib.sha256(",".join(topology.addresses).encode()).hexdigest()


def _name(rank: int, topology: Topology) -> str:
    return f"rank {rank}" + (f" ({topology.addresses[rank]})" if topology.addresses else "")


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)
