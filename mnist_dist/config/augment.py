"""Keys of `augment`: how training images are changed at random; those of validation and test never are."""

from collections.abc import Sequence
from dataclasses import dataclass

from mnist_dist.config.rules import MAX_INT32, Checked, between, check, one_of

_SET_BY_CHOICE = "is set by augment=...; leave it alone"
_MAX_SCALE = 9


@dataclass
class AugmentConfig(Checked):
    """No change; the choices below add their own keys."""

    section = "augment."

    name: str = one_of("none", words=_SET_BY_CHOICE)

    def check_image_shape(self, image_shape: Sequence[int]) -> None:
        """Raise UserError if images of this shape (height, width, ...) could be moved out of view."""

    def describe(self) -> str:
        """In words, for the log; empty if nothing is changed."""
        return ""


@dataclass
class ShiftConfig(AugmentConfig):
    """Move each image by whole pixels: no value is changed."""

    name: str = one_of("shift", words=_SET_BY_CHOICE)
    max_pixels: int = between(0, MAX_INT32)
    """How many pixels each image is moved at most in each direction, less than its sides; with shift whole ones."""

    def check_image_shape(self, image_shape: Sequence[int]) -> None:
        """As the base class says."""
        _check_pixels(self.max_pixels, image_shape)

    def describe(self) -> str:
        """As the base class says."""
        return f"moved by up to {self.max_pixels} pixels"


@dataclass
class AffineConfig(AugmentConfig):
    """Turn, scale and move each image, with bilinear interpolation."""

    name: str = one_of("affine", words=_SET_BY_CHOICE)
    max_degrees: float = between(0, 180)
    """affine: each image is turned about its centre by up to this angle, either way."""
    max_scale: float = between(0, _MAX_SCALE)
    """affine: the sides are multiplied by a factor from 1 / (1 + this) to 1 + this, the same for both."""
    max_pixels: float = between(0, MAX_INT32)
    """affine: how many pixels each image is then moved at most in each direction, less than its sides."""

    def check_image_shape(self, image_shape: Sequence[int]) -> None:
        """As the base class says."""
        _check_pixels(self.max_pixels, image_shape)

    def describe(self) -> str:
        """As the base class says."""
        return (
            f"turned by up to {self.max_degrees:g} degrees, scaled by up to {1 + self.max_scale:g}, "
            f"moved by up to {self.max_pixels:g} pixels"
        )


def _check_pixels(max_pixels: float, image_shape: Sequence[int]) -> None:
    height, width = image_shape[:2]
    words = f"must be less than the sides of the images, which have {height}x{width} pixels"
    check(max_pixels < min(height, width), "augment.max_pixels", max_pixels, words)
