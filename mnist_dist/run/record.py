"""What a run folder says of its run, whatever became of it: for reports, and for those who watch it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from mnist_dist.base.errors import UserError
from mnist_dist.base.files import describe_os_error, is_locked, read_regular
from mnist_dist.config.train import TrainerConfig
from mnist_dist.results.history import History
from mnist_dist.results.predictions import PREDICTIONS, Predictions
from mnist_dist.run.early_end import early_end
from mnist_dist.run.events import Event, read_events, with_loss
from mnist_dist.run.folder import RunFolder
from mnist_dist.run.incidents import Incident, list_incidents
from mnist_dist.run.inspection import Inspection
from mnist_dist.run.summary import Summary

RunState = Literal["running", "finished", "stopped", "failed", "lost"]
"""stopped: on request, with a checkpoint. lost: it ended without a word."""


@dataclass(frozen=True)
class RunRecord:
    """All that the files of a run folder say; what is missing or damaged is None or empty."""

    path: Path
    config: Mapping[str, Any]
    """`config.yaml` as nested mappings."""
    history: History
    summary: Summary | None
    events: tuple[Event, ...]
    is_alive: bool
    """Whether a job is training there."""
    damage: str
    """What is damaged, in words; files of later stages may well be missing."""
    load_predictions: Callable[[], Predictions | None] = lambda: None
    """Reads `predictions.npz`, which may be large; None if there is none. Raises ValueError if it is damaged."""

    @property
    def num_epochs(self) -> int | None:
        """The epochs that were asked for."""
        trainer = self.config.get("trainer")
        epochs = trainer.get("epochs") if isinstance(trainer, Mapping) else None
        return epochs if isinstance(epochs, int) else None

    @cached_property
    def early_end(self) -> str:
        """Why the results are of fewer epochs than were asked for; empty if they are not, or there are none."""
        try:
            trainer = TrainerConfig(**self.config["trainer"])
        except (KeyError, TypeError, UserError):  # damaged, or of another version
            return ""
        done = self.history.epochs[: self.summary.epochs_completed] if self.summary else ()
        return early_end(trainer, History(done))

    @cached_property
    def state(self) -> RunState:
        """What became of the run."""
        if self.is_alive:
            return "running"
        # Whatever happened later: the results are there, and `train` says that there is nothing to do.
        if (self.summary and self.num_epochs and self.summary.epochs_completed >= self.num_epochs) or self.early_end:
            return "finished"
        last = self.events[-1].kind if self.events else "finished"  # earlier versions wrote no events
        if last == "finished":
            return "finished" if self.summary else "lost"
        return "lost" if last == "started" else last

    @property
    def results(self) -> Summary | None:
        """The results, if they are those of the run as it is now: a finished one may have been trained further."""
        return self.summary if self.state == "finished" else None

    @cached_property
    def incidents(self) -> tuple[Incident, ...]:
        """What was lost while it trained."""
        return list_incidents(self.events, self.history)

    @cached_property
    def reason(self) -> str:
        """Why it ended, unless it has finished all epochs that were asked for."""
        if self.state == "finished":
            return self.early_end
        if self.state in ("stopped", "failed"):
            return self.events[-1].reason
        if self.state == "lost":
            return _last_error(self.path) or "it ended without a word: killed, or its machine was lost"
        return ""


def is_run_folder(path: Path) -> bool:
    """Whether a run has left anything in this folder."""
    return RunFolder(path).is_started


def read_record(path: Path, *, is_alive: bool | None = None) -> RunRecord:
    """Read the run folder `path`.

    Args:
        path: a folder with a run, finished or not.
        is_alive: whether a job is training there, where the caller knows; by default its lock tells.

    Raises:
        UserError: there is no run, or its files cannot be read.
    """
    try:
        if not is_run_folder(path):
            raise UserError(f"run_dir={path}: no run here; name the folder of a run")
        # First: a run that ends meanwhile is running still, and not one that ended without a word.
        is_alive = is_locked(path / "train.log") if is_alive is None else is_alive
        found = Inspection(path)
        present = {name for name in ("history.csv", "summary.json") if (path / name).is_file()}
        events = read_events(path)
        return RunRecord(
            path=path,
            config=found.read_config() or {},
            history=(found.read_history(None) if "history.csv" in present else None) or History(),
            summary=found.read_summary() if "summary.json" in present else None,
            events=events if is_alive else with_loss(path, events),
            is_alive=is_alive,
            damage=found.describe(),
            load_predictions=lambda: _load_predictions(path),
        )
    except OSError as error:
        raise UserError(f"run_dir={path}: cannot be read: {describe_os_error(error)}") from error


def _load_predictions(path: Path) -> Predictions | None:
    try:
        return Predictions.from_bytes(read_regular(path / PREDICTIONS))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"it cannot be read: {describe_os_error(error)}") from error


def _last_error(path: Path) -> str:
    """The last line of the log, if it is that of an error."""
    try:
        lines = (path / "train.log").read_text("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return lines[-1].partition("error: ")[2] if lines else ""
