"""Several processes, one replica each, by Horovod's plain collectives.

`horovod.tensorflow.keras` must not be used: under Keras 3 its optimizer silently does not reduce.
"""

import os
from typing import Any

import tensorflow as tf

from mnist_dist.errors import UserError
from mnist_dist.gpus import own_share
from mnist_dist.strategy.base import Array, SingleDevice
from mnist_dist.topology import Topology

# Horovod's own settings, measured for one message a step between 2 CPU ranks: without its cache of agreed names, which
# is made for hundreds of messages, an all-reduce of 1.08 MB takes 1.6 ms in place of 4. What the user has set, stays.
_SETTINGS = {"HOROVOD_CACHE_CAPACITY": "0", "HOROVOD_CYCLE_TIME": "0.5"}
_HOW_TO_INSTALL = "install it with: make horovod"


def load_horovod() -> Any:
    """The module `horovod.tensorflow`; raises UserError with the way out where it is missing or does not fit."""
    try:
        import horovod.tensorflow as hvd
    except ModuleNotFoundError as error:
        raise UserError(f"strategy=horovod: Horovod is not installed; {_HOW_TO_INSTALL}") from error
    except (ImportError, tf.errors.NotFoundError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"strategy=horovod: Horovod was not built for the installed TensorFlow {tf.__version__} ({reason}); "
            f"build it again: make horovod"
        ) from error
    return hvd


class Horovod(SingleDevice):
    """This process's one device, together with those of the other processes."""

    name = "horovod"

    def __init__(self, *, topology: Topology) -> None:
        self._hvd = load_horovod()
        gpus = tf.config.list_physical_devices("GPU")
        if gpus:
            tf.config.set_visible_devices(gpus[own_share(len(gpus), topology)[0]], "GPU")
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        self._hvd.init()
        super().__init__()
        self.num_replicas = self._hvd.size()

    def create_variable(self, value: Array) -> tf.Variable:
        """A plain variable with rank 0's value."""
        return super().create_variable(self._hvd.broadcast(tf.convert_to_tensor(value), root_rank=0))

    def replica_index(self) -> int:
        """This process's rank."""
        return int(self._hvd.rank())

    def all_reduce_sum(self, bucket: tf.Tensor) -> tf.Tensor:
        """Horovod's all-reduce: NCCL where it is built in, otherwise Gloo."""
        return self._hvd.allreduce(bucket, op=self._hvd.Sum, name=_name("sum", bucket))

    def all_gather(self, rows: tf.Tensor) -> tf.Tensor:
        """Horovod's all-gather."""
        gathered = self._hvd.allgather(rows, name=_name("gather", rows))
        return tf.ensure_shape(gathered, [self.num_replicas * rows.shape[0], *rows.shape[1:]])


def _name(operation: str, tensor: tf.Tensor) -> str:
    """A name for each shape: Horovod remembers what it has agreed on under a name, and starts afresh if it changes."""
    return ".".join([operation, tensor.dtype.name, *map(str, tensor.shape)])
