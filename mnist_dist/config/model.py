"""Keys of `model`: which network, and how large it is."""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from omegaconf import MISSING

from mnist_dist.config.rules import MAX_INT64, Checked, between, check, one_of, ruled

# Listed here rather than looked up in Keras, so that a misspelt one is refused before TensorFlow is imported.
ACTIVATIONS = ("relu", "leaky_relu", "elu", "selu", "gelu", "silu", "softplus", "sigmoid", "tanh", "linear")


INITIALIZERS = tuple(f"{family}_{kind}" for family in ("he", "glorot", "lecun") for kind in ("normal", "uniform"))


# Keras walks through a network recursively, and hits Python's limit at about 500 layers with dropout.
MAX_LAYERS = 400


_WORD = r"[A-Za-z_]\w*"
_SET_BY_CHOICE = "is set by model=...; leave it alone"
_UNKNOWN = "no such network; start your own file with defaults: [mlp], for example"


class LayerSize(NamedTuple):
    """How large a layer is."""

    num_weights: int
    num_outputs: int
    """Of one image."""


@dataclass
class ModelConfig(Checked):
    """The keys of every network; the choices below add their own."""

    section = "model."
    size_keys: ClassVar[tuple[str, ...]]
    """The keys that make the network large or small."""

    name: str = MISSING
    pretrained: str | None = None
    """A `model.keras` whose weights the training starts from; the network must be the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(type(self) is not ModelConfig, "model.name", self.name, _UNKNOWN)

    def layer_sizes(self, image_shape: Sequence[int], num_classes: int) -> list[LayerSize]:
        """The layers with weights, for images of shape (height, width) or (height, width, channels).

        Those that are known: memory is estimated from below, so a choice that does not override this is not refused.
        """
        return []


@dataclass
class BuiltInConfig(ModelConfig):
    """The keys of the networks that come with the package."""

    dropout: float = between(0, 0.9999)
    """Share of units dropped after each hidden layer, on average over the layer's units."""
    activation: str = one_of(*ACTIVATIONS)
    """Activation of the hidden layers."""
    kernel_initializer: str = one_of(*INITIALIZERS)
    """Keras initializer of the hidden layers."""
    output_initializer: str = one_of(*INITIALIZERS)
    """Keras initializer of the softmax layer."""


@dataclass
class MLPConfig(BuiltInConfig):
    """The multilayer perceptron of the recipe."""

    size_keys: ClassVar = ("hidden_sizes",)

    name: str = one_of("mlp", words=_SET_BY_CHOICE)
    hidden_sizes: list[int] = MISSING
    """mlp: units of each hidden layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_layers("model.hidden_sizes", self.hidden_sizes)

    def layer_sizes(self, image_shape: Sequence[int], num_classes: int) -> list[LayerSize]:
        """As the base class says."""
        return _dense_sizes([math.prod(image_shape), *self.hidden_sizes, num_classes])


@dataclass
class CNNConfig(BuiltInConfig):
    """A small convolutional network: one convolution and 2x2 pooling per entry of `filters`, then one dense layer."""

    size_keys: ClassVar = ("filters", "kernel_size", "dense_size")

    name: str = one_of("cnn", words=_SET_BY_CHOICE)
    filters: list[int] = MISSING
    """cnn: channels of each convolution."""
    kernel_size: int = between(1, MAX_INT64)
    """cnn: side of the convolution kernels, in pixels."""
    dense_size: int = between(1, MAX_INT64)
    """cnn: units of the dense layer before the softmax."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_layers("model.filters", self.filters)

    def layer_sizes(self, image_shape: Sequence[int], num_classes: int) -> list[LayerSize]:
        """As the base class says."""
        height, width, channels = (*image_shape, 1)[:3]
        convolutions = []
        for filters in self.filters:
            num_weights = (self.kernel_size**2 * channels + 1) * filters
            convolutions.append(LayerSize(num_weights, height * width * filters))
            height, width, channels = -(-height // 2), -(-width // 2), filters
        return [*convolutions, *_dense_sizes([height * width * channels, self.dense_size, num_classes])]


@dataclass
class KerasConfig(ModelConfig):
    """A network of the user's own, built by a function."""

    size_keys: ClassVar = ("factory", "args")

    name: str = one_of("keras", words=_SET_BY_CHOICE)
    factory: str = ruled(
        lambda value: re.fullmatch(rf"{_WORD}(\.{_WORD})*:{_WORD}", value) is not None,
        "must name the function that builds the network, as package.module:function",
    )
    """keras: `package.module:function`, which returns an uncompiled keras.Model that ends in softmax."""
    args: Any = None
    """keras: arguments of that function, by name."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.args = {} if self.args is None else self.args
        is_by_name = isinstance(self.args, dict) and all(isinstance(name, str) for name in self.args)
        words = "must be arguments by name: 'model.args={NAME: VALUE, ...}'"
        check(is_by_name, "model.args", self.args, words)


def _check_layers(key: str, sizes: list[int]) -> None:
    check(len(sizes) <= MAX_LAYERS, key, sizes, f"{len(sizes)} layers; at most {MAX_LAYERS} are possible")
    valid = all(isinstance(size, int) and 1 <= size <= MAX_INT64 for size in sizes)
    check(valid, key, sizes, f"each must be from 1 to {MAX_INT64}")


def _dense_sizes(sizes: Sequence[int]) -> list[LayerSize]:
    return [LayerSize((inputs + 1) * outputs, outputs) for inputs, outputs in itertools.pairwise(sizes)]
