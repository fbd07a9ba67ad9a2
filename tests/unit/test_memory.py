"""How much memory there is, how much training needs at least, and what happens when it runs out."""

import numpy as np
import pytest

from mnist_dist.base.memory import count_oom_kills, describe_bytes, usable_memory
from mnist_dist.config.compose import compose_config
from mnist_dist.data.dataset import ImageDataset
from mnist_dist.engine.footprint import NETWORK, training_moments

GB = 1024**3


@pytest.fixture
def machine(tmp_path):
    """A machine with 8 GB and 1 GB of swap, as its files show it; call it with the group's line and limits."""

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
        (V2, {"memory.max": f"{4 * GB}\n"}, 5 * GB),  # in a container, which sees its own group as the root
        (V2, {"unified/system.slice/memory.max": f"{4 * GB}\n"}, 5 * GB),
        (V1, {"memory/slurm/uid_0/job_7/memory.limit_in_bytes": f"{2 * GB}\n"}, 3 * GB),
        (V1, {"memory/slurm/memory.limit_in_bytes": f"{2 * GB}\n"}, 3 * GB),
        (V1, {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 9 * GB),
        (V1, {"cpu/memory.limit_in_bytes": "1\n", "memory/slurm/memory.limit_in_bytes": "nonsense"}, 9 * GB),
    ],
)
def test_limits_of_groups(line, limits, expected, machine):
    assert machine(line, limits) == expected


def test_when_nothing_is_known(tmp_path):
    assert usable_memory(proc=tmp_path, cgroups=tmp_path) == np.inf


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (25.3e9, "25.3 GB"), (10**12, "1 TB"), (10**18, "1e+03 PB")],
)
def test_bytes_in_words(number, text):
    assert describe_bytes(number) == text


# What training needs


def dataset(num_classes, *, size=16, dtype=np.uint8):
    images, labels = np.zeros((600, size, size), dtype), np.arange(600) % num_classes
    return ImageDataset("npz", images, labels, images[:100], labels[:100], sha256="")


def test_what_is_counted_for_the_network():
    """Adam: 8 + 3 * 24 bytes a parameter; plain gradient descent: 8 + 24."""
    for optimizer, expected in (("adam", 80), ("sgd", 32)):
        config = compose_config(f"optimizer={optimizer}", "model.hidden_sizes=[]")
        largest = max(moment.get(NETWORK, 0) for moment in training_moments(config, dataset(4), num_classes=4))
        assert largest == expected * (16 * 16 + 1) * 4


# When it runs out anyway


@pytest.mark.parametrize(
    ("line", "name"),
    [(V1, "memory/slurm/uid_0/job_7/memory.oom_control"), (V2, "system.slice/job_7/step_0/memory.events")],
)
def test_kills_for_want_of_memory_are_counted(line, name, machine, tmp_path):
    around = {"memory/memory.oom_control": "oom_kill 70\n", "system.slice/memory.events": "oom_kill 70\n"}
    machine(line, {**around, name: "oom 4\noom_kill 3\noom_group_kill 0\n"})
    assert count_oom_kills(proc=tmp_path / "proc", cgroups=tmp_path / "cgroup") == 3
    assert count_oom_kills(proc=tmp_path, cgroups=tmp_path) == 0
