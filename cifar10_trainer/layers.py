"""Replacements for Keras layers that train faster: the same variables and, within rounding, the same function.

`accelerate.py` puts them into the training model; a saved model never contains one of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias

import keras
import tensorflow as tf

Activation: TypeAlias = Callable[[tf.Tensor], tf.Tensor]
Gradient: TypeAlias = Callable[[tf.Tensor], tf.Tensor]

LARGE = 1 << 19  # elements, from which a loop is faster if XLA compiles it: a call of it takes 0.2 ms more


def compiles(maps: tf.Tensor | None = None) -> bool:
    """Whether XLA compiles loops over elements: on a CPU, if this build of TensorFlow can. Not all can.

    Args:
        maps: of a loop that is cheap without XLA as well. Such a loop is compiled only if the size of its maps is fixed,
            because XLA compiles again for each one, and if they are large.
    """
    pays = maps is None or (maps.shape.num_elements() or 0) >= LARGE
    return pays and not tf.config.list_logical_devices("GPU") and has_xla()


@functools.cache
def has_xla() -> bool:
    """Whether this build of TensorFlow compiles for its CPU."""
    try:
        with tf.init_scope(), tf.device("CPU"):
            compiled(lambda: tf.constant(0))()
    except (tf.errors.OpError, ValueError):
        return False
    return True


def compiled(function: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
    """`function`, which XLA compiles for each shape of its arguments."""
    return tf.function(function, jit_compile=True, autograph=False)


def widened(x: tf.Tensor) -> tf.Tensor:
    """`x` in float32; float64 as it is."""
    return x if x.dtype == tf.float64 else tf.cast(x, tf.float32)


@compiled
def gate(x: tf.Tensor, keep: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
    """`x` times `scale` where `keep`, else 0. `scale` is a float32 scalar."""
    x32 = widened(x)
    return tf.cast(tf.where(keep, x32 * tf.cast(scale, x32.dtype), tf.zeros_like(x32)), x.dtype)


@functools.cache
def fast_activation(function: Activation) -> Activation:
    """An activation function that XLA compiles to one loop over the elements, and its gradient to another one.

    TensorFlow runs one kernel for each operation of a gradient, and on a CPU these kernels are slow in bfloat16
    (docs/measurements.md, "Activations that XLA compiles"). The gradient is computed in float32, or in float64 for such maps.

    Args:
        function: elementwise, of one tensor.

    Returns:
        the same function. One object for equal arguments, so that equal layers share the compiled loops.
    """

    def gradient(x: tf.Tensor, dy: tf.Tensor) -> tf.Tensor:
        x = widened(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        return tf.cast(tape.gradient(y, x, widened(dy)), dy.dtype)

    compiled_function, compiled_gradient = compiled(function), compiled(gradient)

    @tf.custom_gradient
    def activate(x: tf.Tensor) -> tuple[tf.Tensor, Gradient]:
        return compiled_function(x), functools.partial(compiled_gradient, x)

    return lambda x: activate(x) if compiles() else function(x)


@functools.cache
def fast_relu(slope: float, fuses: bool) -> Activation:
    """ReLU or leaky ReLU, whose gradient is determined from the sign of the output, in one loop that XLA compiles.

    Only the activation reads its input, so TensorFlow can fuse it with the convolution or the batch norm before it.

    Args:
        slope: the factor of negative inputs, 0 or more.
        fuses: whether TensorFlow does that. If not, XLA compiles the activation as well.

    Returns:
        the activation function. One object for equal arguments.
    """
    function = functools.partial(tf.nn.leaky_relu, alpha=slope) if slope else tf.nn.relu

    def gradient(y: tf.Tensor, dy: tf.Tensor) -> tf.Tensor:
        seed = widened(dy)
        return tf.cast(
            tf.where(widened(y) > 0, seed, slope * seed if slope else tf.zeros_like(seed)), dy.dtype
        )

    def kernel(y: tf.Tensor, dy: tf.Tensor) -> tf.Tensor:
        if slope:
            return tf.raw_ops.LeakyReluGrad(gradients=dy, features=y, alpha=slope)
        return tf.raw_ops.ReluGrad(gradients=dy, features=y)

    compiled_function, compiled_gradient = compiled(function), compiled(gradient)

    @tf.custom_gradient
    def activate(x: tf.Tensor) -> tuple[tf.Tensor, Gradient]:
        y = function(x) if fuses or not compiles() else compiled_function(x)
        return y, functools.partial(compiled_gradient if compiles(x) else kernel, y)

    return activate


@keras.saving.register_keras_serializable("cifar10_trainer")
class FusedBatchNormalization(keras.layers.BatchNormalization):
    """Keras's batch norm over the last axis, as one kernel forward and one backward.

    The input may be bfloat16; the statistics are float32. An epsilon of 1e-5 acts as 1.001e-5, because the kernel requires it.
    """

    def call(
        self, inputs: tf.Tensor, training: bool | None = None, mask: tf.Tensor | None = None
    ) -> tf.Tensor:
        """Normalizes `inputs`, and in training updates the moving statistics.

        Args:
            inputs: float [batch, channels] or [batch, height, width, channels].
            training: whether to normalize with the statistics of the batch.
            mask: accepted for Keras, and ignored.

        Returns:
            A tensor of the same shape and dtype.
        """
        channels = inputs.shape[-1]
        flat = tf.reshape(inputs, [-1, 1, 1, channels]) if len(inputs.shape) == 2 else inputs
        scale = tf.ones([channels]) if self.gamma is None else tf.convert_to_tensor(self.gamma)
        offset = tf.zeros([channels]) if self.beta is None else tf.convert_to_tensor(self.beta)
        normalize = functools.partial(
            tf.compat.v1.nn.fused_batch_norm, flat, scale, offset, epsilon=max(self.epsilon, 1.001e-5)
        )
        if training and self.trainable:
            output, mean, variance = normalize()
            # The kernel returns the unbiased variance; Keras averages the biased one.
            count = tf.cast(tf.size(flat) // channels, tf.float32)
            variance = variance * ((count - 1) / count)
            for average, new in ((self.moving_mean, mean), (self.moving_variance, variance)):
                old = tf.convert_to_tensor(average)
                average.assign(old * self.momentum + new * (1 - self.momentum))
        else:
            mean, variance = map(tf.convert_to_tensor, (self.moving_mean, self.moving_variance))
            output, *_ = normalize(mean, variance, is_training=False)
        return tf.reshape(output, tf.shape(inputs)) if flat is not inputs else output

    @staticmethod
    def suits(layer: keras.layers.BatchNormalization) -> bool:
        """Returns whether this class can replace `layer`, except for its axis: a smaller epsilon would be another function."""
        return layer.dtype_policy.variable_dtype == "float32" and layer.epsilon >= 1e-5


@keras.saving.register_keras_serializable("cifar10_trainer")
class FastDropout(keras.layers.Dropout):
    """Keras's dropout with 16 random bits per element, half of Keras's.

    Large maps are masked in one loop that XLA compiles, others by one product. The effective rate is the nearest multiple of 2**-16.
    """

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Sets elements to zero at random and scales the others; returns `inputs` outside training."""
        if not training or self.rate == 0:
            return inputs
        count = tf.size(inputs)
        seed = tf.cast(tf.convert_to_tensor(self.seed_generator.next()), tf.int32)
        bits = tf.random.stateless_uniform([(count + 1) // 2], seed, None, None, tf.int32)
        draws = tf.reshape(tf.bitcast(bits, tf.int16), [-1])[:count]
        dropped = round(self.rate * 2**16)  # of the 2**16 values of a draw
        if dropped == 2**16:
            return tf.zeros_like(inputs)
        keep = tf.reshape(draws >= dropped - 2**15, tf.shape(inputs))
        scale = tf.constant(2**16 / (2**16 - dropped), tf.float32)
        if not compiles(inputs):
            return inputs * (tf.cast(keep, inputs.dtype) * tf.cast(scale, inputs.dtype))

        @tf.custom_gradient
        def drop(x: tf.Tensor) -> tuple[tf.Tensor, Gradient]:
            return gate(x, keep, scale), lambda dy: gate(dy, keep, scale)

        return drop(inputs)


@keras.saving.register_keras_serializable("cifar10_trainer")
class FastReLU(keras.layers.ReLU):
    """Keras's plain ReLU, with the gradient of `fast_relu`."""

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Applies the activation to each element."""
        return fast_relu(0.0, True)(inputs)

    @staticmethod
    def suits(layer: keras.layers.ReLU) -> bool:
        """Returns whether this class can replace `layer`."""
        return (layer.max_value, layer.negative_slope, layer.threshold) == (None, 0, 0)


@keras.saving.register_keras_serializable("cifar10_trainer")
class FastLeakyReLU(keras.layers.LeakyReLU):
    """Keras's leaky ReLU, with the gradient of `fast_relu`. The slope must be above 0."""

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Applies the activation to each element."""
        return fast_relu(float(self.negative_slope), True)(inputs)


@keras.saving.register_keras_serializable("cifar10_trainer")
class FastConv2D(keras.layers.Conv2D):
    """Keras's 3x3 convolution, whose gradient with respect to the kernel is nine matrix products if the maps are small.

    On a CPU that takes 0.1 to 0.9 of the time of oneDNN's kernel. If the maps have no fixed size, each step decides
    whether they are small.
    """

    def convolution_op(self, inputs: tf.Tensor, kernel: keras.Variable) -> tf.Tensor:
        """Computes the convolution without bias and activation.

        Args:
            inputs: float [batch, height, width, in].
            kernel: float [3, 3, in, out].

        Returns:
            float [batch, height, width, out].
        """
        channels = min(kernel.shape[2:])
        height, width = inputs.shape[1:3]

        @tf.custom_gradient
        def convolve(
            x: tf.Tensor, w: tf.Tensor
        ) -> tuple[tf.Tensor, Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]]:
            def gradient(dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
                if height and width:
                    dw = kernel_gradient(x, dy)
                else:
                    onednn_gradient = functools.partial(
                        tf.raw_ops.Conv2DBackpropFilter,
                        input=x,
                        filter_sizes=w.shape,
                        out_backprop=dy,
                        strides=[1] * 4,
                        padding="SAME",
                    )
                    small = self.small(tf.shape(x)[1], tf.shape(x)[2], channels)
                    dw = tf.cond(small, lambda: kernel_gradient(x, dy), onednn_gradient)
                # Otherwise TensorFlow computes every dx first, and x and dy of many layers wait in memory for their dw.
                with tf.control_dependencies([dw]):
                    dx = tf.raw_ops.Conv2DBackpropInput(
                        input_sizes=tf.shape(x), filter=w, out_backprop=dy, strides=[1] * 4, padding="SAME"
                    )
                return dx, dw

            return tf.nn.conv2d(x, w, 1, "SAME"), gradient

        return convolve(inputs, tf.convert_to_tensor(kernel))

    @staticmethod
    def small(height: int | tf.Tensor, width: int | tf.Tensor, channels: int) -> bool | tf.Tensor:
        """Returns whether maps are so small that the matrix products are faster.

        docs/measurements.md, "Gradients to the kernels of small maps", has the timings behind this rule.

        Args:
            height: of the maps, in pixels.
            width: of the maps, in pixels.
            channels: the smaller one of the numbers of input and output channels.
        """
        return 3 * height * width <= channels

    @classmethod
    def suits(cls, layer: keras.layers.Conv2D, height: int, width: int) -> bool:
        """Returns whether this class can replace `layer`, and is faster if its maps have this size."""
        return (
            (layer.kernel_size, layer.strides, layer.dilation_rate) == ((3, 3), (1, 1), (1, 1))
            and (layer.padding, layer.groups, layer.data_format) == ("same", 1, "channels_last")
            and min(layer.kernel.shape[2:]) >= 64
            and cls.small(height, width, min(layer.kernel.shape[2:]))
        )


@keras.saving.register_keras_serializable("cifar10_trainer")
class FastMaxPooling2D(keras.layers.MaxPooling2D):
    """Keras's 2x2 max pooling, whose gradient is determined from the position of the first maximum of each window.

    XLA compiles it to one pass over the maps forward and one backward. It compiles the gradient of Keras's layer to
    scattered additions, which took an eighth of a step. Without XLA, Keras's layer is faster.
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Takes the maximum of each 2x2 window: float [batch, h, w, channels] to [batch, h // 2, w // 2, channels]."""
        shape = tf.shape(inputs)
        height, width = (n or shape[i] for i, n in ((1, inputs.shape[1]), (2, inputs.shape[2])))

        @tf.custom_gradient
        def pool(x: tf.Tensor) -> tuple[tf.Tensor, Gradient]:
            corners = [x[:, i : height // 2 * 2 : 2, j : width // 2 * 2 : 2] for i in (0, 1) for j in (0, 1)]
            y = functools.reduce(tf.maximum, corners)
            argmax = tf.constant(3, tf.uint8)
            for k in (2, 1, 0):
                argmax = tf.where(corners[k] == y, tf.constant(k, tf.uint8), argmax)

            def gradient(dy: tf.Tensor) -> tf.Tensor:
                # [n, h, 2, w, 2, channels] is the order of the windows' pixels in memory.
                argmax_of_pixel, dy_of_pixel = argmax[:, :, None, :, None], dy[:, :, None, :, None]
                position = tf.constant([[0, 1], [2, 3]], tf.uint8)[None, None, :, None, :, None]
                dx = tf.where(argmax_of_pixel == position, dy_of_pixel, tf.zeros([], dy.dtype))
                dx = tf.reshape(dx, [-1, height // 2 * 2, width // 2 * 2, x.shape[-1]])
                return tf.pad(dx, [[0, 0], [0, height % 2], [0, width % 2], [0, 0]])

            return y, gradient

        return pool(inputs)

    @staticmethod
    def suits(layer: keras.layers.MaxPooling2D) -> bool:
        """Returns whether this class can replace `layer`."""
        return (layer.pool_size, layer.strides, layer.padding, layer.data_format) == (
            (2, 2),
            (2, 2),
            "valid",
            "channels_last",
        )


def kernel_gradient(x: tf.Tensor, dy: tf.Tensor) -> tf.Tensor:
    """Computes the gradient of y = conv2d(x, kernel, 1, "SAME") with respect to a 3x3 kernel.

    Entry (i, j) of the kernel, i and j from -1 to 1, multiplies each pixel of x that lies (i, j) away from a pixel of
    y. Its gradient is therefore one matrix product over all such pairs of pixels.

    Args:
        x: float [n, h, w, in], the input.
        dy: float [n, h, w, out], the gradient with respect to y.

    Returns:
        float [3, 3, in, out].
    """
    height, width = tf.shape(x)[1], tf.shape(x)[2]

    def pixels(maps: tf.Tensor, i: int, j: int) -> tf.Tensor:
        part = maps[:, max(i, 0) : height + min(i, 0), max(j, 0) : width + min(j, 0)]
        return tf.reshape(part, [-1, maps.shape[-1]])

    products: list[tf.Tensor] = []
    for i, j in [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]:
        # One after another, because each product copies its pixels, and all copies together would need much memory.
        with tf.control_dependencies(products[-1:]):
            products.append(tf.matmul(pixels(x, i, j), pixels(dy, -i, -j), transpose_a=True))
    return tf.reshape(tf.stack(products), [3, 3, x.shape[-1], dy.shape[-1]])
