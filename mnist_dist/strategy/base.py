"""The one interface to replicas and collectives, and its implementation for a single device.

A compiled program is written once: `run` calls a function on every replica; inside it `replica_index` tells a replica
which rows are its own, and `all_reduce_sum` sums the replicas' results. Nothing outside this package depends on which
strategy it is.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from mnist_dist.base.array import Array
from mnist_dist.base.errors import LostTouch


class Strategy(ABC):
    """Placement and collectives of one job."""

    name: str
    num_replicas: int
    """Model copies of the whole job."""
    has_all_to_all = False
    """Whether `all_to_all` moves less than `all_gather`."""
    has_xla_collectives = False
    """Whether XLA can compile a program with its collectives."""

    @abstractmethod
    def devices(self) -> list[str]:
        """Names of this process's devices, one for each of its replicas."""

    @property
    def on_gpu(self) -> bool:
        """Whether its devices are GPUs."""
        return bool(tf.config.get_visible_devices("GPU"))

    def compute_capability(self) -> tuple[int, int] | None:
        """The compute capability of the GPUs, as NVIDIA numbers it; None on a CPU."""
        gpus = tf.config.get_visible_devices("GPU")
        return tf.config.experimental.get_device_details(gpus[0]).get("compute_capability") if gpus else None

    @abstractmethod
    def create_variable(self, value: Array) -> tf.Variable:
        """A variable with rank 0's value and a copy on every replica, which each reads and updates by itself."""

    def read(self, variable: tf.Variable) -> Array:
        """The value of this process's first copy."""
        return self.copies(variable)[0]

    @abstractmethod
    def replicate(self, array: Array) -> Any:
        """The array as a constant on every replica, as an argument for `run`."""

    @abstractmethod
    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function(*args)` on every replica and return what the first one of this process returns.

        For use in a compiled program. Arguments from `replicate` arrive as the replica's own copy.
        """

    @abstractmethod
    def copies(self, variable: tf.Variable) -> list[Array]:
        """The values of this process's copies, in the order of its replicas."""

    @abstractmethod
    def replica_index(self) -> int:
        """Inside `run`: this replica's number among all of the job; a constant when a program is traced."""

    @abstractmethod
    def all_reduce_sum(self, bucket: tf.Tensor) -> tf.Tensor:
        """Inside `run`, outside loops: the sum of the replicas' tensors, in any order, on each of them."""

    @abstractmethod
    def all_gather(self, rows: tf.Tensor) -> tf.Tensor:
        """Inside `run`, outside loops: the replicas' tensors, of equal shape, joined along the first axis in order."""

    def all_to_all(self, rows: tf.Tensor) -> tf.Tensor:
        """Inside `run`, outside loops: of N equal blocks of rows, block j goes to replica j; those received, in order.

        For a backend without such a collective (`has_all_to_all`): every replica gets all blocks, and takes its own.
        """
        num_replicas = self.num_replicas
        blocks = tf.reshape(self.all_gather(rows), [num_replicas, num_replicas, -1, *rows.shape[1:]])
        return tf.reshape(blocks[:, self.replica_index()], rows.shape)

    @contextlib.contextmanager
    def collectives(self) -> Iterator[None]:
        """A block with collectives: raises LostTouch if one fails because processes cannot reach each other."""
        try:
            yield
        except tf.errors.OpError as error:
            if not self.is_lost_touch(error):
                raise
            raise LostTouch(
                f"the processes of this job cannot reach each other any more ({type(error).__name__} in a collective); "
                "what was saved is kept, and the same command resumes from there"
            ) from error

    def is_lost_touch(self, error: tf.errors.OpError) -> bool:
        """Whether this error of the backend means that it cannot reach a process."""
        return False

    def subsets(self) -> "list[Strategy]":
        """Fewer of its replicas, as strategies of their own: one of this process, up to all; for measurements."""
        one = SingleDevice(self.devices()[0])
        return [one] if self.num_replicas == 1 else [one, self]

    def barrier(self) -> None:
        """Wait until every process has arrived here, so that none leaves while others still need it."""

        def meet() -> tf.Tensor:
            return self.all_reduce_sum(tf.zeros([1]))

        tf.function(self.run, autograph=False)(meet)


class SingleDevice(Strategy):
    """One process, one replica: the first GPU, or the CPU, or the given device."""

    name = "single"
    num_replicas = 1
    has_xla_collectives = True  # it has none

    def __init__(self, device: str | None = None) -> None:
        gpus = tf.config.list_logical_devices("GPU")
        self._device = device or (gpus or tf.config.list_logical_devices("CPU"))[0].name

    def devices(self) -> list[str]:
        """The one device."""
        return [self._device]

    def create_variable(self, value: Array) -> tf.Variable:
        """A plain variable."""
        with tf.device(self._device):
            return tf.Variable(value)

    def copies(self, variable: tf.Variable) -> list[Array]:
        """Its value."""
        return [np.asarray(variable.numpy())]

    def replicate(self, array: Array) -> tf.Tensor:
        """A plain tensor."""
        with tf.device(self._device):
            return tf.convert_to_tensor(array)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """A plain call."""
        with tf.device(self._device):
            return function(*args)

    def replica_index(self) -> int:
        """Always 0."""
        return 0

    def all_reduce_sum(self, bucket: tf.Tensor) -> tf.Tensor:
        """The tensor itself."""
        return bucket

    def all_gather(self, rows: tf.Tensor) -> tf.Tensor:
        """The tensor itself."""
        return rows
