"""How the training is computed, where the configuration leaves it open."""

from mnist_dist.base.console import job_log
from mnist_dist.config.model import KerasConfig
from mnist_dist.config.train import TrainConfig
from mnist_dist.launch.topology import Topology


def choose_mode(config: TrainConfig, topology: Topology, *, num_gpus: int) -> str:
    """Exact or fast, chosen before the devices start; a warning says which configured value will have no effect.

    `auto` is exact on CPUs, where it costs little, and fast on GPUs, where one large product beats several small ones.
    """
    mode, num_shards = config.reproducibility, config.batch.num_shards
    if mode == "auto":
        # On CPUs a process has one replica, or as many as requested.
        num_replicas = max(topology.world_size, config.strategy.num_replicas or 1)
        mode = "fast" if num_gpus or num_replicas > num_shards else "exact"
        if mode == "fast" and not num_gpus:
            job_log.warning(
                "WARNING: batch.num_shards=%d: fewer shards than the %d replicas, so reproducibility=auto is fast and "
                "the number of replicas may change the last bits; batch.num_shards=%d makes it exact",
                num_shards,
                num_replicas,
                num_replicas,
            )
    if mode == "exact" and config.threads.intra_op != "auto" and int(config.threads.intra_op) != 1:
        job_log.warning(
            "WARNING: threads.intra_op=%s is ignored: reproducibility=exact runs each operation on one thread, so "
            "that the bits do not depend on the number; a larger batch.num_shards, more processes or "
            "reproducibility=fast use more cores",
            config.threads.intra_op,
        )
    return mode


def choose_compiler(config: TrainConfig, *, mode: str, on_gpu: bool, is_single: bool) -> str:
    """The compiler: none or xla.

    `auto` is xla where that makes a program of a whole epoch (`Engine.compiled_by_xla`) on a GPU, which then no longer
    waits for the host between operations. On CPUs XLA is slower, and for single shards it gains little
    (docs/performance.md). Nor is there a compiler for every layer of Keras, so not for networks of the user's own.
    """
    if config.compile == "auto":
        is_own = isinstance(config.model, KerasConfig)
        return "xla" if mode == "fast" and on_gpu and is_single and not is_own else "none"
    return config.compile
