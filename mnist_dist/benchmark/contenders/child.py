"""A child of the benchmark: `python -m mnist_dist.benchmark.contenders.child JOB.json`; it builds one contender."""

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from mnist_dist.base.surroundings import settings_of_keras, settle
from mnist_dist.base.wire import Wire
from mnist_dist.benchmark.protocol import Turns
from mnist_dist.config.compose import compose_config
from mnist_dist.config.data import DataConfig
from mnist_dist.data.load import load_dataset
from mnist_dist.data.splits import preprocess
from mnist_dist.launch.environment import read_topology
from mnist_dist.launch.rendezvous import Rendezvous


def main() -> None:
    """Connect to the benchmark and take part."""
    settle()
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    topology = read_topology()
    # One file per process: horovodrun's own messages about a failed process would hide the reason.
    output = os.open(f"{job['output']}.{topology.rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    wire = Wire(socket.create_connection(("127.0.0.1", job["port"])))
    wire.send({"token": job["token"], "rank": topology.rank, "pid": os.getpid()})
    data = DataConfig(**job["data"])
    splits = preprocess(load_dataset(data), val_fraction=data.val_fraction, split_seed=data.split_seed)
    turns, kind, precision, options = Turns(wire), job["kind"], job["precision"], job["options"]
    # Each imports only its own framework, without the others' settings.
    if kind == "keras":
        with settings_of_keras():
            from mnist_dist.benchmark.contenders import keras_fit

        keras_fit.take_part(turns, splits, precision=precision, options=options)
    elif kind == "floor":
        with settings_of_keras():
            from mnist_dist.benchmark.contenders import floor

        floor.take_part(turns, splits, precision=precision)
    elif kind == "torch":
        from mnist_dist.benchmark.contenders import pytorch

        pytorch.take_part(turns, splits, precision=precision, options=options)
    elif kind == "jax":
        from mnist_dist.benchmark.contenders import jax_scan

        jax_scan.take_part(turns, splits, precision=precision)
    else:
        with settings_of_keras():
            from mnist_dist.benchmark.contenders import ours

        config = compose_config(*job["overrides"])
        with Rendezvous(topology, timeout_s=config.strategy.start_timeout_s) as rendezvous:
            ours.take_part(turns, splits, config=config, rendezvous=rendezvous)


if __name__ == "__main__":
    main()
