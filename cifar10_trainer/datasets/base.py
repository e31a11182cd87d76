"""The Dataset class, and its split into training and validation."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..config import SPLITS
from ..errors import ConfigError, RunError, shown, unknown


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels in memory.

    All images are uint8 [n, height, width, 3], all labels int64 [n] from 0 to num_classes - 1.

    Attributes:
        name: of the data set, see `load`; "arrays" for arrays in memory.
        train_images: the training images.
        train_labels: their labels.
        test_images: the test images; [0, height, width, 3] if there are none.
        test_labels: their labels.
        class_names: the name of each label.
        source: where the images came from, for people.
        validation: images and labels for validation that belong to the data set; None if there are none.
        files: of a folder: "train", "validation" and "test" -> the file of each image, relative to the folder.
        resize: of a folder: how its pictures got their size, see `read_image`.

    Raises:
        ConfigError: if the class names are not different strings.
        RunError: if a class name is not UTF-8, as the name of a folder may be.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    source: str
    validation: tuple[np.ndarray, np.ndarray] | None = None
    files: Mapping[str, tuple[str, ...]] | None = None
    resize: str = "squash"

    def __post_init__(self) -> None:
        names = self.class_names
        if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
            raise ConfigError(f"class_names is {shown(names)}; allowed: different strings")
        for name in names:
            try:
                name.encode()
            except UnicodeEncodeError as error:
                raise RunError(f"the class name {shown(name)} is not UTF-8; rename the class") from error

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        height, width, channels = self.train_images.shape[1:]
        return height, width, channels


def split(
    dataset: Dataset, fraction: float | None, kind: str = "stratified", seed: int = 0, fold: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Splits the training images into training and validation. The test images are not used.

    Args:
        dataset: what to split. If it has validation images of its own, they are the validation set, whatever the
            other arguments are.
        fraction: the share of the training images to validate on, between 0 and 1: round(n * fraction) images. None:
            train on all of them; the validation arrays are empty.
        kind: "stratified" draws each class's share at random; "last" takes the last images.
        seed: of the random draw of "stratified".
        fold: which of the 1 / fraction stratified parts is the validation set, from 0. Where 1 / fraction is a whole number,
            and each class has at least so many images, each training image is in exactly one of these parts.

    Returns:
        Training images, training labels, validation images, validation labels. All keep the order of the data set.

    Raises:
        ConfigError: if a value is out of range, the validation set is empty, or a class has no training image left.
    """
    images, labels = dataset.train_images, dataset.train_labels
    if kind not in SPLITS:
        raise unknown("validation_split", kind, SPLITS)
    if dataset.validation is not None:
        return images, labels, *dataset.validation
    if fraction is None:
        return images, labels, images[:0].copy(), labels[:0].copy()  # a view would keep all images in memory
    if not 0 < fraction < 1:
        raise ConfigError(f"validation_fraction is {fraction}; allowed: greater than 0 and less than 1")

    count = round(labels.size * fraction)
    if kind == "stratified":
        held_out = stratified_mask(labels, fraction, seed, fold) & (np.bincount(labels)[labels] > 1)
    else:
        held_out = np.arange(labels.size) >= labels.size - count
    if not held_out.any():
        why, least = "", f"{1 / labels.size:.2g} or more"
        if count:
            why, least = f" in fold {fold}" if fold else ", as each class keeps one", "a larger one"
        raise ConfigError(
            f"validation_fraction is {fraction}, which is none of {labels.size} images{why};"
            f" allowed: {least}, or None (--final_fit), which holds none out"
        )
    missing = np.setdiff1d(labels, labels[~held_out])
    if missing.size:
        names = ", ".join(dataset.class_names[k] for k in missing)
        raise ConfigError(
            f"validation_fraction is {fraction}, which with the {kind} split leaves no training image of"
            f" {names}; allowed: a smaller fraction"
        )
    return images[~held_out], labels[~held_out], images[held_out], labels[held_out]


def fingerprint(dataset: Dataset) -> str:
    """Identifies what is trained and validated on, by a crc32 of all labels and about 500 images of each set.

    It costs milliseconds, so a change to a single image may go unnoticed. The test images do not count, because they
    change nothing in a run except its final score.

    Returns:
        Eight hexadecimal digits.
    """
    value = zlib.crc32("\n".join(dataset.class_names).encode())
    for images, labels in filter(None, [(dataset.train_images, dataset.train_labels), dataset.validation]):
        value = zlib.crc32(labels.tobytes(), value)
        value = zlib.crc32(images[:: max(1, len(images) // 500)].tobytes(), value)
    return f"{value:08x}"


def stratified_mask(labels: np.ndarray, fraction: float, seed: int, fold: int = 0) -> np.ndarray:
    """Draws round(n * fraction) images, in proportion from each class.

    Args:
        labels: integers [n], from 0.
        fraction: the share of the images to draw, from 0 to 1.
        seed: of the draw.
        fold: which part to draw, from 0; different folds of one seed have no image in common where each class has at
            least 1 / fraction images.

    Returns:
        A mask of the drawn images, bool [n].
    """
    starts, ends = (_shares(labels, min(part * fraction, 1.0)) for part in (fold, fold + 1))
    rng = np.random.default_rng(seed)
    mask = np.zeros(labels.size, bool)
    for k, (start, end) in enumerate(zip(starts, ends, strict=True)):
        mask[rng.permutation(np.flatnonzero(labels == k))[start:end]] = True
    return mask


def _shares(labels: np.ndarray, fraction: float) -> np.ndarray:
    """Divides round(n * fraction) images among the classes, by largest remainders: integers [classes]."""
    exact = np.bincount(labels) * fraction
    counts = np.floor(exact).astype(int)
    short = round(labels.size * fraction) - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[:short]] += 1
    return counts
