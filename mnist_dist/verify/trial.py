"""A short training whose numbers are compared with bands; with TensorFlow, see `verify.bands` for the rest."""

import numpy as np
import numpy.typing as npt

from mnist_dist.engine.build import Engine
from mnist_dist.engine.trainer import Programs
from mnist_dist.results.sums import EpochSums, EvaluationSums
from mnist_dist.verify.bands import EPOCHS, Trial


class _Recorder:
    """Programs that remember the losses of every step, which the history does not have."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self.epochs: list[EpochSums] = []

    def train_epoch(self, indices: npt.NDArray[np.int32], *, learning_rates: npt.NDArray[np.float64]) -> EpochSums:
        """Train, and remember."""
        self.epochs.append(self._programs.train_epoch(indices, learning_rates=learning_rates))
        return self.epochs[-1]

    def validate(self) -> EvaluationSums:
        """As the programs do."""
        return self._programs.validate()

    def agree_to_stop(self, epoch: int) -> bool:
        """As the programs do."""
        return self._programs.agree_to_stop(epoch)

    def digest_weights(self) -> str | None:
        """As the programs do."""
        return self._programs.digest_weights()


def run_trial(engine: Engine) -> Trial:
    """Train a new engine for as many epochs as the bands are made of; a collective. Raises TrainingFailed."""
    trainer = engine.create_trainer()
    recorder = _Recorder(trainer.programs)
    trainer.programs = recorder
    history = trainer.fit(num_epochs=EPOCHS)
    return Trial(
        step_losses=tuple(sums.losses.astype(np.float64) for sums in recorder.epochs),
        batch_size=engine.plan.global_batch_size,
        history=history,
        num_val=len(engine.splits.val),
    )
