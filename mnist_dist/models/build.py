"""The networks, in plain Keras."""

import keras
import numpy as np

from mnist_dist.config.model import MAX_LAYERS, BuiltInConfig, CNNConfig, KerasConfig, MLPConfig, ModelConfig
from mnist_dist.models.factory import build_from_factory


def build_model(config: ModelConfig, *, image_shape: tuple[int, ...], num_classes: int, seed: int) -> keras.Model:
    """Build the configured network: float images in 0..1 -> (n, num_classes) softmax probabilities.

    The networks of this package take images as (n, pixels). Raises UserError for a factory that does not build one.
    """
    if isinstance(config, KerasConfig):
        return build_from_factory(config, image_shape=image_shape, seed=seed)
    assert isinstance(config, BuiltInConfig), config
    # A seed per layer with weights, taken from the end: first the 64th to the 1st, then the 65th and so on, an order
    # that keeps the initial weights of earlier versions, which had 64 seeds.
    states = np.random.SeedSequence(seed).generate_state(MAX_LAYERS + 2).tolist()
    seeds = [*reversed(states[64:]), *states[:64]]
    layers = [
        keras.Input((int(np.prod(image_shape)),), name="pixels"),
        *_hidden_layers(config, image_shape, seeds),
        keras.layers.Dense(
            num_classes,
            activation="softmax",
            kernel_initializer=_initializer(config.output_initializer, seeds.pop()),
            name="probabilities",
        ),
    ]
    return keras.Sequential(layers, name=config.name)


def _hidden_layers(config: BuiltInConfig, image_shape: tuple[int, ...], seeds: list[int]) -> list[keras.Layer]:
    if isinstance(config, MLPConfig):
        return _mlp_layers(config, seeds)
    assert isinstance(config, CNNConfig), config
    return _cnn_layers(config, image_shape, seeds)


def _mlp_layers(config: MLPConfig, seeds: list[int]) -> list[keras.Layer]:
    layers = []
    for number, units in enumerate(config.hidden_sizes, start=1):
        layers += [
            _hidden(config, units, seeds, name=f"hidden_{number}"),
            keras.layers.Dropout(config.dropout),
        ]
    return layers


def _cnn_layers(config: CNNConfig, image_shape: tuple[int, ...], seeds: list[int]) -> list[keras.Layer]:
    layers = [keras.layers.Reshape(image_shape if len(image_shape) == 3 else (*image_shape, 1))]
    for number, filters in enumerate(config.filters, start=1):
        convolution = keras.layers.Conv2D(
            filters,
            config.kernel_size,
            padding="same",
            activation=config.activation,
            kernel_initializer=_initializer(config.kernel_initializer, seeds.pop()),
            name=f"convolution_{number}",
        )
        layers += [convolution, keras.layers.MaxPooling2D(padding="same")]
    hidden = _hidden(config, config.dense_size, seeds, name="hidden")
    return [*layers, keras.layers.Flatten(), hidden, keras.layers.Dropout(config.dropout)]


def _hidden(config: BuiltInConfig, units: int, seeds: list[int], *, name: str) -> keras.Layer:
    return keras.layers.Dense(
        units,
        activation=config.activation,
        kernel_initializer=_initializer(config.kernel_initializer, seeds.pop()),
        name=name,
    )


def _initializer(name: str, seed: int) -> keras.Initializer:
    return type(keras.initializers.get(name))(seed=seed)
