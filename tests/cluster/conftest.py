"""A cluster with real Slurm for each module, and a user who submits jobs to it."""

import os
import shutil
import sys

import pytest
from support import CHECKOUT
from support.batch import environment_of_user, submitter
from support.slurm_cluster import missing_programs, run_cluster


@pytest.fixture(scope="module")
def cluster():
    """The cluster's environment variables; without Slurm, skip, or fail where skipping is not allowed (CI)."""
    if missing := missing_programs():
        reason = f"not installed: {', '.join(missing)}; apt-get install slurm-wlm munge"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    with run_cluster() as environment:
        yield environment


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """The folder that a user submits from, with spaces in its name."""
    folder = tmp_path_factory.mktemp("my own") / "two words"
    (folder / "runs").mkdir(parents=True)
    (folder / "slurm").mkdir()
    for script in (CHECKOUT / "slurm").glob("*.sh"):
        if script.name != "site.sh":
            shutil.copy(script, folder / "slurm")
    (folder / "slurm" / "site.sh").write_text(f"python='{sys.executable}'\nexport FROM_THE_SITE=yes\n")
    return folder


@pytest.fixture(scope="module")
def small(small_npz, desk):
    """The arguments of a short training run; the path of its data also has a space."""
    path = shutil.copy(small_npz, desk / "small data.npz")
    return ["data=npz", f"data.path={path}", "trainer.epochs=2"]


@pytest.fixture(scope="module")
def environment(cluster):
    """The variables of a user of the cluster."""
    return environment_of_user(cluster)


@pytest.fixture(scope="module")
def submit(environment, desk):
    """Start `sbatch OPTIONS slurm/train.sh ARGUMENTS`; see `submitter`."""
    return submitter(environment, desk)
