"""Messages over a TCP connection: JSON objects, one a line."""

import json
import socket
import time
from collections.abc import Mapping
from typing import Any

Message = dict[str, Any]

_CHUNK = 65_536


class Garbled(ValueError):
    """What came is no message of ours."""

    def __init__(self, line: bytes) -> None:
        super().__init__(f"not a message: {line[:80]!r}")
        self.line = line


class Wire:
    """One side of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._received = b""

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message; raises OSError."""
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, *, timeout_s: float | None = None) -> Message:
        """Wait for the next message.

        Args:
            timeout_s: for the whole message, however slowly it drips; None waits for as long as it takes.

        Raises:
            OSError: the connection broke or has ended, or the time is up.
            Garbled: something else came, or the connection ended within a line.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while b"\n" not in self._received:
            left_s = None if deadline is None else deadline - time.monotonic()
            if left_s is not None and left_s <= 0:
                raise TimeoutError
            self.connection.settimeout(left_s)
            self._read()
        line, _, self._received = self._received.partition(b"\n")
        return _parse(line)

    def receive_ready(self) -> list[Message]:
        """Read once, and return the messages that are complete now; raises as `receive` does."""
        self._read()
        return self.arrived()

    def arrived(self) -> list[Message]:
        """The messages that an earlier call has read but not returned."""
        *lines, self._received = self._received.split(b"\n")
        return [_parse(line) for line in lines]

    def close(self) -> None:
        """End the connection."""
        self.connection.close()

    def _read(self) -> None:
        data = self.connection.recv(_CHUNK)
        if not data:
            if self._received:
                raise Garbled(self._received)
            raise ConnectionError("the other side has ended the connection")
        self._received += data


def _parse(line: bytes) -> Message:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Garbled(line) from error
    if not isinstance(message, dict):
        raise Garbled(line)
    return message
