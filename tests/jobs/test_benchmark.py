"""The benchmark with real child processes on small data; no test checks how long anything took."""

import contextlib
import json
import os
import subprocess
from pathlib import Path
from typing import cast

import psutil
import pytest
from support.launchers import horovodrun
from support.processes import family, wait_until

from mnist_dist.benchmark import startup
from mnist_dist.benchmark.guard import Guard

# One process has all of them, as they share what takes long to make.
pytestmark = pytest.mark.xdist_group("benchmark")

MODULE = ("-m", "mnist_dist.benchmark")
SHORT = ("epochs=2", "warmup_epochs=1", "timeout_s=300")


def contenders(*texts: str) -> str:
    return f"contenders={json.dumps(texts)}"


@pytest.fixture(scope="module")
def report(small_npz, run_python, tmp_path_factory):
    """A whole run: what it printed, its folder, and benchmark.json."""
    folder = tmp_path_factory.mktemp("benchmark") / "run"
    result = run_python(
        *MODULE, "data=npz", f"data.path={small_npz}", f"run_dir={folder}", *SHORT, "targets=true",
        "startup.repeats=1", "startup.cold=none", "profile=true",
        contenders(
            "strategy=single reproducibility=exact precision=float32",
            "keras",
            "keras jit_compile=false steps_per_execution=epoch",
            "floor",
            "strategy=single optimizer.learning_rate=1e30 optimizer=sgd precision=float32",
        ),
        timeout=590, fresh=True,
    )  # fmt: skip
    return result, folder, json.loads((folder / "benchmark.json").read_text())


def test_report_has_every_contender(report):
    result, folder, content = report
    rows = {row["name"]: row for row in content["rows"]}
    assert list(rows) == [
        "single exact",
        "keras",
        "keras jit_compile=false steps_per_execution=epoch",
        "floor",
        "single auto optimizer.learning_rate=1e30 optimizer=sgd",
    ]
    *good, _ = rows.values()
    assert rows["single exact"]["facts"]["gpu_operations"]["device"] > 8 * 8  # products alone
    assert rows["single exact"]["facts"]["gpu_operations"]["host"] == 0
    for row in good:
        assert row["status"] == "ok"
        assert len(row["epochs_s"]) == 2
        assert len(row["warmup_s"]) == 1
        assert row["min_s"] <= row["median_s"] <= row["max_s"]
        assert set(row["ratios"]) == {"keras_published", "keras_best", "floor"}
    assert rows["keras"]["ratios"]["keras_published"] == 1
    assert (folder / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert {"cpu", "cores", "gpus"} <= set(content["machine"])
    assert set(content["load_average"]) == {"before", "after"}
    assert "Load average" in result.stdout
    assert "tensorflow" in content["versions"]


def test_failed_contender_is_marked_and_the_rest_run(report):
    result, _, content = report
    assert result.returncode == 1, result.stderr
    assert content["rows"][-1]["status"] == "failed"
    assert "Diverged" in result.stdout
    assert "failed" in result.stdout


def test_profile_says_where_the_time_of_a_step_goes(report):
    result, _, content = report
    (profile,) = content["profile"]  # only our own training can be traced, and one of them failed
    assert (profile["name"], profile["precision"]) == ("single exact", "float32")
    shares = {row["operation"]: row["share"] for row in profile["operations"]}
    assert any("MatMul" in operation for operation in shares)
    assert {"executor", "idle"} <= set(shares)
    assert all(0 <= share <= 1 for share in shares.values())
    assert "Profile of single exact, float32" in result.stdout


def test_startup_and_targets_are_reported(report):
    result, _, content = report
    times = content["startup"]["warm"]
    assert times["median_to_first_epoch_s"] > 0
    assert len(times["bare_import_s"]) == 1
    assert {target["passed"] for target in content["targets"]} <= {True, False}
    assert "single exact, float32, to Keras at its best" in result.stdout
    assert "start-up to import tensorflow, warm file cache" in result.stdout


def test_the_file_cache_is_dropped(tmp_path, monkeypatch):
    """On a small folder: to drop the packages' cache would slow down every test that runs beside this one."""
    package = tmp_path / "package" / "module.py"
    package.parent.mkdir()
    package.write_bytes(bytes(100_000))
    with package.open("rb") as file:
        os.fsync(file.fileno())
    monkeypatch.setattr(startup, "__file__", str(tmp_path / "mnist_dist" / "benchmark" / "startup.py"))
    monkeypatch.setattr(startup.sysconfig, "get_path", lambda _: str(package.parent))
    assert cached_bytes(package) > 0
    startup.drop_file_cache("fadvise")
    assert cached_bytes(package) == 0


def cached_bytes(path: Path) -> int:
    return int(subprocess.check_output(["fincore", "--noheadings", "--bytes", "--output=RES", str(path)]))


def test_every_start_with_a_cold_file_cache_follows_a_drop(tmp_path, monkeypatch):
    steps = []

    def start(*values, **_):
        steps.append("start")
        times = values[-1]
        for seconds in vars(times).values():
            seconds.append(1.0)

    for name in ("run_once", "import_once"):
        monkeypatch.setattr(startup, name, start)
    monkeypatch.setattr(startup, "drop_file_cache", steps.append)
    guard = cast(Guard, None)
    startup.measure_startup(tmp_path, overrides=[], repeats=2, cold="fadvise", guard=guard, look=lambda: None)
    warm, cold = ["start", "start"], ["fadvise", "start", "fadvise", "start"]
    assert steps == ["start", *warm, *cold, *warm, *cold]


def test_job_of_several_processes_and_its_parts(small_npz, run_python, tmp_path):
    horovodrun()
    result = run_python(
        *MODULE, "data=npz", f"data.path={small_npz}", f"run_dir={tmp_path}", *SHORT, "startup.enabled=false",
        contenders("strategy=horovod processes=2 precision=float32"), timeout=590, fresh=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert [row["part"] for row in content["rows"]] == ["epoch", "compute", "all_reduces"]
    (job,) = content["jobs"]
    assert job["ratio"] == job["epoch_s"] / (job["compute_s"] + job["all_reduces_s"])
    assert [point["bytes"] for point in content["all_reduce"]] == [1024 * 2**n for n in range(14)]
    assert {point["num_replicas"] for point in content["all_reduce"]} == {2}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["epochs=0"], "epochs=0"),
        (["startup.cold=maybe"], "startup.cold=maybe"),
        (["startup.repeats=0"], "startup.repeats=0"),
        (["timeout_s=0"], "timeout_s=0"),
        (["epoch=3"], "did you mean epochs=3"),
        ([contenders("kreas")], "kreas"),
        ([contenders("strategy=nowhere")], "strategy=nowhere"),
        ([contenders("strategy=single processes=2")], "several processes need"),
        ([contenders("keras batch=3")], "batch"),
        ([contenders("torch compile=maybe")], "compile must be one of"),
        ([contenders("floor precision=float64")], "precision must be one of"),
        ([contenders("strategy=single data=mnist")], "not a key of a contender"),
        (["data=npz", "data.path=nowhere.npz", contenders("floor")], "nowhere.npz"),
    ],
)
def test_bad_input(arguments, named, run_python, tmp_path):
    result = run_python(*MODULE, *arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert named in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_results_are_not_overwritten(run_python, tmp_path):
    (tmp_path / "config.yaml").touch()
    (tmp_path / "benchmark.json").touch()
    result = run_python(*MODULE, f"run_dir={tmp_path}", contenders("floor"))
    assert result.returncode == 2
    assert "holds a benchmark already" in result.stderr


def test_no_child_outlives_a_killed_benchmark(small_npz, start_python, tmp_path):
    process = start_python(
        *MODULE, "data=npz", f"data.path={small_npz}", f"run_dir={tmp_path / 'run'}", "epochs=100000",
        "startup.enabled=false", contenders("strategy=multiworker processes=2"), fresh=True,
    )  # fmt: skip
    (benchmark,) = process.processes
    jobs = wait_until(lambda: children if len(children := list_children(benchmark)) == 2 else [])
    benchmark.kill()
    process.codes()
    wait_until(lambda: not any(map(is_child, jobs)))


def list_children(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in family(process) if is_child(child)]


def is_child(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "mnist_dist.benchmark.contenders.child" in process.cmdline()
    return False
