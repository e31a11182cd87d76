"""Data sets: verified uint8 images, their labels, and the split into training and validation.

`load` runs no TensorFlow operation, so strategies and logical devices can still be set up after it.
"""

from __future__ import annotations

import os
from numbers import Integral
from typing import Any

from ..config import DATASETS
from ..errors import ConfigError, check_number, unknown
from . import cifar10, digits, folder
from .arrays import as_dataset, from_arrays
from .base import Dataset, fingerprint, split
from .cifar10 import CIFAR10_CLASSES
from .folder import rows as file_rows
from .folder import size_of as folder_size
from .images import read_image

__all__ = [
    "CIFAR10_CLASSES",
    "Dataset",
    "as_dataset",
    "file_rows",
    "fingerprint",
    "folder_size",
    "from_arrays",
    "load",
    "read_ahead",
    "read_image",
    "split",
]


def read_ahead(name: str, data_dir: str | os.PathLike[str] | None) -> None:
    """Begins to read a data set, for a `load` with the same arguments that comes after a long import.

    Only reading CIFAR-10 takes long enough, and is always the same. No error is raised here.
    """
    if name == "cifar10":
        cifar10.read_ahead(data_dir)


def load(
    name: str = "cifar10",
    data_dir: str | os.PathLike[str] | None = None,
    image_size: int = 32,
    resize: str = "squash",
    **folder_options: Any,
) -> Dataset:
    """Reads a data set into memory.

    Args:
        name: "cifar10" (50,000 + 10,000 images in the official order), "digits" (the 1,797 images of scikit-learn,
            enlarged to 32x32; a fifth of them are test images) or "folder" (train/<class>/*, optionally val/ and
            test/, or simply <class>/*, of which a fifth are test images).
        data_dir: for cifar10, an official archive (python or binary), its extracted folder, a directory that TFDS
            prepared, or a folder that holds one of these. None: the first of $CIFAR10_TRAINER_DATA, the caches of
            TFDS, Keras and torchvision, and a download. For folder, the folder. digits accepts only None.
        image_size: the side in pixels, 8 to 512, that images of a folder are resized to; 32 for the other data sets.
        resize: how images of a folder are resized, "squash", "crop" or "pad", see `read_image`.
        folder_options: for a folder: `strict`, `max_bad`, `workdir`, `files`, `skip_gone`, `only`, `cut`, `copies` and `log` of
            `folder.load_folder`. Unless `log` receives them, lines on files that are left out go to stderr.

    Returns:
        The data set.

    Raises:
        ConfigError: if `name` is unknown, a path does not exist, or `image_size` is out of range.
        RunError: if the data is missing, damaged or unreadable.
    """
    if name not in DATASETS:
        raise unknown("dataset", name, DATASETS)
    if name == "folder":
        check_number("image_size", image_size, Integral, 8, 512)
        return folder.load_folder(data_dir, image_size, resize, **folder_options)
    for option, value in folder_options.items():
        if option != "log" and value is not None and value is not False:
            raise ConfigError(f"{option} is {value}; allowed with the dataset folder only")
    for what, value, only in (("image_size", image_size, 32), ("resize", resize, "squash")):
        if value != only:
            raise ConfigError(f"{what} is {value}; allowed with the dataset {name}: {only}")
    return cifar10.load_cifar10(data_dir) if name == "cifar10" else digits.load_digits(data_dir)
