"""x"""
from dataclasses import dataclass
import numpy as np
import numpy.typing as npt
from mnist_dist.results.history import History
EPOCHS = 3


@dataclass(frozen=True)
class Trial:
    """What a training of `EPOCHS` epochs has shown."""

    step_losses: tuple[npt.NDArray[np.float64], ...]
    """For each epoch, (steps,): the sum of the losses of a step's examples."""
    batch_size: int
    """Examples of a step, except the last one of an epoch."""
    history: History
    num_val: int
    """Examples of the validation split."""
