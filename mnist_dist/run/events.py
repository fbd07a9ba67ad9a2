"""`events.jsonl`: when a run was started and resumed, and when and why it ended each time."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mnist_dist.base.errors import EnvironmentFailed, TrainingFailed
from mnist_dist.base.files import describe_os_error
from mnist_dist.cli.explain import describe
from mnist_dist.launch.losses import Loss
from mnist_dist.results.history import History, from_csv
from mnist_dist.run.folder import RunFolder
from mnist_dist.run.incidents import Incident, list_incidents
from mnist_dist.run.summary import read_as

EVENTS = "events.jsonl"

EventKind = Literal["started", "lost", "stopped", "failed", "finished"]
"""lost: the run ended without a word (killed, or its machine failed); its next start notes it."""


@dataclass(frozen=True)
class LostRank:
    """A process that made the run fail, since it was gone."""

    rank: int
    host: str
    how: str
    """How that was noticed, in words."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line of `events.jsonl`."""

    kind: EventKind
    time: float
    """Seconds since 1970; of a lost run, when it last wrote its history."""
    epoch: int
    """Finished epochs at that time."""
    last_epoch_time: float | None = None
    """Of an end: when the last of them was finished, or the run was started, if none was since."""
    reason: str = ""
    error: str = ""
    """The class of the error that ended the run."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Of a start: strategy, num_replicas, world_size, hosts, devices, versions."""
    lost: LostRank | None = None
    """Of a failure, if that is why."""
    losses: tuple[Loss, ...] = ()
    """Of a start: what its launcher has lost since the start before."""

    @property
    def hosts(self) -> tuple[str, ...]:
        """Of a start: the machine of each rank."""
        found = self.facts.get("hosts")
        return tuple(map(str, found)) if isinstance(found, list) else ()


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


def with_loss(path: Path, events: Sequence[Event]) -> tuple[Event, ...]:
    """The events of a run that is not alive; one that has not noted its end is lost since it last wrote its history."""
    if not events or events[-1].kind != "started":
        return tuple(events)
    since = _last_epoch_time(path, events)
    return (*events, Event(kind="lost", time=since, epoch=_num_epochs(path), last_epoch_time=since))


def _last_epoch_time(path: Path, events: Sequence[Event]) -> float:
    """When `history.csv` was written by the last start, or else when that was."""
    with contextlib.suppress(OSError):
        return max(events[-1].time, (path / "history.csv").stat().st_mtime)
    return events[-1].time


def _num_epochs(path: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return len(from_csv((path / "history.csv").read_text()).epochs)
    return 0


class EventLog:
    """Writes the events of a run as they happen; on the chief only, like all of the run folder."""

    def __init__(self, run_folder: RunFolder, *, at_end: Callable[[], None] = lambda: None) -> None:
        """Call `at_end` whenever the run has ended, for whatever reason, and that has been noted."""
        self._run_folder = run_folder
        self._at_end = at_end
        self._is_running = False

    def note_loss(self) -> None:
        """Note the end of a run that could not note it itself; to be called before its `history.csv` is changed.

        Raises:
            TrainingFailed: the file cannot be read or written.
        """
        before = self._read()
        if before != (events := with_loss(self._run_folder.path, before)):
            self._write(events)

    def started(self, epoch: int, facts: Mapping[str, Any], losses: Sequence[Loss] = ()) -> None:
        """Note a start after `epoch`, and before it what `note_loss` does.

        Of `losses`, all that the job has lost so far, those are noted that have not been.

        Raises:
            TrainingFailed: the file cannot be read or written.
        """
        self._is_running = True
        self.note_loss()
        noted = {loss for event in self._read() for loss in event.losses}
        new = tuple(loss for loss in losses if loss not in noted)
        self._add(Event(kind="started", time=time.time(), epoch=epoch, facts=facts, losses=new))

    def ended(
        self,
        kind: Literal["stopped", "failed", "finished"],
        reason: str = "",
        *,
        error: str = "",
        lost: LostRank | None = None,
    ) -> None:
        """Note that the run has ended, then call `at_end`; not if it has never started, or has ended already.

        Raises:
            TrainingFailed: as `started`.
        """
        if self._is_running:
            self._is_running = False
            path, events = self._run_folder.path, self._read()
            end = Event(
                kind=kind,
                time=time.time(),
                epoch=_num_epochs(path),
                last_epoch_time=_last_epoch_time(path, events) if events else None,
                reason=reason,
                error=error,
                lost=lost,
            )
            self._add(end)
            self._at_end()

    def failed(self, reason: str, error: str = "", *, lost: LostRank | None = None) -> None:
        """Note that the run has failed; if that is impossible, whatever made it fail is what matters."""
        with contextlib.suppress(TrainingFailed):  # the disk is full, or the folder gone
            self.ended("failed", reason, error=error, lost=lost)

    @contextlib.contextmanager
    def noting_failure(self) -> Iterator[None]:
        """Note whatever error ends the run in the block, and let it pass."""
        try:
            yield
        except BaseException as error:
            self.failed(describe(error), type(error).__name__)
            raise

    def settle(self) -> None:
        """For a run that is found finished: note that, if whatever finished it could not."""
        events = self._read()
        if events and events[-1].kind != "finished":
            self._is_running = True
            self.ended("finished")

    def incidents(self, history: History) -> tuple[Incident, ...]:
        """The incidents until now; none on other ranks. Raises TrainingFailed if the file cannot be read."""
        return list_incidents(self._read(), history)

    def _read(self) -> tuple[Event, ...]:
        try:
            return read_events(self._run_folder.path) if self._run_folder.is_writer else ()
        except OSError as error:
            path = self._run_folder.path / EVENTS
            raise EnvironmentFailed(f"{path} cannot be read: {describe_os_error(error)}") from error

    def _add(self, event: Event) -> None:
        self._write((*self._read(), event))

    def _write(self, events: Sequence[Event]) -> None:
        lines = (json.dumps(asdict(one)) + "\n" for one in events)
        self._run_folder.write_lazily(EVENTS, lambda: "".join(lines))
