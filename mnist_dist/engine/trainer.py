"""The outer loop: epochs, and the actions between them."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mnist_dist.base.errors import TrainingFailed
from mnist_dist.engine.batches import BatchPlan
from mnist_dist.results.history import EpochMetrics, History
from mnist_dist.results.sums import EpochSums, EvaluationSums

log = logging.getLogger(__name__)

EpochAction = Callable[[History], None]
"""Something to do after each epoch, with all epochs so far."""


class RunEpoch(Protocol):
    """Train on one epoch's batches (see `steps.TrainProgram.run_epoch`)."""

    def __call__(self, indices: npt.NDArray[np.int32], *, learning_rates: npt.NDArray[np.float64]) -> EpochSums:
        """Train on the steps of `indices`, each with its learning rate."""
        ...


class Trainer:
    """Trains epoch after epoch; knows neither files nor devices, which it is handed as callables."""

    def __init__(
        self,
        *,
        train_epoch: RunEpoch,
        validate: Callable[[], EvaluationSums],
        plan: BatchPlan,
        seed: int,
        learning_rate_at: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]],
        check_replicas: Callable[[int], bool] = lambda epoch: False,
        digest_weights: Callable[[], str | None] = lambda: None,
        actions: Sequence[EpochAction] = (),
    ) -> None:
        self._train_epoch = train_epoch
        self._validate = validate
        self._plan = plan
        self._seed = seed
        self._learning_rate_at = learning_rate_at
        self._check_replicas = check_replicas
        self._digest_weights = digest_weights
        self._actions = actions

    def fit(self, *, num_epochs: int, history: History = History()) -> History:  # noqa: B008 (a frozen value)
        """Train until there are `num_epochs`, those of `history` included, or fewer if any process was asked to stop.

        Raises TrainingFailed. The state of the programs must be that after the last epoch of `history`.
        """
        stops = len(history.epochs) < num_epochs and self._check_replicas(len(history.epochs))
        while len(history.epochs) < num_epochs and not stops:
            row = self.run_epoch(len(history.epochs) + 1)
            stops = self._check_replicas(row.epoch)
            history = history.append(row)
            for action in self._actions:
                action(history)
        return history

    def run_epoch(self, epoch: int) -> EpochMetrics:
        """Train on one epoch, counted from 1, and validate; raises TrainingFailed."""
        start = time.perf_counter()
        indices = self._plan.shuffled(seed=self._seed, epoch=epoch)
        learning_rates = self._learning_rate_at(np.arange(len(indices)) + (epoch - 1) * len(indices))
        sums = self._train_epoch(indices, learning_rates=learning_rates)
        train_s = time.perf_counter() - start
        _check_finite(sums.losses, epoch=epoch)
        validation = self._validate()
        if not math.isfinite(validation.loss):
            raise TrainingFailed(
                f"the validation loss became {validation.loss} after epoch {epoch}; the results of earlier epochs are "
                "kept. A smaller optimizer.learning_rate usually helps"
            )
        epoch_s = time.perf_counter() - start
        return EpochMetrics(
            epoch=epoch,
            loss=sums.losses.sum(dtype=np.float64).item() / self._plan.num_examples,
            accuracy=sums.num_correct.sum().item() / self._plan.num_examples,
            val_loss=validation.loss / validation.num_examples,
            val_accuracy=validation.num_correct / validation.num_examples,
            learning_rate=learning_rates[-1].item(),
            epoch_s=epoch_s,
            images_per_s=self._plan.num_examples / train_s,
            weights_sha256=self._digest_weights(),
        )


def _check_finite(losses: npt.NDArray[np.float32], *, epoch: int) -> None:
    bad_steps = np.flatnonzero(~np.isfinite(losses))
    if len(bad_steps):
        step = int(bad_steps[0])
        raise TrainingFailed(
            f"the training loss became {losses[step]} at epoch {epoch}, step {step + 1} of {len(losses)}; "
            "the results of earlier epochs are kept. A smaller optimizer.learning_rate usually helps"
        )


class Periodic:
    """Does something after every so many epochs, and earlier where these take longer than so many seconds."""

    def __init__(
        self,
        action: EpochAction,
        *,
        every_epochs: int,
        every_s: float,
        start_epoch: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to count after `start_epoch`."""
        self._action = action
        self._every_epochs = every_epochs
        self._every_s = every_s
        self._clock = clock
        self._last_epoch, self._last_s = start_epoch, clock()

    def __call__(self, history: History) -> None:
        """Do it, if it is time to."""
        if len(history.epochs) % self._every_epochs == 0 or self._clock() - self._last_s >= self._every_s:
            self.catch_up(history)

    def catch_up(self, history: History) -> None:
        """Do it, unless it was done after the last epoch already."""
        epoch = len(history.epochs)
        if epoch > self._last_epoch:
            self._action(history)
            self._last_epoch, self._last_s = epoch, self._clock()


class LogEpoch:
    """Logs one plain line an epoch, in the form Keras prints."""

    def __init__(self, *, num_epochs: int) -> None:
        self._num_epochs = num_epochs

    def __call__(self, history: History) -> None:
        """Log the last epoch."""
        row = history.epochs[-1]
        log.info(
            "Epoch %d/%d - %.1fs - loss: %.4f - accuracy: %.4f - val_loss: %.4f - val_accuracy: %.4f",
            row.epoch,
            self._num_epochs,
            row.epoch_s,
            row.loss,
            row.accuracy,
            row.val_loss,
            row.val_accuracy,
        )
