"""How much memory training takes, and what happens when it runs out."""

import numpy as np
import pytest

from mnist_dist.base.memory import describe_bytes, usable_memory
from mnist_dist.config.compose import compose_config
from mnist_dist.data.dataset import ImageDataset
from mnist_dist.engine.footprint import training_moments

# One process has all of them, as they share what takes long to make.
pytestmark = pytest.mark.xdist_group("memory")


@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_limits_of_the_process(kind, run_python):
    code = f"import resource as r; r.setrlimit(r.{kind}, (10**9,) * 2); from mnist_dist.base import memory as m; "
    assert run_python("-c", code + "print(m.usable_memory())", fresh=True).stdout == "1000000000\n"


NETWORKS = [
    ["model.hidden_sizes=[2500,2500]"],
    ["model.hidden_sizes=[4000,2500]", "optimizer=sgd"],
    ["model=cnn", "model.filters=[8,16]", "model.dense_size=10000"],
]


# Trains and reports its peak memory. Not getrusage's ru_maxrss: a process inherits that number across
# fork and exec, so it is never less than what the test process itself has used.
MEASURED = """
import atexit, pathlib, re
def tell():
    status = pathlib.Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024)
atexit.register(tell)
from mnist_dist.train import main
main()
"""


def dataset(num_classes, *, size=16, dtype=np.uint8):
    images, labels = np.zeros((600, size, size), dtype), np.arange(600) % num_classes
    return ImageDataset("npz", images, labels, images[:100], labels[:100], sha256="")


def save(path, data):
    np.savez(path, x_train=data.x_train, y_train=data.y_train, x_test=data.x_test, y_test=data.y_test)


@pytest.fixture(scope="module")
def peak_bytes(run_python, tmp_path_factory):
    """Peak memory of one epoch on `dataset` with these keys."""

    def peak(data, *overrides):
        folder = tmp_path_factory.mktemp("peak")
        save(folder / "data.npz", data)
        keys = ("data=npz", f"data.path={folder}/data.npz", f"run_dir={folder}/run", "trainer.epochs=1")
        result = run_python("-c", MEASURED, *keys, *overrides)
        assert result.returncode == 0, result
        return int(result.stdout.splitlines()[-1])

    return peak


@pytest.fixture(scope="module")
def base_bytes(peak_bytes):
    """The memory that Python and TensorFlow take."""
    return peak_bytes(dataset(4), "model.hidden_sizes=[8]")


@pytest.mark.parametrize("overrides", NETWORKS, ids=" ".join)
def test_a_network_takes_no_less_than_estimated(overrides, peak_bytes, base_bytes):
    moments = training_moments(compose_config(*overrides), dataset(4), num_classes=4)
    expected = max(sum(moment.values()) for moment in moments)
    assert expected > 200e6  # more than the base memory varies
    assert expected < peak_bytes(dataset(4), *overrides) - base_bytes


def test_classes_take_no_less_than_estimated(peak_bytes, base_bytes):
    """The one-hot labels of the training images, and the confusion matrices."""
    images, labels = np.zeros((30_000, 2, 2), np.uint8), np.arange(30_000) % 2_500
    data = ImageDataset("npz", images, labels, images[:2_500], labels[:2_500], sha256="")
    moments = training_moments(compose_config(), data, num_classes=2_500)
    expected = max(sum(moment.values()) for moment in moments)
    assert expected > 500e6
    assert expected < peak_bytes(data, "model.hidden_sizes=[8]") - base_bytes


RUNS_OUT = """
import sys
from mnist_dist.cli import main as cli
from mnist_dist.config.compose import TRAIN

def entry(config, topology, console):
    if config.seed == 0:
        import numpy
        numpy.ones(2**50)
    with console.tensorflow_start():
        import tensorflow as tf
    tf.fill([2**46], 1.0)

cli.run(TRAIN, entry)
"""


@pytest.mark.parametrize(("seed", "reason"), [(0, "Unable to allocate 8.00 PiB"), (1, "OOM when allocating tensor")])
def test_one_line_when_memory_has_run_out(seed, reason, run_python):
    result = run_python("-c", RUNS_OUT, f"seed={seed}", env={"TF_CPP_MIN_LOG_LEVEL": "3"})
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1
    assert lines[0].startswith(
        f"error: out of memory, of which this process may use {describe_bytes(usable_memory())}: "
    )
    assert reason in lines[0]
    assert len(lines) == 1
    assert "Traceback" not in result.stderr
