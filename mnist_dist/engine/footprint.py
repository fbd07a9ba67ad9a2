"""What a training holds in memory at least, so that what cannot fit is refused before it is built."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mnist_dist.base.errors import UserError
from mnist_dist.base.memory import describe_bytes, usable_memory
from mnist_dist.config.data import DataConfig
from mnist_dist.config.rules import shorten
from mnist_dist.config.train import TrainConfig
from mnist_dist.data.dataset import ImageDataset
from mnist_dist.engine.batches import BatchPlan
from mnist_dist.launch.gpus import own_uuids
from mnist_dist.launch.topology import Topology

_FLOAT32 = 4
NETWORK, IMAGES, LABELS, CONFUSION, OUTPUTS = (
    "network", "images", "one-hot labels", "confusion matrices", "outputs of the layers",
)  # fmt: skip
Footprint = Mapping[str, int]
"""Bytes of each thing held in memory at one moment."""


def check_fits(config: TrainConfig, dataset: ImageDataset, topology: Topology) -> None:
    """Raise UserError if the training cannot fit into the memory that this process may use."""
    num_classes = len(np.unique(dataset.y_train))
    moments = training_moments(config, dataset, num_classes=num_classes, world_size=topology.world_size)
    largest = max(moments, key=lambda moment: sum(moment.values()))
    if sum(largest.values()) > usable_memory() and _has_gpus(topology):  # most of it is in the GPUs' memory
        largest = data_moment(dataset, num_classes=num_classes)
    model = config.model
    if max(largest, key=lambda name: largest[name]) in (NETWORK, OUTPUTS):
        layers = model.layer_sizes(dataset.x_train.shape[1:], num_classes)
        num_parameters = sum(layer.num_weights for layer in layers)
        _refuse_unless_it_fits(largest, f"{_describe_network(config)} has {num_parameters:,} parameters")
    else:
        check_data_fits(config.data, dataset, moment=largest)


def check_data_fits(config: DataConfig, dataset: ImageDataset, *, moment: Footprint | None = None) -> None:
    """Raise UserError if the data (by default while it is prepared) cannot fit into this process's memory."""
    num_classes = len(np.unique(dataset.y_train))
    where = f"data={config.name}" if config.path is None else f"data.path={config.path}"
    what = f"{where}: {len(dataset.x_train) + len(dataset.x_test):,} images in {num_classes:,} classes"
    _refuse_unless_it_fits(moment or data_moment(dataset, num_classes=num_classes), what)


def check_network_fits(config: TrainConfig, num_weights: int) -> None:
    """Raise UserError if a network of that many weights cannot fit into this process's memory, whatever the data."""
    _refuse_unless_it_fits(
        _network_moment(config, num_weights), f"{_describe_network(config)} has {num_weights:,} parameters"
    )


def _describe_network(config: TrainConfig) -> str:
    sizes = {key: getattr(config.model, key) for key in config.model.size_keys}
    given = " ".join(f"model.{key}={shorten(value)}" for key, value in sizes.items() if value != {})
    return f"{given}: the network"


def _network_moment(config: TrainConfig, num_weights: int) -> Footprint:
    """Always: the model, its twin, `TrainState`, and the 64-bit factors of `ReplicaCheck`."""
    vectors = 1 + config.optimizer.num_slots  # like the weights
    bytes_each = 2 if "16" in config.precision.name else _FLOAT32
    return {NETWORK: num_weights * (_FLOAT32 * (1 + vectors + 2 * vectors) + bytes_each)}


def _refuse_unless_it_fits(moment: Footprint, what: str) -> None:
    total, limit = sum(moment.values()), usable_memory()
    if total > limit:
        parts = sorted(((size, name) for name, size in moment.items()), reverse=True)
        listed = ", ".join(f"{name} {describe_bytes(size)}" for size, name in parts)
        raise UserError(
            f"{what}, for which this process would need at least {describe_bytes(total)} of memory ({listed}); "
            f"it may use {describe_bytes(limit)}"
        )


def _has_gpus(topology: Topology) -> bool:
    return Path("/dev/nvidiactl").exists() or bool(own_uuids(topology))


def data_moment(dataset: ImageDataset, *, num_classes: int) -> Footprint:
    """While the training images are split (`preprocess`): raw images and one-hot labels, both twice."""
    raw = sum(array.nbytes for array in (dataset.x_train, dataset.x_test))
    rows = 2 * len(dataset.y_train) + len(dataset.y_test)
    return {IMAGES: raw + dataset.x_train.nbytes, LABELS: rows * num_classes * _FLOAT32}


def training_moments(
    config: TrainConfig, dataset: ImageDataset, *, num_classes: int, world_size: int = 1
) -> list[Footprint]:
    """What is held on a CPU at the moments that may be worst: lower bounds."""
    train, test = dataset.x_train, dataset.x_test
    # `ImageDataset`; `Splits` (float32 images are copied only by splitting); the splits placed on the device, whose
    # images may have 16 bits.
    copies = train.size + (0 if test.dtype == np.float32 else test.size)
    images = train.nbytes + test.nbytes + copies * _FLOAT32 + train.size * 2
    label = num_classes * _FLOAT32
    data = {IMAGES: images, LABELS: (2 * len(train) + len(test)) * label}
    layers = config.model.layer_sizes(train.shape[1:], num_classes)
    vectors = 1 + config.optimizer.num_slots  # like the weights
    num_weights = sum(layer.num_weights for layer in layers)
    parameters = num_weights * _FLOAT32
    bytes_each = 2 if "16" in config.precision.name else _FLOAT32
    network = _network_moment(config, num_weights)
    # At the end: the confusion matrices of three splits, or their copies.
    num_placed = len(train) - math.ceil(config.data.val_fraction * len(train))
    evaluated = {CONFUSION: 4 * num_classes**2 * 8}
    # Outputs of layers: one layer's in evaluation, always float32; all layers' in a shard's step, for backpropagation.
    outputs = [layer.num_outputs for layer in layers]
    evaluated_rows = BatchPlan.for_evaluation(len(test)).global_batch_size
    batch, shards = min(config.batch.global_size, num_placed), config.batch.num_shards
    is_exact = max(world_size, config.strategy.num_replicas or 1) <= shards and config.reproducibility != "fast"
    shard_rows = -(-batch // shards) if is_exact else 0
    return [
        data_moment(dataset, num_classes=num_classes),
        # `ReplicaCheck`: all vectors joined, and as 64-bit words.
        {**data, NETWORK: network[NETWORK] + parameters * 3 * vectors},
        {**data, **network, **evaluated},
        {**data, **network, OUTPUTS: evaluated_rows * max(outputs, default=0) * _FLOAT32},
        {**data, **network, OUTPUTS: shard_rows * sum(outputs) * bytes_each},
    ]
