"""Tutorial 5, "Deep Learning Image Classification with CNN": pairs of convolutions and two wide dense layers.

2,915,114 parameters, nine tenths of them in the head.
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
    dense: Sequence[int] = (1024, 512),
    dropout: float = 0.2,
) -> keras.Model:
    """Builds the network: blocks of two convolutions with dropout between them and max pooling, and wide dense layers.

    Args:
        input_shape: height, width and channels of the images.
        num_classes: the number of classes.
        mean: one number per channel, in units of 0-1 pixels, that preprocessing subtracts; None: 0.
        std: one number per channel, in units of 0-1 pixels, by which preprocessing divides; None: 1.
        filters: the filters of each block's two convolutions.
        dense: units of each hidden dense layer.
        dropout: the rate in the blocks, before the first dense layer and after each hidden one.

    Returns:
        An uncompiled functional model: images [n, height, width, channels], uint8 or float, 0-255, to float32
        probabilities [n, num_classes].

    Raises:
        ConfigError: if the image is too small.
    """
    images = keras.Input(input_shape, dtype="float32", name="images")
    x = common.preprocess(images, mean, std)
    for block, width in enumerate(filters, start=1):
        x = layers.Conv2D(width, 3, padding="same", name=f"block{block}_conv1")(x)
        x = layers.ReLU(name=f"block{block}_relu1")(x)
        x = common.dropout(x, dropout, f"block{block}_dropout")
        x = layers.Conv2D(width, 3, padding="same", name=f"block{block}_conv2")(x)
        x = layers.ReLU(name=f"block{block}_relu2")(x)
        x = common.pool(x, f"block{block}_pool")
    x = common.flatten(x)
    x = common.dropout(x, dropout, "flatten_dropout")
    for i, units in enumerate(dense, start=1):
        x = layers.Dense(units, name=f"head_dense{i}")(x)
        x = layers.ReLU(name=f"head_relu{i}")(x)
        x = common.dropout(x, dropout, f"head_dropout{i}")
    return keras.Model(images, common.classifier_head(x, num_classes), name="wide_head")
