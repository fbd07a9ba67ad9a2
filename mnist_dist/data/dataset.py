"""The form in which every source returns its images."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mnist_dist.base.array import Array

ARRAY_NAMES = ("x_train", "y_train", "x_test", "y_test")
"""The arrays of a data set, named as in a Keras-layout file."""


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

    @classmethod
    def from_arrays(cls, name: str, arrays: Mapping[str, Array]) -> "ImageDataset":
        """The data set of `ARRAY_NAMES`; other entries of `arrays` are ignored."""
        digests = array_digests(arrays)
        text = "".join(f"{key}:{arrays[key].dtype}:{arrays[key].shape}:{digests[key]}\n" for key in ARRAY_NAMES)
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        return cls(name=name, sha256=sha256, **{key: arrays[key] for key in ARRAY_NAMES})


def array_digests(arrays: Mapping[str, Array]) -> dict[str, str]:
    """SHA-256 of each array's raw bytes in C order."""
    return {key: hashlib.sha256(np.ascontiguousarray(arrays[key]).data).hexdigest() for key in ARRAY_NAMES}
