import gc
import logging
import os

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


def test_start_up_chatter_is_held_back_for_error_messages(capfd):
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


def test_errors_are_not_held_back(capfd):
    """The process may end before TensorFlow has started."""
    console = Console()
    with console, console.tensorflow_start():
        log.error("error: rank 1 is gone")
        assert capfd.readouterr().err == "error: rank 1 is gone\n"
    assert gc.isenabled()


def test_garbage_is_not_collected_while_tensorflow_is_imported(monkeypatch):
    """What an import creates stays; scanning it costs a fifth of the start-up, and slows every later collection."""
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    frozen = []
    for _ in range(2):
        with Console().tensorflow_start():
            assert not gc.isenabled()
        assert gc.isenabled()
    with pytest.raises(RuntimeError), Console().tensorflow_start():
        raise RuntimeError
    assert gc.isenabled()
    assert frozen == [False] * 3


def test_no_bar_without_a_terminal(capsys):
    with progress("working") as show:
        show(1, 2)
    assert capsys.readouterr().out == ""
