"""GPUs: what the driver shows, what Slurm has given, and what TensorFlow can use."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mnist_dist.base.errors import UserError
from mnist_dist.doctor.finding import Finding, from_message
from mnist_dist.doctor.probe import Outcome
from mnist_dist.launch.gpus import own_share, visible_uuids
from mnist_dist.launch.topology import Topology
from mnist_dist.launch.variables import Variables, printable

QUERY = ("--query-gpu=uuid,name,driver_version,memory.total", "--format=csv,noheader,nounits")
_WITHOUT = "train on the CPU: CUDA_VISIBLE_DEVICES="
# The first driver of each release of CUDA (NVIDIA's table of CUDA compatibility).
_FIRST_DRIVERS = {11: 450, 12: 525, 13: 580}


class Gpu(NamedTuple):
    """A GPU as nvidia-smi shows it."""

    uuid: str
    name: str
    driver: str
    memory_mib: str


def parse_gpus(text: str) -> list[Gpu]:
    """The GPUs that nvidia-smi printed for `QUERY`; raises ValueError for anything else."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text)) if row]
    for row in rows:
        if len(row) != len(Gpu._fields) or not row[0].startswith(("GPU-", "MIG-")):
            raise ValueError(printable(", ".join(row), 120))
    return [Gpu(*row) for row in rows]


def check_driver(outcome: Outcome | None, dev: Path) -> tuple[Finding, list[Gpu]]:
    """Whether nvidia-smi answers, and its GPUs; `outcome` is None if there is no such program."""
    name = "GPUs"
    if outcome is None:
        if (dev / "nvidiactl").exists():
            fix = "put nvidia-smi on PATH (in a container: start it with --nv or --gpus all)"
            return Finding(name, "warning", "there is a driver (/dev/nvidiactl), but no nvidia-smi", fix), []
        return Finding(name, "ok", "none: no driver, no nvidia-smi"), []
    if outcome.expired:
        fix = (
            "the driver hangs: drain the node (scontrol update nodename=NODE state=drain reason=gpu) and restart it; "
            f"until then use another, or {_WITHOUT}"
        )
        return Finding(name, "error", f"nvidia-smi {outcome.describe()}", fix), []
    text = " ".join((outcome.stdout + " " + outcome.stderr).split())
    if outcome.code != 0:
        if "No devices were found" in text:
            return Finding(name, "warning", "a driver, but no GPU that this job may use", _ASK), []
        fix = f"load the driver (modprobe nvidia; dmesg | grep NVRM tells why it is not), or {_WITHOUT}"
        if "mismatch" in text:
            fix = "the driver was updated while it was loaded: restart the node"
        found = f"nvidia-smi ended with exit code {outcome.code}: {printable(text, 160)}"
        return Finding(name, "error", found, fix), []
    try:
        gpus = parse_gpus(outcome.stdout)
    except ValueError as error:
        return Finding(name, "unknown", f"nvidia-smi printed something else than GPUs: {error}"), []
    if not gpus:
        return Finding(name, "warning", "a driver, but no GPU that this job may use", _ASK), []
    names = " + ".join(
        f"{[gpu.name for gpu in gpus].count(one)} x {one}" for one in dict.fromkeys(g.name for g in gpus)
    )
    found = f"{names}, driver {gpus[0].driver}"
    facts = {"GPUs": names, "driver": gpus[0].driver}
    return Finding(name, "ok", found, facts=facts, differing="warning"), gpus


_ASK = "ask Slurm for some (sbatch --gpus-per-node=1), or give the container access (--nv, --gpus all)"


def check_shares(gpus: Sequence[Gpu], topology: Topology, variables: Variables) -> Finding:
    """Whether the GPUs that Slurm has given are visible, and each process of this machine gets its own."""
    name, visible = "GPUs of this rank", topology.visible_gpus
    uuids = visible_uuids([gpu.uuid for gpu in gpus], visible=visible)
    given = variables.get("SLURM_GPUS_ON_NODE", "")
    shown = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={printable(visible, 80)})"
    named = [one for one in (visible or "").split(",") if one.strip() not in ("", "-1", "NoDevFiles")]
    if gpus and len(uuids) < len(named):
        fix = f"unset CUDA_VISIBLE_DEVICES, or name some of the {len(gpus)} GPUs"
        return Finding(name, "error", f"names GPUs that are not here{shown}", fix)
    if given.isdecimal() and int(given) > 0 and not uuids:
        found = f"Slurm has given SLURM_GPUS_ON_NODE={given} GPUs, and this process sees none{shown}"
        fix = "see the row GPUs; in a container: start it with --nv; else: srun --gpus-per-node=... as for sbatch"
        return Finding(name, "warning", found, fix)
    try:
        own = own_share(len(uuids), topology)
    except UserError as error:
        return from_message(name, str(error))
    if gpus and not uuids:
        return Finding(name, "warning", f"none: they are hidden{shown}", "unset CUDA_VISIBLE_DEVICES")
    idle = len(uuids) - len(own) * topology.local_size
    if topology.local_size > 1 and len(uuids) > 1 and idle:
        found = f"{len(uuids)} GPUs for {topology.local_size} processes: {idle} of them idle{shown}"
        return Finding(name, "warning", found, f"start one process per GPU: --ntasks-per-node={len(uuids)}")
    found = f"{len(own)} of {len(uuids)}{shown}" if uuids else "none"
    return Finding(name, "ok", found, details={"uuids": [uuids[index] for index in own]})


def check_cuda(gpus: Sequence[Gpu], topology: Topology, outcome: Outcome) -> Finding:
    """Whether TensorFlow can use the GPUs that the driver shows."""
    name = "CUDA"
    build, usable = outcome.answers.get("tensorflow", {}).get("build", {}), outcome.answers.get("gpus")
    visible = visible_uuids([gpu.uuid for gpu in gpus], visible=topology.visible_gpus)
    if not visible:
        return Finding(name, "ok", "not needed: no GPUs")
    if usable is None:
        return Finding(name, "unknown", "TensorFlow did not say which GPUs it can use")
    if not build.get("is_cuda_build", True):
        fix = "install TensorFlow with CUDA: pip install 'tensorflow[and-cuda]' (make cuda)"
        return Finding(name, "warning", f"TensorFlow was built without CUDA: {len(visible)} GPU(s) stay idle", fix)
    cuda = str(build.get("cuda_version", "?"))
    first, driver = _FIRST_DRIVERS.get(_number(cuda), 0), _number(gpus[0].driver)
    if 0 < driver < first:
        found = f"driver {gpus[0].driver} is too old for TensorFlow's CUDA {cuda}"
        return Finding(name, "error", found, f"install driver {first} or later, or {_WITHOUT}")
    if len(usable) < len(visible):
        missing = sorted(set(re.findall(r"Could not load dynamic library '([^']+)'", outcome.stderr)))
        lost = f"; libraries that it does not find: {', '.join(missing)}" if missing else ""
        fix = f"make cuda, or put CUDA {cuda} and cuDNN {build.get('cudnn_version', '?')} on LD_LIBRARY_PATH"
        return Finding(name, "error", f"TensorFlow sees {len(usable)} of {len(visible)} GPU(s){lost}", fix)
    return _check_capability(name, [tuple(gpu["compute_capability"]) for gpu in usable], cuda, build)


def _check_capability(name: str, found: Sequence[tuple[int, ...]], cuda: str, build: dict[str, object]) -> Finding:
    """Whether TensorFlow has kernels for these GPUs."""
    shown = ", ".join(dict.fromkeys(".".join(map(str, one)) for one in found))
    told = f"CUDA {cuda}, compute capability {shown}"
    compiled = re.findall(r"_(\d+)(\d)\b", " ".join(map(str, build.get("cuda_compute_capabilities") or [])))  # type: ignore[call-overload]
    lowest, highest = (limit([(int(a), int(b)) for a, b in compiled], default=None) for limit in (min, max))
    if lowest and min(found) < lowest:
        fix = f"use GPUs of {lowest[0]}.{lowest[1]} or later, or {_WITHOUT}"
        return Finding(name, "error", f"{told}: TensorFlow's kernels start at {lowest[0]}.{lowest[1]}", fix)
    if highest and max(found)[0] > highest[0]:
        fix = "wait: the first start compiles kernels for minutes, later ones find them in ~/.nv/ComputeCache"
        found_text = f"{told}: newer than TensorFlow's kernels ({highest[0]}.{highest[1]})"
        return Finding(name, "warning", found_text, f"{fix}; strategy.start_timeout_s=600")
    return Finding(name, "ok", told, facts={"compute capability": shown})


def _number(version: str) -> int:
    """The first number of a version; 0 if there is none."""
    first = version.partition(".")[0]
    return int(first) if first.isdecimal() else 0
