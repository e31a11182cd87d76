"""Images and labels in memory, and their split into training and validation."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from ..config import SPLITS
from ..errors import ConfigError, unknown


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels in memory.

    Images are uint8 [n, height, width, 3], labels int64 [n] from 0 to num_classes - 1. The test arrays are
    empty ([0, height, width, 3] and [0]) for a folder without test/. `source` tells people where the images
    were read. `validation` is (images, labels) of a folder with its own val/, otherwise None.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    source: str
    validation: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        height, width, channels = self.train_images.shape[1:]
        return height, width, channels


def split(
    dataset: Dataset, fraction: float | None, kind: str = "stratified", seed: int = 0, fold: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images, training labels, validation images, validation labels.

    fraction: the share of the training images to validate on, between 0 and 1: round(n * fraction) images.
        None: train on all, the validation arrays are empty. A dataset with its own validation images keeps
        them, whatever the fraction.
    kind: "stratified" draws each class's share at random from `seed`; "last" takes the last images.
    fold: which of the 1 / fraction stratified parts is the validation set, from 0. Together they are all the
        training images, each once.

    Both parts keep the order of the dataset. The test images are not looked at. Raises ConfigError on a value
    out of range, an empty validation set or a class left without a training image.
    """
    images, labels = dataset.train_images, dataset.train_labels
    if kind not in SPLITS:
        raise unknown("validation_split", kind, SPLITS)
    if dataset.validation is not None:
        return images, labels, *dataset.validation
    if fraction is None:
        return images, labels, images[:0].copy(), labels[:0].copy()  # no views: they would hold all images
    if not 0 < fraction < 1:
        raise ConfigError(f"validation_fraction is {fraction}; allowed: greater than 0 and less than 1")

    count = round(labels.size * fraction)
    if kind == "stratified":
        held_out = stratified_mask(labels, fraction, seed, fold)
    else:
        held_out = np.arange(labels.size) >= labels.size - count
    if count == 0:
        raise ConfigError(
            f"validation_fraction is {fraction}, which is none of {labels.size} images;"
            f" allowed: {1 / labels.size:.2g} or more"
        )
    lost = np.setdiff1d(labels, labels[~held_out])
    if lost.size:
        names = ", ".join(dataset.class_names[k] for k in lost)
        raise ConfigError(
            f"validation_fraction is {fraction}; with the {kind} split that leaves no training image of"
            f" {names}; allowed: a smaller fraction"
        )
    return images[~held_out], labels[~held_out], images[held_out], labels[held_out]


def fingerprint(dataset: Dataset) -> str:
    """Eight letters and digits that tell apart what is trained and validated on: a crc32 of labels and some hundred images.

    It costs milliseconds, so a change to a single image may go unnoticed. The test images do not count: they change
    nothing in a run but its last score.
    """
    value = zlib.crc32("\n".join(dataset.class_names).encode())
    for images, labels in filter(None, [(dataset.train_images, dataset.train_labels), dataset.validation]):
        value = zlib.crc32(labels.tobytes(), value)
        value = zlib.crc32(images[:: max(1, len(images) // 500)].tobytes(), value)
    return f"{value:08x}"


def stratified_mask(labels: np.ndarray, fraction: float, seed: int, fold: int = 0) -> np.ndarray:
    """A bool mask of round(n * fraction) images, drawn from each class in proportion; fold 1 is drawn after fold 0."""
    starts, ends = (_shares(labels, min(part * fraction, 1.0)) for part in (fold, fold + 1))
    rng = np.random.default_rng(seed)
    mask = np.zeros(labels.size, bool)
    for k, (start, end) in enumerate(zip(starts, ends, strict=True)):
        mask[rng.permutation(np.flatnonzero(labels == k))[start:end]] = True
    return mask


def _shares(labels: np.ndarray, fraction: float) -> np.ndarray:
    """How many images of each class are its share of round(n * fraction), by largest remainders."""
    exact = np.bincount(labels) * fraction
    counts = np.floor(exact).astype(int)
    short = round(labels.size * fraction) - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[:short]] += 1
    return counts
