"""TensorFlow's settings: computed, and as a run makes them."""

import json
import os

import pytest

from mnist_dist.config.devices import ThreadsConfig
from mnist_dist.engine.runtime import choose_threads, own_cores
from mnist_dist.launch.environment import read_topology
from mnist_dist.launch.topology import HorovodRun, Topology

# Runs `mnist_dist.train` up to the point where everything is built, and prints TensorFlow's settings.
SETTINGS = """
import json
from mnist_dist import train

build = train.build

def tell(*args):
    build(*args)
    import tensorflow as tf
    threading, options = tf.config.threading, tf.config.optimizer.get_experimental_options()
    print(json.dumps({
        "intra_op": threading.get_intra_op_parallelism_threads(),
        "inter_op": threading.get_inter_op_parallelism_threads(),
        "arithmetic_optimization": options.get("arithmetic_optimization", True),
        "tf32": tf.config.experimental.tensor_float_32_execution_enabled(),
    }))
    raise SystemExit(0)

train.build = tell
train.main()
"""


@pytest.fixture
def settings_of_a_run(run_python, small_npz, tmp_path):
    def run(*args) -> dict:
        data = ("data=npz", f"data.path={small_npz}", f"run_dir={tmp_path / 'run'}")
        result = run_python("-c", SETTINGS, *data, *args)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    return run


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
    """Kernels that add over rows cut them by the number of threads."""
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
    # A shell inside of an allocation is no task: what its jobs may use, the machine says.
    assert own_cores(read_topology({"SLURM_CPUS_PER_TASK": "37"})) == len(os.sched_getaffinity(0))


def test_a_run_is_given_the_configured_threads_and_a_graph_optimiser_that_keeps_the_order(settings_of_a_run):
    settings = settings_of_a_run("threads.intra_op=2", "threads.inter_op=3", "reproducibility=fast")
    assert settings == {"intra_op": 2, "inter_op": 3, "arithmetic_optimization": False, "tf32": False}


def test_a_run_takes_all_cores_by_itself(settings_of_a_run):
    num_cores = len(os.sched_getaffinity(0))
    settings = settings_of_a_run("batch.num_shards=1", "reproducibility=fast")
    assert (settings["intra_op"], settings["inter_op"]) == (num_cores, num_cores)
    settings = settings_of_a_run("batch.num_shards=1", "threads.intra_op=2")  # exact on a CPU
    assert (settings["intra_op"], settings["inter_op"]) == (1, num_cores)
