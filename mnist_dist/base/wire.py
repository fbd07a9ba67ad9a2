"""Messages over a TCP connection: JSON objects, one a line."""

import json
import socket
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

Message = dict[str, Any]

MAX_MESSAGE = 2**28
"""Most bytes of a message, about: what all ranks of a large job hand in fits, and an endless line ends."""
MAX_GREETING = 2**24
"""Most bytes of a first message, about."""
_CHUNK = 65_536


class Garbled(ValueError):
    """What came is not one of our messages."""

    def __init__(self, line: bytes) -> None:
        self.start = line[:80]
        super().__init__(f"not a message: {self.start!r}")


class Wire:
    """One side of a connection; the timeout set on the connection applies to `send`."""

    def __init__(self, connection: socket.socket, *, max_bytes: int = MAX_MESSAGE) -> None:
        self.connection = connection
        self.max_bytes = max_bytes
        self._lines: deque[bytes] = deque()
        self._rest = bytearray()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message; raises OSError."""
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, *, timeout_s: float | None = None) -> Message:
        """Wait for the next message: `timeout_s` seconds for all of it, however slowly it arrives, or without end.

        Raises:
            OSError: the connection broke or ended, or the time is up.
            Garbled: something else came, more than `max_bytes`, or the connection ended within a line.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        timeout_of_send = self.connection.gettimeout()
        try:
            while not self._lines:
                left_s = None if deadline is None else deadline - time.monotonic()
                if left_s is not None and left_s <= 0:
                    raise TimeoutError
                self.connection.settimeout(left_s)
                self._read()
        finally:
            self.connection.settimeout(timeout_of_send)
        return _parse(self._lines.popleft())

    def receive_ready(self) -> list[Message]:
        """Read once, and return the messages that are complete now; raises as `receive` does."""
        self._read()
        return self.arrived()

    def receive_one_ready(self) -> Message | None:
        """Read once, and return the first message if it is complete now; keeps later ones; raises as `receive` does."""
        self._read()
        return _parse(self._lines.popleft()) if self._lines else None

    def arrived(self) -> list[Message]:
        """The messages that earlier calls have read but not returned."""
        lines, self._lines = self._lines, deque()
        return [_parse(line) for line in lines]

    def close(self) -> None:
        """End the connection."""
        self.connection.close()

    def _read(self) -> None:
        data = self.connection.recv(_CHUNK)
        if not data:
            if self._rest:
                raise Garbled(bytes(self._rest))
            raise ConnectionError("the other side has ended the connection")
        end, *more = data.split(b"\n")
        self._rest += end
        for start in more:
            self._lines.append(bytes(self._rest))
            self._rest = bytearray(start)
        if len(self._rest) > self.max_bytes:
            raise Garbled(bytes(self._rest[:_CHUNK]))


def _parse(line: bytes) -> Message:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Garbled(line) from error
    if not isinstance(message, dict):
        raise Garbled(line)
    return message
