"""A folder of images: train/<class>/*, and optionally val/<class>/* and test/<class>/*."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..errors import ConfigError, RunError, reason_of
from ..machine import cpu_count
from .base import Dataset
from .images import read_image

_FOLDER_LAYOUT = "a folder with train/<class>/* and, optionally, val/<class>/* and test/<class>/*"


def load_folder(data_dir: str | os.PathLike[str] | None, size: int) -> Dataset:
    """Reads a folder of images.

    Args:
        data_dir: the folder; the names of the folders in its train/ are the class names.
        size: the side in pixels that each image is resized to.

    Returns:
        The data set, with classes and files in sorted order.

    Raises:
        ConfigError: if the folder does not exist, or if val/ or test/ has a class that train/ has not.
        RunError: if there are fewer than two classes, an empty class, or a file that is not an image.
    """
    if not data_dir:
        raise ConfigError(f"data_dir is not set; allowed with the dataset folder: {_FOLDER_LAYOUT}")
    root = Path(data_dir).expanduser()
    try:
        if not root.exists():
            raise ConfigError(f"data_dir is {root}, which does not exist; allowed: {_FOLDER_LAYOUT}")
        if not (root / "train").is_dir():
            raise RunError(f"{root} has no folder train/; allowed: {_FOLDER_LAYOUT}")
        # Before the first image is read, so that a mistake shows at once.
        parts = [part for part in ("train", "val", "test") if (root / part).exists()]
        files = {part: _list_images(root / part) for part in parts}
    except OSError as error:
        raise RunError(f"cannot read {error.filename or root}: {reason_of(error)}; correct that") from error
    class_names = tuple(files["train"])
    if len(class_names) < 2:
        raise RunError(
            f"{root / 'train'} has {len(class_names)} class folder ({', '.join(class_names) or 'none'});"
            f" allowed: two or more, in {_FOLDER_LAYOUT}"
        )
    for part, classes in files.items():
        extra = sorted(set(classes) - set(class_names))
        if extra:
            raise ConfigError(
                f"{root / part} has the class {', '.join(extra)}, which train/ lacks;"
                f" allowed: {', '.join(class_names)}"
            )

    def read(classes: dict[str, list[Path]]) -> tuple[np.ndarray, np.ndarray]:
        paths = [path for name in classes for path in classes[name]]
        labels = [class_names.index(name) for name in classes for _ in classes[name]]
        images = np.empty((len(paths), size, size, 3), np.uint8)
        for i, image in enumerate(pool.map(lambda path: read_image(path, (size, size)), paths)):
            images[i] = image
        return images, np.array(labels, np.int64)

    with ThreadPoolExecutor(cpu_count()) as pool:
        train = read(files["train"])
        validation = read(files["val"]) if "val" in files else None
        test = read(files.get("test", {}))
    return Dataset("folder", *train, *test, class_names, str(root), validation)


def _list_images(folder: Path) -> dict[str, list[Path]]:
    """Returns {class name: its files}, both sorted and without hidden ones. Raises RunError if one is empty."""
    classes = {}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            raise RunError(f"{entry} is not in the folder of a class; allowed: {_FOLDER_LAYOUT}")
        classes[entry.name] = sorted(path for path in entry.iterdir() if not path.name.startswith("."))
        if not classes[entry.name]:
            raise RunError(f"the class folder {entry} is empty; put images into it, or remove it")
    if not classes:
        raise RunError(f"{folder} holds no class folders; allowed: {_FOLDER_LAYOUT}")
    return classes
