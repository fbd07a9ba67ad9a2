"""The data in the replicas' memory, and how the rows of a batch are read from it."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from mnist_dist.base.array import Array
from mnist_dist.data.splits import Split
from mnist_dist.engine.augment import Augmentation
from mnist_dist.engine.batches import PADDING, fill_up
from mnist_dist.strategy.base import Strategy


class DeviceArrays(NamedTuple):
    """Images and labels of a split in a replica's memory."""

    images: tf.Tensor
    """(examples, pixels), in the type that the network computes in."""
    labels: tf.Tensor
    """(examples,) int64: class numbers."""


class PlacedSplit(NamedTuple):
    """A split in every replica's memory; the data sets of this package fit there."""

    arrays: DeviceArrays
    num_examples: int
    num_classes: int
    augmentation: Augmentation | None = None
    """How a training changes the images."""
    label_smoothing: float = 0.0
    """Of the targets that are trained on; the labels here are plain."""


def place_split(split: Split, strategy: Strategy, *, dtype: tf.DType = tf.float32) -> PlacedSplit:
    """Copy a split to every replica, with the images in the type that the network computes in."""
    images = split.images.astype(dtype.as_numpy_dtype, copy=False)
    arrays = DeviceArrays(strategy.replicate(images), strategy.replicate(split.labels.argmax(axis=1)))
    return PlacedSplit(arrays, len(split), num_classes=split.labels.shape[1])


class Rows(NamedTuple):
    """Rows of batches, as programs read them; any shape, NumPy arrays or tensors.

    64-bit indices, because a GPU computes with 32-bit ones on the host.
    """

    examples: Array | tf.Tensor
    """int64: each row's example; padding reads another one of its shard, or example 0."""
    weights: Array | tf.Tensor
    """float32: 1 for an example, 0 for padding."""


def rows_of(indices: npt.NDArray[np.int32], *, rows_per_shard: int = 1) -> Rows:
    """The rows with these example indices."""
    examples = fill_up(indices, rows_per_shard=rows_per_shard)
    return Rows(np.maximum(examples, 0).astype(np.int64), (indices != PADDING).astype(np.float32))


def gather(data: DeviceArrays, examples: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Images and labels of these examples."""
    return tf.gather(data.images, examples), tf.gather(data.labels, examples)
