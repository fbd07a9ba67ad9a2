"""Virtual shards: the fixed pieces of a global batch, and which replica computes which.

A shard has the same rows and the same shape whoever computes it, so its sums have the same bits everywhere. What is
left to fix is the order in which shards are added up: a binary tree over the shards, which depends on their number
alone. A replica's shards are neighbours, so it can add up the subtrees that it holds whole; only those travel.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


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
        """A replica's shards; the first replicas have one more where the number does not divide (8 over 3: 3, 3, 2)."""
        pieces = np.array_split(np.arange(self.num_shards), self.num_replicas)
        return range(int(pieces[replica][0]), int(pieces[replica][-1]) + 1)

    def subtrees_of(self, replica: int) -> list[Node]:
        """The largest subtrees that a replica holds whole, from left to right."""
        own = self.shards_of(replica)

        def inside(node: Node) -> list[Node]:
            if node.last <= own.start or own.stop <= node.first:
                return []
            if own.start <= node.first and node.last <= own.stop:
                return [node]
            return [found for child in node.children() for found in inside(child)]

        return inside(self.root)
