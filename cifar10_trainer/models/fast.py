"""The project's own network: patch whitening, then three blocks of two 3x3 convolutions, and a small head.

It has 1,973,920 parameters with the default widths, whitening included. It follows airbench94 (Jordan 2024,
arXiv:2404.00498) in idiomatic Keras: batch norm without scale, convolutions whose initial kernels are close to the
identity, logits divided by nine. The last pooling is global, so the network also accepts smaller images.
"""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np
from keras import layers

from ..errors import ConfigError, shown
from .arguments import checked
from .common import per_block, preprocess

# Relative to the largest one. In bfloat16 a filter of a smaller eigenvalue would show the rounding of the others, and a
# network that learns from that is worth nothing in float32: of grey images, two thirds of the eigenvalues are zero. The
# smallest one of CIFAR-10 is 6e-5.
SMALLEST_EIGENVALUE = 1e-5


@checked
def build(
    *,
    input_shape: Sequence[int] = (32, 32, 3),
    num_classes: int = 10,
    mean: Sequence[float] | None = (0.4914, 0.4822, 0.4465),
    std: Sequence[float] | None = (0.2470, 0.2435, 0.2616),
    filters: Sequence[int] = (64, 256, 256),
    depth: int = 2,
    dropout: float | Sequence[float] = 0.0,
    activation: str = "silu",
) -> keras.Model:
    """Builds the network.

    Args:
        input_shape: height, width and channels of the images.
        num_classes: the number of classes.
        mean: one number per channel, in units of 0-1 pixels, that preprocessing subtracts; None: 0.
        std: one number per channel, in units of 0-1 pixels, by which preprocessing divides; None: 1.
        filters: the filters of each block's convolutions.
        depth: the number of convolutions in each block; from the third on, a shortcut leads around each of them.
        dropout: the rate before the head; or one rate per block, after its last convolution. From 0 to less than 1.
        activation: the name of a Keras activation.

    Returns:
        An uncompiled functional model: images [n, height, width, channels], uint8 or float, 0-255, to float32
        probabilities [n, num_classes].

    Raises:
        ConfigError: if the image is too small, or if an option is out of range.
    """
    _check_options(input_shape, filters, depth, dropout)
    images = keras.Input(input_shape, name="images")
    x = preprocess(images, mean, std)
    x = layers.Conv2D(2 * 4 * input_shape[-1], 2, use_bias=False, name="whitening")(x)
    x = layers.Activation(activation, name="whitening_activation")(x)
    for b, width in enumerate(filters, start=1):
        for c in range(1, depth + 1):
            name = f"block{b}_conv{c}"
            shortcut = x
            x = _convolution(x, width, name)
            if c == 1:
                x = layers.MaxPooling2D(name=f"block{b}_pool")(x)
            x = _norm(x, f"block{b}_norm{c}")
            if c > 2:
                x = layers.Add(name=f"block{b}_add{c}")([x, shortcut])
            x = layers.Activation(activation, name=f"block{b}_activation{c}")(x)
        if not isinstance(dropout, int | float) and dropout[b - 1]:
            x = layers.Dropout(dropout[b - 1], name=f"block{b}_dropout")(x)
    x = layers.GlobalMaxPooling2D(name="pool")(x)
    if isinstance(dropout, int | float) and dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    model = keras.Model(images, scaled_head(x, num_classes), name="fast")
    for layer in model.layers:
        if isinstance(layer, layers.Conv2D) and layer.name != "whitening":
            _start_as_identity(layer)
    return model


def scaled_head(x: keras.KerasTensor, num_classes: int) -> keras.KerasTensor:
    """Maps features [n, f] to float32 probabilities [n, num_classes]; the logits are divided by nine, which slows the head."""
    x = layers.Dense(num_classes, use_bias=False, dtype="float32", name="head")(x)
    x = layers.Rescaling(1 / 9, dtype="float32", name="logits")(x)
    return layers.Activation("softmax", dtype="float32", name="probabilities")(x)


def _check_options(
    input_shape: Sequence[int], filters: Sequence[int], depth: int, dropout: float | Sequence[float]
) -> None:
    """Raises ConfigError as `build` does."""
    if not filters or min(filters) < 1:
        raise ConfigError(f"filters is {shown(tuple(filters))}; allowed: one positive width per block")
    if depth < 1:
        raise ConfigError(f"depth is {shown(depth)}; allowed: 1 or more")
    if not all(0 <= rate < 1 for rate in per_block("dropout", dropout, len(filters))):
        raise ConfigError(f"dropout is {shown(dropout)}; allowed: 0 to less than 1")
    smallest = 2 ** len(filters) + 1
    if min(input_shape[:2]) < smallest:
        raise ConfigError(
            f"input_shape is {tuple(input_shape)}, but {len(filters)} blocks need images of {smallest}x{smallest};"
            " allowed: larger images or fewer blocks"
        )


def _convolution(x: keras.KerasTensor, width: int, name: str) -> keras.KerasTensor:
    """A 3x3 convolution without bias, initially uniform within 1 / sqrt(fan in), which is PyTorch's default."""
    initializer = keras.initializers.VarianceScaling(1 / 3, "fan_in", "uniform")
    return layers.Conv2D(width, 3, padding="same", use_bias=False, kernel_initializer=initializer, name=name)(
        x
    )


def _norm(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    """Batch norm without scale. Its epsilon is the smallest one that cuDNN accepts."""
    return layers.BatchNormalization(scale=False, momentum=0.6, epsilon=1.001e-5, name=name)(x)


def _start_as_identity(layer: layers.Conv2D) -> None:
    """Sets the first filters of a 3x3 convolution so that filter i copies channel i of the input."""
    kernel = np.array(layer.kernel.numpy())  # a copy
    size = min(kernel.shape[2:])
    kernel[:, :, :, :size] = 0
    kernel[1, 1, range(size), range(size)] = 1
    layer.kernel.assign(kernel)


def whiten(
    model: keras.Model,
    images: np.ndarray,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    epsilon: float = 5e-4,
) -> None:
    """Sets the layer "whitening" so that it whitens 2x2 patches, and freezes it.

    Filter i is eigenvector i of the second moments of the patches, divided by sqrt(eigenvalue + epsilon). The second
    half of the filters is the negative of the first half. The entry of an eigenvector with the largest magnitude is
    made positive, so the filters do not depend on the machine unless two eigenvalues are equal. The filters of directions
    in which the images hardly differ are copies of the others. About 2,000 images, evenly spaced in `images`, are used.

    Args:
        model: what `build` returned.
        images: uint8 [n, height, width, channels].
        mean: of the model's preprocessing.
        std: of the model's preprocessing.
        epsilon: is added to the eigenvalues, whose unit is the square of preprocessed pixels.

    Raises:
        ConfigError: if the model has no layer "whitening".
    """
    if "whitening" not in (layer.name for layer in model.layers):
        raise ConfigError(f"whitening is True; allowed with the architecture {model.name}: False")
    shift = np.reshape(0.0 if mean is None else mean, (-1, 1, 1, 1))
    scale = np.reshape(1.0 if std is None else std, (-1, 1, 1, 1))

    def moments(part: np.ndarray) -> np.ndarray:
        """Returns sums over all patches, [4 * channels, 4 * channels], of products of two entries of a patch."""
        x = (part.transpose(3, 0, 1, 2).astype(np.float64, order="C") / 255 - shift) / scale
        h, w = x.shape[2:]
        pixels = [x[:, :, i : h - 1 + i, j : w - 1 + j] for i in (0, 1) for j in (0, 1)]
        patches = np.stack(pixels).reshape(4 * len(x), -1)
        return patches @ patches.T

    images = images[:: max(1, len(images) // 2000)]  # the images of a folder are sorted by class
    n, h, w, channels = images.shape
    # A few images at a time, so that the arrays stay in the cache of the processor.
    total = sum(moments(images[i : i + 20]) for i in range(0, n, 20))
    values, vectors = np.linalg.eigh(total / (n * (h - 1) * (w - 1)))
    largest = vectors[np.abs(vectors).argmax(axis=0), range(len(vectors))]
    filters = vectors * np.sign(largest) / np.sqrt(values + epsilon)
    flat = values < SMALLEST_EIGENVALUE * values.max()
    filters[:, flat] = np.resize(filters[:, ~flat].T, (flat.sum(), len(filters))).T
    kernel = np.concatenate([filters, -filters], axis=1).reshape(2, 2, channels, -1)
    layer = model.get_layer("whitening")
    layer.kernel.assign(kernel)
    layer.trainable = False
