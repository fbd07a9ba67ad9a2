"""Keys of `optimizer`, `learning_rate` and `batch`."""

from dataclasses import dataclass

from omegaconf import MISSING

from mnist_dist.config.rules import MAX_INT32, MAX_PARTS, Checked, between, check, decay, one_of, positive_float32

_SET_BY_CHOICE = "is set by optimizer=...; leave it alone"
_UNKNOWN = "no such optimizer; start your own file with defaults: [adam], for example"


@dataclass
class OptimizerConfig(Checked):
    """What every optimizer has."""

    section = "optimizer."

    name: str = MISSING
    learning_rate: float = positive_float32()
    """Of every step, unless `learning_rate.scaling` raises it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(type(self) is not OptimizerConfig, "optimizer.name", self.name, _UNKNOWN)

    @property
    def num_slots(self) -> int:
        """Numbers that the optimizer keeps for each weight."""
        raise NotImplementedError  # each choice has it; abstract classes are no schemas


@dataclass
class AdamConfig(OptimizerConfig):
    """Adam (Kingma and Ba 2015, arXiv 1412.6980) with Keras' defaults."""

    name: str = one_of("adam", words=_SET_BY_CHOICE)
    beta_1: float = decay()
    """adam: decay of the mean of gradients."""
    beta_2: float = decay()
    """adam: decay of the mean of squared gradients."""
    epsilon: float = positive_float32()
    """adam: keeps the division from 0."""

    @property
    def num_slots(self) -> int:
        """As the base class says."""
        return 2


@dataclass
class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent with optional momentum."""

    name: str = one_of("sgd", words=_SET_BY_CHOICE)
    momentum: float = decay()
    """sgd: share of the last update that is added to the next one."""
    nesterov: bool = MISSING
    """sgd: Nesterov's form of momentum."""

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
class LearningRateConfig(Checked):
    """How the learning rate follows the size of the global batch."""

    section = "learning_rate."

    scaling: str = one_of("none", "linear", "sqrt")
    """How the rate follows the factor by which weak scaling makes the global batch larger."""
    warmup_epochs: float = between(0, MAX_INT32)
    """Epochs over which the rate rises to its full value (Goyal et al. 2017, arXiv 1706.02677)."""


@dataclass
class BatchConfig(Checked):
    """How training examples form a step."""

    section = "batch."

    global_size: int = between(1, MAX_INT32)
    """Examples of an optimizer step: of all replicas together (strong scaling), or of each replica (weak)."""
    scaling: str = one_of("strong", "weak")
    """strong: the global batch is divided over the replicas; weak: each replica has `batch.global_size` examples."""
    num_shards: int = between(1, MAX_PARTS)
    """exact: pieces that a global batch is cut into; the largest number of replicas, and of cores of a process."""
