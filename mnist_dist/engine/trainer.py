"""The outer loop: epochs, and the actions between them."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mnist_dist.base.errors import Diverged
from mnist_dist.engine.actions import EpochAction
from mnist_dist.engine.batches import BatchPlan
from mnist_dist.results.history import EpochMetrics, History
from mnist_dist.results.sums import EpochSums, EvaluationSums

log = logging.getLogger(__name__)


class Programs(Protocol):
    """What the trainer calls; all of them are collectives (see `build.Programs`)."""

    def train_epoch(self, indices: npt.NDArray[np.int32], *, learning_rates: npt.NDArray[np.float64]) -> EpochSums:
        """Train on the steps of `indices`, each with its learning rate."""
        ...

    def validate(self) -> EvaluationSums:
        """Evaluate the current weights on the validation split."""
        ...

    def agree_to_stop(self, epoch: int) -> bool:
        """Whether any process wants to stop after this epoch; raises TrainingFailed if replicas differ."""
        ...

    def digest_weights(self) -> str | None:
        """The digest of the current weights, if other runs can be compared by it."""
        ...


class Trainer:
    """Trains epoch after epoch; knows neither files nor devices."""

    def __init__(
        self,
        programs: Programs,
        *,
        plan: BatchPlan,
        seed: int,
        learning_rate_at: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]],
        actions: Sequence[EpochAction] = (),
    ) -> None:
        self.programs = programs
        self._plan = plan
        self._seed = seed
        self._learning_rate_at = learning_rate_at
        self._actions = actions

    def fit(
        self,
        *,
        num_epochs: int,
        history: History = History(),  # noqa: B008 (a frozen value)
        is_enough: Callable[[History], bool] = lambda _: False,
    ) -> History:
        """Train until `history` has `num_epochs`; or fewer, if they are enough or any process was asked to stop.

        The programs must be in the state after the last epoch of `history`, and `is_enough` must decide alike on all
        processes. Raises TrainingFailed.
        """

        def is_done() -> bool:
            return len(history.epochs) >= num_epochs or is_enough(history)

        stops = not is_done() and self.programs.agree_to_stop(len(history.epochs))
        while not (stops or is_done()):
            row = self.run_epoch(len(history.epochs) + 1)
            stops = self.programs.agree_to_stop(row.epoch)
            history = history.append(row)
            for action in self._actions:
                action(history)
        return history

    def run_epoch(self, epoch: int) -> EpochMetrics:
        """Train one epoch, counted from 1, and validate; raises TrainingFailed."""
        start = time.perf_counter()
        indices = self._plan.shuffled(seed=self._seed, epoch=epoch)
        learning_rates = self._learning_rate_at(np.arange(len(indices)) + (epoch - 1) * len(indices))
        sums = self.programs.train_epoch(indices, learning_rates=learning_rates)
        train_s = time.perf_counter() - start
        _check_finite(sums.losses, epoch=epoch)
        validation = self.programs.validate()
        if not math.isfinite(validation.loss):
            raise Diverged(
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
            weights_sha256=self.programs.digest_weights(),
        )


def _check_finite(losses: npt.NDArray[np.float32], *, epoch: int) -> None:
    bad_steps = np.flatnonzero(~np.isfinite(losses))
    if len(bad_steps):
        step = int(bad_steps[0])
        raise Diverged(
            f"the training loss became {losses[step]} at epoch {epoch}, step {step + 1} of {len(losses)}; "
            "the results of earlier epochs are kept. A smaller optimizer.learning_rate usually helps"
        )
