"""Checkpoints: the training state between two epochs, each in one file that is whole or is not used.

A file is one line of text with a SHA-256, then the content that it is of, an uncompressed NumPy archive.
"""

import errno
import hashlib
import io
import json
import logging
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from mnist_dist.base.array import Array
from mnist_dist.base.files import describe_os_error, make_folder, read_regular, write_atomically
from mnist_dist.results.history import History, best_of, from_csv, to_csv

log = logging.getLogger(__name__)

DATA_DIGEST = "data.sha256"
"""The name of the data's digest in a fingerprint, next to the keys of the configuration."""

_MAGIC = b"mnist_dist checkpoint 1 sha256 "
# Names in the files, which are older than those in the code.
_RESUME_POINT = "progress"
_KEYS = {"fingerprint": "training"}
_FILE_NAME = re.compile(r"epoch-([0-9]+)\.ckpt")


@dataclass(frozen=True)
class ResumePoint:
    """How far a training has come, and which training it is; the part of a checkpoint that every process needs."""

    history: History
    fingerprint: Mapping[str, str]
    """What the training depends on: keys of the configuration, and the digest of the data."""
    num_replicas: int
    """Those that trained the last epoch."""
    global_batch_size: int
    """Training examples per step."""
    resumed_from_epochs: tuple[int, ...] = ()
    """After which epochs the run was resumed."""
    network: str = ""
    """Which network a function of the user's own built (`engine.network.describe_network`); empty for another one."""

    @property
    def data_sha256(self) -> str:
        """The digest of the data."""
        return self.fingerprint[DATA_DIGEST]

    @property
    def epoch(self) -> int:
        """The last finished epoch, counted from 1."""
        return len(self.history.epochs)

    def to_json(self) -> str:
        """As text; floats read back to the same bits."""
        values = {**asdict(self), "history": to_csv(self.history)}
        return json.dumps({_KEYS.get(key, key): value for key, value in values.items()})

    @classmethod
    def from_json(cls, text: str) -> "ResumePoint":
        """Read what `to_json` wrote; raises ValueError, KeyError or TypeError where it is something else."""
        values = json.loads(text)
        values.setdefault("network", "")  # of an earlier version
        values = {name: values[_KEYS.get(name, name)] for name in (field.name for field in fields(cls))}
        values["history"] = from_csv(values["history"])
        values["resumed_from_epochs"] = tuple(values["resumed_from_epochs"])
        return cls(**values)


@dataclass(frozen=True)
class Checkpoint:
    """Everything that the remaining epochs depend on."""

    point: ResumePoint
    state: Mapping[str, Array]
    """The training state's variables by name (`state.TrainState.to_arrays`)."""

    def to_bytes(self) -> bytes:
        """The content of a checkpoint file."""
        stream = io.BytesIO()
        text = np.frombuffer(self.point.to_json().encode(), np.uint8)
        np.savez(stream, allow_pickle=False, **{_RESUME_POINT: text, **self.state})
        content = stream.getvalue()
        return _MAGIC + hashlib.sha256(content).hexdigest().encode() + b"\n" + content

    @classmethod
    def from_bytes(cls, data: bytes) -> "Checkpoint":
        """Read what `to_bytes` made; raises ValueError saying what is wrong with it."""
        header, _, content = data.partition(b"\n")
        if not header.startswith(_MAGIC):
            raise ValueError("it does not begin like a checkpoint" if data else "it is empty")
        if header != _MAGIC + hashlib.sha256(content).hexdigest().encode():
            raise ValueError("its content does not have the checksum that was written with it")
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as archive:
                arrays = dict(archive)
            return cls(ResumePoint.from_json(arrays.pop(_RESUME_POINT).tobytes().decode()), arrays)
        except (KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"it was written by another version of this package ({error})") from error


class CheckpointFolder:
    """The checkpoint files of one run, `epoch-00007.ckpt`: the newest ones, and the best by validation accuracy.

    Which is the newest is in the names; the times of the files play no part, as clocks may go backwards.
    """

    def __init__(self, path: Path, *, check: Callable[[], None] = lambda: None) -> None:
        """Use the folder `path`, which need not exist; its parent must when something is saved.

        `check` is called before anything is replaced or removed, and may raise OSError to prevent it.
        """
        self.path = path
        self._check = check

    def save(self, checkpoint: Checkpoint, *, keep: int) -> None:
        """Write a checkpoint, then remove all but the `keep` newest and the best; raises OSError, then removes none."""
        point = checkpoint.point
        make_folder(self.path)
        write_atomically(self._file(point.epoch), checkpoint.to_bytes(), check=self._check)
        epochs = self._epochs()
        self._check()  # after listing them: they are not those of whoever has taken over the run since
        if point.epoch not in epochs:  # somebody has moved the folder away
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._file(point.epoch)))
        rows = [row for row in point.history.epochs if row.epoch in epochs]
        # Checkpoints of later epochs could not be read when the run was resumed; those epochs are trained again.
        kept = {row.epoch for row in rows[-keep:]} | {best_of(rows).epoch}
        for epoch in set(epochs) - kept:
            self._file(epoch).unlink(missing_ok=True)

    def has_any(self) -> bool:
        """Whether there are checkpoints, whole or not; raises OSError."""
        return bool(self._epochs())

    def newest(self) -> tuple[int, Path] | None:
        """The epoch and the file of the newest checkpoint, whole or not; raises OSError."""
        epochs = self._epochs()
        return (epochs[-1], self._file(epochs[-1])) if epochs else None

    def newest_epoch(self) -> int:
        """The epoch of the newest checkpoint, whole or not; 0 if there is none. Raises OSError."""
        found = self.newest()
        return found[0] if found else 0

    def load_newest(self) -> Checkpoint | None:
        """The newest checkpoint that is intact, or None; a warning names each newer file that is not.

        Raises OSError if a file that may be intact cannot be read: its epochs must not be trained again.
        """
        for epoch in reversed(self._epochs()):
            path = self._file(epoch)
            try:
                checkpoint = Checkpoint.from_bytes(read_regular(path))
                if checkpoint.point.epoch != epoch:
                    raise ValueError(f"it is that of epoch {checkpoint.point.epoch}")
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.EISDIR, errno.EINVAL, errno.EIO):
                    raise  # it may be readable tomorrow, or for another user
                log.warning("%s cannot be used (%s); trying an earlier checkpoint", path, describe_os_error(error))
            except ValueError as error:
                log.warning("%s cannot be used: %s; trying an earlier checkpoint", path, error)
            else:
                return checkpoint
        return None

    def _epochs(self) -> list[int]:
        """The epochs that have files, in order."""
        try:
            names = {path.name for path in self.path.iterdir()}
        except (FileNotFoundError, NotADirectoryError):
            return []
        epochs = sorted(int(match[1]) for match in map(_FILE_NAME.fullmatch, names) if match)
        return [epoch for epoch in epochs if self._file(epoch).name in names]  # not epoch-7.ckpt

    def _file(self, epoch: int) -> Path:
        return self.path / f"epoch-{epoch:05d}.ckpt"
