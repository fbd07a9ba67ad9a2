"""Keys of `optimizer`, `learning_rate` and `batch`."""

from dataclasses import dataclass, replace

from omegaconf import MISSING

from mnist_dist.config.rules import (
    FLOAT32_MAX,
    MAX_INT32,
    MAX_PARTS,
    Checked,
    between,
    check,
    decay,
    one_of,
    positive_float32,
    ruled,
)

_SET_BY_CHOICE = "is set by optimizer=...; leave it alone"
_UNKNOWN = "no such optimizer; start your own file with defaults: [adam], for example"

WEIGHT_KINDS = ("kernel", "bias", "normalization", "embedding")
"""normalization: any weight of a layer whose class name has Normalization. kernel: whatever is none of the others."""


@dataclass
class OptimizerConfig(Checked):
    """The keys of every optimizer; the choices below add their own."""

    section = "optimizer."

    name: str = MISSING
    learning_rate: float = positive_float32()
    """Learning rate of every step, unless `learning_rate.scaling` raises it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(type(self) is not OptimizerConfig, "optimizer.name", self.name, _UNKNOWN)

    @property
    def num_slots(self) -> int:
        """Numbers that the optimizer keeps for each weight."""
        return 0


@dataclass
class AdamConfig(OptimizerConfig):
    """Adam (Kingma and Ba 2015, arXiv 1412.6980) with Keras' defaults."""

    name: str = one_of("adam", words=_SET_BY_CHOICE)
    beta_1: float = decay()
    """adam: decay of the mean of gradients."""
    beta_2: float = decay()
    """adam: decay of the mean of squared gradients."""
    epsilon: float = positive_float32()
    """adam: small number that prevents division by 0."""

    @property
    def num_slots(self) -> int:
        """As the base class says."""
        return 2


@dataclass
class AdamWConfig(AdamConfig):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101), with Keras' defaults."""

    name: str = one_of("adamw", words=_SET_BY_CHOICE)
    weight_decay: float = ruled(
        lambda value: 0 <= value <= FLOAT32_MAX, f"must be at least 0 and at most {FLOAT32_MAX:.2g}"
    )
    """adamw: before each update the weights shrink by this share of themselves times the learning rate."""
    decay_excludes: list[str] = MISSING
    """adamw: kinds of weights that do not shrink: any of kernel, bias, normalization and embedding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in self.decay_excludes:
            words = f"no such kind of weights; the kinds are {', '.join(WEIGHT_KINDS)}"
            check(kind in WEIGHT_KINDS, "optimizer.decay_excludes", kind, words)


@dataclass
class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent with optional momentum."""

    name: str = one_of("sgd", words=_SET_BY_CHOICE)
    momentum: float = decay()
    """sgd: share of the last update that is added to the next one."""
    nesterov: bool = MISSING
    """sgd: whether to use Nesterov momentum."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
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
class LossConfig(Checked):
    """What the training minimizes."""

    section = "loss."

    label_smoothing: float = decay()
    """Share of each target that is spread over all classes (arXiv 1512.00567); losses are shown without it."""


@dataclass
class LearningRateConfig(Checked):
    """How the learning rate follows the size of the global batch, and changes from step to step."""

    section = "learning_rate."

    scaling: str = one_of("none", "linear", "sqrt")
    """How the rate grows with the factor by which weak scaling enlarges the global batch."""
    warmup_epochs: float = between(0, MAX_INT32)
    """Epochs over which the rate rises to its full value (Goyal et al. 2017, arXiv 1706.02677)."""
    schedule: str = one_of("constant", "cosine", "one_cycle", "step")
    """cosine: falls (arXiv 1608.03983); one_cycle: rises, then falls (arXiv 1708.07120); step: falls step by step."""
    schedule_epochs: int | None = between(1, MAX_INT32, default=None)
    """cosine, one_cycle: epochs until the end, by default `trainer.epochs`; from then on the rate stays the same."""
    final_fraction: float = between(0, 1)
    """cosine, one_cycle: the rate at the end, as a share of the full one."""
    start_fraction: float = between(0, 1)
    """one_cycle: the rate at the beginning, as a share of the full one."""
    rise_fraction: float = ruled(lambda value: 0 < value < 1, "must be more than 0 and less than 1")
    """one_cycle: share of all steps in which the rate rises."""
    step_factor: float = ruled(lambda value: 0 < value <= 1, "must be more than 0 and at most 1")
    """step: what the rate is multiplied by each time."""
    step_epochs: int = between(1, MAX_INT32)
    """step: epochs from one time to the next, the warm-up included."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.schedule != "one_cycle" or self.warmup_epochs == 0,
            "learning_rate.warmup_epochs",
            self.warmup_epochs,
            "learning_rate.schedule=one_cycle has a rise of its own; leave this 0",
        )

    def over(self, num_epochs: int) -> "LearningRateConfig":
        """The same for a training of so many epochs: with how long the schedule lasts, None if it has no end."""
        if self.schedule not in ("cosine", "one_cycle"):
            return replace(self, schedule_epochs=None)
        lasts = self.schedule_epochs or num_epochs
        words = f"must be less than the {lasts} epochs of learning_rate.schedule={self.schedule}"
        check(self.warmup_epochs < lasts, "learning_rate.warmup_epochs", self.warmup_epochs, words)
        return replace(self, schedule_epochs=lasts)


@dataclass
class BatchConfig(Checked):
    """How training examples are grouped into steps."""

    section = "batch."

    global_size: int = between(1, MAX_INT32)
    """Examples per optimizer step: over all replicas (strong scaling), or on each replica (weak)."""
    scaling: str = one_of("strong", "weak")
    """strong: the global batch is divided over the replicas; weak: each replica has `batch.global_size` examples."""
    num_shards: int = between(1, MAX_PARTS)
    """exact: shards that a global batch is cut into; at most as many replicas can train, and cores per process."""
