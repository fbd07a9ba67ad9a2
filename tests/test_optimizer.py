import keras
import numpy as np
import pytest
import tensorflow as tf

from mnist_dist.config import compose_config
from mnist_dist.optimizer import create_optimizer

KERAS = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "sgd": lambda: keras.optimizers.SGD(0.01),
    "sgd momentum": lambda: keras.optimizers.SGD(0.01, momentum=0.9),
    "sgd nesterov": lambda: keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True),
}
OVERRIDES = {
    "adam": ["optimizer=adam"],
    "sgd": ["optimizer=sgd"],
    "sgd momentum": ["optimizer=sgd", "optimizer.momentum=0.9"],
    "sgd nesterov": ["optimizer=sgd", "optimizer.momentum=0.9", "optimizer.nesterov=true"],
}


@pytest.mark.parametrize("name", KERAS)
def test_equals_keras_over_many_steps(name):
    rng = np.random.default_rng(0)
    start = rng.normal(size=1000).astype(np.float32)
    reference = keras.Variable(start)
    keras_optimizer = KERAS[name]()
    optimizer = create_optimizer(compose_config(*OVERRIDES[name]).optimizer)
    weights = tf.Variable(start)
    slots = [tf.Variable(np.zeros_like(start)) for _ in optimizer.slot_names]
    for step in range(50):
        gradient = tf.constant(rng.normal(size=1000).astype(np.float32))
        keras_optimizer.apply([gradient], [reference])
        optimizer.apply(
            weights,
            slots,
            gradient,
            global_step=tf.constant(step, tf.int64),
            learning_rate=tf.constant(0.01, tf.float32),
        )
        # Adam divides by the root of a small number, which magnifies the last bit.
        np.testing.assert_allclose(weights.numpy(), reference.numpy(), rtol=1e-5, atol=5e-6)
    assert np.abs(weights.numpy() - start).mean() > 0.01  # it did move
