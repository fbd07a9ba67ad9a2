"""Starts the contenders, each in its own processes, and lets one at a time compute.

Threads can be set only once per process, hence the processes; other load on the machine should affect all contenders
equally, hence the turns. No TensorFlow here.
"""

import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mnist_dist.base.wire import MAX_GREETING, Garbled, Message, Wire
from mnist_dist.benchmark.entries import Contender
from mnist_dist.benchmark.guard import Guard
from mnist_dist.benchmark.protocol import Lost, receive_all, send
from mnist_dist.config.data import DataConfig

log = logging.getLogger(__name__)

EPOCH = "epoch"
MESSAGES = "message_sizes"
PROFILE = "profile"
ONCE = (MESSAGES, PROFILE)
"""Parts that are measured once, after the rounds."""
_TAIL_LINES = 15
_EXIT_S = 10.0


@dataclass
class Entry:
    """A contender during the benchmark."""

    contender: Contender
    facts: dict[str, Any] = field(default_factory=dict)
    """What its first process says about itself."""
    parts: list[str] = field(default_factory=list)
    """What it can measure, the epoch first."""
    measured: dict[str, list[Message]] = field(default_factory=dict)
    """All answers by part, the warm-up included."""
    error: str | None = None
    """Why it no longer takes part."""
    wires: list[Wire] = field(default_factory=list)
    """Connections to its processes, by rank."""
    pids: list[int] = field(default_factory=list)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    output: Path = Path()

    @property
    def is_running(self) -> bool:
        """Whether it still takes part."""
        return self.error is None and bool(self.parts)


class Referee:
    """Holds the processes of all contenders; none of them outlives it."""

    def __init__(self, folder: Path, *, data: DataConfig, timeout_s: float, guard: Guard) -> None:
        """Write files to `folder`; a contender may take `timeout_s` seconds to start, and for each of its turns."""
        self._folder = folder
        self._data = data
        self._timeout_s = timeout_s
        self._guard = guard
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(0.2)
        self._token = secrets.token_hex(16)
        self._entries: list[Entry] = []

    def __enter__(self) -> "Referee":
        return self

    def __exit__(self, *_: object) -> None:
        for entry in self._entries:
            self._stop(entry)
        self._server.close()

    def start(self, contender: Contender) -> Entry:
        """Start a contender and wait until it is built."""
        entry = Entry(contender, output=self._folder / f"{len(self._entries)}.log")
        self._entries.append(entry)
        try:
            self._launch(entry)
            self._meet(entry)
            ready = receive_all(entry.wires, timeout_s=self._timeout_s)[0]
            entry.facts, entry.parts = ready["ready"], ready["parts"]
            self._pause(entry, signal.SIGSTOP)
        except Lost as lost:
            self._fail(entry, f"start: {lost}")
        return entry

    def let_run(self, entry: Entry, part: str) -> Message | None:
        """Let all processes of one contender measure one part; returns the answer of rank 0, None if it failed."""
        self._pause(entry, signal.SIGCONT)
        try:
            for wire in entry.wires:
                send(wire, {"do": part})
            answer = receive_all(entry.wires, timeout_s=self._timeout_s)[0]
        except Lost as lost:
            self._fail(entry, f"{part}: {lost}")
            return None
        self._pause(entry, signal.SIGSTOP)
        entry.measured.setdefault(part, []).append(answer)
        return answer

    def _launch(self, entry: Entry) -> None:
        contender = entry.contender
        job = entry.output.with_suffix(".json")
        content = {
            "port": self._server.getsockname()[1],
            "token": f"{self._token}-{len(self._entries)}",
            "output": str(entry.output),
            "data": asdict(self._data),
            "kind": contender.kind,
            "precision": contender.precision,
            "options": contender.options,
            "overrides": contender.overrides,
        }
        job.write_text(json.dumps(content))
        child = [sys.executable, "-m", "mnist_dist.benchmark.contenders.child", str(job)]
        with entry.output.open("wb") as output:
            for command in contender.commands(child):
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
                entry.processes.append(process)
                self._guard.watch(process.pid)

    def _meet(self, entry: Entry) -> None:
        """Wait for the connections of all ranks; raises Lost."""
        wires: dict[int, Wire] = {}
        token = f"{self._token}-{len(self._entries)}"
        end = time.monotonic() + self._timeout_s
        while len(wires) < entry.contender.processes:
            if any(process.poll() is not None for process in entry.processes):
                raise Lost("ended")
            if time.monotonic() > end:
                raise Lost(f"did not answer within {self._timeout_s:g} s")
            with contextlib.suppress(OSError, Garbled):  # a stranger, or nobody yet
                connection, _ = self._server.accept()
                wire = Wire(connection, max_bytes=MAX_GREETING)
                hello = wire.receive(timeout_s=self._timeout_s)
                if hello.get("token") != token:  # a latecomer of a contender that has failed, or a stranger
                    wire.close()
                    continue
                wires[int(hello["rank"])] = wire
                entry.pids.append(int(hello["pid"]))
                self._guard.watch(entry.pids[-1])
        entry.wires = [wires[rank] for rank in sorted(wires)]

    def _pause(self, entry: Entry, number: signal.Signals) -> None:
        if entry.contender.is_paused:
            for pid in entry.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def _fail(self, entry: Entry, reason: str) -> None:
        # It may still be writing the reason; wait a moment before killing it.
        self._await_exit(entry, 1.0)
        self._stop(entry)
        codes = ", ".join(str(process.returncode) for process in entry.processes)
        entry.error = f"{reason} (exit code {codes})"
        log.warning("%s failed: %s; the end of its output:", entry.contender.text, entry.error)
        # If processes got as far as opening their own files, these say more than their launcher's.
        files = sorted(self._folder.glob(f"{entry.output.name}.*")) or [entry.output]
        for file in files:
            for line in file.read_text(errors="replace").splitlines()[-_TAIL_LINES:]:
                log.warning("    %s", line)

    def _stop(self, entry: Entry) -> None:
        for wire in entry.wires:
            wire.close()
        for pid in entry.pids:
            # The launcher has not waited for its child yet, so the number still belongs to the child.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        # The launcher (horovodrun) ends by itself once its processes are gone, and cleans up.
        self._await_exit(entry, _EXIT_S if len(entry.processes) < len(entry.pids) else 0.0)
        for process in entry.processes:
            process.kill()
            process.wait()
        entry.pids, entry.wires = [], []

    @staticmethod
    def _await_exit(entry: Entry, seconds: float) -> None:
        end = time.monotonic() + seconds
        for process in entry.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))


def rounds(referee: Referee, entries: list[Entry], *, warmup: int, epochs: int) -> Iterator[int]:
    """Let all contenders run in turns; yields the number of each finished round, from 1, including the warm-up.

    A contender that can measure parts does so in the same turn, so that they can be compared with its epoch.
    """
    for number in range(1, warmup + epochs + 1):
        for entry in entries:
            for part in entry.parts:
                if entry.is_running and part not in ONCE:
                    referee.let_run(entry, part)
        yield number
