"""Event files for TensorBoard: the history, the configuration and the confusion matrix of a run.

A run that was killed and resumed, however often, shows as one line. The events are written by TensorFlow's own writer
of record files, not by `tf.summary`: that needs the package `tensorboard`, gives all events the present time, and names
its files by a clock, which may go backwards.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import tensorflow as tf
from tensorflow.compat.v1 import Event, SessionLog, Summary, SummaryMetadata

from mnist_dist.results.history import EpochMetrics, History

TAGS = {
    "accuracy/train": "accuracy",
    "accuracy/validation": "val_accuracy",
    "loss/train": "loss",
    "loss/validation": "val_loss",
    "optimizer/learning_rate": "learning_rate",
    "speed/epoch_s": "epoch_s",
    "speed/images_per_s": "images_per_s",
}
"""The columns of the history by their names in TensorBoard, which groups them by what stands before the slash."""
CONFIGURATION, CONFUSION_MATRIX = "configuration", "confusion_matrix/test"

_NAME = "events.out.tfevents.{:05d}"  # TensorBoard reads files in the order of their names
_NAMES = "events.out.tfevents." + 5 * "[0-9]"


class EventFiles:
    """The event files of one run, a new one for each start; an epoch is one record, which is there or is not."""

    def __init__(self, write_into: Callable[[Callable[[Path], None]], None]) -> None:
        """Write by way of `write_into`: it calls what it is given with the folder, or on other ranks does not."""
        self._write_into = write_into
        self._found: Sequence[Event] = ()
        self._num_epochs = 0
        self._writer: tf.io.TFRecordWriter | None = None

    def begin(self, history: History, config: Path) -> None:
        """Begin a file for a training that continues after `history`.

        What earlier processes did not get to write of these epochs is written first. If their files say more or
        something else (the newest checkpoint was damaged, so that these epochs are trained again), all is written anew.

        Args:
            history: epochs that will not be taken back, here and in `write`.
            config: the file with the configuration, which is shown as a text.
        """
        self._write_into(lambda folder: self._begin(folder, history, config))

    def write(self, history: History) -> None:
        """Write the epochs that are not written yet."""
        self._write_into(lambda _: self._add_epochs(history))

    def write_confusion_matrix(self, epoch: int, picture: Path) -> None:
        """Write a PNG file, drawn after `epoch`, unless it was written already."""
        self._write_into(lambda _: self._add_picture(epoch, picture))

    def _begin(self, folder: Path, history: History, config: Path) -> None:
        with _as_os_error():
            folder.mkdir(exist_ok=True)
            paths = sorted(folder.glob(_NAMES))
            self._found = [event for path in paths for event in _read(path)]
            # Continue to count where files are removed: a TensorBoard that is open looks for later names only.
            number = 1 + (int(paths[-1].name.rpartition(".")[2]) if paths else 0)
            if not _is_beginning(self._found, history):
                self._found = ()
                for path in paths:
                    path.unlink()
            self._num_epochs = len(_with_tag(self._found, "loss/train"))
            self._writer = tf.io.TFRecordWriter(str(folder / _NAME.format(number)))
            self._add(Event(file_version="brain.Event:2"))
            # To those who have read further, TensorBoard included: forget what comes again.
            restart = SessionLog(status=SessionLog.START)
            self._add(Event(step=self._num_epochs + 1, session_log=restart))
            self._add_text(len(history.epochs), config.read_text("utf-8"))
        self._add_epochs(history)

    def _add_epochs(self, history: History) -> None:
        with _as_os_error():
            added = history.epochs[self._num_epochs :]
            ended = time.time() - sum(row.epoch_s for row in added)
            for row in added:
                ended += row.epoch_s  # the last one now, the others before it
                self._add(Event(step=row.epoch, wall_time=ended, summary=_summary_of(row)))
            self._flush()
            self._num_epochs = len(history.epochs)

    def _add_text(self, step: int, text: str) -> None:
        tensor = tf.make_tensor_proto([f"```yaml\n{text}```"], tf.string)
        earlier = _with_tag(self._found, CONFIGURATION)
        if earlier and earlier[-1].summary.value[0].tensor == tensor:
            return
        kind = SummaryMetadata(plugin_data={"plugin_name": "text"})
        value = Summary.Value(tag=CONFIGURATION, tensor=tensor, metadata=kind)
        self._add(Event(step=step, summary=Summary(value=[value])))

    def _add_picture(self, epoch: int, picture: Path) -> None:
        if any(event.step == epoch for event in _with_tag(self._found, CONFUSION_MATRIX)):
            return
        with _as_os_error():
            png = picture.read_bytes()
            height, width, _ = tf.io.decode_png(png).shape
            image = Summary.Image(height=height, width=width, encoded_image_string=png)
            value = Summary.Value(tag=CONFUSION_MATRIX, image=image)
            self._add(Event(step=epoch, summary=Summary(value=[value])))
            self._flush()

    def _add(self, event: Event) -> None:
        assert self._writer is not None, "begin() comes first"
        event.wall_time = event.wall_time or time.time()
        self._writer.write(event.SerializeToString())

    def _flush(self) -> None:
        assert self._writer is not None
        self._writer.flush()


def _summary_of(row: EpochMetrics) -> Summary:
    return Summary(value=[Summary.Value(tag=tag, simple_value=getattr(row, name)) for tag, name in TAGS.items()])


def _read(path: Path) -> Iterator[Event]:
    """The events in a file, as far as it is intact: the process that wrote it may have been killed."""
    with contextlib.suppress(tf.errors.DataLossError):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            event = Event.FromString(record)
            if event.HasField("summary"):
                yield event


def _with_tag(events: Sequence[Event], tag: str) -> list[Event]:
    return [event for event in events if any(value.tag == tag for value in event.summary.value)]


def _is_beginning(events: Sequence[Event], history: History) -> bool:
    """Whether the events are those of the first epochs of `history`, or of all."""
    epochs = [(event.step, event.summary) for event in _with_tag(events, "loss/train")]
    expected = [(row.epoch, _summary_of(row)) for row in history.epochs[: len(epochs)]]
    return epochs == expected and all(event.step <= len(history.epochs) for event in events)


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """Raise TensorFlow's errors, whose "resource exhausted" would be taken for memory, as what they are."""
    try:
        yield
    except tf.errors.OpError as error:
        raise OSError(error.message.rpartition("; ")[2]) from error
