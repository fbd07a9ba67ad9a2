"""Placement and collectives with `tf.distribute`, for one process or several.

Every replica owns its copy of the state and updates it by itself, from the same reduced gradient; so only the gradient
is synchronised.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from mnist_dist.base.array import Array
from mnist_dist.strategy.base import Strategy


class DistributeStrategy(Strategy):
    """What the strategies of `tf.distribute` have in common."""

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        self._strategy = strategy
        self.num_replicas = strategy.num_replicas_in_sync

    def devices(self) -> list[str]:
        """This process's devices."""
        return list(self._strategy.extended.worker_devices)

    def create_variable(self, value: Array) -> tf.Variable:
        """A copy on every replica, with the first process's value."""
        with self._strategy.scope():
            # ON_READ: each replica may assign to its own copy, without communication.
            return tf.Variable(
                value,
                trainable=False,
                synchronization=tf.VariableSynchronization.ON_READ,
                aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
            )

    def copies(self, variable: tf.Variable) -> list[Array]:
        """One for each local device."""
        return [np.asarray(copy.numpy()) for copy in self._strategy.experimental_local_results(variable)]

    def replicate(self, array: Array) -> Any:
        """A copy in each local device's memory."""
        devices = self.devices()

        def copy_to(context: tf.distribute.ReplicaContext) -> tf.Tensor:
            # TensorFlow would put all copies on the first device.
            with tf.device(devices[context.replica_id_in_sync_group % len(devices)]):
                return tf.identity(array)

        return self._strategy.experimental_distribute_values_from_function(copy_to)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function` on every replica of the job."""
        results = self._strategy.run(function, args=args)
        return tf.nest.map_structure(lambda value: self._strategy.experimental_local_results(value)[0], results)

    def replica_index(self) -> int:
        """This replica's number in the job; TensorFlow traces each replica separately, so it is a constant."""
        return int(tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group))

    def all_reduce_sum(self, bucket: tf.Tensor) -> tf.Tensor:
        """TensorFlow's all-reduce: NCCL between GPUs."""
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, bucket)

    def all_gather(self, rows: tf.Tensor) -> tf.Tensor:
        """TensorFlow's all-gather."""
        gathered = tf.distribute.get_replica_context().all_gather(rows, axis=0)
        return tf.ensure_shape(gathered, [self.num_replicas * rows.shape[0], *rows.shape[1:]])
