import json
import re
import socket
import threading
import time

import pytest
from jobs import free_ports

from mnist_dist import rendezvous
from mnist_dist.errors import UserError
from mnist_dist.rendezvous import RankTaken, exchange, hold_free_port, hold_own_port, listen, serving_addresses
from mnist_dist.topology import Topology, split_address


@pytest.fixture(params=["127.0.0.1", "[::1]"])
def addresses(request) -> list[str]:
    return [f"{request.param}:{port}" for port in free_ports(3)]


@pytest.fixture
def held(monkeypatch):
    """Hold the port of a rank, as its process does; what is held when the test ends is let go."""
    monkeypatch.setattr(rendezvous, "_own_port", None)
    yield hold_own_port
    if rendezvous._own_port:
        rendezvous._own_port.end().close()


def topology_of(rank, addresses) -> Topology:
    return Topology("tf_config", rank=rank, world_size=len(addresses), addresses=tuple(addresses))


def start(ranks, addresses, timeout_s, delays=None):
    """Let these ranks exchange their names; the outcome of each is what it got, or its error.

    A spare process of rank 1 is 101.
    """
    outcomes = {}

    def one(rank):
        time.sleep((delays or {}).get(rank, 0))
        topology = topology_of(rank % 100, addresses)
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
        stranger = socket.create_connection(split_address(addresses[0]))
        stranger.sendall(words)
        silent.append(stranger)

    threading.Thread(target=knock).start()
    assert start([0, 1, 2], addresses, 20, {1: 1.0, 2: 1.0}) == ALL
    silent[0].close()


@pytest.mark.parametrize("host", ["", "127.0.0.1", "::1"])
def test_a_port_in_use_is_an_answer(host, addresses, held, monkeypatch):
    monkeypatch.setattr(rendezvous, "_PATIENCE_S", 0.5)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with (
        socket.create_server((host, split_address(addresses[0])[1]), family=family),
        pytest.raises(UserError, match="another program has this port; end it, or give rank 0 another") as error,
    ):
        held(topology_of(0, addresses))
    assert str(error.value).startswith(f"{addresses[0]}: cannot listen there (Address already in use)")


def test_a_held_port_is_no_one_elses_but_the_servers_that_shares_it(addresses, held):
    """Not even for the moment in which TensorFlow's server takes over."""
    topology = Topology("tf_config", 0, 2, addresses=tuple(addresses[:2]))
    held(topology)
    other = threading.Thread(target=lambda: meet(Topology("tf_config", 1, 2, addresses=tuple(addresses[:2]))))
    other.start()
    port = split_address(addresses[0])[1]
    dual = {"family": socket.AF_INET6, "dualstack_ipv6": True}
    exchange("", topology=topology, timeout_s=20)
    with serving_addresses(topology, timeout_s=20) as told:
        assert told == addresses[:2]
        for place, options in ((("", port), {}), (("127.0.0.1", port), {}), (("::", port), dual)):
            with pytest.raises(OSError, match="in use"):
                socket.create_server(place, **options)
        server = socket.create_server(("::", port), reuse_port=True, **dual)
    with server, socket.create_connection(split_address(addresses[0])):
        server.accept()[0].close()
    other.join(20)


def meet(topology) -> None:
    """Rank 1's part."""
    exchange("", topology=topology, timeout_s=20)
    exchange(topology.addresses[1], topology=topology, timeout_s=20, topic="addresses")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_spare_process_at_the_same_address(rank, addresses, held):
    """As long as the other waits, or loads what it needs, it says so itself."""
    held(topology_of(rank, addresses))
    with pytest.raises(RankTaken, match=rf"^rank {rank} is taken: process \d+ on .+ has it; give each .* index in TF_"):
        hold_own_port(topology_of(rank, addresses))


def test_a_spare_process_elsewhere(addresses):
    """Where its own address is free it hears from rank 0; the others do not notice it."""
    outcomes = start([0, 1, 101, 2], addresses, 20, {101: 0.5, 2: 1.5})
    spare = outcomes.pop(101)
    assert spare.startswith("rank 1 is taken: process ")
    assert outcomes == ALL


def test_a_spare_process_that_comes_when_all_have_met(addresses, held):
    held(topology_of(0, addresses))
    assert start([0, 1, 2], addresses, 20) == ALL
    started = time.monotonic()
    assert start([1], addresses, 20)[1].startswith("rank 1 is taken: process ")
    assert time.monotonic() - started < 2


def test_a_spare_process_that_comes_when_tensorflow_serves(addresses, monkeypatch):
    """A real server of TensorFlow, which takes 30 s of `timeout_s` otherwise, and is waited for if it ends."""
    import tensorflow as tf

    monkeypatch.setattr(rendezvous, "_ENDING_S", 0.5)
    server = tf.distribute.Server({"worker": addresses[:1]}, job_name="worker", task_index=0)
    assert server.target
    started = time.monotonic()
    text = start([1], addresses, 30)[1]
    assert text.startswith(f"rank 1 is taken: the job of rank 0 ({addresses[0]}) has started")
    with pytest.raises(UserError, match=r"^rank 0 is taken: a training that runs already has "):
        hold_own_port(topology_of(0, addresses))
    assert time.monotonic() - started < 10


def test_a_process_of_a_job_of_another_size(addresses, held):
    held(topology_of(0, addresses))
    text = start([1], addresses[:2], 20)[1]
    assert text.startswith(f"{addresses[0]}: process ")
    assert "of another job with 3 processes, not the 2 that TF_CONFIG names" in text
    with pytest.raises(UserError, match=r"cannot listen there .*: a process of another job has this port"):
        hold_own_port(topology_of(0, addresses[:2]))
    assert start([0, 1, 2], addresses, 20) == ALL


def test_a_process_that_is_started_again_while_the_others_wait(addresses, held):
    held(topology_of(0, addresses))
    connection = rendezvous._greet(addresses[0], "I was 1", topology_of(1, addresses), topic="start")
    assert "is taken" in start([1], addresses, 20)[1]
    connection.close()
    assert start([0, 1, 2], addresses, 20, {2: 1.5}) == ALL  # it comes before the last one does


def start_under_slurm(num_ranks, contacts, *, job="7"):
    """Let so many ranks exchange their names twice, and their addresses in between."""
    outcomes = {}

    def one(rank):
        topology = Topology(
            "slurm", rank, num_ranks, hosts=("127.0.0.1",) * num_ranks, contacts=tuple(contacts), step=job
        )
        first = exchange(f"{job} {rank}", topology=topology, timeout_s=20)
        with serving_addresses(topology, timeout_s=20) as addresses:
            pass
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
    monkeypatch.setattr(rendezvous, "_ANSWER_S", 1.0)
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
    with listen(split_address(addresses[0])[1]) as server:
        threading.Thread(target=end_after_greeting, args=[server]).start()
        with pytest.raises(
            UserError, match=rf"^rank 0 \({re.escape(addresses[0])}\) is gone: it ended before all had come"
        ):
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


@pytest.fixture
def store_port():
    """The real store, as horovodrun serves it."""
    http_server = pytest.importorskip("horovod.runner.http.http_server", exc_type=ImportError)
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts

    server = http_server.RendezvousServer()
    port = server.start()
    server.init(get_host_assignments(parse_hosts("localhost:3"), 3))
    yield port
    server.stop()


def exchange_over_store(port, rank, *, world_size=3, timeout_s=20.0):
    topology = Topology("horovod", rank=rank, world_size=world_size, store=f"127.0.0.1:{port}")
    try:
        return exchange(f"I am {rank}", topology=topology, timeout_s=timeout_s)
    except UserError as error:
        return str(error)


def test_over_horovodruns_store(store_port):
    outcomes = {}

    def one(rank):
        time.sleep(rank * 0.5)
        outcomes[rank] = exchange_over_store(store_port, rank)

    threads = [threading.Thread(target=one, args=[rank]) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert outcomes == ALL
    assert re.match(r"rank 1 is taken: process \d+ on .+ HOROVOD_RANK", exchange_over_store(store_port, 1))
    assert exchange_over_store(store_port, 4, world_size=5) == (
        "rank 0 has HOROVOD_SIZE=3, rank 4 has HOROVOD_SIZE=5; start all processes with one horovodrun"
    )


def test_who_is_missing_in_horovodruns_store(store_port):
    text = exchange_over_store(store_port, 1, world_size=100_000, timeout_s=0.5)
    assert text.startswith("rank 0, rank 2, rank 3, rank 4, rank 5, rank 6, rank 7, rank 8 and 99991 more did not come")
