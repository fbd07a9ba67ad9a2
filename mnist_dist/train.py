"""Train: `python -m mnist_dist.train KEY=VALUE ...`. A run, from top to bottom."""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from mnist_dist.base.console import Console, progress
from mnist_dist.base.errors import EXIT_LOST_PEER, EXIT_OK, EXIT_PREEMPTED, LostTouch
from mnist_dist.cli.explain import describe
from mnist_dist.cli.main import run
from mnist_dist.config.compose import TRAIN
from mnist_dist.config.train import TrainConfig
from mnist_dist.data.splits import SplitName, preprocess
from mnist_dist.engine.footprint import check_fits
from mnist_dist.launch.job import Job
from mnist_dist.launch.peers import PeerEnd
from mnist_dist.launch.topology import Topology
from mnist_dist.results.reference import Reference
from mnist_dist.results.sums import EvaluationSums
from mnist_dist.run.checkpoint import ResumePoint
from mnist_dist.run.early_end import early_end
from mnist_dist.run.events import EventLog, LostRank
from mnist_dist.run.folder import REPORT_PAGE, TENSORBOARD, RunFolder
from mnist_dist.run.input import RunInput, agree_on_input, read_input, start_timeout_s
from mnist_dist.run.record import read_record
from mnist_dist.run.resume import start_point
from mnist_dist.run.saving import PeriodicCheckpoints
from mnist_dist.run.summary import RunClock, build_summary, log_summary

if TYPE_CHECKING:
    from mnist_dist.engine.build import Engine
    from mnist_dist.engine.tensorboard import EventFiles

log = logging.getLogger("mnist_dist.train")  # __name__ is __main__ when run with -m


def train(config: TrainConfig, topology: Topology, console: Console) -> int:
    """Train, evaluate, save and plot one run; returns the exit code."""
    clock = RunClock()
    with Job(topology, timeout_s=start_timeout_s(config, topology)) as job:
        run_folder = RunFolder.from_config(config.run_dir, is_writer=topology.is_chief)
        with job.telling_errors():
            own_input = read_input(config, job, run_folder)
            check_fits(own_input.config, own_input.dataset, topology)
        run_input = agree_on_input(own_input, job)
        events = EventLog(run_folder, at_end=lambda: write_report(run_folder, config))
        if run_input.found.is_finished:
            log.info("%s holds this run, finished: nothing to do", run_folder.path)
            events.settle()
            return EXIT_OK
        job.peers.at_loss = partial(note_peer_end, events, run_input.hosts)
        watching = job.peers.watching(run_input.watch_address, start_silence_s=config.strategy.start_timeout_s)
        with events.noting_failure(), watching:
            engine = build(run_input, job, console)
            start = prepare_folder(run_input, engine, run_folder, events, console)
            board = begin_event_files(start, run_folder, config)
            reached = train_epochs(engine, start, run_folder, job, clock, board)
            num_epochs, early = engine.config.trainer.epochs, early_end(engine.config.trainer, reached.history)
            is_finished = reached.epoch == num_epochs or bool(early)
            if is_finished:
                if early:
                    log.info("Finished after epoch %d of %d: %s", reached.epoch, num_epochs, early)
                results = write_results(engine, reached, run_folder, run_input.reference, board)
                write_summary(engine, reached, results, run_folder, clock, events)
                events.ended("finished", early)
            else:
                where = f"after epoch {reached.epoch}" if reached.epoch else "before the first epoch"
                log.info("Stopped on request %s; run the same command again to resume", where)
                events.ended("stopped", reason=f"stopped on request {where}")
            engine.strategy.barrier()
            return EXIT_OK if is_finished else EXIT_PREEMPTED


def build(run_input: RunInput, job: Job, console: Console) -> "Engine":
    """Start TensorFlow and the devices; raises UserError if configuration and devices do not match."""
    config, dataset, checkpoint = run_input.config, run_input.dataset, run_input.found.checkpoint
    # Importing TensorFlow takes seconds, so it comes after everything that may refuse the input. Another core prepares
    # the data at the same time.
    preparing = ThreadPoolExecutor(1).submit(
        preprocess, dataset, val_fraction=config.data.val_fraction, split_seed=config.data.split_seed
    )
    with console.tensorflow_start(messages=config.console.tensorflow_messages):
        import mnist_dist.report.run_page  # noqa: F401 (like the files of pages, it may have changed hours later)
        from mnist_dist.engine.build import build_engine
        from mnist_dist.results.page import load_files
        from mnist_dist.strategy.choose import list_gpus

        load_files()
        num_gpus = len(list_gpus())
        splits = preparing.result()
        log.info("Data: %s, %s", dataset.name, splits.describe())
        restored = checkpoint.state if checkpoint else None
        point = run_input.found.point
        saved = None if point is None else point.network
        engine = build_engine(config, job.rendezvous, splits, num_gpus=num_gpus, saved_network=saved, restored=restored)
    job.peers.started()
    return engine


def prepare_folder(
    run_input: RunInput, engine: "Engine", run_folder: RunFolder, events: EventLog, console: Console
) -> ResumePoint:
    """Set up the run folder; logs what will be trained, and returns where the training starts."""
    from mnist_dist.engine.network import describe_network

    start = start_point(
        engine.config,
        run_input.found.point,
        data_sha256=run_input.dataset.sha256,
        num_replicas=engine.strategy.num_replicas,
        global_batch_size=engine.plan.global_batch_size,
        network=describe_network(engine.config, engine.flat_model),
    )
    run_folder.create(engine.config)
    console.log_to(run_folder.log_path)
    log.info("Run folder: %s", run_folder.path)
    engine.log_description()
    events.note_loss()
    if (run_folder.path / "history.csv").exists() or start.epoch:
        # It may be ahead of the checkpoint. Not after the start is noted: what is in it is that start's.
        run_folder.write_history(start.history)
    events.started(start.epoch, {**engine.facts(), "hosts": run_input.hosts}, run_input.losses)
    return start


def begin_event_files(start: ResumePoint, run_folder: RunFolder, config: TrainConfig) -> "EventFiles":
    """Begin the event files for TensorBoard; ones that are never written, if they are not wanted."""
    from mnist_dist.engine.tensorboard import EventFiles

    board = EventFiles(partial(run_folder.write_into, TENSORBOARD) if config.tensorboard else lambda write: None)
    board.begin(start.history, run_folder.path / "config.yaml")
    return board


def train_epochs(
    engine: "Engine", start: ResumePoint, run_folder: RunFolder, job: Job, clock: RunClock, board: "EventFiles"
) -> ResumePoint:
    """Train from `start` until the run is finished or a process is asked to stop; either way with a checkpoint."""
    from mnist_dist.engine.actions import LogEpoch

    config = engine.config.trainer
    num_epochs = config.epochs
    checkpoints = PeriodicCheckpoints(
        run_folder, engine.config.checkpoint, start, read_state=engine.state.to_arrays, after_save=board.write
    )
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
        clock.first_epoch_begins()
        history = trainer.fit(
            num_epochs=num_epochs,
            history=start.history,
            is_enough=lambda history: bool(early_end(config, history)),
        )
    checkpoints.catch_up(history)
    return replace(start, history=history)


def write_results(
    engine: "Engine",
    reached: ResumePoint,
    run_folder: RunFolder,
    reference: Reference | None,
    board: "EventFiles",
) -> Mapping[SplitName, EvaluationSums]:
    """Evaluate the trained model on every split, which is returned; write it and the pictures."""
    from mnist_dist.results.curves import plot_run

    with engine.strategy.collectives():
        results, predictions = engine.evaluate()
    run_folder.save_model(engine.model)
    run_folder.write_predictions(predictions)
    history, confusion = reached.history, results["test"].confusion
    dataset, class_names = engine.config.data.name, engine.splits.class_names
    run_folder.write_plots(plot_run(history, confusion, dataset=dataset, class_names=class_names, reference=reference))
    board.write_confusion_matrix(reached.epoch, run_folder.path / "plots/confusion_matrix.png")
    return results


def write_summary(
    engine: "Engine",
    reached: ResumePoint,
    results: Mapping[SplitName, EvaluationSums],
    run_folder: RunFolder,
    clock: RunClock,
    events: EventLog,
) -> None:
    """Write and log the summary: the run is finished."""
    summary = build_summary(
        engine.config,
        engine.placement(),
        reached,
        results,
        weights_sha256=engine.weights_digest(),
        timing=clock.timing(reached.history.column("epoch_s")),
    )
    run_folder.write_summary(replace(summary, incidents=events.incidents(reached.history)))
    log_summary(summary, run_folder.path)


def note_peer_end(events: EventLog, hosts: Sequence[str], end: PeerEnd) -> None:
    """Note that the run has failed because another process has ended."""
    lost = None if end.rank is None else LostRank(end.rank, hosts[end.rank], end.how)
    events.failed(end.text, LostTouch.__name__ if end.code == EXIT_LOST_PEER else "", lost=lost)


def write_report(run_folder: RunFolder, config: TrainConfig) -> None:
    """Write `report.html`, if it is wanted; what is wrong with a report must not end a run."""
    if config.report:
        try:
            from mnist_dist.report.run_page import build_run_page

            run_folder.write_lazily(REPORT_PAGE, lambda: build_run_page(read_record(run_folder.path, is_alive=False)))
        except Exception as error:
            log.warning("%s was not written: %s", REPORT_PAGE, describe(error))


def main() -> None:
    """The console script."""
    run(TRAIN, train)


if __name__ == "__main__":
    main()
