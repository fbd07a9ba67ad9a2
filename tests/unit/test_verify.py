"""The judges of `verify`: evidence in, a finding out; and the report."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from mnist_dist.verify.checks.base import Finding, minority
from mnist_dist.verify.checks.collectives import Collectives
from mnist_dist.verify.checks.cross_examination import CrossExamination, _find_dispute
from mnist_dist.verify.checks.data import Data, _to_text
from mnist_dist.verify.checks.equality import Exact, Fast
from mnist_dist.verify.checks.identity import Identity
from mnist_dist.verify.checks.interruption import Interruption
from mnist_dist.verify.checks.learning import _skips_one_step
from mnist_dist.verify.checks.reference import Own, Reference, compare, load_reports, times_of
from mnist_dist.verify.checks.speed import SlowRank
from mnist_dist.verify.context import Context
from mnist_dist.verify.quiet import find_noise, spread_of
from mnist_dist.verify.report import CHECK_NAMES, CheckResult, RankFacts, Report, Suspect, judge
from mnist_dist.verify.runner import Runner, judge_detectors

# Evidence


def sums(size: int, num_replicas: int, wrong: dict[int, float] | None = None, *, everywhere: float | None = None):
    """Evidence of one all-reduce, a replica on each rank; `wrong`: what a replica got in place of the sum."""
    evidence = []
    for rank in range(num_replicas):
        blocks = []
        for first in range(0, num_replicas, 12):
            expected = float(sum(4**index for index in range(min(12, num_replicas - first))))
            got = (wrong or {}).get(rank, everywhere if everywhere is not None and first == 0 else expected)
            blocks.append({"wrong": int(got != expected), "value": got, "element": 0, "expected": expected,
                           "digits": True, "source": None})  # fmt: skip
        row = {"collective": "all_reduce", "bytes": size, "got": [blocks], "seconds": [1e-3, 1e-3]}
        evidence.append({"rows": [row]})
    return evidence


def plan(num_ranks: int, *, steps: int = 3, rows: int = 16, shards: int = 8):
    """Evidence of the data check: row checksums of each rank, a replica on each."""
    expected = np.arange(1, steps * rows + 1).reshape(steps, rows) * 1_000_003
    expected[-1, -2:] = 0  # padding
    evidence = []
    for own in np.array_split(np.arange(shards), num_ranks):
        read = np.zeros_like(expected)
        columns = slice(own[0] * rows // shards, (own[-1] + 1) * rows // shards)
        read[:, columns] = expected[:, columns]
        evidence.append({"foreign": [0], "intact": True, "sums": [_to_text(read)], "shards": shards,
                         "indices_shape": [steps, rows]})  # fmt: skip
    evidence[0] |= {"expected": _to_text(expected), "plan_is_complete": True}
    return evidence, expected


def digests(*replicas: list[list[int]], distances: list[float] | None = None):
    return [
        {"digests": [own], "distances": [distances[rank]] if distances else [], "shards": len(own[0])}
        for rank, own in enumerate(replicas)
    ]


def quiet(seconds: float = 1.0, host: str = "a"):
    return {"host": host, "cores": 2, "seconds": seconds, "busy_s": 1.0, "own_s": 0.98, "steal_s": 0.0, "throttled": 0}


def blocks(*ranks: list[float], noise=None, waited_s: float | None = None):
    """Evidence of the slow rank check; `waited_s`: how long a rank waited for a core in each block, if it is known."""
    noise = noise or {**quiet(), "own_s": 1.0 / len(ranks)}
    return [
        {
            "rounds": [[own], [own]],
            "alone": [[[None if waited_s is None else one - waited_s for one in own]]] * 2,
            "noise": noise,
            "limit": 1.33,
            "step_s": own[0],
        }
        for own in ranks
    ]


RANKS = [RankFacts(rank, "ab"[rank], (), (f"GPU-{rank}0", f"GPU-{rank}1"), "cpu", 1) for rank in range(2)]
GOOD = [1.0, 1.01, 1.0, 1.02, 1.0, 1.01]


# Who is in the minority


@pytest.mark.parametrize(
    ("values", "expected"), [("aab", [2]), ("ab", None), ("abc", None), ("aaaa", []), ("aabb", None), ("baaca", [0, 3])]
)
def test_minority(values, expected):
    assert minority(values) == expected


# Collectives


@pytest.mark.parametrize("num_replicas", [1, 2, 3, 12, 13, 30])
def test_exact_sums_pass(num_replicas):
    finding = Collectives().judge(sums(4, num_replicas))
    assert (finding.status, finding.blamed) == ("pass", {})


@pytest.mark.parametrize(
    ("digits", "blamed", "text"),
    [
        ((1, 0, 1), {1}, "replica 1's contribution was missing"),
        ((1, 1, 2), {2}, "replica 2's contribution was counted 2 times"),
        ((0, 2, 1), {0, 1}, "replica 0's contribution was missing; replica 1's contribution was counted 2 times"),
    ],
)
def test_a_wrong_sum_tells_whose_contribution(digits, blamed, text):
    value = float(sum(count * 4**index for index, count in enumerate(digits)))
    finding = Collectives().judge(sums(4, 3, everywhere=value))
    assert finding.status == "fail" and set(finding.blamed) == blamed
    assert text in finding.summary


def test_a_contribution_that_nobody_made():
    finding = Collectives().judge(sums(4, 3, everywhere=21.5))
    assert (finding.status, finding.blamed) == ("fail", {})
    assert "21.5 in place of 21, a contribution that none made" in finding.summary


def test_a_sum_that_is_wrong_on_its_way_to_one_replica():
    finding = Collectives().judge(sums(4, 3, wrong={2: 22.0}))
    assert finding.status == "fail" and set(finding.blamed) == {2}
    assert "replica 2 got 22 in place of 21 (1 elements)" in finding.summary


def test_what_one_replica_sends_to_all_is_told_by_its_place():
    evidence = sums(4, 3, everywhere=9.0)
    for one in evidence:
        for block in one["rows"][0]["got"][0]:
            block.update(digits=False, source=1)
    finding = Collectives().judge(evidence)
    assert set(finding.blamed) == {1} and "what replica 1 sent arrived as 9" in finding.summary


# Data


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_each_example_once_passes(num_ranks):
    evidence, expected = plan(num_ranks)
    finding = Data().judge(evidence)
    assert finding.status == "pass"
    assert finding.details["exactly_once"] == (expected != 0).sum() == sum(finding.details["per_rank"])


def test_wrong_data_on_rank_0_do_not_blame_the_others():
    evidence, expected = plan(3)
    evidence[0]["foreign"] = [7]
    evidence[0]["expected"] = _to_text(expected + 1)
    finding = Data().judge(evidence)
    assert finding.status == "fail" and set(finding.blamed) == {0}


def test_data_that_changed_in_memory():
    evidence, _ = plan(2)
    evidence[1]["intact"] = False
    assert set(Data().judge(evidence).blamed) == {1}


def test_a_plan_that_leaves_examples_out():
    evidence, _ = plan(2)
    evidence[0]["plan_is_complete"] = False
    assert "the plan of an epoch" in Data().judge(evidence).summary


# Cross-examination


def test_a_transient_fault_is_blamed_before_a_persistent_one():
    finding = CrossExamination().judge(digests([[1, 2]] * 3, [[1, 2], [1, 9], [1, 2]], [[5, 5]] * 3))
    assert set(finding.blamed) == {1} and "transient" in finding.blamed[1] and "1 of 6" in finding.blamed[1]


def test_the_minority_computes_wrongly():
    finding = CrossExamination().judge(digests([[1, 2]] * 2, [[1, 3]] * 2, [[1, 2]] * 2))
    assert set(finding.blamed) == {1} and "persistent" in finding.blamed[1]


@pytest.mark.parametrize(
    ("distances", "blamed"), [([1e-6, 0.2], {1}), ([float("nan"), 1e-6], {0}), ([1e-6, 2e-6], set())]
)
def test_of_two_the_third_opinion_decides(distances, blamed):
    finding = CrossExamination().judge(digests([[1, 2]] * 2, [[1, 3]] * 2, distances=distances))
    assert finding.status == "fail" and set(finding.blamed) == blamed


def test_what_is_disputed():
    def values(*replicas):
        return [{"digests": [own]} for own in replicas]

    assert _find_dispute(values([[1, 2]] * 2, [[1, 3]] * 2)) == 1
    assert _find_dispute(values([[1, 2]] * 2, [[1, 2]] * 2)) is None
    assert _find_dispute(values([[1, 2]] * 2, [[1, 3]] * 2, [[1, 2]] * 2)) is None  # a majority
    assert _find_dispute(values([[1, 2], [1, 4]], [[1, 3]] * 2)) is None  # a transient fault


# Exact and fast


def runs(state: str, *, losses=(3.0, 2.0, 1.0), reference="r"):
    run = {"optimizer": "sgd", "losses": list(losses), "states": [state], "reference_losses": [3.0, 2.0, 1.0],
           "reference": reference}  # fmt: skip
    return {"runs": [run], "num_local": 1}


def test_the_first_step_that_differs_is_told():
    finding = Exact().judge([runs("x", losses=(3.0, 2.0, 1.5))] * 2)
    assert (finding.status, finding.blamed) == ("fail", {})
    assert "all replicas differ with sgd from one replica from step 2 on" in finding.summary


def test_steps_are_counted_from_1():
    finding = Exact().judge([runs("x", losses=(3.5, 2.0, 1.0))])
    assert "from step 1 on" in finding.summary


def test_weights_that_are_the_same_everywhere_and_not_what_the_seed_gives():
    evidence = json.loads(json.dumps(EVIDENCE[Identity]))
    for one in evidence:
        one["state"][0]["weights"] = "of yesterday"
    finding = Identity(lambda _: None).judge(evidence)
    assert finding.status == "fail" and set(finding.blamed) == {0, 1}


def test_one_replica_that_differs_is_named():
    finding = Exact().judge([runs("r"), runs("x"), runs("r")])
    assert set(finding.blamed) == {1} and "by the end of 25 steps" in finding.summary


def test_a_rank_that_differs_alone_is_named():
    finding = Exact().judge([runs("r"), runs("r", reference="s"), runs("r")])
    assert set(finding.blamed) == {1} and "alone do not train" in finding.summary


@pytest.mark.parametrize(("distances", "status", "blamed"), [
    ([7.9, 7.9], "pass", set()), ([8.1, 8.1], "fail", set()), ([1.0, 9.0], "fail", {1}),
    ([1.0, float("nan")], "fail", {1}),
])  # fmt: skip
def test_fast_mode_within_the_noise(distances, status, blamed):
    evidence = [{"distances": [one], "noise": [1.0] * 8, "moved": 1e4, "xla": None} for one in distances]
    finding = Fast().judge(evidence)
    assert (finding.status, set(finding.blamed)) == (status, blamed)


# Speed


def test_a_slow_rank_on_a_quiet_machine():
    finding = SlowRank().judge(blocks(GOOD, [1.4 * one for one in GOOD]))
    assert finding.status == "degraded" and set(finding.blamed) == {1}
    assert "1.40 times as long" in finding.summary


def test_slow_in_one_round_only_is_not_slow():
    evidence = blocks(GOOD, GOOD)
    evidence[1]["rounds"][0] = [[1.5 * one for one in GOOD]]
    assert SlowRank().judge(evidence).status == "pass"


def test_uneven_blocks_are_inconclusive():
    finding = SlowRank().judge(blocks([1.0, 1.3, 1.0, 1.3, 1.0, 1.3], [1.1, 1.4, 1.1, 1.4, 1.1, 1.4]))
    assert finding.status == "inconclusive" and "differ by 30 %" in finding.summary


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"busy_s": 1.3}, "other processes took 15 % of the CPU of a"),
        ({"steal_s": 0.3}, "the hypervisor took 15 % of the CPU of a away"),
        ({"throttled": 2}, "was throttled (its CPU quota)"),
    ],
)
def test_a_disturbed_machine_blames_nobody(change, text):
    evidence = blocks(GOOD, [2 * one for one in GOOD], noise={**quiet(), "own_s": 0.5, **change})
    finding = SlowRank().judge(evidence)
    assert (finding.status, finding.blamed) == ("inconclusive", {})
    assert text in finding.summary


@pytest.mark.parametrize(("factor", "waited_s", "status"), [(5, 0.5, "degraded"), (5, 4.0, "inconclusive"),
                                                              (2, 0.0, "inconclusive")])  # fmt: skip
def test_what_others_cannot_explain_is_slow_on_a_busy_machine_too(factor, waited_s, status):
    evidence = blocks(GOOD, [factor * one for one in GOOD], noise={**quiet(), "own_s": 0.2}, waited_s=waited_s)
    finding = SlowRank().judge(evidence)
    assert (finding.status, set(finding.blamed)) == (status, {1} if status == "degraded" else set())


def test_noise_is_that_of_each_host():
    assert find_noise([quiet(host="a"), quiet(host="b")]) == ""
    assert "of b" in find_noise([quiet(host="a"), {**quiet(host="b"), "busy_s": 1.5}])
    # Two ranks on a host: what one of them computes is not another process's.
    assert find_noise([{**quiet(), "busy_s": 1.9}, {**quiet(), "busy_s": 1.9}]) == ""


def test_spread():
    assert spread_of([1.0, 1.1, 1.0]) == pytest.approx(0.1)
    assert spread_of([2.0, 2.0, 2.0]) == 0


# Precision


def states(updates=(0, 1, 1, 2), scales=(8.0, 8.0, 4.0, 4.0), weights="abbc"):
    return [
        {"updates": number, "scale": scale, "weights": digest}
        for number, scale, digest in zip(updates, scales, weights, strict=True)
    ]


@pytest.mark.parametrize(
    ("change", "skips"),
    [({}, True), ({"updates": (0, 1, 2, 3)}, False), ({"scales": (8.0, 8.0, 8.0, 8.0)}, False),
     ({"weights": "abcd"}, False), ({"weights": "abbb"}, False)],
)  # fmt: skip
def test_one_step_is_skipped(change, skips):
    assert _skips_one_step(states(**change)) is skips


# Every judge sees what its own `spoil` does to good evidence


EVIDENCE = {
    Collectives: sums(4, 3),
    Data: plan(3)[0],
    CrossExamination: digests([[1, 2]] * 2, [[1, 2]] * 2),
    Exact: [runs("r"), runs("r")],
    Fast: [{"distances": [1.0], "noise": [1.0] * 8, "moved": 1e6, "xla": None}] * 2,
    SlowRank: blocks(GOOD, GOOD),
    Reference: [{"current": {"step": [1.0, 0.0]}, "earlier": [{"step": [1.0, 0.0]}], "reasons": [], "noise": ""}],
    Identity: [
        {"facts": {"code": "x"}, "state": [{"weights": "w"}], "initial weights as computed here": "w"}
        for _ in range(2)
    ],
    Interruption: [
        {"through": ["t"], "resumed": ["t"],
         "files": {"problem": "", "refused": {"flipped in one bit": True, "truncated": True}, "write_s": 0.1,
                   "read_s": 0.1, "bytes": 10}}
        for _ in range(2)
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", EVIDENCE, ids=lambda kind: kind.name)
def test_good_evidence_passes_and_a_fault_in_it_is_found(kind):
    check = kind(lambda *_: None) if kind in (Identity, Reference) else kind()
    evidence = json.loads(json.dumps(EVIDENCE[kind]))  # a copy, as it comes from the ranks
    assert check.judge(evidence).status == "pass"
    rank = check.spoil(evidence)
    finding = check.judge(evidence)
    assert finding.status in ("fail", "degraded")
    assert rank is None or set(finding.blamed) == {rank}


def test_a_detector_that_has_gone_blind_is_found():
    class Blind(CrossExamination):
        def judge(self, evidence):
            return dataclasses.replace(super().judge(digests([[1, 2]] * 2)), status="pass")

    runner, good = Runner([], RANKS, show=lambda *_: None), json.loads(json.dumps(EVIDENCE[CrossExamination]))
    runner.results.append(CheckResult(5, "cross_examination", "pass", ""))
    runner._judge_the_judge(CrossExamination(), good)
    assert judge_detectors(runner).status == "pass"
    runner._judge_the_judge(Blind(), good)
    assert judge_detectors(runner).status == "fail"
    assert "cross_examination does not see" in judge_detectors(runner).summary


def test_a_detector_that_blames_the_wrong_rank_is_found():
    class Confused(CrossExamination):
        def judge(self, evidence):
            finding = super().judge(evidence)
            return dataclasses.replace(finding, blamed=dict.fromkeys(finding.blamed and [0], ""))

    runner, good = Runner([], RANKS, show=lambda *_: None), json.loads(json.dumps(EVIDENCE[CrossExamination]))
    runner._judge_the_judge(Confused(), good)
    assert "does not blame rank 1" in judge_detectors(runner).summary


@pytest.mark.parametrize(
    ("of", "number", "rank", "device"),
    [("replica", 2, 1, "GPU-10"), ("replica", 1, 0, "GPU-01"), ("rank", 1, 1, "GPU-10 GPU-11")],
)
def test_a_suspect_has_its_gpu(of, number, rank, device):
    runner = Runner([], RANKS, show=lambda *_: None)
    runner._devices = [["GPU:0", "GPU:1"], ["GPU:0", "GPU:1"]]
    runner._note(CrossExamination(), Finding("fail", "", {number: "wrong"}, of=of), seconds=1.0)
    assert runner.results[0].suspects == (Suspect(rank, "ab"[rank], "cross_examination", "wrong", device),)


@pytest.mark.parametrize(("budget_s", "repeats"), [(None, 6), (1e6, 6), (60, 6), (40, 4), (1, 3)])
def test_a_budget_trims_repeats(budget_s, repeats):
    context = SimpleNamespace(asked=SimpleNamespace(budget_s=budget_s))
    assert Context.repeats(context, 6) == repeats


# The report


def report(**changes) -> Report:
    transfers = [{"collective": "all_reduce", "bytes": 1024**2, "seconds": 1e-3, "bus_gb_per_s": 1.0, "spread": 0.01}]
    checks = (
        CheckResult(3, "collectives", "pass", "fine", 1.0, (), {"transfers": transfers}),
        CheckResult(
            11,
            "slow_rank",
            "degraded",
            "slow",
            2.0,
            (Suspect(1, "b", "slow_rank", "slow"),),
            {"step_s": [1.0], "spread": 0.0},
        ),
    )
    values = {
        "verdict": "DEGRADED", "started": "2026-01-01T00:00:00+00:00", "seconds": 3.0, "command": "c",
        "strategy": "horovod", "num_replicas": 2, "dataset": {"name": "mnist"}, "versions": {"python": "3.11"},
        "configuration": {"data": {"name": "mnist"}, "model": {"name": "mlp"}, "seed": 0}, "checks": checks,
        "ranks": (RankFacts(0, "a", ("CPU:0",), (), "cpu", 1), RankFacts(1, "b", ("CPU:0",), (), "cpu", 1)),
    }  # fmt: skip
    return Report(**{**values, **changes})


def test_the_report_reads_back():
    assert Report.from_json(report().to_json()) == report()
    assert report().suspects == (Suspect(1, "b", "slow_rank", "slow"),)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (["pass", "skipped", "info"], "PASS"), (["pass", "inconclusive"], "PASS"), (["pass", "degraded"], "DEGRADED"),
        (["degraded", "fail", "inconclusive"], "FAIL"),
    ],
)  # fmt: skip
def test_the_verdict(found, verdict):
    assert judge([CheckResult(0, "x", status, "") for status in found]) == verdict


# References


def compared(references, *, results=None, noise="", shares_cores=False):
    current = report()
    own = Own(results or current.checks, current.ranks, current.configuration, shares_cores)
    evidence = compare(own, references)
    return Reference(lambda: evidence).judge([{**evidence, "noise": noise}])


@pytest.fixture
def versions(monkeypatch):
    monkeypatch.setattr("mnist_dist.verify.checks.reference.installed_versions", lambda: {"python": "3.11"})


def slower(factor: float, *, spread: float = 0.01):
    first, second = report().checks
    transfers = [{**first.details["transfers"][0], "seconds": factor * 1e-3, "spread": spread}]
    return dataclasses.replace(first, details={"transfers": transfers}), second


@pytest.mark.parametrize(
    ("factor", "noise", "status"),
    [(1.0, "", "pass"), (1.09, "", "pass"), (1.11, "", "degraded"), (1.11, "a busy machine", "inconclusive"),
     (0.5, "", "pass")],
)  # fmt: skip
def test_a_tenth_slower_is_degraded(factor, noise, status, versions):
    finding = compared([("earlier.json", report())], results=slower(factor), noise=noise)
    assert finding.status == status
    assert max(one["ratio"] for one in finding.details["compared"]) == pytest.approx(max(factor, 1.0))


@pytest.mark.parametrize(("factor", "status"), [(1.1, "pass"), (1.13, "pass"), (1.16, "degraded")])
def test_of_several_references_the_slowest_counts(factor, status, versions):
    references = [(str(one), report(checks=slower(one))) for one in (0.1, 1.0, 1.04)]
    assert compared(references, results=slower(factor)).status == status


@pytest.mark.parametrize(
    ("spread", "factor", "status"), [(0.05, 1.14, "pass"), (0.05, 1.16, "degraded"), (0.11, 9.0, "pass")]
)
def test_what_does_not_repeat_itself_is_not_judged(spread, factor, status, versions):
    finding = compared([("earlier.json", report())], results=slower(factor, spread=spread))
    assert finding.status == status
    assert ("too uneven" in finding.summary) == (spread > 0.1)


def test_replicas_that_share_cores_are_not_compared(versions):
    finding = compared([("earlier.json", report())], results=slower(9.0), shares_cores=True)
    assert finding.status == "pass"
    assert [one["name"] for one in finding.details["compared"]] == ["a step without communication, slowest rank"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"ranks": tuple(dataclasses.replace(one, gpu="A100") for one in report().ranks)},
            "the GPUs' model: ['A100'] there",
        ),
        ({"ranks": report().ranks[:1]}, "the number of ranks: 1 there, 2 here"),
        ({"versions": {"python": "3.12"}}, "the version of python: 3.12 there, 3.11 here"),
        ({"configuration": {"data": {"name": "mnist"}, "model": {"name": "cnn"}, "seed": 0}}, "model: "),
        (
            {"configuration": {"data": {"name": "digits"}, "model": {"name": "mlp"}, "seed": 0}},
            "the data set: digits there",
        ),
    ],
)
def test_what_differs_is_not_compared(changes, reason, versions):
    finding = compared([("earlier.json", report(**changes))])
    assert finding.status == "info" and f"not comparable: earlier.json: {reason}" in finding.summary
    assert finding.details["not_comparable"]


def test_another_seed_may_be_compared(versions):
    other = {**report().configuration, "seed": 1}
    assert compared([("earlier.json", report(configuration=other))]).status == "pass"


def test_the_slowest_rank_counts():
    result = CheckResult(11, "slow_rank", "pass", "", details={"step_s": [1.0, 3.0, 2.0], "spread": 0.1})
    assert times_of([result], shares_cores=True) == {"a step without communication, slowest rank": (3.0, 0.1)}


def test_references_in_a_folder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "verify.json").write_text(report().to_json())
    (tmp_path / "a" / "summary.json").write_text("{}")
    assert len(load_reports(str(tmp_path))) == 2
    assert len(load_reports(str(tmp_path / "a" / "verify.json"))) == 1


@pytest.mark.parametrize("content", ["", "[]", "{}", json.dumps({"checks": [], "ranks": [{}]})])
def test_a_damaged_reference_is_refused(content, tmp_path):
    (tmp_path / "verify.json").write_text(content)
    with pytest.raises(ValueError, match="is not a report of verify"):
        load_reports(str(tmp_path))


def test_checks_are_numbered_in_their_order():
    assert [CHECK_NAMES.index(kind.name) for kind in (Identity, Collectives, Data, CrossExamination, Exact, Fast)] == [
        2, 3, 4, 5, 6, 7,
    ]  # fmt: skip
