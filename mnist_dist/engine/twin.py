"""The twin of a Keras model: it computes what the model does, but by the position of rows in the global batch.

The twin's layers are those of the model, with another dtype policy. Where what a layer computes while training depends
on more than one row, its `call` is replaced: nothing is left that depends on which device computes which rows.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from mnist_dist.engine.layers.batch_norm import ShardNormalization
from mnist_dist.engine.layers.by_shard import ByShard
from mnist_dist.engine.layers.dropout import PositionalDropout
from mnist_dist.models.factory import first_of

BATCH_NORM = keras.layers.BatchNormalization
_SIXTEEN_BITS = ("float16", "bfloat16")


def create_twin(model: keras.Model, *, seed: int, dtype: str, row_shape: Sequence[int]) -> keras.Model:
    """A copy of a built model with layers that compute in `dtype` and draw by position, for the run's `seed`."""
    with _policy_of_parts(dtype):
        if is_graph(model):
            twin = keras.models.clone_model(model, clone_function=lambda layer: _copy(layer, dtype), recursive=True)
        else:
            twin = _copy(model, dtype)
            for layer in layers_of(twin):
                layer.dtype_policy = _policy(layer, dtype)
            twin(keras.ops.zeros((1, *row_shape), dtype=dtype))  # creates the weights
    for ours, theirs in zip(layers_of(twin), layers_of(model), strict=True):
        ours.trainable = theirs.trainable  # what was frozen after it was made is not in its configuration
    kinds = [[(tuple(one.shape), one.trainable) for one in every.weights] for every in (model, twin)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"a copy of {model.name}, made by get_config and from_config, has other weights")
    _replace_calls(twin, seed=seed)
    return twin


def is_graph(model: keras.Model) -> bool:
    """Whether Keras knows the graph of a model's layers: Sequential or functional, not subclassed."""
    return bool(getattr(model, "inputs", None))


def layers_of(model: keras.Layer) -> list[keras.Layer]:
    """The model and all layers in it, at any depth, each once, in the order in which they were added."""
    found = {model: None}
    for part in model._layers:  # Keras has no public way to those that layers keep in attributes
        found.update(dict.fromkeys(layers_of(part)))
    return list(found)


def _replace_calls(model: keras.Model, *, seed: int) -> None:
    """Replace the `call` of all layers that need it. Random layers are numbered from 1, in the order of the model."""
    index, done = 0, set[int]()
    for layer in layers_of(model):
        if type(layer) is BATCH_NORM:
            layer.call = ShardNormalization(layer)
        elif id(layer) not in done and (generators := _seed_generators(layer)):
            index += 1
            if type(layer) is keras.layers.Dropout and layer.noise_shape is None:
                layer.call = PositionalDropout(layer.rate, seed=seed, index=index)
            else:
                layer.call = ByShard(layer.call, generators, seed=seed, index=index)
                done.update(map(id, layers_of(layer)))


def _seed_generators(layer: keras.Layer) -> list[keras.random.SeedGenerator]:
    """What a layer draws from: its own generators, and then those of the layers in it as well.

    A recurrent layer has none, but its cell keeps what it has drawn from step to step.
    """

    def own(layer: keras.Layer) -> list[keras.random.SeedGenerator]:
        return [value for value in vars(layer).values() if isinstance(value, keras.random.SeedGenerator)]

    is_one = own(layer) or isinstance(layer, keras.layers.RNN)
    return [generator for part in layers_of(layer) for generator in own(part)] if is_one else []


def is_by_shard(model: keras.Model) -> bool:
    """Whether a twin has layers that need whole virtual shards."""
    return any(isinstance(layer.call, ShardNormalization | ByShard) for layer in layers_of(model))


def _copy(layer: keras.Layer, dtype: str) -> keras.Layer:
    """The layer again; raises ValueError if its class does not allow that, and so could not be loaded once saved."""
    kind = type(layer)
    try:
        config: dict[str, Any] = layer.get_config()
        if not isinstance(layer, keras.Layer):  # an operation, as the sum in `x + y`
            return kind.from_config(config)
        return kind.from_config({**config, "dtype": _policy(layer, dtype)})
    except Exception as error:
        advice = "let __init__ take **options and pass them to super().__init__, and get_config return its arguments"
        if kind.__module__.startswith("keras."):
            advice = "write a layer of your own" if isinstance(layer, keras.layers.Lambda) else "use another layer"
        raise ValueError(
            f"{layer.name} ({kind.__name__}): {_first_sentence(first_of(error))}; so the saved model could not be "
            f"loaded either: {advice}"
        ) from error


@contextlib.contextmanager
def _policy_of_parts(dtype: str) -> Iterator[None]:
    """While layers are made that make others: those compute in `dtype`, with weights in float32."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(f"mixed_{dtype}" if dtype in _SIXTEEN_BITS else dtype)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _first_sentence(error: BaseException) -> str:
    return re.split(r"\.(?= [A-Z]|$)", " ".join(str(error).split()))[0]


def _policy(layer: keras.Layer, dtype: str) -> str:
    # Weights come in the type that layers compute in; but moving averages of 8 significant bits would stand still.
    is_mixed = isinstance(layer, BATCH_NORM) and dtype in _SIXTEEN_BITS
    return f"mixed_{dtype}" if is_mixed else dtype
