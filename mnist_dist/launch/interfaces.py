"""The network interfaces of this machine, and at which of its addresses it listens for the other ranks."""

import contextlib
import ipaddress
import socket

import psutil

from mnist_dist.base.errors import EnvironmentProblem
from mnist_dist.launch.address import is_address
from mnist_dist.launch.topology import Topology

LOOPBACK = "127.0.0.1"


def check_interface(interface: str | None) -> None:
    """Raise EnvironmentProblem if the interface that the user chose for Horovod does not exist."""
    known = [name for _, name in socket.if_nameindex()]
    if interface is not None and interface not in known:
        raise EnvironmentProblem(
            f"HOROVOD_GLOO_IFACE={interface[:80]}: this machine has no such network interface, but "
            f"{', '.join(known)}; correct it, or unset it"
        )


def resolve(host: str) -> str:
    """The IPv4 address of a host, or its IPv6 address; its name if it has none."""
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            return str(socket.getaddrinfo(host, None, family)[0][4][0])
    return host


def meeting_point(host: str, topology: Topology) -> str:
    """The one address at which a process on `host` listens, and other ranks reach it; the host itself if unknown.

    The ranks on that host and those on others must come to the same address, from what their machines know.
    """
    if is_address(host):
        return host
    if topology.local_size == topology.world_size:
        return LOOPBACK
    found = resolve(host)
    if not is_address(found) or not ipaddress.ip_address(found).is_loopback:
        return found
    # Debian gives a machine's own name an address of the loopback, 127.0.1.1, where no other machine reaches it.
    others = (topology.host_of(rank) for rank in range(topology.world_size))
    other = next((name for name in others if name != host), "")
    return _own_address(resolve(other)) or host


def interface_towards(address: str) -> str | None:
    """The network interface over which this machine reaches another; None if unknown.

    By default Gloo uses the one that this machine's own name resolves to, often the loopback.
    """
    if (own := _own_address(address)) is not None:
        for name, addresses in psutil.net_if_addrs().items():
            if own in (entry.address for entry in addresses):
                return name
    return None


def _own_address(towards: str) -> str | None:
    """This machine's address on the way to another one; None if there is no way."""
    family = socket.AF_INET6 if ":" in towards else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))  # sends nothing
        return str(probe.getsockname()[0])
    return None
