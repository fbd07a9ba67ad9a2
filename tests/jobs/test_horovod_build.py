"""What scripts/horovod/build.sh says when NCCL is asked for and cannot be had; it stops before it builds anything."""

import os
import shutil
import subprocess
import sys

import pytest
from support import CHECKOUT


@pytest.fixture
def tools(tmp_path):
    """A folder to serve as PATH: what the script needs to get that far, and no nvcc."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("basename", "dirname"):
        (folder / name).symlink_to(shutil.which(name))
    return folder


def build(tools, **variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HOROVOD_")}
    command = [shutil.which("bash"), CHECKOUT / "scripts/horovod/build.sh", sys.executable]
    return subprocess.run(
        command,
        env={**environment, "PATH": str(tools), "HOROVOD_GPU_OPERATIONS": "NCCL", **variables},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_nccl_without_nvcc(tools, tmp_path):
    result = build(tools, CUDA_HOME=str(tmp_path))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"horovod: NCCL was requested, but there is no nvcc on PATH or in {tmp_path}/bin; install CUDA's toolkit, or "
        "set CUDA_HOME\n"
    )


def test_nccl_home_without_nccl(tools, tmp_path):
    (tools / "nvcc").symlink_to(shutil.which("true"))
    result = build(tools, HOROVOD_NCCL_HOME=str(tmp_path))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"horovod: HOROVOD_NCCL_HOME={tmp_path} has no include/nccl.h; correct it, or unset it\n"
