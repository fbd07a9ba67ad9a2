"""The exact sum on up to 1,024 replicas, emulated in one process: its bits, and what is sent."""

import itertools
from collections import Counter

import numpy as np
import pytest
import tensorflow as tf
from support.sums import tree_sum, wild

from mnist_dist.benchmark.cost_model import Link, Workload, exact_reduction_s, ring_all_reduce_s
from mnist_dist.engine.exchange import choose_way, levels_above
from mnist_dist.engine.reduction import ExactSum
from mnist_dist.engine.shards import ShardPlan
from mnist_dist.strategy.base import SingleDevice

SIZE = Workload().message_bytes
BYTES = Link(alpha_s=0, beta_s_per_byte=1)
"""A link on which the formulas give bytes in place of seconds."""


class WaitsForOthers(Exception):
    """A replica has sent its part of a collective, and cannot go on before all have."""


class Emulation(SingleDevice):
    """All replicas of a job, one after the other: each computes up to its next collective, until all have sent.

    Counts what each replica sends to the others.
    """

    has_all_to_all = True

    def __init__(self, num_replicas: int) -> None:
        super().__init__()
        self.num_replicas = num_replicas
        self.sent_bytes: Counter[int] = Counter()
        self._finished: list[np.ndarray] = []
        """What all replicas have sent in each collective."""

    def play(self, function) -> list[np.ndarray]:
        """What `function` returns on each replica."""
        results: list[np.ndarray] = []
        while len(results) < self.num_replicas:
            sent = []
            for index in range(self.num_replicas):
                self._index, self._collectives = index, itertools.count()
                try:
                    results.append(function().numpy())
                except WaitsForOthers as wait:
                    sent.append(wait.args[0])
            assert len(results) + len(sent) == self.num_replicas
            self._finished.append(np.array(sent))
        return results

    def replica_index(self) -> int:
        return self._index

    def all_gather(self, rows: tf.Tensor) -> tf.Tensor:
        """In a ring each one sends its own rows, and passes on those of all others but one."""
        everywhere = self._collect(rows, num_bytes=(self.num_replicas - 1) * rows.numpy().nbytes)
        return tf.constant(everywhere.reshape(-1, *rows.shape[1:]))

    def all_to_all(self, rows: tf.Tensor) -> tf.Tensor:
        blocks = rows.numpy().reshape(self.num_replicas, -1, *rows.shape[1:])
        received = self._collect(blocks, num_bytes=blocks[1:].nbytes)[:, self._index]
        return tf.constant(received.reshape(rows.shape))

    def all_reduce_sum(self, bucket: tf.Tensor) -> tf.Tensor:
        assert self.num_replicas == 2, "of more than two numbers the order would not be known"
        return tf.constant(self._collect(bucket, num_bytes=bucket.numpy().nbytes).sum(axis=0))

    def _collect(self, message, *, num_bytes: int) -> np.ndarray:
        number = next(self._collectives)
        if number < len(self._finished):
            return self._finished[number]
        self.sent_bytes[self._index] += num_bytes
        raise WaitsForOthers(np.asarray(message))


def reduce_on(num_replicas: int, values: np.ndarray, *, way=None) -> tuple[list[np.ndarray], float]:
    """What each replica gets, and how often the size of the sum each one sends."""
    plan, strategy = ShardPlan(len(values), 1, num_replicas), Emulation(num_replicas)
    reduction = ExactSum(strategy, plan, way=way)
    reduction._add_levels = tf.function(reduction._add_levels, autograph=False)  # once for all replicas: seconds less
    results = strategy.play(
        lambda: reduction([[tf.constant(values[shard])] for shard in plan.shards_of(strategy.replica_index())])
    )
    assert len(set(strategy.sent_bytes.values())) <= 1, "all send the same number of bytes"
    return results, strategy.sent_bytes[0] / values[0].nbytes


def expected_messages(num_replicas: int, num_shards: int, **options) -> float:
    """The model's bytes for the recipe's sums, as a multiple of their size."""
    return exact_reduction_s(BYTES, num_bytes=SIZE, num_replicas=num_replicas, num_shards=num_shards, **options) / SIZE


def check(results: list[np.ndarray], values: np.ndarray) -> None:
    assert {result.tobytes() for result in results} == {tree_sum(values).tobytes()}


@pytest.mark.parametrize("num_replicas", [16, 64, 256, 1024])
def test_hundreds_of_replicas_have_the_bits_of_one_at_the_price_of_fast(num_replicas):
    values = wild(1024, 1024)
    ((alone,), nothing) = reduce_on(1, values)
    results, messages = reduce_on(num_replicas, values, way="scatter")
    check([alone, *results], values)
    assert nothing == 0
    assert messages == pytest.approx(expected_messages(num_replicas, 1024))
    assert messages == pytest.approx(ring_all_reduce_s(BYTES, num_bytes=1, num_replicas=num_replicas))


@pytest.mark.parametrize(("num_shards", "num_replicas"), [(2, 2), (6, 2), (8, 3), (8, 5), (8, 8), (100, 7), (20, 19)])
def test_both_ways_and_the_chosen_one_give_the_same_bits(num_shards, num_replicas):
    values = wild(num_shards, 13 * num_replicas, seed=num_replicas)
    plan = ShardPlan(num_shards, 1, num_replicas)
    for way, has_all_to_all in (("gather", False), ("scatter", True)):
        results, messages = reduce_on(num_replicas, values, way=way)
        assert len(results) == num_replicas
        check(results, values)
        if choose_way(plan, num_bytes=SIZE, has_all_to_all=has_all_to_all) == way:
            expected = expected_messages(num_replicas, num_shards, has_all_to_all=has_all_to_all)
            assert messages == pytest.approx(expected)
    check(reduce_on(num_replicas, values)[0], values)


@pytest.mark.parametrize(("num_shards", "num_replicas"), [(2, 2), (6, 2), (8, 3), (8, 4), (16, 16)])
def test_the_recipes_sums_cost_what_the_model_says(num_shards, num_replicas):
    """In the way that is chosen, with a few zeros where the slices do not divide evenly."""
    values = np.ones((num_shards, SIZE // 4), np.float32)
    results, messages = reduce_on(num_replicas, values)
    assert all((result == num_shards).all() for result in results)
    assert messages == pytest.approx(expected_messages(num_replicas, num_shards), rel=1e-4)


def test_slices_that_do_not_divide_evenly():
    values = wild(8, 101)
    check(reduce_on(8, values, way="scatter")[0], values)
    check(reduce_on(3, values[:, :1], way="scatter")[0], values[:, :1])  # fewer numbers than replicas


@pytest.mark.parametrize(
    ("num_shards", "num_replicas", "num_bytes", "way"),
    [
        (8, 2, SIZE, "all_reduce"),
        (6, 2, SIZE, "gather"),  # two subtrees from each
        (8, 3, SIZE, "scatter"),
        (8, 4, SIZE, "scatter"),
        (8, 4, SIZE // 2, "gather"),
        (8, 8, 4096, "gather"),
        (1024, 1024, 16384, "gather"),  # a thousand messages more would take longer than the bytes
        (1024, 1024, SIZE, "scatter"),
        (1024, 1000, SIZE, "scatter"),
    ],
)
def test_the_way_follows_from_size_and_number(num_shards, num_replicas, num_bytes, way):
    plan = ShardPlan(num_shards, 1, num_replicas)
    assert choose_way(plan, num_bytes=num_bytes, has_all_to_all=True) == way
    assert choose_way(plan, num_bytes=num_bytes, has_all_to_all=False) == way.replace("scatter", "gather")


def test_a_thousand_sums_need_ten_levels():
    levels = levels_above(ShardPlan(1024, 1, 1024))
    assert [len(level.left) for level in levels] == [512, 256, 128, 64, 32, 16, 8, 4, 2, 1]
    assert not any(len(level.kept) for level in levels)
