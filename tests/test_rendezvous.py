import json
import socket
import threading
import time

import pytest
from jobs import free_ports

from mnist_dist import rendezvous
from mnist_dist.errors import UserError
from mnist_dist.rendezvous import check_own_port, exchange, exchange_addresses, hold_free_port
from mnist_dist.topology import Topology


@pytest.fixture
def addresses() -> list[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return [f"127.0.0.1:{port}", "127.0.0.1:1", "127.0.0.1:2"]


def start(ranks, addresses, timeout_s, delays=None):
    """Let these ranks exchange their names; the outcome of each is what it got, or its error."""
    outcomes = {}

    def one(rank):
        time.sleep((delays or {}).get(rank, 0))
        topology = Topology("tf_config", rank=rank, world_size=len(addresses), addresses=tuple(addresses))
        try:
            outcomes[rank] = exchange(f"I am {rank}", topology=topology, timeout_s=timeout_s)
        except UserError as error:
            outcomes[rank] = str(error)

    threads = [threading.Thread(target=one, args=[rank]) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return outcomes


ALL = {rank: ["I am 0", "I am 1", "I am 2"] for rank in range(3)}


def test_one_process_talks_to_itself():
    assert exchange("alone", topology=Topology(), timeout_s=1) == ["alone"]


@pytest.mark.parametrize("late", [0, 1, 2])
def test_all_come_even_if_seconds_apart(late, addresses):
    assert start([0, 1, 2], addresses, 20, {late: 1.5}) == ALL


def test_the_missing_one_is_named_to_all(addresses):
    outcomes = start([0, 1], addresses, 1.0)
    for rank in (0, 1):
        assert outcomes[rank].startswith(f"rank 2 ({addresses[2]}) did not come within 1 s")


def test_a_missing_chief_is_named(addresses):
    assert start([1], addresses, 1.0)[1].startswith(f"rank 0 ({addresses[0]}) did not come within 1 s")


@pytest.mark.parametrize(
    "words",
    [b"GET / HTTP/1.1\r\n\r\n", b"[1, 2]\n", b'{"rank": 1}\n', b'{"job": "x", "rank": 1, "text": ""}\n', b""],
)
def test_strangers_do_not_count(words, addresses, monkeypatch):
    """Not even one that says nothing at all and stays."""
    monkeypatch.setattr(rendezvous, "_READ_TIMEOUT_S", 1.0)
    silent = []

    def knock():
        time.sleep(0.3)
        stranger = socket.create_connection(("127.0.0.1", int(addresses[0].split(":")[1])))
        stranger.sendall(words)
        silent.append(stranger)

    threading.Thread(target=knock).start()
    assert start([0, 1, 2], addresses, 20, {1: 1.0, 2: 1.0}) == ALL
    silent[0].close()


def test_a_port_in_use_is_an_answer(addresses):
    topology = Topology("tf_config", rank=0, world_size=3, addresses=tuple(addresses))
    check_own_port(topology)
    with socket.create_server(("", int(addresses[0].split(":")[1]))), pytest.raises(UserError) as error:
        check_own_port(topology)
    assert f"{addresses[0]}: cannot listen there" in str(error.value)


def start_under_slurm(num_ranks, contacts, *, job="7"):
    """Let so many ranks exchange their names twice, and their addresses in between."""
    outcomes = {}

    def one(rank):
        topology = Topology(
            "slurm", rank, num_ranks, hosts=("127.0.0.1",) * num_ranks, contacts=tuple(contacts), step=job
        )
        first = exchange(f"{job} {rank}", topology=topology, timeout_s=20)
        addresses = exchange_addresses(topology, timeout_s=20)
        outcomes[rank] = (first, addresses, exchange(f"{job} {rank} again", topology=topology, timeout_s=20, topic="x"))

    threads = [threading.Thread(target=one, args=[rank]) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    return threads, outcomes


def check_outcomes(threads, outcomes, *, job):
    for thread in threads:
        thread.join(40)
        assert not thread.is_alive()
    num_ranks = len(threads)
    assert set(outcomes) == set(range(num_ranks))
    for first, addresses, second in outcomes.values():
        assert first == [f"{job} {rank}" for rank in range(num_ranks)]
        assert second == [f"{job} {rank} again" for rank in range(num_ranks)]
        assert addresses == outcomes[0][1]
        assert len(set(addresses)) == num_ranks


def test_many_ranks_of_a_host_have_ports_of_their_own(addresses):
    check_outcomes(*start_under_slurm(20, addresses[:1]), job="7")


def test_two_jobs_with_the_same_contacts_do_not_mix():
    contacts = [f"127.0.0.1:{port}" for port in free_ports(3)]
    one, other = start_under_slurm(3, contacts, job="1"), start_under_slurm(3, contacts, job="2")
    check_outcomes(*one, job="1")
    check_outcomes(*other, job="2")


def test_a_program_that_says_nothing_is_left_alone(monkeypatch, addresses):
    monkeypatch.setattr(rendezvous, "_READ_TIMEOUT_S", 0.3)
    with socket.create_server(("", 0)) as mute:
        contacts = [f"127.0.0.1:{mute.getsockname()[1]}", addresses[0]]
        check_outcomes(*start_under_slurm(2, contacts), job="7")


def test_a_chief_that_ends_while_the_others_wait(addresses):
    """It is not waited for any longer."""

    def end_after_greeting(server):
        connection, _ = server.accept()
        with connection, connection.makefile("rb") as stream:
            job = json.loads(stream.readline())["job"]
            connection.sendall(json.dumps({"job": job}).encode() + b"\n")

    topology = Topology("tf_config", 1, 2, addresses=tuple(addresses[:2]))
    with socket.create_server(("127.0.0.1", int(addresses[0].rpartition(":")[2]))) as server:
        threading.Thread(target=end_after_greeting, args=[server]).start()
        with pytest.raises(UserError, match=rf"^rank 0 \({addresses[0]}\) is gone: it ended before all had come"):
            exchange("x", topology=topology, timeout_s=300)


def test_a_missing_rank_of_slurm_is_named_with_its_node(addresses):
    topology = Topology("slurm", 0, 2, hosts=("127.0.0.1", "far"), contacts=(addresses[0],), step="7")
    with pytest.raises(UserError, match=r"^rank 1 \(far\) did not come within 0 s"):
        exchange("x", topology=topology, timeout_s=0.3)


def test_a_free_port_is_held_and_given_back():
    with hold_free_port() as held, pytest.raises(OSError):
        port = held.getsockname()[1]
        socket.create_server(("", port))
    socket.create_server(("", port)).close()


def test_over_horovodruns_store():
    """The real store, as horovodrun serves it."""
    http_server = pytest.importorskip("horovod.runner.http.http_server", exc_type=ImportError)
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts

    server = http_server.RendezvousServer()
    port = server.start()
    server.init(get_host_assignments(parse_hosts("localhost:3"), 3))
    try:
        outcomes = {}

        def one(rank, delay_s, timeout_s=20.0, world_size=3):
            time.sleep(delay_s)
            topology = Topology("horovod", rank=rank, world_size=world_size, store=f"127.0.0.1:{port}")
            try:
                outcomes[rank] = exchange(f"I am {rank}", topology=topology, timeout_s=timeout_s)
            except UserError as error:
                outcomes[rank] = str(error)

        threads = [threading.Thread(target=one, args=[rank, rank * 0.5]) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert outcomes == ALL
        one(1, 0, timeout_s=0.5, world_size=5)
        assert outcomes[1].startswith("rank 3, rank 4 did not come within 0 s")
    finally:
        server.stop()
