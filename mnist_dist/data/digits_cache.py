"""The embedded digits, built once and then cached."""

import contextlib
import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mnist_dist.base.array import Array
from mnist_dist.base.console import progress
from mnist_dist.base.errors import UserError
from mnist_dist.base.files import describe_os_error, expand_path, file_lock, write_atomically
from mnist_dist.config.data import DataConfig
from mnist_dist.data import digits
from mnist_dist.data.dataset import ImageDataset, array_digests
from mnist_dist.data.formats import read_npz

log = logging.getLogger(__name__)


def load_digits(config: DataConfig) -> ImageDataset:
    """Read the embedded digits from `data.cache_dir`; if they are not there, build them."""
    path = digits_path(config)
    arrays = _read_cached(path)
    if arrays is None:
        arrays = _build_once(path)
    return ImageDataset.from_arrays("digits", arrays)


def digits_path(config: DataConfig) -> Path:
    """Where they are cached."""
    return expand_path("data.cache_dir", config.cache_dir) / f"digits-v{digits.DIGITS_VERSION}.npz"


def _read_cached(path: Path) -> dict[str, Array] | None:
    """The cached arrays; None if there are none, or none that are intact."""
    if not path.is_file():
        return None
    with contextlib.suppress(UserError):
        arrays = read_npz(path)
        if array_digests(arrays) == digits.DIGITS_SHA256:
            return arrays
    return None


def _build_once(path: Path) -> dict[str, Array]:
    """Build and cache the digits; if several processes need them at once, one builds and the others wait."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(path.with_suffix(".lock")))
        except OSError as error:
            log.warning("cannot cache the digits at %s (%s): they are built each time", path, describe_os_error(error))
            return _build()
        arrays = _read_cached(path)  # another process may have been faster
        if arrays is None:
            if path.is_file():
                log.warning("the cached digits at %s are damaged; building them again", path)
            arrays = _build()
            if array_digests(arrays) != digits.DIGITS_SHA256:
                log.warning(
                    "the digits built here differ from the expected ones (another NumPy?): results are not "
                    "bit-identical to those of other machines, and the digits are built each time"
                )
                return arrays
            try:
                write_atomically(path, _npz_bytes(arrays))
            except OSError as error:
                log.warning("cannot cache the digits at %s (%s)", path, describe_os_error(error))
        return arrays


def _build() -> dict[str, Array]:
    log.info("building the embedded digits data set (once; it is cached)")
    with progress("building digits") as show:
        return digits.generate_digits(on_progress=show)


def _npz_bytes(arrays: Mapping[str, Array]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **dict[str, Any](arrays))
    return buffer.getvalue()
