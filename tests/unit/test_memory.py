"""How much memory there is, what a training needs at least, and what happens when it runs out."""

import numpy as np
import pytest

from mnist_dist.base.memory import describe_bytes, usable_memory
from mnist_dist.config.compose import compose_config
from mnist_dist.data.dataset import ImageDataset
from mnist_dist.engine.footprint import NETWORK, training_moments

GB = 1024**3


@pytest.fixture
def machine(tmp_path):
    """A machine of 8 GB and 1 GB of swap, as its files show it; call it with the group's line and limits."""

    def build(
        line="", limits=None, meminfo=f"MemTotal: {8 * GB // 1024} kB\nMemFree: 3 kB\nSwapTotal: {GB // 1024} kB\n"
    ):
        proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
        (proc / "self").mkdir(parents=True)
        (proc / "meminfo").write_text(meminfo)
        (proc / "self" / "cgroup").write_text(line)
        for path, content in (limits or {}).items():
            (cgroups / path).parent.mkdir(parents=True, exist_ok=True)
            (cgroups / path).write_text(content)
        return usable_memory(proc=proc, cgroups=cgroups)

    return build


V1, V2 = "4:memory:/slurm/uid_0/job_7\n1:cpu:/\n", "0::/system.slice/job_7/step_0\n"


@pytest.mark.parametrize(
    ("line", "limits", "expected"),
    [
        ("", {}, 9 * GB),
        (V2, {}, 9 * GB),
        (V2, {"system.slice/job_7/step_0/memory.max": "max\n", "system.slice/job_7/memory.max": f"{2 * GB}\n"}, 3 * GB),
        (V2, {"system.slice/job_7/step_0/memory.max": f"{GB}\n"}, 2 * GB),
        (V2, {"memory.max": f"{4 * GB}\n"}, 5 * GB),  # in a container, which sees its group as the root
        (V2, {"unified/system.slice/memory.max": f"{4 * GB}\n"}, 5 * GB),
        (V1, {"memory/slurm/uid_0/job_7/memory.limit_in_bytes": f"{2 * GB}\n"}, 3 * GB),
        (V1, {"memory/slurm/memory.limit_in_bytes": f"{2 * GB}\n"}, 3 * GB),
        (V1, {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 9 * GB),
        (V1, {"cpu/memory.limit_in_bytes": "1\n", "memory/slurm/memory.limit_in_bytes": "nonsense"}, 9 * GB),
    ],
)
def test_limits_of_groups(line, limits, expected, machine):
    assert machine(line, limits) == expected


def test_where_nothing_can_be_told(tmp_path):
    assert usable_memory(proc=tmp_path, cgroups=tmp_path) == np.inf


@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_limits_of_the_process(kind, run_python):
    code = f"import resource as r; r.setrlimit(r.{kind}, (10**9,) * 2); from mnist_dist.base import memory as m; "
    assert run_python("-c", code + "print(m.usable_memory())").stdout == "1000000000\n"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (25.3e9, "25.3 GB"), (10**12, "1 TB"), (10**18, "1e+03 PB")],
)
def test_bytes_in_words(number, text):
    assert describe_bytes(number) == text


# What a training needs

NETWORKS = [
    ["model.hidden_sizes=[2500,2500]"],
    ["model.hidden_sizes=[4000,2500]", "optimizer=sgd"],
    ["model=cnn", "model.filters=[8,16]", "model.dense_size=10000"],
]
# Trains, and tells the most memory that it has used. Not by getrusage's ru_maxrss: a process inherits that number over
# fork and exec, so it is never less than what the test process itself has taken.
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
    """The most memory that one epoch on `dataset` with these keys takes."""

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
    """What Python and TensorFlow take."""
    return peak_bytes(dataset(4), "model.hidden_sizes=[8]")


@pytest.mark.parametrize("overrides", NETWORKS, ids=" ".join)
def test_a_network_takes_no_less_than_was_said(overrides, peak_bytes, base_bytes):
    moments = training_moments(compose_config(*overrides), dataset(4), num_classes=4)
    expected = max(sum(moment.values()) for moment in moments)
    assert expected > 200e6  # more than the base varies
    assert expected < peak_bytes(dataset(4), *overrides) - base_bytes


def test_classes_take_no_less_than_was_said(peak_bytes, base_bytes):
    """The one-hot labels of training images, and the confusion matrices."""
    images, labels = np.zeros((30_000, 2, 2), np.uint8), np.arange(30_000) % 2_500
    data = ImageDataset("npz", images, labels, images[:2_500], labels[:2_500], sha256="")
    moments = training_moments(compose_config(), data, num_classes=2_500)
    expected = max(sum(moment.values()) for moment in moments)
    assert expected > 500e6
    assert expected < peak_bytes(data, "model.hidden_sizes=[8]") - base_bytes


def test_what_is_counted_for_the_network():
    """Adam: 8 + 3 * 24 bytes a parameter; plain gradient descent: 8 + 24."""
    for optimizer, expected in (("adam", 80), ("sgd", 32)):
        config = compose_config(f"optimizer={optimizer}", "model.hidden_sizes=[]")
        largest = max(moment.get(NETWORK, 0) for moment in training_moments(config, dataset(4), num_classes=4))
        assert largest == expected * (16 * 16 + 1) * 4


# When it runs out all the same

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
