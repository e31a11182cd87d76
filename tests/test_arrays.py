"""Somebody's own arrays as a data set: what is taken, what becomes of it, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from cifar10_trainer import datasets, machine
from cifar10_trainer.datasets import arrays
from cifar10_trainer.datasets.arrays import as_dataset, from_arrays
from cifar10_trainer.errors import ConfigError, RunError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 8, 10, 3), np.uint8)
LABELS = np.array([0, 1, 2, 2, 1, 0])
ONE_HOT = np.eye(3, dtype=np.float32)[LABELS]


def test_arrays_are_taken_as_they_are():
    data = from_arrays((IMAGES, LABELS), validation=(IMAGES[:2], LABELS[:2]), test=(IMAGES[2:], LABELS[2:]))
    assert np.shares_memory(data.train_images, IMAGES)
    np.testing.assert_array_equal(data.train_labels, LABELS)
    np.testing.assert_array_equal(data.test_images, IMAGES[2:])
    np.testing.assert_array_equal(data.validation[1], LABELS[:2])
    assert (data.name, data.source, data.class_names) == ("arrays", "arrays in memory", ("0", "1", "2"))
    assert data.train_labels.dtype == np.int64 and data.input_shape == (8, 10, 3)


DATA = from_arrays((IMAGES, LABELS), validation=(IMAGES[:2], LABELS[:2]), test=(IMAGES[2:], LABELS[2:]))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"train_images": IMAGES.astype(np.float32) / 255},
            "train images has dtype float32 and values from 0 to 1; allowed: uint8",
        ),
        ({"test_images": IMAGES[2:, ..., :1]}, "the Dataset has test images (4, 8, 10, 1)"),
        ({"validation": (IMAGES[:2, :5], LABELS[:2])}, "the Dataset has validation images (2, 5, 10, 3)"),
        ({"train_labels": LABELS[:5]}, "train labels has shape (5,); allowed: (6,)"),
        ({"train_labels": ONE_HOT}, "train labels float32 (6, 3); allowed: ('n', 8, 10, 3) and int64 ('n',)"),
        (
            {"train_images": IMAGES[:0], "train_labels": LABELS[:0]},
            "the Dataset has no training images; allowed: one or more",
        ),
        ({"class_names": ("a", "b")}, "train labels go up to 2, but the Dataset names 2 classes"),
    ],
)
def test_a_dataset_of_somebodys_own_is_checked_as_arrays_are(changes, text):
    assert as_dataset(DATA) is DATA
    with pytest.raises(ConfigError) as error:
        as_dataset(dataclasses.replace(DATA, **changes))
    assert text in str(error.value) and "\n" not in str(error.value)


def test_labels_that_are_numbers_of_something_else_are_refused_at_once():
    with pytest.raises(ConfigError, match="labels go up to 2000000000, but there are only 6 training images"):
        from_arrays((IMAGES, np.array([0, 1, 2, 2, 1, 2_000_000_000])))


def test_without_validation_and_test_there_is_none():
    data = from_arrays((IMAGES, LABELS), class_names=["cat", "dog", "owl"])
    assert (
        data.validation is None and data.test_images.shape == (0, 8, 10, 3) and data.test_labels.shape == (0,)
    )
    assert data.class_names == ("cat", "dog", "owl")


@pytest.mark.parametrize(
    "labels", [ONE_HOT, ONE_HOT.astype(bool), LABELS[:, None], LABELS.astype(np.uint8), list(LABELS)]
)
def test_labels_are_integers_or_one_hot(labels):
    np.testing.assert_array_equal(from_arrays((IMAGES, labels)).train_labels, LABELS)


@pytest.mark.parametrize("grey", [IMAGES[..., 0], IMAGES[..., :1]])
def test_grey_images_get_three_equal_channels(grey):
    images = from_arrays((grey, LABELS)).train_images
    assert images.shape == IMAGES.shape
    for channel in range(3):
        np.testing.assert_array_equal(images[..., channel], IMAGES[..., 0])


@pytest.mark.parametrize("batch", [None, 4, 6])
def test_a_finite_tf_data_set(batch):
    data = tf.data.Dataset.from_tensor_slices((IMAGES, LABELS))
    found = from_arrays(data if batch is None else data.batch(batch))
    np.testing.assert_array_equal(found.train_images, IMAGES)
    np.testing.assert_array_equal(found.train_labels, LABELS)


@pytest.mark.parametrize(
    ("train", "text"),
    [
        (
            (IMAGES / 255, LABELS),
            "dtype float64 and values from 0 to 1; allowed: uint8, raw pixels 0-255; for pixels 0-1",
        ),
        (
            (IMAGES.astype(np.float32), LABELS),
            "for pixels 0-255 convert them with images.round().astype('uint8')",
        ),
        ((IMAGES.astype(np.int32), LABELS), "train images has dtype int32; allowed: uint8"),
        (
            (IMAGES[0], LABELS[:1]),
            "train labels has shape (1,); allowed: (8,)",
        ),  # an image is taken for grey ones
        ((IMAGES[..., :2], LABELS), "train images has shape (6, 8, 10, 2); allowed: (n, height, width, 3)"),
        ((IMAGES[:, 0, 0], LABELS), "train images has shape (6, 3); allowed"),
        ((IMAGES, LABELS[:5]), "train labels has shape (5,); allowed: (6,)"),
        ((IMAGES, LABELS - 1), "train labels has the value -1; allowed: integers from 0"),
        (
            (IMAGES, LABELS.astype(np.float32)),
            "train labels has dtype float32; allowed: integers from 0, or one-hot rows",
        ),
        ((IMAGES[:0], np.zeros((0, 0), int)), "train labels has shape (0, 0); allowed: (0,)"),
        ((IMAGES, ONE_HOT * 0.5), "is not one-hot; allowed: one 1 in each row"),
        (
            (IMAGES, LABELS * 2),
            "train labels has no image of 1, 3; allowed: at least one image of each of the 5 classes",
        ),
        ((IMAGES, LABELS * 0), "train labels has no image of 1"),
        ((IMAGES[:0], LABELS[:0]), "train images has length 0; allowed: one image or more"),
        (IMAGES, "train data is ndarray; allowed: (images, labels), a Dataset, or a finite tf.data.Dataset"),
        ("pictures", "train data is str; allowed"),
        ((IMAGES, LABELS, LABELS), "train data is tuple; allowed: (images, labels)"),
    ],
)
def test_what_is_refused_is_one_line(train, text):
    with pytest.raises(ConfigError) as caught:
        from_arrays(train)
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_endless_and_empty_tf_data_sets():
    data = tf.data.Dataset.from_tensor_slices((IMAGES, LABELS))
    with pytest.raises(
        ConfigError, match=r"is an infinite tf\.data\.Dataset; allowed: a finite one, without repeat"
    ):
        from_arrays(data.repeat())
    with pytest.raises(ConfigError, match="train data has no elements"):
        from_arrays(data.take(0))
    with pytest.raises(ConfigError, match=r"allowed: \(images, labels\)"):
        from_arrays(data.map(lambda x, y: x))


@pytest.mark.parametrize("one_hot", [False, True])
def test_batches_of_grey_images(one_hot):
    labels = ONE_HOT if one_hot else LABELS
    data = tf.data.Dataset.from_tensor_slices((IMAGES[..., 0], labels))
    if one_hot:
        np.testing.assert_array_equal(from_arrays(data.batch(4)).train_images[..., 1], IMAGES[..., 0])
    else:
        np.testing.assert_array_equal(from_arrays(data).train_labels, LABELS)
        with pytest.raises(ConfigError, match="which may be batches or not; allowed: batches of images"):
            from_arrays(data.batch(4))


def test_one_hot_labels_keep_their_number_of_classes():
    wide = np.eye(5)[LABELS]
    with pytest.raises(
        ConfigError, match=r"train labels has no image of 3, 4; allowed: .* each of the 5 classes"
    ):
        from_arrays((IMAGES, wide))


def test_no_data_and_dictionaries_are_one_line():
    with pytest.raises(ConfigError, match="train data is None"):
        from_arrays(None)
    data = tf.data.Dataset.from_tensor_slices(({"x": IMAGES}, LABELS))
    with pytest.raises(ConfigError, match=r"allowed: \(images, labels\)"):
        from_arrays(data)


def test_floats_of_other_ranges_get_no_recipe_that_would_spoil_them():
    for images in (IMAGES / 127.5 - 1, (IMAGES / 255 - 0.5) / 0.2, IMAGES * 2.0):
        with pytest.raises(ConfigError, match="neither 0-1 nor 0-255, so undo their scaling first") as error:
            from_arrays((images, LABELS))
        assert f"from {images.min():.4g} to {images.max():.4g}" in str(error.value)


def test_what_is_ragged_is_one_line():
    with pytest.raises(ConfigError, match=r"train images is no array .*; allowed: all of one shape"):
        from_arrays(([IMAGES[0], IMAGES[1, :5]], [0, 1]))
    with pytest.raises(ConfigError, match="train labels is no array"):
        from_arrays((IMAGES[:2], [[1, 0], [1]]))
    pictures = [IMAGES[:2], IMAGES[:2, :5]]
    data = tf.data.Dataset.from_generator(
        lambda: ((x, LABELS[:2]) for x in pictures),
        output_signature=(tf.TensorSpec((None, None, None, 3), tf.uint8), tf.TensorSpec((None,), tf.int64)),
    )
    with pytest.raises(ConfigError, match=r"train data has elements of different shapes .*; allowed: of one"):
        from_arrays(data)


@pytest.mark.parametrize("names", ["abc", 5, {0: "a", 1: "b"}, {"a", "b"}])
def test_names_of_classes_are_a_list(names):
    with pytest.raises(ConfigError, match=r"class_names is .*; allowed: a list with a name for each class"):
        from_arrays((IMAGES, LABELS), class_names=names)


@pytest.mark.parametrize("names", [("a", "b", "a"), (0, 1, 2)])
def test_a_dataset_has_different_names_of_classes(names):
    with pytest.raises(ConfigError, match=r"class_names is \(.*\); allowed: different strings"):
        dataclasses.replace(DATA, class_names=names)


def test_parts_must_fit_together():
    with pytest.raises(ConfigError, match=r"test images are \(8, 9, 3\); allowed: \(8, 10, 3\)"):
        from_arrays((IMAGES, LABELS), test=(IMAGES[:, :, :9], LABELS))
    with pytest.raises(ConfigError, match=r"the labels go up to 2; allowed: at least 3 different names"):
        from_arrays((IMAGES, LABELS), class_names=("cat", "dog"))
    with pytest.raises(ConfigError, match="at least 3 different names"):
        from_arrays((IMAGES, LABELS), class_names=("cat", "cat", "dog"))
    data = from_arrays((IMAGES, LABELS))
    assert as_dataset(data) is data
    with pytest.raises(ConfigError, match="test_data is set beside a Dataset, which holds its own"):
        as_dataset(data, test=(IMAGES, LABELS))


# --- memory ---------------------------------------------------------------------------------------------


def test_a_dataset_without_an_end_is_refused_when_memory_runs_short(monkeypatch):
    """Its length is unknown, so it is counted as it comes."""
    monkeypatch.setattr(arrays, "_CHECK_BYTES", 10_000)
    monkeypatch.setattr(machine, "available_memory", lambda: 50_000)
    given = []

    def forever():
        while True:
            given.append(1)
            yield np.zeros((10, 10, 3), np.uint8), 0

    spec = (tf.TensorSpec((10, 10, 3), tf.uint8), tf.TensorSpec((), tf.int64))
    with pytest.raises(RunError, match=r"train data, .* bytes so far: needs .* are available; use fewer"):
        datasets.from_arrays(tf.data.Dataset.from_generator(forever, output_signature=spec))
    assert len(given) * 300 < 100_000


def test_grey_images_that_do_not_fit_as_three_channels(monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda: 1000)
    grey = np.zeros((10, 8, 8), np.uint8), np.arange(10)
    with pytest.raises(RunError, match=r"train images, 10 grey images as three channels: needs 0 MB"):
        datasets.from_arrays(grey)


def test_a_class_name_that_is_not_utf8():
    images, labels = np.zeros((2, 8, 8, 3), np.uint8), np.arange(2)
    with pytest.raises(RunError, match=r"the class name 'a\\udcff' is not UTF-8; rename the class$"):
        datasets.from_arrays((images, labels), class_names=("a\udcff", "b"))


def test_labels_that_count_from_one_are_told_so():
    images = np.zeros((6, 8, 8, 3), np.uint8)
    with pytest.raises(ConfigError, match=r"no image of 0; .* labels count from 0, so subtract 1$"):
        from_arrays((images, np.array([1, 2, 3] * 2)))
    with pytest.raises(ConfigError, match=r"no image of 1; .* each of the 3 classes$"):
        from_arrays((images, np.array([0, 2, 2] * 2)))
    with pytest.raises(ConfigError, match=r"int32; .* convert pixels 0-255 with images.astype\('uint8'\)"):
        from_arrays((images.astype(np.int32), np.array([0, 1, 2] * 2)))
