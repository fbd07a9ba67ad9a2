"""The moving averages of all layers of batch normalisation, updated together, once a step."""

from collections.abc import Mapping, Sequence

import keras
import numpy as np
import tensorflow as tf

from mnist_dist.engine.layers.batch_norm import ShardNormalization


class Averages:
    """Where they are in the vector of a twin's weights that are not trained, and how fast they move."""

    def __init__(self, twin: keras.Model, layers: Sequence[keras.Layer]) -> None:
        normalized = [
            layer for layer in layers if isinstance(layer.call, ShardNormalization) and layer.trainable and layer.built
        ]
        self._paths = [layer.path for layer in normalized]
        sizes = [layer.moving_mean.shape[0] for layer in normalized]
        self.num_moments: int = 2 * sum(sizes)
        self._rates = np.repeat([1 - layer.momentum for layer in normalized], sizes).astype(np.float32)
        starts, end = {}, 0
        for variable in twin.non_trainable_weights:
            starts[id(variable)], end = end, end + int(np.prod(variable.shape))
        variables = [*(layer.moving_mean for layer in normalized), *(layer.moving_variance for layer in normalized)]
        positions = [
            np.arange(size) + starts[id(variable)] for variable, size in zip(variables, sizes * 2, strict=True)
        ]
        self._positions = np.concatenate([np.zeros(0, np.int64), *positions])
        # Of each weight: in the updated averages, or behind them in the vector as it was.
        self._sources = np.arange(end) + self.num_moments
        self._sources[self._positions] = np.arange(self.num_moments)

    def join(self, moments: Mapping[str, Sequence[tf.Tensor]]) -> list[tf.Tensor]:
        """The layers' moments as one vector: first those of all means, then those of all variances."""
        if missing := [path for path in self._paths if path not in moments]:
            raise ValueError(f"{missing[0]} is not called while training, so its averages would stand still")
        return [tf.concat([moments[path][part] for part in (0, 1) for path in self._paths], axis=0)] if moments else []

    def update(self, others: tf.Tensor, moments: tf.Tensor) -> tf.Tensor:
        """The vector of weights that are not trained after a step, from its moments / number of examples.

        Those are the means of x - m and of (x - m)^2, where m is the present moving mean.
        """
        means, variances = tf.split(tf.gather(others, self._positions), 2)
        first, second = tf.split(moments, 2)
        variance = tf.maximum(second - tf.square(first), 0)
        updated = [means + self._rates * first, variances + self._rates * (variance - variances)]
        return tf.gather(tf.concat([*updated, others], axis=0), self._sources)
