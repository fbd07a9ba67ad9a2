import pytest
import tensorflow as tf

from mnist_dist.base.errors import UserError
from mnist_dist.launch.gpus import own_share, visible_uuids
from mnist_dist.launch.topology import HorovodRun, SlurmJob, Step, TFConfig, Topology
from mnist_dist.strategy.mirrored import Mirrored
from mnist_dist.strategy.multiworker import create_resolver

UUIDS = ["GPU-aa", "GPU-bb", "GPU-cc"]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, UUIDS),
        ("1", ["GPU-bb"]),
        ("2, 0", ["GPU-cc", "GPU-aa"]),
        ("GPU-cc", ["GPU-cc"]),
        ("7", []),  # unknown, so it claims nothing
        ("", []),
    ],
)
def test_visible_uuids(visible, expected):
    assert visible_uuids(UUIDS, visible=visible) == expected


@pytest.mark.parametrize(
    ("num_gpus", "local_rank", "local_size", "expected"),
    [(0, 0, 1, []), (4, 0, 1, [0, 1, 2, 3]), (4, 1, 2, [2, 3]), (2, 1, 2, [1]), (1, 1, 2, [0]), (5, 1, 2, [2, 3])],
)
def test_each_process_of_a_machine_has_its_share(num_gpus, local_rank, local_size, expected):
    topology = Topology(HorovodRun(), local_rank, local_size, local_rank, local_size)
    assert list(own_share(num_gpus, topology)) == expected


def test_fewer_gpus_than_processes():
    with pytest.raises(UserError, match="4 processes on this machine but 2 GPUs"):
        own_share(2, Topology(HorovodRun(), 2, 4, 2, 4))
    with pytest.raises(UserError, match=r"slurm/train\.sh: #SBATCH --ntasks-per-node=2"):
        own_share(2, Topology(Step(("a",) * 4, ("a:1",), "7.0.0"), 2, 4, 2, 4, slurm=SlurmJob("7", "a")))


def test_fewer_gpus_than_asked_for(monkeypatch):
    gpus = [tf.config.PhysicalDevice(f"/physical_device:GPU:{n}", "GPU") for n in range(2)]
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: gpus if kind == "GPU" else [])
    with pytest.raises(UserError, match=r"strategy\.num_replicas=3: this machine has 2 GPU"):
        Mirrored(num_replicas=3)


def test_multiworker_tells_tensorflow_of_its_gpus():
    """Without the number TensorFlow uses the CPU."""
    addresses = ("a:1", "b:1")
    topology = Topology(TFConfig(addresses), rank=1, world_size=2)
    resolvers = {num: create_resolver(topology, addresses, num_gpus=num) for num in (0, 2)}
    assert resolvers[2].num_accelerators() == {"GPU": 2}
    assert resolvers[0].num_accelerators() == {}
    assert resolvers[0].task_id == 1
