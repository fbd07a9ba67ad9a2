"""Trains a step of many shapes in exact mode and prints the digests: `python bits_of_shapes.py KEY=VALUE ...`.

`NUM_CORES` is the number of cores that the machine seems to have.
"""

import hashlib
import json
import os
import sys

import numpy as np

from mnist_dist.config.compose import compose_config
from mnist_dist.data.splits import Split, Splits
from mnist_dist.engine.build import build_engine
from mnist_dist.launch.rendezvous import Rendezvous
from mnist_dist.launch.topology import Topology

# Network, precision, rows per shard, shards, side of the images. Each was seen to differ for some number of
# threads when operations have several.
SHAPES = [
    ("mlp", "float32", 512, 8, 28),
    ("mlp", "float32", 6188, 8, 28),
    ("mlp", "float32", 24750, 1, 28),
    ("mlp", "float32", 50000, 1, 28),
    ("mlp", "mixed_bfloat16", 4096, 2, 28),
    ("mlp", "mixed_bfloat16", 24750, 1, 28),
    ("cnn", "float32", 64, 8, 28),
    ("cnn", "float32", 512, 1, 28),
    ("cnn", "float32", 50000, 1, 8),
    ("cnn", "mixed_bfloat16", 64, 2, 28),
]


def create_split(num_examples: int, side: int, generator: np.random.Generator) -> Split:
    labels = np.eye(10, dtype=np.float32)[generator.integers(0, 10, num_examples)]
    return Split(generator.random((num_examples, side * side), np.float32), labels)


def digest(model: str, precision: str, num_rows: int, num_shards: int, side: int, overrides: list[str]) -> str:
    """A digest of weights, losses and counts after a step on as many examples as the shards have rows."""
    generator = np.random.default_rng(0)
    splits = Splits(
        train=create_split(num_rows * num_shards, side, generator),
        val=create_split(1500, side, generator),
        test=create_split(10, side, generator),
        image_shape=(side, side),
        class_names=tuple("0123456789"),
    )
    shape = [f"model={model}", f"precision={precision}", f"batch.num_shards={num_shards}"]
    config = compose_config("strategy=single", *shape, f"batch.global_size={num_rows * num_shards}", *overrides)
    engine = build_engine(config, Rendezvous(Topology(), timeout_s=1), splits, num_gpus=0)
    assert (engine.plan.steps_per_epoch, engine.shards.rows_per_shard) == (1, num_rows)
    row = engine.create_trainer().run_epoch(1)
    numbers = [row.loss.hex(), row.val_loss.hex(), row.accuracy.hex(), row.val_accuracy.hex()]
    return hashlib.sha256(":".join([engine.weights().tobytes().hex(), *numbers]).encode()).hexdigest()


num_cores = int(os.environ["NUM_CORES"])
os.sched_getaffinity = lambda process: set(range(num_cores))
print(json.dumps({":".join(map(str, shape)): digest(*shape, sys.argv[1:]) for shape in SHAPES}))
