"""Reading data files. Whatever is wrong with one becomes a UserError, one line that names the file."""

import contextlib
import gzip
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mnist_dist.base.array import Array
from mnist_dist.base.errors import UserError
from mnist_dist.base.files import describe_os_error, open_regular
from mnist_dist.base.memory import describe_bytes, usable_memory
from mnist_dist.data.dataset import ARRAY_NAMES

IDX_FILES = {
    "x_train": "train-images",
    "y_train": "train-labels",
    "x_test": "t10k-images",
    "y_test": "t10k-labels",
}


def read_idx_folder(folder: Path) -> dict[str, Array]:
    """Read MNIST's four IDX files, gzipped or not, under any of their usual names."""
    return {key: _read_idx(_find_idx(folder, stem), ndim=3 if key[0] == "x" else 1) for key, stem in IDX_FILES.items()}


def _find_idx(folder: Path, stem: str) -> Path:
    with readable(folder):
        candidates = [p for p in sorted(folder.iterdir()) if p.name.startswith(stem)]
    if not candidates:
        raise UserError(f"data.path={folder}: no file {stem}-idx?-ubyte or .gz in this folder")
    return candidates[0]


def _read_idx(path: Path, *, ndim: int) -> Array:
    """Read one IDX file of uint8 (format: yann.lecun.com/exdb/mnist), gzipped or not."""
    with readable(path), contextlib.ExitStack() as stack:
        file = stack.enter_context(open_regular(path))
        stream = stack.enter_context(gzip.open(file)) if file.peek(2)[:2] == b"\x1f\x8b" else file
        # Magic number: two zero bytes, 8 for uint8, the number of dimensions; then big-endian sizes.
        if stream.read(4) != bytes([0, 0, 8, ndim]):
            raise ValueError(f"not an IDX file of {ndim}-dimensional uint8")
        shape = tuple(np.frombuffer(stream.read(4 * ndim), ">u4").tolist())
        size = math.prod(shape)
        _check_fits(size)
        # One byte more than expected: reaches the end, where gzip checks its content.
        values = np.frombuffer(stream.read(size + 1), np.uint8)
        if len(values) != size:
            found = f"{len(values)}" if len(values) < size else f"more than {size}"
            raise ValueError(f"it has {found} bytes of data but its header says {size}")
        return values.reshape(shape)


def _check_fits(size: int) -> None:
    if size > usable_memory():
        raise ValueError(
            f"its arrays need {describe_bytes(size)} of memory, and this process may use "
            f"{describe_bytes(usable_memory())}"
        )


def read_npz(path: Path) -> dict[str, Array]:
    """Read the four arrays of a Keras-layout file; never unpickles."""
    with readable(path), open_regular(path) as stream:
        if not zipfile.is_zipfile(stream):
            # NumPy would treat any unknown file as a pickle.
            raise ValueError("it is not an .npz archive, or its end is missing; write it with numpy.savez")
        stream.seek(0)
        with np.load(stream, allow_pickle=False) as content:
            missing = [name for name in ARRAY_NAMES if name not in content]
            if missing:
                raise ValueError(f"it has no {', '.join(missing)}")
            # Sizes from the archive's directory, before anything is unpacked.
            members = [info for info in content.zip.infolist() if info.filename.removesuffix(".npy") in ARRAY_NAMES]
            _check_fits(sum(info.file_size for info in members))
            arrays = {name: content[name] for name in ARRAY_NAMES}
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray):  # NumPy returns what it cannot read as bytes
                raise ValueError(f"{name} is not an array; write the file with numpy.savez")
        return arrays


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn any error of reading `path` into one line that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"data.path={path}: cannot be read: {describe_os_error(error)}") from error
    except Exception as error:  # NumPy, zipfile and the decompressors each raise their own errors for bad bytes
        if "allow_pickle" in str(error) or "pickled" in str(error):
            reason = "it holds pickled objects, which are never loaded; save plain arrays with numpy.savez"
        else:
            reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"data.path={path}: not a usable data file: {reason}") from error
