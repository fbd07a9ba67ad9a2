"""Whether a network of the user's own can be trained; what its function does may hang, or end the process."""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mnist_dist.base.errors import UserError
from mnist_dist.base.surroundings import settings_of_keras
from mnist_dist.config.model import KerasConfig
from mnist_dist.config.train import TrainConfig
from mnist_dist.data.load import load_dataset
from mnist_dist.doctor.children.dataset import absent

_MNIST = (28, 28), 10


def probe(config: TrainConfig) -> Iterator[tuple[str, Any]]:
    """Build it as a training does, and try it on images like those of the data."""
    try:
        image_shape, num_classes = _images(config)
    except UserError as error:
        yield "no images", str(error)
        return
    with settings_of_keras():
        from mnist_dist.engine.network import load_pretrained, try_own_network
        from mnist_dist.engine.precision import choose_precision
        from mnist_dist.engine.verdicts import objection
    yield "started", True
    policy = choose_precision(config.precision.name, None)
    config = replace(config, precision=replace(config.precision, name=policy))
    try:
        network, verdicts = try_own_network(config, image_shape=image_shape, num_classes=num_classes)
        if config.model.pretrained is not None:
            load_pretrained(network, config.model.pretrained, image_shape=image_shape, num_classes=num_classes)
    except UserError as error:
        yield "error", str(error)
        return
    yield (
        "verdicts",
        {
            "num_layers": len(verdicts),
            "num_parameters": network.num_parameters,
            "refused": objection(verdicts, "refused"),
            "fast_only": objection(verdicts, "fast only"),
            "code": _digest(config.model),
        },
    )


def _images(config: TrainConfig) -> tuple[tuple[int, ...], int]:
    """Shape of the images and number of classes; of data that is not here yet, those of MNIST."""
    if absent(config.data):
        return _MNIST
    dataset = load_dataset(config.data)
    return dataset.x_train.shape[1:], len(np.unique(dataset.y_train))


def _digest(model: Any) -> str:
    """Of the file that has the function."""
    assert isinstance(model, KerasConfig), model
    path = sys.modules[model.factory.partition(":")[0]].__file__
    return hashlib.sha256(Path(path or "").read_bytes()).hexdigest() if path else ""
