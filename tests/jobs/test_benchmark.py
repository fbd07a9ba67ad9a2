"""The benchmark with real child processes on small data; no test looks at how long anything took."""

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from jobs import horovodrun

from mnist_dist.base.errors import UserError
from mnist_dist.base.wire import Wire
from mnist_dist.benchmark.entries import default_texts, parse
from mnist_dist.benchmark.machine import Bystanders
from mnist_dist.benchmark.protocol import Lost, Turns, receive_all
from mnist_dist.benchmark.report import build_rows, build_targets, format_table

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
        "startup.repeats=1",
        contenders(
            "strategy=single reproducibility=exact precision=float32",
            "strategy=mirrored strategy.num_replicas=2 reproducibility=exact precision=float32",
            "keras",
            "keras jit_compile=false steps_per_execution=epoch",
            "floor",
            "strategy=single optimizer.learning_rate=1e30 optimizer=sgd precision=float32",
        ),
        timeout=590,
    )  # fmt: skip
    return result, folder, json.loads((folder / "benchmark.json").read_text())


def test_report_has_every_contender(report):
    result, folder, content = report
    rows = {row["name"]: row for row in content["rows"]}
    assert list(rows) == [
        "single exact",
        "mirrored x2 exact",
        "keras",
        "keras jit_compile=false steps_per_execution=epoch",
        "floor",
        "single auto optimizer.learning_rate=1e30 optimizer=sgd",
    ]
    *good, _ = rows.values()
    for row in good:
        assert row["status"] == "ok"
        assert len(row["epochs_s"]) == 2
        assert len(row["warmup_s"]) == 1
        assert row["min_s"] <= row["median_s"] <= row["max_s"]
        assert set(row["ratios"]) == {"keras_published", "keras_best", "floor"}
    # Both train the same, to the last bit.
    assert rows["single exact"]["loss"] == rows["mirrored x2 exact"]["loss"]
    assert rows["keras"]["ratios"]["keras_published"] == 1
    assert (folder / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    assert {"cpu", "cores", "gpus"} <= set(content["machine"])
    assert set(content["load_average"]) == {"before", "after"}
    assert "Load average" in result.stdout
    assert "tensorflow" in content["versions"]


def test_failed_contender_is_marked_and_the_rest_goes_on(report):
    result, _, content = report
    assert result.returncode == 1, result.stderr
    assert content["rows"][-1]["status"] == "failed"
    assert "TrainingFailed" in result.stdout
    assert "failed" in result.stdout


def test_startup_and_targets_are_reported(report):
    result, _, content = report
    for name in ("warm", "cold"):
        times = content["startup"][name]
        assert times["median_to_first_epoch_s"] > 0
        assert len(times["bare_import_s"]) == 1
    assert {target["passed"] for target in content["targets"]} <= {True, False}
    assert "single exact, float32, to Keras at its best" in result.stdout
    assert "start-up to import tensorflow, cold file cache" in result.stdout


@pytest.mark.parametrize("strategy", ["horovod", "multiworker"])
def test_job_of_several_processes_and_its_parts(strategy, small_npz, run_python, tmp_path):
    if strategy == "horovod":
        horovodrun()
    result = run_python(
        *MODULE, "data=npz", f"data.path={small_npz}", f"run_dir={tmp_path}", *SHORT, "startup.enabled=false",
        contenders(f"strategy={strategy} processes=2 precision=float32"), timeout=590,
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
        "startup.enabled=false", contenders("strategy=multiworker processes=2"),
    )  # fmt: skip
    jobs = wait_for(lambda: children if len(children := list_children(process.pid)) == 2 else [])
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert wait_for(lambda: not any(is_child(pid) for pid in jobs))


@pytest.fixture
def ends():
    """Both sides of a connection; into the second one a test writes what it likes."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Wire(ours), theirs


def test_what_came_with_the_greeting_is_not_waited_for(ends):
    wire, theirs = ends
    theirs.sendall(b'{"token": "x"}\n{"ready": {}}\n')
    assert wire.receive() == {"token": "x"}
    assert receive_all([wire], timeout_s=0.1) == [{"ready": {}}]
    with pytest.raises(Lost, match=r"^did not answer within 0\.1 s$"):
        receive_all([wire], timeout_s=0.1)


@pytest.mark.parametrize("last", [b"", b'{"sec'])
def test_a_child_that_ends_is_lost_even_within_a_word(last, ends):
    wire, theirs = ends
    theirs.sendall(last)
    theirs.close()
    with pytest.raises(Lost, match=r"^ended$"):
        receive_all([wire], timeout_s=20)


@pytest.mark.parametrize("last", [b"", b'{"d'])
def test_a_child_ends_with_the_benchmark(last, ends):
    wire, theirs = ends
    theirs.sendall(last)
    theirs.close()
    with pytest.raises(SystemExit):
        Turns(wire).wait()


def list_children(pid: int) -> list[int]:
    return [child for child in descendants(pid) if is_child(child)]


def wait_for(condition, *, seconds=240):
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return result


def is_child(pid: int) -> bool:
    try:
        return b"mnist_dist.benchmark.contenders.child" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    try:
        own = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [*own, *(below for child in own for below in descendants(child))]


def test_default_contenders_can_all_be_read():
    for num_gpus in (0, 1, 4):
        texts = default_texts(num_gpus=num_gpus)
        assert len({(parse(text).name, parse(text).precision) for text in texts}) == len(texts)
        assert any("mixed_float16" in text for text in texts) == (num_gpus > 0)


def test_pytorch_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="PyTorch is not installed"):
        parse("torch precision=float32")


def test_bystanders_are_others_only():
    bystanders = Bystanders()
    bystanders.look()
    sum(range(10_000_000))  # our own time does not count
    bystanders.look()
    assert os.getpid() not in [process["pid"] for process in bystanders.busiest(1000)]


def test_empty_benchmark_is_a_table_without_rows():
    assert build_rows([], warmup=1) == []
    assert build_targets([], [], None) == []
    assert len(format_table([])) == 1
