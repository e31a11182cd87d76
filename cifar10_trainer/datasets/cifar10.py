"""CIFAR-10: finds it in any of its common forms, and reads it.

Every form contains the same six batches. The md5 of a batch is verified before anything else reads the batch, so all
forms lead to equal arrays in the official order.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import struct
import sys
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..errors import ConfigError, RunError, cut, reason_of
from ..files import expanded, regular_file
from ..keras_state import keras_home
from .base import Dataset
from .download import PYTHON_URL, download, tfds_folder

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)

_BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
_ROWS = 10_000  # images per batch
_BATCH_BYTES = 31_100_000  # the largest file of a batch has 31,035,999
# of the unpacked archive, whose six batches are all but a few thousand of its bytes
_ARCHIVE_BYTES = 7 * _BATCH_BYTES
_RECORD_BYTES = 1 << 16  # of the largest record of TFDS; 32x32 pixels are 3,072 bytes
# A row of a .bin file is one label byte and 3,072 pixel bytes: the red, the green and the blue plane. The other files
# are pickles.
_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
# What to look for in a folder, the fastest to read first. Each is a form, or a folder that contains one. The second
# pattern matches the names that Keras 2 and Keras 3 give to their copies.
_PLACES = (
    "cifar-10-batches-bin",
    "cifar-10-batches-py*",
    "cifar-10-binary.tar.gz",
    "cifar-10-python.tar.gz",
    "downloads/manual",
    "cifar10",
    "3.*",
)
_AHEAD: dict[Path, Future[Dataset]] = {}  # what `read_ahead` has begun to read


# ---- finding the data


def load_cifar10(data_dir: str | os.PathLike[str] | None) -> Dataset:
    """Finds and reads CIFAR-10, or downloads it.

    Args:
        data_dir: see `datasets.load`.

    Returns:
        50,000 training and 10,000 test images, 32x32, in the official order.

    Raises:
        ConfigError: if the path does not exist.
        RunError: if the data is missing, damaged or unreadable.
    """
    given = _given(data_dir)
    name = "data_dir" if data_dir else "$CIFAR10_TRAINER_DATA"
    if given:
        path = expanded(given)
        with _one_line_errors(path):
            if not path.exists():
                raise ConfigError(
                    f"{name} is {path}, which does not exist; allowed: CIFAR-10, archive or folder"
                )
            form = next(_forms(path), None)
        if form is None:
            raise RunError(
                f"{path} holds no CIFAR-10; allowed: cifar-10-python.tar.gz or cifar-10-binary.tar.gz, one of them extracted,"
                f" or cifar10/ as TFDS prepares it. Pictures of your own need --dataset=folder; for CIFAR-10, download {PYTHON_URL},"
                f" or correct {name}"
            )
        return _read(form)
    for cache in _caches():
        forms: list[Path] = []
        with contextlib.suppress(OSError):  # a cache without read permission is skipped
            forms = list(_forms(cache))
        for form in forms:
            try:
                return _read(form)
            except RunError as error:
                print(f"cifar10: skipping a cached copy: {error}", file=sys.stderr)
    return _read(download())


def read_ahead(data_dir: str | os.PathLike[str] | None) -> None:
    """Begins to read CIFAR-10 in a thread, beside a long import. `load_cifar10` then waits for that, and for its errors.

    What needs TensorFlow or a download is left to `load_cifar10`.
    """
    given = _given(data_dir)
    places = [expanded(given)] if given else _caches()
    with contextlib.suppress(OSError):
        form = next((form for place in places for form in _forms(place)), None)
        if form is None or (form / "dataset_info.json").exists():
            return
        pool = ThreadPoolExecutor(1)
        _AHEAD[form] = pool.submit(_read_now, form)
        pool.shutdown(wait=False)


def _given(data_dir: str | os.PathLike[str] | None) -> str | os.PathLike[str] | None:
    """What names the place of the images; None: nothing does."""
    return data_dir or os.environ.get("CIFAR10_TRAINER_DATA")


def _caches() -> list[Path]:
    """Where copies of other libraries may be."""
    return [tfds_folder(), keras_home() / "datasets", Path("data")]


def _forms(path: Path) -> Iterator[Path]:
    """Yields archives and folders at or below `path` that look like CIFAR-10 and that `_read` can try."""
    if path.is_file():
        yield path
    elif path.is_dir():
        names = set(os.listdir(path))  # unlike glob, it raises if there is no read permission
        if names & {"dataset_info.json", *_MD5}:
            yield path
        else:
            for pattern in _PLACES:
                for place in sorted(path.glob(pattern), reverse=True):
                    yield from _forms(place)


# ---- reading the data


def _read(form: Path) -> Dataset:
    """Reads an archive, a folder of batches, or a TFDS version directory. Raises RunError if it is damaged."""
    ahead = _AHEAD.pop(form, None)
    return _read_now(form) if ahead is None else ahead.result()


def _read_now(form: Path) -> Dataset:
    with _one_line_errors(form):
        if form.is_file():
            members = _archive_members(form)
        elif (form / "dataset_info.json").exists():
            members = _tfds_members(form)
        else:
            # A generator, so that the next file is read while the last one is verified.
            members = (
                (name, regular_file(form / name, _BATCH_BYTES).read_bytes())
                for name in _MD5
                if (form / name).exists()
            )
        train, test = _assemble(form, members)
    return Dataset("cifar10", *train, *test, CIFAR10_CLASSES, str(form))


def _archive_members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yields (name, content) of the batches in a tar archive, in one pass and without writing a file."""
    with open(regular_file(path), "rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream: Any = _Bounded(io.BytesIO(_unpacked(raw)) if packed else raw)
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                name = os.path.basename(member.name)
                if name not in _MD5:
                    continue
                content = (
                    tar.extractfile(member) if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) else None
                )
                if content is None:
                    raise tarfile.TarError(f"its {cut(name)} is a link, or no file")
                yield name, content.read()


def _unpacked(file: Any) -> bytes:
    """The content of a gzip file, up to the size of an honest archive.

    It is unpacked in one call, because `read_ahead` does this beside an import: after each call, Python would wait 5 ms for
    the interpreter lock.
    """
    size = os.fstat(file.fileno()).st_size
    packed, content = file.read(min(size, _ARCHIVE_BYTES)), b""  # Python allocates what it is asked for
    while packed:
        member = zlib.decompressobj(wbits=31)
        found = member.decompress(packed, _ARCHIVE_BYTES - len(content) + 1)
        content = content + found if content else found
        if len(content) > _ARCHIVE_BYTES:
            raise tarfile.TarError(f"it holds more than {_ARCHIVE_BYTES:,} bytes")
        if not member.eof:
            raise EOFError("it ends too soon")
        packed = member.unused_data.lstrip(b"\0")  # some tools pad a file
    return content


class _Bounded:
    """A file whose reads together are no longer than an honest archive, so that a small archive cannot fill the memory.

    tarfile reads a header of any size at once, and skips a member of any size by reading it.
    """

    def __init__(self, file: Any):
        self._file = file
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        if size > _BATCH_BYTES:
            raise tarfile.TarError(f"a part of it has {size:,} bytes; allowed: up to {_BATCH_BYTES:,}")
        return self._file.read(size)

    def seek(self, position: int) -> int:
        if position > _ARCHIVE_BYTES:
            raise tarfile.TarError(f"it holds more than {_ARCHIVE_BYTES:,} bytes")
        return self._file.seek(position)


def _tfds_members(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yields (name, content) of the binary batches that TFDS prepared `folder` from.

    TFDS stores the images in shuffled order, but their ids ("train_16399") give their place in the official order.
    They are read without tf.data, which would initialize TensorFlow's devices before a caller can configure them.
    """
    import tensorflow as tf
    import tensorflow_datasets as tfds
    from PIL import Image

    rows = np.zeros((len(_BATCHES) * _ROWS, 1 + 3072), np.uint8)
    for file in folder.glob("*.json"):
        regular_file(file, _BATCH_BYTES)
    try:
        splits = tfds.builder_from_directory(folder).info.splits
        for split_name, first in (("train", 0), ("test", 5 * _ROWS)):
            for file in splits[split_name].filepaths:
                for record in _tfrecords(file):
                    feature = tf.train.Example.FromString(record).features.feature
                    _, _, index = feature["id"].bytes_list.value[0].partition(b"_")
                    row = rows[first + int(index)]
                    row[0] = feature["label"].int64_list.value[0]
                    png = Image.open(io.BytesIO(feature["image"].bytes_list.value[0]), formats=("PNG",))
                    if png.size != (32, 32):
                        raise ValueError(f"an image has {png.size} pixels; allowed: (32, 32)")
                    row[1:] = np.asarray(png).transpose(2, 0, 1).ravel()
    except PermissionError:
        raise
    except Exception as error:  # TFDS, protobuf and Pillow raise errors of different classes
        raise _damaged(folder, f"it is not CIFAR-10 as TFDS prepares it ({reason_of(error)})") from error
    for i, name in enumerate(_BATCHES):
        yield f"{name}.bin", rows[i * _ROWS : (i + 1) * _ROWS].tobytes()


def _tfrecords(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """Yields the records of a TFRecord file; the md5 of the batches replaces its checksums."""
    with open(regular_file(path), "rb") as file:
        while header := file.read(12):  # length and its checksum, then the content and its checksum
            (length,) = struct.unpack("<Q4x", header)
            if length > _RECORD_BYTES:
                raise ValueError(f"a record has {length:,} bytes; allowed: up to {_RECORD_BYTES:,}")
            yield file.read(length)
            file.read(4)


def _assemble(form: Path, members: Iterable[tuple[str, bytes]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Verifies the batches, and returns [(training images, labels), (test images, labels)] in the official order.

    Images are uint8 [n, 32, 32, 3], labels int64 [n]. Training and test arrays share no memory, so one pair can be
    freed without the other. Raises RunError if a batch is missing or has the wrong md5.
    """
    n = _ROWS * (len(_BATCHES) - 1)
    train, test = ((np.empty((m, 32, 32, 3), np.uint8), np.empty(m, np.int64)) for m in (n, _ROWS))
    verified = set()
    with ThreadPoolExecutor(1) as pool:
        # Reading and hashing release the interpreter lock, so a batch is hashed while the next one is read. The thread
        # allocates no large arrays, because glibc would not return their memory.
        hashed = ((name, content, pool.submit(_md5_of, content)) for name, content in members)
        following = next(hashed, None)
        while following:
            (name, content, md5), following = following, next(hashed, None)
            if md5.result() != _MD5[name]:
                raise _damaged(form, f"the md5 of its {name} is {md5.result()}, not {_MD5[name]}")
            batch = name.removesuffix(".bin")
            first = _BATCHES.index(batch) * _ROWS
            images, labels = (x[first : first + _ROWS] for x in train) if first < n else test
            labels[:], planes = _parse(name, content)
            for channel in range(3):  # several times faster than one transpose
                images[..., channel] = planes[:, channel]
            verified.add(batch)
    missing = [batch for batch in _BATCHES if batch not in verified]
    if len(missing) == len(_BATCHES):
        raise _damaged(form, "it holds no batch of CIFAR-10")
    if missing:
        raise _damaged(form, f"it lacks {', '.join(missing)}")
    return [train, test]


def _md5_of(content: bytes) -> str:
    """Returns the md5 as hexadecimal digits."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _parse(name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Returns labels [n] and pixels uint8 [n, 3, 32, 32] of a verified batch."""
    if name.endswith(".bin"):
        rows = np.frombuffer(content, np.uint8).reshape(-1, 1 + 3072)
        return rows[:, 0], rows[:, 1:].reshape(-1, 3, 32, 32)
    batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    return np.array(batch[b"labels"]), batch[b"data"].reshape(-1, 3, 32, 32)


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles NumPy arrays and plain containers only: a second defence, after the checksum."""

    allowed: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],  # NumPy 2 moved it
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Returns an allowed class. Raises UnpicklingError for any other."""
        try:
            return self.allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a batch of images") from None


def _damaged(path: Path, what: str) -> RunError:
    """Returns the error for data that is not as published."""
    return RunError(
        f"{path} cannot be used: {what}; delete it and download it again from {PYTHON_URL},"
        " or name another copy with --data_dir"
    )


@contextlib.contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    """Replaces the errors that reading `path` can raise by a RunError that says what to do."""
    try:
        yield
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        if isinstance(error, OSError) and error.strerror:
            raise RunError(
                f"cannot read {error.filename or path}: {error.strerror};"
                " correct that, or name another copy with --data_dir"
            ) from error
        raise _damaged(path, f"it is damaged, or not an archive ({reason_of(error)})") from error
