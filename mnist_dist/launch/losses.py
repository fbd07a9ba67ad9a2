"""What a job has lost so far: its launcher notes it, and hands it to the processes of the next start.

A line for each loss: seconds since 1970, the hosts that do not answer any more (separated by commas; none if only
processes were lost), and how it was noticed, separated by tabs. `slurm/common.sh` writes the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LOSSES_VARIABLE = "MNIST_DIST_LOSSES"
"""The environment variable with the path of the file."""


@dataclass(frozen=True)
class Loss:
    """Something that ended a start of the job."""

    time: float
    """When it was noticed; seconds since 1970."""
    hosts: tuple[str, ...]
    """Those that do not answer since."""
    how: str
    """In words."""

    def to_line(self) -> str:
        """As in the file."""
        return f"{self.time:.1f}\t{','.join(self.hosts)}\t{' '.join(self.how.split())}\n"


def read_losses(path: Path | None) -> tuple[Loss, ...]:
    """The losses in the file, in order; none without a file, and without lines that are damaged. Raises OSError."""
    if path is None or not path.is_file():
        return ()
    found = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        moment, *rest = line.split("\t", 2)
        if len(rest) == 2 and moment.replace(".", "", 1).isdecimal():
            found.append(Loss(float(moment), tuple(filter(None, rest[0].split(","))), rest[1]))
    return tuple(found)


def lost_hosts(losses: Sequence[Loss]) -> list[str]:
    """All hosts that were lost, each once, in order."""
    return list(dict.fromkeys(host for loss in losses for host in loss.hosts))
