"""Ports of this machine: listening on one, holding it until it is needed, handing it over."""

import contextlib
import random
import socket

from mnist_dist.base.errors import EnvironmentProblem

OWN_PORTS = range(20_000, 32_768)
"""Linux assigns those above by itself, to any program."""


def listen(port: int) -> socket.socket:
    """A server on a port of this machine, for IPv4 and, if available, IPv6; raises OSError."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def hold_free_port() -> socket.socket:
    """A server on a free port of this machine, which is reserved until the server is closed."""
    for port in random.SystemRandom().sample(OWN_PORTS, 100):
        with contextlib.suppress(OSError):
            return listen(port)
    raise EnvironmentProblem(f"no free port from {OWN_PORTS.start} to {OWN_PORTS.stop - 1} on this machine")


def share_port(server: socket.socket) -> None:
    """Stop listening, but keep the port reserved for servers of this user that share theirs (SO_REUSEPORT)."""
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    with contextlib.suppress(OSError):
        server.shutdown(socket.SHUT_RDWR)  # wakes a thread that is in accept()
