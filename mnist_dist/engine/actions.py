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
        log.info("%s", history.epochs[-1].describe(self._num_epochs))
