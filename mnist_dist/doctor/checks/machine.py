"""Processor, cores, memory and limits of this machine."""

import contextlib
import os
import resource
from pathlib import Path

import psutil

from mnist_dist.base.memory import control_groups, describe_bytes, usable_memory
from mnist_dist.doctor.finding import Finding
from mnist_dist.doctor.sources import Sources
from mnist_dist.launch.topology import Topology

_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one on Arm
# Resident, measured: TensorFlow and Keras once imported, much of it files; the default recipe at its peak.
_NEEDED_BYTES, _COMFORTABLE_BYTES = 0.7e9, 1.6e9
_SHM_BYTES = 256e6
_OPEN_FILES, _FILES_PER_RANK = 1024, 3


def check_processor(proc: Path, *, precision: str) -> Finding:
    """Whether the processor has the instructions that this training needs or would gain from."""
    model, flags = read_processor(proc)
    facts = {"processor": model}
    name = "processor"
    if not flags:
        return Finding(name, "unknown", f"{model}: {proc / 'cpuinfo'} does not tell its instructions", facts=facts)
    if "avx" not in flags and "asimd" not in flags:
        fix = "use a node with a newer processor; a virtual machine may hide AVX: pass the host's CPU through"
        return Finding(name, "error", f"{model}: no AVX, which TensorFlow was built with", fix, facts, "warning")
    if precision == "mixed_bfloat16" and not flags & _BFLOAT16:
        fix = "precision=float32 on this CPU (or a GPU)"
        found = f"{model}: bfloat16 is emulated, and slower than float32"
        return Finding(name, "warning", found, fix, facts, "warning")
    has = "with bfloat16" if flags & _BFLOAT16 else "without bfloat16"
    return Finding(name, "ok", f"{model}, {has}", facts=facts, differing="warning")


def read_processor(proc: Path) -> tuple[str, set[str]]:
    """Model and instructions, as Linux shows them."""
    model, flags = "unknown processor", set[str]()
    with contextlib.suppress(OSError):
        for line in (proc / "cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                return model, set(value.split())
    return model, flags


def check_cores(topology: Topology, sources: Sources, *, num_cores: int | None = None) -> Finding:
    """Whether the cores that this process takes for its own are really there; `num_cores` may be used (affinity)."""
    name = "cores"
    cores = num_cores or len(os.sched_getaffinity(0))
    quota, asked = cpu_quota(sources), topology.cpus_per_task
    if asked is not None and asked > cores:
        found = f"SLURM_CPUS_PER_TASK={asked}, but this process may use {cores} core(s): its threads would take turns"
        return Finding(name, "warning", found, f"give srun the cores as well: srun --cpus-per-task={asked}")
    own = asked or max(1, cores // topology.local_size)
    if cores < topology.local_size and asked is None:
        found = f"{cores} core(s) for {topology.local_size} processes on this machine: they take turns"
        return Finding(
            name, "warning", found, "start fewer processes, or ask for more cores (sbatch --cpus-per-task=...)"
        )
    if quota is not None and quota < own - 0.01:
        found = f"{own} core(s) for this process, but its control group allows {quota:g}: it would be throttled"
        fix = f"threads.inter_op={max(1, int(quota))}, or raise the limit (docker --cpus, Kubernetes limits.cpu)"
        return Finding(name, "warning", found, fix)
    given = " by Slurm" if asked else ""
    return Finding(name, "ok", f"{own} for this process{given}, of {cores} that it may use")


def cpu_quota(sources: Sources) -> float | None:
    """Cores that the control groups of this process allow on average; None without a limit."""
    limits: list[float] = []
    for group in control_groups("cpu", proc=sources.proc, cgroups=sources.cgroups):
        with contextlib.suppress(OSError, ValueError):  # no such file; "max"
            quota, period = (group / "cpu.max").read_text().split()
            limits.append(int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError):
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(quota) > 0:
                limits.append(int(quota) / int(period))
    return min(limits, default=None)


def check_memory(topology: Topology, sources: Sources, *, available: float | None = None) -> Finding:
    """Whether there is memory for this machine's processes; `available` bytes are free."""
    limit = usable_memory(proc=sources.proc, cgroups=sources.cgroups)
    free = min(limit, psutil.virtual_memory().available if available is None else available)
    each = free / topology.local_size
    found = f"{describe_bytes(free)} free of {describe_bytes(limit)} that this process may use"
    if topology.local_size > 1:
        found += f", {describe_bytes(each)} for each of {topology.local_size} processes"
    fix = "ask for more (sbatch --mem=..., docker --memory), or start fewer processes on a machine"
    if each < _NEEDED_BYTES:
        return Finding("memory", "error", f"{found}: TensorFlow alone needs {describe_bytes(_NEEDED_BYTES)}", fix)
    if each < _COMFORTABLE_BYTES:
        return Finding("memory", "warning", f"{found}: little", fix)
    return Finding("memory", "ok", found)


def check_shm(dev: Path, *, num_gpus: int, local_size: int) -> Finding:
    """Whether /dev/shm is large enough for NCCL, over which the GPUs of a machine talk."""
    try:
        system = os.statvfs(dev / "shm")
    except OSError:
        size, free = 0.0, 0.0
    else:
        size, free = float(system.f_blocks * system.f_frsize), float(system.f_bavail * system.f_frsize)
    found = f"{describe_bytes(free)} free of {describe_bytes(size)}" if size else "there is none"
    if free < _SHM_BYTES and num_gpus and max(num_gpus, local_size) > 1:
        fix = "start the container with more: docker --shm-size=1g, or --ipc=host; else remove old files in /dev/shm"
        return Finding("/dev/shm", "warning", f"{found}: too little for NCCL between the GPUs of a machine", fix)
    return Finding("/dev/shm", "ok", found)


def check_open_files(topology: Topology, *, soft: int | None = None) -> Finding:
    """Whether this process may open enough files and connections."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if soft is None else soft
    needed = 200 + (_FILES_PER_RANK * topology.world_size if topology.is_chief else 0)
    fix = f"ulimit -n {max(4096, 2 * needed)} before the command, or in slurm/site.sh"
    if limit < needed:
        return Finding("open files", "error", f"at most {limit}; this rank needs about {needed}", fix)
    if limit < _OPEN_FILES:
        return Finding("open files", "warning", f"at most {limit}: little", fix)
    return Finding("open files", "ok", f"at most {limit}")
