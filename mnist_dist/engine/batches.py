"""The batch plan: which examples form which step, as a pure function of the seed and the epoch.

Every process computes the same plan, without communication. The unit is the global batch; which replica computes which
of its rows is decided elsewhere and changes nothing here.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PADDING = -1
"""The index of a row that holds no example (weight 0)."""
EVALUATION_ROWS = 1024
"""Most rows evaluated at once: enough to keep any device busy, few enough for the caches of two cores."""


@dataclass(frozen=True)
class BatchPlan:
    """How `num_examples` are cut into global batches; the last one of an epoch may be short."""

    num_examples: int
    global_batch_size: int
    """Examples of a step, except the last one."""
    num_rows: int = 0
    """Rows of a step, if more than that: the rest is padding, for shards that have more rows than examples."""

    def __post_init__(self) -> None:
        if self.num_rows < self.global_batch_size:
            object.__setattr__(self, "num_rows", self.global_batch_size)

    @classmethod
    def for_evaluation(cls, num_examples: int) -> "BatchPlan":
        """As few chunks as possible, and these as small as possible, so that there is little padding."""
        num_chunks = -(-num_examples // EVALUATION_ROWS)
        return cls(num_examples, global_batch_size=-(-num_examples // num_chunks))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return -(-self.num_examples // self.global_batch_size)

    def shuffled(self, *, seed: int, epoch: int) -> npt.NDArray[np.int32]:
        """Example indices of one epoch's steps.

        Returns:
            Shape (steps_per_epoch, num_rows): each of 0..num_examples-1 exactly once; the other rows are `PADDING`.
        """
        # Philox is a counter-based generator: (seed, epoch) is its whole state.
        generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
        return self._cut(generator.permutation(self.num_examples), num_steps=self.steps_per_epoch)

    def in_order(self, *, multiple_of: int = 1) -> npt.NDArray[np.int32]:
        """Example indices in their own order, for evaluation; the number of steps is rounded up to a multiple."""
        num_steps = -(-self.steps_per_epoch // multiple_of) * multiple_of
        return self._cut(np.arange(self.num_examples), num_steps=num_steps)

    def _cut(self, order: npt.NDArray[np.int64], *, num_steps: int) -> npt.NDArray[np.int32]:
        """Cut an order of examples into steps; the only place that adds padding."""
        examples = np.full((num_steps, self.global_batch_size), PADDING, np.int32)
        examples.reshape(-1)[: self.num_examples] = order
        rows = np.full((num_steps, self.num_rows), PADDING, np.int32)
        rows[:, : self.global_batch_size] = examples
        return rows


def fill_up(indices: npt.NDArray[np.int32], *, rows_per_shard: int) -> npt.NDArray[np.int32]:
    """The same steps with a shard's own examples, in rotation, in the rows that pad it; a shard without any stays.

    These rows have no weight. But what layers add to the loss is a mean over all rows of a shard.
    """
    shards = indices.reshape(-1, rows_per_shard)
    num_examples = np.maximum((shards != PADDING).sum(axis=1, keepdims=True), 1)
    rows = np.take_along_axis(shards, np.arange(rows_per_shard) % num_examples, axis=1)
    return rows.reshape(indices.shape)
