"""Which physical GPUs a process uses, so that two processes on one GPU are noticed."""

import subprocess
from collections.abc import Mapping, Sequence

from mnist_dist.errors import UserError


def list_uuids() -> list[str]:
    """UUIDs of the GPUs this process may see, by their number; empty where nvidia-smi cannot tell."""
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return output.split()


def used_uuids(indices: Sequence[int], *, visible: str | None, uuids: Sequence[str]) -> list[str]:
    """UUIDs of TensorFlow's GPUs `indices`.

    Args:
        indices: as TensorFlow numbers the GPUs of this process.
        visible: CUDA_VISIBLE_DEVICES, which renumbers them: numbers or UUIDs, with commas; None if not set.
        uuids: from `list_uuids`.
    """
    names = [name.strip() for name in visible.split(",")] if visible else list(map(str, range(len(uuids))))
    used: list[str] = []
    for name in (names[index] for index in indices if index < len(names)):
        if name.isdigit():
            used += uuids[int(name) : int(name) + 1]
        else:
            used.append(name)
    return used


def check_not_shared(uuids_by_rank: Mapping[int, Sequence[str]]) -> None:
    """Raise UserError if two ranks use one GPU, naming both."""
    owners: dict[str, int] = {}
    for rank, uuids in uuids_by_rank.items():
        for uuid in uuids:
            if owners.setdefault(uuid, rank) != rank:
                raise UserError(
                    f"ranks {owners[uuid]} and {rank} both use the GPU {uuid}; give each process a GPU of its own "
                    "(CUDA_VISIBLE_DEVICES, or Slurm's --gpus-per-task)"
                )
