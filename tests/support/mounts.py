"""File systems of a test's own, which only root can mount."""

import os
import subprocess
from pathlib import Path

import pytest


def mount(*args) -> None:
    """Mount something; where that is not allowed, skip the test, or fail where skipping is not allowed (CI)."""
    mounted = subprocess.run(["mount", *map(str, args)], capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        reason = f"mount: {mounted.stderr.strip()}"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", folder], check=True)
