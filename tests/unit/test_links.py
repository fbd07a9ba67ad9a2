"""How the ranks come to rank 0, to watch each other."""

import contextlib
import queue
import secrets
import threading
import time

import pytest

from mnist_dist.launch import links
from mnist_dist.launch.gate import Gate
from mnist_dist.launch.links import Links
from mnist_dist.launch.ports import listen
from mnist_dist.launch.secret import watch_key
from mnist_dist.launch.topology import TFConfig, Topology


def topology_of(rank) -> Topology:
    return Topology(TFConfig(("127.0.0.1:1", "127.0.0.1:2")), rank, 2, rank, 2)


class Watch(Links):
    """Keeps what it hears, and whom it loses."""

    def __init__(self, rank):
        self.events = queue.Queue()
        super().__init__(topology_of(rank))

    def _heard(self, link, message):
        if message:
            self.events.put((link.rank, message))

    def _lost(self, rank, name, how):
        self.events.put((rank, how))

    def begin(self, address):
        self._start(address, thread_name="watch")

    def tell(self, message):
        self._send(message)

    def end(self):
        self._has_left.set()
        self._say_farewell()


@pytest.fixture
def watch():
    """Watches, which end when the test does."""
    started = []

    def of(rank):
        started.append(Watch(rank))
        return started[-1]

    yield of
    for one in started:
        one.end()


def test_a_rank_that_is_dropped_comes_again(watch):
    """Its proof alone does not count: what it says first has to arrive."""
    came, token = [], secrets.token_hex(16)

    def admit(wire, hello):
        came.append(hello["rank"])
        if len(came) < 3:
            raise OSError("dropped")
        wire.connection.sendall(b'{}\n{"all": "here"}\n')

    server = listen("127.0.0.1", 0)
    address = f"127.0.0.1:{server.getsockname()[1]}:{token}"
    own, rank_1 = Gate(server, watch_key(topology_of(0), token), admit=admit, expected=2), watch(1)
    rank_1.begin(address)
    assert rank_1.events.get(timeout=20) == (0, {"all": "here"})
    assert came == [1, 1, 1]
    own.close()


def test_what_is_said_at_once_arrives(watch):
    """From both sides."""
    chief, rank_1 = watch(0), watch(1)
    chief.begin(chief.address)
    rank_1.begin(chief.address)
    rank_1.tell({"here": 1})
    assert chief.events.get(timeout=20) == (1, {"here": 1})
    chief.tell({"all": "here"})
    assert rank_1.events.get(timeout=20) == (0, {"all": "here"})


def test_a_rank_that_comes_while_rank_0_is_stopped(watch, monkeypatch):
    """Longer than ranks may take: rank 0 looks who has come before it misses anybody."""
    monkeypatch.setattr(links, "SILENCE_S", 0.5)
    monkeypatch.setattr(links, "_JOIN_S", 0.5)
    monkeypatch.setattr(links, "ALIVE_EVERY_S", 0.2)
    chief, rank_1, is_stopped = watch(0), watch(1), threading.Event()
    select = chief._selector.select

    def stop(timeout):
        chief._selector.select = select
        is_stopped.wait(20)
        return []

    chief._selector.select = stop
    chief.begin(chief.address)
    time.sleep(1)
    rank_1.begin(chief.address)
    rank_1.tell({"here": 1})
    is_stopped.set()
    assert chief.events.get(timeout=20) == (1, {"here": 1})


def test_ranks_may_take_as_long_as_rank_0_may_be_silent(watch, monkeypatch):
    """It is while it loads a library."""
    monkeypatch.setattr(links, "_JOIN_S", 0.1)
    chief, rank_1 = watch(0), watch(1)
    chief.begin(chief.address)
    time.sleep(1)
    rank_1.begin(chief.address)
    rank_1.tell({"here": 1})
    assert chief.events.get(timeout=20) == (1, {"here": 1})


def test_the_gate_does_not_wait_for_the_watch(watch):
    """Nor does it drop a rank when the watch does not look for a while."""
    chief, rank_1 = watch(0), watch(1)
    chief._bell.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            chief._bell.send(b"!")
    rank_1.begin(chief.address)
    rank_1.tell({"here": 1})
    chief.begin(chief.address)
    assert chief.events.get(timeout=20) == (1, {"here": 1})
