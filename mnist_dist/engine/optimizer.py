"""The optimizers, on one flat weight vector.

Keras' own optimizers sum the gradients of all replicas when applied under `tf.distribute`; here the gradient has
already been reduced, together with the metrics. So the update is TensorFlow's fused kernel, which does the arithmetic
of Keras' optimizer in one operation.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence

import tensorflow as tf

from mnist_dist.config.optimization import AdamConfig, AdamWConfig, OptimizerConfig, SGDConfig


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


def create_optimizer(config: OptimizerConfig, weight_kinds: Sequence[tuple[str, int]] = ()) -> Optimizer:
    """The configured optimizer, for weights of these kinds (`FlatModel.weight_kinds`), which only AdamW asks for."""
    if isinstance(config, AdamWConfig):
        return AdamW(config, weight_kinds)
    if isinstance(config, AdamConfig):
        return Adam(config)
    assert isinstance(config, SGDConfig), config
    return SGD(config)
