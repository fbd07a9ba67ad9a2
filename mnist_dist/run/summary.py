"""The results of a finished run, read back: its summary, and whether the files beside it are whole."""

import errno
import functools
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from omegaconf import OmegaConf

from mnist_dist.base.errors import UserError
from mnist_dist.base.files import describe_os_error
from mnist_dist.config.compare import training_keys
from mnist_dist.results.history import History, from_csv
from mnist_dist.run.checkpoint import Progress

T = TypeVar("T")

MODEL = "model.keras"
MODEL_ADVICE = "take it away, and the training command of this run makes it again from its last checkpoint"
"""What to do about a `model.keras` that is damaged, or is another one."""
RESULT_FILES = (MODEL, "plots/loss.png", "plots/accuracy.png", "plots/confusion_matrix.png")
"""The files whose SHA-256 `summary.json` has below `files`."""

_NUMBER = (int, float)
_SPLIT = {"loss": _NUMBER, "accuracy": _NUMBER, "num_correct": int, "num_examples": int}
_SUMMARY = {
    "status": str,
    "dataset": {"name": str, "sha256": str, "num_train": int, "num_val": int, "num_test": int},
    "strategy": str,
    "world_size": int,
    "num_replicas": int,
    "global_batch_size": int,
    "per_replica_batch_size": int,
    "precision": str,
    "seed": int,
    "epochs_completed": int,
    "train": _SPLIT,
    "val": _SPLIT,
    "test": _SPLIT,
    "avoidable_bias_percent": _NUMBER,
    "variance_percent": _NUMBER,
    "weights_sha256": str,
    "timing": {},
    "resumed_from_epochs": list,
    "versions": {},
}
_PNG = (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82")


@dataclass(frozen=True)
class Summary:
    """What of a `summary.json` is read back."""

    epochs: int
    data_sha256: str
    weights_sha256: str
    files: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of `RESULT_FILES`; there is none in a summary of an earlier version of this package."""

    @classmethod
    def from_json(cls, content: bytes) -> "Summary":
        """Read a whole `summary.json`; raises ValueError that says what is wrong with it."""
        try:
            values = json.loads(content, parse_constant=_refuse)
        except RecursionError as error:
            raise ValueError("it is nested too deep") from error
        _check_types(values, _SUMMARY, "it")
        epochs, files = values["epochs_completed"], values.get("files", {})
        if values["status"] != "finished" or epochs < 1:
            raise ValueError(f"its status is {values['status']!r} after {epochs} epochs")
        _check_types(files, dict.fromkeys(files, str) if isinstance(files, dict) else {}, "files")
        return cls(epochs, values["dataset"]["sha256"], values["weights_sha256"], files)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it has {constant} for a number")


def _check_types(value: Any, expected: Any, name: str) -> None:
    if isinstance(expected, Mapping):
        if not isinstance(value, dict):
            raise ValueError(f"{name} is {value!r:.40}, not an object")
        for key, kind in expected.items():
            if key not in value:
                raise ValueError(f"it has no {key}")
            _check_types(value[key], kind, key)
    elif not isinstance(value, expected) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r:.40}")


class Inspection:
    """Reads the files of a run folder back, and keeps a list of those that are missing or damaged.

    All methods raise UserError where a file cannot be read just now, or by this user: then it may well be whole.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._damage: list[str] = []

    def describe(self) -> str:
        """What was missing or damaged, in words; empty if nothing was."""
        return ", ".join(self._damage)

    def read_config(self) -> dict[str, Any] | None:
        """The keys of `config.yaml`, but for Hydra's; None if it is missing or damaged."""
        return self._read("config.yaml", _parse_config)

    def read_training_keys(self, expected: Set[str]) -> dict[str, str]:
        """What `config.yaml` says that the training depends on; nothing if it is damaged.

        So it is without all `expected` keys, but for those that come with another model or optimizer.
        """
        keys = training_keys(self.read_config() or {})
        expected = {key for key in expected if key.endswith(".name") or not key.startswith(("model.", "optimizer."))}
        if not self._damage and (lacking := expected - keys.keys()):
            self._damage.append(
                f"config.yaml is damaged, or of another version of this package (it has no {min(lacking)})"
            )
            return {}
        return keys

    def read_history(self, progress: Progress | None) -> History | None:
        """`history.csv`, None if it is missing or damaged; one that is not that of the checkpoint is listed, too."""
        history = self._read("history.csv", lambda content: from_csv(content.decode()))
        # It may be longer: it is written before the checkpoint is.
        if history and progress and history.epochs[: progress.epoch] != progress.history.epochs:
            self._damage.append("history.csv is damaged (it does not agree with the newest checkpoint)")
        return history

    def read_summary(self) -> Summary | None:
        """`summary.json`, None if it is missing or damaged."""
        return self._read("summary.json", Summary.from_json)

    def check_results(self, summary: Summary, history: History | None) -> None:
        """Look whether the results are those of `summary`, and this is that of the run with `history`."""
        for name in RESULT_FILES:
            self._read(name, functools.partial(_check_result, name, sha256=summary.files.get(name)))
        rows = history.epochs[summary.epochs - 1 : summary.epochs] if history else ()
        if any(row.weights_sha256 not in (None, summary.weights_sha256) for row in rows):
            self._damage.append(f"summary.json is damaged (its weights are not those of epoch {summary.epochs})")

    def check_model(self) -> None:
        """Raise UserError unless the model's file looks whole."""
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
    except Exception as error:  # YAML and OmegaConf have many for bad text
        raise ValueError(str(error)) from error
    if not isinstance(tree, dict):
        raise ValueError("it is not a configuration")
    return {str(key): value for key, value in tree.items() if key != "defaults"}


def _check_result(name: str, content: bytes, *, sha256: str | None) -> None:
    """Raise ValueError unless a file of `RESULT_FILES` has this digest, or where there is none looks whole."""
    if sha256 is not None:
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError("its SHA-256 is not that in summary.json")
    elif name == MODEL:
        _check_model(content)
    elif not (content.startswith(_PNG[0]) and content.endswith(_PNG[1])):
        raise ValueError("it is no whole PNG file")


def _check_model(content: bytes) -> None:
    """Raise ValueError unless this is a whole archive of Keras 3; what it holds, only Keras can tell."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names, damaged = archive.namelist(), archive.testzip()
    except Exception as error:  # zipfile and the decompressors have many for bad bytes
        raise ValueError("it is no archive as Keras writes it, or its end is missing") from error
    if damaged is not None:
        raise ValueError(f"{damaged} in it does not have the checksum that was written with it")
    if missing := {"config.json", "metadata.json"} - set(names):
        raise ValueError(f"it has no {', '.join(sorted(missing))}")
