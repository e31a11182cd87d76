"""Layers and checks that the architectures share."""

from __future__ import annotations

from collections.abc import Sequence

import keras
from keras import layers

from ..errors import ConfigError, shown


def preprocess(
    x: keras.KerasTensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> keras.KerasTensor:
    """Computes (x / 255 - mean) / std in one layer, named "preprocess".

    It is always float32, because the subtraction would lose bits in bfloat16.

    Args:
        x: images [n, height, width, channels], 0-255.
        mean: one number per channel, in units of 0-1 pixels; None: 0.
        std: one number per channel, in units of 0-1 pixels; None: 1.

    Returns:
        float32 [n, height, width, channels].

    Raises:
        ConfigError: if the length of `mean` or `std` is wrong, or if a `std` is 0 or less.
    """
    channels = x.shape[-1]
    mean = [0.0] * channels if mean is None else [float(m) for m in mean]
    std = [1.0] * channels if std is None else [float(s) for s in std]
    if not len(mean) == len(std) == channels or min(std) <= 0:
        raise ConfigError(
            f"mean is {shown(mean)} and std is {shown(std)}; allowed: {channels} numbers each, all positive in std"
        )
    return layers.Rescaling(
        scale=[1 / (255 * s) for s in std],
        offset=[-m / s for m, s in zip(mean, std, strict=True)],
        dtype="float32",
        name="preprocess",
    )(x)


def classifier_head(
    x: keras.KerasTensor, num_classes: int, regularizer: keras.Regularizer | None = None
) -> keras.KerasTensor:
    """Maps features [n, f] to float32 probabilities [n, num_classes], by layers "logits" and "probabilities"."""
    x = layers.Dense(num_classes, kernel_regularizer=regularizer, dtype="float32", name="logits")(x)
    return layers.Activation("softmax", dtype="float32", name="probabilities")(x)


def pool(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    """Halves the maps [n, h, w, c] by 2x2 max pooling. Raises ConfigError if no pixel would be left."""
    check_side(x, 2, name)
    return layers.MaxPooling2D(2, name=name)(x)


def flatten(x: keras.KerasTensor) -> keras.KerasTensor:
    """Reshapes [n, h, w, c] to [n, h * w * c]. Raises ConfigError if height or width is not fixed."""
    if None in x.shape[1:]:
        raise ConfigError(f"input_shape leads to maps of {x.shape[1:]}; allowed: a fixed height and width")
    return layers.Flatten(name="flatten")(x)


def dropout(x: keras.KerasTensor, rate: float, name: str) -> keras.KerasTensor:
    """Applies dropout, or returns `x` if `rate` is 0. Raises ConfigError on a rate that leaves nothing."""
    if not 0 <= rate < 1:
        raise ConfigError(f"dropout is {rate}; allowed: from 0 to less than 1")
    return layers.Dropout(rate, name=name)(x) if rate else x


def check_side(x: keras.KerasTensor, side: int, name: str) -> None:
    """Raises ConfigError if the maps [n, h, w, c] are smaller than the window of the layer `name`."""
    height, width = x.shape[1:3]
    if any(length is not None and length < side for length in (height, width)):
        raise ConfigError(
            f"the network is too deep for the image: {name} receives maps of {height}x{width};"
            f" allowed: at least {side}x{side}; use larger images or fewer layers"
        )


def per_block(name: str, value: float | Sequence[float], count: int) -> tuple[float, ...]:
    """Returns the option `name` as one number per block: a single number stands for all `count` blocks.

    Raises:
        ConfigError: if there are neither one nor `count` numbers.
    """
    values = (value,) * count if isinstance(value, int | float) else tuple(value)
    if len(values) != count:
        raise ConfigError(f"{name} is {shown(values)}; allowed: one number, or {count} numbers")
    return values
