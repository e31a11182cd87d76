"""Image files of any common format -> uint8 pixels."""

from __future__ import annotations

import os

import numpy as np

from ..errors import RunError, reason_of

_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


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
            f"{path} cannot be read as an image ({reason_of(error)}); allowed: PNG, JPEG, WebP, GIF, BMP;"
            " repair or remove it"
        ) from error
