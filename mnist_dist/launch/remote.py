"""The far end of ssh: `python -m mnist_dist.launch.remote` starts a process of a job, and ends it with the connection.

The first line of standard input has its command and variables, which must not be in a command line that others can
see; each further line is the number of a signal for it. The end of standard input is the end of the connection.
"""

import io
import json
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from subprocess import Popen
from typing import NoReturn

from mnist_dist.base.errors import EXIT_LOST_PEER
from mnist_dist.launch.child import Share, start_child


def order_line(words: Sequence[str], variables: Mapping[str, str]) -> bytes:
    """The first line."""
    return json.dumps({"words": words, "variables": variables}).encode() + b"\n"


def signal_line(number: int) -> bytes:
    """A further line."""
    return f"{int(number)}\n".encode()


def main() -> NoReturn:
    """Start the process, and end with its exit code, as a shell reports it."""
    # Not sys.stdin, whose lock the thread would hold when this process ends.
    orders = io.FileIO(0, closefd=False)
    first = orders.readline()
    if not first.endswith(b"\n"):
        sys.exit(EXIT_LOST_PEER)
    order = json.loads(first)
    process = start_child(order["words"], share=Share(variables=order["variables"]))
    threading.Thread(target=_obey, args=(process, orders), daemon=True).start()
    code = process.wait()
    os._exit(128 - code if code < 0 else code)


def _obey(process: "Popen[bytes]", orders: io.FileIO) -> None:
    for line in orders:
        process.send_signal(int(line))
    process.kill()  # nobody waits for it any more, and others may take its place


if __name__ == "__main__":
    main()
