"""One evaluation pass over a split as one compiled call."""

import math

import numpy as np
import tensorflow as tf

from mnist_dist.engine.batches import BatchPlan
from mnist_dist.engine.flat_model import FlatModel
from mnist_dist.engine.loss import cross_entropy
from mnist_dist.engine.programs.placement import DeviceArrays, PlacedSplit, Rows, gather, rows_of
from mnist_dist.results.sums import EvaluationSums
from mnist_dist.strategy.base import Strategy


class EvaluateProgram:
    """Loss and confusion matrix of one split as one call, bit-identical on any number of replicas.

    The split is cut into chunks of the same shape, and each replica evaluates whole chunks. Counts are whole numbers,
    whose sum does not depend on the order; nor does that of the chunks' losses by `math.fsum`, which rounds only once.
    """

    def __init__(self, flat_model: FlatModel, *, strategy: Strategy, split: PlacedSplit, xla: bool = False) -> None:
        """Build it; `xla` compiles it as one program of XLA."""
        self._flat_model = flat_model
        self._strategy = strategy
        self._num_classes = split.num_classes
        self._arrays = split.arrays
        plan = BatchPlan.for_evaluation(split.num_examples)
        # Every replica evaluates the same number of chunks; some may be all padding.
        self._rows = rows_of(plan.in_order(multiple_of=strategy.num_replicas))
        self._compiled = tf.function(self._evaluate, autograph=False, jit_compile=True if xla else None)

    def run(self, weights: tf.Variable) -> EvaluationSums:
        """Evaluate the weights on every example once; no dropout."""
        losses, counts = self._compiled(weights, Rows(*map(tf.constant, self._rows)))
        confusion = np.rint(counts.numpy()).astype(np.int64).reshape(self._num_classes, self._num_classes)
        return EvaluationSums(math.fsum(losses.numpy().tolist()), confusion)

    def _evaluate(self, weights: tf.Variable, chunks: Rows) -> tuple[tf.Tensor, tf.Tensor]:
        losses, counts = self._strategy.run(self._evaluate_replica, weights, self._arrays, chunks)
        return losses, counts

    def _evaluate_replica(self, weights: tf.Variable, data: DeviceArrays, chunks: Rows) -> tuple[tf.Tensor, tf.Tensor]:
        """One replica's chunks, then one reduction; `chunks` are those of all replicas, (chunks, rows)."""
        layers = self._flat_model.split(weights.read_value())
        num_all = chunks.examples.shape[0]
        num_chunks = num_all // self._strategy.num_replicas
        first = self._strategy.replica_index() * num_chunks
        # The iterations are independent, so TensorFlow runs several in parallel.
        losses, cells = tf.map_fn(
            lambda rows: self._evaluate_rows(layers, data, rows),
            Rows(*(part[first : first + num_chunks] for part in chunks)),
            fn_output_signature=(tf.float32, tf.int64),
        )
        # In float64, which is exact for counts up to 2**53; once for all chunks, since there may be many classes.
        counts = tf.math.unsorted_segment_sum(tf.ones_like(cells, tf.float64), cells, self._num_classes**2)
        losses = tf.pad(tf.cast(losses, tf.float64), [[first, num_all - first - num_chunks]])
        bucket = self._strategy.all_reduce_sum(tf.concat([losses, counts], axis=0))
        return bucket[:num_all], bucket[num_all:]

    def _evaluate_rows(self, layers: list[tf.Tensor], data: DeviceArrays, rows: Rows) -> tuple[tf.Tensor, tf.Tensor]:
        """The sum of losses, and each row's cell in the flat confusion matrix; -1 is none."""
        images, labels = gather(data, rows.examples)
        logits = self._flat_model.logits(layers, images)
        losses, _ = cross_entropy(logits, labels, fused=not self._strategy.on_gpu)
        cells = labels * self._num_classes + tf.argmax(logits, axis=1)
        return tf.reduce_sum(losses * rows.weights), tf.where(rows.weights > 0, cells, tf.constant(-1, tf.int64))
