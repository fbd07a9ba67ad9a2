"""What all tests share: data sets, and TensorFlow's settings in this process."""

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from support.data import create_small_arrays
from support.processes import cache_folder

from mnist_dist.config.devices import ThreadsConfig
from mnist_dist.launch.topology import Topology


def pytest_configure(config):
    """Configure TensorFlow in the processes that run tests; it cannot be done later."""
    os.environ["XDG_CACHE_HOME"] = cache_folder().name
    if config.getoption("numprocesses", None):
        return
    import tensorflow as tf

    from mnist_dist.engine.runtime import configure_tensorflow

    # As many logical CPUs as the largest `mirrored` test has replicas.
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 7)
    configure_tensorflow(ThreadsConfig("auto", "auto"), Topology(), num_shards=8, exact=True)


@pytest.fixture(scope="session")
def mnist_path() -> Path:
    """The real MNIST as an .npz file; without it the test is skipped, or fails where skipping is not allowed (CI)."""
    name = os.environ.get("MNIST_DIST_TEST_MNIST")
    if name and Path(name).is_file():
        return Path(name).resolve()
    reason = f"MNIST_DIST_TEST_MNIST={name}: no such file" if name else "MNIST_DIST_TEST_MNIST=mnist.npz is not set"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def small_arrays() -> dict[str, np.ndarray]:
    """Images of 8x8 pixels in 4 classes; do not change them."""
    return create_small_arrays()


@pytest.fixture(scope="session")
def small_npz(small_arrays, tmp_path_factory) -> Path:
    """`small_arrays` as a file; do not change it."""
    path = tmp_path_factory.mktemp("data") / "small.npz"
    np.savez(path, **small_arrays)
    return path


@pytest.fixture
def logged():
    """The messages that the package has logged so far, at a level or above."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("mnist_dist")
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield lambda level=logging.INFO: [record.getMessage() for record in records if record.levelno >= level]
    logger.removeHandler(handler)
    logger.setLevel(before)
