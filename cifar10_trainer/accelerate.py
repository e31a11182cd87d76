"""Turns a plain Keras model into its training model: the same variables and the same function, but faster.

The training model computes in the dtype of a precision policy, ends in logits instead of a softmax, and replaces
these layers by those of `layers.py`:

- batch norm: one kernel forward and one backward;
- dropout: 16 random bits per element;
- leaky ReLU: a part of the convolution before it;
- SiLU: a gradient without a sigmoid, on a CPU;
- 3x3 convolutions with small maps: the gradient to the kernel as matrix products, on a CPU;
- max pooling: one pass forward and one backward, under XLA.

The trained weights are copied to the plain model, and that model is saved.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from .errors import ConfigError
from .layers import (
    FastConv2D,
    FastDropout,
    FastLeakyReLU,
    FastMaxPooling2D,
    FastSiLU,
    FusedBatchNormalization,
)
from .models.own import logits_of

# Layers whose results lose too much in 16 bits.
FLOAT32_LAYERS = {"preprocess", "head", "logits"}
# TensorFlow has no fast bfloat16 kernel for them on a CPU: in float32 a step of MobileNetV2 takes half of the time.
SLOW_IN_BFLOAT16 = (keras.layers.DepthwiseConv2D, keras.layers.SeparableConv2D)
PREPROCESSING_LAYERS = (keras.layers.Rescaling, keras.layers.Normalization, keras.layers.Resizing)


def make_training_model(
    model: keras.Model,
    policy: str,
    *,
    any_size: bool = False,
    synchronize: bool = False,
    compiled: bool = False,
) -> keras.Model:
    """Makes the training model of `model`: up to the logits, with equal variables in the same order.

    Args:
        model: functional; it ends in probabilities, and before them in logits.
        policy: a Keras dtype policy's name. Preprocessing, and everything from the head on, stays in float32.
        any_size: whether the training model accepts images of any height and width.
        synchronize: whether batch norm computes its statistics over all replicas, by Keras's own, unfused kernels.
        compiled: whether XLA compiles the gradients.

    Returns:
        A functional model from images [n, height, width, channels] to float32 logits [n, classes]. Its variables have
        the values of those of `model`, but they are copies.
    """

    logits, softmax_layer = logits_of(model)

    body = keras.Model(model.inputs[0], logits)

    def clone(layer: Any) -> keras.Layer:
        if layer.name == body.output_names[0] and not isinstance(layer, keras.Model):
            linear = {"activation": "linear"} if layer is softmax_layer else {}
            return layer.__class__.from_config({**layer.get_config(), **linear, "dtype": "float32"})
        return _training_layer(layer, policy, any_size=any_size, synchronize=synchronize, compiled=compiled)

    shape = (None, None, model.input_shape[-1]) if any_size else model.input_shape[1:]
    nested = any(isinstance(layer, keras.Model) for layer in body.layers)
    result = keras.models.clone_model(
        body,
        input_tensors=keras.Input(shape),
        clone_function=clone,
        **({"recursive": True} if nested else {}),
    )
    _copy_trainable(body, result)
    result.set_weights(body.get_weights())
    return result


def _copy_trainable(model: keras.Model, result: keras.Model) -> None:
    """Freezes the layers of `result` whose counterparts in `model` are frozen, inside nested models too."""
    for old, new in zip(model.layers, result.layers, strict=True):
        if isinstance(old, keras.Model):
            _copy_trainable(old, new)
        else:
            new.trainable = old.trainable


def _training_layer(
    layer: keras.Layer, policy: str, *, any_size: bool, synchronize: bool, compiled: bool
) -> keras.Layer:
    """Returns a new layer, without weights, that stands for `layer` in the training model."""
    config = layer.get_config()
    # `type`, not `isinstance`: a subclass may compute something else.
    kind, cpu = type(layer), not tf.config.list_logical_devices("GPU")
    is_float32 = layer.name in FLOAT32_LAYERS or isinstance(layer, PREPROCESSING_LAYERS)
    is_float32 = is_float32 or (cpu and kind in SLOW_IN_BFLOAT16)
    if not is_float32 and layer.dtype_policy.name == "float32":
        config["dtype"] = policy
    if len(layer._inbound_nodes) > 1:  # a layer that is used several times has several outputs
        return layer.__class__.from_config(config)
    if kind is keras.layers.BatchNormalization and config["axis"] in (-1, len(layer.output.shape) - 1):
        if synchronize:
            return keras.layers.BatchNormalization.from_config({**config, "synchronized": True})
        return FusedBatchNormalization.from_config(config)
    if kind is keras.layers.Dropout and layer.noise_shape is None:
        return FastDropout.from_config(config)
    if kind is keras.layers.Conv2D and cpu:
        # Without a fixed size, each step decides, and the smallest maps are those for which it can matter.
        height, width = (1, 1) if any_size else layer.output.shape[1:3]
        if FastConv2D.suits(layer, height, width):
            return FastConv2D.from_config(config)
    if kind is keras.layers.Activation and cpu and not compiled and FastSiLU.suits(layer, policy):
        return FastSiLU.from_config(config)
    if kind is keras.layers.MaxPooling2D and compiled and FastMaxPooling2D.suits(layer):
        return FastMaxPooling2D.from_config(config)
    if kind is keras.layers.LeakyReLU and layer.negative_slope > 0:
        return FastLeakyReLU.from_config(config)
    return layer.__class__.from_config(config)


def check_sizes(model: keras.Model, sizes: tuple[int, ...]) -> None:
    """Checks that `model` can train on square images of these sides.

    Args:
        model: functional.
        sizes: sides in pixels, at least one.

    Raises:
        ConfigError: if a layer would receive no pixels, or if the number of weights depends on the size.
    """
    for side in {min(sizes), max(sizes)}:
        too_deep = (
            f"sizes is {sizes}, but {model.name} is too deep for {side}x{side} pixels; allowed: larger sizes"
        )
        images = keras.Input((side, side, model.input_shape[-1]))
        try:
            resized = keras.models.clone_model(model, input_tensors=images)
        except ValueError as error:
            raise ConfigError(too_deep) from error
        if any(0 in layer.output.shape[1:] for layer in resized.layers):  # Keras before 3.13 raises nothing
            raise ConfigError(too_deep)
        if [w.shape for w in resized.weights] != [w.shape for w in model.weights]:
            raise ConfigError(
                f"sizes is {sizes}, but {model.name} flattens its maps, so it accepts images of one size only;"
                " allowed: (), which leaves all images as they are"
            )
