"""The run folder: what is in it, when a folder may be used, and how its files are written.

Only the chief writes: on the other ranks all writing methods do nothing, so that callers need not check.
"""

import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from mnist_dist.base.errors import EnvironmentFailed, EnvironmentProblem, TrainingFailed, UserError
from mnist_dist.base.files import (
    check_writable,
    describe_os_error,
    expand_path,
    is_temporary,
    make_folder,
    make_new_folder,
    path_by_time,
    remove_temporaries,
    write_atomically,
)
from mnist_dist.config.train import TrainConfig
from mnist_dist.results.history import History, to_csv
from mnist_dist.results.predictions import PREDICTIONS, Predictions
from mnist_dist.run.checkpoint import Checkpoint, CheckpointFolder
from mnist_dist.run.lock import HOLDER, FolderLock, Holder, read_holder
from mnist_dist.run.summary import MODEL, RESULT_FILES, Summary

if TYPE_CHECKING:
    import keras

log = logging.getLogger(__name__)

REPORT_PAGE = "report.html"
"""All of it for readers; also the name of the page of a sweep, or of a folder of runs."""
RUN_FILES = (
    *("config.yaml", "train.log", "history.csv", "summary.json", "events.jsonl", REPORT_PAGE, HOLDER),
    *RESULT_FILES,
)
"""The files of a training run except its checkpoints."""
RUN_FOLDERS = ("checkpoints", "plots")
"""The folders in a training run's folder."""
TENSORBOARD = "tensorboard"
"""One more, for runs with `tensorboard=true`."""


class RunFolder:
    """The files of one run; every file is replaced atomically, so a reader never sees half of one."""

    def __init__(self, path: Path, *, is_writer: bool = True, is_new: bool = False) -> None:
        self.path = path
        self.is_writer = is_writer
        self._is_new = is_new
        self._found_run = False
        self._lock = FolderLock()
        self._holder = Holder()
        self._digests: dict[str, str] = {}  # SHA-256 of the files that this object has written

    @classmethod
    def from_config(cls, run_dir: str | None, *, is_writer: bool = True) -> "RunFolder":
        """The configured folder, or a new one below `runs/`, named by the time; raises UserError for `~nobody`."""
        if run_dir is not None:
            return cls(expand_path("run_dir", run_dir), is_writer=is_writer)
        return cls(path_by_time(), is_writer=is_writer, is_new=True)

    @property
    def log_path(self) -> Path:
        """The log file."""
        return self.path / "train.log"

    @property
    def checkpoints(self) -> CheckpointFolder:
        """The states to resume from."""
        return CheckpointFolder(self._path("checkpoints"), check=self._lock.check)

    def check_usable(
        self, *, may_resume: bool = True, files: Sequence[str] = RUN_FILES, folders: Sequence[str] = RUN_FOLDERS
    ) -> None:
        """Raise UserError unless this is (or can become) a run folder that can be written; leaves nothing behind.

        `files` and `folders` will be written in it.
        """
        if not self.is_writer:
            return
        place = ""
        try:
            if self.path.is_dir() and not self.is_started and self._holds_other_things():
                raise UserError(
                    f"run_dir={self.path}: this folder is not empty and is not a run folder (it has no config.yaml); "
                    "name another one"
                )
            if not may_resume and self.is_started:
                raise UserError(
                    f"resume=never: {self.path} already holds a run; name another run_dir, or give resume=auto"
                )
            for place in ("", *folders):
                check_writable(self._path(place))
            for place in files:
                if os.path.lexists(self._path(place)) and not self._path(place).is_file():
                    raise UserError(f"run_dir={self.path}: {place} is not a regular file; move it away")
        except OSError as error:
            raise EnvironmentProblem(
                f"run_dir={self.path}: {place}{' ' if place else ''}cannot be written: {error.strerror or error}"
            ) from error

    def claim(self, holder: Holder = Holder(), *, wait_s: float = 0.0, holder_is_lost: bool = False) -> None:  # noqa: B008 (a frozen value)
        """Keep other jobs out of a folder that holds a run until this process ends; to be called before it is read.

        A folder without a run is left as it is until `create`. Raises UserError if another job is training there;
        LostTouch if it has been waited for.

        Args:
            holder: this process, which notes that it has the folder.
            wait_s: how long to wait for a process that is training there.
            holder_is_lost: whether such a process is on a machine that does not answer. Then the run is taken over
                from it, and should it wake up, it finds that and writes nothing more.
        """
        self._lock = FolderLock(wait_s=wait_s, holder_is_lost=holder_is_lost)
        self._holder = holder
        self._found_run = self.is_started
        # A command that is refused must not make the file.
        if self._found_run and self.log_path.exists():
            is_taken_over = self._lock.take(self.log_path)
            if read_holder(self.path) != holder:  # a command that has nothing to do changes nothing
                self.write_text(HOLDER, holder.to_json())
            if is_taken_over:
                log.warning("%s: taken over from a process on a machine that was lost", self.path)
                with self._failing_in_words():
                    self._remove_temporaries()  # files that it has written, but not renamed yet

    def create(self, config: TrainConfig) -> None:
        """Make the folder and write `config.yaml`, which composes to the same run with `--config-name`.

        Raises UserError, before anything changes, if another job is training here or has started a run since.
        """
        if not self.is_writer:
            return
        with self._failing_in_words():
            self.reserve()
        if not self._lock.is_held:
            self._lock.take(self.log_path)
            if self.is_started and not self._found_run:
                raise UserError(
                    f"run_dir={self.path}: another job has started a run here; run the same command again to "
                    "resume it, or name another run_dir"
                )
            self.write_text(HOLDER, self._holder.to_json())
        with self._failing_in_words():
            self._remove_temporaries()  # of a run that was killed
        # The choices first, for their schemas; then every value.
        defaults = [
            "schema/train@_global_",
            {"data": config.data.name},
            {"augment": config.augment.name},
            {"model": config.model.name},
            {"optimizer": config.optimizer.name},
            {"strategy": config.strategy.name},
            {"precision": config.precision.name},
            "_self_",
        ]
        values = {**asdict(config), "run_dir": str(self.path)}
        text = OmegaConf.to_yaml(OmegaConf.create({"defaults": defaults, **values}))
        header = (
            "# To train this again, into another folder:\n"
            "#   python -m mnist_dist.train --config-dir THIS_FOLDER --config-name config run_dir=ANOTHER_FOLDER\n"
        )
        self._write("config.yaml", (header + text).encode())

    def reserve(self) -> None:
        """Make the folder if it is a new one; jobs that start in the same second each get their own."""
        if not self._is_new:
            self.path.mkdir(parents=True, exist_ok=True)
            return
        self.path = make_new_folder(self.path)

    def write_into(self, folder: str, write: Callable[[Path], None]) -> None:
        """Have `write` write into a folder of the run, whose path it is given, by its own means; on the chief only."""
        if self.is_writer:
            with self._failing_in_words(folder):
                write(self._path(folder))

    def save_checkpoint(self, create: Callable[[], Checkpoint], *, keep: int) -> None:
        """Write the checkpoint that `create` returns; the `keep` newest ones stay, and the best."""
        if self.is_writer:
            with self._failing_in_words("checkpoints"):
                self.checkpoints.save(create(), keep=keep)

    def write_history(self, history: History) -> None:
        """Write `history.csv`."""
        self._write("history.csv", to_csv(history).encode())

    def write_predictions(self, predictions: Predictions) -> None:
        """Write `predictions.npz`."""
        if self.is_writer:
            self._write(PREDICTIONS, predictions.to_bytes())

    def write_text(self, name: str, text: str) -> None:
        """Write a file of text."""
        self._write(name, text.encode())

    def write_lazily(self, name: str, create: Callable[[], str]) -> None:
        """Write the text that `create` returns, which is called on the chief only."""
        if self.is_writer:
            self.write_text(name, create())

    def write_summary(self, summary: Summary) -> None:
        """Write `summary.json`, last of all, with the digests of the results."""
        if self.is_writer:
            files = {name: self._digests[name] for name in RESULT_FILES}
            self.write_text("summary.json", replace(summary, files=files).to_json())

    def write_plots(self, pictures: Iterable[tuple[str, bytes]]) -> None:
        """Write pictures, each with its name, to `plots/`; pictures drawn lazily are drawn on the chief only."""
        if self.is_writer:
            with self._failing_in_words("plots"):
                make_folder(self._path("plots"))
            for name, png in pictures:
                self._write(f"plots/{name}", png)

    def save_model(self, model: "keras.Model") -> None:
        """Write `model.keras`."""
        if not self.is_writer:
            return
        with self._failing_in_words(MODEL), tempfile.TemporaryDirectory() as folder:
            saved = Path(folder) / MODEL
            model.save(saved)
            content = saved.read_bytes()
        self._write(MODEL, content)

    def _path(self, name: str) -> Path:
        return self.path / name

    @property
    def is_started(self) -> bool:
        """Whether a run has left more here than an empty log, even if `config.yaml` is lost."""
        return self.is_writer and (self._path("config.yaml").is_file() or self.checkpoints.has_any())

    def _holds_other_things(self) -> bool:
        """Whether there is more here than what a run leaves that was killed before it wrote `config.yaml`."""
        return any(
            not is_temporary(path) and path.name != HOLDER and not (path == self.log_path and path.stat().st_size == 0)
            for path in self.path.iterdir()
        )

    def _remove_temporaries(self) -> None:
        for folder in (self.path, self.checkpoints.path, self._path("plots")):
            remove_temporaries(folder)

    def _write(self, name: str, content: bytes) -> None:
        if self.is_writer:
            with self._failing_in_words(name):
                write_atomically(self._path(name), content, check=self._lock.check)
            self._digests[name] = hashlib.sha256(content).hexdigest()

    @contextlib.contextmanager
    def _failing_in_words(self, name: str = "") -> Iterator[None]:
        """While the block writes `name`: an OSError, such as a full disk, becomes TrainingFailed.

        So does a folder that no longer belongs to this run: the rest of the files, written where the folder was removed
        or into another job's folder, would look like a run and not be one.
        """
        try:
            self._lock.check()
            yield
        except OSError as error:
            if not self._lock.is_still_there():
                raise TrainingFailed(
                    f"{self.path} is not this run's folder any more: it, or the {self.log_path.name} in it, was "
                    "removed, moved or replaced, as by a job that goes on without this machine. Nothing more was "
                    "written there. Put it back and run the same command again to resume; without it, training starts "
                    "over"
                ) from error
            raise EnvironmentFailed(
                f"{self._path(name)} cannot be written ({describe_os_error(error)}); what was written before is kept. "
                "Fix this, then run the same command again"
            ) from error
