"""The plain model that a run starts with. Its preprocessing depends on the training images."""

from __future__ import annotations

import math

import keras
import numpy as np

from ..config import Config
from . import build, fast


def initial_model(config: Config, images: np.ndarray, num_classes: int) -> keras.Model:
    """Builds the plain model that a run starts with.

    Args:
        config: architecture, options, `pixels` and `whitening`. The caller chooses the seed of the weights, see `keras_state.seeded`.
        images: the training images, uint8 [n, height, width, channels].
        num_classes: the number of classes.

    Returns:
        An uncompiled functional model, see `models.build`.

    Raises:
        ConfigError: if the config and the images do not fit together.
    """
    mean, std = pixel_statistics(config.pixels, images)
    model = build(config, input_shape=images.shape[1:], num_classes=num_classes, mean=mean, std=std)
    if config.whitening:
        fast.whiten(model, images, mean, std)
    return model


def pixel_statistics(
    pixels: str, images: np.ndarray
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Computes the statistics of the channels that `pixels` requires.

    Args:
        pixels: "unit", "centred" or "standardised", as in a Config.
        images: uint8 [n, height, width, channels].

    Returns:
        (mean, std), each one number per channel in units of 0-1 pixels, std at least 1e-3. "unit" requires neither and
        "centred" no std; what is not required is None.
    """
    if pixels == "unit":
        return None, None
    channels = images.shape[-1]
    rows, n = images.reshape(len(images), -1), images.size // channels
    # Sums of 8-bit integers and of their squares are exact in 64 bits, and need no float copy of the images.
    sums = rows.sum(0, dtype=np.uint64), np.einsum("np,np->p", rows, rows, dtype=np.uint64)
    total, squares = (s.reshape(-1, channels).sum(0).tolist() for s in sums)
    mean = tuple(t / n / 255 for t in total)
    if pixels == "centred":
        return mean, None
    std = (math.sqrt(n * s - t * t) / n / 255 for t, s in zip(total, squares, strict=True))
    return mean, tuple(max(s, 1e-3) for s in std)
