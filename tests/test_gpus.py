import pytest
import tensorflow as tf

from mnist_dist.errors import UserError
from mnist_dist.strategy.gpus import check_not_shared, list_uuids, used_uuids
from mnist_dist.strategy.horovod import choose_own_gpu
from mnist_dist.strategy.mirrored import Mirrored

UUIDS = ["GPU-aa", "GPU-bb", "GPU-cc"]


@pytest.mark.parametrize(
    ("indices", "visible", "expected"),
    [
        ([0, 2], None, ["GPU-aa", "GPU-cc"]),
        ([0], "1", ["GPU-bb"]),
        ([0, 1], "2, 0", ["GPU-cc", "GPU-aa"]),
        ([0], "GPU-cc", ["GPU-cc"]),
        ([0], "7", []),  # unknown: nothing is claimed
    ],
)
def test_used_uuids(indices, visible, expected):
    assert used_uuids(indices, visible=visible, uuids=UUIDS) == expected


def test_two_ranks_on_one_gpu_are_named():
    check_not_shared({0: ["GPU-aa"], 1: ["GPU-bb"], 2: []})
    with pytest.raises(UserError, match="ranks 0 and 2 both use the GPU GPU-aa"):
        check_not_shared({0: ["GPU-aa"], 1: ["GPU-bb"], 2: ["GPU-aa"]})


def test_uuids_come_from_nvidia_smi(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf 'GPU-aa\\nGPU-bb\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert list_uuids() == ["GPU-aa", "GPU-bb"]
    program.write_text("#!/bin/sh\necho no driver; exit 9\n")
    assert list_uuids() == []


def test_fewer_gpus_than_asked_for(monkeypatch):
    gpus = [tf.config.PhysicalDevice(f"/physical_device:GPU:{n}", "GPU") for n in range(2)]
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: gpus if kind == "GPU" else [])
    with pytest.raises(UserError, match=r"strategy\.num_replicas=3: this machine has 2 GPU"):
        Mirrored(num_replicas=3)


def test_each_local_rank_has_its_own_gpu():
    assert [choose_own_gpu(local_rank, local_size=2, num_gpus=2) for local_rank in (0, 1)] == [0, 1]
    assert choose_own_gpu(1, local_size=2, num_gpus=1) == 0  # its launcher shows each process one GPU
    with pytest.raises(UserError, match="4 processes on this machine but 2 GPUs"):
        choose_own_gpu(2, local_size=4, num_gpus=2)
