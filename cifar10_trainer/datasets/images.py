"""Reads image files of the common formats as uint8 pixels."""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ..config import RESIZES
from ..errors import RunError, reason_of, unknown
from ..files import regular_file

if TYPE_CHECKING:
    from PIL import Image

# The endings of picture files, and the formats that are opened, whatever a file is called.
SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif", ".heic",
    ".heif", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
ALLOWED = "PNG, JPEG, WebP, GIF, BMP, TIFF, PPM, AVIF, and HEIC with the package pillow-heif"
_PLUGINS = {  # of Pillow, by the format: it imports them late, and some builds lack some
    "PNG": "Png",
    "JPEG": "Jpeg",
    "MPO": "Mpo",
    "WEBP": "WebP",
    "GIF": "Gif",
    "BMP": "Bmp",
    "DIB": "Bmp",
    "TIFF": "Tiff",
    "PPM": "Ppm",
    "AVIF": "Avif",
}
_NEEDS = {  # format -> the package that reads it, where Pillow alone does not
    "HEIF": "pillow-heif",
    "AVIF": "pillow-avif-plugin, or a newer Pillow",
}
_STARTS = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*")
MAX_PIXELS = 178_000_000  # of one picture; at 178,956,970 Pillow refuses it by itself
MAX_BYTES = 2**30  # of one file
LARGE = 16_000_000  # pixels to decode; such pictures are decoded one at a time, so that threads do not add up
# System errors that are of the machine and not of a file: too many files are open, no memory, a lost network folder.
PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)
_large = threading.Lock()

_ORIENTATION = 0x0112  # EXIF
_BITS = 258  # of TIFF: those of each sample
_PHOTOMETRIC = 262  # of TIFF; 0: white is zero
# EXIF's orientation -> the method of `Image.transpose`, by name, that shows the picture upright.
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


class Unreadable(Exception):
    """Why a file cannot be read, in words for people."""


def read_image(path: str | os.PathLike[str], size: tuple[int, int], resize: str = "squash") -> np.ndarray:
    """Reads an image file, and resizes it.

    Args:
        path: a PNG, JPEG, WebP, GIF, BMP, TIFF, PPM or AVIF file, or HEIC where the package pillow-heif is installed. It
            may be grey, with 16 bits or floats (0-1 or 0-255), CMYK, with a palette, transparent (white shows through),
            rotated by EXIF, or an animation (the first frame counts). Of 16-bit colours the upper 8 bits count.
        size: (height, width) in pixels.
        resize: "squash" resizes the whole image to `size`, "crop" its largest part in the middle with the proportions of
            `size`; "pad" fits the whole image into the middle of `size`, on black. All of them smooth.

    Returns:
        uint8 [height, width, 3], in RGB.

    Raises:
        ConfigError: if `resize` is unknown.
        RunError: if the file is not such an image, or has over 178 million pixels.
    """
    if resize not in RESIZES:
        raise unknown("resize", resize, RESIZES)
    try:
        return decode(path, size, resize)
    except Unreadable as error:
        raise RunError(
            f"{readable(path)} cannot be read as an image ({error}); allowed: {ALLOWED}; repair or remove it"
        ) from error


def decode(path: str | os.PathLike[str], size: tuple[int, int], resize: str) -> np.ndarray:
    """As `read_image`, but raises Unreadable with the reason alone."""
    from PIL import Image, UnidentifiedImageError

    formats = open_formats()
    try:
        with _open_file(path) as file, Image.open(file, formats=formats) as image:
            return _pixels(image, *size, resize)
    except Unreadable:
        raise
    except UnidentifiedImageError as error:
        reason = _missing_reader(path, formats) or "no format that can be read, or damaged"
        raise Unreadable(reason) from error
    except MemoryError as error:
        raise RunError(
            f"out of memory while {readable(path)} was read; use a smaller --image_size"
        ) from error
    except Exception as error:  # Pillow's decoders raise errors of many classes for damaged files
        if isinstance(error, OSError) and error.errno in PASSING:
            raise RunError(f"cannot read {readable(path)}: {reason_of(error)}; try again") from error
        raise Unreadable(reason_of(error)[:200]) from error


def readable(path: str | os.PathLike[str]) -> str:
    """A file name for people: what is no UTF-8 in it becomes "?", and control characters, too."""
    text = os.fsencode(path).decode("utf-8", "replace").replace("\ufffd", "?")
    return "".join(c if c.isprintable() else "?" for c in text)


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Within it, Pillow does not warn of damaged tags and the like, nor of large pictures, which are allowed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


@functools.cache
def open_formats() -> tuple[str, ...]:
    """The formats that Pillow can open here, of those that we read."""
    from PIL import Image

    Image.preinit()
    for plugin in set(_PLUGINS.values()):
        with contextlib.suppress(ImportError):
            importlib.import_module(f"PIL.{plugin}ImagePlugin")
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_avif")
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    return tuple(name for name in (*_PLUGINS, "HEIF") if name in Image.OPEN and _works(name))


def _works(name: str) -> bool:
    """Whether Pillow was built with what the format needs."""
    from PIL import features

    return name != "AVIF" or "pillow_avif" in sys.modules or bool(features.check("avif"))


def _missing_reader(path: str | os.PathLike[str], formats: tuple[str, ...]) -> str | None:
    """What to install for a file whose format has no reader here."""
    with _open_file(path) as file:
        start = file.read(12)
    if start[4:8] != b"ftyp":
        return None
    name = "AVIF" if start[8:12] in (b"avif", b"avis") else "HEIF"
    return None if name in formats else f"{name} needs: pip install {_NEEDS[name]}"


@contextlib.contextmanager
def _open_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a regular file. Anything else, as a pipe or a device, is refused before it can block."""
    regular_file(path, MAX_BYTES)
    # Without blocking, because the file may be replaced by a pipe just now.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as file:
        yield file


def looks_like_image(path: str | os.PathLike[str]) -> bool:
    """Whether a file, which has no ending, starts as a picture does."""
    try:
        with _open_file(path) as file:
            start = file.read(12)
    except OSError:
        return False
    return start.startswith(_STARTS) or start[4:8] == b"ftyp"


# ---- from a file to pixels


def _pixels(image: Image.Image, height: int, width: int, resize: str) -> np.ndarray:
    """uint8 [height, width, 3] of an image that is open but not decoded yet."""
    from PIL import Image

    if image.width * image.height > MAX_PIXELS:
        raise Unreadable(
            f"it has {image.width} x {image.height} pixels; allowed: at most {MAX_PIXELS:,} in total"
        )
    if image.format in ("JPEG", "MPO"):
        _draft(image, height, width, resize)
    large = image.width * image.height > LARGE
    with _large if large else contextlib.nullcontext():
        image.load()
        # Only now: TIFF's reader turns the picture itself, and then has no orientation any more.
        turn = _TURNS.get(_orientation(image))
        on_its_side = turn in ("TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
        box = (height, width) if on_its_side else (width, height)
        small = _resized(_rgb(image), *box, resize)
    if turn is not None:  # the small image rather than the large one
        small = small.transpose(Image.Transpose[turn])
    if small.size != (width, height):  # pad
        canvas = Image.new("RGB", (width, height))
        canvas.paste(small, ((width - small.width) // 2, (height - small.height) // 2))
        small = canvas
    return np.array(small)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where it is missing or damaged."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a picture whose EXIF is damaged is a picture
        return 1


def _draft(image: Any, height: int, width: int, resize: str) -> None:
    """Sets a JPEG to be decoded at a half, a quarter or an eighth of its size, which is faster, where that is enough."""
    if _orientation(image) > 4:
        height, width = width, height
    scales = width / image.width, height / image.height
    if resize != "squash":
        scales = (max(scales) if resize == "crop" else min(scales),) * 2
    wanted = (round(2 * image.width * scales[0]), round(2 * image.height * scales[1]))
    image.draft(None, (max(1, wanted[0]), max(1, wanted[1])))


def _rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, transparent parts on white."""
    from PIL import Image

    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=rgba)
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """uint8 [height, width] of an image of 16 bits a pixel, or of floats; Pillow would clip at 255."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    allowed = (0, 255) if image.mode == "F" else (0, 65535)
    if not allowed[0] <= low <= high <= allowed[1]:  # NaN, too
        raise Unreadable(
            f"it has pixels from {low:.6g} to {high:.6g}; allowed: {allowed[0]} to {allowed[1]}"
            + (", or 0 to 1" if image.mode == "F" else "")
        )
    # Of 8 bits Pillow itself inverts such a TIFF.
    white_is_zero = image.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
    if image.mode == "F":
        scale = 255.0 if high <= 1 else 1.0
    else:  # a TIFF of 32 bits may hold pixels of 8
        bits = getattr(image, "tag_v2", {}).get(_BITS)
        scale = 1.0 if bits == (32,) and high <= 255 else 1 / 257
    key = image.info.get("transparency") if image.mode != "F" else None  # the grey that is transparent
    result = np.empty(values.shape, np.uint8)
    # Some rows at a time: floats of the whole image would take eight times its memory.
    for start in range(0, len(values), 256):
        rows = values[start : start + 256]
        rows = 65535 - rows if white_is_zero else rows
        result[start : start + 256] = np.rint(rows * scale)
        if isinstance(key, int):
            result[start : start + 256][rows == key] = 255
    return result


def _resized(image: Image.Image, width: int, height: int, resize: str) -> Image.Image:
    """The image, or for "crop" its middle, resized; for "pad" as large as it fits into width x height."""
    from PIL import Image

    bilinear = Image.Resampling.BILINEAR
    if resize == "squash":
        return image.resize((width, height), bilinear)
    if resize == "crop":
        scale = max(width / image.width, height / image.height)
        # At most the image: a rounding error must not lead outside of it.
        part = min(width / scale, image.width), min(height / scale, image.height)
        left, top = (image.width - part[0]) / 2, (image.height - part[1]) / 2
        box = (left, top, min(left + part[0], image.width), min(top + part[1], image.height))
        return image.resize((width, height), bilinear, box=box)
    scale = min(width / image.width, height / image.height)
    inside = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(inside, bilinear)
