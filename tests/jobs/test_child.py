"""Programs that a process starts, and the signals to both."""

import os
import sys
from collections.abc import Collection

import pytest

from mnist_dist.launch.child import Share, Signals, start_child
from mnist_dist.launch.stop import SIGNALS


class Cores(Collection):
    """Those of this process; the child gets a signal when it looks at them, just before it becomes the program."""

    def __init__(self, number):
        self._number, self._cores = number, os.sched_getaffinity(0)

    def __iter__(self):
        os.kill(os.getpid(), self._number)
        return iter(self._cores)

    def __len__(self):
        return len(self._cores)

    def __contains__(self, core):
        return core in self._cores


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_before_the_program_runs_ends_it_and_is_not_taken_for_one_to_its_parent(number):
    with Signals() as signals:
        process = start_child([sys.executable, "-c", ""], share=Share(Cores(number)))
        assert process.wait() == -number
        assert signals.wait(0) == []
