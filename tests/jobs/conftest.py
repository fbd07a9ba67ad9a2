"""Processes as users start them (`support/job.py`)."""

import functools
import json
import os
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import pytest
from support import job
from support.browser import missing_browser, run_browser
from support.data import write_part
from support.hooks import HOOKS
from support.job import NUM_EPOCHS, SINGLE, Job
from support.processes import python_environment as clean_environment
from support.runs import history_of, summary_of

from mnist_dist.engine.flat_model import FlatModel
from mnist_dist.results.history import History


@pytest.fixture(scope="session")
def python_environment() -> dict[str, str]:
    """The environment in which `python -m mnist_dist...` runs from any folder, installed or not."""
    return clean_environment()


@pytest.fixture(scope="session")
def run_python(tmp_path_factory):
    """Run `python *words` to its end, by default in a new empty folder; options as for `support.job.start`."""

    def run(*words, cwd=None, timeout=300, **options):
        started = job.start(*words, printed_to=tmp_path_factory.mktemp("printed"), cwd=cwd, **options)
        try:
            (result,) = started.wait(timeout)
        finally:
            started.kill()
        return result

    return run


@pytest.fixture
def start_python(tmp_path):
    """Start `python *words` in `tmp_path`; whatever still runs when the test ends is killed."""
    started: list[Job] = []

    def start(*words, **options) -> Job:
        started.append(job.start(*words, printed_to=tmp_path, **options))
        return started[-1]

    yield start
    for one in started:
        one.kill()


@pytest.fixture
def start(tmp_path):
    """Start training in `tmp_path` (`support.job.start_job`); whatever still runs when the test ends is killed."""
    started: list[Job] = []

    def begin(kind, *args, **options) -> Job:
        started.append(job.start_job(kind, *args, printed_to=tmp_path, **options))
        return started[-1]

    yield begin
    for one in started:
        one.kill()


@pytest.fixture(scope="session")
def run_job(tmp_path_factory):
    """Run training to its end; returns how each process (or horovodrun itself) ended."""

    def run(kind, *args, **options):
        started = job.start_job(kind, *args, printed_to=tmp_path_factory.mktemp("printed"), **options)
        try:
            return started.wait()
        finally:
            started.kill()

    return run


class Finished(NamedTuple):
    """A finished training run, as `hooks/probe.py` saw it."""

    folder: Path
    outputs: list[str]
    ranks: list[dict]

    @property
    def summary(self) -> dict:
        return summary_of(self.folder)

    @property
    def history(self) -> History:
        return history_of(self.folder)

    def weights(self) -> np.ndarray:
        return FlatModel(keras.models.load_model(self.folder / "model.keras")).get_weights()


@pytest.fixture(scope="session")
def train_with(tmp_path_factory, run_job):
    """Train once for each set of arguments, and inspect every process. Horovod's ranks are started by srun."""

    @functools.cache
    def train(strategy: str, size: int, *args, cwd: Path | None = None) -> Finished:
        root = tmp_path_factory.mktemp(f"{strategy}{size}")
        results = run_job(
            (strategy, size), *args, f"run_dir={root / 'run'}", script=[HOOKS / "probe.py"],
            env={"PROBE_DIR": str(root)}, launcher="srun" if strategy == "horovod" else None, cwd=cwd,
        )  # fmt: skip
        for result in results:
            assert result.returncode == 0, result.stderr + result.stdout
        ranks = [json.loads(path.read_text()) for path in sorted(root.glob("rank-*.json"))]
        return Finished(root / "run", [result.stdout for result in results], ranks)

    return train


@pytest.fixture(scope="session")
def part_of_mnist(mnist_path, tmp_path_factory):
    """An eighth of it: 4,950 examples in 10 batches, the last one of 342."""
    return write_part(mnist_path, tmp_path_factory.mktemp("part"), num_train=6000, num_test=1000)


@pytest.fixture(scope="session")
def args(small_npz):
    """What all runs on the small data set have in common."""
    return ("data=npz", f"data.path={small_npz}", "batch.global_size=64", f"trainer.epochs={NUM_EPOCHS}")


@pytest.fixture(scope="session")
def train(run_job, args):
    """Train in a folder, on one device."""

    def run(folder, *more, **options):
        (result,) = run_job(SINGLE, *args, f"run_dir={folder}", *more, **options)
        return result

    return run


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, train) -> Path:
    """The folder of an uninterrupted run; do not change it."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    result = train(folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="session")
def browser():
    """A real browser; without one the test is skipped, or fails where skipping is not allowed (CI)."""
    if (reason := missing_browser()) is not None:
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    with run_browser() as running:
        yield running
