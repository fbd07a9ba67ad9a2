"""The floor: the recipe's matrix products and nothing else, in TensorFlow with its default threads.

A training step is eight products of a whole batch: three forward, three for the gradients of the weights, two for
those of the hidden layers. The validation is three products over all its rows. They are independent here, so TensorFlow
may compute them in parallel: no training of this network can be faster with the same products.
"""

import itertools
import time

import keras
import numpy as np
import tensorflow as tf

from mnist_dist.benchmark.contenders.keras_fit import BATCH_SIZE, describe_tensorflow
from mnist_dist.benchmark.protocol import Turns
from mnist_dist.data.splits import Splits

HIDDEN = (256, 256)


class Products:
    """The products of one epoch as one compiled call."""

    def __init__(self, splits: Splits, *, precision: str) -> None:
        self._dtype = tf.as_dtype(keras.DTypePolicy(precision).compute_dtype)
        sizes = [splits.train.images.shape[1], *HIDDEN, splits.num_classes]
        self._num_steps = -(-len(splits.train) // BATCH_SIZE)
        generator = np.random.default_rng(0)

        def random(*shape: int) -> tf.Variable:
            return tf.Variable(tf.cast(generator.standard_normal(shape).astype(np.float32), self._dtype))

        # Variables, since TensorFlow would multiply constants once and for all.
        self._weights = [random(m, n) for m, n in itertools.pairwise(sizes)]
        self._inputs = [random(BATCH_SIZE, n) for n in sizes[:-1]]
        self._errors = [random(BATCH_SIZE, n) for n in sizes[1:]]
        self._val_inputs = [random(len(splits.val), n) for n in sizes[:-1]]
        self.run = tf.function(self._epoch)

    def _epoch(self) -> tf.Tensor:
        # TensorFlow would skip a product whose result is not used, and compute one that never changes only once.
        used = tf.zeros([], self._dtype)
        for step in tf.range(self._num_steps):
            outputs = [tf.matmul(x, w) for x, w in zip(self._inputs, self._weights, strict=True)]
            outputs += [tf.matmul(x, e, transpose_a=True) for x, e in zip(self._inputs, self._errors, strict=True)]
            outputs += [
                tf.matmul(e, w, transpose_b=True) for e, w in zip(self._errors[1:], self._weights[1:], strict=True)
            ]
            used += tf.add_n([output[0, 0] for output in outputs]) * tf.cast(step, self._dtype)
        outputs = [tf.matmul(x, w) for x, w in zip(self._val_inputs, self._weights, strict=True)]
        return used + tf.add_n([output[0, 0] for output in outputs])


def take_part(turns: Turns, splits: Splits, *, precision: str) -> None:
    """Multiply until the benchmark has enough."""
    products = Products(splits, precision=precision)
    turns.ready({**describe_tensorflow(), "precision": precision})
    while True:
        turns.wait()
        start = time.perf_counter()
        products.run().numpy()
        turns.done(seconds=time.perf_counter() - start)
