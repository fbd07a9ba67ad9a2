"""From the sums of single shards to the sum over the global batch, on every replica.

`FastSum` lets the collective choose the order of summation, so the last bits depend on the number of replicas.
`ExactSum` sums in the order of the shards' tree (`engine.shards`), so they do not:

- Each node of the tree is one addition of two float32 numbers, which IEEE 754 rounds the same way everywhere.
- A replica sums its whole subtrees; these partial sums travel without any rounding, and the rest of the tree is summed
  where they arrive. So the additions are the same for any number of replicas, only in different places.
- Either every replica gets all partial sums, or each one gets and sums a slice of them, as in a reduce-scatter, and the
  slices of the sum are gathered: no more bytes than an all-reduce in a ring moves (`engine.exchange`).
- If there are just two partial sums, as with two replicas, their sum is the root; and since a + b = b + a, an
  all-reduce may compute it.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import tensorflow as tf

from mnist_dist.engine.exchange import Way, choose_way, levels_above
from mnist_dist.engine.shards import Node, ShardPlan
from mnist_dist.strategy.base import Strategy

Sums = Sequence[tf.Tensor]
"""The sums over one shard: tensors of any shapes, the same for every shard."""


class Reduction(Protocol):
    """How sums are reduced; for use inside `Strategy.run`."""

    def __call__(self, sums: Sequence[Sums]) -> tf.Tensor:
        """The sum over all shards of the job, flat, on every replica; `sums` are those of this replica's shards."""
        ...


class FastSum:
    """In whichever order is fastest: one all-reduce of each replica's sum."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy

    def __call__(self, sums: Sequence[Sums]) -> tf.Tensor:
        """The sum over all shards."""
        return self._strategy.all_reduce_sum(_flat(_add_up(Node(0, len(sums)), _leaves(sums, first=0))))


class ExactSum:
    """In the order of the tree, whatever the number of replicas."""

    def __init__(self, strategy: Strategy, plan: ShardPlan, *, way: Way | None = None) -> None:
        """Reduce in the cheapest way for the size of the sums, or in this one."""
        self._strategy = strategy
        self._plan = plan
        self._way = way
        self._most = plan.most_subtrees
        self._levels = levels_above(plan)

    def __call__(self, sums: Sequence[Sums]) -> tf.Tensor:
        """The sum over all shards."""
        plan, strategy, replica = self._plan, self._strategy, self._strategy.replica_index()
        leaves = _leaves(sums, first=plan.shards_of(replica).start)
        own = [_flat(_add_up(node, leaves)) for node in plan.subtrees_of(replica)]
        if plan.num_replicas == 1:
            return own[0]
        num_bytes = own[0].shape.num_elements() * own[0].dtype.size
        way = self._way or choose_way(plan, num_bytes=num_bytes, has_all_to_all=strategy.has_all_to_all)
        if way == "all_reduce":
            return strategy.all_reduce_sum(own[0])
        # All send the same number of partial sums, padded with zeros that are not read.
        rows = tf.stack(own + [tf.zeros_like(own[0])] * (self._most - len(own)))
        return self._gather(rows) if way == "gather" else self._scatter(rows)

    def _gather(self, rows: tf.Tensor) -> tf.Tensor:
        """Every replica adds everything."""
        return self._add_levels(self._strategy.all_gather(rows))

    def _scatter(self, rows: tf.Tensor) -> tf.Tensor:
        """Replica j adds slice j; an addition of vectors has the same bits in slices."""
        num_replicas, num_values = self._plan.num_replicas, rows.shape[1]
        num_each = -(-num_values // num_replicas)
        padded = tf.pad(rows, [[0, 0], [0, num_each * num_replicas - num_values]])
        by_receiver = tf.transpose(tf.reshape(padded, [-1, num_replicas, num_each]), [1, 0, 2])
        received = self._strategy.all_to_all(tf.reshape(by_receiver, [-1, num_each]))
        return self._strategy.all_gather(self._add_levels(received))[:num_values]

    def _add_levels(self, rows: tf.Tensor) -> tf.Tensor:
        """The tree's root, from the partial sums of all replicas."""
        for level in self._levels:
            sums = tf.gather(rows, level.left) + tf.gather(rows, level.right)
            rows = tf.concat([sums, tf.gather(rows, level.kept)], axis=0) if len(level.kept) else sums
        return rows[0]


def _leaves(sums: Sequence[Sums], *, first: int) -> dict[Node, Sums]:
    return {Node(first + number, first + number + 1): sum_ for number, sum_ in enumerate(sums)}


def _add_up(node: Node, known: Mapping[Node, Sums]) -> Sums:
    """The sum of a subtree, from sums of its parts."""
    if node in known:
        return known[node]
    left, right = (_add_up(child, known) for child in node.children())
    return [a + b for a, b in zip(left, right, strict=True)]


def _flat(sums: Sums) -> tf.Tensor:
    return tf.concat([tf.reshape(tensor, [-1]) for tensor in sums], axis=0)
