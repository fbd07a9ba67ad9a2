import keras
import numpy as np
import pytest
import tensorflow as tf

from mnist_dist.base.errors import UserError
from mnist_dist.config.compose import compose_config
from mnist_dist.engine.optimizer import LearningRate, create_optimizer

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
            learning_rate=tf.constant(0.01, tf.float32),
            factors=optimizer.factors(tf.constant(step, tf.int64)),
        )
        # Adam divides by the square root of a small number, which magnifies the last bit.
        np.testing.assert_allclose(weights.numpy(), reference.numpy(), rtol=1e-5, atol=5e-6)
    assert np.abs(weights.numpy() - start).mean() > 0.01  # it did move


@pytest.mark.parametrize(
    ("scaling", "warmup", "factor", "expected"),
    [
        ("none", 0, 4, [0.1, 0.1, 0.1, 0.1]),
        ("linear", 0, 4, [0.4, 0.4, 0.4, 0.4]),
        ("sqrt", 0, 4, [0.2, 0.2, 0.2, 0.2]),
        ("linear", 1.5, 4, [0.2, 0.3, 0.4, 0.4]),  # three steps of warm-up, from 0.1
        ("none", 1, 4, [0.05, 0.1, 0.1, 0.1]),  # nothing to warm up from but 0
    ],
)
def test_learning_rates(scaling, warmup, factor, expected):
    config = compose_config(f"learning_rate.scaling={scaling}", f"learning_rate.warmup_epochs={warmup}").learning_rate
    rate = LearningRate(config, base=0.1, batch_factor=factor, steps_per_epoch=2)
    assert rate.at(np.arange(4)) == pytest.approx(expected)
    assert rate.at(np.arange(2, 4)) == pytest.approx(expected[2:])


def test_a_rate_that_scaling_makes_too_large():
    config = compose_config("learning_rate.scaling=linear").learning_rate
    with pytest.raises(UserError, match=r"^learning_rate.scaling=linear: raises optimizer.learning_rate=3e\+38 by "):
        LearningRate(config, base=3e38, batch_factor=4, steps_per_epoch=2)
