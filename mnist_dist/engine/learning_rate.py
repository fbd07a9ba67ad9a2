"""The learning rate of every step: a pure function of the step's number, so that there is nothing to save."""

from typing import Any

import numpy as np
import numpy.typing as npt

from mnist_dist.base.errors import UserError
from mnist_dist.config.optimization import LearningRateConfig
from mnist_dist.config.rules import FLOAT32_MAX

Floats = npt.NDArray[np.float64]


class LearningRate:
    """The learning rate of every step: what the schedule leaves of the full rate.

    If the global batch is larger than the configured one by a factor, the full rate is larger by that factor (`linear`)
    or its root (`sqrt`). During the warm-up it rises in equal steps from the configured rate to the scaled one (gradual
    warm-up, Goyal et al. 2017, arXiv 1706.02677), or from 0 if the two are equal.
    """

    def __init__(self, config: LearningRateConfig, *, base: float, batch_factor: int, steps_per_epoch: int) -> None:
        """Build it; raises UserError if the rate grows beyond float32."""
        self._target = base * {"none": 1.0, "linear": batch_factor, "sqrt": batch_factor**0.5}[config.scaling]
        if self._target > FLOAT32_MAX:
            raise UserError(
                f"learning_rate.scaling={config.scaling}: raises optimizer.learning_rate={base} by the factor of the "
                f"batch, {batch_factor}, to {self._target:g}, which is too large for float32"
            )
        self._config = config
        self._start = base if self._target > base else 0.0
        self._steps_per_epoch = steps_per_epoch
        self._warmup_steps = round(config.warmup_epochs * steps_per_epoch)

    def describe(self) -> str:
        """The rate in words, for the log."""
        config, full = self._config, f"{self._target:g}"
        if self._warmup_steps:
            full = f"{self._start:g} to {full} over {self._warmup_steps} steps"
        if config.schedule == "step":
            return f"{full}, times {config.step_factor:g} every {config.step_epochs} epoch(s)"
        if config.schedule == "constant":
            return full
        if config.schedule == "one_cycle":
            full = f"{config.start_fraction * self._target:g} by a cosine to {full}"
        return f"{full}, by a cosine to {config.final_fraction * self._target:g} by epoch {config.schedule_epochs}"

    def at(self, steps: npt.NDArray[np.int64]) -> Floats:
        """The rates of these steps, counted from 0 over the whole training."""
        progress = np.minimum((steps + 1) / self._warmup_steps, 1) if self._warmup_steps else np.ones(len(steps))
        # In a form whose value at the end of the warm-up is exactly the target.
        full = self._target - (self._target - self._start) * (1 - progress)
        return np.asarray(full * self._fractions(steps))

    def _fractions(self, steps: npt.NDArray[np.int64]) -> Floats:
        """What the schedule leaves of the full rate."""
        config = self._config
        if config.schedule == "step":
            return np.asarray(config.step_factor ** (steps // (config.step_epochs * self._steps_per_epoch)))
        if config.schedule_epochs is None:
            return np.ones(len(steps))
        end = config.schedule_epochs * self._steps_per_epoch
        if config.schedule == "cosine":
            peak = float(min(self._warmup_steps, end - 1))
            rising = np.ones(len(steps))
        else:
            peak = config.rise_fraction * end
            rising = _along_cosine(config.start_fraction, 1, steps / peak)
        return np.where(steps < peak, rising, _along_cosine(1, config.final_fraction, (steps - peak) / (end - peak)))


def _along_cosine(first: float, last: float, progress: npt.NDArray[np.floating[Any]]) -> Floats:
    """From `first` to `last` by half a cosine, and then `last`."""
    return np.asarray(last + (first - last) * (1 + np.cos(np.pi * np.clip(progress, 0, 1))) / 2)
