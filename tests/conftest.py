"""Fixtures that all tests share: data sets, and Python in a process of its own."""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf
from jobs import CHECKOUT, NUM_EPOCHS, TRAIN, free_ports, horovodrun, kill, start_job, tf_configs
from jobs import python_environment as clean_environment
from small_data import create_small_arrays

from mnist_dist.config.devices import ThreadsConfig
from mnist_dist.engine.flat_model import FlatModel
from mnist_dist.engine.runtime import configure_tensorflow
from mnist_dist.launch.topology import Topology
from mnist_dist.results.history import History, from_csv

# Before anything starts TensorFlow's devices: as many logical CPUs as the largest `mirrored` test has replicas.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 7
)
# And the settings of a run, which cannot be made later.
configure_tensorflow(ThreadsConfig("auto", "auto"), Topology(), num_shards=8, exact=True)

PROBE = CHECKOUT / "tests" / "probe.py"


@pytest.fixture(scope="session")
def mnist_path() -> Path:
    """The real MNIST as an .npz file; without it the test is skipped, but fails where nothing may be skipped (CI)."""
    name = os.environ.get("MNIST_DIST_TEST_MNIST")
    if name and Path(name).is_file():
        return Path(name).resolve()
    reason = f"MNIST_DIST_TEST_MNIST={name}: no such file" if name else "MNIST_DIST_TEST_MNIST=mnist.npz is not set"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def small_arrays() -> dict[str, np.ndarray]:
    """Images of 8x8 pixels in 4 classes; not to be changed."""
    return create_small_arrays()


@pytest.fixture(scope="session")
def small_npz(small_arrays, tmp_path_factory) -> Path:
    """`small_arrays` as a file; not to be changed."""
    path = tmp_path_factory.mktemp("data") / "small.npz"
    np.savez(path, **small_arrays)
    return path


@pytest.fixture
def logged():
    """The messages that the package has logged so far, of a level and above."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("mnist_dist")
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield lambda level=logging.INFO: [record.getMessage() for record in records if record.levelno >= level]
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.fixture(scope="session")
def python_environment() -> dict[str, str]:
    """Environment variables with which `python -m mnist_dist...` runs from any folder, installed or not."""
    return clean_environment()


@pytest.fixture(scope="session")
def run_python(tmp_path_factory, python_environment):
    """Run `python *args` in a process of its own, by default in a new empty folder; returns it with what it printed."""

    def run(*args, env=None, cwd=None, timeout=300) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, args)],
            env={**python_environment, **(env or {})},
            cwd=cwd or tmp_path_factory.mktemp("cwd"),
            timeout=timeout,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture
def start_python(python_environment, tmp_path):
    """Start `python *args` without waiting for it; what still runs when the test ends is killed."""
    processes = []

    def start(*args, cwd=tmp_path, stderr=subprocess.STDOUT) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *map(str, args)],
            env=python_environment,
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


class RunningJob(NamedTuple):
    """The processes that a user launches for a job, and the files that take what they print."""

    processes: list[subprocess.Popen]
    outputs: list[tuple[Path, Path]]

    def is_running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def output(self) -> str:
        return "".join(path.read_text() for pair in self.outputs for path in pair)

    def wait(self, timeout: float) -> list[int]:
        return [process.wait(timeout=timeout) for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def launch_job(tmp_path_factory, python_environment):
    """Start several processes that train together, as a user launches them.

    `launch_job("horovod", 2, *args)` or `launch_job("multiworker", 2, *args)`; `script` replaces `-m mnist_dist.train`,
    and of single ranks of multiworker `per_rank` gives arguments, `delays_s` lets them start later, `ports` sets ports.
    """

    def launch(
        strategy,
        size,
        *args,
        script=TRAIN,
        env=None,
        per_rank=None,
        delays_s=None,
        cwd=None,
        ports=None,
    ) -> RunningJob:
        command = [sys.executable, *script, f"strategy={strategy}", *map(str, args)]
        environment = {**python_environment, **(env or {})}
        if strategy == "horovod":
            commands = [[horovodrun(), "-np", str(size), *command]]
            environments = [environment]
        else:
            free = free_ports(size)
            addresses = [f"127.0.0.1:{(ports or {}).get(rank, free[rank])}" for rank in range(size)]
            commands = [[*command, *(per_rank or {}).get(rank, [])] for rank in range(size)]
            environments = [{**environment, "TF_CONFIG": text} for text in tf_configs(addresses)]
        folder = cwd or tmp_path_factory.mktemp("job")
        job = RunningJob([], [(folder / f"out{n}", folder / f"err{n}") for n in range(len(commands))])
        for rank, (command, environment, (out, err)) in enumerate(
            zip(commands, environments, job.outputs, strict=True)
        ):
            time.sleep((delays_s or {}).get(rank, 0))
            job.processes.append(
                subprocess.Popen(command, env=environment, cwd=folder, stdout=out.open("w"), stderr=err.open("w"))
            )
        return job

    return launch


@pytest.fixture(scope="session")
def run_job(launch_job):
    """As `launch_job`, and wait for the end; returns what each process (horovodrun: what it) printed."""

    def run(*args, **kwargs):
        job = launch_job(*args, **kwargs)
        try:
            codes = job.wait(timeout=300)
        finally:
            job.kill()
        return [
            subprocess.CompletedProcess(process.args, code, out.read_text(), err.read_text())
            for process, code, (out, err) in zip(job.processes, codes, job.outputs, strict=True)
        ]

    return run


@pytest.fixture
def launch(launch_job):
    """As `launch_job`; what still runs when the test ends is killed."""
    jobs = []

    def begin(*args, **kwargs) -> RunningJob:
        jobs.append(launch_job(*args, **kwargs))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.kill()


class Job(NamedTuple):
    """A finished training, as `probe.py` saw it."""

    folder: Path
    outputs: list[str]
    ranks: list[dict]

    @property
    def summary(self) -> dict:
        return json.loads((self.folder / "summary.json").read_text())

    @property
    def history(self) -> History:
        return from_csv((self.folder / "history.csv").read_text())

    def weights(self) -> np.ndarray:
        return FlatModel(keras.models.load_model(self.folder / "model.keras")).get_weights()


@pytest.fixture(scope="session")
def run_probe(run_python, run_job):
    """Run `probe.py` with a strategy and so many processes or replicas; returns the finished processes."""

    def run(strategy, size, *args, env):
        if strategy not in ("single", "mirrored"):
            return run_job(strategy, size, *args, script=[str(PROBE)], env=env)
        replicas = [f"strategy.num_replicas={size}"] if strategy == "mirrored" else []
        return [run_python(PROBE, f"strategy={strategy}", *replicas, *args, env=env)]

    return run


@pytest.fixture(scope="session")
def args(small_npz):
    """What all runs on the small data set have in common (see `jobs.NUM_EPOCHS`)."""
    return ("data=npz", f"data.path={small_npz}", "batch.global_size=64", f"trainer.epochs={NUM_EPOCHS}")


@pytest.fixture(scope="session")
def train(run_python, args):
    """Train in a folder, on one device; `script` replaces `-m mnist_dist.train`."""

    def run(folder, *more, env=None, script=TRAIN):
        return run_python(*script, "strategy=single", *args, f"run_dir={folder}", *more, env=env)

    return run


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, train) -> Path:
    """The folder of a run that nothing happened to; not to be changed."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    result = train(folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def start(python_environment, tmp_path):
    """Start a job in a process group of its own (`jobs.start_job`); what still runs at the end is killed."""
    processes = []

    def begin(job, *args, variables=None, **kwargs) -> subprocess.Popen:
        output, env = tmp_path / f"output-{len(processes)}", {**python_environment, **(variables or {})}
        processes.append(start_job(job, *args, output=output, env=env, cwd=tmp_path, **kwargs))
        return processes[-1]

    yield begin
    for process in processes:
        kill(process)


@pytest.fixture(scope="module")
def train_with(tmp_path_factory, run_probe):
    """Train, once for each set of arguments, and look into every process."""
    done: dict[tuple, Job] = {}

    def train(strategy: str, size: int, *args) -> Job:
        key = (strategy, size, *args)
        if key not in done:
            root = tmp_path_factory.mktemp(f"{strategy}{size}")
            results = run_probe(strategy, size, *args, f"run_dir={root / 'run'}", env={"PROBE_DIR": str(root)})
            for result in results:
                assert result.returncode == 0, result.stderr + result.stdout
            ranks = [json.loads(path.read_text()) for path in sorted(root.glob("rank-*.json"))]
            done[key] = Job(root / "run", [result.stdout for result in results], ranks)
        return done[key]

    return train
