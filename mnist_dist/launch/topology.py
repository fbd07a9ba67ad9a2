"""The process layout: how many processes train together, and which of them this is.

Pure: a mapping of environment variables in, a `Topology` out. The only reader of environment variables; everything
else is told what it needs to know.
"""

import ipaddress
import itertools
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from mnist_dist.base.errors import UserError

Launcher = Literal["none", "horovod", "tf_config", "slurm"]
_T = TypeVar("_T")

# More than the largest machines run; what a mistyped variable asks for must not fill the memory.
_MAX_PROCESSES, _MAX_CORES, _MAX_ID = 100_000, 4_096, 2**32 - 1
_MAX_HOST_NAME, _MAX_SHOWN = 253, 200
_HOROVOD_NAMES = ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE")
_STORE_NAMES = ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT")
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST_NAME = rf"{_LABEL}(?:\.{_LABEL})*"
# Settings of Horovod that it ends on, with no word, where they are no numbers or too large for it.
_HOROVOD_SETTINGS = {
    "HOROVOD_CACHE_CAPACITY": 10**6,
    "HOROVOD_CYCLE_TIME": 10**5,
    "HOROVOD_FUSION_THRESHOLD": 2**31 - 1,
    "HOROVOD_GLOO_TIMEOUT_SECONDS": 10**6,
}
_NODES = r"(?:[A-Za-z0-9._-]|\[[0-9,-]+\])+"

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
    interface: str | None = None
    """The network interface that the user chose for Horovod (HOROVOD_GLOO_IFACE)."""
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
    """The process layout that the launcher set up. An empty variable is one that is not set.

    Horovod's variables and TF_CONFIG are stronger than Slurm's, which are there in every process of an allocation.

    Raises:
        UserError: two launchers at once, or a variable that is not usable, or does not fit to the others.
    """
    told = {name: value.strip() for name, value in environ.items() if value.strip()}
    horovod = next((name for name in _HOROVOD_NAMES if name in told), None)
    if horovod and "TF_CONFIG" in told:
        raise UserError(
            f"{_shown(told, horovod)} and {_shown(told, 'TF_CONFIG')} are both set: two launchers "
            "at once; unset one of them (horovodrun sets the first, multiworker needs the second)"
        )
    if _number(told, "OMPI_COMM_WORLD_SIZE", default=1, minimum=1) > 1 and not horovod and "TF_CONFIG" not in told:
        raise UserError(
            f"OMPI_COMM_WORLD_SIZE={told['OMPI_COMM_WORLD_SIZE']}: mpirun is not supported, each of its processes "
            "would train alone; start the job with horovodrun, srun or TF_CONFIG"
        )
    if horovod:
        topology = _from_horovod(told)
    elif "TF_CONFIG" in told:
        topology = _from_tf_config(told)
    elif _number(told, "SLURM_STEP_NUM_TASKS", default=1, minimum=1) > 1:
        topology = _from_slurm(told)
    elif "SLURM_STEP_NUM_TASKS" not in told and _number(told, "SLURM_PROCID", default=0) > 0:
        raise UserError(
            f"SLURM_PROCID={told['SLURM_PROCID']}: one of several tasks, but SLURM_STEP_NUM_TASKS is not set, so each "
            "would train alone; start the tasks with srun"
        )
    else:
        topology = Topology()
    _check_horovod_settings(told)
    cpus = _number(told, "SLURM_CPUS_PER_TASK", default=0, minimum=1, maximum=_MAX_CORES)
    return replace(
        topology,
        interface=told.get("HOROVOD_GLOO_IFACE"),
        visible_gpus=environ.get("CUDA_VISIBLE_DEVICES"),  # empty: no GPUs
        cpus_per_task=cpus or None if topology.launcher != "none" else None,
        slurm=_slurm_job(told),
    )


def _from_horovod(told: Mapping[str, str]) -> Topology:
    """What horovodrun tells its processes."""
    given = next(name for name in _HOROVOD_NAMES if name in told)
    _check_complete(told, _HOROVOD_NAMES, given=given, launcher="horovodrun")
    rank, local_rank = (_number(told, name) for name in ("HOROVOD_RANK", "HOROVOD_LOCAL_RANK"))
    size, local_size = (_number(told, name, minimum=1) for name in ("HOROVOD_SIZE", "HOROVOD_LOCAL_SIZE"))
    # Not read here, but by Horovod, which would wait for nodes that are not there.
    node, num_nodes = _number(told, "HOROVOD_CROSS_RANK", default=0), _number(told, "HOROVOD_CROSS_SIZE", default=1)
    fits = (
        rank < size and local_rank < local_size <= size and local_rank <= rank,
        node < num_nodes <= size - local_size + 1,
    )
    if not all(fits):
        names = [name for name in (*_HOROVOD_NAMES, "HOROVOD_CROSS_RANK", "HOROVOD_CROSS_SIZE") if name in told]
        values = ", ".join(f"{name}={told[name]}" for name in names)
        raise UserError(f"{values}: these do not fit together; start the job with horovodrun")
    store = None
    if size > 1 or any(name in told for name in _STORE_NAMES):
        _check_complete(told, _STORE_NAMES, given="HOROVOD_RANK", launcher="horovodrun")
        host = _used(told, _STORE_NAMES[0], lambda text: _ipv6(text.strip("[]")) if ":" in text else _host_name(text))
        store = join_address(host, _number(told, _STORE_NAMES[1], minimum=1, maximum=65_535))
    return Topology("horovod", rank, size, local_rank, local_size, store=store)


def _check_horovod_settings(told: Mapping[str, str]) -> None:
    for name, largest in _HOROVOD_SETTINGS.items():
        value = told.get(name, "0")
        if not re.fullmatch(r"[0-9]{1,12}(?:\.[0-9]{1,12})?", value) or float(value) > largest:
            raise UserError(f"{_shown(told, name)}: must be a number from 0 to {largest}; correct it, or unset it")


def _from_tf_config(told: Mapping[str, str]) -> Topology:
    """TensorFlow's own variable: {"cluster": {"worker": [ADDRESS, ...]}, "task": {"type": "worker", "index": N}}."""
    try:
        rank, addresses = _read_tf_config(told["TF_CONFIG"])
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{_shown(told, 'TF_CONFIG')}: not usable ({error}); expected "
            '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}'
        ) from error
    machines = tuple(_machine(split_address(address)[0]) for address in addresses)
    return replace(_with_local_ranks("tf_config", rank, machines), addresses=tuple(addresses), hosts=())


def _read_tf_config(text: str) -> tuple[int, list[str]]:
    """This process's rank and the addresses of all; raises ValueError or RecursionError."""
    content = json.loads(text)
    cluster, task = _member(content, "cluster"), _member(content, "task")
    kind, index = _member(task, "type"), _member(task, "index")
    if kind not in ("chief", "worker") or not isinstance(cluster, dict) or not set(cluster) <= {"chief", "worker"}:
        raise ValueError("only chief and worker tasks train here, no parameter servers and no evaluators")
    if isinstance(index, bool) or not re.fullmatch(r"-?[0-9]{1,9}", str(index)):
        raise ValueError(f"the index {_short(json.dumps(index), 80)} is no whole number below {_MAX_PROCESSES:,}")
    jobs = {name: _addresses(cluster.get(name, [])) for name in ("chief", "worker")}
    if not 0 <= int(index) < len(jobs[kind]):
        raise ValueError(f"there is no {kind} {index}")
    addresses = [*jobs["chief"], *jobs["worker"]]
    first: dict[tuple[str, int], str] = {}
    for address in addresses:
        host, port = split_address(address)
        if (same := first.setdefault((_machine(host), port), address)) is not address:
            raise ValueError(f"{address} is no host:port of its own, {same} is the same")
    return int(index) + (len(jobs["chief"]) if kind == "worker" else 0), addresses


def _member(content: Any, name: str) -> Any:
    if not isinstance(content, dict) or name not in content:
        raise ValueError(f'"{name}" is missing')
    return content[name]


def _addresses(entries: Any) -> list[str]:
    """The `host:port` entries of one job of a cluster, in one spelling; raises ValueError for anything else."""
    if isinstance(entries, dict):  # TensorFlow's other form: by number
        if set(entries) != set(map(str, range(len(entries)))):
            raise ValueError("the tasks of a job are numbered from 0, without a gap")
        entries = [entries[str(number)] for number in range(len(entries))]
    if not isinstance(entries, list):
        raise ValueError(f"{_short(json.dumps(entries), 80)} is no host:port list")
    return [join_address(*split_address(entry)) for entry in entries]


def split_address(address: Any) -> tuple[str, int]:
    """Host and port of `host:port` or `[IPv6]:port`, in one spelling; raises ValueError for anything else."""
    text = address if isinstance(address, str) else json.dumps(address)
    shown = f"{_short(text, 80)} is no host:port"
    parts = re.fullmatch(r"(?:\[([^\[\]]*)\]|([^:\[\]]*)):([0-9]{1,9})", text)
    if parts is None:
        raise ValueError(shown + ("; an IPv6 address goes into brackets: [::1]:2345" if text.count(":") > 1 else ""))
    ipv6, name, port = parts[1], parts[2], int(parts[3])
    if not 1 <= port <= 65_535:
        raise ValueError(f"{shown}: ports are 1 to 65535")
    try:
        return (_host_name(name) if ipv6 is None else _ipv6(ipv6)), port
    except ValueError as error:
        raise ValueError(f"{shown}: {error}") from error


def join_address(host: str, port: int) -> str:
    """`host:port`, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _ipv6(text: str) -> str:
    if not re.fullmatch(r"[0-9A-Fa-f:.]{2,45}(?:%[A-Za-z0-9._-]{1,15})?", text):  # with the zone of a link-local one
        raise ValueError(f'"{_short(text, 80)}" is no IPv6 address')
    return str(ipaddress.IPv6Address(text))


def _host_name(text: str) -> str:
    """One spelling of a host's name or IPv4 address; raises ValueError if it is neither."""
    name = text.lower().removesuffix(".")
    if len(name) > _MAX_HOST_NAME or not re.fullmatch(_HOST_NAME, name):
        raise ValueError(f'"{_short(text, 80)}" is no name of a host')
    # The system would read it as one IPv4 address or another: 1, 0x7f.1, 127.1
    if re.fullmatch(r"[0-9]+|0x[0-9a-f]*", name.rpartition(".")[2]):
        return str(ipaddress.IPv4Address(name))
    return name


def _machine(host: str) -> str:
    """One name for all spellings of a machine, as far as they can be told: every port is one for all of them."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    address = getattr(address, "ipv4_mapped", None) or address
    return "localhost" if address.is_loopback or address.is_unspecified else str(address)


def _from_slurm(told: Mapping[str, str]) -> Topology:
    """What srun tells the tasks of a job step: tasks are numbered node by node (its default distribution)."""
    nodes, per_node = "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE"
    numbers = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID")
    _check_complete(told, (nodes, per_node, *numbers), given="SLURM_STEP_NUM_TASKS", launcher="srun")
    hosts, counts = _used(told, nodes, expand_node_list), _used(told, per_node, expand_task_counts)
    rank, local_rank, job, step = (_number(told, name, maximum=_MAX_ID) for name in numbers)
    restarts = _number(told, "SLURM_RESTART_COUNT", default=0)
    if len(hosts) != len(counts):
        raise UserError(
            f"{_shown(told, nodes)} names {len(hosts)} nodes, {_shown(told, per_node)} {len(counts)}; "
            "start the tasks with srun"
        )
    tasks = tuple(host for host, count in zip(hosts, counts, strict=True) for _ in range(count))
    for name, fits in (
        ("SLURM_STEP_NUM_TASKS", int(told["SLURM_STEP_NUM_TASKS"]) == len(tasks)),
        ("SLURM_PROCID", rank < len(tasks)),
    ):
        if not fits:
            raise UserError(
                f"{name}={told[name]}, but {_shown(told, per_node)} means {len(tasks)} tasks; start the tasks with srun"
            )
    # One port for each step, which follows from the numbers of job and step, so that all ranks know it.
    first = job * 31 + step
    ports = [_FIRST_PORT + (first + number * _CONTACT_STEP) % _NUM_PORTS for number in range(_NUM_CONTACTS)]
    topology = replace(
        _with_local_ranks("slurm", rank, tasks),
        contacts=tuple(f"{hosts[0]}:{port}" for port in ports),
        step=f"{job}.{step}.{restarts}",
    )
    if topology.local_rank != local_rank:
        raise UserError(
            f"SLURM_LOCALID={local_rank} where {topology.local_rank} was expected: the tasks are not numbered node by "
            "node; give srun --distribution=block"
        )
    return topology


def _slurm_job(told: Mapping[str, str]) -> SlurmJob | None:
    names = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
    job, array, task = (_number(told, name, default=-1, maximum=_MAX_ID) for name in names)
    restarts = _number(told, "SLURM_RESTART_COUNT", default=0)
    if job < 0:
        return None
    nodes = _short(told.get("SLURM_STEP_NODELIST") or told.get("SLURM_JOB_NODELIST", ""))
    return SlurmJob(f"{array}_{task}" if array >= 0 and task >= 0 else str(job), nodes, restarts)


def _with_local_ranks(launcher: Launcher, rank: int, hosts: tuple[str, ...]) -> Topology:
    return Topology(
        launcher,
        rank=rank,
        world_size=len(hosts),
        local_rank=hosts[:rank].count(hosts[rank]),
        local_size=hosts.count(hosts[rank]),
        hosts=hosts,
    )


def _check_complete(told: Mapping[str, str], names: tuple[str, ...], *, given: str, launcher: str) -> None:
    missing = [name for name in names if name not in told]
    if missing:
        raise UserError(f"{_shown(told, given)} is set but {', '.join(missing)} is not; start the job with {launcher}")


def _number(
    told: Mapping[str, str], name: str, *, default: int = 0, minimum: int = 0, maximum: int = _MAX_PROCESSES
) -> int:
    """A variable that is a whole number, or the default where it is not set."""
    if name not in told:
        return default
    number = int(told[name]) if re.fullmatch("[0-9]{1,18}", told[name]) else -1
    if not minimum <= number <= maximum:
        raise UserError(
            f"{_shown(told, name)}: must be a whole number from {minimum} to {maximum}; unset it, or start the "
            "processes with the launcher that sets it"
        )
    return number


def _used(told: Mapping[str, str], name: str, read: Callable[[str], _T]) -> _T:
    """What `read` makes of a variable; its ValueError becomes one that names the variable."""
    try:
        return read(told[name])
    except ValueError as error:
        raise UserError(f"{_shown(told, name)}: {error}; start the processes with the launcher that sets it") from error


def _shown(told: Mapping[str, str], name: str) -> str:
    return f"{name}={_short(told[name])}"


def _short(value: str, length: int = _MAX_SHOWN) -> str:
    """A value from outside, as it may stand in a message."""
    printable = "".join(letter if letter.isprintable() else "?" for letter in value[:length])
    return printable + ("..." if len(value) > length else "")


def expand_node_list(text: str) -> list[str]:
    """Host names of Slurm's compressed form: `a[1-2,5],b` -> a1, a2, a5, b; leading zeros are kept.

    As `scontrol show hostnames` gives them; but that may be missing in a container.

    Raises:
        ValueError: it is not of that form, or too long.
    """
    if not re.fullmatch(f"{_NODES}(?:,{_NODES})*", text):
        raise ValueError("no list of nodes such as a[1-2,5],b")
    hosts: list[str] = []
    for entry in re.findall(_NODES, text):
        choices: list[list[str]] = []
        number = 1
        for index, part in enumerate(re.split(r"\[([^\]]*)\]", entry)):  # plain text and ranges, in turns
            choices.append(_expand_ranges(part) if index % 2 else [part])
            number *= len(choices[-1])
            if len(hosts) + number > _MAX_PROCESSES:
                raise ValueError(f"more than {_MAX_PROCESSES} nodes")
        _host_name("".join(choice[-1] for choice in choices))  # the longest one
        hosts += ["".join(choice) for choice in itertools.product(*choices)]
    return hosts


def _expand_ranges(text: str) -> list[str]:
    """The inside of a bracket: `08-10,12` -> 08, 09, 10, 12."""
    numbers: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if match is None or first > last:
            raise ValueError(f"[{_short(text, 80)}] is no list of numbers")
        if len(numbers) + last - first >= _MAX_PROCESSES:
            raise ValueError(f"more than {_MAX_PROCESSES} nodes")
        numbers += [f"{number:0{len(match[1])}d}" for number in range(first, last + 1)]
    return numbers


def expand_task_counts(text: str) -> list[int]:
    """Tasks of each node of Slurm's compressed form: `2(x3),1` -> 2, 2, 2, 1.

    Raises:
        ValueError: it is not of that form, or means more processes than there can be.
    """
    counts: list[int] = []
    num_tasks = 0
    for part in text.split(","):
        match = re.fullmatch(r"([1-9][0-9]{0,8})(?:\(x([1-9][0-9]{0,8})\))?", part)
        if match is None:
            raise ValueError("no list of numbers of tasks such as 2(x3),1")
        count, repeats = int(match[1]), int(match[2] or 1)
        num_tasks += count * repeats
        if num_tasks > _MAX_PROCESSES:
            raise ValueError(f"more than {_MAX_PROCESSES} tasks")
        counts += [count] * repeats
    return counts
