"""The user's own arrays: one .npz file, checked before anything is trained on it."""

from pathlib import Path

import numpy as np

from mnist_dist.base.array import Array
from mnist_dist.base.errors import UserError
from mnist_dist.base.files import expand_path
from mnist_dist.config.data import DataConfig
from mnist_dist.data.dataset import ImageDataset
from mnist_dist.data.formats import read_npz


def load_npz(config: DataConfig) -> ImageDataset:
    """Read the file at `data.path`; raises UserError unless its arrays are fit for training and testing."""
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
        raise UserError(f"data.path={path}: y_test has labels missing from y_train: {_some(unknown)}")
    if len(classes) < 2:
        raise UserError(f"data.path={path}: y_train has only the label {classes[0]}; at least two classes are needed")
    return ImageDataset.from_arrays("npz", arrays)


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
        raise UserError(f"data.path={path}: {name} has shape {labels.shape}; expected (n,), one label per image")
    if labels.dtype.kind not in "iu":
        raise UserError(f"data.path={path}: {name} is {labels.dtype}; expected whole numbers (class 0, 1, 2, ...)")
    if labels.min() < 0:
        raise UserError(f"data.path={path}: {name} has labels out of range: {_some(labels[labels < 0])}")


def _some(values: Array, most: int = 5) -> str:
    listed = np.unique(values)
    return ", ".join(map(str, listed[:most])) + (", ..." if len(listed) > most else "")
