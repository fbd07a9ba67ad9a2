"""What happens between epochs: small callables that are given the history so far."""

import logging
from collections.abc import Callable

from mnist_dist.results.history import History

log = logging.getLogger(__name__)

EpochAction = Callable[[History], None]
"""Something to do after each epoch, with all epochs so far."""


class LogEpoch:
    """Logs one line per epoch, in Keras' format."""

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
