"""What the compiled programs return: sums over examples, divided by the number of examples once, at the end."""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class EpochSums(NamedTuple):
    """Sums over the examples of each step of an epoch."""

    losses: npt.NDArray[np.float32]
    """Shape (steps,): the sum of the examples' losses."""
    num_correct: npt.NDArray[np.int64]
    """Shape (steps,)."""


@dataclass(frozen=True)
class SplitMetrics:
    """The metrics of a model on one split, as `summary.json` has them."""

    loss: float
    """The mean over the examples."""
    accuracy: float
    num_correct: int
    num_examples: int


class EvaluationSums(NamedTuple):
    """Sums over the examples of a split."""

    loss: float
    confusion: npt.NDArray[np.int64]
    """Shape (num_classes, num_classes): [i, j] counts the examples of class i that were predicted as class j."""

    @property
    def num_correct(self) -> int:
        """Correctly classified examples."""
        return int(np.trace(self.confusion))

    @property
    def num_examples(self) -> int:
        """All examples."""
        return int(self.confusion.sum())

    def metrics(self) -> SplitMetrics:
        """The metrics: sums divided by the number of examples."""
        accuracy = self.num_correct / self.num_examples
        return SplitMetrics(self.loss / self.num_examples, accuracy, self.num_correct, self.num_examples)


def weights_digest(*vectors: npt.NDArray[np.float32]) -> str:
    """SHA-256 over the float32 little-endian bytes of the trainable weights in model order, then of any others."""
    return hashlib.sha256(b"".join(vector.astype("<f4").tobytes() for vector in vectors)).hexdigest()
