"""Dropout that depends on what is computed, never on which device computes it.

The mask of an example is a pure function of (seed, global step, layer, position in the global batch). So any device
draws the same masks for its rows of a global batch as a single device would.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

PHILOX = 1  # TensorFlow's number for the counter-based generator of Salmon et al. 2011 (SC'11)
_BITS_PER_TICK = 128  # one tick of its counter gives as many
# Random bits are most of what dropout costs. With 8 of them for each unit, a unit's drop rate is a multiple of 1/256,
# so a layer's units have two neighbouring rates, in such numbers that their mean is right. That would be rough for
# a rate near 0 or 1, which gets 16 bits and one rate for all units, right to 1/65536.
_ROUGH = 1 / 16


class BatchPosition(NamedTuple):
    """Which rows of which step are being computed."""

    first_row: tf.Tensor
    """Scalar int64: position in the global batch of the first of these rows."""
    global_step: tf.Tensor
    """Scalar int64: optimizer steps made so far."""


Thresholds = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

_counter: ContextVar[tf.Tensor] = ContextVar("first row and step")


@contextmanager
def at_position(position: BatchPosition) -> Iterator[None]:
    """Tell the dropout layers which rows they are called for, while the block is traced."""
    token = _counter.set(tf.stack(position))
    try:
        yield
    finally:
        _counter.reset(token)


class PositionalDropout(keras.layers.Layer):  # type: ignore[misc]
    """Dropout (Srivastava et al. 2014) by batch position, without any state to save."""

    def __init__(self, rate: float, *, seed: int, index: int, **kwargs: Any) -> None:
        """Build layer number `index` of the network's dropout layers, for the run's `seed`."""
        super().__init__(**kwargs)
        self._rate = rate
        self._key = (seed << 32) | index

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Choose the units' drop rates."""
        self._thresholds = drop_thresholds(self._rate, math.prod(size for size in input_shape[1:] if size))

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Drop units while training: (rows, ...) -> (rows, ...); the static shape must be known."""
        if not training or self._rate == 0:
            return inputs
        masks = keep_masks(
            self._key, _counter.get(), num_rows=inputs.shape[0], thresholds=self._thresholds, dtype=inputs.dtype
        )
        return inputs * (masks if inputs.shape.rank == 2 else tf.reshape(masks, inputs.shape))


def drop_thresholds(rate: float, num_units: int) -> Thresholds:
    """Each unit's threshold, (num_units,) uint8 or uint16: a random number below it drops the unit."""
    if not _ROUGH <= rate <= 1 - _ROUGH:
        return np.full(num_units, round(rate * 2**16), np.uint16)
    # Spread evenly: their sum up to each unit is as close as it can be.
    sums = np.round(rate * 2**8 * np.arange(num_units + 1))
    return np.diff(sums).astype(np.uint8)


def keep_masks(
    key: int, position: tf.Tensor, *, num_rows: int, thresholds: Thresholds, dtype: tf.DType = tf.float32
) -> tf.Tensor:
    """Factors of shape (num_rows, num_units): 0 for a dropped unit, 1 / (1 - its drop rate) for another.

    `position` is a `BatchPosition` as one tensor. Row i is that of position `first_row + i`: each row owns a range of
    ticks of the low half of Philox's counter, and the step is the high half.
    """
    num_units, bits = len(thresholds), thresholds.dtype.itemsize * 8
    ticks = -(-num_units * bits // _BITS_PER_TICK)
    counter = position * tf.constant([ticks, 1], tf.int64)
    words = tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=[num_rows, ticks * _BITS_PER_TICK // 32],
        key=tf.constant([key], tf.uint64),
        counter=tf.bitcast(counter, tf.uint64),
        alg=PHILOX,
        dtype=tf.uint32,
    )
    random = tf.reshape(tf.bitcast(words, thresholds.dtype), [num_rows, ticks * _BITS_PER_TICK // bits])
    if random.shape[1] > num_units:
        random = random[:, :num_units]
    # By each unit's actual rate, so that its expectation is exact.
    scales = 2**bits / (2**bits - thresholds.astype(np.float64))
    return tf.where(random >= thresholds, tf.constant(scales, dtype), tf.zeros([], dtype))
