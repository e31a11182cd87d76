"""From uint8 arrays in memory to batches for the training step.

It has two pieces, so that the same batch can be made on the host and on the device:

- `EpochSampler` determines which images come in which order with which random draws: a tf.data pipeline of a few
  bytes per image.
- `BatchMaker` turns these into the images and labels of a batch. It is a pure function. On a CPU, tf.data maps it
  and prefetches; on a GPU, where the images then live, the training step calls it.

The order of epoch e and its draws are a function of (seed, e) alone. So a run that starts at step n sees what an
uninterrupted run sees, and neither the batch size nor the number of replicas changes how an image is augmented. The
exceptions are mixup and CutMix, which mix an image with its neighbour in the replica's part of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import TypeAlias

import numpy as np
import tensorflow as tf

from . import augment
from .config import Augmentation
from .datasets.arrays import check_images, check_labels
from .errors import ConfigError, check_number, check_type
from .keras_state import keras_defaults
from .machine import cpu_count
from .runtime import check_batch

Pair: TypeAlias = tuple[tf.Tensor, tf.Tensor]
# The most classes of `make_dataset`: larger labels are IDs of images by mistake, and from 2**31 on they do not fit int32.
MAX_CLASSES = 1_000_000

# Decorates functions without a tensor in an `if` or a `for`: AutoGraph would parse their source code, which takes half
# a second in total.
no_autograph = tf.autograph.experimental.do_not_convert


@dataclass(frozen=True)
class EpochSampler:
    """Samples the steps of a run.

    Attributes:
        n: the number of training images.
        batch_size: over all replicas; a multiple of `replicas`.
        seed: of the order and of the draws, from 0.
        augmentation: determines how many draws an image needs.
        replicas: the number of replicas.
    """

    n: int
    batch_size: int
    seed: int
    augmentation: Augmentation
    replicas: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """The number of whole batches; other images are left over in each epoch."""
        return self.n // self.batch_size

    @property
    def draws(self) -> int:
        """The number of uniform draws per image and epoch."""
        layers = augment.layers_of(self.augmentation)
        return sum(layer.draws for layer in layers) + (augment.MIX_DRAWS if self.augmentation.mixes else 0)

    def epoch(self, epoch: tf.Tensor | int) -> tuple[tf.Tensor, tf.Tensor]:
        """Samples the order and the draws of one epoch.

        Args:
            epoch: from 0.

        Returns:
            The indices of all images in their order, int32 [n], and the draws of these images, float32 [n, draws], in
            [0, 1), and 1 as the first draw of a cutout that an image does not have. The draws of an image do not depend on its
            place in the order.
        """
        epoch = tf.cast(epoch, tf.int32)
        index = tf.random.experimental.stateless_shuffle(
            tf.range(self.n), seed=tf.stack([self.seed, 2 * epoch])
        )
        numbers = tf.random.stateless_uniform([self.n, self.draws], seed=tf.stack([self.seed, 2 * epoch + 1]))
        a = self.augmentation
        if a.flip == "alternating":
            # One draw per image serves the whole run. Adding a half moves it across 0.5, the threshold of the flip, so
            # every other epoch shows the mirror image.
            once = tf.random.stateless_uniform([self.n, 1], seed=[self.seed, -1])
            once = tf.math.floormod(once + 0.5 * tf.cast(epoch % 2, tf.float32), 1.0)
            numbers = tf.concat([once, numbers[:, 1:]], axis=1)
        if a.cutout and a.cutout_warmup:
            layers = augment.layers_of(a)
            kinds = [type(layer) for layer in layers]
            before = sum(layer.draws for layer in layers[: kinds.index(augment.RandomCutout)])
            first = augment.cut_out_some(numbers[:, before], tf.cast(epoch, tf.float32) / a.cutout_warmup)
            numbers = tf.concat([numbers[:, :before], first[:, None], numbers[:, before + 1 :]], axis=1)
        return index, tf.gather(numbers, index)

    def batches(self, epoch: tf.Tensor | int) -> tuple[tf.Tensor, ...]:
        """Splits an epoch into steps and replicas.

        Args:
            epoch: from 0.

        Returns:
            (index int32 [steps, replicas, part of a batch], numbers float32 [steps, replicas, part, draws]).
        """
        steps, part = self.steps_per_epoch, self.batch_size // self.replicas
        shape = [steps, self.replicas, part]
        return tuple(tf.reshape(x[: steps * self.batch_size], shape + x.shape[1:]) for x in self.epoch(epoch))

    def dataset(
        self, start: int, stop: int, first_replica: int = 0, replicas: int | None = None
    ) -> tf.data.Dataset:
        """Returns the steps from `start` to `stop`, for a worker's replicas.

        Args:
            start: the first step of the run, from 0.
            stop: the step after the last one.
            first_replica: the worker's first replica.
            replicas: how many replicas the worker has; None: all.

        Returns:
            (index int32 [part of a batch], numbers float32 [part, draws]), one element per replica, interleaved: all
            replicas of the first step, then all of the second.
        """
        replicas = self.replicas if replicas is None else replicas

        @no_autograph
        def one_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
            local = (x[:, first_replica : first_replica + replicas] for x in self.batches(epoch))
            return tf.data.Dataset.from_tensor_slices(tuple(tf.reshape(x, [-1, *x.shape[2:]]) for x in local))

        steps = self.steps_per_epoch
        first_epoch = start // steps
        data = tf.data.Dataset.range(first_epoch, -(-stop // steps)).flat_map(one_epoch)
        return data.skip((start - first_epoch * steps) * replicas).take((stop - start) * replicas)


@dataclass(frozen=True, eq=False)
class BatchMaker:
    """Makes the images and labels of a batch from what `EpochSampler` samples.

    Attributes:
        augmentation: of the images.
        num_classes: the number of classes.
        size: the side in pixels that square images are resized to after augmentation; None: the images as they are.
    """

    augmentation: Augmentation
    num_classes: int
    size: int | None = None

    def __call__(
        self, table: tf.Tensor, labels: tf.Tensor, index: tf.Tensor, numbers: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Reads, augments, mixes and resizes the images of a batch.

        Args:
            table: `augment.image_table` of the whole training set.
            labels: of the whole training set, int32 [n].
            index: int32 [batch].
            numbers: float32 [batch, draws], the draws that `EpochSampler` samples.

        Returns:
            Images [batch, height, width, channels], uint8, or float32 in 0-255 if they are mixed or resized, and
            targets, float32 [batch, classes], rows that sum to 1.
        """
        a = self.augmentation
        layers = augment.layers_of(a)
        layer_draws = sum(layer.draws for layer in layers)
        batch = augment.fetch(table, index, layers, numbers[:, :layer_draws])
        targets = tf.one_hot(tf.gather(labels, index), self.num_classes)
        if a.mixes:
            batch, targets = augment.mix(
                batch, targets, numbers[:, layer_draws:], mixup=a.mixup, cutmix=a.cutmix
            )
        if self.size and self.size != table.shape[1]:
            batch = resize(batch, self.size)
        return batch, targets


def resize(images: tf.Tensor, size: int) -> tf.Tensor:
    """Resizes square images with antialiasing, as `tf.image.resize(..., antialias=True)` does.

    It is two matrix products, so it is fast on every device, and XLA can compile it. To shrink images,
    the weights are a triangle as wide as two output pixels.

    Args:
        images: uint8 or float32 in 0-255, [batch, side, side, channels].
        size: the new side, in pixels.

    Returns:
        float32 in 0-255, [batch, size, size, channels].
    """
    side, channels = images.shape[1], images.shape[3]
    scale = side / size
    centre = (np.arange(size) + 0.5) * scale - 0.5
    weights = np.maximum(0, 1 - np.abs(np.arange(side)[None] - centre[:, None]) / max(scale, 1.0))
    weights = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    # This matrix acts on a whole row of pixels with their channels side by side, so nothing has to be transposed.
    columns = np.kron(weights.T, np.eye(channels, dtype=np.float32))
    rows = tf.matmul(weights, tf.reshape(tf.cast(images, tf.float32), [-1, side, side * channels]))
    return tf.reshape(tf.matmul(tf.reshape(rows, [-1, side * channels]), columns), [-1, size, size, channels])


def training_data(
    sampler: EpochSampler,
    start: int,
    stop: int,
    *,
    table: tf.Tensor,
    labels: tf.Tensor,
    batch_maker: BatchMaker,
    any_size: bool = False,
    context: tf.distribute.InputContext | None = None,
) -> tf.data.Dataset:
    """Makes a prefetched tf.data pipeline of finished batches, for steps on a CPU.

    Args:
        sampler: of the run.
        start: the first step.
        stop: the step after the last one.
        table: `augment.image_table` of the training images.
        labels: of the training images, int32 [n].
        batch_maker: makes the batches.
        any_size: whether to return float32 images without a static height and width, so that a step that is traced
            once accepts images of all sizes.
        context: the worker's part of the data; None: all of it.

    Returns:
        (images, targets) as `batch_maker` returns them, one element per replica of the worker, interleaved.
    """

    @no_autograph
    def make_batch(batch: Pair, data_set: Pair) -> Pair:
        images, targets = batch_maker(*data_set, *batch)
        if any_size:
            shape = [images.shape[0], None, None, images.shape[-1]]
            images = tf.compat.v1.placeholder_with_default(tf.cast(images, tf.float32), shape)
        return images, targets

    data = beside(_indices(sampler, start, stop, context), (table, labels))
    data = data.map(make_batch, num_parallel_calls=cpu_count()).prefetch(4)
    # Steps on small images are short, and resizing is half of the work of a batch. A step uses all cores evenly, so it
    # waits for a core that is busy with a batch. If all cores share each batch, it waits half as long.
    return data.with_options(tuned_by_hand(cpu_count() if any_size else 1))


@keras_defaults()
def make_dataset(
    images: np.ndarray,
    labels: np.ndarray,
    batch_size: int,
    *,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    epochs: int | None = None,
    one_hot: bool = False,
) -> tf.data.Dataset:
    """Makes the cached, shuffled, augmented and prefetched input pipeline of this project for anybody's `fit`.

    All images are in memory. The order and the augmentation of an epoch are a function of the seed and of the number of the
    epoch alone. Epoch by epoch they are those that `train` uses for the same seed, batch size and augmentation.

    Args:
        images: uint8 [n, height, width, 3], or grey ones [n, height, width], raw pixels 0-255.
        labels: integers [n] from 0, or one-hot [n, classes].
        batch_size: 1 to n. Each epoch has n // batch_size whole batches; which images are left over differs.
        augmentation: None: none.
        seed: 0 to 2**31 - 1.
        epochs: None: each iterator of the data set is the next epoch, as `fit(dataset, epochs=10)` needs it. Looking at a
            batch by `next(iter(dataset))` counts as an epoch, too, and a new process begins at epoch 1 again. A number: one pass is so many epochs, and every pass is
            the same, for exact repetition: `fit(dataset, epochs=N, steps_per_epoch=len(images) // batch_size)`.
        one_hot: whether the labels are one-hot float32 [batch, classes]; else int32 [batch]. mixup and cutmix need it.

    Returns:
        (images, labels) of a batch. Images are uint8, or float32 in 0-255 if they are mixed.

    Raises:
        ConfigError: on another shape, dtype, length or range.
    """
    images = check_images("images", images)
    labels, num_classes = check_labels("labels", labels, len(images))
    augmentation = Augmentation() if augmentation is None else augmentation
    check_type("augmentation", augmentation, Augmentation, "an Augmentation, or None")
    _check_dataset(images, num_classes, batch_size, augmentation, seed, epochs, one_hot)
    sampler = EpochSampler(len(images), batch_size, seed, augmentation)
    batch_maker = BatchMaker(augmentation, num_classes)
    data_set = augment.host_table(images), tf.constant(labels, tf.int32)
    steps = sampler.steps_per_epoch

    @no_autograph
    def make_batch(batch: Pair, data_set: Pair) -> Pair:
        (index, _), (_, targets) = batch, data_set
        made, hot = batch_maker(*data_set, *batch)
        return made, hot if one_hot else tf.gather(targets, index)

    if epochs is not None:
        indices, count = sampler.dataset(0, epochs * steps), epochs * steps
    else:
        passes, count = tf.Variable(-1, dtype=tf.int64, trainable=False), steps
        one_pass = tf.data.Dataset.range(1).map(lambda _: passes.assign_add(1))
        indices = one_pass.flat_map(
            lambda epoch: tf.data.Dataset.from_tensor_slices(tuple(x[:, 0] for x in sampler.batches(epoch)))
        )
    data = beside(indices, data_set).map(make_batch, num_parallel_calls=cpu_count()).prefetch(4)
    return data.with_options(tuned_by_hand()).apply(tf.data.experimental.assert_cardinality(count))


def _check_dataset(
    images: np.ndarray,
    num_classes: int,
    batch_size: int,
    augmentation: Augmentation,
    seed: int,
    epochs: int | None,
    one_hot: bool,
) -> None:
    """Raises ConfigError as `make_dataset` does."""
    if num_classes > MAX_CLASSES:
        raise ConfigError(
            f"labels go up to {num_classes - 1}; allowed: classes numbered from 0, at most {MAX_CLASSES:,} of them"
        )
    check_number("batch_size", batch_size, Integral, 1, len(images))
    check_batch(batch_size, len(images), mixes=augmentation.mixes)
    check_number("seed", seed, Integral, 0, 2**31 - 1)
    if epochs is not None:
        check_number("epochs", epochs, Integral, 1, words="None, or a whole number, 1 or more")
    if augmentation.mixes and not one_hot:
        raise ConfigError("one_hot is False, but mixup and cutmix mix labels; allowed: True")
    augment.check_size(augmentation, *images.shape[1:3])


def index_data(
    sampler: EpochSampler, start: int, stop: int, context: tf.distribute.InputContext | None = None
) -> tf.data.Dataset:
    """Makes a prefetched tf.data pipeline of what `sampler` samples, for steps that make their batches.

    Args:
        sampler: of the run.
        start: the first step.
        stop: the step after the last one.
        context: the worker's part of the data; None: all of it.

    Returns:
        The elements of `EpochSampler.dataset`.
    """
    return _indices(sampler, start, stop, context).with_options(tuned_by_hand())


def _indices(
    sampler: EpochSampler, start: int, stop: int, context: tf.distribute.InputContext | None
) -> tf.data.Dataset:
    """Returns `index_data` without its options. TensorFlow warns where options are set twice."""
    worker, workers = (context.input_pipeline_id, context.num_input_pipelines) if context else (0, 1)
    local = sampler.replicas // workers
    return sampler.dataset(start, stop, worker * local, local).prefetch(2)


def beside(data: tf.data.Dataset, tensors: Pair) -> tf.data.Dataset:
    """Returns the pairs (element of `data`, `tensors`).

    A tensor that a mapped function captures instead lives until Python's garbage collector comes.
    """
    return tf.data.Dataset.zip(data, tf.data.Dataset.from_tensors(tensors).repeat())


def tuned_by_hand(threads: int = 1) -> tf.data.Options:
    """Returns tf.data options without autotuning.

    The autotuner runs in a thread, and an iterator that ends waits for this thread for up to a minute.

    Args:
        threads: for each batch. With one thread per batch and several batches at a time, a pipeline is up to a sixth
            faster than with several threads per batch.
    """
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.experimental_optimization.apply_default_optimizations = False
    options.threading.max_intra_op_parallelism = threads
    return options
