"""TensorFlow's settings, as a run sets them."""

import json
import os

import pytest

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


def test_a_run_is_given_the_configured_threads_and_a_graph_optimiser_that_keeps_the_order(settings_of_a_run):
    settings = settings_of_a_run("threads.intra_op=2", "threads.inter_op=3", "reproducibility=fast")
    assert settings == {"intra_op": 2, "inter_op": 3, "arithmetic_optimization": False, "tf32": False}


def test_a_run_uses_all_cores_by_default(settings_of_a_run):
    num_cores = len(os.sched_getaffinity(0))
    settings = settings_of_a_run("batch.num_shards=1", "reproducibility=fast")
    assert (settings["intra_op"], settings["inter_op"]) == (num_cores, num_cores)
    settings = settings_of_a_run("batch.num_shards=1", "threads.intra_op=2")  # exact on a CPU
    assert (settings["intra_op"], settings["inter_op"]) == (1, num_cores)
