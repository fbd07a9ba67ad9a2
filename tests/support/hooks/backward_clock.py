"""Train while the clock on the wall goes backwards, an hour each time that it is looked at."""

import itertools
import time

now = itertools.count(2e9, -3600)
time.time = lambda: next(now)
time.time_ns = lambda: int(next(now)) * 10**9

from mnist_dist import train  # noqa: E402 (what it imports may keep a clock)

train.main()
