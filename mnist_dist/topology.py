"""The process layout: how many processes train together, and which of them this is.

Pure: a mapping of environment variables in, a `Topology` out. The only reader of environment variables; everything
else is told what it needs to know.
"""

import itertools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from mnist_dist.errors import UserError

Launcher = Literal["none", "horovod", "tf_config", "slurm"]

# Ports for a job's first contact, below the range from which Linux gives out ports by itself (32768 and up).
_FIRST_PORT, _NUM_PORTS = 20_000, 10_000
# Where one is taken, the next is tried: so many, so far apart that two jobs that share one share no more.
_NUM_CONTACTS, _CONTACT_STEP = 8, 1_013


@dataclass(frozen=True)
class SlurmJob:
    """What Slurm says of the job."""

    job_id: str
    """As the user knows it: of an array's task `<array>_<task>`."""
    node_list: str
    """In Slurm's compressed form."""
    restart_count: int = 0
    """How often the job was put back into the queue."""


@dataclass(frozen=True)
class Topology:
    """This process among all processes of the job; the fields speak of processes, never of model replicas."""

    launcher: Launcher = "none"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    addresses: tuple[str, ...] = ()
    """`host:port` of every rank, where the launcher told them."""
    hosts: tuple[str, ...] = ()
    """The host of every rank, where the launcher told no ports; the ranks choose free ones when they need them."""
    contacts: tuple[str, ...] = ()
    """Then: `host:port` on rank 0's host, the same on every rank; rank 0 waits for the others at the first free one."""
    step: str = ""
    """Then: what tells these processes from all others on those hosts."""
    store: str | None = None
    """`host:port` of the key-value store that horovodrun serves to its processes."""
    visible_gpus: str | None = None
    """CUDA_VISIBLE_DEVICES."""
    cpus_per_task: int | None = None
    """Cores that Slurm gave to each task, where `--cpus-per-task` said so."""
    slurm: SlurmJob | None = None
    """The job, where Slurm runs this process, whoever launched it."""

    @property
    def is_chief(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0


def read_topology(environ: Mapping[str, str] = os.environ) -> Topology:
    """The process layout that the launcher set up.

    Horovod's variables and TF_CONFIG are stronger than Slurm's, which are there in every process of an allocation.

    Raises:
        UserError: two launchers at once, or variables that do not fit together.
    """
    if "HOROVOD_RANK" in environ and "TF_CONFIG" in environ:
        raise UserError(
            f"HOROVOD_RANK={environ['HOROVOD_RANK']} and TF_CONFIG={environ['TF_CONFIG']} are both set: two launchers "
            "at once; unset one of them (horovodrun sets the first, multiworker needs the second)"
        )
    if int(environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1 and not {"HOROVOD_RANK", "TF_CONFIG"} & set(environ):
        raise UserError(
            f"OMPI_COMM_WORLD_SIZE={environ['OMPI_COMM_WORLD_SIZE']}: mpirun is not supported, each of its processes "
            "would train alone; start the job with horovodrun, srun or TF_CONFIG"
        )
    if "HOROVOD_RANK" in environ:
        topology = _from_horovod(environ)
    elif "TF_CONFIG" in environ:
        topology = _from_tf_config(environ["TF_CONFIG"])
    elif int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        topology = _from_slurm(environ)
    else:
        topology = Topology()
    cpus = environ.get("SLURM_CPUS_PER_TASK", "")
    return replace(
        topology,
        visible_gpus=environ.get("CUDA_VISIBLE_DEVICES"),
        cpus_per_task=int(cpus) if topology.launcher != "none" and cpus.isdigit() else None,
        slurm=_slurm_job(environ),
    )


def _from_horovod(environ: Mapping[str, str]) -> Topology:
    """What horovodrun tells its processes."""
    names = ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE")
    missing = [name for name in names if name not in environ]
    if missing:
        raise UserError(f"HOROVOD_RANK is set but {', '.join(missing)} is not; start the job with horovodrun")
    try:
        rank, size, local_rank, local_size = (int(environ[name]) for name in names)
    except ValueError as error:
        values = ", ".join(f"{name}={environ[name]}" for name in names)
        raise UserError(f"{values}: must be whole numbers; start the job with horovodrun") from error
    host, port = (environ.get(f"HOROVOD_GLOO_RENDEZVOUS_{name}") for name in ("ADDR", "PORT"))
    if size > 1 and not (host and port):
        raise UserError("HOROVOD_RANK is set but HOROVOD_GLOO_RENDEZVOUS_ADDR is not; start the job with horovodrun")
    store = f"{host}:{port}" if host and port else None
    return _checked(Topology("horovod", rank, size, local_rank, local_size, store=store))


def _from_tf_config(text: str) -> Topology:
    """TensorFlow's own variable: {"cluster": {"worker": [ADDRESS, ...]}, "task": {"type": "worker", "index": N}}."""
    try:
        content = json.loads(text)
        cluster, task = content["cluster"], content["task"]
        kind, index = task["type"], int(task["index"])
        if kind not in ("chief", "worker") or not set(cluster) <= {"chief", "worker"}:
            raise ValueError("only chief and worker tasks train here, no parameter servers and no evaluators")
        jobs = {name: _addresses(cluster.get(name, [])) for name in ("chief", "worker")}
        if not 0 <= index < len(jobs[kind]):
            raise ValueError(f"there is no {kind} {index}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"TF_CONFIG={text}: not usable ({type(error).__name__}: {error}); expected "
            '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}'
        ) from error
    rank = index + (len(jobs["chief"]) if kind == "worker" else 0)
    addresses = (*jobs["chief"], *jobs["worker"])
    hosts = tuple(address.rpartition(":")[0] for address in addresses)
    return replace(_checked(_with_local_ranks("tf_config", rank, hosts)), addresses=addresses, hosts=())


def _addresses(entries: Any) -> list[str]:
    """The `host:port` entries of one job of a cluster; raises ValueError for anything else."""
    addresses = list(entries.values() if isinstance(entries, dict) else entries)
    for address in addresses:
        if not (isinstance(address, str) and re.fullmatch(r".+:\d+", address)) or addresses.count(address) > 1:
            raise ValueError(f"{address} is no host:port of its own")
    return addresses


def _from_slurm(environ: Mapping[str, str]) -> Topology:
    """What srun tells the tasks of a job step: tasks are numbered node by node (its default distribution)."""
    try:
        hosts = expand_node_list(environ["SLURM_STEP_NODELIST"])
        counts = expand_task_counts(environ["SLURM_STEP_TASKS_PER_NODE"])
        rank, local_rank = int(environ["SLURM_PROCID"]), int(environ["SLURM_LOCALID"])
        job, step = int(environ["SLURM_JOB_ID"]), int(environ["SLURM_STEP_ID"])
    except (KeyError, ValueError) as error:
        raise UserError(f"Slurm's variables are not complete ({error}); start the tasks with srun") from error
    if len(hosts) != len(counts):
        raise UserError(
            f"SLURM_STEP_NODELIST={environ['SLURM_STEP_NODELIST']} names {len(hosts)} nodes, "
            f"SLURM_STEP_TASKS_PER_NODE={environ['SLURM_STEP_TASKS_PER_NODE']} {len(counts)}; start the tasks with srun"
        )
    tasks = tuple(host for host, count in zip(hosts, counts, strict=True) for _ in range(count))
    # One port for each step, which follows from the numbers of job and step, so that all ranks know it.
    first = job * 31 + step
    ports = [_FIRST_PORT + (first + number * _CONTACT_STEP) % _NUM_PORTS for number in range(_NUM_CONTACTS)]
    topology = replace(
        _with_local_ranks("slurm", rank, tasks),
        contacts=tuple(f"{hosts[0]}:{port}" for port in ports),
        step=f"{job}.{step}.{environ.get('SLURM_RESTART_COUNT', '0')}",
    )
    if topology.local_rank != local_rank:
        raise UserError(
            f"SLURM_LOCALID={local_rank} where {topology.local_rank} was expected: the tasks are not numbered node by "
            "node; give srun --distribution=block"
        )
    return topology


def _slurm_job(environ: Mapping[str, str]) -> SlurmJob | None:
    job_id = environ.get("SLURM_JOB_ID")
    if job_id is None:
        return None
    array, task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    restarts = environ.get("SLURM_RESTART_COUNT", "0")
    return SlurmJob(f"{array}_{task}" if array and task else job_id, nodes, int(restarts) if restarts.isdigit() else 0)


def _with_local_ranks(launcher: Launcher, rank: int, hosts: tuple[str, ...]) -> Topology:
    if not 0 <= rank < len(hosts):
        raise UserError(f"this process has number {rank}, but there are {len(hosts)} processes, on {', '.join(hosts)}")
    return Topology(
        launcher,
        rank=rank,
        world_size=len(hosts),
        local_rank=hosts[:rank].count(hosts[rank]),
        local_size=hosts.count(hosts[rank]),
        hosts=hosts,
    )


def _checked(topology: Topology) -> Topology:
    if not (0 <= topology.rank < topology.world_size and 0 <= topology.local_rank < topology.local_size):
        raise UserError(f"the launcher's numbers do not fit together: {topology}")
    return topology


def expand_node_list(text: str) -> list[str]:
    """Host names of Slurm's compressed form: `a[1-2,5],b` -> a1, a2, a5, b; leading zeros are kept.

    As `scontrol show hostnames` gives them; but that may be missing in a container.
    """
    hosts: list[str] = []
    for entry in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text):
        parts = re.split(r"\[([^\]]*)\]", entry)  # plain text and ranges, in turns
        choices = [_expand_ranges(part) if index % 2 else [part] for index, part in enumerate(parts)]
        hosts += ["".join(choice) for choice in itertools.product(*choices)]
    return hosts


def _expand_ranges(text: str) -> list[str]:
    """The inside of a bracket: `08-10,12` -> 08, 09, 10, 12."""
    numbers: list[str] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
    return numbers


def expand_task_counts(text: str) -> list[int]:
    """Tasks of each node of Slurm's compressed form: `2(x3),1` -> 2, 2, 2, 1."""
    counts = []
    for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(repeats or 1)
    return counts
