"""Where images come from: verified uint8 arrays, their labels, and the split into training and validation.

CIFAR-10 is read from whatever form it is found in. Each form comes down to the same six batches, each checked
against its md5 before anything else looks at it, so every form gives equal arrays in the official order.

Nothing here runs a TensorFlow operation: strategies and logical devices can still be set up after `load`.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import os
import pickle
import struct
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .config import DATASETS, SPLITS
from .errors import ConfigError, RunError, unknown

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
PYTHON_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
BINARY_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
BINARY_SIZE = 170_052_171
BINARY_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"

_BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
_ROWS = 10_000  # images a batch
# A .bin file is rows of one label byte and 3,072 pixel bytes: red, green, blue plane. The others are pickles.
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
# What to look for in a folder, quickest to read first; each may be a form itself or a folder with one inside.
# The second pattern takes in the names that Keras 2 and 3 give to their copies.
_PLACES = (
    "cifar-10-batches-bin",
    "cifar-10-batches-py*",
    "cifar-10-binary.tar.gz",
    "cifar-10-python.tar.gz",
    "downloads/manual",
    "cifar10",
    "3.*",
)
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_FOLDER_LAYOUT = "a folder with train/<class>/* and, if you like, val/<class>/* and test/<class>/*"
_DIGITS_TEST_SEED = 8  # fixes which digits are test images, whatever a run's own seed
_ATTEMPTS = 5  # in a row without a byte received
_PAUSE = 1.0  # seconds before the second attempt; it doubles with each
_TIMEOUT = 60.0  # seconds without a byte from the server


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
        return _load_folder(data_dir, image_size)
    if image_size != 32:
        raise ConfigError(f"image_size is {image_size}; allowed with the dataset {name}: 32")
    return _load_cifar10(data_dir) if name == "cifar10" else _load_digits(data_dir)


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
        held_out = _stratified(labels, fraction, seed, fold)
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


def read_image(path: str | os.PathLike[str], size: tuple[int, int]) -> np.ndarray:
    """The image file at `path` as uint8 [height, width, 3], the whole of it resized to `size`.

    Takes PNG, JPEG, WebP, GIF and BMP: grayscale, 16 bit, palette, transparent (shown on white), rotated by
    EXIF; of an animation the first frame. `size` is (height, width) in pixels. Raises RunError naming the
    file when it cannot be read as one of these.
    """
    from PIL import Image, ImageOps

    height, width = size
    try:
        with Image.open(path, formats=_IMAGE_FORMATS) as opened:
            # A large JPEG is decoded at a half, a quarter or an eighth: faster, and it is made small anyway.
            opened.draft(None, (2 * width, 2 * height))
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bit a pixel; Pillow's own conversion would clip at 255
                image = Image.fromarray(np.rint(np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
            if image.mode != "RGB" or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            return np.array(image.resize((width, height), Image.Resampling.BILINEAR))
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        raise RunError(
            f"{path} cannot be read as an image ({_reason(error)}); allowed: PNG, JPEG, WebP, GIF, BMP;"
            " repair or remove it"
        ) from error


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


@contextlib.contextmanager
def hold(folder: Path, busy: Callable[[], None]) -> Iterator[None]:
    """Makes `folder`, and keeps other processes out; where one is in, calls `busy` and then waits for its end.

    The lock is the system's: it ends with the process, however that ends, and leaves no file. Folders that were made
    here and are still empty at the end are removed. Raises OSError where the folder cannot be made.
    """
    made, descriptor = _take(folder, busy)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            for path in made:
                path.rmdir()
        if descriptor is not None:
            os.close(descriptor)  # last: whoever waits must find the folders gone or staying


def _take(folder: Path, busy: Callable[[], None]) -> tuple[list[Path], int | None]:
    """The folders made, the innermost first, and the descriptor that locks `folder`; None where there are no locks."""
    made: list[Path] = []
    while True:
        made += [path for path in _make(folder) if path not in made]
        descriptor = None
        try:
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                busy()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(descriptor), folder.stat()):
                return made, descriptor
        except FileNotFoundError:
            pass  # who held it left it empty, and took it away: again
        except (ImportError, OSError):  # no locks on Windows and some network file systems
            return made, descriptor
        except BaseException:  # `busy` will not wait, or the user
            if descriptor is not None:
                os.close(descriptor)
            raise
        if descriptor is not None:
            os.close(descriptor)


def _make(folder: Path) -> list[Path]:
    """Makes `folder`. Gives what was not there before, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _reason(error: BaseException) -> str:
    """The first line of what `error` says."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.partition("\n")[0].rstrip(":")


def _stratified(labels: np.ndarray, fraction: float, seed: int, fold: int = 0) -> np.ndarray:
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


# ---- CIFAR-10: finding it


def _load_cifar10(data_dir: str | os.PathLike[str] | None) -> Dataset:
    given = data_dir or os.environ.get("CIFAR10_TRAINER_DATA")
    name = "data_dir" if data_dir else "$CIFAR10_TRAINER_DATA"
    if given:
        path = Path(given).expanduser()
        with _one_line_errors(path):
            if not path.exists():
                raise ConfigError(
                    f"{name} is {path}, which does not exist; allowed: CIFAR-10, archive or folder"
                )
            form = next(_forms(path), None)
        if form is None:
            raise RunError(
                f"{path} holds no CIFAR-10; allowed: cifar-10-python.tar.gz or cifar-10-binary.tar.gz,"
                " either of them extracted, or cifar10/ as TFDS prepares it;"
                f" download {PYTHON_URL} into it, or correct {name}"
            )
        return _read(form)
    for cache in (_tfds_folder(), _keras_folder(), Path("data")):
        forms: list[Path] = []
        with contextlib.suppress(OSError):  # a cache that may not be read is none
            forms = list(_forms(cache))
        for form in forms:
            try:
                return _read(form)
            except RunError as error:
                print(f"cifar10: passing over a cached copy: {error}", file=sys.stderr)
    return _read(_download())


def _tfds_folder() -> Path:
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def _keras_folder() -> Path:
    return Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser() / "datasets"


def _forms(path: Path) -> Iterator[Path]:
    """What `path` is or holds that looks like CIFAR-10: archives and folders that `_read` takes."""
    if path.is_file():
        yield path
    elif path.is_dir():
        names = set(os.listdir(path))  # unlike glob, it raises where the folder may not be read
        if names & {"dataset_info.json", *_MD5}:
            yield path
        else:
            for pattern in _PLACES:
                for place in sorted(path.glob(pattern), reverse=True):
                    yield from _forms(place)


# ---- CIFAR-10: reading it


def _read(form: Path) -> Dataset:
    """The dataset in one form: an archive, a folder of batches, or a TFDS version directory."""
    with _one_line_errors(form):
        if form.is_file():
            members = _archive_members(form)
        elif (form / "dataset_info.json").exists():
            members = _tfds_members(form)
        else:
            # Lazily, so that the next file is read while the last is verified.
            members = ((name, (form / name).read_bytes()) for name in _MD5 if (form / name).exists())
        train, test = _assemble(form, members)
    return Dataset("cifar10", *train, *test, CIFAR10_CLASSES, str(form))


def _archive_members(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the batches in a tar archive, in one pass and without writing anything."""
    with tarfile.open(path) as tar:
        for member in tar:
            name = os.path.basename(member.name)
            content = tar.extractfile(member) if name in _MD5 else None
            if content is not None:
                yield name, content.read()


def _tfds_members(folder: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the binary batches that TFDS prepared `folder` from.

    TFDS stores the images shuffled, but their ids ("train_16399") count them in the official order. They are
    read without tf.data, which would start TensorFlow's devices before anyone could configure them.
    """
    import tensorflow as tf
    import tensorflow_datasets as tfds
    from PIL import Image

    rows = np.zeros((len(_BATCHES) * _ROWS, 1 + 3072), np.uint8)
    try:
        splits = tfds.builder_from_directory(folder).info.splits
        for split_name, first in (("train", 0), ("test", 5 * _ROWS)):
            for file in splits[split_name].filepaths:
                for record in _tfrecords(file):
                    feature = tf.train.Example.FromString(record).features.feature
                    _, _, index = feature["id"].bytes_list.value[0].partition(b"_")
                    row = rows[first + int(index)]
                    row[0] = feature["label"].int64_list.value[0]
                    png = io.BytesIO(feature["image"].bytes_list.value[0])
                    row[1:] = np.asarray(Image.open(png, formats=("PNG",))).transpose(2, 0, 1).ravel()
    except PermissionError:
        raise
    except Exception as error:  # TFDS, protobuf and Pillow have an error of their own each
        raise _damaged(folder, f"it is not CIFAR-10 as TFDS prepares it ({_reason(error)})") from error
    for i, name in enumerate(_BATCHES):
        yield f"{name}.bin", rows[i * _ROWS : (i + 1) * _ROWS].tobytes()


def _tfrecords(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """The records of a TFRecord file: length, checksum, content, checksum. (The batches' md5 covers them.)"""
    with open(path, "rb") as file:
        while header := file.read(12):
            (length,) = struct.unpack("<Q4x", header)
            yield file.read(length)
            file.read(4)


def _assemble(form: Path, members: Iterable[tuple[str, bytes]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images uint8 [n, 32, 32, 3] and labels int64 [n], in order, of the training batches and of the test batch.

    Each batch is verified first. Training and test arrays share no memory: either can go alone.
    """
    n = _ROWS * (len(_BATCHES) - 1)
    train, test = ((np.empty((m, 32, 32, 3), np.uint8), np.empty(m, np.int64)) for m in (n, _ROWS))
    found = set()
    with ThreadPoolExecutor(1) as pool:
        # Reading and hashing release the interpreter lock: a batch is hashed while the next is read. The thread
        # allocates nothing large, which glibc would keep.
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
            found.add(batch)
    missing = [batch for batch in _BATCHES if batch not in found]
    if len(missing) == len(_BATCHES):
        raise _damaged(form, "it holds no batch of CIFAR-10")
    if missing:
        raise _damaged(form, f"it lacks {', '.join(missing)}")
    return [train, test]


def _md5_of(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _parse(name: str, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Labels [n] and pixels uint8 [n, 3, 32, 32] of a verified batch."""
    if name.endswith(".bin"):
        rows = np.frombuffer(content, np.uint8).reshape(-1, 1 + 3072)
        return rows[:, 0], rows[:, 1:].reshape(-1, 3, 32, 32)
    batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    return np.array(batch[b"labels"]), batch[b"data"].reshape(-1, 3, 32, 32)


class _ArrayUnpickler(pickle.Unpickler):
    """Builds NumPy arrays and plain containers only: a second bolt behind the checksum."""

    allowed: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],  # NumPy 2 moved it
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a batch of images") from None


def _damaged(path: Path, what: str) -> RunError:
    return RunError(
        f"{path} cannot be used: {what}; delete it and download it again from {PYTHON_URL},"
        " or name another copy with --data_dir"
    )


@contextlib.contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    """Turns what reading `path` can raise into a RunError that says what to do."""
    try:
        yield
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        if isinstance(error, OSError) and error.strerror:
            raise RunError(
                f"cannot read {error.filename or path}: {error.strerror};"
                " correct that, or name another copy with --data_dir"
            ) from error
        raise _damaged(path, f"it is damaged, or no archive ({_reason(error)})") from error


# ---- CIFAR-10: downloading it


def _download() -> Path:
    """Downloads the binary archive to where TFDS looks for it, and gives its path.

    It is the download of TFDS: the same address, the same sha256, and `tfds.load("cifar10")` takes it from
    <data_dir>/downloads/manual/. But TFDS's downloader starts again from nothing after a broken connection,
    and this server has been slow enough for that to matter. TFDS's preparation is left out: the archive
    itself reads faster than what it would be turned into.
    """
    folder = _tfds_folder() / "downloads" / "manual"
    archive = folder / "cifar-10-binary.tar.gz"
    part = folder / "cifar-10-binary.tar.gz.part"
    try:
        with hold(folder, lambda: print("cifar10: waiting for another process", file=sys.stderr)):
            if (
                archive.exists()
            ):  # another process has just brought it; or it is damaged, as reading it will tell
                return archive
            print(
                f"cifar10: not on this machine; downloading {BINARY_SIZE / 1e6:.0f} MB from {BINARY_URL}"
                f" to {folder}. The server can be slow. If you stop, the next run goes on from there;"
                " a copy from elsewhere is named with --data_dir.",
                file=sys.stderr,
            )
            _fetch(part)
            received = hashlib.sha256(part.read_bytes()).hexdigest()
            if received != BINARY_SHA256:
                part.unlink()
                raise RunError(
                    f"the download from {BINARY_URL} has the sha256 {received}, not {BINARY_SHA256}, and was"
                    " deleted; run again, or name another copy with --data_dir"
                )
            os.replace(part, archive)
    except OSError as error:
        raise RunError(
            f"cannot write {error.filename or folder}: {_reason(error)};"
            " correct that, or set TFDS_DATA_DIR to a folder with 200 MB to spare"
        ) from error
    return archive


def _fetch(part: Path) -> None:
    """Completes `part` from the server, over as many connections as it takes."""
    failures = 0
    while (have := part.stat().st_size if part.exists() else 0) < BINARY_SIZE:
        reason = "the connection closed early"
        try:
            _receive(part, have)
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"the server answered {error.code} {error.reason}"
            if 400 <= error.code < 500 and error.code not in (408, 429):
                failures = _ATTEMPTS
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            cause = getattr(error, "reason", error)  # urllib wraps what the socket raised
            reason = _reason(cause) if isinstance(cause, Exception) else str(cause)
        now = part.stat().st_size if part.exists() else 0
        if now >= BINARY_SIZE:
            break
        failures = 0 if now > have else failures + 1
        if failures >= _ATTEMPTS:
            raise RunError(
                f"cannot download {BINARY_URL}: {reason}; run again to go on from {now / 1e6:.1f} MB,"
                f" or download {PYTHON_URL} elsewhere and name it with --data_dir"
            )
        pause = _PAUSE * 2 ** max(failures - 1, 0)
        print(f"cifar10: {reason}; trying again in {pause:.0f} s", file=sys.stderr)
        time.sleep(pause)


def _receive(part: Path, have: int) -> None:
    """One request for the bytes from `have` on, appended to `part`; or from the start, if need be."""
    request = urllib.request.Request(BINARY_URL, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
        start = have if response.status == 206 else 0  # partial content; otherwise the server sends it all
        length = response.headers.get("Content-Length")
        if length is not None and start + int(length) != BINARY_SIZE:
            raise RunError(
                f"{BINARY_URL} gives {start + int(length):,} bytes, not {BINARY_SIZE:,}: perhaps the page of"
                " a proxy; check the network, or name another copy with --data_dir"
            )
        progress = _progress(start)
        with open(part, "ab" if start else "wb") as file:
            while file.tell() < BINARY_SIZE and (chunk := response.read1(1 << 16)):
                file.write(chunk)
                progress(file.tell())


def _progress(start: int) -> Callable[[int], None]:
    """Shows megabytes, rate and time left: on a terminal in one line, otherwise a line each half minute."""
    terminal = sys.stderr.isatty()
    interval = 0.2 if terminal else 30.0
    began = time.monotonic()
    shown = began

    def show(done: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < interval and done < BINARY_SIZE:
            return
        shown = now
        rate = (done - start) / max(now - began, 1e-3)
        left = (BINARY_SIZE - done) / max(rate, 1.0)
        text = (
            f"cifar10: {done / 1e6:.1f} of {BINARY_SIZE / 1e6:.1f} MB, {rate / 1e6:.2f} MB/s,"
            f" {left // 60:.0f} min {left % 60:.0f} s left"
        )
        end = "" if terminal and done < BINARY_SIZE else "\n"
        print(f"\r{text:<70}" if terminal else text, end=end, file=sys.stderr, flush=True)

    return show


# ---- The other datasets


def _load_digits(data_dir: str | os.PathLike[str] | None) -> Dataset:
    """scikit-learn's handwritten digits, enlarged from 8x8; always the same stratified fifth tests."""
    if data_dir:
        raise ConfigError(f"data_dir is {data_dir}; allowed with the dataset digits: none, it is built in")
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    large = [np.array(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)) for image in grey]
    images = np.repeat(np.stack(large)[..., None], 3, axis=-1)
    labels = digits.target.astype(np.int64)
    test = _stratified(labels, 0.2, _DIGITS_TEST_SEED)
    parts = images[~test], labels[~test], images[test], labels[test]
    return Dataset("digits", *parts, tuple("0123456789"), "scikit-learn")


def _load_folder(data_dir: str | os.PathLike[str] | None, size: int) -> Dataset:
    if not data_dir:
        raise ConfigError(f"data_dir is not set; allowed with the dataset folder: {_FOLDER_LAYOUT}")
    root = Path(data_dir).expanduser()
    try:
        if not root.exists():
            raise ConfigError(f"data_dir is {root}, which does not exist; allowed: {_FOLDER_LAYOUT}")
        if not (root / "train").is_dir():
            raise RunError(f"{root} has no folder train/; allowed: {_FOLDER_LAYOUT}")
        # List and check everything before reading the first image.
        parts = [part for part in ("train", "val", "test") if (root / part).exists()]
        files = {part: _list_images(root / part) for part in parts}
    except OSError as error:
        raise RunError(f"cannot read {error.filename or root}: {_reason(error)}; correct that") from error
    class_names = tuple(files["train"])
    if len(class_names) < 2:
        raise RunError(
            f"{root / 'train'} has {len(class_names)} class folder ({', '.join(class_names) or 'none'});"
            f" at least two are needed: {_FOLDER_LAYOUT}"
        )
    for part, classes in files.items():
        strangers = sorted(set(classes) - set(class_names))
        if strangers:
            raise ConfigError(
                f"{root / part} has the class {', '.join(strangers)}, which train/ lacks;"
                f" allowed: {', '.join(class_names)}"
            )

    def read(classes: dict[str, list[Path]]) -> tuple[np.ndarray, np.ndarray]:
        paths = [path for name in classes for path in classes[name]]
        labels = [class_names.index(name) for name in classes for _ in classes[name]]
        images = np.empty((len(paths), size, size, 3), np.uint8)
        for i, image in enumerate(pool.map(lambda path: read_image(path, (size, size)), paths)):
            images[i] = image
        return images, np.array(labels, np.int64)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        train = read(files["train"])
        validation = read(files["val"]) if "val" in files else None
        test = read(files.get("test", {}))
    return Dataset("folder", *train, *test, class_names, str(root), validation)


def _list_images(folder: Path) -> dict[str, list[Path]]:
    """{class name: its files}, both sorted, hidden ones left out."""
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
