"""The benchmark's parts: protocol, contender strings, report."""

import functools
import os
import socket

import pytest

from mnist_dist.base.errors import UserError
from mnist_dist.base.wire import Wire
from mnist_dist.benchmark.entries import default_texts, parse
from mnist_dist.benchmark.machine import Bystanders
from mnist_dist.benchmark.protocol import Lost, Turns, receive_all
from mnist_dist.benchmark.report import build_rows, build_targets, format_table


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


def test_default_contenders_can_all_be_parsed():
    read = functools.cache(parse)
    for num_gpus in (0, 1, 4):
        texts = default_texts(num_gpus=num_gpus)
        assert len({(read(text).name, read(text).precision) for text in texts}) == len(texts)
        assert any("mixed_float16" in text for text in texts) == (num_gpus > 0)


def test_pytorch_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="PyTorch is not installed"):
        parse("torch precision=float32")


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
