"""Ports of this machine: listening on one, holding it until it is needed, handing it over."""

import contextlib
import errno
import logging
import random
import socket
from collections.abc import Callable
from typing import TypeVar

from mnist_dist.base.errors import EnvironmentProblem
from mnist_dist.launch.address import is_address

log = logging.getLogger(__name__)
T = TypeVar("T")

OWN_PORTS = range(20_000, 32_768)
"""Linux assigns those above by itself, to any program."""


def listen(host: str, port: int) -> socket.socket:
    """A server on a port of one address of this machine; raises OSError.

    On all interfaces if the machine does not have that address, or `host` is a name: its address is unknown then.
    """
    if is_address(host):
        try:
            return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise
    if socket.has_dualstack_ipv6():
        server = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        server = socket.create_server(("", port))
    log.info("Listening on all network interfaces at port %d: this machine does not have the address %s", port, host)
    return server


def listen_anywhere(host: str) -> tuple[socket.socket, str, int]:
    """A server as `listen` makes it, on a free port; with the host and port that others need to reach it."""
    server = _at_free_port(lambda port: listen(host, port))
    at, port, *_ = server.getsockname()
    return server, host if at in ("::", "0.0.0.0") else str(at), port


def hold_free_port() -> socket.socket:
    """A socket that reserves a free port of this machine, on all interfaces, until it is closed; does not listen."""
    return _at_free_port(lambda port: _bind(port, reuse=False))


def hold_and_listen(host: str, port: int) -> tuple[socket.socket, socket.socket]:
    """A socket that reserves a port on all interfaces, and a server there that listens at `host`; raises OSError."""
    # With `reuse`, connections of an earlier server do not matter; two that come at once still cannot both listen.
    held = _bind(port, reuse=True)
    try:
        server = listen(host, port)
    except BaseException:
        held.close()
        raise
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    return held, server


def _at_free_port(create: Callable[[int], T]) -> T:
    """What `create` makes of the first port of ours for which it does not raise OSError."""
    for port in random.SystemRandom().sample(OWN_PORTS, 100):
        with contextlib.suppress(OSError):
            return create(port)
    raise EnvironmentProblem(f"no free port from {OWN_PORTS.start} to {OWN_PORTS.stop - 1} on this machine")


def share_port(held: socket.socket) -> None:
    """Keep a port reserved only for servers of this user that share theirs (SO_REUSEPORT)."""
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def _bind(port: int, *, reuse: bool) -> socket.socket:
    is_dual = socket.has_dualstack_ipv6()
    held = socket.socket(socket.AF_INET6 if is_dual else socket.AF_INET, socket.SOCK_STREAM)
    try:
        if is_dual:
            held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        held.bind(("", port))
    except BaseException:
        held.close()
        raise
    return held
