"""Random changes of training images, by batch position: any device changes its rows as a single device would.

A changed image reads each of its pixels at some place of the original one; outside of that there are zeros. XLA
compiles this whatever `compile` is: on a CPU TensorFlow's own kernels take 5 times as long for `affine`, and a GPU
would have to start dozens of them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from mnist_dist.config.augment import AffineConfig, AugmentConfig, ShiftConfig
from mnist_dist.engine.layers.position import BatchPosition, stream_key, uniform


class Augmentation(ABC):
    """A random change of images, a function of (seed, global step, position in the global batch)."""

    num_values: int
    """Random numbers for each image."""

    def __init__(self, image_shape: Sequence[int], *, seed: int) -> None:
        """Build it for images of shape (height, width, ...)."""
        self._height, self._width = image_shape[:2]
        self._key = stream_key(seed, 0)
        y, x = np.indices(image_shape[:2]).reshape(2, 1, -1)
        self._x, self._y = x, y  # (1, pixels): the place of each pixel
        self._compiled = tf.function(self._change, autograph=False, jit_compile=True)

    def __call__(self, images: tf.Tensor, position: BatchPosition) -> tf.Tensor:
        """The images of rows at this position of the global batch, changed: (rows, values), as they are stored."""
        changed: tf.Tensor = self._compiled(images, position)
        return changed

    @abstractmethod
    def _read(self, images: tf.Tensor, random: tf.Tensor) -> tf.Tensor:
        """The changed images, both (rows, pixels, channels); `random` is (rows, num_values), from 0 to less than 1."""

    def _change(self, images: tf.Tensor, position: BatchPosition) -> tf.Tensor:
        num_rows = images.shape[0]
        random = uniform(self._key, position.counter(), num_rows=num_rows, num_values=self.num_values)
        pixels = tf.reshape(images, [num_rows, self._height * self._width, -1])
        return tf.cast(tf.reshape(self._read(pixels, random), images.shape), images.dtype)

    def _at(self, images: tf.Tensor, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        """The values at these places, (rows, pixels) int32."""
        is_inside = (x >= 0) & (x < self._width) & (y >= 0) & (y < self._height)
        values = tf.gather(images, tf.where(is_inside, y * self._width + x, 0), batch_dims=1)
        return tf.where(is_inside[..., tf.newaxis], values, tf.zeros([], images.dtype))


class Shift(Augmentation):
    """Moves each image by whole pixels, every number up to the largest with the same probability."""

    num_values = 2

    def __init__(self, config: ShiftConfig, image_shape: Sequence[int], *, seed: int) -> None:
        super().__init__(image_shape, seed=seed)
        self._max_pixels = config.max_pixels

    def _read(self, images: tf.Tensor, random: tf.Tensor) -> tf.Tensor:
        moves = tf.cast(random * (2 * self._max_pixels + 1), tf.int32) - self._max_pixels
        return self._at(images, self._x - moves[:, :1], self._y - moves[:, 1:])


class Affine(Augmentation):
    """Turns and scales each image about its centre, then moves it; angle, log of the factor and moves are uniform."""

    num_values = 4

    def __init__(self, config: AffineConfig, image_shape: Sequence[int], *, seed: int) -> None:
        super().__init__(image_shape, seed=seed)
        amounts = math.radians(config.max_degrees), math.log1p(config.max_scale), config.max_pixels, config.max_pixels
        self._max_amounts = np.array(amounts, np.float32)

    def _read(self, images: tf.Tensor, random: tf.Tensor) -> tf.Tensor:
        angle, log_scale, right, down = tf.split((2 * random - 1) * self._max_amounts, self.num_values, axis=1)
        # Back from each pixel to the place that it comes from.
        centre_x, centre_y = (self._width - 1) / 2, (self._height - 1) / 2
        x, y = np.float32(self._x - centre_x) - right, np.float32(self._y - centre_y) - down
        cos, sin = tf.cos(angle) * tf.exp(-log_scale), tf.sin(angle) * tf.exp(-log_scale)
        return self._interpolate(images, cos * x + sin * y + centre_x, cos * y - sin * x + centre_y)

    def _interpolate(self, images: tf.Tensor, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        """The values at these places, (rows, pixels) float32, bilinear between the four pixels around each."""
        left, top = tf.floor(x), tf.floor(y)
        to_right, to_bottom = (x - left)[..., tf.newaxis], (y - top)[..., tf.newaxis]
        column, row = tf.cast(left, tf.int32), tf.cast(top, tf.int32)

        def between(row: tf.Tensor) -> tf.Tensor:
            first, second = (tf.cast(self._at(images, column + step, row), tf.float32) for step in (0, 1))
            return first + to_right * (second - first)

        upper, lower = between(row), between(row + 1)
        return upper + to_bottom * (lower - upper)


def create_augmentation(config: AugmentConfig, image_shape: Sequence[int], *, seed: int) -> Augmentation | None:
    """The configured change, None for none; raises UserError if it does not suit images of this shape."""
    config.check_image_shape(image_shape)
    if isinstance(config, ShiftConfig):
        return Shift(config, image_shape, seed=seed)
    return Affine(config, image_shape, seed=seed) if isinstance(config, AffineConfig) else None
