"""Messages over a connection, whole or in pieces, and what is not a message."""

import json
import socket
import threading
import time

import pytest

from mnist_dist.base.wire import Garbled, Wire


@pytest.fixture
def ends():
    """Both ends: one reads, a test writes what it likes into the other."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Wire(ours), theirs


def drip(connection, content: bytes, *, every_s: float) -> threading.Thread:
    """Write byte by byte until the other side stops listening."""

    def write():
        for byte in content:
            try:
                connection.sendall(bytes([byte]))
            except OSError:
                return
            time.sleep(every_s)

    thread = threading.Thread(target=write)
    thread.start()
    return thread


def test_messages_arrive_as_they_were_sent(ends):
    wire, theirs = ends
    sent = [{"text": "line\nand \u00fcml\u00e4ut", "numbers": [1, 0.1, None]}, {}]
    for message in sent:
        Wire(theirs).send(message)
    assert [wire.receive(), wire.receive()] == sent


def test_a_message_that_drips_arrives_whole(ends):
    wire, theirs = ends
    writer = drip(theirs, b'{"a": 1}\n', every_s=0.01)
    assert wire.receive(timeout_s=20) == {"a": 1}
    writer.join()


def test_a_message_that_drips_has_only_its_time(ends):
    """Each byte arrives in time; the message does not."""
    wire, theirs = ends
    writer = drip(theirs, b" " * 1000, every_s=0.02)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        wire.receive(timeout_s=0.3)
    assert 0.3 <= time.monotonic() - began < 15  # all of it takes 20 s
    wire.close()
    writer.join()


def test_what_came_before_the_time_was_up_is_kept(ends):
    wire, theirs = ends
    theirs.sendall(b'{"a":')
    with pytest.raises(TimeoutError):
        wire.receive(timeout_s=0.1)
    theirs.sendall(b" 1}\n")
    assert wire.receive(timeout_s=20) == {"a": 1}


@pytest.mark.parametrize("own", [None, 7.0])
@pytest.mark.parametrize("content", [b"{}\n", b"{", b"x\n"])
def test_receiving_leaves_the_timeout_of_sends_alone(content, own, ends):
    """The time left after a late message would hardly be enough for the answer."""
    wire, theirs = ends
    wire.connection.settimeout(own)
    theirs.sendall(content)
    try:
        wire.receive(timeout_s=0.1)
    except (TimeoutError, Garbled):
        assert content != b"{}\n"
    assert wire.connection.gettimeout() == own


def test_two_messages_in_one_chunk(ends):
    wire, theirs = ends
    theirs.sendall(b'{"a": 1}\n{"b": 2}\n{"c":')
    assert wire.receive() == {"a": 1}
    assert wire.arrived() == [{"b": 2}]
    assert wire.arrived() == []
    theirs.sendall(b' 3}\n{"d": 4}\n')
    assert wire.receive_ready() == [{"c": 3}, {"d": 4}]
    theirs.sendall(b'{"e": 5}\n{"f": 6}\n')
    assert [wire.receive(), wire.receive()] == [{"e": 5}, {"f": 6}]


def test_the_first_of_what_is_ready(ends):
    wire, theirs = ends
    theirs.sendall(b'{"a"')
    assert wire.receive_one_ready() is None
    theirs.sendall(b': 1}\n{"b": 2}\n{"c":')
    assert wire.receive_one_ready() == {"a": 1}
    assert wire.arrived() == [{"b": 2}]


def test_what_is_ready_may_be_an_incomplete_message(ends):
    wire, theirs = ends
    theirs.sendall(b'{"a"')
    assert wire.receive_ready() == []
    theirs.sendall(b": 1}\n")
    assert wire.receive_ready() == [{"a": 1}]


@pytest.mark.parametrize("receive", [Wire.receive, Wire.receive_ready])
def test_an_end_between_messages(receive, ends):
    wire, theirs = ends
    theirs.sendall(b'{"a": 1}\n')
    theirs.close()
    assert wire.receive() == {"a": 1}
    with pytest.raises(ConnectionError):
        receive(wire)


@pytest.mark.parametrize("receive", [Wire.receive, Wire.receive_ready])
def test_an_end_within_a_line(receive, ends):
    wire, theirs = ends
    theirs.sendall(b'\0\0{"a": ')
    assert wire.receive_ready() == []
    theirs.close()
    with pytest.raises(Garbled) as error:
        receive(wire)
    assert error.value.start == b'\0\0{"a": '


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"GET / HTTP/1.1\r",
        b"{'a': 1}",
        b"\xff\xfe",
        b"\0\0\x12\4",
        b"[" * 100_000,
        b'{"a": ' + b"9" * 100_000 + b"}",
        *(json.dumps(other).encode() for other in ([], [{}], "text", 1, None, True)),
    ],
    ids=lambda line: repr(line[:12]),
)
def test_what_is_not_a_message_is_shown_shortened(line, ends):
    wire, theirs = ends
    threading.Thread(target=theirs.sendall, args=[line + b"\n" + b"{}\n"]).start()
    with pytest.raises(Garbled) as error:
        wire.receive(timeout_s=20)
    assert line.startswith(error.value.start)
    assert len(str(error.value)) < 400
    assert wire.receive(timeout_s=20) == {}


def test_a_broken_connection():
    """Reset, not closed: the system does so because the other side has unread data."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as ours:
        theirs, _ = server.accept()
        wire = Wire(ours)
        wire.send({"unread": True})
        while not theirs.recv(1, socket.MSG_PEEK):
            pass
        theirs.close()
        with pytest.raises(OSError):
            wire.receive(timeout_s=20)
        with pytest.raises(OSError):
            wire.send({})


def receive_all_ready(wire) -> None:
    while not wire.receive_ready():
        pass


def receive_first_ready(wire) -> None:
    while wire.receive_one_ready() is None:
        pass


@pytest.mark.parametrize("receive", [Wire.receive, receive_all_ready, receive_first_ready])
def test_a_line_that_never_ends_is_not_kept(receive, ends):
    wire, theirs = Wire(ends[0].connection, max_bytes=2**20), ends[1]
    writer = threading.Thread(target=send_until_closed, args=[theirs])
    writer.start()
    with pytest.raises(Garbled):
        receive(wire)
    wire.close()
    writer.join()


def send_until_closed(connection) -> None:
    try:
        while True:
            connection.sendall(b"x" * 4096)
    except OSError:
        pass


@pytest.mark.timeout(60)
def test_a_long_message_takes_linear_time(ends):
    """As in a job of very many ranks; rescanning it with each chunk would take minutes."""
    wire, theirs = ends
    message = {"texts": ["x" * 1000] * 100_000}
    writer = threading.Thread(target=Wire(theirs).send, args=[message])
    writer.start()
    assert wire.receive() == message
    writer.join()
