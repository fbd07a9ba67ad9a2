"""What needs a process of its own, but trains nothing."""

import os
import pty
import sys

import pytest

from mnist_dist.engine.batches import BatchPlan
from mnist_dist.launch.gpus import own_uuids, query_gpus
from mnist_dist.launch.topology import HorovodRun, Topology


def test_other_processes_compute_the_same_results(run_python):
    code = (
        "from mnist_dist.engine.batches import BatchPlan\n"
        "print(*BatchPlan(10, 5).shuffled(seed=1, epoch=2).reshape(-1).tolist())"
    )
    result = run_python("-c", code, fresh=True)
    here = BatchPlan(10, 5).shuffled(seed=1, epoch=2).reshape(-1).tolist()
    assert result.stdout.split() == [str(index) for index in here]


def test_plotting_needs_neither_pyplot_nor_tensorflow(run_python):
    code = (
        "import sys, numpy as np; from mnist_dist.results.curves import plot_run\n"
        "from mnist_dist.results.history import EpochMetrics, History\n"
        "history = History((EpochMetrics(1, 1., 1., 1., 1., 1., 1., 1.),))\n"
        "list(plot_run(history, np.eye(2, dtype=int), dataset='', class_names=['a', 'b'], reference=None))\n"
        "sys.exit(str([m for m in ('matplotlib.pyplot', 'tensorflow', 'keras') if m in sys.modules] or ''))"
    )
    result = run_python("-c", code, fresh=True)
    assert result.stderr.strip() == ""


def test_a_bar_with_time_left_in_a_terminal(tmp_path):
    code = (
        "import time; from mnist_dist.base.console import Console, progress\n"
        "with Console(), progress('working') as show:\n"
        "    for n in range(4): show(n, 4); time.sleep(0.3)\n"
    )
    shown = bytearray()

    def read(descriptor: int) -> bytes:
        data = os.read(descriptor, 4096)
        shown.extend(data)
        return data

    command = ["/usr/bin/env", "TERM=xterm-256color", "COLUMNS=100", sys.executable, "-c", code]
    status = pty.spawn(command, read)
    assert status == 0
    text = shown.decode()
    assert "working" in text
    assert "3/4" in text
    assert "left" in text


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A program of that name that prints two GPUs."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf 'GPU-aa\\nGPU-bb\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return program


def test_uuids_come_from_nvidia_smi(nvidia_smi):
    assert query_gpus("uuid") == ["GPU-aa", "GPU-bb"]
    assert own_uuids(Topology(HorovodRun(), 1, 2, local_rank=1, local_size=2)) == ["GPU-bb"]
    nvidia_smi.write_text("#!/bin/sh\necho no driver; exit 9\n")
    assert query_gpus("uuid") == []
