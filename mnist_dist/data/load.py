"""Where images come from: MNIST, the embedded digits, or the user's own file.

Without TensorFlow, so that wrong or missing files are reported at once.
"""

import logging

from mnist_dist.base.errors import UserError
from mnist_dist.config.data import DataConfig
from mnist_dist.data.dataset import ImageDataset
from mnist_dist.data.digits_cache import load_digits
from mnist_dist.data.mnist import load_mnist
from mnist_dist.data.npz import load_npz

log = logging.getLogger(__name__)


def load_dataset(config: DataConfig) -> ImageDataset:
    """Load the configured data set; raises UserError with one line if it is unavailable or damaged."""
    loaders = {"auto": _load_auto, "mnist": load_mnist, "digits": load_digits, "npz": load_npz}
    return loaders[config.name](config)


def _load_auto(config: DataConfig) -> ImageDataset:
    try:
        return load_mnist(config)
    except UserError as error:
        log.warning("WARNING: training on the embedded digits, NOT on MNIST: %s", error)
        return load_digits(config)
