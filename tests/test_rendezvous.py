import socket
import threading
import time

import pytest

from mnist_dist.errors import UserError
from mnist_dist.rendezvous import wait_for_all


@pytest.fixture
def addresses() -> list[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return [f"127.0.0.1:{port}", "127.0.0.1:1", "127.0.0.1:2"]


def start(ranks, addresses, timeout_s, delays=None):
    """Let these ranks wait for all; the outcome of each is None or its error."""
    outcomes = {}

    def one(rank):
        time.sleep((delays or {}).get(rank, 0))
        try:
            wait_for_all(rank=rank, addresses=addresses, timeout_s=timeout_s)
            outcomes[rank] = None
        except UserError as error:
            outcomes[rank] = str(error)

    threads = [threading.Thread(target=one, args=[rank]) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return outcomes


@pytest.mark.parametrize("late", [0, 1, 2])
def test_all_come_even_if_seconds_apart(late, addresses):
    assert start([0, 1, 2], addresses, 20, {late: 1.5}) == {0: None, 1: None, 2: None}


def test_the_missing_one_is_named_to_all(addresses):
    outcomes = start([0, 1], addresses, 1.0)
    for rank in (0, 1):
        assert outcomes[rank].startswith(f"rank 2 ({addresses[2]}) did not come within 1 s")


def test_a_missing_chief_is_named(addresses):
    assert start([1], addresses, 1.0)[1].startswith(f"rank 0 ({addresses[0]}) did not come within 1 s")


def test_strangers_do_not_count(addresses):
    def knock():
        time.sleep(0.3)
        with socket.create_connection(("127.0.0.1", int(addresses[0].split(":")[1]))) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")

    threading.Thread(target=knock).start()
    assert start([0, 1, 2], addresses, 20, {1: 1.0, 2: 1.0}) == {0: None, 1: None, 2: None}


def test_a_port_in_use_is_an_answer(addresses):
    port = int(addresses[0].split(":")[1])
    with socket.create_server(("", port)):
        outcome = start([0], addresses, 1.0)[0]
    assert f"cannot listen at 127.0.0.1:{port}" in outcome
