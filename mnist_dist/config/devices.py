"""Keys of `strategy`, `precision` and `threads`: on which devices and in which types the training is computed."""

from dataclasses import dataclass
from typing import Any

from mnist_dist.config.rules import MAX_INT32, MAX_PARTS, Checked, between, one_of, ruled, timeout_s


@dataclass
class StrategyConfig(Checked):
    """Which devices train, and how they work together."""

    section = "strategy."

    name: str = one_of("auto", "single", "mirrored", "multiworker", "horovod", words="is set by strategy={}")
    num_replicas: int | None = between(1, MAX_PARTS, default=None)
    """mirrored: how many GPUs to use (by default all) or, without GPUs, how many logical CPUs."""
    start_timeout_s: float = timeout_s()
    """Several processes: how many seconds they wait for each other at the start."""


@dataclass
class PrecisionConfig(Checked):
    """The type that layers compute in; weights, softmax, loss and reduction are always float32."""

    section = "precision."

    name: str = one_of("auto", "float32", "mixed_float16", "mixed_bfloat16", words="is set by precision={}")
    initial_loss_scale: float = between(1, 2.0**126)
    """mixed_float16: initial loss scale, which keeps small gradients from vanishing."""
    loss_scale_growth_steps: int = between(1, MAX_INT32)
    """mixed_float16: steps without overflow after which the loss scale doubles."""


def _threads() -> Any:
    numbers = {str(number) for number in range(1, MAX_PARTS + 1)}
    return ruled(lambda value: value == "auto" or value in numbers, f"must be auto or a number from 1 to {MAX_PARTS}")


@dataclass
class ThreadsConfig(Checked):
    """TensorFlow's threads."""

    section = "threads."

    intra_op: str = _threads()
    """fast: threads within one operation; exact always uses one, and warns if another number is configured."""
    inter_op: str = _threads()
    """Operations that run in parallel; changes the speed, not the results."""
