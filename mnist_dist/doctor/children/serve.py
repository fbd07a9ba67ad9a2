"""The other side of `probe.start_child`."""

import importlib
import json
import os
import pickle
import signal
import sys

_LATER_S = 5  # than the parent's deadline


def serve() -> None:
    """Do what standard input asks for, and write the answers to standard output, each as soon as it is known."""
    module, timeout_s, arguments = pickle.load(sys.stdin.buffer)
    signal.alarm(int(timeout_s) + _LATER_S)  # should the parent be killed meanwhile
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    # What libraries print must not come in between.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for topic, answer in importlib.import_module(module).probe(*arguments):
            answers.write(json.dumps([topic, answer]) + "\n")
            answers.flush()
