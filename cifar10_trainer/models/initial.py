"""The plain model that a run starts with: drawn from the seed, with what it knows of the training images."""

from __future__ import annotations

import math

import keras
import numpy as np

from ..config import Config
from . import build, fast


def initial_model(config: Config, images: np.ndarray, num_classes: int) -> keras.Model:
    """The plain model that a run starts with."""
    keras.utils.set_random_seed(
        config.seed
    )  # of the weights and of dropout; the data's order has its own seeds
    mean, std = pixel_statistics(config.pixels, images)
    model = build(config, input_shape=images.shape[1:], num_classes=num_classes, mean=mean, std=std)
    if config.whitening:
        fast.whiten(model, images, mean, std)
    return model


def pixel_statistics(
    pixels: str, images: np.ndarray
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """(mean, std) of the channels in 0-1 units, as far as `pixels` asks for them."""
    if pixels == "unit":
        return None, None
    channels = images.shape[-1]
    rows, n = images.reshape(len(images), -1), images.size // channels
    # Sums of 8-bit numbers and of their squares are exact in 64 bits, and need no float copy of the images.
    sums = rows.sum(0, dtype=np.uint64), np.einsum("np,np->p", rows, rows, dtype=np.uint64)
    total, squares = (s.reshape(-1, channels).sum(0).tolist() for s in sums)
    mean = tuple(t / n / 255 for t in total)
    if pixels == "centred":
        return mean, None
    std = (math.sqrt(n * s - t * t) / n / 255 for t, s in zip(total, squares, strict=True))
    return mean, tuple(max(s, 1e-3) for s in std)
