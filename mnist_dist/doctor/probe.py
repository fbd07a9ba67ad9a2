"""Probes that may hang: each runs in a process of its own, which is killed after its deadline.

An alarm or a thread would not do: a driver or a dead network mount may block a whole process in the kernel. Even a
process that cannot be killed is only left behind, and its answers so far are used: it writes into memory, not into a
pipe whose end somebody would wait for.
"""

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_DYING_S = 1.0
# The parent's search path, so that the child finds the same modules.
_CHILD = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from mnist_dist.doctor.children.serve import serve; serve()"
)


@dataclass(frozen=True)
class Outcome:
    """How a probe ended."""

    code: int | None
    """The exit code, below 0 for a signal; None: it was killed after its deadline."""
    stdout: str
    stderr: str
    timeout_s: float

    @property
    def expired(self) -> bool:
        """Whether it was killed after its deadline."""
        return self.code is None

    @property
    def answers(self) -> dict[str, Any]:
        """What a child has answered, by topic, up to its end."""
        found: dict[str, Any] = {}
        for line in self.stdout.splitlines():
            with contextlib.suppress(ValueError, TypeError):  # the last line may be cut off
                topic, answer = json.loads(line)
                found[str(topic)] = answer
        return found

    def describe(self) -> str:
        """How it ended, in words."""
        if self.code is None:
            return f"did not answer within {self.timeout_s:.0f} s"
        last = next((line.strip() for line in reversed(self.stderr.splitlines()) if line.strip()), "")
        if self.code < 0:
            with contextlib.suppress(ValueError):
                return f"was ended by {signal.Signals(-self.code).name}"
        return f"ended with exit code {self.code}" + (f": {last[:300]}" if last else "")


@dataclass
class Probe:
    """A program that has been started."""

    process: "subprocess.Popen[bytes]"
    timeout_s: float
    _outputs: tuple[int, int]
    _deadline: float = field(init=False)

    def __post_init__(self) -> None:
        self._deadline = time.monotonic() + self.timeout_s

    def outcome(self) -> Outcome:
        """Wait until it ends or its time is up; to be called once."""
        code: int | None = None
        try:
            code = self.process.wait(max(0.0, self._deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it may hang in the kernel: nobody can end it
                self.process.wait(_DYING_S)
        stdout, stderr = (_read(descriptor) for descriptor in self._outputs)
        for descriptor in self._outputs:
            os.close(descriptor)
        return Outcome(code, stdout, stderr, self.timeout_s)

    def answer(self, topic: str) -> Any:
        """Wait for a child's answer on one topic; None if it ends before."""
        while True:
            has_ended = self.process.poll() is not None
            found = Outcome(0, _read(self._outputs[0]), "", self.timeout_s).answers.get(topic)
            if found is not None or has_ended or time.monotonic() > self._deadline:
                return found
            time.sleep(0.02)

    def end(self) -> Outcome:
        """Ask it to end, and wait a moment."""
        self.process.terminate()
        self._deadline = time.monotonic() + _DYING_S
        return self.outcome()


def start_program(
    command: Sequence[str], *, variables: Mapping[str, str], timeout_s: float, given: bytes = b""
) -> Probe:
    """Start a program, with `given` on its standard input; raises OSError."""
    descriptors = [os.memfd_create(name) for name in ("stdin", "stdout", "stderr")]
    try:
        os.write(descriptors[0], given)
        os.lseek(descriptors[0], 0, os.SEEK_SET)
        stdin, stdout, stderr = descriptors
        process = subprocess.Popen(command, env=dict(variables), stdin=stdin, stdout=stdout, stderr=stderr)
    except BaseException:
        for descriptor in descriptors[1:]:
            os.close(descriptor)
        raise
    finally:
        os.close(descriptors[0])
    return Probe(process, timeout_s, (stdout, stderr))


def start_child(module: str, *arguments: object, variables: Mapping[str, str], timeout_s: float) -> Probe:
    """Call `probe(*arguments)` of a module of `children` in a process of its own; raises OSError."""
    name = f"{__package__}.children.{module}"
    given = pickle.dumps(sys.path) + pickle.dumps((name, timeout_s, arguments))
    return start_program([sys.executable, "-c", _CHILD], variables=variables, timeout_s=timeout_s, given=given)


def _read(descriptor: int) -> str:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")
