"""Which machine it is, and what else runs on it: a time is worth nothing without these."""

import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mnist_dist.launch.gpus import query_gpus


def describe_machine() -> dict[str, Any]:
    """Processor, cores that this process may use, GPUs and system."""
    cpu = platform.processor() or platform.machine()
    for line in _read(Path("/proc/cpuinfo")).splitlines():
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


@dataclass(frozen=True)
class _Process:
    pid: int
    parent: int
    started: int
    """Clock ticks since the machine started; with the number it names a process for good."""
    cpu_s: float


@dataclass
class Bystanders:
    """The CPU seconds of processes that are not this one's, nor its children, from the first to the last `look`."""

    _first: dict[tuple[int, int], float] = field(default_factory=dict)
    _last: dict[tuple[int, int], float] = field(default_factory=dict)
    _names: dict[tuple[int, int], str] = field(default_factory=dict)
    _own: set[tuple[int, int]] = field(default_factory=set)
    load_before: float | None = None
    load_after: float | None = None
    """Load averages over one minute."""

    def look(self) -> None:
        """Read the clocks of all processes; those that come and go between two looks are not seen."""
        self.load_after = os.getloadavg()[0]
        is_first = self.load_before is None
        if is_first:
            self.load_before = self.load_after
        processes = {process.pid: process for process in _list_processes()}
        for process in processes.values():
            key = (process.pid, process.started)
            if _descends(process, processes, ancestor=os.getpid()):
                self._own.add(key)
            # One that has come since then has spent all its time since then.
            self._first.setdefault(key, process.cpu_s if is_first else 0.0)
            self._last[key] = process.cpu_s
            self._names[key] = self._names.get(key) or _name(process.pid)

    def busiest(self, number: int = 5) -> list[dict[str, Any]]:
        """The processes that took most CPU time meanwhile, and at least a tenth of a second; seconds."""
        spent = {key: self._last[key] - self._first[key] for key in set(self._last) - self._own}
        top = sorted(spent, key=lambda key: -spent[key])[:number]
        return [
            {"pid": key[0], "command": self._names[key], "cpu_s": round(spent[key], 2)}
            for key in top
            if spent[key] >= 0.1
        ]


def _list_processes() -> Iterable[_Process]:
    ticks = os.sysconf("SC_CLK_TCK")
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        # The name, in parentheses, may hold anything; the numbers follow it.
        fields = _read(folder / "stat").rpartition(")")[2].split()
        if len(fields) > 19:
            cpu_s = (int(fields[11]) + int(fields[12])) / ticks
            yield _Process(int(folder.name), parent=int(fields[1]), started=int(fields[19]), cpu_s=cpu_s)


def _descends(process: _Process | None, processes: dict[int, _Process], *, ancestor: int) -> bool:
    while process is not None and process.pid != ancestor:
        process = processes.get(process.parent)
    return process is not None


def _name(pid: int) -> str:
    words = _read(Path(f"/proc/{pid}/cmdline")).replace("\0", " ").strip()
    return (words or _read(Path(f"/proc/{pid}/comm")).strip())[:80]


def _read(path: Path) -> str:
    """A file's text; empty where there is none (any more), or it is not for us."""
    if sys.platform != "linux":
        return ""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
