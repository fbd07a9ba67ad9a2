"""Keys of `data`: which images."""

from dataclasses import dataclass

from omegaconf import MISSING

from mnist_dist.config.rules import Checked, between, check, one_of, ruled


@dataclass
class DataConfig(Checked):
    """Which images to train on, and how they are split."""

    section = "data."

    name: str = one_of("auto", "mnist", "digits", "npz", words="is set by data={}")
    path: str | None = None
    """A Keras-layout .npz file, or (mnist) a folder with the four IDX files."""
    cache_dir: str = MISSING
    """Where generated data sets are cached."""
    keras_home: str = MISSING
    """Keras' own cache: MNIST is read from `datasets/mnist.npz` below it, or downloaded to it."""
    val_fraction: float = ruled(lambda value: 0 < value < 1, "must be between 0 and 1")
    """Share of the training images held out for validation (scikit-learn's `test_size`)."""
    split_seed: int = between(0, 2**32 - 1)
    """`random_state` of that split; separate from `seed`, so that seeds can be compared on the same split."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.name != "npz" or self.path is not None,
            "data.path",
            self.path,
            "data=npz needs data.path=FILE.npz",
        )
        check(
            self.path is None or self.name in ("mnist", "npz"),
            "data.path",
            self.path,
            f"data={self.name} reads no file; give data=mnist or data=npz as well",
        )
