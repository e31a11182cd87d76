"""Learning-rate schedules and optimizers, as Keras classes built from a Config."""

from __future__ import annotations

import dataclasses

import keras
import tensorflow as tf

from .config import Optimizer, Schedule


@keras.saving.register_keras_serializable("cifar10_trainer")
class RunSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate over a whole run of `steps` steps: `peak` times what `Schedule` says at step / steps.

    The last step is `steps - 1`; a linear or cosine course would reach `end` one step later.
    """

    def __init__(self, peak: float, steps: int, schedule: Schedule | dict):
        self.peak = peak
        self.steps = steps
        self.schedule = schedule if isinstance(schedule, Schedule) else Schedule(**schedule)

    def __call__(self, step):
        s = self.schedule
        step = tf.cast(step, tf.float32)
        after = tf.clip_by_value((step / self.steps - s.warmup) / (1 - s.warmup), 0.0, 1.0)
        if s.name == "linear":
            value = 1 + (s.end - 1) * after
        elif s.name == "cosine":
            value = s.end + (1 - s.end) * 0.5 * (1 + tf.cos(3.14159265 * after))
        elif s.name == "step":
            # In whole steps: as fractions they would round differently inside a graph.
            drops = tf.constant([drop * self.steps for drop in s.drops], tf.float32)
            value = s.drop ** tf.reduce_sum(tf.cast(step >= drops, tf.float32))
        elif s.name == "cyclic":
            # Triangles from `end` up to 1 and back: Smith 2017, arXiv:1506.01186.
            phase = tf.math.floormod(after * s.cycles, 1.0)
            value = s.end + (1 - s.end) * (1 - tf.abs(2 * phase - 1))
        else:
            value = tf.ones_like(step)
        if s.warmup:
            end = s.warmup * self.steps
            value = tf.where(step < end, s.start + (1 - s.start) * step / end, value)
        return self.peak * value

    def get_config(self):
        return {"peak": self.peak, "steps": self.steps, "schedule": dataclasses.asdict(self.schedule)}


@keras.saving.register_keras_serializable("cifar10_trainer")
class Adam(keras.optimizers.Adam):
    """Keras's Adam, each variable in one kernel: a step reads and writes it once, not once an operation."""

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        dtype = variable.dtype
        step = tf.cast(self.iterations + 1, dtype)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].value.handle,
            v=self._velocities[index].value.handle,
            beta1_power=tf.cast(self.beta_1, dtype) ** step,
            beta2_power=tf.cast(self.beta_2, dtype) ** step,
            lr=tf.cast(learning_rate, dtype),
            beta1=tf.cast(self.beta_1, dtype),
            beta2=tf.cast(self.beta_2, dtype),
            epsilon=tf.cast(self.epsilon, dtype),
            grad=gradient,
        )


@keras.saving.register_keras_serializable("cifar10_trainer")
class SGD(keras.optimizers.SGD):
    """Keras's SGD with L2 in the gradient, and a learning rate of their own for batch-norm offsets.

    The gradient becomes multiplier * gradient + l2 * variable: the multiplier is 1 but for the offsets, whose
    decay thus stays that of the other weights. (airbench's rule; Jordan 2024, arXiv:2404.00498.)
    """

    def __init__(self, learning_rate=0.01, l2=0.0, bias_multiplier=1.0, **kwargs):
        super().__init__(learning_rate, **kwargs)
        self.l2 = l2
        self.bias_multiplier = bias_multiplier

    def update_step(self, gradient, variable, learning_rate):
        place = self._trainable_variables[self._get_variable_index(variable)]
        if self.bias_multiplier != 1 and place.path.endswith("/beta"):
            gradient = gradient * self.bias_multiplier
        if self.l2:
            gradient = gradient + self.l2 * tf.convert_to_tensor(variable)
        if not self.momentum:
            super().update_step(gradient, variable, learning_rate)
            return
        tf.raw_ops.ResourceApplyKerasMomentum(  # Keras's own rule, in one kernel
            var=variable.handle,
            accum=self.momentums[self._get_variable_index(variable)].value.handle,
            lr=tf.cast(learning_rate, variable.dtype),
            grad=gradient,
            momentum=tf.cast(self.momentum, variable.dtype),
            use_nesterov=self.nesterov,
        )

    def get_config(self):
        return {**super().get_config(), "l2": self.l2, "bias_multiplier": self.bias_multiplier}


@keras.saving.register_keras_serializable("cifar10_trainer")
class Muon(SGD):
    """Momentum whose update of each convolution kernel is made orthogonal; SGD for everything else.

    A kernel [h, w, in, out] is taken as a matrix [h * w * in, out]; before each update its norm is set to the
    square root of `out`. Keras's own `Muon` leaves convolutions to AdamW. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon
    """

    momentums: list[keras.Variable]

    def __init__(self, learning_rate=0.24, kernel_momentum=0.6, sgd_ratio=6.0, **kwargs):
        super().__init__(learning_rate, **kwargs)
        self.kernel_momentum = kernel_momentum
        self.sgd_ratio = sgd_ratio

    def build(self, variables):
        super().build(variables)
        if not self.momentums:  # SGD has none where its own momentum is 0
            self.momentums = self.add_optimizer_variables(variables, "momentum")

    def update_step(self, gradient, variable, learning_rate):
        if len(variable.shape) == 4:
            self._update_kernels(variable, [gradient], [variable], learning_rate)
        else:
            super().update_step(gradient, variable, learning_rate * self.sgd_ratio)

    def _distributed_tf_update_step(self, distribution, grads_and_vars, learning_rate):
        """Keras's own, which takes variables one by one, but for the kernels: those it takes together."""
        kernels = [pair for pair in grads_and_vars if len(pair[1].shape) == 4]
        others = [pair for pair in grads_and_vars if len(pair[1].shape) != 4]
        super()._distributed_tf_update_step(distribution, others, learning_rate)
        if kernels:
            gradients, variables = zip(*kernels, strict=True)
            arguments = gradients, variables, learning_rate
            distribution.extended.update(variables[0], self._update_kernels, arguments, group=False)

    def _update_kernels(self, _, gradients, variables, learning_rate):
        matrices = []
        for gradient, variable in zip(gradients, variables, strict=True):
            momentum = self.momentums[self._get_variable_index(variable)].value
            velocity = self.kernel_momentum * momentum + gradient
            momentum.assign(velocity)
            update = gradient + self.kernel_momentum * velocity
            matrices.append(tf.reshape(update, [-1, variable.shape[-1]]))
        for variable, update in zip(variables, orthogonalize(matrices), strict=True):
            weights = tf.convert_to_tensor(variable)
            weights = weights * (variable.shape[-1] ** 0.5 / tf.norm(weights))
            rate = tf.cast(learning_rate, variable.dtype)
            variable.assign(weights - rate * tf.reshape(update, variable.shape))

    def get_config(self):
        return {**super().get_config(), "kernel_momentum": self.kernel_momentum, "sgd_ratio": self.sgd_ratio}


def orthogonalize(matrices):
    """Roughly the nearest matrices with singular values of one, of float32 matrices [m, n].

    On a GPU all are one batch, in bfloat16 whatever the policy: small products take it longer to start than to
    compute. They are padded with zeros, which stay zeros.
    """
    if not tf.config.list_logical_devices("GPU"):
        return [newton_schulz(normalize(x)) for x in matrices]
    tall = [x if x.shape[0] >= x.shape[1] else tf.transpose(x) for x in matrices]
    rows, columns = (max(x.shape[i] for x in tall) for i in (0, 1))
    padded = [tf.pad(normalize(x), [[0, rows - x.shape[0]], [0, columns - x.shape[1]]]) for x in tall]
    found = tf.cast(newton_schulz(tf.cast(tf.stack(padded), tf.bfloat16)), tf.float32)
    parts = [part[: x.shape[0], : x.shape[1]] for part, x in zip(tf.unstack(found), tall, strict=True)]
    return [
        part if part.shape == x.shape else tf.transpose(part) for part, x in zip(parts, matrices, strict=True)
    ]


def normalize(matrix):
    """A matrix over its norm."""
    return matrix / (tf.norm(matrix) + 1e-7)


def newton_schulz(x, steps: int = 3):
    """The quintic iteration that moves the singular values of matrices [..., m, n], at most one, towards one."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[-2] > x.shape[-1]
    identity = tf.eye(min(x.shape[-2:]), dtype=x.dtype)
    for _ in range(steps):  # a x + b (x x') x + c (x x')^2 x, from the side where x x' is the smaller
        square = tf.matmul(x, x, transpose_a=tall, transpose_b=not tall)
        change = a * identity + b * square + c * tf.matmul(square, square)
        x = tf.matmul(x, change) if tall else tf.matmul(change, x)
    return x


def make_optimizer(optimizer: Optimizer, schedule: Schedule, steps: int) -> keras.optimizers.Optimizer:
    """The Keras optimizer of a run of `steps` steps. The plateau schedule leaves its rate to a callback."""
    o = optimizer
    constant = schedule.name in ("constant", "plateau") and not schedule.warmup
    rate = o.learning_rate if constant else RunSchedule(o.learning_rate, steps, schedule)
    if o.name == "adam":
        return Adam(rate, global_clipnorm=o.clip_norm)
    if o.name == "adamw":
        return keras.optimizers.AdamW(rate, weight_decay=o.weight_decay, global_clipnorm=o.clip_norm)
    kind = SGD if o.name == "sgd" else Muon
    return kind(
        rate,
        momentum=o.momentum,
        nesterov=o.nesterov,
        l2=o.weight_decay,
        bias_multiplier=o.bias_multiplier,
        global_clipnorm=o.clip_norm,
    )
