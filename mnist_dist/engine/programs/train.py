"""One epoch of training as one compiled call, without Python per step. The methods follow the path of a batch.

A global batch is computed shard by shard (`engine.shards`): the shards of a replica are independent, so they keep the
cores of a CPU busy in parallel. What is reduced are sums over examples, divided by the number of real examples in the
global batch. A row without an example has weight 0.

What is known before an epoch starts is computed then, for all its steps (`StepInputs`): a GPU takes as long to start a
tiny operation as a large one.
"""

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mnist_dist.engine.flat_model import FlatModel, Weights
from mnist_dist.engine.layers.position import BatchPosition, BatchRows
from mnist_dist.engine.loss import cross_entropy, smoothed
from mnist_dist.engine.programs.placement import DeviceArrays, PlacedSplit, Rows, gather, rows_of
from mnist_dist.engine.programs.state import TrainState
from mnist_dist.engine.reduction import Reduction
from mnist_dist.engine.shards import ShardPlan
from mnist_dist.results.sums import EpochSums

XlaProgram = Literal["epoch", "shard"]


class StepInputs(NamedTuple):
    """What a step needs besides data and state; with one more axis in front, for all steps of an epoch."""

    rows: Rows
    """(rows,): those of the whole global batch."""
    loss_weights: tf.Tensor
    """(rows,) float32: each row's share of the global batch's mean, 1 / number of examples or 0."""
    global_step: tf.Tensor
    """Scalar int64: optimizer steps made before."""
    learning_rate: tf.Tensor
    """Scalar float32."""
    factors: tuple[tf.Tensor, ...]
    """The optimizer's own, scalars (`TrainState.optimizer_factors`)."""


class TrainProgram:
    """Trains `state` on the examples of `split`."""

    def __init__(
        self,
        flat_model: FlatModel,
        state: TrainState,
        *,
        split: PlacedSplit,
        shards: ShardPlan,
        reduction: Reduction,
        xla: XlaProgram | None = None,
    ) -> None:
        """Build it; `xla` says what XLA compiles as one program, for a shard: what each replica computes for it."""
        self._flat_model = flat_model
        self._state = state
        self._strategy = state.strategy
        self._arrays = split.arrays
        self._augmentation = split.augmentation
        self._label_smoothing = split.label_smoothing
        self._shards = shards
        self._reduction = reduction
        # No AutoGraph here and below: nothing needs it, and it takes a second.
        self._compiled = tf.function(self._train_epoch, autograph=False, jit_compile=True if xla == "epoch" else None)
        # Traced once for all shards. XLA compiles each shard by itself, so that its bits do not depend on how many
        # shards a replica has.
        self._shard_sums = tf.function(
            self._trace_shard_sums, autograph=False, jit_compile=True if xla == "shard" else None
        )

    def run_epoch(self, indices: npt.NDArray[np.int32], *, learning_rates: npt.NDArray[np.float64]) -> EpochSums:
        """Train on the steps of `indices`, shape (steps, rows of all shards), as a `BatchPlan` makes them."""
        losses, num_correct = self._compiled(self.step_inputs(indices, learning_rates=learning_rates))
        return EpochSums(losses.numpy(), num_correct.numpy().astype(np.int64))

    def step_inputs(self, indices: npt.NDArray[np.int32], *, learning_rates: npt.NDArray[np.float64]) -> StepInputs:
        """What the steps of `run_epoch` need."""
        rows, num_steps = rows_of(indices, rows_per_shard=self._shards.rows_per_shard), len(indices)
        first_step = int(self._strategy.read(self._state.global_step))
        return StepInputs(
            rows=Rows(*map(tf.constant, rows)),
            loss_weights=tf.constant(rows.weights / rows.weights.sum(axis=1, keepdims=True)),
            global_step=tf.range(first_step, first_step + num_steps, dtype=tf.int64),
            learning_rate=tf.constant(learning_rates, tf.float32),
            factors=self._state.optimizer_factors(num_steps),
        )

    def trace_step(self) -> tf.types.experimental.ConcreteFunction:
        """One step by itself, to be examined."""
        scalar, rows = tf.TensorSpec([]), tf.TensorSpec([self._shards.num_rows])
        inputs = StepInputs(
            rows=Rows(tf.TensorSpec(rows.shape, tf.int64), rows),
            loss_weights=rows,
            global_step=tf.TensorSpec([], tf.int64),
            learning_rate=scalar,
            factors=tuple(scalar for _ in self._state.optimizer_factors(1)),
        )
        step = tf.function(lambda inputs: self._strategy.run(self._train_step, self._arrays, inputs), autograph=False)
        return step.get_concrete_function(inputs)

    def _train_epoch(self, steps: StepInputs) -> tuple[tf.Tensor, tf.Tensor]:
        def run(step: StepInputs) -> tf.Tensor:
            return self._strategy.run(self._train_step, self._arrays, step)

        # A loop in the graph; each step needs the weights of the one before, so steps must not run in parallel.
        sums = tf.map_fn(run, steps, fn_output_signature=tf.TensorSpec([2], tf.float32), parallel_iterations=1)
        self._strategy.run(self._state.count_steps, steps.global_step.shape[0])
        return sums[:, 0], sums[:, 1]

    def _train_step(self, data: DeviceArrays, step: StepInputs) -> tf.Tensor:
        """One replica's share of a step; returns the sums over the global batch: losses, and number correct."""
        state = self._state
        vectors, flat_model = state.read_model(), self._flat_model
        weights = flat_model.split(*vectors)
        step = step._replace(loss_weights=state.scale(step.loss_weights))
        calls = self._shards.calls_of(self._strategy.replica_index())
        # Gradients, metric sums and moments travel together: one message per step.
        bucket = self._reduction([self.shard_sums(shards, data, step, weights) for shards in calls])
        num_parameters, num_moments = flat_model.num_parameters, flat_model.num_moments
        others = []
        if num_moments:
            moments = tf.slice(bucket, [num_parameters + 2], [num_moments]) / tf.reduce_sum(step.rows.weights)
            others = [flat_model.update_averages(vectors[1], moments)]
        state.update(tf.slice(bucket, [0], [num_parameters]), step.learning_rate, step.factors, others)
        return tf.slice(bucket, [num_parameters], [2])

    def shard_sums(self, shards: range, data: DeviceArrays, step: StepInputs, weights: Weights) -> list[tf.Tensor]:
        """What these shards of a step, computed at once, add to what it reduces; see `_trace_shard_sums`."""
        first_row = tf.constant(shards.start * self._shards.rows_per_shard, tf.int64)
        *rows, own_weights = (self._rows_of(shards, part) for part in (*step.rows, step.loss_weights))
        position = BatchPosition(first_row, step.global_step)
        sums: list[tf.Tensor] = self._shard_sums(weights, data, Rows(*rows), own_weights, position)
        return sums

    def _rows_of(self, shards: range, rows: tf.Tensor) -> tf.Tensor:
        if len(shards) == self._shards.num_shards:
            return rows
        size = self._shards.rows_per_shard
        return tf.slice(rows, [shards.start * size], [len(shards) * size])

    def _trace_shard_sums(
        self,
        weights: Weights,
        data: DeviceArrays,
        rows: Rows,
        loss_weights: tf.Tensor,
        position: BatchPosition,
    ) -> list[tf.Tensor]:
        """What shards add to the global batch's gradient, to its loss and the number correct, and to the moments."""
        images, labels = gather(data, rows.examples)
        if self._augmentation:
            images = self._augmentation(images, position)
        batch_rows = BatchRows(position, rows.weights, self._shards.rows_per_shard)
        with tf.GradientTape() as tape:
            tape.watch(weights.trained)
            logits, penalties, moments = self._flat_model.training_pass(weights, images, batch_rows)
        # Not on the tape, which would also prepare second derivatives.
        losses, slopes = cross_entropy(logits, labels, fused=not self._strategy.on_gpu)
        slopes = smoothed(slopes, labels, self._label_smoothing)
        # A penalty counts once, so in each shard by its share of the examples.
        share = tf.reduce_sum(loss_weights)
        gradients = tape.gradient(
            [logits, *penalties],
            weights.trained,
            output_gradients=[slopes * tf.reshape(loss_weights, [-1, 1]), *(share for _ in penalties)],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        correct = tf.cast(tf.argmax(logits, axis=1) == labels, tf.float32)
        metrics = tf.matmul(tf.reshape(rows.weights, [1, -1]), tf.stack([losses, correct], axis=1))
        # Products may be computed in 16 bits; sums have 32.
        return [*(tf.cast(gradient, tf.float32) for gradient in gradients), metrics, *moments]
