"""Tutorial 2, "How to Develop a CNN From Scratch for CIFAR-10": VGG blocks.

One block 1,060,138 parameters, two 591,274, three 550,570, three with batch norm 552,874.
"""

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
    dropout: float | Sequence[float] = 0.0,
    l2: float = 0.0,
    batch_norm: bool = False,
) -> keras.Model:
    """Builds the network: blocks of two convolutions with ReLU and max pooling, and a hidden dense layer.

    Args:
        input_shape: height, width and channels of the images.
        num_classes: the number of classes.
        mean: one number per channel, in units of 0-1 pixels, that preprocessing subtracts; None: 0.
        std: one number per channel, in units of 0-1 pixels, by which preprocessing divides; None: 1.
        filters: the filters of each block's two convolutions.
        dense: units of the hidden dense layer.
        dropout: the rate after each max pooling and after the hidden dense layer; one for all, or one for each.
        l2: the penalty on every kernel, as Keras's regularizer defines it.
        batch_norm: whether batch norm follows the ReLU of every convolution and of the hidden dense layer.

    Returns:
        An uncompiled functional model: images [n, height, width, channels], uint8 or float, 0-255, to float32
        probabilities [n, num_classes].

    Raises:
        ConfigError: if the image is too small, or if the number of dropout rates is wrong.
    """
    rates = common.per_block("dropout", dropout, len(filters) + 1)
    regularizer = keras.regularizers.L2(l2) if l2 else None
    kernel = {"kernel_initializer": "he_uniform", "kernel_regularizer": regularizer}

    images = keras.Input(input_shape, dtype="float32", name="images")
    x = common.preprocess(images, mean, std)
    for block, (width, rate) in enumerate(zip(filters, rates[:-1], strict=True), start=1):
        for i in (1, 2):
            x = layers.Conv2D(width, 3, padding="same", name=f"block{block}_conv{i}", **kernel)(x)
            x = layers.ReLU(name=f"block{block}_relu{i}")(x)
            if batch_norm:
                x = layers.BatchNormalization(name=f"block{block}_norm{i}")(x)
        x = common.pool(x, f"block{block}_pool")
        x = common.dropout(x, rate, f"block{block}_dropout")
    x = common.flatten(x)
    x = layers.Dense(dense, name="head_dense1", **kernel)(x)
    x = layers.ReLU(name="head_relu1")(x)
    if batch_norm:
        x = layers.BatchNormalization(name="head_norm1")(x)
    x = common.dropout(x, rates[-1], "head_dropout1")
    return keras.Model(images, common.classifier_head(x, num_classes, regularizer), name="vgg")
