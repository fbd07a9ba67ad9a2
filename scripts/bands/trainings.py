"""Many short trainings, in one process per core, remembered in a file so that an interrupted build continues."""

import json
import logging
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mnist_dist.base.errors import TrainingFailed
from mnist_dist.config.compose import compose_config
from mnist_dist.config.train import TrainConfig
from mnist_dist.data.dataset import ImageDataset
from mnist_dist.data.load import load_dataset
from mnist_dist.data.splits import Splits, preprocess
from mnist_dist.launch.rendezvous import Rendezvous
from mnist_dist.launch.topology import Topology
from mnist_dist.results.history import EpochMetrics, History
from mnist_dist.verify.bands import Trial


class Task(NamedTuple):
    """One training."""

    dataset: str
    precision: str
    seed: int
    fault: str = ""


@dataclass(frozen=True)
class Sources:
    """Where the data sets are."""

    mnist: str
    """A file with MNIST."""

    def config(self, task: Task, overrides: Sequence[str] = ()) -> TrainConfig:
        """The configuration of a training; nothing is left to `auto`."""
        fixed = ("strategy=single", "reproducibility=exact", "compile=none", f"precision={task.precision}")
        data = ("data=mnist", f"data.path={self.mnist}") if task.dataset == "mnist" else (f"data={task.dataset}",)
        return compose_config(*data, *fixed, *overrides, f"seed={task.seed}")


class Records:
    """The trainings so far: a line of JSON each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.trials: dict[Task, Trial | None] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                row = json.loads(line)
                self.trials[Task(*row["task"])] = _to_trial(row["trial"])

    def add(self, task: Task, trial: Trial | None) -> None:
        """Remember a training; None is one that failed."""
        self.trials[task] = trial
        with self._path.open("a") as file:
            file.write(json.dumps({"task": task, "trial": trial and _to_row(trial)}) + "\n")


def _to_row(trial: Trial) -> dict[str, Any]:
    losses = [[float(f"{loss:.9g}") for loss in losses] for losses in trial.step_losses]
    return {**asdict(trial), "step_losses": losses}


def _to_trial(row: dict[str, Any] | None) -> Trial | None:
    if row is None:
        return None
    epochs = [EpochMetrics(**epoch) for epoch in row["history"]["epochs"]]
    losses = tuple(np.array(losses) for losses in row["step_losses"])
    return Trial(losses, row["batch_size"], History(tuple(epochs)), row["num_val"])


def train_all(tasks: Iterable[Task], records: Records, sources: Sources, *, num_processes: int) -> None:
    """Train what is not recorded yet."""
    missing = [task for task in tasks if task not in records.trials]
    if not missing:
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("i", 0)
    with ProcessPoolExecutor(num_processes, context, initializer=_start, initargs=(counter, sources)) as pool:
        # Neighbours have the same data set, fault and so on: what a process keeps of the last one serves the next.
        futures = {pool.submit(_train, task): task for task in missing}
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                records.add(futures[future], future.result())
                if number % 50 == 0:
                    print(f"{number} of {len(missing)} trainings", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_sources: Sources
_strategy: Any


def _start(counter: Any, sources: Sources) -> None:
    """One core for each process, so that they do not wait for each other."""
    global _sources, _strategy
    with counter.get_lock():
        number, counter.value = counter.value, counter.value + 1
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # every training traces its programs anew
    from mnist_dist.engine.build import start_devices

    _sources = sources
    config = sources.config(Task("digits", "float32", seed=0))
    _, _strategy = start_devices(config, Rendezvous(Topology(), timeout_s=60), num_gpus=0)


@lru_cache(maxsize=1)
def load(sources: Sources, name: str) -> tuple[ImageDataset, Splits]:
    """A data set, ready."""
    config = sources.config(Task(name, "float32", seed=0)).data
    dataset = load_dataset(config)
    return dataset, preprocess(dataset, val_fraction=config.val_fraction, split_seed=config.split_seed)


def _train(task: Task) -> Trial | None:
    import keras
    from faults import FAULTS, Fault

    from mnist_dist.engine.build import assemble
    from mnist_dist.verify.trial import run_trial

    keras.backend.clear_session()
    fault = FAULTS[task.fault] if task.fault else Fault("none")
    _, splits = load(_sources, task.dataset)
    if fault.spoil_splits:
        splits = fault.spoil_splits(splits, task.seed)
    engine = assemble(_sources.config(task, fault.overrides), _strategy, splits, topology=Topology())
    if fault.spoil_engine:
        engine = fault.spoil_engine(engine)
    try:
        return run_trial(engine)
    except TrainingFailed:
        return None
