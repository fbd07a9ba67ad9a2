"""Batch normalisation over virtual shards, against Keras."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.networks import IMAGE_SHAPE, layers, make_split, network, rows_of, train, train_plainly

from mnist_dist.engine.flat_model import FlatModel
from mnist_dist.strategy.mirrored import Mirrored


def normalized(**options) -> keras.Model:
    keras.utils.set_random_seed(3)
    return network(
        layers.Conv2D(3, 3, use_bias=False),
        layers.BatchNormalization(momentum=0.8, **options),
        layers.ReLU(),
        layers.Flatten(),
        layers.Dense(5),
        layers.BatchNormalization(axis=1, name="second"),
    )


def others_of(model: keras.Model) -> np.ndarray:
    return np.concatenate([variable.numpy().ravel() for variable in model.non_trainable_weights])


def weights_of(model: keras.Model) -> np.ndarray:
    return np.concatenate([variable.numpy().ravel() for variable in model.trainable_weights])


@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False, "epsilon": 0.1}])
def test_one_shard_is_batch_normalisation_of_keras(options):
    """70 examples in batches of 32: the last one has 6, and 26 rows that do not count."""
    split, model = make_split(70), normalized(**options)
    training = train(model, split, num_shards=1)
    before = training.vectors()
    training.run(epochs=2)
    for epoch in (1, 2):
        train_plainly(model, split, training.plan.shuffled(seed=0, epoch=epoch))
    weights, others = training.vectors()
    assert np.abs(weights - before[0]).max() > 0.05
    assert np.abs(others - before[1]).max() > 0.05
    np.testing.assert_allclose(weights, weights_of(model), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(others, others_of(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_each_shard_has_its_own_statistics(axis):
    """A layer that Keras calls for each shard by itself; the fourth shard has two examples, the last one none."""
    layer = layers.BatchNormalization(axis=axis)
    model = network(layer, shape=(6, 6, 1))
    flat_model = FlatModel(model)
    images = np.random.default_rng(0).normal(2, 3, (40, 36)).astype(np.float32)
    counts = [8, 8, 8, 2, 0]
    weights = np.concatenate([np.arange(8) < count for count in counts]).astype(np.float32)
    found = rows_of(flat_model, images, shards=5, weights=tf.constant(weights))
    for shard, count in enumerate(counts[:4]):
        part = images[shard * 8 : shard * 8 + count]
        expected = model(part.reshape(-1, *IMAGE_SHAPE), training=True)
        np.testing.assert_allclose(
            tf.nn.softmax(found.logits[shard * 8 : shard * 8 + count]), expected, rtol=1e-3, atol=1e-5
        )
    assert np.isfinite(found.logits).all()


def test_the_gradient_is_that_of_the_mean_of_the_shards():
    """SGD over 4 shards against Keras on each of them, weighted by its examples."""
    split, model = make_split(28), normalized()
    training = train(model, split, num_shards=4)
    (row,) = training.plan.shuffled(seed=0, epoch=1)
    expected = 0.0
    for shard in range(4):
        rows = row[shard * 8 : shard * 8 + 8]
        rows = rows[rows >= 0]
        copy = keras.models.clone_model(model)
        copy.set_weights(model.get_weights())
        with tf.GradientTape() as tape:
            outputs = copy(tf.reshape(split.images[rows], [-1, *IMAGE_SHAPE]), training=True)
            loss = tf.reduce_sum(keras.losses.categorical_crossentropy(split.labels[rows], outputs)) / 28
        gradients = tape.gradient(loss, copy.trainable_variables)
        expected = expected + np.concatenate([gradient.numpy().ravel() for gradient in gradients])
    before, _ = training.vectors()
    training.run(learning_rate=1.0)
    np.testing.assert_allclose(before - training.vectors()[0], expected, rtol=1e-3, atol=1e-5)


def test_the_averages_follow_the_whole_batch_wherever_its_mean_is():
    """Around 1000 with a deviation of 0.3, squares around zero would leave nothing of the variance in float32."""
    split = make_split(32, mean=1000.0)
    model = network(layers.BatchNormalization(momentum=0.5))
    training = train(model, split)
    for _ in range(30):
        training.run(learning_rate=0.0001)
    _, (mean, variance) = training.vectors()
    pixels = split.images.astype(np.float64)
    assert mean == pytest.approx(pixels.mean(), rel=1e-6)
    assert variance == pytest.approx(pixels.var(), rel=1e-3)


def test_any_number_of_replicas_gives_the_same_bits():
    split = make_split(90)
    found = []
    for num_replicas in (1, 2, 3, 5):
        training = train(normalized(), split, strategy=Mirrored(num_replicas=num_replicas))
        training.run(epochs=2)
        found.append([vector.tobytes() for vector in training.vectors()])
        copies = [training.state.strategy.copies(variable) for variable in training.state.model]
        assert all(len({copy.tobytes() for copy in own}) == 1 and len(own) == num_replicas for own in copies)
    assert all(one == found[0] for one in found[1:])


@pytest.mark.parametrize(("num_replicas", "shards_per_call"), [(1, 8), (1, 3), (3, 2), (2, 4)])
def test_fast_has_the_same_groups_of_rows(num_replicas, shards_per_call):
    split = make_split(90)
    vectors = []
    for options in (
        {},
        {"strategy": Mirrored(num_replicas=num_replicas), "shards_per_call": shards_per_call, "exact": False},
        {"num_shards": 4},
    ):
        training = train(normalized(), split, **options)
        training.run(epochs=2)
        vectors.append(np.concatenate(training.vectors()))
    np.testing.assert_allclose(vectors[1], vectors[0], rtol=1e-3, atol=1e-4)
    assert not np.allclose(vectors[2], vectors[0], rtol=1e-3, atol=1e-4)  # other groups


@pytest.mark.parametrize("overrides", [["compile=xla"], ["precision=mixed_bfloat16"], ["precision=mixed_float16"]])
def test_compiled_and_in_16_bits(overrides):
    split = make_split(90)
    vectors = []
    for more in ([], overrides):
        training = train(normalized(), split, *more)
        training.run(epochs=2, learning_rate=0.05)
        vectors.append(training.vectors())
    for (one, other), tolerance in zip(zip(*vectors, strict=True), (0.05, 0.01), strict=True):
        assert np.abs(one - other).max() < tolerance * (1 if "16" in overrides[0] else 0.01)


def test_averages_move_by_less_than_16_bits_could_show():
    """A momentum of 0.9999 adds 1e-4 of the difference; 8 significant bits would lose it."""
    split, model = make_split(64, mean=1.0), network(layers.BatchNormalization(momentum=0.9999))
    training = train(model, split, "precision=mixed_bfloat16")
    model.layers[0].moving_mean.assign([1.4])
    training.run()
    assert training.vectors()[1][0] == pytest.approx(2 * 1.5e-4, rel=0.05)  # from 0: two steps


def test_averages_arrive_where_16_bits_have_no_number_on_the_way():
    """Steps of half the difference: if the present average were rounded to 8 bits, they would end at 0.998."""
    split, model = make_split(64), network(layers.BatchNormalization(momentum=0.5))
    split.images[:] = 1
    training = train(model, split, "precision=mixed_bfloat16")
    training.run(epochs=12)
    assert training.vectors()[1][0] == pytest.approx(1, abs=1e-5)


def test_a_step_that_overflowed_leaves_the_averages():
    split = make_split(32)
    split.images[3, 5] = np.inf
    training = train(normalized(), split, "precision=mixed_float16")
    before = training.vectors()
    training.run()
    assert [vector.tobytes() for vector in training.vectors()] == [vector.tobytes() for vector in before]


def test_the_saved_layer_is_that_of_keras(tmp_path):
    split = make_split(64)
    training = train(normalized(), split)
    training.run()
    training.flat_model.export(*training.vectors()).save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [type(layer) for layer in loaded.layers if "normal" in layer.name] == [keras.layers.BatchNormalization]
    np.testing.assert_array_equal(others_of(loaded), training.vectors()[1])
    images = split.images[:5]
    weights = training.flat_model.split(*map(tf.constant, training.vectors()))
    logits = training.flat_model.logits(weights, tf.constant(images))
    np.testing.assert_allclose(
        loaded(images.reshape(-1, *IMAGE_SHAPE), training=False), tf.nn.softmax(logits), rtol=1e-5, atol=1e-6
    )


def test_frozen_layers_use_their_averages():
    model = normalized()
    model.layers[1].trainable = False
    training = train(model, make_split(64))
    start = training.vectors()[1]
    training.run()
    end = training.vectors()[1]
    is_frozen = np.zeros(len(start), bool)
    is_frozen[: 4 * 3] = True  # gamma, beta and averages of three channels
    np.testing.assert_array_equal(end[is_frozen], start[is_frozen])
    assert (end != start).any()


def test_masked_inputs_are_refused():
    with pytest.raises(ValueError, match="masked"):
        rows_of(
            FlatModel(network(layers.Reshape((6, 6)), layers.Masking(), layers.BatchNormalization())),
            np.ones((8, 36), np.float32),
            shards=2,
        )
