"""Somebody's own Keras classifier as the plain model of a run."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import keras

from ..errors import ConfigError

ALLOWED = (
    "allowed: a functional or built Sequential Keras model with one image input [batch, height, width, channels] and one"
    " output [batch, classes], softmax or logits"
)


def plain_model(model: keras.Model, input_shape: tuple[int, ...], num_classes: int) -> keras.Model:
    """Makes the plain model of a run from somebody's own classifier.

    Args:
        model: functional or Sequential, compiled or not. It takes raw pixels 0-255, so scaling is a layer of it.
        input_shape: height, width and channels of the images.
        num_classes: the number of classes.

    Returns:
        A functional model that shares all layers with `model`. It ends in probabilities: where `model` ends in logits, a
        softmax follows them.

    Raises:
        ConfigError: if the engine cannot train the model.
    """
    functional = _functional(model)
    shape, output_shape = tuple(functional.input_shape), tuple(functional.output_shape)
    fits = all(a in (None, b) for a, b in zip(shape[1:], input_shape, strict=False))
    if len(shape) != 4 or not fits:
        raise ConfigError(f"model takes {shape}, but the images are {input_shape}; {ALLOWED}")
    if len(output_shape) != 2 or output_shape[1] != num_classes:
        raise ConfigError(
            f"model returns {output_shape}, but the data set has {num_classes} classes; {ALLOWED}"
        )
    if _ends_in_softmax(functional):
        return functional
    taken = {other.name for other in functional.layers}
    name = next(n for n in ("probabilities", "probabilities_of_the_run") if n not in taken)
    softmax = keras.layers.Activation("softmax", dtype="float32", name=name)
    return keras.Model(functional.inputs[0], softmax(functional.outputs[0]), name=functional.name)


def logits_of(model: keras.Model) -> tuple[keras.KerasTensor, keras.Layer | None]:
    """Finds the logits of a model that ends in probabilities.

    Returns:
        The tensor of the logits. Where the softmax is the activation of a layer, that layer's output, and the layer, which
        computes the logits once its activation is linear.
    """
    for layer in model.layers:
        if layer.name == "logits" and layer.output.shape == model.output_shape:
            return layer.output, None
    last = _last_operation(model)
    if _has_softmax(last) and not _is_only_softmax(last):
        return model.outputs[0], last
    return last.input, None


def digest(model: keras.Model) -> str:
    """Eight letters and digits for the architecture of `model`: the kinds of its layers, and the shapes of its weights."""
    layers = [[type(layer).__name__, [list(w.shape) for w in layer.weights]] for layer in model.layers]
    return hashlib.sha256(json.dumps(layers).encode()).hexdigest()[:8]


def _functional(model: Any) -> keras.Model:
    """A functional model of the layers of `model`. Raises ConfigError where there is none."""
    if not isinstance(model, keras.Model):
        raise ConfigError(f"model is {type(model).__name__}; {ALLOWED}")
    inputs, outputs = (getattr(model, name, None) for name in ("inputs", "outputs"))
    if not inputs or not outputs:
        how = (
            "a Sequential model without an input shape"
            if isinstance(model, keras.Sequential)
            else "a subclassed model"
        )
        raise ConfigError(f"model is {type(model).__name__}, {how}; {ALLOWED}")
    if len(inputs) != 1 or len(outputs) != 1:
        raise ConfigError(f"model has {len(inputs)} inputs and {len(outputs)} outputs; {ALLOWED}")
    if isinstance(model, keras.Sequential):
        return keras.Model(inputs[0], outputs[0], name=model.name)
    return model


def _last_operation(model: keras.Model) -> Any:
    """The layer, or the operation of `keras.ops`, whose output is that of the model."""
    return next(op for op in model.operations if op.name == model.output_names[0])


def _is_only_softmax(operation: Any) -> bool:
    """Whether it computes a softmax and nothing else: a layer Softmax or Activation, or `keras.ops.softmax`."""
    return type(operation).__name__ == "Softmax" or isinstance(operation, keras.layers.Activation)


def _has_softmax(operation: Any) -> bool:
    softmax = getattr(operation, "activation", None) is keras.activations.softmax
    return softmax or type(operation).__name__ == "Softmax"


def _ends_in_softmax(model: keras.Model) -> bool:
    """Whether the model ends in a softmax, and not in logits. Raises ConfigError if it ends in another activation."""
    last = _last_operation(model)
    activation = getattr(last, "activation", None)
    if not _has_softmax(last) and activation not in (None, keras.activations.linear):
        name = getattr(activation, "__name__", str(activation))
        raise ConfigError(f"model ends in the activation {name}; {ALLOWED}")
    return _has_softmax(last)
