"""The training step and its loop, the same for every strategy, precision and device.

`Engine` trains the training model (`accelerate.py`) of a plain Keras model. The gradients are a pure function of the
variables' values (`stateless_call`), so XLA can compile that function on a GPU. Several steps run in one loop inside
the graph. On a single GPU, XLA compiles that whole loop. `Model.fit` does not work with all of this under every
strategy.

The whole state of the engine is a dict of arrays: `state()` and `restore()`. The order of the data is a function of
(seed, epoch). So a run that is restored at step n continues exactly as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf

from . import augment, models, optim, runtime, scoring
from .accelerate import check_sizes, make_training_model, synchronizes
from .config import Config
from .datasets.arrays import check_images, check_labels
from .errors import ConfigError, RunError, check_number
from .keras_state import StepSeeds, drawing_from, keras_defaults, seeded
from .models.initial import initial_model
from .models.own import draws_of, plain_model
from .pipeline import BatchMaker, EpochSampler, beside, index_data, no_autograph, training_data, tuned_by_hand

# Bytes. TensorFlow's allocator takes memory in regions, of which each is twice the one before. With a large one at once, the
# tensors of a step find room in few regions, where fewer gaps stay. Linux gives memory only where something is written.
REGION = 512 << 20

SMALL_BATCH = 128  # for the evaluation of at most so many images

PerReplica: TypeAlias = Any  # a tensor, or under a strategy of several replicas one tensor for each
Loop: TypeAlias = Callable[[Any, tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]


@dataclass
class RunningMetrics:
    """Sums over the steps since this object was made."""

    loss_sum: float = 0.0
    num_correct: float = 0.0
    num_images: int = 0

    def logs(self) -> dict[str, float]:
        """Returns the mean loss and the accuracy, 0-1; zeros before the first step."""
        n = max(self.num_images, 1)
        return {"loss": self.loss_sum / n, "accuracy": self.num_correct / n}


class Engine:
    """Trains `model` on arrays in memory.

    Args:
        model: plain, functional, uncompiled; it ends in probabilities, and before them in logits.
        config: batch size, seed, augmentation, optimizer, schedule and so on.
        images: the training images, uint8 [n, height, width, channels].
        labels: the training labels, integers [n] from 0 to num_classes - 1.
        strategy: a tf.distribute strategy.
        policy: a Keras dtype policy's name.
        num_classes: the number of classes.
        on_device: whether images live and are augmented on the device that runs the step. None: on GPUs.
        compiled: whether XLA compiles the loop of whole steps or, where it cannot, the gradient function. It can
            compile the loop if there is one replica, which makes its own batches, and if XLA supports all augmentation
            layers. None: on GPUs, without synchronized batch norm.

    Attributes:
        sizes: the sides of the images in pixels, each for an equal share of the steps. This is progressive resizing:
            training on small images first, because they cost less. Empty: the images as they are.
        step: how many steps the engine has taken, of `steps`.
        running: sums over the steps since the caller last replaced it.
        resumes_exactly: whether `state` holds all that a step depends on. False: a layer of the model draws from `tf.random`.

    Raises:
        ConfigError: if images or labels are of another shape, dtype or range, or the model or the augmentation does not fit
            them, or the batch their number.
    """

    averages: list[tf.Variable]  # slow weights of lookahead, see `_lookahead`; empty without it
    table: PerReplica  # augment.image_table of the images
    labels: PerReplica  # int32 [n]
    compile_loop: bool  # whether XLA compiles the loop of whole steps
    # Those of the training model, and the seed of what draws without a generator.
    non_trainable: list[keras.Variable]
    _gradients_of: Callable[..., Any]  # `_gradients`, compiled by XLA or not

    @keras_defaults()
    def __init__(
        self,
        model: keras.Model,
        config: Config,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        strategy: tf.distribute.Strategy,
        policy: str,
        num_classes: int,
        on_device: bool | None = None,
        compiled: bool | None = None,
    ) -> None:
        gpu = bool(tf.config.list_logical_devices("GPU"))
        images = check_images("images", images)
        labels = self._check_labels(labels, len(images), num_classes, model)
        self._image_shape = images.shape[1:]
        self.model = model
        self.config = config
        self.strategy = strategy
        self.policy = policy
        self.num_classes = num_classes
        self.on_device = gpu if on_device is None else on_device
        synchronize = config.synchronize_batch_norm or synchronizes(model)
        self.compiled = gpu and not synchronize if compiled is None else compiled
        self.replicas: int = strategy.num_replicas_in_sync
        mixes = config.augmentation.mixes
        runtime.check_batch(config.batch_size, len(images), self.replicas, mixes=mixes)
        ids = strategy.experimental_distribute_values_from_function(lambda c: c.replica_id_in_sync_group)
        self._replica_ids: tuple[int, ...] = strategy.experimental_local_results(ids)  # of this worker

        self.sizes = self._training_sizes(*images.shape[1:3])
        self.sampler = EpochSampler(
            len(images), config.batch_size, config.seed, config.augmentation, self.replicas
        )
        self.steps_per_epoch = self.sampler.steps_per_epoch
        self.steps = max(1, round(config.epochs * self.steps_per_epoch))
        self.step = 0
        self.running = RunningMetrics()
        self.class_weights = _class_weights(config.class_weights, labels, num_classes)
        if not gpu:
            tf.raw_ops.Empty(shape=[REGION], dtype=tf.uint8)
        with strategy.scope():
            self._make_variables()
        self._place_data(images, labels)
        self._choose_compilation()

        self._loops: dict[int | None, Loop] = {}  # by image size
        self._iterator: tuple[tuple[int, int | None], Iterator] | None = None
        self._sampled_epochs: dict[int, Future] = {}
        self._executor = ThreadPoolExecutor(1)

    @staticmethod
    def _check_labels(labels: Any, n: int, num_classes: int, model: keras.Model) -> np.ndarray:
        """Returns the labels as int64 [n]. Raises ConfigError where they or the model do not fit the number of classes."""
        labels, count = check_labels("labels", labels, n)
        outputs = model.output_shape[-1]
        if count > num_classes or outputs != num_classes:
            raise ConfigError(
                f"num_classes is {num_classes}, but the labels go up to {count - 1} and the model has {outputs} outputs;"
                " allowed: as many as the model has outputs, and labels below that"
            )
        return labels

    def _training_sizes(self, height: int, width: int) -> tuple[int, ...]:
        """Returns the sides of progressive resizing for these images. Raises ConfigError if something does not fit."""
        config = self.config
        # The last size of the config stands for the images as they are.
        sizes = tuple(round(height * size / config.sizes[-1]) for size in config.sizes)
        if sizes:
            if height != width:
                raise ConfigError(
                    f"sizes is {config.sizes}, but images are {height}x{width};"
                    " allowed: (), which leaves all images as they are"
                )
            check_sizes(self.model, sizes)
        augment.check_size(config.augmentation, height, width)
        return sizes

    def _make_variables(self) -> None:
        """Makes the training model, its optimizer and the averages of lookahead."""
        config = self.config
        self.training_model = make_training_model(
            self.model,
            self.policy,
            any_size=bool(self.sizes),
            synchronize=config.synchronize_batch_norm,
            replicas=self.replicas,
            compiled=self.compiled,
        )
        draws = draws_of(self.model)
        self.resumes_exactly = not draws.tensorflow
        seeds = [keras.random.SeedGenerator(config.seed).state] if draws.keras else []
        self.non_trainable = [*self.training_model.non_trainable_variables, *seeds]
        self.optimizer = optim.make_optimizer(config.optimizer, config.schedule, self.steps, self.replicas)
        optim.leave_out_others(self.optimizer, self.training_model)
        if self.policy == "mixed_float16":
            self.optimizer = keras.optimizers.LossScaleOptimizer(self.optimizer)
        self.optimizer.build(self.training_model.trainable_variables)
        self.averages = []
        if config.averaging.every:
            self.averages = [tf.Variable(v.numpy(), trainable=False) for v in self._averaged_variables()]

    def _place_data(self, images: np.ndarray, labels: np.ndarray) -> None:
        """Puts the training set where the batches are made: on each device, or in the host's memory."""
        self.table = augment.host_table(images)
        self.labels = tf.constant(labels, tf.int32)
        if self.on_device:
            self.table, self.labels = (
                self.strategy.experimental_distribute_values_from_function(lambda _, x=x: tf.identity(x))
                for x in (self.table, self.labels)
            )

    def _choose_compilation(self) -> None:
        """Decides what XLA compiles: the loop of whole steps, the gradient function, or nothing."""
        # XLA must compile neither reductions over replicas nor what tf.data does.
        cluster = isinstance(self.strategy, tf.distribute.MultiWorkerMirroredStrategy)
        single_replica = self.on_device and self.replicas == 1 and not cluster
        layers = augment.layers_of(self.config.augmentation)
        # A user's own model may hold layers that XLA cannot compile.
        compilable = self.compiled and all(x.supports_jit for x in self.training_model._flatten_layers())
        self.compile_loop = compilable and single_replica and all(layer.compilable for layer in layers)
        compile_gradients = compilable and not self.compile_loop
        self._gradients_of = (
            tf.function(self._gradients, jit_compile=True) if compile_gradients else self._gradients
        )

    @property
    def images(self) -> np.ndarray:
        """The training images, uint8 [n, height, width, channels], not copied if they lie in the host's memory."""
        table = self.strategy.experimental_local_results(self.table)[0]
        return np.asarray(table)[:-1]

    def release_images(self) -> None:
        """Lets go of the training images: no step can follow."""
        self._iterator, self._loops, self._sampled_epochs = None, {}, {}
        del self.table, self.labels

    # -- the step ------------------------------------------------------------------------------------------------

    def _averaged_variables(self) -> list[keras.Variable]:
        """Returns the variables of which lookahead keeps averages: the weights, and the statistics of batch norm."""
        statistics = [
            v
            for v in self.training_model.non_trainable_variables
            if keras.backend.is_float_dtype(v.dtype) and v.path.endswith(("moving_mean", "moving_variance"))
        ]
        return [*self.training_model.trainable_variables, *statistics]

    def _gradients(
        self,
        weights: list[tf.Tensor],
        non_trainable: list[tf.Tensor],
        images: tf.Tensor,
        targets: tf.Tensor,
    ) -> tuple[list[tf.Tensor], list[tf.Tensor], tf.Tensor, tf.Tensor]:
        """Computes one replica's part of a step, as a pure function.

        Args:
            weights: values of the trainable variables.
            non_trainable: values of the other variables.
            images: uint8 or float32 in 0-255, [part of the batch, height, width, channels].
            targets: float32 [part of the batch, classes], rows that sum to 1.

        Returns:
            Gradients, new values of the other variables, sum of the losses, number of correct predictions.
        """
        count = len(self.training_model.non_trainable_variables)
        non_trainable, seeds = non_trainable[:count], [StepSeeds(seed) for seed in non_trainable[count:]]
        drawing = drawing_from(seeds[0]) if seeds else contextlib.nullcontext()
        with tf.GradientTape() as tape, drawing:
            tape.watch(weights)
            logits, non_trainable, penalties = self.training_model.stateless_call(
                weights, non_trainable, images, training=True, return_losses=True
            )
            aims, image_weights = targets, None
            if self.class_weights is not None:
                aims, image_weights = weigh(targets, self.class_weights)
            smoothing = self.config.label_smoothing
            smoothed = aims * (1 - smoothing) + smoothing / self.num_classes
            logits = tf.cast(logits, tf.float32)  # in 16 bits where a user's own model ends in a nested one
            losses = tf.nn.softmax_cross_entropy_with_logits(smoothed, logits)
            if image_weights is not None:
                losses *= image_weights
            # Keras optimizers sum over replicas, so each replica adds its share of the mean over the global batch.
            loss = tf.reduce_sum(losses) / self.config.batch_size
            # What a layer adds may have one value for each image, and any dtype: Keras adds the sums.
            penalties = [tf.reduce_sum(tf.cast(penalty, loss.dtype)) for penalty in penalties]
            objective = loss + tf.add_n(penalties) / self.replicas if penalties else loss
            if isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
                objective = self.optimizer.scale_loss(objective)
        gradients = tape.gradient(objective, weights)
        num_correct = tf.reduce_sum(tf.cast(tf.argmax(logits, 1) == tf.argmax(targets, 1), tf.float32))
        non_trainable = [*non_trainable, *(generator.seed for generator in seeds)]
        return gradients, non_trainable, tf.reduce_sum(losses), num_correct

    @no_autograph
    def _replica_step(
        self, batch: tuple[tf.Tensor, ...], data: tuple[tf.Tensor, ...], batch_maker: BatchMaker
    ) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
        """Takes one replica's part of a step. See `_step` for the arguments, `_gradients` for what it returns."""
        images, targets = batch_maker(*data, *batch) if self.on_device else batch
        weights = [tf.convert_to_tensor(v.value) for v in self.training_model.trainable_variables]
        non_trainable = [tf.convert_to_tensor(v.value) for v in self.non_trainable]
        gradients, non_trainable, loss_sum, num_correct = self._gradients_of(
            weights, self._with_own_seeds(non_trainable), images, targets
        )
        if isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer) and self.replicas > 1:
            # Keras looks for an overflow in the gradients of the first replica only, before it sums all of them. A NaN
            # that is added on every replica makes Keras skip the step on all of them.
            finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in gradients])
            poison = tf.where(finite, 0.0, math.nan)
            poison = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, poison)
            gradients = [g + tf.cast(poison, g.dtype) for g in gradients]
        if self.config.optimizer.clip_norm is not None and self.replicas > 1:  # see `make_optimizer`
            gradients = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.MEAN, gradients)
        self.optimizer.apply(gradients, self.training_model.trainable_variables)
        return self._with_own_seeds(non_trainable), loss_sum, num_correct

    def _with_own_seeds(self, non_trainable: list[tf.Tensor]) -> list[tf.Tensor]:
        """Turns the seeds of random layers into those of this replica, and these into the common ones again.

        With equal seeds, all replicas would draw the same dropout mask, each for its part of the batch.

        Args:
            non_trainable: values of the non-trainable variables.

        Returns:
            The same values, the seeds xor the number of the replica. On the first replica nothing changes.
        """
        if self.replicas == 1:
            return non_trainable
        number = tf.distribute.get_replica_context().replica_id_in_sync_group
        return [
            tf.bitwise.bitwise_xor(value, tf.cast([number, 0], value.dtype))  # a seed and a counter
            if variable.path.endswith("seed_generator_state")
            else value
            for variable, value in zip(self.non_trainable, non_trainable, strict=True)
        ]

    @no_autograph
    def _apply_non_trainable(self, non_trainable: list[PerReplica]) -> None:
        """Assigns the non-trainable variables: the mean over replicas; counters are equal on all replicas."""
        for variable, new in zip(self.non_trainable, non_trainable, strict=True):
            if not keras.backend.is_float_dtype(variable.dtype):
                new = self.strategy.experimental_local_results(new)[0]
            elif self.replicas > 1:
                new = self.strategy.reduce(tf.distribute.ReduceOp.MEAN, new, axis=None)
            self.strategy.extended.update(variable.value, lambda v, n: v.assign(n), args=(new,))

    @no_autograph
    def _lookahead(self) -> None:
        """Moves the averages towards the weights, and sets the weights to the averages.

        Lookahead (Zhang et al. 2019, arXiv:1907.08610) does this every k steps. Here the averages move less and less as
        the run progresses, as in airbench (Jordan 2024, arXiv:2404.00498).
        """
        rule = self.config.averaging
        progress = tf.cast(self.optimizer.iterations, tf.float32) / self.steps
        keep = rule.decay**rule.every * progress**3
        for variable, average in zip(self._averaged_variables(), self.averages, strict=True):
            share = tf.cast(keep, variable.dtype)
            new = share * average + (1 - share) * variable.value
            for v in (average, variable.value):
                self.strategy.extended.update(v, lambda v, n: v.assign(n), args=(new,))

    @no_autograph
    def _step(
        self, batch: PerReplica, data: PerReplica, batch_maker: BatchMaker
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Takes one step on all replicas, without lookahead.

        Args:
            batch: (images, targets) of each replica or, if `on_device`, (index, numbers) for `batch_maker`.
            data: (table, labels) of each replica if `on_device`, otherwise ().
            batch_maker: makes the batch if `on_device`.

        Returns:
            The sum of the losses and the number of correct predictions, float64 [], over the global batch.
        """
        non_trainable, loss_sum, num_correct = self.strategy.run(
            lambda batch, data: self._replica_step(batch, data, batch_maker), args=(batch, data)
        )
        self._apply_non_trainable(non_trainable)
        # Sums in float64 are exact, so they do not depend on the number of steps per call.
        loss_sum, num_correct = (
            tf.cast(self.strategy.reduce(tf.distribute.ReduceOp.SUM, x, axis=None), tf.float64)
            for x in (loss_sum, num_correct)
        )
        return loss_sum, num_correct

    def _graph(self, size: int | None) -> Loop:
        """Returns the loop of several steps, as a function that TensorFlow traces once.

        If batches are made on the device, there is one loop per image size; otherwise one loop serves all sizes.

        Args:
            size: the side of the images in pixels; None: the images as they are.

        Returns:
            A function (batches, first, count) -> (sum of losses, number of correct predictions) of `count` steps.
            `batches` is an iterator or, if XLA compiles the loop, the arrays of `_prefetched_epoch`; `first` is the
            first step's index into these arrays.
        """
        size = size if self.on_device else None
        if size in self._loops:
            return self._loops[size]
        batch_maker = self._batch_maker(size)
        every = self.config.averaging.every
        data = (self.table, self.labels) if self.on_device else ()

        def loop(
            batches: Any, first: tf.Tensor, count: tf.Tensor, data: PerReplica
        ) -> tuple[tf.Tensor, tf.Tensor]:
            loss_sum = num_correct = tf.constant(0.0, tf.float64)
            i, end = first, first + count
            while i < end:  # XLA would compile again for each new length of a `tf.range`
                batch = [tf.gather(x, i) for x in batches] if self.compile_loop else self._next(batches)
                step_loss, step_correct = self._step(batch, data, batch_maker)
                loss_sum, num_correct = loss_sum + step_loss, num_correct + step_correct
                if every and self.optimizer.iterations % every == 0:
                    self._lookahead()
                i += 1
            return loss_sum, num_correct

        graph = tf.function(loop, reduce_retracing=True, jit_compile=self.compile_loop or None)
        self._loops[size] = lambda batches, first, count: graph(batches, first, count, data)
        return self._loops[size]

    # -- the loop ------------------------------------------------------------------------------------------------

    def _batch_maker(self, size: int | None) -> BatchMaker:
        """Returns the function that makes batches of images of this size."""
        return BatchMaker(self.config.augmentation, self.num_classes, size)

    def _phase(self, step: int) -> tuple[int, int | None]:
        """Returns (end, image size) of the phase of progressive resizing that contains `step`."""
        if not self.sizes:
            return self.steps, None
        ends = [round((i + 1) * self.steps / len(self.sizes)) for i in range(len(self.sizes))]
        return next((end, size) for end, size in zip(ends, self.sizes, strict=True) if step < end)

    def _prefetched_epoch(self, epoch: int) -> tuple[tf.Tensor, ...]:
        """Returns `_sample_epoch` of an epoch, and starts to sample the next one in a thread."""
        wanted = range(epoch, min(epoch + 2, -(-self.steps // self.steps_per_epoch)))
        self._sampled_epochs = {
            e: self._sampled_epochs.get(e) or self._executor.submit(self._sample_epoch, e) for e in wanted
        }
        return self._sampled_epochs[epoch].result()

    def _sample_epoch(self, epoch: int) -> tuple[tf.Tensor, ...]:
        """Returns (index int32 [steps, batch], numbers float32 [steps, batch, draws]) of an epoch."""
        with tf.device("CPU"):  # as tf.data does it
            return tuple(x[:, 0] for x in self.sampler.batches(epoch))

    def _batches(self, end: int, size: int | None) -> Iterator:
        """Returns the iterator over the batches from the current step to `end`, the same one until they end."""
        key = (end, size)
        if self._iterator is None or self._iterator[0] != key:
            context = self._context()
            if self.on_device:
                data = index_data(self.sampler, self.step, end, context)
            else:
                data = training_data(
                    self.sampler,
                    self.step,
                    end,
                    table=self.table,
                    labels=self.labels,
                    batch_maker=self._batch_maker(size),
                    any_size=bool(self.sizes),
                    context=context,
                )
            self._iterator = key, iter(data)
        return self._iterator[1]

    def _context(self) -> tf.distribute.InputContext:
        """Returns this worker's part of the data.

        Each worker has a plain iterator. TensorFlow's distributed iterators tune themselves in threads of their own,
        and such a thread takes up to a minute to end.
        """
        local = len(self._replica_ids)
        return tf.distribute.InputContext(
            self.replicas // local, self._replica_ids[0] // local, num_replicas_in_sync=self.replicas
        )

    @no_autograph
    def _next(self, iterator: Iterator) -> PerReplica:
        """Returns a batch for each replica of this worker, from the next elements of its iterator."""
        batches = {replica: next(iterator) for replica in self._replica_ids}
        return self.strategy.experimental_distribute_values_from_function(
            lambda context: batches[context.replica_id_in_sync_group]
        )

    @keras_defaults()
    def train(self, count: int) -> dict[str, float]:
        """Takes up to `count` steps.

        It takes fewer steps if the image size changes before or, if XLA compiles the loop, if the epoch ends before.
        After the last step of the run it takes none.

        Args:
            count: steps, 1 or more.

        Returns:
            "loss" and "accuracy" (0-1): means over all steps since `running` was replaced.

        Raises:
            ConfigError: if `count` is no whole number from 1.
            RunError: if the loss is not finite, or if memory runs out.
        """
        check_number("count", count, Integral, 1)
        if self.step >= self.steps:
            return self.running.logs()
        end, size = self._phase(self.step)
        batches: Iterator | tuple[tf.Tensor, ...]
        try:
            if self.compile_loop:
                epoch, first = divmod(self.step, self.steps_per_epoch)
                end = min(end, self.step - first + self.steps_per_epoch)
                batches = self._prefetched_epoch(epoch)
            else:
                first, batches = self.step, self._batches(end, size)
            count = min(count, end - self.step)
            loss_sum, num_correct = self._graph(size)(batches, tf.constant(first), tf.constant(count))
        except tf.errors.ResourceExhaustedError as error:
            raise runtime.out_of_memory(error) from error
        self.step += count
        self.running.loss_sum += float(loss_sum)
        self.running.num_correct += float(num_correct)
        self.running.num_images += count * self.config.batch_size
        if not np.isfinite(self.running.loss_sum):
            raise RunError(
                f"the loss is {self.running.loss_sum} at step {self.step}: training diverged;"
                " use a lower --learning_rate"
            )
        return self.running.logs()

    def pflop(self) -> float:
        """Returns the FLOPs (floating-point operations) of the steps so far, in units of 10**15.

        They are counted as three forward passes per image, as the speed records count them.
        """
        total, step = 0, 0
        while step < self.step:
            end, size = self._phase(step)
            end = min(end, self.step)
            total += (end - step) * 3 * self.config.batch_size * models.forward_flops(self.model, size)
            step = end
        return total / 1e15

    # -- evaluation ----------------------------------------------------------------------------------------------

    @keras_defaults()
    def evaluate(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        on_batch: Callable[[int, dict[str, float] | None], None] | None = None,
    ) -> dict[str, float]:
        """Computes the loss and accuracy of the training model, on all replicas.

        There is no test-time augmentation (TTA), which averages the predictions for several versions of an image.

        Args:
            images: uint8 [n, height, width, channels], of the size of the training images.
            labels: integers [n] from 0 to num_classes - 1.
            on_batch: is called before and after each batch, with its number from 0, and None or the means until then.

        Returns:
            "loss" and "accuracy" (0-1): means over all n images.

        Raises:
            ConfigError: if there are no images, or if images or labels are of another shape, dtype or range.
        """
        images = check_images("images", images)
        labels = self._check_labels(labels, len(images), self.num_classes, self.model)
        if len(images) == 0:
            raise ConfigError("images has none; allowed: 1 or more")
        if images.shape[1:] != self._image_shape:
            raise ConfigError(
                f"images are {images.shape[1:]}; allowed: {self._image_shape}, as the training images"
            )
        size = scoring.default_batch(images)
        if len(images) <= SMALL_BATCH:  # of so few images padding would be most of the work
            size = min(size, SMALL_BATCH)
        rounds = -(-len(images) // (size * self.replicas))
        starts = [(r * self.replicas + i) * size for r in range(rounds) for i in self._replica_ids]
        data_set = tf.constant(images), tf.constant(labels, tf.int32)
        data = beside(tf.data.Dataset.from_tensor_slices(tf.constant(starts)), data_set)
        data = data.map(no_autograph(lambda start, whole: padded_slice(whole[0], whole[1], start, size)))
        data = data.prefetch(2).with_options(tuned_by_hand())
        batches = iter(data)
        sums = np.zeros(2, np.float32)  # as the loop in the graph adds
        scores = {"loss": 0.0, "accuracy": 0.0}
        count = rounds if on_batch is None else 1
        for i in range(0, rounds, count):
            if on_batch is not None:
                on_batch(i, None)
            sums += np.array(self._evaluation(batches, tf.constant(count)))
            n = min((i + count) * size * self.replicas, len(images))
            scores = {"loss": float(sums[0]) / n, "accuracy": float(sums[1]) / n}
            if on_batch is not None:
                on_batch(i, dict(scores))
        return scores

    @functools.cached_property
    def _evaluation(self) -> Callable[[Iterator, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
        """The loop of an evaluation: (iterator, count) -> (sum of losses, number of correct predictions)."""

        @tf.function(reduce_retracing=True)
        def loop(iterator: Iterator, count: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            loss_sum = num_correct = tf.constant(0.0)
            for _ in tf.range(count):
                loss, correct = self.strategy.run(self._replica_evaluation, args=(self._next(iterator),))
                loss_sum += self.strategy.reduce(tf.distribute.ReduceOp.SUM, loss, axis=None)
                num_correct += self.strategy.reduce(tf.distribute.ReduceOp.SUM, correct, axis=None)
            return loss_sum, num_correct

        return loop

    @no_autograph
    def _replica_evaluation(
        self, batch: tuple[tf.Tensor, tf.Tensor, tf.Tensor]
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the sum of losses and the number of correct predictions of one `padded_slice`."""
        images, labels, weight = batch
        logits = tf.cast(self.training_model(images, training=False), tf.float32)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        correct = tf.cast(tf.argmax(logits, 1, tf.int32) == labels, tf.float32)
        return tf.reduce_sum(losses * weight), tf.reduce_sum(correct * weight)

    # -- state ---------------------------------------------------------------------------------------------------

    def _variables(self) -> dict[str, list[Any]]:
        """Returns the variables of the state, by the first part of their names there."""
        return {
            "weights": self.training_model.trainable_variables,
            "others": self.non_trainable,  # the name in the files of version 1.0.0
            "optimizer": self.optimizer.variables,
            "averages": self.averages,
        }

    def state(self) -> dict[str, np.ndarray]:
        """Returns everything that a step reads and changes, as copies: name -> array.

        Values of a dtype that NumPy does not know, such as bfloat16, are float32 there, and the same ones.
        """
        arrays = {
            f"{kind}/{i}": _known_to_numpy(np.array(v))
            for kind, variables in self._variables().items()
            for i, v in enumerate(variables)
        }
        running = self.running
        sums = [self.step, running.loss_sum, running.num_correct, running.num_images]
        arrays["engine"] = np.array(sums, np.float64)
        return arrays

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Sets the engine to a state.

        Args:
            arrays: what `state` returned, of an engine with the same model and config.

        Raises:
            KeyError: if an array is missing.
            ValueError: if an array has the wrong shape.
        """
        for kind, variables in self._variables().items():
            for i, v in enumerate(variables):
                v.assign(arrays[f"{kind}/{i}"].astype(tf.as_dtype(v.dtype).as_numpy_dtype, copy=False))
        step, loss_sum, num_correct, num_images = arrays["engine"]
        self.step = int(step)
        self.running = RunningMetrics(float(loss_sum), float(num_correct), int(num_images))
        self._iterator, self._sampled_epochs = None, {}

    def export(self) -> keras.Model:
        """Copies the weights trained so far into the plain model, and returns it."""
        self.model.set_weights(self.training_model.get_weights())
        return self.model

    def set_weights(self, weights: list[np.ndarray]) -> None:
        """Sets the weights, from which training continues.

        Args:
            weights: as `get_weights` of the plain model returns them.
        """
        self.training_model.set_weights(weights)
        if self.averages:
            for variable, average in zip(self._averaged_variables(), self.averages, strict=True):
                average.assign(variable.numpy())


def _known_to_numpy(array: np.ndarray) -> np.ndarray:
    """The array or, where its dtype is an extension of NumPy's that its files do not hold, a float32 one."""
    return array.astype(np.float32) if array.dtype.kind == "V" else array


def _class_weights(kind: str, labels: np.ndarray, num_classes: int) -> np.ndarray | None:
    """The weight of each class, float32 [classes]: n / (classes * images of the class). None for "none"."""
    if kind == "none":
        return None
    counts = np.maximum(np.bincount(labels, minlength=num_classes), 1)
    return (len(labels) / (num_classes * counts)).astype(np.float32)


def weigh(targets: tf.Tensor, class_weights: np.ndarray) -> tuple[tf.Tensor, tf.Tensor]:
    """The targets and weights of images whose loss counts as their class weighs.

    An image that is mixed of two counts as both do: the cross-entropy with the targets, times the weight, is the sum over the
    classes of share * weight of the class * cross-entropy with that class.

    Args:
        targets: float32 [batch, classes], rows that sum to 1.
        class_weights: float32 [classes], above 0.

    Returns:
        targets of the same shape, and weights float32 [batch].
    """
    weighted = targets * class_weights
    weights = tf.reduce_sum(weighted, axis=1)
    return weighted / weights[:, None], weights


def padded_slice(
    images: tf.Tensor, labels: tf.Tensor, start: tf.Tensor, length: int
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Returns images[start : start + length] and their labels, padded to `length`.

    Args:
        images: [n, height, width, channels].
        labels: [n].
        start: an integer, which may be n or more.
        length: of the result.

    Returns:
        Images and labels of that length, and weights, float32 [length]: 1 for an image, 0 for padding.
    """
    index = start + tf.range(length)
    weight = tf.cast(index < tf.shape(labels)[0], tf.float32)
    index = tf.minimum(index, tf.shape(labels)[0] - 1)
    return tf.gather(images, index), tf.gather(labels, index), weight


def make_engine(
    config: Config,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int,
    strategy: tf.distribute.Strategy,
    policy: str,
    model: keras.Model | None = None,
) -> Engine:
    """Makes the engine at the start of a run.

    Args:
        model: a user's own classifier, see `models.own.plain_model`; None: `initial_model` of the config and the images.
        config, images, labels, num_classes, strategy, policy: as of `Engine`.

    Returns:
        An engine at step 0.

    Raises:
        ConfigError: if the engine cannot train the model, or the config does not fit it.
    """
    if model is not None:
        if config.whitening:
            raise ConfigError("whitening is True; allowed with a model of your own: False")
        model = plain_model(model, images.shape[1:], num_classes)
    # Initial weights and dropout depend on this seed; the order of the data has seeds of its own.
    with seeded(config.seed):
        model = initial_model(config, images, num_classes) if model is None else model
        return Engine(
            model, config, images, labels, strategy=strategy, policy=policy, num_classes=num_classes
        )
