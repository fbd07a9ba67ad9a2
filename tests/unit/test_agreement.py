import pytest

from mnist_dist.base.errors import UserError
from mnist_dist.launch.agreement import Report, agree, check_not_shared, find_disagreement
from mnist_dist.launch.rendezvous import Rendezvous
from mnist_dist.launch.topology import Topology


def test_one_process_agrees_with_itself():
    report = Report(facts={"seed": "0"}, is_finished=True)
    assert agree(report, Rendezvous(Topology(), timeout_s=1)) == [report]


def test_equal_facts_agree():
    assert find_disagreement([{"seed": "0", "data": "abc"}] * 3) is None


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"seed": "1", "data": "abc"}, "rank 2 has seed=1, rank 0 has seed=0"),
        ({"seed": "0", "data": "xyz"}, "rank 2 has data=xyz, rank 0 has data=abc"),
        ({"seed": "0"}, "rank 2 has data=None, rank 0 has data=abc"),
    ],
)
def test_the_rank_and_the_key_are_named(other, expected):
    facts = {"seed": "0", "data": "abc"}
    assert find_disagreement([facts, facts, other]) == expected


def test_two_ranks_on_one_gpu_are_named():
    check_not_shared([["GPU-aa"], ["GPU-bb"], []])
    with pytest.raises(UserError, match="ranks 0 and 2 both use the GPU GPU-aa"):
        check_not_shared([["GPU-aa"], ["GPU-bb"], ["GPU-aa"]])
