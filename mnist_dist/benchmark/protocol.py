"""How the benchmark and its children talk: one JSON object a line, over a TCP connection on this machine.

A child says `{"token", "rank", "pid"}` when it starts and `{"ready": facts, "parts": [...]}` once it is built; then it
answers each `{"do": PART}` by what it measured, until the connection ends.
"""

import json
import selectors
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]


class Lost(Exception):
    """The other side is gone, or does not answer; the message says which."""


class Channel:
    """One side of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._received = b""

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message; raises Lost."""
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise Lost("ended") from error

    def receive(self) -> Message:
        """Wait for a whole message; raises Lost."""
        while (message := self.receive_some()) is None:
            pass
        return message

    def receive_some(self) -> Message | None:
        """Read what has come, at least a byte; a message if it is complete now. Raises Lost."""
        try:
            data = self.connection.recv(65536)
        except OSError as error:
            raise Lost("ended") from error
        if not data:
            raise Lost("ended")
        self._received += data
        line, newline, rest = self._received.partition(b"\n")
        if not newline:
            return None
        self._received = rest
        return dict(json.loads(line))

    def close(self) -> None:
        """End the connection."""
        self.connection.close()


def receive_all(channels: Sequence[Channel], *, timeout_s: float) -> list[Message]:
    """One message from each, in order; raises Lost as soon as one of them is gone, or after `timeout_s` seconds."""
    answers: dict[int, Message] = {}
    end = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        for number, channel in enumerate(channels):
            selector.register(channel.connection, selectors.EVENT_READ, number)
        while len(answers) < len(channels):
            ready = selector.select(max(0.0, end - time.monotonic()))
            if not ready:
                raise Lost(f"did not answer within {timeout_s:g} s")
            for key, _ in ready:
                message = channels[key.data].receive_some()
                if message is not None:
                    answers[key.data] = message
                    selector.unregister(key.fileobj)
    return [answers[number] for number in range(len(channels))]


class Turns:
    """A child's side: it computes only when it is its turn."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def ready(self, facts: Mapping[str, Any], *, parts: Sequence[str] = ("epoch",)) -> None:
        """Say that everything is built, and which parts can be measured."""
        self._channel.send({"ready": dict(facts), "parts": list(parts)})

    def wait(self) -> str:
        """Wait for the next turn: the part to measure. Ends the process when there is none any more."""
        try:
            return str(self._channel.receive()["do"])
        except Lost:
            sys.exit()

    def done(self, **measured: Any) -> None:
        """Answer; `seconds` is the time of the part."""
        self._channel.send(measured)
