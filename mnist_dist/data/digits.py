"""The embedded, MNIST-like data set: real handwritten digits, multiplied by deformation.

The originals are scikit-learn's bundled copy of the UCI "optdigits" test set (Alpaydin & Kaynak 1998): 1,797
images of 8x8 pixels, each pixel the number (0 to 16) of ink pixels in a 4x4 block of a binary 32x32 scan. They
are enlarged to pen strokes and deformed into 60,000 + 10,000 images in MNIST's layout: white ink on black, about
20 pixels tall, centre of mass in the middle of 28x28.

What is known about the writers: UCI says that 13 people wrote these images. Who wrote which is not recorded, but
the labels show the order: the text of one preprinted form (``012345678901...``, about 128 digits) repeats 14
times, so each repetition is one person's form, and a run of whole forms is a block of writers. The test originals
are two whole forms. What is assumed: that nobody filled one form inside that block and one outside (14 forms, 13
writers: somebody filled two). These two forms were picked, not drawn: a network trained on the others finds them
about as hard as MNIST's test set (98% right); it gets 93% of the last two forms right, whose hands are more unusual.

Determinism: bit-identical on every machine with IEEE 754 doubles and with every NumPy release. Random numbers are raw
PCG64 output, which NumPy guarantees to keep, scaled by a power of two. All else is elementwise ``+ - * /``,
comparison, rounding and integer sums, each of which has one right result; there is no matrix product, float reduction
or transcendental function, whose last bit depends on the BLAS, vector width or C library.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

DIGITS_VERSION = 1
"""Incremented whenever the images change; part of the cache file's name."""

DIGITS_SHA256: dict[str, str] = {
    "x_train": "234464e535667500a2b188604d77e9593e33f77d876025489aa39a92cc3d7cee",
    "y_train": "7558ed859c8c814094468c503db160a3d98c9b4817797110e4c3a76bc2840572",
    "x_test": "e40eba4af89ab2db495f8e78f60f97b6d5c9bc593bf303a7445e764cf7a0d1a6",
    "y_test": "2991209cad49a931286f29b96052342d189eaf6d9a66e64d0aac5fcf8179a67e",
}
"""SHA-256 of each array's raw C-order bytes (all uint8, so there is no byte order)."""

SPLITS = ("train", "test")
NUM_IMAGES = (60_000, 10_000)
SIDE = 28  # pixels per side of a finished image, as in MNIST
TEST_ORIGINALS = (1157, 1415)  # first and end: two whole forms (see above)

# The largest deformations; each image draws its own, uniformly within plus or minus these.
MAX_HALF_ANGLE_TAN = 0.10  # rotation, as tan(angle / 2): 11.4 degrees
MAX_SHEAR = 0.15  # slant, pixels sideways per pixel of height
MAX_ZOOM = 0.06
MAX_ASPECT = 0.08
MAX_THICKENING = 0.12  # shift of the ink threshold (ink is 0 to 1)
# Elastic deformation, in pixels at the spline's knots. Most images get little more than the first; a few get up to the
# sum of both and are hard to read: such a tail keeps good models below 100% on MNIST too.
ELASTIC_BASE = 1.2
ELASTIC_TAIL = 6.0
KNOT_SPACING = 7  # pixels; smooths the field about as much as Simard's sigma of 4
EDGE_LEVEL = 0.54  # ink threshold: a little inside the reconstructed edge, for strokes about as wide as MNIST's
EDGE_GAIN = 2.8  # slope of that threshold: strokes fade out over about one pixel

_BLOCK = 4  # scan pixels per side of an original's pixel
_SCALE = 1.64  # scan pixels per output pixel: 32 scan rows become 19.5
_KNOTS = SIDE // KNOT_SPACING + 3
_NUM_DRAWS = 6 + 2 * _KNOTS * _KNOTS
_SEED = 1998
_CHUNK = 125  # images made at once: few enough for the CPU's cache. Part of the seed: changing it changes the images

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]


def generate_digits(on_progress: Callable[[int, int], None] | None = None) -> dict[str, Bytes]:
    """Make the whole data set.

    Args:
        on_progress: Called with (images made, images in all) after every chunk.

    Returns:
        What ``keras.datasets.mnist`` holds, in shuffled order: ``x_train`` (60000, 28, 28), ``y_train`` (60000,),
        ``x_test`` (10000, 28, 28), ``y_test`` (10000,), all uint8; pixels 0 (paper) to 255 (ink), labels 0 to 9.
    """
    counts, labels = _load_originals()
    levels = np.concatenate([enlarge(counts[i : i + _CHUNK]) for i in range(0, len(counts), _CHUNK)])
    centres = _centre_of_mass(np.rint(1000.0 * np.clip(levels, 0.0, 1.0)).astype(np.int64))
    arrays: dict[str, Bytes] = {}
    num_done = 0
    for stream, split in enumerate(SPLITS):
        sources = sources_of_images(split)
        images = np.empty((len(sources), SIDE, SIDE), np.uint8)
        for start in range(0, len(sources), _CHUNK):
            chunk = sources[start : start + _CHUNK]
            draws = _uniforms((len(chunk), _NUM_DRAWS), key=[_SEED, stream, 1, start])
            images[start : start + len(chunk)] = _centre(deform(levels[chunk], centres=centres[chunk], draws=draws))
            num_done += len(chunk)
            if on_progress is not None:
                on_progress(num_done, sum(NUM_IMAGES))
        arrays[f"x_{split}"] = images
        arrays[f"y_{split}"] = labels[sources]
    return arrays


def split_originals() -> tuple[Ints, Ints]:
    """Indices into scikit-learn's ``load_digits()`` of the (train, test) originals; they share no form."""
    first, last = TEST_ORIGINALS
    everything = np.arange(len(_load_originals()[1]))
    return np.delete(everything, slice(first, last)), everything[first:last]


def sources_of_images(split: str) -> Ints:
    """Index of the original behind each image of ``split`` ("train" or "test"), in the order of the images.

    Every original of the split is used equally often, give or take one.
    """
    stream = SPLITS.index(split)
    originals = split_originals()[stream]
    sources = originals[np.arange(NUM_IMAGES[stream]) % len(originals)]
    keys = _uniforms((len(sources),), key=[_SEED, stream, 0])
    return sources[np.argsort(keys, kind="stable")]


def enlarge(counts: Floats) -> Floats:
    """Reconstruct smooth pen strokes at scan resolution from block counts.

    Interpolation alone leaves strokes as blurred as the 8x8 pixels. Iterative back-projection (Irani & Peleg 1991,
    "Improving resolution by image registration") looks for a smooth image whose thresholded ink, counted in 4x4
    blocks again, gives the original counts.

    Args:
        counts: (n, 8, 8), ink pixels per block, 0 to 16.

    Returns:
        (n, 40, 40) ink levels, with one empty block on each side; a stroke's edge is at 0.5.
    """
    coverage = np.pad(counts / (_BLOCK * _BLOCK), ((0, 0), (1, 1), (1, 1)))
    levels = _spread(coverage)
    for _ in range(15):
        ink = np.clip(0.5 + 1.5 * (levels - 0.5), 0.0, 1.0)
        covered = np.zeros_like(coverage)
        for row, column in np.ndindex(_BLOCK, _BLOCK):  # not .mean(), which may sum in any order
            covered += ink[:, row::_BLOCK, column::_BLOCK]
        levels = np.clip(levels + _spread(coverage - covered / (_BLOCK * _BLOCK)), -1.0, 2.0)
    return levels


def deform(levels: Floats, *, centres: Floats, draws: Floats) -> Bytes:
    """Draw each original once, under its own affine and elastic deformation.

    The elastic part follows Simard, Steinkraus & Platt 2003 ("Best practices for convolutional neural networks
    applied to visual document analysis"): a smooth random displacement of the pixels, here a uniform cubic B-spline
    with random coefficients instead of Gaussian-filtered noise.

    Args:
        levels: (n, 40, 40) ink levels from ``enlarge``.
        centres: (n, 2), the (row, column) of ``levels`` that lands in the middle.
        draws: (n, 6 + 2 * 7 * 7), uniform in [-1, 1): half-angle, slant, zoom, aspect, thickness, elastic strength,
            then the spline's coefficients.

    Returns:
        (n, 28, 28) images, 0 to 255.
    """
    half, slant, zoom, aspect, thick, strength = (draws[:, i, None, None] for i in range(6))
    square = strength * strength
    fourth = square * square
    amplitude = ELASTIC_BASE + ELASTIC_TAIL * (fourth * fourth)  # the eighth power: most of it near 0
    offsets = _bspline_field(draws[:, 6:].reshape(-1, 2, _KNOTS, _KNOTS) * amplitude[:, None])
    grid = np.arange(SIDE) - (SIDE - 1) / 2
    y = grid[:, None] + offsets[:, 0]
    x = grid + offsets[:, 1] + (MAX_SHEAR * slant) * y

    tan = MAX_HALF_ANGLE_TAN * half  # gives sine and cosine without calling either
    cos, sin = (1.0 - tan * tan) / (1.0 + tan * tan), 2.0 * tan / (1.0 + tan * tan)
    scale, widen = _SCALE * (1.0 + MAX_ZOOM * zoom), MAX_ASPECT * aspect
    rows = scale * (1.0 - widen) * (sin * x + cos * y) + centres[:, 0, None, None]
    columns = scale * (1.0 + widen) * (cos * x - sin * y) + centres[:, 1, None, None]

    level = _sample(levels, rows=rows, columns=columns)
    ink = 0.5 + EDGE_GAIN * (level - (EDGE_LEVEL + MAX_THICKENING * thick))
    images: Bytes = np.rint(255.0 * np.clip(ink, 0.0, 1.0)).astype(np.uint8)
    return images


def _load_originals() -> tuple[Floats, Bytes]:
    from sklearn.datasets import load_digits  # scikit-learn takes a second to import

    bunch = load_digits()
    return bunch.images.astype(np.float64), bunch.target.astype(np.uint8)


def _uniforms(shape: tuple[int, ...], *, key: list[int]) -> Floats:
    """Uniform numbers in [-1, 1), exact in float64, from a stream of their own per key."""
    bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(int(np.prod(shape)))
    return ((bits >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0).reshape(shape)


def _spread(blocks: Floats) -> Floats:
    """Enlarge (n, h, w) blocks four times, smoothed by a binomial filter of 9 pixels a side."""
    fine = blocks.repeat(_BLOCK, axis=1).repeat(_BLOCK, axis=2)
    for _ in range(4):
        padded = np.pad(fine, ((0, 0), (1, 1), (0, 0)), mode="edge")
        fine = (padded[:, :-2] + padded[:, 2:]) * 0.25 + padded[:, 1:-1] * 0.5
        padded = np.pad(fine, ((0, 0), (0, 0), (1, 1)), mode="edge")
        fine = (padded[..., :-2] + padded[..., 2:]) * 0.25 + padded[..., 1:-1] * 0.5
    return fine


def _bspline_field(knots: Floats) -> Floats:
    """Evaluate uniform cubic B-splines, (..., 7, 7) coefficients, at each pixel, (..., 28, 28)."""
    position = (np.arange(SIDE) + 0.5) / KNOT_SPACING
    first = position.astype(np.int64)
    t = position - first
    s = 1.0 - t
    weights = (s * s * s / 6.0, *((a * a * (a * 3.0 - 6.0) + 4.0) / 6.0 for a in (t, s)), t * t * t / 6.0)
    rows = np.zeros((*knots.shape[:-2], SIDE, _KNOTS))
    for tap, weight in enumerate(weights):
        rows += weight[:, None] * knots[..., first + tap, :]
    field = np.zeros((*knots.shape[:-2], SIDE, SIDE))
    for tap, weight in enumerate(weights):
        field += weight * rows[..., first + tap]
    return field


def _sample(levels: Floats, *, rows: Floats, columns: Floats) -> Floats:
    """Bilinear samples of each (h, w) image at its own (28, 28) points; edges extend outwards."""
    num, height, width = levels.shape
    rows = np.clip(rows, 0.0, height - 1.001)
    columns = np.clip(columns, 0.0, width - 1.001)
    row, column = rows.astype(np.int64), columns.astype(np.int64)
    down, right = rows - row, columns - column
    corner = (np.arange(num)[:, None, None] * height + row) * width + column
    flat = levels.ravel()
    upper = _mix(flat.take(corner), flat.take(corner + 1), right)
    lower = _mix(flat.take(corner + width), flat.take(corner + width + 1), right)
    return _mix(upper, lower, down)


def _mix(first: Floats, second: Floats, share: Floats) -> Floats:
    return first + share * (second - first)


def _centre_of_mass(ink: Ints | Bytes) -> Floats:
    """Centre of mass (row, column) of each (h, h) image, (n, 2); sums of integers are the same in any order."""
    index = np.arange(ink.shape[1])
    moments = np.stack([(ink.sum(axis, dtype=np.int64) * index).sum(1) for axis in (2, 1)], axis=1)
    centres: Floats = moments / np.maximum(ink.sum((1, 2), dtype=np.int64), 1)[:, None]
    return centres


def _centre(images: Bytes) -> Bytes:
    """Shift each image by whole pixels to put its centre of mass at (14, 14), as MNIST does."""
    margin = 8
    shifts = np.floor(_centre_of_mass(images) + 0.5).astype(np.int64) - SIDE // 2
    window = np.arange(SIDE) + margin + np.clip(shifts, -margin, margin)[..., None]
    padded = np.pad(images, ((0, 0), (margin, margin), (margin, margin)))
    centred: Bytes = padded[np.arange(len(images))[:, None, None], window[:, 0, :, None], window[:, 1, None]]
    return centred
