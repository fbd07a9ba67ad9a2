"""Reading a run folder back: which of its files are intact, and what they say."""

import errno
import functools
import hashlib
import io
import zipfile
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mnist_dist.base.errors import UserError
from mnist_dist.base.files import describe_os_error
from mnist_dist.config.compare import training_keys
from mnist_dist.config.data import DataConfig
from mnist_dist.config.model import KerasConfig
from mnist_dist.results.history import History, from_csv
from mnist_dist.run.checkpoint import ResumePoint
from mnist_dist.run.summary import EARLIER_RESULT_FILES, MODEL, RESULT_FILES, Summary

T = TypeVar("T")


MODEL_ADVICE = "remove it, and the training command of this run makes it again from its last checkpoint"
"""What to do about a `model.keras` that is damaged, or is not this run's."""


# Keys that not every choice has.
_OF_A_CHOICE = ("augment.", "model.", "optimizer.")
_PNG = (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82")


def check_has_model(path: Path) -> None:
    """Raise UserError unless a model was saved in this folder and its file is intact."""
    try:
        is_here = (path / MODEL).is_file()
    except OSError as error:
        raise UserError(f"run_dir={path}: cannot be read: {describe_os_error(error)}") from error
    if not is_here:
        raise UserError(f"run_dir={path}: no {MODEL} here; name the folder of a finished run")
    Inspection(path).check_model()


def read_data_config(path: Path) -> DataConfig:
    """Which data the run in this folder was trained on; raises UserError if that is unknown."""
    found = Inspection(path)
    config = found.read_config()
    if config is None:
        raise UserError(f"run_dir={path}: {found.describe()}; put back the file of this run")
    try:
        data = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), config["data"]))
    except (KeyError, TypeError, ValueError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"run_dir={path}: config.yaml does not say which data was used ({reason})") from error
    assert isinstance(data, DataConfig)
    return data


def read_own_model(path: Path) -> KerasConfig | None:
    """The function that built the network of the run in this folder; None if the package has it, or it is unknown."""
    config = Inspection(path).read_config() or {}
    model = config.get("model") or {}
    return KerasConfig(name="keras", factory=model["factory"]) if "factory" in model else None


def read_data_sha256(path: Path) -> str:
    """The digest of that data, from `summary.json`; raises UserError if there is none or it is damaged."""
    found = Inspection(path)
    summary = found.read_summary()
    if summary is None:
        raise UserError(f"run_dir={path}: no finished run here: {found.describe()}")
    return summary.dataset.sha256


class Inspection:
    """Reads the files of a run folder back, and keeps a list of those that are missing or damaged.

    All methods raise UserError if a file cannot be read now, or by this user: it may well be intact.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._damage: list[str] = []

    def describe(self) -> str:
        """What is missing or damaged, in words; empty if nothing is."""
        return ", ".join(self._damage)

    def read_config(self) -> dict[str, Any] | None:
        """The keys of `config.yaml`, except Hydra's; None if it is missing or damaged."""
        return self._read("config.yaml", _parse_config)

    def read_training_keys(self, expected: Set[str]) -> dict[str, str]:
        """The keys in `config.yaml` that the training depends on; none if it is damaged.

        A file that lacks one of the `expected` keys counts as damaged, except for keys that only another choice has.
        """
        keys = training_keys(self.read_config() or {})
        expected = {key for key in expected if key.endswith(".name") or not key.startswith(_OF_A_CHOICE)}
        if not self._damage and (lacking := expected - keys.keys()):
            self._damage.append(
                f"config.yaml is damaged, or from another version of this package (it has no {min(lacking)})"
            )
            return {}
        return keys

    def read_history(self, point: ResumePoint | None) -> History | None:
        """`history.csv`, None if it is missing or damaged; one that contradicts the checkpoint counts as damaged."""
        history = self._read("history.csv", lambda content: from_csv(content.decode()))
        # It may be longer: it is written before the checkpoint is.
        if history and point and history.epochs[: point.epoch] != point.history.epochs:
            self._damage.append("history.csv is damaged (it does not agree with the newest checkpoint)")
        return history

    def read_summary(self) -> Summary | None:
        """`summary.json`, None if it is missing or damaged."""
        return self._read("summary.json", Summary.from_json)

    def check_results(self, summary: Summary, history: History | None) -> None:
        """Check that the results belong to `summary`, and `summary` to the run with `history`."""
        for name in [name for name in RESULT_FILES if name in summary.files] or EARLIER_RESULT_FILES:
            self._read(name, functools.partial(_check_result, name, sha256=summary.files.get(name)))
        rows = history.epochs[summary.epochs_completed - 1 : summary.epochs_completed] if history else ()
        if any(row.weights_sha256 not in (None, summary.weights_sha256) for row in rows):
            self._damage.append(
                f"summary.json is damaged (its weights are not those of epoch {summary.epochs_completed})"
            )

    def check_model(self) -> None:
        """Raise UserError unless the model's file looks intact."""
        self._read(MODEL, _check_model)
        if self._damage:
            raise UserError(f"{self._folder / MODEL}: not a usable model: {self.describe()}; {MODEL_ADVICE}")

    def _read(self, name: str, parse: Callable[[bytes], T]) -> T | None:
        path = self._folder / name
        try:
            if not path.is_file():
                self._damage.append(f"{name} is missing")
                return None
            if not (content := path.read_bytes()):
                raise ValueError("it is empty")
            return parse(content)
        except OSError as error:
            reason = describe_os_error(error)
            if error.errno != errno.EIO:
                raise UserError(f"run_dir={self._folder}: {name} cannot be read: {reason}") from error
        except ValueError as error:
            reason = " ".join(str(error).split())
        self._damage.append(f"{name} is damaged ({reason})")
        return None


def _parse_config(content: bytes) -> dict[str, Any]:
    try:
        tree = OmegaConf.to_container(OmegaConf.load(io.StringIO(content.decode())))
    except Exception as error:  # YAML and OmegaConf raise many kinds for bad text
        raise ValueError(str(error)) from error
    if not isinstance(tree, dict):
        raise ValueError("it is not a configuration")
    return {str(key): value for key, value in tree.items() if key != "defaults"}


def _check_result(name: str, content: bytes, *, sha256: str | None) -> None:
    """Raise ValueError unless a file of `RESULT_FILES` has this digest or, without a digest, looks intact."""
    if sha256 is not None:
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError("its SHA-256 is not that in summary.json")
    elif name == MODEL:
        _check_model(content)
    elif not (content.startswith(_PNG[0]) and content.endswith(_PNG[1])):
        raise ValueError("it is not a complete PNG file")


def _check_model(content: bytes) -> None:
    """Raise ValueError unless this is an intact archive as Keras 3 writes it; only Keras can read its content."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names, damaged = archive.namelist(), archive.testzip()
    except Exception as error:  # zipfile and the decompressors raise many kinds for bad bytes
        raise ValueError("it is not an archive written by Keras, or its end is missing") from error
    if damaged is not None:
        raise ValueError(f"{damaged} in it does not have the checksum that was written with it")
    if missing := {"config.json", "metadata.json"} - set(names):
        raise ValueError(f"it has no {', '.join(sorted(missing))}")
