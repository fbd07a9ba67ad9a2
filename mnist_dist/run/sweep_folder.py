"""The folder of a sweep: its plan, a record of each trial, and each trial's run folder, which has the last word.

sweep.json          the plan (`SweepPlan`)
journal.log         Optuna's journal, made from the rest
sweep.lock          held, for an instant, by whoever changes something here
trials/0003.json    the record of trial 3 (`Trial`)
trials/0003.lock    held as long as trial 3 is trained, by its worker and by the training itself
trials/0003.log     what its trainings printed
trials/0003/        its run folder
"""

import contextlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from mnist_dist.base.errors import EnvironmentProblem, TrainingFailed, UserError
from mnist_dist.base.files import (
    describe_os_error,
    is_locked,
    is_temporary,
    make_folder,
    open_locked,
    polled_lock,
    read_regular,
    remove_temporaries,
    write_atomically,
)
from mnist_dist.run.inspection import Inspection
from mnist_dist.run.summary import read_as

log = logging.getLogger(__name__)

T = TypeVar("T")

TrialState = Literal["waiting", "running", "finished", "pruned", "failed"]
"""waiting: to be trained, or to be continued."""
FINAL: tuple[TrialState, ...] = ("finished", "pruned", "failed")
"""The states of trials that are not trained any further."""

_PLAN = "sweep.json"
_LOCK = "sweep.lock"
_RECORD = re.compile(r"([0-9]{4,})\.json")
LOOK_S = 0.05
"""How often to look whether the lock of a sweep's folder is free."""
_TOLD_AFTER_LOOKS = 100


@dataclass(frozen=True)
class SweepPlan:
    """`sweep.json`: what is searched, and how."""

    space: Mapping[str, str]
    """The texts of the search space by key (`config.search_space.parse_space`)."""
    sampler: str
    pruner: str
    seed: int
    num_trials: int
    """How many trials are planned in all."""
    max_attempts: int
    """How often a trial that crashes is tried from the same checkpoint."""
    training: Mapping[str, str]
    """What all trainings have in common, by dotted key; also `data.sha256`, unless the data varies."""
    overrides: tuple[str, ...]
    """KEY=VALUE as the user gave them for all trainings."""
    config_dir: str | None = None
    """The user's own configuration files."""


@dataclass(frozen=True)
class Attempt:
    """One training process of a trial."""

    started: float
    """Seconds since 1970."""
    host: str
    from_epoch: int
    """The epoch of the checkpoint that it started from; 0 for none."""
    ended: float | None = None
    reached_epoch: int | None = None
    """The epoch of the newest checkpoint at its end."""
    exit_code: int | None = None
    """Negative: the signal that killed it. None: unknown, or not ended yet."""
    reason: str = ""
    """Why it ended, unless it finished."""


@dataclass(frozen=True)
class Trial:
    """`trials/0003.json`: one trial, as its last worker has left it."""

    number: int
    params: Mapping[str, Any]
    """The value of each key of the search space."""
    overrides: tuple[str, ...]
    """The same as texts KEY=VALUE, in the order of the search space."""
    state: TrialState = "waiting"
    value: float | None = None
    """Validation accuracy of the saved model, 0 to 1, of a finished trial."""
    reason: str = ""
    """Why it was pruned or has failed, or why its last attempt ended."""
    attempts: tuple[Attempt, ...] = ()
    pruned_after_epoch: int | None = None

    @property
    def is_final(self) -> bool:
        """Whether it is not trained any further."""
        return self.state in FINAL

    @property
    def texts(self) -> dict[str, str]:
        """The text of each value by key, as the command line has it."""
        return dict(text.split("=", 1) for text in self.overrides)


@dataclass(frozen=True)
class Sweep:
    """A sweep as its folder shows it now."""

    path: Path
    plan: SweepPlan
    trials: tuple[Trial, ...] = field(default_factory=tuple)
    """By number, from 0. Their states are those of the run folders, whatever the records say."""

    @property
    def best(self) -> Trial | None:
        """The finished trial of the highest validation accuracy; the earliest of equals."""
        finished = [trial for trial in self.trials if trial.state == "finished"]
        return max(finished, key=lambda trial: (trial.value or 0.0, -trial.number), default=None)

    def run_dir(self, trial: Trial) -> Path:
        """The run folder of a trial; it need not exist."""
        return SweepFolder(self.path).run_dir(trial.number)


def is_sweep_folder(path: Path) -> bool:
    """Whether there is a sweep in this folder."""
    return (path / _PLAN).is_file()


def read_sweep(path: Path) -> Sweep:
    """Read the sweep in the folder `path`, finished or not; raises UserError if there is none or it is damaged."""
    folder = SweepFolder(path)
    plan = folder.read_plan()
    return Sweep(path, plan, tuple(folder.as_it_is(plan, trial) for trial in folder.read_records()))


class SweepFolder:
    """Reads and writes the files of a sweep; whoever writes holds `locked`.

    All methods raise UserError where a file is missing, damaged or cannot be read, and OSError where one cannot be
    written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._trials = path / "trials"
        self._known: dict[Path, tuple[tuple[int, int, int], Any]] = {}

    @property
    def journal_path(self) -> Path:
        """Optuna's journal."""
        return self.path / "journal.log"

    def run_dir(self, number: int) -> Path:
        """The run folder of a trial."""
        return self._trials / f"{number:04d}"

    def log_path(self, number: int) -> Path:
        """What the trainings of a trial have printed."""
        return self._trials / f"{number:04d}.log"

    def check_usable(self) -> None:
        """Raise UserError if there is something else than a sweep in this folder; there need not be one."""
        try:
            others = [path.name for path in self.path.iterdir() if path.name != _LOCK and not is_temporary(path)]
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"sweep_dir={self.path}: cannot be read: {describe_os_error(error)}") from error
        if others and not is_sweep_folder(self.path):
            raise UserError(
                f"sweep_dir={self.path}: this folder is not empty and is not a sweep (it has no {_PLAN}); name another"
            )

    @contextlib.contextmanager
    def locked(
        self, *, wait: Callable[[int], object] = lambda _: time.sleep(LOOK_S), may_be_new: bool = False
    ) -> Iterator[None]:
        """Keep all others from changing anything here while the block runs.

        Args:
            wait: called before each further look, with their number so far, while another process has the lock; it
                takes `LOOK_S`, and may raise.
            may_be_new: there need not be a sweep in the folder, nor the folder.

        Raises:
            TrainingFailed: there is no sweep in the folder any more.
        """

        def wait_and_tell(looks: int) -> None:
            if looks == _TOLD_AFTER_LOOKS:
                log.warning("%s: waiting for its lock, which another process holds", self.path)
            wait(looks)

        with contextlib.ExitStack() as stack:
            try:
                if may_be_new:
                    self.path.mkdir(parents=True, exist_ok=True)
                else:
                    self._check_is_there()
                stack.enter_context(polled_lock(self.path / _LOCK, wait=wait_and_tell))
            except OSError as error:
                raise EnvironmentProblem(
                    f"sweep_dir={self.path}: cannot be written, or its file system has no locks "
                    f"({describe_os_error(error)}); name a folder on another file system"
                ) from error
            if not may_be_new:
                self._check_is_there()
            yield

    def _check_is_there(self) -> None:
        if not (is_sweep_folder(self.path) and self._trials.is_dir()):
            raise TrainingFailed(
                f"{self.path} is not this sweep's folder any more: it, or what was in it, was removed, moved or "
                "replaced. Nothing more was written there. Put it back and run the same command again to continue; "
                "without it, the sweep starts over"
            )

    def claim(self, number: int) -> int | None:
        """Claim a trial for this process and all that inherit the returned descriptor; None if another one has it."""
        path = self._trials / f"{number:04d}.lock"
        with contextlib.suppress(BlockingIOError):
            if not is_locked(path):  # which does not wait, as taking the lock does
                return open_locked(path)
        return None

    def read_plan(self) -> SweepPlan:
        """The plan."""
        if not is_sweep_folder(self.path):
            raise UserError(f"sweep_dir={self.path}: no sweep here (no {_PLAN}); name the folder of a sweep")
        return self._read(_PLAN, SweepPlan)

    def tidy(self) -> None:
        """Remove what killed workers have left half written; not of a report, which is written without the lock."""
        remove_temporaries(self.path, of=_PLAN)
        remove_temporaries(self._trials)

    def write_plan(self, plan: SweepPlan) -> None:
        """Write the plan."""
        write_atomically(self.path / _PLAN, _to_json(plan))

    def make_trials(self) -> None:
        """Make the folder for the trials; after the plan, without which nobody may take this for a sweep."""
        make_folder(self._trials)

    def read_records(self) -> list[Trial]:
        """The records of all trials, by number."""
        names = [path.name for path in self._trials.iterdir()] if self._trials.is_dir() else []
        numbers = {int(match[1]) for match in map(_RECORD.fullmatch, names) if match}
        used = {int(name[:4]) for name in names if re.match("[0-9]{4}", name)} | numbers
        for number in range(max(used, default=-1) + 1):
            if number not in numbers:
                raise UserError(
                    f"sweep_dir={self.path}: trials/{number:04d}.json is missing, so it is unknown what was tried; put "
                    "it back, or name another sweep_dir"
                )
        return [self.read_record(number) for number in sorted(numbers)]

    def read_record(self, number: int) -> Trial:
        """The record of one trial."""
        name = f"trials/{number:04d}.json"
        trial = self._unless_known(self.path / name, lambda: self._read(name, Trial), lambda trial: trial.is_final)
        if trial.number != number or any("=" not in text for text in trial.overrides):
            raise UserError(f"sweep_dir={self.path}: trials/{number:04d}.json is not that of trial {number}")
        return trial

    def write_record(self, trial: Trial) -> None:
        """Write the record of a trial."""
        write_atomically(self._trials / f"{trial.number:04d}.json", _to_json(trial))

    def result(self, plan: SweepPlan, trial: Trial) -> float | None:
        """The validation accuracy of a trial's saved model; None unless its run folder says that all is trained."""
        run_dir = self.run_dir(trial.number)
        epochs = trial.params.get("trainer.epochs", plan.training.get("trainer.epochs"))
        summary = self._unless_known(run_dir / "summary.json", Inspection(run_dir).read_summary, bool)
        is_done = summary and (summary.epochs_completed >= int(epochs or 1) or summary.ended_early)
        return summary.val.accuracy if summary and is_done else None

    def as_it_is(self, plan: SweepPlan, trial: Trial) -> Trial:
        """A trial with the state that its run folder shows."""
        if trial.state == "pruned":  # a decision about it, not a state of its training
            return trial
        if not trial.is_final and is_locked(self._trials / f"{trial.number:04d}.lock"):
            return replace(trial, state="running")
        value = self.result(plan, trial)
        if value is not None:
            return replace(trial, state="finished", value=value, reason="")
        return trial if trial.state == "failed" else replace(trial, state="waiting", value=None)

    def _unless_known(self, path: Path, read: Callable[[], T], is_final: Callable[[T], bool]) -> T:
        """What `read` makes of the file `path`; what is final is not read again, unless the file is another one."""
        try:
            status = path.stat()
        except OSError:
            return read()  # which knows what to say
        version = status.st_ino, status.st_mtime_ns, status.st_size
        if path in self._known and self._known[path][0] == version:
            known: T = self._known[path][1]
            return known
        found = read()
        if is_final(found):
            self._known[path] = version, found
        return found

    def _read(self, name: str, kind: type[T]) -> T:
        try:
            found: T = read_as(kind, json.loads(read_regular(self.path / name)), "it")
        except OSError as error:
            raise UserError(f"sweep_dir={self.path}: {name} cannot be read: {describe_os_error(error)}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"sweep_dir={self.path}: {name} is damaged ({error}); put it back") from error
        return found


def _to_json(value: SweepPlan | Trial) -> bytes:
    return (json.dumps(asdict(value), indent=2, allow_nan=False) + "\n").encode()
