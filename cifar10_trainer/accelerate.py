"""A plain Keras model -> the model that trains: the same variables and the same function, faster.

Batch norm in one kernel each way, dropout from 16 random bits a number, leaky ReLUs within convolutions, SiLU's gradient
without a sigmoid, gradients of small convolutions as matrix products, max pooling in one pass each way under XLA, the
compute dtype of the precision's policy, no softmax. What it has learned is copied to the plain model, which is what is saved.
"""

from __future__ import annotations

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


def make_training_model(
    model: keras.Model,
    policy: str,
    *,
    any_size: bool = False,
    synchronize: bool = False,
    compiled: bool = False,
) -> keras.Model:
    """A twin of `model` up to its logits, faster to train: the same variables in the same order, and their values.

    The twin computes in `policy`; preprocessing and everything from the logits on stay in float32.

    Args:
        model: functional, with a layer "logits".
        policy: a Keras dtype policy's name.
        any_size: whether the twin takes images of any height and width.
        synchronize: whether batch norm takes its statistics over all replicas (Keras's own, unfused kernel).
        compiled: whether XLA compiles its gradients.
    """
    body = keras.Model(model.input, model.get_layer("logits").output)
    head = {"preprocess", "head", "logits"}
    cpu = not tf.config.list_logical_devices("GPU")

    def twin(layer):
        config = layer.get_config()
        if layer.name not in head:
            config["dtype"] = policy
        if type(layer) is keras.layers.BatchNormalization and config["axis"] in (
            -1,
            len(layer.output.shape) - 1,
        ):
            if synchronize:
                return keras.layers.BatchNormalization.from_config({**config, "synchronized": True})
            return FusedBatchNormalization.from_config(config)
        if type(layer) is keras.layers.Dropout and layer.noise_shape is None:
            return FastDropout.from_config(config)
        if type(layer) is keras.layers.Conv2D and cpu:
            side = (1, 1) if any_size else layer.output.shape[1:3]
            if FastConv2D.suits(layer, *side):
                return FastConv2D.from_config(config)
        if type(layer) is keras.layers.Activation and cpu and not compiled and FastSiLU.suits(layer, policy):
            return FastSiLU.from_config(config)
        if type(layer) is keras.layers.MaxPooling2D and compiled and FastMaxPooling2D.suits(layer):
            return FastMaxPooling2D.from_config(config)
        if type(layer) is keras.layers.LeakyReLU and layer.negative_slope > 0:
            return FastLeakyReLU.from_config(config)
        return layer.__class__.from_config(config)

    shape = (None, None, model.input_shape[-1]) if any_size else model.input_shape[1:]
    result = keras.models.clone_model(body, input_tensors=keras.Input(shape), clone_function=twin)
    for old, new in zip(body.layers, result.layers, strict=True):
        new.trainable = old.trainable
    result.set_weights(body.get_weights())
    return result


def check_sizes(model: keras.Model, sizes: tuple[int, ...]) -> None:
    """Raises ConfigError where the weights of `model` do not fit square images of these sides."""
    for side in {min(sizes), max(sizes)}:
        deep = (
            f"sizes is {sizes}, but {model.name} is too deep for {side}x{side} pixels; allowed: larger ones"
        )
        try:
            twin = keras.models.clone_model(
                model, input_tensors=keras.Input((side, side, model.input_shape[-1]))
            )
        except ValueError as error:
            raise ConfigError(deep) from error
        if any(0 in layer.output.shape[1:] for layer in twin.layers):  # Keras before 3.13 does not mind
            raise ConfigError(deep)
        if [w.shape for w in twin.weights] != [w.shape for w in model.weights]:
            raise ConfigError(
                f"sizes is {sizes}, but {model.name} flattens its maps, so it takes images of one size;"
                " allowed: () for them as they are"
            )
