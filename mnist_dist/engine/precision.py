"""The type that layers compute in, and the loss scale that float16 needs."""

import tensorflow as tf

from mnist_dist.config.devices import PrecisionConfig


def choose_precision(name: str, compute_capability: tuple[int, int] | None) -> str:
    """The Keras dtype policy for a configured precision.

    Args:
        name: auto, or a policy.
        compute_capability: of the GPU, as NVIDIA counts; None for a CPU.

    Returns:
        float32, mixed_float16 or mixed_bfloat16.
    """
    if name != "auto":
        return name
    if compute_capability is None or compute_capability < (7, 0):
        return "float32"
    # bfloat16 came with Ampere (8.0), float16 tensor cores with Volta (7.0).
    return "mixed_bfloat16" if compute_capability >= (8, 0) else "mixed_float16"


class LossScale:
    """Dynamic loss scaling (Micikevicius et al. 2018, arXiv 1710.03740); a constant 1 if not needed.

    An overflow shows as a non-finite number in the *reduced* gradient, which is the same on every replica; so all of
    them make the same decision, without further communication. A factor of 2 changes only exponents, so scaling
    itself causes no rounding.
    """

    def __init__(self, config: PrecisionConfig) -> None:
        """Create it for a resolved precision, not `auto`."""
        self.is_dynamic = config.name == "mixed_float16"
        self.initial = config.initial_loss_scale if self.is_dynamic else 1.0
        self._growth_steps = config.loss_scale_growth_steps

    def update(self, scale: tf.Variable, good_steps: tf.Variable, is_finite: tf.Tensor) -> None:
        """Adapt the scale after a step: halve it after an overflow, double it after many steps without one."""
        steps = tf.where(is_finite, good_steps.read_value() + 1, tf.zeros([], tf.int64))
        grows = steps >= self._growth_steps
        factor = tf.where(is_finite, tf.where(grows, 2.0, 1.0), 0.5)
        scale.assign(tf.maximum(scale.read_value() * factor, 1.0))
        good_steps.assign(tf.where(grows, tf.zeros([], tf.int64), steps))
