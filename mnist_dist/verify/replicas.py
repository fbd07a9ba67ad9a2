"""Results of every replica, which a training does not need: there all replicas have the same."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from mnist_dist.base.array import Array
from mnist_dist.strategy.base import Strategy


class Boxes:
    """A place on every replica where it leaves an array, to be read without a collective."""

    def __init__(self, strategy: Strategy, like: Array) -> None:
        """Make room for arrays of this shape and type; a collective."""
        self._strategy = strategy
        self._variable = strategy.create_variable(np.zeros_like(like))

    def fill(self, value: tf.Tensor) -> tf.Tensor:
        """Inside `Strategy.run`: leave this replica's array."""
        self._variable.assign(value)
        return tf.zeros([])

    def read(self) -> list[Array]:
        """Those of this process's replicas."""
        return self._strategy.copies(self._variable)


def on_each_replica(strategy: Strategy, function: Callable[..., tf.Tensor], *args: Any, like: Array) -> list[Array]:
    """What `function(*args)` returns on each replica of this process; a collective."""
    boxes = Boxes(strategy, like)
    compiled = tf.function(
        lambda *given: strategy.run(lambda *own: boxes.fill(function(*own)), *given), autograph=False
    )
    compiled(*args)
    return boxes.read()


def join_sums(sums: Sequence[tf.Tensor]) -> tf.Tensor:
    """The sums of a shard as one vector."""
    return tf.concat([tf.reshape(tensor, [-1]) for tensor in sums], axis=0)
