"""The recipe's preprocessing, compared with plain scikit-learn calls: the same arrays, index for index."""

import numpy as np
import pytest
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import OneHotEncoder

from mnist_dist.base.errors import UserError
from mnist_dist.data.dataset import ImageDataset
from mnist_dist.data.splits import SPLIT_NAMES, preprocess


def create_dataset(arrays, **changes):
    return ImageDataset(name="npz", sha256="0", **{**arrays, **changes})


def plain_recipe(arrays, *, test_size, random_state):
    """The recipe as a scikit-learn user writes it."""
    x_train, x_test = (arrays[key].reshape(len(arrays[key]), -1) for key in ("x_train", "x_test"))
    encoder = OneHotEncoder()
    y_train = encoder.fit_transform(arrays["y_train"].reshape(-1, 1)).toarray()
    y_test = encoder.transform(arrays["y_test"].reshape(-1, 1)).toarray()
    x_train, x_val, y_train, y_val = train_test_split(x_train, y_train, test_size=test_size, random_state=random_state)
    images = {"train": x_train, "val": x_val, "test": x_test}
    labels = {"train": y_train, "val": y_val, "test": y_test}
    return {name: ((images[name] / 255).astype(np.float32), labels[name]) for name in SPLIT_NAMES}


def assert_same(splits, expected):
    for name in SPLIT_NAMES:
        images, labels = expected[name]
        assert splits[name].images.dtype == splits[name].labels.dtype == np.float32
        assert np.array_equal(splits[name].images, images)
        assert np.array_equal(splits[name].labels, labels)
        assert len(splits[name]) == len(images)


def test_real_mnist_index_for_index(mnist_path):
    with np.load(mnist_path) as content:
        arrays = dict(content)
    splits = preprocess(create_dataset(arrays), val_fraction=0.175, split_seed=0)
    assert [len(splits[name]) for name in SPLIT_NAMES] == [49_500, 10_500, 10_000]
    assert splits.train.images.shape == (49_500, 784)
    assert splits.val.labels.shape == (10_500, 10)
    assert splits.image_shape == (28, 28)
    assert splits.class_names == tuple("0123456789")
    assert_same(splits, plain_recipe(arrays, test_size=0.175, random_state=0))


@pytest.mark.parametrize(("val_fraction", "split_seed"), [(0.175, 0), (0.175, 1), (0.5, 0), (0.001, 2**32 - 1)])
def test_small_data(small_arrays, val_fraction, split_seed):
    splits = preprocess(create_dataset(small_arrays), val_fraction=val_fraction, split_seed=split_seed)
    assert_same(splits, plain_recipe(small_arrays, test_size=val_fraction, random_state=split_seed))


def test_the_split_seed_decides(small_arrays):
    splits = [preprocess(create_dataset(small_arrays), val_fraction=0.2, split_seed=seed) for seed in (0, 0, 1)]
    assert np.array_equal(splits[0].val.images, splits[1].val.images)
    assert not np.array_equal(splits[0].val.images, splits[2].val.images)


def test_floats_and_channels(small_arrays):
    colour = {key: np.repeat(small_arrays[key][..., None], 3, -1) / 255 for key in ("x_train", "x_test")}
    splits = preprocess(create_dataset(small_arrays, **colour), val_fraction=0.175, split_seed=0)
    assert splits.image_shape == (8, 8, 3)
    assert splits.train.images.dtype == np.float32
    assert np.array_equal(splits.test.images, colour["x_test"].reshape(120, 192).astype(np.float32))


def test_labels_with_gaps(small_arrays):
    labels = {key: small_arrays[key].astype(np.int64) * 7 for key in ("y_train", "y_test")}
    splits = preprocess(create_dataset(small_arrays, **labels), val_fraction=0.175, split_seed=0)
    assert splits.class_names == ("0", "7", "14", "21")
    assert splits.num_classes == 4
    assert np.array_equal(splits.test.labels.argmax(axis=1), small_arrays["y_test"])


def test_a_test_set_without_some_class(small_arrays):
    present = small_arrays["y_test"] != 2
    arrays = {key: small_arrays[key][present] for key in ("x_test", "y_test")}
    splits = preprocess(create_dataset(small_arrays, **arrays), val_fraction=0.175, split_seed=0)
    assert splits.test.labels.shape[1] == 4
    assert splits.test.labels[:, 2].sum() == 0


@pytest.mark.parametrize(("num_images", "val_fraction"), [(600, 0.9999), (1, 0.5)])
def test_a_split_without_examples_is_refused(small_arrays, num_images, val_fraction):
    arrays = {key: small_arrays[key][:num_images] for key in ("x_train", "y_train")}
    arrays["y_test"] = np.resize(arrays["y_train"], 120)
    with pytest.raises(UserError, match=rf"data\.val_fraction={val_fraction}: {num_images} training images"):
        preprocess(create_dataset(small_arrays, **arrays), val_fraction=val_fraction, split_seed=0)
