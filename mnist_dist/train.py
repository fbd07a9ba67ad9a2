"""Train: `python -m mnist_dist.train KEY=VALUE ...`. A run, from top to bottom."""

import contextlib
import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple

from mnist_dist import __version__
from mnist_dist.base.console import Console, progress
from mnist_dist.base.errors import EXIT_OK, EXIT_PREEMPTED, UserError
from mnist_dist.base.surroundings import arithmetic_variables
from mnist_dist.cli.main import run
from mnist_dist.config.compare import job_keys
from mnist_dist.config.compose import TRAIN
from mnist_dist.config.train import TrainConfig
from mnist_dist.data.load import ImageDataset, load_dataset
from mnist_dist.data.splits import SPLIT_NAMES, check_val_fraction, preprocess
from mnist_dist.engine.footprint import check_fits
from mnist_dist.launch.agreement import Report, agree
from mnist_dist.launch.gpus import own_uuids
from mnist_dist.launch.peers import PeerWatch
from mnist_dist.launch.rendezvous import RankTaken, hold_own_port
from mnist_dist.launch.stop import StopRequest
from mnist_dist.launch.topology import Topology
from mnist_dist.results.history import History
from mnist_dist.results.reference import Reference, load_reference
from mnist_dist.results.sums import weights_digest
from mnist_dist.run.checkpoint import DATA_DIGEST, Checkpoint, Progress
from mnist_dist.run.folder import RunFolder, Timing, build_summary
from mnist_dist.run.resume import check_same_batches, settle, start_or_resume

if TYPE_CHECKING:
    from mnist_dist.engine.build import Training

log = logging.getLogger("mnist_dist.train")  # __name__ is __main__ when run with -m


def train(config: TrainConfig, topology: Topology, console: Console) -> int:
    """Train, evaluate, save and plot one run; returns the exit code."""
    started = time.perf_counter()
    peers = PeerWatch(topology)
    with StopRequest(tell_others=peers.tell_why, has_others=topology.world_size > 1) as stop_request:
        run_folder = RunFolder.from_config(config.run_dir, is_writer=topology.is_chief)
        run_input = agree_on_input(config, topology, run_folder, contact=peers.contact)
        if run_input is None:
            log.info("%s holds this run, finished: nothing to do", run_folder.path)
            return EXIT_OK
        with peers.watching(run_input.contact, start_silence_s=config.strategy.start_timeout_s):
            return train_on(
                run_input, topology, run_folder, console, peers=peers, stop_request=stop_request, started=started
            )


def train_on(
    run_input: "RunInput",
    topology: Topology,
    run_folder: RunFolder,
    console: Console,
    *,
    peers: PeerWatch,
    stop_request: StopRequest,
    started: float,
) -> int:
    """From the input to the results, or to a request to stop; returns the exit code."""
    config, dataset, reference, reached, checkpoint, _ = run_input

    # Importing TensorFlow takes seconds, so it comes after everything that may send the user back. The other core
    # prepares the data meanwhile.
    preparing = ThreadPoolExecutor(1).submit(
        preprocess, dataset, val_fraction=config.data.val_fraction, split_seed=config.data.split_seed
    )
    with console.tensorflow_start(messages=config.console.tensorflow_messages):
        from mnist_dist.engine.build import build_training
        from mnist_dist.engine.trainer import LogEpoch, Periodic
        from mnist_dist.results import curves as plots
        from mnist_dist.strategy.choose import list_gpus

        num_gpus = len(list_gpus())
        splits = preparing.result()
        log.info("Data: %s, %s", dataset.name, splits.describe())
        restored = checkpoint.state if checkpoint else None
        training = build_training(config, topology, splits, num_gpus=num_gpus, restored=restored)
    peers.started()
    config, strategy = training.config, training.strategy
    check_same_batches(reached, training)

    run_folder.create(config)
    console.log_to(run_folder.log_path)
    placement = describe_placement(training, topology)
    if (job := topology.slurm) is not None:
        log.info("Slurm: job %s on %s, restarted %d time(s)", job.job_id, job.node_list, job.restart_count)
    log.info("Run folder: %s", run_folder.path)
    log.info("Model: %s, %s parameters", config.model.name, f"{training.network.num_parameters:,}")
    log.info("Devices: %s; precision %s", ", ".join(strategy.devices()), config.precision.name)
    log_batches(placement, training)

    # The training.
    num_epochs = config.trainer.epochs
    start = start_or_resume(reached, training, run_folder, dataset_sha256=dataset.sha256)

    def save_checkpoint(history: History) -> None:
        run_folder.save_checkpoint(
            lambda: Checkpoint(replace(start, history=history), training.state.to_arrays()), keep=config.checkpoint.keep
        )

    saving = Periodic(
        save_checkpoint,
        every_epochs=config.checkpoint.every_epochs,
        every_s=config.checkpoint.every_s,
        start_epoch=start.epoch,
    )
    stop_request.training_begins()
    with progress("training") as show, strategy.collectives():
        trainer = training.create_trainer(
            actions=[
                LogEpoch(num_epochs=num_epochs),
                run_folder.write_history,
                saving,
                lambda history: show(len(history.epochs), num_epochs),
            ],
            wants_to_stop=stop_request,
        )
        show(start.epoch, num_epochs)
        startup_s = time.perf_counter() - started
        history = trainer.fit(num_epochs=num_epochs, history=start.history)
    saving.catch_up(history)
    if len(history.epochs) < num_epochs:
        where = f"after epoch {len(history.epochs)}" if history.epochs else "before the first epoch"
        log.info("Stopped on request %s; run the same command again to go on", where)
        strategy.barrier()
        return EXIT_PREEMPTED

    # The results.
    with strategy.collectives():
        results = training.evaluate()
    run_folder.save_model(training.model)
    pictures = plots.plot_run(
        history, results["test"].confusion, dataset=dataset.name, class_names=splits.class_names, reference=reference
    )
    run_folder.write_plots(pictures)
    summary = build_summary(
        config=config,
        dataset_sha256=dataset.sha256,
        placement=placement,
        history=history,
        results=results,
        weights_sha256=weights_digest(training.weights()),
        timing=Timing(startup_s=startup_s, total_s=time.perf_counter() - started),
        resumed_from_epochs=start.resumed_from_epochs,
    )
    run_folder.write_summary(summary)
    log_results(summary, run_folder)
    strategy.barrier()
    return EXIT_OK


class RunInput(NamedTuple):
    """What a run reads, the same on all processes but for the checkpoint."""

    config: TrainConfig
    """With the name of the data in place of `auto`, and with what each `auto` was in the run that goes on."""
    dataset: ImageDataset
    reference: Reference | None
    reached: Progress | None
    """How far the run has come that goes on, if one does."""
    checkpoint: Checkpoint | None
    """That of `reached`, on the chief."""
    contact: str
    """Of the watch over all processes."""


def agree_on_input(config: TrainConfig, topology: Topology, run_folder: RunFolder, *, contact: str) -> RunInput | None:
    """The input, once all processes of the job have it and have the same; None if the run is finished already.

    Raises:
        UserError: something is wrong with it here or in another process.
    """
    timeout_s = config.strategy.start_timeout_s
    try:
        dataset, reference = load_input(config, topology, run_folder)
        config = replace(config, data=replace(config.data, name=dataset.name))
        checkpoint = run_folder.load_checkpoint()
        reached = checkpoint.progress if checkpoint else None
        run_folder.check_same_training(config, dataset_sha256=dataset.sha256, progress=reached)
        is_finished = run_folder.is_finished(config, progress=reached)
        gpus = own_uuids(topology)
        facts = describe_training(config, dataset, num_gpus=len(gpus))
        report = Report(
            facts=facts,
            gpus=gpus,
            is_finished=is_finished,
            progress=reached.to_json() if reached else "",
            contact=contact,
        )
    except RankTaken:
        raise  # the job has nothing to do with this process
    except UserError as error:
        with contextlib.suppress(UserError):  # this one is the reason, whatever the others say
            agree(Report(error=str(error)), topology=topology, timeout_s=timeout_s)
        raise
    agreed = agree(report, topology=topology, timeout_s=timeout_s)
    if agreed.is_finished:
        return None
    reached = Progress.from_json(agreed.progress) if agreed.progress else None
    return RunInput(settle(config, reached), dataset, reference, reached, checkpoint, agreed.contact)


def load_input(config: TrainConfig, topology: Topology, run_folder: RunFolder) -> tuple[ImageDataset, Reference | None]:
    """The data and the reference curves; raises UserError for whatever of the input can be seen to be wrong here."""
    hold_own_port(topology)
    run_folder.check_usable(may_resume=config.resume == "auto")
    run_folder.claim()
    reference = load_reference(config.plots.reference)
    dataset = load_dataset(config.data)
    check_val_fraction(len(dataset.x_train), config.data.val_fraction)
    check_fits(config, dataset, topology)
    return dataset, reference


def describe_training(config: TrainConfig, dataset: ImageDataset, *, num_gpus: int) -> dict[str, str]:
    """What all processes of a job must have in common."""
    try:
        horovod = metadata.version("horovod")
    except metadata.PackageNotFoundError:
        horovod = "none"
    return {
        **job_keys(asdict(config)),
        DATA_DIGEST: dataset.sha256,
        "version of mnist_dist": __version__,
        "version of tensorflow": metadata.version("tensorflow"),
        "version of horovod": horovod,
        "number of GPUs": str(num_gpus),
        **arithmetic_variables(),
    }


def describe_placement(training: "Training", topology: Topology) -> dict[str, Any]:
    """Where and how the training runs, for the summary."""
    strategy, plan, config = training.strategy, training.plan, training.config
    return {
        "strategy": strategy.name,
        "world_size": topology.world_size,
        "num_replicas": strategy.num_replicas,
        "global_batch_size": plan.global_batch_size,
        "per_replica_batch_size": -(-plan.global_batch_size // strategy.num_replicas),
        "precision": config.precision.name,
        "reproducibility": config.reproducibility,
        "num_shards": training.shards.num_shards,
    }


def log_batches(placement: Mapping[str, Any], training: "Training") -> None:
    """Log how the examples are divided; nothing is scaled without a word."""
    log.info(
        "Batch: %d over %d replica(s) in %d process(es), %d each; %d steps an epoch; learning rate %s",
        placement["global_batch_size"],
        placement["num_replicas"],
        placement["world_size"],
        placement["per_replica_batch_size"],
        training.plan.steps_per_epoch,
        training.learning_rate.describe(),
    )
    log.info(
        "Reproducibility: %s",
        f"exact, {placement['num_shards']} shards: the same bits on up to so many replicas"
        if placement["reproducibility"] == "exact"
        else "fast: the number of replicas may change the last bits",
    )
    num_shards = -(-placement["num_shards"] // placement["world_size"])
    on_cpu = training.strategy.compute_capability() is None
    if placement["reproducibility"] == "exact" and on_cpu and training.num_cores > num_shards:
        log.info(
            "Cores: %d of this process's %d compute at a time, one for each of its shards; a larger batch.num_shards "
            "uses more, with other bits",
            num_shards,
            training.num_cores,
        )


def log_results(summary: Mapping[str, Any], run_folder: RunFolder) -> None:
    """Log the evaluation of the saved model, and where everything is."""
    for name in SPLIT_NAMES:
        log.info(
            "%-5s - loss: %.4f - accuracy: %.4f (%d of %d)",
            name,
            *(summary[name][key] for key in ("loss", "accuracy", "num_correct", "num_examples")),
        )
    log.info("Avoidable bias: %.2f %%", summary["avoidable_bias_percent"])
    log.info("Variance: %.2f %%", summary["variance_percent"])
    log.info("Results: %s (model.keras, summary.json, history.csv, plots/)", run_folder.path)


def main() -> None:
    """The console script."""
    run(TRAIN, train)


if __name__ == "__main__":
    main()
