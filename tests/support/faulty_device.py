"""A device that computes wrongly, for testing who notices."""

import numpy as np
import tensorflow as tf

from mnist_dist.strategy.base import Strategy


def flip_bit_of_replica(strategy: Strategy, variable: tf.Variable, replica: int, *, element: int = -1) -> None:
    """Change the last bit of one number of a float32 variable, on one replica of the job."""

    def flip() -> tf.Tensor:
        if strategy.replica_index() == replica:
            value = variable.read_value()
            mask = np.zeros(value.shape, np.int32)
            mask[element] = 1
            variable.assign(tf.bitcast(tf.bitwise.bitwise_xor(tf.bitcast(value, tf.int32), mask), tf.float32))
        return tf.zeros([])

    tf.function(strategy.run)(flip)
