"""Tutorial 4, the 85% assignment: pairs of convolutions, LeakyReLU and batch norm. 1,345,066 parameters."""

from __future__ import annotations

from collections.abc import Sequence

import keras
from keras import layers

from . import common


def build(
    *,
    input_shape: Sequence[int | None] = (32, 32, 3),
    num_classes: int = 10,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    blocks: Sequence[Sequence[int]] = ((32, 32), (64, 64), (128, 128)),
    negative_slope: float = 0.1,
    dropout: float | Sequence[float] = (0.2, 0.3, 0.4),
    dense: int = 512,
    head_dropout: float = 0.4,
) -> keras.Model:
    """Images [n, h, w, c], uint8 or float, 0-255 -> float32 probabilities [n, num_classes].

    blocks: the filters of the convolutions of each block, which ends in max-pooling and dropout;
    negative_slope: of every LeakyReLU, 0 making it a ReLU; dropout: one rate for all blocks or one for each;
    dense: units of the hidden dense layer. Raises ConfigError where the image is too small.
    """
    rates = common.per_block("dropout", dropout, len(blocks))
    images = keras.Input(input_shape, dtype="float32", name="images")
    x = common.preprocess(images, mean, std)
    for block, (widths, rate) in enumerate(zip(blocks, rates, strict=True), start=1):
        for number, width in enumerate(widths, start=1):
            x = layers.Conv2D(width, 3, padding="same", name=f"block{block}_conv{number}")(x)
            x = layers.LeakyReLU(negative_slope, name=f"block{block}_relu{number}")(x)
            x = layers.BatchNormalization(name=f"block{block}_norm{number}")(x)
        x = common.pool(x, f"block{block}_pool")
        x = common.dropout(x, rate, f"block{block}_dropout")
    x = common.flatten(x)
    x = layers.Dense(dense, name="head_dense1")(x)
    x = layers.LeakyReLU(negative_slope, name="head_relu1")(x)
    x = layers.BatchNormalization(name="head_norm1")(x)
    x = common.dropout(x, head_dropout, "head_dropout1")
    return keras.Model(images, common.classifier_head(x, num_classes), name="leaky")
