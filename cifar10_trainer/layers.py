"""Keras's layers again, faster to train: the same variables and, within rounding, the same function.

`accelerate.py` puts them into the training model; a saved model never holds one of them.
"""

from __future__ import annotations

import functools

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable("cifar10_trainer")
class FusedBatchNormalization(keras.layers.BatchNormalization):
    """Keras's batch norm over the last axis, in one kernel forward and one backward: bfloat16 in, float32 statistics.

    Same weights, same results within rounding; epsilon is at least 1.001e-5, as the kernel wants it.
    """

    def call(self, inputs, training=None, mask=None):
        channels = inputs.shape[-1]
        flat = tf.reshape(inputs, [-1, 1, 1, channels]) if len(inputs.shape) == 2 else inputs
        ones, zeros = tf.ones([channels]), tf.zeros([channels])
        scale = ones if self.gamma is None else tf.convert_to_tensor(self.gamma)
        offset = zeros if self.beta is None else tf.convert_to_tensor(self.beta)
        epsilon = max(self.epsilon, 1.001e-5)
        if not (training and self.trainable):
            mean, variance = (
                tf.convert_to_tensor(self.moving_mean),
                tf.convert_to_tensor(self.moving_variance),
            )
            output, *_ = tf.compat.v1.nn.fused_batch_norm(
                flat, scale, offset, mean, variance, epsilon=epsilon, is_training=False
            )
            return tf.reshape(output, tf.shape(inputs)) if flat is not inputs else output
        output, mean, variance = tf.compat.v1.nn.fused_batch_norm(flat, scale, offset, epsilon=epsilon)
        # The kernel's variance is the unbiased one; Keras keeps the biased.
        count = tf.cast(tf.size(flat) // channels, tf.float32)
        variance = variance * ((count - 1) / count)
        for average, new in ((self.moving_mean, mean), (self.moving_variance, variance)):
            old = tf.convert_to_tensor(average)
            average.assign(old * self.momentum + new * (1 - self.momentum))
        return tf.reshape(output, tf.shape(inputs)) if flat is not inputs else output


@keras.saving.register_keras_serializable("cifar10_trainer")
class FastDropout(keras.layers.Dropout):
    """Keras's dropout of single numbers, from half as many random bits, and kept as a factor, not as a choice.

    The rate is the nearest multiple of 2**-16. On a CPU in bfloat16 it takes two fifths of Keras's time.
    """

    def call(self, inputs, training=False):
        if not training or self.rate == 0:
            return inputs
        count = tf.size(inputs)
        seed = tf.cast(tf.convert_to_tensor(self.seed_generator.next()), tf.int32)
        bits = tf.random.stateless_uniform([(count + 1) // 2], seed, None, None, tf.int32)
        numbers = tf.reshape(tf.bitcast(bits, tf.int16), [-1])[:count]
        dropped = round(self.rate * 2**16)
        kept = tf.reshape(numbers >= dropped - 2**15, tf.shape(inputs))
        return inputs * (tf.cast(kept, inputs.dtype) * (2**16 / (2**16 - dropped)))


@keras.saving.register_keras_serializable("cifar10_trainer")
class FastLeakyReLU(keras.layers.LeakyReLU):
    """Keras's leaky ReLU, whose gradient is told by the sign of what comes out: what goes in need not be kept.

    So it becomes a part of the convolution before it, which no one else asks for its result. Its slope is above 0.
    """

    def call(self, inputs):
        slope = self.negative_slope

        @tf.custom_gradient
        def activate(x):
            y = tf.nn.leaky_relu(x, slope)
            return y, lambda dy: tf.raw_ops.LeakyReluGrad(gradients=dy, features=y, alpha=slope)

        return activate(inputs)


@keras.saving.register_keras_serializable("cifar10_trainer")
class FastSiLU(keras.layers.Activation):
    """Keras's SiLU, whose gradient takes the sigmoid from what came out: y / x, where y = x sigmoid(x).

    On a CPU in bfloat16 a division takes a quarter of a sigmoid's time, and the whole gradient six tenths. XLA makes one
    pass of Keras's own.
    """

    def call(self, inputs):
        @tf.custom_gradient
        def activate(x):
            y = x * tf.sigmoid(x)  # one kernel of oneDNN's

            def gradient(dy):
                with tf.control_dependencies([dy]):  # not before it is needed: it is as large as the maps
                    sigmoid = tf.where(x == 0, tf.constant(0.5, x.dtype), y / x)
                    return dy * (sigmoid * (1 + (x - y)))

            return y, gradient

        return activate(inputs)

    @staticmethod
    def suits(layer: keras.layers.Activation, policy: str) -> bool:
        """Whether `layer` may be one of these. In float16, y / x is wrong where y is subnormal."""
        return layer.activation is keras.activations.silu and policy != "mixed_float16"


@keras.saving.register_keras_serializable("cifar10_trainer")
class FastConv2D(keras.layers.Conv2D):
    """Keras's 3x3 convolution whose gradient to the kernel is nine matrix products where the maps are small.

    On a CPU that takes 0.1 to 0.9 of the time of oneDNN's own. Maps without a fixed size are small or not in each step.
    """

    def convolution_op(self, inputs, kernel):
        channels = min(kernel.shape[2:])
        height, width = inputs.shape[1:3]

        @tf.custom_gradient
        def convolve(x, w):
            def gradient(dy):
                if height and width:
                    dw = kernel_gradient(x, dy)
                else:
                    own = tf.raw_ops.Conv2DBackpropFilter
                    dw = tf.cond(
                        self.small(tf.shape(x)[1], tf.shape(x)[2], channels),
                        lambda: kernel_gradient(x, dy),
                        lambda: own(
                            input=x, filter_sizes=w.shape, out_backprop=dy, strides=[1] * 4, padding="SAME"
                        ),
                    )
                with tf.control_dependencies([dw]):  # else many layers' x and dy would wait in memory for it
                    dx = tf.raw_ops.Conv2DBackpropInput(
                        input_sizes=tf.shape(x), filter=w, out_backprop=dy, strides=[1] * 4, padding="SAME"
                    )
                return dx, dw

            return tf.nn.conv2d(x, w, 1, "SAME"), gradient

        return convolve(inputs, tf.convert_to_tensor(kernel))

    @staticmethod
    def small(height, width, channels):
        """Whether maps of `channels` channels, the fewer of both sides, are small. BUILD_NOTES.md has the timings."""
        return 3 * height * width <= channels

    @classmethod
    def suits(cls, layer: keras.layers.Conv2D, height: int, width: int) -> bool:
        """Whether `layer` may be one of these where its maps are of this size."""
        return (
            (layer.kernel_size, layer.strides, layer.dilation_rate) == ((3, 3), (1, 1), (1, 1))
            and (layer.padding, layer.groups, layer.data_format) == ("same", 1, "channels_last")
            and min(layer.kernel.shape[2:]) >= 64
            and cls.small(height, width, min(layer.kernel.shape[2:]))
        )


@keras.saving.register_keras_serializable("cifar10_trainer")
class FastMaxPooling2D(keras.layers.MaxPooling2D):
    """Keras's pooling of 2x2 pixels, whose gradient is told by which of the four was the first to be the largest.

    XLA makes one pass over the maps of it, each way; of Keras's own gradient it makes scattered additions, which took an
    eighth of a step. Without XLA it is slower than Keras's own.
    """

    def call(self, inputs):
        shape = tf.shape(inputs)
        height, width = (n or shape[i] for i, n in ((1, inputs.shape[1]), (2, inputs.shape[2])))

        @tf.custom_gradient
        def pool(x):
            places = [x[:, i : height // 2 * 2 : 2, j : width // 2 * 2 : 2] for i in (0, 1) for j in (0, 1)]
            y = functools.reduce(tf.maximum, places)
            first = tf.constant(3, tf.uint8)
            for k in (2, 1, 0):
                first = tf.where(places[k] == y, tf.constant(k, tf.uint8), first)

            def gradient(dy):
                # [n, h, 2, w, 2, channels]: the four pixels of each result, as they lie in memory.
                spread = first[:, :, None, :, None], dy[:, :, None, :, None]
                place = tf.constant([[0, 1], [2, 3]], tf.uint8)[None, None, :, None, :, None]
                dx = tf.where(spread[0] == place, spread[1], tf.zeros([], dy.dtype))
                dx = tf.reshape(dx, [-1, height // 2 * 2, width // 2 * 2, x.shape[-1]])
                return tf.pad(dx, [[0, 0], [0, height % 2], [0, width % 2], [0, 0]])

            return y, gradient

        return pool(inputs)

    @staticmethod
    def suits(layer: keras.layers.MaxPooling2D) -> bool:
        """Whether `layer` may be one of these."""
        return (layer.pool_size, layer.strides, layer.padding, layer.data_format) == (
            (2, 2),
            (2, 2),
            "valid",
            "channels_last",
        )


def kernel_gradient(x, dy):
    """The gradient [3, 3, in, out] to the kernel of y = conv2d(x, kernel, 1, "SAME").

    Place (i, j) of the kernel has the pixels of x [n, h, w, in] that lie (i, j) from those of dy [n, h, w, out].
    """
    height, width = tf.shape(x)[1], tf.shape(x)[2]

    def pixels(maps, i, j):
        part = maps[:, max(i, 0) : height + min(i, 0), max(j, 0) : width + min(j, 0)]
        return tf.reshape(part, [-1, maps.shape[-1]])

    products: list = []
    for i, j in [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]:
        with tf.control_dependencies(
            products[-1:]
        ):  # one after another: the copies of all would be in memory
            products.append(tf.matmul(pixels(x, i, j), pixels(dy, -i, -j), transpose_a=True))
    return tf.reshape(tf.stack(products), [3, 3, x.shape[-1], dy.shape[-1]])
