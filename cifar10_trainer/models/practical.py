"""Tutorial 1, "Training a CNN from Scratch": three convolutions with batch norm. 2,195,146 parameters."""

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
    kernel_size: int = 3,
    pools: int = 2,
    dense: Sequence[int] = (256,),
    dropout: float = 0.5,
) -> keras.Model:
    """Builds the network: convolutions with batch norm and ReLU, some with max pooling, and hidden dense layers.

    Args:
        input_shape: height, width and channels of the images.
        num_classes: the number of classes.
        mean: one number per channel, in units of 0-1 pixels, that preprocessing subtracts; None: 0.
        std: one number per channel, in units of 0-1 pixels, by which preprocessing divides; None: 1.
        filters: the filters of each convolution.
        kernel_size: the side of the kernels, in pixels.
        pools: the number of convolutions that max pooling follows, counted from the first.
        dense: units of each hidden dense layer, which is followed by batch norm, ReLU and dropout.
        dropout: the rate after each hidden dense layer.

    Returns:
        An uncompiled functional model: images [n, height, width, channels], uint8 or float, 0-255, to float32
        probabilities [n, num_classes].

    Raises:
        ConfigError: if the image is too small.
    """
    images = keras.Input(input_shape, dtype="float32", name="images")
    x = common.preprocess(images, mean, std)
    for block, width in enumerate(filters, start=1):
        x = layers.Conv2D(width, kernel_size, padding="same", name=f"block{block}_conv1")(x)
        x = layers.BatchNormalization(name=f"block{block}_norm1")(x)
        x = layers.ReLU(name=f"block{block}_relu1")(x)
        if block <= pools:
            x = common.pool(x, f"block{block}_pool")
    x = common.flatten(x)
    for i, units in enumerate(dense, start=1):
        x = layers.Dense(units, name=f"head_dense{i}")(x)
        x = layers.BatchNormalization(name=f"head_norm{i}")(x)
        x = layers.ReLU(name=f"head_relu{i}")(x)
        x = common.dropout(x, dropout, f"head_dropout{i}")
    return keras.Model(images, common.classifier_head(x, num_classes), name="practical")
