"""Hosts and `host:port` addresses, normalised to one spelling each."""

import ipaddress
import json
import re
from typing import Any

from mnist_dist.launch.variables import printable

_MAX_HOST_NAME = 253
# Where the ranks meet: ports below the range that Linux assigns by itself (32768 and up).
_FIRST_PORT, _NUM_PORTS = 20_000, 10_000
# If one is taken the next is tried, so far away that two jobs have at most one in common.
_NUM_ADDRESSES, _PORT_STEP = 8, 1_013
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST_NAME = rf"{_LABEL}(?:\.{_LABEL})*"


def split_address(address: Any) -> tuple[str, int]:
    """Host and port of `host:port` or `[IPv6]:port`, normalised; raises ValueError for anything else."""
    text = address if isinstance(address, str) else json.dumps(address)
    shown = f"{printable(text, 80)} is not host:port"
    parts = re.fullmatch(r"(?:\[([^\[\]]*)\]|([^:\[\]]*)):([0-9]{1,9})", text)
    if parts is None:
        raise ValueError(shown + ("; an IPv6 address needs brackets: [::1]:2345" if text.count(":") > 1 else ""))
    ipv6, name, port = parts[1], parts[2], int(parts[3])
    if not 1 <= port <= 65_535:
        raise ValueError(f"{shown}: ports are 1 to 65535")
    try:
        return (host_name(name) if ipv6 is None else ipv6_address(ipv6)), port
    except ValueError as error:
        raise ValueError(f"{shown}: {error}") from error


def join_address(host: str, port: int) -> str:
    """`host:port`, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_address(host: str) -> bool:
    """Whether a host is given by its address, and not by a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def meeting_addresses(host: str, number: int) -> tuple[str, ...]:
    """Where the ranks of a job may meet on a host: ports derived from a number of the job, so that all know them."""
    ports = (_FIRST_PORT + (number + attempt * _PORT_STEP) % _NUM_PORTS for attempt in range(_NUM_ADDRESSES))
    return tuple(join_address(host, port) for port in ports)


def ipv6_address(text: str) -> str:
    """The normal spelling of an IPv6 address, without brackets; raises ValueError if it is not one."""
    if not re.fullmatch(r"[0-9A-Fa-f:.]{2,45}(?:%[A-Za-z0-9._-]{1,15})?", text):  # with the zone of a link-local one
        raise ValueError(f'"{printable(text, 80)}" is not an IPv6 address')
    return str(ipaddress.IPv6Address(text))


def host_name(text: str) -> str:
    """The normal spelling of a host's name or IPv4 address; raises ValueError if it is neither."""
    name = text.lower().removesuffix(".")
    if len(name) > _MAX_HOST_NAME or not re.fullmatch(_HOST_NAME, name):
        raise ValueError(f'"{printable(text, 80)}" is not a host name')
    # The system would take it for some IPv4 address: 1, 0x7f.1, 127.1
    if re.fullmatch(r"[0-9]+|0x[0-9a-f]*", name.rpartition(".")[2]):
        return str(ipaddress.IPv4Address(name))
    return name
