"""One process, several replicas: `tf.distribute.MirroredStrategy`."""

import logging

import tensorflow as tf

from mnist_dist.base.errors import UserError
from mnist_dist.strategy.base import Strategy
from mnist_dist.strategy.tf_distribute import DistributeStrategy

log = logging.getLogger(__name__)


class Mirrored(DistributeStrategy):
    """All GPUs of this machine, or the first `num_replicas`; without GPUs that many logical CPUs."""

    name = "mirrored"

    def __init__(self, *, num_replicas: int | None) -> None:
        gpus = tf.config.list_physical_devices("GPU")
        wanted = num_replicas or len(gpus) or 1
        if gpus and wanted > len(gpus):
            raise UserError(
                f"strategy.num_replicas={wanted}: this machine has {len(gpus)} GPU(s); ask for at most that many"
            )
        if gpus:
            devices, reduction = [f"GPU:{index}" for index in range(wanted)], tf.distribute.NcclAllReduce()
        else:
            devices, reduction = [f"CPU:{index}" for index in range(wanted)], tf.distribute.ReductionToOneDevice()
            cpu = tf.config.list_physical_devices("CPU")[0]
            if len(tf.config.get_logical_device_configuration(cpu) or [cpu]) < wanted:
                tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * wanted)
            if num_replicas is None:
                log.info("No GPU: training on 1 logical CPU; strategy.num_replicas=N uses N")
        super().__init__(tf.distribute.MirroredStrategy(devices, cross_device_ops=reduction))

    def subsets(self) -> list[Strategy]:
        """One replica, two, ..., all of them."""
        fewer = [Mirrored(num_replicas=number) for number in range(2, self.num_replicas)]
        one, *all_of_them = super().subsets()
        return [one, *fewer, *all_of_them]
