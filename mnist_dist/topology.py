"""The process layout: how many processes train together, and which of them this is.

The only reader of environment variables; everything else is told what it needs to know.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """This process among all processes of the job; the fields speak of processes, never of model replicas."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_chief(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0
