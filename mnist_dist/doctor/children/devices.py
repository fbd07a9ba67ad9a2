"""TensorFlow, its devices, Horovod, and what `auto` would choose: the only module of the doctor that imports them."""

import importlib.util
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

from mnist_dist.base.errors import UserError
from mnist_dist.base.surroundings import settings_of_keras
from mnist_dist.config.train import TrainConfig
from mnist_dist.launch.gpus import own_share
from mnist_dist.launch.topology import Topology


def probe(config: TrainConfig, topology: Topology) -> Iterator[tuple[str, Any]]:
    """Import TensorFlow, ask it for its devices, load Horovod, and make the choices of a training, in this order."""
    started_s = time.monotonic()
    with settings_of_keras():
        import keras
        import tensorflow as tf
    yield (
        "tensorflow",
        {
            "version": tf.__version__,
            "keras": keras.__version__,
            "seconds": time.monotonic() - started_s,
            "build": {key: value for key, value in tf.sysconfig.get_build_info().items() if value is not None},
        },
    )
    from mnist_dist.strategy.choose import list_gpus

    gpus = [
        {
            "name": str(details.get("device_name", "")),
            "compute_capability": list(details.get("compute_capability") or ()),
        }
        for details in map(tf.config.experimental.get_device_details, list_gpus())
    ]
    yield "gpus", gpus
    yield "choices", _choices(config, topology, gpus)
    yield "horovod", _horovod()


def _choices(config: TrainConfig, topology: Topology, gpus: list[dict[str, Any]]) -> dict[str, Any]:
    """What the functions of the package choose, or the message of the error that they end with."""
    from mnist_dist.engine.mode import choose_compiler, choose_mode
    from mnist_dist.engine.precision import choose_precision
    from mnist_dist.engine.runtime import choose_threads, own_cores
    from mnist_dist.strategy.choose import choose_strategy, needs_horovod

    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mnist_dist").addHandler(handler)
    has_horovod = importlib.util.find_spec("horovod") is not None
    found: dict[str, Any] = {"has_horovod": has_horovod, "warnings": warnings}
    try:
        name, reason = choose_strategy(config.strategy.name, topology, num_gpus=len(gpus), has_horovod=has_horovod)
        found |= {"strategy": name, "reason": reason, "needs_horovod": needs_horovod(name)}
        own = own_share(len(gpus), topology)
    except UserError as error:
        return {**found, "error": str(error)}
    mode = choose_mode(config, topology, num_gpus=len(gpus))
    capability = tuple(gpus[own[0]]["compute_capability"]) if own else None
    cores = own_cores(topology)
    num_shards = -(-config.batch.num_shards // topology.world_size)
    intra_op, inter_op = choose_threads(config.threads, num_cores=cores, num_shards=num_shards, exact=mode == "exact")
    return found | {
        "reproducibility": mode,
        "precision": choose_precision(config.precision.name, capability or None),
        "compile": choose_compiler(config, mode=mode, on_gpu=capability is not None, is_single=name == "single"),
        "intra_op": intra_op,
        "inter_op": inter_op,
        "cores": cores,
        "num_gpus": len(gpus),
        "num_shards": num_shards,
    }


def _horovod() -> dict[str, Any]:
    """Whether Horovod can be loaded, and what is built in."""
    from mnist_dist.strategy.horovod import load_horovod

    try:
        hvd = load_horovod()
    except UserError as error:
        return {"error": str(error)}
    built = {name: bool(getattr(hvd, f"{name}_built", lambda: False)()) for name in ("gloo", "nccl", "mpi")}
    return {"version": getattr(sys.modules.get("horovod"), "__version__", ""), **built}
