"""`summary.json`: the results of a finished run."""

import json
import logging
import statistics
import time
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from mnist_dist.base.versions import imported_versions
from mnist_dist.config.train import TrainConfig
from mnist_dist.data.splits import SPLIT_NAMES, SplitName
from mnist_dist.results.placement import Placement
from mnist_dist.results.predictions import PREDICTIONS
from mnist_dist.results.sums import EvaluationSums, SplitMetrics
from mnist_dist.run.checkpoint import ResumePoint
from mnist_dist.run.early_end import early_end
from mnist_dist.run.incidents import Incident

log = logging.getLogger(__name__)

MODEL = "model.keras"
EARLIER_RESULT_FILES = (MODEL, "plots/loss.png", "plots/accuracy.png", "plots/confusion_matrix.png")
"""Those of runs whose `summary.json` has no `files`."""
RESULT_FILES = (*EARLIER_RESULT_FILES, PREDICTIONS)
"""The files whose SHA-256 is in `summary.json`, under `files`."""


@dataclass(frozen=True)
class DatasetSummary:
    """The data, and how many images each split has."""

    name: str
    sha256: str
    num_train: int
    num_val: int
    num_test: int


@dataclass(frozen=True)
class Timing:
    """How long the run took, or its last part if it was resumed; seconds."""

    startup_s: float
    """From the start of `train` to the first epoch."""
    first_epoch_s: float
    median_epoch_s: float
    total_s: float


class RunClock:
    """Takes the times of a run, from when it is created."""

    def __init__(self) -> None:
        self._start = self._first_epoch = time.perf_counter()

    def first_epoch_begins(self) -> None:
        """Note that all is ready for the first epoch."""
        self._first_epoch = time.perf_counter()

    def timing(self, epoch_s: Sequence[float]) -> Timing:
        """The times until now; `epoch_s` are those of all epochs."""
        return Timing(
            startup_s=self._first_epoch - self._start,
            first_epoch_s=epoch_s[0],
            median_epoch_s=statistics.median(epoch_s),
            total_s=time.perf_counter() - self._start,
        )


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The content of `summary.json`, in order; keys that earlier versions of the package lack have defaults."""

    status: str
    dataset: DatasetSummary
    strategy: str
    world_size: int
    num_replicas: int
    global_batch_size: int
    per_replica_batch_size: int
    precision: str
    reproducibility: str = "unknown"
    num_shards: int = 0
    seed: int
    epochs_completed: int
    ended_early: str = ""
    """Why these are fewer than were asked for; empty if they are not."""
    train: SplitMetrics
    val: SplitMetrics
    test: SplitMetrics
    avoidable_bias_percent: float
    variance_percent: float
    weights_sha256: str
    timing: Timing
    resumed_from_epochs: tuple[int, ...]
    incidents: tuple[Incident, ...] = ()
    """What was lost while it trained."""
    versions: Mapping[str, str]
    files: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of `RESULT_FILES`."""

    def to_json(self) -> str:
        """As text; raises ValueError for NaN and infinity, which JSON does not have."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, content: bytes) -> "Summary":
        """Read the content of a `summary.json`; raises ValueError that says what is wrong with it."""
        try:
            values = json.loads(content, parse_constant=_refuse)
        except RecursionError as error:
            raise ValueError("it is nested too deep") from error
        summary: Summary = read_as(cls, values, "it")
        if summary.status != "finished" or summary.epochs_completed < 1:
            raise ValueError(f"its status is {summary.status!r} after {summary.epochs_completed} epochs")
        return summary


def build_summary(
    config: TrainConfig,
    placement: Placement,
    reached: ResumePoint,
    results: Mapping[SplitName, EvaluationSums],
    *,
    weights_sha256: str,
    timing: Timing,
) -> Summary:
    """The summary of a run that is finished; without what only the run folder knows: `incidents` and `files`."""
    splits: dict[str, Any] = {name: sums.metrics() for name, sums in results.items()}
    return Summary(
        status="finished",
        dataset=DatasetSummary(
            config.data.name,
            reached.data_sha256,
            **{f"num_{name}": sums.num_examples for name, sums in results.items()},
        ),
        **asdict(placement),
        seed=config.seed,
        epochs_completed=reached.epoch,
        ended_early=early_end(config.trainer, reached.history),
        **splits,
        # As in Ng's "Machine Learning Yearning": the training error, and what validation adds to it.
        avoidable_bias_percent=100 * (1 - splits["train"].accuracy),
        variance_percent=100 * (splits["train"].accuracy - splits["val"].accuracy),
        weights_sha256=weights_sha256,
        timing=timing,
        resumed_from_epochs=reached.resumed_from_epochs,
        versions=imported_versions(),
    )


def log_summary(summary: Summary, path: Path) -> None:
    """Log the evaluation of the saved model, and where everything is."""
    for name in SPLIT_NAMES:
        split: SplitMetrics = getattr(summary, name)
        log.info(
            "%-5s - loss: %.4f - accuracy: %.4f (%d of %d)",
            *(name, split.loss, split.accuracy, split.num_correct, split.num_examples),
        )
    log.info("Avoidable bias: %.2f %%", summary.avoidable_bias_percent)
    log.info("Variance: %.2f %%", summary.variance_percent)
    log.info("Results: %s (model.keras, summary.json, history.csv, plots/)", path)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it has {constant} for a number")


def read_as(kind: Any, value: Any, name: str) -> Any:
    """A value from JSON as a `kind`: dataclass, mapping, tuple, number, text, or None; raises ValueError."""
    container, choices = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or (container is Literal and value in choices) or (value is None and type(None) in choices):
        return value
    if type(None) in choices:
        return read_as(choices[0], value, name)
    if is_dataclass(kind) or container is Mapping:
        if not isinstance(value, dict):
            raise ValueError(f"{name} is {value!r:.40}, not an object")
        if container is Mapping:
            return {key: read_as(typing.get_args(kind)[1], item, key) for key, item in value.items()}
        hints = typing.get_type_hints(kind)
        found = {}
        for key in fields(kind):
            if key.name in value:
                found[key.name] = read_as(hints[key.name], value[key.name], key.name)
            elif key.default is MISSING and key.default_factory is MISSING:
                raise ValueError(f"it has no {key.name}")
        return kind(**found)
    if container is tuple and isinstance(value, list):
        return tuple(read_as(typing.get_args(kind)[0], item, name) for item in value)
    allowed: tuple[type, ...] = (int, float) if kind is float else (kind,) if isinstance(kind, type) else ()
    if not isinstance(value, allowed) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r:.40}")
    return value
