"""One rank of Horovod that sums numbers in exact mode, in every way, inside a compiled loop as training does.

`python reduce_exactly.py FOLDER` writes `FOLDER/rank-N.npz`: an array for each number of shards and way.
"""

import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

from mnist_dist.config.compose import compose_config
from mnist_dist.config.devices import ThreadsConfig
from mnist_dist.engine.reduction import ExactSum
from mnist_dist.engine.runtime import configure_tensorflow
from mnist_dist.engine.shards import ShardPlan
from mnist_dist.launch.environment import read_topology
from mnist_dist.launch.rendezvous import Rendezvous
from mnist_dist.strategy.choose import create_strategy
from support.sums import wild

# 8 shards as in training: 1.2 MB, for which the cheaper way is chosen as there. And a tree with many loose ends.
CASES = [(8, 300_001), (11, 1001)]
WAYS = ["gather", "scatter", None]


def reduce_twice(reduction: ExactSum, own: np.ndarray) -> np.ndarray:
    """Both results of a loop in the graph, of the numbers and of twice as much."""

    def step(factor: tf.Tensor) -> tf.Tensor:
        return reduction([[row * factor] for row in tf.unstack(own)])

    def loop() -> tf.Tensor:
        return tf.map_fn(step, tf.constant([1.0, 2.0]), parallel_iterations=1)

    return strategy.run(tf.function(loop, autograph=False)).numpy()


topology = read_topology()
configure_tensorflow(ThreadsConfig("auto", "auto"), topology, num_shards=8, exact=True)
strategy = create_strategy(compose_config("strategy=horovod").strategy, Rendezvous(topology, timeout_s=60), num_gpus=0)
results = {}
for num_shards, num_values in CASES:
    plan = ShardPlan(num_shards, 1, strategy.num_replicas)
    own = wild(num_shards, num_values)[list(plan.shards_of(topology.rank))]
    for way in WAYS:
        results[f"{num_shards} {way}"] = reduce_twice(ExactSum(strategy, plan, way=way), own)
np.savez(Path(sys.argv[1], f"rank-{topology.rank}.npz"), **results)
strategy.barrier()
