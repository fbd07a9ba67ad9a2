"""Who may connect: only a process that has the key, which it proves before anything that it says is read.

Both sides prove it, over nonces that are new for each connection, so that nothing that was recorded is of any use:

    gate      _MAGIC, its nonce
    visitor   _MAGIC, its nonce, HMAC-SHA256(key, "visitor", both nonces)
    gate      HMAC-SHA256(key, "gate", both nonces); to a visitor with another key nothing: the connection ends

All sizes are fixed. Then come messages (`base.wire`). Each gate of a job has a key of its own (`secret`), so that
nobody can listen where ranks knock, and pass on what he is asked to another gate.
"""

import contextlib
import errno
import hmac
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from mnist_dist.base.wire import MAX_GREETING, MAX_MESSAGE, Garbled, Message, Wire

NEWCOMER_S = 5.0
"""How long a newcomer may take for its proof and its first message."""
MAX_NEWCOMERS = 256
"""How many may be about that at once, and as many as are expected; then the oldest without a proof has to go."""
_MAGIC = b"mnist\0\r\n"
_NONCE, _PROOF = 32, 32
_GREETING, _ANSWER = len(_MAGIC) + _NONCE, len(_MAGIC) + _NONCE + _PROOF
_ACCEPT_AT_ONCE = 32
_LOOK_S, _PAUSE_S = 0.2, 1.0


class Refused(ConnectionError):
    """The gate at the other end does not let this process in: most likely the keys differ."""


@dataclass(eq=False)
class _Newcomer:
    """A connection from anybody."""

    connection: socket.socket
    due_s: float
    nonce: bytes = field(default_factory=lambda: secrets.token_bytes(_NONCE))
    answer: bytes = b""
    wire: Wire | None = None
    """Once it has proved that it has the key."""


class Gate:
    """Listens in its own thread, and hands over each process that has the key, with its first message."""

    def __init__(
        self, server: socket.socket, key: bytes, *, admit: Callable[[Wire, Message], None], expected: int
    ) -> None:
        """Start it; `admit` is called in its thread, and may raise as for a message that is not what it should be.

        The server is closed at the end. `expected` is how many processes may come at once.
        """
        self.num_refused = 0
        """How many have answered as processes of ours do, with another key."""
        self._server, self._key, self._admit = server, key, admit
        self._limit = MAX_NEWCOMERS + expected
        self._newcomers: dict[_Newcomer, None] = {}  # in the order in which they came
        self._selector = selectors.DefaultSelector()
        self._has_ended = False
        # Stands still while this process does: newcomers are not to blame if it was stopped, or loads a library.
        self._clock_s = 0.0
        server.setblocking(False)
        self._selector.register(server, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="gate", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let nobody in any more."""
        self._has_ended = True
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join(_PAUSE_S)

    def _run(self) -> None:
        now = time.monotonic()
        while not self._has_ended:
            for key, _ in self._selector.select(timeout=_LOOK_S):
                if key.data is None:
                    self._accept()
                elif key.data in self._newcomers:
                    self._serve(key.data)
            before, now = now, time.monotonic()
            self._clock_s += min(now - before, _PAUSE_S)
            for late in [one for one in self._newcomers if one.due_s < self._clock_s]:
                self._drop(late)
        for newcomer in tuple(self._newcomers):
            self._drop(newcomer)
        self._server.close()
        self._selector.close()

    def _accept(self) -> None:
        """Challenge some of those that wait, not all: those that have answered are served in between."""
        for _ in range(_ACCEPT_AT_ONCE):
            try:
                connection, _ = self._server.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    self._make_room()
                time.sleep(_LOOK_S / 10)
                return
            connection.setblocking(False)
            newcomer = _Newcomer(connection, self._clock_s + NEWCOMER_S)
            self._newcomers[newcomer] = None
            self._selector.register(connection, selectors.EVENT_READ, newcomer)
            try:
                connection.send(_MAGIC + newcomer.nonce)
            except OSError:
                self._drop(newcomer)
            if len(self._newcomers) > self._limit:
                self._make_room()

    def _make_room(self) -> None:
        """Drop the oldest of those that have proved nothing: of ours, each is tried again until it is let in."""
        if (oldest := next((one for one in self._newcomers if one.wire is None), None)) is not None:
            self._drop(oldest)

    def _serve(self, newcomer: _Newcomer) -> None:
        """Read what a newcomer has sent, and let it in once it is known and has said what it wants."""
        try:
            if newcomer.wire is None:
                self._check(newcomer)
                return
            message = newcomer.wire.receive_one_ready()
        except BlockingIOError:
            return
        except (OSError, ValueError):
            self._drop(newcomer)
            return
        if message is None:
            return
        self._forget(newcomer)
        newcomer.wire.max_bytes = MAX_MESSAGE
        newcomer.connection.setblocking(True)
        try:
            self._admit(newcomer.wire, message)
        except (OSError, ValueError, KeyError, TypeError):
            newcomer.wire.close()

    def _check(self, newcomer: _Newcomer) -> None:
        """Read a newcomer's proof, and answer once it is complete; raises ConnectionError if it is wrong."""
        data = newcomer.connection.recv(_ANSWER - len(newcomer.answer))
        newcomer.answer += data
        if not data or newcomer.answer[: len(_MAGIC)] != _MAGIC[: len(newcomer.answer)]:
            raise ConnectionError
        if len(newcomer.answer) < _ANSWER:
            return
        nonces = newcomer.nonce + newcomer.answer[len(_MAGIC) : _GREETING]
        if not hmac.compare_digest(newcomer.answer[_GREETING:], _prove(self._key, b"visitor", nonces)):
            self.num_refused += 1
            raise ConnectionError
        newcomer.connection.send(_prove(self._key, b"gate", nonces))
        newcomer.wire = Wire(newcomer.connection, max_bytes=MAX_GREETING)

    def _forget(self, newcomer: _Newcomer) -> None:
        del self._newcomers[newcomer]
        self._selector.unregister(newcomer.connection)

    def _drop(self, newcomer: _Newcomer) -> None:
        self._forget(newcomer)
        newcomer.connection.close()


def enter(connection: socket.socket, key: bytes, *, timeout_s: float, greeting_s: float | None = None) -> Wire:
    """Go through the gate at the other end, once both have proved that they have the key.

    A gate greets at once, unless its process is held up: `greeting_s` is how long to wait for that.

    Raises:
        Garbled: something else than a gate is there; or it does not have the key.
        Refused: the gate has ended the connection, having got this process's proof.
        OSError: the connection broke before, or the time is up.
    """
    deadline = time.monotonic() + timeout_s
    timeout_of_send = connection.gettimeout()
    due_s = deadline if greeting_s is None else min(deadline, time.monotonic() + greeting_s)
    greeting = _receive(connection, _GREETING, due_s, begins=_MAGIC)
    nonce = secrets.token_bytes(_NONCE)
    nonces = greeting[len(_MAGIC) :] + nonce
    connection.sendall(_MAGIC + nonce + _prove(key, b"visitor", nonces))
    try:
        proof = _receive(connection, _PROOF, deadline)
    except ConnectionResetError:  # a gate that refuses has read everything, and ends the connection properly
        raise
    except ConnectionError as error:
        raise Refused(*error.args) from error
    if not hmac.compare_digest(proof, _prove(key, b"gate", nonces)):
        raise Garbled(proof)
    connection.settimeout(timeout_of_send)
    return Wire(connection)


def _prove(key: bytes, role: bytes, nonces: bytes) -> bytes:
    return hmac.digest(key, role + b" " + nonces, "sha256")


def _receive(connection: socket.socket, size: int, deadline: float, *, begins: bytes = b"") -> bytes:
    """Exactly so many bytes; raises OSError, and Garbled if they do not begin as they should."""
    received = b""
    while len(received) < size:
        if (left_s := deadline - time.monotonic()) <= 0:
            raise TimeoutError
        connection.settimeout(left_s)
        if not (data := connection.recv(size - len(received))):
            raise ConnectionError("the other side has ended the connection")
        received += data
        if received[: len(begins)] != begins[: len(received)]:
            raise Garbled(received)
    return received
