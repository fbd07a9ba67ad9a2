"""The embedded digits: MNIST's layout, the recorded bytes, and test originals by other writers."""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.datasets import load_digits

from mnist_dist.data import digits

# One process has all of them, as they share what takes long to make.
pytestmark = pytest.mark.xdist_group("digits")

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Generated:
    arrays: dict[str, Bytes]
    progress: list[tuple[int, int]]


@pytest.fixture(scope="module")
def generated() -> Generated:
    progress: list[tuple[int, int]] = []
    arrays = digits.generate_digits(lambda num_done, num_total: progress.append((num_done, num_total)))
    return Generated(arrays, progress)


def test_bytes_are_the_recorded_ones(generated: Generated) -> None:
    found = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in generated.arrays.items()}
    assert found == digits.DIGITS_SHA256


def test_layout_is_that_of_mnist(generated: Generated) -> None:
    assert {name: (array.shape, array.dtype) for name, array in generated.arrays.items()} == {
        "x_train": ((60000, 28, 28), np.dtype(np.uint8)),
        "y_train": ((60000,), np.dtype(np.uint8)),
        "x_test": ((10000, 28, 28), np.dtype(np.uint8)),
        "y_test": ((10000,), np.dtype(np.uint8)),
    }


def test_progress_rises_to_all_images(generated: Generated) -> None:
    num_done = [done for done, _ in generated.progress]
    assert len(num_done) >= 100  # a bar that moves
    assert num_done == sorted(set(num_done))
    assert {total for _, total in generated.progress} == {70000}
    assert num_done[-1] == 70000


@pytest.mark.parametrize("split", digits.SPLITS)
def test_labels_are_balanced_and_shuffled(generated: Generated, split: str) -> None:
    labels = generated.arrays[f"y_{split}"]
    assert np.all(np.abs(np.bincount(labels, minlength=10) / len(labels) - 0.1) < 0.005)
    # Neighbours come from neighbouring originals only as often as by chance.
    steps = np.diff(digits.sources_of_images(split))
    assert np.mean(np.abs(steps) <= 1) < 0.02


@pytest.mark.parametrize("split", digits.SPLITS)
def test_every_original_is_used_equally_often_under_its_own_label(generated: Generated, split: str) -> None:
    originals = digits.split_originals()[digits.SPLITS.index(split)]
    sources = digits.sources_of_images(split)
    used, times = np.unique(sources, return_counts=True)
    assert np.array_equal(used, originals)
    assert times.max() - times.min() <= 1
    assert np.array_equal(generated.arrays[f"y_{split}"], load_digits().target[sources])


def test_train_and_test_originals_are_disjoint() -> None:
    train, test = digits.split_originals()
    assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(1797))
    assert not np.isin(digits.sources_of_images("train"), test).any()


def test_test_originals_are_whole_forms() -> None:
    # Every form starts with the ten digits three times over.
    labels = load_digits().target
    start = np.tile(np.arange(10), 3)
    starts = [i for i in range(len(labels) - 30) if np.array_equal(labels[i : i + 30], start)]
    assert set(digits.TEST_ORIGINALS) <= set(starts)
    assert np.array_equal(digits.split_originals()[1], np.arange(*digits.TEST_ORIGINALS))


@pytest.mark.parametrize("split", digits.SPLITS)
def test_images_are_white_strokes_on_black(generated: Generated, split: str) -> None:
    images = generated.arrays[f"x_{split}"]
    corners = images[:, [0, 1, 2, -3, -2, -1]][:, :, [0, 1, 2, -3, -2, -1]]
    assert corners.max() == 0
    assert np.mean(images.max((1, 2)) == 255) > 0.999
    # MNIST: 13.1% mean, 19.1% nonzero pixels.
    assert images.mean() / 255 == pytest.approx(0.131, abs=0.02)
    assert np.mean(images > 0) == pytest.approx(0.191, abs=0.02)


@pytest.mark.parametrize("split", digits.SPLITS)
def test_centre_of_mass_is_in_the_middle(generated: Generated, split: str) -> None:
    images = generated.arrays[f"x_{split}"].astype(np.float64)
    index = np.arange(28)
    mass = images.sum((1, 2))
    for axis in (1, 2):
        centre = (images.sum(axis) * index).sum(1) / mass
        assert np.mean(np.abs(centre - 14) < 0.51) > 0.99
        assert np.all(np.abs(centre - 14) < 3)  # the edge cuts off the deformed ink of a few


def test_no_two_images_are_the_same(generated: Generated) -> None:
    images = np.concatenate([generated.arrays["x_train"], generated.arrays["x_test"]])
    assert len({image.tobytes() for image in images}) == len(images)


def test_images_show_their_labels(generated: Generated) -> None:
    # Nearest class mean: 82% right on MNIST, 10% if images and labels do not match.
    arrays = {name: array.astype(np.float64) for name, array in generated.arrays.items() if name.startswith("x")}
    means = np.stack([arrays["x_train"][generated.arrays["y_train"] == label].mean(0) for label in range(10)])
    distances = np.stack([((arrays["x_test"] - mean) ** 2).sum((1, 2)) for mean in means])
    assert np.mean(distances.argmin(0) == generated.arrays["y_test"]) > 0.8


def test_enlarged_strokes_keep_the_ink_of_every_block() -> None:
    counts = load_digits().images[:200].astype(np.float64)
    ink = digits.enlarge(counts) > 0.5
    found = ink.reshape(200, 10, 4, 10, 4).sum((2, 4))[:, 1:-1, 1:-1]
    assert np.abs(found - counts).mean() < 0.5  # of 16 pixels with ink; 0.75 without the back-projection


def test_draws_decide_the_image() -> None:
    levels = digits.enlarge(load_digits().images[:1].astype(np.float64)).repeat(3, axis=0)
    draws = np.zeros((3, 6 + 2 * 7 * 7))
    draws[2, 0] = 1.0  # the largest rotation
    plain, again, rotated = digits.deform(levels, centres=np.full((3, 2), 19.5), draws=draws)
    assert np.array_equal(plain, again)
    assert not np.array_equal(plain, rotated)
