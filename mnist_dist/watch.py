"""Watch a run: `python -m mnist_dist.watch run_dir=runs/...`, on any machine that sees its folder.

Only reads: neither the run nor its folder notices.
"""

import contextlib
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import get_args

import rich.console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mnist_dist.base.console import Console
from mnist_dist.base.errors import EXIT_FAILURE, EXIT_OK, EXIT_PREEMPTED, UserError
from mnist_dist.base.files import describe_os_error, expand_path
from mnist_dist.cli.main import run
from mnist_dist.config.compose import Command
from mnist_dist.config.rules import Checked, between, ruled
from mnist_dist.launch.child import Signals
from mnist_dist.launch.topology import Topology
from mnist_dist.results.history import Metric
from mnist_dist.results.quantities import counted, seconds_text
from mnist_dist.results.text_chart import draw_text_curves
from mnist_dist.run.checkpoint import CheckpointFolder
from mnist_dist.run.record import RunRecord, RunState, is_run_folder, read_record

EXIT_CODES: dict[RunState, int] = {
    "running": EXIT_OK,
    "finished": EXIT_OK,
    "stopped": EXIT_PREEMPTED,
    "failed": EXIT_FAILURE,
    "lost": EXIT_FAILURE,
}
_STYLES: dict[RunState, str] = {
    "running": "bold cyan",
    "finished": "bold green",
    "stopped": "bold yellow",
    "failed": "bold red",
    "lost": "bold red",
}
_LOG_LINES, _LOG_BYTES = 4, 4000
_SIDE_BY_SIDE = 100  # columns of a terminal from which two charts stand beside each other
_CHART_LINES = (5, 16)


@dataclass
class WatchConfig(Checked):
    """All keys of `python -m mnist_dist.watch`."""

    run_dir: str | None = ruled(
        lambda value: value is not None, "say which run to watch: run_dir=runs/...", default=None
    )
    """The run folder to watch; it need not exist yet."""
    every_s: float = between(0.1, 3600)
    """Seconds from one look to the next."""
    once: bool = False
    """Show the run as it is now, and end."""


@dataclass(frozen=True)
class Look:
    """A run at one moment."""

    record: RunRecord
    reason: str
    """Why it ended."""
    checkpoint: tuple[int, float] | None
    """The epoch of the newest one, and its age in seconds by the clock of this machine."""
    log: tuple[str, ...]
    """The last lines."""
    epochs_per_s: float | None
    """None before the first epoch."""

    @property
    def num_epochs(self) -> int:
        """Those that are asked for."""
        return max(self.record.num_epochs or 0, len(self.record.history.epochs), 1)


class NothingToSee(UserError):
    """There is no run yet, or it cannot be read at the moment."""


def watch(config: WatchConfig, topology: Topology, _: Console) -> int:
    """Show a run until it has ended; returns 0 if it is finished, 75 if it was stopped, 1 if it failed or was lost."""
    if topology.world_size > 1:
        raise UserError(f"{topology.world_size} processes were started; one is enough to watch a run")
    assert config.run_dir is not None
    terminal, observer = rich.console.Console(highlight=False), Observer(expand_path("run_dir", config.run_dir))
    if config.once:
        look = observer.look()
        terminal.print(build_view(look, terminal))
        return EXIT_CODES[look.record.state]
    is_live = terminal.is_terminal and not terminal.is_dumb_terminal
    # Signals as values: KeyboardInterrupt may come at any moment, also where Python ignores exceptions (a finalizer).
    with Signals() as signals, live_view(terminal) if is_live else contextlib.nullcontext(PlainLines(terminal)) as show:
        return _follow(observer, show, signals, every_s=config.every_s)


def _follow(observer: "Observer", show: Callable[[Look | str], None], signals: Signals, *, every_s: float) -> int:
    """Show the run, or why there is none to see yet, until it has ended or a signal comes; returns the exit code."""
    while True:
        try:
            look = observer.look()
        except NothingToSee as error:
            show(f"Waiting: {error}")
        else:
            show(look)
            if look.record.state != "running":
                return EXIT_CODES[look.record.state]
        if came := signals.wait(every_s):
            return 128 + came[0]  # as a shell reports it: 130 for Ctrl-C


class Observer:
    """Looks at a run folder again and again, and so knows how fast the run is, by the clock of this machine."""

    _WINDOW_S = 60.0

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()  # when so many epochs were there, oldest first

    def look(self) -> Look:
        """The run as it is now; raises NothingToSee, and UserError if the folder holds several runs."""
        try:
            record = read_record(self.path)
            return Look(record, record.reason, self._newest_checkpoint(), self._log(), self._pace(record))
        except OSError as error:
            raise NothingToSee(f"run_dir={self.path}: cannot be read: {describe_os_error(error)}") from error
        except UserError as error:
            self._check_is_one_run()
            raise NothingToSee(str(error)) from error

    def _check_is_one_run(self) -> None:
        with contextlib.suppress(OSError):
            runs = [path for path in self.path.iterdir() if is_run_folder(path)] if self.path.is_dir() else []
            if runs:
                newest = max(runs, key=lambda path: path.stat().st_mtime)
                raise UserError(f"run_dir={self.path}: not a run, but a folder of runs; name one: run_dir={newest}")

    def _newest_checkpoint(self) -> tuple[int, float] | None:
        with contextlib.suppress(FileNotFoundError):  # it has just been replaced by a newer one
            if newest := CheckpointFolder(self.path / "checkpoints").newest():
                # The clock of the machine that wrote it may be ahead.
                return newest[0], max(time.time() - newest[1].stat().st_mtime, 0.0)
        return None

    def _log(self) -> tuple[str, ...]:
        try:
            with (self.path / "train.log").open("rb") as stream:
                stream.seek(max(os.fstat(stream.fileno()).st_size - _LOG_BYTES, 0))
                lines = stream.read().decode(errors="replace").splitlines()
        except FileNotFoundError:
            return ()
        return tuple(line for line in lines if line.strip())[-_LOG_LINES:]

    def _pace(self, record: RunRecord) -> float | None:
        """Epochs per second of the last minute, as seen; until there is something to see, as the run measured them."""
        now, epochs = self._clock(), record.history.epochs
        if self._seen and self._seen[-1][1] > len(epochs):
            self._seen.clear()  # resumed from an earlier checkpoint
        if not self._seen or self._seen[-1][1] < len(epochs):
            self._seen.append((now, len(epochs)))
        while len(self._seen) > 2 and now - self._seen[1][0] > self._WINDOW_S:
            self._seen.popleft()
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        if last - first >= 10:
            return (last - first) / (last_s - first_s)
        return 1 / statistics.median(row.epoch_s for row in epochs[-10:]) if epochs else None


def build_view(look: Look, terminal: rich.console.Console) -> rich.console.Group:
    """The run as it fits the terminal."""
    record, (width, height) = look.record, terminal.size
    parts: list[rich.console.RenderableType] = [
        *_describe_state(look),
        _progress(look),
        _describe_pace(look),
        _describe_checkpoint(look),
        *_describe_incidents(look),
        Text(),
    ]
    log_lines = [Text(line, style="dim", no_wrap=True, overflow="crop") for line in look.log]
    if record.history.epochs:
        columns = 2 if width >= _SIDE_BY_SIDE else 1
        room = (height - len(parts) - len(log_lines) - 2) * columns // 2
        size = {"width": (width - 2) // columns, "height": min(max(room, _CHART_LINES[0]), _CHART_LINES[1])}
        charts = Table.grid(padding=(0, 2 * (columns - 1), 0, 0))
        drawn = [
            draw_text_curves(record.history, metric=metric, ascii_only=terminal.options.ascii_only, **size)
            for metric in get_args(Metric)
        ]
        for row in [drawn] if columns == 2 else [[chart] for chart in drawn]:
            charts.add_row(*row)
        parts += [charts, Text()]
    return rich.console.Group(*parts, *log_lines)


def _describe_state(look: Look) -> Iterator[Text]:
    record = look.record
    yield Text.assemble(
        (str(record.path), "bold"),
        "  ",
        (record.state, _STYLES[record.state]),
        f": {look.reason}" if look.reason else "",
        f": test accuracy {record.results.test.accuracy:.2%}" if record.results else "",
    )
    if record.damage:
        yield Text(record.damage, "yellow")


def _progress(look: Look) -> Table:
    done = len(look.record.history.epochs)
    total = done if look.record.early_end and look.record.results else look.num_epochs
    line = Table.grid(padding=(0, 1), expand=True)
    line.add_column(ratio=1)
    line.add_column(no_wrap=True)
    line.add_row(ProgressBar(total=total, completed=done), f"{done}/{total} epochs {done / total:4.0%}")
    return line


def _describe_pace(look: Look) -> Text:
    epochs = look.record.history.epochs
    if look.epochs_per_s is None:
        return Text("no epoch yet", "dim")
    parts = [f"{60 * look.epochs_per_s:,.1f} epochs/min", f"{epochs[-1].images_per_s:,.0f} images/s"]
    if look.record.state == "running":
        left_s = round((look.num_epochs - len(epochs)) / look.epochs_per_s)
        parts.append(f"{timedelta(seconds=left_s)} left")
    return Text("   ".join(parts))


def _describe_checkpoint(look: Look) -> Text:
    if look.checkpoint is None:
        return Text("no checkpoint yet", "dim")
    epoch, age_s = look.checkpoint
    return Text(f"last checkpoint: epoch {epoch}, {timedelta(seconds=round(age_s))} ago")


def _describe_incidents(look: Look) -> Iterator[Text]:
    incidents = look.record.incidents
    if incidents:
        again = counted(sum(one.epochs_computed_again for one in incidents), "epoch")
        lost = seconds_text(sum(one.seconds_lost for one in incidents))
        yield Text(f"{counted(len(incidents), 'incident')}: {again} computed again, {lost} lost", "yellow")


@contextlib.contextmanager
def live_view(terminal: rich.console.Console) -> Iterator[Callable[[Look | str], None]]:
    """A view that is replaced by the next one; the last one stays."""
    with Live(console=terminal, auto_refresh=False) as live:
        yield lambda found: live.update(
            Text(found, "dim") if isinstance(found, str) else build_view(found, terminal), refresh=True
        )


class PlainLines:
    """A line for each new epoch, and for what else is new; for pipes and files."""

    def __init__(self, terminal: rich.console.Console) -> None:
        self._terminal = terminal
        self._waiting = ""
        self._num_epochs: int | None = None

    def __call__(self, found: Look | str) -> None:
        """Print what is new; of a run that is under way, its last epoch to begin with."""
        if isinstance(found, str):
            if found != self._waiting:
                self._print(found)
            self._waiting = found
            return
        epochs = found.record.history.epochs
        known = self._num_epochs if self._num_epochs is not None else len(epochs) - 1
        for row in epochs[max(min(known, len(epochs)), 0) :]:
            self._print(row.describe(found.num_epochs))
        self._num_epochs = len(epochs)
        if found.record.state != "running":
            self._print(" ".join(map(str, _describe_state(found))))

    def _print(self, line: str) -> None:
        self._terminal.print(line, markup=False, emoji=False, soft_wrap=True)


def main() -> None:
    """The console script."""
    run(Command("watch", WatchConfig), watch)


if __name__ == "__main__":
    main()
