"""Resuming a run: what its folder holds, what must be the same, and where the training continues."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace

from mnist_dist.base.errors import UserError
from mnist_dist.base.files import describe_os_error
from mnist_dist.config.compare import IMPLIED, SCHEDULE_EPOCHS, training_keys
from mnist_dist.config.train import TrainConfig
from mnist_dist.results.history import History
from mnist_dist.run.checkpoint import DATA_DIGEST, Checkpoint, ResumePoint
from mnist_dist.run.early_end import early_end
from mnist_dist.run.folder import RunFolder
from mnist_dist.run.inspection import Inspection
from mnist_dist.run.summary import MODEL, Summary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FoundRun:
    """What a run folder holds of the run that is asked for."""

    point: ResumePoint | None = None
    """How far the run has come, if it is to be resumed."""
    checkpoint: Checkpoint | None = None
    """The checkpoint of `point`, on the chief only."""
    is_finished: bool = False
    """Whether as many epochs are trained as were asked for, and all results are intact."""


def inspect(run_folder: RunFolder, config: TrainConfig, *, data_sha256: str) -> FoundRun:
    """What the folder holds of the run that `config` asks for; nothing on ranks that do not write there.

    A warning names damaged checkpoints, and results that are missing or damaged and will be made again.

    Raises:
        UserError: the folder holds another training, or one that cannot be resumed as requested, or is not readable.
    """
    if not run_folder.is_started:
        return FoundRun()
    checkpoint = _load_checkpoint(run_folder)
    point = checkpoint.point if checkpoint else None
    _check_same_training(run_folder, config, data_sha256=data_sha256, point=point)
    return FoundRun(point, checkpoint, is_finished=_Results(run_folder, config, point).are_whole())


def settle(config: TrainConfig, point: ResumePoint | None) -> TrainConfig:
    """The configuration with each `auto` as the run to resume has resolved it, whatever devices this job has.

    And with at least its number of epochs, so that the results of a finished run can be made again.
    """
    if point is None:
        return config
    mode, precision, compiler = config.reproducibility, config.precision.name, config.compile
    saved = {**IMPLIED, **point.fingerprint}
    return replace(
        config,
        trainer=replace(config.trainer, epochs=max(config.trainer.epochs, point.epoch)),
        reproducibility=saved["reproducibility"] if mode == "auto" else mode,
        precision=replace(config.precision, name=saved["precision.name"] if precision == "auto" else precision),
        compile=saved["compile"] if compiler == "auto" else compiler,
    )


def start_point(
    config: TrainConfig,
    point: ResumePoint | None,
    *,
    data_sha256: str,
    num_replicas: int,
    global_batch_size: int,
    network: str = "",
) -> ResumePoint:
    """Where the training starts: at the beginning, or after the last epoch of `point`, which is logged.

    Raises:
        UserError: the steps would differ from those of the run to resume.
    """
    start = ResumePoint(
        History(),
        fingerprint={**training_keys(asdict(config)), DATA_DIGEST: data_sha256},
        num_replicas=num_replicas,
        global_batch_size=global_batch_size,
        network=network,
    )
    if point is None:
        return start
    if point.global_batch_size != global_batch_size:
        raise UserError(
            f"batch.scaling=weak: with {num_replicas} replicas a step has {global_batch_size} images, but in this run "
            f"it has {point.global_batch_size}; resume with {point.num_replicas} replicas, or name another run_dir"
        )
    log.info("Resuming after epoch %d of %d", point.epoch, config.trainer.epochs)
    if config.reproducibility == "fast" and point.num_replicas != num_replicas:
        log.info(
            "Replicas: %d until now, %d from now on; with reproducibility=fast that may change the last bits",
            point.num_replicas,
            num_replicas,
        )
    return replace(start, history=point.history, resumed_from_epochs=(*point.resumed_from_epochs, point.epoch))


def _load_checkpoint(run_folder: RunFolder) -> Checkpoint | None:
    """The newest intact checkpoint, None if there is none; raises UserError if `checkpoints` cannot be read."""
    try:
        return run_folder.checkpoints.load_newest()
    except OSError as error:
        name = (error.filename or "checkpoints").rpartition("/")[2]
        raise UserError(f"run_dir={run_folder.path}: {name} cannot be read: {describe_os_error(error)}") from error


def _check_same_training(
    run_folder: RunFolder, config: TrainConfig, *, data_sha256: str, point: ResumePoint | None
) -> None:
    """Raise UserError if the folder, or its checkpoint `point`, belongs to another training; names the keys."""
    path, found = run_folder.path, Inspection(run_folder.path)
    ours = training_keys(asdict(config))
    saved = {**IMPLIED, **point.fingerprint} if point else {}
    recorded = found.read_training_keys(ours.keys())
    if not recorded and not saved:
        raise UserError(
            f"run_dir={path}: {found.describe()}, so it is unknown which run this is; put the file back, "
            "or name another run_dir"
        )
    ours[DATA_DIGEST] = data_sha256
    # Keys that only the checkpoint has say nothing about the run, unless the checkpoint is all that is left of it.
    known = {key: saved[key] for key in saved.keys() & ours.keys()} if recorded else saved
    if summary := found.read_summary():
        recorded[DATA_DIGEST] = summary.dataset.sha256
    theirs = {**known, **recorded}
    if different := _list_differences(theirs, ours, keys=theirs.keys() | (ours.keys() - {DATA_DIGEST})):
        raise UserError(
            f"run_dir={path}: holds a run of another configuration ({different}); "
            "name another run_dir, or use its configuration"
        )
    if foreign := _list_differences(saved, {**ours, **recorded}, keys=saved.keys()):
        raise UserError(
            f"run_dir={path}: the newest checkpoint does not belong to the run here ({foreign}); "
            "remove it, or name another run_dir"
        )


class _Results:
    """Whether a run has as many epochs as were asked for, and all its results are intact."""

    def __init__(self, run_folder: RunFolder, config: TrainConfig, point: ResumePoint | None) -> None:
        self._path = run_folder.path
        self._trainer, self._num_epochs = config.trainer, config.trainer.epochs
        self._point = point
        self._reached = point.epoch if point else 0
        self._found = Inspection(run_folder.path)
        self._found.read_training_keys(training_keys(asdict(config)).keys())
        self._history = self._found.read_history(point)
        self._num_rows = len(self._history.epochs) if self._history else 0

    def are_whole(self) -> bool:
        """Raise UserError if what is missing cannot be made again, and the run cannot be resumed to that epoch either.

        A warning says what will be made again. A finished run is not trained again, and a longer one not cut back.
        """
        was_finished = any((self._path / name).is_file() for name in ("summary.json", MODEL))
        summary = self._found.read_summary() if was_finished else None
        if summary is None:
            self._check_without_summary(was_finished=was_finished)
        elif summary.epochs_completed > max(self._reached, self._num_rows):
            raise UserError(
                f"run_dir={self._path}: summary.json has {summary.epochs_completed} epochs, history.csv "
                f"{self._num_rows or 'none'}, the newest checkpoint {self._reached or 'is missing'}; put back what "
                "belongs together, or name another run_dir"
            )
        elif summary.epochs_completed < self._num_epochs and not self._early_end(summary):
            self._check_can_resume(summary)
        else:
            self._found.check_results(summary, self._point.history if self._point else self._history)
            if not self._found.describe():
                return True
            self._check_can_be_made_again(summary)
        if self._point and (damage := self._found.describe()):
            log.warning("%s: made again from the checkpoint of epoch %d", damage, self._reached)
        return False

    def _early_end(self, summary: Summary) -> str:
        """Why the results are of fewer epochs than were asked for; empty if they should be of more."""
        num_epochs = summary.epochs_completed
        history = self._point.history if self._point and self._reached >= num_epochs else self._history
        return early_end(self._trainer, History(history.epochs[:num_epochs])) if history else ""

    def _check_without_summary(self, *, was_finished: bool) -> None:
        # Only the history, if anything, still shows how many epochs the lost results had.
        self._check_enough(max(self._reached, self._num_rows) if was_finished else self._reached)
        if was_finished and self._point is None:
            raise UserError(
                f"run_dir={self._path}: {self._found.describe()}, and no checkpoint to make that from is left; put it "
                "back, or name another run_dir"
            )

    def _check_can_resume(self, summary: Summary) -> None:
        self._check_enough(self._reached)
        if self._point is None:
            raise UserError(
                f"trainer.epochs={self._num_epochs}: the run in {self._path} finished after "
                f"{summary.epochs_completed}, and no checkpoint to resume from is left; name another run_dir"
            )

    def _check_can_be_made_again(self, summary: Summary) -> None:
        num_epochs, damage = summary.epochs_completed, self._found.describe()
        if self._reached > num_epochs:
            without = ", without trainer.patience and trainer.stop_at_val_accuracy," if self._early_end(summary) else ""
            raise UserError(
                f"run_dir={self._path}: {damage}, and the run was since trained to epoch {self._reached}; give "
                f"trainer.epochs={self._reached}{without} for its results"
            )
        if self._reached < num_epochs:
            newest = f" (the newest is of epoch {self._reached})" if self._reached else ""
            raise UserError(
                f"run_dir={self._path}: {damage}, and no checkpoint of epoch {num_epochs} to make that from is "
                f"left{newest}; put it back, or name another run_dir"
            )

    def _check_enough(self, reached: int) -> None:
        if reached > self._num_epochs:
            raise UserError(
                f"trainer.epochs={self._num_epochs}: the run in {self._path} already has {reached}; ask for at least "
                "that many, or name another run_dir"
            )


def _list_differences(theirs: Mapping[str, str], ours: Mapping[str, str], *, keys: Iterable[str]) -> str:
    """In words, which of `keys` differ; keys that are still `auto` are not known yet and do not count."""
    different = [
        _describe_difference(key, str(theirs.get(key)), str(ours.get(key)))
        for key in sorted(keys)
        if theirs.get(key) != ours.get(key) and ours.get(key) != "auto"
    ]
    return "; ".join(different)


def _describe_difference(key: str, was: str, now: str) -> str:
    if key == DATA_DIGEST:
        return f"the data was {was:.12}..., is now {now:.12}..."
    text = f"{key} was {was}, is now {now}"
    if key == SCHEDULE_EPOCHS and "None" not in (was, now):
        return f"{text}, which by default is trainer.epochs; with {key}={was} it goes on at the schedule's last rate"
    return text
