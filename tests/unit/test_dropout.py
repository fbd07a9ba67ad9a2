import numpy as np
import pytest
import tensorflow as tf

from mnist_dist.engine.layers.dropout import PositionalDropout, drop_thresholds, keep_masks
from mnist_dist.engine.layers.position import BatchPosition, BatchRows, computing


def position(step: int, row: int) -> BatchPosition:
    return BatchPosition(tf.constant(row, tf.int64), tf.constant(step, tf.int64))


def at(step: int, row: int, *, num_rows: int):
    return computing(BatchRows(position(step, row), tf.ones(num_rows), num_rows))


def masks(*, key: int = 7, step: int = 3, row: int = 0, num_rows: int, num_units: int, rate: float = 0.4) -> np.ndarray:
    thresholds = drop_thresholds(rate, num_units)
    return keep_masks(key, position(step, row).counter(), num_rows=num_rows, thresholds=thresholds).numpy()


@pytest.mark.parametrize("rate", [0.4, 0.01])
@pytest.mark.parametrize("num_units", [8, 10, 256, 300])
def test_rows_do_not_depend_on_who_computes_them(num_units, rate):
    whole = masks(num_rows=512, num_units=num_units, rate=rate)
    for first_row, num_rows in [(0, 171), (171, 171), (342, 170), (511, 1)]:
        part = masks(row=first_row, num_rows=num_rows, num_units=num_units, rate=rate)
        np.testing.assert_array_equal(part, whole[first_row : first_row + num_rows])


def test_keys_steps_and_rows_give_different_masks():
    """Independent masks with rate 0.5 agree for half of the units."""
    size = {"num_rows": 64, "num_units": 64, "rate": 0.5}
    base = masks(**size) > 0
    for other in ({"key": 8}, {"step": 4}, {"row": 64}, {"row": 1}):
        assert abs((base == (masks(**size, **other) > 0)).mean() - 0.5) < 0.04  # standard error 0.008


def test_units_are_independent():
    keeps = masks(num_rows=4000, num_units=64, rate=0.5) > 0
    correlations = np.corrcoef(keeps.T) - np.eye(64)
    assert np.abs(correlations).max() < 0.08  # standard error 0.016
    rows = np.corrcoef(keeps[:64].astype(float)) - np.eye(64)
    assert abs(rows.mean()) < 0.01


@pytest.mark.parametrize("rate", [0.001, 0.02, 0.0625, 0.1, 0.25, 0.4, 0.75, 0.99])
@pytest.mark.parametrize("num_units", [1, 10, 256])
def test_every_unit_is_dropped_at_the_rate_and_keeps_its_expectation(rate, num_units):
    thresholds = drop_thresholds(rate, num_units)
    rates = thresholds.astype(float) / 2 ** (8 * thresholds.dtype.itemsize)
    assert np.abs(rates - rate).max() <= 1 / 256
    assert abs(rates.mean() - rate) <= 1 / 512 / num_units + 1 / 2**16
    out = masks(num_rows=20_000, num_units=num_units, rate=rate)
    assert np.abs((out == 0).mean(axis=0) - rates).max() < 5 * np.sqrt(rate * (1 - rate) / 20_000) + 1e-12
    np.testing.assert_allclose(out.max(axis=0) * (1 - rates), 1, rtol=1e-6)
    assert all(len(np.unique(column)) <= 2 for column in out.T)


def test_the_layer_multiplies_by_the_mask():
    x = tf.random.stateless_normal([6, 10], seed=[1, 2])
    with at(3, 5, num_rows=6):
        out = PositionalDropout(0.4, seed=2, index=1)(x, training=True).numpy()
    np.testing.assert_array_equal(out, x * masks(key=(2 << 32) | 1, row=5, num_rows=6, num_units=10))


def test_layers_and_seeds_differ():
    with at(0, 0, num_rows=8):
        outputs = [
            PositionalDropout(0.5, seed=seed, index=index)(tf.ones([8, 64]), training=True).numpy()
            for seed, index in [(0, 1), (0, 2), (1, 1)]
        ]
    assert not np.array_equal(outputs[0], outputs[1])
    assert not np.array_equal(outputs[0], outputs[2])


def test_inference_and_rate_zero_change_nothing():
    x = tf.random.stateless_normal([4, 8], seed=[1, 2])
    np.testing.assert_array_equal(PositionalDropout(0.5, seed=0, index=1)(x, training=False), x)
    np.testing.assert_array_equal(PositionalDropout(0.0, seed=0, index=1)(x, training=True), x)


def test_works_on_images():
    with at(0, 0, num_rows=8):
        out = PositionalDropout(0.5, seed=0, index=1)(tf.ones([2, 5, 5, 3]), training=True)
    assert out.shape == (2, 5, 5, 3)
