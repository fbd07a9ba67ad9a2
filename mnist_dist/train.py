"""Train: `python -m mnist_dist.train KEY=VALUE ...`. A run, from top to bottom."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mnist_dist.base.console import Console, progress
from mnist_dist.base.errors import EXIT_OK, EXIT_PREEMPTED
from mnist_dist.cli.main import run
from mnist_dist.config.compose import TRAIN
from mnist_dist.config.train import TrainConfig
from mnist_dist.data.splits import preprocess
from mnist_dist.engine.footprint import check_fits
from mnist_dist.launch.job import Job
from mnist_dist.launch.topology import Topology
from mnist_dist.results.reference import Reference
from mnist_dist.results.sums import weights_digest
from mnist_dist.run.checkpoint import ResumePoint
from mnist_dist.run.folder import RunFolder
from mnist_dist.run.input import RunInput, agree_on_input, read_input
from mnist_dist.run.resume import start_point
from mnist_dist.run.saving import PeriodicCheckpoints
from mnist_dist.run.summary import build_summary, build_timing, log_summary

if TYPE_CHECKING:
    from mnist_dist.engine.build import Engine

log = logging.getLogger("mnist_dist.train")  # __name__ is __main__ when run with -m


def train(config: TrainConfig, topology: Topology, console: Console) -> int:
    """Train, evaluate, save and plot one run; returns the exit code."""
    clock = time.perf_counter()
    with Job(topology, timeout_s=config.strategy.start_timeout_s) as job:
        run_folder = RunFolder.from_config(config.run_dir, is_writer=topology.is_chief)
        with job.telling_errors():
            own_input = read_input(config, job, run_folder)
            check_fits(own_input.config, own_input.dataset, topology)
        run_input = agree_on_input(own_input, job)
        if run_input.found.is_finished:
            log.info("%s holds this run, finished: nothing to do", run_folder.path)
            return EXIT_OK
        with job.peers.watching(run_input.watch_address, start_silence_s=config.strategy.start_timeout_s):
            engine = build(run_input, job, console)
            start = prepare_folder(run_input, engine, run_folder, console)
            trained = train_epochs(engine, start, run_folder, job)
            if trained.point.epoch == engine.config.trainer.epochs:
                write_results(engine, trained, run_folder, run_input.reference, clock=clock)
                code = EXIT_OK
            else:
                where = f"after epoch {trained.point.epoch}" if trained.point.epoch else "before the first epoch"
                log.info("Stopped on request %s; run the same command again to resume", where)
                code = EXIT_PREEMPTED
            engine.strategy.barrier()
            return code


def build(run_input: RunInput, job: Job, console: Console) -> "Engine":
    """Start TensorFlow and the devices; raises UserError where configuration and devices do not fit together."""
    config, dataset, checkpoint = run_input.config, run_input.dataset, run_input.found.checkpoint
    # Importing TensorFlow takes seconds, so it comes after everything that may send the user back. The other core
    # prepares the data at the same time.
    preparing = ThreadPoolExecutor(1).submit(
        preprocess, dataset, val_fraction=config.data.val_fraction, split_seed=config.data.split_seed
    )
    with console.tensorflow_start(messages=config.console.tensorflow_messages):
        import mnist_dist.results.curves  # noqa: F401 (not hours later, when its files may have changed)
        from mnist_dist.engine.build import build_engine
        from mnist_dist.strategy.choose import list_gpus

        num_gpus = len(list_gpus())
        splits = preparing.result()
        log.info("Data: %s, %s", dataset.name, splits.describe())
        restored = checkpoint.state if checkpoint else None
        engine = build_engine(config, job.rendezvous, splits, num_gpus=num_gpus, restored=restored)
    job.peers.started()
    return engine


def prepare_folder(run_input: RunInput, engine: "Engine", run_folder: RunFolder, console: Console) -> ResumePoint:
    """Make the run folder this run's own; returns where the training starts, and logs what it will be."""
    start = start_point(
        engine.config,
        run_input.found.point,
        data_sha256=run_input.dataset.sha256,
        num_replicas=engine.strategy.num_replicas,
        global_batch_size=engine.plan.global_batch_size,
    )
    run_folder.create(engine.config)
    console.log_to(run_folder.log_path)
    log.info("Run folder: %s", run_folder.path)
    engine.log_description()
    if start.epoch:
        run_folder.write_history(start.history)  # the file may be ahead of the checkpoint
    return start


@dataclass(frozen=True)
class Trained:
    """How far a training came."""

    point: ResumePoint
    first_epoch_at: float
    """When its first epoch began, on the clock of `time.perf_counter`."""


def train_epochs(engine: "Engine", start: ResumePoint, run_folder: RunFolder, job: Job) -> Trained:
    """Train from `start` to the last epoch, or until a process is asked to stop; either way with a checkpoint."""
    from mnist_dist.engine.actions import LogEpoch

    num_epochs = engine.config.trainer.epochs
    checkpoints = PeriodicCheckpoints(run_folder, engine.config.checkpoint, start, read_state=engine.state.to_arrays)
    job.stop_request.training_begins()
    with progress("training") as show, engine.strategy.collectives():
        trainer = engine.create_trainer(
            [
                LogEpoch(num_epochs=num_epochs),
                run_folder.write_history,
                checkpoints,
                lambda history: show(len(history.epochs), num_epochs),
            ],
            wants_to_stop=job.stop_request,
        )
        show(start.epoch, num_epochs)
        first_epoch_at = time.perf_counter()
        history = trainer.fit(num_epochs=num_epochs, history=start.history)
    checkpoints.catch_up(history)
    return Trained(replace(start, history=history), first_epoch_at)


def write_results(
    engine: "Engine", trained: Trained, run_folder: RunFolder, reference: Reference | None, *, clock: float
) -> None:
    """Evaluate the trained model on every split; write it, the pictures and the summary. `clock`: the run's start."""
    from mnist_dist.results.curves import plot_run

    with engine.strategy.collectives():
        results = engine.evaluate()
    run_folder.save_model(engine.model)
    history, dataset = trained.point.history, engine.config.data.name
    run_folder.write_plots(
        plot_run(
            history,
            results["test"].confusion,
            dataset=dataset,
            class_names=engine.splits.class_names,
            reference=reference,
        )
    )
    timing = build_timing(
        history.column("epoch_s"), startup_s=trained.first_epoch_at - clock, total_s=time.perf_counter() - clock
    )
    summary = build_summary(
        engine.config,
        engine.placement(),
        trained.point,
        results,
        weights_sha256=weights_digest(engine.weights()),
        timing=timing,
    )
    run_folder.write_summary(summary)
    log_summary(summary, run_folder.path)


def main() -> None:
    """The console script."""
    run(TRAIN, train)


if __name__ == "__main__":
    main()
