"""Which keys must be the same in all processes of a job, and in all commands of a run."""

from collections.abc import Mapping
from typing import Any

# Keys that may differ between processes of one job.
_FREE_IN_A_JOB = (
    *("run_dir", "plots.", "report", "tensorboard", "console.", "threads."),
    *("data.path", "data.cache_dir", "data.keras_home"),
)

# Keys that may differ between commands of one run: they do not change what an epoch does to the weights.
_FREE_IN_A_RUN = (*_FREE_IN_A_JOB, "strategy.", "trainer.", "checkpoint.", "resume")
SCHEDULE_EPOCHS = "learning_rate.schedule_epochs"
IMPLIED = {
    "compile": "none",
    "model.pretrained": "None",
    "augment.name": "none",
    "learning_rate.schedule": "constant",
    SCHEDULE_EPOCHS: "None",
    "learning_rate.final_fraction": "0.0",
    "learning_rate.start_fraction": "0.04",
    "learning_rate.rise_fraction": "0.3",
    "learning_rate.step_factor": "0.1",
    "learning_rate.step_epochs": "30",
    "loss.label_smoothing": "0.0",
    "gradient_clip_norm": "None",
}
"""Keys that runs of earlier versions do not have, and what these versions did; of those without effect the default."""


def job_keys(tree: Mapping[str, Any]) -> dict[str, str]:
    """The keys of a configuration (as nested mappings) that must be the same in all processes of a job, dotted."""
    return _select(tree, without=_FREE_IN_A_JOB)


def training_keys(tree: Mapping[str, Any]) -> dict[str, str]:
    """The keys of a configuration (as nested mappings) that its training depends on, dotted."""
    return IMPLIED | _select(tree, without=_FREE_IN_A_RUN) if tree else {}


def sweep_keys(tree: Mapping[str, Any]) -> dict[str, str]:
    """The keys of a configuration (as nested mappings) that the result of a training depends on, dotted."""
    ends = {key: str(value) for key, value in flatten(tree).items() if key.startswith("trainer.") and value is not None}
    return training_keys(tree) | ends


def _select(tree: Mapping[str, Any], *, without: tuple[str, ...]) -> dict[str, str]:
    return {key: str(value) for key, value in flatten(tree).items() if not key.startswith(without)}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
