"""Who gets through a gate, and who does not, whatever else knocks at it."""

import contextlib
import errno
import queue
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from mnist_dist.base.wire import MAX_GREETING, MAX_MESSAGE, Garbled
from mnist_dist.launch import gate
from mnist_dist.launch.gate import Gate, Refused, enter
from mnist_dist.launch.ports import listen

KEY, OTHER = b"the key of this job", b"the key of another one"


@pytest.fixture
def open_gate():
    """Open gates; returns the address of each, and the queue of those that have come through."""
    gates = []

    def open_one(key=KEY, **kwargs):
        came = queue.Queue()
        server = listen("127.0.0.1", 0)
        address = server.getsockname()
        gates.append(Gate(server, key, admit=lambda wire, message: came.put((wire, message)), expected=2, **kwargs))
        return address, came

    yield open_one
    for one in gates:
        one.close()


def is_ended(connection, *, timeout_s=20) -> bool:
    """Whether the gate ends a connection in time, after the greeting."""
    connection.settimeout(timeout_s)
    try:
        while connection.recv(4096):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def knock(address, *, key=KEY, message=None, timeout_s=20):
    """Come as a process of ours does."""
    wire = enter(socket.create_connection(address, timeout=timeout_s), key, timeout_s=timeout_s)
    wire.send(message or {"rank": 1})
    return wire


def test_one_of_ours_comes_through_with_all_that_it_says(open_gate):
    address, came = open_gate()
    wire = enter(socket.create_connection(address), KEY, timeout_s=20)
    wire.connection.sendall(b'{"rank": 1}\n{"more": 2}\n{"half"')
    theirs, message = came.get(timeout=20)
    assert message == {"rank": 1}
    assert theirs.arrived() == [{"more": 2}]
    wire.connection.sendall(b": 3}\n")
    assert theirs.receive(timeout_s=20) == {"half": 3}
    theirs.send({"answer": 4})
    assert wire.receive(timeout_s=20) == {"answer": 4}


def test_a_long_first_message(open_gate):
    address, came = open_gate()
    knock(address, message={"text": "x" * 10**6})
    theirs, message = came.get(timeout=20)
    assert len(message["text"]) == 10**6
    assert theirs.max_bytes == MAX_MESSAGE  # the bound of first messages is theirs alone


GARBAGE = [
    b"",
    b"\0" * 200,
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b"x" * 100,
    b'{"rank": 1}\n' * 10,
    b"mnist\0\r\n" + b"x" * 64 + b'{"rank": 1}\n',
    b"\x16\x03\x01\x02\x00\x01\x00" * 30,
]


@pytest.mark.parametrize("words", GARBAGE, ids=lambda words: repr(words[:12]))
@pytest.mark.parametrize("is_patient", [True, False], ids=["stays", "leaves"])
def test_a_stranger_who_comes_first(words, is_patient, open_gate):
    """Whatever it says, and whether it stays or not."""
    address, came = open_gate()
    with socket.create_connection(address) as stranger:
        stranger.sendall(words)
        if not is_patient:
            stranger.close()
        knock(address)
        assert came.get(timeout=20)[1] == {"rank": 1}
    assert came.empty()


@pytest.mark.parametrize("words", GARBAGE[1:], ids=lambda words: repr(words[:12]))
def test_garbage_ends_the_connection_at_once(words, open_gate, monkeypatch):
    """And without a word but the greeting."""
    monkeypatch.setattr(gate, "NEWCOMER_S", 1000.0)
    address, came = open_gate()
    with socket.create_connection(address) as stranger:
        stranger.sendall(words)
        assert is_ended(stranger)
    assert came.empty()


def test_a_stranger_who_resets(open_gate):
    address, came = open_gate()
    for _ in range(50):
        with socket.create_connection(address) as stranger:
            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    knock(address)
    assert came.get(timeout=20)[1] == {"rank": 1}


@pytest.mark.parametrize("number", [200, 600])
def test_many_silent_ones(number, open_gate, monkeypatch):
    """Fewer and more than may wait: the oldest have to go, and those who have the key come through."""
    monkeypatch.setattr(gate, "NEWCOMER_S", 1000.0)
    address, came = open_gate()
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(address)) for _ in range(number)]
        wires = [knock(address, message={"rank": rank}) for rank in range(20)]
        assert {came.get(timeout=20)[1]["rank"] for _ in wires} == set(range(20))
        # Each has been greeted; to those that had to go, nothing more is said.
        ended = sum(is_ended_now(one) for one in silent)
        assert number <= gate.MAX_NEWCOMERS or number - gate.MAX_NEWCOMERS - 2 <= ended < number
        assert number > gate.MAX_NEWCOMERS or ended == 0
    assert came.empty()


def test_one_that_has_proved_itself_does_not_have_to_go(open_gate, monkeypatch):
    """Whatever comes between its proof and its first message."""
    monkeypatch.setattr(gate, "NEWCOMER_S", 1000.0)
    monkeypatch.setattr(gate, "MAX_NEWCOMERS", 4)
    address, came = open_gate()
    ours = enter(socket.create_connection(address), KEY, timeout_s=20)
    with silent_ones(address, 8) as silent:
        assert is_ended_now(silent[0]) and not is_ended_now(silent[-1])
        ours.send({"rank": 1})
        assert came.get(timeout=20)[1] == {"rank": 1}


@contextlib.contextmanager
def silent_ones(address, number):
    """Connections that a gate has greeted, one after the other."""
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(address, timeout=20)) for _ in range(number)]
        for one in silent:
            assert one.recv(100).startswith(b"mnist")
        yield silent


class ShortOfFiles(socket.socket):
    """A server whose process may open no more files, once."""

    has_files = True

    def accept(self):
        if self.has_files:
            return super().accept()
        self.has_files = True
        raise OSError(errno.EMFILE, "Too many open files")


def test_no_more_files(monkeypatch):
    """Then the oldest of those that have proved nothing has to go, too."""
    monkeypatch.setattr(gate, "NEWCOMER_S", 1000.0)
    came, server = queue.Queue(), ShortOfFiles(fileno=listen("127.0.0.1", 0).detach())
    address = server.getsockname()
    own = Gate(server, KEY, admit=lambda wire, message: came.put(message), expected=2)
    ours = enter(socket.create_connection(address), KEY, timeout_s=20)
    with silent_ones(address, 2) as silent:
        server.has_files = False
        ours_too = enter(socket.create_connection(address), KEY, timeout_s=20)
        assert is_ended_now(silent[0]) and not is_ended_now(silent[1])
        for wire in (ours, ours_too):
            wire.send({"rank": 1})
            assert came.get(timeout=20) == {"rank": 1}
    own.close()


def is_ended_now(connection) -> bool:
    return is_ended(connection, timeout_s=0.001)


def test_a_flood_that_never_stops(open_gate):
    """Threads that connect as fast as they can, and say nothing, or anything."""
    address, came = open_gate()
    is_over = threading.Event()

    def flood(words):
        held = []
        while not is_over.is_set():
            with contextlib.suppress(OSError):
                held.append(socket.create_connection(address, timeout=5))
                held[-1].sendall(words)
            if len(held) > 100:
                held.pop(0).close()

    floods = [threading.Thread(target=flood, args=[words]) for words in (b"", b"mnist\0\r\n", b"x" * 100)]
    for one in floods:
        one.start()
    try:
        for rank in range(20):
            for _ in range(50):  # as ranks do, who are not discouraged
                with contextlib.suppress(OSError, Garbled):
                    knock(address, message={"rank": rank}, timeout_s=5)
                    break
        assert sorted(came.get(timeout=20)[1]["rank"] for _ in range(20)) == list(range(20))
    finally:
        is_over.set()
        for one in floods:
            one.join(30)


@pytest.mark.parametrize("key", [KEY, None], ids=["ours", "a stranger"])
def test_one_who_drips(key, open_gate, monkeypatch):
    """A byte now and then, of a proof or of a first message, does not give it more time."""
    monkeypatch.setattr(gate, "NEWCOMER_S", 0.5)
    address, came = open_gate()
    with socket.create_connection(address) as slow:
        if key:
            enter(slow, key, timeout_s=20)
        dripping = threading.Thread(target=drip, args=[slow, b'{"a":' if key else gate._MAGIC])
        dripping.start()
        knock(address)  # meanwhile
        assert came.get(timeout=20)[1] == {"rank": 1}
        assert is_ended(slow)
        dripping.join(30)
        assert not dripping.is_alive()
    assert came.empty()


def drip(connection, words) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(words)
        for _ in range(10_000):
            connection.sendall(b" ")
            time.sleep(0.1)


def test_half_a_line_and_an_end(open_gate):
    address, came = open_gate()
    with socket.create_connection(address) as half:
        enter(half, KEY, timeout_s=20)
        half.sendall(b'{"rank": ')
    knock(address, message={"rank": 2})
    assert came.get(timeout=20)[1] == {"rank": 2}
    assert came.empty()


def test_a_first_message_that_never_ends(open_gate):
    """Even from one who has the key."""
    address, _ = open_gate()
    with socket.create_connection(address) as endless:
        enter(endless, KEY, timeout_s=20)
        sent = 0
        with pytest.raises(ConnectionError):
            while sent < 4 * MAX_GREETING:
                sent += endless.send(b"x" * 2**16)
    assert sent < 2 * MAX_GREETING


def test_a_message_that_is_no_use(open_gate):
    """What `admit` does not like ends this connection, and no other."""

    def admit(wire, message):
        came.put(message["rank"])

    came = queue.Queue()
    server = listen("127.0.0.1", 0)
    own = Gate(server, KEY, admit=admit, expected=2)
    wire = knock(server.getsockname(), message={"no": "rank"})
    assert is_ended(wire.connection)
    knock(server.getsockname())
    assert came.get(timeout=20) == 1
    own.close()


def test_another_key(open_gate):
    address, came = open_gate()
    with pytest.raises(Refused):
        knock(address, key=OTHER)
    assert came.empty()


@pytest.mark.parametrize("key", [KEY, OTHER])
def test_only_processes_with_another_key_are_counted(key, open_gate):
    """A stranger is no reason to tell the user about secrets."""
    server = listen("127.0.0.1", 0)
    own = Gate(server, KEY, admit=lambda wire, message: came.put(message), expected=2)
    came, address = queue.Queue(), server.getsockname()
    for words in GARBAGE:
        with socket.create_connection(address) as stranger:
            stranger.sendall(words if b"mnist" not in words else b"mnist")
    with contextlib.suppress(Refused):
        knock(address, key=key)
    knock(address)
    came.get(timeout=20)
    assert own.num_refused == (key == OTHER)
    own.close()


class Recorded:
    """A connection that keeps what was sent over it."""

    def __init__(self, address):
        self._connection = socket.create_connection(address, timeout=20)
        self.sent = b""

    def sendall(self, data):
        self.sent += data
        self._connection.sendall(data)

    def __getattr__(self, name):
        return getattr(self._connection, name)


def test_what_was_recorded_is_worth_nothing(open_gate):
    """All that one of ours has said, said again: to the same gate, and to that of a later job with the same key."""
    address, came = open_gate()
    recorded = Recorded(address)
    enter(recorded, KEY, timeout_s=20).send({"rank": 1})
    assert came.get(timeout=20)[1] == {"rank": 1}
    for place in (address, open_gate()[0]):
        with socket.create_connection(place) as again:
            again.sendall(recorded.sent)
            assert is_ended(again)
    assert came.empty()


@pytest.mark.parametrize(
    "answer",
    [
        b"\0\0\x12\4",
        b"HTTP/1.1 400 Bad Request\r\n",
        b"mnist\0\r\n" + b"n" * 32 + b"p" * 32,
        b"mnist\0\r\n" + b"n" * 100,
    ],
    ids=lambda answer: repr(answer[:12]),
)
def test_a_listener_that_does_not_prove_itself_hears_nothing(answer, open_gate):
    heard = bytearray()

    def serve():
        connection, _ = server.accept()
        with connection:
            connection.sendall(answer)
            with contextlib.suppress(OSError):
                while data := connection.recv(4096):
                    heard.extend(data)

    with listen("127.0.0.1", 0) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        connection = socket.create_connection(server.getsockname(), timeout=20)
        with connection, pytest.raises(Garbled) as error:
            enter(connection, KEY, timeout_s=20)
        thread.join(30)
    assert error.value.start in answer
    assert b"rank" not in heard and len(heard) <= gate._ANSWER


def test_a_listener_that_says_nothing(open_gate):
    with (
        listen("127.0.0.1", 0) as mute,
        socket.create_connection(mute.getsockname()) as connection,
        pytest.raises(TimeoutError),
    ):
        enter(connection, KEY, timeout_s=0.3)


def test_a_closed_gate(open_gate):
    server = listen("127.0.0.1", 0)
    address = server.getsockname()
    own = Gate(server, KEY, admit=lambda wire, message: None, expected=2)
    with socket.create_connection(address) as waiting:
        assert waiting.recv(5) == b"mnist"
        own.close()
        with pytest.raises(OSError):
            socket.create_connection(address)
        assert is_ended_now(waiting)


def test_a_gate_that_was_held_up_blames_nobody(open_gate, monkeypatch):
    """A library that loads blocks all threads of a process: longer than a newcomer may take."""
    monkeypatch.setattr(gate, "NEWCOMER_S", 20.0)
    skipped_s = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + skipped_s[0], sleep=time.sleep)
    monkeypatch.setattr(gate, "time", clock)
    came, is_held_up = queue.Queue(), threading.Event()

    def admit(wire, message):
        came.put(message["rank"])
        if message["rank"] == 0:
            is_held_up.wait(20)

    server = listen("127.0.0.1", 0)
    own = Gate(server, KEY, admit=admit, expected=2)
    slow = enter(socket.create_connection(server.getsockname()), KEY, timeout_s=20)
    knock(server.getsockname(), message={"rank": 0})
    assert came.get(timeout=20) == 0
    skipped_s[0] = 1000.0
    is_held_up.set()
    knock(server.getsockname(), message={"rank": 2})  # by now the gate has looked at the clock
    assert came.get(timeout=20) == 2
    slow.send({"rank": 1})
    assert came.get(timeout=20) == 1
    own.close()
