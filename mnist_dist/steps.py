"""The compiled programs: one training epoch, one evaluation pass. Python does nothing per step.

Every replica computes its rows of each global batch; sums over examples are what is reduced, and they are divided by
the number of real examples of the global batch. A row without an example (index `PADDING`) has weight 0.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mnist_dist.data.batches import PADDING, BatchPlan
from mnist_dist.data.preprocess import Split
from mnist_dist.dropout import BatchPosition
from mnist_dist.metrics import EpochSums, EvaluationSums
from mnist_dist.model import FloatArray, Network
from mnist_dist.optimizer import Optimizer
from mnist_dist.precision import LossScale
from mnist_dist.strategy.base import Strategy

EVALUATION_ROWS = 1024
"""Rows that a replica evaluates at once, at most: enough to keep any device busy."""


class DeviceArrays(NamedTuple):
    """Images and labels of a split in a replica's memory."""

    images: tf.Tensor
    labels: tf.Tensor


class PlacedSplit(NamedTuple):
    """A split in every replica's memory: all data sets of this package fit there."""

    arrays: DeviceArrays
    num_examples: int
    num_classes: int


def place_split(split: Split, strategy: Strategy) -> PlacedSplit:
    """Copy a split to every replica."""
    arrays = DeviceArrays(strategy.replicate(split.images), strategy.replicate(split.labels))
    return PlacedSplit(arrays, num_examples=len(split), num_classes=split.labels.shape[1])


class TrainState:
    """What training changes, all of it; one copy on every replica, and all copies are the same."""

    def __init__(self, weights: FloatArray, *, optimizer: Optimizer, loss_scale: LossScale, strategy: Strategy) -> None:
        self.weights = strategy.create_variable(weights)
        self.slots = [strategy.create_variable(np.zeros_like(weights)) for _ in optimizer.slot_names]
        self.global_step = strategy.create_variable(np.array(0, np.int64))
        # Steps whose gradient overflowed are steps, but no updates (mixed_float16 only).
        self.num_updates = strategy.create_variable(np.array(0, np.int64))
        self.loss_scale = strategy.create_variable(np.array(loss_scale.initial, np.float32))
        self.good_steps = strategy.create_variable(np.array(0, np.int64))


class TrainProgram:
    """One epoch of training as one call."""

    def __init__(
        self,
        *,
        network: Network,
        optimizer: Optimizer,
        loss_scale: LossScale,
        strategy: Strategy,
        state: TrainState,
        split: PlacedSplit,
    ) -> None:
        self._network = network
        self._optimizer = optimizer
        self._loss_scale = loss_scale
        self._strategy = strategy
        self._state = state
        self._arrays = split.arrays
        self._compiled = tf.function(self._train_epoch)

    def run_epoch(self, indices: npt.NDArray[np.int32], *, learning_rates: npt.NDArray[np.float64]) -> EpochSums:
        """Train on the steps of `indices`, shape (steps, global_batch_size), as a `BatchPlan` makes them."""
        padded = _pad_rows(indices, multiple=self._strategy.num_replicas)
        losses, num_correct = self._compiled(tf.constant(padded), tf.constant(learning_rates, tf.float32))
        return EpochSums(losses.numpy(), num_correct.numpy().astype(np.int64))

    def _train_epoch(self, indices: tf.Tensor, learning_rates: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        num_steps = indices.shape[0]
        losses = tf.TensorArray(tf.float32, size=num_steps, element_shape=[])
        num_correct = tf.TensorArray(tf.float32, size=num_steps, element_shape=[])
        for step in tf.range(num_steps):
            loss, correct = self._strategy.run(self._train_step, self._arrays, indices[step], learning_rates[step])
            losses = losses.write(step, loss)
            num_correct = num_correct.write(step, correct)
        return losses.stack(), num_correct.stack()

    def _train_step(
        self, data: DeviceArrays, indices: tf.Tensor, learning_rate: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """One replica's share of a step; `indices` are those of the whole global batch."""
        state = self._state
        weights = self._network.split(state.weights.read_value())
        # What a sum over examples is multiplied by to be the global batch's (scaled) mean.
        num_examples = tf.math.count_nonzero(indices != PADDING, dtype=tf.float32)
        loss_factor = state.loss_scale.read_value() / num_examples
        global_step = state.global_step.read_value()
        rows, first_row = own_rows(indices, self._strategy)
        sums = self._sums(weights, data, rows, loss_factor, BatchPosition(global_step, first_row))
        # Gradients and metric sums travel together: one message a step.
        bucket = self._strategy.all_reduce_sum(tf.concat([tf.reshape(t, [-1]) for t in sums], axis=0))
        gradient, loss, correct = tf.split(bucket, [self._network.num_parameters, 1, 1])
        self._update(gradient, learning_rate)
        state.global_step.assign_add(1)
        return loss[0], correct[0]

    def _update(self, scaled_gradient: tf.Tensor, learning_rate: tf.Tensor) -> None:
        """Apply the reduced gradient, unless it overflowed."""
        state = self._state
        if not self._loss_scale.is_dynamic:
            self._apply(scaled_gradient, learning_rate)
            return
        gradient = scaled_gradient / state.loss_scale.read_value()
        is_finite = tf.reduce_all(tf.math.is_finite(gradient))
        if is_finite:
            self._apply(gradient, learning_rate)
        self._loss_scale.update(state.loss_scale, state.good_steps, is_finite)

    def _apply(self, gradient: tf.Tensor, learning_rate: tf.Tensor) -> None:
        state = self._state
        num_updates = state.num_updates.read_value()
        self._optimizer.apply(
            state.weights, state.slots, gradient, num_updates=num_updates, learning_rate=learning_rate
        )
        state.num_updates.assign_add(1)

    def _sums(
        self,
        weights: list[tf.Tensor],
        data: DeviceArrays,
        rows: tf.Tensor,
        loss_factor: tf.Tensor,
        position: BatchPosition,
    ) -> list[tf.Tensor]:
        """What these rows add to the gradient of the global batch, to the sum of losses, to the correct ones."""
        images, labels, example_weights = gather_rows(data, rows)
        with tf.GradientTape() as tape:
            tape.watch(weights)
            logits = self._network.training_logits(weights, images, position)
            losses = tf.nn.softmax_cross_entropy_with_logits(labels, logits) * example_weights
            share_of_mean = tf.reduce_sum(losses) * loss_factor
        gradients = tape.gradient(share_of_mean, weights)
        correct = tf.cast(tf.argmax(logits, axis=1) == tf.argmax(labels, axis=1), tf.float32)
        return [*gradients, tf.reduce_sum(losses), tf.reduce_sum(correct * example_weights)]


class EvaluateProgram:
    """Loss and confusion matrix of one split as one call."""

    def __init__(self, *, network: Network, strategy: Strategy, split: PlacedSplit) -> None:
        self._network = network
        self._strategy = strategy
        self._num_classes = split.num_classes
        self._arrays = split.arrays
        num_replicas = strategy.num_replicas
        # The fewest passes, then the smallest batch that does with them, so that little is padding.
        num_batches = -(-split.num_examples // (EVALUATION_ROWS * num_replicas))
        plan = BatchPlan(split.num_examples, global_batch_size=-(-split.num_examples // num_batches))
        self._indices = _pad_rows(plan.in_order(), multiple=num_replicas)
        self._compiled = tf.function(self._evaluate)

    def run(self, weights: tf.Variable) -> EvaluationSums:
        """Evaluate the weights on every example once; no dropout."""
        sums = self._compiled(weights, tf.constant(self._indices)).numpy()
        confusion = np.rint(sums[1:]).astype(np.int64).reshape(self._num_classes, self._num_classes)
        return EvaluationSums(float(sums[0]), confusion)

    def _evaluate(self, weights: tf.Variable, indices: tf.Tensor) -> tf.Tensor:
        return self._strategy.run(self._evaluate_replica, weights, self._arrays, indices)

    def _evaluate_replica(self, weights: tf.Variable, data: DeviceArrays, indices: tf.Tensor) -> tf.Tensor:
        """One replica's rows of every batch, then one reduction."""
        layers = self._network.split(weights.read_value())
        # float64: exact for counts up to 2**53.
        sums = tf.zeros([1 + self._num_classes**2], tf.float64)
        for batch in tf.range(indices.shape[0]):
            rows, _ = own_rows(indices[batch], self._strategy)
            images, labels, example_weights = gather_rows(data, rows)
            logits = self._network.logits(layers, images)
            losses = tf.nn.softmax_cross_entropy_with_logits(labels, logits) * example_weights
            taken_for = tf.one_hot(tf.argmax(logits, axis=1), self._num_classes)
            confusion = tf.matmul(labels * example_weights[:, tf.newaxis], taken_for, transpose_a=True)
            sums += tf.cast(tf.concat([[tf.reduce_sum(losses)], tf.reshape(confusion, [-1])], axis=0), tf.float64)
        return self._strategy.all_reduce_sum(sums)


def own_rows(indices: tf.Tensor, strategy: Strategy) -> tuple[tf.Tensor, tf.Tensor]:
    """Inside `run`: this replica's equal share of a global batch's rows, and the position of its first one."""
    num_rows = indices.shape[0] // strategy.num_replicas
    first_row = strategy.replica_index() * num_rows
    return tf.slice(indices, first_row[tf.newaxis], [num_rows]), first_row


def gather_rows(data: DeviceArrays, indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Images, labels and weights (1 for an example, 0 for padding) of the rows with these example indices."""
    valid = tf.maximum(indices, 0)  # padding reads example 0 and then weighs nothing
    example_weights = tf.cast(indices != PADDING, tf.float32)
    return tf.gather(data.images, valid), tf.gather(data.labels, valid), example_weights


def _pad_rows(indices: npt.NDArray[np.int32], *, multiple: int) -> npt.NDArray[np.int32]:
    """Widen the global batches by padding rows, so that they can be cut into `multiple` equal parts."""
    missing = -indices.shape[1] % multiple
    return np.pad(indices, [(0, 0), (0, missing)], constant_values=PADDING)
