"""Train while the wall clock goes backwards, by an hour each time it is read."""

import itertools
import time

now = itertools.count(2e9, -3600)
time.time = lambda: next(now)
time.time_ns = lambda: int(next(now)) * 10**9

from mnist_dist import train  # noqa: E402 (what it imports may keep a reference to the clock)

train.main()
