"""Every optimisation of the step at once, against the step as a textbook writes it, on real MNIST.

The plain step has the whole batch in one piece, Keras' layers and Keras' optimizer; only the dropout masks are ours.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from mnist_dist.config import compose_config
from mnist_dist.data.preprocess import preprocess
from mnist_dist.data.sources import load_dataset
from mnist_dist.dropout import BatchPosition, random_uint16
from mnist_dist.topology import Topology
from mnist_dist.training import build_training

SEED, RATE, NUM_STEPS = 3, 0.4, 97


@pytest.fixture(scope="module")
def splits(mnist_path):
    data = compose_config("data=mnist", f"data.path={mnist_path}").data
    return preprocess(load_dataset(data), val_fraction=data.val_fraction, split_seed=data.split_seed)


@pytest.fixture(scope="module")
def train(splits, mnist_path):
    """Train some steps of epoch 1 of the recipe; returns the weights before and after, and the batches' indices."""

    def run(optimizer: str, num_steps: int, mode: str):
        config = compose_config(
            "data=mnist", f"data.path={mnist_path}", f"seed={SEED}", f"optimizer={optimizer}", f"reproducibility={mode}",
            "strategy=single",
        )  # fmt: skip
        training = build_training(config, Topology(), splits, num_gpus=0)
        before = training.weights()
        indices = training.plan.shuffled(seed=SEED, epoch=1)[:num_steps]
        rates = training.learning_rate.at(np.arange(num_steps))
        training.create_trainer()._train_epoch(indices, learning_rates=rates)
        return before, training.weights(), indices, training

    return run


def masks(step: int, layer: int, num_rows: int) -> np.ndarray:
    position = BatchPosition(tf.constant(step, tf.int64), tf.constant(0, tf.int64))
    random = random_uint16((SEED << 32) | layer, position, num_rows=512, num_units=256).numpy()[:num_rows]
    threshold = round(RATE * 2**16)
    return (random >= threshold).astype(np.float32) * np.float32(2**16 / (2**16 - threshold))


def plain_steps(training, splits, weights: np.ndarray, indices: np.ndarray, optimizer: keras.Optimizer):
    """The weights after these steps, and the gradient of the first."""
    model = training.network.export(weights)
    first_gradient = None
    for step, row in enumerate(indices):
        rows = row[row >= 0]
        with tf.GradientTape() as tape:
            outputs, num_dropouts = tf.constant(splits.train.images[rows]), 0
            for layer in model.layers:
                if isinstance(layer, keras.layers.Dropout):
                    num_dropouts += 1
                    outputs = outputs * masks(step, num_dropouts, len(rows))
                else:
                    outputs = layer(outputs)
            loss = tf.reduce_mean(keras.losses.categorical_crossentropy(splits.train.labels[rows], outputs))
        gradients = tape.gradient(loss, model.trainable_variables)
        if first_gradient is None:
            first_gradient = np.concatenate([gradient.numpy().ravel() for gradient in gradients])
        optimizer.apply(gradients, model.trainable_variables)
    return np.concatenate([variable.numpy().ravel() for variable in model.trainable_variables]), first_gradient


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize(
    ("optimizer", "num_steps", "tolerance"), [("sgd", 1, 1e-6), ("adam", 1, 1e-6), ("sgd", NUM_STEPS, 1e-5)]
)
def test_equals_the_plain_step(train, splits, optimizer, num_steps, tolerance, mode):
    """97 steps are the whole epoch with its short last batch."""
    before, ours, indices, training = train(optimizer, num_steps, mode)
    keras_optimizer = {"sgd": keras.optimizers.SGD(0.1), "adam": keras.optimizers.Adam(1e-3)}[optimizer]
    plain, _ = plain_steps(training, splits, before, indices, keras_optimizer)
    assert np.abs(plain - before).max() > 100 * tolerance  # they did move
    np.testing.assert_allclose(ours, plain, rtol=0, atol=tolerance)
