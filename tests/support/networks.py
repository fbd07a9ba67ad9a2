"""Networks of a user's own in a training program, without a run."""

from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from mnist_dist.config.compose import compose_config
from mnist_dist.data.splits import Split
from mnist_dist.engine.batches import BatchPlan
from mnist_dist.engine.flat_model import FlatModel
from mnist_dist.engine.layers.position import BatchPosition, BatchRows
from mnist_dist.engine.optimizer import create_optimizer
from mnist_dist.engine.precision import LossScale
from mnist_dist.engine.programs.placement import place_split
from mnist_dist.engine.programs.state import TrainState
from mnist_dist.engine.programs.train import TrainProgram
from mnist_dist.engine.reduction import ExactSum, FastSum
from mnist_dist.engine.shards import ShardPlan
from mnist_dist.strategy.base import SingleDevice, Strategy

IMAGE_SHAPE, NUM_CLASSES = (6, 6, 1), 4
layers = keras.layers


def network(*parts: keras.Layer, shape=IMAGE_SHAPE) -> keras.Model:
    """These layers between the images and softmax."""
    softmax = layers.Dense(NUM_CLASSES, activation="softmax", name="probabilities")
    return keras.Sequential([keras.Input(shape), *parts, layers.Flatten(), softmax])


def make_split(num_examples: int, *, seed: int = 0, mean: float = 0.0) -> Split:
    rng = np.random.default_rng(seed)
    labels = np.eye(NUM_CLASSES, dtype=np.float32)[rng.integers(NUM_CLASSES, size=num_examples)]
    return Split((rng.random((num_examples, 36)) + mean).astype(np.float32), labels)


def rows_of(flat_model: FlatModel, images, *, shards: int, step: int = 0, first_row: int = 0, weights=None):
    """`FlatModel.training_pass` for images as so many shards, with the model's own weights."""
    num_rows = len(images)
    position = BatchPosition(tf.constant(first_row, tf.int64), tf.constant(step, tf.int64))
    rows = BatchRows(position, tf.ones(num_rows) if weights is None else weights, num_rows // shards)
    own = flat_model.split(*map(tf.constant, flat_model.vectors()))
    return flat_model.training_pass(own, tf.cast(images, flat_model.compute_dtype), rows)


class Training(NamedTuple):
    state: TrainState
    flat_model: FlatModel
    program: TrainProgram
    plan: BatchPlan

    def run(self, *, epochs: int = 1, learning_rate: float = 0.1) -> None:
        for epoch in range(epochs):
            indices = self.plan.shuffled(seed=0, epoch=epoch + 1)
            self.program.run_epoch(indices, learning_rates=np.full(len(indices), learning_rate))

    def vectors(self) -> list[np.ndarray]:
        return [self.state.strategy.read(variable) for variable in self.state.model]


def train(
    model: keras.Model,
    split: Split,
    *overrides: str,
    batch_size: int = 32,
    num_shards: int = 8,
    shards_per_call: int = 1,
    strategy: Strategy | None = None,
    exact: bool = True,
    seed: int = 0,
) -> Training:
    """A training of the model from its own weights, by SGD unless `overrides` say otherwise."""
    strategy = strategy or SingleDevice()
    config = compose_config("optimizer=sgd", "precision=float32", *overrides)
    flat_model = FlatModel(model, image_shape=IMAGE_SHAPE, seed=seed, policy=config.precision.name)
    plan = ShardPlan(num_shards, -(-batch_size // num_shards), strategy.num_replicas, shards_per_call)
    state = TrainState(
        flat_model.vectors(),
        optimizer=create_optimizer(config.optimizer, flat_model.weight_kinds()),
        loss_scale=LossScale(config.precision),
        strategy=strategy,
    )
    program = TrainProgram(
        flat_model,
        state,
        split=place_split(split, strategy, dtype=flat_model.compute_dtype),
        shards=plan,
        reduction=ExactSum(strategy, plan) if exact else FastSum(strategy),
        xla="shard" if config.compile == "xla" else None,
    )
    return Training(state, flat_model, program, BatchPlan(len(split), batch_size, num_rows=plan.num_rows))


def train_plainly(model: keras.Model, split: Split, indices: np.ndarray, *, penalties: bool = True) -> None:
    """The same in plain Keras on one device: the mean loss of a batch, its penalties, SGD."""
    optimizer = keras.optimizers.SGD(0.1)
    for row in indices:
        rows = row[row >= 0]
        with tf.GradientTape() as tape:
            images = tf.reshape(split.images[rows], [-1, *IMAGE_SHAPE])
            outputs = model(images, training=True)
            loss = tf.reduce_mean(keras.losses.categorical_crossentropy(split.labels[rows], outputs))
            loss += sum(model.losses) if penalties else 0
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
