"""What the compiled programs find: sums over examples, to be divided by the number of examples once, at the end."""

import hashlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class EpochSums(NamedTuple):
    """Sums over the examples of each step of an epoch."""

    losses: npt.NDArray[np.float32]
    """Shape (steps,): the sum of the examples' losses."""
    num_correct: npt.NDArray[np.int64]
    """Shape (steps,)."""


class EvaluationSums(NamedTuple):
    """Sums over the examples of a split."""

    loss: float
    confusion: npt.NDArray[np.int64]
    """Shape (num_classes, num_classes): [i, j] counts the examples of class i that were taken for class j."""

    @property
    def num_correct(self) -> int:
        """Examples taken for what they are."""
        return int(np.trace(self.confusion))

    @property
    def num_examples(self) -> int:
        """All examples."""
        return int(self.confusion.sum())

    def to_dict(self) -> dict[str, float | int]:
        """Mean loss, accuracy and the counts behind it, as `summary.json` has them."""
        return {
            "loss": self.loss / self.num_examples,
            "accuracy": self.num_correct / self.num_examples,
            "num_correct": self.num_correct,
            "num_examples": self.num_examples,
        }


def weights_digest(weights: npt.NDArray[np.float32]) -> str:
    """SHA-256 over the float32 little-endian bytes of the trainable weights, in model order."""
    return hashlib.sha256(weights.astype("<f4").tobytes()).hexdigest()
