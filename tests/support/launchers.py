"""What each launcher puts into the environment of the processes that it starts. Without TensorFlow."""

import contextlib
import json
import os
import secrets
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest


def horovodrun() -> str:
    """The launcher; without Horovod the test is skipped, or fails where skipping is not allowed (CI)."""
    path = Path(sys.executable).with_name("horovodrun")
    if not path.is_file():
        reason = "Horovod is not installed: make horovod"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return str(path)


def free_ports(number: int) -> list[int]:
    """Ports that nobody is listening on."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [server.getsockname()[1] for server in servers]


def local_addresses(size: int, ports: dict[int, int] | None = None) -> list[str]:
    """An address for each rank, with the port given in `ports` or a free one."""
    return [f"127.0.0.1:{(ports or {}).get(rank, port)}" for rank, port in enumerate(free_ports(size))]


def tf_config(addresses: list[str]) -> list[dict[str, str]]:
    """The environment of each worker at these addresses."""
    cluster = {"worker": list(addresses)}
    tasks = [{"type": "worker", "index": index} for index in range(len(addresses))]
    return [{"TF_CONFIG": json.dumps({"cluster": cluster, "task": task})} for task in tasks]


def srun(size: int, nodes: Sequence[str] = ("127.0.0.1",)) -> list[dict[str, str]]:
    """The environment of each task of a job step, with as many on each node; all are names of this machine."""
    per_node = size // len(nodes)
    step = {
        "SLURM_JOB_ID": str(1 + secrets.randbelow(10**8)),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": ",".join(nodes),
        "SLURM_STEP_NUM_TASKS": str(size),
        "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{len(nodes)})" if len(nodes) > 1 else str(size),
    }
    return [{**step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % per_node)} for rank in range(size)]
