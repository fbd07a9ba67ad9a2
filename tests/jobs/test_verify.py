"""`python -m mnist_dist.verify`: a clean cluster passes, and each fault is found by the right check, with its rank."""

import dataclasses
import json
import re

import pytest
from support.hooks import HOOKS
from support.job import HOROVOD, MIRRORED, SINGLE, job_name
from support.launchers import local_addresses, tf_config

from mnist_dist.base.errors import EXIT_FAILURE, EXIT_LOST_PEER, EXIT_OK, EXIT_USER_ERROR
from mnist_dist.verify.report import CHECK_NAMES, Report

VERIFY = ("-m", "mnist_dist.verify")
FAULTY = (HOOKS / "faulty_verify.py",)
MULTIWORKER, HOROVOD_3 = ("multiworker", 2), ("horovod", 3)
# Those that time nothing, and need no bands.
QUICK = ["identity", "collectives", "data", "cross_examination", "exact", "fast", "interruption", "detectors"]


@pytest.fixture
def verify(start, small_npz, tmp_path):
    """Verify on the small data set; returns the report, and the exit codes of all ranks."""

    def run(kind, *args, fault=None, checks=QUICK, data=None, script=None, **options):
        folder = tmp_path / "run"
        script = script or (FAULTY if fault else VERIFY)
        job = start(
            kind,
            *(data or ["data=npz", f"data.path={small_npz}"]),
            f"run_dir={folder}",
            f"checks=[{','.join(checks)}]",
            *args,
            script=script,
            env={"FAULT": fault} if fault else None,
            launcher="srun" if kind[0] == "horovod" else None,
            **options,
        )
        codes = job.codes(180)
        assert (folder / "verify.json").exists(), job.output()
        return Report.from_json((folder / "verify.json").read_text()), codes

    return run


def statuses(report: Report) -> dict[str, str]:
    return {check.name: check.status for check in report.checks if check.status != "skipped"}


def found(report: Report):
    """The first check that failed, and all that blames somebody."""
    first = next((check.name for check in report.checks if check.status in ("fail", "degraded")), None)
    return first, {suspect.rank for suspect in report.suspects}


@pytest.mark.parametrize("kind", [SINGLE, MIRRORED, HOROVOD, HOROVOD_3, MULTIWORKER], ids=job_name)
def test_a_clean_cluster_passes(kind, verify, tmp_path):
    report, codes = verify(kind, checks=[name for name in CHECK_NAMES if name not in ("slow_rank", "scaling")])
    assert set(codes) == {EXIT_OK}
    assert report.verdict == "PASS" and not report.suspects
    expected = {name for name in CHECK_NAMES if name not in ("learning", "slow_rank", "scaling", "reference")}
    if kind == SINGLE:
        expected -= {"exact"}
    assert statuses(report) == dict.fromkeys(expected, "pass")
    assert report.num_replicas == kind[1] and len(report.ranks) == (kind[1] if kind[0] != "mirrored" else 1)
    assert [check.name for check in report.checks] == list(CHECK_NAMES)
    assert (tmp_path / "run" / "suspects.txt").read_text() == ""
    page = (tmp_path / "run" / "verify.html").read_text()
    assert page.lower().startswith("<!doctype html>") and "PASS" in page


FAULTS = [
    ("stale_weights:1", HOROVOD, "identity", {1}),
    ("stale_weights:2", HOROVOD_3, "identity", {2}),
    ("stale_weights:1", MIRRORED, "identity", {0}),
    ("other_code:1", MULTIWORKER, "identity", set()),
    ("other_code:1", HOROVOD_3, "identity", {1}),
    ("corrupted_all_reduce:1", HOROVOD, "collectives", {1}),
    ("corrupted_all_reduce:0", HOROVOD_3, "collectives", {0}),
    ("corrupted_all_reduce:1", MULTIWORKER, "collectives", {1}),
    ("corrupted_all_reduce:1", MIRRORED, "collectives", {0}),
    ("corrupted_all_gather:1", HOROVOD, "collectives", {1}),
    ("corrupted_all_gather:1", MULTIWORKER, "collectives", {1}),
    ("shuffled_labels:1", HOROVOD, "data", {1}),
    ("shuffled_labels:0", MULTIWORKER, "data", {0}),
    ("shard_read_twice:1", HOROVOD, "data", {1}),
    ("shard_read_twice:2", HOROVOD_3, "data", {2}),
    ("shard_read_twice:1", MIRRORED, "data", {0}),
    ("flaky_core:1", HOROVOD, "cross_examination", {1}),
    ("flaky_core:0", MULTIWORKER, "cross_examination", {0}),
    ("flaky_core:1", MIRRORED, "cross_examination", {0}),
    ("broken_core:1", HOROVOD, "cross_examination", {1}),
    ("broken_core:0", HOROVOD_3, "cross_examination", {0}),
    ("scaled_rate", HOROVOD, "exact", set()),
    ("scaled_rate", MIRRORED, "exact", set()),
    ("divided_twice", HOROVOD, "exact", set()),
    ("divided_twice", MULTIWORKER, "exact", set()),
    ("divided_twice_in_fast_mode", MIRRORED, "fast", set()),
    ("scaled_rate_in_fast_mode", SINGLE, "fast", set()),
    ("flipped_bit_in_checkpoint", HOROVOD, "interruption", {0}),
    ("flipped_bit_in_checkpoint", SINGLE, "interruption", {0}),
    ("blind_judge", MIRRORED, "detectors", set()),
]


@pytest.mark.parametrize(
    ("fault", "kind", "check", "ranks"), FAULTS, ids=[f"{fault}-{job_name(kind)}" for fault, kind, *_ in FAULTS]
)
def test_a_fault_is_found(fault, kind, check, ranks, verify, tmp_path):
    report, codes = verify(kind, fault=fault)
    assert found(report) == (check, ranks), [(one.name, one.summary) for one in report.checks]
    assert report.verdict == "FAIL" and set(codes) == {EXIT_FAILURE}
    assert {one.check for one in report.suspects} <= {check}
    hosts = (tmp_path / "run" / "suspects.txt").read_text().split()
    assert hosts == sorted({suspect.host for suspect in report.suspects})


def test_gradients_divided_twice_are_seen_with_sgd_from_the_first_step(verify):
    report, _ = verify(HOROVOD, fault="divided_twice", checks=["exact"])
    (sgd, adam) = report.checks[CHECK_NAMES.index("exact")].details["runs"]
    assert (sgd["optimizer"], sgd["first_difference"]) == ("sgd", 1)
    assert adam["optimizer"] == "adam" and sgd["reference_losses"] != adam["reference_losses"]


def test_a_fault_in_the_sum_also_shows_in_fast_mode(verify):
    report, _ = verify(HOROVOD, fault="divided_twice", checks=["fast"])
    assert found(report) == ("fast", set())


@pytest.mark.parametrize(("argument", "program"), [("compile=auto", None), ("compile=xla", "epoch")])
def test_fast_mode_is_tried_with_the_compiler_of_a_training(argument, program, verify):
    """Here none; on one GPU XLA, which compiles whole epochs."""
    report, _ = verify(SINGLE, argument, checks=["fast"])
    check = report.checks[CHECK_NAMES.index("fast")]
    assert (check.status, check.details["xla"]) == ("pass", program)


def test_a_rank_that_steps_alone(verify, mnist_path):
    report, _ = verify(HOROVOD_3, fault="steps_alone:1", checks=["precision"])
    assert found(report)[0] == "precision"
    assert report.checks[CHECK_NAMES.index("precision")].details["overflow"]["skipped_on"][1] is False


@pytest.mark.parametrize("kind", [HOROVOD, MIRRORED], ids=job_name)
def test_a_slow_rank_is_named(kind, verify):
    """The machine that runs the tests is not quiet, so the judge may only be told what was measured."""
    report, codes = verify(kind, fault="slow_rank:1", checks=["slow_rank"])
    result = report.checks[CHECK_NAMES.index("slow_rank")]
    assert result.details["slowest_ratio"] > 1.33
    if result.status == "degraded":
        assert report.verdict == "DEGRADED" and found(report)[1] == {1 if kind == HOROVOD else 0}
    else:
        assert result.status == "inconclusive" and report.verdict == "PASS"
    assert set(codes) == {EXIT_OK}


def test_a_wrong_dropout_rate_on_all_ranks(verify, mnist_path):
    data = ["data=mnist", f"data.path={mnist_path}"]
    report, _ = verify(MIRRORED, fault="wrong_dropout", checks=["exact", "learning"], data=data)
    assert found(report) == ("learning", set())
    assert report.checks[CHECK_NAMES.index("exact")].status == "pass"


def test_a_fault_of_mixed_precision_alone(verify, mnist_path):
    data = ["data=mnist", f"data.path={mnist_path}"]
    report, _ = verify(MIRRORED, fault="scaled_rate_in_mixed_precision", checks=["learning", "precision"], data=data)
    assert found(report) == ("precision", set())


@pytest.mark.parametrize("strategy", [HOROVOD, MULTIWORKER], ids=job_name)
def test_the_recipe_on_mnist_is_inside_its_bands(strategy, verify, mnist_path):
    data = ["data=mnist", f"data.path={mnist_path}"]
    report, codes = verify(strategy, checks=["learning", "precision"], data=data)
    assert statuses(report) == {"identity": "pass", "learning": "pass", "precision": "pass"}
    assert set(codes) == {EXIT_OK}


@pytest.mark.parametrize("kind", [HOROVOD, MULTIWORKER], ids=job_name)
def test_a_killed_rank_is_named(kind, verify):
    report, codes = verify(kind, fault="killed:1")
    assert found(report) == ("exact", {1})
    assert "is gone (its connection broke) in phase '25 steps of adam'" in report.suspects[0].evidence
    assert codes[0] == EXIT_FAILURE


def test_a_hanging_rank_ends_in_a_verdict(verify):
    report, codes = verify(HOROVOD, "deadline_s=15", fault="hang:1")
    result = report.checks[CHECK_NAMES.index("exact")]
    assert result.status == "fail" and result.summary.startswith("the time is up: rank 0 ")
    assert "rank 1 (" in result.summary and "is in phase '25 steps of adam'" in result.summary
    assert codes == [EXIT_FAILURE] * 2
    assert report.checks[CHECK_NAMES.index("interruption")].summary == "exact ended the job"


def test_a_check_that_meets_in_between_has_a_deadline_to_its_end(verify):
    report, codes = verify(HOROVOD, "deadline_s=15", fault="hang_after_barriers:1", checks=["scaling"])
    assert found(report) == ("scaling", {1})
    assert "is in phase 'block 2, weak, 2 replicas'" in report.suspects[0].evidence
    assert codes == [EXIT_FAILURE] * 2


@pytest.mark.parametrize(
    ("fault", "check"), [("raises:1", "exact"), ("raises_alone:1", "scaling"), ("raises_between_barriers:1", "scaling")]
)
def test_a_rank_that_fails_is_named_and_leaves_nobody_waiting(fault, check, verify):
    report, codes = verify(HOROVOD, fault=fault, checks=[check, "interruption"])
    assert found(report) == (check, {1})
    assert "the device has fallen off the bus" in report.suspects[0].evidence
    assert codes == [EXIT_FAILURE] * 2
    assert report.seconds < 60


def test_without_rank_0_there_is_no_verdict(start, small_npz, tmp_path):
    job = start(
        MULTIWORKER, "data=npz", f"data.path={small_npz}", f"run_dir={tmp_path / 'run'}", "checks=[exact]",
        script=FAULTY, env={"FAULT": "killed:0"},
    )  # fmt: skip
    assert job.codes(120)[1] == EXIT_LOST_PEER
    assert re.search(r"error: rank 0 \(.*\) is gone \(.*\), and with it the verdict", job.output())
    assert not (tmp_path / "run" / "verify.json").exists()


def test_a_rank_that_never_comes_is_named(start_python, small_npz, tmp_path):
    folder = tmp_path / "run"
    environment = tf_config(local_addresses(2))[0]
    words = ["strategy=multiworker", "data=npz", f"data.path={small_npz}", "strategy.start_timeout_s=2"]
    job = start_python(*VERIFY, *words, f"run_dir={folder}", env=environment)
    assert job.codes(60) == [EXIT_FAILURE]
    report = Report.from_json((folder / "verify.json").read_text())
    assert found(report) == ("environment", {1})
    assert (folder / "suspects.txt").read_text() == "127.0.0.1\n"


def test_references(verify, tmp_path):
    """The same machine, and then one that was twice as fast once."""
    checks = ["collectives", "scaling", "reference"]
    report, _ = verify(MIRRORED, checks=checks)
    earlier = tmp_path / "earlier"
    (tmp_path / "run").rename(earlier)
    scaling = report.checks[CHECK_NAMES.index("scaling")]
    for point in scaling.details["points"]:
        point["step_s"] /= 2
    faster = dataclasses.replace(report, checks=tuple(report.checks))
    (tmp_path / "faster.json").write_text(faster.to_json())
    again, codes = verify(MIRRORED, f"reference={tmp_path / 'faster.json'}", "strict=true", checks=checks)
    result = again.checks[CHECK_NAMES.index("reference")]
    assert result.status in ("degraded", "inconclusive")
    assert max(one["ratio"] for one in result.details["compared"]) > 1.1
    assert codes == [EXIT_FAILURE if result.status == "degraded" else EXIT_OK]


def test_other_hardware_is_not_compared(verify, tmp_path):
    report, _ = verify(SINGLE, checks=["collectives"])
    other = json.loads(report.to_json())
    other["ranks"][0]["cpu"] = "another processor"
    (tmp_path / "run").rename(tmp_path / "earlier")
    (tmp_path / "earlier" / "verify.json").write_text(json.dumps(other))
    again, codes = verify(SINGLE, f"reference={tmp_path / 'earlier'}", checks=["collectives", "reference"])
    result = again.checks[CHECK_NAMES.index("reference")]
    assert result.status == "info" and codes == [EXIT_OK]
    assert "not comparable" in result.summary and "another processor" in result.summary


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("checks=[exactly]", "checks=exactly: no such check; the checks are environment, detectors, identity"),
        ("checks=[]", "checks=[]: name at least one"),
        ("budget_s=0", "budget_s=0.0: must be more than 0"),
        ("reference=nowhere", "reference=nowhere"),
    ],
)
def test_bad_arguments(argument, message, run_python, small_npz):
    result = run_python(*VERIFY, "strategy=single", "data=npz", f"data.path={small_npz}", argument)
    assert result.returncode == EXIT_USER_ERROR
    assert message in result.stderr


def test_a_folder_with_a_verification_is_refused(run_python, small_npz, tmp_path):
    (tmp_path / "verify.json").write_text("{}")
    result = run_python(*VERIFY, "data=npz", f"data.path={small_npz}", f"run_dir={tmp_path}")
    assert result.returncode == EXIT_USER_ERROR
    assert f"run_dir={tmp_path}: holds a verification already" in result.stderr
