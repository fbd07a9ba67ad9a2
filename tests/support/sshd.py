"""Hosts that ssh reaches, all of them this machine: an sshd for each address, run by this user. Without TensorFlow.

It needs Debian's openssh-server installed, but not configured or running: keys and ports are the test's own.
"""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from support.launchers import free_ports
from support.processes import family, kill, wait_until

_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
_CONFIG = """\
Port {port}
ListenAddress {host}
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
PrintMotd no
"""


def missing_programs() -> list[str]:
    """The programs of OpenSSH that are not installed."""
    return [name for name in ("sshd", "ssh", "ssh-keygen") if shutil.which(name, path=_PATH) is None]


@dataclass(frozen=True)
class Hosts:
    """What `mnist_dist.launch` needs, and each host's sshd, of which all that runs on the host descends."""

    command: str
    """`ssh`, with what it takes to be let in."""
    daemons: dict[str, psutil.Process]

    def sessions(self, host: str) -> list[psutil.Process]:
        """The connections that are open, and all that runs on a host."""
        return family(self.daemons[host])[1:]


@contextlib.contextmanager
def run_hosts(folder: Path, names: tuple[str, ...]) -> Iterator[Hosts]:
    """Start an sshd for each of these addresses; at the end kill all that is left of them."""
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # Debian makes it when the service starts
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
    (port,) = free_ports(1)
    program = shutil.which("sshd", path=_PATH)
    daemons = {}
    try:
        for host in names:
            config = folder / f"sshd_config-{host}"
            config.write_text(_CONFIG.format(port=port, host=host, folder=folder))
            daemons[host] = psutil.Popen(
                [program, "-D", "-e", "-f", config], stdin=subprocess.DEVNULL, stderr=(folder / f"{host}.log").open("w")
            )
        command = f"ssh -F none -p {port} -i {folder}/key"
        for setting in ("UserKnownHostsFile=/dev/null", "StrictHostKeyChecking=no", "LogLevel=ERROR"):
            command += f" -o {setting}"
        for host in names:
            wait_until(lambda host=host: _answers(command, host), timeout_s=30, every_s=0.1)
        yield Hosts(command, daemons)
    finally:
        for daemon in daemons.values():
            kill(daemon)
            daemon.wait()


def _answers(command: str, host: str) -> bool:
    return subprocess.run([*command.split(), host, "true"], capture_output=True, check=False).returncode == 0
