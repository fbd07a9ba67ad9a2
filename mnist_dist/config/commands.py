"""The typed configuration: every key, its meaning, its range.

The dataclasses are Hydra's schema, so a misspelt key or a wrong type is refused when the configuration is
composed; values outside the range that stands beside a key are refused when `to_config` turns it into these objects.
Nothing here knows TensorFlow.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import hydra
from hydra import version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mnist_dist.base.errors import UserError

# Named here and not looked up in Keras, so that a misspelt one is refused before TensorFlow is imported.
ACTIVATIONS = ("relu", "leaky_relu", "elu", "selu", "gelu", "silu", "softplus", "sigmoid", "tanh", "linear")
INITIALIZERS = tuple(f"{family}_{kind}" for family in ("he", "glorot", "lecun") for kind in ("normal", "uniform"))


# What TensorFlow computes with: larger numbers are infinite, smaller ones are flushed to 0.
FLOAT32_MAX = (2 - 2**-23) * 2.0**127
FLOAT32_TINY = 2.0**-126
# From here on a number is 1 once it is rounded to float32.
_ROUNDS_TO_1 = 1 - 2**-25
_MAX_INT32 = 2**31 - 1
_MAX_INT64 = 2**63 - 1
# Keras follows a network by recursion, and Python's limit ends that at 500 layers, each with its dropout.
MAX_LAYERS = 400
# More shards, replicas or threads help nobody.
_MAX_PARTS = 1024


class _Rule(NamedTuple):
    """What a value must be."""

    allows: Callable[[Any], bool]
    words: str


def _ruled(allows: Callable[[Any], bool], words: str, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"rule": _Rule(allows, words)})


def _one_of(*choices: str, words: str = "must be {}") -> Any:
    *most, last = choices
    return _ruled(lambda value: value in choices, words.format(f"{', '.join(most)} or {last}" if most else last))


def _between(low: float, high: float, *, default: Any = MISSING) -> Any:
    """A number, both ends included; None where that is the default."""
    return _ruled(lambda value: value is None or low <= value <= high, f"must be from {low} to {high}", default)


def _positive_float32() -> Any:
    words = f"must be a positive number of float32 (from {FLOAT32_TINY:.2g} to {FLOAT32_MAX:.2g})"
    return _ruled(lambda value: FLOAT32_TINY <= value <= FLOAT32_MAX, words)


def _decay() -> Any:
    return _ruled(
        lambda value: 0 <= value < _ROUNDS_TO_1, "must be at least 0 and less than 1 in float32 (at most 0.9999999)"
    )


def _check(condition: bool, key: str, value: object, words: str) -> None:
    if not condition:
        raise UserError(f"{key}={shorten(value)}: {words}")


def shorten(value: object, most: int = 200) -> str:
    """A value as text, its middle left out where it is too long for a line."""
    text = str(value)
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 4 :]}"


_LEAVE_ALONE = "is set by model=... or optimizer=...; leave it alone"
_NO_SCHEMA = "no network and optimizer of ours has this name; begin a file of your own with defaults: [{}], for example"
_AT_MOST_A_DAY = _Rule(lambda value: 0 < value <= 86400, "must be more than 0 and at most 86400")


class _Checked:
    """Refuses values that the rule of their key does not allow."""

    section = ""
    """Where the keys are, with the dot."""

    def __post_init__(self) -> None:
        for key in fields(self):  # type: ignore[arg-type]
            value, rule = getattr(self, key.name), key.metadata.get("rule")
            if rule is not None:
                _check(rule.allows(value), self.section + key.name, value, rule.words)


@dataclass
class DataConfig(_Checked):
    """Which images to train on, and how they are split."""

    section = "data."

    name: str = _one_of("auto", "mnist", "digits", "npz", words="is set by data={}")
    path: str | None = None
    """A Keras-layout .npz file, or (mnist) a folder with the four IDX files."""
    cache_dir: str = MISSING
    """Where built data sets are kept."""
    keras_home: str = MISSING
    """Keras' own cache: `datasets/mnist.npz` below it is read, and a download is put there."""
    val_fraction: float = _ruled(lambda value: 0 < value < 1, "must be between 0 and 1")
    """Share of the training images that is held out for validation (scikit-learn's `test_size`)."""
    split_seed: int = _between(0, 2**32 - 1)
    """`random_state` of that split; separate from `seed`, so that seeds can be compared on one split."""

    def __post_init__(self) -> None:
        super().__post_init__()
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


class LayerSize(NamedTuple):
    """How large a layer is."""

    num_weights: int
    num_outputs: int
    """Of one image."""


@dataclass
class ModelConfig(_Checked):
    """What every network has; the choices below add their own keys."""

    section = "model."
    size_keys: ClassVar[tuple[str, ...]]
    """The keys that make the network large or small."""

    name: str = MISSING
    dropout: float = _between(0, 0.9999)
    """Share of units dropped after each hidden layer; `PositionalDropout` keeps it to 1/65536."""
    activation: str = _one_of(*ACTIVATIONS)
    kernel_initializer: str = _one_of(*INITIALIZERS)
    """Keras initializer of the hidden layers."""
    output_initializer: str = _one_of(*INITIALIZERS)
    """Keras initializer of the softmax layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(type(self) is not ModelConfig, "model.name", self.name, _NO_SCHEMA.format("mlp"))

    def layer_sizes(self, image_shape: Sequence[int], num_classes: int) -> list[LayerSize]:
        """The layers with weights, for images of shape (height, width) or (height, width, channels)."""
        raise NotImplementedError  # each choice has it; abstract classes are no schemas


@dataclass
class MLPConfig(ModelConfig):
    """The multilayer perceptron of the recipe."""

    size_keys: ClassVar = ("hidden_sizes",)

    name: str = _one_of("mlp", words=_LEAVE_ALONE)
    hidden_sizes: list[int] = MISSING
    """Units of each hidden layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_layers("model.hidden_sizes", self.hidden_sizes)

    def layer_sizes(self, image_shape: Sequence[int], num_classes: int) -> list[LayerSize]:
        """As the base class says."""
        return _dense_sizes([math.prod(image_shape), *self.hidden_sizes, num_classes])


@dataclass
class CNNConfig(ModelConfig):
    """A small convolutional network: one convolution and 2x2 pooling per entry of `filters`, then one dense layer."""

    size_keys: ClassVar = ("filters", "kernel_size", "dense_size")

    name: str = _one_of("cnn", words=_LEAVE_ALONE)
    filters: list[int] = MISSING
    """Channels of each convolution."""
    kernel_size: int = _between(1, _MAX_INT64)
    """Side of the convolution kernels, in pixels."""
    dense_size: int = _between(1, _MAX_INT64)
    """Units of the dense layer before the softmax."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_layers("model.filters", self.filters)

    def layer_sizes(self, image_shape: Sequence[int], num_classes: int) -> list[LayerSize]:
        """As the base class says."""
        height, width, channels = (*image_shape, 1)[:3]
        convolutions = []
        for filters in self.filters:
            num_weights = (self.kernel_size**2 * channels + 1) * filters
            convolutions.append(LayerSize(num_weights, height * width * filters))
            height, width, channels = -(-height // 2), -(-width // 2), filters
        return [*convolutions, *_dense_sizes([height * width * channels, self.dense_size, num_classes])]


def _check_layers(key: str, sizes: list[int]) -> None:
    _check(len(sizes) <= MAX_LAYERS, key, sizes, f"{len(sizes)} layers; {MAX_LAYERS} are the most")
    valid = all(isinstance(size, int) and 1 <= size <= _MAX_INT64 for size in sizes)
    _check(valid, key, sizes, f"each must be from 1 to {_MAX_INT64}")


def _dense_sizes(sizes: Sequence[int]) -> list[LayerSize]:
    return [LayerSize((inputs + 1) * outputs, outputs) for inputs, outputs in itertools.pairwise(sizes)]


@dataclass
class OptimizerConfig(_Checked):
    """What every optimizer has."""

    section = "optimizer."

    name: str = MISSING
    learning_rate: float = _positive_float32()

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(type(self) is not OptimizerConfig, "optimizer.name", self.name, _NO_SCHEMA.format("adam"))

    @property
    def num_slots(self) -> int:
        """Numbers that the optimizer keeps for each weight."""
        raise NotImplementedError  # each choice has it; abstract classes are no schemas


@dataclass
class AdamConfig(OptimizerConfig):
    """Adam (Kingma and Ba 2015, arXiv 1412.6980) with Keras' defaults."""

    name: str = _one_of("adam", words=_LEAVE_ALONE)
    beta_1: float = _decay()
    beta_2: float = _decay()
    epsilon: float = _positive_float32()

    @property
    def num_slots(self) -> int:
        """As the base class says."""
        return 2


@dataclass
class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent with optional momentum."""

    name: str = _one_of("sgd", words=_LEAVE_ALONE)
    momentum: float = _decay()
    nesterov: bool = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(
            not self.nesterov or self.momentum > 0,
            "optimizer.nesterov",
            self.nesterov,
            "needs optimizer.momentum greater than 0",
        )

    @property
    def num_slots(self) -> int:
        """As the base class says."""
        return 1 if self.momentum else 0


@dataclass
class LearningRateConfig(_Checked):
    """How the learning rate follows the size of the global batch."""

    section = "learning_rate."

    scaling: str = _one_of("none", "linear", "sqrt")
    """none | linear | sqrt: of the factor by which the global batch is larger than `batch.global_size`."""
    warmup_epochs: float = _between(0, _MAX_INT32)
    """Epochs over which the rate rises to its full value (Goyal et al. 2017, arXiv 1706.02677)."""


@dataclass
class BatchConfig(_Checked):
    """How training examples form a step."""

    section = "batch."

    global_size: int = _between(1, _MAX_INT32)
    """Examples per optimizer step: over all replicas together (strong scaling), or of each replica (weak)."""
    scaling: str = _one_of("strong", "weak")
    """strong | weak."""
    num_shards: int = _between(1, _MAX_PARTS)
    """reproducibility=exact: pieces that a global batch is cut into; the largest number of replicas."""


@dataclass
class StrategyConfig(_Checked):
    """Which devices train, and how they work together."""

    section = "strategy."

    name: str = _one_of("auto", "single", "mirrored", "multiworker", "horovod", words="is set by strategy={}")
    num_replicas: int | None = _between(1, _MAX_PARTS, default=None)
    """mirrored: how many GPUs to use, or without GPUs how many logical CPUs."""
    start_timeout_s: float = _ruled(*_AT_MOST_A_DAY)
    """Several processes: how long they wait for each other at the start, seconds."""


@dataclass
class PrecisionConfig(_Checked):
    """The type that layers compute in; weights, softmax, loss and reduction are float32 always."""

    section = "precision."

    name: str = _one_of("auto", "float32", "mixed_float16", "mixed_bfloat16", words="is set by precision={}")
    initial_loss_scale: float = _between(1, 2.0**126)
    """mixed_float16: first factor on the loss, which keeps small gradients from vanishing."""
    loss_scale_growth_steps: int = _between(1, _MAX_INT32)
    """mixed_float16: the factor doubles after so many steps without overflow."""


def _threads() -> Any:
    numbers = {str(number) for number in range(1, _MAX_PARTS + 1)}
    return _ruled(lambda value: value == "auto" or value in numbers, f"must be auto or a number from 1 to {_MAX_PARTS}")


@dataclass
class ThreadsConfig(_Checked):
    """TensorFlow's threads; they change the speed only."""

    section = "threads."

    intra_op: str = _threads()
    """Threads inside one operation: auto | a number."""
    inter_op: str = _threads()
    """Operations side by side: auto | a number."""


@dataclass
class TrainerConfig(_Checked):
    """The outer loop."""

    section = "trainer."

    epochs: int = _between(1, _MAX_INT32)


@dataclass
class CheckpointConfig(_Checked):
    """What is kept of the training while it runs, to go on from."""

    section = "checkpoint."

    every_epochs: int = _between(1, _MAX_INT32)
    """A checkpoint after so many epochs, and after the last one."""
    every_s: float = _between(0, math.inf)
    """And after the epoch that ends so many seconds after the last checkpoint, or later."""
    keep: int = _between(1, _MAX_INT32)
    """How many of the newest are kept; the best by validation accuracy is kept besides."""


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
class TrainConfig(_Checked):
    """Everything that `python -m mnist_dist.train` can be told."""

    run_dir: str | None = None
    """The run folder; by default a new one below `runs/`, named by date and time."""
    seed: int = _between(0, _MAX_INT32)
    """Initial weights, shuffling and dropout follow from it."""
    data: DataConfig = MISSING
    model: ModelConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    learning_rate: LearningRateConfig = MISSING
    batch: BatchConfig = MISSING
    strategy: StrategyConfig = MISSING
    precision: PrecisionConfig = MISSING
    reproducibility: str = _one_of("auto", "exact", "fast")
    """auto | exact | fast; auto is exact on CPUs and fast on GPUs."""
    threads: ThreadsConfig = MISSING
    trainer: TrainerConfig = MISSING
    checkpoint: CheckpointConfig = MISSING
    resume: str = _one_of("auto", "never")
    """auto | never: whether to go on with a run that was started in `run_dir`."""
    plots: PlotsConfig = MISSING
    console: ConsoleConfig = MISSING


@dataclass
class EvaluateDataConfig:
    """Where a run's data is now."""

    path: str | None = None
    """The data file, if it has moved since the training."""


@dataclass
class EvaluateConfig(_Checked):
    """Everything that `python -m mnist_dist.evaluate` can be told."""

    run_dir: str | None = _ruled(
        lambda value: value is not None, "say which run to evaluate: run_dir=runs/...", default=None
    )
    """The run folder to evaluate."""
    split: str = _one_of("train", "val", "test")
    """train | val | test."""
    data: EvaluateDataConfig = MISSING
    console: ConsoleConfig = MISSING


@dataclass
class StartupConfig(_Checked):
    """How the start of a training is timed."""

    section = "startup."

    enabled: bool = MISSING
    repeats: int = _between(1, _MAX_INT32)
    """Starts of each kind."""
    cold: str = _one_of("fadvise", "drop_caches", "none")
    """fadvise | drop_caches | none: how the file cache is dropped before a cold start."""


@dataclass
class BenchmarkConfig(_Checked):
    """Everything that `python -m mnist_dist.benchmark` can be told."""

    run_dir: str | None = None
    """The folder for the results; by default a new one below `runs/`, named by date and time."""
    contenders: list[str] | None = None
    """Who is compared; by default all that this machine can run."""
    epochs: int = _between(1, _MAX_INT32)
    """Epochs that count, of each contender."""
    warmup_epochs: int = _between(0, _MAX_INT32)
    """Epochs before them that do not count."""
    targets: bool = MISSING
    """Say of each target whether it was reached."""
    timeout_s: float = _ruled(*_AT_MOST_A_DAY)
    """How long a contender may take to start, or for one turn, seconds."""
    startup: StartupConfig = MISSING
    data: DataConfig = MISSING

    def __post_init__(self) -> None:
        super().__post_init__()
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


def compose(
    command: str, overrides: Sequence[str], *, config_dir: str | None = None, config_name: str | None = None
) -> DictConfig:
    """What the files of `conf/` and a command line give, checked against the schema of `command` but for the ranges.

    Only composing is left to Hydra: whatever a file of the user's own says of Hydra's settings, nothing acts on it.

    Args:
        command: train, evaluate or benchmark.
        overrides: KEY=VALUE, each.
        config_dir: a folder with files of the user's own.
        config_name: of these files the one to begin with; by default that of `command` in `conf/`.

    Raises:
        UserError: a file cannot be read, or is no configuration of `command`.
        hydra.errors.HydraException, omegaconf.errors.OmegaConfBaseException: an unknown key, choice or type.
    """
    register_schemas()
    version.setbase("1.3")
    GlobalHydra.instance().clear()  # Hydra composes one command line at a time
    search_path = create_config_search_path(str(conf_dir()))
    if config_dir is not None:  # before the schemas
        place = SearchPathQuery(provider="schema")
        search_path.prepend("command-line", f"file://{Path(config_dir).absolute()}", anchor=place)
    try:
        Hydra.create_main_hydra2(command, search_path)
        # A file that names folders or packages to search has no effect.
        composed = hydra.compose(config_name or command, [*overrides, "hydra.searchpath=[]"])
    except (HydraException, OmegaConfBaseException):
        if config_name is not None and overrides:  # what is wrong with the file itself comes first
            compose(command, (), config_dir=config_dir, config_name=config_name)
        raise
    except RecursionError as error:
        raise UserError(
            "the configuration cannot be read: files whose defaults name each other, or too deep"
        ) from error
    except Exception as error:  # YAML, decoding, files, defaults: each has errors of its own
        raise UserError(f"the configuration cannot be read: {shorten(' '.join(str(error).split()), 400)}") from error
    if OmegaConf.get_type(composed) is not _SCHEMAS["schema", command]:
        raise UserError(
            f"--config-name={config_name}: no configuration of {command}; begin the file with defaults: "
            f"[{command}, _self_]"
        )
    return composed


def compose_config(*overrides: str, config_name: str = "train") -> Any:
    """The typed configuration that the command line `overrides` would give; raises as `compose` and `to_config`."""
    return to_config(compose(config_name, overrides))


def to_config(composed: DictConfig) -> Any:
    """The typed configuration of a composed one; raises UserError for values out of range."""
    return OmegaConf.to_object(composed)


def conf_dir() -> Path:
    """The folder `conf/`: inside the package once installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    return next(folder for folder in (package / "conf", package.parent / "conf") if folder.is_dir())
