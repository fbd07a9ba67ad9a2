"""The recipe's preprocessing: one-hot labels, the train/validation split, pixels to 0..1."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from mnist_dist.base.array import Array
from mnist_dist.base.errors import UserError
from mnist_dist.data.dataset import ImageDataset

SplitName = Literal["train", "val", "test"]
SPLIT_NAMES: tuple[SplitName, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """Examples ready for the network."""

    images: npt.NDArray[np.float32]
    """Shape (n, pixels), in 0..1."""
    labels: npt.NDArray[np.float32]
    """Shape (n, num_classes), one-hot."""

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Splits:
    """All that training and evaluation read."""

    train: Split
    val: Split
    test: Split
    image_shape: tuple[int, ...]
    """(height, width) or (height, width, channels) before flattening."""
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes, which is the width of the labels."""
        return len(self.class_names)

    def describe(self) -> str:
        """Sizes in words, for the log."""
        return (
            f"{len(self.train)} training / {len(self.val)} validation / {len(self.test)} test images of "
            f"{'x'.join(map(str, self.image_shape))}, {self.num_classes} classes"
        )

    def __getitem__(self, name: SplitName) -> Split:
        return {"train": self.train, "val": self.val, "test": self.test}[name]


def check_val_fraction(num_images: int, val_fraction: float) -> None:
    """Raise UserError if no training image would be left (scikit-learn rounds the number for validation up)."""
    if math.ceil(val_fraction * num_images) >= num_images:
        raise UserError(
            f"data.val_fraction={val_fraction}: {num_images} training images cannot be split like this: none would be "
            "left to train on"
        )


def preprocess(dataset: ImageDataset, *, val_fraction: float, split_seed: int) -> Splits:
    """Prepare a data set exactly as the recipe does.

    The labels become one-hot by scikit-learn's OneHotEncoder, fitted on the training labels; then
    `train_test_split(test_size=val_fraction, random_state=split_seed)`; then uint8 pixels / 255.

    Raises:
        UserError: as `check_val_fraction`.
    """
    check_val_fraction(len(dataset.x_train), val_fraction)
    from sklearn.model_selection import train_test_split  # scikit-learn takes a second to import
    from sklearn.preprocessing import OneHotEncoder

    encoder = OneHotEncoder(sparse_output=False, dtype=np.float32).fit(dataset.y_train.reshape(-1, 1))
    y_train, y_test = (encoder.transform(y.reshape(-1, 1)) for y in (dataset.y_train, dataset.y_test))
    x_train, x_val, y_train, y_val = train_test_split(
        dataset.x_train, y_train, test_size=val_fraction, random_state=split_seed
    )
    return Splits(
        train=Split(_to_unit_range(x_train), y_train),
        val=Split(_to_unit_range(x_val), y_val),
        test=Split(_to_unit_range(dataset.x_test), y_test),
        image_shape=dataset.x_train.shape[1:],
        class_names=tuple(str(label) for label in encoder.categories_[0]),
    )


def _to_unit_range(images: Array) -> npt.NDArray[np.float32]:
    """Flatten; uint8 pixels / 255 (floats are in 0..1 already)."""
    flat = images.reshape(len(images), -1)
    if flat.dtype == np.uint8:
        # Only the 256 possible values are divided: the result is the same, without a float64 copy of the array.
        values = (np.arange(256, dtype=np.uint8) / 255).astype(np.float32)
        return np.take(values, flat)
    return np.asarray(flat, np.float32)
