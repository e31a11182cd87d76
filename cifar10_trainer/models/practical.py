"""Tutorial 1, "Training a CNN from Scratch": three convolutions with batch norm. 2,195,146 parameters."""

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
    filters: Sequence[int] = (32, 64, 128),
    kernel_size: int = 3,
    pools: int = 2,
    dense: Sequence[int] = (256,),
    dropout: float = 0.5,
) -> keras.Model:
    """Images [n, h, w, c], uint8 or float, 0-255 -> float32 probabilities [n, num_classes].

    filters: one convolution each; pools: how many of them, from the first, are followed by max-pooling;
    dense: units of each hidden dense layer; dropout: after each of these.
    Raises ConfigError where the image is too small.
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
    for number, units in enumerate(dense, start=1):
        x = layers.Dense(units, name=f"head_dense{number}")(x)
        x = layers.BatchNormalization(name=f"head_norm{number}")(x)
        x = layers.ReLU(name=f"head_relu{number}")(x)
        x = common.dropout(x, dropout, f"head_dropout{number}")
    return keras.Model(images, common.classifier_head(x, num_classes), name="practical")
