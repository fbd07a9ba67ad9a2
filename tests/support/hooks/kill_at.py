"""Train, and be killed at one moment: `kill_at.py MOMENT FILE NUMBER KEY=VALUE ...`.

The NUMBER-th time that FILE is written, SIGKILL comes when half of the new content is in its temporary file (`half`),
when all of it has been flushed to disk there (`flushed`), or when it has been renamed (`renamed`).
"""

import itertools
import os
import signal
import sys
from pathlib import Path

from mnist_dist import train

MOMENT, FILE, NUMBER = sys.argv[1], sys.argv[2], int(sys.argv[3])
fdopen, fsync, replace = os.fdopen, os.fsync, os.replace
writes, flushed = itertools.count(1), set()
is_due = False


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def name_of(descriptor: int) -> str:
    return Path(f"/proc/self/fd/{descriptor}").readlink().name


def fdopen_watched(descriptor, *args, **kwargs):
    global is_due
    stream = fdopen(descriptor, *args, **kwargs)
    if name_of(descriptor).startswith(f".{FILE}."):
        is_due = next(writes) == NUMBER
        if is_due and MOMENT == "half":
            return HalfWritten(stream)
    return stream


class HalfWritten:
    def __init__(self, stream) -> None:
        self.stream = stream

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.stream.close()

    def write(self, content: bytes) -> None:
        self.stream.write(content[: len(content) // 2])
        self.stream.flush()
        die()


def fsync_watched(descriptor):
    fsync(descriptor)
    flushed.add(name_of(descriptor))


def replace_watched(source, target, **kwargs):
    is_it = is_due and Path(target).name == FILE
    if is_it and MOMENT == "flushed" and Path(source).name in flushed:
        die()
    replace(source, target, **kwargs)
    if is_it and MOMENT == "renamed":
        die()


os.fdopen, os.fsync, os.replace = fdopen_watched, fsync_watched, replace_watched
del sys.argv[1:4]
train.main()
