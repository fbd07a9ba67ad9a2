import numpy as np
import pytest
import tensorflow as tf

from mnist_dist.engine.layers.dropout import BatchPosition, PositionalDropout, at_position, random_uint16


def position(step: int, row: int) -> BatchPosition:
    return BatchPosition(tf.constant(step, tf.int64), tf.constant(row, tf.int64))


@pytest.mark.parametrize("num_units", [8, 10, 256, 300])
def test_rows_do_not_depend_on_who_computes_them(num_units):
    whole = random_uint16(7, position(3, 0), num_rows=512, num_units=num_units).numpy()
    for first_row, num_rows in [(0, 171), (171, 171), (342, 170), (511, 1)]:
        part = random_uint16(7, position(3, first_row), num_rows=num_rows, num_units=num_units).numpy()
        np.testing.assert_array_equal(part, whole[first_row : first_row + num_rows])


def test_keys_steps_and_rows_give_different_numbers():
    base = random_uint16(7, position(3, 0), num_rows=4, num_units=64).numpy()
    for key, step, row in [(8, 3, 0), (7, 4, 0), (7, 3, 4)]:
        other = random_uint16(key, position(step, row), num_rows=4, num_units=64).numpy()
        assert (base == other).mean() < 0.05


def test_numbers_are_uniform():
    numbers = random_uint16(1, position(0, 0), num_rows=1000, num_units=256).numpy().astype(np.float64)
    assert abs(numbers.mean() / 65535 - 0.5) < 0.002  # standard error 0.0006
    assert abs(np.corrcoef(numbers[:, :-1].ravel(), numbers[:, 1:].ravel())[0, 1]) < 0.01


@pytest.mark.parametrize("rate", [0.1, 0.4, 0.75])
def test_drops_the_rate_and_keeps_the_expectation(rate):
    layer = PositionalDropout(rate, seed=0, index=1)
    with at_position(position(0, 0)):
        out = layer(tf.ones([1000, 256]), training=True).numpy()
    assert abs((out == 0).mean() - rate) < 0.005
    assert abs(out.mean() - 1) < 0.01
    assert len(np.unique(out)) == 2


def test_layers_and_seeds_differ():
    with at_position(position(0, 0)):
        masks = [
            PositionalDropout(0.5, seed=seed, index=index)(tf.ones([8, 64]), training=True).numpy()
            for seed, index in [(0, 1), (0, 2), (1, 1)]
        ]
    assert not np.array_equal(masks[0], masks[1])
    assert not np.array_equal(masks[0], masks[2])


def test_inference_and_rate_zero_change_nothing():
    x = tf.random.stateless_normal([4, 8], seed=[1, 2])
    np.testing.assert_array_equal(PositionalDropout(0.5, seed=0, index=1)(x, training=False), x)
    np.testing.assert_array_equal(PositionalDropout(0.0, seed=0, index=1)(x, training=True), x)


def test_works_on_images():
    with at_position(position(0, 0)):
        out = PositionalDropout(0.5, seed=0, index=1)(tf.ones([2, 5, 5, 3]), training=True)
    assert out.shape == (2, 5, 5, 3)
