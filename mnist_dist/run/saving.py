"""When checkpoints are written: after a number of epochs, and earlier if these take long."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from mnist_dist.base.array import Array
from mnist_dist.config.train import CheckpointConfig
from mnist_dist.results.history import History
from mnist_dist.run.checkpoint import Checkpoint, ResumePoint
from mnist_dist.run.folder import RunFolder


class PeriodicCheckpoints:
    """The action that writes checkpoints; called after each epoch."""

    def __init__(
        self,
        run_folder: RunFolder,
        config: CheckpointConfig,
        start: ResumePoint,
        *,
        read_state: Callable[[], Mapping[str, Array]],
        after_save: Callable[[History], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Write what `read_state` returns to `run_folder`, for a training that begins at `start`.

        `after_save` is given the epochs that can no longer be lost.
        """
        self._run_folder = run_folder
        self._config = config
        self._start = start
        self._read_state = read_state
        self._after_save = after_save
        self._clock = clock
        self._last_epoch, self._last_s = start.epoch, clock()

    def __call__(self, history: History) -> None:
        """Write a checkpoint if one is due."""
        is_due = len(history.epochs) % self._config.every_epochs == 0
        if is_due or self._clock() - self._last_s >= self._config.every_s:
            self.catch_up(history)

    def catch_up(self, history: History) -> None:
        """Write a checkpoint unless the last epoch has one."""
        epoch = len(history.epochs)
        if epoch > self._last_epoch:
            point = replace(self._start, history=history)
            self._run_folder.save_checkpoint(lambda: Checkpoint(point, self._read_state()), keep=self._config.keep)
            self._last_epoch, self._last_s = epoch, self._clock()
            self._after_save(history)
