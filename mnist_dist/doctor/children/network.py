"""What the names of the job's hosts resolve to here; a dead name server makes this hang."""

import contextlib
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import psutil

from mnist_dist.launch.interfaces import interface_towards, resolve


def probe(hosts: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """The interfaces of this machine, the addresses of the hosts, and over which interface they are reached."""
    yield "interfaces", {name: stats.isup for name, stats in psutil.net_if_stats().items()}
    own = socket.gethostname()
    for host in dict.fromkeys([own, *hosts]):
        addresses: list[str] = []
        with contextlib.suppress(OSError):
            addresses = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, None)})
        yield f"host {host}", {"addresses": addresses, "interface": interface_towards(resolve(host))}
