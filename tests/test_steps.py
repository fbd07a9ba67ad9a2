"""The compiled programs against the same arithmetic in plain NumPy and Keras, step by step."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from mnist_dist.config import compose_config
from mnist_dist.data.batches import BatchPlan
from mnist_dist.data.preprocess import Split
from mnist_dist.model import Network, build_model
from mnist_dist.optimizer import create_optimizer
from mnist_dist.steps import EvaluateProgram, TrainProgram, TrainState
from mnist_dist.strategy.base import SingleDevice

NUM_PIXELS, NUM_CLASSES = 20, 3


def make_split(num_examples: int, seed: int = 0) -> Split:
    rng = np.random.default_rng(seed)
    labels = np.eye(NUM_CLASSES, dtype=np.float32)[rng.integers(NUM_CLASSES, size=num_examples)]
    return Split(rng.random((num_examples, NUM_PIXELS), np.float32), labels)


def make_program(split: Split, *overrides: str, num_parts: int = 1):
    config = compose_config("model.hidden_sizes=[16]", *overrides)
    model = build_model(config.model, image_shape=(4, 5), num_classes=NUM_CLASSES, seed=0)
    network = Network(model)
    optimizer = create_optimizer(config.optimizer)
    strategy = SingleDevice()
    state = TrainState(network.get_weights(), optimizer=optimizer, strategy=strategy)
    program = TrainProgram(
        network=network, optimizer=optimizer, strategy=strategy, state=state, split=split, num_parts=num_parts
    )
    return program, state, network, model


@pytest.mark.parametrize("num_parts", [1, 2, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_an_epoch_equals_plain_keras_steps(optimizer, num_parts):
    """70 examples in batches of 16: the last batch has 6, and 16 does not divide by 3 parts."""
    split = make_split(70)
    program, state, _, model = make_program(
        split, f"optimizer={optimizer}", "optimizer.learning_rate=0.01", "model.dropout=0", num_parts=num_parts
    )
    plan = BatchPlan(70, 16)
    indices = plan.shuffled(seed=3, epoch=1)
    sums = program.run_epoch(indices, learning_rate=0.01)

    reference = {"sgd": keras.optimizers.SGD(0.01), "adam": keras.optimizers.Adam(0.01)}[optimizer]
    for step, row in enumerate(indices):
        rows = row[row >= 0]
        with tf.GradientTape() as tape:
            probabilities = model(split.images[rows], training=True)
            losses = keras.losses.categorical_crossentropy(split.labels[rows], probabilities)
            mean_loss = tf.reduce_mean(losses)
        reference.apply(tape.gradient(mean_loss, model.trainable_variables), model.trainable_variables)
        assert sums.losses[step] == pytest.approx(float(tf.reduce_sum(losses)), rel=1e-5)
        correct = np.argmax(probabilities, axis=1) == np.argmax(split.labels[rows], axis=1)
        assert sums.num_correct[step] == correct.sum()
    expected = np.concatenate([variable.numpy().ravel() for variable in model.trainable_variables])
    np.testing.assert_allclose(state.weights.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert state.global_step.numpy() == plan.steps_per_epoch


def test_parts_draw_the_same_dropout():
    """How a batch is cut must not change which units are dropped."""
    split = make_split(64)
    results = []
    for num_parts in (1, 2, 4):
        program, state, *_ = make_program(split, "optimizer=sgd", "optimizer.learning_rate=1.0", num_parts=num_parts)
        program.run_epoch(BatchPlan(64, 32).shuffled(seed=0, epoch=1), learning_rate=1.0)
        results.append(state.weights.numpy())
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(results[2], results[0], rtol=1e-5, atol=1e-6)


def test_same_seed_same_bits():
    weights = []
    for _ in range(2):
        program, state, *_ = make_program(make_split(70))
        for epoch in (1, 2):
            program.run_epoch(BatchPlan(70, 16).shuffled(seed=0, epoch=epoch), learning_rate=0.001)
        weights.append(state.weights.numpy().tobytes())
    assert weights[0] == weights[1]


def test_dropout_differs_from_step_to_step():
    split = make_split(16)
    program, *_ = make_program(split, "optimizer=sgd")
    indices = np.repeat(BatchPlan(16, 16).in_order(), 2, axis=0)
    losses = program.run_epoch(indices, learning_rate=1e-30).losses  # the weights stay
    assert losses[0] != losses[1]


@pytest.mark.parametrize("num_examples", [1, 50, 1025, 2100])
def test_evaluation_counts_every_example_once(num_examples):
    split = make_split(num_examples)
    _, _, network, model = make_program(split)
    strategy = SingleDevice()
    program = EvaluateProgram(network=network, strategy=strategy, split=split)
    sums = program.run(strategy.create_variable(network.get_weights()))

    probabilities = model.predict(split.images, verbose=0)
    actual, predicted = np.argmax(split.labels, axis=1), np.argmax(probabilities, axis=1)
    confusion = np.zeros((NUM_CLASSES, NUM_CLASSES), int)
    np.add.at(confusion, (actual, predicted), 1)
    np.testing.assert_array_equal(sums.confusion, confusion)
    assert sums.num_examples == num_examples
    assert sums.num_correct == (actual == predicted).sum()
    expected = keras.losses.categorical_crossentropy(split.labels, probabilities).numpy().sum(dtype=np.float64)
    assert sums.loss == pytest.approx(expected, rel=1e-5)


def test_one_epoch_is_one_call_of_one_program():
    program, *_ = make_program(make_split(70))
    plan = BatchPlan(70, 16)
    for epoch in (1, 2, 3):
        program.run_epoch(plan.shuffled(seed=0, epoch=epoch), learning_rate=0.1 / epoch)
    assert program._compiled.experimental_get_tracing_count() == 1
