"""Batch normalisation with the statistics of each virtual shard, so that the number of devices changes no bit.

Statistics over a part of the batch are ghost batch normalisation (Hoffer et al. 2017, arXiv 1705.08741). Here the part
is a virtual shard and never what a device happens to have, and rows without an example do not count.

What is saved stays a plain `keras.layers.BatchNormalization`: its moving averages, which are used in inference, follow
mean and variance of the whole global batch, once a step. Each shard contributes two sums that travel with its gradients
(`BatchRows.moments`). They are taken around the present moving mean: sums of squares around zero would cancel where the
mean is large, which is the flaw of E[x^2] - E[x]^2.
"""

import math
from typing import Any

import keras
import tensorflow as tf

from mnist_dist.engine.layers.position import current_rows


class ShardNormalization:
    """Normalises by the statistics of each virtual shard; takes the place of a `call`."""

    def __init__(self, layer: keras.layers.BatchNormalization) -> None:
        self._layer = layer
        self._infer = layer.call

    def __call__(self, inputs: tf.Tensor, training: bool = False, mask: Any = None) -> tf.Tensor:
        """(rows, ...) -> (rows, ...); raises ValueError where rows are masked, and at a second call in a step."""
        layer = self._layer
        if not training or not layer.trainable:
            return self._infer(inputs, training=False)
        if mask is not None:
            raise ValueError(f"{layer.name}: its input is masked, and masked rows would count")
        rows, (_, *sizes) = current_rows(), inputs.shape
        # Shape (shards, rows, ...). Sixteen bits are not enough here.
        values = tf.reshape(
            tf.cast(inputs, tf.float64 if inputs.dtype == tf.float64 else tf.float32),
            [rows.num_shards, rows.rows_per_shard, *sizes],
        )
        axis = layer.axis % inputs.shape.rank + 1
        others = [number for number in range(1, values.shape.rank) if number != axis]
        channels = [-1 if number == axis else 1 for number in range(values.shape.rank)]

        def vector(variable: Any) -> tf.Tensor:
            return tf.reshape(tf.cast(variable.value, values.dtype), channels)

        weights = tf.reshape(tf.cast(rows.weights, values.dtype), [*values.shape[:2], *[1 for _ in sizes]])
        num_examples = tf.reduce_sum(weights, axis=1, keepdims=True)
        num_each = math.prod(sizes) // inputs.shape[layer.axis]
        shares = weights / tf.maximum(num_examples * num_each, 1)
        mean = tf.reduce_sum(shares * values, axis=others, keepdims=True)
        centred = values - mean
        variance = tf.reduce_sum(shares * tf.square(centred), axis=others, keepdims=True)
        offset = mean - vector(layer.moving_mean)
        moments = [num_examples * offset, num_examples * (variance + tf.square(offset))]
        rows.add_moments(
            layer.path, [tf.cast(tf.reshape(tf.reduce_sum(one, axis=0), [-1]), tf.float32) for one in moments]
        )
        scale = tf.math.rsqrt(variance + layer.epsilon)
        outputs = centred * (scale * vector(layer.gamma) if layer.scale else scale)
        if layer.center:
            outputs += vector(layer.beta)
        return tf.cast(tf.reshape(outputs, inputs.shape), inputs.dtype)
