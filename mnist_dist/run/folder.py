"""The run folder: what is in it, and when a folder may be used. Only the chief is handed one to write."""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import platform
import statistics
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mnist_dist.base.errors import TrainingFailed, UserError
from mnist_dist.base.files import (
    check_writable,
    describe_os_error,
    is_open_as,
    is_temporary,
    make_folder,
    open_locked,
    remove_temporaries,
    write_atomically,
)
from mnist_dist.config.compare import training_keys
from mnist_dist.config.data import DataConfig
from mnist_dist.config.train import TrainConfig
from mnist_dist.data.formats import expand_path
from mnist_dist.data.splits import SplitName
from mnist_dist.results.history import History, to_csv
from mnist_dist.results.sums import EvaluationSums
from mnist_dist.run.checkpoint import DATA_DIGEST, Checkpoint, CheckpointFolder, Progress
from mnist_dist.run.summary import MODEL, RESULT_FILES, Inspection

if TYPE_CHECKING:
    import keras

log = logging.getLogger(__name__)

RUN_FILES = ("config.yaml", "train.log", "history.csv", "summary.json", *RESULT_FILES)
"""The files of a training run but for its checkpoints."""
RUN_FOLDERS = ("checkpoints", "plots")
"""The folders in a training run's folder."""


class RunFolder:
    """The files of one run; every file is replaced in one step, so a reader never meets half of one.

    Only the chief's object writes: on the others all writing methods do nothing, so that no caller has to ask.
    """

    def __init__(self, path: Path, *, is_writer: bool = True, is_new: bool = False) -> None:
        self.path = path
        self._is_writer = is_writer
        self._is_new = is_new
        self._found_run = False
        self._lock: int | None = None  # the descriptor of train.log, once this job has the folder for itself
        self._digests: dict[str, str] = {}  # SHA-256 of the files that this object has written

    @classmethod
    def from_config(cls, run_dir: str | None, *, is_writer: bool = True) -> "RunFolder":
        """The configured folder, or a new one below `runs/`, named by the time; raises UserError for `~nobody`."""
        if run_dir is not None:
            return cls(expand_path("run_dir", run_dir), is_writer=is_writer)
        return cls(Path("runs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S"), is_writer=is_writer, is_new=True)

    @property
    def log_path(self) -> Path:
        """The file that takes the log's lines."""
        return self.path / "train.log"

    @property
    def model_path(self) -> Path:
        """The saved Keras model."""
        return self.path / MODEL

    @property
    def checkpoints(self) -> CheckpointFolder:
        """The states to go on from."""
        return CheckpointFolder(self._path("checkpoints"))

    def check_usable(
        self, *, may_resume: bool = True, files: Sequence[str] = RUN_FILES, folders: Sequence[str] = RUN_FOLDERS
    ) -> None:
        """Raise UserError unless this is (or can become) a run folder that can be written; leaves nothing behind.

        `files` and `folders` are what will be written in it.
        """
        if not self._is_writer:
            return
        place = ""
        try:
            if self.path.is_dir() and not self._is_started and self._holds_other_things():
                raise UserError(
                    f"run_dir={self.path}: this folder is not empty and is not a run folder (it has no config.yaml); "
                    "name another one"
                )
            if not may_resume and self._is_started:
                raise UserError(
                    f"resume=never: {self.path} holds a run already; name another run_dir, or go on with resume=auto"
                )
            for place in ("", *folders):
                check_writable(self._path(place))
            for place in files:
                if os.path.lexists(self._path(place)) and not self._path(place).is_file():
                    raise UserError(f"run_dir={self.path}: {place} is not a regular file; move it away, or mend it")
        except OSError as error:
            raise UserError(
                f"run_dir={self.path}: {place}{' ' if place else ''}cannot be written: {error.strerror or error}"
            ) from error

    def claim(self) -> None:
        """Keep other jobs out of a folder that holds a run, from before it is read until this process ends.

        A folder without a run is left as it is until `create`. Raises UserError if another job is training there.
        """
        self._found_run = self._is_started
        if self._found_run and self.log_path.exists():  # a command that is refused must not make the file
            self._take_lock()

    def load_checkpoint(self) -> Checkpoint | None:
        """The newest intact checkpoint, None if there is none; a warning names those that are damaged.

        Raises UserError if `checkpoints` cannot be read.
        """
        if not self._is_writer:
            return None
        try:
            return self.checkpoints.load_newest()
        except OSError as error:
            name = Path(error.filename or self.checkpoints.path).name
            raise UserError(f"run_dir={self.path}: {name} cannot be read: {describe_os_error(error)}") from error

    def check_same_training(self, config: TrainConfig, *, dataset_sha256: str, progress: Progress | None) -> None:
        """Raise UserError if the folder, or its checkpoint of `progress`, is of another training, naming the keys."""
        if not self._is_started:
            return
        found = Inspection(self.path)
        ours = training_keys(asdict(config))
        saved = progress.training if progress else {}
        recorded = found.read_training_keys(ours.keys())
        if not recorded and not saved:
            raise UserError(
                f"run_dir={self.path}: {found.describe()}, so it cannot be told which run this is; put the file back, "
                "or name another run_dir"
            )
        ours[DATA_DIGEST] = dataset_sha256
        # Keys that only the checkpoint has are no news of the run, unless it is all that is left of that.
        known = {key: saved[key] for key in saved.keys() & ours.keys()} if recorded else saved
        if summary := found.read_summary():
            recorded[DATA_DIGEST] = summary.data_sha256
        theirs = {**known, **recorded}
        if different := _list_differences(theirs, ours, keys=theirs.keys() | (ours.keys() - {DATA_DIGEST})):
            raise UserError(
                f"run_dir={self.path}: holds a run of another configuration ({different}); "
                "name another run_dir, or use its configuration"
            )
        if foreign := _list_differences(saved, {**ours, **recorded}, keys=saved.keys()):
            raise UserError(
                f"run_dir={self.path}: the newest checkpoint is not of the run that is here ({foreign}); "
                "take it away, or name another run_dir"
            )

    def is_finished(self, config: TrainConfig, *, progress: Progress | None) -> bool:
        """Whether a run came to its end here with all epochs of `config`, and all that it left is whole.

        A warning says what is missing or damaged and will be made again, from the newest checkpoint, that of
        `progress`; then the run is not finished.

        Raises:
            UserError: it cannot be made again, or the run cannot go on to so many epochs; nor is a finished run trained
                again, or one that was trained further cut back.
        """
        if not self._is_started:
            return False
        num_epochs = config.trainer.epochs
        found = Inspection(self.path)
        found.read_training_keys(training_keys(asdict(config)).keys())
        history = found.read_history(progress)
        was_finished = any(self._path(name).is_file() for name in ("summary.json", MODEL))
        summary = found.read_summary() if was_finished else None
        reached, num_rows = progress.epoch if progress else 0, len(history.epochs) if history else 0
        if summary is None:
            # Of how many epochs the lost results were can be seen in the history at best.
            self._check_enough(num_epochs, max(reached, num_rows) if was_finished else reached)
            if was_finished and progress is None:
                raise UserError(
                    f"run_dir={self.path}: {found.describe()}, and no checkpoint to make that from is left; put it "
                    "back, or name another run_dir"
                )
        elif summary.epochs > max(reached, num_rows):
            raise UserError(
                f"run_dir={self.path}: summary.json has {summary.epochs} epochs, history.csv {num_rows or 'none'}, the "
                f"newest checkpoint {reached or 'is missing'}; put back what belongs together, or name another run_dir"
            )
        elif summary.epochs < num_epochs:
            self._check_enough(num_epochs, reached)
            if progress is None:
                raise UserError(
                    f"trainer.epochs={num_epochs}: the run in {self.path} is finished after {summary.epochs}, and no "
                    "checkpoint to go on from is left; name another run_dir"
                )
        else:
            found.check_results(summary, progress.history if progress else history)
            if not found.describe():
                return True
            if reached > summary.epochs:
                raise UserError(
                    f"run_dir={self.path}: {found.describe()}, and the run was trained on, to epoch {reached}; say "
                    f"trainer.epochs={reached} to have the results of that"
                )
            if reached < summary.epochs:
                newest = f" (the newest is of epoch {reached})" if reached else ""
                raise UserError(
                    f"run_dir={self.path}: {found.describe()}, and no checkpoint of epoch {summary.epochs} to make "
                    f"that from is left{newest}; put it back, or name another run_dir"
                )
        if progress and (damage := found.describe()):
            log.warning("%s: made again from the checkpoint of epoch %d", damage, reached)
        return False

    def check_has_model(self) -> None:
        """Raise UserError unless a model was saved here and its file is whole."""
        try:
            is_here = self.model_path.is_file()
        except OSError as error:
            raise UserError(f"run_dir={self.path}: cannot be read: {describe_os_error(error)}") from error
        if not is_here:
            raise UserError(f"run_dir={self.path}: no {MODEL} here; name the folder of a finished run")
        Inspection(self.path).check_model()

    def read_data_config(self) -> DataConfig:
        """The data that the run here was trained on; raises UserError if that cannot be told."""
        found = Inspection(self.path)
        config = found.read_config()
        if config is None:
            raise UserError(f"run_dir={self.path}: {found.describe()}; put back the file of this run")
        try:
            data = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), config["data"]))
        except (KeyError, TypeError, ValueError, OmegaConfBaseException) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"run_dir={self.path}: config.yaml does not say what the data was ({reason})") from error
        assert isinstance(data, DataConfig)
        return data

    def read_data_sha256(self) -> str:
        """The digest of that data, from `summary.json`; raises UserError if there is none or it is damaged."""
        found = Inspection(self.path)
        summary = found.read_summary()
        if summary is None:
            raise UserError(f"run_dir={self.path}: no finished run here: {found.describe()}")
        return summary.data_sha256

    def create(self, config: TrainConfig) -> None:
        """Make the folder and write `config.yaml`, which composes to the same run when it is passed back.

        Raises UserError, before anything changes, if another job is training here or has begun a run meanwhile.
        """
        if not self._is_writer:
            return
        with self._failing_in_words():
            self.reserve()
        if self._lock is None:
            self._take_lock()
            if self._is_started and not self._found_run:
                raise UserError(
                    f"run_dir={self.path}: another job has begun a run here meanwhile; run the same command again to "
                    "go on with it, or name another run_dir"
                )
        with self._failing_in_words():
            for folder in (self.path, self.checkpoints.path, self._path("plots")):
                remove_temporaries(folder)  # of a run that was killed
        # The choices first, so that Hydra finds their schemas; then every value.
        defaults = [
            "schema/train@_global_",
            {"data": config.data.name},
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
        """Make the folder if it is a new one; of several jobs started in the same second each gets its own."""
        if not self._is_new:
            self.path.mkdir(parents=True, exist_ok=True)
            return
        named = self.path
        named.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(2):
            with contextlib.suppress(FileExistsError):
                self.path.mkdir()
                return
            self.path = named.with_name(f"{named.name}_{number}")

    def save_checkpoint(self, create: Callable[[], Checkpoint], *, keep: int) -> None:
        """Write the checkpoint that `create` returns; `keep` of the newest ones stay, and the best."""
        if self._is_writer:
            with self._failing_in_words("checkpoints"):
                self.checkpoints.save(create(), keep=keep)

    def write_history(self, history: History) -> None:
        """Write `history.csv`."""
        self._write("history.csv", to_csv(history).encode())

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file; raises ValueError for NaN and infinity, which JSON has not."""
        self._write(name, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`, last of all: with the digests of the results that were written before."""
        if self._is_writer:
            self.write_json("summary.json", {**summary, "files": {name: self._digests[name] for name in RESULT_FILES}})

    def write_plots(self, pictures: Iterable[tuple[str, bytes]]) -> None:
        """Write pictures below `plots/`, each with its name; those drawn lazily are drawn on the chief only."""
        if self._is_writer:
            with self._failing_in_words("plots"):
                make_folder(self._path("plots"))
            for name, png in pictures:
                self._write(f"plots/{name}", png)

    def save_model(self, model: "keras.Model") -> None:
        """Write `model.keras`."""
        if not self._is_writer:
            return
        with self._failing_in_words(self.model_path.name), tempfile.TemporaryDirectory() as folder:
            saved = Path(folder) / self.model_path.name
            model.save(saved)
            content = saved.read_bytes()
        self._write(MODEL, content)

    def _path(self, name: str) -> Path:
        return self.path / name

    @property
    def _is_started(self) -> bool:
        """Whether a run has left more here than an empty log; its configuration may be lost."""
        return self._is_writer and (self._path("config.yaml").is_file() or self.checkpoints.has_any())

    def _holds_other_things(self) -> bool:
        """Whether there is more than a run leaves that was killed before it wrote `config.yaml`."""
        return any(
            not is_temporary(path) and not (path == self.log_path and path.stat().st_size == 0)
            for path in self.path.iterdir()
        )

    def _take_lock(self) -> None:
        """Lock `train.log`, which is open until this process ends anyway; raises UserError if another job has it."""
        try:
            self._lock = open_locked(self.log_path)
        except BlockingIOError as error:
            raise UserError(
                f"run_dir={self.path}: another job is training here (it holds the lock on {self.log_path.name}); stop "
                "it or wait for its end, or name another run_dir"
            ) from error
        except OSError as error:
            reason = f"{self.log_path.name} cannot be written: {describe_os_error(error)}"
            raise UserError(f"run_dir={self.path}: {reason}") from error
        weakref.finalize(self, os.close, self._lock).atexit = False  # at the process's end the kernel does it, last

    def _is_ours(self) -> bool:
        """Whether this is still the folder that was locked; where none was (`evaluate`), there is nothing to tell."""
        return self._lock is None or is_open_as(self._lock, self.log_path)

    def _check_enough(self, num_epochs: int, reached: int) -> None:
        if reached > num_epochs:
            raise UserError(
                f"trainer.epochs={num_epochs}: the run in {self.path} has {reached} already; ask for at least as many, "
                "or name another run_dir"
            )

    def _write(self, name: str, content: bytes) -> None:
        if self._is_writer:
            with self._failing_in_words(name):
                write_atomically(self._path(name), content)
            self._digests[name] = hashlib.sha256(content).hexdigest()

    @contextlib.contextmanager
    def _failing_in_words(self, name: str = "") -> Iterator[None]:
        """Write `name` in the block: an OSError, of a disk that is full for example, becomes TrainingFailed.

        So does a folder that is not the one of this run any more: to write what comes next into the place of a folder
        that was removed, or into that of another job, would leave what looks like a run and is none.
        """
        try:
            if not self._is_ours():
                raise FileNotFoundError(self.log_path)
            yield
        except OSError as error:
            if not self._is_ours():
                raise TrainingFailed(
                    f"{self.path} is not this run's folder any more: it, or the {self.log_path.name} in it, was "
                    "removed, moved or replaced. Nothing more was written there. Put it back and run the same command "
                    "again to go on; without it that begins anew"
                ) from error
            raise TrainingFailed(
                f"{self._path(name)} cannot be written ({describe_os_error(error)}); what was written before is kept. "
                "Mend this, then run the same command again"
            ) from error


def _list_differences(theirs: Mapping[str, str], ours: Mapping[str, str], *, keys: Iterable[str]) -> str:
    """In words, which of `keys` differ, but for what is still `auto`, and so not known yet."""
    different = [
        f"the data was {theirs[key]:.12}..., is now {ours[key]:.12}..."
        if key == DATA_DIGEST
        else f"{key} was {theirs.get(key)}, is now {ours.get(key)}"
        for key in sorted(keys)
        if theirs.get(key) != ours.get(key) and ours.get(key) != "auto"
    ]
    return "; ".join(different)


@dataclass(frozen=True)
class Timing:
    """How long a run took."""

    startup_s: float
    """From the first line of the run to its first epoch."""
    total_s: float


def build_summary(
    *,
    config: TrainConfig,
    dataset_sha256: str,
    placement: Mapping[str, Any],
    history: History,
    results: Mapping[SplitName, EvaluationSums],
    weights_sha256: str,
    timing: Timing,
    resumed_from_epochs: Sequence[int] = (),
) -> dict[str, Any]:
    """The content of `summary.json`; `placement` says where the training ran."""
    epoch_s = history.column("epoch_s")
    metrics: dict[str, Any] = {name: sums.to_dict() for name, sums in results.items()}
    return {
        "status": "finished",
        "dataset": {
            "name": config.data.name,
            "sha256": dataset_sha256,
            **{f"num_{name}": sums.num_examples for name, sums in results.items()},
        },
        **placement,
        "seed": config.seed,
        "epochs_completed": len(history.epochs),
        **metrics,
        # The bounds of Ng's "Machine Learning Yearning": training error over none, and what validation adds to it.
        "avoidable_bias_percent": 100 * (1 - metrics["train"]["accuracy"]),
        "variance_percent": 100 * (metrics["train"]["accuracy"] - metrics["val"]["accuracy"]),
        "weights_sha256": weights_sha256,
        "timing": {
            "startup_s": timing.startup_s,
            "first_epoch_s": epoch_s[0],
            "median_epoch_s": statistics.median(epoch_s),
            "total_s": timing.total_s,
        },
        "resumed_from_epochs": list(resumed_from_epochs),
        "versions": installed_versions(),
    }


def installed_versions() -> dict[str, str]:
    """Versions of what the results depend on, for the summary."""
    import hydra
    import keras
    import sklearn
    import tensorflow as tf

    import mnist_dist

    modules = (mnist_dist, tf, keras, np, sklearn, hydra)
    return {"python": platform.python_version(), **{module.__name__: module.__version__ for module in modules}}
