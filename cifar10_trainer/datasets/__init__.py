"""Where images come from: verified uint8 arrays, their labels, and the split into training and validation.

Nothing here runs a TensorFlow operation: strategies and logical devices can still be set up after `load`.
"""

from __future__ import annotations

import os

from ..config import DATASETS
from ..errors import ConfigError, unknown
from . import cifar10, digits, folder
from .base import Dataset, fingerprint, split
from .cifar10 import CIFAR10_CLASSES
from .images import read_image

__all__ = ["CIFAR10_CLASSES", "Dataset", "fingerprint", "load", "read_image", "split"]


def load(
    name: str = "cifar10", data_dir: str | os.PathLike[str] | None = None, image_size: int = 32
) -> Dataset:
    """Reads a dataset into memory.

    name: "cifar10" (50,000 + 10,000 images in the official order), "digits" (scikit-learn's 1,797, enlarged
        to 32x32, a fifth of them for testing) or "folder" (train/<class>/*, optional val/ and test/).
    data_dir: for cifar10 an official archive (python or binary), its extracted folder, a directory prepared
        by TFDS, or a folder holding one of these; None looks in $CIFAR10_TRAINER_DATA, then in the caches of
        TFDS, Keras and torchvision, then downloads. For folder the image folder. digits takes none.
    image_size: the side in pixels, 8 to 512, to which images of a folder are resized; 32 for the others.

    Raises ConfigError on an unknown name, a path that does not exist or an image_size out of range, RunError
    when the data is missing, damaged or unreadable.
    """
    if name not in DATASETS:
        raise unknown("dataset", name, DATASETS)
    if name == "folder":
        if not 8 <= image_size <= 512:
            raise ConfigError(f"image_size is {image_size}; allowed: from 8 to 512")
        return folder.load_folder(data_dir, image_size)
    if image_size != 32:
        raise ConfigError(f"image_size is {image_size}; allowed with the dataset {name}: 32")
    return cifar10.load_cifar10(data_dir) if name == "cifar10" else digits.load_digits(data_dir)
