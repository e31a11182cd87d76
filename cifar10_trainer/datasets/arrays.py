"""Somebody's own arrays, or a finite `tf.data.Dataset`, as a Dataset."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np

from ..errors import ConfigError, cut, one_line, shown
from ..machine import check_fits
from .base import Dataset

SOURCE = "arrays in memory"
_CHECK_BYTES = 64 << 20  # of images between two looks at the memory that is left
Pair = tuple[Any, Any]


def from_arrays(
    train: Any,
    validation: Any = None,
    test: Any = None,
    class_names: Sequence[str] | None = None,
) -> Dataset:
    """A Dataset of arrays. The arrays are not copied where their types fit.

    Args:
        train: (images, labels), or a finite `tf.data.Dataset` of such pairs, batched or not. Images are uint8 [n, height,
            width, 3], raw pixels 0-255; grey ones [n, height, width] or [n, height, width, 1] become three equal channels.
            Labels are integers [n] from 0, or one-hot [n, classes].
        validation, test: the same, for validation and for the final score; None: none.
        class_names: one for each class; None: the numbers of the classes.

    Returns:
        The data set, named "arrays".

    Raises:
        ConfigError: on another shape, dtype, length or range. Float images are refused, because 0-1 and 0-255 cannot be
            distinguished safely.
    """
    parts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    count = 0
    if train is None:
        raise ConfigError("train data is None; allowed: (images, labels), or a finite tf.data.Dataset")
    for name, part in (("train", train), ("validation", validation), ("test", test)):
        if part is not None:
            images, labels = pair(name, part)
            images = check_images(f"{name} images", images)
            checked, columns = check_labels(f"{name} labels", labels, len(images))
            parts[name], count = (images, checked), max(count, columns)
    shape = parts["train"][0].shape[1:]
    for name, (images, _) in parts.items():
        if images.shape[1:] != shape:
            raise ConfigError(
                f"{name} images are {images.shape[1:]}; allowed: {shape}, as the training images"
            )
    if len(parts["train"][1]) == 0:
        raise ConfigError("train images has length 0; allowed: one image or more")
    names = _class_names(class_names, count, parts["train"][1])
    empty = parts["train"][0][:0].copy(), np.zeros(0, np.int64)
    (train_images, train_labels), (test_images, test_labels) = parts["train"], parts.get("test", empty)
    return Dataset(
        "arrays", train_images, train_labels, test_images, test_labels, names, SOURCE, parts.get("validation")
    )


def _class_names(class_names: Sequence[str] | None, count: int, labels: np.ndarray) -> tuple[str, ...]:
    """A name for each of at least `count` classes. Raises ConfigError where they do not fit the training labels."""
    if class_names is None and count > len(labels):  # IDs perhaps, of which there may be billions
        raise ConfigError(
            f"labels go up to {count - 1}, but there are only {len(labels)} training images; allowed: classes"
            " numbered from 0, each with a training image"
        )
    if class_names is not None:
        # The order counts, which a set has not; of a dict it would be the keys.
        if isinstance(class_names, str | Mapping | Set) or not isinstance(class_names, Iterable):
            raise ConfigError(
                f"class_names is {shown(class_names)}; allowed: a list with a name for each class"
            )
        class_names = tuple(map(str, class_names))
    names = class_names if class_names is not None else tuple(map(str, range(max(count, 2))))
    if len(names) < max(count, 2) or len(set(names)) != len(names):
        raise ConfigError(
            f"class_names is {shown(names)}, but the labels go up to {count - 1}; allowed: at least {max(count, 2)} different names"
        )
    present = np.unique(labels)
    missing = [names[k] for k in range(len(names)) if k not in present]
    if missing:
        from_one = "; labels count from 0, so subtract 1" if missing == ["0"] else ""
        raise ConfigError(
            f"train labels has no image of {cut(', '.join(missing[:10]))}; allowed: at least one image of each of the"
            f" {len(names)} classes{from_one}"
        )
    return names


def as_dataset(
    data: Any, validation: Any = None, test: Any = None, class_names: Sequence[str] | None = None
) -> Dataset:
    """`data` itself, checked, where it is a Dataset, else `from_arrays` of the arguments. Raises ConfigError."""
    if not isinstance(data, Dataset):
        return from_arrays(data, validation, test, class_names)
    for name, value in (("validation_data", validation), ("test_data", test), ("class_names", class_names)):
        if value is not None:
            raise ConfigError(
                f"{name} is set beside a Dataset, which holds its own; allowed: with arrays only"
            )
    _check(data)
    return data


def _check(data: Dataset) -> None:
    """Raises ConfigError where somebody has made a Dataset of other arrays than `Dataset` describes."""
    shape = check_images("train images", data.train_images).shape[1:]
    if not len(data.train_images):
        raise ConfigError("the Dataset has no training images; allowed: one or more")
    train, test = (data.train_images, data.train_labels), (data.test_images, data.test_labels)
    for name, part in (("train", train), ("validation", data.validation), ("test", test)):
        if part is None:
            continue
        images, labels = map(np.asarray, part)
        _, count = check_labels(f"{name} labels", labels, len(check_images(f"{name} images", images)))
        if images.shape[1:] != shape or labels.ndim != 1 or labels.dtype != np.int64:
            raise ConfigError(
                f"the Dataset has {name} images {images.shape} and {name} labels {labels.dtype} {labels.shape}; allowed:"
                f" {('n', *shape)} and int64 ('n',), or (images, labels) in place of the Dataset"
            )
        if count > data.num_classes:
            raise ConfigError(
                f"{name} labels go up to {count - 1}, but the Dataset names {data.num_classes} classes; allowed: a name for each"
            )


def pair(name: str, part: Any) -> Pair:
    """(images, labels) of a pair or of a tf.data.Dataset. Raises ConfigError where it is neither."""
    tf = sys.modules.get("tensorflow")  # a tf.data.Dataset exists only where TensorFlow was imported
    if tf is not None and isinstance(part, tf.data.Dataset):
        return _collect(name, part, tf)
    if not isinstance(part, tuple | list) or len(part) != 2:
        raise ConfigError(
            f"{name} data is {type(part).__name__}; allowed: (images, labels), a Dataset, or a finite tf.data.Dataset"
        )
    return part[0], part[1]


def _collect(name: str, data: Any, tf: Any) -> Pair:
    """All elements of a finite tf.data.Dataset of (image, label) pairs or batches of them."""
    spec = data.element_spec
    if not isinstance(spec, tuple) or len(spec) != 2 or not all(isinstance(s, tf.TensorSpec) for s in spec):
        raise ConfigError(f"{name} data has the elements {shown(spec)}; allowed: (images, labels)")
    if data.cardinality() == tf.data.INFINITE_CARDINALITY:
        raise ConfigError(
            f"{name} data is an infinite tf.data.Dataset; allowed: a finite one, without repeat()"
        )
    ranks = tuple(s.shape.rank for s in spec)
    # Images [h, w, 3] with labels [classes] look like a batch of grey images [n, h, w] with labels [n].
    if None in ranks or ranks == (3, 1):
        raise ConfigError(
            f"{name} data has elements of the shapes {spec[0].shape} and {spec[1].shape}, which may be batches or not;"
            " allowed: batches of images [n, height, width, 3], or single images with integer labels"
        )
    elements, size, checked = [], 0, 0
    for images, labels in data.as_numpy_iterator():
        elements.append((images, labels))
        size += images.nbytes
        # They will be joined in a second array; the number may be without an end.
        if size > checked + _CHECK_BYTES:
            check_fits(size, f"{name} data, {size:,} bytes so far", "use fewer or smaller images")
            checked = size
    if not elements:
        raise ConfigError(f"{name} data has no elements; allowed: one image or more")
    join = np.concatenate if ranks[0] == 4 or ranks == (3, 2) else np.stack
    try:
        return join([x for x, _ in elements]), join([np.asarray(y) for _, y in elements])
    except ValueError as error:
        raise ConfigError(
            f"{name} data has elements of different shapes ({one_line(error)}); allowed: of one"
        ) from error


def _array(name: str, values: Any) -> np.ndarray:
    """The values as an array. Raises ConfigError where they are ragged."""
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ConfigError(f"{name} is no array ({one_line(error)}); allowed: all of one shape") from error


def check_images(name: str, images: Any) -> np.ndarray:
    """Checks images.

    Args:
        name: what an error calls them.
        images: uint8 [n, height, width, 3], or grey ones [n, height, width] or [n, height, width, 1].

    Returns:
        uint8 [n, height, width, 3], not copied if it has this shape.

    Raises:
        ConfigError: on another shape or dtype.
    """
    array = _array(name, images)
    if array.dtype.kind == "f":
        low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
        if low >= 0 and high <= 1:
            how = "for pixels 0-1 convert them with (images * 255).round().astype('uint8')"
        elif low >= 0 and high <= 255:
            how = "for pixels 0-255 convert them with images.round().astype('uint8')"
        else:
            how = "these are neither 0-1 nor 0-255, so undo their scaling first"
        raise ConfigError(
            f"{name} has dtype {array.dtype} and values from {low:.4g} to {high:.4g}; allowed: uint8, raw pixels 0-255; {how}"
        )
    if array.dtype != np.uint8:
        how = "; convert pixels 0-255 with images.astype('uint8')" if array.dtype.kind in "iu" else ""
        raise ConfigError(f"{name} has dtype {array.dtype}; allowed: uint8, raw pixels 0-255{how}")
    if array.ndim == 3 or (array.ndim == 4 and array.shape[3] == 1):
        check_fits(3 * array.nbytes, f"{name}, {len(array):,} grey images as three channels")
        array = np.repeat(array.reshape(*array.shape[:3], 1), 3, axis=3)
    if array.ndim != 4 or array.shape[3] != 3 or min(array.shape[1:3]) < 1:
        raise ConfigError(
            f"{name} has shape {array.shape}; allowed: (n, height, width, 3), or for grey images (n, height, width)"
        )
    return array


def check_labels(name: str, labels: Any, n: int) -> tuple[np.ndarray, int]:
    """Checks labels of n images.

    Args:
        name: what an error calls them.
        labels: integers [n] or [n, 1] from 0, or one-hot [n, classes].
        n: the number of images.

    Returns:
        int64 [n], and the number of classes: the columns of one-hot labels, else one more than the largest label.

    Raises:
        ConfigError: on another shape, dtype or range.
    """
    array = _array(name, labels)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim not in (1, 2) or len(array) != n or array.shape[1:] == (0,):
        raise ConfigError(
            f"{name} has shape {array.shape}; allowed: ({n},) or one-hot ({n}, classes), one for each image"
        )
    if array.ndim == 2:
        if not (np.isin(array, (0, 1)).all() and (array.sum(axis=1) == 1).all()):
            raise ConfigError(
                f"{name} has shape {array.shape} and is not one-hot; allowed: one 1 in each row, else 0"
            )
        return array.argmax(axis=1).astype(np.int64), array.shape[1]
    if array.dtype.kind not in "iu":
        raise ConfigError(f"{name} has dtype {array.dtype}; allowed: integers from 0, or one-hot rows")
    if array.size and array.min() < 0:
        raise ConfigError(f"{name} has the value {array.min()}; allowed: integers from 0")
    return array.astype(np.int64, copy=False), int(array.max()) + 1 if array.size else 0
