import pytest

from mnist_dist.agreement import check_agreement, to_text
from mnist_dist.errors import UserError


def test_equal_facts_agree():
    check_agreement([to_text({"seed": 0, "data": "abc"})] * 3)


@pytest.mark.parametrize(
    ("other", "fragments"),
    [
        ({"seed": 1, "data": "abc"}, "rank 2 has seed=1, rank 0 has seed=0"),
        ({"seed": 0, "data": "xyz"}, "rank 2 has data=xyz, rank 0 has data=abc"),
        ({"seed": 0}, "rank 2 has data=None, rank 0 has data=abc"),
    ],
)
def test_the_rank_and_the_key_are_named(other, fragments):
    facts = {"seed": 0, "data": "abc"}
    with pytest.raises(UserError, match=fragments):
        check_agreement([to_text(facts), to_text(facts), to_text(other)])
