"""What TensorFlow's own variable TF_CONFIG tells a process."""

import ipaddress
import json
import re
from typing import Any

from mnist_dist.base.errors import UserError
from mnist_dist.launch.address import join_address, split_address
from mnist_dist.launch.topology import TFConfig, Topology
from mnist_dist.launch.variables import MAX_PROCESSES, Variables, printable


def read_tf_config(env: Variables) -> Topology:
    """TensorFlow's own variable: {"cluster": {"worker": [ADDRESS, ...]}, "task": {"type": "worker", "index": N}}."""
    try:
        rank, addresses = _parse(env["TF_CONFIG"])
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{env.shown('TF_CONFIG')}: not usable ({error}); expected "
            '{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}'
        ) from error
    machines = tuple(_machine(split_address(address)[0]) for address in addresses)
    return Topology.of_hosts(TFConfig(tuple(addresses)), machines, rank=rank)


def _parse(text: str) -> tuple[int, list[str]]:
    """This process's rank and the addresses of all; raises ValueError or RecursionError."""
    content = json.loads(text)
    cluster, task = _member(content, "cluster"), _member(content, "task")
    kind, index = _member(task, "type"), _member(task, "index")
    if kind not in ("chief", "worker") or not isinstance(cluster, dict) or not set(cluster) <= {"chief", "worker"}:
        raise ValueError("only chief and worker tasks are supported, no parameter servers and no evaluators")
    if isinstance(index, bool) or not re.fullmatch(r"-?[0-9]{1,9}", str(index)):
        raise ValueError(f"the index {printable(json.dumps(index), 80)} is not a whole number below {MAX_PROCESSES:,}")
    jobs = {name: _addresses(cluster.get(name, [])) for name in ("chief", "worker")}
    if not 0 <= int(index) < len(jobs[kind]):
        raise ValueError(f"there is no {kind} {index}")
    addresses = [*jobs["chief"], *jobs["worker"]]
    first: dict[tuple[str, int], str] = {}
    for address in addresses:
        host, port = split_address(address)
        if (same := first.setdefault((_machine(host), port), address)) is not address:
            raise ValueError(f"{address} is not unique, {same} is the same host:port")
    return int(index) + (len(jobs["chief"]) if kind == "worker" else 0), addresses


def _member(content: Any, name: str) -> Any:
    if not isinstance(content, dict) or name not in content:
        raise ValueError(f'"{name}" is missing')
    return content[name]


def _addresses(entries: Any) -> list[str]:
    """The `host:port` entries of one job of a cluster, normalised; raises ValueError for anything else."""
    if isinstance(entries, dict):  # TensorFlow's other form: by number
        if set(entries) != set(map(str, range(len(entries)))):
            raise ValueError("the tasks of a job must be numbered from 0, without gaps")
        entries = [entries[str(number)] for number in range(len(entries))]
    if not isinstance(entries, list):
        raise ValueError(f"{printable(json.dumps(entries), 80)} is not a list of host:port")
    return [join_address(*split_address(entry)) for entry in entries]


def _machine(host: str) -> str:
    """One name for all spellings of a machine, as far as they can be recognised: they share their ports."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    address = getattr(address, "ipv4_mapped", None) or address
    return "localhost" if address.is_loopback or address.is_unspecified else str(address)
