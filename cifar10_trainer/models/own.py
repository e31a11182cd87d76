"""A user's own Keras classifier as the plain model of a run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from ..errors import ConfigError, one_line
from ..keras_state import StepSeeds, drawing_from

# Operations of keras.ops and layers that are no logits.
ACTIVATIONS = ("Sigmoid", "Tanh", "Relu", "ReLU", "LogSoftmax", "HardSigmoid")
# TensorFlow's random operations that keep a state of their own; the stateless ones are given a seed.
RANDOM_OPERATION = re.compile(
    r"(?!Stateless).*(Random|Multinomial|StandardNormal|TruncatedNormal|SampleDistorted|StatefulUniform)|Rng"
)
SUM_TOLERANCE = 0.02  # of probabilities in 16 bits
ALLOWED = (
    "allowed: a functional or built Sequential Keras model with one image input [batch, height, width, channels] and one"
    " output [batch, classes], softmax or logits"
)


def plain_model(model: keras.Model, input_shape: tuple[int, ...], num_classes: int) -> keras.Model:
    """Makes the plain model of a run from a user's classifier.

    Args:
        model: functional or Sequential, compiled or not. It takes raw pixels 0-255, so scaling is a layer of it.
        input_shape: height, width and channels of the images.
        num_classes: the number of classes.

    Returns:
        A functional model that shares all layers with `model`, for images of this shape. It ends in probabilities: where
        `model` ends in logits, a softmax follows them.

    Raises:
        ConfigError: if the engine cannot train the model.
    """
    functional = _functional(model)
    shape, output_shape = tuple(functional.input_shape), tuple(functional.output_shape)
    fits = all(a in (None, b) for a, b in zip(shape[1:], input_shape, strict=False))
    if len(shape) != 4 or not fits:
        grey = "; grey images become three equal channels" if shape[3:] == (1,) else ""
        raise ConfigError(f"model takes {shape}, but the images are {input_shape}{grey}; {ALLOWED}")
    if len(output_shape) != 2 or output_shape[1] != num_classes:
        raise ConfigError(
            f"model returns {output_shape}, but the data set has {num_classes} classes; {ALLOWED}"
        )
    if None in shape[1:]:
        fixed = keras.Input(input_shape, dtype=functional.inputs[0].dtype)
        functional = keras.models.clone_model(
            functional, input_tensors=fixed, clone_function=lambda layer: layer
        )
    _check_layers(functional)
    _check_ending(functional)
    _check_assignments(functional)
    if not functional.trainable_variables:
        raise ConfigError(
            "model has no weights to train; allowed: one with a layer that is trainable and has weights"
        )
    if softmax_of(functional) is not None:
        return functional
    _check_logits(functional)
    taken = {layer.name for layer in functional.layers}
    name = next(n for n in ("probabilities", "probabilities_of_the_run") if n not in taken)
    softmax = keras.layers.Activation("softmax", dtype="float32", name=name)
    return keras.Model(functional.inputs[0], softmax(functional.outputs[0]), name=functional.name)


def softmax_of(model: keras.Model) -> Any:
    """Finds the softmax that a model ends in.

    Args:
        model: functional.

    Returns:
        The layer, or the operation of `keras.ops`, that computes it, also inside a model that is the last layer; None if
        the model ends in something else.
    """
    last = _last_operation(model)
    if isinstance(last, keras.Model):
        return softmax_of(last)
    # A layer of the user's own may compute something after its activation.
    is_softmax = getattr(last, "activation", None) is keras.activations.softmax and is_of_keras(last)
    return last if is_softmax or type(last).__name__ == "Softmax" else None


def logits_before_softmax(model: keras.Model) -> keras.KerasTensor | None:
    """Finds the input of the softmax that a model ends in.

    Args:
        model: functional.

    Returns:
        The tensor; None if the model does not end in a layer or operation that computes a softmax and nothing else.
    """
    last = _last_operation(model)
    only = type(last).__name__ == "Softmax" or isinstance(last, keras.layers.Activation)
    if isinstance(last, keras.Model) or softmax_of(model) is None or not only:
        return None
    node = last._inbound_nodes[model.outputs[0]._keras_history.node_index]
    return node.input_tensors[0]


def digest(model: keras.Model) -> str:
    """Makes eight letters and digits that stand for the layers of `model`, their settings and the shapes of their weights.

    The names of the layers do not count, because Keras numbers them anew for each model, nor do their seeds, which Keras
    draws where none is given: a run that resumes takes its random numbers from the state that it saved.
    """
    return hashlib.sha256(json.dumps(_described(model), default=str).encode()).hexdigest()[:8]


def _described(model: keras.Model) -> list[Any]:
    described: list[Any] = []
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            described.append(_described(layer))
        else:
            settings = _settings({"trainable": layer.trainable, **layer.get_config()})
            described.append(
                [type(layer).__name__, settings, [[list(w.shape), w.trainable] for w in layer.weights]]
            )
    return described


def _settings(config: Any) -> Any:
    """The configuration of a layer, without the names and seeds of the layer and of those within it."""
    if isinstance(config, (list, tuple)):
        return [_settings(x) for x in config]
    if not isinstance(config, dict):
        return config
    # Objects that are no layers have telling names, as dtype policies.
    left_out = ("name", "seed") if "trainable" in config else ()
    return {key: _settings(value) for key, value in config.items() if key not in left_out}


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
    return keras.Model(inputs[0], outputs[0], name=model.name)


def _last_operation(model: keras.Model) -> Any:
    """The layer, or the operation of `keras.ops`, whose output is that of the model."""
    return model.outputs[0]._keras_history.operation


def _check_layers(model: keras.Model) -> None:
    """Raises ConfigError if a layer cannot be made again from its configuration, as the run and its model file need."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            if not getattr(layer, "outputs", None):
                raise ConfigError(
                    f"model has the model {layer.name!r} inside, which is {type(layer).__name__}, a subclassed one; allowed: a"
                    " functional or Sequential one, or a Layer"
                )
            _check_layers(layer)
            continue
        if isinstance(layer, keras.layers.Lambda):
            raise ConfigError(
                f"model has the Lambda layer {layer.name!r}, whose function no file can hold safely; allowed: operations of"
                " keras.ops, or a registered Layer"
            )
        try:
            type(layer).from_config(layer.get_config())
        except Exception as error:
            raise ConfigError(
                f"model has the layer {layer.name!r}, and {type(layer).__name__}.from_config(layer.get_config()) fails"
                f" ({one_line(error)}); allowed: layers whose get_config returns all arguments of their constructor"
            ) from error


def _check_assignments(model: keras.Model) -> None:
    """Raises ConfigError where a layer sets its own trainable weights in training: a step keeps the optimizer's values only."""
    images = keras.ops.zeros((2, *model.input_shape[1:]), model.inputs[0].dtype)
    # What fails, fails in training as well.
    with keras.StatelessScope() as scope, contextlib.suppress(Exception):
        model(images, training=True)
    for variable in model.trainable_variables:
        if scope.get_current_value(variable) is not None:
            raise ConfigError(
                f"model has a layer that sets its trainable weight {variable.path!r} itself, as SpectralNormalization does; allowed:"
                " layers whose trainable weights only the optimizer changes"
            )


@dataclass(frozen=True)
class Draws:
    """Which generators, beside those of its own layers, a model draws from in training."""

    keras: bool = False  # from the global one of keras.random
    tensorflow: bool = False  # from those of tf.random


def draws_of(model: keras.Model) -> Draws:
    """Finds out what a functional model draws from. Layers of Keras and of this package have generators of their own."""
    known = ("keras.", "cifar10_trainer.")
    layers = [(x, getattr(x, "activation", None)) for x in model._flatten_layers()]
    if all(
        type(x).__module__.startswith(known) and (f is None or f.__module__.startswith(known))
        for x, f in layers
    ):
        return Draws()
    first = tf.constant([0, 0], tf.int64)
    generator = StepSeeds(first)

    @tf.function
    def call(images: tf.Tensor) -> None:
        with keras.StatelessScope():
            model(images, training=True)

    with contextlib.suppress(Exception), drawing_from(generator):  # what fails, fails in training as well
        graph = call.get_concrete_function(
            tf.TensorSpec((2, *model.input_shape[1:]), model.inputs[0].dtype)
        ).graph
        parts = graph.as_graph_def()
        nodes = [*parts.node, *(node for function in parts.library.function for node in function.node_def)]
        return Draws(generator.seed is not first, any(RANDOM_OPERATION.match(node.op) for node in nodes))
    return Draws()


def is_of_keras(operation: Any) -> bool:
    """Whether Keras made the layer or operation."""
    return type(operation).__module__.startswith("keras.")


def _check_logits(model: keras.Model) -> None:
    """Raises ConfigError where the outputs are probabilities, though no softmax is the last layer: a second one would follow."""
    images = np.random.default_rng(0).integers(0, 256, (2, *model.input_shape[1:]))
    images[0] = 0  # of noise alone a softmax may be sure, and the same
    outputs = model(keras.ops.cast(images, model.inputs[0].dtype), training=False)
    outputs = keras.ops.convert_to_numpy(keras.ops.cast(outputs, "float32"))
    depends = np.ptp(outputs, axis=0).max() > 0  # not those of a head that begins with zeros
    if depends and (outputs >= 0).all() and np.allclose(outputs.sum(axis=1), 1, atol=SUM_TOLERANCE):
        raise ConfigError(
            f"model returns probabilities, but its last layer, {_last_operation(model).name!r}, is no softmax; allowed: a softmax"
            ' at the very end, as Activation("softmax", dtype="float32"), or logits'
        )


def _check_ending(model: keras.Model) -> None:
    """Raises ConfigError if the model ends in an activation other than softmax, also inside its last layer."""
    last = _last_operation(model)
    if isinstance(last, keras.Model):
        _check_ending(last)
        return
    activation = getattr(last, "activation", None)
    if softmax_of(model) is None and activation not in (None, keras.activations.linear):
        name = getattr(activation, "__name__", str(activation))
        if not is_of_keras(last):
            raise ConfigError(
                f"model ends in {last.name!r}, a {type(last).__name__} with the activation {name}, after which it may compute"
                ' something else; allowed: a layer of Keras at the end, as Activation("softmax", dtype="float32"), or logits'
            )
        hint = ' (activation="softmax")' if name.startswith("softmax") else ""  # that of keras.ops is another
        raise ConfigError(f"model ends in the activation {name}; {ALLOWED}{hint}")
    if is_of_keras(last) and type(last).__name__ in ACTIVATIONS:
        raise ConfigError(f"model ends in the operation {type(last).__name__}; {ALLOWED}")
    if softmax_of(model) is not None and getattr(last, "activity_regularizer", None) is not None:
        raise ConfigError(
            f"model ends in {last.name!r}, whose activity_regularizer would act on the logits; allowed: none in the layer of the softmax"
        )
