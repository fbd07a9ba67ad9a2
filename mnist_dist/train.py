"""Train: `python -m mnist_dist.train KEY=VALUE ...`. A run, from top to bottom."""

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from mnist_dist.base.console import Console, progress
from mnist_dist.base.errors import EXIT_OK, EXIT_PREEMPTED
from mnist_dist.cli.main import run
from mnist_dist.config.compare import job_keys
from mnist_dist.config.compose import TRAIN
from mnist_dist.config.train import TrainConfig
from mnist_dist.data.load import ImageDataset, load_dataset
from mnist_dist.data.splits import check_val_fraction, preprocess
from mnist_dist.engine.footprint import check_fits
from mnist_dist.launch.agreement import Report, agree, job_facts
from mnist_dist.launch.gpus import own_uuids
from mnist_dist.launch.job import Job
from mnist_dist.launch.topology import Topology
from mnist_dist.results.history import History
from mnist_dist.results.reference import Reference, load_reference
from mnist_dist.results.sums import weights_digest
from mnist_dist.run.checkpoint import DATA_DIGEST, Checkpoint, ResumePoint
from mnist_dist.run.folder import RunFolder
from mnist_dist.run.resume import inspect, settle, start_point
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
            found = read_input(config, job, run_folder)
            report = report_of(found, job)
        agreed = agree(report, job.rendezvous)
        if agreed.is_finished:
            log.info("%s holds this run, finished: nothing to do", run_folder.path)
            return EXIT_OK
        run_input = replace(found, point=ResumePoint.from_json(agreed.resume_point) if agreed.resume_point else None)
        with job.peers.watching(agreed.watch_address, start_silence_s=config.strategy.start_timeout_s):
            engine = build(run_input, job, console)
            start = prepare_folder(run_input, engine, run_folder, console)
            trained = train_epochs(engine, start, run_folder, job)
            if trained.point.epoch < engine.config.trainer.epochs:
                where = f"after epoch {trained.point.epoch}" if trained.point.epoch else "before the first epoch"
                log.info("Stopped on request %s; run the same command again to resume", where)
                code = EXIT_PREEMPTED
            else:
                write_results(engine, trained, run_folder, run_input.reference, clock=clock)
                code = EXIT_OK
            engine.strategy.barrier()
            return code


@dataclass(frozen=True)
class RunInput:
    """What a run reads; alike on all processes but for the checkpoint."""

    config: TrainConfig
    """With the name of the data in place of `auto`."""
    dataset: ImageDataset
    reference: Reference | None
    point: ResumePoint | None
    """How far the run has come, if one is to be resumed; known to the chief alone until all have agreed."""
    checkpoint: Checkpoint | None
    """That of `point`, on the chief."""
    is_finished: bool


def read_input(asked: TrainConfig, job: Job, run_folder: RunFolder) -> RunInput:
    """The run folder, the data and the reference; raises UserError for whatever can be seen to be wrong here."""
    job.rendezvous.hold_own_port()
    run_folder.check_usable(may_resume=asked.resume == "auto")
    run_folder.claim()
    reference = load_reference(asked.plots.reference)
    dataset = load_dataset(asked.data)
    check_val_fraction(len(dataset.x_train), asked.data.val_fraction)
    check_fits(asked, dataset, job.topology)
    config = replace(asked, data=replace(asked.data, name=dataset.name))
    found = inspect(run_folder, config, data_sha256=dataset.sha256)
    return RunInput(config, dataset, reference, found.point, found.checkpoint, found.is_finished)


def report_of(run_input: RunInput, job: Job) -> Report:
    """What this process tells the others, before any of them starts TensorFlow."""
    gpus = own_uuids(job.topology)
    keys = {**job_keys(asdict(run_input.config)), DATA_DIGEST: run_input.dataset.sha256}
    return Report(
        facts=job_facts(keys, num_gpus=len(gpus)),
        gpus=gpus,
        is_finished=run_input.is_finished,
        resume_point=run_input.point.to_json() if run_input.point else "",
        watch_address=job.peers.address,
    )


def build(run_input: RunInput, job: Job, console: Console) -> "Engine":
    """Start TensorFlow and the devices; raises UserError where configuration and devices do not fit together."""
    config, dataset = settle(run_input.config, run_input.point), run_input.dataset
    # Importing TensorFlow takes seconds, so it comes after everything that may send the user back. The other core
    # prepares the data meanwhile.
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
        restored = run_input.checkpoint.state if run_input.checkpoint else None
        engine = build_engine(config, job.rendezvous, splits, num_gpus=num_gpus, restored=restored)
    job.peers.started()
    return engine


def prepare_folder(run_input: RunInput, engine: "Engine", run_folder: RunFolder, console: Console) -> ResumePoint:
    """Make the run folder this run's own; returns where the training starts, and logs what it will be."""
    start = start_point(
        engine.config,
        run_input.point,
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
    from mnist_dist.engine.actions import LogEpoch, Periodic

    config, num_epochs = engine.config, engine.config.trainer.epochs

    def save_checkpoint(history: History) -> None:
        run_folder.save_checkpoint(
            lambda: Checkpoint(replace(start, history=history), engine.state.to_arrays()), keep=config.checkpoint.keep
        )

    saving = Periodic(
        save_checkpoint,
        every_epochs=config.checkpoint.every_epochs,
        every_s=config.checkpoint.every_s,
        start_epoch=start.epoch,
    )
    job.stop_request.training_begins()
    with progress("training") as show, engine.strategy.collectives():
        trainer = engine.create_trainer(
            [
                LogEpoch(num_epochs=num_epochs),
                run_folder.write_history,
                saving,
                lambda history: show(len(history.epochs), num_epochs),
            ],
            wants_to_stop=job.stop_request,
        )
        show(start.epoch, num_epochs)
        first_epoch_at = time.perf_counter()
        history = trainer.fit(num_epochs=num_epochs, history=start.history)
    saving.catch_up(history)
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
