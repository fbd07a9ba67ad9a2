"""A Keras model as a pure function of flat vectors: one of the weights that are trained, one of the others.

With vectors nothing around the network depends on its layers: all gradients travel in one message, and the state of a
training is a few arrays.
"""

import inspect
import math
import re
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mnist_dist.engine.layers.averages import Averages
from mnist_dist.engine.layers.position import BatchPosition, BatchRows, computing
from mnist_dist.engine.twin import create_twin, is_by_shard, is_graph, layers_of

FloatArray = npt.NDArray[np.float32]


def load_flat_model(path: Path, *, image_shape: Sequence[int], num_classes: int) -> "FlatModel":
    """A saved model, after a trial on an image of zeros; raises ValueError if it is not a model of this kind."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = keras.models.load_model(path, compile=False, safe_mode=True)  # runs no code of the file's
            if not all(np.isfinite(variable).all() for variable in model.weights):
                raise ValueError("its weights are not all finite")
            network = FlatModel(model, image_shape=image_shape)
            warnings.simplefilter("error", UserWarning)  # for example about inputs with other names
            weights = network.split(*map(tf.constant, network.vectors()))
            logits = network.logits(weights, tf.zeros((1, network.num_pixels)))
        if logits.shape != (1, num_classes):
            raise ValueError(f"it gives the shape {logits.shape} for an image, not (1, {num_classes})")
    except Exception as error:  # Keras, its layers and TensorFlow raise many kinds for unsuitable files
        raise ValueError(_shorten(error)) from error
    return network


def _shorten(error: Exception) -> str:
    """The first sentence of an error, since those of Keras fill pages."""
    sentence = re.split(r"\.(?: (?=[A-Z])|$)", " ".join(str(error).split()))[0]
    return textwrap.shorten(sentence, 200, placeholder=" ...") or type(error).__name__


class Weights(NamedTuple):
    """The vectors as the tensors of the layers."""

    trained: list[tf.Tensor]
    """In the type that the layers compute in."""
    others: list[tf.Tensor]
    """float32: moving averages, and the weights of layers that are not trained."""


class TrainingPass(NamedTuple):
    """What a network computes for some rows of a global batch while training."""

    logits: tf.Tensor
    """(rows, num_classes) float32."""
    penalties: list[tf.Tensor]
    """Scalars: losses that layers add, as regularisation, each a mean over these rows or independent of them."""
    moments: list[tf.Tensor]
    """(num_moments,) float32, sums over these rows for `FlatModel.update_averages`; none without batch normalisation.
    """


class FlatModel:
    """A Keras model as a function of its weights, in float32 vectors in model order, each weight C-contiguous.

    The model itself stays plain and float32; a twin of it computes (`engine.twin`), with the dtype policy `policy`. It
    gives logits, since loss and softmax are one numerically stable operation in float32.

    Raises:
        ValueError: the model does not end in softmax, or has no weights or some that are not float32.
    """

    def __init__(
        self,
        model: keras.Model,
        *,
        image_shape: Sequence[int] | None = None,
        seed: int = 0,
        policy: str = "float32",
    ) -> None:
        """Wrap a built model, for images of `image_shape`, by default of the shape of its input."""
        if not model.trainable_variables:
            raise ValueError(f"model {model.name} must have weights to train")
        if others := [variable for variable in model.weights if variable.dtype != "float32"]:
            raise ValueError(f"weights must be float32; {others[0].path} is {others[0].dtype}")
        self.model = model
        """The plain Keras model."""
        self.compute_dtype = tf.as_dtype(keras.DTypePolicy(policy).compute_dtype)
        self._row_shape = _row_shape(model, image_shape)
        _check_ends_in_softmax(model, self._row_shape)
        # It is called with weights in the type that it computes in; a mixed policy would cast each to float32 and back.
        self.twin = create_twin(model, seed=seed, dtype=self.compute_dtype.name, row_shape=self._row_shape)
        """What computes."""
        self._caller = self.twin if is_graph(model) else _Caller(self.twin)
        self._trained = _Layout(model.trainable_variables)
        self._others = _Layout(model.non_trainable_weights)
        self._averages = Averages(self.twin, layers_of(self.twin))
        self.penalizes_rows = self._penalizes_rows()
        """Whether layers add losses that may depend on the rows, a mean over those of a call."""
        self.is_by_shard = self.penalizes_rows or is_by_shard(self.twin)
        """Whether it must be called for whole virtual shards."""

    def _penalizes_rows(self) -> bool:
        parts = layers_of(self.model)
        if all(type(one).__module__.startswith("keras.") and one.activity_regularizer is None for one in parts):
            return False
        position = BatchPosition(tf.constant(0, tf.int64), tf.constant(0, tf.int64))
        weights = self.split(*map(tf.constant, self.vectors()))
        images = tf.zeros((2, self.num_pixels), self.compute_dtype)
        try:
            penalties = self.training_pass(weights, images, BatchRows(position, tf.ones(2), 2)).penalties
        except Exception:  # whoever trains it will hear of it
            return True
        return len(penalties) > sum(one.regularizer is not None for one in self.twin.trainable_weights)

    @property
    def num_parameters(self) -> int:
        """Length of the vector of the weights that are trained."""
        return self._trained.size

    @property
    def num_moments(self) -> int:
        """Length of `TrainingPass.moments`; 0 without batch normalisation."""
        return self._averages.num_moments

    @property
    def num_pixels(self) -> int:
        """Numbers in an image."""
        return math.prod(self._row_shape)

    @property
    def num_sums(self) -> int:
        """Numbers that a step reduces: the gradient, two metrics, and moments."""
        return self.num_parameters + 2 + self.num_moments

    def weight_kinds(self) -> list[tuple[str, int]]:
        """Kind (one of `WEIGHT_KINDS`) and size of each part of the weight vector, in order."""
        kinds = {
            id(variable): _weight_kind(layer, variable)
            for layer in layers_of(self.model)
            for variable in layer._trainable_variables  # its own, without those of layers inside it
        }
        return [(kinds[id(variable)], math.prod(variable.shape)) for variable in self.model.trainable_variables]

    def get_weights(self) -> FloatArray:
        """The model's trained weights as one vector."""
        return _join(self.model.trainable_variables)

    def vectors(self) -> list[FloatArray]:
        """The trained weights; then the others, if there are any."""
        others = self.model.non_trainable_weights
        return [self.get_weights(), *([_join(others)] if others else [])]

    def export(self, *vectors: FloatArray) -> keras.Model:
        """The plain Keras model with these weights, as `vectors` returns them; without the others, those stay."""
        kinds = (self.model.trainable_variables, self._trained), (self.model.non_trainable_weights, self._others)
        for (variables, layout), vector in zip(kinds, vectors, strict=False):
            for variable, piece in zip(variables, layout.split(vector), strict=True):
                variable.assign(piece)
        return self.model

    def split(self, *vectors: tf.Tensor) -> Weights:
        """The vectors as the layers' tensors."""
        weights, *others = vectors
        # Cast all at once, into the type that the layers compute in.
        trained = self._trained.split(tf.cast(weights, self.compute_dtype))
        return Weights(trained, self._others.split(others[0]) if others else [])

    def logits(self, weights: Weights, images: tf.Tensor) -> tf.Tensor:
        """Inference: (rows, pixels) -> (rows, num_classes) float32."""
        probabilities, *_ = self._call(weights, images, training=False)
        return _logits_of(probabilities)

    def predict(self, images: FloatArray) -> FloatArray:
        """What the plain Keras model gives: (n, pixels) -> (n, num_classes) probabilities."""
        return np.asarray(self.model(images.reshape(-1, *self._row_shape), training=False))

    def training_pass(self, weights: Weights, images: tf.Tensor, rows: BatchRows) -> TrainingPass:
        """What the network computes while training, for these rows of the global batch.

        Raises:
            ValueError: a layer changes a state of its own, which nothing would keep alike on all devices.
        """
        with computing(rows):
            probabilities, changed, losses = self._call(weights, images, training=True, return_losses=True)
        if unknown := [variable.path for variable in changed if id(variable) not in rows.seeded]:
            raise ValueError(f"{unknown[0]} changes while training, and not in a way that is known")
        penalties = [tf.cast(loss, tf.float32) for loss in losses]
        return TrainingPass(_logits_of(probabilities), penalties, self._averages.join(rows.moments))

    def update_averages(self, others: tf.Tensor, moments: tf.Tensor) -> tf.Tensor:
        """The vector of the other weights after a step, from the moments of all shards / number of examples."""
        return self._averages.update(others, moments)

    def _call(self, weights: Weights, images: tf.Tensor, **options: bool) -> tuple[Any, ...]:
        own = dict(zip(map(id, self.twin.non_trainable_weights), weights.others, strict=True))
        # The rest are states of random generators, which are set when layers are called.
        variables = self._caller.non_trainable_variables
        before = [
            tf.cast(own.get(id(variable), tf.zeros(variable.shape, variable.dtype)), variable.dtype)
            for variable in variables
        ]
        rows = images if len(self._row_shape) == 1 else tf.reshape(images, [-1, *self._row_shape])
        outputs, after, *losses = self._caller.stateless_call(weights.trained, before, rows, **options)
        changed = [variable for variable, old, new in zip(variables, before, after, strict=True) if new is not old]
        return outputs, changed, *losses


class _Caller(keras.Layer):  # type: ignore[misc]
    """Calls a subclassed model as a user does: `stateless_call` would tell only the model itself that it is training.

    Then the layers inside know it too, if the model's `call` does not tell them; a `call` may do without `training`.
    """

    def __init__(self, model: keras.Model) -> None:
        super().__init__(dtype=model.dtype_policy)
        self.model, self.built = model, True
        self._takes_training = "training" in inspect.signature(model.call).parameters

    def call(self, rows: tf.Tensor, training: bool = False) -> tf.Tensor:
        return self.model(rows, training=training) if self._takes_training else self.model(rows)


class _Layout:
    """How a vector is cut into weights."""

    size: int

    def __init__(self, variables: Sequence[keras.Variable]) -> None:
        self._shapes = [tuple(variable.shape) for variable in variables]
        self._sizes = [math.prod(shape) for shape in self._shapes]
        self.size = sum(self._sizes)

    def split(self, vector: tf.Tensor) -> list[tf.Tensor]:
        starts = np.cumsum([0, *self._sizes])[:-1]
        # Slices, because unlike the pieces of `tf.split` they share the vector's memory.
        pieces = [tf.slice(vector, [start], [size]) for start, size in zip(starts, self._sizes, strict=True)]
        return [tf.reshape(piece, shape) for piece, shape in zip(pieces, self._shapes, strict=True)]


def _join(variables: Sequence[keras.Variable]) -> FloatArray:
    return np.concatenate([variable.numpy().reshape(-1) for variable in variables])


def _weight_kind(layer: keras.Layer, variable: keras.Variable) -> str:
    if "Normalization" in type(layer).__name__:
        return "normalization"
    if isinstance(layer, keras.layers.Embedding):
        return "embedding"
    return "bias" if "bias" in variable.name else "kernel"


def _row_shape(model: keras.Model, image_shape: Sequence[int] | None) -> tuple[int, ...]:
    """In which shape the model takes an image; raises ValueError for an input that images do not fit."""
    if not is_graph(model):  # nothing says what it takes
        return (*(image_shape or ()), 1)[:3]
    if len(model.inputs) != 1 or not isinstance(model.input_shape, tuple):
        raise ValueError(f"model {model.name} must have one input")
    shape, dtype = model.input_shape[1:], model.inputs[0].dtype
    if not dtype.startswith("float"):
        raise ValueError(f"model {model.name} takes {dtype}; images are float32, from 0 to 1")
    if image_shape is None:
        return tuple(shape)
    if len(shape) == 1:
        image_shape = (math.prod(image_shape),)
    sizes = [size for size in image_shape if size != 1]
    given = [size for size in shape if size != 1]
    if len(given) != len(sizes) or any(own not in (None, size) for own, size in zip(given, sizes, strict=True)):
        raise ValueError(f"model {model.name} takes inputs of shape {tuple(shape)}, not images of {tuple(image_shape)}")
    found = iter(sizes)
    return tuple(1 if size == 1 else next(found) for size in shape)


def _check_ends_in_softmax(model: keras.Model, row_shape: Sequence[int]) -> None:
    noise = np.random.default_rng(0).random((2, *row_shape), np.float32)
    probabilities = model(noise, training=False)
    if not np.allclose(probabilities, tf.nn.softmax(_logits_of(probabilities)), atol=1e-4, equal_nan=True):
        raise ValueError(_NO_SOFTMAX)


_NO_SOFTMAX = "the model must end in a layer with softmax activation"


def _logits_of(probabilities: tf.Tensor) -> tf.Tensor:
    """What Keras' softmax was computed from, which Keras keeps for its own cross-entropy."""
    logits = getattr(probabilities, "_keras_logits", None)
    if logits is None:
        raise ValueError(_NO_SOFTMAX)
    return tf.cast(logits, tf.float32)
