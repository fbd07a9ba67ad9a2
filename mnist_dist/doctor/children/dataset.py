"""Whether the data set can be loaded and trained on; nothing is downloaded, and nothing is built."""

from collections.abc import Iterator
from typing import Any

from mnist_dist.base.errors import UserError
from mnist_dist.config.data import DataConfig
from mnist_dist.config.train import TrainConfig
from mnist_dist.data.digits_cache import digits_path
from mnist_dist.data.load import load_dataset
from mnist_dist.data.mnist import download_path
from mnist_dist.data.splits import check_val_fraction
from mnist_dist.engine.footprint import check_fits
from mnist_dist.launch.topology import Topology


def probe(config: TrainConfig, topology: Topology) -> Iterator[tuple[str, Any]]:
    """Load it as a training does, if it is here."""
    yield "dataset", _examine(config, topology)


def _examine(config: TrainConfig, topology: Topology) -> dict[str, Any]:
    try:
        if to_get := absent(config.data):
            return to_get
        dataset = load_dataset(config.data)
        check_val_fraction(len(dataset.x_train), config.data.val_fraction)
        config.augment.check_image_shape(dataset.x_train.shape[1:])
        check_fits(config, dataset, topology)
    except UserError as error:
        return {"error": str(error)}
    return {
        "name": dataset.name,
        "sha256": dataset.sha256,
        "num_train": len(dataset.x_train),
        "num_test": len(dataset.x_test),
        "shape": list(dataset.x_train.shape[1:]),
    }


def absent(config: DataConfig) -> dict[str, Any] | None:
    """What a training would have to fetch or build first; None if all is here."""
    if config.name in ("auto", "mnist") and config.path is None:
        path = download_path(config)
        return None if path.is_file() else {"to_download": str(path)}
    if config.name == "digits" and not (path := digits_path(config)).is_file():
        return {"to_build": str(path)}
    return None
