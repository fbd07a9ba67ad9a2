"""Clipping by the norm, against TensorFlow's own and the textbook."""

import numpy as np
import pytest
import tensorflow as tf

from mnist_dist.engine.clipping import clip


def vector(size: int, norm: float) -> np.ndarray:
    direction = np.random.default_rng(size).normal(size=size)
    return (norm * direction / np.linalg.norm(direction)).astype(np.float32)


@pytest.mark.parametrize("size", [1, 1024, 1025, 5000, 1024**2 + 3])
@pytest.mark.parametrize("norm", [0.5, 2.0, 300.0])
def test_equals_tensorflows(size, norm):
    gradient = vector(size, norm)
    (expected,), _ = tf.clip_by_global_norm([tf.constant(gradient)], 1.0)
    np.testing.assert_allclose(clip(tf.constant(gradient), 1.0), expected, rtol=2e-6)


def test_a_gradient_that_is_short_enough_keeps_its_bits():
    gradient = vector(5000, 0.999)
    assert clip(tf.constant(gradient), 1.0).numpy().tobytes() == gradient.tobytes()
    assert clip(tf.zeros(3), 1.0).numpy().tolist() == [0, 0, 0]


@pytest.mark.parametrize(("norm", "limit"), [(1e30, 1.0), (1e38, 1e-37), (1e-30, 1e-35), (1e-37, 3e38), (1e37, 3e38)])
def test_numbers_whose_squares_float32_does_not_have(norm, limit):
    clipped = clip(tf.constant(vector(3000, norm)), limit).numpy().astype(np.float64)
    assert np.linalg.norm(clipped) == pytest.approx(min(norm, limit), rel=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [3, 3000])
def test_what_is_not_finite_stays_so(bad, size):
    gradient = vector(size, 10.0)
    gradient[1] = bad
    assert not np.isfinite(clip(tf.constant(gradient), 1.0).numpy()[1])
