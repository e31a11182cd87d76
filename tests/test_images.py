"""Picture files of all kinds: right pixels, no hang, bounded memory. `test_datasets` has the commonest ones."""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from cifar10_trainer import datasets
from cifar10_trainer.datasets import images
from cifar10_trainer.errors import ConfigError, RunError

RAMP = np.array([[0, 64, 128, 255]], np.uint8)  # one row of four greys


def read(path, size=None, **options):
    if size is None:
        with Image.open(path) as image:
            size = image.size[::-1]
    return datasets.read_image(path, size, **options)


def greys(values):
    """uint8 [1, n, 3] of greys."""
    return np.repeat(np.array([values], np.uint8)[..., None], 3, axis=2)


# ---- the right pixels


@pytest.mark.parametrize("suffix", ["tiff", "TIF", "ppm", "pgm", "dib"])
def test_further_formats(tmp_path, suffix):
    Image.fromarray(RAMP).save(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(read(tmp_path / f"a.{suffix}"), greys(RAMP[0]))


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("1", [0, 255, 255, 0], [0, 255, 255, 0]),
        ("L", [0, 64, 128, 255], [0, 64, 128, 255]),
        ("F", [0.0, 0.25, 0.5, 1.0], [0, 64, 128, 255]),  # 63.75 and 127.5, rounded to even
        ("F", [0.0, 10.4, 10.6, 255.0], [0, 10, 11, 255]),
        ("I;16", [0, 128, 129, 65535], [0, 0, 1, 255]),  # 257 sixteen-bit steps are one of eight bits
        ("I", [0, 257, 32896, 65535], [0, 1, 128, 255]),
        (
            "I",
            [0, 60, 99, 255],
            [0, 60, 99, 255],
        ),  # as an array of integers is saved that holds pixels of 8 bits
        ("I;16", [0, 60, 99, 255], [0, 0, 0, 1]),
    ],
)
def test_modes_of_tiff(tmp_path, mode, values, expected):
    if mode == "1":
        image = Image.fromarray(np.array([values], np.uint8)).convert("1")
    else:
        kinds = {"F": np.float32, "I;16": np.uint16, "I": np.int32, "L": np.uint8}
        image = Image.fromarray(np.array([values], kinds[mode]))
    assert image.mode == mode
    image.save(tmp_path / "a.tiff")
    np.testing.assert_array_equal(read(tmp_path / "a.tiff"), greys(expected))


@pytest.mark.parametrize(("kind", "values"), [(np.uint8, [0, 255, 64]), (np.uint16, [0, 65535, 64 * 257])])
def test_a_tiff_whose_zero_is_white(tmp_path, kind, values):
    """Pillow inverts 8 bits when it saves, and 16 bits not, so the file with 16 has the values that are given."""
    image = Image.fromarray(np.array([values], kind))
    image.save(tmp_path / "a.tiff", tiffinfo={262: 0})
    expected = [255, 0, 191] if kind is np.uint16 else None
    with Image.open(tmp_path / "a.tiff") as opened:
        expected = np.asarray(opened)[0].tolist() if expected is None else expected
    np.testing.assert_array_equal(read(tmp_path / "a.tiff"), greys(expected))


@pytest.mark.parametrize("values", [[-1.0, 0.5], [0.0, 256.0], [0.0, np.nan], [np.inf, 0.0]])
def test_floats_of_another_range_are_refused_rather_than_guessed(tmp_path, values):
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(RunError, match="allowed: 0 to 255, or 0 to 1"):
        read(tmp_path / "a.tiff")


def test_a_transparent_grey_of_16_bits_is_white(tmp_path):
    """A PNG made by hand: the grey 1000 is transparent."""
    rows = b"\0" + struct.pack(">3H", 0, 1000, 65535)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 3, 1, 16, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"tRNS", struct.pack(">H", 1000))
    (tmp_path / "a.png").write_bytes(png + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    np.testing.assert_array_equal(read(tmp_path / "a.png", (1, 3)), greys([0, 255, 255]))


def test_cmyk_of_tiff(tmp_path):
    """Each ink takes its share of the light, and black takes it from all."""
    ink = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 0, 255]]], np.uint8)
    Image.fromarray(ink, "CMYK").save(tmp_path / "a.tiff")
    expected = [[[255, 255, 255], [0, 255, 255], [255, 0, 255], [0, 0, 0]]]
    np.testing.assert_array_equal(read(tmp_path / "a.tiff"), expected)


def test_alpha_over_white_is_the_mean_by_alpha(tmp_path):
    alpha = np.arange(256, dtype=np.uint8)
    pixels = np.stack([np.full(256, 10), np.full(256, 100), np.full(256, 200), alpha], axis=1)[None]
    Image.fromarray(pixels.astype(np.uint8), "RGBA").save(tmp_path / "a.png")
    share = alpha[:, None] / 255
    exact = share * [10, 100, 200] + (1 - share) * 255
    assert np.abs(read(tmp_path / "a.png")[0] - exact).max() <= 0.51


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_shows_the_same_picture(tmp_path, suffix, orientation):
    """The file holds the picture as a camera that was held in this way stores it."""
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16], upright[:8, 16:], upright[8:, :16] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    # EXIF: where row 0 and column 0 of the file are in the picture.
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1), 7: np.rot90(upright, 2).swapaxes(0, 1), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = (
        {"quality": 100, "subsampling": 0}
        if suffix == "jpg"
        else {"lossless": True}
        if suffix == "webp"
        else {}
    )
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"a.{suffix}", exif=exif, **options)
    for size in ((16, 32), (8, 16)):
        found = read(tmp_path / f"a.{suffix}", size).astype(int)
        high, wide = size[0] // 4, size[1] // 4  # the middle of the quarter at the top left
        assert np.abs(found[high, wide] - [250, 0, 0]).max() <= 3
        assert np.abs(found[high, -wide] - [0, 250, 0]).max() <= 3
        assert np.abs(found[-high, wide] - [0, 0, 250]).max() <= 3
        assert found[-high, -wide].max() <= 3


def test_damaged_exif_does_not_hide_the_picture(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.jpg", exif=b"Exif\0\0nonsense", quality=100)
    assert np.abs(read(tmp_path / "a.jpg").astype(int) - greys(RAMP[0])).max() <= 2


@pytest.mark.parametrize("suffix", ["png", "webp", "gif", "tiff"])
def test_of_an_animation_the_first_frame_counts(tmp_path, suffix):
    frames = [Image.new("RGB", (6, 5), colour) for colour in ((0, 255, 0), (255, 0, 0))]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    assert (read(tmp_path / f"a.{suffix}") == (0, 255, 0)).all()


@pytest.mark.skipif(not features.check("avif"), reason="this build of Pillow has no AVIF")
def test_avif(tmp_path):
    Image.new("RGB", (40, 30), (200, 100, 50)).save(tmp_path / "a.avif", quality=100)
    assert np.abs(read(tmp_path / "a.avif").astype(int) - (200, 100, 50)).max() <= 3


@pytest.mark.parametrize(("brand", "package"), [(b"heic", "pillow-heif"), (b"avif", "pillow-avif-plugin")])
def test_a_format_without_its_reader_says_what_to_install(tmp_path, monkeypatch, brand, package):
    monkeypatch.setattr(images, "open_formats", lambda: ("PNG", "JPEG"))
    (tmp_path / "a.heic").write_bytes(struct.pack(">I", 24) + b"ftyp" + brand + b"\0" * 100)
    with pytest.raises(RunError, match=f"needs: pip install {package}"):
        read(tmp_path / "a.heic", (8, 8))


# ---- how it is resized


def stripes(path, size=(400, 200)):
    """A picture with a red left quarter, a green middle and a blue right quarter."""
    width, height = size
    image = Image.new("RGB", size, (0, 255, 0))
    image.paste((255, 0, 0), (0, 0, width // 4, height))
    image.paste((0, 0, 255), (width - width // 4, 0, width, height))
    image.save(path)
    return path


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_squash_crop_and_pad(tmp_path, suffix):
    path = stripes(tmp_path / f"a.{suffix}")
    squashed, cropped, padded = (read(path, (40, 40), resize=how).astype(int) for how in images.RESIZES)
    red, green, blue = (255, 0, 0), (0, 255, 0), (0, 0, 255)

    def same(part, colour):
        assert np.abs(part - colour).max() <= 4, (part, colour)

    same(squashed[:, 2:8], red), same(squashed[:, 12:28], green), same(squashed[:, 32:38], blue)
    same(cropped[:, 2:38], green)  # the middle 200 of 400 pixels
    assert (padded[:10] == 0).all() and (padded[30:] == 0).all()  # 40 x 20 pixels of picture
    same(padded[11:29, 2:8], red), same(padded[11:29, 12:28], green), same(padded[11:29, 32:38], blue)
    with pytest.raises(ConfigError, match="unknown resize 'stretch'; allowed: squash, crop, pad"):
        read(path, (8, 8), resize="stretch")


@pytest.mark.parametrize("how", ["crop", "pad"])
def test_a_picture_of_the_right_proportions_is_the_same_by_every_rule(tmp_path, how):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(
        read(tmp_path / "a.png", (20, 30), resize=how), read(tmp_path / "a.png", (20, 30))
    )


@pytest.mark.parametrize("how", images.RESIZES)
@pytest.mark.parametrize("size", [(1, 999), (999, 1), (1, 1), (3, 2)])
def test_extreme_proportions(tmp_path, how, size):
    Image.new("RGB", size, (9, 200, 9)).save(tmp_path / "a.png")
    found = read(tmp_path / "a.png", (33, 32), resize=how)
    assert found.shape == (33, 32, 3) and (found == (9, 200, 9)).all(-1).any()


def test_a_turned_picture_is_padded_as_an_upright_one(tmp_path):
    """Also where the border is of an odd number of pixels, and one side gets one more."""
    upright = Image.new("RGB", (90, 30), (255, 0, 0))
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(
        *(read(tmp_path / f"{name}.png", (32, 33), resize="pad") for name in ("upright", "turned"))
    )


# ---- what is no picture, and bombs


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a device"])
def test_what_is_no_file_never_hangs(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    path = Path("a.png")
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))  # the file stays
    else:
        path = Path("/dev/zero")
    with pytest.raises(RunError, match=f"{path} cannot be read as an image .*{kind}"):
        read(path, (8, 8))


def bomb(path, side):
    """A PNG of a few bytes whose header claims side x side pixels, and whose data hold some of them."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(10**6), 9)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("side", [13_343, 60_000, 2**31 - 1])
def test_bombs_are_refused_by_their_header(tmp_path, side, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # somebody's program may have done so
    with pytest.raises(RunError, match=r"cannot be read as an image \(.*(pixels|too large|decompress)"):
        read(bomb(tmp_path / "a.png", side), (8, 8))


def test_reading_a_large_picture_takes_its_decoded_size_and_little_more(tmp_path):
    """6,000 x 6,000 RGBA pixels, and the picture on white; in a process of its own."""
    Image.new("RGBA", (6000, 6000), (1, 2, 3, 255)).save(tmp_path / "a.png", compress_level=1)
    code = (
        "import resource, sys\n"
        "from cifar10_trainer.datasets import read_image\n"
        "read_image(sys.argv[2], (8, 8))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "read_image(sys.argv[1], (8, 8))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    Image.new("RGBA", (8, 8)).save(tmp_path / "small.png")
    words = [sys.executable, "-c", code, tmp_path / "a.png", tmp_path / "small.png"]
    taken = int(subprocess.run(words, capture_output=True, check=True).stdout) * 1024
    decoded = 6000 * 6000 * 4
    assert taken < 1.2 * 2.5 * decoded  # the picture, the white one, and the mask of 1 byte a pixel twice


def test_large_pictures_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "LARGE", 100)
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    inside, most, lock = [0], [0], threading.Lock()
    original = images._rgb

    def counted(image):
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        threading.Event().wait(0.02)
        with lock:
            inside[0] -= 1
        return original(image)

    monkeypatch.setattr(images, "_rgb", counted)
    threads = [threading.Thread(target=read, args=(tmp_path / "a.png", (8, 8))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "out of memory while .* was read; use a smaller --image_size"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files; try again"),
    ],
)
def test_an_error_of_the_machine_is_no_damaged_picture(error, says, tmp_path, monkeypatch):
    """Else up to 5% of the pictures would be left out."""

    def failing(*arguments):
        raise error

    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path)
    monkeypatch.setattr(images, "_pixels", failing)
    with pytest.raises(RunError, match=says):
        images.decode(path, (4, 4), "squash")


def test_names_that_are_not_utf_8(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9\n.png")
    Image.new("RGB", (4, 4), (9, 9, 9)).save(os.fsdecode(path))
    assert (datasets.read_image(os.fsdecode(path), (4, 4)) == 9).all()
    assert images.readable(path).endswith("/caf??.png")
    Path(os.fsdecode(path)).write_bytes(b"text")
    with pytest.raises(RunError, match=r"caf\?\?\.png cannot be read"):
        datasets.read_image(os.fsdecode(path), (4, 4))
