"""The project's own network: patch whitening, then three blocks of two 3x3 convolutions, and a small head.

1,973,920 parameters with the default widths, whitening included. After airbench94's (Jordan 2024,
arXiv:2404.00498), as natural Keras: batch norm without scale, convolutions that start near the identity,
logits divided by nine. The last pooling is global, so that it also takes smaller images.
"""

from __future__ import annotations

import keras
import numpy as np
from keras import layers

from ..errors import ConfigError
from .common import preprocess


def build(
    *,
    input_shape: tuple[int, int, int] = (32, 32, 3),
    num_classes: int = 10,
    mean: tuple[float, ...] | None = (0.4914, 0.4822, 0.4465),
    std: tuple[float, ...] | None = (0.2470, 0.2435, 0.2616),
    filters: tuple[int, ...] = (64, 256, 256),
    depth: int = 2,
    dropout: float = 0.0,
    activation: str = "silu",
) -> keras.Model:
    """Builds the network, uncompiled. Images [n, height, width, channels] of 0-255 in, float32 probabilities out.

    Args:
        input_shape: height, width, channels.
        num_classes: outputs.
        mean, std: of the data's channels in 0-1 units, for the preprocessing that the model holds.
        filters: width of each block.
        depth: convolutions of a block; from the third on each has a shortcut around it.
        dropout: rate before the head.
        activation: a Keras activation's name.

    Raises ConfigError for an image too small for the blocks, or a value out of range.
    """
    if not filters or min(filters) < 1:
        raise ConfigError(f"filters is {tuple(filters)}; allowed: one positive width a block")
    if depth < 1:
        raise ConfigError(f"depth is {depth}; allowed: 1 or more")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout is {dropout}; allowed: 0 to less than 1")
    smallest = 2 ** len(filters) + 1
    if min(input_shape[:2]) < smallest:
        raise ConfigError(
            f"{len(filters)} blocks need images of {smallest}x{smallest}, not {input_shape[:2]}"
        )

    def convolution(x, width, name):
        # Uniform within 1 / sqrt(fan in), the default of the networks this one descends from.
        start = keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform")
        return layers.Conv2D(width, 3, padding="same", use_bias=False, kernel_initializer=start, name=name)(x)

    def norm(x, name):
        return layers.BatchNormalization(scale=False, momentum=0.6, epsilon=1.001e-5, name=name)(x)

    images = keras.Input(input_shape, name="images")
    x = preprocess(images, mean, std)
    x = layers.Conv2D(2 * 4 * input_shape[-1], 2, use_bias=False, name="whitening")(x)
    x = layers.Activation(activation, name="whitening_activation")(x)
    for b, width in enumerate(filters, start=1):
        for c in range(1, depth + 1):
            name = f"block{b}_conv{c}"
            shortcut = x
            x = convolution(x, width, name)
            if c == 1:
                x = layers.MaxPooling2D(name=f"block{b}_pool")(x)
            x = norm(x, f"block{b}_norm{c}")
            if c > 2:
                x = layers.Add(name=f"block{b}_add{c}")([x, shortcut])
            x = layers.Activation(activation, name=f"block{b}_activation{c}")(x)
    x = layers.GlobalMaxPooling2D(name="pool")(x)
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    x = layers.Dense(num_classes, use_bias=False, dtype="float32", name="head")(x)
    x = layers.Rescaling(1 / 9, dtype="float32", name="logits")(x)
    x = layers.Activation("softmax", dtype="float32", name="probabilities")(x)
    model = keras.Model(images, x, name="fast")
    for layer in model.layers:
        if isinstance(layer, layers.Conv2D) and layer.name != "whitening":
            _start_as_identity(layer)
    return model


def _start_as_identity(layer: layers.Conv2D) -> None:
    """Makes the first filters of a 3x3 convolution pass their input channels on, as far as there are filters."""
    kernel = np.array(layer.kernel)
    size = min(kernel.shape[2:])
    kernel[:, :, :, :size] = 0
    kernel[1, 1, range(size), range(size)] = 1
    layer.kernel.assign(kernel)


def whiten(model: keras.Model, images: np.ndarray, mean, std, epsilon: float = 5e-4) -> None:
    """Sets the layer "whitening" to the eigenvectors of the images' 2x2 patches, and freezes it.

    Filter i is eigenvector i of the patches' second moments over sqrt(eigenvalue + epsilon); the second half of
    the filters are the first half's negatives. The largest entry of an eigenvector is positive, so that the filters do
    not depend on the machine where no two eigenvalues are equal. Some 2,000 images, from all over, are used.

    Args:
        images: uint8 [n, height, width, channels]; mean, std: as the model's preprocessing has them.

    Raises ConfigError where the model has no such layer.
    """
    if "whitening" not in (layer.name for layer in model.layers):
        raise ConfigError(f"whitening is True; allowed with the architecture {model.name}: False")
    shift = np.reshape(0.0 if mean is None else mean, (-1, 1, 1, 1))
    scale = np.reshape(1.0 if std is None else std, (-1, 1, 1, 1))

    def moments(part):
        """Sums [4 * channels, 4 * channels] of products of the numbers of a patch: its pixels, and their channels."""
        x = (part.transpose(3, 0, 1, 2).astype(np.float64, order="C") / 255 - shift) / scale
        h, w = x.shape[2:]
        pixels = [x[:, :, i : h - 1 + i, j : w - 1 + j] for i in (0, 1) for j in (0, 1)]
        patches = np.stack(pixels).reshape(4 * len(x), -1)
        return patches @ patches.T

    images = images[:: max(1, len(images) // 2000)]  # a folder's images are sorted by class
    n, h, w, channels = images.shape
    # Few images at a time stay in the cache.
    total = sum(moments(images[i : i + 20]) for i in range(0, n, 20))
    values, vectors = np.linalg.eigh(total / (n * (h - 1) * (w - 1)))
    largest = vectors[np.abs(vectors).argmax(axis=0), range(len(vectors))]
    filters = vectors * np.sign(largest) / np.sqrt(values + epsilon)
    kernel = np.concatenate([filters, -filters], axis=1).reshape(2, 2, channels, -1)
    layer = model.get_layer("whitening")
    layer.kernel.assign(kernel)
    layer.trainable = False
