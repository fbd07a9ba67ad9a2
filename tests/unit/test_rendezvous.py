import contextlib
import json
import re
import socket
import threading
import time

import pytest
from support.launchers import free_ports, horovodrun

from mnist_dist.base.errors import UserError
from mnist_dist.launch import gate, rendezvous, visit
from mnist_dist.launch.address import split_address
from mnist_dist.launch.gate import Gate
from mnist_dist.launch.ports import hold_free_port, listen
from mnist_dist.launch.reception import RankTaken, Reception
from mnist_dist.launch.rendezvous import Rendezvous
from mnist_dist.launch.secret import meeting_key
from mnist_dist.launch.topology import HorovodRun, Step, TFConfig, Topology


@pytest.fixture(params=["127.0.0.1", "[::1]"])
def addresses(request) -> list[str]:
    return [f"{request.param}:{port}" for port in free_ports(3)]


@pytest.fixture
def hold():
    """Hold the port of a rank, as its process does; what is still held when the test ends is released."""
    with contextlib.ExitStack() as stack:

        def hold(rank, addresses, **kwargs) -> Rendezvous:
            holder = stack.enter_context(rendezvous_of(rank, addresses, **kwargs))
            holder.hold_own_port()
            return holder

        yield hold


def topology_of(rank, addresses) -> Topology:
    return Topology(TFConfig(tuple(addresses)), rank=rank, world_size=len(addresses))


def rendezvous_of(rank, addresses, *, timeout_s=20.0) -> Rendezvous:
    return Rendezvous(topology_of(rank, addresses), timeout_s=timeout_s)


def start(ranks, addresses, timeout_s, delays=None, *, chief=None):
    """Let these ranks exchange their names; the outcome of each is what it got or its error.

    101 is a spare process of rank 1. `chief` is rank 0's side if it already holds its port.
    """
    outcomes = {}

    def one(rank):
        time.sleep((delays or {}).get(rank, 0))
        own = chief if rank == 0 and chief else rendezvous_of(rank % 100, addresses, timeout_s=timeout_s)
        try:
            outcomes[rank] = own.exchange(f"I am {rank}")
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
    assert Rendezvous(Topology(), timeout_s=1).exchange("alone") == ["alone"]


@pytest.mark.parametrize("late", [0, 1, 2])
def test_all_come_even_if_seconds_apart(late, addresses):
    assert start([0, 1, 2], addresses, 20, {late: 0.6}) == ALL


def test_the_missing_one_is_named_to_all(addresses):
    outcomes = start([0, 1], addresses, 0.6)
    for rank in (0, 1):
        assert outcomes[rank].startswith(f"rank 2 ({addresses[2]}) did not come within 1 s")


def collect(starting, addresses, **options):
    """Let these ranks collect their names; what each gets."""
    outcomes = {}

    def one(rank):
        with rendezvous_of(rank, addresses, timeout_s=20) as own:
            outcomes[rank] = own.collect(f"I am {rank}", topic="names", **options)

    threads = [threading.Thread(target=one, args=[rank]) for rank in starting]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return outcomes


BOTH = {0: "I am 0", 1: "I am 1"}


def test_those_that_come_get_what_there_is(addresses):
    """Without an error for the one that is missing."""
    assert collect([0, 1], addresses, timeout_s=0.6) == {0: BOTH, 1: BOTH}


def test_a_rank_that_is_known_to_be_missing_is_not_waited_for(addresses):
    started_s = time.monotonic()
    assert collect([0, 1], addresses, ranks=[0, 1], timeout_s=60) == {0: BOTH, 1: BOTH}
    assert time.monotonic() - started_s < 30


def test_without_rank_0_there_is_only_oneself(addresses):
    assert collect([1, 2], addresses, timeout_s=0.6) == {1: {1: "I am 1"}, 2: {2: "I am 2"}}


def test_a_missing_chief_is_named(addresses):
    assert start([1], addresses, 0.6)[1].startswith(f"rank 0 ({addresses[0]}) did not come within 1 s")


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"[1, 2]\n",
        b'{"rank": 1}\n',
        b'{"job": "x", "rank": 1, "text": ""}\n',
        b"[" * 100_000 + b"\n",
        b"",
    ],
    ids=lambda words: repr(words[:20]),
)
def test_strangers_are_ignored(words, addresses, monkeypatch):
    """Even one that says nothing at all and stays."""
    monkeypatch.setattr(gate, "NEWCOMER_S", 0.3)
    silent = []

    def knock():
        time.sleep(0.1)
        stranger = socket.create_connection(split_address(addresses[0]))
        stranger.sendall(words)
        silent.append(stranger)

    threading.Thread(target=knock).start()
    assert start([0, 1, 2], addresses, 20, {1: 0.5, 2: 0.5}) == ALL
    silent[0].close()


@pytest.mark.parametrize(("words", "every_s"), [(b"x", 0.1), (b"x" * 2**20, 0)])
def test_strangers_whose_lines_never_end(words, every_s, addresses, monkeypatch):
    """They drip or flood; neither keeps the ranks waiting or fills the memory."""
    monkeypatch.setattr(gate, "NEWCOMER_S", 0.3)
    sent = []

    def knock():
        with socket.create_connection(split_address(addresses[0])) as stranger, contextlib.suppress(OSError):
            for _ in range(100):
                stranger.sendall(words)
                sent.append(len(words))
                time.sleep(every_s)

    stranger = threading.Thread(target=knock)
    threading.Timer(0.1, stranger.start).start()
    assert start([0, 1, 2], addresses, 20, {1: 0.5, 2: 0.5}) == ALL
    stranger.join(30)
    assert not stranger.is_alive()
    assert len(sent) < 50  # by then nobody was reading it any more


@pytest.mark.parametrize("host", ["", "127.0.0.1", "::1"])
def test_a_port_in_use_is_reported(host, addresses, hold, monkeypatch):
    monkeypatch.setattr(visit, "_PATIENCE_S", 0.5)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with (
        socket.create_server((host, split_address(addresses[0])[1]), family=family),
        pytest.raises(UserError, match="another program has this port; end it, or give rank 0 another") as error,
    ):
        hold(0, addresses)
    assert str(error.value).startswith(f"{addresses[0]}: cannot listen there (Address already in use)")


def test_a_held_port_is_available_only_to_the_server_that_shares_it(addresses, hold):
    """Even at the moment when TensorFlow's server takes over."""
    chief = hold(0, addresses[:2])
    other = threading.Thread(target=meet, args=[rendezvous_of(1, addresses[:2]), addresses[1]])
    other.start()
    port = split_address(addresses[0])[1]
    dual = {"family": socket.AF_INET6, "dualstack_ipv6": True}
    chief.exchange("")
    with chief.serving_addresses() as told:
        assert told == addresses[:2]
        for place, options in ((("", port), {}), (("127.0.0.1", port), {}), (("::", port), dual)):
            with pytest.raises(OSError, match="in use"):
                socket.create_server(place, **options)
        server = socket.create_server(("::", port), reuse_port=True, **dual)
    with server, socket.create_connection(split_address(addresses[0])):
        server.accept()[0].close()
    other.join(20)


def meet(own: Rendezvous, address) -> None:
    """Rank 1's part."""
    own.exchange("")
    own.exchange(address, topic="addresses")


def test_a_held_port_is_given_back(addresses):
    host, port = split_address(addresses[0])
    with rendezvous_of(0, addresses) as own:
        own.hold_own_port()
        own.hold_own_port()  # it has the port already
        for other in (host, "127.0.0.9", "0.0.0.0", "::"):
            with pytest.raises(OSError, match="in use"):
                listen(other, port)
    listen("::", port).close()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_spare_process_at_the_same_address(rank, addresses, hold):
    """While the other waits or loads what it needs, it reports this itself."""
    hold(rank, addresses)
    with pytest.raises(RankTaken, match=rf"^rank {rank} is taken: process \d+ on .+ has it; give each .* index in TF_"):
        hold(rank, addresses)


def test_a_spare_process_elsewhere(addresses):
    """If its own address is free, it hears from rank 0; the others do not notice it."""
    outcomes = start([0, 1, 101, 2], addresses, 20, {101: 0.3, 2: 1.0})
    spare = outcomes.pop(101)
    assert spare.startswith("rank 1 is taken: process ")
    assert outcomes == ALL


def test_a_spare_process_that_comes_when_all_have_met(addresses, hold):
    assert start([0, 1, 2], addresses, 20, chief=hold(0, addresses)) == ALL
    started = time.monotonic()
    assert start([1], addresses, 20)[1].startswith("rank 1 is taken: process ")
    assert time.monotonic() - started < 15  # it does not wait for the time-out


def test_a_spare_process_that_comes_when_tensorflow_serves(addresses, hold, monkeypatch):
    """A real TensorFlow server, which otherwise takes 30 s of `timeout_s`, and is waited for if it ends."""
    import tensorflow as tf

    monkeypatch.setattr(visit, "_ENDING_S", 0.5)
    server = tf.distribute.Server({"worker": addresses[:1]}, job_name="worker", task_index=0)
    assert server.target
    started = time.monotonic()
    text = start([1], addresses, 30)[1]
    assert text.startswith(f"rank 1 is taken: the job of rank 0 ({addresses[0]}) has already started")
    with pytest.raises(UserError, match=r"^rank 0 is taken: a running training has "):
        hold(0, addresses)
    assert time.monotonic() - started < 25  # it does not wait for the time-out


def test_a_process_of_a_job_of_another_size(addresses, hold):
    chief = hold(0, addresses)
    text = start([1], addresses[:2], 20)[1]
    assert text.startswith(f"{addresses[0]}: process ")
    assert "of another job with 3 processes, not the 2 that TF_CONFIG names" in text
    with pytest.raises(UserError, match=r"cannot listen there .*: a process of another job has this port"):
        hold(0, addresses[:2])
    assert start([0, 1, 2], addresses, 20, chief=chief) == ALL


OTHER_SECRET = (
    "a process of mnist_dist is there, with another secret than rank 1: it is another job's, or set MNIST_DIST_SECRET "
    "to the same value for all processes of the job"
)


@pytest.fixture
def visitors_have_another_secret(monkeypatch):
    monkeypatch.setattr(visit, "meeting_key", lambda topology, address: b"another")


def test_a_process_with_another_secret(addresses, monkeypatch, visitors_have_another_secret):
    """It hears that soon, and rank 0 at the end."""
    monkeypatch.setattr(visit, "_ENDING_S", 0.5)
    outcomes = start([0, 1], addresses[:2], 4)
    assert re.fullmatch(rf"{re.escape(addresses[0])}: {OTHER_SECRET}", outcomes[1])
    assert outcomes[0].startswith(
        f"rank 1 ({addresses[1]}) did not come within 4 s (rank 0 listened at {addresses[0]}; somebody with another "
    )


def test_a_spare_process_with_another_secret(addresses, hold, visitors_have_another_secret):
    hold(0, addresses)
    with pytest.raises(UserError, match=r"cannot listen there .*: a process with another secret has this port; end it"):
        hold(0, addresses)


def test_a_task_with_another_secret(visitors_have_another_secret):
    """Another job may have the first address, so it waits for rank 0 at the next one."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    outcomes = {}

    def one(rank):
        try:
            rendezvous_under_slurm(rank, ["127.0.0.1"] * 2, addresses, timeout_s=1.5 - rank / 2).exchange("x")
        except UserError as error:
            outcomes[rank] = str(error)

    threads = [threading.Thread(target=one, args=[rank]) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert outcomes[1].startswith(
        f"rank 0 (127.0.0.1) did not come within 1 s (at {addresses[0]} is a process with another secret: it is "
        "another job's, or set MNIST_DIST_SECRET to the same value for all processes of the job); start all 2 "
    )
    assert "somebody with another secret knocked" in outcomes[0]


def test_nobody_can_pass_on_what_he_is_asked(monkeypatch):
    """Who is first at rank 0's address cannot let rank 1 talk to rank 2, which listens at the same port of its host."""
    monkeypatch.setattr(visit, "_ENDING_S", 0.5)
    (port,) = free_ports(1)
    addresses = [f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}", f"127.0.0.9:{port}"]
    own = topology_of(2, addresses)
    rank_2 = Reception(listen("127.0.0.9", port), own, key=meeting_key(own, addresses[2]))
    with passing_on(addresses[0], to=addresses[2]) as said:
        assert OTHER_SECRET in start([1], addresses, 20)[1]
    rank_2.end()
    assert said and not any(b"I am 1" in words for words in said)


@contextlib.contextmanager
def passing_on(address, *, to):
    """A stranger between a visitor and a gate, who passes on what both say; yields what that is."""
    said, threads = [], []

    def pass_on(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                said.append(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def serve():
        with contextlib.suppress(OSError):
            while True:
                visitor, behind = server.accept()[0], socket.create_connection(split_address(to))
                pairs = (visitor, behind), (behind, visitor)
                threads.extend(threading.Thread(target=pass_on, args=pair) for pair in pairs)
                for thread in threads[-2:]:
                    thread.start()

    with listen(*split_address(address)) as server:
        threads.append(threading.Thread(target=serve))
        threads[0].start()
        try:
            yield said
        finally:
            server.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join(20)


def test_the_meeting_is_at_no_other_address(addresses, hold):
    """While the port is reserved on all interfaces."""
    hold(0, addresses)
    port = split_address(addresses[0])[1]
    for other in {"127.0.0.1", "127.0.0.9", "::1"} - {split_address(addresses[0])[0]}:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((other, port))


@pytest.mark.parametrize("last", [1, 2])
def test_a_process_that_is_started_again_while_the_others_wait(last, addresses, hold):
    """Whether it returns before or after the last of the others: a process that has gone is not counted."""
    chief = hold(0, addresses)
    own = topology_of(1, addresses)
    wire = visit.knock(addresses[0], "I was 1", own, key=meeting_key(own, addresses[0]), topic="start")
    assert "is taken" in start([1], addresses, 20)[1]
    wire.close()
    assert start([0, 1, 2], addresses, 20, {last: 0.6}, chief=chief) == ALL


def rendezvous_under_slurm(rank, hosts, meeting_addresses, *, job="7", timeout_s=20.0) -> Rendezvous:
    topology = Topology(Step(tuple(hosts), tuple(meeting_addresses), job), rank, len(hosts))
    return Rendezvous(topology, timeout_s=timeout_s)


def start_under_slurm(num_ranks, meeting_addresses, *, job="7"):
    """Let that many ranks exchange their names twice, and their addresses in between."""
    outcomes = {}

    def one(rank):
        own = rendezvous_under_slurm(rank, ["127.0.0.1"] * num_ranks, meeting_addresses, job=job)
        first = own.exchange(f"{job} {rank}")
        with own.serving_addresses() as addresses:
            pass
        outcomes[rank] = (first, addresses, own.exchange(f"{job} {rank} again", topic="x"))

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


def test_two_jobs_with_the_same_meeting_addresses_do_not_mix():
    shared = [f"127.0.0.1:{port}" for port in free_ports(3)]
    one, other = start_under_slurm(3, shared, job="1"), start_under_slurm(3, shared, job="2")
    check_outcomes(*one, job="1")
    check_outcomes(*other, job="2")


def test_a_task_whose_rank_0_is_missing_gets_what_there_is(visitors_have_another_secret):
    """Even if another user's job is at one of its addresses."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    other = rendezvous_under_slurm(0, ["127.0.0.1"] * 2, addresses[:1]).topology
    at_first = Reception(listen(*split_address(addresses[0])), other, key=meeting_key(other, addresses[0]))
    own = rendezvous_under_slurm(1, ["127.0.0.1"] * 2, addresses)
    assert own.collect("I am 1", topic="names", timeout_s=0.6) == {1: "I am 1"}
    assert at_first.num_refused
    at_first.end()


def test_programs_that_say_nothing_are_left_alone(addresses):
    """Even at several addresses, they do not use up the time: 15 s for each would be too long."""
    with socket.create_server(("", 0)) as one, socket.create_server(("", 0)) as other:
        places = [*(f"127.0.0.1:{mute.getsockname()[1]}" for mute in (one, other)), addresses[0]]
        chief, own = (rendezvous_under_slurm(rank, ["127.0.0.1"] * 2, places) for rank in range(2))
        waiting = threading.Thread(target=chief.exchange, args=["I am 0"])
        waiting.start()
        assert own.exchange("I am 1") == ["I am 0", "I am 1"]
        waiting.join(30)


def test_a_program_that_says_nothing_is_left_alone(monkeypatch, addresses):
    # Short, but long enough for threads of ours that a busy machine holds up.
    monkeypatch.setattr(visit, "READ_TIMEOUT_S", 1.0)
    monkeypatch.setattr(visit, "_GREETING_S", 2.0)
    with socket.create_server(("", 0)) as mute:
        meeting_addresses = [f"127.0.0.1:{mute.getsockname()[1]}", addresses[0]]
        check_outcomes(*start_under_slurm(2, meeting_addresses), job="7")


def test_a_chief_that_ends_while_the_others_wait(addresses):
    """The others stop waiting for it."""
    with (
        greeting_and_ending(addresses),
        pytest.raises(UserError, match=rf"^rank 0 \({re.escape(addresses[0])}\) is gone: it ended before all had come"),
    ):
        rendezvous_of(1, addresses[:2], timeout_s=300).exchange("x")


def test_what_the_chief_says_may_come_in_one_chunk(addresses):
    """Its greeting, and what all have sent."""
    with greeting_and_ending(addresses, {"texts": {"0": "I am 0", "1": "x"}}):
        assert rendezvous_of(1, addresses[:2]).exchange("x") == ["I am 0", "x"]


@contextlib.contextmanager
def greeting_and_ending(addresses, *answers):
    """Do what rank 0 does, all in one chunk."""

    def admit(wire, message):
        greeting = {"job": message["job"]}
        with wire.connection as connection:
            connection.sendall(b"".join(json.dumps(answer).encode() + b"\n" for answer in (greeting, *answers)))

    server = listen(*split_address(addresses[0]))
    own = Gate(server, meeting_key(topology_of(0, addresses), addresses[0]), admit=admit, expected=1)
    yield
    own.close()


def test_a_missing_rank_of_slurm_is_named_with_its_node(addresses):
    chief = rendezvous_under_slurm(0, ["127.0.0.1", "far"], addresses[:1], timeout_s=0.3)
    with pytest.raises(UserError, match=r"^rank 1 \(far\) did not come within 0 s"):
        chief.exchange("x")


def test_a_port_is_given_back_when_the_others_do_not_come(addresses, monkeypatch):
    held = hold_free_port()
    monkeypatch.setattr(rendezvous, "hold_free_port", lambda: held)
    chief = rendezvous_under_slurm(0, ["127.0.0.1", "far"], addresses[:1], timeout_s=0.3)
    with pytest.raises(UserError, match="did not come"), chief.serving_addresses():
        pass
    assert held.fileno() == -1


def test_a_free_port_is_held_and_given_back():
    with hold_free_port() as held, pytest.raises(OSError):
        port = held.getsockname()[1]
        socket.create_server(("", port))
    socket.create_server(("", port)).close()


@pytest.fixture
def store_port():
    """The real store, as horovodrun serves it."""
    horovodrun()  # if it is missing: skips, or fails in CI
    from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
    from horovod.runner.http import http_server

    server = http_server.RendezvousServer()
    port = server.start()
    server.init(get_host_assignments(parse_hosts("localhost:3"), 3))
    yield port
    server.stop()


def exchange_over_store(port, rank, *, world_size=3, timeout_s=20.0):
    topology = Topology(HorovodRun(f"127.0.0.1:{port}"), rank=rank, world_size=world_size)
    try:
        return Rendezvous(topology, timeout_s=timeout_s).exchange(f"I am {rank}")
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


def test_several_topics_over_horovodruns_store(store_port):
    """The same ranks meet again; a rank that is not waited for may be missing."""
    outcomes = {}

    def one(rank):
        topology = Topology(HorovodRun(f"127.0.0.1:{store_port}"), rank=rank, world_size=3)
        own = Rendezvous(topology, timeout_s=20)
        first = own.collect(f"I am {rank}", topic="first", ranks=[0, 1])
        outcomes[rank] = (first, own.collect(f"{rank} again", topic="second", ranks=[0, 1]))

    threads = [threading.Thread(target=one, args=[rank]) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert outcomes[0] == outcomes[1] == ({0: "I am 0", 1: "I am 1"}, {0: "0 again", 1: "1 again"})


def test_who_is_missing_in_horovodruns_store(store_port):
    text = exchange_over_store(store_port, 1, world_size=100_000, timeout_s=0.5)
    assert text.startswith("rank 0, rank 2, rank 3, rank 4, rank 5, rank 6, rank 7, rank 8 and 99991 more did not come")
