"""The one training step and loop, the same for every strategy, precision and device.

`Engine` trains the accelerated twin (`twin.py`) of a plain Keras model. Gradients are a pure function of variables'
values (`stateless_call`), so that XLA can compile it on a GPU; several steps run in one loop inside the graph. Where
one GPU does everything, XLA compiles that whole loop. `Model.fit` does none of this under every strategy.

The engine's whole state is a dictionary of arrays: `state()` and `restore()`. With the data's order being a
function of (seed, step), a run restored at step n goes on exactly as if it had never stopped.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from . import augment, models, optim, runtime
from .accelerate import check_sizes, make_training_model
from .config import Config
from .errors import ConfigError, RunError
from .models.initial import initial_model
from .pipeline import BatchMaker, EpochSampler, index_data, no_autograph, training_data, tuned_by_hand

EVALUATION_BATCH = 500  # divides CIFAR-10's 10,000 and 5,000: little is padded


@dataclass
class RunningMetrics:
    """What the steps since it was made add up to."""

    loss: float = 0.0
    correct: float = 0.0
    images: int = 0

    def logs(self) -> dict[str, float]:
        n = max(self.images, 1)
        return {"loss": self.loss / n, "accuracy": self.correct / n}


class Engine:
    """Trains `model` on arrays in memory.

    Args:
        model: plain, functional, uncompiled; ends in layers "logits" and "probabilities".
        config: batch size, seed, augmentation, optimizer, schedule and so on.
        images, labels: uint8 [n, height, width, channels], integers [n]: the training set.
        strategy: a tf.distribute strategy.
        policy: a Keras dtype policy's name.
        num_classes: classes of the labels.
        on_device: whether images live, and are augmented, where the step runs. None: on GPUs.
        compiled: whether XLA compiles the gradient function or, where one replica makes its images itself and XLA
            knows how, the loop of whole steps. None: on GPUs.
    """

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
    ):
        gpu = bool(tf.config.list_logical_devices("GPU"))
        side = images.shape[1]
        self.sizes = tuple(round(side * size / config.sizes[-1]) for size in config.sizes)
        if self.sizes:
            if side != images.shape[2]:
                raise ConfigError(
                    f"sizes is {config.sizes}, but images are {side}x{images.shape[2]}; allowed: () for them as they are"
                )
            check_sizes(model, self.sizes)
        layers = augment.layers_of(config.augmentation)
        for layer in layers:
            if isinstance(layer, augment.RandomShift):
                layer.check(*images.shape[1:3])
        self.model = model
        self.config = config
        self.strategy = strategy
        self.replicas = strategy.num_replicas_in_sync
        ids = strategy.experimental_distribute_values_from_function(lambda c: c.replica_id_in_sync_group)
        self._replica_ids = strategy.experimental_local_results(ids)  # of this worker
        self.policy = policy
        self.num_classes = num_classes
        self.on_device = gpu if on_device is None else on_device
        self.compiled = gpu and not config.synchronize_batch_norm if compiled is None else compiled
        self.sampler = EpochSampler(
            len(images), config.batch_size, config.seed, config.augmentation, self.replicas
        )
        self.steps_per_epoch = self.sampler.steps_per_epoch
        self.steps = max(1, round(config.epochs * self.steps_per_epoch))
        self.step = 0
        self.running = RunningMetrics()

        with strategy.scope():
            self.training_model = make_training_model(
                model,
                policy,
                any_size=bool(self.sizes),
                synchronize=config.synchronize_batch_norm and self.replicas > 1,
                compiled=self.compiled,
            )
            self.optimizer = optim.make_optimizer(config.optimizer, config.schedule, self.steps)
            if policy == "mixed_float16":
                self.optimizer = keras.optimizers.LossScaleOptimizer(self.optimizer)
            self.optimizer.build(self.training_model.trainable_variables)
            self.averages = []
            if config.averaging.every:
                values = [*self.training_model.trainable_variables, *self._statistics()]
                self.averages = [tf.Variable(v.numpy(), trainable=False) for v in values]

        self.table = augment.image_table(tf.constant(images))
        self.labels = tf.constant(labels, tf.int32)
        if self.on_device:
            self.table, self.labels = (
                strategy.experimental_distribute_values_from_function(lambda _, x=x: tf.identity(x))
                for x in (self.table, self.labels)
            )
        # Reductions over replicas, and what tf.data does, must stay outside of what XLA compiles.
        cluster = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
        single_replica = self.on_device and self.replicas == 1 and not cluster
        self.compile_loop = self.compiled and single_replica and all(layer.compilable for layer in layers)
        compile_gradients = self.compiled and not self.compile_loop
        self._gradients_of = (
            tf.function(self._gradients, jit_compile=True) if compile_gradients else self._gradients
        )
        self._graphs: dict[int | None, Callable] = {}
        self._iterator: tuple[tuple[int, int | None], Iterator] | None = None
        self._epochs: dict[int, Future] = {}
        self._background = ThreadPoolExecutor(1)

    @property
    def images(self) -> np.ndarray:
        """The training images, uint8 [n, height, width, channels], not copied where they lie in the host's memory."""
        table = self.strategy.experimental_local_results(self.table)[0]
        return np.asarray(table)[:-1]

    # -- the step ------------------------------------------------------------------------------------------------

    def _statistics(self) -> list:
        """The float variables that training changes without a gradient: batch-norm statistics."""
        return [
            v
            for v in self.training_model.non_trainable_variables
            if v.dtype.startswith("float") and v.path.endswith(("moving_mean", "moving_variance"))
        ]

    def _gradients(self, weights, non_trainable, images, targets):
        """The pure heart of a step: loss of this replica's part, gradients, and what changes without one."""
        with tf.GradientTape() as tape:
            tape.watch(weights)
            logits, non_trainable, penalties = self.training_model.stateless_call(
                weights, non_trainable, images, training=True, return_losses=True
            )
            smoothing = self.config.label_smoothing
            soft = targets * (1 - smoothing) + smoothing / self.num_classes
            losses = tf.nn.softmax_cross_entropy_with_logits(soft, logits)
            # Keras optimizers sum over replicas: each gives its share of the mean over the global batch.
            loss = tf.reduce_sum(losses) / self.config.batch_size
            objective = loss + tf.add_n(penalties) / self.replicas if penalties else loss
            if isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
                objective = self.optimizer.scale_loss(objective)
        gradients = tape.gradient(objective, weights)
        num_correct = tf.reduce_sum(tf.cast(tf.argmax(logits, 1) == tf.argmax(targets, 1), tf.float32))
        return gradients, non_trainable, tf.reduce_sum(losses), num_correct

    @no_autograph
    def _replica_step(self, batch, data, batch_maker):
        images, targets = batch_maker(*data, *batch) if self.on_device else batch
        weights = [v.value for v in self.training_model.trainable_variables]
        non_trainable = [v.value for v in self.training_model.non_trainable_variables]
        gradients, non_trainable, loss, num_correct = self._gradients_of(
            [tf.convert_to_tensor(w) for w in weights],
            [tf.convert_to_tensor(o) for o in non_trainable],
            images,
            targets,
        )
        if isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer) and self.replicas > 1:
            # Keras looks for an overflow in the first replica's gradients only, before it adds up those of all.
            finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in gradients])
            lost = tf.where(finite, 0.0, math.nan)
            lost = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, lost)
            gradients = [g + tf.cast(lost, g.dtype) for g in gradients]
        self.optimizer.apply(gradients, self.training_model.trainable_variables)
        return non_trainable, loss, num_correct

    @no_autograph
    def _apply_non_trainable(self, non_trainable) -> None:
        """Writes what a step changed without a gradient: the mean over replicas; counters are equal on all."""
        for variable, new in zip(self.training_model.non_trainable_variables, non_trainable, strict=True):
            if not variable.dtype.startswith("float"):
                new = self.strategy.experimental_local_results(new)[0]
            elif self.replicas > 1:
                new = self.strategy.reduce(tf.distribute.ReduceOp.MEAN, new, axis=None)
            self.strategy.extended.update(variable.value, lambda v, n: v.assign(n), args=(new,))

    @no_autograph
    def _average(self) -> None:
        """Lookahead: moves the averages towards the weights, and the weights onto the averages."""
        rule = self.config.averaging
        done = tf.cast(self.optimizer.iterations, tf.float32) / self.steps
        keep = rule.decay**rule.every * done**3
        for variable, average in zip(
            [*self.training_model.trainable_variables, *self._statistics()], self.averages, strict=True
        ):
            new = keep * average + (1 - keep) * variable.value
            for v in (average, variable.value):
                self.strategy.extended.update(v, lambda v, n: v.assign(n), args=(new,))

    @no_autograph
    def _step(self, batch, data, batch_maker):
        """One step on all replicas, but for the averaging: the sums of loss and of right answers."""
        non_trainable, loss, num_correct = self.strategy.run(
            lambda batch, data: self._replica_step(batch, data, batch_maker), args=(batch, data)
        )
        self._apply_non_trainable(non_trainable)
        # In float64 their sums are exact, so they do not depend on how many steps a call takes.
        return tuple(
            tf.cast(self.strategy.reduce(tf.distribute.ReduceOp.SUM, x, axis=None), tf.float64)
            for x in (loss, num_correct)
        )

    def _graph(self, size: int | None) -> Callable:
        """The compiled loop: (batches, first, count) -> sums of loss and of right answers of `count` steps.

        batches: an iterator or, where XLA compiles the loop, `_epoch_of` an epoch, of which `first` is the first step.

        On the device there is one for each size of the images, since it makes them; else one for all sizes.
        """
        size = size if self.on_device else None
        if size in self._graphs:
            return self._graphs[size]
        batch_maker = self._batch_maker(size)
        every = self.config.averaging.every
        data = (self.table, self.labels) if self.on_device else ()

        def loop(batches, first, count, data):
            loss = num_correct = tf.constant(0.0, tf.float64)
            i, end = first, first + count
            while i < end:  # XLA would compile again for each new value of a `tf.range`
                batch = [tf.gather(x, i) for x in batches] if self.compile_loop else self._next(batches)
                part, right = self._step(batch, data, batch_maker)
                loss, num_correct = loss + part, num_correct + right
                if every and self.optimizer.iterations % every == 0:
                    self._average()
                i += 1
            return loss, num_correct

        graph = tf.function(loop, reduce_retracing=True, jit_compile=self.compile_loop or None)
        self._graphs[size] = lambda batches, first, count: graph(batches, first, count, data)
        return self._graphs[size]

    # -- the loop ------------------------------------------------------------------------------------------------

    def _batch_maker(self, size: int | None) -> BatchMaker:
        return BatchMaker(self.config.augmentation, self.num_classes, size)

    def _phase(self, step: int) -> tuple[int, int, int | None]:
        """(first step, end, image size) of the part of the run that `step` is in."""
        sizes = self.sizes
        if not sizes:
            return 0, self.steps, None
        ends = [round((i + 1) * self.steps / len(sizes)) for i in range(len(sizes))]
        i = next(i for i, end in enumerate(ends) if step < end)
        return (ends[i - 1] if i else 0), ends[i], sizes[i]

    def _epoch_of(self, epoch: int) -> tuple:
        """(index int32 [steps, batch], numbers float32 [steps, batch, draws]) of an epoch.

        The next is made meanwhile, in a thread.
        """
        wanted = range(epoch, min(epoch + 2, -(-self.steps // self.steps_per_epoch)))
        self._epochs = {
            e: self._epochs.get(e) or self._background.submit(self._make_epoch, e) for e in wanted
        }
        return self._epochs[epoch].result()

    def _make_epoch(self, epoch: int) -> tuple:
        with tf.device("CPU"):  # as tf.data does it
            return tuple(x[:, 0] for x in self.sampler.batches(epoch))

    def _batches(self, end: int, size: int | None) -> Iterator:
        """Batches from the present step to `end`; made once for a stretch of steps without a break."""
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
        """This worker's part of the data.

        Its iterators are plain ones. TensorFlow's distributed ones tune themselves in threads of their own,
        and the end of such a thread takes up to a minute.
        """
        local = len(self._replica_ids)
        return tf.distribute.InputContext(
            self.replicas // local, self._replica_ids[0] // local, num_replicas_in_sync=self.replicas
        )

    @no_autograph
    def _next(self, iterator):
        """A batch for each replica of this worker, from the next elements of its iterator."""
        batches = {replica: next(iterator) for replica in self._replica_ids}
        return self.strategy.experimental_distribute_values_from_function(
            lambda context: batches[context.replica_id_in_sync_group]
        )

    def train(self, count: int) -> dict[str, float]:
        """Takes up to `count` steps, and returns the mean loss and accuracy since `running` was cleared.

        Stops before where the size of the images changes and, where XLA compiles the loop, at the end of an epoch.
        After the last step it takes none. Raises RunError where the loss is no number, and where memory runs out.
        """
        if self.step >= self.steps:
            return self.running.logs()
        _, end, size = self._phase(self.step)
        batches: Iterator | tuple
        try:
            if self.compile_loop:
                epoch, first = divmod(self.step, self.steps_per_epoch)
                end = min(end, self.step - first + self.steps_per_epoch)
                batches = self._epoch_of(epoch)
            else:
                first, batches = self.step, self._batches(end, size)
            count = min(count, end - self.step)
            loss, num_correct = self._graph(size)(batches, tf.constant(first), tf.constant(count))
        except tf.errors.ResourceExhaustedError as error:
            raise runtime.out_of_memory(error) from error
        self.step += count
        self.running.loss += float(loss)
        self.running.correct += float(num_correct)
        self.running.images += count * self.config.batch_size
        if not np.isfinite(self.running.loss):
            raise RunError(
                f"the loss is {self.running.loss} at step {self.step}: training diverged; use a lower --learning_rate"
            )
        return self.running.logs()

    def pflop(self) -> float:
        """Arithmetic of the steps so far, in PFLOP: three forward passes an image, as the speed records count it."""
        total, step = 0, 0
        while step < self.step:
            _, end, size = self._phase(step)
            end = min(end, self.step)
            total += (end - step) * 3 * self.config.batch_size * models.forward_flops(self.model, size)
            step = end
        return total / 1e15

    # -- evaluation ----------------------------------------------------------------------------------------------

    def evaluate(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Mean loss and accuracy over all of the images, computed by the twin on all replicas, plain (one view)."""
        part = EVALUATION_BATCH
        rounds = -(-len(images) // (part * self.replicas))
        starts = [(r * self.replicas + i) * part for r in range(rounds) for i in self._replica_ids]
        images_t, labels_t = tf.constant(images), tf.constant(labels, tf.int32)
        data = tf.data.Dataset.from_tensor_slices(tf.constant(starts))
        data = data.map(no_autograph(lambda s: padded_slice(images_t, labels_t, s, part))).prefetch(2)
        loss, num_correct = self._evaluation(iter(data.with_options(tuned_by_hand())), tf.constant(rounds))
        return {"loss": float(loss) / len(images), "accuracy": float(num_correct) / len(images)}

    @functools.cached_property
    def _evaluation(self) -> Callable:
        """The compiled loop of an evaluation: (iterator, count) -> sums of loss and of right answers."""

        @tf.function(reduce_retracing=True)
        def loop(iterator, count):
            loss = num_correct = tf.constant(0.0)
            for _ in tf.range(count):
                part, right = self.strategy.run(self._replica_evaluation, args=(self._next(iterator),))
                loss += self.strategy.reduce(tf.distribute.ReduceOp.SUM, part, axis=None)
                num_correct += self.strategy.reduce(tf.distribute.ReduceOp.SUM, right, axis=None)
            return loss, num_correct

        return loop

    @no_autograph
    def _replica_evaluation(self, batch):
        images, labels, weight = batch
        logits = self.training_model(images, training=False)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        num_correct = tf.cast(tf.argmax(logits, 1, tf.int32) == labels, tf.float32)
        return tf.reduce_sum(losses * weight), tf.reduce_sum(num_correct * weight)

    # -- state ---------------------------------------------------------------------------------------------------

    def _variables(self) -> dict[str, list]:
        return {
            "weights": self.training_model.trainable_variables,
            "non_trainable": self.training_model.non_trainable_variables,
            "optimizer": self.optimizer.variables,
            "averages": self.averages,
        }

    def state(self) -> dict[str, np.ndarray]:
        """Everything that a step reads and changes, as arrays by name."""
        arrays = {
            f"{kind}/{i}": np.array(v)
            for kind, variables in self._variables().items()
            for i, v in enumerate(variables)
        }
        p = self.running
        arrays["engine"] = np.array([self.step, p.loss, p.correct, p.images], np.float64)
        return arrays

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Takes up a state that `state` of an engine of the same model and config gave."""
        for kind, variables in self._variables().items():
            for i, v in enumerate(variables):
                v.assign(arrays[f"{kind}/{i}"])
        step, loss, correct, images = arrays["engine"]
        self.step, self.running = int(step), RunningMetrics(float(loss), float(correct), int(images))
        self._iterator, self._epochs = None, {}

    def export(self) -> keras.Model:
        """The plain model with the weights trained so far."""
        self.model.set_weights(self.training_model.get_weights())
        return self.model


def padded_slice(images, labels, start, length):
    """images[start:start + length] and labels, filled up to `length` with weight 0 where they end."""
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
) -> Engine:
    """An Engine at the start of a run: the model of `config`, drawn from its seed, with what it knows of the images.

    Arguments as of `Engine`.
    """
    model = initial_model(config, images, num_classes)
    return Engine(model, config, images, labels, strategy=strategy, policy=policy, num_classes=num_classes)
