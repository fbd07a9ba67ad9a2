"""How the check slow_rank judges: on a quiet machine, and on one that others use too."""

import pytest

from mnist_dist.verify.checks.speed import SlowRank
from mnist_dist.verify.quiet import Noise, Waiting

QUIET = {"host": "node1", "cores": 2, "seconds": 10.0, "busy_s": 10.0, "own_s": 5.0, "steal_s": 0.0, "throttled": 0}
BUSY = {**QUIET, "busy_s": 18.0}  # others took 8 of 20 seconds
STOLEN = {**BUSY, "steal_s": 5.0}
THROTTLED = {**BUSY, "throttled": 3}
FAST = [0.100, 0.101, 0.100, 0.102, 0.101, 0.100]


def evidence(seconds, waited_s, *, noise, rounds=2):
    """Two ranks' evidence; the second one's blocks take `seconds`, of which its threads waited `waited_s` in all."""
    own = [seconds + step for step in (0.0, 0.001, 0.002, 0.001, 0.0, 0.002)]
    alone = [None if waited_s is None else one - waited_s for one in own]
    common = {"limit": 1.33, "step_s": 0.004, "noise": noise}
    return [
        {**common, "rounds": [[FAST]] * 2, "alone": [[FAST]] * 2},
        {**common, "rounds": [[own]] * rounds + [[FAST]] * (2 - rounds), "alone": [[alone]] * 2},
    ]


@pytest.mark.parametrize(
    ("seconds", "waited_s", "noise", "status"),
    [
        (0.1, 0.0, QUIET, "pass"),
        (0.2, 0.0, QUIET, "degraded"),
        (0.2, None, QUIET, "degraded"),
        (0.1, 0.0, BUSY, "inconclusive"),
        (0.2, 0.0, BUSY, "inconclusive"),  # may be shared caches
        (1.0, 0.0, BUSY, "degraded"),
        (1.0, 0.6, BUSY, "degraded"),
        (1.0, 0.9, BUSY, "inconclusive"),  # it waited for a core
        (1.0, 1.9, BUSY, "inconclusive"),  # several threads did
        (1.0, None, BUSY, "inconclusive"),  # unknown
        (1.0, 0.0, STOLEN, "inconclusive"),
        (1.0, 0.0, THROTTLED, "inconclusive"),
    ],
)
def test_judging(seconds, waited_s, noise, status):
    finding = SlowRank().judge(evidence(seconds, waited_s, noise=noise))
    assert finding.status == status, finding.summary
    assert [*finding.blamed] == ([1] if status == "degraded" else [])


@pytest.mark.parametrize("noise", [QUIET, BUSY])
def test_slow_in_one_round_only(noise):
    own = evidence(1.0, 0.0, noise=noise, rounds=1)
    own[1]["alone"] = own[1]["rounds"]
    assert SlowRank().judge(own).status in ("pass", "inconclusive")


def test_an_accident_in_one_block_is_not_slow():
    own = evidence(0.1, 0.0, noise=BUSY)
    own[1]["alone"] = [[[0.1, 0.1, 5.0, 0.1, 0.1, 0.1]]] * 2
    assert SlowRank().judge(own).status == "inconclusive"


@pytest.mark.parametrize("noise", [QUIET, BUSY])
def test_its_own_fault_is_found(noise):
    own = evidence(0.1, 0.0, noise=dict(noise))
    rank = SlowRank().spoil(own)
    assert rank in SlowRank().judge(own).blamed


def test_the_clocks_of_this_process():
    noise, waiting = Noise(), Waiting()
    sum(range(10**6))
    assert noise.read()["own_s"] > 0
    waited_s = waiting.read()
    assert waited_s is None or waited_s >= 0
