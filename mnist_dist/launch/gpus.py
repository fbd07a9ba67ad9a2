"""The GPUs of this process, as far as they can be found without starting one."""

import re
import subprocess
from collections.abc import Sequence

from mnist_dist.base.errors import EnvironmentProblem
from mnist_dist.launch.topology import Topology


def own_share(num_gpus: int, topology: Topology) -> range:
    """Which of the GPUs that a process sees are its own: each process of a machine gets an equal share.

    A launcher may also show each process only its own GPU; a single GPU is therefore the process's own.

    Raises:
        EnvironmentProblem: fewer GPUs than processes.
    """
    if topology.local_size == 1 or num_gpus <= 1:
        return range(num_gpus)
    size = num_gpus // topology.local_size
    if size == 0:
        raise EnvironmentProblem(
            f"{topology.local_size} processes on this machine but {num_gpus} GPUs; start at most one process per GPU"
            + (f", in slurm/train.sh: #SBATCH --ntasks-per-node={num_gpus}" if topology.slurm else "")
        )
    return range(topology.local_rank * size, (topology.local_rank + 1) * size)


def own_uuids(topology: Topology) -> list[str]:
    """UUIDs of this process's GPUs; empty if nvidia-smi cannot tell."""
    visible = visible_uuids(query_gpus("uuid"), visible=topology.visible_gpus)
    return [visible[index] for index in own_share(len(visible), topology)]


def query_gpus(field: str) -> list[str]:
    """A field (`uuid`, `name`) of all GPUs that nvidia-smi shows to this process, in order; empty without it."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in output.splitlines()]


def visible_uuids(uuids: Sequence[str], *, visible: str | None) -> list[str]:
    """The GPUs that CUDA_VISIBLE_DEVICES (numbers or UUIDs, separated by commas; None: not set) names, in its order."""
    if visible is None:
        return list(uuids)
    chosen: list[str] = []
    for name in (name.strip() for name in visible.split(",")):
        if re.fullmatch("[0-9]{1,9}", name):
            chosen += uuids[int(name) : int(name) + 1]
        elif name in uuids:
            chosen.append(name)
    return chosen
