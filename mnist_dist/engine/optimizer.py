"""The optimizers, on one flat weight vector.

Keras' own optimizers sum the gradients of all replicas when applied under `tf.distribute`; here the gradient has
already been reduced, together with the metrics. So the update is TensorFlow's fused kernel, which does the arithmetic
of Keras' optimizer in one operation.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mnist_dist.base.errors import UserError
from mnist_dist.config.optimization import AdamConfig, AdamWConfig, LearningRateConfig, OptimizerConfig, SGDConfig
from mnist_dist.config.rules import FLOAT32_MAX


class Optimizer(ABC):
    """An update rule. Its state is one vector like the weights for each of `slot_names`, initially zero."""

    slot_names: tuple[str, ...]

    def factors(self, num_updates: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """What changes from update to update besides the learning rate; `num_updates` were made before, int64."""
        del num_updates  # usually the same rule at every step
        return ()

    @abstractmethod
    def apply(
        self,
        weights: tf.Variable,
        slots: Sequence[tf.Variable],
        gradient: tf.Tensor,
        *,
        learning_rate: tf.Tensor,
        factors: Sequence[tf.Tensor],
    ) -> None:
        """Update weights and slots in place; `factors` are those of this update."""


class Adam(Optimizer):
    """Adam as in section 2 of Kingma and Ba 2015 (the form with "epsilon hat"), as in Keras."""

    slot_names = ("momentum", "velocity")

    def __init__(self, config: AdamConfig) -> None:
        self._config = config

    def factors(self, num_updates: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Each beta to the power of the update's number."""
        this_update = tf.cast(num_updates + 1, tf.float64)
        betas = (self._config.beta_1, self._config.beta_2)
        return tuple(tf.cast(tf.pow(tf.constant(beta, tf.float64), this_update), tf.float32) for beta in betas)

    def apply(
        self,
        weights: tf.Variable,
        slots: Sequence[tf.Variable],
        gradient: tf.Tensor,
        *,
        learning_rate: tf.Tensor,
        factors: Sequence[tf.Tensor],
    ) -> None:
        """Update weights and slots in place."""
        config, (momentum, velocity), (beta_1_power, beta_2_power) = self._config, slots, factors
        tf.raw_ops.ResourceApplyAdam(
            var=weights.handle,
            m=momentum.handle,
            v=velocity.handle,
            beta1_power=beta_1_power,
            beta2_power=beta_2_power,
            lr=learning_rate,
            beta1=config.beta_1,
            beta2=config.beta_2,
            epsilon=config.epsilon,
            grad=gradient,
        )


class AdamW(Adam):
    """Adam, before which the weights shrink by `weight_decay` times the learning rate, as in Keras' AdamW."""

    def __init__(self, config: AdamWConfig, weight_kinds: Sequence[tuple[str, int]]) -> None:
        """Create it for a weight vector whose parts have these kinds and sizes."""
        super().__init__(config)
        self._weight_decay = config.weight_decay
        decays = [(kind not in config.decay_excludes, size) for kind, size in weight_kinds]
        groups = itertools.groupby(decays, key=lambda part: part[0])
        self._parts = [(decays, sum(size for _, size in parts)) for decays, parts in groups]

    def apply(
        self,
        weights: tf.Variable,
        slots: Sequence[tf.Variable],
        gradient: tf.Tensor,
        *,
        learning_rate: tf.Tensor,
        factors: Sequence[tf.Tensor],
    ) -> None:
        """Update weights and slots in place."""
        kept = 1 - learning_rate * self._weight_decay
        # Made on the device in each step: as a constant it would be another vector in every program.
        shares = [tf.fill([size], kept if decays else tf.ones([])) for decays, size in self._parts]
        weights.assign(weights.read_value() * tf.concat(shares, axis=0))
        super().apply(weights, slots, gradient, learning_rate=learning_rate, factors=factors)


class SGD(Optimizer):
    """Gradient descent; with momentum in Keras' form (velocity = momentum * velocity - learning_rate * gradient)."""

    def __init__(self, config: SGDConfig) -> None:
        self._config = config
        self.slot_names = ("momentum",) if config.momentum else ()

    def apply(
        self,
        weights: tf.Variable,
        slots: Sequence[tf.Variable],
        gradient: tf.Tensor,
        *,
        learning_rate: tf.Tensor,
        factors: Sequence[tf.Tensor],
    ) -> None:
        """Update weights and slots in place."""
        del factors
        if not slots:
            tf.raw_ops.ResourceApplyGradientDescent(var=weights.handle, alpha=learning_rate, delta=gradient)
            return
        tf.raw_ops.ResourceApplyKerasMomentum(
            var=weights.handle,
            accum=slots[0].handle,
            lr=learning_rate,
            grad=gradient,
            momentum=self._config.momentum,
            use_nesterov=self._config.nesterov,
        )


class LearningRate:
    """The learning rate of every step.

    If the global batch is larger than the configured one by a factor, the rate is larger by that factor (`linear`) or
    its root (`sqrt`). During the warm-up it rises in equal steps from the configured rate to the scaled one (gradual
    warm-up, Goyal et al. 2017, arXiv 1706.02677), or from 0 if the two are equal.
    """

    def __init__(self, config: LearningRateConfig, *, base: float, batch_factor: int, steps_per_epoch: int) -> None:
        """Build it; raises UserError if the rate grows beyond float32."""
        self._target = base * {"none": 1.0, "linear": batch_factor, "sqrt": batch_factor**0.5}[config.scaling]
        if self._target > FLOAT32_MAX:
            raise UserError(
                f"learning_rate.scaling={config.scaling}: raises optimizer.learning_rate={base} by the factor of the "
                f"batch, {batch_factor}, to {self._target:g}, which is too large for float32"
            )
        self._start = base if self._target > base else 0.0
        self._warmup_steps = round(config.warmup_epochs * steps_per_epoch)

    def describe(self) -> str:
        """The rate in words, for the log."""
        if self._warmup_steps:
            return f"{self._start:g} to {self._target:g} over {self._warmup_steps} steps"
        return f"{self._target:g}"

    def at(self, steps: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """The rates of these steps, counted from 0 over the whole training."""
        progress = np.minimum((steps + 1) / self._warmup_steps, 1) if self._warmup_steps else np.ones(len(steps))
        # In a form whose value at the end of the warm-up is exactly the target.
        return np.asarray(self._target - (self._target - self._start) * (1 - progress))


def create_optimizer(config: OptimizerConfig, weight_kinds: Sequence[tuple[str, int]] = ()) -> Optimizer:
    """The configured optimizer, for weights of these kinds (`FlatModel.weight_kinds`), which only AdamW asks for."""
    if isinstance(config, AdamWConfig):
        return AdamW(config, weight_kinds)
    if isinstance(config, AdamConfig):
        return Adam(config)
    assert isinstance(config, SGDConfig), config
    return SGD(config)
