"""Which machine this is, and what else runs on it: without these a time means nothing."""

import contextlib
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from mnist_dist.launch.gpus import query_gpus


def describe_machine() -> dict[str, Any]:
    """Processor, cores that this process may use, GPUs and system."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # psutil does not know the model
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                cpu = value.strip()
                break
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "gpus": query_gpus("name"),
        "system": platform.platform(),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
    }


@dataclass
class Bystanders:
    """The CPU seconds of processes other than this one and its children, from the first to the last `look`."""

    _first: dict[psutil.Process, float] = field(default_factory=dict)
    _last: dict[psutil.Process, float] = field(default_factory=dict)
    _names: dict[psutil.Process, str] = field(default_factory=dict)
    _own: set[psutil.Process] = field(default_factory=set)
    load_before: float | None = None
    load_after: float | None = None
    """Load averages over one minute."""

    def look(self) -> None:
        """Read the clocks of all processes; those that come and go between two looks are not seen."""
        self.load_after = os.getloadavg()[0]
        is_first = self.load_before is None
        if is_first:
            self.load_before = self.load_after
        this = psutil.Process()
        self._own |= {this, *this.children(recursive=True)}
        for process in psutil.process_iter(["cpu_times", "cmdline", "name"]):
            if (times := process.info["cpu_times"]) is None:
                continue  # not readable for this user
            cpu_s = times.user + times.system
            # A process that started after the first look has spent all its time since.
            self._first.setdefault(process, cpu_s if is_first else 0.0)
            self._last[process] = cpu_s
            self._names.setdefault(
                process, (" ".join(process.info["cmdline"] or []) or process.info["name"] or "")[:80]
            )

    def busiest(self, number: int = 5) -> list[dict[str, Any]]:
        """The processes that used most CPU time between the looks, and at least a tenth of a second; seconds."""
        spent = {process: self._last[process] - self._first[process] for process in set(self._last) - self._own}
        top = sorted(spent, key=lambda process: -spent[process])[:number]
        return [
            {"pid": process.pid, "command": self._names[process], "cpu_s": round(spent[process], 2)}
            for process in top
            if spent[process] >= 0.1
        ]
