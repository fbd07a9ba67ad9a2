"""Virtual shards: the fixed pieces of a global batch, and which replica computes which.

A shard has the same rows and the same shape on every replica, so its sums have the same bits everywhere. What is left
to fix is the order in which shards are summed: a binary tree over the shards, which depends only on their number. A
replica's shards are contiguous, so it can sum the subtrees that it holds entirely; only these partial sums are sent.
"""

from dataclasses import dataclass
from typing import NamedTuple

from mnist_dist.base.errors import UserError
from mnist_dist.config.train import TrainConfig


class Node(NamedTuple):
    """A subtree: the shards `first`, ..., `last` - 1."""

    first: int
    last: int

    def children(self) -> tuple["Node", "Node"]:
        """The two halves; the left one is the largest power of two that is smaller than the whole."""
        middle = self.first + (1 << (self.last - self.first - 1).bit_length() - 1)
        return Node(self.first, middle), Node(middle, self.last)


@dataclass(frozen=True)
class ShardPlan:
    """`num_shards` shards of `rows_per_shard` rows, over `num_replicas` replicas that each compute whole shards."""

    num_shards: int
    rows_per_shard: int
    num_replicas: int
    shards_per_call: int = 1
    """Shards that a replica computes at once."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_replicas <= self.num_shards:
            raise ValueError(f"{self.num_shards} shards cannot be divided over {self.num_replicas} replicas")

    @property
    def num_rows(self) -> int:
        """Rows of all shards together."""
        return self.num_shards * self.rows_per_shard

    @property
    def root(self) -> Node:
        """The whole tree."""
        return Node(0, self.num_shards)

    def shards_of(self, replica: int) -> range:
        """A replica's shards; the first ones have one more if the number does not divide evenly (8 over 3: 3, 3, 2)."""
        each, more = divmod(self.num_shards, self.num_replicas)
        first = replica * each + min(replica, more)
        return range(first, first + each + (replica < more))

    def calls_of(self, replica: int) -> list[range]:
        """A replica's shards, in the pieces that it computes at once."""
        own, size = self.shards_of(replica), self.shards_per_call
        return [own[first : first + size] for first in range(0, len(own), size)]

    def subtrees_of(self, replica: int) -> list[Node]:
        """The largest subtrees that a replica holds entirely, from left to right."""
        own = self.shards_of(replica)

        def inside(node: Node) -> list[Node]:
            if node.last <= own.start or own.stop <= node.first:
                return []
            if own.start <= node.first and node.last <= own.stop:
                return [node]
            return [found for child in node.children() for found in inside(child)]

        return inside(self.root)

    @property
    def most_subtrees(self) -> int:
        """The largest number of subtrees that a replica holds; 1 for powers of two."""
        return max(len(self.subtrees_of(replica)) for replica in range(self.num_replicas))


_FAST_ROWS = 128
"""Rows of each part of a replica's batch on a CPU with reproducibility=fast: several parts keep all cores busy."""


def plan_shards(
    config: TrainConfig,
    global_batch_size: int,
    *,
    num_replicas: int,
    on_gpu: bool,
    by_shard: bool = False,
    one_by_one: bool = False,
) -> ShardPlan:
    """How a global batch is cut, once `reproducibility` is exact or fast.

    `by_shard` says that the network has layers that look at whole virtual shards (batch normalisation), so these must
    be the same ones with fast; `one_by_one` that no two of them may be computed at once.

    Raises:
        UserError: more replicas than virtual shards.
    """
    num_shards, is_fast = config.batch.num_shards, config.reproducibility == "fast"
    if is_fast and not by_shard:
        parts = 1 if on_gpu else max(1, global_batch_size // num_replicas // _FAST_ROWS)
        num_shards = num_replicas * parts
    elif num_replicas > num_shards:
        raise UserError(
            f"batch.num_shards={num_shards}: fewer shards than the {num_replicas} replicas, and each replica computes "
            f"whole shards{' for layers like batch normalisation' if is_fast else ''}; give "
            f"batch.num_shards={num_replicas} (other bits than with {num_shards})"
            f"{'' if by_shard else ', or reproducibility=fast'}"
        )
    rows_per_shard = -(-global_batch_size // num_shards)
    shards_per_call = 1
    if is_fast and by_shard and not one_by_one:
        shards_per_call = -(-num_shards // num_replicas) if on_gpu else max(1, _FAST_ROWS // rows_per_shard)
    return ShardPlan(num_shards, rows_per_shard, num_replicas, shards_per_call)
