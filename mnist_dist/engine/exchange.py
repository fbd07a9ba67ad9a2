"""How the partial sums of all replicas become the sum over the global batch: which messages, and which additions.

Arithmetic only: `engine.reduction` does both, `benchmark.cost_model` says what it costs.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from mnist_dist.engine.shards import Node, ShardPlan

Way = Literal["all_reduce", "gather", "scatter"]
"""all_reduce: of just two partial sums. gather: every replica gets all partial sums, and adds. scatter: replica j gets
slice j of all of them, and adds; then the slices of the sum are gathered."""

# What a link could move in the time of one more message, and of one more call of a collective (Horovod negotiates each
# one). Round numbers, since every replica must choose alike: 5 µs at 13 GB/s, 1 ms at 1 GB/s.
_MESSAGE_BYTES, _CALL_BYTES = 64 * 1024, 1024 * 1024


def choose_way(plan: ShardPlan, *, num_bytes: int, has_all_to_all: bool) -> Way:
    """The cheaper way for sums of `num_bytes`, the same one on every replica; all of them give the same bits.

    A gather costs N-1 times alpha + k m beta; all-to-all and gather of slices N-1 times 2 alpha + (k+1)/N m beta, and a
    second call: fewer bytes in more messages (`cost_model.exact_reduction_s`).
    """
    most = plan.most_subtrees
    if plan.num_replicas <= 2 and most == 1:
        return "all_reduce"
    saved = (most - (most + 1) / plan.num_replicas) * num_bytes
    is_worth_it = (plan.num_replicas - 1) * (saved - _MESSAGE_BYTES) > _CALL_BYTES
    return "scatter" if has_all_to_all and is_worth_it else "gather"


Positions = npt.NDArray[np.int64]


class Level(NamedTuple):
    """Additions that do not depend on each other, of rows that each hold the sum of a subtree."""

    left: Positions
    """Of the first summands."""
    right: Positions
    """Of the second ones."""
    kept: Positions
    """Of what a later level adds."""


def levels_above(plan: ShardPlan) -> list[Level]:
    """The additions between the replicas' partial sums, level by level: about log2 N of them instead of N - 1.

    The first level's positions are those of `most_subtrees` rows from each replica, of which some are padding; then
    come the sums of a level, followed by what it kept.
    """
    most, parents = plan.most_subtrees, dict(_parents(plan.root))
    position = {
        node: replica * most + number
        for replica in range(plan.num_replicas)
        for number, node in enumerate(plan.subtrees_of(replica))
    }
    levels = []
    while plan.root not in position:
        above = dict.fromkeys(parents[node] for node in position)  # each once, from left to right
        ready = {node: None for node in above if position.keys() >= {*node.children()}}
        kept = [node for node in position if parents[node] not in ready]
        left, right = zip(*(node.children() for node in ready), strict=True)
        levels.append(Level(*(np.array([position[node] for node in nodes], np.int64) for nodes in (left, right, kept))))
        position = {node: number for number, node in enumerate([*ready, *kept])}
    return levels


def _parents(node: Node) -> Iterator[tuple[Node, Node]]:
    if node.last - node.first > 1:
        for child in node.children():
            yield child, node
            yield from _parents(child)
