"""What srun tells the tasks of a job step."""

import itertools
import re

from mnist_dist.base.errors import UserError
from mnist_dist.launch.address import host_name, meeting_addresses
from mnist_dist.launch.topology import SlurmJob, Step, Topology
from mnist_dist.launch.variables import MAX_ID, MAX_PROCESSES, Variables, printable

_NODES = r"(?:[A-Za-z0-9._-]|\[[0-9,-]+\])+"


def read_slurm_step(env: Variables) -> Topology:
    """The topology that srun's variables describe; tasks are numbered node by node (srun's default distribution)."""
    nodes, per_node = "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE"
    numbers = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID")
    env.check_complete((nodes, per_node, *numbers), given="SLURM_STEP_NUM_TASKS", launcher="srun")
    hosts, counts = env.parsed(nodes, expand_node_list), env.parsed(per_node, expand_task_counts)
    rank, local_rank, job, step = (env.number(name, maximum=MAX_ID) for name in numbers)
    restarts = env.number("SLURM_RESTART_COUNT", default=0)
    if len(hosts) != len(counts):
        raise UserError(
            f"{env.shown(nodes)} names {len(hosts)} nodes, {env.shown(per_node)} {len(counts)}; "
            "start the tasks with srun"
        )
    tasks = tuple(host for host, count in zip(hosts, counts, strict=True) for _ in range(count))
    for name, fits in (
        ("SLURM_STEP_NUM_TASKS", int(env["SLURM_STEP_NUM_TASKS"]) == len(tasks)),
        ("SLURM_PROCID", rank < len(tasks)),
    ):
        if not fits:
            raise UserError(
                f"{name}={env[name]}, but {env.shown(per_node)} means {len(tasks)} tasks; start the tasks with srun"
            )
    launcher = Step(
        hosts=tasks,
        meeting_addresses=meeting_addresses(hosts[0], job * 31 + step),
        step_id=f"{job}.{step}.{restarts}",
    )
    topology = Topology.of_hosts(launcher, tasks, rank=rank)
    if topology.local_rank != local_rank:
        raise UserError(
            f"SLURM_LOCALID={local_rank}, but expected {topology.local_rank}: the tasks are not numbered node by "
            "node; give srun --distribution=block"
        )
    return topology


def read_slurm_job(env: Variables) -> SlurmJob | None:
    """The Slurm job that this process runs in; None without Slurm."""
    names = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")
    job, array, task = (env.number(name, default=-1, maximum=MAX_ID) for name in names)
    restarts = env.number("SLURM_RESTART_COUNT", default=0)
    if job < 0:
        return None
    nodes = printable(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", ""))
    name = f"{array}_{task}" if array >= 0 and task >= 0 else str(job)
    return SlurmJob(name, nodes, restarts, printable(env.get("SLURMD_NODENAME", "")))


def expand_node_list(text: str) -> list[str]:
    """Host names of Slurm's compressed form: `a[1-2,5],b` -> a1, a2, a5, b; leading zeros are kept.

    The same as `scontrol show hostnames`, which may be missing in a container.

    Raises:
        ValueError: it does not have that form, or is too long.
    """
    if not re.fullmatch(f"{_NODES}(?:,{_NODES})*", text):
        raise ValueError("not a list of nodes such as a[1-2,5],b")
    hosts: list[str] = []
    for entry in re.findall(_NODES, text):
        choices: list[list[str]] = []
        number = 1
        for index, part in enumerate(re.split(r"\[([^\]]*)\]", entry)):  # plain text and ranges alternate
            choices.append(_expand_ranges(part) if index % 2 else [part])
            number *= len(choices[-1])
            if len(hosts) + number > MAX_PROCESSES:
                raise ValueError(f"more than {MAX_PROCESSES} nodes")
        host_name("".join(choice[-1] for choice in choices))  # the longest one
        hosts += ["".join(choice) for choice in itertools.product(*choices)]
    return hosts


def _expand_ranges(text: str) -> list[str]:
    """The inside of a bracket: `08-10,12` -> 08, 09, 10, 12."""
    numbers: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if match is None or first > last:
            raise ValueError(f"[{printable(text, 80)}] is not a list of numbers")
        if len(numbers) + last - first >= MAX_PROCESSES:
            raise ValueError(f"more than {MAX_PROCESSES} nodes")
        numbers += [f"{number:0{len(match[1])}d}" for number in range(first, last + 1)]
    return numbers


def expand_task_counts(text: str) -> list[int]:
    """Tasks per node from Slurm's compressed form: `2(x3),1` -> 2, 2, 2, 1.

    Raises:
        ValueError: it does not have that form, or means too many processes.
    """
    counts: list[int] = []
    num_tasks = 0
    for part in text.split(","):
        match = re.fullmatch(r"([1-9][0-9]{0,8})(?:\(x([1-9][0-9]{0,8})\))?", part)
        if match is None:
            raise ValueError("not a list of task counts such as 2(x3),1")
        count, repeats = int(match[1]), int(match[2] or 1)
        num_tasks += count * repeats
        if num_tasks > MAX_PROCESSES:
            raise ValueError(f"more than {MAX_PROCESSES} tasks")
        counts += [count] * repeats
    return counts
