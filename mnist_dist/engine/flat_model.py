"""A Keras model as a pure function of one flat weight vector.

With a vector nothing around the network depends on its layers: all gradients travel in one message, and the state of a
training is a few arrays.
"""

import math
import re
import textwrap
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mnist_dist.engine.layers.dropout import PositionalDropout
from mnist_dist.engine.layers.position import BatchPosition, at_position

FloatArray = npt.NDArray[np.float32]


def load_flat_model(path: Path, *, num_pixels: int, num_classes: int) -> "FlatModel":
    """A saved model, after a trial on an image of zeros; raises ValueError if it is not a model of this kind."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = FlatModel(keras.models.load_model(path, compile=False))
            warnings.simplefilter("error", UserWarning)  # for example about inputs with other names
            weights = network.get_weights()
            logits = network.logits(network.split(tf.constant(weights)), tf.zeros((1, num_pixels)))
        if not np.isfinite(weights).all():
            raise ValueError("its weights are not all finite")
        if logits.shape != (1, num_classes):
            raise ValueError(f"it gives the shape {logits.shape} for an image, not (1, {num_classes})")
    except Exception as error:  # Keras, its layers and TensorFlow raise many kinds for unsuitable files
        raise ValueError(_shorten(error)) from error
    return network


def _shorten(error: Exception) -> str:
    """The first sentence of an error, since those of Keras fill pages."""
    sentence = re.split(r"\.(?: (?=[A-Z])|$)", " ".join(str(error).split()))[0]
    return textwrap.shorten(sentence, 200, placeholder=" ...") or type(error).__name__


class FlatModel:
    """A Keras model as a function of its weights, all in one float32 vector in model order, each C-contiguous.

    The model itself stays plain and float32; a twin of it computes. The twin's layers have the dtype policy `policy`,
    its dropout draws by batch position, and its last layer gives logits, since loss and softmax are one numerically
    stable operation in float32.

    Raises:
        ValueError: the model does not end in softmax, has no weights or some that are not float32, or has non-trainable
            weights (batch normalisation's averages, for example): state that this package does not handle.
    """

    def __init__(self, model: keras.Model, *, seed: int = 0, policy: str = "float32") -> None:
        last = model.layers[-1] if getattr(model, "layers", []) else None
        if getattr(last, "activation", None) is not keras.activations.softmax:
            raise ValueError(f"model {model.name} must end in a layer with softmax activation")
        if {variable.dtype for variable in model.weights} != {"float32"}:
            raise ValueError(f"model {model.name} must have weights, all float32")
        self._model = model
        self.compute_dtype = tf.as_dtype(keras.DTypePolicy(policy).compute_dtype)
        # It is called with weights in the type that it computes in; a mixed policy would cast each to float32 and back.
        self._twin = _twin(model, seed=seed, policy=self.compute_dtype.name)
        if state := [variable.path for variable in self._twin.non_trainable_variables]:
            raise ValueError(f"model {model.name} has weights that are not trained: {', '.join(state)}")
        self._shapes = [tuple(variable.shape) for variable in model.trainable_variables]
        self._sizes = [int(np.prod(shape)) for shape in self._shapes]

    @property
    def num_parameters(self) -> int:
        """Length of the weight vector."""
        return sum(self._sizes)

    def weight_kinds(self) -> list[tuple[str, int]]:
        """Kind (one of `WEIGHT_KINDS`) and size of each part of the weight vector, in order."""
        kinds = {
            id(variable): _weight_kind(layer, variable)
            for layer in self._model._flatten_layers()
            for variable in layer._trainable_variables  # its own, without those of layers inside it
        }
        return [(kinds[id(variable)], math.prod(variable.shape)) for variable in self._model.trainable_variables]

    def get_weights(self) -> FloatArray:
        """The model's weights as one vector."""
        return np.concatenate([variable.numpy().reshape(-1) for variable in self._model.trainable_variables])

    def export(self, weights: FloatArray) -> keras.Model:
        """The plain Keras model with these weights."""
        pieces = np.split(weights, np.cumsum(self._sizes)[:-1])
        for variable, piece, shape in zip(self._model.trainable_variables, pieces, self._shapes, strict=True):
            variable.assign(piece.reshape(shape))
        return self._model

    def split(self, weights: tf.Tensor) -> list[tf.Tensor]:
        """The vector as the layers' tensors, in the type that they compute in."""
        starts = np.cumsum([0, *self._sizes])
        # Slices, because unlike the pieces of `tf.split` they share the vector's memory.
        vector = tf.cast(weights, self.compute_dtype)
        pieces = [tf.slice(vector, [start], [size]) for start, size in zip(starts[:-1], self._sizes, strict=True)]
        return [tf.reshape(piece, shape) for piece, shape in zip(pieces, self._shapes, strict=True)]

    def logits(self, weights: list[tf.Tensor], images: tf.Tensor) -> tf.Tensor:
        """Inference: (rows, pixels) -> (rows, num_classes) float32."""
        return self._call(weights, images, training=False)

    def training_logits(self, weights: list[tf.Tensor], images: tf.Tensor, position: BatchPosition) -> tf.Tensor:
        """The same with dropout, for rows at this position of the global batch."""
        with at_position(position):
            return self._call(weights, images, training=True)

    def _call(self, weights: list[tf.Tensor], images: tf.Tensor, *, training: bool) -> tf.Tensor:
        logits, _ = self._twin.stateless_call(weights, [], images, training=training)
        return tf.cast(logits, tf.float32)


def _weight_kind(layer: keras.Layer, variable: keras.Variable) -> str:
    if "Normalization" in type(layer).__name__:
        return "normalization"
    if isinstance(layer, keras.layers.Embedding):
        return "embedding"
    return "bias" if "bias" in variable.name else "kernel"


def _twin(model: keras.Model, *, seed: int, policy: str) -> keras.Model:
    num_dropouts = 0

    def clone_layer(layer: keras.Layer) -> keras.Layer:
        nonlocal num_dropouts
        config: dict[str, Any] = layer.get_config()
        if isinstance(layer, keras.layers.Dropout):
            num_dropouts += 1
            return PositionalDropout(layer.rate, seed=seed, index=num_dropouts, name=layer.name, dtype=policy)
        if layer is model.layers[-1]:
            config["activation"] = "linear"
        config["dtype"] = policy
        return type(layer).from_config(config)

    return keras.models.clone_model(model, clone_function=clone_layer)
