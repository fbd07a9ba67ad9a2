"""Whether a network of the user's own trains the same on any number of devices: a verdict for every layer.

A layer is not judged by its name but by what it does. The network is called for two virtual shards at once, and each
layer also for one after the other: it must give the same. Then a training step is traced, and nothing may be in it that
depends on anything but its arguments. What depends on more than one row in a way that is known has been replaced before
(`engine.twin`).
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from mnist_dist.engine.flat_model import FlatModel
from mnist_dist.engine.layers.batch_norm import ShardNormalization
from mnist_dist.engine.layers.by_shard import ByShard
from mnist_dist.engine.layers.dropout import PositionalDropout
from mnist_dist.engine.layers.position import BatchPosition, BatchRows, computing, current_rows
from mnist_dist.engine.twin import BATCH_NORM, layers_of
from mnist_dist.models.factory import last_line

Word = Literal["exact", "fast only", "refused"]
_SHARDS, _ROWS_PER_SHARD = 2, 8
_STEPS = 3  # a random layer may change nothing now and then
_NUM_ROWS = _SHARDS * _ROWS_PER_SHARD
# Operations whose result depends on a hidden state, or on Python.
_HIDDEN_STATE = (
    *("Random", "Stateful", "TruncatedNormal", "ParameterizedTruncatedNormal", "Multinomial", "FractionalMaxPool"),
    *("FractionalAvgPool", "SampleDistortedBoundingBox", "Timestamp", "AllCandidateSampler", "LogUniformCandidate"),
)
_IDLE = "does as in inference: no `call` above it has the argument training, or passes it on"


@dataclass(frozen=True)
class Verdict:
    """About one layer."""

    layer: str
    kind: str
    num_weights: int
    word: Word
    """exact: trains bit-identically on any number of devices; fast only: with reproducibility=fast; refused."""
    reason: str


def judge_layers(network: FlatModel) -> list[Verdict]:
    """The verdicts on all layers of a network, in the order of the model.

    Raises:
        ValueError: it cannot be trained because of something that is not due to one layer.
    """
    pairs = zip(layers_of(network.model), layers_of(network.twin), strict=True)
    layers = {layer: twin for layer, twin in pairs if not isinstance(layer, keras.Model | keras.layers.InputLayer)}
    names = Counter(layer.name for layer in set(network.model.layers))
    found = {twin: reason for layer, twin in layers.items() if (reason := _refuse_at_sight(layer, names))}
    refused, idle = (found, set()) if found else _try_out(network, list(layers.values()))
    python = {} if refused else _find_python(network, list(layers.values()))
    return [
        Verdict(
            layer.name,
            type(layer).__name__,
            _count_weights(layer),
            "refused" if twin in refused else "fast only" if twin in python else "exact",
            refused.get(twin) or python.get(twin) or (_IDLE if twin in idle else _describe(twin)),
        )
        for layer, twin in layers.items()
    ]


def format_verdicts(verdicts: Sequence[Verdict]) -> list[str]:
    """A table, line by line."""
    rows = [("layer", "kind", "weights", "verdict", "why")]
    rows += [(one.layer, one.kind, f"{one.num_weights:,}", one.word, one.reason) for one in verdicts]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {weights:>{widths[2]}}  {word:<{widths[3]}}  {reason}"
        for name, kind, weights, word, reason in rows
    ]


def objection(verdicts: Sequence[Verdict], *words: Word) -> str:
    """Which layers have one of these verdicts, and why; empty if none has."""
    return "; ".join(f"{one.layer} ({one.kind}): {one.reason}" for one in verdicts if one.word in words)


def _count_weights(layer: keras.Layer) -> int:
    return sum(math.prod(variable.shape) for variable in layer.weights)


def _describe(layer: keras.Layer) -> str:
    """Why a layer is exact."""
    if not layer.trainable and _count_weights(layer):
        return "is not trained"
    if isinstance(layer.call, PositionalDropout):
        return "drops by (seed, step, layer, position in the batch)"
    if isinstance(layer.call, ShardNormalization):
        return "statistics of each virtual shard"
    if isinstance(layer.call, ByShard):
        return "draws by (seed, step, layer, virtual shard)"
    return "each image by itself"


def _refuse_at_sight(layer: keras.Layer, names: Counter[str]) -> str:
    """Why a layer cannot be trained, as far as its configuration shows that; empty if it does not."""
    if names[layer.name] > 1:
        return "has the name of another layer"
    if isinstance(layer, BATCH_NORM):
        if type(layer) is not BATCH_NORM:
            return "is a class of its own derived from BatchNormalization"
        if getattr(layer, "renorm", False):
            return "renorm=True depends on the moving averages while training"
        if layer.axis % layer.input_spec.ndim == 0:
            return "axis=0 is that of the images"
    if layer.dtype_policy.name != "float32":
        return f"has the dtype policy {layer.dtype_policy.name}; precision= says in what layers compute"
    if constrained := [variable.path for variable in layer.trainable_variables if variable.constraint is not None]:
        return f"the constraint of {constrained[0]} would not be applied"
    return ""


class _Probe:
    """Takes the place of a `call`: compares what a layer gives for all rows with what it gives shard by shard."""

    def __init__(self, layer: keras.Layer, found: dict[keras.Layer, str]) -> None:
        self._call = layer.call
        self._layer = layer
        self._normalizes = any(isinstance(part.call, ShardNormalization) for part in layers_of(layer))
        self._found = found
        self.is_idle = isinstance(self._call, PositionalDropout | ByShard | ShardNormalization)
        """Whether it does something while training, and was never told that it is."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        rows, calls = current_rows(), Counter(current_rows().num_calls)
        self.is_idle &= not options.get("training", any(value is True for value in args))
        try:
            outputs = self._call(*args, **options)
            parts = []
            for part, own in zip(rows.slices(), rows.shards(), strict=True):
                with computing(replace(own, num_calls=Counter(calls))):
                    parts.append(self._call(*rows.cut(args, part), **rows.cut(options, part)))
            if not self._keeps_images_apart(args, options, calls):
                self._found[self._layer] = "mixes the images of a batch, and with them those that only fill it up"
            if not _are_close(outputs, tf.nest.map_structure(lambda *own: tf.concat(own, axis=0), *parts)):
                self._found[self._layer] = (
                    "what it gives for an image depends on the other images, or changes from call to call"
                )
        except Exception as error:
            self._found.setdefault(self._layer, last_line(error))
            raise
        return outputs

    def _keeps_images_apart(self, args: Any, options: Any, calls: Counter[int]) -> bool:
        """Whether another last image changes nothing for the first ones of a shard; batch normalisation knows which."""
        if self._normalizes:
            return True
        rows, outputs = current_rows(), []
        first = rows.shards()[0]
        for blank in (False, True):

            def take(values: Any, blank: bool = blank) -> Any:
                part = rows.cut(values, rows.slices()[0])
                return tf.nest.map_structure(lambda own: _without_last(own) if blank else own, part)

            with computing(replace(first, num_calls=Counter(calls))):
                outputs.append(self._call(*take(args), **take(options)))
        return _are_close(*(tf.nest.map_structure(lambda own: own[:-1], one) for one in outputs))


def _without_last(values: Any) -> Any:
    """The same with zeros in the last row, if there are rows."""
    has_rows = tf.is_tensor(values) and values.shape.rank and values.shape[0] == _ROWS_PER_SHARD
    return tf.concat([values[:-1], tf.zeros_like(values[-1:])], axis=0) if has_rows else values


def _are_close(ones: Any, others: Any) -> bool:
    pairs = zip(tf.nest.flatten(ones), tf.nest.flatten(others), strict=True)
    return all(one.shape == other.shape and np.allclose(one, other, rtol=1e-3, atol=1e-4) for one, other in pairs)


def _try_out(network: FlatModel, layers: Sequence[keras.Layer]) -> tuple[dict[keras.Layer, str], set[keras.Layer]]:
    """What is wrong with layers when the network is called; and which are not told that they are training."""
    found: dict[keras.Layer, str] = {}
    calls = [layer.call for layer in layers]
    probes = [_Probe(layer, found) for layer in layers]
    for layer, probe in zip(layers, probes, strict=True):
        layer.call = probe
    try:
        for step in range(_STEPS):
            network.training_pass(*_arguments(network, step))
    except Exception as error:
        owners = (layer for layer in layers for one in layer.variables if one.path in str(error))
        if not found and (owner := next(owners, None)) is None:
            raise
        if not found:
            found[owner] = str(error)
    finally:
        for layer, call in zip(layers, calls, strict=True):
            layer.call = call
    return found, {layer for layer, probe in zip(layers, probes, strict=True) if probe.is_idle}


def _arguments(network: FlatModel, step: int = 0) -> tuple[Any, ...]:
    noise = np.random.default_rng(step)
    images = noise.random((_NUM_ROWS, network.num_pixels), np.float32)
    position = BatchPosition(tf.constant(0, tf.int64), tf.constant(step, tf.int64))
    rows = BatchRows(position, tf.ones(_NUM_ROWS), _ROWS_PER_SHARD)
    # Not the initial weights: a zero among them may hide what a layer does.
    weights = network.split(*(vector + noise.random(len(vector), np.float32) / 8 for vector in network.vectors()))
    return weights, tf.cast(images, network.compute_dtype), rows


def _find_python(network: FlatModel, layers: Sequence[keras.Layer]) -> dict[keras.Layer, str]:
    """Layers that compute in Python; raises ValueError where a step depends on a hidden state."""
    weights, images, rows = _arguments(network)

    def step(weights: Any, images: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(weights.trained)
            found = network.training_pass(weights, images, rows)
        return tape.gradient([found.logits, *found.penalties], weights.trained)

    graph = tf.function(step, autograph=False).get_concrete_function(weights, images).graph
    if graph.variables:
        names = ", ".join(variable.name for variable in graph.variables)
        raise ValueError(f"uses a variable that is no weight of a layer, so nothing would save it: {names}")
    definition = graph.as_graph_def(add_shapes=False)
    nodes = [*definition.node, *(node for function in definition.library.function for node in function.node_def)]
    if hidden := [node for node in nodes if node.op.startswith(_HIDDEN_STATE)]:
        raise ValueError(f"{hidden[0].name} ({hidden[0].op}) draws from a generator whose state nothing saves")
    python = [re.sub(r"_\d+(?=/|$)", "", node.name).split("/") for node in nodes if "PyFunc" in node.op]
    if not python:
        return {}
    guilty = [layer for layer in layers if any(re.sub(r"_\d+$", "", layer.name) in path for path in python)]
    return dict.fromkeys(guilty or layers, "computes in Python, whose bits TensorFlow does not vouch for")
