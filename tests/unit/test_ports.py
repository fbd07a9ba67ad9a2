"""At which address and port a process listens."""

import socket

import pytest
from support.launchers import free_ports

from mnist_dist.launch import interfaces
from mnist_dist.launch.interfaces import meeting_point
from mnist_dist.launch.ports import OWN_PORTS, hold_and_listen, hold_free_port, listen, listen_anywhere
from mnist_dist.launch.topology import Step, TFConfig, Topology


def reaches(host, port) -> bool:
    try:
        socket.create_connection((host, port), timeout=20).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1"])
def test_it_listens_at_one_address(host, logged):
    (port,) = free_ports(1)
    with listen(host, port):
        assert [reaches(other, port) for other in ("127.0.0.1", "127.0.0.2", "::1")] == [
            other == host for other in ("127.0.0.1", "127.0.0.2", "::1")
        ]
    assert not logged()


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "no-such-host.invalid", "localhost"])
def test_an_address_of_another_machine(host, logged):
    """A machine may not know the address by which others reach it; a name is what is left if none is known."""
    server, told, port = listen_anywhere(host)
    with server:
        assert (told, port in OWN_PORTS) == (host, True)
        assert reaches("127.0.0.1", port) and reaches("::1", port)
    assert logged() == [
        f"Listening on all network interfaces at port {port}: this machine does not have the address {host}"
    ]


def test_localhost():
    """Clients may try ::1 first."""
    own = Topology.of_hosts(TFConfig(("localhost:1", "localhost:2")), ("localhost",) * 2, rank=0)
    server, host, port = listen_anywhere(meeting_point("localhost", own))
    with server:
        assert host == "127.0.0.1"
        assert reaches("localhost", port)


def test_a_port_in_use():
    with listen("127.0.0.1", 0) as server, pytest.raises(OSError, match="in use"):
        listen("127.0.0.1", server.getsockname()[1])


def test_a_held_port_does_not_answer():
    with hold_free_port() as held:
        port = held.getsockname()[1]
        assert not reaches("127.0.0.1", port)
        for host in ("127.0.0.1", "127.0.0.9", "::1", "::"):
            with pytest.raises(OSError, match="in use"):
                listen(host, port)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_that_is_held_where_it_does_not_answer(host):
    """Until it is handed over, nobody else may take it at another address."""
    (port,) = free_ports(1)
    held, server = hold_and_listen(host, port)
    with held, server:
        for other in ("127.0.0.1", "127.0.0.9", "0.0.0.0", "::1", "::"):
            assert reaches(other, port) == (other == host or (other, host) in ANY)
            with pytest.raises(OSError, match="in use"):
                listen(other, port)


# To connect to "any" address is to connect to the loopback.
ANY = {("0.0.0.0", "127.0.0.1"), ("::", "::1")}


def test_a_port_whose_connections_linger():
    """Of the last run, a moment ago: the side that ends a connection first keeps its port for a minute."""
    (port,) = free_ports(1)
    for _ in range(2):
        held, server = hold_and_listen("127.0.0.1", port)
        with held, server, socket.create_connection(("127.0.0.1", port)) as client:
            server.accept()[0].close()
            assert client.recv(1) == b""


HOSTS = {"a": "192.0.2.1", "b": "192.0.2.2", "six": "2001:db8::6", "debian": "127.0.1.1"}


@pytest.fixture
def resolving(monkeypatch):
    """Names as some cluster has them; towards 192.0.2.2 this machine is 192.0.2.9."""
    monkeypatch.setattr(interfaces, "resolve", lambda name: HOSTS.get(name, name))
    monkeypatch.setattr(interfaces, "_own_address", lambda towards: {"192.0.2.2": "192.0.2.9"}.get(towards))


@pytest.mark.parametrize(
    ("hosts", "point"),
    [
        (("a", "b"), "192.0.2.1"),
        (("a", "a"), "127.0.0.1"),
        (("six", "b"), "2001:db8::6"),
        (("127.0.0.2", "127.0.0.3"), "127.0.0.2"),
        (("192.0.2.7", "192.0.2.7"), "192.0.2.7"),
        (("debian", "debian", "b"), "192.0.2.9"),
        (("debian", "lost"), "debian"),
        (("unknown", "b"), "unknown"),
    ],
)
def test_where_rank_0_listens_and_is_visited(hosts, point, resolving):
    """By both sides, also on its own machine."""
    for rank in range(len(hosts)):
        if hosts[rank] == hosts[0]:
            assert meeting_point(hosts[0], Topology.of_hosts(Step(hosts, (), "7"), hosts, rank=rank)) == point


def test_with_tf_config(resolving):
    addresses = ("debian:1", "b:1")
    assert meeting_point("debian", Topology.of_hosts(TFConfig(addresses), ("debian", "b"), rank=0)) == "192.0.2.9"


def test_the_way_to_another_machine():
    assert interfaces._own_address("127.0.0.5") == "127.0.0.1"
    assert interfaces._own_address("::1") == "::1"
    assert interfaces._own_address("no-such-host.invalid") is None
    assert interfaces.interface_towards("127.0.0.5") == "lo"
    assert interfaces.resolve("localhost") == "127.0.0.1"
    assert interfaces.resolve("no-such-host.invalid") == "no-such-host.invalid"
