"""Random augmentation of image batches, as Keras layers.

Each layer can be used in two ways.

- As a pure function of a batch and of uniform draws from [0, 1), `layer.draws` of them per image: `transform(images,
  numbers)`. `layer(images, seed=(7, 0))` makes the draws from a seed of two integers, which may be tensors, as in
  `seed=tf.stack([7, step])`. Equal seeds give equal images, eagerly, inside `tf.data` and inside a compiled step.
- As Keras's own augmentation layers, in a model or in `dataset.map(lambda x, y: (layer(x), y))`: without a seed, the layer
  draws anew at each call. It augments in training only: `predict` and `evaluate` leave the images as they are.

A flip or a shift only maps each output pixel to a source pixel, and a cutout only selects the pixels to blank.
`fetch` composes these maps, so that a single gather reads a batch from the data set and augments it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, ClassVar, TypeAlias

import keras
import numpy as np
import tensorflow as tf

from .config import FILLS, Augmentation
from .errors import ConfigError, check_number, shown, unknown

BLACK, GREY = 0, 127  # pixel values, 0-255
ALIGNMENT = 64  # bytes; TensorFlow copies an array that begins elsewhere

Matrix: TypeAlias = tuple[tuple[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]


@keras.saving.register_keras_serializable("cifar10_trainer")
class RandomLayer(keras.layers.Layer):
    """Base class: maps images [batch, height, width, channels] to images of the same shape and dtype.

    Args:
        seed: of the draws of calls without a seed; None: another one for each layer.

    Attributes:
        draws: how many uniform draws the layer needs per image.
        compilable: whether XLA can compile the layer.
    """

    draws: ClassVar[int] = 1
    compilable: ClassVar[bool] = True

    def __init__(self, *, seed: int | None = None, **kwargs: Any) -> None:
        # Keras must not cast the pixels, whatever the global dtype policy is.
        kwargs.setdefault("dtype", "float32")
        kwargs.setdefault("autocast", False)
        super().__init__(**kwargs)
        self.supports_jit = self.compilable  # what Keras's `fit` asks
        self.seed = seed
        self.seed_generator: keras.random.SeedGenerator | None = None

    def build(self, input_shape: Any) -> None:
        """Makes the seed generator. Not sooner, because the training pipeline makes layers inside graphs, without need."""
        with tf.init_scope():  # the layer may be built inside `dataset.map`
            self.seed_generator = keras.random.SeedGenerator(self.seed)
        super().build(input_shape)

    def call(
        self, images: tf.Tensor, seed: tf.Tensor | Sequence[int] | None = None, training: bool = True
    ) -> tf.Tensor:
        """Augments each image with `draws` uniform draws of its own.

        Args:
            images: [batch, height, width, channels] or one image [height, width, channels], pixels 0-255, uint8 or
                float. Height and width must be static.
            seed: two integers, as of TensorFlow's stateless random operations; None: from the layer's own generator.
                Layers that are called with the same seed get the same draws, so give each its own first integer.
            training: False returns the images as they are.

        Returns:
            The augmented images, of the same shape and dtype.

        Raises:
            ConfigError: if the images have another rank, or no static height and width, or on another shape of the seed.
        """
        if not training:
            return images
        shape = tuple(images.shape)
        if len(shape) == 3:
            return self.call(tf.convert_to_tensor(images)[None], seed)[0]
        if len(shape) != 4 or None in shape[1:]:
            raise ConfigError(
                f"images has shape {shape}; allowed: (batch, height, width, channels) or one image, with static sides"
            )
        if seed is None:
            assert self.seed_generator is not None  # `build` made it
            seed = tf.convert_to_tensor(self.seed_generator.next())
        if (shape := tf.convert_to_tensor(seed).shape) != (2,):
            raise ConfigError(f"seed has shape {tuple(shape)}; allowed: two integers")
        # XLA would take another algorithm than TensorFlow by itself.
        drawn = [tf.shape(images)[0], self.draws]
        numbers = tf.random.stateless_uniform(drawn, tf.cast(seed, tf.int32), alg="philox")
        return self.transform(images, numbers)

    def transform(self, images: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
        """Augments each image as its draws determine.

        Args:
            images: uint8 or float [batch, height, width, channels].
            numbers: float32 [batch, draws], uniform draws from [0, 1).

        Returns:
            The augmented images, of the same shape and dtype.
        """
        raise NotImplementedError

    def compute_output_spec(
        self, images: keras.KerasTensor, seed: Any = None, training: bool = True
    ) -> keras.KerasTensor:
        """Returns the shape and dtype of the images: the layer changes neither."""
        return keras.KerasTensor(images.shape, images.dtype)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of the constructor."""
        return {**super().get_config(), "seed": self.seed}


class Reindex(RandomLayer):
    """A layer that only moves pixels: row r of its output is row rows[r] of its input, and so for columns."""

    def reindex(
        self, rows: tf.Tensor, columns: tf.Tensor, height: int, width: int, numbers: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Maps rows and columns of the layer's output to those of its input.

        Args:
            rows: int32 [batch, n], rows of the output; -1 stands for a black row.
            columns: int32 [batch, m], columns of the output; -1 stands for a black column.
            height: of the images, in pixels.
            width: of the images, in pixels.
            numbers: float32 [batch, draws], uniform draws from [0, 1).

        Returns:
            Rows and columns of the input, int32, of the same shapes; -1 stands for black.
        """
        raise NotImplementedError

    def transform(self, images: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
        """See `RandomLayer.transform`."""
        index = tf.range(tf.shape(images)[0])
        return fetch(image_table(images), index, [self], numbers)


@keras.saving.register_keras_serializable("cifar10_trainer")
class RandomFlip(Reindex):
    """Mirrors an image left to right if its draw is below one half."""

    def reindex(
        self, rows: tf.Tensor, columns: tf.Tensor, height: int, width: int, numbers: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """See `Reindex.reindex`."""
        mirrored = tf.where(columns < 0, columns, width - 1 - columns)
        return rows, tf.where(numbers[:, :1] < 0.5, mirrored, columns)


@keras.saving.register_keras_serializable("cifar10_trainer")
class RandomShift(Reindex):
    """Moves an image by -pixels to +pixels along each axis, like padding by `pixels` and cropping at random.

    Args:
        pixels: the largest shift, 0 or more.
        fill: what enters at the border. "reflect" mirrors the image without repeating its border (`mode="reflect"`
            of `numpy.pad`), "nearest" repeats the border, "constant" is black.

    Raises:
        ConfigError: if an argument is out of range.
    """

    draws = 2

    def __init__(self, pixels: int, fill: str = "reflect", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if fill not in FILLS:
            raise unknown("fill", fill, FILLS)
        check_number("pixels", pixels, Integral, 0)
        self.pixels = pixels
        self.fill = fill

    def _shift(self, index: tf.Tensor, size: int, number: tf.Tensor) -> tf.Tensor:
        """Maps indices along one axis of `size` pixels to those before the shift; -1 is black, before and after."""
        offset = tf.cast(tf.floor(number * (2 * self.pixels + 1)), tf.int32) - self.pixels
        source = index + offset
        if self.fill == "reflect":
            source = (size - 1) - tf.abs((size - 1) - tf.abs(source))
        elif self.fill == "nearest":
            source = tf.clip_by_value(source, 0, size - 1)
        else:
            source = tf.where((source >= 0) & (source < size), source, -1)
        return tf.where(index < 0, index, source)

    def check(self, height: int, width: int) -> None:
        """Checks that images of this size have enough pixels to mirror.

        Raises:
            ConfigError: if they do not.
        """
        if self.fill == "reflect" and self.pixels >= min(height, width):
            raise ConfigError(
                f"shift is {self.pixels} pixels of {height}x{width}; allowed: less than the shorter side"
            )

    def reindex(
        self, rows: tf.Tensor, columns: tf.Tensor, height: int, width: int, numbers: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """See `Reindex.reindex`."""
        self.check(height, width)
        return self._shift(rows, height, numbers[:, :1]), self._shift(columns, width, numbers[:, 1:2])

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "pixels": self.pixels, "fill": self.fill}


class Projective(RandomLayer):
    """A random linear map about the image's centre, with bilinear interpolation.

    Args:
        amount: the strength, in the unit of the subclass.
        fill: what enters at the border: "reflect" mirrors the image and repeats its border (`mode="reflect"` of
            `scipy.ndimage`), "nearest" repeats the border, "constant" is black.

    Raises:
        ConfigError: if `fill` is unknown, or the amount out of range.

    Attributes:
        most: the largest amount.
    """

    most: ClassVar[float] = math.inf
    compilable = False  # XLA has no kernel for ImageProjectiveTransformV3

    def __init__(self, amount: float, fill: str = "reflect", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if fill not in FILLS:
            raise unknown("fill", fill, FILLS)
        check_number("amount", amount, Real, 0, self.most)
        self.amount = amount
        self.fill = fill

    def matrix(self, numbers: tf.Tensor) -> Matrix:
        """Returns the map from the output's coordinates (x, y), counted from the centre, to the input's.

        Args:
            numbers: float32 [batch, draws], uniform draws from [0, 1).

        Returns:
            ((a, b), (c, d)), each float32 [batch]: x_in = a x + b y, y_in = c x + d y.
        """
        raise NotImplementedError

    def transform(self, images: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
        """See `RandomLayer.transform`."""
        (a, b), (c, d) = self.matrix(numbers)
        y, x = ((s - 1) / 2 for s in images.shape[1:3])
        zero = tf.zeros_like(a)
        rows = [a, b, x - a * x - b * y, c, d, y - c * x - d * y, zero, zero]
        mapped = tf.raw_ops.ImageProjectiveTransformV3(
            images=tf.cast(images, tf.float32),
            transforms=tf.stack(rows, axis=1),
            output_shape=images.shape[1:3],
            interpolation="BILINEAR",
            fill_mode=self.fill.upper(),
            fill_value=0.0,
        )
        return tf.cast(tf.round(mapped) if tf.as_dtype(images.dtype).is_integer else mapped, images.dtype)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "amount": self.amount, "fill": self.fill}


@keras.saving.register_keras_serializable("cifar10_trainer")
class RandomRotation(Projective):
    """Rotates an image about its centre, by -amount to +amount turns (0.1 is 36 degrees)."""

    def matrix(self, numbers: tf.Tensor) -> Matrix:
        """See `Projective.matrix`."""
        angle = (2 * numbers[:, 0] - 1) * (2 * np.pi * self.amount)
        cos, sin = tf.cos(angle), tf.sin(angle)
        return (cos, -sin), (sin, cos)


@keras.saving.register_keras_serializable("cifar10_trainer")
class RandomZoom(Projective):
    """Zooms so that 1 - amount to 1 + amount of an image's height is visible and, independently, of its width."""

    draws = 2
    most = 1.0

    def matrix(self, numbers: tf.Tensor) -> Matrix:
        """See `Projective.matrix`."""
        scale = 1 + (2 * numbers - 1) * self.amount
        zero = tf.zeros_like(scale[:, 0])
        return (scale[:, 1], zero), (zero, scale[:, 0])


class Recolour(RandomLayer):
    """A layer that changes the values of pixels, and so has to know their range.

    Args:
        value_range: the values of a black and of a white pixel, as of Keras's own layers.

    Raises:
        ConfigError: if the range is not two numbers, the smaller one first.
    """

    def __init__(self, *, value_range: Sequence[float] = (0, 255), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        two = isinstance(value_range, tuple | list) and len(value_range) == 2
        finite = two and all(isinstance(v, Real) and math.isfinite(v) for v in value_range)
        if not (finite and value_range[0] < value_range[1]):
            raise ConfigError(
                f"value_range is {shown(value_range)}; allowed: two numbers, the smaller one first, as (0, 255) or (0, 1)"
            )
        self.value_range = float(value_range[0]), float(value_range[1])

    @property
    def grey(self) -> float:
        """The value of a middle grey pixel."""
        low, high = self.value_range
        return low + (high - low) * GREY / 255

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "value_range": self.value_range}


@keras.saving.register_keras_serializable("cifar10_trainer")
class RandomCutout(Recolour):
    """Blanks a square to middle grey (DeVries and Taylor 2017, arXiv:1708.04552).

    The centre of the square is anywhere in the image, so a part of the square may lie outside.

    Args:
        size: the side of the square, in pixels, 0 or more.
        value_range: the values of a black and of a white pixel.

    Raises:
        ConfigError: if an argument is out of range.
    """

    draws = 2

    def __init__(self, size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_number("size", size, Integral, 0)
        self.size = size

    def transform(self, images: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
        """See `RandomLayer.transform`."""
        _, height, width, _ = images.shape
        mask = self.covered(height, width, numbers)[..., None]
        return tf.where(mask, tf.saturate_cast(self.grey, images.dtype), images)

    def covered(self, height: int, width: int, numbers: tf.Tensor) -> tf.Tensor:
        """Returns the mask of the pixels that are blanked, bool [batch, height, width]."""

        def interval(side: int, number: tf.Tensor) -> tf.Tensor:
            first = tf.cast(tf.floor(number * side), tf.int32) - self.size // 2
            offset = tf.range(side)[None] - first
            return (offset >= 0) & (offset < self.size)

        # A first draw of 1 stands for no square, see `cut_out_some`.
        rows = interval(height, numbers[:, :1]) & (numbers[:, :1] < 1)
        return rows[:, :, None] & interval(width, numbers[:, 1:2])[:, None, :]

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "size": self.size}


@keras.saving.register_keras_serializable("cifar10_trainer")
class RandomColorJitter(Recolour):
    """Changes an image's brightness, then its contrast: adds one number to all of it, then scales its distance to middle grey.

    The colour channels of an image change alike. Values that leave the range are clipped.

    Args:
        brightness: the largest sum, in either direction, as a share of the range: 0.1 is 25.5 of 255. 0 to 1.
        contrast: the factor is 1 - contrast to 1 + contrast. 0 to 1.
        value_range: the values of a black and of a white pixel.

    Raises:
        ConfigError: if an argument is out of range.
    """

    draws = 2

    def __init__(self, brightness: float = 0.0, contrast: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_number("brightness", brightness, Real, 0, 1)
        check_number("contrast", contrast, Real, 0, 1)
        self.brightness = brightness
        self.contrast = contrast

    def transform(self, images: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
        """See `RandomLayer.transform`."""
        low, high = self.value_range
        more = (2 * numbers[:, 0] - 1) * (self.brightness * (high - low))
        factor = 1 + (2 * numbers[:, 1] - 1) * self.contrast
        # (pixel + more - grey) * factor + grey
        offset = (more - self.grey) * factor + self.grey
        jittered = tf.cast(images, tf.float32) * factor[:, None, None, None] + offset[:, None, None, None]
        jittered = tf.clip_by_value(jittered, low, high)
        if tf.as_dtype(images.dtype).is_integer:
            jittered = tf.round(jittered)
        return tf.saturate_cast(jittered, images.dtype)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "brightness": self.brightness, "contrast": self.contrast}


def cut_out_some(numbers: tf.Tensor, share: tf.Tensor | float) -> tf.Tensor:
    """Changes first draws of `RandomCutout` so that it cuts only some images.

    Args:
        numbers: float32 [batch], uniform draws from [0, 1).
        share: of the images that have a square, 0 or more; from 1 on, all.

    Returns:
        float32 [batch]: uniform in [0, 1) for this share of the images, and 1 for the others.
    """
    share = tf.minimum(tf.cast(share, tf.float32), 1.0)
    return tf.where(numbers < share, tf.math.divide_no_nan(numbers, share), 1.0)


def image_table(images: tf.Tensor) -> tf.Tensor:
    """Appends one image that holds the blank pixels: its first pixel is black, all others are grey.

    `fetch` reads black and grey pixels from there, in the same gather as those of the images.

    Args:
        images: uint8, or float where a layer is called by itself, [n, height, width, channels].

    Returns:
        [n + 1, height, width, channels] of the same dtype.
    """
    first = tf.range(math.prod(images.shape[1:])) < images.shape[-1]
    blank = tf.where(first, tf.constant(BLACK, images.dtype), tf.constant(GREY, images.dtype))
    return tf.concat([images, tf.reshape(blank, [1, *images.shape[1:]])], axis=0)


def host_table(images: np.ndarray) -> tf.Tensor:
    """Returns `image_table` of a whole data set, in an array of NumPy, which gives its memory back to the system at its end.

    What TensorFlow's allocator has once taken for a tensor it keeps until the process ends.

    Args:
        images: uint8 [n, height, width, channels].

    Returns:
        uint8 [n + 1, height, width, channels].
    """
    n, *shape = images.shape
    size = (n + 1) * math.prod(shape)
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    table = memory[start : start + size].reshape(n + 1, *shape)
    table[:n], table[n], table[n, 0, 0] = images, GREY, BLACK
    return tf.experimental.dlpack.from_dlpack(table.__dlpack__())


def fetch(table: tf.Tensor, index: tf.Tensor, layers: Sequence[RandomLayer], numbers: tf.Tensor) -> tf.Tensor:
    """Reads the images at `index` and augments them with `layers`.

    The leading flips and shifts, and a cutout right after them, become a part of the gather that reads the images.

    Args:
        table: `image_table` of the images, [n + 1, height, width, channels].
        index: int32 [batch], from 0 to n - 1.
        layers: the layers, in the order in which they act.
        numbers: float32 [batch, draws of all layers], in the order of the layers: uniform draws from [0, 1), or what `cut_out_some`
            made of them.

    Returns:
        [batch, height, width, channels] of the dtype of `table`.
    """
    parts = tf.split(numbers, [layer.draws for layer in layers], axis=1) if layers else []
    gathered = next((i for i, layer in enumerate(layers) if not isinstance(layer, Reindex)), len(layers))
    cutout = gathered < len(layers) and isinstance(layers[gathered], RandomCutout)
    if gathered or cutout:
        pixel = _source_pixels(table, index, layers[:gathered], parts[:gathered])
        if cutout:
            mask = layers[gathered].covered(*table.shape[1:3], parts[gathered])
            grey = _num_pixels(table, pixel.dtype) - 1
            pixel = tf.where(mask, grey, pixel)
            gathered += 1
        # gather_nd copies pixels in two thirds of the time that gather takes.
        images = tf.gather_nd(tf.reshape(table, [-1, table.shape[-1]]), pixel[..., None])
    else:
        images = tf.gather(table, index)
    for layer, part in zip(layers[gathered:], parts[gathered:], strict=True):
        images = layer.transform(images, part)
    return images


def _source_pixels(
    table: tf.Tensor, index: tf.Tensor, layers: Sequence[RandomLayer], parts: Sequence[tf.Tensor]
) -> tf.Tensor:
    """Returns the table's pixel that each output pixel of Reindex layers comes from, integers [batch, h, w]."""
    _, height, width, _ = table.shape
    # 32-bit indices make the gather a third faster on a CPU.
    dtype = tf.int32 if table.shape[0] is not None and np.prod(table.shape[:3]) < 2**31 else tf.int64
    batch = tf.shape(index)[0]
    rows = tf.broadcast_to(tf.range(height), [batch, height])
    columns = tf.broadcast_to(tf.range(width), [batch, width])
    # From the last layer to the first: a layer's input is the output of the layer before it.
    for layer, part in list(zip(layers, parts, strict=True))[::-1]:
        rows, columns = layer.reindex(rows, columns, height, width, part)
    rows, columns = tf.cast(rows, dtype), tf.cast(columns, dtype)
    starts = (tf.cast(index, dtype) * (height * width))[:, None] + rows * width
    pixel = starts[:, :, None] + columns[:, None, :]
    if any(getattr(layer, "fill", None) == "constant" for layer in layers):
        black = _num_pixels(table, dtype) - height * width
        pixel = tf.where((rows < 0)[:, :, None] | (columns < 0)[:, None, :], black, pixel)
    return pixel


def _num_pixels(table: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Returns the number of pixels in an image_table."""
    return tf.cast(tf.reduce_prod(tf.shape(table, tf.int64)[:3]), dtype)


MIX_DRAWS = 3  # uniform draws per image that `mix` takes


def mix(
    images: tf.Tensor, labels: tf.Tensor, numbers: tf.Tensor, *, mixup: float = 0.0, cutmix: float = 0.0
) -> tuple[tf.Tensor, tf.Tensor]:
    """Mixes each image and its label with the one before it in the batch, the first one with the last, by mixup or by CutMix.

    Mixup (Zhang et al. 2018, arXiv:1710.09412) averages the two images, with a weight from Beta(mixup, mixup). CutMix
    (Yun et al. 2019, arXiv:1905.04899) pastes a rectangle of the other image, with a share of the area from
    Beta(cutmix, cutmix). Under several replicas, each replica mixes within its own part of the batch.

    Args:
        images: uint8 [batch, height, width, channels].
        labels: float32 [batch, classes], rows that sum to 1.
        numbers: float32 [batch, MIX_DRAWS], uniform draws from [0, 1).
        mixup: alpha of the Beta distribution; 0 for CutMix.
        cutmix: alpha of the Beta distribution; only used if `mixup` is 0.

    Returns:
        Images, float32 in 0-255, and labels, both of the shapes they came in.
    """
    alpha = mixup or cutmix
    images = tf.cast(images, tf.float32)
    partners, partner_labels = tf.roll(images, 1, 0), tf.roll(labels, 1, 0)
    share = _beta_quantile(alpha, numbers[:, 0])
    if mixup:
        weight = share[:, None, None, None]
        images = weight * images + (1 - weight) * partners
    else:
        height, width = images.shape[1:3]

        def interval(side: int, centre: tf.Tensor) -> tf.Tensor:
            half = tf.sqrt(1 - share)[:, None] * side / 2
            middle = tf.floor(centre[:, None] * side)
            position = tf.range(side, dtype=tf.float32)[None]
            return (position >= tf.round(middle - half)) & (position < tf.round(middle + half))

        mask = interval(height, numbers[:, 1])[:, :, None] & interval(width, numbers[:, 2])[:, None, :]
        images = tf.where(mask[..., None], partners, images)
        share = 1 - tf.reduce_mean(tf.cast(mask, tf.float32), [1, 2])  # a rectangle may lie partly outside
    return images, share[:, None] * labels + (1 - share[:, None]) * partner_labels


def _beta_quantile(alpha: float, uniform: tf.Tensor) -> tf.Tensor:
    """Returns quantiles of Beta(alpha, alpha), from a table, because TensorFlow has no inverse of `betainc`."""
    grid = np.linspace(0.0, 1.0, 2001)
    table = tf.math.betainc(tf.constant(alpha, tf.float64), tf.constant(alpha, tf.float64), grid)
    place = tf.searchsorted(table, tf.cast(uniform, tf.float64))
    place = tf.clip_by_value(place, 1, len(grid) - 1)
    low, high = tf.gather(table, place - 1), tf.gather(table, place)
    fraction = (tf.cast(uniform, tf.float64) - low) / tf.maximum(high - low, 1e-12)
    return tf.cast((tf.cast(place - 1, tf.float64) + fraction) / (len(grid) - 1), tf.float32)


def layers_of(augmentation: Augmentation) -> list[RandomLayer]:
    """Makes the layers of `augmentation`, in their order. Mixup and CutMix are `mix`, which is not a layer."""
    a = augmentation
    layers: list[RandomLayer] = []
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
    if a.brightness or a.contrast:
        layers.append(RandomColorJitter(a.brightness, a.contrast))
    return layers


def check_size(augmentation: Augmentation, height: int, width: int) -> None:
    """Raises ConfigError where images of this size have too few pixels for `augmentation`."""
    for layer in layers_of(augmentation):
        if isinstance(layer, RandomShift):
            layer.check(height, width)
