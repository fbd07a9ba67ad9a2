"""Checksums of numbers where they are, on a device: any single changed bit changes them."""

import numpy as np
import numpy.typing as npt
import tensorflow as tf


def odd_factors(number: int) -> npt.NDArray[np.int64]:
    """Fixed random factors for `checksum`; odd, so that multiplication modulo 2**64 loses nothing."""
    generator = np.random.Generator(np.random.Philox(key=0))
    return generator.integers(0, 2**31, number, np.int64) * 2 + 1


def checksum(numbers: tf.Tensor, factors: tf.Tensor) -> tf.Tensor:
    """Sums over the last axis of 32-bit numbers' bits times factors, modulo 2**64: int64."""
    return tf.reduce_sum(tf.cast(tf.bitcast(numbers, tf.int32), tf.int64) * factors, axis=-1)
