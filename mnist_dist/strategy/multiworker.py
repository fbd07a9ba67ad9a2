"""Several processes by TensorFlow alone: `tf.distribute.MultiWorkerMirroredStrategy`."""

import tensorflow as tf

from mnist_dist.rendezvous import wait_for_all
from mnist_dist.strategy.mirrored import DistributeStrategy
from mnist_dist.topology import Topology

_MAX_TEXT_BYTES = 2**16


class MultiWorker(DistributeStrategy):
    """All GPUs of this process (or its CPU) together with those of the other processes."""

    name = "multiworker"

    def __init__(self, *, topology: Topology, start_timeout_s: float) -> None:
        if topology.world_size > 1:
            wait_for_all(rank=topology.rank, addresses=topology.addresses, timeout_s=start_timeout_s)
        cluster = tf.train.ClusterSpec({"worker": list(topology.addresses)} if topology.world_size > 1 else {})
        super().__init__(
            tf.distribute.MultiWorkerMirroredStrategy(
                cluster_resolver=tf.distribute.cluster_resolver.SimpleClusterResolver(
                    cluster, task_type="worker", task_id=topology.rank, rpc_layer="grpc"
                )
            )
        )

    def gather_text(self, text: str) -> list[str]:
        """The texts of all processes, by rank, over TensorFlow's own collective."""
        content = text.encode()
        assert len(content) < _MAX_TEXT_BYTES, len(content)
        # Fixed length, and int32: what the gathering collective takes on every device.
        codes = tf.constant([[*content.ljust(_MAX_TEXT_BYTES, b"\0")]], tf.int32)

        gather = tf.function(lambda: self.run(lambda: tf.distribute.get_replica_context().all_gather(codes, axis=0)))
        rows = gather().numpy()[:: len(self.devices())]  # every local replica has sent the same
        return [bytes(row.tolist()).rstrip(b"\0").decode() for row in rows]
