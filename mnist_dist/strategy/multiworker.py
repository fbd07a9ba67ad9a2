"""Several processes with TensorFlow alone: `tf.distribute.MultiWorkerMirroredStrategy`."""

import os
import signal
from collections.abc import Sequence

import tensorflow as tf

from mnist_dist.base.errors import EnvironmentProblem
from mnist_dist.launch.gpus import own_share
from mnist_dist.launch.rendezvous import Rendezvous
from mnist_dist.launch.topology import Topology
from mnist_dist.strategy.tf_distribute import DistributeStrategy


class MultiWorker(DistributeStrategy):
    """This process's share of the machine's GPUs (or its CPU), together with those of the other processes."""

    name = "multiworker"

    def __init__(self, rendezvous: Rendezvous) -> None:
        """Start TensorFlow's servers, once all processes have exchanged their addresses."""
        topology = rendezvous.topology
        gpus = tf.config.list_physical_devices("GPU")
        own = [gpus[index] for index in own_share(len(gpus), topology)]
        if gpus:
            tf.config.set_visible_devices(own, "GPU")
        os.environ["TF_GRPC_REUSE_PORT"] = "true"
        with rendezvous.serving_addresses() as addresses:
            resolver = create_resolver(topology, addresses, num_gpus=len(own))
            on_sigterm = signal.getsignal(signal.SIGTERM)
            try:
                strategy = tf.distribute.MultiWorkerMirroredStrategy(cluster_resolver=resolver)
            except tf.errors.OpError as error:
                if "Could not start gRPC server" not in str(error):
                    raise
                raise EnvironmentProblem(
                    f"{addresses[topology.rank]}: TensorFlow's server cannot listen there, on the port of rank "
                    f"{topology.rank}; end the program that does, or choose another port, and start all processes again"
                ) from error
        signal.signal(signal.SIGTERM, on_sigterm)  # TensorFlow has replaced it with its own handler
        super().__init__(strategy)

    def is_lost_touch(self, error: tf.errors.OpError) -> bool:
        """TensorFlow's processes ask each other every few seconds, and give up after 10 s, suspended or not."""
        kinds = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.DeadlineExceededError)
        return isinstance(error, (*kinds, tf.errors.CancelledError))


def create_resolver(
    topology: Topology, addresses: Sequence[str], *, num_gpus: int
) -> tf.distribute.cluster_resolver.ClusterResolver:
    """What TensorFlow needs to know about the job; without the number of GPUs it would train on the CPU."""
    workers = {"worker": list(addresses)} if topology.world_size > 1 else {}
    return tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec(workers),
        task_type="worker",
        task_id=topology.rank,
        num_accelerators={"GPU": num_gpus} if num_gpus else None,
        rpc_layer="grpc",
    )
