import gc
import logging
import os
import pty
import sys

import pytest

from mnist_dist.base.console import Console, progress

log = logging.getLogger("mnist_dist.test")


def test_lines_go_to_stdout_and_later_to_a_file_in_order(tmp_path, capsys):
    with Console() as console:
        log.info("before [bold]the folder[/bold] :smile:")
        console.log_to(tmp_path / "train.log")
        log.warning("after")
    expected = "before [bold]the folder[/bold] :smile:\nafter\n"
    assert capsys.readouterr().out == expected
    assert (tmp_path / "train.log").read_text() == expected


def test_the_file_is_appended_to(tmp_path):
    for text in ("first", "second"):
        with Console() as console:
            console.log_to(tmp_path / "train.log")
            log.info(text)
    assert (tmp_path / "train.log").read_text() == "first\nsecond\n"


def test_long_lines_are_not_wrapped(capsys):
    with Console():
        log.info("x" * 500)
    assert capsys.readouterr().out == "x" * 500 + "\n"


def test_start_up_chatter_is_kept_back_for_whoever_looks_for_a_reason(capfd):
    console = Console()
    with console.tensorflow_start():
        os.write(2, b"chatter\n")
    console.show_held_back()
    with pytest.raises(RuntimeError), console.tensorflow_start():
        os.write(2, b"chatter\n")
        raise RuntimeError
    assert capfd.readouterr().err == ""
    console.show_held_back()
    assert capfd.readouterr().err == "chatter\n"
    with Console().tensorflow_start(messages=True):
        os.write(2, b"chatter\n")
    assert capfd.readouterr().err == "chatter\n"


def test_errors_are_not_kept_back(capfd):
    """The process may end before TensorFlow's start does."""
    console = Console()
    with console, console.tensorflow_start():
        log.error("error: rank 1 is gone")
        assert capfd.readouterr().err == "error: rank 1 is gone\n"
    assert gc.isenabled()


def test_no_bar_without_a_terminal(capsys):
    with progress("working") as show:
        show(1, 2)
    assert capsys.readouterr().out == ""


def test_a_bar_with_time_left_in_a_terminal(tmp_path):
    code = (
        "import time; from mnist_dist.base.console import Console, progress\n"
        "with Console(), progress('working') as show:\n"
        "    for n in range(4): show(n, 4); time.sleep(0.3)\n"
    )
    shown = bytearray()

    def read(descriptor: int) -> bytes:
        data = os.read(descriptor, 4096)
        shown.extend(data)
        return data

    command = ["/usr/bin/env", "TERM=xterm-256color", "COLUMNS=100", sys.executable, "-c", code]
    status = pty.spawn(command, read)
    assert status == 0
    text = shown.decode()
    assert "working" in text
    assert "3/4" in text
    assert "left" in text
