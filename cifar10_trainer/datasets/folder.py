"""A folder of pictures: train/<class>/*, with or without val/ and test/ beside it, or simply <class>/*."""

from __future__ import annotations

import errno
import math
import os
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..config import RESIZES
from ..errors import ConfigError, RunError, check_number, reason_of, shown, unknown
from ..files import expanded
from ..machine import check_fits, cpu_count
from ..process import Log
from ..run_folder import RUN_FILES, holds_run
from .base import Dataset, stratified_mask
from .images import SUFFIXES, Unreadable, decode, looks_like_image, open_formats, readable, without_warnings

LAYOUT = (
    "a folder with train/<class>/* and, optionally, val/<class>/* and test/<class>/*; or with <class>/*, from which"
    " validation and test images are cut"
)
_NAMES = {  # part -> what its folder may be called, in any case of letters
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "validate", "dev", "development"),
    "test": ("test", "testing"),
}
_PART_OF = {name: part for part, names in _NAMES.items() for name in names}
RUNS = "run folder(s)"  # what is left out of the pictures as such
TEST_SHARE = 0.2  # of <class>/*
_TEST_SEED = 8  # the test images are the same ones for every seed of a run
MAX_BAD = 0.05
SHOWN = 10  # files that a message names
PROGRESS_SECONDS = 10.0
_BLOCK = 1024  # files that are handed to the threads at a time
_DARK = 31  # of 255: what 13 bits of 16 reach

_Part = tuple[np.ndarray, np.ndarray, list[str]]  # images, labels, files
Row = tuple[str, str, str]  # file, relative to the data set's folder; class; part


@dataclass
class _Found:
    """What is in a folder: part -> class -> files, all sorted and relative to the folder; and what is left out."""

    files: dict[str, dict[str, list[str]]]
    cut: bool  # whether validation and test images are cut from "train"
    left_out: Counter[str] = field(default_factory=Counter)

    def pairs(self, only: str | None = None, cut: bool = True) -> dict[str, list[tuple[str, int]]]:
        """Part -> (file, label) of each picture; "train" and "test" are among the parts.

        only: the part that is not empty. cut: whether test images may be cut from "train", or all are test images there.
        """
        numbers = {name: label for label, name in enumerate(self.files["train"])}
        pairs = {
            part: [(file, numbers[name]) for name, inside in classes.items() for file in inside]
            for part, classes in self.files.items()
        }
        if self.cut:
            pairs["train"], pairs["test"] = _cut(pairs["train"]) if cut else ([], pairs["train"])
        pairs.setdefault("test", [])
        return {part: pairs[part] if only in (None, part) else [] for part in pairs}


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def load_folder(
    data_dir: str | os.PathLike[str] | None,
    size: int,
    resize: str = "squash",
    *,
    strict: bool = False,
    max_bad: float = MAX_BAD,
    files: Sequence[Row] | None = None,
    skip_gone: bool = False,
    only: str | None = None,
    cut: bool = True,
    workdir: str | os.PathLike[str] | None = None,
    copies: int = 1,
    log: Log | None = None,
) -> Dataset:
    """Reads a folder of pictures.

    Where the folder holds train/, the folders in it are the classes, and val/ and test/ are used where they exist, under
    any of their usual names. Otherwise its own folders are the classes, and TEST_SHARE of each class becomes the test
    images, the same ones for every seed of a run. The pictures of a class may lie in folders within its folder.

    Args:
        data_dir: the folder. Run folders in it are left out.
        size: the side in pixels that each picture is resized to.
        resize: how, see `read_image`.
        strict: whether to refuse files that are no pictures, and pictures that cannot be read, rather than to leave them
            out.
        max_bad: the share of pictures that cannot be read, 0-1, up to which they are left out.
        files: the files of an earlier run, as `rows` returns them: these are read, all of them, and no others.
        skip_gone: whether those of `files` that have gone are left out.
        only: the part to read, "train", "validation" or "test"; the others are left empty. None: all.
        cut: False: the pictures of <class>/* are all test images, and there are none to train on.
        workdir: the folder of the run that reads the pictures; it is no class.
        copies: how many of the pixels memory must hold, those that the caller will make included.
        log: receives lines on what is left out, and on the progress; None: they go to stderr.

    Returns:
        The data set, with classes and files in sorted order, and with `Dataset.files`.

    Raises:
        ConfigError: if an argument is not allowed, or if the folder does not exist, has two folders for one part or a further folder with classes, or if val/ or
            test/ has a class that train/ has not.
        RunError: if there are fewer than two classes, an empty class, a picture outside the classes, too many that cannot
            be read, or too many for the memory.
    """
    _check_options(max_bad, resize, only)
    root, log = _existing(data_dir), log or _to_stderr
    found = _find(root, files, None if workdir is None else Path(workdir).resolve(), skip_gone)
    _check_names_differ(found.files["train"], root)
    _log_left_out(found.left_out, root, strict, log)
    pairs = found.pairs(only, cut)
    total = sum(map(len, pairs.values()))
    check_fits(
        copies * total * size * size * 3, f"{readable(root)}, {total:,} pictures of {size} x {size} pixels"
    )
    bad: list[tuple[str, str]] = []
    read = {part: _read(root, pairs[part], size, resize, bad, log) for part in pairs}
    _check_bad(bad, total, 0.0 if strict else max_bad, files is not None, root, log)
    _warn_if_dark([images for images, _, _ in read.values()], root, log)
    return _assemble(root, found, read, resize, check=only is None and cut)


def _check_options(max_bad: float, resize: str, only: str | None) -> None:
    """Raises ConfigError where an argument of `load_folder` is not allowed."""
    check_number("max_bad", max_bad, Real, 0, math.nextafter(1, 0), words="at least 0 and less than 1")
    if resize not in RESIZES:
        raise unknown("resize", resize, RESIZES)
    if only not in (None, *_NAMES):
        raise unknown("only", only, _NAMES)


def _assemble(root: Path, found: _Found, read: dict[str, _Part], resize: str, *, check: bool) -> Dataset:
    """The data set of the parts that were read. check: whether each class must have an image to train on."""
    class_names = tuple(map(readable, found.files["train"]))
    if check:
        _check_classes(read["train"][1], class_names, root)
    (train_images, train_labels, _), (test_images, test_labels, _) = read["train"], read["test"]
    validation = read["validation"][:2] if "validation" in read else None
    files = {part: tuple(names) for part, (_, _, names) in read.items()}
    return Dataset(
        "folder",
        train_images,
        train_labels,
        test_images,
        test_labels,
        class_names,
        str(root),
        validation,
        files,
        resize,
    )


def _find(root: Path, files: Sequence[Row] | None, workdir: Path | None, skip_gone: bool = False) -> _Found:
    """The files of an earlier run, or what is in the folder. Raises ConfigError and RunError as `load_folder` does."""
    if files is not None:
        return _recorded(files, root if skip_gone else None)
    try:
        return _scan(root, workdir)
    except OSError as error:
        place = readable(error.filename or root)
        raise RunError(f"cannot read {place}: {reason_of(error)}; correct that") from error


def _existing(data_dir: str | os.PathLike[str] | None) -> Path:
    """The folder. Raises ConfigError where there is none."""
    if not data_dir:
        raise ConfigError(f"data_dir is not set; allowed with the dataset folder: {LAYOUT}")
    root = expanded(data_dir)
    if not root.is_dir():
        what = "is no folder" if root.exists() else "does not exist"
        raise ConfigError(f"data_dir is {readable(root)}, which {what}; allowed: {LAYOUT}")
    return root


class FolderSize(NamedTuple):
    """How much a folder holds: training pictures, classes, and whether it has a part of its own for validation."""

    images: int
    classes: int
    validation: bool


def size_of(
    data_dir: str | os.PathLike[str] | None, workdir: str | os.PathLike[str] | None = None
) -> FolderSize | None:
    """Counts the training pictures of a folder, without reading them.

    Args:
        data_dir: the folder, as `load_folder` takes it.
        workdir: of a run, which may be in it.

    Returns:
        what it holds, test pictures that are cut from it left out; None where the folder cannot be used: `load_folder`
        raises why.
    """
    try:
        own = expanded(workdir).resolve() if workdir else None
        found = _find(_existing(data_dir), None, own)
    except (ConfigError, RunError):
        return None
    pairs = found.pairs("train")
    return FolderSize(len(pairs["train"]), len(found.files["train"]), "validation" in found.files)


# ---- what is in the folder


def _scan(root: Path, workdir: Path | None) -> _Found:
    """Finds the parts, classes and files. Raises ConfigError and RunError as `load_folder` does."""
    left_out: Counter[str] = Counter()
    folders, files = _entries(root, left_out)
    if root.resolve() == workdir or holds_run(files):
        folders = [name for name in folders if name not in RUN_FILES]
    by_part: dict[str, list[str]] = {}
    for name in folders:
        if name.casefold() in _PART_OF:
            by_part.setdefault(_PART_OF[name.casefold()], []).append(name)
    if "train" not in by_part:
        for names in by_part.values():
            for name in names:  # of a class, perhaps
                if _has_classes(root / name):
                    raise RunError(f"{readable(root)} has {name}/ but no folder train/; allowed: {LAYOUT}")
        classes = _classes(root, folders, files, left_out, root, workdir)
        _check_class_names(classes, root)
        return _Found({"train": classes}, True, left_out)
    for part, names in by_part.items():
        if len(names) > 1:
            raise ConfigError(
                f"{readable(root)} has {' and '.join(f'{n}/' for n in names)}, both for {part} images; allowed: one of them"
            )
    for name in sorted(set(folders) - {names[0] for names in by_part.values()}):
        if _has_classes(root / name):
            raise ConfigError(
                f"{readable(root)} has {readable(name)}/ with classes beside train/; allowed: train, val and test"
                f" ({', '.join(n for n in _PART_OF if n not in by_part)}); rename it, or move it away"
            )
        if not _is_around(root / name, workdir):
            pictures = " with pictures" if next(find_pictures(root / name), None) else ""
            left_out[f"folder {readable(name)}{pictures} beside {by_part['train'][0]}/"] += 1
    _leave_out(files, left_out)
    parts = {}
    for part in _NAMES:
        if part in by_part:
            place = root / by_part[part][0]
            parts[part] = _classes(place, *_entries(place, left_out), left_out, root, workdir)
    _check_class_names(parts["train"], root / by_part["train"][0])
    _check_parts(parts, {part: root / names[0] for part, names in by_part.items()})
    return _Found(parts, False, left_out)


def _check_parts(parts: dict[str, dict[str, list[str]]], places: dict[str, Path]) -> None:
    """Raises ConfigError where a part has a class that train/ has not."""
    for part in parts:
        extra = sorted(set(parts[part]) - set(parts["train"]))
        if extra:
            alike = {unicodedata.normalize("NFC", readable(name)) for name in parts["train"]}
            for name in map(readable, extra):
                if unicodedata.normalize("NFC", name) in alike:
                    raise ConfigError(
                        f"{readable(places[part])} and {readable(places['train'])} have the class {name} in two forms of Unicode;"
                        " allowed: one; rename one of the folders"
                    )
            raise ConfigError(
                f"{readable(places[part])} has the class {', '.join(map(readable, extra))}, which train/ lacks;"
                f" allowed: {', '.join(map(readable, parts['train']))}"
            )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry of a folder is a folder, or a link to one. A link that leads to itself is none."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def _entries(folder: str | os.PathLike[str], left_out: Counter[str]) -> tuple[list[str], list[str]]:
    """The names of the folders and of the other entries in `folder`, sorted; hidden ones are left out."""
    folders: list[str] = []
    files: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                left_out["hidden"] += 1
            elif entry.name == "__MACOSX":  # what macOS adds to zip archives
                left_out["__MACOSX"] += 1
            else:
                (folders if _is_folder(entry) else files).append(entry.name)
    return sorted(folders), sorted(files)


def _classes(
    folder: Path,
    names: list[str],
    files: list[str],
    left_out: Counter[str],
    root: Path,
    workdir: Path | None,
) -> dict[str, list[str]]:
    """{class: its files, relative to `root`} of the folders `names`. Raises RunError as `load_folder` does.

    A folder without pictures is no class if it holds runs, or is where the run that reads it works.
    """
    lost = [name for name in files if Path(name).suffix.lower() in SUFFIXES]
    if lost:
        hint = "; a class of such a name needs another one, such as trains" if folder != root else ""
        raise RunError(
            f"{readable(folder / lost[0])} is not in the folder of a class ({len(lost):,} such pictures); allowed: {LAYOUT}{hint}"
        )
    _leave_out(files, left_out)
    classes = {}
    for name in names:
        place, runs = os.fspath(folder / name), left_out[RUNS]
        inside = os.path.relpath(place, root)
        classes[name] = _in_order(inside + path[len(place) :] for path in find_pictures(place, left_out))
        if not classes[name]:
            if not _is_around(folder / name, workdir) and left_out[RUNS] == runs:
                raise RunError(
                    f"the class folder {readable(folder / name)} holds no pictures; put some into it, or remove it"
                )
            del classes[name]
    if not classes:
        raise RunError(f"{readable(folder)} holds no class folders; allowed: {LAYOUT}")
    return classes


def _is_around(folder: Path, workdir: Path | None) -> bool:
    """Whether a folder is that of the run that reads it, or around it."""
    return workdir is not None and folder.parent.resolve() / folder.name in (workdir, *workdir.parents)


def _leave_out(files: list[str], left_out: Counter[str]) -> None:
    for name in files:
        left_out[Path(readable(name)).suffix.lower() or "without an ending"] += 1


def find_pictures(
    folder: str | os.PathLike[str], left_out: Counter[str] | None = None, *, may_hold_run: bool = False
) -> Iterator[str]:
    """Finds the picture files in a folder and in the folders within it, in sorted order.

    Links are followed, and each folder is read once, so that links in a circle end; a link to a folder around this one is
    left alone. A file is taken for a picture by its
    ending or, without one, by its first bytes. A name with the ending of a picture counts, whatever it is. The figures
    of runs are no pictures: run folders are left out.

    Args:
        folder: where to begin.
        left_out: counts what is left out, by its ending.
        may_hold_run: whether pictures beside a run's own files in `folder` count; otherwise a folder with a run is left out whole.
    """
    left_out = Counter() if left_out is None else left_out
    waiting = [os.fspath(folder)]
    seen = {_identity(around) for around in Path(folder).resolve().parents}
    while waiting:
        current = waiting.pop()
        if _identity(current) in seen:
            continue
        seen.add(_identity(current))
        folders, files = _entries(current, left_out)
        if holds_run(files):
            left_out[RUNS] += 1
            if not may_hold_run or current != os.fspath(folder):
                continue
            own = (*RUN_FILES, "search.png")
            folders, files = ([name for name in names if name not in own] for names in (folders, files))
        waiting += [os.path.join(current, name) for name in reversed(folders)]
        for name in files:
            path, ending = os.path.join(current, name), os.path.splitext(name)[1].lower()
            if ending in SUFFIXES or (not ending and looks_like_image(path)):
                yield path
            else:
                left_out[readable(ending) or "without an ending"] += 1


def _identity(folder: str | os.PathLike[str]) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _has_classes(folder: Path) -> bool:
    """Whether a folder holds a folder that holds a picture."""
    ignored: Counter[str] = Counter()
    return any(next(find_pictures(folder / name, ignored), None) for name in _entries(folder, ignored)[0])


def _check_class_names(classes: dict[str, list[str]], folder: Path) -> None:
    """Raises RunError where there are fewer than two classes."""
    if len(classes) > 1:
        return
    (name,) = classes
    inside, _ = _entries(folder / name, Counter())
    hint = f"; or --data_dir={readable(folder / name)}, which holds folders" if len(inside) > 1 else ""
    raise RunError(
        f"{readable(folder)} has 1 class folder ({readable(name)}); allowed: two or more, in {LAYOUT}{hint}"
    )


def _check_names_differ(classes: Iterable[str], root: Path) -> None:
    """Raises RunError where two classes read alike, because their names are not UTF-8."""
    for name, count in Counter(map(readable, classes)).items():
        if count > 1:
            raise RunError(
                f"{readable(root)} has class folders whose names differ, but not in UTF-8: {name}; rename them"
            )


def _log_left_out(left_out: Counter[str], root: Path, strict: bool, log: Log) -> None:
    """Says what is left out, in one line. Raises RunError where `strict`."""
    if not left_out:
        return
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in left_out.most_common(SHOWN))
    more = len(left_out) - SHOWN
    kinds += f" and {more} other endings" if more > 0 else ""
    text = f"{left_out.total():,} files or folders in {readable(root)} are not used: {kinds}"
    if strict:
        raise RunError(f"{text}; remove them, or leave them out without --strict")
    log(f"left out: {text}")


def _cut(pairs: list[tuple[str, int]]) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Cuts the test images from (file, label) pairs: the others, and they. A class of one or two images keeps them."""
    labels = np.array([label for _, label in pairs])
    test = stratified_mask(labels, TEST_SHARE, _TEST_SEED) & (np.bincount(labels)[labels] > 2)
    others = [pair for pair, is_test in zip(pairs, test, strict=True) if not is_test]
    return others, [pair for pair, is_test in zip(pairs, test, strict=True) if is_test]


# ---- the pictures


def _read(
    root: Path, pairs: list[tuple[str, int]], size: int, resize: str, bad: list[tuple[str, str]], log: Log
) -> _Part:
    """Reads pictures in parallel.

    Args:
        root: where the files are.
        pairs: file and label.
        size, resize: see `read_image`.
        bad: receives (file, reason) of those that cannot be read.
        log: receives a line on the progress from time to time.

    Returns:
        Images, labels and files of those that can be read, in their order.
    """
    n = len(pairs)
    images, labels = np.empty((n, size, size, 3), np.uint8), np.empty(n, np.int64)
    names: list[str] = []
    open_formats()  # not in several threads at once

    def one(pair: tuple[str, int]) -> np.ndarray | str:
        try:
            return decode(root / pair[0], (size, size), resize)
        except Unreadable as error:
            return str(error)

    said = time.monotonic()
    pool = ThreadPoolExecutor(cpu_count())
    with without_warnings():
        try:
            for start in range(0, n, _BLOCK):
                block = pairs[start : start + _BLOCK]
                for pair, image in zip(block, pool.map(one, block), strict=True):
                    if isinstance(image, str):
                        bad.append((pair[0], image))
                        continue
                    images[len(names)], labels[len(names)] = image, pair[1]
                    names.append(pair[0])
                if time.monotonic() - said > PROGRESS_SECONDS:
                    said = time.monotonic()
                    log(f"read {start + len(block):,} of {n:,} pictures")
        finally:
            pool.shutdown(cancel_futures=True)
    return images[: len(names)], labels[: len(names)], names


def _check_bad(
    bad: list[tuple[str, str]], total: int, max_bad: float, recorded: bool, root: Path, log: Log
) -> None:
    """Says which pictures cannot be read. Raises RunError where they are too many, or `recorded`: of an earlier run."""
    if not bad:
        return
    named = ", ".join(f"{readable(root / file)} ({reason})" for file, reason in bad[:SHOWN])
    named += f" and {len(bad) - SHOWN:,} more" if len(bad) > SHOWN else ""
    text = f"{len(bad):,} of {total:,} pictures cannot be read as an image: {named}"
    if recorded:
        raise RunError(f"{text}; the run began with them: put them back, or begin another run")
    if len(bad) > max_bad * total:
        more = f", or leave out a larger share than {max_bad:g} with --max_bad" if max_bad else ""
        raise RunError(f"{text}; repair or remove them{more}")
    log(f"left out: {text}")


def _warn_if_dark(images: Iterable[np.ndarray], root: Path, log: Log) -> None:
    """Says so where all pictures are nearly black, as those of a camera of 12 bits are in files of 16."""
    brightest = max((int(part.max()) for part in images if part.size), default=255)
    if brightest <= _DARK:
        log(
            f"warning: the brightest value of all pictures in {readable(root)} is {brightest} of 255, so a network sees little"
            " of them; where files of 16 bits hold values of fewer bits, scale the values to 0-65535 first"
        )


def _check_classes(labels: np.ndarray, class_names: tuple[str, ...], root: Path) -> None:
    """Raises RunError where no training picture of a class can be read."""
    missing = [name for k, name in enumerate(class_names) if not (labels == k).any()]
    if missing:
        raise RunError(
            f"{readable(root)} has no picture to train on that can be read in class {', '.join(missing)}; put images into it,"
            " or remove it"
        )


# ---- the files of a run


def _recorded(rows: Sequence[Row], root: Path | None = None) -> _Found:
    """The files of an earlier run, as `_scan` and `_cut` found them: validation images that it split off are training images.

    root: files that are not in this folder are left out; their classes stay. None: all are there.
    """
    names = dict.fromkeys(name for _, name, _ in rows)  # the training images come first, class by class
    files: dict[str, dict[str, list[str]]] = {"train": {name: [] for name in names}}
    folders = [file.split(os.sep, 1)[0].casefold() for file, _, _ in rows]
    has_parts = "train" in (_PART_OF.get(folder) for folder in folders)
    for folder, (file, name, part) in zip(folders, rows, strict=True):
        if has_parts and folder not in _PART_OF:
            raise RunError(
                f"split.csv names {shown(file)}, which is in none of the folders of the others; correct it"
            )
        own = _PART_OF[folder] if has_parts else "test" if part == "test" else "train"
        if root is None or (root / file).exists():
            files.setdefault(own, {}).setdefault(name, []).append(file)
    # A run splits its validation images off; the order of all of them shows where they were.
    return _Found(
        {part: {k: _in_order(v) for k, v in classes.items()} for part, classes in files.items()}, False
    )


def _in_order(files: Iterable[str]) -> list[str]:
    """Sorted by the names of folders and files."""
    return sorted(files, key=lambda file: file.split(os.sep))


def is_cut(data: Dataset) -> bool:
    """Whether the test images are those that `load_folder` has cut from <class>/*."""
    files = (data.files or {}).get("test", ())
    return any(file.split(os.sep, 1)[0].casefold() not in _PART_OF for file in files)


def rows(data: Dataset) -> list[Row]:
    """(file, class, part) of each picture of a folder; empty for other data.

    Args:
        data: as a run split it: `validation` and `files` hold what the run holds out.
    """
    labels = {"train": data.train_labels, "test": data.test_labels}
    if data.validation is not None:
        labels["validation"] = data.validation[1]
    return [
        (file, data.class_names[label], part)
        for part in ("train", "validation", "test")
        if data.files and len(labels.get(part, ()))  # a cross-validation takes the test images away
        for file, label in zip(data.files[part], labels[part], strict=True)
    ]
