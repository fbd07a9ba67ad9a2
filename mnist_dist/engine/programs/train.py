"""The compiled programs: one training epoch, one evaluation pass. Python does nothing per step.

A global batch is computed shard by shard (`data.shards`): the shards of a replica do not depend on each other, so they
keep the cores of a CPU busy side by side. What is reduced are sums over examples, and they are divided by the number of
real examples of the global batch. A row without an example (index `PADDING`) has weight 0.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mnist_dist.base.errors import TrainingFailed, UserError
from mnist_dist.data.splits import Split
from mnist_dist.engine.batches import PADDING, BatchPlan
from mnist_dist.engine.layers.dropout import BatchPosition
from mnist_dist.engine.optimizer import Optimizer
from mnist_dist.engine.precision import LossScale
from mnist_dist.engine.reduction import Reduction
from mnist_dist.engine.shards import ShardPlan
from mnist_dist.models.build import FloatArray, Network
from mnist_dist.results.sums import EpochSums, EvaluationSums
from mnist_dist.strategy.base import Array, Strategy


class DeviceArrays(NamedTuple):
    """Images and labels of a split in a replica's memory."""

    images: tf.Tensor
    labels: tf.Tensor


class PlacedSplit(NamedTuple):
    """A split in every replica's memory: all data sets of this package fit there."""

    arrays: DeviceArrays
    num_examples: int
    num_classes: int


def place_split(split: Split, strategy: Strategy, *, dtype: tf.DType = tf.float32) -> PlacedSplit:
    """Copy a split to every replica; the images in the type that the network computes in."""
    images = split.images.astype(dtype.as_numpy_dtype, copy=False)
    arrays = DeviceArrays(strategy.replicate(images), strategy.replicate(split.labels))
    return PlacedSplit(arrays, num_examples=len(split), num_classes=split.labels.shape[1])


class TrainState:
    """What training changes, all of it; one copy on every replica, and all copies are the same."""

    def __init__(
        self,
        weights: FloatArray,
        *,
        optimizer: Optimizer,
        loss_scale: LossScale,
        strategy: Strategy,
        restored: Mapping[str, Array] | None = None,
    ) -> None:
        """Create the variables, a collective: for a new training, or from rank 0's `restored` arrays (`to_arrays`)."""
        self._strategy = strategy
        self._variables: dict[str, tf.Variable] = {}

        def create(name: str, initial: Array) -> tf.Variable:
            value = initial if restored is None else restored.get(name)
            if value is None or (value.dtype, value.shape) != (initial.dtype, initial.shape):
                raise UserError(
                    f"the checkpoint to go on from has no {name} as this version of the package needs it; "
                    "name another run_dir"
                )
            self._variables[name] = strategy.create_variable(value)
            return self._variables[name]

        self.weights = create("weights", weights)
        self.slots = [create(f"slot {name}", np.zeros_like(weights)) for name in optimizer.slot_names]
        self.global_step = create("global_step", np.array(0, np.int64))
        # Steps whose gradient overflowed are steps, but no updates (mixed_float16 only).
        self.num_updates = create("num_updates", np.array(0, np.int64))
        self.loss_scale = create("loss_scale", np.array(loss_scale.initial, np.float32))
        self.good_steps = create("good_steps", np.array(0, np.int64))

    def to_arrays(self) -> dict[str, Array]:
        """The values of all variables by name, as this process's first replica has them."""
        return {name: self._strategy.read(variable) for name, variable in self._variables.items()}


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
        shards: ShardPlan,
        reduction: Reduction,
    ) -> None:
        self._network = network
        self._optimizer = optimizer
        self._loss_scale = loss_scale
        self._strategy = strategy
        self._state = state
        self._arrays = split.arrays
        self._shards = shards
        self._reduction = reduction
        # Traced once for all shards. AutoGraph is off here and below: nothing needs it, and it takes a second.
        self._shard_sums = tf.function(self._trace_shard_sums, autograph=False)
        self._compiled = tf.function(self._train_epoch, autograph=False)

    def run_epoch(self, indices: npt.NDArray[np.int32], *, learning_rates: npt.NDArray[np.float64]) -> EpochSums:
        """Train on the steps of `indices`, shape (steps, global_batch_size), as a `BatchPlan` makes them."""
        padded = _pad(indices, width=self._shards.num_rows)
        losses, num_correct = self._compiled(tf.constant(padded), tf.constant(learning_rates, tf.float32))
        return EpochSums(losses.numpy(), num_correct.numpy().astype(np.int64))

    def _train_epoch(self, indices: tf.Tensor, learning_rates: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        def step(step_inputs: tuple[tf.Tensor, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
            loss, correct = self._strategy.run(self._train_step, self._arrays, *step_inputs)
            return loss, correct

        # A loop in the graph; the variables that every step reads and writes keep its passes in order.
        losses, num_correct = tf.map_fn(step, (indices, learning_rates), fn_output_signature=(tf.float32, tf.float32))
        return losses, num_correct

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
        num_rows = self._shards.rows_per_shard
        sums = []
        for shard in self._shards.shards_of(self._strategy.replica_index()):
            rows = tf.slice(indices, [shard * num_rows], [num_rows])
            first_row = tf.constant(shard * num_rows, tf.int64)
            sums.append(self._shard_sums(weights, data, rows, loss_factor, global_step, first_row))
        # Gradients and metric sums travel together: one message a step.
        bucket = self._reduction(sums)
        gradient, loss, correct = tf.split(bucket, [self._network.num_parameters, 1, 1])
        self._update(gradient, learning_rate)
        state.global_step.assign_add(1)
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
        """What one shard adds to the gradient of the global batch, to the sum of losses, to the correct ones."""
        images, labels, example_weights = gather_rows(data, rows)
        with tf.GradientTape() as tape:
            tape.watch(weights)
            logits = self._network.training_logits(weights, images, BatchPosition(global_step, first_row))
            losses = tf.nn.softmax_cross_entropy_with_logits(labels, logits) * example_weights
            share_of_mean = tf.reduce_sum(losses) * loss_factor
        # Products may be computed in 16 bits; what is added up has 32.
        gradients = [tf.cast(gradient, tf.float32) for gradient in tape.gradient(share_of_mean, weights)]
        correct = tf.cast(tf.argmax(logits, axis=1) == tf.argmax(labels, axis=1), tf.float32)
        return [*gradients, tf.reduce_sum(losses), tf.reduce_sum(correct * example_weights)]

    def _update(self, scaled_gradient: tf.Tensor, learning_rate: tf.Tensor) -> None:
        """Apply the reduced gradient, unless it overflowed."""
        state = self._state
        if not self._loss_scale.is_dynamic:
            self._apply(scaled_gradient, learning_rate)
            return
        gradient = scaled_gradient / state.loss_scale.read_value()
        is_finite = tf.reduce_all(tf.math.is_finite(gradient))
        tf.cond(is_finite, lambda: self._apply(gradient, learning_rate), lambda: None)
        self._loss_scale.update(state.loss_scale, state.good_steps, is_finite)

    def _apply(self, gradient: tf.Tensor, learning_rate: tf.Tensor) -> None:
        state = self._state
        num_updates = state.num_updates.read_value()
        self._optimizer.apply(
            state.weights, state.slots, gradient, num_updates=num_updates, learning_rate=learning_rate
        )
        state.num_updates.assign_add(1)


class EvaluateProgram:
    """Loss and confusion matrix of one split as one call; the same bits on any number of replicas.

    The split is cut into chunks of one shape, and each replica evaluates whole chunks. Counts are whole numbers, whose
    sum has no order; the losses of the chunks are added by `math.fsum`, which rounds once, so has none either.
    """

    def __init__(self, *, network: Network, strategy: Strategy, split: PlacedSplit) -> None:
        self._network = network
        self._strategy = strategy
        self._num_classes = split.num_classes
        self._arrays = split.arrays
        plan = BatchPlan.for_evaluation(split.num_examples)
        # Every replica runs through the same number of chunks; some may be padding from end to end.
        chunks_each = -(-plan.steps_per_epoch // strategy.num_replicas)
        missing = chunks_each * strategy.num_replicas - plan.steps_per_epoch
        self._indices = np.pad(plan.in_order(), [(0, missing), (0, 0)], constant_values=PADDING)
        self._compiled = tf.function(self._evaluate, autograph=False)

    def run(self, weights: tf.Variable) -> EvaluationSums:
        """Evaluate the weights on every example once; no dropout."""
        losses, counts = self._compiled(weights, tf.constant(self._indices))
        confusion = np.rint(counts.numpy()).astype(np.int64).reshape(self._num_classes, self._num_classes)
        return EvaluationSums(math.fsum(losses.numpy().tolist()), confusion)

    def _evaluate(self, weights: tf.Variable, indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        losses, counts = self._strategy.run(self._evaluate_replica, weights, self._arrays, indices)
        return losses, counts

    def _evaluate_replica(
        self, weights: tf.Variable, data: DeviceArrays, indices: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """One replica's chunks, then one reduction."""
        layers = self._network.split(weights.read_value())
        num_chunks = indices.shape[0] // self._strategy.num_replicas
        first = self._strategy.replica_index() * num_chunks
        # The passes of this loop do not depend on each other, so TensorFlow runs several side by side.
        losses, cells = tf.map_fn(
            lambda rows: self._evaluate_rows(layers, data, rows),
            indices[first : first + num_chunks],
            fn_output_signature=(tf.float32, tf.int64),
        )
        # In float64, which is exact for counts up to 2**53; once for all rows, since there may be many classes.
        counts = tf.math.unsorted_segment_sum(tf.ones_like(cells, tf.float64), cells, self._num_classes**2)
        losses = tf.pad(tf.cast(losses, tf.float64), [[first, indices.shape[0] - first - num_chunks]])
        bucket = self._strategy.all_reduce_sum(tf.concat([losses, counts], axis=0))
        return bucket[: indices.shape[0]], bucket[indices.shape[0] :]

    def _evaluate_rows(
        self, layers: list[tf.Tensor], data: DeviceArrays, rows: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """The sum of losses, and the cell of the flat confusion matrix that each row belongs to; -1 is none."""
        images, labels, example_weights = gather_rows(data, rows)
        logits = self._network.logits(layers, images)
        losses = tf.nn.softmax_cross_entropy_with_logits(labels, logits) * example_weights
        cells = tf.argmax(labels, axis=1) * self._num_classes + tf.argmax(logits, axis=1)
        return tf.reduce_sum(losses), tf.where(rows == PADDING, tf.constant(-1, tf.int64), cells)


class ReplicaCheck:
    """Compares the training state of all replicas: they must not differ in a single bit.

    With the digests travels whether a process was asked to stop, so that all of them stop after the same epoch.
    """

    def __init__(
        self, *, strategy: Strategy, state: TrainState, wants_to_stop: Callable[[], bool] = lambda: False
    ) -> None:
        self._wants_to_stop = wants_to_stop
        self._strategy = strategy
        self._vectors = [state.weights, *state.slots]
        # Odd, so that multiplication loses nothing: any one changed bit changes the digest.
        size = int(state.weights.shape[0]) * len(self._vectors)
        generator = np.random.Generator(np.random.Philox(key=0))
        self._factors = strategy.replicate(generator.integers(0, 2**31, size, np.int64) * 2 + 1)
        self._compiled = tf.function(self._digests, autograph=False)

    def run(self, epoch: int) -> bool:
        """Return whether any process wants to stop; raise TrainingFailed, naming the replicas, if not all are the same.

        A collective; all processes return the same.
        """
        request = tf.constant(int(self._wants_to_stop()), tf.int64)
        *digests, num_requests = self._compiled(self._factors, request).numpy().tolist()
        common, votes = Counter(digests).most_common(1)[0]
        if votes == len(digests):
            return bool(num_requests)
        if votes == 1:
            which = f"no two of the {len(digests)} replicas have"
        else:
            others = [str(index) for index, digest in enumerate(digests) if digest != common]
            which = f"replica{'s' if len(others) > 1 else ''} {', '.join(others)} of {len(digests)} did not have"
        when = f"after epoch {epoch}" if epoch else "before the first epoch"
        raise TrainingFailed(
            f"{when} {which} the same weights and optimizer state: a device computes or transmits wrongly, "
            "or the processes run different software; the results of earlier epochs are kept"
        )

    def _digests(self, factors: tf.Tensor, request: tf.Tensor) -> tf.Tensor:
        return self._strategy.run(self._digest_replica, factors, request)

    def _digest_replica(self, factors: tf.Tensor, request: tf.Tensor) -> tf.Tensor:
        """All replicas' digests, which are sums of the words times the factors, modulo 2**64; then their requests."""
        bits = tf.bitcast(tf.concat([vector.read_value() for vector in self._vectors], axis=0), tf.int32)
        digest = tf.reduce_sum(tf.cast(bits, tf.int64) * factors)
        index, num_replicas = self._strategy.replica_index(), self._strategy.num_replicas
        own = tf.one_hot(index, num_replicas, digest, tf.constant(0, tf.int64))
        return self._strategy.all_reduce_sum(tf.concat([own, [request]], axis=0))


def gather_rows(data: DeviceArrays, indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Images, labels and weights (1 for an example, 0 for padding) of the rows with these example indices."""
    valid = tf.maximum(indices, 0)  # padding reads example 0 and then weighs nothing
    example_weights = tf.cast(indices != PADDING, tf.float32)
    return tf.gather(data.images, valid), tf.gather(data.labels, valid), example_weights


def _pad(indices: npt.NDArray[np.int32], *, width: int) -> npt.NDArray[np.int32]:
    """Widen the global batches by padding rows."""
    return np.pad(indices, [(0, 0), (0, width - indices.shape[1])], constant_values=PADDING)
