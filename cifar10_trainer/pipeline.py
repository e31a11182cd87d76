"""From uint8 arrays in memory to batches for the training step.

Two pieces, so that the same batch can be made on either side:

- `EpochSampler` says which images, in which order, with which random numbers: a tf.data pipeline of a few bytes an image.
- `BatchMaker` turns that into the images and labels of a batch: a pure function, mapped by tf.data on a CPU
  (with prefetch) or called inside the training step on a GPU, where the images then live.

The order of epoch e and its random numbers are a function of (seed, e) alone. So a run started at step n sees
what an uninterrupted one sees, and what an image becomes does not depend on batch size or replicas (but for mixup and cutmix, whose
partner is a neighbour in the replica's part of the batch).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from . import augment
from .config import Augmentation

# For functions without tensors in their `if`s and `for`s: AutoGraph would read their sources, for half a second in all.
no_autograph = tf.autograph.experimental.do_not_convert


@dataclass(frozen=True)
class EpochSampler:
    """The steps of a run: batches of (index int32 [batch], numbers float32 [batch, draws])."""

    n: int  # images
    batch_size: int  # over all replicas
    seed: int
    augmentation: Augmentation
    replicas: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches only: the images left over differ from epoch to epoch."""
        return self.n // self.batch_size

    @property
    def draws(self) -> int:
        mixing = self.augmentation.mixup or self.augmentation.cutmix
        layers = augment.layers_of(self.augmentation)
        return sum(layer.draws for layer in layers) + (augment.MIX_DRAWS if mixing else 0)

    def epoch(self, epoch):
        """(index int32 [n], numbers float32 [n, draws]) of one epoch; image i has row i of numbers in every order."""
        epoch = tf.cast(epoch, tf.int32)
        index = tf.random.experimental.stateless_shuffle(
            tf.range(self.n), seed=tf.stack([self.seed, 2 * epoch])
        )
        numbers = tf.random.stateless_uniform([self.n, self.draws], seed=tf.stack([self.seed, 2 * epoch + 1]))
        if self.augmentation.flip == "alternating":
            # One draw for the whole run, mirrored in every other epoch: adding a half changes sides.
            once = tf.random.stateless_uniform([self.n, 1], seed=[self.seed, -1])
            once = tf.math.floormod(once + 0.5 * tf.cast(epoch % 2, tf.float32), 1.0)
            numbers = tf.concat([once, numbers[:, 1:]], axis=1)
        return index, tf.gather(numbers, index)

    def batches(self, epoch):
        """What `epoch` gives, cut: (index [steps, replicas, part of a batch], numbers [..., draws])."""
        steps, part = self.steps_per_epoch, self.batch_size // self.replicas
        shape = [steps, self.replicas, part]
        return tuple(tf.reshape(x[: steps * self.batch_size], shape + x.shape[1:]) for x in self.epoch(epoch))

    def dataset(
        self, start: int, stop: int, first_replica: int = 0, replicas: int | None = None
    ) -> tf.data.Dataset:
        """Steps start to stop, for the replicas from `first_replica` on: one element a replica, in turn."""
        replicas = self.replicas if replicas is None else replicas

        @no_autograph
        def one_epoch(epoch):
            mine = (x[:, first_replica : first_replica + replicas] for x in self.batches(epoch))
            return tf.data.Dataset.from_tensor_slices(tuple(tf.reshape(x, [-1, *x.shape[2:]]) for x in mine))

        steps = self.steps_per_epoch
        first = start // steps
        data = tf.data.Dataset.range(first, -(-stop // steps)).flat_map(one_epoch)
        return data.skip((start - first * steps) * replicas).take((stop - start) * replicas)


@dataclass(frozen=True, eq=False)
class BatchMaker:
    """index, numbers -> images [batch, size, size, 3], labels float32 [batch, classes]."""

    augmentation: Augmentation
    num_classes: int
    size: int | None = None  # side that the images are resized to after augmentation; None: as they are

    def __call__(self, table, labels, index, numbers):
        """table (`augment.image_table` of the images) and labels int32 [n] are the whole data set.

        Returns uint8 images, or float32 in 0-255 where they were mixed or resized.
        """
        a = self.augmentation
        layers = augment.layers_of(a)
        drawn = sum(layer.draws for layer in layers)
        batch = augment.fetch(table, index, layers, numbers[:, :drawn])
        targets = tf.one_hot(tf.gather(labels, index), self.num_classes)
        if a.mixup or a.cutmix:
            batch, targets = augment.mix(batch, targets, numbers[:, drawn:], mixup=a.mixup, cutmix=a.cutmix)
        if self.size and self.size != table.shape[1]:
            batch = resize(batch, self.size)
        return batch, targets


def resize(images, size: int):
    """Square images made smaller, antialiased: two matrix products, so it is fast on every device and under XLA.

    The weights are a triangle as wide as two output pixels (`tf.image.resize` with antialias=True computes
    the same). Returns float32 in 0-255.
    """
    side, channels = images.shape[1], images.shape[3]
    scale = side / size
    centre = (np.arange(size) + 0.5) * scale - 0.5
    weights = np.maximum(0, 1 - np.abs(np.arange(side)[None] - centre[:, None]) / max(scale, 1.0))
    weights = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    # Nothing is transposed: the columns' matrix takes a whole row of pixels, its channels side by side.
    columns = np.kron(weights.T, np.eye(channels, dtype=np.float32))
    rows = tf.matmul(weights, tf.reshape(tf.cast(images, tf.float32), [-1, side, side * channels]))
    return tf.reshape(tf.matmul(tf.reshape(rows, [-1, side * channels]), columns), [-1, size, size, channels])


def training_data(
    sampler: EpochSampler,
    start: int,
    stop: int,
    *,
    table,
    labels,
    batch_maker: BatchMaker,
    any_size=False,
    context=None,
):
    """A prefetched tf.data pipeline of finished batches: the CPU's way.

    any_size: whether the images are float32 whose height and width are not part of their type, so that a step traced
    for one size of images takes them all.
    """

    @no_autograph
    def finished(index, numbers):
        images, targets = batch_maker(table, labels, index, numbers)
        if any_size:
            shape = [images.shape[0], None, None, images.shape[-1]]
            images = tf.compat.v1.placeholder_with_default(tf.cast(images, tf.float32), shape)
        return images, targets

    data = index_data(sampler, start, stop, context)
    data = data.map(finished, num_parallel_calls=os.cpu_count()).prefetch(4)
    if any_size:
        # Resizing is half of the work, and steps are short: they share their work out evenly, and all cores would wait
        # for the one that is busy with a batch. With all cores for each batch they wait half as long.
        options = tf.data.Options()
        options.threading.max_intra_op_parallelism = os.cpu_count() or 1
        data = data.with_options(options)
    return data


def index_data(sampler: EpochSampler, start: int, stop: int, context=None) -> tf.data.Dataset:
    """A prefetched tf.data pipeline of `sampler` alone, for a step that fetches by itself."""
    here, workers = (context.input_pipeline_id, context.num_input_pipelines) if context else (0, 1)
    local = sampler.replicas // workers
    return sampler.dataset(start, stop, here * local, local).prefetch(2).with_options(tuned_by_hand())


def tuned_by_hand() -> tf.data.Options:
    """No autotuning: the end of an iterator waits, for up to a minute, for the thread that does it.

    Batches are made side by side, each in one thread: up to a sixth faster than many threads for each.
    """
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    options.threading.max_intra_op_parallelism = 1
    return options
