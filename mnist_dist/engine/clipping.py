"""Shortening a gradient that is too long."""

import tensorflow as tf

_BLOCK = 1024


def clip(gradient: tf.Tensor, limit: float) -> tf.Tensor:
    """The vector `gradient`, shortened to the L2 norm `limit` if it is longer; what is not finite stays so."""
    # In units of the largest number, as the square of a finite one may be infinite or 0.
    largest = tf.reduce_max(tf.abs(gradient))
    norm, most = tf.sqrt(_sum(tf.square(gradient / largest))), limit / largest
    # Both are NaN for a gradient of zeros, and for one that is not finite: NaN is not greater than anything.
    return gradient * tf.where(norm > most, most / norm, 1.0)


def _sum(numbers: tf.Tensor) -> tf.Tensor:
    """Their sum, in an order that does not depend on the number of threads, which replicas may have different ones of.

    TensorFlow cuts a long vector into a part for each thread, but a row or a short vector is one thread's.
    """
    while (size := numbers.shape[0]) > _BLOCK:
        rows = tf.reshape(tf.pad(numbers, [[0, -size % _BLOCK]]), [-1, _BLOCK])
        numbers = tf.reduce_sum(rows, axis=1)
    return tf.reduce_sum(numbers)
