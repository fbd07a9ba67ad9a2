"""The hosts of a job and how many processes each of them takes: `host:slots,host:slots`."""

import contextlib
import re
import socket
from collections.abc import Sequence

import psutil

from mnist_dist.launch.address import host_name
from mnist_dist.launch.variables import MAX_PROCESSES, printable

LOCALHOST = "localhost"


def parse_hosts(text: str) -> dict[str, int]:
    """The slots of each host, in order; a host without a number has one. Raises ValueError."""
    slots: dict[str, int] = {}
    for entry in text.split(","):
        name, colon, number = entry.partition(":")
        host = host_name(name)
        if host in slots:
            raise ValueError(f"{host} is named twice")
        if colon and not re.fullmatch("[1-9][0-9]{0,5}", number):
            raise ValueError(f"{printable(entry, 80)} is not host:slots, such as node7:4")
        slots[host] = int(number) if colon else 1
        if sum(slots.values()) > MAX_PROCESSES:
            raise ValueError(f"more than {MAX_PROCESSES} processes")
    return slots


def format_hosts(hosts: Sequence[str]) -> str:
    """The same for the host of every process; those of one host stand together."""
    return ",".join(f"{host}:{hosts.count(host)}" for host in dict.fromkeys(hosts))


def is_here(host: str) -> bool:
    """Whether a host is this machine: by its name, or by an address of one of its network interfaces."""
    own = socket.gethostname().lower()
    if host in (LOCALHOST, own, own.partition(".")[0]):
        return True
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(host)
        return any(address == entry.address for entries in psutil.net_if_addrs().values() for entry in entries)
    return False
