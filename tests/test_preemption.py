"""A signal is a request, never the end of the process."""

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal
from mnist_dist.preemption import StopRequest

request = StopRequest()
request.listen(signal.SIGTERM, signal.SIGUSR2)
assert not request()
for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM):
    os.kill(os.getpid(), number)
    assert request()
"""

# A signal that comes when Python has put its own handlers back.
AT_THE_END = """
import ctypes

class Late:
    def __del__(self, kill=ctypes.CDLL(None).kill, pid=os.getpid(), number=int(signal.SIGTERM)):
        kill(pid, number)

ctypes.late = Late()
"""


def run(program: str, python_environment) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=python_environment, capture_output=True, text=True, timeout=60, check=False)


def test_a_signal_is_a_request_and_a_second_one_changes_nothing(python_environment):
    result = run(PROGRAM, python_environment)
    assert (result.returncode, result.stderr) == (0, "SIGTERM: stopping after this epoch\n")


@pytest.mark.parametrize("closed", [False, True])
def test_none_is_deadly_after_the_end(closed, python_environment):
    """Python gives signals back their own meaning when it ends; the exit code must not become theirs."""
    program = PROGRAM + ("request.close()\n" if closed else "") + AT_THE_END + "raise SystemExit(75)\n"
    assert run(program, python_environment).returncode == (75 if closed else -signal.SIGTERM)
