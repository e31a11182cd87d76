"""Reads image files of the common formats as uint8 pixels."""

from __future__ import annotations

import os

import numpy as np

from ..errors import RunError, reason_of

_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


def read_image(path: str | os.PathLike[str], size: tuple[int, int]) -> np.ndarray:
    """Reads an image file, and resizes the whole image without cropping it.

    Args:
        path: a PNG, JPEG, WebP, GIF or BMP file. It may be grayscale, 16-bit, with a palette, transparent (white shows
            through), rotated by EXIF, or an animation (the first frame counts).
        size: (height, width) in pixels.

    Returns:
        uint8 [height, width, 3], in RGB.

    Raises:
        RunError: if the file is not such an image.
    """
    from PIL import Image, ImageOps

    height, width = size
    try:
        with Image.open(path, formats=_IMAGE_FORMATS) as opened:
            # A large JPEG is decoded at a half, a quarter or an eighth of its size, which is faster.
            opened.draft(None, (2 * width, 2 * height))
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):  # 16 bits per pixel; Pillow's own conversion would clip at 255
                image = Image.fromarray(np.rint(np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
            if image.mode != "RGB" or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            return np.array(image.resize((width, height), Image.Resampling.BILINEAR))
    except Exception as error:  # Pillow's decoders raise errors of many classes for damaged files
        raise RunError(
            f"{path} cannot be read as an image ({reason_of(error)}); allowed: PNG, JPEG, WebP, GIF, BMP;"
            " repair or remove it"
        ) from error
