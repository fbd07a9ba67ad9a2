"""This end of ssh: the commands that start a process on another host, and ask whether a host is there."""

import contextlib
import fcntl
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from subprocess import DEVNULL, PIPE, Popen

from mnist_dist.base.errors import UserError
from mnist_dist.launch.child import start_child
from mnist_dist.launch.remote import order_line

# No questions, no terminal, no windows; a host that is gone is noticed about as soon as the ranks notice it.
_SETTINGS = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=10", "ServerAliveCountMax=3")
_OPTIONS = ("-T", "-x", *(f"-o{setting}" for setting in _SETTINGS))
# What belongs to this machine or this session.
_STAYS_HERE = ("HOME", "HOSTNAME", "LOGNAME", "MAIL", "OLDPWD", "PWD", "SHELL", "SHLVL", "TERM", "TMPDIR", "USER", "_")
_STAY_HERE = ("DBUS_", "DISPLAY", "SSH_", "XDG_")
_PIPE_BYTES = 2**16  # what Linux gives a pipe


@dataclass(frozen=True)
class Ssh:
    """How other hosts are reached."""

    program: tuple[str, ...]
    """`ssh`, and options of the user's own."""
    python: str
    """The Python of the other hosts."""
    folder: str
    """The working directory, the same on all hosts."""

    def start(self, host: str, words: Sequence[str], variables: Mapping[str, str]) -> "Popen[bytes]":
        """Start `python *words` on a host, by `remote`; standard input stays open for signals. Raises OSError."""
        search_path = f"PYTHONPATH={variables.get('PYTHONPATH', '')}"
        far_end = ["env", search_path, self.python, "-m", "mnist_dist.launch.remote"]
        process = self._run(host, f"cd {shlex.quote(self.folder)} && exec {shlex.join(far_end)}", stdin=PIPE)
        assert process.stdin is not None
        passed_on = {
            name: value
            for name, value in variables.items()
            if name not in _STAYS_HERE and not name.startswith(_STAY_HERE)
        }
        # All of it must fit into the pipe, so that a host which does not read holds nobody up.
        line = order_line([self.python, *words], passed_on)
        os.set_blocking(process.stdin.fileno(), False)
        if len(line) > _PIPE_BYTES:
            with contextlib.suppress(OSError):
                fcntl.fcntl(process.stdin, fcntl.F_SETPIPE_SZ, len(line))
        if tell(process, line) < len(line):
            process.kill()
            raise UserError(f"the environment variables are too many for ssh: {len(line)} bytes; unset some of them")
        return process

    def knock(self, host: str) -> "Popen[bytes]":
        """Ask whether a host is there: the exit code is 0 if it is. Raises UserError if there is no ssh."""
        try:
            return self._run(host, "true")
        except OSError as error:
            raise UserError(f"--ssh={shlex.join(self.program)}: cannot be started ({error.strerror})") from error

    def _run(self, host: str, command: str, *, stdin: int = DEVNULL) -> "Popen[bytes]":
        return start_child([*self.program, *_OPTIONS, host, command], stdin=stdin)


def tell(process: "Popen[bytes]", line: bytes) -> int:
    """Write to its standard input without waiting; returns how many bytes were written."""
    assert process.stdin is not None
    try:
        return os.write(process.stdin.fileno(), line)
    except BrokenPipeError:
        return len(line)  # it has just ended, which is noticed elsewhere
    except BlockingIOError:
        return 0
