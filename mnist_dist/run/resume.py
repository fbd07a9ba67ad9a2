"""Going on with a run: what it keeps of its first start, what must be the same, and where it goes on."""

import logging
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from mnist_dist.base.errors import UserError
from mnist_dist.config.compare import training_keys
from mnist_dist.config.train import TrainConfig
from mnist_dist.results.history import History
from mnist_dist.run.checkpoint import DATA_DIGEST, Progress
from mnist_dist.run.folder import RunFolder

if TYPE_CHECKING:
    from mnist_dist.engine.build import Training

log = logging.getLogger(__name__)


def settle(config: TrainConfig, reached: Progress | None) -> TrainConfig:
    """The configuration with what `auto` has become in the run that goes on, which other devices do not change.

    And with all its epochs, which may be more than were asked for where the results of a finished run are made again.
    """
    if reached is None:
        return config
    mode, precision = config.reproducibility, config.precision.name
    return replace(
        config,
        trainer=replace(config.trainer, epochs=max(config.trainer.epochs, reached.epoch)),
        reproducibility=reached.training["reproducibility"] if mode == "auto" else mode,
        precision=replace(
            config.precision, name=reached.training["precision.name"] if precision == "auto" else precision
        ),
    )


def check_same_batches(reached: Progress | None, training: "Training") -> None:
    """Raise UserError if the steps would be other ones than those of the run that goes on."""
    size = training.plan.global_batch_size
    if reached is not None and reached.global_batch_size != size:
        raise UserError(
            f"batch.scaling=weak: with {training.strategy.num_replicas} replicas a step has {size} images, but in the "
            f"run here it has {reached.global_batch_size}; go on with {reached.num_replicas} replicas, or name "
            "another run_dir"
        )


def start_or_resume(
    reached: Progress | None, training: "Training", run_folder: RunFolder, *, dataset_sha256: str
) -> Progress:
    """Where the training starts: at nothing, or after the last epoch of `reached`; logs which, and what to know."""
    config, strategy = training.config, training.strategy
    start = Progress(
        History(),
        training={**training_keys(asdict(config)), DATA_DIGEST: dataset_sha256},
        num_replicas=strategy.num_replicas,
        global_batch_size=training.plan.global_batch_size,
    )
    if reached is None:
        return start
    log.info("Resuming after epoch %d of %d", reached.epoch, config.trainer.epochs)
    if config.reproducibility == "fast" and reached.num_replicas != strategy.num_replicas:
        log.info(
            "Replicas: %d until now, %d from here on; with reproducibility=fast that may change the last bits",
            reached.num_replicas,
            strategy.num_replicas,
        )
    run_folder.write_history(reached.history)  # the file may be ahead of the checkpoint
    resumed = (*reached.resumed_from_epochs, reached.epoch)
    return replace(start, history=reached.history, resumed_from_epochs=resumed)
