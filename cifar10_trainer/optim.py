"""Learning-rate schedules and optimizers, as Keras classes built from a Config."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from .config import Optimizer, Schedule, section_from_dict
from .errors import check_number, check_type

LearningRate: TypeAlias = float | keras.optimizers.schedules.LearningRateSchedule


@keras.saving.register_keras_serializable("cifar10_trainer")
class RunSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """The learning rate over a whole run: `peak` times the factor of a `Schedule` at step / steps.

    The last step is `steps - 1`; a linear or cosine schedule would reach its `end` one step later. "cyclic" is the
    triangular policy of Smith 2017 (arXiv:1506.01186).

    Args:
        peak: the highest learning rate.
        steps: the length of the run, 1 or more.
        schedule: the factor over the run, from 0 to 1; a mapping of a `Schedule`'s fields after deserialization.

    Raises:
        ConfigError: if an argument has another type or range.
    """

    def __init__(self, peak: float, steps: int, schedule: Schedule | Mapping[str, Any]) -> None:
        check_number("peak", peak, Real, 0)
        check_number("steps", steps, Integral, 1)
        check_type("schedule", schedule, (Schedule, Mapping), "a Schedule")
        self.peak = peak
        self.steps = steps
        self.schedule = (
            schedule if isinstance(schedule, Schedule) else section_from_dict(Schedule, schedule, "schedule")
        )

    def __call__(self, step: tf.Tensor | int) -> tf.Tensor:
        """Returns the learning rate, float32 [], at `step`, from 0."""
        s = self.schedule
        step = tf.cast(step, tf.float32)
        after = tf.clip_by_value((step / self.steps - s.warmup) / (1 - s.warmup), 0.0, 1.0)
        if s.name == "linear":
            value = 1 + (s.end - 1) * after
        elif s.name == "cosine":
            value = s.end + (1 - s.end) * 0.5 * (1 + tf.cos(math.pi * after))
        elif s.name == "step":
            # In whole steps, because fractions of the run would be rounded differently inside a graph.
            drops = tf.constant([drop * self.steps for drop in s.drops], tf.float32)
            value = s.drop ** tf.reduce_sum(tf.cast(step >= drops, tf.float32))
        elif s.name == "cyclic":
            # Triangles from `end` up to 1 and back.
            phase = tf.math.floormod(after * s.cycles, 1.0)
            value = s.end + (1 - s.end) * (1 - tf.abs(2 * phase - 1))
        else:
            value = tf.ones_like(step)
        if s.warmup:
            end = s.warmup * self.steps
            value = tf.where(step < end, s.start + (1 - s.start) * step / end, value)
        return self.peak * value

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"peak": self.peak, "steps": self.steps, "schedule": dataclasses.asdict(self.schedule)}


@keras.saving.register_keras_serializable("cifar10_trainer")
class Adam(keras.optimizers.Adam):
    """Keras's Adam with one kernel per variable: a step reads and writes each variable once, not once per operation."""

    def update_step(self, gradient: tf.Tensor, variable: keras.Variable, learning_rate: tf.Tensor) -> None:
        """Updates one variable in place."""
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
    """Keras's SGD with L2 in the gradient, and a separate learning rate for the offsets of batch norm.

    The gradient becomes multiplier * gradient + l2 * variable. The multiplier is 1, except for the offsets (beta);
    their weight decay therefore equals that of the other weights. airbench uses this rule (Jordan 2024,
    arXiv:2404.00498).

    Args:
        learning_rate: a number or a schedule.
        l2: the factor of weight decay, 0 or more.
        bias_multiplier: the multiplier of the offsets.
        **kwargs: further arguments of `keras.optimizers.SGD`, such as `momentum` and `nesterov`.
    """

    def __init__(
        self,
        learning_rate: LearningRate = 0.01,
        l2: float = 0.0,
        bias_multiplier: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, **kwargs)
        self.l2 = l2
        self.bias_multiplier = bias_multiplier
        self._left_out: set[int] = set()  # identities of variables, until `build` knows their indices
        self._others: set[int] = set()

    def leave_out(self, variables: Sequence[keras.Variable]) -> None:
        """Treats these variables as any other, whatever their names and shapes. It has to be called before `build`."""
        self._left_out.update(map(id, variables))

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Makes the optimizer's own variables."""
        super().build(variables)
        self._others = {i for i, v in enumerate(variables) if id(v) in self._left_out}

    def update_step(self, gradient: tf.Tensor, variable: keras.Variable, learning_rate: tf.Tensor) -> None:
        """Updates one variable in place."""
        index = self._get_variable_index(variable)
        is_offset = self._trainable_variables[index].path.endswith("/beta") and index not in self._others
        if self.bias_multiplier != 1 and is_offset:
            gradient = gradient * self.bias_multiplier
        if self.l2:
            gradient = gradient + self.l2 * tf.convert_to_tensor(variable)
        if not self.momentum:
            super().update_step(gradient, variable, learning_rate)
            return
        tf.raw_ops.ResourceApplyKerasMomentum(  # Keras's own rule, in one kernel
            var=variable.handle,
            accum=self.momentums[index].value.handle,
            lr=tf.cast(learning_rate, variable.dtype),
            grad=gradient,
            momentum=tf.cast(self.momentum, variable.dtype),
            use_nesterov=self.nesterov,
        )

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "l2": self.l2, "bias_multiplier": self.bias_multiplier}


@keras.saving.register_keras_serializable("cifar10_trainer")
class Muon(SGD):
    """Muon for convolution kernels, `SGD` for all other variables.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) is Nesterov momentum whose update is
    orthogonalized. It treats a kernel [h, w, in, out] as a matrix [h * w * in, out], and sets the norm of the kernel to
    the square root of `out` before each update. Keras's own `Muon` leaves convolutions to AdamW.

    By its shape alone, a kernel is a variable of four dimensions whose last one is above 1. `leave_out` names those that are
    none: a depthwise kernel [h, w, in, multiplier], and a transposed one [h, w, out, in].

    Args:
        learning_rate: of the kernels; a number or a schedule.
        kernel_momentum: the momentum of the kernels, from 0 to 1.
        sgd_ratio: the learning rate of all other variables, as a multiple of `learning_rate`.
        **kwargs: further arguments of `SGD`; they act on all other variables.
    """

    momentums: list[keras.Variable]

    def __init__(
        self,
        learning_rate: LearningRate = 0.24,
        kernel_momentum: float = 0.6,
        sgd_ratio: float = 6.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, **kwargs)
        check_number("kernel_momentum", kernel_momentum, Real, 0, 1)
        self.kernel_momentum = kernel_momentum
        self.sgd_ratio = sgd_ratio

    def _is_kernel(self, variable: keras.Variable) -> bool:
        has_shape = len(variable.shape) == 4 and variable.shape[-1] > 1
        return has_shape and self._get_variable_index(variable) not in self._others

    def build(self, variables: Sequence[keras.Variable]) -> None:
        """Makes the momentum of each variable."""
        super().build(variables)
        if not self.momentums:  # Keras's SGD makes none if its own momentum is 0
            self.momentums = self.add_optimizer_variables(variables, "momentum")

    def update_step(self, gradient: tf.Tensor, variable: keras.Variable, learning_rate: tf.Tensor) -> None:
        """Updates one variable in place, which is no kernel: `_update_kernels` updates those."""
        super().update_step(gradient, variable, learning_rate * self.sgd_ratio)

    def _distributed_tf_update_step(
        self,
        distribution: tf.distribute.Strategy,
        grads_and_vars: Sequence[tuple[tf.Tensor, keras.Variable]],
        learning_rate: tf.Tensor,
    ) -> None:
        """Updates all kernels in one call; Keras's own method updates the other variables one by one."""
        kernels = [pair for pair in grads_and_vars if self._is_kernel(pair[1])]
        rest = [pair for pair in grads_and_vars if not self._is_kernel(pair[1])]
        super()._distributed_tf_update_step(distribution, rest, learning_rate)
        if kernels:
            gradients, variables = zip(*kernels, strict=True)
            arguments = gradients, variables, learning_rate
            distribution.extended.update(variables[0], self._update_kernels, arguments, group=False)

    def _update_kernels(
        self,
        _: keras.Variable,
        gradients: Sequence[tf.Tensor],
        variables: Sequence[keras.Variable],
        learning_rate: tf.Tensor,
    ) -> None:
        """Updates kernels in place. `extended.update` requires the first argument, a variable."""
        matrices = []
        for gradient, variable in zip(gradients, variables, strict=True):
            momentum = self.momentums[self._get_variable_index(variable)].value
            velocity = self.kernel_momentum * momentum + gradient
            momentum.assign(velocity)
            update = gradient + self.kernel_momentum * velocity
            matrices.append(tf.reshape(update, [-1, variable.shape[-1]]))
        for variable, update in zip(variables, orthogonalize(matrices), strict=True):
            weights = tf.convert_to_tensor(variable)
            weights = weights * tf.math.divide_no_nan(variable.shape[-1] ** 0.5, tf.norm(weights))
            rate = tf.cast(learning_rate, variable.dtype)
            variable.assign(weights - rate * tf.reshape(update, variable.shape))

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {**super().get_config(), "kernel_momentum": self.kernel_momentum, "sgd_ratio": self.sgd_ratio}


def leave_out_others(optimizer: keras.optimizers.Optimizer, model: keras.Model) -> None:
    """Makes SGD and Muon treat as ordinary variables those that only look special.

    These are the offsets of normalizations other than batch norm, and the kernels of depthwise and transposed convolutions. Other
    optimizers stay as they are. To be called before `build`.
    """
    if not isinstance(optimizer, SGD):
        return
    layers = model._flatten_layers()
    offsets = {id(x.beta) for x in layers if isinstance(x, keras.layers.BatchNormalization)}
    named_beta = [v for v in model.trainable_variables if v.path.endswith("/beta")]
    optimizer.leave_out([v for v in named_beta if id(v) not in offsets])
    for layer in layers:
        if isinstance(layer, keras.layers.SeparableConv2D):
            optimizer.leave_out([layer.depthwise_kernel])
        elif isinstance(layer, (keras.layers.DepthwiseConv2D, keras.layers.Conv2DTranspose)):
            optimizer.leave_out([layer.kernel])


def orthogonalize(matrices: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """Returns, approximately, the nearest matrices whose singular values are all one.

    On a GPU, all matrices become one batch in bfloat16, whatever the dtype policy is, because a GPU needs more time to
    start a small product than to compute it. Zeros pad the matrices to one shape, and stay zeros.

    Args:
        matrices: float32, each [m, n] with m and n of its own.

    Returns:
        float32 matrices of the same shapes.
    """
    if not tf.config.list_logical_devices("GPU"):
        return [newton_schulz(normalize(x)) for x in matrices]
    tall = [x if x.shape[0] >= x.shape[1] else tf.transpose(x) for x in matrices]
    rows, columns = (max(x.shape[i] for x in tall) for i in (0, 1))
    padded = [tf.pad(normalize(x), [[0, rows - x.shape[0]], [0, columns - x.shape[1]]]) for x in tall]
    batch = tf.cast(newton_schulz(tf.cast(tf.stack(padded), tf.bfloat16)), tf.float32)
    parts = [part[: x.shape[0], : x.shape[1]] for part, x in zip(tf.unstack(batch), tall, strict=True)]
    return [
        part if part.shape == x.shape else tf.transpose(part) for part, x in zip(parts, matrices, strict=True)
    ]


def normalize(matrix: tf.Tensor) -> tf.Tensor:
    """Divides a matrix by its Frobenius norm."""
    return matrix / (tf.norm(matrix) + 1e-7)


def newton_schulz(x: tf.Tensor) -> tf.Tensor:
    """Moves the singular values of matrices towards one, by three steps of a quintic Newton-Schulz iteration.

    The coefficients are those of Muon (Jordan et al. 2024): singular values settle between about 0.7 and 1.2.

    Args:
        x: float [..., m, n], with singular values of at most one.

    Returns:
        Matrices of the same shape and dtype.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[-2] > x.shape[-1]
    identity = tf.eye(min(x.shape[-2:]), dtype=x.dtype)
    for _ in range(3):
        # a x + b (x x') x + c (x x')^2 x, with x' x instead if it is the smaller of the two
        square = tf.matmul(x, x, transpose_a=tall, transpose_b=not tall)
        polynomial = a * identity + b * square + c * tf.matmul(square, square)
        x = tf.matmul(x, polynomial) if tall else tf.matmul(polynomial, x)
    return x


def is_constant(schedule: Schedule) -> bool:
    """Returns whether the optimizer has a number as its learning rate, which callbacks may change."""
    return schedule.name in ("constant", "plateau") and not schedule.warmup


def make_optimizer(
    optimizer: Optimizer, schedule: Schedule, steps: int, replicas: int = 1
) -> keras.optimizers.Optimizer:
    """Makes the Keras optimizer of a run.

    Args:
        optimizer: its settings.
        schedule: of the learning rate. With "plateau" the rate is constant here, and a callback changes it.
        steps: the length of the run.
        replicas: of the engine. Keras clips the gradient of each replica, then sums them. Where each gives it the mean of all,
            as `Engine._replica_step` does, clip_norm / replicas is the limit that clips the sum at clip_norm.

    Returns:
        The optimizer, not built yet.
    """
    o = optimizer
    clip_norm = None if o.clip_norm is None else o.clip_norm / replicas
    rate = o.learning_rate if is_constant(schedule) else RunSchedule(o.learning_rate, steps, schedule)
    if o.name == "adam":
        return Adam(rate, global_clipnorm=clip_norm)
    if o.name == "adamw":
        return keras.optimizers.AdamW(rate, weight_decay=o.weight_decay, global_clipnorm=clip_norm)
    kind = SGD if o.name == "sgd" else Muon
    return kind(
        rate,
        momentum=o.momentum,
        nesterov=o.nesterov,
        l2=o.weight_decay,
        bias_multiplier=o.bias_multiplier,
        global_clipnorm=clip_norm,
    )
