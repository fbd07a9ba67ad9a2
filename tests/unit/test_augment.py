"""Changes of training images, against the same in plain NumPy and SciPy."""

import itertools
from dataclasses import replace
from unittest.mock import Mock, patch

import numpy as np
import pytest
import scipy.ndimage
import tensorflow as tf

from mnist_dist.base.errors import UserError
from mnist_dist.config.augment import ShiftConfig
from mnist_dist.config.compose import compose_config
from mnist_dist.data.splits import Split, Splits
from mnist_dist.engine.augment import Shift, create_augmentation
from mnist_dist.engine.build import Programs, assemble
from mnist_dist.engine.layers.position import BatchPosition, stream_key, uniform
from mnist_dist.launch.topology import Topology
from mnist_dist.strategy.base import SingleDevice

SHIFT = "augment=shift"
AFFINE = "augment=affine"
BOTH = pytest.mark.parametrize("choice", [SHIFT, AFFINE])
SHAPES = pytest.mark.parametrize("image_shape", [(28, 28), (8, 11), (7, 5, 3)], ids=str)


def position(step: int, row: int) -> BatchPosition:
    return BatchPosition(tf.constant(row, tf.int64), tf.constant(step, tf.int64))


def make_images(num_rows: int, image_shape=(28, 28)) -> np.ndarray:
    """(rows, values), as they are stored; no pixel is 0, so zeros are from outside."""
    return np.random.default_rng(0).uniform(0.1, 1, (num_rows, np.prod(image_shape))).astype(np.float32)


def change(images, *overrides, image_shape=(28, 28), seed=0, step=3, row=0, dtype=tf.float32) -> np.ndarray:
    augmentation = create_augmentation(compose_config(*overrides).augment, image_shape, seed=seed)
    changed = augmentation(tf.cast(images, dtype), position(step, row))
    assert (changed.dtype, changed.shape) == (dtype, images.shape)
    return changed.numpy()


def moved(image: np.ndarray, right: int, down: int) -> np.ndarray:
    """The image with zeros around it, cut out elsewhere."""
    height, width = image.shape[:2]
    padded = np.pad(image, [(height, height), (width, width), *[(0, 0)] * (image.ndim - 2)])
    return padded[height - down :, width - right :][:height, :width]


@pytest.mark.parametrize(
    ("image_shape", "max_pixels", "dtype"),
    [
        ((28, 28), 2, tf.float32),
        ((8, 11), 7, tf.float32),
        ((7, 5, 3), 4, tf.float32),
        ((8, 8), 1, tf.bfloat16),
        ((8, 8), 1, tf.float16),
        ((8, 8), 1, tf.float64),
    ],
)
def test_a_shifted_image_is_one_of_those_that_slicing_gives(image_shape, max_pixels, dtype):
    images = make_images(200, image_shape)
    changed = change(images, SHIFT, f"augment.max_pixels={max_pixels}", image_shape=image_shape, dtype=dtype)
    offsets = range(-max_pixels, max_pixels + 1)
    used = set()
    for image, found in zip(tf.cast(images, dtype).numpy(), changed, strict=True):
        moves = [
            move
            for move in itertools.product(offsets, offsets)
            if np.array_equal(moved(image.reshape(image_shape), *move).ravel(), found)
        ]
        assert len(moves) == 1
        used.add(moves[0])
    assert {right for right, _ in used} == {down for _, down in used} == set(offsets)


def test_all_shifts_are_equally_likely():
    """A pixel in the middle shows how an image was moved."""
    num_rows, max_pixels = 20_000, 2
    images = np.zeros((num_rows, 25), np.float32)
    images[:, 12] = 1
    places = change(images, SHIFT, image_shape=(5, 5)).argmax(axis=1)
    counts = np.bincount(places, minlength=25)
    expected = num_rows / (2 * max_pixels + 1) ** 2
    assert ((counts - expected) ** 2 / expected).sum() < 60  # chi-squared of 24 degrees: p = 6e-5


def test_the_largest_random_number_gives_the_largest_shift():
    """However the product is rounded."""
    for max_pixels in (*range(1, 64), 1000):
        shift = Shift(ShiftConfig("shift", max_pixels), (1001, 1001), seed=0)
        with patch.object(shift, "_at") as at:
            shift._read(Mock(), tf.constant([[0.0, 1 - 2**-24]]))
        _, x, y = at.call_args.args
        assert (x.numpy()[0, 0], y.numpy()[0, 0]) == (max_pixels, -max_pixels)


def affine_by_scipy(images, image_shape, random, *, degrees, scale, pixels) -> np.ndarray:
    """`scipy.ndimage` reads each pixel (row, column) of the result at matrix @ (row, column) + offset."""
    height, width = image_shape[:2]
    centre = np.array([height - 1, width - 1]) / 2
    results = []
    for image, (turn, size, right, down) in zip(images, 2.0 * random - 1, strict=True):
        angle = np.radians(turn * degrees)
        turned = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])  # (down, right)
        matrix = np.linalg.inv((1 + scale) ** size * turned)
        offset = centre - matrix @ (centre + np.array([down, right]) * pixels)
        channels = np.moveaxis(np.pad(image.reshape(*image_shape[:2], -1), [(1, 1), (1, 1), (0, 0)]), -1, 0)
        results.append(
            np.stack(
                [
                    scipy.ndimage.affine_transform(channel, matrix, offset + 1, (height, width), order=1)
                    for channel in channels
                ],
                axis=-1,
            ).ravel()
        )
    return np.stack(results)


@SHAPES
@pytest.mark.parametrize(
    "amounts", [(10, 0.1, 2), (180, 0, 0), (0, 1.5, 0), (0, 0, 3.5), (90, 0.5, 4)], ids=lambda amounts: str(amounts)
)
def test_an_affine_change_is_that_of_scipy(image_shape, amounts):
    images = make_images(50, image_shape).astype(np.float64)
    keys = [
        f"augment.max_{name}={amount}" for name, amount in zip(("degrees", "scale", "pixels"), amounts, strict=True)
    ]
    changed = change(images, AFFINE, *keys, image_shape=image_shape, seed=2, dtype=tf.float64)
    random = uniform(stream_key(2, 0), position(3, 0), num_rows=50, num_values=4).numpy()
    degrees, scale, pixels = amounts
    expected = affine_by_scipy(images, image_shape, random, degrees=degrees, scale=scale, pixels=pixels)
    np.testing.assert_allclose(changed, expected, atol=3e-5)
    assert np.abs(changed - images).max() > 0.1


@pytest.mark.parametrize(("dtype", "bits"), [(tf.bfloat16, 8), (tf.float16, 11)])
def test_an_affine_change_of_images_of_16_bits_is_rounded_once(dtype, bits):
    images = tf.cast(make_images(50), dtype)
    expected = change(tf.cast(images, tf.float32), AFFINE)
    np.testing.assert_allclose(change(images, AFFINE, dtype=dtype).astype(np.float32), expected, rtol=2.0**-bits)


@BOTH
@pytest.mark.parametrize("num_parts", [2, 4, 8])
def test_rows_do_not_depend_on_who_computes_them(choice, num_parts):
    images, size = make_images(64), 64 // num_parts
    whole = change(images, choice)
    parts = [change(images[row : row + size], choice, row=row) for row in range(0, 64, size)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@BOTH
def test_rows_of_any_part_are_those_of_the_whole(choice):
    """A sine may differ in its last bit with the row's place in a vector of the processor."""
    images = make_images(512)
    whole = change(images, choice)
    for row, size in [(0, 171), (171, 171), (342, 170), (511, 1)]:
        part = change(images[row : row + size], choice, row=row)
        np.testing.assert_allclose(part, whole[row : row + size], atol=0 if choice == SHIFT else 1e-5)


@BOTH
def test_seeds_steps_and_rows_give_different_changes(choice):
    images = np.tile(make_images(1), (64, 1))
    base = change(images, choice)
    assert len(np.unique(base, axis=0)) > 20  # shift: of 25
    for other in ({"seed": 1}, {"step": 4}, {"row": 64}, {"row": 1}):
        same = (change(images, choice, **other) == base).all(axis=1)
        assert same.mean() < 0.3  # 1/25 by chance


@BOTH
def test_amounts_of_zero_change_nothing(choice):
    keys = ["augment.max_pixels=0", *(["augment.max_degrees=0", "augment.max_scale=0"] if choice == AFFINE else [])]
    images = make_images(64)
    np.testing.assert_array_equal(change(images, choice, *keys), images)


@BOTH
def test_inside_a_program_of_xla_it_is_the_same(choice):
    images = make_images(64)
    augmentation = create_augmentation(compose_config(choice).augment, (28, 28), seed=0)
    whole = tf.function(augmentation, jit_compile=True)(images, position(3, 0))
    np.testing.assert_allclose(whole, change(images, choice), atol=0 if choice == SHIFT else 1e-5)


@BOTH
def test_training_changes_its_images_and_validation_does_not(choice):
    found = []
    for augment in ("augment=none", choice):
        config = replace(compose_config(augment, "precision=float32"), reproducibility="exact", compile="none")
        labels = np.eye(10, dtype=np.float32)[np.arange(64) % 10]
        splits = Splits(*[Split(make_images(64), labels)] * 3, image_shape=(28, 28), class_names=tuple("0123456789"))
        engine = assemble(config, SingleDevice(), splits, topology=Topology())
        programs = Programs(engine)
        before = programs.validate()
        trained = programs.train_epoch(engine.plan.in_order(), learning_rates=np.full(1, 0.001))
        after = {sums.loss for sums in engine.evaluate()[0].values()}
        found.append((before.loss, *trained.losses, len(after)))
    (before, loss, _), (same_before, other_loss, num_results) = found
    assert (same_before, num_results) == (before, 1)  # the three splits are the same
    assert other_loss != loss


def test_none_is_none():
    assert create_augmentation(compose_config("augment=none").augment, (28, 28), seed=0) is None


@BOTH
def test_images_must_stay_in_view(choice):
    config = compose_config(choice, "augment.max_pixels=5").augment
    create_augmentation(config, (6, 6, 1), seed=0)
    reason = "augment.max_pixels=5(.0)?: must be less than the sides of the images, which have 28x5 pixels"
    with pytest.raises(UserError, match=reason):
        create_augmentation(config, (28, 5), seed=0)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([SHIFT, "augment.max_pixels=-1"], "augment.max_pixels=-1: must be from 0 to"),
        ([AFFINE, "augment.max_degrees=181"], "augment.max_degrees=181.0: must be from 0 to 180"),
        ([AFFINE, "augment.max_scale=nan"], "augment.max_scale=nan: must be from 0 to 9"),
        ([AFFINE, "augment.name=none"], "augment.name=none: is set by augment=...; leave it alone"),
    ],
)
def test_values_out_of_range_are_refused(overrides, line):
    with pytest.raises(UserError, match=line):
        compose_config(*overrides)
