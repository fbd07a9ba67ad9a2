"""Which strategy to use: as configured, or by how the processes were launched."""

import importlib.util
import logging

import tensorflow as tf

from mnist_dist.base.errors import UserError
from mnist_dist.config.devices import StrategyConfig
from mnist_dist.launch.rendezvous import Rendezvous
from mnist_dist.launch.topology import HorovodRun, Step, TFConfig, Topology
from mnist_dist.strategy.base import SingleDevice, Strategy

log = logging.getLogger(__name__)


def list_gpus() -> list[tf.config.PhysicalDevice]:
    """The GPUs that TensorFlow can use."""
    return list(tf.config.list_physical_devices("GPU"))


def create_strategy(config: StrategyConfig, rendezvous: Rendezvous, *, num_gpus: int) -> Strategy:
    """The configured strategy, ready for use.

    Raises:
        UserError: it does not match the launched processes or the devices, or something it needs is missing.
    """
    topology = rendezvous.topology
    has_horovod = importlib.util.find_spec("horovod") is not None
    name, reason = choose_strategy(config.name, topology, num_gpus=num_gpus, has_horovod=has_horovod)
    if config.num_replicas is not None and name != "mirrored":
        raise UserError(
            f"strategy.num_replicas={config.num_replicas}: is for strategy=mirrored; with strategy={name} the number "
            "of replicas follows from the processes and devices"
        )
    log.info("Strategy: %s (%s)", name, reason)
    # Each backend is imported only when it is chosen.
    if name == "mirrored":
        from mnist_dist.strategy.mirrored import Mirrored

        return Mirrored(num_replicas=config.num_replicas)
    if name == "multiworker":
        from mnist_dist.strategy.multiworker import MultiWorker

        return MultiWorker(rendezvous)
    if name == "horovod":
        from mnist_dist.strategy.horovod import Horovod

        return Horovod(rendezvous)
    return SingleDevice()


def choose_strategy(name: str, topology: Topology, *, num_gpus: int, has_horovod: bool) -> tuple[str, str]:
    """The strategy's name and why it was chosen.

    Raises:
        UserError: the configured strategy cannot serve the launched processes.
    """
    several = topology.world_size > 1
    if name == "auto":
        return _choose_automatically(topology, num_gpus=num_gpus, has_horovod=has_horovod)
    if several and name in ("single", "mirrored"):
        raise UserError(
            f"strategy={name}: is for one process, but {topology.launcher.name} started {topology.world_size}; "
            "give strategy=horovod or strategy=multiworker, or start one process"
            + (" (slurm/train.sh does: #SBATCH --nodes=1)" if topology.slurm else "")
        )
    if several and name == "multiworker" and isinstance(topology.launcher, HorovodRun):
        raise UserError(
            "strategy=multiworker: horovodrun started the processes, and does not tell their addresses; "
            "give strategy=horovod, or start them with python -m mnist_dist.launch or TF_CONFIG"
        )
    if several and name == "horovod" and isinstance(topology.launcher, TFConfig):
        raise UserError(
            "strategy=horovod: the processes were started with TF_CONFIG; start them with python -m "
            "mnist_dist.launch, horovodrun or srun, or give strategy=multiworker"
        )
    return name, "as configured"


def needs_horovod(name: str) -> bool:
    """Whether a chosen strategy needs Horovod."""
    return name == "horovod"


def _choose_automatically(topology: Topology, *, num_gpus: int, has_horovod: bool) -> tuple[str, str]:
    if isinstance(topology.launcher, HorovodRun):
        return "horovod", "HOROVOD_RANK is set"
    if topology.world_size > 1:
        started = f"{topology.world_size} processes were started by {topology.launcher.name}"
        if isinstance(topology.launcher, Step):  # Horovod can start among its tasks too
            if has_horovod:
                return "horovod", f"{started}, and Horovod is installed"
            return "multiworker", f"{started}, and Horovod is not installed"
        return "multiworker", started
    if num_gpus >= 2:
        return "mirrored", f"one process, {num_gpus} GPUs"
    return "single", f"one process, {num_gpus} GPU" + ("" if num_gpus else "s: training on the CPU")
