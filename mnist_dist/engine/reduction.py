"""From the sums of single shards to the sum over the global batch, on every replica.

`FastSum` lets the collective choose the order of summation, so the last bits depend on the number of replicas.
`ExactSum` sums in the order of the shards' tree (`engine.shards`), so they do not:

- Each node of the tree is one addition of two float32 numbers, which IEEE 754 rounds the same way everywhere.
- A replica sums its whole subtrees; these partial sums are gathered, without any rounding, and every replica sums the
  rest of the tree. So the additions are the same for any number of replicas, only in different places.
- If there are just two partial sums, as with two replicas, their sum is the root; and since a + b = b + a, an
  all-reduce may compute it.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import tensorflow as tf

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

    def __init__(self, strategy: Strategy, plan: ShardPlan) -> None:
        self._strategy = strategy
        self._plan = plan

    def __call__(self, sums: Sequence[Sums]) -> tf.Tensor:
        """The sum over all shards."""
        plan, replica = self._plan, self._strategy.replica_index()
        leaves = _leaves(sums, first=plan.shards_of(replica).start)
        own = [_flat(_add_up(node, leaves)) for node in plan.subtrees_of(replica)]
        everywhere = [plan.subtrees_of(index) for index in range(plan.num_replicas)]
        if everywhere == [[plan.root]]:
            return own[0]
        if [len(nodes) for nodes in everywhere] == [1, 1]:
            return self._strategy.all_reduce_sum(own[0])
        # All send the same number of partial sums, padded with zeros that are not read.
        most = max(len(nodes) for nodes in everywhere)
        own += [tf.zeros_like(own[0])] * (most - len(own))
        gathered = tf.unstack(self._strategy.all_gather(tf.stack(own)), num=most * plan.num_replicas)
        partial = {
            node: [gathered[index * most + number]]
            for index, nodes in enumerate(everywhere)
            for number, node in enumerate(nodes)
        }
        return _add_up(plan.root, partial)[0]


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
