"""How many images a folder has in a class, before any of them is read."""

from __future__ import annotations

import os
from pathlib import Path


def images_per_class(data_dir: str | os.PathLike[str] | None) -> float | None:
    """Counts the files in the class folders of train/, or of the folder itself where it has no train/.

    Args:
        data_dir: a folder as the dataset "folder" takes it.

    Returns:
        the mean number of files in a class, hidden ones left out; None where there are no class folders.
    """
    if not data_dir:
        return None
    root = Path(data_dir).expanduser()
    train = root / "train"
    classes = _folders(train if train.is_dir() else root)
    counts = [
        sum(not name.startswith(".") for _, _, names in os.walk(folder) for name in names)
        for folder in classes
    ]
    return sum(counts) / len(counts) if counts else None


def _folders(folder: Path) -> list[str]:
    try:
        return [entry.path for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."]
    except OSError:  # loading it says what is wrong
        return []
