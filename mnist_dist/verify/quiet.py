"""Whether a machine was quiet while something was timed: otherwise its times are nobody's fault."""

import contextlib
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from mnist_dist.base.memory import control_groups

MAX_SPREAD = 0.10
"""Of what does the same; beyond it a time means nothing."""
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
    return find_withheld(readings) or find_others(readings)


def find_withheld(readings: Sequence[Mapping[str, Any]]) -> str:
    """Whether a machine did not have all of its cores, in words."""
    for host, here, capacity_s in _by_host(readings):
        steal = max(reading["steal_s"] for reading in here) / capacity_s
        if steal > _MAX_OTHERS:
            return f"the hypervisor took {100 * steal:.0f} % of the CPU of {host} away"
        if any(reading["throttled"] > 0 for reading in here):
            return f"the control group of {host}'s processes was throttled (its CPU quota)"
    return ""


def find_others(readings: Sequence[Mapping[str, Any]]) -> str:
    """Whether other processes were busy, in words."""
    for host, here, capacity_s in _by_host(readings):
        others = (max(reading["busy_s"] for reading in here) - sum(reading["own_s"] for reading in here)) / capacity_s
        if others > _MAX_OTHERS:
            return f"other processes took {100 * others:.0f} % of the CPU of {host}"
    return ""


def _by_host(readings: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Mapping[str, Any]], float]]:
    """Each host, the readings there, and how many seconds of CPU it had."""
    for host in sorted({reading["host"] for reading in readings}):
        here = [reading for reading in readings if reading["host"] == host]
        yield host, here, here[0]["cores"] * max(reading["seconds"] for reading in here)


def spread_of(blocks: Sequence[float]) -> float:
    """How well a minimum of blocks repeats: how far those of every other block are apart, A against A."""
    one, other = min(blocks[::2]), min(blocks[1::2])
    return max(one, other) / min(one, other) - 1


class Waiting:
    """How long this process's threads wait for a core while others use it; Linux counts it for each thread."""

    def __init__(self) -> None:
        self._start = _waits_s()

    def read(self) -> float | None:
        """Seconds since, all threads together: what others can have cost at most. None if it is unknown."""
        now = _waits_s()
        if not self._start or not self._start.keys() <= now.keys():  # a thread has ended, and its count is lost
            return None
        return sum(seconds - self._start.get(thread, 0.0) for thread, seconds in now.items())


def _waits_s() -> dict[str, float]:
    """Of each thread; empty if the kernel does not tell."""
    waits = {}
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # it has ended
            waits[path.parent.name] = int(path.read_text().split()[1]) / 1e9
    return waits


def _busy_s(times: Any) -> float:
    return float(times.user + times.nice + times.system + getattr(times, "irq", 0.0) + getattr(times, "softirq", 0.0))


def _own_s() -> float:
    times = psutil.Process().cpu_times()
    return float(times.user + times.system)


def _throttled() -> int:
    """How often this process's control group had to wait for its quota; 0 if it has none."""
    for group in control_groups("cpu", proc=Path("/proc"), cgroups=Path("/sys/fs/cgroup")):
        with contextlib.suppress(OSError, ValueError):
            counts = dict(line.split() for line in (group / "cpu.stat").read_text().splitlines())
            return int(counts.get("nr_throttled", 0))
    return 0
