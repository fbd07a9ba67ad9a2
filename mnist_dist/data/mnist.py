"""MNIST: from the user's file or folder, Keras' cache, or the network."""

import contextlib
import hashlib
import http.client
import logging
import threading
import urllib.request
from pathlib import Path
from typing import Any

from mnist_dist.base.array import Array
from mnist_dist.base.errors import UserError
from mnist_dist.base.files import describe_os_error, expand_path, file_lock, write_atomically
from mnist_dist.config.data import DataConfig
from mnist_dist.data.dataset import ImageDataset, array_digests
from mnist_dist.data.formats import read_idx_folder, read_npz, readable

log = logging.getLogger(__name__)

# SHA-256 of each array's raw uint8 bytes: identifies MNIST, however it is packed.
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


def load_mnist(config: DataConfig) -> ImageDataset:
    """Read MNIST from `data.path`, else from Keras' cache, downloaded if it is not there; raises UserError."""
    if config.path is not None:
        return ImageDataset.from_arrays("mnist", _read_mnist(expand_path("data.path", config.path)))
    path = download_path(config)
    if not path.is_file():
        _download_mnist(path)
    try:
        return ImageDataset.from_arrays("mnist", _read_mnist(path))
    except UserError as error:
        # The user did not choose this file, so deleting it is enough.
        raise UserError(
            f"data=mnist: delete {path}, which is damaged, to have it downloaded again ({error})"
        ) from error


def download_path(config: DataConfig) -> Path:
    """Where MNIST is downloaded to, and found again."""
    return expand_path("data.keras_home", config.keras_home) / "datasets" / "mnist.npz"


def _read_mnist(path: Path) -> dict[str, Array]:
    """Read an .npz file or a folder of IDX files, and check that it is MNIST."""
    with readable(path):
        is_folder = path.is_dir()
    arrays = read_idx_folder(path) if is_folder else read_npz(path)
    for key, digest in array_digests(arrays).items():
        if digest != MNIST_SHA256[key]:
            raise UserError(
                f"data.path={path}: {key} is not MNIST's (SHA-256 {digest[:12]}..., expected "
                f"{MNIST_SHA256[key][:12]}...); get the original file, or give data=npz for your own data"
            )
    return arrays


def _download_mnist(path: Path) -> None:
    """Download Keras' MNIST file to `path`, once per machine, however many processes need it."""
    way_out = (
        "MNIST is not here and cannot be downloaded ({}); give data.path=mnist.npz (or a folder with the four IDX "
        f"files), or put mnist.npz at {path}, or give data=digits"
    )
    failure = path.with_suffix(".failed")
    earlier = _mtime_ns(failure)
    try:
        with file_lock(path.with_suffix(".lock")):
            if path.is_file():  # another process was faster
                return
            # Not compared for being later: the clock may have gone backwards since.
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
    """Download `url`; raises OSError, after at most `CONNECT_TIMEOUT_S` if there is no answer at all."""
    answers: list[Any] = []

    def connect() -> None:
        try:
            answers.append(urllib.request.urlopen(url, timeout=CONNECT_TIMEOUT_S))
        except Exception as error:
            answers.append(error)

    # In a thread, because looking up a host name has no timeout.
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
    except http.client.HTTPException as error:  # the connection was lost
        raise OSError(f"the download broke off: {error}") from error
