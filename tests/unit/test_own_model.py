"""Networks of a user's own: what they draw, what they add to the loss, and the verdicts on their layers."""

import functools
import sys
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops
from support.networks import IMAGE_SHAPE, NUM_CLASSES, layers, make_split, network, rows_of, train, train_plainly

from mnist_dist.base.errors import UserError
from mnist_dist.config.compose import compose_config
from mnist_dist.engine.flat_model import FlatModel
from mnist_dist.engine.network import build_network, check_verdicts
from mnist_dist.engine.shards import plan_shards
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


class MixesNeighbours(layers.Layer):
    """Within virtual shards only."""

    def call(self, inputs, training=False):
        pairs = ops.reshape(inputs, (-1, 2, *inputs.shape[1:]))
        return (
            ops.reshape(pairs - ops.mean(pairs, axis=1, keepdims=True), (-1, *inputs.shape[1:])) if training else inputs
        )


class MixesLater(layers.Layer):
    """By a weight that is 0 at first."""

    def build(self, shape):
        self.share = self.add_weight(shape=(), initializer="zeros")

    def call(self, inputs):
        return inputs + self.share * (inputs - ops.mean(inputs, axis=0))


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
    "mixing neighbours": (MixesNeighbours(), "mixes_neighbours", "mixes the images of a batch, and with them those"),
    "mixing later": (MixesLater(), "mixes_later", CHANGES),
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
    "policy": (layers.Dense(3, dtype="mixed_float16", name="d"), "d", "has the dtype policy mixed_float16; precision="),
    "twice": (twice(layers.BatchNormalization(name="shared")), "shared", "is called twice in a step"),
    "constraint": (layers.Dense(3, kernel_constraint="non_neg", name="d"), "d", "constraint of"),
    "fails": (FailsInTraining(), "fails_in_training", "RuntimeError: no such thing (test_own_model.py, line "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_verdicts_name_the_layer(name):
    make, layer, reason = REFUSED[name]
    verdicts = judge_layers(FlatModel(functional(make)))
    (verdict,) = [verdict for verdict in verdicts if verdict.word != "exact"]
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
    lambda x: layers.LSTM(3, dropout=0.1)(layers.Masking()(layers.Reshape((6, 6))(x))),
    lambda x: ops.relu(layers.Dense(1)(x) + 2 * x),
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
    with pytest.raises(UserError, match=r"is another one: weight 1 has the shape \(36, 5\), here \(36, 6\)$"):
        build_network(config, **shape)
    (tmp_path / "model.keras").write_bytes(b"nothing")
    with pytest.raises(Exception, match=r"^model\.pretrained=.*: not a usable model: "):
        build_network(config, **shape)


@keras.saving.register_keras_serializable("tests")
class Pair(layers.Layer):
    """Two layers that only their flags tell apart, one of which is frozen when it is made; and one without weights."""

    def __init__(self, **options):
        super().__init__(**options)
        self.one, self.two = layers.Dense(8), layers.Dense(8)
        self.norm = layers.BatchNormalization(scale=False, center=False)
        self.one.trainable = False

    def build(self, shape):
        for part in (self.one, self.two, self.norm):
            part.build((None, 8) if part is self.norm else shape)
        super().build(shape)

    def call(self, inputs, training=False):
        return self.norm(self.one(inputs) - self.two(inputs), training=training)


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_layers_that_are_frozen_later(precision):
    """Their configuration does not say so."""
    keras.utils.set_random_seed(1)
    pair = Pair()
    model = network(layers.Flatten(), pair)
    pair.one.trainable, pair.two.trainable, pair.norm.trainable = True, False, False
    training = train(model, make_split(64), f"precision={precision}")
    outputs = training.flat_model.logits(
        training.flat_model.split(*map(tf.constant, training.vectors())),
        tf.cast(IMAGES, training.flat_model.compute_dtype),
    )
    np.testing.assert_allclose(
        tf.nn.softmax(outputs), training.flat_model.predict(IMAGES), atol=1e-5 if precision == "float32" else 0.05
    )
    before = [variable.numpy() for variable in (pair.one.kernel, pair.two.kernel, pair.norm.moving_mean)]
    training.run()
    training.flat_model.export(*training.vectors())
    after = [variable.numpy() for variable in (pair.one.kernel, pair.two.kernel, pair.norm.moving_mean)]
    assert [np.array_equal(one, other) for one, other in zip(before, after, strict=True)] == [False, True, True]


@keras.saving.register_keras_serializable("tests")
class Fourier(layers.Layer):
    """Its random numbers are neither weights nor in its configuration."""

    def build(self, shape):
        self.numbers = np.random.default_rng().normal(size=(shape[-1], 5)).astype(np.float32)

    def call(self, inputs):
        return ops.cos(inputs @ self.numbers)


def own(make, *overrides: str):
    """A configuration whose factory is `make`."""
    module = types.ModuleType("own_factories")
    module.make, module.__file__ = make, "own_factories.py"
    sys.modules["own_factories"] = module
    return compose_config("model=keras", "model.factory=own_factories:make", "precision=float32", *overrides)


SHAPE = {"image_shape": IMAGE_SHAPE[:2], "num_classes": NUM_CLASSES}


def test_a_copy_that_is_another_network_is_refused():
    with pytest.raises(
        UserError, match=r"^model\.factory=own_factories:make: cannot be trained: a copy of it, made by"
    ):
        build_network(own(lambda: network(layers.Flatten(), Fourier())), **SHAPE)


def test_the_same_layers_again_are_refused():
    with pytest.raises(UserError, match=r"returns the same layers when it is called again; let it make them anew$"):
        build_network(own(functools.cache(lambda: network(layers.Dense(3)))), **SHAPE)


def test_a_function_that_ends_the_process_is_refused():
    with pytest.raises(
        UserError, match=r"^model\.factory=own_factories:make: fails: SystemExit: 7 \(test_own_model.py"
    ):
        build_network(own(lambda: sys.exit(7)), **SHAPE)


def test_the_message_is_that_of_the_users_error():
    def make():
        try:
            return {}["width"]
        except KeyError:
            raise ValueError("3 is not even") from None

    with pytest.raises(UserError, match=r": fails: ValueError: 3 is not even \(test_own_model\.py, line \d+\)$"):
        build_network(own(make), **SHAPE)


def test_dropout_in_inference_is_refused():
    class MonteCarlo(Residual):
        def call(self, images, training=False):
            return self.probabilities(self.drop(self.flatten(images), training=True))

    with pytest.raises(UserError, match="a layer behaves in inference as if it were training"):
        build_network(own(MonteCarlo), **SHAPE)


@keras.saving.register_keras_serializable("tests")
class Sampling(OwnNoise):
    """As in variational autoencoders."""

    def call(self, inputs, training=False):
        self.add_loss(ops.mean(ops.square(inputs)))
        return super().call(inputs, training=training)


@pytest.mark.parametrize("make", [Sampling, AddsLoss])
def test_losses_of_rows_are_added_shard_by_shard_in_fast_too(make):
    engine_config = own(lambda: network(layers.Flatten(), layers.Dense(5), make()), "reproducibility=fast")
    flat_model = build_network(engine_config, **SHAPE)
    assert flat_model.penalizes_rows
    assert flat_model.is_by_shard
    plan = plan_shards(
        engine_config, 512, num_replicas=1, on_gpu=True, by_shard=True, one_by_one=flat_model.penalizes_rows
    )
    assert plan.calls_of(0) == [range(shard, shard + 1) for shard in range(8)]
    assert plan_shards(engine_config, 512, num_replicas=1, on_gpu=True, by_shard=True).calls_of(0) == [range(8)]


def test_padding_does_not_count_in_losses_of_rows():
    """Nine examples in shards of 8: the second shard has one, and seven rows that only fill it up."""
    split = make_split(9)
    split.images[0] *= 3  # what padding would read otherwise
    keras.utils.set_random_seed(2)
    model = network(layers.Flatten(), layers.Dense(5, activity_regularizer=keras.regularizers.L2(1.0)))
    training = train(model, split, batch_size=16, num_shards=2)
    training.run()
    train_plainly(model, split, training.plan.shuffled(seed=0, epoch=1))
    expected = np.concatenate([variable.numpy().ravel() for variable in model.trainable_variables])
    np.testing.assert_allclose(training.vectors()[0], expected, rtol=1e-4, atol=1e-5)


def test_pretrained_weights_of_a_network_that_is_frozen_now(tmp_path):
    def make(frozen=False):
        model = network(layers.Dense(3, name="base"), layers.BatchNormalization())
        model.get_layer("base").trainable = not frozen
        return model

    first = build_network(own(make), **SHAPE).model
    weights = [np.random.default_rng(1).random(weight.shape) for weight in first.get_weights()]
    first.set_weights(weights)
    first.save(tmp_path / "model.keras")
    second = own(make, "model.args={frozen: true}", f"model.pretrained={tmp_path / 'model.keras'}")
    found = build_network(second, **SHAPE)
    for one, other in zip(found.model.get_weights(), weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    assert len(found.vectors()[1]) == 6 + 6  # averages, and what is frozen


@keras.saving.register_keras_serializable("tests")
class Forgetful(keras.Model):
    """Its `call` does not know whether it is training."""

    def __init__(self, **options):
        super().__init__(**options)
        self.flatten, self.drop = layers.Flatten(), layers.Dropout(0.3, name="drop")
        self.probabilities = layers.Dense(NUM_CLASSES, activation="softmax", name="probabilities")

    def call(self, images):
        return self.probabilities(self.drop(self.flatten(images)))


def test_layers_that_are_not_told_that_they_are_training_say_so():
    model = Forgetful()
    model(np.zeros((1, *IMAGE_SHAPE), np.float32))
    told = network(layers.Dropout(0.3, name="drop"))
    reasons = [
        {one.layer: one.reason for one in judge_layers(FlatModel(one, image_shape=IMAGE_SHAPE))}
        for one in (model, told)
    ]
    assert reasons[0]["drop"].startswith("does as in inference: no `call` above it has the argument training")
    assert reasons[0]["probabilities"] == "each image by itself"
    assert reasons[1]["drop"] == "drops by (seed, step, layer, position in the batch)"
