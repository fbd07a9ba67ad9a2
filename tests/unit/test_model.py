import keras
import numpy as np
import pytest
import tensorflow as tf

from mnist_dist.config.compose import compose_config
from mnist_dist.engine.flat_model import FlatModel, load_flat_model
from mnist_dist.engine.layers.position import BatchPosition, BatchRows
from mnist_dist.models.build import build_model


def build(*overrides: str, image_shape=(28, 28), num_classes=10, seed=0) -> keras.Model:
    return build_model(compose_config(*overrides).model, image_shape=image_shape, num_classes=num_classes, seed=seed)


def test_mlp_is_the_recipe():
    model = build()
    assert model.count_params() == 269_322
    kinds = [type(layer).__name__ for layer in model.layers]
    assert kinds == ["Dense", "Dropout", "Dense", "Dropout", "Dense"]
    first, last = model.layers[0], model.layers[-1]
    assert first.activation is keras.activations.relu
    assert isinstance(first.kernel_initializer, keras.initializers.HeNormal)
    assert isinstance(last.kernel_initializer, keras.initializers.GlorotNormal)
    assert model.layers[1].rate == 0.4


def test_initial_weights_follow_the_seed():
    first, again, other = (FlatModel(build(seed=seed)).get_weights() for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    kernels = [layer.kernel.numpy() for layer in build().layers if hasattr(layer, "kernel")]
    assert abs(kernels[0].std() - np.sqrt(2 / 784)) < 0.002  # he_normal
    assert not np.array_equal(kernels[0][:256], kernels[1])  # layers differ


@pytest.mark.parametrize("shape", [(28, 28), (8, 8), (5, 7), (16, 16, 3)])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_any_image_shape(name, shape):
    model = build(f"model={name}", image_shape=shape, num_classes=3)
    probabilities = model.predict(np.zeros((2, int(np.prod(shape))), np.float32), verbose=0)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("shape", [(28, 28), (8, 8), (5, 7), (16, 16, 3), (1, 1), (9, 4, 2)])
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.hidden_sizes=[]"],
        ["model.hidden_sizes=[7,3,5]"],
        ["model=cnn"],
        ["model=cnn", "model.filters=[]"],
        ["model=cnn", "model.filters=[3,4,5]", "model.kernel_size=5", "model.dense_size=6"],
    ],
    ids=" ".join,
)
def test_layer_sizes_are_those_of_keras(overrides, shape):
    model = build(*overrides, image_shape=shape, num_classes=3)
    sizes = compose_config(*overrides).model.layer_sizes(shape, 3)
    layers = [layer for layer in model.layers if layer.count_params()]
    assert [size.num_weights for size in sizes] == [layer.count_params() for layer in layers]
    assert [size.num_outputs for size in sizes] == [int(np.prod(layer.output.shape[1:])) for layer in layers]


def test_deep_networks_begin_like_shallow_ones():
    """The seeds of the first 64 layers are fixed; more layers do not change them."""
    sizes = {number: "model.hidden_sizes=[" + ",".join(["4"] * number) + "]" for number in (3, 63, 100)}
    kernels = {
        number: [layer.kernel.numpy() for layer in build(key, image_shape=(2, 2), num_classes=4).layers
                 if hasattr(layer, "kernel")]
        for number, key in sizes.items()
    }  # fmt: skip
    assert len(kernels[100]) == 101
    for shallow, deep in ((3, 63), (63, 100)):
        np.testing.assert_array_equal(kernels[shallow][:shallow], kernels[deep][:shallow])
    assert len({kernel.tobytes() for kernel in kernels[100]}) == 101  # all different


def test_the_seeds_of_the_recipe_never_change():
    seeds = np.random.SeedSequence(0).generate_state(64).tolist()
    for layer in (layer for layer in build().layers if hasattr(layer, "kernel")):
        assert layer.kernel_initializer.seed == seeds.pop()


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_network_computes_what_the_model_does(name):
    model = build(f"model={name}")
    network = FlatModel(model)
    images = np.random.default_rng(0).random((5, 784), np.float32)
    weights = network.split(tf.constant(network.get_weights()))
    logits = network.logits(weights, tf.constant(images))
    np.testing.assert_allclose(tf.nn.softmax(logits), model.predict(images, verbose=0), rtol=1e-4, atol=1e-6)


def test_export_takes_the_weights_and_stays_plain_keras(tmp_path):
    network = FlatModel(build())
    weights = np.random.default_rng(0).normal(size=network.num_parameters).astype(np.float32)
    model = network.export(weights)
    np.testing.assert_array_equal(FlatModel(model).get_weights(), weights)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert {type(layer).__module__.split(".")[0] for layer in loaded.layers} == {"keras"}


def test_the_kinds_of_weights():
    """In the order of the vector, also of layers inside layers."""
    layers = keras.layers
    inner = keras.Sequential([keras.Input((8,)), layers.Dense(6), layers.LayerNormalization()])
    model = keras.Sequential(
        [
            *(keras.Input((8,)), layers.Embedding(5, 4), layers.Flatten(), layers.Dense(8, use_bias=False)),
            *(inner, layers.RMSNormalization(), layers.Dense(3, activation="softmax")),
        ]
    )
    assert FlatModel(model).weight_kinds() == [
        *(("embedding", 20), ("kernel", 256), ("kernel", 48), ("bias", 6), ("normalization", 6), ("normalization", 6)),
        *(("normalization", 6), ("kernel", 18), ("bias", 3)),
    ]


def test_dropout_acts_only_in_training_and_by_position():
    network = FlatModel(build())
    weights = network.split(tf.constant(network.get_weights()))
    images = tf.constant(np.random.default_rng(0).random((6, 784), np.float32))

    def at(step: int, row: int, rows: tf.Tensor) -> np.ndarray:
        position = BatchPosition(tf.constant(row, tf.int64), tf.constant(step, tf.int64))
        return network.training_pass(weights, rows, BatchRows(position, tf.ones(len(rows)), len(rows))).logits.numpy()

    whole = at(0, 0, images)
    assert not np.allclose(whole, network.logits(weights, images))
    np.testing.assert_allclose(at(0, 4, images[4:]), whole[4:], rtol=1e-4, atol=1e-5)
    assert not np.allclose(at(1, 0, images), whole)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize(
    ("policy", "dtype"), [("float32", "float32"), ("mixed_float16", "float16"), ("mixed_bfloat16", "bfloat16")]
)
def test_the_precision_policy_reaches_the_layers_that_compute(policy, dtype, name):
    model = build(f"model={name}")
    network = FlatModel(model, policy=policy)
    layers = network.twin.layers
    assert {layer.compute_dtype for layer in layers} == {dtype}
    assert {layer.variable_dtype for layer in layers} == {dtype}  # no layer casts its weights: `split` did, all at once
    assert {layer.compute_dtype for layer in model.layers} == {"float32"}  # what is saved stays plain float32
    weights = network.split(tf.constant(network.get_weights()))
    assert network.logits(weights, tf.zeros([2, 784])).dtype == tf.float32


def test_models_without_softmax_are_refused():
    with pytest.raises(ValueError, match="softmax"):
        FlatModel(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]))


layers = keras.layers


def probabilities(**more):
    return layers.Dense(4, activation="softmax", **more)


def two_inputs():
    inputs = [keras.Input((64,)), keras.Input((64,))]
    return keras.Model(inputs, probabilities()(layers.Concatenate()(inputs)))


def two_outputs():
    pixels = keras.Input((64,))
    return keras.Model(pixels, [probabilities()(pixels), probabilities()(pixels)])


def input_by_name():
    pixels = keras.Input((64,), name="pixels")
    return keras.Model({"pixels": pixels}, probabilities()(pixels))


def frozen():
    hidden = layers.Dense(8)
    model = keras.Sequential([keras.Input((64,)), hidden, probabilities()])
    hidden.trainable = False
    return model


def with_nan():
    model = sequential(probabilities())
    model.layers[0].bias.assign([0, 0, np.nan, 0])
    return model


class OwnLayer(layers.Dense):
    pass


def sequential(*parts, pixels=64):
    return keras.Sequential([keras.Input((pixels,)), *parts])


UNUSABLE = {
    "no softmax": (lambda: sequential(layers.Dense(4)), "must end in a layer with softmax activation"),
    "sigmoid": (lambda: sequential(layers.Dense(4, activation="sigmoid")), "must end in a layer with softmax"),
    "empty": (lambda: keras.Sequential(), "must have weights to train"),
    "other input": (lambda: sequential(probabilities(), pixels=784), "takes inputs of shape (784,), not images of (64"),
    "larger images": (
        lambda: keras.Sequential([keras.Input((8, 9)), layers.Flatten(), probabilities()]),
        "takes inputs of shape (8, 9), not images of (8, 8)",
    ),
    "channels first": (
        lambda: keras.Sequential([keras.Input((3, 8, 8)), layers.Flatten(), probabilities()]),
        "takes inputs of shape (3, 8, 8), not images of (8, 8)",
    ),
    "whole numbers": (
        lambda: keras.Sequential([keras.Input((64,), dtype="int32"), layers.Rescaling(1.0), probabilities()]),
        "takes int32; images are float32",
    ),
    "other classes": (
        lambda: sequential(layers.Dense(10, activation="softmax")),
        "the shape (1, 10) for an image, not",
    ),
    "for each pixel": (
        lambda: sequential(layers.Reshape((64, 1)), probabilities()),
        "gives the shape (1, 64, 4) for an",
    ),
    "two inputs": (two_inputs, "must have one input"),
    "two outputs": (two_outputs, "must end in a layer with softmax activation"),
    "an input by name": (input_by_name, "structure of `inputs` doesn't match the expected structure"),
    "lambda": (lambda: sequential(layers.Lambda(lambda x: 2 * x), probabilities()), "deserialization of a `Lambda`"),
    "a layer of somebody's": (lambda: sequential(OwnLayer(8), probabilities()), "could not be deserialized properly"),
    "float16": (lambda: sequential(probabilities(dtype="float16")), "weights must be float32; "),
    "no weights": (
        lambda: sequential(layers.Reshape((16, 4)), layers.GlobalMaxPooling1D(), layers.Activation("softmax")),
        "must have weights to train",
    ),
    "NaN": (with_nan, "its weights are not all finite"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_model_that_is_not_ours(name, tmp_path, capfd):
    make, problem = UNUSABLE[name]
    path = tmp_path / "model.keras"
    make().save(path)
    capfd.readouterr()
    with pytest.raises(ValueError) as error:
        load_flat_model(path, image_shape=(8, 8), num_classes=4)
    line = str(error.value)
    assert problem in line
    assert "\n" not in line
    assert len(line) < 300
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "make",
    [
        lambda: sequential(probabilities()),
        lambda: sequential(layers.Dense(4), layers.Activation("softmax")),
        lambda: sequential(layers.Dense(4), layers.Softmax()),
        lambda: sequential(sequential(probabilities())),
        lambda: sequential(layers.BatchNormalization(), layers.GaussianNoise(0.1), probabilities()),
        lambda: keras.Sequential([keras.Input((8, 8)), layers.Flatten(), probabilities()]),
        lambda: keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), probabilities()]),
        lambda: keras.Sequential([keras.Input((None, None, 1)), layers.GlobalMaxPooling2D(), probabilities()]),
        frozen,
    ],
    ids=["dense", "activation", "softmax", "nested", "more", "images", "channels", "any size", "frozen"],
)
def test_a_model_that_is_accepted(make, tmp_path):
    model = make()
    model.save(tmp_path / "model.keras")
    network = load_flat_model(tmp_path / "model.keras", image_shape=(8, 8), num_classes=4)
    np.testing.assert_array_equal(network.get_weights(), FlatModel(model, image_shape=(8, 8)).get_weights())
