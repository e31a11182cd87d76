"""Random changes to batches of images, as Keras layers without state.

Every layer is a pure function of a uint8 batch and of uniform numbers in [0, 1), `draws` of them for each image:
`transform(images, numbers)`. Called as a layer it makes the numbers from a seed of two integers:
`layer(images, seed=(7, 0))`, or `seed=tf.stack([7, step])` where the step is a tensor. So each image changes by itself, equal seeds give equal images, and the same layer runs eagerly, inside
`tf.data` and inside a compiled training step.

Flips and shifts only say which row and column a pixel comes from, and a cutout which pixels are blank. `fetch`
composes them, so that a whole batch is read from the data set, flipped, shifted and cut out in one gather.
"""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from .config import FILLS, Augmentation
from .errors import ConfigError, unknown

BLACK, GREY = 0, 127


@keras.saving.register_keras_serializable("cifar10_trainer")
class RandomLayer(keras.layers.Layer):
    """Base: uint8 images [batch, height, width, channels] in, the same out."""

    draws = 1  # uniform numbers for each image
    compilable = True  # by XLA

    def __init__(self, **kwargs):
        # Pixels stay uint8 whatever the global policy is.
        kwargs.setdefault("dtype", "float32")
        super().__init__(**kwargs)

    def call(self, images, seed):
        """Transforms with `draws` numbers an image from the stateless `seed`, two integers."""
        numbers = tf.random.stateless_uniform([tf.shape(images)[0], self.draws], tf.cast(seed, tf.int32))
        return self.transform(images, numbers)

    def transform(self, images, numbers):
        """The pure function: images [batch, h, w, c], numbers float32 [batch, draws] in [0, 1)."""
        raise NotImplementedError

    def compute_output_spec(self, images, seed):
        return keras.KerasTensor(images.shape, images.dtype)


class Reindex(RandomLayer):
    """A layer that only moves pixels: row r of the result is row rows[r] of the image, and so for columns."""

    def reindex(self, rows, columns, height, width, numbers):
        """Maps int32 rows [batch, h] and columns [batch, w] of the result to those of the image; -1 is black."""
        raise NotImplementedError

    def transform(self, images, numbers):
        index = tf.range(tf.shape(images)[0])
        return fetch(image_table(images), index, [self], numbers)


@keras.saving.register_keras_serializable("cifar10_trainer")
class RandomFlip(Reindex):
    """Mirrors an image left to right where its number is below one half."""

    def reindex(self, rows, columns, height, width, numbers):
        mirrored = tf.where(columns < 0, columns, width - 1 - columns)
        return rows, tf.where(numbers[:, :1] < 0.5, mirrored, columns)


@keras.saving.register_keras_serializable("cifar10_trainer")
class RandomShift(Reindex):
    """Moves an image by -pixels to +pixels along each axis: padding by `pixels` and cropping at random.

    fill: what enters at the border. "reflect" mirrors without repeating the border (NumPy's `pad` mode of
    that name), "nearest" repeats it, "constant" is black.
    """

    draws = 2

    def __init__(self, pixels, fill="reflect", **kwargs):
        super().__init__(**kwargs)
        if fill not in FILLS:
            raise unknown("fill", fill, FILLS)
        if pixels < 0:
            raise ConfigError(f"pixels is {pixels}; allowed: 0 or more")
        self.pixels = pixels
        self.fill = fill

    def _moved(self, index, size, number):
        offset = tf.cast(tf.floor(number * (2 * self.pixels + 1)), tf.int32) - self.pixels
        moved = index + offset
        if self.fill == "reflect":
            moved = (size - 1) - tf.abs((size - 1) - tf.abs(moved))
        elif self.fill == "nearest":
            moved = tf.clip_by_value(moved, 0, size - 1)
        else:
            moved = tf.where((moved >= 0) & (moved < size), moved, -1)
        return tf.where(index < 0, index, moved)

    def check(self, height, width):
        """Raises ConfigError where images of this size have not enough pixels to mirror."""
        if self.fill == "reflect" and self.pixels >= min(height, width):
            raise ConfigError(f"shift is {self.pixels} pixels of {height}x{width}; allowed: less than a side")

    def reindex(self, rows, columns, height, width, numbers):
        self.check(height, width)
        return self._moved(rows, height, numbers[:, :1]), self._moved(columns, width, numbers[:, 1:2])

    def get_config(self):
        return {**super().get_config(), "pixels": self.pixels, "fill": self.fill}


class Projective(RandomLayer):
    """A linear map about the image's centre, bilinear. `fill="reflect"` repeats the border, as SciPy's does."""

    compilable = False

    def __init__(self, amount, fill="reflect", **kwargs):
        super().__init__(**kwargs)
        if fill not in FILLS:
            raise unknown("fill", fill, FILLS)
        self.amount = amount
        self.fill = fill

    def matrix(self, numbers):
        """The map from a pixel of the result to one of the image: ((a, b), (c, d)), each float32 [batch]."""
        raise NotImplementedError

    def transform(self, images, numbers):
        (a, b), (c, d) = self.matrix(numbers)
        y, x = ((s - 1) / 2 for s in images.shape[1:3])
        zero = tf.zeros_like(a)
        rows = [a, b, x - a * x - b * y, c, d, y - c * x - d * y, zero, zero]
        moved = tf.raw_ops.ImageProjectiveTransformV3(
            images=tf.cast(images, tf.float32),
            transforms=tf.stack(rows, axis=1),
            output_shape=images.shape[1:3],
            interpolation="BILINEAR",
            fill_mode=self.fill.upper(),
            fill_value=0.0,
        )
        return tf.cast(tf.round(moved), images.dtype)

    def get_config(self):
        return {**super().get_config(), "amount": self.amount, "fill": self.fill}


@keras.saving.register_keras_serializable("cifar10_trainer")
class RandomRotation(Projective):
    """Turns an image by -amount to +amount turns (0.1: 36 degrees) about its centre."""

    def matrix(self, numbers):
        angle = (2 * numbers[:, 0] - 1) * (2 * np.pi * self.amount)
        cos, sin = tf.cos(angle), tf.sin(angle)
        return (cos, -sin), (sin, cos)


@keras.saving.register_keras_serializable("cifar10_trainer")
class RandomZoom(Projective):
    """Shows 1 - amount to 1 + amount of an image's height and, independently, of its width."""

    draws = 2

    def matrix(self, numbers):
        scale = 1 + (2 * numbers - 1) * self.amount
        zero = tf.zeros_like(scale[:, 0])
        return (scale[:, 1], zero), (zero, scale[:, 0])


@keras.saving.register_keras_serializable("cifar10_trainer")
class RandomCutout(RandomLayer):
    """Blanks a square of `size` pixels a side, centred anywhere in the image, to middle grey.

    The square may reach over the border. DeVries and Taylor 2017, arXiv:1708.04552.
    """

    draws = 2

    def __init__(self, size, **kwargs):
        super().__init__(**kwargs)
        self.size = size

    def transform(self, images, numbers):
        _, height, width, _ = images.shape
        inside = self.covered(height, width, numbers)[..., None]
        return tf.where(inside, tf.constant(GREY, images.dtype), images)

    def covered(self, height, width, numbers):
        """bool [batch, height, width]: the pixels that are blanked."""

        def band(side, number):
            first = tf.cast(tf.floor(number * side), tf.int32) - self.size // 2
            offset = tf.range(side)[None] - first
            return (offset >= 0) & (offset < self.size)

        return band(height, numbers[:, :1])[:, :, None] & band(width, numbers[:, 1:2])[:, None, :]

    def get_config(self):
        return {**super().get_config(), "size": self.size}


def image_table(images):
    """uint8 [n, h, w, c] and one image more, [n + 1, h, w, c], whose first pixel is black and whose last is grey."""
    first = tf.range(tf.size(images[0])) < images.shape[-1]
    blank = tf.where(first, tf.constant(BLACK, images.dtype), tf.constant(GREY, images.dtype))
    return tf.concat([images, tf.reshape(blank, [1, *images.shape[1:]])], axis=0)


def fetch(table, index, layers, numbers):
    """Reads the images at `index` and puts them through `layers`.

    Args:
        table: image_table of the images, uint8 [n + 1, height, width, channels].
        index: int32 [batch].
        layers: RandomLayers.
        numbers: float32 [batch, draws of all layers], in the order of the layers.

    Returns: uint8 [batch, height, width, channels].
    """
    parts = tf.split(numbers, [layer.draws for layer in layers], axis=1) if layers else []
    moves = next((i for i, layer in enumerate(layers) if not isinstance(layer, Reindex)), len(layers))
    cutout = moves < len(layers) and isinstance(layers[moves], RandomCutout)
    if moves or cutout:
        pixel = _moved_pixels(table, index, layers[:moves], parts[:moves])
        if cutout:
            covered = layers[moves].covered(*table.shape[1:3], parts[moves])
            pixel = tf.where(covered, _pixels(table, pixel.dtype) - 1, pixel)
            moves += 1
        # gather_nd copies pixels in two thirds of the time that gather takes.
        images = tf.gather_nd(tf.reshape(table, [-1, table.shape[-1]]), pixel[..., None])
    else:
        images = tf.gather(table, index)
    for layer, part in zip(layers[moves:], parts[moves:], strict=True):
        images = layer.transform(images, part)
    return images


def _moved_pixels(table, index, layers, parts):
    """Which pixel of the table each pixel of the batch is, integers [batch, height, width], after Reindex layers."""
    _, height, width, _ = table.shape
    # Indices of 32 bits make the gather a third faster on a CPU.
    kind = tf.int32 if table.shape[0] is not None and np.prod(table.shape[:3]) < 2**31 else tf.int64
    batch = tf.shape(index)[0]
    rows = tf.broadcast_to(tf.range(height), [batch, height])
    columns = tf.broadcast_to(tf.range(width), [batch, width])
    # The last layer's result is indexed first: its rows lead to rows of what the layer before it made.
    for layer, part in list(zip(layers, parts, strict=True))[::-1]:
        rows, columns = layer.reindex(rows, columns, height, width, part)
    rows, columns = tf.cast(rows, kind), tf.cast(columns, kind)
    starts = (tf.cast(index, kind) * (height * width))[:, None] + rows * width
    pixel = starts[:, :, None] + columns[:, None, :]
    if any(getattr(layer, "fill", None) == "constant" for layer in layers):
        black = _pixels(table, kind) - height * width
        pixel = tf.where((rows < 0)[:, :, None] | (columns < 0)[:, None, :], black, pixel)
    return pixel


def _pixels(table, kind):
    """How many pixels an image_table has."""
    return tf.cast(tf.reduce_prod(tf.shape(table, tf.int64)[:3]), kind)


MIX_DRAWS = 3  # uniform numbers an image that `mix` takes


def mix(images, labels, numbers, *, mixup=0.0, cutmix=0.0):
    """Mixes each image, and its label, with the one before it in the batch.

    mixup: Zhang et al. 2018, arXiv:1710.09412: share of the image ~ Beta(mixup, mixup), all pixels.
    cutmix: Yun et al. 2019, arXiv:1905.04899: a rectangle of the other image, its area ~ Beta(cutmix, cutmix).

    Args:
        images: uint8 [batch, h, w, c]; labels: float32 [batch, classes], rows that sum to 1.
        numbers: float32 [batch, MIX_DRAWS] in [0, 1).

    Returns: images as float32 in 0-255, labels. Under several replicas each mixes within its own part.
    """
    alpha = mixup or cutmix
    images = tf.cast(images, tf.float32)
    others, other_labels = tf.roll(images, 1, 0), tf.roll(labels, 1, 0)
    share = _beta_quantile(alpha, numbers[:, 0])
    if mixup:
        weight = share[:, None, None, None]
        images = weight * images + (1 - weight) * others
    else:
        height, width = images.shape[1:3]

        def band(side, centre):
            half = tf.sqrt(1 - share)[:, None] * side / 2
            middle = tf.floor(centre[:, None] * side)
            place = tf.range(side, dtype=tf.float32)[None]
            return (place >= tf.round(middle - half)) & (place < tf.round(middle + half))

        inside = band(height, numbers[:, 1])[:, :, None] & band(width, numbers[:, 2])[:, None, :]
        images = tf.where(inside[..., None], others, images)
        share = 1 - tf.reduce_mean(tf.cast(inside, tf.float32), [1, 2])
    return images, share[:, None] * labels + (1 - share[:, None]) * other_labels


def _beta_quantile(alpha, uniform):
    """The quantiles of Beta(alpha, alpha): a table, since TensorFlow has no inverse of `betainc`."""
    grid = np.linspace(0.0, 1.0, 2001)
    table = tf.math.betainc(tf.constant(alpha, tf.float64), tf.constant(alpha, tf.float64), grid)
    place = tf.searchsorted(table, tf.cast(uniform, tf.float64))
    place = tf.clip_by_value(place, 1, len(grid) - 1)
    low, high = tf.gather(table, place - 1), tf.gather(table, place)
    inside = (tf.cast(uniform, tf.float64) - low) / tf.maximum(high - low, 1e-12)
    return tf.cast((tf.cast(place - 1, tf.float64) + inside) / (len(grid) - 1), tf.float32)


def layers_of(augmentation: Augmentation) -> list[RandomLayer]:
    """The layers that `augmentation` asks for, in their order. Mixing is `mix`'s, not a layer."""
    a, layers = augmentation, []
    if a.flip != "none":
        layers.append(RandomFlip())
    if a.shift:
        layers.append(RandomShift(a.shift, a.fill))
    if a.rotation:
        layers.append(RandomRotation(a.rotation, a.fill))
    if a.zoom:
        layers.append(RandomZoom(a.zoom, a.fill))
    if a.cutout:
        layers.append(RandomCutout(a.cutout))
    return layers
