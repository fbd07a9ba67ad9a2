"""Networks of a user's own: what they draw, what they add to the loss, and the verdicts on their layers."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops
from support.networks import IMAGE_SHAPE, NUM_CLASSES, layers, make_split, network, rows_of, train, train_plainly

from mnist_dist.config.compose import compose_config
from mnist_dist.engine.flat_model import FlatModel
from mnist_dist.engine.network import build_network, check_verdicts
from mnist_dist.engine.verdicts import format_verdicts, judge_layers
from mnist_dist.strategy.mirrored import Mirrored

IMAGES = np.random.default_rng(0).random((48, 36), np.float32)


@keras.saving.register_keras_serializable("tests")
class OwnNoise(layers.Layer):
    """Draws as Keras' documentation says."""

    def __init__(self, **options):
        super().__init__(**options)
        self.generator = keras.random.SeedGenerator(1)

    def call(self, inputs, training=False):
        return inputs + keras.random.normal(ops.shape(inputs), seed=self.generator) if training else inputs


RANDOM = {
    "Dropout": lambda: layers.Dropout(0.5),
    "Dropout of channels": lambda: layers.Dropout(0.5, noise_shape=(None, 1, 6, 1)),
    "SpatialDropout2D": lambda: layers.SpatialDropout2D(0.5),
    "AlphaDropout": lambda: layers.AlphaDropout(0.5),
    "GaussianDropout": lambda: layers.GaussianDropout(0.5),
    "GaussianNoise": lambda: layers.GaussianNoise(0.5),
    "RandomFlip": lambda: layers.RandomFlip(),
    "RandomTranslation": lambda: layers.RandomTranslation(0.4, 0.4),
    "RandomRotation": lambda: layers.RandomRotation(0.4),
    "RandomZoom": lambda: layers.RandomZoom(0.5),
    "RandomContrast": lambda: layers.RandomContrast(0.9),
    "RandomBrightness": lambda: layers.RandomBrightness(0.9, value_range=(0, 1)),
    "RandomErasing": lambda: layers.RandomErasing(value_range=(0, 1)),
    "own": OwnNoise,
    "nested": lambda: keras.Sequential([layers.GaussianNoise(0.5), layers.Dropout(0.5)]),
    "recurrent": lambda: keras.Sequential(
        [layers.Reshape((6, 6)), layers.LSTM(36, dropout=0.3, recurrent_dropout=0.3), layers.Reshape(IMAGE_SHAPE)]
    ),
}


@pytest.mark.parametrize("name", RANDOM)
def test_what_a_layer_draws_depends_on_the_position_only(name):
    flat_model = FlatModel(network(RANDOM[name]()), seed=5)

    def logits(**options) -> np.ndarray:
        return rows_of(flat_model, **{"images": IMAGES, "shards": 6, "step": 3, **options}).logits.numpy()

    whole = logits()
    np.testing.assert_array_equal(logits(), whole)  # no state is left behind
    parts = [logits(images=IMAGES[first : first + 24], shards=3, first_row=first) for first in (0, 24)]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-4, atol=1e-5)
    one = [logits(images=IMAGES[first : first + 8], shards=1, first_row=first) for first in range(0, 48, 8)]
    np.testing.assert_allclose(np.concatenate(one), whole, rtol=1e-4, atol=1e-5)

    inference = flat_model.logits(flat_model.split(*map(tf.constant, flat_model.vectors())), tf.constant(IMAGES))
    others = [
        inference.numpy(),
        logits(step=4),
        logits(first_row=8),
        rows_of(FlatModel(flat_model.model, seed=6), IMAGES, shards=6, step=3).logits.numpy(),
    ]
    assert all(np.abs(other - whole).max() > 1e-2 for other in others)
    same = np.tile(IMAGES[:8], (6, 1))  # shards of equal images
    shards = logits(images=same).reshape(6, -1)
    assert len({shard.tobytes() for shard in shards}) == 6


class Catches(layers.Concatenate):
    def call(self, inputs):
        self.caught = [values.numpy() for values in inputs]
        return super().call(inputs)


def test_layers_and_calls_draw_differently():
    noise, other = layers.GaussianNoise(1.0), layers.GaussianNoise(1.0)
    flat_model = FlatModel(functional(lambda x: Catches(name="catches")([noise(x), noise(x), other(x)])))
    rows_of(flat_model, IMAGES, shards=6)
    drawn = [values.reshape(48, 36) - IMAGES for values in flat_model.twin.get_layer("catches").caught]
    correlations = np.corrcoef([values.ravel() for values in drawn]) - np.eye(3)
    assert np.abs(correlations).max() < 0.1  # standard error 0.024


def test_a_random_network_trains_to_the_same_bits_on_any_number_of_replicas():
    def create():
        keras.utils.set_random_seed(1)
        return network(
            layers.RandomTranslation(0.2, 0.2), layers.Conv2D(4, 3), OwnNoise(), layers.SpatialDropout2D(0.3)
        )

    found = set()
    for num_replicas in (1, 2, 3):
        training = train(create(), make_split(90), strategy=Mirrored(num_replicas=num_replicas))
        training.run(epochs=2)
        found.add(training.vectors()[0].tobytes())
    assert len(found) == 1


@keras.saving.register_keras_serializable("tests")
class AddsLoss(layers.Layer):
    def build(self, shape):
        self.scale = self.add_weight(shape=(), initializer="ones")

    def call(self, inputs):
        self.add_loss(0.3 * ops.mean(ops.square(inputs * self.scale)))  # of the rows
        self.add_loss(0.2 * self.scale)  # and not of them
        return inputs * self.scale


PENALTIES = {
    "weights": lambda: [layers.Dense(5, kernel_regularizer=keras.regularizers.L2(0.1), bias_regularizer="l1")],
    "outputs": lambda: [layers.Dense(5, activity_regularizer=keras.regularizers.L2(0.1))],
    "layer": lambda: [layers.Dense(5), layers.ActivityRegularization(l1=0.1)],
    "added": lambda: [layers.Dense(5), AddsLoss()],
}


@pytest.mark.parametrize("num_shards", [1, 4])
@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_count_once_whatever_the_shards(name, num_shards):
    split = make_split(64)
    keras.utils.set_random_seed(2)
    model = network(layers.Flatten(), *PENALTIES[name]())
    training = train(model, split, num_shards=num_shards)
    before = training.vectors()[0]
    training.run()
    expected, plain = [], keras.models.clone_model(model)
    for is_penalized in (True, False):
        plain.set_weights(model.get_weights())
        train_plainly(plain, split, training.plan.shuffled(seed=0, epoch=1), penalties=is_penalized)
        expected.append(np.concatenate([variable.numpy().ravel() for variable in plain.trainable_variables]))
    np.testing.assert_allclose(training.vectors()[0], expected[0], rtol=1e-4, atol=1e-5)
    assert np.abs(expected[0] - expected[1]).max() > 1e-2
    assert np.abs(expected[0] - before).max() > 1e-2


def test_loss_scaling_scales_penalties_too():
    split = make_split(64)
    vectors = []
    for overrides in ([], ["precision=mixed_float16", "precision.initial_loss_scale=1024"]):
        keras.utils.set_random_seed(2)
        training = train(network(layers.Flatten(), *PENALTIES["weights"]()), split, *overrides)
        training.run()
        vectors.append(training.vectors()[0])
    np.testing.assert_allclose(vectors[1], vectors[0], atol=5e-3)


@keras.saving.register_keras_serializable("tests")
class Residual(keras.Model):
    """Subclassed, as Keras can save it."""

    def __init__(self, width=8, **options):
        super().__init__(**options)
        self.width = width
        self.flatten, self.drop, self.norm = layers.Flatten(), layers.Dropout(0.3), layers.BatchNormalization()
        self.hidden = layers.Dense(width, activation="relu")
        self.probabilities = layers.Dense(NUM_CLASSES, activation="softmax")

    def get_config(self):
        return {**super().get_config(), "width": self.width}

    def call(self, images, training=False):
        hidden = self.drop(self.hidden(self.flatten(images)), training=training)
        return self.probabilities(self.norm(hidden, training=training))


@pytest.mark.parametrize("overrides", [[], ["precision=mixed_bfloat16"]])
def test_a_subclassed_model(overrides, tmp_path):
    split, vectors = make_split(90), []
    for strategy in (None, Mirrored(num_replicas=2)):
        keras.utils.set_random_seed(1)
        model = Residual()
        model(np.zeros((1, *IMAGE_SHAPE), np.float32))
        training = train(model, split, *overrides, strategy=strategy)
        before = training.vectors()
        training.run()
        vectors.append([vector.tobytes() for vector in training.vectors()])
    assert vectors[0] == vectors[1]
    assert vectors[0][1] != before[1].tobytes()
    training.flat_model.export(*training.vectors()).save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(FlatModel(loaded, image_shape=IMAGE_SHAPE).vectors()[1], training.vectors()[1])
    words = {verdict.layer: verdict.word for verdict in judge_layers(FlatModel(model, image_shape=IMAGE_SHAPE))}
    assert len(words) == 5
    assert set(words.values()) == {"exact"}


# Verdicts


def functional(make):
    pixels = keras.Input(IMAGE_SHAPE)
    return keras.Model(pixels, layers.Dense(NUM_CLASSES, activation="softmax")(layers.Flatten()(make(pixels))))


class Mixes(layers.Layer):
    def call(self, inputs):
        return inputs - ops.mean(inputs, axis=0)


class Draws(layers.Layer):
    def call(self, inputs, training=False):
        return inputs + tf.random.normal(tf.shape(inputs)) if training else inputs


class DrawsUnseeded(layers.Layer):
    def call(self, inputs, training=False):
        return inputs + keras.random.normal(ops.shape(inputs)) if training else inputs


class HidesGenerator(layers.Layer):
    def __init__(self, **options):
        super().__init__(**options)
        self.generators = [keras.random.SeedGenerator(1)]

    def call(self, inputs, training=False):
        return inputs + keras.random.normal(ops.shape(inputs), seed=self.generators[0]) if training else inputs


class Counts(layers.Layer):
    def build(self, shape):
        self.number = self.add_weight(shape=(), trainable=False)

    def call(self, inputs):
        self.number.assign_add(1.0)
        return inputs


class OwnNormalization(layers.BatchNormalization):
    pass


class FailsInTraining(layers.Layer):
    def call(self, inputs, training=False):
        if training:
            raise RuntimeError("no such\nthing")
        return inputs


class Python(layers.Layer):
    def call(self, inputs):
        outputs = tf.numpy_function(lambda values: 2 * values, [inputs], tf.float32)
        return tf.ensure_shape(outputs, inputs.shape)


def twice(layer):
    return lambda x: layer(layer(x))


CHANGES = "depends on the other images, or changes from call to call"
REFUSED = {
    "mixing": (Mixes(), "mixes", CHANGES),
    "drawing": (Draws(), "draws", CHANGES),
    "drawing from Keras' generator": (DrawsUnseeded(), "draws_unseeded", CHANGES),
    "hidden generator": (HidesGenerator(), "hides_generator", CHANGES),
    "mixing by a known layer": (layers.MixUp(), "mix_up", "mixes the images of a batch, and with them those that only"),
    "state": (Counts(), "counts", "changes while training"),
    "spectral": (
        layers.SpectralNormalization(layers.Conv2D(2, 3)),
        "spectral_normalization",
        "changes",
    ),  # one of two reasons, by its first weights
    "derived": (OwnNormalization(), "own_normalization", "derived from BatchNormalization"),
    "renorm": (layers.BatchNormalization(renorm=True), "batch_normalization", "renorm=True"),
    "of images": (layers.BatchNormalization(axis=-1, name="n"), None, None),
    "twice": (twice(layers.BatchNormalization(name="shared")), "shared", "is called twice in a step"),
    "constraint": (layers.Dense(3, kernel_constraint="non_neg", name="d"), "d", "constraint of"),
    "fails": (FailsInTraining(), "fails_in_training", "RuntimeError: no such thing (test_own_model.py, line "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_verdicts_name_the_layer(name):
    make, layer, reason = REFUSED[name]
    verdicts = judge_layers(FlatModel(functional(make)))
    refused = [verdict for verdict in verdicts if verdict.word != "exact"]
    if layer is None:
        assert not refused
        return
    (verdict,) = refused
    assert (verdict.layer, verdict.word) == (layer, "refused")
    assert reason in verdict.reason
    assert all("\n" not in line and "\x1b" not in line for line in format_verdicts(verdicts))


def test_python_is_fast_only():
    config = compose_config("model=keras", "model.factory=a:b").model
    verdicts = judge_layers(FlatModel(functional(Python())))
    assert {verdict.layer: verdict.word for verdict in verdicts if verdict.word != "exact"} == {"python": "fast only"}
    check_verdicts(config, verdicts, is_exact=False)
    with pytest.raises(
        Exception, match=r"^model\.factory=a:b: needs reproducibility=fast: python \(Python\): computes"
    ):
        check_verdicts(config, verdicts, is_exact=True)


ACCEPTED = [
    layers.LayerNormalization(),
    layers.GroupNormalization(groups=1),
    layers.UnitNormalization(),
    layers.BatchNormalization(synchronized=True),
    layers.Normalization(mean=0.1, variance=0.2),
    layers.SeparableConv2D(3, 3),
    layers.Rescaling(2.0),
    layers.ActivityRegularization(l2=0.1),
    lambda x: layers.Add()([layers.Conv2D(1, 3, padding="same")(x), x]),
    lambda x: layers.MultiHeadAttention(2, 3, dropout=0.1)(layers.Reshape((6, 6))(x), layers.Reshape((6, 6))(x)),
    *(make for make in RANDOM.values() if make is not OwnNoise),
]


@pytest.mark.parametrize("make", ACCEPTED, ids=range(len(ACCEPTED)))
def test_layers_that_are_exact(make):
    make = make() if make in RANDOM.values() else make
    verdicts = judge_layers(FlatModel(functional(make)))
    assert {verdict.word for verdict in verdicts} == {"exact"}, format_verdicts(verdicts)


@pytest.mark.parametrize(
    "make", [layers.LayerNormalization, lambda: layers.GroupNormalization(1), layers.UnitNormalization]
)
def test_normalisation_of_each_image_trains_to_the_same_bits(make):
    found = set()
    for num_replicas in (1, 2, 3):
        keras.utils.set_random_seed(1)
        model = network(layers.Conv2D(4, 3), make(), layers.ReLU())
        training = train(model, make_split(90), strategy=Mirrored(num_replicas=num_replicas))
        before = training.vectors()[0]
        training.run()
        found.add(training.vectors()[0].tobytes())
    assert len(found) == 1
    assert before.tobytes() not in found


VARIABLE = tf.Variable(3.0, name="foreign")


def test_a_variable_of_nobody_is_refused():
    class Foreign(layers.Layer):
        def call(self, inputs):
            return inputs * VARIABLE

    with pytest.raises(ValueError, match="uses a variable that is no weight of a layer, so nothing would save it: for"):
        judge_layers(FlatModel(functional(Foreign())))


def test_pretrained_weights(tmp_path):
    config = compose_config("model.hidden_sizes=[5]", "precision=float32")
    shape = {"image_shape": (6, 6), "num_classes": 4}
    first = build_network(config, **shape)
    weights = np.random.default_rng(1).normal(size=first.num_parameters).astype(np.float32)
    first.export(weights).save(tmp_path / "model.keras")
    config.model.pretrained = str(tmp_path / "model.keras")
    np.testing.assert_array_equal(build_network(config, **shape).get_weights(), weights)
    assert not np.array_equal(build_network(config, **shape, is_new=False).get_weights(), weights)
    config.model.hidden_sizes = [6]
    with pytest.raises(Exception, match=r"^model\.pretrained=.*: its network is another one: 209 weights .* here 250"):
        build_network(config, **shape)
    (tmp_path / "model.keras").write_bytes(b"nothing")
    with pytest.raises(Exception, match=r"^model\.pretrained=.*: not a usable model: "):
        build_network(config, **shape)
