"""Data sets that train fast. Without TensorFlow, so that scripts can use it as well."""

from pathlib import Path

import numpy as np


def create_small_arrays() -> dict[str, np.ndarray]:
    """600 training and 120 test images of 8x8 pixels in 4 classes: each class lights its own quarter of the image."""
    generator = np.random.default_rng(0)
    arrays = {}
    for part, num_images in (("train", 600), ("test", 120)):
        labels = generator.permutation(np.arange(num_images) % 4).astype(np.uint8)
        images = generator.integers(0, 120, (num_images, 8, 8))
        quarters = images.reshape(num_images, 2, 4, 2, 4)  # a view: (image, upper or lower, row, left or right, column)
        quarters[np.arange(num_images), labels // 2, :, labels % 2, :] += 60
        arrays |= {f"x_{part}": images.astype(np.uint8), f"y_{part}": labels}
    return arrays


def write_part(mnist_path: Path, folder: Path, *, num_train: int, num_test: int) -> tuple[str, str]:
    """Write the first images of MNIST; returns the words of the command line that train on them."""
    path = folder / "mnist.npz"
    with np.load(mnist_path) as arrays:
        np.savez(path, **{name: array[: num_train if "train" in name else num_test] for name, array in arrays.items()})
    return "data=npz", f"data.path={path}"
