"""The tree of virtual shards, for all small numbers of shards and replicas."""

import pytest

from mnist_dist.engine.shards import Node, ShardPlan

PLANS = [ShardPlan(shards, 4, replicas) for shards in range(1, 18) for replicas in range(1, shards + 1)]


def leaves(node: Node) -> list[int]:
    """The shards below a node, from left to right, found only through its children."""
    if node.last - node.first == 1:
        return [node.first]
    return [shard for child in node.children() for shard in leaves(child)]


def additions_within(node: Node) -> int:
    return len(leaves(node)) - 1


def test_every_shard_has_one_replica():
    for plan in PLANS:
        shards = [shard for replica in range(plan.num_replicas) for shard in plan.shards_of(replica)]
        assert shards == list(range(plan.num_shards)), plan


def test_replicas_get_nearly_the_same_number_of_shards():
    for plan in PLANS:
        counts = [len(plan.shards_of(replica)) for replica in range(plan.num_replicas)]
        assert max(counts) - min(counts) <= 1, plan
        assert counts == sorted(counts, reverse=True), plan


def test_subtrees_are_the_replicas_shards():
    for plan in PLANS:
        for replica in range(plan.num_replicas):
            held = [shard for node in plan.subtrees_of(replica) for shard in leaves(node)]
            assert held == list(plan.shards_of(replica)), plan


def test_no_two_subtrees_of_a_replica_are_halves_of_one():
    """Otherwise it would send two tensors when one will do."""
    for plan in PLANS:
        for replica in range(plan.num_replicas):
            nodes = plan.subtrees_of(replica)
            own = plan.shards_of(replica)
            for node in all_nodes(plan.root):
                if own.start <= node.first and node.last <= own.stop:
                    assert any(top.first <= node.first and node.last <= top.last for top in nodes), plan


def all_nodes(node: Node) -> list[Node]:
    below = [] if len(leaves(node)) == 1 else [found for child in node.children() for found in all_nodes(child)]
    return [node, *below]


def test_all_replicas_together_add_as_often_as_one():
    """One addition fewer than shards, wherever they are done: it is the same tree, with each node computed once."""
    for plan in PLANS:
        subtrees = [node for replica in range(plan.num_replicas) for node in plan.subtrees_of(replica)]
        above = len(subtrees) - 1
        assert sum(additions_within(node) for node in subtrees) + above == plan.num_shards - 1, plan


def test_the_tree_depends_only_on_the_number_of_shards():
    for plan in PLANS:
        assert plan.root == Node(0, plan.num_shards)
        nodes = set(all_nodes(plan.root))
        for replica in range(plan.num_replicas):
            assert set(plan.subtrees_of(replica)) <= nodes, plan


@pytest.mark.parametrize(
    ("node", "children"),
    [
        (Node(0, 2), (Node(0, 1), Node(1, 2))),
        (Node(0, 3), (Node(0, 2), Node(2, 3))),
        (Node(0, 8), (Node(0, 4), Node(4, 8))),
        (Node(4, 8), (Node(4, 6), Node(6, 8))),
        (Node(0, 9), (Node(0, 8), Node(8, 9))),
        (Node(5, 10), (Node(5, 9), Node(9, 10))),
    ],
)
def test_children(node, children):
    assert node.children() == children


def test_eight_shards_over_three_replicas():
    plan = ShardPlan(8, 64, 3)
    assert plan.num_rows == 512
    assert [list(plan.shards_of(replica)) for replica in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert [plan.subtrees_of(replica) for replica in range(3)] == [
        [Node(0, 2), Node(2, 3)],
        [Node(3, 4), Node(4, 6)],
        [Node(6, 8)],
    ]


@pytest.mark.parametrize(("num_shards", "num_replicas"), [(2, 3), (1, 0), (0, 0), (0, 1)])
def test_a_replica_without_a_shard_is_refused(num_shards, num_replicas):
    with pytest.raises(ValueError, match="cannot be divided"):
        ShardPlan(num_shards, 4, num_replicas)
