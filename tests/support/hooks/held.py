"""Runs `mnist_dist.train` as usual, but holds it while it writes one file, so that a kill hits that moment for certain.

`HOLD_FILE` is the file's name. `HOLD_AFTER` is the part of its content that has been written by then, from 0 to 1 (all
of it, but the file has not its name yet), or `rename`. `HOLD_SIGNS` is a folder: in it a file `held` says that the
moment has come, and when somebody creates a file `go` there, the run goes on.
"""

import io
import os
import time
from pathlib import Path

from mnist_dist.train import main

FILE, AFTER, SIGNS = os.environ["HOLD_FILE"], os.environ["HOLD_AFTER"], Path(os.environ["HOLD_SIGNS"])


def hold() -> None:
    (SIGNS / "held").touch()
    while not (SIGNS / "go").exists():
        time.sleep(0.01)


class HeldWriter(io.BufferedWriter):
    def write(self, content: bytes) -> int:
        first = round(float(AFTER) * len(content))
        super().write(content[:first])
        self.flush()
        hold()
        return first + super().write(content[first:])


fdopen, replace = os.fdopen, os.replace


def fdopen_held(descriptor: int, *args, **options):
    temporary = Path(f"/proc/self/fd/{descriptor}").readlink().name
    if AFTER != "rename" and temporary.startswith(f".{FILE}."):
        return HeldWriter(io.FileIO(descriptor, "wb"))
    return fdopen(descriptor, *args, **options)


def replace_then_hold(source, target, **options) -> None:
    replace(source, target, **options)
    if AFTER == "rename" and Path(target).name == FILE:
        hold()


os.fdopen, os.replace = fdopen_held, replace_then_hold
main()
