"""The typed configuration: every key, its meaning, its range.

The dataclasses are Hydra's schema, so a misspelt key or a wrong type is refused when the configuration is
composed; `__post_init__` refuses values out of range when `to_config` turns it into these objects. Nothing here
knows TensorFlow.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import MISSING, DictConfig, OmegaConf

from mnist_dist.errors import UserError

# Named here and not looked up in Keras, so that a misspelt one is refused before TensorFlow is imported.
ACTIVATIONS = ("relu", "leaky_relu", "elu", "selu", "gelu", "silu", "softplus", "sigmoid", "tanh", "linear")
INITIALIZERS = tuple(f"{family}_{kind}" for family in ("he", "glorot", "lecun") for kind in ("normal", "uniform"))


def _check(condition: bool, key: str, value: object, rule: str) -> None:
    if not condition:
        raise UserError(f"{key}={value}: {rule}")


@dataclass
class DataConfig:
    """Which images to train on, and how they are split."""

    name: str = MISSING
    """auto | mnist | digits | npz."""
    path: str | None = None
    """A Keras-layout .npz file, or (mnist) a folder with the four IDX files."""
    cache_dir: str = MISSING
    """Where built data sets are kept."""
    keras_home: str = MISSING
    """Keras' own cache: `datasets/mnist.npz` below it is read, and a download is put there."""
    val_fraction: float = MISSING
    """Share of the training images that is held out for validation (scikit-learn's `test_size`)."""
    split_seed: int = MISSING
    """`random_state` of that split; separate from `seed`, so that seeds can be compared on one split."""

    def __post_init__(self) -> None:
        choices = ("auto", "mnist", "digits", "npz")
        _check(self.name in choices, "data.name", self.name, "is set by data=" + "|".join(choices))
        _check(0 < self.val_fraction < 1, "data.val_fraction", self.val_fraction, "must be between 0 and 1")
        _check(0 <= self.split_seed < 2**32, "data.split_seed", self.split_seed, "must be from 0 to 4294967295")
        _check(
            self.name != "npz" or self.path is not None,
            "data.path",
            self.path,
            "data=npz needs data.path=FILE.npz",
        )
        _check(
            self.path is None or self.name in ("mnist", "npz"),
            "data.path",
            self.path,
            f"data={self.name} reads no file; say data=mnist or data=npz as well",
        )


@dataclass
class ModelConfig:
    """What every network has; the choices below add their own keys."""

    name: str = MISSING
    dropout: float = MISSING
    """Share of units dropped after each hidden layer."""
    activation: str = MISSING
    kernel_initializer: str = MISSING
    """Keras initializer of the hidden layers."""
    output_initializer: str = MISSING
    """Keras initializer of the softmax layer."""

    def __post_init__(self) -> None:
        for key, known in (
            ("activation", ACTIVATIONS),
            ("kernel_initializer", INITIALIZERS),
            ("output_initializer", INITIALIZERS),
        ):
            value = getattr(self, key)
            _check(value in known, f"model.{key}", value, f"must be one of {', '.join(known)}")
        _check(0 <= self.dropout < 1, "model.dropout", self.dropout, "must be at least 0 and less than 1")


@dataclass
class MLPConfig(ModelConfig):
    """The multilayer perceptron of the recipe."""

    name: str = MISSING
    hidden_sizes: list[int] = MISSING
    """Units of each hidden layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.name == "mlp", "model.name", self.name, "is set by model=...; leave it alone")
        _check(all(n > 0 for n in self.hidden_sizes), "model.hidden_sizes", self.hidden_sizes, "must be positive")


@dataclass
class CNNConfig(ModelConfig):
    """A small convolutional network: one convolution and 2x2 pooling per entry of `filters`, then one dense layer."""

    name: str = MISSING
    filters: list[int] = MISSING
    """Channels of each convolution."""
    kernel_size: int = MISSING
    """Side of the convolution kernels, in pixels."""
    dense_size: int = MISSING
    """Units of the dense layer before the softmax."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.name == "cnn", "model.name", self.name, "is set by model=...; leave it alone")
        _check(all(n > 0 for n in self.filters), "model.filters", self.filters, "must be positive")
        _check(self.kernel_size > 0, "model.kernel_size", self.kernel_size, "must be positive")
        _check(self.dense_size > 0, "model.dense_size", self.dense_size, "must be positive")


@dataclass
class OptimizerConfig:
    """What every optimizer has."""

    name: str = MISSING
    learning_rate: float = MISSING

    def __post_init__(self) -> None:
        _check(
            0 < self.learning_rate < float("inf"),
            "optimizer.learning_rate",
            self.learning_rate,
            "must be a positive number",
        )


@dataclass
class AdamConfig(OptimizerConfig):
    """Adam (Kingma and Ba 2015, arXiv 1412.6980) with Keras' defaults."""

    name: str = MISSING
    learning_rate: float = MISSING
    beta_1: float = MISSING
    beta_2: float = MISSING
    epsilon: float = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.name == "adam", "optimizer.name", self.name, "is set by optimizer=...; leave it alone")
        _check(0 <= self.beta_1 < 1, "optimizer.beta_1", self.beta_1, "must be at least 0 and less than 1")
        _check(0 <= self.beta_2 < 1, "optimizer.beta_2", self.beta_2, "must be at least 0 and less than 1")
        _check(self.epsilon > 0, "optimizer.epsilon", self.epsilon, "must be positive")


@dataclass
class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent with optional momentum."""

    name: str = MISSING
    learning_rate: float = MISSING
    momentum: float = MISSING
    nesterov: bool = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.name == "sgd", "optimizer.name", self.name, "is set by optimizer=...; leave it alone")
        _check(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "must be at least 0 and less than 1")
        _check(
            not self.nesterov or self.momentum > 0,
            "optimizer.nesterov",
            self.nesterov,
            "needs optimizer.momentum greater than 0",
        )


@dataclass
class LearningRateConfig:
    """How the learning rate follows the size of the global batch."""

    scaling: str = MISSING
    """none | linear | sqrt: of the factor by which the global batch is larger than `batch.global_size`."""
    warmup_epochs: float = MISSING
    """Epochs over which the rate rises to its full value (Goyal et al. 2017, arXiv 1706.02677)."""

    def __post_init__(self) -> None:
        choices = ("none", "linear", "sqrt")
        _check(self.scaling in choices, "learning_rate.scaling", self.scaling, "must be none, linear or sqrt")
        _check(
            0 <= self.warmup_epochs < float("inf"),
            "learning_rate.warmup_epochs",
            self.warmup_epochs,
            "must be at least 0",
        )


@dataclass
class BatchConfig:
    """How training examples form a step."""

    global_size: int = MISSING
    """Examples per optimizer step: over all replicas together (strong scaling), or of each replica (weak)."""
    scaling: str = MISSING
    """strong | weak."""
    num_shards: int = MISSING
    """reproducibility=exact: pieces that a global batch is cut into; the largest number of replicas."""

    def __post_init__(self) -> None:
        _check(self.global_size > 0, "batch.global_size", self.global_size, "must be at least 1")
        _check(self.num_shards > 0, "batch.num_shards", self.num_shards, "must be at least 1")
        _check(self.scaling in ("strong", "weak"), "batch.scaling", self.scaling, "must be strong or weak")


@dataclass
class StrategyConfig:
    """Which devices train, and how they work together."""

    name: str = MISSING
    """auto | single | mirrored | multiworker | horovod."""
    num_replicas: int | None = None
    """mirrored: how many GPUs to use, or without GPUs how many logical CPUs."""
    start_timeout_s: float = MISSING
    """Several processes: how long they wait for each other at the start, seconds."""

    def __post_init__(self) -> None:
        choices = ("auto", "single", "mirrored", "multiworker", "horovod")
        _check(self.name in choices, "strategy.name", self.name, "is set by strategy=" + "|".join(choices))
        _check(
            self.num_replicas is None or self.num_replicas > 0,
            "strategy.num_replicas",
            self.num_replicas,
            "must be at least 1",
        )
        _check(
            0 < self.start_timeout_s <= 86400,
            "strategy.start_timeout_s",
            self.start_timeout_s,
            "must be more than 0 and at most 86400",
        )


@dataclass
class PrecisionConfig:
    """The type that layers compute in; weights, softmax, loss and reduction are float32 always."""

    name: str = MISSING
    """auto | float32 | mixed_float16 | mixed_bfloat16."""
    initial_loss_scale: float = MISSING
    """mixed_float16: first factor on the loss, which keeps small gradients from vanishing."""
    loss_scale_growth_steps: int = MISSING
    """mixed_float16: the factor doubles after so many steps without overflow."""

    def __post_init__(self) -> None:
        choices = ("auto", "float32", "mixed_float16", "mixed_bfloat16")
        _check(self.name in choices, "precision.name", self.name, "is set by precision=" + "|".join(choices))
        _check(
            1 <= self.initial_loss_scale < 2**127,
            "precision.initial_loss_scale",
            self.initial_loss_scale,
            "must be at least 1",
        )
        _check(
            self.loss_scale_growth_steps > 0,
            "precision.loss_scale_growth_steps",
            self.loss_scale_growth_steps,
            "must be at least 1",
        )


@dataclass
class ThreadsConfig:
    """TensorFlow's threads; they change the speed only."""

    intra_op: str = MISSING
    """Threads inside one operation: auto | a number."""
    inter_op: str = MISSING
    """Operations side by side: auto | a number."""

    def __post_init__(self) -> None:
        for key, value in (("intra_op", self.intra_op), ("inter_op", self.inter_op)):
            valid = value == "auto" or (value.isdecimal() and int(value) > 0)
            _check(valid, f"threads.{key}", value, "must be auto or a number, at least 1")


@dataclass
class TrainerConfig:
    """The outer loop."""

    epochs: int = MISSING

    def __post_init__(self) -> None:
        _check(self.epochs > 0, "trainer.epochs", self.epochs, "must be at least 1")


@dataclass
class CheckpointConfig:
    """What is kept of the training while it runs, to go on from."""

    every_epochs: int = MISSING
    """A checkpoint after so many epochs, and after the last one."""
    every_s: float = MISSING
    """And after the epoch that ends so many seconds after the last checkpoint, or later."""
    keep: int = MISSING
    """How many of the newest are kept; the best by validation accuracy is kept besides."""

    def __post_init__(self) -> None:
        _check(self.every_epochs > 0, "checkpoint.every_epochs", self.every_epochs, "must be at least 1")
        _check(self.every_s >= 0, "checkpoint.every_s", self.every_s, "must be at least 0")
        _check(self.keep > 0, "checkpoint.keep", self.keep, "must be at least 1")


@dataclass
class PlotsConfig:
    """The pictures."""

    reference: str | None = None
    """A history to overlay on the curves: `seed` (the original run, shipped with the package) or a CSV file."""


@dataclass
class ConsoleConfig:
    """What the terminal shows."""

    tensorflow_messages: bool = MISSING
    """Show TensorFlow's own start-up messages."""


@dataclass
class TrainConfig:
    """Everything that `python -m mnist_dist.train` can be told."""

    run_dir: str | None = None
    """The run folder; by default a new one below `runs/`, named by date and time."""
    seed: int = MISSING
    """Initial weights, shuffling and dropout follow from it."""
    data: DataConfig = MISSING
    model: ModelConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    learning_rate: LearningRateConfig = MISSING
    batch: BatchConfig = MISSING
    strategy: StrategyConfig = MISSING
    precision: PrecisionConfig = MISSING
    reproducibility: str = MISSING
    """auto | exact | fast; auto is exact on CPUs and fast on GPUs."""
    threads: ThreadsConfig = MISSING
    trainer: TrainerConfig = MISSING
    checkpoint: CheckpointConfig = MISSING
    resume: str = MISSING
    """auto | never: whether to go on with a run that was started in `run_dir`."""
    plots: PlotsConfig = MISSING
    console: ConsoleConfig = MISSING

    def __post_init__(self) -> None:
        _check(0 <= self.seed < 2**31, "seed", self.seed, "must be from 0 to 2147483647")
        choices = ("auto", "exact", "fast")
        _check(
            self.reproducibility in choices, "reproducibility", self.reproducibility, f"must be {', '.join(choices)}"
        )
        _check(self.resume in ("auto", "never"), "resume", self.resume, "must be auto or never")


@dataclass
class EvaluateDataConfig:
    """Where a run's data is now."""

    path: str | None = None
    """The data file, if it has moved since the training."""


@dataclass
class EvaluateConfig:
    """Everything that `python -m mnist_dist.evaluate` can be told."""

    run_dir: str | None = None
    """The run folder to evaluate."""
    split: str = MISSING
    """train | val | test."""
    data: EvaluateDataConfig = MISSING
    console: ConsoleConfig = MISSING

    def __post_init__(self) -> None:
        _check(self.run_dir is not None, "run_dir", None, "say which run to evaluate: run_dir=runs/...")
        _check(self.split in ("train", "val", "test"), "split", self.split, "must be train, val or test")


@dataclass
class StartupConfig:
    """How the start of a training is timed."""

    enabled: bool = MISSING
    repeats: int = MISSING
    """Starts of each kind."""
    cold: str = MISSING
    """fadvise | drop_caches | none: how the file cache is dropped before a cold start."""

    def __post_init__(self) -> None:
        choices = ("fadvise", "drop_caches", "none")
        _check(self.repeats > 0, "startup.repeats", self.repeats, "must be at least 1")
        _check(self.cold in choices, "startup.cold", self.cold, f"must be one of {', '.join(choices)}")


@dataclass
class BenchmarkConfig:
    """Everything that `python -m mnist_dist.benchmark` can be told."""

    run_dir: str | None = None
    """The folder for the results; by default a new one below `runs/`, named by date and time."""
    contenders: list[str] | None = None
    """Who is compared; by default all that this machine can run."""
    epochs: int = MISSING
    """Epochs that count, of each contender."""
    warmup_epochs: int = MISSING
    """Epochs before them that do not count."""
    targets: bool = MISSING
    """Say of each target whether it was reached."""
    timeout_s: float = MISSING
    """How long a contender may take to start, or for one turn, seconds."""
    startup: StartupConfig = MISSING
    data: DataConfig = MISSING

    def __post_init__(self) -> None:
        _check(self.epochs > 0, "epochs", self.epochs, "must be at least 1")
        _check(self.warmup_epochs >= 0, "warmup_epochs", self.warmup_epochs, "must be at least 0")
        _check(0 < self.timeout_s <= 86400, "timeout_s", self.timeout_s, "must be more than 0 and at most 86400")
        _check(
            self.contenders is None or len(self.contenders) > 0 or self.startup.enabled,
            "contenders",
            self.contenders,
            "nothing is left to measure; name one, or say startup.enabled=true",
        )


_SCHEMAS: dict[tuple[str, str], type] = {
    ("schema", "train"): TrainConfig,
    ("schema", "evaluate"): EvaluateConfig,
    ("schema", "benchmark"): BenchmarkConfig,
    ("schema/model", "mlp"): MLPConfig,
    ("schema/model", "cnn"): CNNConfig,
    ("schema/optimizer", "adam"): AdamConfig,
    ("schema/optimizer", "sgd"): SGDConfig,
}


# Keys that may differ between the processes of one job.
_FREE_IN_A_JOB = ("run_dir", "plots.", "console.", "threads.", "data.path", "data.cache_dir", "data.keras_home")
# Keys that may differ between two commands of one run: they do not alter what an epoch makes of the weights.
_FREE_IN_A_RUN = (*_FREE_IN_A_JOB, "strategy.", "trainer.epochs", "checkpoint.", "resume")


def job_keys(tree: Mapping[str, Any]) -> dict[str, str]:
    """The keys of a configuration (as nested mappings) that all processes of a job must share, dotted."""
    return _select(tree, without=_FREE_IN_A_JOB)


def training_keys(tree: Mapping[str, Any]) -> dict[str, str]:
    """The keys of a configuration (as nested mappings) that its training depends on, dotted."""
    return _select(tree, without=_FREE_IN_A_RUN)


def _select(tree: Mapping[str, Any], *, without: tuple[str, ...]) -> dict[str, str]:
    return {key: str(value) for key, value in _flatten(tree).items() if not key.startswith(without)}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def register_schemas() -> None:
    """Make the dataclasses known to Hydra, under `schema/`, where the files of `conf/` name them."""
    for (group, name), node in _SCHEMAS.items():
        ConfigStore.instance().store(group=group, name=name, node=node)


def compose_config(*overrides: str, config_name: str = "train") -> Any:
    """The typed configuration that the command line `overrides` would give; for use from Python.

    Raises:
        UserError: a value is out of range.
        hydra.errors.HydraException, omegaconf.errors.OmegaConfBaseException: an unknown key, choice or type.
    """
    register_schemas()
    GlobalHydra.instance().clear()  # Hydra composes one command line at a time; an entry point's is done by now
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return to_config(hydra.compose(config_name, list(overrides)))


def to_config(composed: DictConfig) -> Any:
    """The typed configuration of a composed one; raises UserError for values out of range."""
    return OmegaConf.to_object(composed)


def conf_dir() -> Path:
    """The folder `conf/`: inside the package once installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return next(folder for folder in (package / "conf", package.parent / "conf") if folder.is_dir())
