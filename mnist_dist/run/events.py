"""`events.jsonl`: when a run was started and resumed, and when and why it ended each time."""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mnist_dist.base.errors import TrainingFailed
from mnist_dist.results.history import from_csv
from mnist_dist.run.folder import RunFolder
from mnist_dist.run.summary import read_as

EVENTS = "events.jsonl"

EventKind = Literal["started", "lost", "stopped", "failed", "finished"]
"""lost: the run ended without a word (killed, or its machine failed); its next start notes it."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line of `events.jsonl`."""

    kind: EventKind
    time: float
    """Seconds since 1970; of a lost run, when it last wrote its history."""
    epoch: int
    """Finished epochs at that time."""
    reason: str = ""
    error: str = ""
    """The class of the error that ended the run."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Of a start: strategy, num_replicas, world_size, hosts, devices, versions."""


def read_events(path: Path) -> tuple[Event, ...]:
    """The events of the run in the folder `path`, in order; lines that are damaged are left out. Raises OSError."""
    try:
        text = (path / EVENTS).read_text("utf-8", errors="replace")
    except FileNotFoundError:
        return ()
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            event: Event = read_as(Event, json.loads(line), "it")
            found.append(event)
    return tuple(found)


class EventLog:
    """Writes the events of a run as they happen; on the chief only, like all of the run folder."""

    def __init__(self, run_folder: RunFolder, *, at_end: Callable[[], None] = lambda: None) -> None:
        """Call `at_end` whenever the run has ended, for whatever reason, and that has been noted."""
        self._run_folder = run_folder
        self._at_end = at_end
        self._is_running = False

    def started(self, epoch: int, facts: Mapping[str, Any]) -> None:
        """Note a start after `epoch`, and before it the end of a run that could not note it itself."""
        events = read_events(self._run_folder.path)
        if events and events[-1].kind == "started":
            history = self._run_folder.path / "history.csv"
            since = max(events[-1].time, history.stat().st_mtime) if history.is_file() else events[-1].time
            events = (*events, Event(kind="lost", time=since, epoch=self._num_epochs()))
        self._is_running = True
        self._write([*events, Event(kind="started", time=time.time(), epoch=epoch, facts=facts)])

    def ended(self, kind: Literal["stopped", "failed", "finished"], reason: str = "", *, error: str = "") -> None:
        """Note that the run has ended, then call `at_end`; not if it has never started, or has ended already."""
        if not self._is_running:
            return
        self._is_running = False
        events = read_events(self._run_folder.path)
        event = Event(kind=kind, time=time.time(), epoch=self._num_epochs(), reason=reason, error=error)
        self._write([*events, event])
        self._at_end()

    @contextlib.contextmanager
    def noting_failure(self) -> Iterator[None]:
        """Note whatever error ends the run in the block, and let it pass."""
        try:
            yield
        except BaseException as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            with contextlib.suppress(TrainingFailed):  # the disk is full, or the folder gone: the error to show is this
                self.ended("failed", reason=reason, error=type(error).__name__)
            raise

    def _num_epochs(self) -> int:
        with contextlib.suppress(OSError, ValueError):
            return len(from_csv((self._run_folder.path / "history.csv").read_text()).epochs)
        return 0

    def _write(self, events: Iterable[Event]) -> None:
        self._run_folder.write_text(EVENTS, "".join(json.dumps(asdict(event)) + "\n" for event in events))
