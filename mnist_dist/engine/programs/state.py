"""What training changes, and how a reduced gradient changes it."""

from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow as tf

from mnist_dist.base.array import Array
from mnist_dist.base.errors import UserError
from mnist_dist.engine.clipping import clip
from mnist_dist.engine.flat_model import FloatArray
from mnist_dist.engine.optimizer import Optimizer
from mnist_dist.engine.precision import LossScale
from mnist_dist.strategy.base import Strategy

MODEL_VECTORS = ("weights", "other weights")
"""Names of the model's vectors in a checkpoint: the weights that are trained; then the others, if there are any."""


class TrainState:
    """All variables that training changes: a copy on every replica, all of them bit-identical."""

    def __init__(
        self,
        vectors: Sequence[FloatArray],
        *,
        optimizer: Optimizer,
        loss_scale: LossScale,
        strategy: Strategy,
        clip_norm: float | None = None,
        restored: Mapping[str, Array] | None = None,
    ) -> None:
        """Create the variables, for the model's `vectors`, or from rank 0's `restored` arrays; a collective.

        A gradient with a norm larger than `clip_norm` is shortened to it.
        """
        self._optimizer = optimizer
        self._loss_scale = loss_scale
        self._clip_norm = clip_norm
        self.strategy = strategy
        self._variables: dict[str, tf.Variable] = {}

        def create(name: str, initial: Array) -> tf.Variable:
            value = initial if restored is None else restored.get(name)
            if value is None or (value.dtype, value.shape) != (initial.dtype, initial.shape):
                raise UserError(
                    f"the checkpoint to resume from lacks the {name} that this version of the package needs; "
                    "name another run_dir"
                )
            self._variables[name] = strategy.create_variable(value)
            return self._variables[name]

        self.model = [create(name, vector) for name, vector in zip(MODEL_VECTORS, vectors, strict=False)]
        """Those of the model (`FlatModel.vectors`)."""
        self.weights = self.model[0]
        self.slots = [create(f"slot {name}", np.zeros_like(vectors[0])) for name in optimizer.slot_names]
        self.global_step = create("global_step", np.array(0, np.int64))
        # A step whose gradient overflowed is not an update (mixed_float16 only).
        self.num_updates = create("num_updates", np.array(0, np.int64))
        self.loss_scale = create("loss_scale", np.array(loss_scale.initial, np.float32))
        self.good_steps = create("good_steps", np.array(0, np.int64))

    @property
    def variables(self) -> Mapping[str, tf.Variable]:
        """All variables by name."""
        return self._variables

    def read_model(self) -> list[tf.Tensor]:
        """The model's vectors on one replica."""
        return [variable.read_value() for variable in self.model]

    def to_arrays(self) -> dict[str, Array]:
        """The values of all variables by name, as this process's first replica has them."""
        return {name: self.strategy.read(variable) for name, variable in self._variables.items()}

    def optimizer_factors(self, num_steps: int) -> tuple[tf.Tensor, ...]:
        """The optimizer's factors for the next steps, each (steps,); none if a step may not become an update."""
        if self._loss_scale.is_dynamic:
            return ()
        first = int(self.strategy.read(self.num_updates))
        return self._optimizer.factors(tf.range(first, first + num_steps, dtype=tf.int64))

    def scale(self, loss_weights: tf.Tensor) -> tf.Tensor:
        """Weights of losses times the loss scale."""
        return loss_weights * self.loss_scale.read_value() if self._loss_scale.is_dynamic else loss_weights

    def update(
        self,
        scaled_gradient: tf.Tensor,
        learning_rate: tf.Tensor,
        factors: Sequence[tf.Tensor],
        others: Sequence[tf.Tensor] = (),
    ) -> None:
        """Make a step on one replica with the reduced gradient; if that overflowed, the weights stay.

        `factors` are the step's of `optimizer_factors`, `others` the other weights after it, if they change.
        """
        if not self._loss_scale.is_dynamic:
            self._apply(self._clip(scaled_gradient), learning_rate, factors, others)
            return
        gradient = self._clip(scaled_gradient / self.loss_scale.read_value())

        def apply() -> None:
            num_updates = self.num_updates.read_value()
            self._apply(gradient, learning_rate, self._optimizer.factors(num_updates), others)
            self.num_updates.assign_add(1)

        is_finite = tf.reduce_all(tf.math.is_finite(gradient))
        tf.cond(is_finite, apply, lambda: None)
        self._loss_scale.update(self.loss_scale, self.good_steps, is_finite)

    def _clip(self, gradient: tf.Tensor) -> tf.Tensor:
        return gradient if self._clip_norm is None else clip(gradient, self._clip_norm)

    def _apply(
        self,
        gradient: tf.Tensor,
        learning_rate: tf.Tensor,
        factors: Sequence[tf.Tensor],
        others: Sequence[tf.Tensor],
    ) -> None:
        for variable, value in zip(self.model[1:], others, strict=False):
            variable.assign(value)
        self._optimizer.apply(self.weights, self.slots, gradient, learning_rate=learning_rate, factors=factors)

    def count_steps(self, num_steps: int) -> None:
        """Count the steps of an epoch on one replica: once, since every operation of a step costs a GPU time."""
        self.global_step.assign_add(num_steps)
        if not self._loss_scale.is_dynamic:
            self.num_updates.assign_add(num_steps)
