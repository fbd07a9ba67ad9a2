"""The benchmark's parts: protocol, contender strings, report."""

import functools
import os
import socket

import pytest

from mnist_dist.base.errors import UserError
from mnist_dist.base.wire import Wire
from mnist_dist.benchmark.entries import default_texts, parse
from mnist_dist.benchmark.machine import Bystanders
from mnist_dist.benchmark.profile import summarize
from mnist_dist.benchmark.protocol import Lost, Turns, receive_all
from mnist_dist.benchmark.report import build_rows, build_targets, format_profile, format_table


@pytest.fixture
def ends():
    """Both ends of a connection; a test writes what it likes into the second one."""
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


@pytest.mark.parametrize("has_rivals", [True, False])
def test_default_contenders_can_all_be_parsed(has_rivals, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if has_rivals else None)
    monkeypatch.setattr("shutil.which", lambda name: name)
    read = functools.cache(parse)
    for num_gpus in (0, 1, 4):
        texts = default_texts(num_gpus=num_gpus)
        assert len({(read(text).name, read(text).precision) for text in texts}) == len(texts)
        assert any("mixed_float16" in text for text in texts) == (num_gpus > 0)
        rivals = {read(text).name for text in texts} & {"torch", "torch compile=true", "jax"}
        assert len(rivals) == (3 if has_rivals else 0)


def test_rivals_that_are_not_installed_are_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for text, named in (("torch precision=float32", "PyTorch"), ("torch compile=true", "PyTorch"), ("jax", "JAX")):
        with pytest.raises(UserError, match=f"{named} is not installed"):
            parse(text)


def test_torch_compile_is_offered_only_with_a_compiler(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert any(text.startswith("torch ") for text in default_texts(num_gpus=0))
    assert not any("compile=true" in text for text in default_texts(num_gpus=0) if text.startswith("torch"))
    assert parse("torch compile=false").options == {"compile": "false"}
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
        parse("torch compile=true")


def test_profile_gives_each_operation_the_time_that_is_not_spent_within():
    ms = 10**9  # picoseconds
    process = "ExecutorState::Process"
    first = [
        (0, 10 * ms, process),
        (1 * ms, 4 * ms, "a:MatMul"),
        (1 * ms, 1 * ms, "a/b:Cast"),  # begins with the operation that it is part of
        (5 * ms, 2 * ms, "c/d:MatMul"),  # begins as the one before ends
        (8 * ms, 1 * ms, "ThreadpoolListener::Region"),  # not an operation: time of what it is part of
    ]
    second = [(20 * ms, 4 * ms, process), (21 * ms, 2 * ms, "e:Cast")]
    python = [(0, 90 * ms, "FunctionRun")]
    profile = summarize([first, reversed(second), python], num_steps=2, seconds=0.02)
    assert (profile["threads"], profile["steps"], profile["step_ms"]) == (2, 2, 10)
    rows = [(row["operation"], row["ms"], row["share"], row["count"]) for row in profile["operations"]]
    assert rows == [("idle", 13, 0.65, 0), ("executor", 3, 0.15, 1), ("MatMul", 2.5, 0.125, 1), ("Cast", 1.5, 0.075, 1)]
    assert format_profile(profile, num_rows=2) == [
        "operation  ms a step  share  per step",
        "idle          13.000  65.0%",
        "executor       3.000  15.0%       1.0",
    ]


def row(name: str, precision: str, median_s: float, *, mode: str = "", kind: str = "ours") -> dict:
    facts = {"reproducibility": mode, "num_replicas": 1}
    common = {"name": name, "kind": kind, "precision": precision, "part": "epoch", "status": "ok", "processes": 1}
    return {**common, "facts": facts, "median_s": median_s}


def test_targets():
    rows = [
        row("single exact", "float32", 0.6, mode="exact"),
        row("single exact batch.num_shards=4", "float32", 0.1, mode="exact"),
        row("single fast", "float32", 0.5, mode="fast"),
        row("single fast", "mixed_bfloat16", 0.3, mode="fast"),
    ]
    for index, (keras, floor) in enumerate([(1.0, 0.4), (1.0, 0.4), (1.0, 0.4), (1.0, 0.2)]):
        rows[index]["ratios"] = {
            "keras_best": rows[index]["median_s"] / keras,
            "floor": rows[index]["median_s"] / floor,
        }
    found = {target.name: (round(target.value, 9), target.limit) for target in build_targets(rows, [], None)}
    assert found == {
        "single exact, float32, to Keras at its best": (0.6, 0.5),
        "single exact, float32, to the floor": (1.5, 1.25),
        "single exact, float32, to single fast": (1.2, 1.1),
        "single fast, float32, to Keras at its best": (0.5, 0.5),
        "single fast, float32, to the floor": (1.25, 1.25),
        "single fast, mixed_bfloat16, to Keras at its best": (0.3, 0.36),
        "single fast, mixed_bfloat16, to the floor": (1.5, 1.5),
    }


def test_bystanders_are_only_other_processes():
    bystanders = Bystanders()
    bystanders.look()
    sum(range(10_000_000))  # our own time does not count
    bystanders.look()
    assert os.getpid() not in [process["pid"] for process in bystanders.busiest(1000)]


def test_empty_benchmark_is_a_table_without_rows():
    assert build_rows([], warmup=1) == []
    assert build_targets([], [], None) == []
    assert len(format_table([])) == 1
