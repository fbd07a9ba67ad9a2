"""Cross-entropy and its derivative, against the textbook in float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from mnist_dist.engine.loss import cross_entropy, smoothed


def textbook(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    rows = np.arange(len(labels))
    slopes = np.exp(shifted - log_sums)
    slopes[rows, labels] -= 1
    return (log_sums - shifted)[rows, labels], slopes


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("size", [0.0, 1.0, 30.0, 1e4])
def test_losses_and_slopes(size, fused):
    """Also of logits that are all equal, and of ones so far apart that a probability is 0 or 1."""
    rng = np.random.default_rng(0)
    logits = (size * rng.standard_normal((64, 10))).astype(np.float32)
    labels = rng.integers(10, size=64)
    losses, slopes = cross_entropy(tf.constant(logits), tf.constant(labels), fused=fused)
    expected_losses, expected_slopes = textbook(logits, labels)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slopes, expected_slopes, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.1, 0.9])
@pytest.mark.parametrize("fused", [True, False])
def test_slopes_of_smoothed_labels_are_keras(smoothing, fused):
    rng = np.random.default_rng(0)
    logits, labels = tf.constant(3 * rng.standard_normal((64, 7)), tf.float32), rng.integers(7, size=64)
    with tf.GradientTape() as tape:
        tape.watch(logits)
        loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing, reduction="sum")
        value = loss(np.eye(7)[labels], logits)
    _, slopes = cross_entropy(logits, tf.constant(labels), fused=fused)
    np.testing.assert_allclose(
        smoothed(slopes, tf.constant(labels), smoothing), tape.gradient(value, logits), rtol=1e-5, atol=1e-6
    )


def test_without_smoothing_there_is_no_operation_more():
    slopes = tf.zeros((2, 3))
    assert smoothed(slopes, tf.constant([0, 1]), 0.0) is slopes
