"""Whether a machine was quiet while something was timed: otherwise its times are nobody's fault."""

import contextlib
import itertools
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

MAX_SPREAD = 0.10
"""Of blocks that do the same; beyond it a time means nothing."""
_MAX_OTHERS = 0.05


class Noise:
    """Clocks of this machine's processor, from the beginning of a measurement to its end."""

    def __init__(self) -> None:
        self._start_s = time.perf_counter()
        self._machine, self._own, self._throttled = psutil.cpu_times(), _own_s(), _throttled()

    def read(self) -> dict[str, Any]:
        """What was spent since; JSON values, for `find_noise`."""
        machine = psutil.cpu_times()
        return {
            "host": socket.gethostname(),
            "cores": psutil.cpu_count(),
            "seconds": time.perf_counter() - self._start_s,
            "busy_s": _busy_s(machine) - _busy_s(self._machine),
            "own_s": _own_s() - self._own,
            "steal_s": getattr(machine, "steal", 0.0) - getattr(self._machine, "steal", 0.0),
            "throttled": _throttled() - self._throttled,
        }


def find_noise(readings: Sequence[Mapping[str, Any]]) -> str:
    """What disturbed the measurement, in words; empty if nothing did. `readings` are those of all ranks."""
    for host in sorted({reading["host"] for reading in readings}):
        here = [reading for reading in readings if reading["host"] == host]
        capacity_s = here[0]["cores"] * max(reading["seconds"] for reading in here)
        others = (max(reading["busy_s"] for reading in here) - sum(reading["own_s"] for reading in here)) / capacity_s
        steal = max(reading["steal_s"] for reading in here) / capacity_s
        if others > _MAX_OTHERS:
            return f"other processes took {100 * others:.0f} % of the CPU of {host}"
        if steal > _MAX_OTHERS:
            return f"the hypervisor took {100 * steal:.0f} % of the CPU of {host} away"
        if any(reading["throttled"] > 0 for reading in here):
            return f"the control group of {host}'s processes was throttled (its CPU quota)"
    return ""


def spread_of(blocks: Sequence[float]) -> float:
    """How far neighbouring blocks, which do the same, are apart: the median of their ratios' distances from 1."""
    ratios = [max(one, other) / min(one, other) - 1 for one, other in itertools.pairwise(blocks)]
    return sorted(ratios)[len(ratios) // 2]


def _busy_s(times: Any) -> float:
    return float(times.user + times.nice + times.system + getattr(times, "irq", 0.0) + getattr(times, "softirq", 0.0))


def _own_s() -> float:
    times = psutil.Process().cpu_times()
    return float(times.user + times.system)


def _throttled() -> int:
    """How often this process's control group had to wait for its quota; 0 if it has none."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        group = next(line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines()
                     if line.startswith("0::"))  # fmt: skip
        for path in (Path("/sys/fs/cgroup") / group.strip("/"), Path("/sys/fs/cgroup")):
            if (path / "cpu.stat").is_file():
                lines = dict(line.split() for line in (path / "cpu.stat").read_text().splitlines())
                return int(lines.get("nr_throttled", 0))
    return 0
