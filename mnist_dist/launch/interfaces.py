"""The network interfaces of this machine."""

import contextlib
import socket

import psutil

from mnist_dist.base.errors import EnvironmentProblem


def check_interface(interface: str | None) -> None:
    """Raise EnvironmentProblem if the interface that the user chose for Horovod does not exist."""
    known = [name for _, name in socket.if_nameindex()]
    if interface is not None and interface not in known:
        raise EnvironmentProblem(
            f"HOROVOD_GLOO_IFACE={interface[:80]}: this machine has no such network interface, but "
            f"{', '.join(known)}; correct it, or unset it"
        )


def resolve(host: str) -> str:
    """The IPv4 address of a host; its name if it has none."""
    with contextlib.suppress(OSError):
        return socket.gethostbyname(host)
    return host


def interface_towards(address: str) -> str | None:
    """The network interface over which this machine reaches another; None if unknown.

    By default Gloo uses the one that this machine's own name resolves to, often the loopback.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((address, 9))  # sends nothing
        own = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if own in (entry.address for entry in addresses):
                return name
    return None
