"""Turns a plain Keras model into its training model: the same variables and, within rounding, the same function, but faster.

The training model computes in the dtype of a precision policy, ends in logits instead of a softmax, and replaces
these layers by those of `layers.py`:

- batch norm: one kernel forward and one backward;
- dropout: 16 random bits per element, and on a CPU a loop that XLA compiles;
- ReLU and leaky ReLU: a part of the convolution or batch norm before it; their gradients, and those of SiLU, GELU and
  others: one loop that XLA compiles, on a CPU;
- 3x3 convolutions with small maps: the gradient to the kernel as matrix products, on a CPU;
- max pooling: one pass forward and one backward, under XLA.

The trained weights are copied to the plain model, and that model is saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from .augment import RandomLayer
from .errors import ConfigError, one_line
from .keras_state import keras_defaults
from .layers import (
    FastConv2D,
    FastDropout,
    FastLeakyReLU,
    FastMaxPooling2D,
    FastReLU,
    FusedBatchNormalization,
    fast_activation,
    fast_relu,
)
from .models.own import is_of_keras, logits_before_softmax, softmax_of

# Layers whose results lose too much in 16 bits.
FLOAT32_LAYERS = {"preprocess", "head", "logits"}
# The base of all preprocessing and augmentation layers of Keras, which has no public name.
PREPROCESSING_LAYERS = (RandomLayer, keras.layers.Rescaling.__base__)
# TensorFlow has no fast bfloat16 kernel for them on a CPU: in float32 a step of MobileNetV2 takes half of the time.
SLOW_IN_BFLOAT16 = (keras.layers.DepthwiseConv2D, keras.layers.SeparableConv2D)
# Layers whose attribute `activation` is the activation function; and the slow functions that compute each element alone.
WITH_ACTIVATION = (keras.layers.Activation, keras.layers.Conv2D, keras.layers.Dense)
ELEMENTWISE = tuple(getattr(keras.activations, name) for name in ("elu", "gelu", "mish", "silu"))
# Policies that the run's own replaces. Any other one was chosen for the layer.
REPLACED_POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")


@keras_defaults()
def make_training_model(
    model: keras.Model,
    policy: str,
    *,
    any_size: bool = False,
    synchronize: bool = False,
    replicas: int = 1,
    compiled: bool = False,
) -> keras.Model:
    """Makes the training model of `model`: up to the logits, with equal variables in the same order.

    Args:
        model: functional; it ends in a softmax.
        policy: a Keras dtype policy's name. Preprocessing, and everything from the head on, stays in float32.
        any_size: whether the training model accepts images of any height and width.
        synchronize: whether all batch norms compute their statistics over all replicas, by Keras's own, unfused kernels, and
            not only those that ask for it themselves.
        replicas: how many share a batch.
        compiled: whether XLA compiles the gradients.

    Returns:
        A functional model from images [n, height, width, channels] to float32 logits [n, classes]. Its variables have
        the values of those of `model`, but they are copies.

    Raises:
        ConfigError: if the model does not end in a softmax, if its last layer is used in other places as well, or if it does not
            work in the policy.
    """
    softmax, logits = softmax_of(model), logits_before_softmax(model)
    if softmax is None:
        raise ConfigError(
            f"model {model.name} does not end in a softmax; allowed: a model that returns probabilities"
        )
    # Where the softmax is a part of the last layer, or of a model inside this one, its copy leaves the softmax out.
    body = keras.Model(model.inputs[0], model.outputs[0] if logits is None else logits, name=model.name)
    last, nodes = body.outputs[0]._keras_history.operation, _nodes_of(body)
    if logits is None:
        _check_used_once(body, nodes)

    def make(layer: Any) -> Any:
        if layer is softmax and logits is None:
            return _without_softmax(layer)
        if not isinstance(layer, keras.Layer):  # an operation of keras.ops
            return type(layer).from_config(layer.get_config())
        if layer is last:
            return type(layer).from_config({**layer.get_config(), "dtype": "float32"})
        return _training_layer(
            layer, nodes, policy,
            any_size=any_size, synchronize=synchronize, replicas=replicas, compiled=compiled,
        )  # fmt: skip

    shape = (None, None, model.input_shape[-1]) if any_size else model.input_shape[1:]
    images = keras.Input(shape, dtype=model.inputs[0].dtype)
    result = _cloned(body, images, make, policy)
    result.set_weights(body.get_weights())
    _finish_layers(body, result)
    return result


def _cloned(
    body: keras.Model, images: keras.KerasTensor, make: Callable[[Any], Any], policy: str
) -> keras.Model:
    """A model of new layers, which `make` makes for those of `body` and of the models inside it.

    Raises ConfigError if it does not work in the policy.
    """

    def clone(layer: Any) -> Any:
        # The policy of the layers that `layer` makes inside itself; `make` sets the run's where it applies.
        keras.config.set_dtype_policy("float32")
        new = make(layer)
        if is_of_keras(layer):
            # A layer of Keras makes no further layers when it is built. A user's layer may; in a nested Sequential it is built only
            # after all layers are made, and must find the run's policy then.
            keras.config.set_dtype_policy(policy)
        return new

    try:
        return keras.models.clone_model(body, input_tensors=images, clone_function=clone, recursive=True)
    except (TypeError, ValueError, tf.errors.InvalidArgumentError) as error:
        if policy == "float32":
            raise
        raise ConfigError(
            f"model {body.name} does not work in {policy} ({one_line(error)}); allowed: --precision=float32"
        ) from error


def _check_used_once(model: keras.Model, nodes: set[Any]) -> None:
    """Raises ConfigError if the last layer is also called elsewhere: its copy has no softmax, which would be missing there."""
    last: Any = model
    while isinstance(last, keras.Model):
        last = last.outputs[0]._keras_history.operation
        if sum(node.operation is last for node in nodes) > 1:
            raise ConfigError(
                f"model {model.name} ends in the layer {last.name!r}, which it also uses elsewhere; allowed: a last layer of its own"
            )


def has_depthwise(model: keras.Model) -> bool:
    """Whether the model has convolutions that are slow in bfloat16 on a CPU."""
    return any(isinstance(layer, SLOW_IN_BFLOAT16) for layer in model._flatten_layers())


def synchronizes(model: keras.Model) -> bool:
    """Whether a batch norm of the model asks for statistics over all replicas."""
    layers = model._flatten_layers()
    return any(isinstance(layer, keras.layers.BatchNormalization) and layer.synchronized for layer in layers)


def _without_softmax(operation: Any) -> keras.Layer:
    """A new layer that computes the logits of which `operation` computes the softmax."""
    if isinstance(operation, keras.Layer) and not isinstance(operation, keras.layers.Softmax):
        config = {**operation.get_config(), "activation": "linear", "dtype": "float32"}
        return type(operation).from_config(config)
    return keras.layers.Activation("linear", dtype="float32", name=operation.name)


def _finish_layers(model: keras.Model, result: keras.Model) -> None:
    """Takes over what is not a weight: what is frozen, and the constants of Normalization."""
    for old, new in zip(model.layers, result.layers, strict=True):
        new.trainable = old.trainable  # of all layers within it, too
        if isinstance(old, keras.Model):
            _finish_layers(old, new)
            continue
        parts, copies = list(old._flatten_layers()), list(new._flatten_layers())
        if len(parts) == len(copies):  # the flags of the weights follow in any case
            for part, copy in zip(parts, copies, strict=True):
                copy.trainable = part.trainable
        for part, copy in zip(old.weights, new.weights, strict=True):
            copy.trainable = part.trainable
        for copy in copies:
            if isinstance(copy, keras.layers.Normalization):
                copy.finalize_state()


def _fuses_relu(layer: keras.Layer) -> bool:
    """Whether TensorFlow fuses the layer's ReLU with the operation before it."""
    before = layer
    if isinstance(layer, keras.layers.Activation):
        before = layer._inbound_nodes[0].parent_nodes[0].operation
    return isinstance(before, keras.layers.BatchNormalization) or getattr(before, "use_bias", False)


def _nodes_of(model: keras.Model) -> set[Any]:
    """The calls of layers that make up the model, those in models inside it included. Other models may share its layers."""
    nested = [_nodes_of(layer) for layer in model.layers if isinstance(layer, keras.Model)]
    by_depth = getattr(model, "_functional", model)._nodes_by_depth
    return {node for nodes in by_depth.values() for node in nodes}.union(*nested)


def _output_shape(layer: keras.Layer, nodes: set[Any]) -> tuple[int | None, ...] | None:
    """The shape of the layer's output in `nodes`; None where it has several, because the layer is used in several places."""
    shapes = {tuple(node.output_tensors[0].shape) for node in layer._inbound_nodes if node in nodes}
    return shapes.pop() if len(shapes) == 1 else None


def _training_layer(
    layer: keras.Layer, nodes: set[Any], policy: str,
    *,
    any_size: bool, synchronize: bool, replicas: int, compiled: bool,
) -> keras.Layer:  # fmt: skip
    """Returns a new layer, without weights, that stands for `layer` in the training model. nodes: those of its model."""
    config, shape = layer.get_config(), _output_shape(layer, nodes)
    # `type`, not `isinstance`: a subclass may compute something else.
    kind, cpu = type(layer), not tf.config.list_logical_devices("GPU")
    by_loops = cpu and not compiled
    is_float32 = layer.name in FLOAT32_LAYERS or isinstance(layer, PREPROCESSING_LAYERS)
    is_float32 = is_float32 or (cpu and kind in SLOW_IN_BFLOAT16)
    if not is_float32 and layer.dtype_policy.name in REPLACED_POLICIES:
        config["dtype"] = policy
        # For the layers that it makes itself, now or when it is built. `keras_defaults` restores the user's.
        keras.config.set_dtype_policy(policy)
    if kind is keras.layers.BatchNormalization:
        if replicas > 1 and (synchronize or layer.synchronized):
            return keras.layers.BatchNormalization.from_config({**config, "synchronized": True})
        last_axis = shape and len(shape) in (2, 4) and config["axis"] in (-1, len(shape) - 1)
        if last_axis and FusedBatchNormalization.suits(layer):
            return FusedBatchNormalization.from_config(config)
    if kind is keras.layers.Dropout and layer.noise_shape is None:
        return FastDropout.from_config(config)
    if kind is keras.layers.Conv2D and cpu and (shape or any_size):
        # Without a fixed size, each step decides, and the smallest maps are those for which it can matter.
        height, width = (1, 1) if any_size or shape is None else shape[1:3]
        if height and width and FastConv2D.suits(layer, height, width):
            kind = FastConv2D
    if kind is keras.layers.MaxPooling2D and compiled and FastMaxPooling2D.suits(layer):
        return FastMaxPooling2D.from_config(config)
    if kind is keras.layers.LeakyReLU and layer.negative_slope > 0:
        return FastLeakyReLU.from_config(config)
    if kind is keras.layers.ReLU and by_loops and FastReLU.suits(layer):
        return FastReLU.from_config(config)
    result = kind.from_config(config)
    if by_loops and isinstance(layer, WITH_ACTIVATION):
        if layer.activation is keras.activations.relu:
            result.activation = fast_relu(0.0, _fuses_relu(layer))
        elif layer.activation in ELEMENTWISE:
            result.activation = fast_activation(layer.activation)
    return result


def check_sizes(model: keras.Model, sizes: tuple[int, ...]) -> None:
    """Checks that `model` can train on square images of these sides.

    Args:
        model: functional.
        sizes: sides in pixels, at least one.

    Raises:
        ConfigError: if a layer would receive no pixels, or if the number of weights depends on the size.
    """
    for side in sorted(set(sizes)):
        images = keras.Input((side, side, model.input_shape[-1]), dtype=model.inputs[0].dtype)
        try:
            resized = keras.models.clone_model(model, input_tensors=images)
        except ValueError as error:
            raise ConfigError(
                f"sizes is {sizes}, but {model.name} does not take {side}x{side} pixels ({one_line(error)}); allowed: other sizes,"
                " larger ones where it is too deep for these"
            ) from error
        outputs = keras.tree.flatten([layer.output for layer in resized.layers])
        if any(0 in output.shape[1:] for output in outputs):  # Keras before 3.13 raises nothing
            raise ConfigError(
                f"sizes is {sizes}, but {model.name} is too deep for {side}x{side} pixels; allowed: larger sizes"
            )
        if [w.shape for w in resized.weights] != [w.shape for w in model.weights]:
            raise ConfigError(
                f"sizes is {sizes}, but {model.name} flattens its maps, so it accepts images of one size only;"
                " allowed: (), which leaves all images as they are"
            )
