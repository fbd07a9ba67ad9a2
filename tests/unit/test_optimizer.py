import keras
import numpy as np
import pytest
import tensorflow as tf

from mnist_dist.config.compose import compose_config
from mnist_dist.engine.optimizer import create_optimizer

KINDS = ("kernel", "bias", "kernel")


def keras_adamw(*excluded: str) -> keras.optimizers.Optimizer:
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_names=list(excluded))
    return optimizer


KERAS = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras_adamw("bias"),
    "adamw everywhere": lambda: keras_adamw(),
    "adamw bias only": lambda: keras_adamw("kernel"),
    "sgd": lambda: keras.optimizers.SGD(0.01),
    "sgd momentum": lambda: keras.optimizers.SGD(0.01, momentum=0.9),
    "sgd nesterov": lambda: keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True),
}
OVERRIDES = {
    "adam": ["optimizer=adam"],
    "adamw": ["optimizer=adamw", "optimizer.weight_decay=0.5"],
    "adamw everywhere": ["optimizer=adamw", "optimizer.weight_decay=0.5", "optimizer.decay_excludes=[]"],
    "adamw bias only": ["optimizer=adamw", "optimizer.weight_decay=0.5", "optimizer.decay_excludes=[kernel]"],
    "sgd": ["optimizer=sgd"],
    "sgd momentum": ["optimizer=sgd", "optimizer.momentum=0.9"],
    "sgd nesterov": ["optimizer=sgd", "optimizer.momentum=0.9", "optimizer.nesterov=true"],
}


@pytest.mark.parametrize("name", KERAS)
def test_equals_keras_over_many_steps(name):
    """AdamW on a vector of a kernel, a bias and another kernel."""
    rng = np.random.default_rng(0)
    start = rng.normal(size=1000).astype(np.float32)
    parts = [keras.Variable(part, name=kind) for kind, part in zip(KINDS, np.split(start, [600, 700]), strict=True)]
    keras_optimizer = KERAS[name]()
    sizes = [part.shape[0] for part in parts]
    optimizer = create_optimizer(compose_config(*OVERRIDES[name]).optimizer, list(zip(KINDS, sizes, strict=True)))
    weights = tf.Variable(start)
    slots = [tf.Variable(np.zeros_like(start)) for _ in optimizer.slot_names]
    for step in range(50):
        gradient = tf.constant(rng.normal(size=1000).astype(np.float32))
        keras_optimizer.apply(tf.split(gradient, sizes), parts)
        optimizer.apply(
            weights,
            slots,
            gradient,
            learning_rate=tf.constant(0.01, tf.float32),
            factors=optimizer.factors(tf.constant(step, tf.int64)),
        )
        # Adam divides by the square root of a small number, which magnifies the last bit.
        reference = np.concatenate([part.numpy() for part in parts])
        np.testing.assert_allclose(weights.numpy(), reference, rtol=1e-5, atol=5e-6)
    assert np.abs(weights.numpy() - start).mean() > 0.01  # it did move


def test_adamw_without_gradient_only_shrinks_what_decays():
    config = compose_config("optimizer=adamw", "optimizer.weight_decay=0.5").optimizer
    optimizer = create_optimizer(config, [("kernel", 2), ("embedding", 1), ("bias", 1), ("normalization", 1)])
    weights = tf.Variable(tf.ones(5))
    slots = [tf.Variable(tf.zeros(5)) for _ in optimizer.slot_names]
    factors = optimizer.factors(tf.constant(0, tf.int64))
    optimizer.apply(weights, slots, tf.zeros(5), learning_rate=tf.constant(0.5), factors=factors)
    assert weights.numpy().tolist() == [0.75, 0.75, 0.75, 1, 1]


def test_adamw_needs_the_kinds_of_all_weights():
    optimizer = create_optimizer(compose_config("optimizer=adamw").optimizer, [("kernel", 2)])
    weights = tf.Variable(tf.ones(5))
    slots = [tf.Variable(tf.zeros(5)) for _ in optimizer.slot_names]
    factors = optimizer.factors(tf.constant(0, tf.int64))
    with pytest.raises(tf.errors.InvalidArgumentError, match="Incompatible shapes"):
        optimizer.apply(weights, slots, tf.zeros(5), learning_rate=tf.constant(0.5), factors=factors)
