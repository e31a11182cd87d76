"""A training step against its limit: the time of its own convolutions and dense products, run alone.

Everything else that a step does (data, batch norm, activations, pooling, dropout, loss, metrics, optimizer) comes on
top of that, on every processor. So the ratio shows what the rest of the step costs, which a share of the
processor's peak does not.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cifar10_trainer import RECIPES

from . import timing
from .timing import Options, against_goal, interleaved, ratio_of_rounds, rows_of, synthetic_data

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

QUICK = ("leaky.baseline", "fast.85")
GOALS = dict.fromkeys(QUICK, "at most 1.20")
GOALS |= dict.fromkeys(("practical.baseline", "course.baseline", "wide_head.baseline"), "at most 1.5")
GOALS |= dict.fromkeys(("fast.default", "fast.94", "vgg.3"), "")
RATIO = "a step / its convolutions and products alone (median over the rounds' ratios)"
TRIALS = 3  # calls of each way to compute a pass, after one that does not count

Operation = Callable[[], "tf.Tensor"]


def limit(o: Options) -> dict[str, Any]:
    """A training step, 32x32 images, beside its own convolutions and dense products, run alone."""
    names = QUICK if o.quick else tuple(GOALS)
    images, labels = synthetic_data(max(o.batches * 128, *(RECIPES[n].batch_size for n in names)))
    passes: dict[str, Callable[[], float]] = {}
    pairs: dict[str, tuple[str, str]] = {}
    for name in names:
        engine = timing.engine_for(name, images, labels, sizes=())
        batch = engine.config.batch_size
        steps = max(1, o.batches * 128 // batch)
        step, alone = pairs[name] = (
            f"{name}, batch {batch}: a step",
            f"{name}: its convolutions and products alone",
        )
        operations = [fastest(ways) for p in products(engine.training_model) for ways in p.passes(batch)]
        for row, seconds in (
            (step, timing.seconds_of(engine, steps)),
            (alone, seconds_of(operations, steps)),
        ):
            passes[row] = timing.in_milliseconds(seconds, steps)
    samples = interleaved(passes, o.rounds)
    rows = rows_of(samples, "ms")
    goals = []
    for name, pair in pairs.items():
        ratio = ratio_of_rounds(samples, *pair)
        goals.append(against_goal(f"{RATIO}: {name}", ratio, GOALS[name]))
    return {"rows": rows, "verdicts": goals}


@dataclass(frozen=True)
class Product:
    """A convolution or a dense layer of a training model.

    Attributes:
        inputs: the shape of its input, without the batch.
        kernel: the shape of its kernel.
        dtype: in which it computes.
        strides: of a convolution; None: a dense layer.
        padding: of a convolution, "SAME" or "VALID".
        to_kernel: whether a step needs the gradient with respect to the kernel: not if it is frozen.
        to_input: whether a step needs the gradient with respect to the input: not if nothing before it is trained.
    """

    inputs: tuple[int, ...]
    kernel: tuple[int, ...]
    dtype: str
    strides: tuple[int, int] | None = None
    padding: str = "VALID"
    to_kernel: bool = True
    to_input: bool = True

    def passes(self, batch: int) -> list[list[Operation]]:
        """The passes that a step of `batch` images needs: for each one the ways to compute it, on random values."""
        import tensorflow as tf

        def random(*shape: int) -> tf.Tensor:
            return tf.cast(tf.random.normal(shape), self.dtype)

        x, w = random(batch, *self.inputs), random(*self.kernel)
        forward, to_kernel, to_input = self._dense(x, w) if self.strides is None else self._convolution(x, w)
        dy = random(*forward().shape)
        found: list[list[Operation]] = [[forward]]
        if self.to_kernel:
            found.append([functools.partial(way, dy) for way in to_kernel])
        if self.to_input:
            found.append([functools.partial(to_input, dy)])
        return found

    def _dense(self, x: tf.Tensor, w: tf.Tensor) -> tuple[Operation, list[Any], Any]:
        """The forward pass, the ways to the gradient of the kernel, and the gradient of the input."""
        import tensorflow as tf

        return (
            lambda: tf.matmul(x, w),
            [lambda dy: tf.matmul(x, dy, transpose_a=True)],
            lambda dy: tf.matmul(dy, w, transpose_b=True),
        )

    def _convolution(self, x: tf.Tensor, w: tf.Tensor) -> tuple[Operation, list[Any], Any]:
        """The same for a convolution."""
        import tensorflow as tf

        from cifar10_trainer.layers import kernel_gradient

        strides = self.strides or (1, 1)
        how: dict[str, Any] = {"strides": [1, *strides, 1], "padding": self.padding}

        def onednn(dy: tf.Tensor) -> tf.Tensor:
            return tf.raw_ops.Conv2DBackpropFilter(input=x, filter_sizes=w.shape, out_backprop=dy, **how)

        as_products = (self.kernel[:2], strides, self.padding) == ((3, 3), (1, 1), "SAME")
        return (
            lambda: tf.nn.conv2d(x, w, **how),
            [onednn, *([lambda dy: kernel_gradient(x, dy)] if as_products else [])],
            lambda dy: tf.raw_ops.Conv2DBackpropInput(input_sizes=x.shape, filter=w, out_backprop=dy, **how),
        )


def products(model: keras.Model) -> list[Product]:
    """The convolutions and dense layers of a training model whose layers form a chain, in their order."""
    import keras

    found, trained = [], False
    weights = {id(v) for v in model.trainable_variables}
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D | keras.layers.Dense):
            is_dense = isinstance(layer, keras.layers.Dense)
            found.append(
                Product(
                    tuple(layer.input.shape[1:]),
                    tuple(layer.kernel.shape),
                    layer.compute_dtype,
                    strides=None if is_dense else layer.strides,
                    padding="VALID" if is_dense else layer.padding.upper(),
                    to_kernel=id(layer.kernel) in weights,
                    to_input=trained,
                )
            )
        trained = trained or bool(layer.trainable_variables)
    return found


def fastest(ways: Sequence[Operation]) -> Operation:
    """The way that takes the least time of TRIALS calls, which alternate."""
    if len(ways) == 1:
        return ways[0]
    measures = [seconds_of([way], 1) for way in ways]
    times = [[measure() for measure in measures] for _ in range(TRIALS + 1)][1:]
    best = [min(column) for column in zip(*times, strict=True)]
    return ways[best.index(min(best))]


def seconds_of(operations: Sequence[Operation], times: int) -> Callable[[], float]:
    """A function that runs all operations `times` times and returns the seconds.

    Those of one time have no order, because TensorFlow may run two at once in a step, too: that is faster.
    """
    import tensorflow as tf

    def once(i: tf.Tensor, last: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.control_dependencies([last]):
            # One number of each result, or TensorFlow would leave the operation out.
            numbers = [tf.cast(tf.reshape(operation(), [-1])[0], tf.float32) for operation in operations]
            return i + 1, tf.add_n(numbers)

    @tf.function(autograph=False)
    def run(count: tf.Tensor) -> tf.Tensor:
        return tf.while_loop(lambda i, _: i < count, once, (0, 0.0), parallel_iterations=1)[1]

    def measure() -> float:
        start = time.perf_counter()
        run(tf.constant(times)).numpy()
        return time.perf_counter() - start

    return measure
