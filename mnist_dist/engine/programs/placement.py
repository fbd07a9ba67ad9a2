"""The data in the replicas' memory, and how the rows of a batch are read from it."""

from typing import NamedTuple

import tensorflow as tf

from mnist_dist.data.splits import Split
from mnist_dist.engine.batches import PADDING
from mnist_dist.strategy.base import Strategy


class DeviceArrays(NamedTuple):
    """Images and labels of a split in a replica's memory."""

    images: tf.Tensor
    labels: tf.Tensor


class PlacedSplit(NamedTuple):
    """A split in every replica's memory; the data sets of this package fit there."""

    arrays: DeviceArrays
    num_examples: int
    num_classes: int


def place_split(split: Split, strategy: Strategy, *, dtype: tf.DType = tf.float32) -> PlacedSplit:
    """Copy a split to every replica, with the images in the type that the network computes in."""
    images = split.images.astype(dtype.as_numpy_dtype, copy=False)
    arrays = DeviceArrays(strategy.replicate(images), strategy.replicate(split.labels))
    return PlacedSplit(arrays, num_examples=len(split), num_classes=split.labels.shape[1])


def gather_rows(data: DeviceArrays, indices: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Images, labels and weights (1 for an example, 0 for padding) of the rows with these example indices."""
    valid = tf.maximum(indices, 0)  # padding reads example 0, with weight 0
    example_weights = tf.cast(indices != PADDING, tf.float32)
    return tf.gather(data.images, valid), tf.gather(data.labels, valid), example_weights
