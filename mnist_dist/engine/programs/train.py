"""One epoch of training as one compiled call, without Python per step. The methods follow the path of a batch.

A global batch is computed shard by shard (`engine.shards`): the shards of a replica are independent, so they keep the
cores of a CPU busy in parallel. What is reduced are sums over examples, divided by the number of real examples in the
global batch. A row without an example (index `PADDING`) has weight 0.
"""

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mnist_dist.engine.batches import PADDING
from mnist_dist.engine.flat_model import FlatModel
from mnist_dist.engine.layers.dropout import BatchPosition
from mnist_dist.engine.programs.placement import DeviceArrays, PlacedSplit, gather_rows
from mnist_dist.engine.programs.state import TrainState
from mnist_dist.engine.reduction import Reduction
from mnist_dist.engine.shards import ShardPlan
from mnist_dist.results.sums import EpochSums
from mnist_dist.strategy.base import Strategy


class TrainProgram:
    """Trains `state` on the examples of `split`."""

    def __init__(
        self,
        flat_model: FlatModel,
        state: TrainState,
        *,
        strategy: Strategy,
        split: PlacedSplit,
        shards: ShardPlan,
        reduction: Reduction,
    ) -> None:
        self._flat_model = flat_model
        self._state = state
        self._strategy = strategy
        self._arrays = split.arrays
        self._shards = shards
        self._reduction = reduction
        # No AutoGraph here and below: nothing needs it, and it takes a second.
        self._compiled = tf.function(self._train_epoch, autograph=False)
        # Traced once for all shards.
        self._shard_sums = tf.function(self._trace_shard_sums, autograph=False)

    def run_epoch(self, indices: npt.NDArray[np.int32], *, learning_rates: npt.NDArray[np.float64]) -> EpochSums:
        """Train on the steps of `indices`, shape (steps, rows of all shards), as a `BatchPlan` makes them."""
        losses, num_correct = self._compiled(tf.constant(indices), tf.constant(learning_rates, tf.float32))
        return EpochSums(losses.numpy(), num_correct.numpy().astype(np.int64))

    def _train_epoch(self, indices: tf.Tensor, learning_rates: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        def step(step_inputs: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
            loss, correct = self._strategy.run(self._train_step, self._arrays, *step_inputs)
            return loss, correct

        # A loop in the graph; each step needs the weights of the one before, so steps must not run in parallel.
        losses, num_correct = tf.map_fn(
            step, (indices, learning_rates), fn_output_signature=(tf.float32, tf.float32), parallel_iterations=1
        )
        return losses, num_correct

    def _train_step(
        self, data: DeviceArrays, indices: tf.Tensor, learning_rate: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """One replica's share of a step; `indices` are those of the whole global batch."""
        state = self._state
        weights = self._flat_model.split(state.weights.read_value())
        # Turns a sum over examples into its share of the global batch's (scaled) mean.
        num_examples = tf.math.count_nonzero(indices != PADDING, dtype=tf.float32)
        loss_factor = state.loss_scale.read_value() / num_examples
        global_step = state.global_step.read_value()
        num_rows = self._shards.rows_per_shard
        sums = []
        for shard in self._shards.shards_of(self._strategy.replica_index()):
            rows = tf.slice(indices, [shard * num_rows], [num_rows])
            first_row = tf.constant(shard * num_rows, tf.int64)
            sums.append(self._shard_sums(weights, data, rows, loss_factor, global_step, first_row))
        # Gradients and metric sums travel together: one message per step.
        bucket = self._reduction(sums)
        gradient, loss, correct = tf.split(bucket, [self._flat_model.num_parameters, 1, 1])
        state.update(gradient, learning_rate)
        return loss[0], correct[0]

    def _trace_shard_sums(
        self,
        weights: list[tf.Tensor],
        data: DeviceArrays,
        rows: tf.Tensor,
        loss_factor: tf.Tensor,
        global_step: tf.Tensor,
        first_row: tf.Tensor,
    ) -> list[tf.Tensor]:
        """What one shard adds to the gradient of the global batch, the sum of losses and the number correct."""
        images, labels, example_weights = gather_rows(data, rows)
        with tf.GradientTape() as tape:
            tape.watch(weights)
            logits = self._flat_model.training_logits(weights, images, BatchPosition(global_step, first_row))
            losses = tf.nn.softmax_cross_entropy_with_logits(labels, logits) * example_weights
            share_of_mean = tf.reduce_sum(losses) * loss_factor
        # Products may be computed in 16 bits; sums have 32.
        gradients = [tf.cast(gradient, tf.float32) for gradient in tape.gradient(share_of_mean, weights)]
        correct = tf.cast(tf.argmax(logits, axis=1) == tf.argmax(labels, axis=1), tf.float32)
        return [*gradients, tf.reduce_sum(losses), tf.reduce_sum(correct * example_weights)]
