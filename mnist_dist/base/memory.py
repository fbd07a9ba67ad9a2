"""How much memory this process may use."""

import contextlib
import math
import resource
from collections.abc import Iterator
from pathlib import Path


def usable_memory(*, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that this process may use at most: the machine's memory, or a smaller limit on its group or itself.

    Swap space counts, and use by others does not: what needs more than this can never run here.
    """
    machine, swap = _read_meminfo(proc)
    limits: list[float] = [machine + swap, *(limit + swap for limit in _group_limits(proc, cgroups))]
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            limits.append(soft)
    return min(limits)


def count_oom_kills(*, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """How many processes of our control group were killed because memory ran out, so far; 0 if unknown."""
    for group in control_groups("memory", proc=proc, cgroups=cgroups):  # our own first, then those around it
        for name in ("memory.events", "memory.oom_control"):
            for line in _lines(group / name):
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0


def _read_meminfo(proc: Path) -> tuple[float, float]:
    """The machine's memory and swap space, bytes; infinite and none if unknown."""
    sizes = {"MemTotal": math.inf, "SwapTotal": 0.0}
    for key, _, value in (line.partition(":") for line in _lines(proc / "meminfo")):
        if key in sizes:
            sizes[key] = int(value.removesuffix("kB")) * 1024
    return sizes["MemTotal"], sizes["SwapTotal"]


def _group_limits(proc: Path, cgroups: Path) -> Iterator[int]:
    """The limits of this process's control groups."""
    for group in control_groups("memory", proc=proc, cgroups=cgroups):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with contextlib.suppress(OSError, ValueError):  # no such file; "max"
                yield int((group / name).read_text())


def control_groups(controller: str, *, proc: Path, cgroups: Path) -> Iterator[Path]:
    """The folders of this process's control groups, of both versions; some may not exist."""
    for line in _lines(proc / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        roots = [cgroups / controller] if controllers else [cgroups, cgroups / "unified"]
        # In a container a group's path may be that outside, while the mount shows only its root.
        for group in (Path(path), *Path(path).parents):
            for root in roots:
                yield root / group.relative_to("/")


def _lines(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return path.read_text().splitlines()
    return []


def describe_bytes(number: float) -> str:
    """A number of bytes for people, with three digits."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if number < 999.5:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} PB"
