"""The keys of `python -m mnist_dist.sweep`: those of `train`, and how to search."""

from dataclasses import dataclass, fields

from omegaconf import MISSING

from mnist_dist.config.compose import Command
from mnist_dist.config.rules import MAX_PARTS, between, one_of
from mnist_dist.config.train import TrainConfig

MAX_TRIALS = 10_000


@dataclass
class SweepConfig(TrainConfig):
    """All keys of `python -m mnist_dist.sweep`."""

    sweep_dir: str | None = None
    """The folder of the sweep; by default a new one below `runs/`, named by date and time."""
    space: str = MISSING
    """Which keys vary, and over which values: a file of `conf/sweep/`, or `path/to/file.yaml`."""
    num_trials: int = between(1, MAX_TRIALS)
    """Trials in all, over all commands that work in `sweep_dir`; raising it continues a finished sweep."""
    sampler: str = one_of("tpe", "random", "grid")
    """tpe: near the good trials so far (Bergstra et al. 2011); random; grid: every combination once."""
    pruner: str = one_of("none", "median", "percentile")
    """Which trials are stopped early: those below the median of the earlier ones, or not in the best quarter."""
    jobs: int = between(1, MAX_PARTS)
    """Trainings at the same time on this machine; they share its cores and GPUs."""
    max_attempts: int = between(1, 1000)
    """How often a trial that crashes is tried from the same checkpoint."""


SWEEP = Command("sweep", SweepConfig)
OWN_KEYS = frozenset(key.name for key in fields(SweepConfig)) - {key.name for key in fields(TrainConfig)}
"""The keys that `train` does not have."""
