"""Tutorial 4, the 85% assignment: pairs of convolutions, LeakyReLU and batch norm. 1,345,066 parameters."""

from __future__ import annotations

from collections.abc import Sequence

import keras
from keras import layers

from . import common
from .arguments import checked


@checked
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
    """Builds the network: blocks of convolutions, each with LeakyReLU and batch norm, and a hidden dense layer.

    Args:
        input_shape: height, width and channels of the images.
        num_classes: the number of classes.
        mean: one number per channel, in units of 0-1 pixels, that preprocessing subtracts; None: 0.
        std: one number per channel, in units of 0-1 pixels, by which preprocessing divides; None: 1.
        blocks: for each block the filters of its convolutions; max pooling and dropout end a block.
        negative_slope: of every LeakyReLU; 0 makes it a ReLU.
        dropout: one rate for all blocks, or one per block.
        dense: units of the hidden dense layer, which is followed by LeakyReLU, batch norm and dropout.
        head_dropout: the rate after the hidden dense layer.

    Returns:
        An uncompiled functional model: images [n, height, width, channels], uint8 or float, 0-255, to float32
        probabilities [n, num_classes].

    Raises:
        ConfigError: if the image is too small, or if the number of dropout rates is wrong.
    """
    rates = common.per_block("dropout", dropout, len(blocks))
    images = keras.Input(input_shape, dtype="float32", name="images")
    x = common.preprocess(images, mean, std)
    for block, (widths, rate) in enumerate(zip(blocks, rates, strict=True), start=1):
        for i, width in enumerate(widths, start=1):
            x = layers.Conv2D(width, 3, padding="same", name=f"block{block}_conv{i}")(x)
            x = layers.LeakyReLU(negative_slope, name=f"block{block}_relu{i}")(x)
            x = layers.BatchNormalization(name=f"block{block}_norm{i}")(x)
        x = common.pool(x, f"block{block}_pool")
        x = common.dropout(x, rate, f"block{block}_dropout")
    x = common.flatten(x)
    x = layers.Dense(dense, name="head_dense1")(x)
    x = layers.LeakyReLU(negative_slope, name="head_relu1")(x)
    x = layers.BatchNormalization(name="head_norm1")(x)
    x = common.dropout(x, head_dropout, "head_dropout1")
    return keras.Model(images, common.classifier_head(x, num_classes), name="leaky")
