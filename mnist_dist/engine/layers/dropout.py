"""Dropout by batch position: any device drops the same units of its rows as a single device would."""

import math

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mnist_dist.engine.layers.position import current_rows, layer_key, random_words

# Random bits are most of what dropout costs. With 8 of them for each unit, a unit's drop rate is a multiple of 1/256,
# so a layer's units have two neighbouring rates, in such numbers that their mean is right. That would be rough for
# a rate near 0 or 1, which gets 16 bits and one rate for all units, right to 1/65536.
_ROUGH = 1 / 16
_WORD_BITS = 32


Thresholds = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]


class PositionalDropout:
    """Dropout (Srivastava et al. 2014) by batch position, without any state to save; takes the place of a `call`."""

    def __init__(self, rate: float, *, seed: int, index: int) -> None:
        """Make it for layer number `index` of the network's random layers, and the run's `seed`."""
        self._rate = rate
        self._seed = seed
        self._index = index

    def __call__(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Drop units while training: (rows, ...) -> (rows, ...); the static shape must be known."""
        if not training or self._rate == 0:
            return inputs
        num_rows, *sizes = inputs.shape
        masks = keep_masks(
            layer_key(self._seed, self._index),
            current_rows().counter,
            num_rows=num_rows,
            thresholds=drop_thresholds(self._rate, math.prod(sizes)),
            dtype=inputs.dtype,
        )
        return inputs * (masks if len(sizes) == 1 else tf.reshape(masks, inputs.shape))


def drop_thresholds(rate: float, num_units: int) -> Thresholds:
    """Each unit's threshold, (num_units,) uint8 or uint16: a random number below it drops the unit."""
    if not _ROUGH <= rate <= 1 - _ROUGH:
        return np.full(num_units, round(rate * 2**16), np.uint16)
    # Spread evenly: their sum up to each unit is as close as it can be.
    sums = np.round(rate * 2**8 * np.arange(num_units + 1))
    return np.diff(sums).astype(np.uint8)


def keep_masks(
    key: int, counter: tf.Tensor, *, num_rows: int, thresholds: Thresholds, dtype: tf.DType = tf.float32
) -> tf.Tensor:
    """Factors of shape (num_rows, num_units): 0 for a dropped unit, 1 / (1 - its drop rate) for another."""
    num_units, bits = len(thresholds), thresholds.dtype.itemsize * 8
    words = random_words(key, counter, num_rows=num_rows, num_words=-(-num_units * bits // _WORD_BITS))
    random = tf.reshape(tf.bitcast(words, thresholds.dtype), [num_rows, words.shape[1] * _WORD_BITS // bits])
    if random.shape[1] > num_units:
        random = random[:, :num_units]
    # By each unit's actual rate, so that its expectation is exact.
    scales = 2**bits / (2**bits - thresholds.astype(np.float64))
    return tf.where(random >= thresholds, tf.constant(scales, dtype), tf.zeros([], dtype))
