"""The optimizers, on one flat weight vector.

Keras' own optimizers add up the gradients of all replicas by themselves when they are applied under `tf.distribute`;
here the gradient has been reduced already, together with the metrics. So the update is TensorFlow's fused kernel,
which does the arithmetic of Keras' optimizer in one operation.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import tensorflow as tf

from mnist_dist.config import AdamConfig, OptimizerConfig, SGDConfig


class Optimizer(ABC):
    """An update rule. Its state is `slot_names`, a vector like the weights for each name, zero at first."""

    slot_names: tuple[str, ...]

    @abstractmethod
    def apply(
        self,
        weights: tf.Variable,
        slots: Sequence[tf.Variable],
        gradient: tf.Tensor,
        *,
        global_step: tf.Tensor,
        learning_rate: tf.Tensor,
    ) -> None:
        """Update weights and slots in place; `global_step` counts the updates made before this one."""


class Adam(Optimizer):
    """Adam as in section 2 of Kingma and Ba 2015 (the form with "epsilon hat"), which is Keras' form too."""

    slot_names = ("momentum", "velocity")

    def __init__(self, config: AdamConfig) -> None:
        self._config = config

    def apply(
        self,
        weights: tf.Variable,
        slots: Sequence[tf.Variable],
        gradient: tf.Tensor,
        *,
        global_step: tf.Tensor,
        learning_rate: tf.Tensor,
    ) -> None:
        """Update weights and slots in place."""
        config, (momentum, velocity) = self._config, slots
        updates = tf.cast(global_step + 1, tf.float32)
        tf.raw_ops.ResourceApplyAdam(
            var=weights.handle,
            m=momentum.handle,
            v=velocity.handle,
            beta1_power=tf.pow(config.beta_1, updates),
            beta2_power=tf.pow(config.beta_2, updates),
            lr=learning_rate,
            beta1=config.beta_1,
            beta2=config.beta_2,
            epsilon=config.epsilon,
            grad=gradient,
        )


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
        global_step: tf.Tensor,
        learning_rate: tf.Tensor,
    ) -> None:
        """Update weights and slots in place."""
        del global_step  # the same rule at every step
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


def create_optimizer(config: OptimizerConfig) -> Optimizer:
    """The configured optimizer."""
    if isinstance(config, AdamConfig):
        return Adam(config)
    assert isinstance(config, SGDConfig), config
    return SGD(config)
