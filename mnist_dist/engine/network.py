"""From the configuration to the network that is trained: built, tried, with its first weights."""

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from mnist_dist.base.console import job_log
from mnist_dist.base.errors import UserError
from mnist_dist.base.files import expand_path
from mnist_dist.config.model import KerasConfig
from mnist_dist.config.train import TrainConfig
from mnist_dist.engine.flat_model import FlatModel, Weights, load_flat_model
from mnist_dist.engine.footprint import check_network_fits
from mnist_dist.engine.verdicts import Verdict, judge_layers, objection
from mnist_dist.models.build import build_model
from mnist_dist.models.factory import count_weights, last_line

_FLOAT32_BYTES = 4


def build_network(
    config: TrainConfig, *, image_shape: Sequence[int], num_classes: int, is_new: bool = True
) -> FlatModel:
    """The network with its first weights, those of `model.pretrained` if that is given and the run is new.

    Raises:
        UserError: a network of the user's own cannot be built or trained, or pretrained weights do not belong to it.
    """
    if isinstance(config.model, KerasConfig):
        network, verdicts = try_own_network(config, image_shape=image_shape, num_classes=num_classes)
        check_verdicts(config.model, verdicts, is_exact=config.reproducibility == "exact")
    else:
        network = _wrap(config, image_shape=image_shape, num_classes=num_classes)
    if config.model.pretrained is not None and is_new:
        load_pretrained(network, config.model.pretrained, image_shape=image_shape, num_classes=num_classes)
    return network


def try_own_network(
    config: TrainConfig, *, image_shape: Sequence[int], num_classes: int
) -> tuple[FlatModel, list[Verdict]]:
    """The network that the user's function builds, after a trial, with the verdicts on its layers; raises UserError."""
    model = config.model
    assert isinstance(model, KerasConfig), model
    num_weights = count_weights(model, image_shape=tuple(image_shape))
    if num_weights is not None:
        check_network_fits(config, num_weights)
    try:
        network = _wrap(config, image_shape=image_shape, num_classes=num_classes)
        weights = network.split(*map(tf.constant, network.vectors()))
        _check_twin(network, weights)
        shape = network.logits(weights, tf.zeros((1, network.num_pixels), network.compute_dtype)).shape
        if shape != (1, num_classes):
            raise ValueError(f"its output for an image has the shape {shape[1:]}; the data has {num_classes} classes")
        return network, judge_layers(network)
    except UserError:
        raise
    except Exception as error:  # of Keras, of TensorFlow, of the user's layers
        is_ours = type(error) is ValueError and "\n" not in str(error)
        reason = str(error) if is_ours else last_line(error)
        raise UserError(f"model.factory={model.factory}: cannot be trained: {reason}") from error


def describe_network(config: TrainConfig, network: FlatModel) -> str:
    """Which network a function of the user's own has built, as one word; empty for the networks of this package."""
    if not isinstance(config.model, KerasConfig):
        return ""
    sizes = "+".join(str(len(vector)) for vector in network.vectors())
    return f"{sizes}:{hashlib.sha256(network.model.to_json().encode()).hexdigest()}"


def check_same_network(config: TrainConfig, network: FlatModel, saved: str) -> None:
    """Compare a network with that of the run to resume; warns if Keras describes it differently.

    Raises:
        UserError: it has other numbers of weights.
    """
    factory = f"model.factory={getattr(config.model, 'factory', '')}"
    ours = describe_network(config, network)
    here, there = (text.partition(":")[0] for text in (ours, saved))
    if here != there:
        raise UserError(
            f"{factory}: builds a network with {here} weights now (to train + others); that of the run to resume has "
            f"{there}; name another run_dir"
        )
    if ours != saved:
        job_log.warning(
            "WARNING: %s: builds another network than when this run was last saved (or Keras describes it differently "
            "now); the training goes on with this one",
            factory,
        )


def check_verdicts(config: KerasConfig, verdicts: Sequence[Verdict], *, is_exact: bool) -> None:
    """Raise UserError, naming the layers, if some are refused, or are fast only and the training is to be exact."""
    if refused := objection(verdicts, "refused"):
        raise UserError(f"model.factory={config.factory}: cannot be trained: {refused}")
    if is_exact and (fast_only := objection(verdicts, "fast only")):
        raise UserError(f"model.factory={config.factory}: needs reproducibility=fast: {fast_only}")


def _check_twin(network: FlatModel, weights: Weights) -> None:
    """Raise ValueError if the network's copy is another network: then so is what is loaded once it is saved."""
    images = np.random.default_rng(0).random((8, network.num_pixels), np.float32)
    probabilities = tf.nn.softmax(network.logits(weights, tf.cast(images, network.compute_dtype)))
    tolerance = 1e-3 if network.compute_dtype.size >= _FLOAT32_BYTES else 0.1
    if not np.allclose(probabilities, network.predict(images), atol=tolerance):
        raise ValueError(
            "a copy of it, made by get_config and from_config, computes something else: a layer keeps something that "
            "is neither a weight nor in its configuration"
        )


def _wrap(config: TrainConfig, *, image_shape: Sequence[int], num_classes: int) -> FlatModel:
    model = build_model(config.model, image_shape=tuple(image_shape), num_classes=num_classes, seed=config.seed)
    return FlatModel(model, image_shape=image_shape, seed=config.seed, policy=config.precision.name)


def load_pretrained(network: FlatModel, name: str, *, image_shape: Sequence[int], num_classes: int) -> None:
    """Give the network the weights of a saved model; raises UserError if they do not belong to it."""
    path: Path = expand_path("model.pretrained", name)
    try:
        found = load_flat_model(path, image_shape=image_shape, num_classes=num_classes)
    except ValueError as error:
        raise UserError(f"model.pretrained={path}: not a usable model: {error}") from error
    ours, theirs = ([tuple(variable.shape) for variable in one.model.weights] for one in (network, found))
    if ours != theirs:
        pairs = itertools.zip_longest(ours, theirs)
        number, (here, there) = next((number, pair) for number, pair in enumerate(pairs, start=1) if pair[0] != pair[1])
        raise UserError(
            f"model.pretrained={path}: its network is another one: weight {number} has the shape {there or 'of none'}, "
            f"here {here or 'of none'}"
        )
    network.model.set_weights(found.model.get_weights())
