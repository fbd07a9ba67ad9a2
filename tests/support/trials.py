"""A sweep's folder as trainings would leave it, without training. Without TensorFlow."""

import json
from pathlib import Path

from mnist_dist.results.history import EpochMetrics, History, to_csv
from mnist_dist.results.sums import SplitMetrics
from mnist_dist.run.events import EVENTS
from mnist_dist.run.summary import DatasetSummary, Summary, Timing


def leave_history(run_dir: Path, accuracies) -> None:
    """Leave `history.csv`, with these validation accuracies."""
    run_dir.mkdir(parents=True, exist_ok=True)
    rows = [EpochMetrics(n, 1.0, 0.5, 1.0, value, 0.1, 1.0, 1.0) for n, value in enumerate(accuracies, start=1)]
    (run_dir / "history.csv").write_text(to_csv(History(tuple(rows))))


def leave_results(run_dir: Path, accuracies, *, ended_early: str = "") -> None:
    """Leave what a finished training with these validation accuracies does, as far as a sweep looks at it."""
    leave_history(run_dir, accuracies)
    metrics = SplitMetrics(loss=1.0, accuracy=accuracies[-1], num_correct=1, num_examples=2)
    summary = Summary(
        status="finished", dataset=DatasetSummary("npz", "0", 1, 1, 1), strategy="single", world_size=1, num_replicas=1,
        global_batch_size=1, per_replica_batch_size=1, precision="float32", seed=0, epochs_completed=len(accuracies),
        train=metrics, val=metrics, test=metrics, avoidable_bias_percent=0.0, variance_percent=0.0, weights_sha256="0",
        timing=Timing(0.0, 0.0, 0.0, 0.0), resumed_from_epochs=(), versions={}, ended_early=ended_early,
    )  # fmt: skip
    (run_dir / "summary.json").write_text(summary.to_json())


def leave_event(run_dir: Path, **event) -> None:
    """Leave the end of a training in `events.jsonl`."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / EVENTS).write_text(json.dumps({"time": 1.0, "epoch": 1, **event}) + "\n")
