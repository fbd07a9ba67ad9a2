"""The sum over shards on real replicas, compared with additions in NumPy."""

import numpy as np
import pytest
import tensorflow as tf
from support.sums import tree_sum, wild

from mnist_dist.engine.reduction import ExactSum, FastSum
from mnist_dist.engine.shards import ShardPlan
from mnist_dist.strategy.base import SingleDevice
from mnist_dist.strategy.mirrored import Mirrored

NUM_VALUES = 1000  # not a power of two, and large enough to leave vectorised kernels a remainder


def reduce_on(strategy, plan: ShardPlan, reduction, values: np.ndarray) -> list[np.ndarray]:
    """What each replica gets; a shard's sums are two tensors, one of them a matrix."""
    result = strategy.create_variable(np.zeros(NUM_VALUES, np.float32))

    def reduce(values: tf.Tensor) -> tf.Tensor:
        sums = [
            [tf.reshape(values[shard, :600], [20, 30]), values[shard, 600:]]
            for shard in plan.shards_of(strategy.replica_index())
        ]
        result.assign(reduction(sums))
        return tf.zeros([])

    tf.function(lambda values: strategy.run(reduce, values))(strategy.replicate(values))
    return strategy.copies(result)


def test_the_numbers_tell_orders_apart():
    rows = wild(8, NUM_VALUES)
    in_a_row = rows[0]
    for row in rows[1:]:
        in_a_row = in_a_row + row
    assert (tree_sum(rows) != in_a_row).mean() > 0.2
    assert (tree_sum(rows) != tree_sum(rows[::-1].copy())).mean() == 0  # the one other order with the same nodes
    assert (tree_sum(rows) != tree_sum(np.roll(rows, 1, axis=0))).mean() > 0.2


@pytest.mark.parametrize(
    ("num_shards", "num_replicas"),
    [(1, 1), (2, 2), (7, 3), (7, 7), (8, 1), (8, 2), (8, 3), (8, 4), (8, 5), (8, 7), (13, 1), (13, 2), (13, 4)],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_exact_is_the_tree_to_the_last_bit(num_shards, num_replicas, seed):
    plan = ShardPlan(num_shards, 4, num_replicas)
    strategies = [Mirrored(num_replicas=num_replicas)] + [SingleDevice()] * (num_replicas == 1)
    values = wild(num_shards, NUM_VALUES, seed=seed)
    for strategy in strategies:
        results = reduce_on(strategy, plan, ExactSum(strategy, plan), values)
        assert len(results) == num_replicas
        for result in results:
            assert result.tobytes() == tree_sum(values).tobytes()


@pytest.mark.parametrize(("num_shards", "num_replicas"), [(2, 2), (8, 3), (8, 4), (13, 4)])
def test_exact_is_the_tree_in_every_way(num_shards, num_replicas):
    """Also in slices, on a backend that has no all-to-all of its own."""
    plan, strategy = ShardPlan(num_shards, 4, num_replicas), Mirrored(num_replicas=num_replicas)
    values = wild(num_shards, NUM_VALUES)
    for way in ("gather", "scatter"):
        results = reduce_on(strategy, plan, ExactSum(strategy, plan, way=way), values)
        assert {result.tobytes() for result in results} == {tree_sum(values).tobytes()}


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 7])
def test_fast_is_the_sum_up_to_rounding(num_replicas):
    plan = ShardPlan(8, 4, num_replicas)
    values, strategy = wild(8, NUM_VALUES), Mirrored(num_replicas=num_replicas)
    bound = 8 * np.finfo(np.float32).eps * np.abs(values).sum(axis=0, dtype=np.float64)
    results = reduce_on(strategy, plan, FastSum(strategy), values)
    assert len(results) == num_replicas
    for result in results:
        assert (np.abs(result - values.sum(axis=0, dtype=np.float64)) <= bound).all()
        assert result.tobytes() == results[0].tobytes()
