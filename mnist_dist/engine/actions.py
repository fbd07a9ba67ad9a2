"""What happens between epochs: small callables, each given the epochs so far."""

import logging
import time
from collections.abc import Callable

from mnist_dist.results.history import History

log = logging.getLogger(__name__)

EpochAction = Callable[[History], None]
"""Something to do after each epoch, with all epochs so far."""


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
