"""The batch plan: which examples form which step, as a pure function of the seed and the epoch.

Every process computes the same plan, with no communication. The unit is the global batch; who computes which of its
rows is decided elsewhere and changes nothing here.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PADDING = -1
"""The index of a row that holds no example (weight 0)."""
EVALUATION_ROWS = 1024
"""Rows that are evaluated at once, at most: enough to keep any device busy, few enough for two cores' caches."""


@dataclass(frozen=True)
class BatchPlan:
    """How `num_examples` are cut into global batches; the last one of an epoch may be short."""

    num_examples: int
    global_batch_size: int

    @classmethod
    def for_evaluation(cls, num_examples: int) -> "BatchPlan":
        """The fewest chunks, then the smallest ones that do with them, so that little is padding."""
        num_chunks = -(-num_examples // EVALUATION_ROWS)
        return cls(num_examples, global_batch_size=-(-num_examples // num_chunks))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-self.num_examples // self.global_batch_size)

    def shuffled(self, *, seed: int, epoch: int) -> npt.NDArray[np.int32]:
        """Example indices of one epoch's steps.

        Returns:
            Shape (steps_per_epoch, global_batch_size): each of 0..num_examples-1 exactly once, then `PADDING`.
        """
        # Philox is a counter-based generator: (seed, epoch) is its whole state.
        generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
        return self._cut(generator.permutation(self.num_examples))

    def in_order(self) -> npt.NDArray[np.int32]:
        """Example indices in their own order, cut and padded like an epoch's; for evaluation."""
        return self._cut(np.arange(self.num_examples))

    def _cut(self, order: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        rows = np.full((self.steps_per_epoch, self.global_batch_size), PADDING, np.int32)
        rows.reshape(-1)[: self.num_examples] = order
        return rows
