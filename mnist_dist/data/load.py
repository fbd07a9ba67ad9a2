"""Where images come from: MNIST, the embedded digits, or the user's own file.

Every source ends as an `ImageDataset`; wrong or missing files end as one `UserError`. No TensorFlow here, so that
these errors answer at once.
"""

import contextlib
import hashlib
import http.client
import io
import logging
import threading
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mnist_dist.base.console import progress
from mnist_dist.base.errors import UserError
from mnist_dist.base.files import describe_os_error, file_lock, write_atomically
from mnist_dist.config.data import DataConfig
from mnist_dist.data.formats import ARRAY_NAMES, Array, expand_path, read_idx_folder, read_npz, readable

log = logging.getLogger(__name__)

# SHA-256 of each array's raw uint8 bytes: what makes a file MNIST, however it is packed.
MNIST_SHA256 = {
    "x_train": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
    "y_train": "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
    "x_test": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
    "y_test": "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
}
# The file that keras.datasets.mnist downloads, and its own SHA-256.
MNIST_URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"
MNIST_FILE_SHA256 = "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"
CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class ImageDataset:
    """Training and test images with their labels.

    Images have the shape (n, height, width) or (n, height, width, channels), as uint8 in 0..255 or float in 0..1;
    labels have the shape (n,) and are integers. `sha256` is a digest of all four arrays.
    """

    name: str
    x_train: Array
    y_train: Array
    x_test: Array
    y_test: Array
    sha256: str


def load_dataset(config: DataConfig) -> ImageDataset:
    """Load the configured data set; raises UserError with one line if it cannot be had or is damaged."""
    if config.name == "auto":
        return _load_auto(config)
    loaders = {"mnist": _load_mnist, "digits": _load_digits, "npz": _load_npz}
    return loaders[config.name](config)


def _load_auto(config: DataConfig) -> ImageDataset:
    try:
        return _load_mnist(config)
    except UserError as error:
        log.warning("WARNING: training on the embedded digits, NOT on MNIST: %s", error)
        return _load_digits(config)


def _dataset(name: str, arrays: Mapping[str, Array]) -> ImageDataset:
    digests = array_digests(arrays)
    text = "".join(f"{key}:{arrays[key].dtype}:{arrays[key].shape}:{digests[key]}\n" for key in ARRAY_NAMES)
    return ImageDataset(
        name=name,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        **{key: arrays[key] for key in ARRAY_NAMES},
    )


def array_digests(arrays: Mapping[str, Array]) -> dict[str, str]:
    """SHA-256 of each array's raw bytes in C order."""
    return {key: hashlib.sha256(np.ascontiguousarray(arrays[key]).data).hexdigest() for key in ARRAY_NAMES}


# MNIST


def _load_mnist(config: DataConfig) -> ImageDataset:
    if config.path is not None:
        return _dataset("mnist", _read_mnist(expand_path("data.path", config.path)))
    path = expand_path("data.keras_home", config.keras_home) / "datasets" / "mnist.npz"
    if not path.is_file():
        _download_mnist(path)
    try:
        return _dataset("mnist", _read_mnist(path))
    except UserError as error:
        # The user has not named this file, and need not mend it.
        raise UserError(
            f"data=mnist: delete {path}, which is damaged, to have it downloaded again ({error})"
        ) from error


def _read_mnist(path: Path) -> dict[str, Array]:
    """Read an .npz file or a folder of IDX files, and make sure that it is MNIST."""
    with readable(path):
        is_folder = path.is_dir()
    arrays = read_idx_folder(path) if is_folder else read_npz(path)
    for key, digest in array_digests(arrays).items():
        if digest != MNIST_SHA256[key]:
            raise UserError(
                f"data.path={path}: {key} is not MNIST's (SHA-256 {digest[:12]}..., expected "
                f"{MNIST_SHA256[key][:12]}...); get the original file, or say data=npz for data of your own"
            )
    return arrays


def _download_mnist(path: Path) -> None:
    """Put Keras' own MNIST file at `path`, once per machine however many processes ask."""
    way_out = (
        "MNIST is not here and cannot be downloaded ({}); give data.path=mnist.npz (or a folder with the four IDX "
        f"files), or put mnist.npz at {path}, or say data=digits"
    )
    failure = path.with_suffix(".failed")
    earlier = _mtime_ns(failure)
    try:
        with file_lock(path.with_suffix(".lock")):
            if path.is_file():  # another process was faster
                return
            # Compared for being another one, not a later one: the clock may have gone backwards since.
            if _mtime_ns(failure) not in (None, earlier):  # another process has tried meanwhile
                raise OSError(failure.read_text())
            log.info("downloading MNIST to %s", path)
            try:
                content = _fetch(MNIST_URL)
            except OSError as error:
                failure.write_text(describe_os_error(error))
                raise
            if hashlib.sha256(content).hexdigest() != MNIST_FILE_SHA256:
                raise UserError("data=mnist: " + way_out.format("the download is not the expected file"))
            write_atomically(path, content)
    except OSError as error:
        raise UserError("data=mnist: " + way_out.format(describe_os_error(error))) from error


def _mtime_ns(path: Path) -> int | None:
    """When a file was last written; None if there is none."""
    with contextlib.suppress(OSError):
        return path.stat().st_mtime_ns
    return None


def _fetch(url: str) -> bytes:
    """Download `url`; raises OSError, after at most `CONNECT_TIMEOUT_S` if nothing answers at all."""
    answers: list[Any] = []

    def connect() -> None:
        try:
            answers.append(urllib.request.urlopen(url, timeout=CONNECT_TIMEOUT_S))
        except Exception as error:
            answers.append(error)

    # In a thread, because looking up a host name has no timeout of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_TIMEOUT_S)
    answer = answers[0] if answers else TimeoutError(f"no answer in {CONNECT_TIMEOUT_S:.0f} s")
    if isinstance(answer, OSError):
        raise answer
    if isinstance(answer, Exception):
        raise OSError(str(answer)) from answer
    try:
        with answer:
            return bytes(answer.read())
    except http.client.HTTPException as error:  # the connection was lost half-way
        raise OSError(f"the download broke off: {error}") from error


# The embedded digits


def _load_digits(config: DataConfig) -> ImageDataset:
    from mnist_dist.data import digits  # scikit-learn is slow to import

    path = expand_path("data.cache_dir", config.cache_dir) / f"digits-v{digits.DIGITS_VERSION}.npz"
    arrays = _read_cached_digits(path, digits.DIGITS_SHA256)
    if arrays is None:
        arrays = _build_digits_once(path, digits)
    return _dataset("digits", arrays)


def _read_cached_digits(path: Path, sha256: Mapping[str, str]) -> dict[str, Array] | None:
    """The cached arrays; None if there are none, or none that are intact."""
    if not path.is_file():
        return None
    with contextlib.suppress(UserError):
        arrays = read_npz(path)
        if array_digests(arrays) == sha256:
            return arrays
    return None


def _build_digits_once(path: Path, digits: ModuleType) -> dict[str, Array]:
    """Build and cache the digits; of several processes that ask at once one builds and the others wait."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(path.with_suffix(".lock")))
        except OSError as error:
            log.warning(
                "cannot keep the built digits at %s (%s): they are built each time", path, describe_os_error(error)
            )
            return _build_digits(digits)
        arrays = _read_cached_digits(path, digits.DIGITS_SHA256)  # another process may have been faster
        if arrays is None:
            if path.is_file():
                log.warning("the cached digits at %s are damaged and are built again", path)
            arrays = _build_digits(digits)
            if array_digests(arrays) != digits.DIGITS_SHA256:
                log.warning(
                    "the digits built here differ from the recorded ones (another NumPy?): results are not comparable "
                    "to the bit with those of other machines, and the digits are built each time"
                )
                return arrays
            try:
                write_atomically(path, _npz_bytes(arrays))
            except OSError as error:
                log.warning("cannot keep the built digits at %s (%s)", path, describe_os_error(error))
        return arrays


def _build_digits(digits: ModuleType) -> dict[str, Array]:
    log.info("building the embedded digits data set (once; it is cached)")
    with progress("building digits") as show:
        arrays: dict[str, Array] = digits.generate_digits(on_progress=show)
        return arrays


def _npz_bytes(arrays: Mapping[str, Array]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **dict[str, Any](arrays))
    return buffer.getvalue()


# The user's own arrays


def _load_npz(config: DataConfig) -> ImageDataset:
    path = expand_path("data.path", str(config.path))
    arrays = read_npz(path)
    for part in ("train", "test"):
        images, labels = arrays[f"x_{part}"], arrays[f"y_{part}"]
        _check_images(path, f"x_{part}", images)
        _check_labels(path, f"y_{part}", labels)
        if len(images) != len(labels):
            raise UserError(
                f"data.path={path}: x_{part} has {len(images)} images but y_{part} has {len(labels)} labels"
            )
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        raise UserError(
            f"data.path={path}: x_train has images of shape {arrays['x_train'].shape[1:]}, "
            f"x_test of shape {arrays['x_test'].shape[1:]}; they must agree"
        )
    if arrays["x_train"].dtype != arrays["x_test"].dtype:
        raise UserError(
            f"data.path={path}: x_train is {arrays['x_train'].dtype}, x_test is {arrays['x_test'].dtype}; "
            "they must agree"
        )
    classes = np.unique(arrays["y_train"])
    unknown = np.setdiff1d(arrays["y_test"], classes)
    if len(unknown):
        raise UserError(f"data.path={path}: y_test has labels that y_train has not: {_some(unknown)}")
    if len(classes) < 2:
        raise UserError(f"data.path={path}: y_train has only the label {classes[0]}; at least two classes are needed")
    return _dataset("npz", arrays)


def _check_images(path: Path, name: str, images: Array) -> None:
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise UserError(
            f"data.path={path}: {name} has shape {images.shape}; expected (n, height, width) or "
            "(n, height, width, channels), none of them 0"
        )
    if images.dtype == np.uint8:
        return
    if images.dtype.kind != "f":
        raise UserError(f"data.path={path}: {name} is {images.dtype}; expected uint8 (0..255) or float (0..1)")
    if not np.isfinite(images).all():
        raise UserError(f"data.path={path}: {name} has NaN or infinite values; remove them")
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        raise UserError(
            f"data.path={path}: {name} is {images.dtype} from {low:g} to {high:g}; floats must be in 0..1 "
            "(divide by 255, or store uint8)"
        )


def _check_labels(path: Path, name: str, labels: Array) -> None:
    if labels.ndim != 1 or len(labels) == 0:
        raise UserError(f"data.path={path}: {name} has shape {labels.shape}; expected (n,), one label an image")
    if labels.dtype.kind not in "iu":
        raise UserError(f"data.path={path}: {name} is {labels.dtype}; expected whole numbers (class 0, 1, 2, ...)")
    if labels.min() < 0:
        raise UserError(f"data.path={path}: {name} has labels out of range: {_some(labels[labels < 0])}")


def _some(values: Array, most: int = 5) -> str:
    listed = np.unique(values)
    return ", ".join(map(str, listed[:most])) + (", ..." if len(listed) > most else "")
