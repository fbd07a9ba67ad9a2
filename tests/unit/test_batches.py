"""The batch plan: every example once per epoch, in an order that depends only on (seed, epoch)."""

import numpy as np
import pytest

from mnist_dist.engine.batches import PADDING, BatchPlan

# The order of 10 examples for seed 1, epoch 2.
RECORDED = [1, 4, 5, 0, 7, 6, 8, 2, 3, 9]
# Examples and batch sizes. The second divides, the last is the recipe's: 97 steps, 348 examples in the last one.
SIZES = [(1, 1), (12, 4), (13, 4), (3, 8), (1000, 7), (49_500, 512)]


@pytest.mark.parametrize(("num_examples", "batch_size"), SIZES)
@pytest.mark.parametrize("epoch", [0, 1, 149])
def test_each_example_exactly_once_then_padding(num_examples, batch_size, epoch):
    plan = BatchPlan(num_examples, batch_size)
    for rows in (plan.shuffled(seed=3, epoch=epoch), plan.in_order()):
        assert rows.shape == (plan.steps_per_epoch, batch_size)
        assert rows.dtype == np.int32
        flat = rows.reshape(-1)
        assert sorted(flat[:num_examples].tolist()) == list(range(num_examples))
        assert set(flat[num_examples:].tolist()) <= {PADDING}
        assert len(flat) - num_examples < batch_size  # no step without an example


def test_the_recipes_steps():
    plan = BatchPlan(49_500, 512)
    assert plan.steps_per_epoch == 97
    sizes = (plan.shuffled(seed=0, epoch=0) != PADDING).sum(axis=1)
    assert sizes.tolist() == [512] * 96 + [348]


def test_in_order():
    assert BatchPlan(5, 2).in_order().tolist() == [[0, 1], [2, 3], [4, PADDING]]


def test_wider_steps_hold_the_same_examples():
    """As when the shards of a batch have more rows than it has examples."""
    for plan, rows in (
        (BatchPlan(5, 2, num_rows=3), [[0, 1, -1], [2, 3, -1], [4, -1, -1]]),
        (BatchPlan(3, 2), [[0, 1], [2, -1]]),
    ):
        assert plan.in_order().tolist() == rows
    narrow, wide = BatchPlan(1000, 64), BatchPlan(1000, 64, num_rows=70)
    assert np.array_equal(wide.shuffled(seed=5, epoch=7)[:, :64], narrow.shuffled(seed=5, epoch=7))
    assert (wide.shuffled(seed=5, epoch=7)[:, 64:] == PADDING).all()


def test_steps_that_divide_by_the_number_of_replicas():
    assert BatchPlan(5, 2).in_order(multiple_of=2).tolist() == [[0, 1], [2, 3], [4, PADDING], [PADDING, PADDING]]


def test_a_pure_function_of_seed_and_epoch():
    first = BatchPlan(1000, 64).shuffled(seed=5, epoch=7)
    np.random.seed(1)
    BatchPlan(1000, 64).shuffled(seed=5, epoch=6)
    assert np.array_equal(BatchPlan(1000, 64).shuffled(seed=5, epoch=7), first)


def test_the_batch_size_does_not_change_the_order():
    orders = [BatchPlan(1000, size).shuffled(seed=5, epoch=7).reshape(-1)[:1000] for size in (1, 64, 2000)]
    assert np.array_equal(orders[0], orders[1])
    assert np.array_equal(orders[0], orders[2])


def test_the_order_never_changes():
    """Resuming with a newer NumPy or on another machine must not reshuffle."""
    assert BatchPlan(10, 5).shuffled(seed=1, epoch=2).reshape(-1).tolist() == RECORDED


def test_seeds_and_epochs_differ():
    plan = BatchPlan(1000, 64)
    # Including (1, 2) and (2, 1): seed and epoch are not simply added.
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2**31 - 1, 0), (2**31 - 1, 1)]
    orders = {plan.shuffled(seed=seed, epoch=epoch).tobytes() for seed, epoch in keys}
    assert len(orders) == len(keys)


def test_orders_look_random():
    """The mean position of an example over many epochs is the middle."""
    plan = BatchPlan(20, 20)
    places = np.array([np.argsort(plan.shuffled(seed=0, epoch=epoch)[0]) for epoch in range(2000)])
    # One position has standard deviation 5.77, a mean of 2000 positions 0.13.
    assert np.abs(places.mean(axis=0) - 9.5).max() < 5 * 0.13
