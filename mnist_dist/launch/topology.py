"""The process layout: which launcher started this process, how many others there are, and which rank this one has.

Plain values; `environment.read_topology` reads them from the environment variables.
"""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mnist_dist.launch.address import split_address

_NAMED_RANKS = 8


@dataclass(frozen=True)
class Alone:
    """No launcher: a single process."""

    name: ClassVar[str] = "none"
    rank_variable: ClassVar[str] = ""


@dataclass(frozen=True)
class HorovodRun:
    """horovodrun, which serves a key-value store to its processes."""

    name: ClassVar[str] = "horovod"
    rank_variable: ClassVar[str] = "HOROVOD_RANK"
    """Where the user finds the rank of a process."""

    store: str | None = None
    """`host:port` of the store; a single process has none."""


@dataclass(frozen=True)
class TFConfig:
    """The user, with TF_CONFIG set for every process."""

    name: ClassVar[str] = "tf_config"
    rank_variable: ClassVar[str] = "index in TF_CONFIG"

    addresses: tuple[str, ...]
    """`host:port` of every rank, which TensorFlow's servers will listen at."""


@dataclass(frozen=True)
class Step:
    """srun, or another launcher that tells the hosts but no ports: the ranks pick free ones when they need them."""

    hosts: tuple[str, ...]
    """The host of every rank."""
    meeting_addresses: tuple[str, ...]
    """`host:port` on rank 0's host, the same on every rank; rank 0 waits for the others at the first free one."""
    step_id: str
    """Distinguishes these processes from all others on those hosts; under Slurm `job.step.restarts`."""
    name: str = "slurm"
    rank_variable: str = "SLURM_PROCID"


Launcher = Alone | HorovodRun | TFConfig | Step


@dataclass(frozen=True)
class SlurmJob:
    """What Slurm says of the job."""

    job_id: str
    """As the user knows it: `<array>_<task>` for a task of an array."""
    node_list: str
    """In Slurm's compressed form."""
    restart_count: int = 0
    """How often the job was requeued."""
    node: str = ""
    """This machine as Slurm calls it; empty outside of batch scripts and steps."""


@dataclass(frozen=True)
class Topology:
    """This process among all processes of the job; the fields count processes, never model replicas."""

    launcher: Launcher = Alone()
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    interface: str | None = None
    """The network interface that the user chose for Horovod (HOROVOD_GLOO_IFACE)."""
    visible_gpus: str | None = None
    """CUDA_VISIBLE_DEVICES."""
    cpus_per_task: int | None = None
    """Cores per task, if Slurm was given `--cpus-per-task`."""
    slurm: SlurmJob | None = None
    """The Slurm job that this process runs in, whatever the launcher."""
    losses: Path | None = None
    """Where the launcher has noted what this job has lost already (`losses.read_losses`), if it does."""

    @classmethod
    def of_hosts(cls, launcher: Launcher, hosts: tuple[str, ...], *, rank: int) -> "Topology":
        """The layout of processes on these hosts, one entry per rank; ranks on one host are numbered in order."""
        return cls(
            launcher,
            rank=rank,
            world_size=len(hosts),
            local_rank=hosts[:rank].count(hosts[rank]),
            local_size=hosts.count(hosts[rank]),
        )

    @property
    def is_chief(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    def describe_rank(self, rank: int, *, host: str = "") -> str:
        """A rank and where it runs, in words; `host` is used if the launcher does not tell."""
        host = self.launcher.addresses[rank] if isinstance(self.launcher, TFConfig) else self.host_of(rank) or host
        return f"rank {rank} ({host})" if host else f"rank {rank}"

    def describe_ranks(self, ranks: Sequence[int], *, hosts: Mapping[int, str] | None = None) -> str:
        """Several ranks, in words; of many the first ones. `hosts` as for `describe_rank`."""
        names = [self.describe_rank(rank, host=(hosts or {}).get(rank, "")) for rank in ranks[:_NAMED_RANKS]]
        more = f" and {len(ranks) - _NAMED_RANKS} more" if len(ranks) > _NAMED_RANKS else ""
        return ", ".join(names) + more

    def host_of(self, rank: int) -> str:
        """Where a rank runs, as the launcher tells it; empty if it does not."""
        if isinstance(self.launcher, TFConfig):
            return split_address(self.launcher.addresses[rank])[0]
        return self.launcher.hosts[rank] if isinstance(self.launcher, Step) else ""

    def node_name(self) -> str:
        """This machine as its launcher calls it: the name that `sbatch --exclude` wants may differ from its own."""
        node = self.slurm.node if self.slurm is not None and isinstance(self.launcher, Alone) else ""
        return self.host_of(self.rank) if isinstance(self.launcher, Step) else node or socket.gethostname()
