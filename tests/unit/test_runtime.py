"""TensorFlow's settings: how they are computed, and how a run applies them."""

import os

import pytest

from mnist_dist.config.devices import ThreadsConfig
from mnist_dist.engine.runtime import choose_threads, own_cores
from mnist_dist.launch.environment import read_topology
from mnist_dist.launch.topology import HorovodRun, Topology


@pytest.mark.parametrize(
    ("num_cores", "num_shards", "expected"),
    [
        (1, 8, (1, 1)),
        (2, 8, (1, 2)),
        (2, 4, (1, 2)),
        (8, 8, (1, 8)),
        (16, 8, (2, 16)),
        (2, 1, (2, 2)),
        (64, 3, (21, 64)),
    ],
)
def test_shards_side_by_side_come_first(num_cores, num_shards, expected):
    threads = ThreadsConfig("auto", "auto")
    assert choose_threads(threads, num_cores=num_cores, num_shards=num_shards, exact=False) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [(ThreadsConfig("3", "auto"), (3, 16)), (ThreadsConfig("auto", "5"), (2, 5)), (ThreadsConfig("1", "1"), (1, 1))],
)
def test_what_is_configured_is_taken(config, expected):
    assert choose_threads(config, num_cores=16, num_shards=8, exact=False) == expected


@pytest.mark.parametrize("intra_op", ["auto", "1", "8"])
@pytest.mark.parametrize("num_cores", [1, 2, 64])
@pytest.mark.parametrize("num_shards", [1, 8])
def test_exact_has_one_thread_inside_an_operation(intra_op, num_cores, num_shards):
    """Kernels that sum over rows split them by the number of threads."""
    config = ThreadsConfig(intra_op, "auto")
    assert choose_threads(config, num_cores=num_cores, num_shards=num_shards, exact=True) == (1, num_cores)


@pytest.mark.parametrize(("local_size", "expected"), [(1, 6), (2, 3), (4, 1), (9, 1)])
def test_processes_of_a_machine_share_what_it_lets_them_use(local_size, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    assert own_cores(Topology(HorovodRun(), 0, local_size, 0, local_size)) == expected


def test_slurm_says_how_many_cores_a_task_has():
    horovod = {f"HOROVOD_{name}": "0" for name in ("RANK", "LOCAL_RANK")} | {
        f"HOROVOD_{name}": "1" for name in ("SIZE", "LOCAL_SIZE")
    }
    assert own_cores(read_topology({**horovod, "SLURM_CPUS_PER_TASK": "37"})) == 37
    # A shell inside an allocation is not a task: the machine says what it may use.
    assert own_cores(read_topology({"SLURM_CPUS_PER_TASK": "37"})) == len(os.sched_getaffinity(0))
