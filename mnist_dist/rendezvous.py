"""First contact of the processes of one job: wait for all of them, for a bounded time, and name who is missing.

TensorFlow's own start-up waits for a missing peer for a long time and does not say whom it is waiting for. Here every
rank reports to rank 0, at the address that rank 0 will use for TensorFlow afterwards; rank 0 answers when all have
come, or tells everyone who has not.
"""

import json
import socket
import time
from collections.abc import Sequence
from typing import Any

from mnist_dist.errors import UserError

_RETRY_S = 0.2


def wait_for_all(*, rank: int, addresses: Sequence[str], timeout_s: float) -> None:
    """Return when every rank has called this.

    Args:
        rank: this process's number.
        addresses: `host:port` of every rank.
        timeout_s: how long to wait for the others, seconds.

    Raises:
        UserError: somebody did not come in time; the message names rank and address.
    """
    deadline = time.monotonic() + timeout_s
    if rank == 0:
        _receive_all(addresses, deadline=deadline, timeout_s=timeout_s)
    else:
        _report(rank, addresses, deadline=deadline, timeout_s=timeout_s)


def _receive_all(addresses: Sequence[str], *, deadline: float, timeout_s: float) -> None:
    host, port = _split(addresses[0])
    peers: dict[int, socket.socket] = {}
    try:
        with socket.create_server(("", port)) as server:
            while len(peers) < len(addresses) - 1 and (left := deadline - time.monotonic()) > 0:
                server.settimeout(left)
                try:
                    peer, _ = server.accept()
                    peers[_read_message(peer, timeout_s=left)["rank"]] = peer
                except (OSError, ValueError, KeyError):
                    continue  # the time is up, or a stranger knocked
    except OSError as error:
        raise UserError(
            f"rank 0 cannot listen at {host}:{port}: {error.strerror or error}; is another job running there?"
        ) from error
    missing = [index for index in range(1, len(addresses)) if index not in peers]
    for peer in peers.values():
        with peer:
            peer.sendall(json.dumps({"missing": missing}).encode() + b"\n")
    if missing:
        raise UserError(_missing(missing, addresses, timeout_s))


def _report(rank: int, addresses: Sequence[str], *, deadline: float, timeout_s: float) -> None:
    while True:
        left = deadline - time.monotonic()
        try:
            with socket.create_connection(_split(addresses[0]), timeout=max(left, _RETRY_S)) as connection:
                connection.sendall(json.dumps({"rank": rank}).encode() + b"\n")
                # Rank 0 may have started later than this process and then waits longer.
                missing = _read_message(connection, timeout_s=2 * timeout_s)["missing"]
                break
        except (OSError, ValueError, KeyError):
            if time.monotonic() > deadline:
                raise UserError(_missing([0], addresses, timeout_s)) from None
            time.sleep(_RETRY_S)
    if missing:
        raise UserError(_missing(missing, addresses, timeout_s))


def _read_message(connection: socket.socket, *, timeout_s: float) -> dict[str, Any]:
    connection.settimeout(timeout_s)
    with connection.makefile("rb") as stream:
        message: dict[str, Any] = json.loads(stream.readline())
    return message


def _missing(ranks: Sequence[int], addresses: Sequence[str], timeout_s: float) -> str:
    names = ", ".join(f"rank {rank} ({addresses[rank]})" for rank in ranks)
    return (
        f"{names} did not come within {timeout_s:.0f} s; start all {len(addresses)} processes, check that they can "
        "reach each other, or allow more time with strategy.start_timeout_s"
    )


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)
