"""The keys of `python -m mnist_dist.train`."""

import math
from dataclasses import dataclass

from omegaconf import MISSING

from mnist_dist.config.augment import AugmentConfig
from mnist_dist.config.data import DataConfig
from mnist_dist.config.devices import PrecisionConfig, StrategyConfig, ThreadsConfig
from mnist_dist.config.model import ModelConfig
from mnist_dist.config.optimization import BatchConfig, LearningRateConfig, LossConfig, OptimizerConfig
from mnist_dist.config.rules import MAX_INT32, Checked, between, one_of, positive_float32, ruled


@dataclass
class TrainerConfig(Checked):
    """The outer loop."""

    section = "trainer."

    epochs: int = between(1, MAX_INT32)
    """Epochs to train; raising it trains a finished run further."""
    stop_at_val_accuracy: float | None = ruled(
        lambda value: value is None or 0 < value <= 1, "must be more than 0 and at most 1", default=None
    )
    """Validation accuracy that is enough: the epoch that reaches it is the last one."""
    patience: int | None = between(1, MAX_INT32, default=None)
    """Epochs without a higher validation accuracy after which the training ends; what is saved is its last epoch."""


@dataclass
class CheckpointConfig(Checked):
    """Which training states are kept, to resume from."""

    section = "checkpoint."

    every_epochs: int = between(1, MAX_INT32)
    """Epochs from one checkpoint to the next; the last epoch always has one."""
    every_s: float = between(0, math.inf)
    """Seconds since the last checkpoint after which the next epoch ends with one in any case."""
    keep: int = between(1, MAX_INT32)
    """How many of the newest to keep; the best by validation accuracy is kept too."""


@dataclass
class PlotsConfig:
    """The pictures."""

    reference: str | None = None
    """A history to overlay on the curves: `original` (the run shipped with the package) or a CSV file."""


@dataclass
class ConsoleConfig:
    """What the terminal shows."""

    tensorflow_messages: bool = MISSING
    """Show TensorFlow's own start-up messages."""


@dataclass
class TrainConfig(Checked):
    """All keys of `python -m mnist_dist.train`."""

    run_dir: str | None = None
    """The run folder; by default a new one below `runs/`, named by date and time."""
    seed: int = between(0, MAX_INT32)
    """Random seed of initial weights, shuffling, augmentation and dropout."""
    data: DataConfig = MISSING
    augment: AugmentConfig = MISSING
    model: ModelConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    learning_rate: LearningRateConfig = MISSING
    loss: LossConfig = MISSING
    gradient_clip_norm: float | None = positive_float32(default=None)
    """Largest norm (L2, over all weights) of a step's gradient: a longer one is shortened to it; null: no limit."""
    batch: BatchConfig = MISSING
    strategy: StrategyConfig = MISSING
    precision: PrecisionConfig = MISSING
    reproducibility: str = one_of("auto", "exact", "fast")
    """exact: bit-identical on any number of replicas; fast: sums in any order; auto: exact on CPUs, fast on GPUs."""
    compile: str = one_of("auto", "none", "xla")
    """none: TensorFlow's own kernels; xla: one program of XLA for each shard, or with `fast` on one device for each
    epoch; auto: xla for fast on one GPU, unless the network is your own; otherwise none."""
    threads: ThreadsConfig = MISSING
    trainer: TrainerConfig = MISSING
    checkpoint: CheckpointConfig = MISSING
    resume: str = one_of("auto", "never")
    """auto: resume the run in `run_dir`, if there is one; never: refuse a folder that holds a run."""
    plots: PlotsConfig = MISSING
    report: bool = MISSING
    """Write `report.html` into the run folder when the run ends, for whatever reason."""
    tensorboard: bool = MISSING
    """Write event files for TensorBoard into the folder `tensorboard/` of the run folder."""
    console: ConsoleConfig = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        # Written out, so that a run that is asked for more epochs does not change its schedule unnoticed.
        self.learning_rate = self.learning_rate.over(self.trainer.epochs)
