"""What `EventFiles` writes, as TensorBoard reads it."""

import dataclasses

import numpy as np
import pytest
from support.event_files import read_event_files

from mnist_dist.engine.tensorboard import TAGS, EventFiles
from mnist_dist.results.history import EpochMetrics, History
from mnist_dist.results.png import create_figure, to_png

ROWS = tuple(EpochMetrics(n, 1 / n, 0.5, 2 / n, 0.25, 1e-3 * n, 0.1 + n, 1e6 / 3) for n in range(1, 10))


def history(num_epochs: int) -> History:
    return History(ROWS[:num_epochs])


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("trainer:\n  epochs: 9\n")
    return path


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "tensorboard"


@pytest.fixture
def begin(folder, config):
    """A process that starts to train after some epochs."""

    def begin(num_epochs: int, rows=ROWS) -> EventFiles:
        files = EventFiles(lambda write: write(folder))
        files.begin(History(rows[:num_epochs]), config)
        return files

    return begin


def check(folder, num_epochs: int, rows=ROWS) -> None:
    shown = read_event_files(folder)
    assert shown.scalars.keys() == TAGS.keys()
    for tag, column in TAGS.items():
        assert shown.scalars[tag] == [(row.epoch, np.float32(getattr(row, column))) for row in rows[:num_epochs]]


def test_epochs_are_readable_as_soon_as_they_are_written(begin, folder):
    files = begin(0)
    for num_epochs in range(1, 4):
        files.write(history(num_epochs))
        check(folder, num_epochs)


def test_resumed(begin, folder):
    begin(0).write(history(3))
    begin(3).write(history(5))
    begin(5)
    begin(5).write(history(7))
    check(folder, 7)


def test_epochs_that_a_killed_process_did_not_write_come_first(begin, folder):
    begin(0).write(history(3))
    begin(5)
    check(folder, 5)


def test_begun_for_a_run_that_had_none(begin, folder):
    begin(6)
    check(folder, 6)


@pytest.mark.parametrize("cut", [1, 5, 15, 150])
def test_a_torn_end_is_written_again(cut, begin, folder):
    begin(0).write(history(4))
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:-cut])
    begin(4).write(history(6))
    check(folder, 6)


@pytest.mark.parametrize("content", [b"", b"no record", bytes(100)])
def test_a_file_without_a_record(content, begin, folder):
    begin(0).write(history(2))
    (folder / "events.out.tfevents.00002").write_bytes(content)
    begin(2).write(history(4))
    check(folder, 4)


def test_a_damaged_middle(begin, folder):
    begin(0).write(history(4))
    begin(4).write(history(6))
    path = folder / "events.out.tfevents.00001"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    begin(6).write(history(8))
    check(folder, 8)


def test_files_that_are_ahead_are_written_anew(begin, folder):
    begin(0).write(history(5))
    again = (*ROWS[:3], *(dataclasses.replace(row, epoch_s=9.0) for row in ROWS[3:]))
    begin(3).write(History(again[:5]))
    check(folder, 5, again)
    assert [path.name for path in folder.iterdir()] == ["events.out.tfevents.00002"]


def test_files_of_other_epochs_are_written_anew(begin, folder):
    again = tuple(dataclasses.replace(row, epoch_s=9.0) for row in ROWS)
    begin(0).write(History(again[:3]))
    begin(3).write(history(5))
    check(folder, 5)


def test_other_files_stay(begin, folder):
    folder.mkdir()
    (folder / "notes.txt").touch()
    begin(0).write(history(5))
    begin(3)
    assert {path.name for path in folder.iterdir()} == {"notes.txt", "events.out.tfevents.00002"}


def test_those_who_read_along_forget_what_is_written_anew(begin, folder):
    """TensorBoard without its fast loader keeps what it has read of a file that is gone."""
    begin(0).write(history(5))
    shown = read_event_files(folder, forgets=True)
    begin(3).write(history(4))
    shown.accumulator.Reload()
    assert [event.step for event in shown.accumulator.Scalars("loss/train")] == [1, 2, 3, 4]


def test_each_epoch_has_the_time_when_it_ended(begin, folder):
    begin(0).write(history(3))
    shown = read_event_files(folder).accumulator.Scalars("loss/train")
    apart = np.diff([event.wall_time for event in shown])
    assert apart == pytest.approx([ROWS[1].epoch_s, ROWS[2].epoch_s], abs=1e-4)


def test_the_configuration_is_written_once_unless_it_changes(begin, folder, config):
    begin(0).write(history(2))
    begin(2).write(history(4))
    text = "```yaml\ntrainer:\n  epochs: 9\n```"
    assert read_event_files(folder).texts == {"configuration": [(0, text)]}
    config.write_text("trainer:\n  epochs: 10\n")
    for _ in range(2):
        begin(4)
    assert read_event_files(folder).texts == {"configuration": [(0, text), (4, text.replace("9", "10"))]}


def test_the_confusion_matrix_is_written_once(begin, folder, tmp_path):
    picture = tmp_path / "picture.png"
    picture.write_bytes(to_png(lambda: create_figure(1, 0.5)))
    for _ in range(2):
        begin(3).write_confusion_matrix(3, picture)
    files = begin(3)
    files.write(history(5))
    files.write_confusion_matrix(5, picture)
    shown = read_event_files(folder)
    assert shown.images == {"confusion_matrix/test": [(3, 160, 80), (5, 160, 80)]}
    (first, _) = shown.accumulator.Images("confusion_matrix/test")
    assert first.encoded_image_string == picture.read_bytes()


def test_other_ranks_write_nothing(folder, config):
    files = EventFiles(lambda write: None)
    files.begin(history(0), config)
    files.write(history(1))
    files.write_confusion_matrix(1, config)
    assert not folder.exists()


def test_a_full_disk_is_not_taken_for_full_memory(begin, folder):
    folder.mkdir()
    (folder / "events.out.tfevents.99999").touch()
    (folder / "events.out.tfevents.100000").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"^No space left on device$"):
        begin(9)
