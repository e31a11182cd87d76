"""Sets of drawn images, uint8 [n, side, side, 3] each; the same seed draws the same ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Draw = Callable[[np.random.Generator, int], np.ndarray]
LETTERS = "AEFHKMRSTX"


def draw(kind: Draw, count: int, seed: int) -> np.ndarray:
    """`count` images of one kind, uint8 [count, 32, 32, 3]."""
    rng = np.random.default_rng(seed)
    return np.stack([kind(rng, 32) for _ in range(count)])


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = rng.integers(0, 256, 3).tolist()
    return red, green, blue


def _smooth(rng: np.random.Generator, side: int, cells: int) -> Image.Image:
    """A few random colours, blended into one another."""
    small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3)).astype(np.uint8))
    return small.resize((side, side), Image.Resampling.BICUBIC)


def plain_colour(rng: np.random.Generator, side: int) -> np.ndarray:
    """One colour all over."""
    return np.broadcast_to(np.array(_colour(rng), np.uint8), (side, side, 3))


def noise(rng: np.random.Generator, side: int) -> np.ndarray:
    """Each pixel by itself."""
    return rng.integers(0, 256, (side, side, 3)).astype(np.uint8)


def shapes(rng: np.random.Generator, side: int) -> np.ndarray:
    """One to four polygons and ellipses before a blurred background, with the grain of a photo."""
    scale = 4
    image = _smooth(rng, scale * side, int(rng.integers(2, 6)))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(1, 5)):
        centre, size = rng.uniform(0.25, 0.75, 2), rng.uniform(0.1, 0.4)
        if rng.random() < 0.5:
            angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8)))
            corners = centre + size * np.stack([np.cos(angles), np.sin(angles)], axis=1)
            pen.polygon([tuple(scale * side * c) for c in corners], fill=_colour(rng))
        else:
            radii = size * rng.uniform(0.3, 1, 2)
            pen.ellipse(tuple(scale * side * np.concatenate([centre - radii, centre + radii])), _colour(rng))
    small = image.filter(ImageFilter.GaussianBlur(scale / 2)).resize((side, side), Image.Resampling.BILINEAR)
    grain = rng.normal(0, 8, (side, side, 3))
    return np.clip(np.asarray(small) + grain, 0, 255).astype(np.uint8)


def stripes(rng: np.random.Generator, side: int) -> np.ndarray:
    """Two colours, in waves of any direction and length."""
    angle, length, phase = rng.uniform(0, np.pi), rng.uniform(3, side), rng.uniform(0, 1)
    y, x = np.mgrid[:side, :side]
    wave = np.sin(2 * np.pi * ((x * np.cos(angle) + y * np.sin(angle)) / length + phase))[..., None]
    first, second = np.array(_colour(rng), float), np.array(_colour(rng), float)
    return ((first + second) / 2 + wave * (first - second) / 2).clip(0, 255).astype(np.uint8)


def clouds(rng: np.random.Generator, side: int) -> np.ndarray:
    """Random colours, blended into one another."""
    return np.asarray(_smooth(rng, side, int(rng.integers(3, 12))))


def letter(rng: np.random.Generator, side: int, which: str | None = None) -> np.ndarray:
    """A letter of LETTERS in one colour on another, of any size and place, turned a little."""
    text = which or str(rng.choice(list(LETTERS)))
    size = side * float(rng.uniform(0.5, 0.9))
    background, ink = _colour(rng), _colour(rng)
    while sum(abs(a - b) for a, b in zip(background, ink, strict=True)) < 150:
        ink = _colour(rng)
    image = Image.new("RGB", (side, side), background)
    x, y = (side * rng.uniform(0.4, 0.6, 2)).tolist()
    ImageDraw.Draw(image).text((x, y), text, ink, ImageFont.load_default(size), anchor="mm")
    image = image.rotate(float(rng.uniform(-20, 20)), Image.Resampling.BILINEAR, fillcolor=background)
    return np.clip(np.asarray(image) + rng.normal(0, 8, (side, side, 3)), 0, 255).astype(np.uint8)


def mosaics(images: np.ndarray, seed: int) -> np.ndarray:
    """Each image cut into 4 x 4 squares, which change places."""
    rng, side = np.random.default_rng(seed), images.shape[1] // 4
    squares = images.reshape(-1, 4, side, 4, side, 3).swapaxes(2, 3).reshape(-1, 16, side, side, 3)
    mixed = np.stack([image[rng.permutation(16)] for image in squares])
    return mixed.reshape(-1, 4, 4, side, side, 3).swapaxes(2, 3).reshape(images.shape)
