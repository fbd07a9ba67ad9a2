"""Dropout that depends on what is computed, never on which device computes it.

The mask of an example is a pure function of (seed, global step, layer, position in the global batch). So any device
draws the same masks for its rows of a global batch as a single device would.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import keras
import tensorflow as tf

PHILOX = 1  # TensorFlow's number for the counter-based generator of Salmon et al. 2011 (SC'11)
_BITS = 16  # random bits per unit: a drop rate is accurate to 1/65536, at half the cost of 32 bits
_UNITS_PER_TICK = 128 // _BITS  # one tick of Philox's counter gives 128 bits


class BatchPosition(NamedTuple):
    """Which rows of which step are being computed."""

    global_step: tf.Tensor
    """Scalar int64: optimizer steps made so far."""
    first_row: tf.Tensor
    """Scalar int64: position in the global batch of the first of these rows."""


_position: ContextVar[BatchPosition] = ContextVar("batch position")


@contextmanager
def at_position(position: BatchPosition) -> Iterator[None]:
    """Tell the dropout layers which rows they are called for, while the block is traced."""
    token = _position.set(position)
    try:
        yield
    finally:
        _position.reset(token)


class PositionalDropout(keras.layers.Layer):  # type: ignore[misc]
    """Dropout (Srivastava et al. 2014) by batch position, without any state to save."""

    def __init__(self, rate: float, *, seed: int, index: int, **kwargs: Any) -> None:
        """Build layer number `index` of the network's dropout layers, for the run's `seed`."""
        super().__init__(**kwargs)
        self._rate = rate
        self._key = (seed << 32) | index

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Drop units while training: (rows, ...) -> (rows, ...); the static shape must be known."""
        if not training or self._rate == 0:
            return inputs
        num_rows, *unit_shape = inputs.shape
        num_units = tf.TensorShape(unit_shape).num_elements()
        random = random_uint16(self._key, _position.get(), num_rows=num_rows, num_units=num_units)
        threshold = round(self._rate * 2**_BITS)
        keep = tf.cast(random >= tf.constant(threshold, tf.uint16), inputs.dtype)
        # Scaled by the actual rate of the threshold, so that the expectation is exact.
        return inputs * tf.reshape(keep * (2**_BITS / (2**_BITS - threshold)), inputs.shape)


def random_uint16(key: int, position: BatchPosition, *, num_rows: int, num_units: int) -> tf.Tensor:
    """Random 16-bit numbers of shape (num_rows, num_units), uint16.

    Row i holds the numbers of position `first_row + i`: each row owns a range of ticks of the low half of Philox's
    counter, and the step is the high half.
    """
    ticks = -(-num_units // _UNITS_PER_TICK)
    counter = tf.stack([position.first_row * ticks, position.global_step])
    words = tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=[num_rows, ticks * 4],
        key=tf.constant([key], tf.uint64),
        counter=tf.cast(counter, tf.uint64),
        alg=PHILOX,
        dtype=tf.uint32,
    )
    halves = tf.reshape(tf.bitcast(words, tf.uint16), [num_rows, ticks * _UNITS_PER_TICK])
    return halves[:, :num_units]
