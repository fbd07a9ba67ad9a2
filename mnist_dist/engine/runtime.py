"""TensorFlow's settings for this process, made before its devices start."""

import os

import tensorflow as tf

from mnist_dist.config.devices import ThreadsConfig
from mnist_dist.launch.topology import Topology


def configure_tensorflow(threads: ThreadsConfig, topology: Topology, *, num_shards: int, exact: bool) -> None:
    """Make all settings.

    Args:
        threads: the configured numbers of threads.
        topology: for this process's share of the cores.
        num_shards: shards that this process computes in parallel.
        exact: whether the bits must not depend on threads and cores, nor vary from run to run on GPUs.
    """
    num_cores = own_cores(topology)
    intra_op, inter_op = choose_threads(threads, num_cores=num_cores, num_shards=num_shards, exact=exact)
    tf.config.threading.set_intra_op_parallelism_threads(intra_op)
    tf.config.threading.set_inter_op_parallelism_threads(inter_op)
    # This stage of the graph optimizer reorders chains of additions, differently in every graph.
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False})
    # By default TensorFlow multiplies float32 numbers with 10-bit mantissas on newer GPUs (TF32).
    tf.config.experimental.enable_tensor_float_32_execution(False)
    if exact and tf.config.list_physical_devices("GPU"):
        tf.config.experimental.enable_op_determinism()


def choose_threads(config: ThreadsConfig, *, num_cores: int, num_shards: int, exact: bool) -> tuple[int, int]:
    """Threads within an operation, and operations in parallel.

    Shards in parallel beat threads within an operation, which must wait for each other at the end of every small
    operation; so only cores that are left over work within one. But kernels that sum over the rows (the gradients of
    biases and convolutions, and in bfloat16 of dense layers) cut them into as many pieces as there are threads, so
    their last bits depend on that number: `exact` always has one thread (docs/threads.md has the measurements).
    """
    inter_op = num_cores if config.inter_op == "auto" else int(config.inter_op)
    if exact:
        return 1, inter_op
    intra_op = max(1, num_cores // num_shards) if config.intra_op == "auto" else int(config.intra_op)
    return intra_op, inter_op


def own_cores(topology: Topology) -> int:
    """Cores of this process: those the launcher gave it, or an equal share of those it may use on this machine."""
    if topology.cpus_per_task is not None:
        return topology.cpus_per_task
    return max(1, len(os.sched_getaffinity(0)) // topology.local_size)
