"""How the benchmark and its children communicate, over TCP connections on this machine.

A child sends `{"token", "rank", "pid"}` when it starts and `{"ready": facts, "parts": [...]}` once it is built; then it
answers each `{"do": PART}` with what it measured, until the connection ends.
"""

import selectors
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mnist_dist.base.wire import Garbled, Message, Wire


class Lost(Exception):
    """A child is gone, or does not answer; the message says which."""


def send(wire: Wire, message: Mapping[str, Any]) -> None:
    """Send a message to a child; raises Lost."""
    try:
        wire.send(message)
    except OSError as error:
        raise Lost("ended") from error


def receive_all(wires: Sequence[Wire], *, timeout_s: float) -> list[Message]:
    """One message from each, in order; raises Lost as soon as one of them is gone, or after `timeout_s` seconds."""
    end = time.monotonic() + timeout_s
    # A child sends one message at a time; the first may have come together with its greeting.
    answers = {number: arrived[0] for number, wire in enumerate(wires) if (arrived := _take(wire.arrived))}
    with selectors.DefaultSelector() as selector:
        for number, wire in enumerate(wires):
            if number not in answers:
                selector.register(wire.connection, selectors.EVENT_READ, number)
        while len(answers) < len(wires):
            ready = selector.select(max(0.0, end - time.monotonic()))
            if not ready:
                raise Lost(f"did not answer within {timeout_s:g} s")
            for key, _ in ready:
                if messages := _take(wires[key.data].receive_ready):
                    answers[key.data] = messages[0]
                    selector.unregister(key.fileobj)
    return [answers[number] for number in range(len(wires))]


def _take(receive: Callable[[], list[Message]]) -> list[Message]:
    try:
        return receive()
    except (OSError, Garbled) as error:  # within a line, even
        raise Lost("ended") from error


class Turns:
    """A child's side: it computes only in its turn."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def ready(self, facts: Mapping[str, Any], *, parts: Sequence[str] = ("epoch",)) -> None:
        """Tell that everything is built, and which parts can be measured."""
        self._wire.send({"ready": dict(facts), "parts": list(parts)})

    def wait(self) -> str:
        """Wait for the next turn: the part to measure. Ends the process when there are no more."""
        try:
            return str(self._wire.receive()["do"])
        except (OSError, Garbled):
            sys.exit()

    def done(self, **measured: Any) -> None:
        """Answer; `seconds` is the time of the part."""
        self._wire.send(measured)
