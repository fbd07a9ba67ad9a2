"""What a training holds in memory, at least: so that what cannot fit is refused before it is built."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mnist_dist.config import TrainConfig
from mnist_dist.data.batches import BatchPlan
from mnist_dist.data.sources import ImageDataset
from mnist_dist.errors import UserError
from mnist_dist.gpus import own_uuids
from mnist_dist.memory import describe_bytes, usable_memory
from mnist_dist.topology import Topology

_FLOAT32 = 4
NETWORK, IMAGES, LABELS, CONFUSION, OUTPUTS = (
    "network", "images", "one-hot labels", "confusion matrices", "outputs of a layer",
)  # fmt: skip
Footprint = Mapping[str, int]
"""Bytes for each thing that is held at one moment."""


def check_fits(config: TrainConfig, dataset: ImageDataset, topology: Topology) -> None:
    """Raise UserError if training cannot fit into the memory that this process may use."""
    num_classes = len(np.unique(dataset.y_train))
    moments = training_moments(config, dataset, num_classes=num_classes)
    limit = usable_memory()
    largest = max(moments, key=lambda moment: sum(moment.values()))
    if sum(largest.values()) > limit and _has_gpus(topology):  # where most of it is
        largest = data_moment(dataset, num_classes=num_classes)
    if sum(largest.values()) <= limit:
        return
    model, image_shape = config.model, dataset.x_train.shape[1:]
    num_parameters = sum(layer.num_weights for layer in model.layer_sizes(image_shape, num_classes))
    if max(largest, key=lambda name: largest[name]) in (NETWORK, OUTPUTS):
        what = " ".join(f"model.{key}={getattr(model, key)}" for key in model.size_keys)
    else:
        what = f"data={dataset.name}" if config.data.path is None else f"data.path={config.data.path}"
    parts = sorted(((size, name) for name, size in largest.items() if size > 0), reverse=True)
    raise UserError(
        f"{what}: the network has {num_parameters:,} parameters, the data {num_classes:,} classes, and training takes "
        f"at least {describe_bytes(sum(largest.values()))} of memory "
        f"({', '.join(f'{name} {describe_bytes(size)}' for size, name in parts)}); "
        f"this process may use {describe_bytes(limit)}"
    )


def _has_gpus(topology: Topology) -> bool:
    return Path("/dev/nvidiactl").exists() or bool(own_uuids(topology))


def data_moment(dataset: ImageDataset, *, num_classes: int) -> Footprint:
    """While the training images are split (`preprocess`): raw images twice, their one-hot labels twice."""
    raw = sum(array.nbytes for array in (dataset.x_train, dataset.x_test))
    rows = 2 * len(dataset.y_train) + len(dataset.y_test)
    return {IMAGES: raw + dataset.x_train.nbytes, LABELS: rows * num_classes * _FLOAT32}


def training_moments(config: TrainConfig, dataset: ImageDataset, *, num_classes: int) -> list[Footprint]:
    """What is held at moments that may be the worst, on a CPU: lower bounds."""
    train, test = dataset.x_train, dataset.x_test
    # `ImageDataset`; `Splits` (what is float32 already is copied by splitting only); what `Trainer` has placed, of
    # which the images may be in 16 bits.
    copies = train.size + (0 if test.dtype == np.float32 else test.size)
    images = train.nbytes + test.nbytes + copies * _FLOAT32 + train.size * 2
    label = num_classes * _FLOAT32
    data = {IMAGES: images, LABELS: (2 * len(train) + len(test)) * label}
    layers = config.model.layer_sizes(train.shape[1:], num_classes)
    vectors = 1 + config.optimizer.num_slots  # like the weights
    parameters = sum(layer.num_weights for layer in layers) * _FLOAT32
    # Always: the model, its twin, `TrainState`, and the 64-bit factors of `ReplicaCheck`.
    network = {NETWORK: parameters * (2 + vectors + 2 * vectors)}
    # In the end: the placed images to train on once more; of three splits the confusion matrices, or their copies.
    num_placed = len(train) - math.ceil(config.data.val_fraction * len(train))
    evaluated = {LABELS: data[LABELS] + num_placed * label, CONFUSION: 4 * num_classes**2 * 8}
    rows = BatchPlan.for_evaluation(len(test)).global_batch_size
    outputs = {OUTPUTS: rows * max(layer.num_outputs for layer in layers) * _FLOAT32}
    return [
        data_moment(dataset, num_classes=num_classes),
        # `ReplicaCheck`: all vectors joined, and as 64-bit words.
        {**data, NETWORK: network[NETWORK] + parameters * 3 * vectors},
        {**data, **network, **evaluated},
        {**data, **network, **outputs},
    ]
