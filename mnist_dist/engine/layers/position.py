"""Random numbers that depend on what is computed, never on which device computes it.

Those of an example are a pure function of (seed, global step, stream, position in the global batch). So any device
draws the same numbers for its rows of a global batch as a single device would.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import tensorflow as tf

PHILOX = 1  # TensorFlow's number for the counter-based generator of Salmon et al. 2011 (SC'11)
_WORDS_PER_TICK = 4  # one tick of its counter gives 128 bits


class BatchPosition(NamedTuple):
    """Which rows of which step are being computed."""

    first_row: tf.Tensor
    """Scalar int64: position in the global batch of the first of these rows."""
    global_step: tf.Tensor
    """Scalar int64: optimizer steps made so far."""


_position: ContextVar[BatchPosition] = ContextVar("first row and step")


@contextmanager
def at_position(position: BatchPosition) -> Iterator[None]:
    """Tell the layers which rows they are called for, while the block is traced."""
    token = _position.set(position)
    try:
        yield
    finally:
        _position.reset(token)


def current_position() -> BatchPosition:
    """The rows that layers are being called for."""
    return _position.get()


def stream_key(seed: int, stream: int) -> int:
    """The key of one of the independent streams of a run: of a layer by its number, from 1; 0 is for the images."""
    return (seed << 32) | stream


def random_words(key: int, position: BatchPosition, *, num_rows: int, num_words: int) -> tf.Tensor:
    """Random bits, (num_rows, at least num_words) uint32, as whole ticks of Philox's counter.

    Row i is that of position `first_row + i`: each row owns a range of ticks of the low half of the counter, and the
    step is the high half.
    """
    ticks = -(-num_words // _WORDS_PER_TICK)
    counter = tf.stack(position) * tf.constant([ticks, 1], tf.int64)
    return tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=[num_rows, ticks * _WORDS_PER_TICK],
        key=tf.constant([key], tf.uint64),
        counter=tf.bitcast(counter, tf.uint64),
        alg=PHILOX,
        dtype=tf.uint32,
    )


def uniform(key: int, position: BatchPosition, *, num_rows: int, num_values: int) -> tf.Tensor:
    """Numbers in [0, 1), (num_rows, num_values) float32, each a multiple of 2**-24."""
    words = random_words(key, position, num_rows=num_rows, num_words=num_values)[:, :num_values]
    return tf.cast(tf.bitwise.right_shift(words, tf.constant(8, tf.uint32)), tf.float32) * 2.0**-24
