"""Tutorial 3, "Training a CNN", a web-service course: unpadded convolutions. 161,610 parameters."""

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
    filters: Sequence[int] = (32, 64, 128),
    dense: int = 128,
    dropout: float = 0.25,
    head_dropout: float = 0.5,
) -> keras.Model:
    """Builds the network: blocks of convolution, ReLU, batch norm, max pooling and dropout, and a hidden dense layer.

    Args:
        input_shape: height, width and channels of the images.
        num_classes: the number of classes.
        mean: one number per channel, in units of 0-1 pixels, that preprocessing subtracts; None: 0.
        std: one number per channel, in units of 0-1 pixels, by which preprocessing divides; None: 1.
        filters: the filters of each block's convolution, which has no padding.
        dense: units of the hidden dense layer, which is followed by ReLU, batch norm and dropout.
        dropout: the rate in the blocks.
        head_dropout: the rate after the hidden dense layer.

    Returns:
        An uncompiled functional model: images [n, height, width, channels], uint8 or float, 0-255, to float32
        probabilities [n, num_classes].

    Raises:
        ConfigError: if the image is too small.
    """
    images = keras.Input(input_shape, dtype="float32", name="images")
    x = common.preprocess(images, mean, std)
    for block, width in enumerate(filters, start=1):
        common.check_side(x, 3, f"block{block}_conv1")
        x = layers.Conv2D(width, 3, name=f"block{block}_conv1")(x)
        x = layers.ReLU(name=f"block{block}_relu1")(x)
        x = layers.BatchNormalization(name=f"block{block}_norm1")(x)
        x = common.pool(x, f"block{block}_pool")
        x = common.dropout(x, dropout, f"block{block}_dropout")
    x = common.flatten(x)
    x = layers.Dense(dense, name="head_dense1")(x)
    x = layers.ReLU(name="head_relu1")(x)
    x = layers.BatchNormalization(name="head_norm1")(x)
    x = common.dropout(x, head_dropout, "head_dropout1")
    return keras.Model(images, common.classifier_head(x, num_classes), name="course")
