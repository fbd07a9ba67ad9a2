"""What a run leaves in its folder. Without TensorFlow."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

from mnist_dist.results.history import EpochMetrics, History, from_csv


class Result(NamedTuple):
    """What must not depend on interruptions."""

    weights_sha256: str
    num_correct: tuple[int, ...]
    rows: tuple[EpochMetrics, ...]


def result_of(folder: Path) -> Result:
    summary = summary_of(folder)
    rows = tuple(dataclasses.replace(row, epoch_s=0.0, images_per_s=0.0) for row in history_of(folder).epochs)
    return Result(
        summary["weights_sha256"], tuple(summary[name]["num_correct"] for name in ("train", "val", "test")), rows
    )


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def history_of(folder: Path) -> History:
    return from_csv((folder / "history.csv").read_text())


def checkpoints_of(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("epoch-*.ckpt"))
