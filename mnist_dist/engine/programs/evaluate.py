"""One evaluation pass over a split as one compiled call."""

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from mnist_dist.engine.batches import BatchPlan
from mnist_dist.engine.flat_model import FlatModel, Weights
from mnist_dist.engine.loss import cross_entropy
from mnist_dist.engine.programs.placement import DeviceArrays, PlacedSplit, Rows, gather, rows_of
from mnist_dist.results.predictions import Answers
from mnist_dist.results.sums import EvaluationSums
from mnist_dist.strategy.base import Strategy


class EvaluateProgram:
    """Loss and confusion matrix of one split as one call, bit-identical on any number of replicas.

    The split is cut into chunks of the same shape, and each replica evaluates whole chunks. Counts are whole numbers,
    whose sum does not depend on the order; nor does that of the chunks' losses by `math.fsum`, which rounds only once.
    """

    def __init__(
        self,
        flat_model: FlatModel,
        *,
        strategy: Strategy,
        split: PlacedSplit,
        xla: bool = False,
        wants_answers: bool = False,
    ) -> None:
        """Build it; `xla` compiles it as one program of XLA, `wants_answers` is for `run_with_answers`."""
        self._flat_model = flat_model
        self._strategy = strategy
        self._wants_answers = wants_answers
        self._num_classes = split.num_classes
        self._arrays = split.arrays
        plan = BatchPlan.for_evaluation(split.num_examples)
        # Every replica evaluates the same number of chunks; some may be all padding.
        self._rows = rows_of(plan.in_order(multiple_of=strategy.num_replicas))
        self._compiled = tf.function(self._evaluate, autograph=False, jit_compile=True if xla else None)

    def run(self, model: Sequence[tf.Variable]) -> EvaluationSums:
        """Evaluate the model with these vectors (`TrainState.model`) on every example once; no dropout."""
        return self._sums(*self._call(model)[:2])

    def run_with_answers(self, model: Sequence[tf.Variable]) -> tuple[EvaluationSums, Answers]:
        """The same, and what the model says to each example."""
        losses, counts, cells, probabilities = self._call(model)
        is_example = self._rows.weights.reshape(-1) > 0
        predicted = cells.numpy()[is_example].astype(np.int64) % self._num_classes
        return self._sums(losses, counts), Answers(predicted, probabilities.numpy()[is_example].astype(np.float32))

    def _call(self, model: Sequence[tf.Variable]) -> list[tf.Tensor]:
        outputs: list[tf.Tensor] = self._compiled(list(model), Rows(*map(tf.constant, self._rows)))
        return outputs

    def _sums(self, losses: tf.Tensor, counts: tf.Tensor) -> EvaluationSums:
        confusion = np.rint(counts.numpy()).astype(np.int64).reshape(self._num_classes, self._num_classes)
        return EvaluationSums(math.fsum(losses.numpy().tolist()), confusion)

    def _evaluate(self, model: list[tf.Variable], chunks: Rows) -> list[tf.Tensor]:
        outputs: list[tf.Tensor] = self._strategy.run(self._evaluate_replica, model, self._arrays, chunks)
        return outputs

    def _evaluate_replica(self, model: list[tf.Variable], data: DeviceArrays, chunks: Rows) -> list[tf.Tensor]:
        """One replica's chunks, then one reduction; `chunks` are those of all replicas, (chunks, rows).

        Returns the chunks' losses and the counts; if they are wanted, also each row's cell and probability.
        """
        weights = self._flat_model.split(*(vector.read_value() for vector in model))
        num_all = chunks.examples.shape[0]
        num_chunks = num_all // self._strategy.num_replicas
        first = self._strategy.replica_index() * num_chunks
        # The iterations are independent, so TensorFlow runs several in parallel.
        losses, cells, *probabilities = tf.map_fn(
            lambda rows: self._evaluate_rows(weights, data, rows),
            Rows(*(part[first : first + num_chunks] for part in chunks)),
            fn_output_signature=(tf.float32, tf.int64, *([tf.float32] if self._wants_answers else [])),
        )
        # In float64, which is exact for counts up to 2**53; once for all chunks, since there may be many classes.
        counts = tf.math.unsorted_segment_sum(tf.ones_like(cells, tf.float64), cells, self._num_classes**2)
        # Each replica's own chunks, with zeros for those of the others.
        others = [first, num_all - first - num_chunks]
        losses = tf.pad(tf.cast(losses, tf.float64), [others])
        answers = [cells, *probabilities] if self._wants_answers else []
        rows = [tf.reshape(tf.pad(tf.cast(part, tf.float64), [others, [0, 0]]), [-1]) for part in answers]
        bucket = self._strategy.all_reduce_sum(tf.concat([losses, counts, *rows], axis=0))
        sizes = [num_all, self._num_classes**2, *(math.prod(chunks.examples.shape) for _ in rows)]
        parts: list[tf.Tensor] = tf.split(bucket, sizes)
        return parts

    def _evaluate_rows(self, weights: Weights, data: DeviceArrays, rows: Rows) -> tuple[tf.Tensor, ...]:
        """The sum of losses, each row's cell in the flat confusion matrix (-1 is none), and its probability."""
        images, labels = gather(data, rows.examples)
        logits = self._flat_model.logits(weights, images)
        losses, _ = cross_entropy(logits, labels, fused=not self._strategy.on_gpu)
        cells = labels * self._num_classes + tf.argmax(logits, axis=1)
        probabilities = [tf.reduce_max(tf.nn.softmax(logits), axis=1)] if self._wants_answers else []
        cells = tf.where(rows.weights > 0, cells, tf.constant(-1, tf.int64))
        return tf.reduce_sum(losses * rows.weights), cells, *probabilities
