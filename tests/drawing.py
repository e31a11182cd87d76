"""Helpers of the tests that look at pictures."""

from __future__ import annotations

import numpy as np
from PIL import Image

NAMES = ("cat", "dog", "owl")
RED, LIME, NAVY = (250, 10, 10), (10, 250, 10), (10, 10, 120)


def solid(colours, size=8):
    """One image a colour, uint8 [n, size, size, 3]."""
    return np.tile(np.array(colours, np.uint8)[:, None, None], (1, size, size, 1))


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def where(picture, colour):
    """Boolean map of the pixels within 2 of `colour` (exact but for the rounding of the drawing)."""
    if isinstance(colour, str):
        colour = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return (abs(picture - np.array(colour)) <= 2).all(axis=-1)


def texts(axes):
    return [text.get_text() for text in axes.texts]


def history(*rows):
    keys = ("epoch", "loss", "accuracy", "val_loss", "val_accuracy")
    return [dict(zip(keys, row, strict=True)) for row in rows]


def probabilities(*predicted, p=0.93):
    """Rows over three classes with `p` for the predicted one and the rest in equal parts."""
    rows = np.full((len(predicted), 3), (1 - p) / 2, np.float32)
    rows[np.arange(len(predicted)), list(map(int, predicted))] = p
    return rows
